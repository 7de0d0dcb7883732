//! Whether a server can be a source or a target, and what it takes: each failed check with its cure.
//!
//! [`inspect`] asks, [`check`] judges without I/O.

mod check;
mod slots;

use super::connect::{Session, Side, connect};
use super::endpoint::Endpoint;
use super::source::answer;
use crate::engine::error::{Error, Result, reason};
use crate::engine::table::QualifiedName;
use check::{Backend, Facts, Standbys};
pub use slots::OwnSlot;
use std::str::FromStr;
use tokio_postgres::error::SqlState;
use tokio_postgres::{SimpleQueryMessage, SimpleQueryRow};

/// Name of the sessions.
const APPLICATION_NAME: &str = "sluice inspect";

/// What is checked besides the server itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Checks<'a> {
    /// Tables that the role must be able to read; those that do not exist are passed over here.
    pub tables: &'a [QualifiedName],
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// Version as text, for example `15.19`.
    pub server_version: String,
    /// `server_version_num`, for example 150019.
    pub version_num: i32,
    /// Identifies the cluster, replicas included.
    pub system_identifier: String,
    /// Present timeline; unknown on a standby.
    pub timeline: Option<i64>,
    /// A standby.
    pub in_recovery: bool,
    /// Transactions can't write.
    pub read_only: bool,
    /// The role may set `session_replication_role`, so that triggers and foreign keys do not act on mirrored rows.
    pub may_set_replica_role: bool,
    /// What is missing, and warnings.
    pub failed: Vec<FailedPrerequisite>,
    /// Of a source: slots that streams of ours have made.
    pub own_slots: Vec<OwnSlot>,
}

/// One prerequisite that is not met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedPrerequisite {
    /// A constant of [`reason`].
    pub name: &'static str,
    /// What is wrong.
    pub message: String,
    /// Statement or action that cures it.
    pub cure: Option<String>,
    /// Stops nothing by itself.
    pub warning: bool,
}

/// Connects and checks.
///
/// # Errors
/// When there is no session to ask in: the reason says why.
pub async fn inspect(endpoint: &Endpoint, side: Side, checks: Checks<'_>) -> Result<Inspection> {
    let session = connect(endpoint, side, APPLICATION_NAME).await.map_err(pooler_or)?;
    let facts = facts(&session, side).await?;
    let is_pooled = check::is_pooled(&backends(endpoint, side, &session, &facts).await?);
    let may_set_replica_role = side == Side::Target && may_set_replica_role(&session, side).await?;
    let unreadable = if side == Side::Source { unreadable(&session, checks.tables).await? } else { Vec::new() };
    let own_slots = if side == Side::Source && !facts.in_recovery && !is_pooled { slots::own(&session).await? } else { Vec::new() };
    let failed = match side {
        Side::Source => check::source(&facts, is_pooled, &unreadable),
        Side::Target => check::target(&facts, is_pooled),
    };
    Ok(Inspection {
        server_version: facts.server_version,
        version_num: facts.version_num,
        system_identifier: facts.backend.system_identifier,
        timeline: facts.timeline,
        in_recovery: facts.in_recovery,
        read_only: facts.read_only,
        may_set_replica_role,
        failed,
        own_slots,
    })
}

/// PgBouncer knows few startup parameters, and says so.
fn pooler_or(error: Error) -> Error {
    if error.message.contains("unsupported startup parameter") {
        Error::stop(reason::POOLER_DETECTED, format!("{}; connect to the server itself, not to a pooler", error.message))
    } else {
        error
    }
}

const BACKEND: &str = "SELECT pg_backend_pid() AS pid, pg_postmaster_start_time() AS started, system_identifier FROM pg_control_system()";

/// One simple statement for all, as a pooler would break prepared ones. Slots and senders of others are counted, not read: that
/// takes no rights.
const FACTS: &str = "SELECT pg_backend_pid() AS pid, pg_postmaster_start_time() AS started, k.system_identifier,
    split_part(current_setting('server_version'), ' ', 1) AS server_version, current_setting('server_version_num') AS version_num,
    pg_is_in_recovery() AS in_recovery, current_setting('transaction_read_only')::bool AS read_only,
    CASE WHEN NOT pg_is_in_recovery() THEN ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int4::int8 END AS timeline,
    current_setting('wal_level') AS wal_level, coalesce(current_setting('max_slot_wal_keep_size', true), '-1') = '-1' AS unlimited,
    current_setting('max_replication_slots') AS max_slots, (SELECT count(*) FROM pg_replication_slots) AS slots,
    current_setting('max_wal_senders') AS max_senders, (SELECT count(*) FROM pg_stat_replication) AS senders,
    r.rolname AS role, r.rolsuper OR r.rolreplication
      OR EXISTS (SELECT FROM pg_roles m WHERE m.rolname = 'rds_replication' AND pg_has_role(m.oid, 'MEMBER')) AS may_replicate,
    (SELECT string_agg(s.slot_name::text, ', ' ORDER BY s.slot_name) FROM pg_replication_slots s WHERE s.slot_type = 'physical' AND s.active) AS standbys,
    EXISTS (SELECT FROM pg_replication_slots s WHERE s.slot_type = 'physical' AND s.active AND s.xmin IS NOT NULL) AS feedback,
    EXISTS (SELECT FROM pg_stat_activity a WHERE a.application_name LIKE '%slotsync worker') AS syncing,
    pg_has_role('pg_read_all_stats', 'USAGE') AS sees_sessions, current_setting('synchronized_standby_slots', true) AS awaited,
    (SELECT string_agg(n.name, ', ') FROM (SELECT btrim(unnest(string_to_array(current_setting('synchronized_standby_slots', true), ',')), ' \"')) n(name)
      WHERE n.name NOT IN ('', '*') AND NOT EXISTS
        (SELECT FROM pg_replication_slots s WHERE s.slot_name = n.name AND s.slot_type = 'physical' AND s.active)) AS away,
    current_database() AS database, has_database_privilege(current_database(), 'CREATE') AS may_create
    FROM pg_control_system() k, pg_roles r WHERE r.rolname = current_user";

