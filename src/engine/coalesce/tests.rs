//! What a plan looks like. That it is right is shown in `model`.

mod model;

use super::*;
use crate::engine::batch::Image;
use crate::engine::table::{Column, Identity, QualifiedName, TableVersion};
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
        number: 0,
        modifier: -1,
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

const BY_KEY: TableRule<'_> = TableRule { key: &[0], order: Order::Key, rewrites: true };

fn word(images: &Images<'_>, cell: Cell) -> String {
    match cell.kind {
        CellKind::Null => "-".into(),
        CellKind::Unchanged => "~".into(),
        CellKind::Text | CellKind::Binary => String::from_utf8(images.bytes(cell).to_vec()).unwrap(),
    }
}

/// One line a step: action, table, `old>new` of each row.
fn shape(plan: &Plan<'_>) -> Vec<String> {
    let image = |image: Image| plan.images.cells(image).iter().map(|cell| word(&plan.images, *cell)).collect::<Vec<_>>().join(",");
    let row = |row: &Row| match (row.old.is_present(), row.new.is_present()) {
        (true, _) => format!("{}>{}", image(row.old), image(row.new)),
        (false, _) => image(row.new),
    };
    let step = |step: &Step| match step {
        Step::Truncate(tables) => format!("Truncate {tables:?}"),
        Step::Write(write) => {
            let rows: Vec<String> = write.rows.iter().map(row).collect();
            format!("{:?} {}{}: {}", write.action, write.table, if write.one_by_one { " one by one" } else { "" }, rows.join(" "))
        }
    };
    plan.steps.iter().map(step).collect()
}

/// An update that leaves its key alone.
fn update(batch: &mut Batch, version: &Arc<TableVersion>, new: &[Value]) {
    push(batch, version, Op::Update, &[], new);
}

fn moved(batch: &mut Batch, version: &Arc<TableVersion>, from: u32, to: u32, value: Value) {
    push(batch, version, Op::Update, &[text(from), Value::Null], &[text(to), value]);
}

fn delete(batch: &mut Batch, version: &Arc<TableVersion>, key: u32) {
    push(batch, version, Op::Delete, &[text(key), Value::Null], &[]);
}

fn insert(batch: &mut Batch, version: &Arc<TableVersion>, key: u32, value: impl std::fmt::Display) {
    push(batch, version, Op::Insert, &[], &[text(key), text(value)]);
}

#[test]
fn each_key_has_one_net_effect_in_four_phases_at_most() {
    let (a, b) = (table(1, 2), table(2, 2));
    let mut batch = Batch::default();
    insert(&mut batch, &a, 1, "x"); // with its update: one insert
    insert(&mut batch, &b, 1, "x");
    update(&mut batch, &a, &[text(1), text("y")]);
    update(&mut batch, &a, &[text(2), text("y")]); // the last of two
    update(&mut batch, &a, &[text(2), text("z")]);
    delete(&mut batch, &a, 3); // replaced
    insert(&mut batch, &a, 3, "w");
    insert(&mut batch, &a, 4, "gone"); // nothing
    delete(&mut batch, &a, 4);
    update(&mut batch, &a, &[text(5), text("gone")]); // a delete
    delete(&mut batch, &a, 5);
    let plan = plan(&batch, &[BY_KEY, BY_KEY], |_, _| true).unwrap();
    assert_eq!(shape(&plan), ["Delete 0: 3,-> 5,gone>", "Update 0: 2,z", "Insert 0: 1,y 3,w", "Insert 1: 1,x"]);
    assert_eq!((plan.applied.inserts, plan.applied.updates, plan.applied.deletes, plan.rows()), (4, 4, 3, 11));
}

#[test]
fn hot_keys_become_one_row_each() {
    let a = table(1, 2);
    let mut batch = Batch::default();
    for number in 0..50_000 {
        update(&mut batch, &a, &[text(number % 1000), if number % 3 == 0 { Value::Unchanged } else { text(number) }]);
    }
    let plan = plan(&batch, &[BY_KEY], |_, _| true).unwrap();
    let [Step::Write(write)] = &plan.steps[..] else { panic!("{} steps", plan.steps.len()) };
    assert_eq!((write.rows.len(), plan.rows(), plan.column_sets.len()), (1000, 50_000, 1));
    assert!(plan.images.merged() <= 2 * 1000, "{} merged cells", plan.images.merged());
}

#[test]
fn what_is_left_out_is_filled_from_the_batch_or_kept() {
    let a = table(1, 3);
    let mut batch = Batch::default();
    let hole = || Value::Unchanged;
    push(&mut batch, &a, Op::Insert, &[], &[text(1), text("x"), text("big")]);
    update(&mut batch, &a, &[text(1), text("y"), hole()]);
    update(&mut batch, &a, &[text(2), text("x"), text("big")]);
    update(&mut batch, &a, &[text(2), hole(), text("bigger")]);
    update(&mut batch, &a, &[text(3), text("x"), hole()]);
    update(&mut batch, &a, &[text(3), text("y"), hole()]);
    let plan = plan(&batch, &[BY_KEY], |_, _| true).unwrap();
    assert_eq!(shape(&plan), ["Update 0: 2,x,bigger 3,y,~", "Insert 0: 1,y,big"]);
    assert_eq!(plan.column_sets[1..], [ColumnSet { never: vec![], some: vec![2] }]);
}

