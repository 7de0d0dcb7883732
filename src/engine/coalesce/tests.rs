//! The plan against the history applied row by row, on an in-memory model of a table.

use super::*;
use crate::engine::batch::Image;
use crate::engine::table::{Column, Identity, QualifiedName, TableVersion};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

/// A cell as tests write it.
#[derive(Clone, Debug)]
enum Value {
    Text(String),
    Binary(String),
    Unchanged,
    Null,
}

fn text(value: impl std::fmt::Display) -> Value {
    Value::Text(value.to_string())
}

fn table(id: u32, columns: usize) -> Arc<TableVersion> {
    let column = |number: usize| Column {
        name: format!("c{number}"),
        type_id: 25,
        type_name: QualifiedName::new("pg_catalog", "text"),
        declared: "text".into(),
        key: number == 0,
        not_null: false,
        generated: None,
        collation: None,
    };
    Arc::new(TableVersion {
        id,
        name: QualifiedName::new("public", format!("t{id}")),
        columns: (0..columns).map(column).collect(),
        identity: Identity::Key,
        differs: None,
    })
}

fn image(batch: &mut Batch, values: &[Value]) -> Image {
    let image = batch.begin_image();
    for value in values {
        match value {
            Value::Text(text) => batch.push_cell(CellKind::Text, text.as_bytes()),
            Value::Binary(text) => batch.push_cell(CellKind::Binary, text.as_bytes()),
            Value::Unchanged => batch.push_cell(CellKind::Unchanged, b""),
            Value::Null => batch.push_cell(CellKind::Null, b""),
        }
    }
    batch.end_image(image)
}

fn push(batch: &mut Batch, version: &Arc<TableVersion>, op: Op, old: &[Value], new: &[Value]) {
    let table = batch.intern_table(version);
    let (old, new) = (image(batch, old), image(batch, new));
    batch.push(Change { op, table, old, old_is_full: false, new, group: 0 });
}

fn truncate(batch: &mut Batch, version: &Arc<TableVersion>, group: u32) {
    let table = batch.intern_table(version);
    batch.push(Change { op: Op::Truncate, table, old: Image::ABSENT, old_is_full: false, new: Image::ABSENT, group });
}

const BY_KEY: TableRule<'_> = TableRule { key: &[0], order: Order::Key };

fn shape(plan: &Plan) -> Vec<(Action, u32, Vec<u32>)> {
    plan.steps.iter().map(|step| (step.action, step.table, step.changes.clone())).collect()
}

#[test]
fn rows_gather_per_table_and_kind_and_a_key_never_twice_in_a_set() {
    let (a, b) = (table(1, 2), table(2, 2));
    let mut batch = Batch::default();
    push(&mut batch, &a, Op::Insert, &[], &[text(1), text("x")]); // 0
    push(&mut batch, &b, Op::Insert, &[], &[text(1), text("x")]); // 1
    push(&mut batch, &a, Op::Insert, &[], &[text(2), text("x")]); // 2
    push(&mut batch, &a, Op::Update, &[], &[text(1), text("y")]); // 3
    push(&mut batch, &a, Op::Update, &[], &[text(1), text("z")]); // 4
    push(&mut batch, &a, Op::Update, &[], &[text(2), text("z")]); // 5
    push(&mut batch, &a, Op::Delete, &[text(1), Value::Null], &[]); // 6
    push(&mut batch, &a, Op::Insert, &[], &[text(1), text("w")]); // 7
    let plan = plan(&batch, &[BY_KEY, BY_KEY], |_, _| true).unwrap();
    assert_eq!(
        shape(&plan),
        [
            (Action::Insert, 0, vec![0, 2]),
            (Action::Insert, 1, vec![1]),
            (Action::Update, 0, vec![3, 5]),
            (Action::Update, 0, vec![4]),
            (Action::Delete, 0, vec![6]),
            (Action::Insert, 0, vec![7]),
        ]
    );
}

#[test]
fn moved_keys_wait_for_both_keys() {
    let a = table(1, 2);
    let mut batch = Batch::default();
    let moved = |batch: &mut Batch, from: u32, to: u32| push(batch, &a, Op::Update, &[text(from), Value::Null], &[text(to), text("v")]);
    moved(&mut batch, 2, 3); // 0
    moved(&mut batch, 1, 2); // 1: 2 must be free first
    moved(&mut batch, 8, 9); // 2: independent
    moved(&mut batch, 9, 9); // 3: does not move
    let plan = plan(&batch, &[BY_KEY], |_, _| true).unwrap();
    assert_eq!(shape(&plan), [(Action::UpdateKey, 0, vec![0, 2]), (Action::UpdateKey, 0, vec![1]), (Action::Update, 0, vec![3]),]);
}

