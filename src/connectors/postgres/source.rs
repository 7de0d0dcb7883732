//! PostgreSQL as a source.

use super::altered::{self, Description, Seen};
use super::catalog;
use super::catalog::rules::Server;
use super::compare::PostgresCompare;
use super::connect::{Session, Side, connect};
use super::endpoint::Endpoint;
use super::log::{LogConfig, PostgresLog, StreamingPause};
use super::lsn::Lsn;
use super::pgoutput::{MESSAGE_PREFIX, binary_allowed};
use super::replication::{ReplicationClient, connect_replication};
use super::session::UNLIMITED;
use super::slot::NewSlot;
use super::snapshot::{Hands, PostgresSnapshot};
use super::{cleanup, errors, fed, fence, publication, slot};
use crate::engine::error::{Error, Result, reason};
use crate::engine::flow::lost_task;
use crate::engine::retention::Retention;
use crate::engine::roles::{BatchLimits, Fed, LogState, Proof, Selection, Source, SourceIdentity};
use crate::engine::spill::Room;
use crate::engine::structure::SequenceValue;
use crate::engine::table::{Altered, MappedTable, QualifiedName, TableVersion};
use crate::engine::verify::Compare;
use std::collections::HashMap;
use std::future::Future;
use std::ops::Deref;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::MutexGuard;
use tokio_util::task::AbortOnDropHandle;

/// Bound for a statement that has nothing to wait for but the server. Thousands of tables take seconds.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// Memory of the log, in bytes.
const MEMORY: usize = 64 * 1024 * 1024;
/// How long the creation of a slot waits for older transactions.
const CREATION_LIMIT: Duration = Duration::from_secs(600);
/// Oldest version that is read: it has TID range scans and pgoutput with all that is needed.
pub(super) const OLDEST_VERSION: i32 = 140_000;
/// Begins the names of our sessions; that of those which read from the log is this alone.
pub(super) const APPLICATION_NAME: &str = "sluice";

/// A database that is read, through one slot and one publication.
pub struct PostgresSource {
    endpoint: Endpoint,
    slot: String,
    publication: String,
    creation_limit: Duration,
    room: Room,
    pause: StreamingPause,
    /// The session for statements, kept between them.
    session: tokio::sync::Mutex<Option<Kept>>,
    /// The session that makes slots and then reads from the log. It has the fence's lock.
    walsender: Mutex<Option<ReplicationClient>>,
    /// Sessions for the snapshot of the slot that is to be made, being opened.
    hands: Mutex<Option<AbortOnDropHandle<Result<Hands>>>>,
    /// As [`Source::identity`] last saw it.
    server: Mutex<Option<Server>>,
    waiting: Mutex<Option<String>>,
    /// By table: what the last look at it has seen.
    seen: Mutex<HashMap<u32, Seen>>,
    /// As [`Source::identity`] last saw it: every replication session must be on that server and timeline.
    identity: Mutex<Option<SourceIdentity>>,
}

/// A session for statements.
struct Kept {
    session: Session,
    /// It has the fence's lock: what changes the source may run on it.
    fenced: bool,
}

/// The session for statements while it is used. It is put back with [`Self::keep`] after success only: whatever was left open
/// on it by an error or a future that was dropped goes with it.
struct Borrowed<'a> {
    place: MutexGuard<'a, Option<Kept>>,
    kept: Kept,
}

impl Borrowed<'_> {
    fn keep(mut self) {
        *self.place = Some(self.kept);
    }
}

impl Deref for Borrowed<'_> {
    type Target = Session;

    fn deref(&self) -> &Session {
        &self.kept.session
    }
}

