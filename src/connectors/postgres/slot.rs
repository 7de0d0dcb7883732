//! Replication slots: their state, how they are made and dropped.
//!
//! Invariants: a slot that is not a logical pgoutput slot of this database is never touched; a process that reads from a slot is
//! ended only when it is one of ours.

use super::connect::{Session, Side};
use super::endpoint::Endpoint;
use super::lsn::Lsn;
use super::publication;
use super::replication::{CreatedSlot, ReplicationClient};
use super::source::answer;
use super::sql::quote_literal;
use crate::engine::error::{Error, Result, reason};
use crate::engine::retention::{Lost, Retention};
use crate::engine::roles::LogState;
use std::fmt::Write as _;
use std::time::Duration;
use tokio::time::Instant;
use tokio_postgres::error::SqlState;

/// How long an ended process may take to let go of its slot.
const RELEASE_LIMIT: Duration = Duration::from_secs(15);
/// Pause between two looks at a slot.
const RELEASE_PAUSE: Duration = Duration::from_millis(50);
/// Pause between two looks at what a slot waits for.
const WAITING_PAUSE: Duration = Duration::from_millis(500);
/// Transactions that are named in a message.
const NAMED: i64 = 5;

/// The cause of most losses.
const WAL_REMOVED: &str =
    "wal_removed: more was written than max_slot_wal_keep_size lets it keep; raise that bound, or suspend for shorter";

/// `pg_replication_slots`, with the columns that newer versions have.
const STATE: &str = "SELECT s.plugin::text, s.database::text, s.confirmed_flush_lsn::text, s.active_pid, s.wal_status,
        to_jsonb(s)->>'invalidation_reason',
        concat_ws(', ', a.application_name, 'user ' || a.usename::text, 'from ' || host(a.client_addr), 'since ' || date_trunc('second', a.backend_start)::text),
        a.application_name
    FROM pg_replication_slots s LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid WHERE s.slot_name = $1";

/// A slot as the source sees it.
#[derive(Clone, Debug, PartialEq)]
struct State {
    plugin: Option<String>,
    database: Option<String>,
    confirmed: Option<Lsn>,
    active: Option<i32>,
    /// The process that reads from it, for people.
    reader: String,
    /// Its application name.
    application: Option<String>,
    wal_status: Option<String>,
    invalidation_reason: Option<String>,
}

/// The slot for the engine.
///
/// # Errors
/// [`reason::INVALID_SPEC`] when a slot of that name is of another kind or database.
pub async fn state(session: &Session, slot: &str, database: &str) -> Result<Option<LogState<Lsn>>> {
    read(session, slot).await?.map(|state| usable(slot, &state, database).map(|()| log_state(&state))).transpose()
}

/// What is kept for the slot, for people: also for one that is not ours.
pub async fn retention(session: &Session, slot: &str, publication: &str) -> Result<Retention> {
    const RETENTION: &str = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn)::int8,
            pg_wal_lsn_diff(pg_current_wal_lsn(), s.confirmed_flush_lsn)::int8, s.wal_status, s.safe_wal_size,
            to_jsonb(s)->>'invalidation_reason', s.slot_name IS NOT NULL,
            EXISTS (SELECT FROM pg_publication WHERE pubname = $2 AND obj_description(oid, 'pg_publication') = $3)
        FROM (SELECT) AS one LEFT JOIN pg_replication_slots s ON s.slot_name = $1";
    let mark = publication::mark_of_given_up(slot);
    let what = format!("look at slot {slot}");
    let row = answer(Side::Source, &what, session.query_one(RETENTION, &[&slot, &publication, &mark])).await?;
    let bytes = |bytes: Option<i64>| bytes.map(|bytes| u64::try_from(bytes).unwrap_or_default());
    let wal_status: Option<String> = row.get(2);
    Ok(Retention {
        exists: row.get(5),
        retained: bytes(row.get(0)),
        unconfirmed: bytes(row.get(1)),
        lost: lost(wal_status.as_deref(), row.get(4)),
        wal_status,
        safe: row.get(3),
        given_up: row.get(6),
    })
}

