//! Writes what becomes of tables and their copies, each in a transaction that ends with the proof of the claim and is on disk when it is
//! answered.

use super::checkpoint::Claim;
use super::connect::Session;
use super::ddl;
use super::lsn::Lsn;
use super::target::{failed, within};
use crate::engine::error::{Error, Result, reason};
use crate::engine::register::Register;
use crate::engine::request::{RequestChange, RequestRecord};
use crate::engine::roles::ApplyMode;
use crate::engine::table::{Altered, MappedTable, QualifiedName, TableState};
use futures::future::{join, join3};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// Bound for each call that does not write rows, which takes as long as it takes.
pub(super) const CONTROL_LIMIT: Duration = Duration::from_secs(90);
/// Bound for the emptying of a table, which may have to be done row by row, and for altering one, which may write all rows anew.
pub(super) const EMPTY_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// On a session that the next claim ends.
pub struct PostgresRegister {
    session: Arc<Session>,
    claim: Claim,
    mode: ApplyMode,
}

impl PostgresRegister {
    pub(super) fn new(session: Arc<Session>, claim: Claim, mode: ApplyMode) -> Self {
        Self { session, claim, mode }
    }

    /// Begins a transaction that is on disk when it is committed.
    async fn begin(&self) -> Result<()> {
        let sql = format!("BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL synchronous_commit = on; {}", ddl::LOCK_TIMEOUT);
        self.session.batch_execute(&sql).await.map_err(failed("begin a transaction"))
    }

    async fn commit(&self) -> Result<()> {
        self.session.batch_execute("COMMIT").await.map_err(failed("commit"))
    }

    /// One statement that is bound to the claim by itself, and says so when the claim is lost: a transaction in one round trip.
    pub(super) async fn statement(&self, what: &str, written: impl Future<Output = Result<()>>) -> Result<()> {
        let transaction = async { Ok(join3(self.begin(), written, self.commit()).await) };
        let (begun, written, committed) = within(CONTROL_LIMIT, what, transaction).await?;
        begun?;
        written?;
        committed
    }

    /// Statements in a transaction. They are not sent before it has begun: outside of it each would stand for itself.
    pub(super) async fn statements(&self, what: &str, written: impl Future<Output = Result<()>>) -> Result<()> {
        within(CONTROL_LIMIT, what, async {
            self.begin().await?;
            let written = self.prove_behind(written).await;
            self.end(written).await
        })
        .await
    }

    /// Writes what is decided about requests. Returns all records, the newest first.
    pub(super) async fn record(&self, change: &RequestChange<'_, Lsn>) -> Result<Vec<RequestRecord>> {
        within(CONTROL_LIMIT, "record a request", async {
            self.begin().await?;
            let recorded = match self.claim.record(&self.session, change).await {
                Ok(records) => self.claim.check(&self.session).await.map(|()| records),
                Err(error) => Err(error),
            };
            self.end(recorded).await
        })
        .await
    }

    /// Statements that are sent together, and the proof of the claim with them, as the last one.
    async fn prove_behind<T>(&self, written: impl Future<Output = Result<T>>) -> Result<T> {
        let (written, proven) = join(written, self.claim.check(&self.session)).await;
        let written = written?;
        proven.map(|()| written)
    }

    /// Commits what has succeeded, or rolls back.
    async fn end<T>(&self, result: Result<T>) -> Result<T> {
        match result {
            Ok(value) => {
                self.commit().await?;
                Ok(value)
            }
            Err(error) => {
                // The error is what matters; a lost connection has rolled back by itself.
                let _ = self.session.batch_execute("ROLLBACK").await;
                Err(error)
            }
        }
    }

    async fn begin_copy_inside(&self, table: &MappedTable, beside: &[&MappedTable], truncate: bool, place: ddl::Place) -> Result<i64> {
        let session = &*self.session;
        let made = place.present.is_none();
        if !made {
            self.empty(table, beside, truncate).await?;
            Box::pin(self.fit(table)).await?;
        }
        let create = async { if made { ddl::create(session, table, place.has_schema).await } else { Ok(()) } };
        let written = async {
            let (created, generation) = join(create, self.claim.begin_table(session, table, made)).await;
            created.and(generation)
        };
        self.prove_behind(written).await
    }

    /// Empties a table, and with it those that foreign keys make one with it.
    async fn empty(&self, table: &MappedTable, beside: &[&MappedTable], truncate: bool) -> Result<()> {
        let session = &*self.session;
        let tables: Vec<&MappedTable> = std::iter::once(table).chain(beside.iter().copied()).collect();
        let names: Vec<&QualifiedName> = tables.iter().map(|table| &table.target).collect();
        let related = ddl::related(session, &names).await?;
        let members: Vec<&QualifiedName> = related.members.iter().map(|number| names[*number]).collect();
        let mut full = Vec::new();
        for number in &related.members {
            if ddl::has_rows(session, names[*number]).await? {
                self.check_may_empty(tables[*number], truncate).await?;
                full.push(names[*number]);
            }
        }
        for emptied in related.empty(session, &members, &full, self.mode).await? {
            // Nobody may take it for what it was, should its own copy never begin.
            if let Some(other) = tables.iter().find(|table| table.target == *emptied) {
                self.claim.begin_table(session, other, false).await?;
            }
        }
        Ok(())
    }

    /// Makes an empty table what the source's is now, when it holds an earlier version.
    async fn fit(&self, table: &MappedTable) -> Result<()> {
        let known = self.claim.known_table(&self.session, table).await?;
        let held = known.and_then(|known| table.recorded(&known.columns)).filter(|held| !table.is_like(held));
        let Some(held) = held else { return Ok(()) };
        let altered = Altered { table: table.clone(), initial: HashMap::new(), key_in_doubt: false };
        ddl::alter(&self.session, &held, &altered, true).await.map(drop)
    }

    /// Rows of an earlier copy by this very stream that was not finished are its own.
    async fn check_may_empty(&self, table: &MappedTable, truncate: bool) -> Result<()> {
        let known = self.claim.known_table(&self.session, table).await?;
        let unfinished =
            known.is_some_and(|known| known.generation > 0 && !matches!(known.state, TableState::CatchingUp | TableState::Ready));
        if truncate || unfinished {
            return Ok(());
        }
        Err(Error::stop(
            reason::TARGET_TABLE_NOT_EMPTY,
            format!("target table {} holds rows: empty it, or set snapshot.existingRows to Truncate", table.target),
        ))
    }
}

impl Register for PostgresRegister {
    type Position = Lsn;

    async fn begin_copy(&mut self, table: &MappedTable, beside: &[&MappedTable], truncate: bool) -> Result<i64> {
        within(EMPTY_LIMIT, "begin a copy", async {
            // Three round trips where the table is made: what is there; what is made and written; the commit.
            let (begun, place) = join(self.begin(), ddl::look(&self.session, table)).await;
            begun?;
            let generation = match place {
                Ok(place) => self.begin_copy_inside(table, beside, truncate, place).await,
                Err(error) => Err(error),
            };
            self.end(generation).await
        })
        .await
    }

    async fn set_state(&mut self, table: &MappedTable, state: TableState, position: Option<&Lsn>) -> Result<()> {
        self.statements("write a table's state", self.claim.set_state(&self.session, table, state, position.copied())).await
    }

    async fn done_ranges(&mut self, table: &MappedTable, generation: i64) -> Result<Vec<i32>> {
        let read = self.claim.done_ranges(&self.session, table.source(), generation);
        within(CONTROL_LIMIT, "read the copied ranges", read).await
    }
}
