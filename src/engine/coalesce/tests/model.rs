//! Plans against histories applied row by row, on a model of a table that checks every constraint at every row, and
//! wrong plans, each of which the model must find out.

use super::*;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use std::collections::{BTreeMap, HashSet};

type Cells = Vec<Option<String>>;
type Rows = BTreeMap<String, Cells>;

/// Columns of the model: key, a unique one, one that is unique among rows whose flag is set, the flag, two free ones.
const UNIQUE: usize = 1;
const PARTIAL: usize = 2;
const FLAG: usize = 3;
const FREE: usize = 4;
const COLUMNS: usize = 6;

/// What a model table demands.
#[derive(Clone, Copy, PartialEq)]
enum Constraints {
    Key,
    Unique,
}

impl Constraints {
    /// Whether the row may stand beside the others.
    fn allow(self, rows: &Rows, row: &Cells) -> bool {
        let collide = |other: &Cells| {
            let same = |column: usize| row[column].is_some() && row[column] == other[column];
            same(0) || (self == Self::Unique && (same(UNIQUE) || (same(FLAG) && same(PARTIAL))))
        };
        !rows.values().any(collide)
    }

    fn guarded(self) -> &'static [usize] {
        match self {
            Self::Key => &[],
            Self::Unique => &[UNIQUE, PARTIAL, FLAG],
        }
    }
}

struct History {
    random: StdRng,
    constraints: Constraints,
    version: Arc<TableVersion>,
    batch: Batch,
    before: Rows,
    rows: Rows,
}

impl History {
    /// A history over few keys and values, so that everything happens to the same ones.
    fn new(seed: u64, constraints: Constraints) -> Self {
        let mut history = Self {
            random: StdRng::seed_from_u64(seed),
            constraints,
            version: table(1, COLUMNS),
            batch: Batch::default(),
            before: Rows::new(),
            rows: Rows::new(),
        };
        for key in 0..history.random.random_range(0..8) {
            let row = history.row(key.to_string());
            if constraints.allow(&history.rows, &row) {
                history.rows.insert(key.to_string(), row);
            }
        }
        history.before = history.rows.clone();
        for number in 0..history.random.random_range(1..60) {
            history.one_change(number);
        }
        history
    }

    fn row(&mut self, key: String) -> Cells {
        let mut row: Cells = (1..COLUMNS).map(|column| self.value(column)).collect();
        row.insert(0, Some(key));
        row
    }

    fn value(&mut self, column: usize) -> Option<String> {
        let number = self.random.random_range(0..12);
        match column {
            FLAG => (number % 3 > 0).then(|| "on".to_owned()),
            _ if number == 0 => None,
            UNIQUE | PARTIAL => Some(number.to_string()),
            _ => Some(format!("v{}", self.random.random_range(0..1000))),
        }
    }

    fn pick(&mut self) -> Option<String> {
        let keys: Vec<&String> = self.rows.keys().collect();
        (!keys.is_empty()).then(|| keys[self.random.random_range(0..keys.len())].clone())
    }

    fn one_change(&mut self, number: u32) {
        match self.random.random_range(0..100) {
            0..30 => {
                let key = self.random.random_range(0..8).to_string();
                let row = self.row(key);
                self.insert(row);
            }
            30..45 => {
                if let Some(key) = self.pick() {
                    self.delete(&key);
                }
            }
            45..55 => self.swap(UNIQUE),
            55..60 => self.swap(0),
            60..97 => {
                if let Some(key) = self.pick() {
                    let mut row = self.rows[&key].clone();
                    for (column, value) in row.iter_mut().enumerate().skip(1) {
                        if self.random.random_range(0..3) == 0 {
                            *value = self.value(column);
                        }
                    }
                    if self.random.random_range(0..3) == 0 {
                        row[0] = Some(self.random.random_range(0..8).to_string());
                    }
                    self.update(&key, row);
                }
            }
            97..98 => {
                truncate(&mut self.batch, &self.version, number);
                self.rows.clear();
            }
            _ => {}
        }
    }

    fn insert(&mut self, row: Cells) {
        if self.constraints.allow(&self.rows, &row) {
            let new: Vec<Value> = row.iter().map(sent).collect();
            push(&mut self.batch, &self.version, Op::Insert, &[], &new);
            self.rows.insert(row[0].clone().unwrap(), row);
        }
    }

    fn delete(&mut self, key: &str) {
        let old = key_image(key);
        push(&mut self.batch, &self.version, Op::Delete, &old, &[]);
        self.rows.remove(key);
    }