impl PostgresSource {
    /// A source that is not connected yet.
    #[must_use]
    pub fn new(endpoint: Endpoint, slot: impl Into<String>, publication: impl Into<String>) -> Self {
        Self {
            endpoint,
            slot: slot.into(),
            publication: publication.into(),
            creation_limit: CREATION_LIMIT,
            room: Room::in_memory(MEMORY),
            pause: StreamingPause::default(),
            session: tokio::sync::Mutex::default(),
            walsender: Mutex::default(),
            hands: Mutex::default(),
            server: Mutex::default(),
            waiting: Mutex::default(),
            seen: Mutex::default(),
            identity: Mutex::default(),
        }
    }

    /// The same with another bound for the time that the creation of a slot waits for older transactions; 600 s otherwise.
    #[must_use]
    pub fn with_creation_limit(mut self, limit: Duration) -> Self {
        self.creation_limit = limit;
        self
    }

    /// The same with another room for the log; 64 MiB of memory otherwise.
    #[must_use]
    pub fn with_room(mut self, room: Room) -> Self {
        self.room = room;
        self
    }

    /// The same with what earlier sources of this stream know of pauses of streaming; nothing otherwise.
    #[must_use]
    pub fn with_streaming_pause(mut self, pause: StreamingPause) -> Self {
        self.pause = pause;
        self
    }

    /// The kept session or a new one, for what changes nothing.
    async fn session(&self) -> Result<Borrowed<'_>> {
        let mut place = self.session.lock().await;
        let kept = match place.take().filter(|kept| !kept.session.is_closed()) {
            Some(kept) => kept,
            None => Kept { session: connect(&self.endpoint, Side::Source, APPLICATION_NAME).await?, fenced: false },
        };
        Ok(Borrowed { place, kept })
    }

    /// The session that has the fence's lock, for what changes the source. Never another one: whoever has the lock now may be
    /// changing it too.
    async fn fenced(&self) -> Result<Borrowed<'_>> {
        let mut place = self.session.lock().await;
        let kept = place.take().filter(|kept| kept.fenced && !kept.session.is_closed());
        kept.map(|kept| Borrowed { place, kept }).ok_or_else(|| not_taken("statements"))
    }

    /// A replication session without limits of time, on whatever server.
    async fn open_walsender(&self) -> Result<ReplicationClient> {
        let mut client = connect_replication(&self.endpoint, APPLICATION_NAME).await?;
        client.simple_query(UNLIMITED).await?;
        Ok(client)
    }

    /// A replication session on the server that was seen last.
    async fn replication(&self) -> Result<ReplicationClient> {
        let mut client = self.open_walsender().await?;
        let expected = guard(&self.identity).clone();
        if let Some(expected) = expected {
            client.expect_system(&expected).await?;
        }
        Ok(client)
    }

    /// Makes a slot and takes its snapshot over, so that the replication session is free.
    async fn slot_with_snapshot(
        &self,
        client: &mut ReplicationClient,
        observer: &Session,
        name: &str,
        temporary: bool,
    ) -> Result<PostgresSnapshot> {
        let opening = guard(&self.hands).take();
        let hands = async {
            match opening {
                Some(opening) => opening.await.map_err(|error| lost_task(&error))?,
                None => Hands::open(&self.endpoint).await,
            }
        };
        let new = NewSlot { name, temporary, limit: self.creation_limit };
        let create = slot::create(client, observer, new, |waiting| *guard(&self.waiting) = waiting);
        let (created, hands) = futures::future::try_join(create, hands).await?;
        PostgresSnapshot::import(hands, &self.endpoint, created.consistent_point, &created.snapshot_name).await
    }

    /// Version and role, which the rules need.
    async fn server(&self, session: &Session) -> Result<Server> {
        const SERVER: &str = "SELECT current_setting('server_version_num')::int4, current_user::text";
        if let Some(server) = guard(&self.server).clone() {
            return Ok(server);
        }
        let row = answer(Side::Source, "identify the server", session.query_one(SERVER, &[])).await?;
        Ok(Server { version: row.get(0), role: row.get(1) })
    }

    /// The slot as it is compared with the position once more: the server would silently begin at a later one.
    async fn check_position(&self, session: &Session, from: Lsn) -> Result<()> {
        let slot = &self.slot;
        let Some(state) = slot::state(session, slot, &self.endpoint.database).await? else {
            return Err(Error::stop(reason::CHECKPOINT_WITHOUT_SLOT, format!("slot {slot} is not on the source")));
        };
        if let Some(lost) = state.lost {
            return Err(Error::stop(lost.reason, format!("the source has invalidated slot {slot} ({})", lost.cause)));
        }
        if state.confirmed > from {
            let message = format!("slot {slot} was confirmed up to {}, after {from}: the changes between are gone", state.confirmed);
            return Err(Error::stop(reason::CHECKPOINT_BEHIND_SLOT, message));
        }
        Ok(())
    }
}

