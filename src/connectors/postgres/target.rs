//! PostgreSQL as a target.

mod check;

use super::applier::{PostgresApplier, Prepared};
use super::checkpoint::{Claim, claim, requests, schema};
use super::compare::PostgresCompare;
use super::connect::{Session, Side, connect};
use super::ddl;
use super::endpoint::Endpoint;
use super::errors::classify;
use super::finish;
use super::load::{self, Loader, Loaders};
use super::lsn::Lsn;
use super::pgoutput::binary_allowed;
use super::register::PostgresRegister;
use super::relate;
use super::session::UNLIMITED;
use crate::engine::error::{Error, Result, reason};
use crate::engine::request::{RequestRecord, RequestState};
use crate::engine::roles::{
    ApplyMode, Builders, BulkFormat, BulkStream, Claimed, Fed, Owner, Range, SourceIdentity, StreamKey, Target, Tell,
};
use crate::engine::structure::SequenceValue;
use crate::engine::table::{Column, MappedTable};
use crate::engine::verify::Compare;
use futures::StreamExt as _;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio_postgres::error::SqlState;

/// Bound for a claim, the ends of old backends included.
const CLAIM_LIMIT: Duration = Duration::from_secs(120);
/// Bound for all checks.
const CHECK_LIMIT: Duration = Duration::from_secs(120);

/// Settings of the writer's session.
///
/// Rows are found by their key: a plan that was made while a table was empty must not read all of it when it has grown. The
/// cost that stands for a forbidden sequential scan would set off the just-in-time compiler.
const WRITER_SETTINGS: &str = "SET enable_seqscan = off; SET jit = off";
/// Changes are committed without waiting for the disk (`PostgresApplier` knows what is durable), unless the user has chosen
/// otherwise with a session parameter of the endpoint.
const SYNCHRONOUS_COMMIT: &str = "synchronous_commit";

/// A PostgreSQL database as the target of one Mirror.
#[derive(Clone)]
pub struct PostgresTarget {
    endpoint: Endpoint,
    owner: Owner,
    apply_connections: usize,
    pub(super) triggers_accepted: bool,
    loaders: Arc<Loaders>,
    /// What [`Target::connect`] has opened for the next claim.
    writers: Arc<Mutex<Option<Writers>>>,
    /// Sessions that look and that loaders begin with, between two uses.
    idle: Arc<Mutex<Vec<Session>>>,
}

/// Sessions for changes, each with its backend's pid, and how they write.
struct Writers {
    sessions: Vec<(Session, i32)>,
    mode: ApplyMode,
}

impl PostgresTarget {
    /// The database behind `endpoint`, written for `owner`.
    #[must_use]
    pub fn new(endpoint: Endpoint, owner: Owner) -> Self {
        Self {
            endpoint,
            owner,
            apply_connections: 1,
            triggers_accepted: false,
            loaders: Arc::default(),
            writers: Arc::default(),
            idle: Arc::default(),
        }
    }

    /// The same with another number of connections that changes are applied on; 1 otherwise. More than one are used only
    /// with replica role: without it changes are written row by row in commit order.
    #[must_use]
    pub fn with_apply_connections(mut self, connections: usize) -> Self {
        self.apply_connections = connections.max(1);
        self
    }

    /// The same with triggers and foreign key actions of target tables allowed to fire, where the role may not switch them
    /// off; otherwise such tables are refused.
    #[must_use]
    pub fn with_triggers_accepted(mut self, accepted: bool) -> Self {
        self.triggers_accepted = accepted;
        self
    }

    /// Opens the sessions for changes, and makes schema `_sluice` when it is missing.
    async fn open_writers(&self) -> Result<Writers> {
        let opened = futures::future::try_join_all((0..self.apply_connections).map(|_| self.writer_session())).await?;
        let mode = opened.iter().all(|(.., mode)| *mode == ApplyMode::Replica);
        let mode = if mode { ApplyMode::Replica } else { ApplyMode::Ordered };
        // Without replica role changes are written one by one in commit order.
        let used = if mode == ApplyMode::Replica { self.apply_connections } else { 1 };
        let sessions: Vec<(Session, i32)> = opened.into_iter().take(used).map(|(session, pid, _)| (session, pid)).collect();
        schema::ensure(&sessions[0].0).await?;
        Ok(Writers { sessions, mode })
    }

    /// A session for changes with its backend's pid, and how it writes.
    pub(super) async fn writer_session(&self) -> Result<(Session, i32, ApplyMode)> {
        let session = connect(&self.endpoint, Side::Target, "sluice apply").await?;
        let settings = writer_settings(&self.endpoint);
        // Polled together: one round trip for all.
        let (unlimited, set, mode, pid, writable) = futures::future::join5(
            session.query(UNLIMITED, &[]),
            session.batch_execute(&settings),
            choose_mode(&session),
            session.query_one("SELECT pg_backend_pid()", &[]),
            check_writable(&session),
        )
        .await;
        writable?;
        unlimited.map_err(failed("set up the session"))?;
        set.map_err(failed("set up the session"))?;
        let pid = pid.map_err(failed("set up the session"))?.get(0);
        Ok((session, pid, mode?))
    }

