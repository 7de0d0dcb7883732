//! A consistent state of the source and its copy by ranges of blocks.
//!
//! A snapshot comes from the creation of a replication slot: only such a one is a prefix of the log. One session imports it and
//! exports it again, so that the walsender that made the slot is free and a temporary slot can go at once. This holder keeps it
//! alive; when the holder is gone, so is the snapshot.
//!
//! Invariant: every range is read under the snapshot, from the file and the partitions that the table had in it. Rewriting a table
//! (VACUUM FULL, TRUNCATE, most of ALTER TABLE) moves or hides rows of older snapshots: it is seen, and ends the snapshot. So is any
//! alteration of its columns since they were read.

use super::connect::{Session, Side, connect};
use super::endpoint::Endpoint;
use super::errors::ServerError;
use super::lsn::Lsn;
use super::replication::BulkSession;
use super::session::UNLIMITED;
use super::source::{ANSWER_LIMIT, APPLICATION_NAME, answer};
use super::sql::{qualified, quote_ident, quote_literal};
use super::{catalog::facts, errors};
use crate::engine::error::{Error, Result, reason};
use crate::engine::roles::{BulkFormat, BulkStream, Range, Snapshot};
use crate::engine::table::MappedTable;
use bytes::Bytes;
use futures::stream;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio_postgres::error::SqlState;

/// How long a user's exclusive lock on a table is waited for.
const LOCK_LIMIT: Duration = Duration::from_secs(600);
/// The last range has no upper bound: see [`split`].
const END: u64 = u64::MAX;

/// The state of the source at a position.
pub struct PostgresSnapshot {
    position: Lsn,
    /// Name under which other sessions import it.
    name: String,
    partitioned: HashSet<u32>,
    holder: Session,
    readers: Arc<Readers>,
}

/// Sessions that read ranges, and have nothing open between two.
struct Readers {
    endpoint: Endpoint,
    idle: Mutex<Vec<BulkSession>>,
}

impl PostgresSnapshot {
    /// Takes over a snapshot that another session has exported and still holds.
    pub(super) async fn import(hands: Hands, endpoint: &Endpoint, position: Lsn, exported: &str) -> Result<Self> {
        let Hands { holder, reader } = hands;
        let begin = begin(exported);
        // Polled together: one round trip for all, in this order.
        let (begun, name, partitioned) = futures::future::join3(
            answer(Side::Source, "import the slot's snapshot", holder.batch_execute(&begin)),
            answer(Side::Source, "export the snapshot", holder.query_one("SELECT pg_export_snapshot()", &[])),
            facts::partitioned(&holder),
        )
        .await;
        begun?;
        let (name, partitioned) = (name?.get(0), partitioned?);
        let readers = Readers { endpoint: endpoint.clone(), idle: Mutex::new(vec![reader]) };
        Ok(Self { position, name, partitioned, holder, readers: Arc::new(readers) })
    }

    /// The name under which any session of the database may import it, as long as it lives.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// One round trip: import the snapshot, lock the table as the copy will, see whether it is still what the snapshot knows.
    async fn enter(&self, session: &mut BulkSession, table: &MappedTable) -> Result<()> {
        let is_partitioned = self.partitioned.contains(&table.version.id);
        let lock = format!("{} LIMIT 0", select(table, is_partitioned));
        let statements = format!("{}; {lock}; {}", begin(&self.name), unchanged(table, is_partitioned));
        let entered = tokio::time::timeout(LOCK_LIMIT, session.run(&statements)).await;
        let what = format!("copy {}", table.source());
        let Ok(entered) = entered else {
            let message = format!("{what}: the table is locked since {LOCK_LIMIT:?}");
            return Err(Error::retry(reason::SOURCE_UNREACHABLE, message));
        };
        let rows = entered?.map_err(|error| match &error.code {
            _ if is_lost(&error) => lost(&error.message),
            // It was altered since the catalog was read.
            code if code == SqlState::UNDEFINED_COLUMN.code() => lost(&error.message),
            _ => errors::classify_server(Side::Source, &what, &error),
        })?;
        if rows.last().and_then(|row| row.first()?.as_deref()) == Some("t") {
            return Ok(());
        }
        let message =
            format!("{} was altered, rewritten, truncated, or has other partitions than the snapshot: it needs a new one", table.source());
        Err(Error::retry(reason::SNAPSHOT_LOST, message))
    }
}

/// Sessions that a snapshot begins with.
pub(super) struct Hands {
    holder: Session,
    reader: BulkSession,
}

impl Hands {
    /// Connects.
    pub async fn open(endpoint: &Endpoint) -> Result<Self> {
        let holder = async {
            let holder = connect(endpoint, Side::Source, APPLICATION_NAME).await?;
            answer(Side::Source, "lift the limits of role and database", holder.query(UNLIMITED, &[])).await?;
            Ok(holder)
        };
        let (holder, reader) = futures::future::try_join(holder, open_reader(endpoint)).await?;
        Ok(Self { holder, reader })
    }
}

