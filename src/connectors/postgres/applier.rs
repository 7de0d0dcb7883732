//! The one writer of a stream: it owns the connection that has claimed it.
//!
//! Invariants:
//! * a transaction of changes ends with the move of the checkpoint, which fails when the claim is lost;
//! * after a failure in the middle of a part nothing more is written: the next claim begins anew;
//! * changes are committed without waiting for the disk; a position counts as durable when the target's flush position
//!   has passed the insert position that was read after the commit. All other transactions wait for the disk.

mod encode;
mod execute;

use super::checkpoint::{self, Claim};
use super::connect::Session;
use super::ddl;
use super::lsn::Lsn;
use super::statements::TableWriter;
use super::target::{failed, within};
use crate::engine::batch::{Batch, Part};
use crate::engine::coalesce::{self, TableRule};
use crate::engine::error::{Error, Result, reason};
use crate::engine::roles::{Applied, Apply, ApplyMode};
use crate::engine::table::{MappedTable, QualifiedName, TableState};
use execute::{Executor, Statements};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_postgres::Statement;
use tokio_postgres::types::PgLsn;

/// Bound for each call but the writing of changes, which takes as long as it takes.
const CONTROL_LIMIT: Duration = Duration::from_secs(90);
/// Committed positions that may wait to become durable; with more of them the newest share one place.
const WAITING: usize = 1024;
/// How often the flush position is asked for.
const FLUSH_LOOK: Duration = Duration::from_millis(10);

/// Applies changes to PostgreSQL.
pub struct PostgresApplier {
    session: Session,
    claim: Claim,
    mode: ApplyMode,
    /// The checkpoint as committed; `None` before the first.
    position: Option<Lsn>,
    writers: HashMap<u32, TableWriter>,
    statements: Statements,
    move_position: Statement,
    log_positions: Statement,
    durability: Durability,
    /// A transaction of changes is open.
    in_transaction: bool,
    /// Rows that the open transaction writes, this part's included.
    uncommitted_rows: i64,
    /// The last part left its transaction open.
    part_is_open: bool,
    /// A part has failed or was cancelled: what the target holds of it is not known.
    broken: bool,
    /// Outcomes of the parts in flight.
    outcomes: VecDeque<Applied>,
}

impl PostgresApplier {
    /// A writer whose claim was just made on this session; `position` is the checkpoint that was read then.
    pub(super) async fn new(session: Session, claim: Claim, mode: ApplyMode, position: Option<Lsn>) -> Result<Self> {
        let move_position = checkpoint::prepare_move(&session).await?;
        let log_positions = session
            .prepare("SELECT pg_current_wal_insert_lsn(), pg_current_wal_flush_lsn()")
            .await
            .map_err(failed("prepare to read the target's log position"))?;
        Ok(Self {
            session,
            claim,
            mode,
            position,
            writers: HashMap::new(),
            statements: Statements::default(),
            move_position,
            log_positions,
            // The claim was flushed to disk, and with it all that was committed before.
            durability: Durability::new(position),
            in_transaction: false,
            uncommitted_rows: 0,
            part_is_open: false,
            broken: false,
            outcomes: VecDeque::new(),
        })
    }

    fn usable(&self) -> Result<()> {
        if self.broken {
            return Err(Error::bug("a writer was used after it had failed"));
        }
        Ok(())
    }

    /// Begins a transaction that is on disk when it is committed.
    async fn begin(&self) -> Result<()> {
        self.usable()?;
        if self.in_transaction {
            return Err(Error::bug("the checkpoint was written in the middle of a transaction"));
        }
        let sql = format!("BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL synchronous_commit = on; {}", ddl::LOCK_TIMEOUT);
        self.session.batch_execute(&sql).await.map_err(failed("begin a transaction"))
    }

    /// Proves the claim and commits, or rolls back.
    async fn end<T>(&self, result: Result<T>) -> Result<T> {
        let result = match result {
            Ok(value) => self.claim.check(&self.session).await.map(|()| value),
            Err(error) => Err(error),
        };
        match result {
            Ok(value) => {
                self.session.batch_execute("COMMIT").await.map_err(failed("commit"))?;
                Ok(value)
            }
            Err(error) => {
                // The error is what matters; a lost connection has rolled back by itself.
                let _ = self.session.batch_execute("ROLLBACK").await;
                Err(error)
            }
        }
    }