#[test]
fn truncates_of_one_statement_are_one_barrier_of_due_tables() {
    let tables = [table(1, 1), table(2, 1), table(3, 1)];
    let mut batch = Batch::default();
    for version in &tables {
        push(&mut batch, version, Op::Insert, &[], &[text(1)]); // 0, 1, 2
    }
    for version in &tables {
        truncate(&mut batch, version, 7); // 3, 4, 5
    }
    truncate(&mut batch, &tables[0], 8); // 6: another statement
    for version in &tables {
        push(&mut batch, version, Op::Insert, &[], &[text(2)]); // 7, 8, 9
    }
    let plan = plan(&batch, &[BY_KEY; 3], |change, _| change.table != 1).unwrap();
    assert_eq!(
        shape(&plan),
        [
            (Action::Insert, 0, vec![0]),
            (Action::Insert, 2, vec![2]),
            (Action::Truncate, 0, vec![3, 5]),
            (Action::Truncate, 0, vec![6]),
            (Action::Insert, 0, vec![7]),
            (Action::Insert, 2, vec![9]),
        ]
    );
}

#[test]
fn commit_order_is_kept_where_keys_are_not_independent() {
    let (a, b) = (table(1, 2), table(2, 2));
    let history = || {
        let mut batch = Batch::default();
        push(&mut batch, &a, Op::Insert, &[], &[text(1), text("x")]); // 0
        push(&mut batch, &a, Op::Insert, &[], &[text(2), text("x")]); // 1
        push(&mut batch, &b, Op::Insert, &[], &[text(1), text("x")]); // 2
        push(&mut batch, &a, Op::Insert, &[], &[text(3), text("x")]); // 3
        push(&mut batch, &a, Op::Update, &[], &[text(1), text("y")]); // 4
        push(&mut batch, &a, Op::Update, &[], &[text(2), text("y")]); // 5
        push(&mut batch, &a, Op::Delete, &[text(1), Value::Null], &[]); // 6
        push(&mut batch, &a, Op::Delete, &[text(2), Value::Null], &[]); // 7
        batch
    };
    let rule = |order| TableRule { key: &[0], order };
    let in_table = plan(&history(), &[rule(Order::Table); 2], |_, _| true).unwrap();
    assert_eq!(
        shape(&in_table),
        [
            (Action::Insert, 0, vec![0, 1, 3]),
            (Action::Insert, 1, vec![2]),
            (Action::Update, 0, vec![4]),
            (Action::Update, 0, vec![5]),
            (Action::Delete, 0, vec![6, 7]),
        ]
    );
    let in_all = plan(&history(), &[rule(Order::All); 2], |_, _| true).unwrap();
    assert_eq!(shape(&in_all)[..3], [(Action::Insert, 0, vec![0, 1]), (Action::Insert, 1, vec![2]), (Action::Insert, 0, vec![3])]);
}

#[test]
fn without_a_key_rows_go_one_by_one_and_need_the_whole_old_row() {
    let a = table(1, 1);
    let mut batch = Batch::default();
    push(&mut batch, &a, Op::Delete, &[text(1)], &[]);
    let rule = TableRule { key: &[], order: Order::Table };
    let error = plan(&batch, &[rule], |_, _| true).unwrap_err();
    assert_eq!(error.reason, reason::PROTOCOL_VIOLATION);
}

#[test]
fn one_key_in_two_encodings_is_kept_in_order() {
    let a = table(1, 2);
    let mut batch = Batch::default();
    let binary = |value: &str| Value::Binary(value.into());
    push(&mut batch, &a, Op::Update, &[], &[text(1), text("x")]); // 0
    push(&mut batch, &a, Op::Update, &[], &[binary("one"), text("y")]); // 1
    push(&mut batch, &a, Op::Update, &[text(5), Value::Null], &[binary("six"), text("y")]); // 2
    push(&mut batch, &a, Op::Update, &[binary("five"), Value::Null], &[binary("ten"), text("y")]); // 3
    let plan = plan(&batch, &[BY_KEY], |_, _| true).unwrap();
    let order: Vec<_> = plan.steps.iter().flat_map(|step| step.changes.clone()).collect();
    assert_eq!((plan.steps.len(), order), (4, vec![0, 1, 2, 3]));
}

type Rows = BTreeMap<String, Vec<Option<String>>>;

