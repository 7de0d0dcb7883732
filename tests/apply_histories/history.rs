//! A random history. Each change is first tried by a plain statement on the one copy of the tables: what that refuses has
//! not happened.

use crate::arrays;
use crate::changes::{Changes, Value, mapped};
use crate::tables::TableSpec;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use sluice::connectors::postgres::sql::quote_literal;
use sluice::engine::table::{Identity, MappedTable};
use std::sync::Arc;
use tokio_postgres::Client;

/// Values of a row as text; `None` is NULL.
type Row = Vec<Option<String>>;

/// How values are sent.
#[derive(Clone, Copy, PartialEq)]
enum Format {
    Text,
    Binary,
    /// Now in one way, now in the other.
    Both,
}

/// A random history and the state that it has led to.
pub struct History<'a> {
    pub random: StdRng,
    pub specs: &'static [TableSpec],
    pub mapped: Vec<MappedTable>,
    /// What has happened since it was taken.
    pub changes: Changes,
    /// Rows that were inserted, updated, deleted.
    pub counts: [u64; 3],
    admin: &'a Client,
    rows: Vec<Vec<Row>>,
    format: Format,
    /// Key changes are left out where the target could not follow.
    moves_all_keys: bool,
}

impl<'a> History<'a> {
    pub fn new(seed: u64, specs: &'static [TableSpec], admin: &'a Client, moves_all_keys: bool) -> Self {
        let mapped = specs.iter().zip(1..).map(|(spec, id)| {
            let mut table = mapped(id, spec.name, "mirror", spec.columns);
            let version = Arc::make_mut(&mut table.version);
            if spec.sends_full {
                version.identity = Identity::Full;
            }
            for &column in spec.required {
                version.columns[column].not_null = true;
            }
            table
        });
        Self {
            random: StdRng::seed_from_u64(seed),
            specs,
            mapped: mapped.collect(),
            changes: Changes::default(),
            counts: [0; 3],
            admin,
            rows: vec![Vec::new(); specs.len()],
            format: [Format::Text, Format::Binary, Format::Both][seed as usize % 3],
            moves_all_keys,
        }
    }

    pub fn chance(&mut self, percent: u32) -> bool {
        self.random.random_range(0..100) < percent
    }

    fn binary(&mut self) -> bool {
        self.format == Format::Binary || (self.format == Format::Both && self.chance(50))
    }

    fn pick(&mut self, table: usize) -> Option<usize> {
        let count = self.rows[table].len();
        (count > 0).then(|| self.random.random_range(0..count))
    }

    fn value(&mut self, table: usize, column: usize) -> Option<String> {
        if let Some(parent) = self.specs[table].parent
            && column == self.mapped[table].version.columns.len() - 1
        {
            let row = self.pick(parent)?;
            return self.rows[parent][row][0].clone();
        }
        let described = &self.mapped[table].version.columns[column];
        let (key, kind, huge) = (described.key, described.type_name.name.clone(), described.name == "huge");
        if !described.not_null && self.chance(15) {
            return None;
        }
        let number = self.random.random_range(0..25);
        Some(match kind.as_str() {
            "int4" => number.to_string(),
            "numeric" if key => number.to_string(),
            // Equal but not the same.
            "numeric" => ["1.0", "1.00", "2"][number as usize % 3].to_owned(),
            "_int4" | "_text" => arrays::literal(kind == "_text", number),
            "json" => format!("{{\"n\": {}}}", number % 3),
            "bpchar" => format!("t{number}"),
            "mood" => format!("t{}", number % 4 + 1),
            _ if huge => huge_text(number),
            _ => match number {
                0 => "tab\t, \"quoted\" 'x' \\back\\ \n line".to_owned(),
                1 => "ünï ✓ {a,b} NULL \\N".to_owned(),
                2 if !key => String::new(),
                3 => "long ".repeat(200),
                _ => format!("t{number}"),
            },
        })
    }