impl Source for PostgresSource {
    type Position = Lsn;
    type Snapshot = PostgresSnapshot;
    type Log = PostgresLog;

    async fn identity(&self) -> Result<SourceIdentity> {
        // The name of a WAL file begins with its timeline; pg_control's may be that of an earlier checkpoint.
        const IDENTITY: &str = "SELECT current_setting('server_version_num')::int4, pg_is_in_recovery(), system_identifier::text,
            current_database()::text, current_user::text,
            CASE WHEN NOT pg_is_in_recovery() THEN ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int4::int8 END
            FROM pg_control_system()";
        let kept = guard(&self.walsender).take();
        let walsender = async {
            match kept {
                Some(client) => Some(client),
                // What needs one will say why there is none.
                None => self.open_walsender().await.ok(),
            }
        };
        let identify = async {
            let session = self.session().await?;
            let row = answer(Side::Source, "identify the server", session.query_one(IDENTITY, &[])).await?;
            session.keep();
            Ok::<_, Error>(row)
        };
        let (row, walsender) = futures::future::join(identify, walsender).await;
        let row = row?;
        let (version, is_standby): (i32, bool) = (row.get(0), row.get(1));
        if version < OLDEST_VERSION {
            let message = format!("the source is PostgreSQL {}; 14 is the oldest that can be read", version / 10_000);
            return Err(Error::stop(reason::SERVER_UNSUPPORTED, message));
        }
        if is_standby {
            // A failover may be on its way.
            return Err(Error::retry(reason::SERVER_UNSUPPORTED, "the source is a standby; name the primary server"));
        }
        let identity = SourceIdentity { system_identifier: row.get(2), database: row.get(3), timeline: row.get(5) };
        *guard(&self.server) = Some(Server { version, role: row.get(4) });
        if let Some(mut client) = walsender
            && client.expect_system(&identity).await.is_ok()
        {
            *guard(&self.walsender) = Some(client);
        }
        *guard(&self.identity) = Some(identity.clone());
        Ok(identity)
    }

    async fn tables(&self, selection: &Selection) -> Result<Vec<MappedTable>> {
        let session = self.session().await?;
        let server = self.server(&session).await?;
        let tables = catalog::tables(&session, &server, selection).await?;
        session.keep();
        Ok(tables)
    }

    async fn fed(&self, tables: &[MappedTable]) -> Result<Vec<Fed>> {
        let session = self.session().await?;
        let fed = fed::fed(&session, tables).await?;
        session.keep();
        Ok(fed)
    }

    async fn take<P: Proof>(&self, claim: &mut P) -> Result<()> {
        let walsender = async {
            let kept = guard(&self.walsender).take();
            match kept {
                Some(client) => Ok(client),
                None => self.replication().await,
            }
        };
        let (mut session, mut client) = futures::future::try_join(self.session(), walsender).await?;
        fence::take(&session, &mut client, &self.slot, claim).await?;
        session.kept.fenced = true;
        session.keep();
        *guard(&self.walsender) = Some(client);
        Ok(())
    }