    async fn begin_copy_inside(&self, table: &MappedTable, truncate: bool) -> Result<i64> {
        let session = &self.session;
        ddl::create_missing(session, table).await?;
        let known = self.claim.known_table(session, table).await?;
        if ddl::has_rows(session, &table.target).await? {
            // Rows of an earlier copy by this very stream that was not finished are its own.
            let unfinished =
                known.is_some_and(|known| known.generation > 0 && !matches!(known.state, TableState::CatchingUp | TableState::Ready));
            if !truncate && !unfinished {
                return Err(Error::stop(
                    reason::TARGET_TABLE_NOT_EMPTY,
                    format!("target table {} holds rows: empty it, or set snapshot.existingRows to Truncate", table.target),
                ));
            }
            ddl::truncate(session, &table.target).await?;
        }
        self.claim.begin_table(session, table).await
    }

    async fn apply_part(
        &mut self,
        part: &Part<Lsn>,
        due: &(dyn Fn(u32, usize) -> bool + Send + Sync),
        joined: &[QualifiedName],
    ) -> Result<Applied> {
        if part.continues != self.part_is_open || (part.open && !joined.is_empty()) {
            return Err(Error::bug("a part does not continue where the one before has ended"));
        }
        self.check_versions(&part.batch, due)?;
        let writers: Vec<Option<&TableWriter>> = part.batch.tables().iter().map(|version| self.writers.get(&version.id)).collect();
        let plan = coalesce::plan(&part.batch, &rules(&writers), |change, index| due(part.batch.table(change).id, index))?;
        self.uncommitted_rows += plan.rows();
        let checkpoint = if part.open { None } else { Some(self.checkpoint_move(*part.end())?) };
        if plan.steps.is_empty() && !self.in_transaction {
            let still = checkpoint.as_ref().is_none_or(|checkpoint| checkpoint.to <= checkpoint.from);
            if still && joined.is_empty() {
                self.part_is_open = part.open;
                return Ok(applied_by(Applied::default(), part));
            }
        } else if checkpoint.as_ref().is_some_and(|checkpoint| checkpoint.to < checkpoint.from) {
            return Err(Error::bug("changes came from before the checkpoint"));
        }

        let mut executor = Executor::new(&self.session, &mut self.statements, &part.batch, &writers);
        if !self.in_transaction {
            executor.command(begin_changes(self.mode)).await?;
            self.in_transaction = true;
        }
        executor.run(&plan).await?;
        if let Some(checkpoint) = &checkpoint {
            if !joined.is_empty() {
                executor.drain().await?;
                self.claim.join(&self.session, joined).await?;
            }
            executor.move_checkpoint(&self.move_position, &self.claim, checkpoint).await?;
        }
        executor.drain().await?;
        let (applied, moved) = (executor.applied, executor.moved);
        drop(executor);
        self.part_is_open = part.open;
        if let Some(checkpoint) = checkpoint {
            if !moved {
                return Err(self.claim.lost(&self.session, "the checkpoint").await);
            }
            self.commit_changes(checkpoint.to.max(checkpoint.from)).await?;
        }
        Ok(applied_by(applied, part))
    }

    /// Where the checkpoint goes from here.
    fn checkpoint_move(&self, to: Lsn) -> Result<CheckpointMove> {
        let from = self.position;
        let from = from.ok_or_else(|| Error::bug("the checkpoint was moved before its first position was written"))?;
        Ok(CheckpointMove { from, to, rows: self.uncommitted_rows })
    }

    /// Rows come under the versions that were prepared. Under another one they can be skipped, not written.
    fn check_versions(&self, batch: &Batch, due: &(dyn Fn(u32, usize) -> bool + Send + Sync)) -> Result<()> {
        for (version, number) in batch.tables().iter().zip(0u32..) {
            let Some(writer) = self.writers.get(&version.id) else { continue };
            let difference = match &version.differs {
                Some(difference) => difference.as_str(),
                None if writer.version.columns == version.columns => continue,
                None => "its columns are not those that were prepared",
            };
            if batch.changes().iter().enumerate().any(|(index, change)| change.table == number && due(version.id, index)) {
                return Err(Error::stop(reason::SCHEMA_CHANGED, format!("table {}: {difference}", version.name)));
            }
        }
        Ok(())
    }