    pub(super) async fn session(&self, application_name: &str) -> Result<Session> {
        let session = connect(&self.endpoint, Side::Target, application_name).await?;
        within(CHECK_LIMIT, "set up the session", async { session.query(UNLIMITED, &[]).await.map_err(failed("set up the session")) })
            .await?;
        Ok(session)
    }

    /// A session that has nothing open. After success it is given back with [`Self::give_back`].
    async fn idle_session(&self) -> Result<Session> {
        loop {
            let idle = guard(&self.idle).pop();
            match idle {
                Some(session) if session.is_closed() => {}
                Some(session) => return Ok(session),
                None => return self.session("sluice check").await,
            }
        }
    }

    fn give_back(&self, session: Session) {
        guard(&self.idle).push(session);
    }
}

impl Target for PostgresTarget {
    type Position = Lsn;
    type Applier = PostgresApplier;
    type Register = PostgresRegister;

    async fn connect(&self) -> Result<()> {
        let opening = futures::future::try_join(self.open_writers(), self.idle_session());
        let (writers, idle) = within(CLAIM_LIMIT, "open sessions on the target", opening).await?;
        *guard(&self.writers) = Some(writers);
        self.give_back(idle);
        Ok(())
    }

    async fn check(&self, source: &SourceIdentity, tables: &[MappedTable], fed: &[Fed]) -> Result<Vec<String>> {
        let session = self.idle_session().await?;
        let checked = within(CHECK_LIMIT, "check the target", async {
            let (writable, mode) = futures::future::join(check_writable(&session), choose_mode(&session)).await;
            writable?;
            let mapping = check::Mapping { source, tables, fed };
            check::check(&session, &self.endpoint, &self.owner, &mapping, mode?, self.triggers_accepted).await
        })
        .await?;
        for table in &checked.missing {
            within(CHECK_LIMIT, "rehearse the making of a table", ddl::structure::rehearse(&session, table)).await?;
        }
        if !checked.missing.is_empty() {
            // They are copied next.
            self.give_back(session);
        }
        Ok(checked.notes)
    }

    async fn claim(&self, key: &StreamKey, owner: &Owner, held: Option<i64>) -> Result<(Claimed<Lsn>, PostgresApplier)> {
        self.loaders.clear();
        within(CLAIM_LIMIT, "claim the stream", async {
            let opened = guard(&self.writers).take();
            let Writers { sessions, mode } = match opened {
                Some(writers) => writers,
                None => self.open_writers().await?,
            };
            let pids: Vec<i32> = sessions.iter().map(|(_, pid)| *pid).collect();
            let lanes = futures::future::try_join_all(sessions.iter().map(|(session, _)| Prepared::on(session)));
            let claim = claim::Claiming { client: &sessions[0].0, pids: &pids, key, owner, held };
            let (claimed, prepared) = futures::future::join(claim.run(), lanes).await;
            let (claimed, prepared) = (claimed?, prepared?);
            let position = claimed.checkpoint.as_ref().map(|checkpoint| checkpoint.position);
            let sessions = sessions.into_iter().zip(prepared).map(|((session, pid), prepared)| (session, pid, prepared));
            let applier = PostgresApplier::new(self, sessions.collect(), claimed.claim.clone(), mode, position);
            Ok((claimed, applier))
        })
        .await
    }

    async fn register(&self, claim: &Claim) -> Result<PostgresRegister> {
        let session = self.session("").await?;
        let mode = load::set_up(&session, claim).await?;
        Ok(PostgresRegister::new(Arc::new(session), claim.clone(), mode))
    }

    async fn bulk_format(&self, table: &MappedTable) -> Result<BulkFormat> {
        let session = self.idle_session().await?;
        let present = within(CHECK_LIMIT, "read the target table", ddl::describe(&session, &table.target)).await?;
        self.give_back(session);
        Ok(match present {
            Some(present) if binary_fits(table, &present) => BulkFormat::PostgresBinary,
            _ => BulkFormat::PostgresText,
        })
    }

    async fn load(
        &self,
        claim: &Claim,
        table: &MappedTable,
        generation: i64,
        range: &Range,
        format: BulkFormat,
        rows: BulkStream,
    ) -> Result<u64> {
        let mut rows = rows.peekable();
        let loader = async {
            let loader = match self.loaders.take() {
                Some(loader) => loader,
                None => Loader::new(self.idle_session().await?, claim).await?,
            };
            loader.begin(claim).await.map(|()| loader)
        };
        // The source begins to send meanwhile; a failure there comes with the rows.
        let sending = async {
            Pin::new(&mut rows).peek().await;
            Ok(())
        };
        let (loader, ()) = futures::future::try_join(loader, sending).await?;
        let loaded = loader.load(claim, table, generation, range, format, Box::pin(rows)).await?;
        self.loaders.give_back(loader);
        Ok(loaded)
    }