    /// How a value is sent: text, or binary where this test knows the form.
    fn cell(&self, table: usize, column: usize, value: &Option<String>, binary: bool) -> Value {
        let kind = self.mapped[table].version.columns[column].type_name.name.as_str();
        let Some(text) = value else { return Value::Null };
        match (binary, kind) {
            (true, "int4") => Value::Binary(text.parse::<i32>().expect("a number").to_be_bytes().to_vec()),
            (true, "text" | "json" | "bpchar" | "mood") => Value::Binary(text.clone().into_bytes()),
            (true, "_int4" | "_text") => Value::Binary(arrays::binary(text, kind == "_text")),
            _ => Value::Text(text.clone()),
        }
    }

    fn cells(&self, table: usize, row: &Row, binary: bool) -> Vec<Value> {
        (0..row.len()).map(|column| self.cell(table, column, &row[column], binary)).collect()
    }

    /// The old image that the source would send.
    fn old(&self, table: usize, row: &Row, binary: bool) -> Vec<Value> {
        let mut cells = self.cells(table, row, binary);
        let spec = &self.specs[table];
        if spec.key > 0 && !spec.sends_full {
            cells[spec.key..].fill(Value::Null);
        }
        cells
    }

    /// Tries a statement on the plain tables.
    async fn happens(&self, sql: &str) -> bool {
        match self.admin.batch_execute(sql).await {
            Ok(()) => true,
            // Constraints, and a range that ends before it begins.
            Err(error) if error.code().is_some_and(|code| code.code().starts_with("23") || code.code() == "22000") => false,
            Err(error) => panic!("{sql}: {error:?}"),
        }
    }

    pub async fn one_change(&mut self) {
        let table = self.random.random_range(0..self.specs.len());
        match self.random.random_range(0..100) {
            0..30 => {
                let row = self.row(table);
                self.insert(table, vec![row]).await;
            }
            30..31 => self.bulk(table).await,
            31..44 => {
                if let Some(at) = self.pick(table) {
                    self.delete(table, at).await;
                }
            }
            44..45 => self.truncate().await,
            45..50 => self.replace(table).await,
            50..62 => self.swap(table).await,
            _ => {
                if let Some(at) = self.pick(table) {
                    self.random_update(table, at).await;
                }
            }
        }
    }

    fn row(&mut self, table: usize) -> Row {
        (0..self.mapped[table].version.columns.len()).map(|column| self.value(table, column)).collect()
    }

    async fn insert(&mut self, table: usize, rows: Vec<Row>) -> bool {
        let idents: Vec<String> = (0..rows[0].len()).map(|column| self.ident(table, column)).collect();
        let values: Vec<String> = rows.iter().map(|row| format!("({})", row.iter().map(literal).collect::<Vec<_>>().join(", "))).collect();
        let sql = format!("INSERT INTO {} ({}) VALUES {}", self.plain(table), idents.join(", "), values.join(", "));
        if !self.happens(&sql).await {
            return false;
        }
        for row in rows {
            let binary = self.binary();
            let cells = self.cells(table, &row, binary);
            self.changes.insert(&self.mapped[table], &cells);
            self.rows[table].push(row);
            self.counts[0] += 1;
        }
        true
    }

    /// Enough rows for a COPY; some of them are gone again soon.
    async fn bulk(&mut self, table: usize) {
        let first = self.random.random_range(1000..5000);
        let count = self.random.random_range(201..260);
        let mut rows = Vec::new();
        for number in first..first + count {
            let mut row = self.row(table);
            for (column, value) in row.iter_mut().enumerate() {
                let described = &self.mapped[table].version.columns[column];
                let last = self.specs[table].parent.is_some() && column > 0 && described.type_name.name == "int4";
                match described.type_name.name.as_str() {
                    "int4" | "numeric" if !last => *value = Some(number.to_string()),
                    "text" | "bpchar" if described.name != "huge" => *value = Some(format!("bulk {number}")),
                    _ if described.name == "huge" => *value = None,
                    _ => {}
                }
            }
            rows.push(row);
        }
        let there = self.rows[table].len();
        if self.insert(table, rows).await && self.chance(70) {
            while self.rows[table].len() > there && self.delete(table, self.rows[table].len() - 1).await {}
        }
    }