    /// Commits and reads the log's positions in one round trip.
    async fn commit_changes(&mut self, position: Lsn) -> Result<()> {
        let commit = self.session.batch_execute("COMMIT");
        let look = self.session.query_one(&self.log_positions, &[]);
        let (committed, looked) = futures::future::join(commit, look).await;
        committed.map_err(failed("commit changes"))?;
        self.in_transaction = false;
        self.uncommitted_rows = 0;
        self.position = Some(position);
        let row = looked.map_err(failed("read the target's log position"))?;
        self.durability.committed(position, Lsn(row.get::<_, PgLsn>(0).into()));
        self.durability.flushed(Lsn(row.get::<_, PgLsn>(1).into()));
        Ok(())
    }

    async fn roll_back(&mut self) {
        // Best effort: a lost connection has rolled back by itself, and this writer is not used again.
        let _ = tokio::time::timeout(Duration::from_secs(5), self.session.batch_execute("ROLLBACK")).await;
    }
}

impl Apply for PostgresApplier {
    type Position = Lsn;

    async fn intend_log(&mut self) -> Result<()> {
        within(CONTROL_LIMIT, "note the slot to come", async {
            self.begin().await?;
            let written = self.claim.intend_log(&self.session).await;
            self.end(written).await
        })
        .await
    }

    async fn initialize(&mut self, position: &Lsn, timeline: i64) -> Result<()> {
        within(CONTROL_LIMIT, "write the first checkpoint", async {
            self.begin().await?;
            let written = self.claim.initialize(&self.session, *position, timeline).await;
            self.end(written).await
        })
        .await?;
        self.position = Some(*position);
        self.durability = Durability::new(Some(*position));
        Ok(())
    }

    async fn set_timeline(&mut self, timeline: i64) -> Result<()> {
        within(CONTROL_LIMIT, "write the timeline", async {
            self.begin().await?;
            let written = self.claim.set_timeline(&self.session, timeline).await;
            self.end(written).await
        })
        .await
    }

    async fn begin_copy(&mut self, table: &MappedTable, truncate: bool) -> Result<i64> {
        within(CONTROL_LIMIT, "begin a copy", async {
            self.begin().await?;
            let generation = self.begin_copy_inside(table, truncate).await;
            self.end(generation).await
        })
        .await
    }

    async fn set_state(&mut self, table: &MappedTable, state: TableState, position: Option<&Lsn>) -> Result<()> {
        within(CONTROL_LIMIT, "write a table's state", async {
            self.begin().await?;
            let written = self.claim.set_state(&self.session, table, state, position.copied()).await;
            self.end(written).await
        })
        .await
    }

    async fn forget(&mut self, tables: &[QualifiedName]) -> Result<()> {
        within(CONTROL_LIMIT, "forget tables", async {
            self.begin().await?;
            let written = self.claim.forget(&self.session, tables).await;
            self.end(written).await
        })
        .await
    }

    async fn done_ranges(&mut self, table: &MappedTable, generation: i64) -> Result<Vec<i32>> {
        self.usable()?;
        let read = self.claim.done_ranges(&self.session, table.source(), generation);
        within(CONTROL_LIMIT, "read the copied ranges", read).await
    }

    async fn prepare(&mut self, tables: &[MappedTable]) -> Result<()> {
        self.usable()?;
        self.statements.clear();
        self.writers.clear();
        for table in tables {
            let present = within(CONTROL_LIMIT, "read the target table", ddl::describe(&self.session, &table.target)).await?;
            let Some(present) = present else {
                return Err(Error::stop(reason::TARGET_TABLE_INCOMPATIBLE, format!("target table {} is gone", table.target)));
            };
            ddl::check_compatible(table, &present)?;
            self.writers.insert(table.version.id, TableWriter::new(table, &present, self.mode)?);
        }
        Ok(())
    }

    async fn apply(
        &mut self,
        part: Arc<Part<Lsn>>,
        due: &(dyn Fn(u32, usize) -> bool + Send + Sync),
        joined: &[QualifiedName],
    ) -> Result<()> {
        self.usable()?;
        // Also when the caller drops this future in the middle.
        self.broken = true;
        match self.apply_part(&part, due, joined).await {
            Ok(applied) => {
                self.broken = false;
                self.outcomes.push_back(applied);
                Ok(())
            }
            Err(error) => {
                self.roll_back().await;
                Err(error)
            }
        }
    }

    fn has_room(&self) -> bool {
        self.outcomes.is_empty()
    }

    async fn applied(&mut self) -> Result<Option<Applied>> {
        Ok(self.outcomes.pop_front())
    }

