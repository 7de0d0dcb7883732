//! What one writer has committed, kept apart from any database.

use std::collections::BTreeMap;

/// The tables that it writes to; each is one index below.
pub const TABLES: [&str; 5] = ["accounts", "pairs", "notes", "parts", "log"];
/// No key, full identity.
pub const LOG: usize = 4;

/// Tables of different kinds, with the same columns.
pub const CREATE: &str = "
    CREATE TABLE accounts (w int, id bigint PRIMARY KEY, n bigint, u text UNIQUE, big text);
    CREATE TABLE pairs (w int, id bigint, n bigint, u text, big text, PRIMARY KEY (id, w));
    CREATE TABLE notes (w int, id bigint PRIMARY KEY, n bigint, u text NOT NULL, big text);
    CREATE UNIQUE INDEX notes_u ON notes (u);
    ALTER TABLE notes REPLICA IDENTITY USING INDEX notes_u;
    CREATE TABLE parts (w int, id bigint, n bigint, u text, big text, PRIMARY KEY (id)) PARTITION BY HASH (id);
    CREATE TABLE parts_0 PARTITION OF parts FOR VALUES WITH (MODULUS 3, REMAINDER 0);
    CREATE TABLE parts_1 (id bigint NOT NULL, big text, u text, n bigint, w int);
    ALTER TABLE parts ATTACH PARTITION parts_1 FOR VALUES WITH (MODULUS 3, REMAINDER 1);
    CREATE TABLE parts_2 PARTITION OF parts FOR VALUES WITH (MODULUS 3, REMAINDER 2);
    CREATE TABLE log (w int, id bigint, n bigint, u text, big text);
    ALTER TABLE log REPLICA IDENTITY FULL;
    CREATE TABLE ledger (w int, n bigint, digest text, PRIMARY KEY (w, n));
    ALTER TABLE accounts ALTER big SET STORAGE EXTERNAL;
    ALTER TABLE pairs ALTER big SET STORAGE EXTERNAL;
    ALTER TABLE notes ALTER big SET STORAGE EXTERNAL;
    ALTER TABLE parts_0 ALTER big SET STORAGE EXTERNAL;
    ALTER TABLE log ALTER big SET STORAGE EXTERNAL;";

/// Two of them as the target may have them before the first copy.
pub const UNIQUE: &str = "
    CREATE TABLE accounts (w int, id bigint PRIMARY KEY, n bigint, u text UNIQUE, big text);
    CREATE TABLE pairs (w int, id bigint, n bigint, u text UNIQUE, big text, PRIMARY KEY (id, w));";

/// A row as [`Model::lines`] writes it, from SQL.
pub const LINE: &str = "concat_ws(',', w, id, n, u, COALESCE(split_part(big, '|', 1) || ':' || length(big), '-'))";

/// Repetitions in a long value: long enough to be stored out of line.
const LONG: usize = 800;

/// The SQL of a long value.
pub fn big(seed: u32) -> String {
    if seed == 0 { "NULL".into() } else { format!("repeat('b{seed}|', {LONG})") }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub n: i64,
    /// Behind the letter `u`; unique.
    pub u: i64,
    /// Which long value; 0 is NULL.
    pub big: u32,
    /// How often the row is there; more than once only in a table without key.
    pub copies: i64,
}

#[derive(Default)]
struct Table {
    rows: BTreeMap<i64, Row>,
    count: i64,
    sum: i64,
}

/// The writer's rows, and what it would take to go back.
pub struct Model {
    writer: usize,
    tables: [Table; TABLES.len()],
    undo: Vec<(usize, i64, Option<Row>)>,
    /// Transactions that have committed.
    pub committed: i64,
    /// Ids and unique values that were never used begin here.
    pub fresh: i64,
}

impl Model {
    pub fn new(writer: usize) -> Self {
        Self {
            writer,
            tables: std::array::from_fn(|_| Table::default()),
            undo: Vec::new(),
            committed: 0,
            fresh: (writer as i64 + 1) * 1_000_000_000_000,
        }
    }

    pub fn rows(&self, table: usize) -> &BTreeMap<i64, Row> {
        &self.tables[table].rows
    }

    /// That many ids, one behind the other.
    pub fn take_fresh(&mut self, count: i64) -> i64 {
        self.fresh += count;
        self.fresh - count
    }

    pub fn set(&mut self, table: usize, id: i64, row: Option<Row>) {
        let before = self.put(table, id, row);
        self.undo.push((table, id, before));
    }

    fn put(&mut self, table: usize, id: i64, row: Option<Row>) -> Option<Row> {
        let Table { rows, count, sum } = &mut self.tables[table];
        if let Some(row) = &row {
            *count += row.copies;
            *sum += row.copies * row.n;
        }
        let before = match row {
            Some(row) => rows.insert(id, row),
            None => rows.remove(&id),
        };
        if let Some(row) = &before {
            *count -= row.copies;
            *sum -= row.copies * row.n;
        }
        before
    }

    /// Changes the rows of a range of ids.
    pub fn update(&mut self, table: usize, range: (i64, i64), change: impl Fn(i64, &mut Row)) {
        let ids: Vec<i64> = self.rows(table).range(range.0..=range.1).map(|(id, _)| *id).collect();
        for id in ids {
            let mut row = self.rows(table)[&id].clone();
            change(id, &mut row);
            self.set(table, id, Some(row));
        }
    }

    /// Takes the rows of a range of ids away.
    pub fn remove(&mut self, table: usize, range: (i64, i64)) -> Vec<(i64, Row)> {
        let rows: Vec<_> = self.rows(table).range(range.0..=range.1).map(|(id, row)| (*id, row.clone())).collect();
        rows.iter().for_each(|(id, _)| self.set(table, *id, None));
        rows
    }

    /// Where the transaction stands, for [`Self::roll_back`].
    pub fn mark(&self) -> usize {
        self.undo.len()
    }

    pub fn roll_back(&mut self, mark: usize) {
        while self.undo.len() > mark {
            let (table, id, before) = self.undo.pop().expect("more than the mark");
            self.put(table, id, before);
        }
    }

    pub fn commit(&mut self) {
        self.undo.clear();
        self.committed += 1;
    }

    /// Count and sum of each table, as [`DIGEST`] computes them.
    pub fn digest(&self) -> String {
        let tables = self.tables.iter().map(|table| format!("{}:{}", table.count, table.sum));
        tables.collect::<Vec<_>>().join(" ")
    }

    /// The rows of a table as text.
    pub fn lines(&self, table: usize) -> impl Iterator<Item = String> {
        self.tables[table].rows.iter().flat_map(|(id, row)| {
            let big = match row.big {
                0 => "-".into(),
                seed => format!("b{seed}:{}", LONG * format!("b{seed}|").len()),
            };
            std::iter::repeat_n(format!("{},{id},{},u{},{big}", self.writer, row.n, row.u), row.copies as usize)
        })
    }
}

/// Count and sum of a table on a server, by writer.
pub const DIGEST: &str = "SELECT w, count(*) || ':' || sum(n) FROM";
