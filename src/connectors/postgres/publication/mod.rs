//! The publication: which tables and columns the source sends.
//!
//! Invariant: no table is ever published whose users' updates and deletes the source would then refuse. Each table that comes in
//! is read again under a lock that keeps its identity from changing, in the transaction that publishes it.

mod plan;

use super::catalog::facts;
use super::catalog::rules::{self, Server, Wish};
use super::connect::{Session, Side};
use super::source::answer;
use super::sql::{qualified, quote_ident, quote_literal};
use crate::engine::error::{Error, Result, reason};
use crate::engine::table::{MappedTable, QualifiedName};
use plan::{Plan, Published, PublishedTable};
use std::collections::HashSet;
use std::time::Duration;
use tokio_postgres::error::SqlState;

/// How long one try waits for the locks. Longer than `deadlock_timeout` (1 s), after which an autovacuum gives way.
const LOCK_TIMEOUT: Duration = Duration::from_secs(3);
/// Tries to get the locks.
const TRIES: u32 = 10;
/// Pause between two tries, in which whoever queued up behind us can go on.
const PAUSE: Duration = Duration::from_millis(500);

/// The comment that says which stream a publication belongs to.
#[must_use]
pub fn mark(slot: &str) -> String {
    format!("sluice:{slot}")
}

/// The comment of a publication of ours whose slot was given up.
#[must_use]
pub fn mark_of_given_up(slot: &str) -> String {
    format!("{} given up", mark(slot))
}

/// Notes that the slot is about to be given up, durably. A publication that is not ours is left as it is. Returns whether it is noted.
///
/// # Errors
/// As the server answers.
pub async fn note_given_up(session: &Session, name: &str, slot: &str) -> Result<bool> {
    let what = format!("comment on publication {name}");
    if !is_own(session, &what, name, slot).await? {
        return Ok(false);
    }
    let comment = format!("COMMENT ON PUBLICATION {} IS {}", quote_ident(name), quote_literal(&mark_of_given_up(slot)));
    // Before the slot is gone it must be on the disk.
    run(session, &what, &format!("BEGIN; SET LOCAL synchronous_commit = local; {comment}; COMMIT")).await.map(|()| true)
}

/// Makes the publication hold exactly these tables and columns. One that the user has made is only looked at.
///
/// # Errors
/// Why a table can't be published; [`reason::INVALID_SPEC`] for somebody else's publication that does not fit; class `Retry`
/// when a table changed between the reading of the catalog and now, when one of `present` has left, or when the locks could not be had.
pub async fn publish(
    session: &Session,
    server: &Server,
    name: &str,
    slot: &str,
    tables: &[MappedTable],
    present: &[QualifiedName],
) -> Result<()> {
    let mut tries = 0;
    loop {
        tries += 1;
        let result = try_publish(session, server, name, slot, tables, present).await;
        match result {
            Err(Attempt::LocksTaken(_)) if tries < TRIES => tokio::time::sleep(PAUSE).await,
            Err(Attempt::LocksTaken(error) | Attempt::Failed(error)) => return Err(error.context(format!("publication {name}"))),
            Ok(()) => return Ok(()),
        }
    }
}

/// Names of the tables that are in the publication.
///
/// # Errors
/// [`reason::PUBLICATION_MISSING`].
pub async fn published(session: &Session, server: &Server, name: &str) -> Result<Vec<QualifiedName>> {
    let found = read(session, server, name).await?;
    let missing = || Error::stop(reason::PUBLICATION_MISSING, format!("publication {name} is gone: changes since then are not sent"));
    Ok(found.ok_or_else(missing)?.tables.into_iter().map(|table| table.name).collect())
}

/// Drops the publication when it carries the mark of this slot. Returns whether it did.
pub async fn drop_own(session: &Session, name: &str, slot: &str) -> Result<bool> {
    let what = format!("drop publication {name}");
    if !is_own(session, &what, name, slot).await? {
        return Ok(false);
    }
    run(session, &what, &format!("DROP PUBLICATION IF EXISTS {}", quote_ident(name))).await?;
    Ok(true)
}

async fn is_own(session: &Session, what: &str, name: &str, slot: &str) -> Result<bool> {
    const OWN: &str = "SELECT FROM pg_publication WHERE pubname = $1 AND obj_description(oid, 'pg_publication') = ANY($2)";
    let marks = [mark(slot), mark_of_given_up(slot)];
    Ok(answer(Side::Source, what, session.query_opt(OWN, &[&name, &&marks[..]])).await?.is_some())
}