    async fn delete(&mut self, table: usize, at: usize) -> bool {
        let row = self.rows[table][at].clone();
        if !self.happens(&format!("DELETE FROM {} WHERE {}", self.plain(table), self.finds(table, &row))).await {
            return false;
        }
        self.rows[table].swap_remove(at);
        let binary = self.binary();
        let old = self.old(table, &row, binary);
        self.changes.delete(&self.mapped[table], &old);
        self.counts[2] += 1;
        true
    }

    /// A row goes, and another takes over all its values but the key, or the key and nothing else.
    async fn replace(&mut self, table: usize) {
        let Some(at) = self.pick(table) else { return };
        let old = self.rows[table][at].clone();
        let key = self.specs[table].key;
        if self.delete(table, at).await {
            let mut row = self.row(table);
            if self.chance(50) {
                row[key..].clone_from_slice(&old[key..]);
            } else {
                row[..key].clone_from_slice(&old[..key]);
            }
            self.insert(table, vec![row]).await;
        }
    }

    async fn truncate(&mut self) {
        let mut tables: Vec<usize> = (0..self.specs.len()).filter(|_| self.random.random_range(0..3) == 0).collect();
        // A table that others refer to goes together with them.
        for child in 0..self.specs.len() {
            if let Some(parent) = self.specs[child].parent
                && tables.contains(&parent)
                && !tables.contains(&child)
            {
                tables.push(child);
            }
        }
        let names: Vec<String> = tables.iter().map(|table| self.plain(*table)).collect();
        if !tables.is_empty() && self.happens(&format!("TRUNCATE {}", names.join(", "))).await {
            let mapped: Vec<&MappedTable> = tables.iter().map(|table| &self.mapped[*table]).collect();
            self.changes.truncate(&mapped);
            for table in tables {
                self.rows[table].clear();
            }
        }
    }

    /// Two rows exchange their values of a column through a third value, as far as they can.
    async fn swap(&mut self, table: usize) {
        let swaps = self.specs[table].swaps;
        let (Some(a), Some(b)) = (self.pick(table), self.pick(table)) else { return };
        if swaps.is_empty() || a == b {
            return;
        }
        let column = swaps[self.random.random_range(0..swaps.len())];
        if column < self.specs[table].key && !self.may_move_key(table) {
            return;
        }
        let (mine, theirs) = (self.rows[table][a][column].clone(), self.rows[table][b][column].clone());
        for (at, value) in [(a, Some("99999".to_owned())), (b, mine), (a, theirs)] {
            let mut row = self.rows[table][at].clone();
            row[column] = value;
            if !self.update(table, at, row).await {
                return;
            }
        }
    }

    fn may_move_key(&self, table: usize) -> bool {
        self.moves_all_keys || !self.specs[table].fixed_key
    }

    async fn random_update(&mut self, table: usize, at: usize) {
        let mut row = self.rows[table][at].clone();
        let moves_key = self.may_move_key(table) && self.chance(30);
        let key = self.specs[table].key;
        for (column, value) in row.iter_mut().enumerate() {
            let change = if column < key { moves_key } else { self.chance(50) };
            if change {
                *value = self.value(table, column);
            }
        }
        self.update(table, at, row).await;
    }