/// A history over few keys, so that everything happens to the same ones, with holes and moved keys.
fn random_history(random: &mut StdRng) -> (Batch, Rows, Rows) {
    let version = table(1, 3);
    let mut batch = Batch::default();
    let mut rows = Rows::new();
    for key in 0..random.random_range(0..8) {
        rows.insert(format!("{key}"), vec![Some("start".into()), None]);
    }
    let before = rows.clone();
    for number in 0..random.random_range(1..60) {
        let existing: Vec<String> = rows.keys().cloned().collect();
        let free: Vec<String> = (0..8).map(|key| key.to_string()).filter(|key| !rows.contains_key(key)).collect();
        let pick = |keys: &[String], random: &mut StdRng| keys[random.random_range(0..keys.len())].clone();
        let value = |random: &mut StdRng| match random.random_range(0..3) {
            0 => Value::Unchanged,
            1 => Value::Null,
            _ => text(number),
        };
        let stored = |value: &Value, old: Option<String>| match value {
            Value::Text(text) | Value::Binary(text) => Some(text.clone()),
            Value::Unchanged => old,
            Value::Null => None,
        };
        match random.random_range(0..100) {
            0..35 if !free.is_empty() => {
                let key = pick(&free, random);
                push(&mut batch, &version, Op::Insert, &[], &[text(&key), text(number), Value::Null]);
                rows.insert(key, vec![Some(number.to_string()), None]);
            }
            35..55 if !existing.is_empty() => {
                let key = pick(&existing, random);
                push(&mut batch, &version, Op::Delete, &[text(&key), Value::Null, Value::Null], &[]);
                rows.remove(&key);
            }
            55..75 if !existing.is_empty() && !free.is_empty() => {
                let (from, to) = (pick(&existing, random), pick(&free, random));
                let values = [value(random), value(random)];
                push(
                    &mut batch,
                    &version,
                    Op::Update,
                    &[text(&from), Value::Null, Value::Null],
                    &[text(&to), values[0].clone(), values[1].clone()],
                );
                let old = rows.remove(&from).unwrap();
                rows.insert(to, values.iter().zip(old).map(|(value, old)| stored(value, old)).collect());
            }
            75..98 if !existing.is_empty() => {
                let key = pick(&existing, random);
                let values = [value(random), value(random)];
                push(&mut batch, &version, Op::Update, &[], &[text(&key), values[0].clone(), values[1].clone()]);
                let row = rows.get_mut(&key).unwrap();
                *row = values.iter().zip(row.clone()).map(|(value, old)| stored(value, old)).collect();
            }
            98..100 => {
                truncate(&mut batch, &version, number);
                rows.clear();
            }
            _ => {}
        }
    }
    (batch, before, rows)
}

/// Applies a plan as a database would: each step reads the state before it, and wants to hit each of its rows.
fn apply(batch: &Batch, plan: &Plan, mut rows: Rows) -> Rows {
    let word = |cell: Cell| (cell.kind == CellKind::Text).then(|| String::from_utf8(batch.bytes(cell).to_vec()).unwrap());
    for step in &plan.steps {
        let mut seen = HashSet::new();
        let mut once = |key: &String| assert!(seen.insert(key.clone()), "key {key} twice in one set");
        let before = rows.clone();
        for &index in &step.changes {
            let change = &batch.changes()[index as usize];
            let old = || word(batch.cells(change.old)[0]).unwrap();
            let new: Vec<Cell> = batch.cells(change.new).to_vec();
            let merged = |old: &[Option<String>]| {
                new[1..].iter().zip(old).map(|(cell, old)| if is_unchanged(*cell) { old.clone() } else { word(*cell) }).collect()
            };
            match step.action {
                Action::Insert => {
                    let key = word(new[0]).unwrap();
                    once(&key);
                    assert!(rows.insert(key, new[1..].iter().map(|cell| word(*cell)).collect()).is_none(), "conflict");
                }
                Action::Update => {
                    let key = word(new[0]).unwrap();
                    once(&key);
                    let row = merged(&before[&key]);
                    rows.insert(key, row);
                }
                Action::UpdateKey => {
                    let (from, to) = (old(), word(new[0]).unwrap());
                    once(&from);
                    once(&to);
                    let row = merged(&before[&from]);
                    rows.remove(&from).expect("the row to move");
                    assert!(rows.insert(to, row).is_none(), "conflict");
                }
                Action::Delete => {
                    once(&old());
                    rows.remove(&old()).expect("the row to delete");
                }
                Action::Truncate => rows.clear(),
            }
            let missing: MissingColumns = new.iter().zip(0..).filter(|(cell, _)| is_unchanged(**cell)).map(|(_, column)| column).collect();
            assert_eq!(plan.column_sets[step.columns as usize], missing, "columns of the step");
        }
    }
    rows
}

#[test]
fn sets_equal_rows_one_by_one() {
    for seed in 0..3000 {
        let mut random = StdRng::seed_from_u64(seed);
        let (batch, before, after) = random_history(&mut random);
        for order in [Order::Key, Order::Table, Order::All] {
            let plan = plan(&batch, &[TableRule { key: &[0], order }], |_, _| true).unwrap();
            let planned: usize = plan.steps.iter().map(|step| step.changes.len()).sum();
            assert_eq!(planned, batch.changes().len(), "seed {seed}");
            assert_eq!(apply(&batch, &plan, before.clone()), after, "seed {seed}, {order:?}");
        }
    }
}
