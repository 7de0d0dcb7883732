//! A consumer of the log that checks each part's promises and plays the changes onto tables in memory.

use sluice::connectors::postgres::connect::{Side, connect};
use sluice::connectors::postgres::log::{LogConfig, PostgresLog, StreamingPause};
use sluice::connectors::postgres::replication::connect_replication;
use sluice::connectors::postgres::{Endpoint, Lsn};
use sluice::engine::batch::{Batch, CellKind, Image, Op, Part};
use sluice::engine::roles::{BatchLimits, ChangeLog as _};
use sluice::engine::spill::Room;
use sluice::engine::table::{Column, Identity, Lineage, MappedTable, QualifiedName, TableVersion};
use std::collections::HashMap;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;
use tokio_postgres::types::{FromSql, Type};

pub const LIMITS: BatchLimits = BatchLimits { rows: 1000, bytes: 1 << 20, delay: Duration::from_millis(20) };

/// A value: NULL, unchanged, or its bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Value {
    Null,
    Unchanged,
    Bytes(Vec<u8>),
}

impl std::fmt::Debug for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Null => f.write_str("NULL"),
            Self::Unchanged => f.write_str("unchanged"),
            Self::Bytes(bytes) => write!(f, "{}", bytes.escape_ascii()),
        }
    }
}

pub type Row = Vec<Value>;

#[derive(Clone, Debug)]
pub struct Change {
    pub op: Op,
    pub table: String,
    pub old: Option<Row>,
    pub old_is_full: bool,
    pub new: Option<Row>,
    /// How the table differs from the mapped one.
    pub differs: Option<String>,
}

/// One transaction as it was received.
#[derive(Clone, Debug)]
pub struct Transaction {
    pub end: Lsn,
    pub changes: Vec<Change>,
}

pub struct Follower {
    pub log: PostgresLog,
    limits: BatchLimits,
    pub transactions: Vec<Transaction>,
    pub parts: usize,
    pub idle_parts: usize,
    pub received: Lsn,
    open: Vec<Change>,
    was_open: Option<Lsn>,
    last_end: Lsn,
    tables: HashMap<String, Vec<Row>>,
    keys: HashMap<String, Vec<usize>>,
}

impl Follower {
    pub fn new(log: PostgresLog, limits: BatchLimits) -> Self {
        Self {
            log,
            limits,
            transactions: Vec::new(),
            parts: 0,
            idle_parts: 0,
            received: Lsn(0),
            open: Vec::new(),
            was_open: None,
            last_end: Lsn(0),
            tables: HashMap::new(),
            keys: HashMap::new(),
        }
    }

    /// Takes one part.
    pub async fn step(&mut self) {
        let part = tokio::time::timeout(Duration::from_secs(20), self.log.next()).await.expect("a part in time").expect("a part");
        self.take(&part);
    }

    /// Checks what [`Part`] promises and keeps its changes.
    pub fn take(&mut self, part: &Part<Lsn>) {
        self.parts += 1;
        self.idle_parts += usize::from(part.is_idle());
        let count = part.batch.changes().len();
        assert!(count <= self.limits.rows, "{count} changes");
        assert_eq!(part.continues, self.was_open.is_some(), "a part continues what the last one left open");
        assert_eq!(part.open, part.open_from.is_some());
        if part.continues && !part.boundaries.is_empty() {
            assert_eq!((part.boundaries.len(), part.boundaries[0].changes, part.open), (1, count, false), "nothing behind the end");
            assert!(self.was_open.unwrap() <= part.boundaries[0].end);
        }
        let last_boundary = part.boundaries.last().map_or(0, |boundary| boundary.changes);
        assert!(part.open || last_boundary == count, "changes without an end");
        let mut at = 0;
        for boundary in &part.boundaries {
            assert!(boundary.end > self.last_end && boundary.changes >= at, "boundaries go on");
            let mut changes = std::mem::take(&mut self.open);
            changes.extend(self.changes(&part.batch, at..boundary.changes));
            changes.iter().for_each(|change| self.play(change));
            self.transactions.push(Transaction { end: boundary.end, changes });
            (at, self.last_end) = (boundary.changes, boundary.end);
        }
        let rest = self.changes(&part.batch, at..count);
        self.open.extend(rest);
        if let Some(open_from) = part.open_from {
            assert!(open_from >= self.last_end);
        }
        assert!(part.received >= self.received.max(self.last_end), "positions only grow");
        (self.received, self.was_open) = (part.received, part.open_from);
    }