async fn read(session: &Session, slot: &str) -> Result<Option<State>> {
    let what = format!("look at slot {slot}");
    let row = answer(Side::Source, &what, session.query_opt(STATE, &[&slot])).await?;
    let lsn = |text: Option<String>| text.map(|text| text.parse().map_err(|error| Error::bug(format!("{what}: {error}")))).transpose();
    row.map(|row| {
        Ok(State {
            plugin: row.get(0),
            database: row.get(1),
            confirmed: lsn(row.get(2))?,
            active: row.get(3),
            wal_status: row.get(4),
            invalidation_reason: row.get(5),
            reader: row.get(6),
            application: row.get(7),
        })
    })
    .transpose()
}

fn usable(slot: &str, state: &State, database: &str) -> Result<()> {
    let refuse = |what: String| Err(Error::stop(reason::INVALID_SPEC, format!("slot {slot} exists and {what}: choose another slotName")));
    match (&state.plugin, &state.database) {
        (None, _) => refuse("is a physical one".into()),
        (Some(plugin), _) if plugin != "pgoutput" => refuse(format!("uses the plugin {plugin}")),
        (_, Some(other)) if other != database => refuse(format!("belongs to the database {other}")),
        _ => Ok(()),
    }
}

fn log_state(state: &State) -> LogState<Lsn> {
    LogState {
        // A slot that is still being made sends nothing that lies before a point which is not known yet: beyond everything.
        confirmed: state.confirmed.unwrap_or(Lsn(u64::MAX)),
        lost: lost(state.wal_status.as_deref(), state.invalidation_reason.as_deref()),
        active: state.active,
    }
}

/// `wal_status` is `lost` in all versions; 17 says why, and 18 knows one more cause (manual: "pg_replication_slots").
fn lost(wal_status: Option<&str>, invalidation_reason: Option<&str>) -> Option<Lost> {
    let (reason, cause) = match invalidation_reason {
        Some("rows_removed") => (
            reason::SLOT_ROWS_REMOVED,
            "rows_removed: the slot was on a standby, and the primary has removed rows of the catalog that it needs; set hot_standby_feedback = on and a primary_slot_name there".into(),
        ),
        Some("wal_level_insufficient") => (
            reason::SLOT_WAL_LEVEL_INSUFFICIENT,
            "wal_level_insufficient: the slot was on a standby, and wal_level of the primary was not logical for a while".into(),
        ),
        Some("idle_timeout") => (
            reason::SLOT_IDLE_TOO_LONG,
            "idle_timeout: nobody read from it for idle_replication_slot_timeout; raise that, or suspend for shorter".into(),
        ),
        Some("wal_removed") => (reason::SLOT_LOST, WAL_REMOVED.into()),
        Some(other) => (reason::SLOT_LOST, other.into()),
        None if wal_status == Some("lost") => (reason::SLOT_LOST, WAL_REMOVED.into()),
        None => return None,
    };
    Some(Lost { reason, cause })
}

/// Ends a process of ours that reads from the slot, and waits until it is gone: after a crash the server would notice only after
/// `wal_sender_timeout`. Returns whether the slot exists.
///
/// # Errors
/// [`reason::SLOT_IN_USE`] when somebody else reads from it.
pub async fn release(session: &Session, endpoint: &Endpoint, slot: &str) -> Result<bool> {
    let deadline = Instant::now() + RELEASE_LIMIT;
    loop {
        let Some(state) = read(session, slot).await? else { return Ok(false) };
        usable(slot, &state, &endpoint.database)?;
        let Some(pid) = state.active else { return Ok(true) };
        if !is_ours(endpoint, state.application.as_deref()) || Instant::now() > deadline {
            let reader = state.reader;
            return Err(Error::retry(reason::SLOT_IN_USE, format!("process {pid} ({reader}) reads from slot {slot}")));
        }
        let what = format!("end the process {pid} that reads from slot {slot}");
        answer(Side::Source, &what, session.query("SELECT pg_terminate_backend($1)", &[&pid])).await?;
        tokio::time::sleep(RELEASE_PAUSE).await;
    }
}