/// Why a try failed.
enum Attempt {
    /// Somebody holds a lock; trying again may help.
    LocksTaken(Error),
    Failed(Error),
}

impl From<Error> for Attempt {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

async fn try_publish(
    session: &Session,
    server: &Server,
    name: &str,
    slot: &str,
    tables: &[MappedTable],
    present: &[QualifiedName],
) -> Result<(), Attempt> {
    let (found, partitioned) = futures::future::try_join(read(session, server, name), facts::partitioned(session)).await?;
    let marks = plan::Marks { own: &mark(slot), given_up: &mark_of_given_up(slot) };
    let plan = plan::plan(found.as_ref(), tables, &partitioned, marks)?;
    plan::check_present(found.as_ref(), &plan, present)?;
    if plan.is_nothing() {
        return Ok(());
    }
    let changed = change(session, server, name, slot, &plan, &partitioned).await;
    if changed.is_err() {
        // A transaction that can't be ended is ended by the server when the session goes, which it does after an error.
        let _ = run(session, "end", "ROLLBACK").await;
    }
    changed
}

/// In one transaction, and in two round trips: see [`crate::connectors::postgres::connect`].
async fn change(
    session: &Session,
    server: &Server,
    name: &str,
    slot: &str,
    plan: &Plan<'_>,
    partitioned: &HashSet<u32>,
) -> Result<(), Attempt> {
    // The settings end with the transaction. It need not wait for a synchronous standby: the log is sent only after what the server
    // itself demands.
    let begin = format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = {}; SET LOCAL synchronous_commit = local",
        LOCK_TIMEOUT.as_millis()
    );
    let (begun, locked, checked) = futures::future::join3(
        run(session, "begin", &begin),
        lock(session, &plan.incoming, partitioned),
        check(session, server, &plan.incoming),
    )
    .await;
    begun?;
    locked?;
    checked?;
    // The server leaves out what comes after a failure.
    let statements = statements(name, slot, plan).join("; ");
    run_locking(session, "publish", &format!("{statements}; COMMIT")).await
}

/// SHARE UPDATE EXCLUSIVE is what ALTER PUBLICATION itself takes: it goes together with users' reads and writes and excludes all
/// that could change an identity (ALTER TABLE, DROP INDEX, ATTACH PARTITION). A partitioned table is locked with its partitions.
async fn lock(session: &Session, tables: &[&MappedTable], partitioned: &HashSet<u32>) -> Result<(), Attempt> {
    if tables.is_empty() {
        return Ok(());
    }
    let with_parts = |table: &MappedTable| partitioned.contains(&table.version.id);
    let entry = |table: &&MappedTable| if with_parts(table) { qualified(table.source()) } else { only(table.source()) };
    let list: Vec<String> = tables.iter().map(entry).collect();
    run_locking(session, "lock", &format!("LOCK TABLE {} IN SHARE UPDATE EXCLUSIVE MODE", list.join(", "))).await
}

/// Reads and judges the tables again, as they are under the lock.
async fn check(session: &Session, server: &Server, tables: &[&MappedTable]) -> Result<()> {
    if tables.is_empty() {
        return Ok(());
    }
    let ids: Vec<u32> = tables.iter().map(|table| table.version.id).collect();
    let relations = facts::read(session, &ids).await?;
    tables.iter().try_for_each(|table| {
        let changed = || Error::retry(reason::SCHEMA_CHANGED, format!("{} changed while it was about to be published", table.source()));
        let relation = relations.iter().find(|relation| relation.id == table.version.id).ok_or_else(changed)?;
        let wish =
            Wish { target: table.target.clone(), excluded: table.excluded.clone(), accept_narrower_types: table.accept_narrower_types };
        let now = rules::map(relation, &wish, server)?;
        if now.version == table.version && now.generated == table.generated { Ok(()) } else { Err(changed()) }
    })
}