    async fn finish(&self, claim: &Claim, table: &MappedTable, values: &[SequenceValue], builders: Builders, tell: Tell<'_>) -> Result<()> {
        self.loaders.clear();
        guard(&self.idle).clear();
        finish::finish(&finish::Finishing { target: self, claim, table, builders, tell }, values).await
    }

    async fn relate(&self, claim: &Claim, tables: &[MappedTable], tell: Tell<'_>) -> Result<Vec<String>> {
        let session = self.session("").await?;
        relate::relate(&session, claim, tables, &self.endpoint.username, tell).await
    }

    async fn end_request(&self, claim: &Claim, id: &str, state: RequestState, message: &str) -> Result<Vec<RequestRecord>> {
        let session = self.session("sluice request").await?;
        within(CLAIM_LIMIT, "end a request", async {
            let begin = "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL synchronous_commit = on; SET LOCAL lock_timeout = '15s'";
            session.batch_execute(begin).await.map_err(failed("begin a transaction"))?;
            claim.end(&session, id, state, message).await?;
            let records = requests::read(&session, &claim.key).await?;
            claim.check(&session).await?;
            session.batch_execute("COMMIT").await.map_err(failed("commit the end of a request"))?;
            Ok(records)
        })
        .await
    }

    fn compare(&self) -> Option<impl Compare + 'static> {
        Some(PostgresCompare::new(self.endpoint.clone(), Side::Target))
    }
}

/// Binary only if every column is of the same built-in type on both sides, of a kind whose binary form means the same
/// everywhere (engine rule: a binary integer taken for a float corrupts silently).
fn binary_fits(table: &MappedTable, present: &ddl::TargetTable) -> bool {
    let same = |column: &Column| present.column(&column.name).is_some_and(|target| target.type_name == column.type_name);
    binary_allowed(std::slice::from_ref(table)) && table.version.columns.iter().all(same)
}

fn writer_settings(endpoint: &Endpoint) -> String {
    let chosen = endpoint.parameters.keys().any(|name| name.eq_ignore_ascii_case(SYNCHRONOUS_COMMIT));
    if chosen { WRITER_SETTINGS.to_owned() } else { format!("{WRITER_SETTINGS}; SET {SYNCHRONOUS_COMMIT} = off") }
}

/// What a panicking holder leaves is whole: each value is set in one step.
fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn check_writable(session: &Session) -> Result<()> {
    let row = session
        .query_one("SELECT pg_is_in_recovery(), current_setting('transaction_read_only') = 'on'", &[])
        .await
        .map_err(failed("look whether the target takes writes"))?;
    let (standby, read_only): (bool, bool) = (row.get(0), row.get(1));
    if standby || read_only {
        let why = if standby { "it is a standby" } else { "default_transaction_read_only is on" };
        return Err(Error::retry(reason::TARGET_READ_ONLY, format!("the target accepts no writes: {why}")));
    }
    Ok(())
}

/// Takes replica role when the role may, so that triggers and foreign keys of the target do not fire.
pub(super) async fn choose_mode(session: &Session) -> Result<ApplyMode> {
    match session.batch_execute("SET session_replication_role = replica").await {
        Ok(()) => Ok(ApplyMode::Replica),
        Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Ok(ApplyMode::Ordered),
        Err(error) => Err(failed("set up the session")(error)),
    }
}

/// Makes an error of a target's answer.
pub(super) fn failed<W: AsRef<str>>(what: W) -> impl FnOnce(tokio_postgres::Error) -> Error {
    move |error| classify(Side::Target, what.as_ref(), &error)
}

/// Bounds the steps of a call. When the limit is reached, the session must not be used again.
pub(super) async fn within<T>(limit: Duration, what: &str, steps: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(limit, steps).await {
        Ok(done) => done,
        Err(_) => Err(Error::retry(reason::TARGET_UNREACHABLE, format!("{what}: no answer from the target within {limit:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_may_choose_to_wait_for_the_disk() {
        let endpoint = |parameters: &[(&str, &str)]| Endpoint {
            host: "target".into(),
            domain: None,
            port: 5432,
            database: "shop".into(),
            username: "shop".into(),
            password: crate::connectors::postgres::endpoint::Secret(String::new()),
            tls: crate::connectors::postgres::TlsMode::Disable,
            ca: None,
            client_certificate: None,
            parameters: parameters.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
            connect_timeout: Duration::from_secs(1),
        };
        assert!(writer_settings(&endpoint(&[])).ends_with("SET synchronous_commit = off"));
        assert!(writer_settings(&endpoint(&[("work_mem", "8MB")])).ends_with("SET synchronous_commit = off"));
        assert_eq!(writer_settings(&endpoint(&[("Synchronous_Commit", "on")])), WRITER_SETTINGS);
    }
}
