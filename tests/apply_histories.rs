//! Random histories, applied as sets to one schema and row by row, by plain statements, to another: after every part both
//! must hold the same rows. A failure prints its seed; `SLUICE_SEED=<n>` runs that one alone.

mod changes;
mod support;

use changes::{Changes, Value, apply, key, mapped, owner, rows};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use sluice::connectors::postgres::{Endpoint, Lsn, endpoint::Secret, target::PostgresTarget};
use sluice::engine::roles::{Apply as _, ApplyMode, Target as _};
use sluice::engine::table::{Identity, MappedTable, TableState};
use std::fmt::Write as _;
use support::Postgres;

/// Values of a row as text; `None` is NULL.
type Row = Vec<Option<String>>;

/// What happens to a table.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Rows are named by their first `usize` columns.
    Keyed(usize),
    /// No key: rows may be there twice.
    Full,
}

struct TableSpec {
    name: &'static str,
    columns: &'static [&'static str],
    /// Besides the columns: keys and constraints.
    constraints: &'static str,
    kind: Kind,
    /// Column whose values are unique too.
    unique: Option<usize>,
    /// Table whose key the last column refers to.
    parent: Option<usize>,
    /// The source sends whole old rows although there is a key.
    sends_full: bool,
}

const FREE: &[TableSpec] = &[
    TableSpec {
        name: "int_key",
        columns: &["!id int4", "a text", "b text"],
        constraints: "PRIMARY KEY (id)",
        kind: Kind::Keyed(1),
        unique: None,
        parent: None,
        sends_full: false,
    },
    TableSpec {
        name: "text key",
        columns: &["!\"k\" text", "A text"],
        constraints: "PRIMARY KEY (\"\"\"k\"\"\")",
        kind: Kind::Keyed(1),
        unique: None,
        parent: None,
        sends_full: false,
    },
    TableSpec {
        name: "composite",
        columns: &["!x int4", "!y text", "v numeric"],
        constraints: "PRIMARY KEY (x, y)",
        kind: Kind::Keyed(2),
        unique: None,
        parent: None,
        sends_full: false,
    },
    TableSpec {
        name: "all_key",
        columns: &["!x int4", "!y int4"],
        constraints: "PRIMARY KEY (y, x)",
        kind: Kind::Keyed(2),
        unique: None,
        parent: None,
        sends_full: false,
    },
    TableSpec {
        name: "other_unique",
        columns: &["!id int4", "u int4", "v text"],
        constraints: "PRIMARY KEY (id), UNIQUE (u)",
        kind: Kind::Keyed(1),
        unique: Some(1),
        parent: None,
        sends_full: false,
    },
    TableSpec {
        name: "loose_key",
        columns: &["!n numeric", "v text"],
        constraints: "PRIMARY KEY (n)",
        kind: Kind::Keyed(1),
        unique: None,
        parent: None,
        sends_full: false,
    },
    TableSpec {
        name: "keyless",
        columns: &["a int4", "b text", "n numeric", "j json"],
        constraints: "",
        kind: Kind::Full,
        unique: None,
        parent: None,
        sends_full: false,
    },
    TableSpec {
        name: "arrays",
        columns: &["!id int4", "l int4[]", "t text"],
        constraints: "PRIMARY KEY (id)",
        kind: Kind::Keyed(1),
        unique: None,
        parent: None,
        sends_full: false,
    },
    TableSpec {
        name: "full with key",
        columns: &["!id int4", "v text", "n numeric"],
        constraints: "PRIMARY KEY (id)",
        kind: Kind::Keyed(1),
        unique: None,
        parent: None,
        sends_full: true,
    },
];

const LINKED: &[TableSpec] = &[
    TableSpec {
        name: "parent",
        columns: &["!id int4", "a text"],
        constraints: "PRIMARY KEY (id)",
        kind: Kind::Keyed(1),
        unique: None,
        parent: None,
        sends_full: false,
    },
    TableSpec {
        name: "child",
        columns: &["!id int4", "a text", "parent int4"],
        constraints: "PRIMARY KEY (id), FOREIGN KEY (parent) REFERENCES {schema}.parent",
        kind: Kind::Keyed(1),
        unique: None,
        parent: Some(0),
        sends_full: false,
    },
];