fn statements(name: &str, slot: &str, plan: &Plan<'_>) -> Vec<String> {
    const OPTIONS: &str = "publish = 'insert, update, delete, truncate', publish_via_partition_root = true";
    let publication = quote_ident(name);
    let comment = || format!("COMMENT ON PUBLICATION {publication} IS {}", quote_literal(&mark(slot)));
    let incoming: Vec<String> = plan.incoming.iter().map(|table| entry(table)).collect();
    if plan.create {
        let tables = if incoming.is_empty() { String::new() } else { format!(" FOR TABLE {}", incoming.join(", ")) };
        return vec![format!("CREATE PUBLICATION {publication}{tables} WITH ({OPTIONS})"), comment()];
    }
    let mut statements = Vec::new();
    if plan.set_comment {
        statements.push(comment());
    }
    if plan.set_options {
        statements.push(format!("ALTER PUBLICATION {publication} SET ({OPTIONS})"));
    }
    if !plan.outgoing.is_empty() {
        let outgoing: Vec<String> = plan.outgoing.iter().map(only).collect();
        statements.push(format!("ALTER PUBLICATION {publication} DROP TABLE {}", outgoing.join(", ")));
    }
    if !incoming.is_empty() {
        statements.push(format!("ALTER PUBLICATION {publication} ADD TABLE {}", incoming.join(", ")));
    }
    statements
}

/// A list of columns never gains new ones, so there is one only where columns are left out.
fn entry(table: &MappedTable) -> String {
    if table.excluded.is_empty() {
        return only(table.source());
    }
    let columns: Vec<String> = table.version.columns.iter().map(|column| quote_ident(&column.name)).collect();
    format!("{} ({})", only(table.source()), columns.join(", "))
}

/// Without ONLY the tables that inherit would come along; partitions do anyway.
fn only(name: &QualifiedName) -> String {
    format!("ONLY {}", qualified(name))
}

async fn run(session: &Session, what: &str, statement: &str) -> Result<()> {
    answer(Side::Source, what, session.batch_execute(statement)).await
}

/// The same for a statement that takes locks and needs rights.
async fn run_locking(session: &Session, what: &str, statement: &str) -> Result<(), Attempt> {
    let mut code = None;
    let statement = async { session.batch_execute(statement).await.inspect_err(|error| code = error.code().cloned()) };
    let done = answer(Side::Source, what, statement).await;
    done.map_err(|mut error| {
        if error.reason == reason::PRIVILEGE_MISSING {
            error.message += "; publishing takes CREATE on the database and the rights of each table's owner (GRANT owner TO role)";
        }
        match code {
            Some(SqlState::LOCK_NOT_AVAILABLE) => Attempt::LocksTaken(error),
            // Somebody has put a table in, or taken it out, since the publication was read: it must be looked at again.
            Some(SqlState::DUPLICATE_OBJECT | SqlState::UNDEFINED_OBJECT) => {
                Attempt::Failed(Error::retry(reason::LEFT_PUBLICATION, error.message))
            }
            _ => Attempt::Failed(error),
        }
    })
}

/// Reads the publication, if it exists. Lists of columns, filters and whole schemas came with PostgreSQL 15.
async fn read(session: &Session, server: &Server, name: &str) -> Result<Option<Published>> {
    let what = format!("read publication {name}");
    let (schemas, columns, filtered) = if server.version >= 150_000 {
        let columns =
            "(SELECT array_agg(a.attname::text) FROM pg_attribute a WHERE a.attrelid = r.prrelid AND a.attnum = ANY(r.prattrs::int2[]))";
        ("EXISTS (SELECT FROM pg_publication_namespace s WHERE s.pnpubid = p.oid)", columns, "r.prqual IS NOT NULL")
    } else {
        ("false", "NULL::text[]", "false")
    };
    let publication = format!(
        "SELECT obj_description(p.oid, 'pg_publication'), p.puballtables OR {schemas},
             p.pubinsert AND p.pubupdate AND p.pubdelete AND p.pubtruncate, p.pubviaroot
         FROM pg_publication p WHERE p.pubname = $1"
    );
    let tables = format!(
        "SELECT r.prrelid, n.nspname::text, c.relname::text, {columns}, {filtered}
         FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid JOIN pg_class c ON c.oid = r.prrelid
         JOIN pg_namespace n ON n.oid = c.relnamespace WHERE p.pubname = $1 ORDER BY 2, 3"
    );
    let (publication, tables) = futures::future::try_join(
        answer(Side::Source, &what, session.query_opt(&publication, &[&name])),
        answer(Side::Source, &what, session.query(&tables, &[&name])),
    )
    .await?;
    let Some(row) = publication else { return Ok(None) };
    let table = |row: &tokio_postgres::Row| PublishedTable {
        id: row.get(0),
        name: QualifiedName::new(row.get::<_, String>(1), row.get::<_, String>(2)),
        columns: row.get(3),
        filtered: row.get(4),
    };
    Ok(Some(Published {
        comment: row.get(0),
        everything: row.get(1),
        all_operations: row.get(2),
        via_root: row.get(3),
        tables: tables.iter().map(table).collect(),
    }))
}
