//! Mapped tables, batches and parts written by hand, and the streams that they belong to.
#![allow(dead_code)] // each test target uses its part of it

use sluice::connectors::postgres::Lsn;
use sluice::engine::batch::{Batch, Boundary, CellKind, Change, Image, Op, Part};
use sluice::engine::error::Result;
use sluice::engine::register::Reached;
use sluice::engine::roles::{Applied, Apply, Claim, Owner, StreamKey};
use sluice::engine::table::{Column, Identity, Lineage, MappedTable, QualifiedName, TableVersion};
use std::sync::Arc;
use std::time::SystemTime;

/// A cell as tests write it.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Null,
    Unchanged,
    Text(String),
    Binary(Vec<u8>),
}

pub fn text(value: impl std::fmt::Display) -> Value {
    Value::Text(value.to_string())
}

pub fn int(value: i32) -> Value {
    Value::Binary(value.to_be_bytes().to_vec())
}

/// A column `name type`, with `!` before the name when it belongs to the key.
pub fn column(text: &str) -> Column {
    let (name, declared) = text.split_once(' ').expect("name and type");
    let key = name.starts_with('!');
    let base = declared.split('(').next().expect("a type");
    let (type_id, type_name) = match base {
        "int2" => (21, "int2"),
        "int4" => (23, "int4"),
        "int8" => (20, "int8"),
        "text" => (25, "text"),
        "varchar" => (1043, "varchar"),
        "char" => (1042, "bpchar"),
        "numeric" => (1700, "numeric"),
        "float8" => (701, "float8"),
        "json" => (114, "json"),
        "point" => (600, "point"),
        "int4[]" => (1007, "_int4"),
        "text[]" => (1009, "_text"),
        "regclass" => (2205, "regclass"),
        "public.mood" => (90_001, "public.mood"),
        other => panic!("type {other} is not known here"),
    };
    // As a catalog says it.
    let declared = match declared {
        "int2" => "smallint",
        "int4" => "integer",
        "int8" => "bigint",
        "int4[]" => "integer[]",
        "float8" => "double precision",
        other => other,
    };
    let declared = declared.replace("varchar", "character varying").replace("char(", "character(").replace("varying character", "varying");
    let (schema, type_name) = type_name.split_once('.').unwrap_or(("pg_catalog", type_name));
    Column {
        name: name.trim_start_matches('!').into(),
        type_id,
        type_name: QualifiedName::new(schema, type_name),
        declared,
        key,
        not_null: key,
        generated: None,
        collation: None,
        number: 0,
        modifier: -1,
    }
}

/// A table of source schema `public` that goes to `schema` on the target; without a key column its identity is the whole row.
pub fn mapped(id: u32, name: &str, schema: &str, columns: &[&str]) -> MappedTable {
    let columns: Vec<Column> = columns.iter().map(|text| column(text)).collect();
    let primary_key: Vec<String> = columns.iter().filter(|column| column.key).map(|column| column.name.clone()).collect();
    MappedTable {
        target: QualifiedName::new(schema, name),
        generated: vec![],
        excluded: vec![],
        accept_narrower_types: false,
        primary_key_name: (!primary_key.is_empty()).then(|| format!("{name}_pkey")),
        version: Arc::new(TableVersion {
            id,
            name: QualifiedName::new("public", name),
            identity: if primary_key.is_empty() { Identity::Full } else { Identity::Key },
            columns,
            differs: None,
        }),
        primary_key,
        estimated_rows: 0,
        blocks: 0,
        structure: Arc::default(),
        lineage: Lineage::default(),
    }
}

/// Builds a batch change by change.
#[derive(Default)]
pub struct Changes {
    pub batch: Batch,
    group: u32,
}

impl Changes {
    fn image(&mut self, values: &[Value]) -> Image {
        let image = self.batch.begin_image();
        for value in values {
            match value {
                Value::Null => self.batch.push_cell(CellKind::Null, b""),
                Value::Unchanged => self.batch.push_cell(CellKind::Unchanged, b""),
                Value::Text(text) => self.batch.push_cell(CellKind::Text, text.as_bytes()),
                Value::Binary(bytes) => self.batch.push_cell(CellKind::Binary, bytes),
            }
        }
        self.batch.end_image(image)
    }

    pub fn push(&mut self, table: &MappedTable, op: Op, old: &[Value], new: &[Value]) {
        let number = self.batch.intern_table(&table.version);
        let (old, new) = (self.image(old), self.image(new));
        self.batch.push(Change { op, table: number, old, old_is_full: table.version.identity == Identity::Full, new, group: self.group });
    }

    pub fn insert(&mut self, table: &MappedTable, new: &[Value]) {
        self.push(table, Op::Insert, &[], new);
    }

    pub fn update(&mut self, table: &MappedTable, old: &[Value], new: &[Value]) {
        self.push(table, Op::Update, old, new);
    }

    pub fn delete(&mut self, table: &MappedTable, old: &[Value]) {
        self.push(table, Op::Delete, old, &[]);
    }

    /// One statement over these tables.
    pub fn truncate(&mut self, tables: &[&MappedTable]) {
        self.group += 1;
        for table in tables {
            self.push(table, Op::Truncate, &[], &[]);
        }
    }

    /// A part that is one whole transaction.
    pub fn committed(self, end: u64) -> Part<Lsn> {
        self.part(false, Some(end), end)
    }

    /// A part with one piece of a transaction; with its end when `end` is there.
    pub fn part(self, continues: bool, end: Option<u64>, received: u64) -> Part<Lsn> {
        let boundary = end.map(|end| Boundary { changes: self.batch.changes().len(), end: Lsn(end), committed_at: SystemTime::now() });
        Part {
            batch: self.batch,
            boundaries: boundary.into_iter().collect(),
            continues,
            open: end.is_none(),
            open_from: end.is_none().then_some(Lsn(received)),
            ..Part::idle(Lsn(received))
        }
    }
}

/// Applies a part by itself; everything in it is due.
pub async fn apply<A: Apply>(applier: &mut A, part: Part<A::Position>) -> Result<Applied> {
    applier.apply(Arc::new(part), &all, &Reached::default()).await?;
    Ok(applier.applied().await?.expect("the part's outcome"))
}

/// Everything is due.
pub fn all(_: u32, _: usize) -> bool {
    true
}

pub fn key(slot: &str) -> StreamKey {
    StreamKey { system_identifier: "7000000000000000001".into(), database: "shop".into(), slot: slot.into() }
}

pub fn claim(slot: &str, epoch: i64) -> Claim {
    Claim { key: key(slot), epoch }
}

pub fn owner(name: &str) -> Owner {
    Owner { namespace: "team".into(), name: name.into(), uid: format!("uid-of-{name}") }
}

/// The rows of a table as text, sorted.
pub async fn rows(client: &tokio_postgres::Client, table: &str) -> Vec<String> {
    let sql = format!("SELECT (t.*)::text FROM {table} AS t ORDER BY (t.*)::text COLLATE \"C\"");
    let rows = client.query(&sql, &[]).await.expect("the rows");
    rows.iter().map(|row| row.get(0)).collect()
}