    fn update(&mut self, key: &str, row: Cells) -> bool {
        let before = self.rows.remove(key).unwrap();
        if !self.constraints.allow(&self.rows, &row) {
            self.rows.insert(key.to_owned(), before);
            return false;
        }
        let mut new: Vec<Value> = row.iter().map(sent).collect();
        for column in FREE..COLUMNS {
            if row[column] == before[column] && row[column].is_some() && self.random.random_range(0..4) > 0 {
                new[column] = Value::Unchanged;
            }
        }
        let old = if row[0] != before[0] || self.random.random_range(0..8) == 0 { key_image(key) } else { Vec::new() };
        push(&mut self.batch, &self.version, Op::Update, &old, &new);
        self.rows.insert(row[0].clone().unwrap(), row);
        true
    }

    /// Two rows exchange their values of a column, through a third value.
    fn swap(&mut self, column: usize) {
        let (Some(a), Some(b)) = (self.pick(), self.pick()) else { return };
        let (mine, theirs) = (self.rows[&a][column].clone(), self.rows[&b][column].clone());
        if a == b || mine.is_none() || theirs.is_none() {
            return;
        }
        let with = |row: &Cells, value: &Option<String>| {
            let mut row = row.clone();
            row[column].clone_from(value);
            row
        };
        let third = Some("third".to_owned());
        let there = if column == 0 { "third".to_owned() } else { a.clone() };
        if self.update(&a, with(&self.rows[&a], &third)) && self.update(&b, with(&self.rows[&b], &mine)) {
            self.update(&there, with(&self.rows[&there], &theirs));
        }
    }

    fn plan(&self, order: Order, rewrites: bool) -> Plan<'_> {
        plan(&self.batch, &[TableRule { key: &[0], order, rewrites }], |_, _| true).unwrap()
    }
}

fn sent(value: &Option<String>) -> Value {
    value.as_ref().map_or(Value::Null, text)
}

fn key_image(key: &str) -> Vec<Value> {
    let mut image = vec![Value::Null; COLUMNS];
    image[0] = text(key);
    image
}

/// A table as a server keeps it: a statement finds rows as they were before it and writes them one by one.
struct Model {
    rows: Rows,
    constraints: Constraints,
    /// A rewrite inserts each row right after it has deleted it.
    interleaves: bool,
}

impl Model {
    fn put(&mut self, row: Cells) -> Result<(), String> {
        if !self.constraints.allow(&self.rows, &row) {
            return Err(format!("conflict with {row:?}"));
        }
        self.rows.insert(row[0].clone().expect("a key"), row);
        Ok(())
    }

    fn run(mut self, plan: &Plan<'_>) -> Result<Rows, String> {
        for step in &plan.steps {
            match step {
                Step::Truncate(_) => self.rows.clear(),
                Step::Write(write) if write.one_by_one => {
                    for row in &write.rows {
                        self.write(plan, write.action, &[*row])?;
                    }
                }
                Step::Write(write) => self.write(plan, write.action, &write.rows)?,
            }
        }
        Ok(self.rows)
    }

    fn write(&mut self, plan: &Plan<'_>, action: Action, rows: &[Row]) -> Result<(), String> {
        let value = |image: Image, column: usize| {
            let cell = plan.images.cells(image)[column];
            (cell.kind == CellKind::Text).then(|| String::from_utf8(plan.images.bytes(cell).to_vec()).unwrap())
        };
        let merged = |new: Image, old: Option<&Cells>| -> Result<Cells, String> {
            let cells = plan.images.cells(new).iter().zip(0..);
            cells
                .map(|(cell, column)| match (is_unchanged(*cell), old) {
                    (true, None) => Err("a value is missing".to_owned()),
                    (true, Some(old)) => Ok(old[column].clone()),
                    (false, _) => Ok(value(new, column)),
                })
                .collect()
        };
        let before = self.rows.clone();
        let mut found = HashSet::new();
        let mut to_come = Vec::new();
        for row in rows {
            if action == Action::Insert {
                self.put(merged(row.new, None)?)?;
                continue;
            }
            let names = if row.old.is_present() { row.old } else { row.new };
            let key = value(names, 0).ok_or("no key")?;
            let old = before.get(&key).ok_or_else(|| format!("no row {key}"))?;
            if !found.insert(key.clone()) {
                return Err(format!("row {key} twice in one set"));
            }
            if action == Action::Delete {
                self.rows.remove(&key);
                continue;
            }
            let new = merged(row.new, Some(old))?;
            if action == Action::Update && new[0] != old[0] {
                return Err("an update in place moves a key".into());
            }
            let guarded = self.constraints.guarded();
            let touches = new[0] != old[0] || guarded.iter().any(|&column| new[column] != old[column]);
            self.rows.remove(&key);
            if action == Action::Rewrite && touches && !self.interleaves {
                to_come.push(new);
            } else {
                self.put(new)?;
            }
        }
        to_come.into_iter().try_for_each(|row| self.put(row))
    }
}

fn run(history: &History, plan: &Plan<'_>) -> Result<Rows, String> {
    Model { rows: history.before.clone(), constraints: history.constraints, interleaves: false }.run(plan)
}

