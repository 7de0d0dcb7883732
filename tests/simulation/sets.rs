//! A part is written twice: row by row, and as the sets that the planner makes of it, each in an order of its own. Both are
//! strict, and must leave the same rows.

use crate::dice::Dice;
use crate::history::{Row, Rows, TABLES, Tables, UNIQUE_TABLE};
use sluice::engine::batch::{Batch, CellKind, Change, Image, Op};
use sluice::engine::coalesce::{Action, Order, TableRule, plan};

/// The tables after the due changes. An error is a change that does not fit, or a difference between the two ways.
pub fn apply(before: &Tables, batch: &Batch, due: &[bool], overtaking: bool, dice: &mut Dice) -> Result<Tables, String> {
    let mut rows = *before;
    for (change, _) in batch.changes().iter().zip(due).filter(|(_, due)| **due) {
        let table = batch.table(change).id as usize;
        one(&mut rows[table], table, batch, change).map_err(|what| format!("row by row: {what} in table {table}"))?;
    }
    let mut sets = *before;
    let orders: [Order; TABLES] = std::array::from_fn(|table| match table {
        UNIQUE_TABLE if !overtaking => [Order::Table, Order::All][dice.below(2) as usize],
        _ => Order::Key,
    });
    let rules: Vec<TableRule<'_>> =
        batch.tables().iter().map(|table| TableRule { key: &[0], order: orders[table.id as usize] }).collect();
    let plan = plan(batch, &rules, |_, index| due[index]).map_err(|error| error.to_string())?;
    for step in &plan.steps {
        let mut changes = step.changes.clone();
        dice.shuffle(&mut changes);
        for change in changes {
            let change = &batch.changes()[change as usize];
            let table = batch.table(change).id as usize;
            let fits = match step.action {
                Action::Update => one(&mut sets[table], table, batch, &Change { old: Image::ABSENT, ..*change }),
                _ => one(&mut sets[table], table, batch, change),
            };
            fits.map_err(|what| format!("as a set ({:?}): {what} in table {table}", step.action))?;
        }
    }
    if sets == rows { Ok(rows) } else { Err(format!("row by row: {rows:?}\nas sets:    {sets:?}")) }
}

/// Strictly: an insert must insert, an update or delete must hit its row, no unique value may be there twice.
fn one(rows: &mut Rows, table: usize, batch: &Batch, change: &Change) -> Result<(), String> {
    let number = |image: Image, column: usize| -> Option<u32> {
        let cell = batch.cells(image)[column];
        let text = std::str::from_utf8(batch.bytes(cell)).ok();
        (cell.kind == CellKind::Text).then_some(())?;
        text?.parse().ok()
    };
    let key = |image: Image| number(image, 0).map(|key| key as usize).ok_or("an image without its key");
    match change.op {
        Op::Truncate => *rows = Rows::default(),
        Op::Delete => {
            let key = key(change.old)?;
            rows[key].take().ok_or_else(|| format!("row {key} to delete is not there"))?;
        }
        Op::Insert | Op::Update => {
            let to = key(change.new)?;
            let from = if change.old.is_present() { key(change.old)? } else { to };
            let held = if change.op == Op::Update {
                Some(rows[from].take().ok_or_else(|| format!("row {from} to update is not there"))?)
            } else {
                None
            };
            let value = |column| number(change.new, column).ok_or_else(|| format!("row {to} has no value in column {column}"));
            let toast = number(change.new, 3).or(held.map(|row| row.toast)).ok_or("a new row with a value left out")?;
            let row = Row { unique: value(1)?, value: value(2)?, toast };
            if table == UNIQUE_TABLE && rows.iter().flatten().any(|other| other.unique == row.unique) {
                return Err(format!("row {to}: another row has the unique value {}", row.unique));
            }
            if rows[to].replace(row).is_some() {
                return Err(format!("row {to} is there already"));
            }
        }
    }
    Ok(())
}