async fn open_reader(endpoint: &Endpoint) -> Result<BulkSession> {
    let mut session = BulkSession::connect(endpoint, APPLICATION_NAME).await?;
    command(&mut session, UNLIMITED).await?;
    Ok(session)
}

/// A statement that has nothing to wait for.
async fn command(session: &mut BulkSession, sql: &str) -> Result<()> {
    match tokio::time::timeout(ANSWER_LIMIT, session.run(sql)).await {
        Ok(ran) => ran?.map(drop).map_err(|error| errors::classify_server(Side::Source, sql, &error)),
        Err(_) => Err(errors::lost(Side::Source, sql, &format!("no answer within {ANSWER_LIMIT:?}"))),
    }
}

impl Snapshot for PostgresSnapshot {
    type Position = Lsn;

    fn position(&self) -> &Lsn {
        &self.position
    }

    fn ranges(&self, table: &MappedTable, rows: u64) -> Vec<Range> {
        split(table.blocks, table.estimated_rows, rows)
    }

    async fn read(&self, table: &MappedTable, range: &Range, format: BulkFormat) -> Result<BulkStream> {
        if self.holder.is_closed() {
            return Err(lost(&"the session that held it ended"));
        }
        let mut session = self.readers.take().await?;
        self.enter(&mut session, table).await?;
        let statement = copy_statement(table, self.partitioned.contains(&table.version.id), range, format);
        session.copy_out(&format!("copy {}", table.source()), &statement).await?;
        Ok(Box::pin(pieces(session, Arc::clone(&self.readers))))
    }

    async fn close(self) {}
}

impl Readers {
    async fn take(&self) -> Result<BulkSession> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        match idle {
            Some(session) => Ok(session),
            None => open_reader(&self.endpoint).await,
        }
    }

    /// Lets go of the table; the next range may use the session.
    async fn give_back(&self, mut session: BulkSession) -> Result<()> {
        command(&mut session, "COMMIT").await?;
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(session);
        Ok(())
    }
}

fn pieces(session: BulkSession, readers: Arc<Readers>) -> impl futures::Stream<Item = Result<Bytes>> + Send {
    stream::try_unfold((session, readers), |(mut session, readers)| async move {
        if let Some(piece) = session.piece().await? {
            return Ok(Some((piece, (session, readers))));
        }
        // All rows are there: a failure now costs the session alone.
        if let Err(error) = readers.give_back(session).await {
            tracing::debug!(%error, "a session of the copy ended");
        }
        Ok(None)
    })
}

/// Splits into ranges of about `rows` rows. The number of blocks was read before the snapshot was taken, and tables grow: the last
/// range is open, so that rows beyond the blocks seen are in it. A table that shrank has empty ranges.
fn split(blocks: u64, estimated_rows: u64, rows: u64) -> Vec<Range> {
    let wanted = estimated_rows.div_ceil(rows.max(1)).min(blocks);
    if wanted <= 1 {
        return vec![Range { number: 0, blocks: None }];
    }
    let width = blocks.div_ceil(wanted);
    let count = blocks.div_ceil(width);
    // At most one range per block, of which a table has fewer than 2^32; ranges are numbered with an i32 since nobody has 2^31.
    let last = i32::try_from(count - 1).unwrap_or(i32::MAX);
    (0..=last)
        .map(|number| {
            let first = u64::from(number.unsigned_abs()) * width;
            Range { number, blocks: Some((first, if number == last { END } else { first + width })) }
        })
        .collect()
}

fn begin(snapshot: &str) -> String {
    format!("BEGIN TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY; SET TRANSACTION SNAPSHOT {}", quote_literal(snapshot))
}

/// The table's own rows, and for a partitioned one those of its partitions.
fn select(table: &MappedTable, is_partitioned: bool) -> String {
    let columns: Vec<String> = table.version.columns.iter().map(|column| quote_ident(&column.name)).collect();
    let only = if is_partitioned { "" } else { "ONLY " };
    format!("SELECT {} FROM {only}{}", columns.join(", "), qualified(table.source()))
}

fn copy_statement(table: &MappedTable, is_partitioned: bool, range: &Range, format: BulkFormat) -> String {
    let condition = match range.blocks {
        None => String::new(),
        Some((first, END)) => format!(" WHERE ctid >= '({first},0)'"),
        Some((first, end)) => format!(" WHERE ctid >= '({first},0)' AND ctid < '({end},0)'"),
    };
    let format = match format {
        BulkFormat::PostgresBinary => "binary",
        BulkFormat::PostgresText => "text",
    };
    format!("COPY ({}{condition}) TO STDOUT (FORMAT {format})", select(table, is_partitioned))
}