    async fn publish(&self, tables: &[MappedTable], present: &[QualifiedName]) -> Result<()> {
        let session = self.fenced().await?;
        let server = self.server(&session).await?;
        publication::publish(&session, &server, &self.publication, &self.slot, tables, present).await?;
        session.keep();
        Ok(())
    }

    async fn published(&self) -> Result<Vec<QualifiedName>> {
        let session = self.session().await?;
        let server = self.server(&session).await?;
        let published = publication::published(&session, &server, &self.publication).await?;
        session.keep();
        Ok(published)
    }

    async fn log_state(&self) -> Result<Option<LogState<Lsn>>> {
        let session = self.session().await?;
        let state = slot::state(&session, &self.slot, &self.endpoint.database).await?;
        session.keep();
        if state.is_none() {
            // One will be made soon: what its snapshot begins with is opened meanwhile.
            guard(&self.hands).get_or_insert_with(|| {
                let endpoint = self.endpoint.clone();
                AbortOnDropHandle::new(tokio::spawn(async move { Hands::open(&endpoint).await }))
            });
        }
        Ok(state)
    }

    async fn create_log(&self) -> Result<PostgresSnapshot> {
        let mut client = guard(&self.walsender).take().ok_or_else(|| not_taken("slots"))?;
        let observer = self.session().await?;
        let snapshot = self.slot_with_snapshot(&mut client, &observer, &self.slot, false).await?;
        observer.keep();
        // Any command ends the transaction that the snapshot was exported from.
        client.simple_query("SELECT").await?;
        *guard(&self.walsender) = Some(client);
        Ok(snapshot)
    }

    async fn drop_log(&self) -> Result<()> {
        let session = self.fenced().await?;
        slot::drop(&session, &self.endpoint, &self.slot).await?;
        session.keep();
        Ok(())
    }

    async fn snapshot(&self) -> Result<PostgresSnapshot> {
        let name = fence::temporary_slot(&self.slot);
        // Sessions of its own: the others are needed by the stream, and the slot may have to wait for long.
        let (mut client, observer) =
            futures::future::try_join(self.replication(), connect(&self.endpoint, Side::Source, APPLICATION_NAME)).await?;
        let snapshot = self.slot_with_snapshot(&mut client, &observer, &name, true).await?;
        client.drop_slot(&name).await?;
        Ok(snapshot)
    }

    async fn open(&self, from: &Lsn, tables: &[MappedTable], limits: BatchLimits) -> Result<PostgresLog> {
        // Fenced, since a reader may be ended: an old worker's, never a successor's.
        let session = self.fenced().await?;
        self.check_position(&session, *from).await?;
        let client = guard(&self.walsender).take().ok_or_else(|| not_taken("slots"))?;
        slot::release(&session, &self.endpoint, &self.slot).await?;
        session.keep();
        let config = LogConfig {
            endpoint: self.endpoint.clone(),
            slot: self.slot.clone(),
            publication: self.publication.clone(),
            tables: tables.to_vec(),
            binary: binary_allowed(tables),
            limits,
            room: self.room.clone(),
            pause: self.pause.clone(),
        };
        PostgresLog::start(client, config, *from).await
    }

    async fn left_timeline_at(&self, timeline: i64) -> Result<Option<Lsn>> {
        let mut client = self.replication().await?;
        let present = client.identify_system().await?.timeline;
        // The first timeline has no history; nothing has left the present one.
        if timeline >= present {
            return Ok(None);
        }
        let rows = client.simple_query(&format!("TIMELINE_HISTORY {present}")).await?;
        let content = rows.into_iter().next().and_then(|mut row| row.pop()).flatten();
        let content = content.ok_or_else(|| errors::violation("TIMELINE_HISTORY: no content"))?;
        Ok(switch_point(&content, timeline))
    }

    async fn head(&self) -> Result<Lsn> {
        let session = self.session().await?;
        let row =
            answer(Side::Source, "ask for the end of the log", session.query_one("SELECT pg_current_wal_insert_lsn()::text", &[])).await?;
        session.keep();
        row.get::<_, &str>(0).parse().map_err(|error| Error::bug(format!("the end of the log: {error}")))
    }