    async fn advance(&mut self, position: &Lsn, joined: &[QualifiedName]) -> Result<()> {
        self.usable()?;
        let idle = Part::idle(*position);
        let apply = self.apply(Arc::new(idle), &|_, _| false, joined);
        within(CONTROL_LIMIT, "advance the checkpoint", apply).await?;
        self.applied().await.map(|_| ())
    }

    async fn durable(&mut self) -> Result<Option<Lsn>> {
        self.usable()?;
        if self.durability.wants_look() {
            let look = async { self.session.query_one(&self.log_positions, &[]).await.map_err(failed("read the target's log position")) };
            let row = within(CONTROL_LIMIT, "read the target's log position", look).await?;
            self.durability.flushed(Lsn(row.get::<_, PgLsn>(1).into()));
        }
        Ok(self.durability.durable)
    }

    async fn abort(self) {
        if self.broken {
            // A statement may still run on the server, which would notice the closed socket only at its end.
            let _ = self.session.cancel().await;
        }
        let _ = self.session.batch_execute("ROLLBACK").await;
    }

    fn mode(&self) -> ApplyMode {
        self.mode
    }
}

/// From where to where a checkpoint moves; not back, and not at all when `to` lies before.
pub(super) struct CheckpointMove {
    pub from: Lsn,
    pub to: Lsn,
    /// Rows that the transaction writes.
    pub rows: i64,
}

fn applied_by(applied: Applied, part: &Part<Lsn>) -> Applied {
    Applied { committed: !part.open, ..applied }
}

/// Opens a transaction of changes. Without replica role constraints that can wait for the end do: the source may have
/// checked them there.
fn begin_changes(mode: ApplyMode) -> &'static str {
    match mode {
        ApplyMode::Replica => "BEGIN ISOLATION LEVEL READ COMMITTED",
        ApplyMode::Ordered => "BEGIN ISOLATION LEVEL READ COMMITTED; SET CONSTRAINTS ALL DEFERRED",
    }
}

/// A table that is not prepared has no due changes; should there be one, running it fails.
fn rules<'a>(writers: &[Option<&'a TableWriter>]) -> Vec<TableRule<'a>> {
    let rule = |writer: &Option<&'a TableWriter>| TableRule {
        key: writer.map_or(&[][..], |writer| &writer.key),
        order: writer.map_or(coalesce::Order::Table, |writer| writer.order),
    };
    writers.iter().map(rule).collect()
}

/// Which committed positions are on disk.
struct Durability {
    durable: Option<Lsn>,
    /// Checkpoints with the end of the log right after their commit, ascending.
    waiting: VecDeque<(Lsn, Lsn)>,
    looked: Instant,
}

impl Durability {
    fn new(durable: Option<Lsn>) -> Self {
        Self { durable, waiting: VecDeque::new(), looked: Instant::now() }
    }

    fn committed(&mut self, position: Lsn, insert: Lsn) {
        let entry = (position, ddl::record_end(insert));
        if self.waiting.len() >= WAITING {
            self.waiting.pop_back();
        }
        self.waiting.push_back(entry);
    }

    fn flushed(&mut self, flush: Lsn) {
        self.looked = Instant::now();
        while let Some((position, _)) = self.waiting.pop_front_if(|(_, end)| *end <= flush) {
            self.durable = Some(position);
        }
    }

    fn wants_look(&self) -> bool {
        !self.waiting.is_empty() && self.looked.elapsed() >= FLUSH_LOOK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_durable_when_the_flush_has_passed_its_commit() {
        let mut durability = Durability::new(Some(Lsn(1)));
        durability.committed(Lsn(10), Lsn(1000));
        durability.committed(Lsn(20), Lsn(2000));
        durability.flushed(Lsn(999));
        assert_eq!(durability.durable, Some(Lsn(1)));
        durability.flushed(Lsn(1000));
        assert_eq!(durability.durable, Some(Lsn(10)));
        durability.flushed(Lsn(5000));
        assert_eq!((durability.durable, durability.wants_look()), (Some(Lsn(20)), false));
    }

    #[test]
    fn waiting_positions_are_bounded_and_the_oldest_still_become_durable() {
        let mut durability = Durability::new(None);
        for number in 0..5000 {
            durability.committed(Lsn(number), Lsn(number));
        }
        assert_eq!(durability.waiting.len(), WAITING);
        durability.flushed(Lsn(100));
        assert_eq!(durability.durable, Some(Lsn(100)));
        durability.flushed(Lsn(4999));
        assert_eq!(durability.durable, Some(Lsn(4999)));
    }
}