/// Whether the name still means this table, its files are those of the snapshot, and so are its partitions. Queries of the catalog
/// see the snapshot; functions see the present, which can't change while the table is locked.
fn unchanged(table: &MappedTable, is_partitioned: bool) -> String {
    let id = table.version.id;
    let name = quote_literal(&qualified(table.source()));
    let same_files = format!(
        "SELECT count(*) = 1 FROM pg_class c WHERE c.oid = {id} AND c.oid = to_regclass({name})
         AND (c.relkind = 'p' OR c.relfilenode = pg_relation_filenode(c.oid))"
    );
    let same_columns = same_columns(table);
    if !is_partitioned {
        return format!("SELECT ({same_files}) AND ({same_columns})");
    }
    format!(
        "WITH RECURSIVE parts(id) AS (SELECT {id}::oid UNION ALL SELECT i.inhrelid FROM pg_inherits i JOIN parts p ON i.inhparent = p.id)
         SELECT ({same_files}) AND ({same_columns}) AND (SELECT array_agg(id ORDER BY id) FROM parts) = (SELECT array_agg(relid::oid ORDER BY relid::oid) FROM pg_partition_tree({id}))
         AND NOT EXISTS (SELECT FROM pg_class c JOIN parts p ON p.id = c.oid WHERE c.relkind <> 'p' AND c.relfilenode IS DISTINCT FROM pg_relation_filenode(c.oid))"
    )
}

/// Whether the snapshot has the columns that are copied, and their names still mean them. What was altered before the snapshot would
/// not be met in the log again.
fn same_columns(table: &MappedTable) -> String {
    let id = table.version.id;
    if table.version.columns.is_empty() {
        return "SELECT true".to_owned();
    }
    let columns = table.version.columns.iter();
    let columns =
        columns.map(|column| format!("({}, {}, {}::oid, {})", column.number, quote_literal(&column.name), column.type_id, column.modifier));
    let excluded = table.excluded.iter().map(|name| format!(" AND attname <> {}", quote_literal(name))).collect::<String>();
    format!(
        "SELECT bool_and(coalesce(a.attnum IS NOT NULL AND c.number IS NOT NULL AND a.attname = c.name AND a.atttypid = c.type AND a.atttypmod = c.modifier
                AND (pg_identify_object_as_address('pg_class'::regclass, {id}, c.number)).object_names[3] = c.name, false))
         FROM (VALUES {}) AS c (number, name, type, modifier) FULL JOIN (SELECT * FROM pg_attribute
            WHERE attrelid = {id} AND attnum > 0 AND NOT attisdropped AND attgenerated = ''{excluded}) a ON a.attnum = c.number",
        columns.collect::<Vec<_>>().join(", ")
    )
}

/// What the server says when the transaction that has exported a snapshot is over: the name is no snapshot's, its file is gone,
/// or the process is (`ImportSnapshot` in its source; the codes differ between versions).
fn is_lost(error: &ServerError) -> bool {
    let codes = [SqlState::INVALID_PARAMETER_VALUE, SqlState::UNDEFINED_OBJECT, SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE];
    codes.iter().any(|code| code.code() == error.code)
}

fn lost(why: &dyn std::fmt::Display) -> Error {
    Error::retry(reason::SNAPSHOT_LOST, format!("the source's snapshot is gone: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(ranges: &[Range]) -> Vec<(u64, u64)> {
        assert!(ranges.iter().enumerate().all(|(index, range)| range.number as usize == index));
        ranges.iter().map(|range| range.blocks.expect("a range of blocks")).collect()
    }

    #[test]
    fn small_tables_are_one_range() {
        for (blocks, estimated, rows) in [(0, 0, 1000), (1, 5000, 1000), (100, 1000, 1000), (100, 0, 1000)] {
            assert_eq!(split(blocks, estimated, rows), [Range { number: 0, blocks: None }]);
        }
    }

    #[test]
    fn ranges_follow_each_other_and_the_last_is_open() {
        assert_eq!(blocks(&split(10, 1000, 300)), [(0, 3), (3, 6), (6, 9), (9, END)]);
        assert_eq!(blocks(&split(10, 1000, 500)), [(0, 5), (5, END)]);
        assert_eq!(blocks(&split(3, 1_000_000, 1)), [(0, 1), (1, 2), (2, END)]);
    }

    #[test]
    fn ranges_have_no_gap_whatever_the_statistics_say() {
        for blocks_seen in 2..200 {
            for estimated in [1, 10, 999, 1001, 100_000] {
                let ranges = split(blocks_seen, estimated, 100);
                if ranges.len() > 1 {
                    let ranges = blocks(&ranges);
                    assert_eq!(ranges[0].0, 0);
                    assert!(ranges.windows(2).all(|pair| pair[0].1 == pair[1].0));
                    assert_eq!(ranges.last().map(|last| last.1), Some(END));
                }
            }
        }
    }
}