#[test]
fn moved_keys_are_written_anew_where_that_is_allowed() {
    let a = table(1, 2);
    let history = || {
        let mut batch = Batch::default();
        moved(&mut batch, &a, 2, 3, text("v")); // a chain
        moved(&mut batch, &a, 1, 2, Value::Unchanged);
        moved(&mut batch, &a, 8, 0, text("v")); // a swap through a third key
        moved(&mut batch, &a, 9, 8, text("v"));
        moved(&mut batch, &a, 0, 9, Value::Unchanged);
        moved(&mut batch, &a, 5, 6, text("v")); // there and back
        moved(&mut batch, &a, 6, 5, text("w"));
        batch
    };
    let rewritten = history();
    let rewritten = plan(&rewritten, &[BY_KEY], |_, _| true).unwrap();
    assert_eq!(shape(&rewritten), ["Rewrite 0: 2,->3,v 1,->2,~ 8,->9,v 9,->8,v", "Update 0: 5,w"]);
    let in_place = history();
    let in_place = plan(&in_place, &[TableRule { rewrites: false, ..BY_KEY }], |_, _| true).unwrap();
    assert_eq!(
        shape(&in_place),
        [
            "UpdateKey 0 one by one: 2,->3,v",
            "UpdateKey 0 one by one: 1,->2,~",
            "UpdateKey 0 one by one: 8,->0,v 9,->8,v",
            "UpdateKey 0 one by one: 0,->9,~",
            "UpdateKey 0 one by one: 5,->6,v 6,->5,w",
        ]
    );
}

#[test]
fn guarded_updates_are_one_statement_between_deletes_and_inserts() {
    let a = table(1, 2);
    let mut batch = Batch::default();
    insert(&mut batch, &a, 4, "d");
    update(&mut batch, &a, &[text(1), text("c")]);
    update(&mut batch, &a, &[text(2), Value::Unchanged]);
    delete(&mut batch, &a, 3);
    moved(&mut batch, &a, 5, 6, text("e"));
    let plan = plan(&batch, &[TableRule { order: Order::Guarded, ..BY_KEY }], |_, _| true).unwrap();
    assert_eq!(shape(&plan), ["Delete 0: 3,->", "Rewrite 0: 1,c 2,~ 5,->6,e", "Insert 0: 4,d"]);
}

#[test]
fn what_does_not_go_with_a_key_ends_the_run() {
    let a = table(1, 2);
    let mut batch = Batch::default();
    insert(&mut batch, &a, 1, "x");
    insert(&mut batch, &a, 1, "twice"); // the target will say so
    delete(&mut batch, &a, 2);
    update(&mut batch, &a, &[text(2), text("gone")]);
    delete(&mut batch, &a, 2);
    delete(&mut batch, &a, 2);
    moved(&mut batch, &a, 7, 1, text("taken"));
    moved(&mut batch, &a, 8, 1, text("taken"));
    let plan = plan(&batch, &[BY_KEY], |_, _| true).unwrap();
    assert_eq!(
        shape(&plan),
        [
            "Insert 0: 1,x",
            "Delete 0: 2,->",
            "Insert 0: 1,twice",
            "Delete 0: 2,gone>",
            "Delete 0: 2,->",
            "Rewrite 0: 7,->1,taken",
            "Rewrite 0: 8,->1,taken",
        ]
    );
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
    assert_eq!(shape(&plan), ["Insert 0: 1", "Insert 2: 1", "Truncate [0, 2]", "Truncate [0]", "Insert 0: 2", "Insert 2: 2"]);
}

#[test]
fn commit_order_is_kept_where_keys_are_not_independent() {
    let (a, b) = (table(1, 2), table(2, 2));
    let mut batch = Batch::default();
    insert(&mut batch, &a, 1, "x");
    insert(&mut batch, &a, 2, "x");
    insert(&mut batch, &b, 1, "x");
    insert(&mut batch, &a, 3, "x");
    update(&mut batch, &a, &[text(1), text("y")]);
    update(&mut batch, &a, &[text(1), text("z")]);
    update(&mut batch, &a, &[text(2), Value::Unchanged]);
    delete(&mut batch, &a, 1);
    delete(&mut batch, &a, 2);
    let rule = |order| TableRule { key: &[0], order, rewrites: false };
    let in_table = plan(&batch, &[rule(Order::Table); 2], |_, _| true).unwrap();
    let rest = ["Update 0 one by one: 1,y 1,z", "Update 0 one by one: 2,~", "Delete 0: 1,-> 2,->"];
    assert_eq!(shape(&in_table)[..2], ["Insert 0: 1,x 2,x 3,x", "Insert 1: 1,x"]);
    assert_eq!(shape(&in_table)[2..], rest);
    let in_all = plan(&batch, &[rule(Order::All); 2], |_, _| true).unwrap();
    assert_eq!(shape(&in_all)[..3], ["Insert 0: 1,x 2,x", "Insert 1: 1,x", "Insert 0: 3,x"]);
    assert_eq!(shape(&in_all)[3..], rest);
}

#[test]
fn without_a_key_rows_go_one_by_one_and_need_the_whole_old_row() {
    let a = table(1, 1);
    let mut batch = Batch::default();
    push(&mut batch, &a, Op::Delete, &[text(1)], &[]);
    let rule = TableRule { key: &[], order: Order::Table, rewrites: false };
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
    assert_eq!(shape(&plan), ["Update 0: 1,x", "Update 0: one,y", "Rewrite 0: 5,->six,y", "Rewrite 0: five,->ten,y"]);
}