/// A random history and the state that it has led to.
struct History {
    random: StdRng,
    specs: &'static [TableSpec],
    mapped: Vec<MappedTable>,
    rows: Vec<Vec<Row>>,
    changes: Changes,
    /// The same by plain statements, row by row.
    sql: String,
    planned: u64,
}

impl History {
    fn new(seed: u64, specs: &'static [TableSpec]) -> Self {
        let mapped = specs.iter().zip(1..).map(|(spec, id)| {
            let mut table = mapped(id, spec.name, "mirror", spec.columns);
            if spec.sends_full {
                std::sync::Arc::make_mut(&mut table.version).identity = Identity::Full;
            }
            table
        });
        Self {
            random: StdRng::seed_from_u64(seed),
            specs,
            mapped: mapped.collect(),
            rows: vec![Vec::new(); specs.len()],
            changes: Changes::default(),
            sql: String::new(),
            planned: 0,
        }
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.random.random_range(0..100) < percent
    }

    fn pick(&mut self, table: usize) -> Option<usize> {
        let count = self.rows[table].len();
        (count > 0).then(|| self.random.random_range(0..count))
    }

    fn value(&mut self, table: usize, column: usize) -> Option<String> {
        if self.specs[table].parent.is_some() && column == self.mapped[table].version.columns.len() - 1 {
            let parent = self.specs[table].parent.expect("a parent");
            let row = self.pick(parent)?;
            return self.rows[parent][row][0].clone();
        }
        let described = &self.mapped[table].version.columns[column];
        let (key, kind) = (described.key, described.type_name.name.clone());
        if !key && self.chance(15) {
            return None;
        }
        let number = self.random.random_range(0..25);
        Some(match kind.as_str() {
            "int4" => number.to_string(),
            "numeric" if key => number.to_string(),
            // Equal but not the same.
            "numeric" => ["1.0", "1.00", "2"][number as usize % 3].to_owned(),
            "_int4" => format!("{{{number},NULL,{}}}", number + 1),
            "json" => format!("{{\"n\": {}}}", number % 3),
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
    fn cell(&mut self, table: usize, column: usize, value: &Option<String>, binary: bool) -> Value {
        let kind = self.mapped[table].version.columns[column].type_name.name.as_str();
        let Some(text) = value else { return Value::Null };
        match (binary, kind) {
            (true, "int4") => Value::Binary(text.parse::<i32>().expect("a number").to_be_bytes().to_vec()),
            (true, "text" | "json") => Value::Binary(text.clone().into_bytes()),
            (true, "_int4") => {
                let elements: Vec<Option<i32>> = text.trim_matches(['{', '}']).split(',').map(|word| word.parse().ok()).collect();
                let mut bytes: Vec<u8> = [1, 1, 23, elements.len() as i32, 1].iter().flat_map(|n: &i32| n.to_be_bytes()).collect();
                for element in elements {
                    bytes.extend(element.map_or((-1i32).to_be_bytes().to_vec(), |n| [4i32.to_be_bytes(), n.to_be_bytes()].concat()));
                }
                Value::Binary(bytes)
            }
            _ => Value::Text(text.clone()),
        }
    }

    fn cells(&mut self, table: usize, row: &Row, binary: bool) -> Vec<Value> {
        (0..row.len()).map(|column| self.cell(table, column, &row[column], binary)).collect()
    }

    /// The old image that the source would send.
    fn old(&mut self, table: usize, row: &Row, binary: bool) -> Vec<Value> {
        let cells = self.cells(table, row, binary);
        match self.specs[table].kind {
            Kind::Full => cells,
            Kind::Keyed(_) if self.specs[table].sends_full => cells,
            Kind::Keyed(columns) => cells.into_iter().enumerate().map(|(i, cell)| if i < columns { cell } else { Value::Null }).collect(),
        }
    }

    fn is_free(&self, table: usize, row: &Row, but: Option<usize>) -> bool {
        let Kind::Keyed(columns) = self.specs[table].kind else { return true };
        let unique = self.specs[table].unique;
        self.rows[table].iter().enumerate().filter(|(i, _)| Some(*i) != but).all(|(_, other)| {
            other[..columns] != row[..columns] && unique.is_none_or(|column| row[column].is_none() || other[column] != row[column])
        })
    }

    /// Rows of another table refer to the row.
    fn is_referred(&self, table: usize, row: &Row) -> bool {
        let children = self.specs.iter().enumerate().filter(|(_, spec)| spec.parent == Some(table));
        children.into_iter().any(|(child, _)| self.rows[child].iter().any(|other| other.last() == Some(&row[0])))
    }

    fn one_change(&mut self) {
        let table = self.random.random_range(0..self.specs.len());
        let binary = self.chance(50);
        match self.random.random_range(0..100) {
            0..35 => {
                let row: Row = (0..self.mapped[table].version.columns.len()).map(|column| self.value(table, column)).collect();
                self.insert(table, row, binary);
            }
            35..37 => self.bulk(table, binary),
            37..52 => {
                if let Some(at) = self.pick(table)
                    && !self.is_referred(table, &self.rows[table][at])
                {
                    self.delete(table, at, binary);
                }
            }
            52..54 => self.truncate(),
            54..58 => self.swap_unique(table, binary),
            _ => {
                if let Some(at) = self.pick(table) {
                    self.random_update(table, at, binary);
                }
            }
        }
    }

    fn insert(&mut self, table: usize, row: Row, binary: bool) {
        if !self.is_free(table, &row, None) {
            return;
        }
        let cells = self.cells(table, &row, binary);
        self.changes.insert(&self.mapped[table], &cells);
        let values: Vec<String> = row.iter().map(literal).collect();
        writeln!(self.sql, "INSERT INTO {} VALUES ({});", self.plain(table), values.join(", ")).expect("a string");
        self.rows[table].push(row);
        self.planned += 1;
    }

    /// Enough rows for a COPY, and gone again now and then.
    fn bulk(&mut self, table: usize, binary: bool) {
        let first = self.random.random_range(1000..2000);
        let count = self.random.random_range(150..300);
        for number in first..first + count {
            let mut row: Row = (0..self.mapped[table].version.columns.len()).map(|column| self.value(table, column)).collect();
            let kind = self.mapped[table].version.columns[0].type_name.name.clone();
            row[0] = Some(if kind == "text" { format!("bulk {number}") } else { number.to_string() });
            if self.specs[table].unique.is_some() {
                row[1] = Some(number.to_string());
            }
            self.insert(table, row, binary);
        }
        if self.chance(50) {
            while let Some(at) =
                self.rows[table].iter().position(|row| row[0].as_ref().is_some_and(|key| key.contains("bulk") || key.len() == 4))
            {
                if self.is_referred(table, &self.rows[table][at]) {
                    break;
                }
                self.delete(table, at, binary);
            }
        }
    }

    fn delete(&mut self, table: usize, at: usize, binary: bool) {
        let row = self.rows[table].swap_remove(at);
        let old = self.old(table, &row, binary);
        self.changes.delete(&self.mapped[table], &old);
        writeln!(self.sql, "DELETE FROM {} WHERE {};", self.plain(table), self.finds(table, &row)).expect("a string");
        self.planned += 1;
    }

    fn truncate(&mut self) {
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
        if tables.is_empty() {
            return;
        }
        let mapped: Vec<&MappedTable> = tables.iter().map(|table| &self.mapped[*table]).collect();
        self.changes.truncate(&mapped);
        let names: Vec<String> = tables.iter().map(|table| self.plain(*table)).collect();
        writeln!(self.sql, "TRUNCATE {};", names.join(", ")).expect("a string");
        for table in tables {
            self.rows[table].clear();
        }
    }

    /// Two rows exchange their values of the other unique column, through a third value.
    fn swap_unique(&mut self, table: usize, binary: bool) {
        let Some(unique) = self.specs[table].unique else { return };
        let (Some(a), Some(b)) = (self.pick(table), self.pick(table)) else { return };
        let (mine, theirs) = (self.rows[table][a][unique].clone(), self.rows[table][b][unique].clone());
        if a == b || mine.is_none() || theirs.is_none() {
            return;
        }
        for (at, value) in [(a, Some("99999".to_owned())), (b, mine), (a, theirs)] {
            let mut row = self.rows[table][at].clone();
            row[unique] = value;
            self.update(table, at, &row, binary);
        }
    }

    fn random_update(&mut self, table: usize, at: usize, binary: bool) {
        let before = self.rows[table][at].clone();
        let mut row = before.clone();
        let moves_key = self.chance(30);
        let key = match self.specs[table].kind {
            Kind::Keyed(columns) => columns,
            Kind::Full => 0,
        };
        for (column, value) in row.iter_mut().enumerate() {
            let change = if column < key { moves_key } else { self.chance(60) };
            if change {
                *value = self.value(table, column);
            }
        }
        let moved = row[..key] != before[..key];
        if self.is_free(table, &row, Some(at)) && !(moved && self.is_referred(table, &before)) {
            self.update(table, at, &row, binary);
        }
    }

    fn update(&mut self, table: usize, at: usize, row: &Row, binary: bool) {
        let before = std::mem::replace(&mut self.rows[table][at], row.clone());
        let key = match self.specs[table].kind {
            Kind::Keyed(columns) => columns,
            Kind::Full => 0,
        };
        let moved = row[..key] != before[..key];
        let sends_old = moved || key == 0 || self.specs[table].sends_full || self.chance(10);
        let old = if sends_old { self.old(table, &before, binary) } else { Vec::new() };
        let mut new = self.cells(table, row, binary);
        for column in key..row.len() {
            // As for a TOASTed value that did not change.
            if row[column] == before[column] && row[column].is_some() && self.chance(40) {
                new[column] = Value::Unchanged;
            }
        }
        self.changes.update(&self.mapped[table], &old, &new);
        let set: Vec<String> = (0..row.len()).map(|column| format!("{} = {}", self.ident(table, column), literal(&row[column]))).collect();
        writeln!(self.sql, "UPDATE {} SET {} WHERE {};", self.plain(table), set.join(", "), self.finds(table, &before)).expect("a string");
        self.planned += 1;
    }

    fn plain(&self, table: usize) -> String {
        format!("plain.\"{}\"", self.specs[table].name)
    }

    fn ident(&self, table: usize, column: usize) -> String {
        format!("\"{}\"", self.mapped[table].version.columns[column].name.replace('"', "\"\""))
    }

    fn finds(&self, table: usize, row: &Row) -> String {
        match self.specs[table].kind {
            Kind::Keyed(columns) => {
                let equal = (0..columns).map(|column| format!("{} = {}", self.ident(table, column), literal(&row[column])));
                equal.collect::<Vec<_>>().join(" AND ")
            }
            Kind::Full => {
                let same = (0..row.len())
                    .map(|column| format!("{}::text IS NOT DISTINCT FROM {}", self.ident(table, column), literal(&row[column])));
                format!("ctid = (SELECT ctid FROM {} WHERE {} LIMIT 1)", self.plain(table), same.collect::<Vec<_>>().join(" AND "))
            }
        }
    }

    fn create(&self, schema: &str) -> String {
        let tables = self.specs.iter().enumerate().map(|(table, spec)| {
            let columns = (0..spec.columns.len()).map(|column| {
                let declared = &self.mapped[table].version.columns[column].declared;
                format!("{} {declared}", self.ident(table, column))
            });
            let constraints = spec.constraints.replace("{schema}", schema);
            let parts: Vec<String> = columns.chain((!constraints.is_empty()).then_some(constraints)).collect();
            format!("CREATE TABLE {schema}.\"{}\" ({});", spec.name, parts.join(", "))
        });
        format!("DROP SCHEMA IF EXISTS {schema} CASCADE; CREATE SCHEMA {schema}; {}", tables.collect::<Vec<_>>().join("\n"))
    }
}

fn literal(value: &Option<String>) -> String {
    value.as_ref().map_or_else(|| "NULL".to_owned(), |text| sluice::connectors::postgres::sql::quote_literal(text))
}

/// Runs one history in some parts and compares after each that is committed.
async fn run(endpoint: &Endpoint, admin: &tokio_postgres::Client, seed: u64, specs: &'static [TableSpec], mode: ApplyMode) {
    let mut history = History::new(seed, specs);
    admin.batch_execute(&history.create("plain")).await.expect("plain tables");
    admin.batch_execute(&history.create("mirror")).await.expect("mirror tables");
    admin.batch_execute("GRANT ALL ON SCHEMA mirror TO PUBLIC; GRANT ALL ON ALL TABLES IN SCHEMA mirror TO PUBLIC").await.expect("grants");
    let target = PostgresTarget::new(endpoint.clone(), owner("histories"));
    let slot = format!("seed_{seed}_{}", specs.len());
    let (_, mut applier) = target.claim(&key(&slot), &owner("histories"), None).await.expect("a claim");
    assert_eq!(applier.mode(), mode);
    applier.initialize(&Lsn(1), 1).await.expect("a checkpoint");
    for table in &history.mapped {
        applier.set_state(table, TableState::Ready, None).await.expect("a state");
    }
    applier.prepare(&history.mapped).await.expect("prepared");

    let (mut end, mut applied, mut continues) = (1, 0, false);
    for _ in 0..12 {
        let count = history.random.random_range(0..90);
        for _ in 0..count {
            history.one_change();
        }
        end += 8;
        let open = history.chance(30);
        let part = std::mem::take(&mut history.changes).part(continues, (!open).then_some(end), end);
        let counts = apply(&mut applier, part).await.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        applied += counts.inserts + counts.updates + counts.deletes;
        continues = open;
        assert_eq!(counts.committed, !open, "seed {seed}");
        if open {
            continue;
        }
        let sql = std::mem::take(&mut history.sql);
        admin.batch_execute(&format!("BEGIN; {sql} COMMIT;")).await.unwrap_or_else(|error| panic!("seed {seed}: {error:?}"));
        for spec in specs {
            let (plain, mirror) =
                (rows(admin, &format!("plain.\"{}\"", spec.name)).await, rows(admin, &format!("mirror.\"{}\"", spec.name)).await);
            assert_eq!(plain, mirror, "seed {seed}: table {} after {end}", spec.name);
        }
        assert_eq!(applied, history.planned, "seed {seed}: rows counted");
    }
    applier.abort().await;
}

fn seeds(default: std::ops::Range<u64>) -> Vec<u64> {
    match std::env::var("SLUICE_SEED") {
        Ok(seed) => vec![seed.parse().expect("SLUICE_SEED is a number")],
        Err(_) => default.collect(),
    }
}

#[tokio::test]
async fn sets_equal_rows_one_by_one_with_replica_role() {
    let server = Postgres::start(15);
    let admin = server.create_database("histories").await;
    for seed in seeds(0..8) {
        run(&server.endpoint("histories"), &admin, seed, FREE, ApplyMode::Replica).await;
    }
}

#[tokio::test]
async fn sets_equal_rows_one_by_one_in_order_with_foreign_keys() {
    let server = Postgres::start(15);
    let admin = server.create_database("histories").await;
    admin.batch_execute("CREATE ROLE writer LOGIN PASSWORD 'pw'; GRANT CREATE ON DATABASE histories TO writer").await.expect("a role");
    let mut endpoint = server.endpoint("histories");
    endpoint.username = "writer".into();
    endpoint.password = Secret("pw".into());
    for seed in seeds(0..8) {
        run(&endpoint, &admin, seed, LINKED, ApplyMode::Ordered).await;
    }
}