async fn facts(session: &Session, side: Side) -> Result<Facts> {
    let row = single_row(session, side, FACTS).await?;
    Ok(Facts {
        backend: backend(&row)?,
        server_version: text(&row, "server_version")?,
        version_num: number(&row, "version_num")?,
        in_recovery: boolean(&row, "in_recovery")?,
        read_only: boolean(&row, "read_only")?,
        timeline: row.get("timeline").and_then(|timeline| timeline.parse().ok()),
        wal_level: text(&row, "wal_level")?,
        unlimited_wal: boolean(&row, "unlimited")?,
        max_slots: number(&row, "max_slots")?,
        slots: number(&row, "slots")?,
        max_senders: number(&row, "max_senders")?,
        senders: number(&row, "senders")?,
        role: text(&row, "role")?,
        may_replicate: boolean(&row, "may_replicate")?,
        standbys: Standbys {
            slots: optional(&row, "standbys"),
            feedback: boolean(&row, "feedback")?,
            syncing: boolean(&row, "syncing")?,
            sees_sessions: boolean(&row, "sees_sessions")?,
            awaited: optional(&row, "awaited"),
            away: optional(&row, "away"),
        },
        database: text(&row, "database")?,
        may_create: boolean(&row, "may_create")?,
    })
}

/// Who answers: the first session, a second one that stays in a transaction, the first one again. A pooler in transaction mode gives
/// the first session's backend to the second one; a balancer leads to another server.
async fn backends(endpoint: &Endpoint, side: Side, first: &Session, facts: &Facts) -> Result<[Backend; 3]> {
    let second = connect(endpoint, side, APPLICATION_NAME).await.map_err(pooler_or)?;
    let within = single_row(&second, side, &format!("BEGIN; {BACKEND}")).await?;
    let again = single_row(first, side, BACKEND).await?;
    Ok([facts.backend.clone(), backend(&within)?, backend(&again)?])
}

async fn may_set_replica_role(session: &Session, side: Side) -> Result<bool> {
    let set = session.batch_execute("BEGIN; SET LOCAL session_replication_role = replica").await;
    if matches!(&set, Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE)) {
        return Ok(false);
    }
    answer(side, "look at the role's rights", std::future::ready(set)).await?;
    answer(side, "look at the role's rights", session.batch_execute("ROLLBACK")).await?;
    Ok(true)
}

/// Tables of which the role may read no column.
async fn unreadable(session: &Session, tables: &[QualifiedName]) -> Result<Vec<QualifiedName>> {
    const UNREADABLE: &str = "SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE (n.nspname::text, c.relname::text) IN (SELECT * FROM unnest($1::text[], $2::text[]))
          AND NOT (has_schema_privilege(n.oid, 'USAGE') AND has_any_column_privilege(c.oid, 'SELECT')) ORDER BY 1, 2";
    if tables.is_empty() {
        return Ok(Vec::new());
    }
    let (schemas, names): (Vec<&str>, Vec<&str>) = tables.iter().map(|table| (table.schema.as_str(), table.name.as_str())).unzip();
    let rows = answer(Side::Source, "look at the role's rights", session.query(UNREADABLE, &[&schemas, &names])).await?;
    Ok(rows.iter().map(|row| QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1))).collect())
}

async fn single_row(session: &Session, side: Side, statement: &str) -> Result<SimpleQueryRow> {
    let messages = answer(side, "look at the server", session.simple_query(statement)).await?;
    let row = messages.into_iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    row.ok_or_else(|| Error::bug("the server did not say what it is"))
}

fn backend(row: &SimpleQueryRow) -> Result<Backend> {
    Ok(Backend { pid: number(row, "pid")?, started: text(row, "started")?, system_identifier: text(row, "system_identifier")? })
}

fn text(row: &SimpleQueryRow, column: &str) -> Result<String> {
    row.get(column).map(str::to_owned).ok_or_else(|| Error::bug(format!("the server did not say its {column}")))
}

/// Absent or empty.
fn optional(row: &SimpleQueryRow, column: &str) -> Option<String> {
    row.get(column).filter(|text| !text.is_empty()).map(str::to_owned)
}

fn number<T: FromStr>(row: &SimpleQueryRow, column: &str) -> Result<T> {
    text(row, column)?.parse().map_err(|_| Error::bug(format!("the server's {column} is not a number")))
}

fn boolean(row: &SimpleQueryRow, column: &str) -> Result<bool> {
    Ok(text(row, column)? == "t")
}