    fn changes(&mut self, batch: &Batch, range: std::ops::Range<usize>) -> Vec<Change> {
        let owned = |image: Image| {
            let cells = batch.cells(image).iter().map(|cell| match cell.kind {
                CellKind::Null => Value::Null,
                CellKind::Unchanged => Value::Unchanged,
                CellKind::Text | CellKind::Binary => Value::Bytes(batch.bytes(*cell).to_vec()),
            });
            image.is_present().then(|| cells.collect())
        };
        let changes = batch.changes()[range].iter().map(|change| {
            let version = batch.table(change);
            let keys = version.columns.iter().enumerate().filter(|(_, column)| column.key || version.identity == Identity::Full);
            self.keys.entry(version.name.name.clone()).or_insert_with(|| keys.map(|(index, _)| index).collect());
            Change {
                op: change.op,
                table: version.name.name.clone(),
                old: owned(change.old),
                old_is_full: change.old_is_full,
                new: owned(change.new),
                differs: version.differs.clone(),
            }
        });
        changes.collect()
    }

    /// Plays a change; it must fit exactly. Changes of a table that is not as mapped are only kept.
    fn play(&mut self, change: &Change) {
        if change.differs.is_some() {
            return;
        }
        let keys = &self.keys[&change.table];
        let rows = self.tables.entry(change.table.clone()).or_default();
        let find = |rows: &Vec<Row>, by: &Row| {
            let same = |row: &Row| keys.iter().all(|index| row[*index] == by[*index]);
            rows.iter().position(same).unwrap_or_else(|| panic!("no row for {change:?}"))
        };
        match (change.op, &change.old, &change.new) {
            (Op::Insert, None, Some(new)) => rows.push(new.clone()),
            (Op::Update, old, Some(new)) => {
                let at = find(rows, old.as_ref().unwrap_or(new));
                for (value, new) in rows[at].iter_mut().zip(new) {
                    if *new != Value::Unchanged {
                        value.clone_from(new);
                    }
                }
            }
            (Op::Delete, Some(old), None) => {
                let at = find(rows, old);
                rows.swap_remove(at);
            }
            (Op::Truncate, None, None) => rows.clear(),
            _ => panic!("images do not fit: {change:?}"),
        }
    }

    /// Follows until everything committed by now is here.
    pub async fn follow_to_head(&mut self, client: &tokio_postgres::Client) {
        let head = head(client).await;
        self.follow_to(head).await;
    }

    pub async fn follow_to(&mut self, position: Lsn) {
        while self.received < position {
            self.step().await;
        }
    }

    /// Fails with the first rows in which a table differs from what its server has.
    pub async fn assert_contents(&self, endpoint: &Endpoint, table: &str, binary: bool) {
        let mut here = self.tables.get(table).cloned().unwrap_or_default();
        here.sort();
        let there = table_contents(endpoint, table, binary).await;
        let differing = here.iter().zip(&there).find(|(here, there)| here != there);
        assert!(differing.is_none(), "{table}, binary {binary}: {differing:?}");
        assert_eq!(here.len(), there.len(), "{table}, binary {binary}");
    }
}

/// A position behind everything committed by now, which the server will come to.
pub async fn head(client: &tokio_postgres::Client) -> Lsn {
    let head: String = client.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await.unwrap().get(0);
    client.batch_execute("SELECT pg_logical_emit_message(true, 'test', '')").await.unwrap();
    head.parse().unwrap()
}

/// Any value as the bytes that came.
struct Raw(Value);

impl<'a> FromSql<'a> for Raw {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Self(Value::Bytes(raw.to_vec())))
    }

    fn from_sql_null(_: &Type) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Self(Value::Null))
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