    async fn update(&mut self, table: usize, at: usize, row: Row) -> bool {
        let before = self.rows[table][at].clone();
        let set: Vec<String> = (0..row.len()).map(|column| format!("{} = {}", self.ident(table, column), literal(&row[column]))).collect();
        let sql = format!("UPDATE {} SET {} WHERE {}", self.plain(table), set.join(", "), self.finds(table, &before));
        if !self.happens(&sql).await {
            return false;
        }
        let (key, binary) = (self.specs[table].key, self.binary());
        let moved = row[..key] != before[..key];
        let sends_old = moved || key == 0 || self.specs[table].sends_full || self.chance(10);
        let old = if sends_old { self.old(table, &before, binary) } else { Vec::new() };
        let mut new = self.cells(table, &row, binary);
        for column in key..row.len() {
            // As for a TOASTed value that did not change.
            if row[column] == before[column] && row[column].is_some() && self.chance(40) {
                new[column] = Value::Unchanged;
            }
        }
        self.changes.update(&self.mapped[table], &old, &new);
        self.rows[table][at] = row;
        self.counts[1] += 1;
        true
    }

    fn plain(&self, table: usize) -> String {
        format!("plain.\"{}\"", self.specs[table].name)
    }

    fn ident(&self, table: usize, column: usize) -> String {
        format!("\"{}\"", self.mapped[table].version.columns[column].name.replace('"', "\"\""))
    }

    fn finds(&self, table: usize, row: &Row) -> String {
        let key = self.specs[table].key;
        if key > 0 {
            let equal = (0..key).map(|column| format!("{} = {}", self.ident(table, column), literal(&row[column])));
            return equal.collect::<Vec<_>>().join(" AND ");
        }
        let same =
            (0..row.len()).map(|column| format!("{}::text IS NOT DISTINCT FROM {}", self.ident(table, column), literal(&row[column])));
        format!("ctid = (SELECT ctid FROM {} WHERE {} LIMIT 1)", self.plain(table), same.collect::<Vec<_>>().join(" AND "))
    }

    /// The statements that make the tables in a schema.
    pub fn create(&self, schema: &str) -> String {
        let on_target = schema == "mirror";
        let tables = self.specs.iter().enumerate().map(|(table, spec)| {
            let columns = (0..spec.columns.len()).map(|column| {
                let declared = &self.mapped[table].version.columns[column].declared;
                format!("{} {declared}", self.ident(table, column))
            });
            let mut parts: Vec<String> = columns.chain(spec.others.iter().map(|column| (*column).to_owned())).collect();
            if on_target && spec.reversed {
                parts.reverse();
            }
            parts.extend((!spec.constraints.is_empty()).then(|| spec.constraints.to_owned()));
            let then = if on_target { format!("{}; {}", spec.then, spec.on_target) } else { spec.then.to_owned() };
            let sql = format!("CREATE TABLE {{schema}}.\"{}\" ({}) {}; {then};", spec.name, parts.join(", "), spec.suffix);
            sql.replace("{schema}", schema)
        });
        format!("DROP SCHEMA IF EXISTS {schema} CASCADE; CREATE SCHEMA {schema}; {}", tables.collect::<Vec<_>>().join("\n"))
    }

    /// The rows of a table as text, sorted.
    pub async fn rows(&self, schema: &str, table: usize) -> Vec<String> {
        let spec = &self.specs[table];
        let columns = (0..spec.columns.len()).map(|column| self.ident(table, column));
        let columns: Vec<String> = columns.chain(spec.other_names.iter().map(|name| (*name).to_owned())).collect();
        let row = format!("ROW({})::text", columns.join(", "));
        let sql = format!("SELECT {row} FROM {schema}.\"{}\" ORDER BY {row} COLLATE \"C\"", spec.name);
        let rows = self.admin.query(&sql, &[]).await.expect("the rows");
        rows.iter().map(|row| row.get(0)).collect()
    }
}

fn literal(value: &Option<String>) -> String {
    value.as_ref().map_or_else(|| "NULL".to_owned(), |text| quote_literal(text))
}

/// More than 8 KiB that can't be compressed below the limit: it is kept out of line.
fn huge_text(number: u32) -> String {
    let mut words = StdRng::seed_from_u64(number.into());
    (0..1200).map(|_| format!("{:08x}", words.random_range(0..=u32::MAX))).collect()
}