    async fn mark(&self) -> Result<()> {
        // It need not wait for a synchronous standby: the log is sent only after what the server itself demands.
        let mark =
            format!("BEGIN; SET LOCAL synchronous_commit = local; SELECT pg_logical_emit_message(true, '{MESSAGE_PREFIX}', ''); COMMIT");
        let session = self.session().await?;
        answer(Side::Source, "write a marker", session.batch_execute(&mark)).await?;
        session.keep();
        Ok(())
    }

    async fn sequence_values(&self, table: &MappedTable) -> Result<Vec<SequenceValue>> {
        let session = self.session().await?;
        let values = catalog::structure::sequence_values(&session, table).await?;
        session.keep();
        Ok(values)
    }

    fn follows_schema(&self) -> bool {
        true
    }

    async fn look(&self, known: &MappedTable, described: &TableVersion, applied: &Lsn) -> Result<Option<Altered>> {
        let session = self.session().await?;
        let server = self.server(&session).await?;
        let seen = guard(&self.seen).get(&known.version.id).cloned();
        let description = Description { known, described, applied: *applied, seen: seen.as_ref() };
        let (altered, seen) = Box::pin(altered::look(&session, &server, &description)).await?;
        session.keep();
        guard(&self.seen).insert(known.version.id, seen);
        Ok(altered)
    }

    fn compare(&self) -> Option<impl Compare + 'static> {
        Some(PostgresCompare::new(self.endpoint.clone(), Side::Source))
    }

    async fn retention(&self) -> Result<Option<Retention>> {
        let session = self.session().await?;
        let retention = slot::retention(&session, &self.slot, &self.publication).await?;
        session.keep();
        Ok(Some(retention))
    }

    async fn give_up(&self) -> Result<()> {
        cleanup::give_up(&self.endpoint, &self.slot, &self.publication).await
    }

    async fn given_up(&self) -> Result<bool> {
        Ok(self.retention().await?.is_some_and(|seen| seen.given_up && !seen.exists))
    }

    fn waiting(&self) -> Option<String> {
        guard(&self.waiting).clone()
    }
}

/// What changes the source would not be fenced. The next session claims and takes the source again.
fn not_taken(what: &str) -> Error {
    Error::retry(reason::SOURCE_UNREACHABLE, format!("the session that has taken the source for {what} is gone"))
}

/// Where the history file says that a timeline was left: lines of timeline, position, reason (manual: "Timelines").
fn switch_point(history: &str, timeline: i64) -> Option<Lsn> {
    history.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let left: i64 = words.next()?.parse().ok()?;
        (left == timeline).then(|| words.next()?.parse().ok()).flatten()
    })
}

/// Bounds a statement and gives its failure class and reason. After an error the session must not be used again.
pub(super) async fn answer<T>(side: Side, what: &str, statement: impl Future<Output = Result<T, tokio_postgres::Error>>) -> Result<T> {
    match tokio::time::timeout(ANSWER_LIMIT, statement).await {
        Ok(result) => result.map_err(|error| errors::classify(side, what, &error)),
        Err(_) => Err(errors::lost(side, what, &format!("no answer within {ANSWER_LIMIT:?}"))),
    }
}

/// What a panicking holder leaves is whole: each value is set in one step.
fn guard<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_says_where_a_timeline_was_left() {
        let history = "1\t0/3000158\tno recovery target specified\n\n# a comment\n2\t16/B374D848\tbefore 2026-01-01 00:00:00+00\n";
        assert_eq!(switch_point(history, 1), Some(Lsn(0x300_0158)));
        assert_eq!(switch_point(history, 2), Some("16/B374D848".parse().unwrap()));
        assert_eq!(switch_point(history, 3), None);
    }
}