/// The rows of a table as its server has them, sorted, in binary or text.
async fn table_contents(endpoint: &Endpoint, table: &str, binary: bool) -> Vec<Row> {
    let session = connect(endpoint, Side::Source, "").await.unwrap();
    let columns = columns(&session, table).await;
    // As text: what the type's output function writes; a cast to text writes some types otherwise.
    let value = |column: &Column| match column.name.as_str() {
        name if binary => name.to_owned(),
        name => format!("CASE WHEN {name} IS NOT NULL THEN format('%s', {name}) END"),
    };
    let list: Vec<_> = columns.iter().map(value).collect();
    let rows = session.query(&format!("SELECT {} FROM public.{table}", list.join(", ")), &[]).await.unwrap();
    let mut rows: Vec<Row> = rows.iter().map(|row| (0..row.len()).map(|at| row.get::<_, Raw>(at).0).collect()).collect();
    rows.sort();
    rows
}

async fn columns(client: &tokio_postgres::Client, table: &str) -> Vec<Column> {
    let sql = "SELECT attname::text, atttypid, nspname::text, typname::text, format_type(atttypid, atttypmod), attnotnull,
                      COALESCE(attnum = ANY (indkey), false), attnum::int4, atttypmod
                 FROM pg_catalog.pg_attribute
                 JOIN pg_catalog.pg_type t ON t.oid = atttypid
                 JOIN pg_catalog.pg_namespace n ON n.oid = typnamespace
                 LEFT JOIN pg_catalog.pg_index ON indrelid = attrelid AND indisprimary
                WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
                ORDER BY attnum";
    let rows = client.query(sql, &[&format!("public.{table}")]).await.unwrap();
    let column = |row: &tokio_postgres::Row| Column {
        name: row.get(0),
        type_id: row.get(1),
        type_name: QualifiedName::new(row.get::<_, String>(2), row.get::<_, String>(3)),
        declared: row.get(4),
        key: row.get(6),
        not_null: row.get(5),
        generated: None,
        collation: None,
        number: row.get(7),
        modifier: row.get(8),
    };
    rows.iter().map(column).collect()
}

/// A table of schema public as it is now.
pub async fn mapped(client: &tokio_postgres::Client, table: &str) -> MappedTable {
    let row = client
        .query_one("SELECT oid, relreplident = 'f' FROM pg_class WHERE oid = $1::text::regclass", &[&format!("public.{table}")])
        .await
        .unwrap();
    let identity = if row.get(1) { Identity::Full } else { Identity::Key };
    let version = TableVersion {
        id: row.get(0),
        name: QualifiedName::new("public", table),
        columns: columns(client, table).await,
        identity,
        differs: None,
    };
    MappedTable {
        version: Arc::new(version),
        target: QualifiedName::new("public", table),
        generated: Vec::new(),
        excluded: Vec::new(),
        accept_narrower_types: false,
        primary_key: Vec::new(),
        primary_key_name: None,
        estimated_rows: 0,
        blocks: 0,
        structure: Arc::default(),
        lineage: Lineage::default(),
    }
}

/// Makes the publication `p`.
pub async fn publish(client: &tokio_postgres::Client, tables: &[&str]) {
    client.batch_execute(&format!("CREATE PUBLICATION p FOR TABLE {}", tables.join(", "))).await.unwrap();
}

/// Makes a lasting slot; where it starts.
pub async fn create_slot(endpoint: &Endpoint, slot: &str) -> Lsn {
    connect_replication(endpoint, "").await.unwrap().create_slot(slot, false, false).await.unwrap().consistent_point
}

/// Slot `s` with publication `p`, and memory enough.
pub fn config(endpoint: &Endpoint, tables: &[MappedTable], binary: bool, limits: BatchLimits) -> LogConfig {
    LogConfig {
        endpoint: endpoint.clone(),
        slot: "s".into(),
        publication: "p".into(),
        tables: tables.to_vec(),
        binary,
        limits,
        room: Room::in_memory(64 << 20),
        pause: StreamingPause::default(),
    }
}

/// Opens slot `s` with publication `p`; a reader that has just gone may still hold it for a moment.
pub async fn open(endpoint: &Endpoint, from: Lsn, tables: &[MappedTable], binary: bool, limits: BatchLimits) -> PostgresLog {
    open_with(config(endpoint, tables, binary, limits), from).await
}

/// The same with other settings.
pub async fn open_with(config: LogConfig, from: Lsn) -> PostgresLog {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    loop {
        match PostgresLog::open(config.clone(), from).await {
            Ok(log) => return log,
            Err(error) if error.reason == sluice::engine::error::reason::SLOT_IN_USE && tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => panic!("{error}"),
        }
    }
}