#[test]
fn sets_equal_rows_one_by_one() {
    for seed in 0..20_000 {
        let history = History::new(seed, Constraints::Key);
        let orders = [(Order::Key, true), (Order::Key, false), (Order::Table, false), (Order::All, false)];
        // Where commit order is kept there is little to be wrong.
        for &(order, rewrites) in &orders[..if seed % 10 == 0 { 4 } else { 2 }] {
            let plan = history.plan(order, rewrites);
            let truncates = history.batch.changes().iter().filter(|change| change.op == Op::Truncate).count();
            assert_eq!(plan.rows() as usize, history.batch.changes().len() - truncates, "seed {seed}");
            assert_eq!(run(&history, &plan).as_ref(), Ok(&history.rows), "seed {seed}, {order:?}: {:#?}", shape(&plan));
            if order == Order::Key && rewrites {
                assert!(plan.steps.len() <= 4 + 5 * truncates, "seed {seed}: {:#?}", shape(&plan));
            }
        }
    }
}

#[test]
fn guarded_sets_equal_rows_one_by_one() {
    for seed in 0..20_000 {
        let history = History::new(seed, Constraints::Unique);
        for order in [Order::Guarded, Order::Table].into_iter().take(if seed % 10 == 0 { 2 } else { 1 }) {
            let plan = history.plan(order, true);
            assert_eq!(run(&history, &plan).as_ref(), Ok(&history.rows), "seed {seed}, {order:?}: {:#?}", shape(&plan));
        }
    }
}

/// Of some histories, how many a wrong plan gets wrong.
fn found_out(constraints: Constraints, wrong: impl Fn(&History) -> Result<Rows, String>) -> usize {
    let histories = (0..500).map(|seed| History::new(seed, constraints));
    histories.filter(|history| wrong(history).as_ref() != Ok(&history.rows)).count()
}

fn order_of(constraints: Constraints) -> Order {
    match constraints {
        Constraints::Key => Order::Key,
        Constraints::Unique => Order::Guarded,
    }
}

/// The phases of each run in another order.
fn reordered(history: &History, place: fn(Action) -> u8) -> Result<Rows, String> {
    let mut plan = history.plan(order_of(history.constraints), true);
    let writes = |step: &Step| matches!(step, Step::Write(_));
    for run in plan.steps.chunk_by_mut(|one, other| writes(one) && writes(other)) {
        run.sort_by_key(|step| match step {
            Step::Write(write) => place(write.action),
            Step::Truncate(_) => 0,
        });
    }
    run(history, &plan)
}

#[test]
fn phases_in_another_order_are_found_out() {
    let inserts_first = |action| u8::from(action != Action::Insert);
    let deletes_last = |action| u8::from(action == Action::Delete);
    let rewrites_last = |action| u8::from(action == Action::Rewrite);
    for constraints in [Constraints::Key, Constraints::Unique] {
        for place in [inserts_first, deletes_last, rewrites_last] {
            assert!(found_out(constraints, |history| reordered(history, place)) > 20);
        }
    }
}

#[test]
fn rows_that_come_before_all_have_gone_are_found_out() {
    for constraints in [Constraints::Key, Constraints::Unique] {
        let interleaved = |history: &History| {
            let plan = history.plan(order_of(constraints), true);
            Model { rows: history.before.clone(), constraints, interleaves: true }.run(&plan)
        };
        assert!(found_out(constraints, interleaved) > 20);
    }
}

#[test]
fn other_unique_columns_that_nobody_guards_are_found_out() {
    assert!(found_out(Constraints::Unique, |history| run(history, &history.plan(Order::Key, true))) > 20);
}

#[test]
fn left_out_columns_that_are_not_merged_are_found_out() {
    let unmerged = |history: &History| {
        let mut plan = history.plan(Order::Key, true);
        let images = history.batch.changes().iter().rev().map(|change| change.new).filter(|image| image.is_present());
        let images: Vec<Image> = images.collect();
        for step in &mut plan.steps {
            let Step::Write(write) = step else { continue };
            for row in write.rows.iter_mut().filter(|row| row.new.is_present()) {
                let key = |image: Image| plan.images.bytes(plan.images.cells(image)[0]);
                row.new = images.iter().copied().find(|image| key(*image) == key(row.new)).unwrap();
            }
        }
        run(history, &plan)
    };
    assert!(found_out(Constraints::Key, unmerged) > 20);
}

#[test]
fn a_truncate_that_is_no_barrier_is_found_out() {
    let late = |history: &History| {
        let mut plan = history.plan(Order::Key, true);
        plan.steps.sort_by_key(|step| matches!(step, Step::Truncate(_)));
        run(history, &plan)
    };
    assert!(found_out(Constraints::Key, late) > 20);
}