/// Sessions of ours are called `sluice`, or what the user has put into the endpoint's parameters.
fn is_ours(endpoint: &Endpoint, application_name: Option<&str>) -> bool {
    let chosen = endpoint.parameters.iter().find(|(name, _)| name.eq_ignore_ascii_case("application_name"));
    application_name.is_some_and(|name| name.starts_with("sluice") || chosen.is_some_and(|(_, chosen)| name == chosen))
}

/// Drops the slot; ends a process of ours that reads from it first. Returns whether there was one.
pub async fn drop(session: &Session, endpoint: &Endpoint, slot: &str) -> Result<bool> {
    let deadline = Instant::now() + RELEASE_LIMIT;
    while release(session, endpoint, slot).await? {
        let mut code = None;
        let statement = async {
            let dropped = session.execute("SELECT pg_drop_replication_slot($1)", &[&slot]).await;
            dropped.inspect_err(|error| code = error.code().cloned())
        };
        let dropped = answer(Side::Source, &format!("drop slot {slot}"), statement).await;
        match dropped {
            Ok(_) => return Ok(true),
            // A reader came back between the two statements.
            Err(_) if code == Some(SqlState::OBJECT_IN_USE) && Instant::now() < deadline => {}
            Err(_) if code == Some(SqlState::UNDEFINED_OBJECT) => return Ok(true),
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// The statement that drops a slot, for people.
#[must_use]
pub fn drop_statement(slot: &str) -> String {
    format!("SELECT pg_drop_replication_slot({})", quote_literal(slot))
}

/// What is to be made.
#[derive(Clone, Copy, Debug)]
pub struct NewSlot<'a> {
    /// Name.
    pub name: &'a str,
    /// It ends with its session.
    pub temporary: bool,
    /// How long to wait for older transactions.
    pub limit: Duration,
}

/// Makes a slot, which waits until all older transactions have ended; meanwhile `waiting` is told about them through a second
/// session. The snapshot lives as long as the client does nothing else.
///
/// # Errors
/// [`reason::WAITING_FOR_OLD_TRANSACTIONS`], class `Retry`, when the limit has passed; the server then gives the slot up.
pub async fn create(
    client: &mut ReplicationClient,
    observer: &Session,
    new: NewSlot<'_>,
    waiting: impl Fn(Option<String>),
) -> Result<CreatedSlot> {
    let older = writers(observer).await?;
    let deadline = Instant::now() + new.limit;
    let mut create = std::pin::pin!(client.create_slot(new.name, new.temporary, true));
    let mut seen = None;
    loop {
        match tokio::time::timeout(WAITING_PAUSE, &mut create).await {
            Ok(created) => {
                waiting(None);
                return created;
            }
            Err(_) if Instant::now() < deadline => {
                // A look that fails says nothing about the slot.
                seen = older_transactions(observer, new.name, &older).await.unwrap_or(seen);
                waiting(seen.clone());
            }
            Err(_) => {
                waiting(None);
                let seen = seen.unwrap_or_else(|| "the slot was not ready".into());
                return Err(Error::retry(reason::WAITING_FOR_OLD_TRANSACTIONS, format!("gave up after {:?}: {seen}", new.limit)));
            }
        }
    }
}

/// Numbers of the transactions that write now: a slot that is made after this waits for all of them.
async fn writers(session: &Session) -> Result<Vec<String>> {
    const WRITERS: &str =
        "SELECT transactionid::text FROM pg_locks WHERE locktype = 'transactionid' AND granted AND mode = 'ExclusiveLock'";
    let rows = answer(Side::Source, "look for older transactions", session.query(WRITERS, &[])).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Says in words which transactions a slot that is being made waits for. They are found by the locks that they hold on their own
/// numbers, which every role may see; who they are is seen only with the rights for `pg_stat_activity`. In its later phases the
/// server also waits for some that began after it: such a one is found by the lock that it waits for.
async fn older_transactions(session: &Session, slot: &str, older: &[String]) -> Result<Option<String>> {
    let statement = format!(
        "WITH holders AS (
             SELECT DISTINCT ON (l.virtualtransaction) l.pid, l.transactionid FROM pg_locks l
             WHERE l.locktype = 'transactionid' AND l.granted AND l.mode = 'ExclusiveLock' AND l.pid IS DISTINCT FROM pg_backend_pid()
               AND (l.transactionid::text = ANY($1) OR l.transactionid IN
                    (SELECT w.transactionid FROM pg_locks w JOIN pg_replication_slots s ON s.active_pid = w.pid
                     WHERE s.slot_name = $2 AND NOT w.granted AND w.locktype = 'transactionid'))
             ORDER BY l.virtualtransaction, age(l.transactionid) DESC)
         SELECT h.pid, p.gid, a.usename::text, coalesce(a.datname, p.database)::text, a.state,
                extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, p.prepared))::int8, count(*) OVER ()
         FROM holders h LEFT JOIN pg_stat_activity a ON a.pid = h.pid LEFT JOIN pg_prepared_xacts p ON h.pid IS NULL AND p.transaction = h.transactionid
         ORDER BY age(h.transactionid) DESC LIMIT {NAMED}"
    );
    let rows = answer(Side::Source, "look for older transactions", session.query(&statement, &[&older, &slot])).await?;
    let Some(first) = rows.first() else { return Ok(None) };
    let mut text = format!("slot {slot} waits for {} older transactions to end: ", first.get::<_, i64>(6));
    for (number, row) in rows.iter().enumerate() {
        let separator = if number == 0 { "" } else { "; " };
        let who = match (row.get::<_, Option<i32>>(0), row.get::<_, Option<String>>(1)) {
            (Some(pid), _) => format!("pid {pid}"),
            (None, gid) => format!("prepared transaction {}", quote_literal(&gid.unwrap_or_default())),
        };
        // Writing to a String does not fail.
        let _ = write!(text, "{separator}{who}");
        for (label, part) in [("user", row.get::<_, Option<String>>(2)), ("database", row.get(3)), ("state", row.get(4))] {
            if let Some(part) = part {
                let _ = write!(text, ", {label} {part}");
            }
        }
        if let Some(age) = row.get::<_, Option<i64>>(5) {
            let _ = write!(text, ", open for {age} s");
        }
    }
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn healthy() -> State {
        State {
            plugin: Some("pgoutput".into()),
            database: Some("shop".into()),
            confirmed: Some(Lsn(5)),
            active: None,
            reader: String::new(),
            application: None,
            wal_status: Some("reserved".into()),
            invalidation_reason: None,
        }
    }

    #[test]
    fn only_our_kind_of_slot_is_used() {
        assert!(usable("s", &healthy(), "shop").is_ok());
        for state in [
            State { plugin: None, database: None, ..healthy() },
            State { plugin: Some("wal2json".into()), ..healthy() },
            State { database: Some("other".into()), ..healthy() },
        ] {
            assert_eq!(usable("s", &state, "shop").unwrap_err().reason, reason::INVALID_SPEC, "{state:?}");
        }
    }

    #[test]
    fn lost_slots_are_seen() {
        assert_eq!(log_state(&healthy()), LogState { confirmed: Lsn(5), lost: None, active: None });
        for status in ["extended", "unreserved"] {
            assert_eq!(lost(Some(status), None), None);
        }
        for (cause, reason) in [
            (None, reason::SLOT_LOST),
            (Some("wal_removed"), reason::SLOT_LOST),
            (Some("rows_removed"), reason::SLOT_ROWS_REMOVED),
            (Some("wal_level_insufficient"), reason::SLOT_WAL_LEVEL_INSUFFICIENT),
            (Some("idle_timeout"), reason::SLOT_IDLE_TOO_LONG),
            (Some("of a later version"), reason::SLOT_LOST),
        ] {
            let lost = lost(Some("lost"), cause).expect("it is lost");
            assert_eq!(lost.reason, reason);
            assert!(lost.cause.starts_with(cause.unwrap_or("wal_removed")), "{lost:?}");
        }
    }

    #[test]
    fn a_slot_in_the_making_is_never_taken_for_one_that_holds_a_position() {
        assert_eq!(log_state(&State { confirmed: None, ..healthy() }).confirmed, Lsn(u64::MAX));
    }
}
