//! A part is written twice: row by row, and as the sets that the planner makes of it, each in an order of its own. Both are
//! strict, and must leave the same rows.

use crate::dice::Dice;
use crate::history::{KEYLESS_TABLE, NULL, Row, Rows, TABLES, Tables, UNIQUE_TABLE, in_order};
use crate::loads::LOADED_TABLE;
use crate::mutants::Mutant;
use sluice::engine::batch::{Batch, Cell, CellKind, Change, Op};
use sluice::engine::coalesce::{Action, Order, Step, TableRule, Write, plan};

/// The tables after the due changes, and how many of them touched one of several equal rows. An error is a change that does not
/// fit, or a difference between the two ways.
pub fn apply(before: &Tables, batch: &Batch, due: &[bool], mutant: Option<Mutant>, dice: &mut Dice) -> Result<(Tables, u64), String> {
    let mut rows = *before;
    let mut of_equal = 0;
    for (change, _) in batch.changes().iter().zip(due).filter(|(_, due)| **due) {
        let table = batch.table(change).id as usize;
        let values = |image| values(batch.cells(image), |cell| batch.bytes(cell));
        let (rows, old, new) = (&mut rows[table], values(change.old), values(change.new));
        of_equal += u64::from(table == KEYLESS_TABLE && rows.iter().filter(|row| old.is(row)).count() > 1);
        let fits = match change.op {
            Op::Truncate => {
                *rows = Rows::default();
                Ok(())
            }
            Op::Delete => remove(rows, table, &old).map(|_| ()),
            Op::Insert => put(rows, table, None, &new),
            Op::Update => update(rows, table, &old, &new),
        };
        fits.map_err(|what| format!("row by row: {what} in table {table}"))?;
    }
    let [rows, sets] = [rows, as_sets(before, batch, due, mutant, dice)?].map(|mut tables| {
        tables[KEYLESS_TABLE] = in_order(KEYLESS_TABLE, tables[KEYLESS_TABLE]);
        tables
    });
    if sets == rows { Ok((rows, of_equal)) } else { Err(format!("row by row: {rows:?}\nas sets:    {sets:?}")) }
}

/// Which keys of the loaded table the due changes touch, a bit for each.
pub fn loaded_keys(batch: &Batch, due: &[bool]) -> u16 {
    let mut keys = 0;
    for (change, _) in batch.changes().iter().zip(due).filter(|(_, due)| **due) {
        if batch.table(change).id as usize != LOADED_TABLE {
            continue;
        }
        if change.op == Op::Truncate {
            return u16::MAX;
        }
        let images = [change.old, change.new].map(|image| values(batch.cells(image), |cell| batch.bytes(cell)));
        images.iter().filter_map(|values| values.key().ok()).for_each(|key| keys |= 1 << key);
    }
    keys
}

/// Rows that come, with their keys.
///
/// # Errors
/// There is something else.
pub fn inserted(batch: &Batch) -> Result<Vec<(usize, Row)>, String> {
    let row = |change: &Change| {
        let values = values(batch.cells(change.new), |cell| batch.bytes(cell));
        match (change.op, values) {
            (Op::Insert, Values { key: Some(key), unique: Some(unique), value: Some(value), toast: Some(toast) }) => {
                Ok((key as usize, Row { unique, value, toast }))
            }
            (op, values) => Err(format!("{op:?} {values:?} comes early")),
        }
    };
    batch.changes().iter().map(row).collect()
}

/// Any order that a table allows may be chosen for it.
fn as_sets(before: &Tables, batch: &Batch, due: &[bool], mutant: Option<Mutant>, dice: &mut Dice) -> Result<Tables, String> {
    let mut sets = *before;
    let rules: [TableRule<'_>; TABLES] = std::array::from_fn(|table| {
        let order = match table {
            UNIQUE_TABLE if mutant == Some(Mutant::BarrierLeftOut) => Order::Key,
            UNIQUE_TABLE => [Order::Guarded, Order::Table, Order::All][dice.below(3) as usize],
            KEYLESS_TABLE if mutant == Some(Mutant::KeylessNetEffects) => Order::Key,
            KEYLESS_TABLE => [Order::Table, Order::All][dice.below(2) as usize],
            _ => [Order::Key, Order::Key, Order::Guarded, Order::All][dice.below(4) as usize],
        };
        let key: &[usize] = if table == KEYLESS_TABLE { &[] } else { &[0] };
        TableRule { key, order, rewrites: order == Order::Guarded || dice.chance(500) }
    });
    let rules: Vec<TableRule<'_>> = batch.tables().iter().map(|table| rules[table.id as usize]).collect();
    let plan = plan(batch, &rules, |_, index| due[index]).map_err(|error| error.to_string())?;
    for step in &plan.steps {
        match step {
            Step::Truncate(tables) => tables.iter().for_each(|table| sets[batch.tables()[*table as usize].id as usize] = Rows::default()),
            Step::Write(write) => {
                let table = batch.tables()[write.table as usize].id as usize;
                let values = |image| values(plan.images.cells(image), |cell| plan.images.bytes(cell));
                let mut written: Vec<(Values, Values)> = write.rows.iter().map(|row| (values(row.old), values(row.new))).collect();
                if !write.one_by_one {
                    dice.shuffle(&mut written);
                }
                let rows = &mut sets[table];
                let fits = match table {
                    KEYLESS_TABLE => write_rows(rows, write.action, &written, mutant),
                    _ => write_set(rows, table, write, &written),
                };
                fits.map_err(|what| format!("as a set ({:?}): {what} in table {table}", write.action))?;
            }
        }
    }
    Ok(sets)
}

/// Rows without a key, one by one.
fn write_rows(rows: &mut Rows, action: Action, written: &[(Values, Values)], mutant: Option<Mutant>) -> Result<(), String> {
    for (old, new) in written {
        if action == Action::Insert {
            put(rows, KEYLESS_TABLE, None, new)?;
            continue;
        }
        let unequal = mutant == Some(Mutant::NullEqualsNothing) && old.holds_null();
        let equal = rows.iter().filter(|row| old.is(row) && !unequal).count();
        let touched = if mutant == Some(Mutant::AllEqualRowsTouched) { equal } else { 1 };
        for _ in 0..touched {
            match action {
                _ if equal == 0 => return Err(format!("{old:?} is not there")),
                Action::Delete => drop(remove(rows, KEYLESS_TABLE, old)?),
                _ => update(rows, KEYLESS_TABLE, old, new)?,
            }
        }
    }
    Ok(())
}

fn write_set(rows: &mut Rows, table: usize, write: &Write, written: &[(Values, Values)]) -> Result<(), String> {
    let mut gone = Vec::new();
    for (old, new) in written {
        match write.action {
            Action::Insert => put(rows, table, None, new)?,
            Action::Update => update(rows, table, &Values::default(), new)?,
            Action::UpdateKey => update(rows, table, old, new)?,
            Action::Delete => {
                remove(rows, table, old)?;
            }
            Action::Rewrite => {
                let from = if old.key.is_some() { old } else { new };
                let held = rows[from.key()?].ok_or_else(|| format!("{from:?} to rewrite is not there"))?;
                if from.key()? != new.key()? || new.unique.is_some_and(|unique| unique != held.unique) {
                    gone.push((remove(rows, table, from)?, new));
                } else {
                    update(rows, table, &Values::default(), new)?;
                }
            }
        }
    }
    // What had to go comes again when all of them are gone.
    gone.into_iter().try_for_each(|(held, new)| put(rows, table, Some(held), new))
}

/// An image as numbers; what it leaves out is none.
#[derive(Debug, Default)]
struct Values {
    key: Option<u32>,
    unique: Option<u32>,
    value: Option<u32>,
    toast: Option<u32>,
}

impl Values {
    fn key(&self) -> Result<usize, String> {
        self.key.map(|key| key as usize).ok_or_else(|| "an image without its key".into())
    }

    /// Whether it is this row, all values of it; NULL is the same as NULL.
    fn is(&self, row: &Option<Row>) -> bool {
        row.is_some_and(|row| [self.unique, self.value, self.toast] == [row.unique, row.value, row.toast].map(Some))
    }

    fn holds_null(&self) -> bool {
        [self.unique, self.value, self.toast].contains(&Some(NULL))
    }
}

fn values<'a>(cells: &[Cell], bytes: impl Fn(Cell) -> &'a [u8]) -> Values {
    let number = |column: usize| {
        let cell = cells.get(column)?;
        match cell.kind {
            CellKind::Null => Some(NULL),
            CellKind::Text => std::str::from_utf8(bytes(*cell)).ok()?.parse::<u32>().ok(),
            CellKind::Unchanged | CellKind::Binary => None,
        }
    };
    Values { key: number(0), unique: number(1), value: number(2), toast: number(3) }
}

fn remove(rows: &mut Rows, table: usize, old: &Values) -> Result<Row, String> {
    let place = if table == KEYLESS_TABLE { rows.iter().position(|row| old.is(row)) } else { Some(old.key()?) };
    place.and_then(|place| rows[place].take()).ok_or_else(|| format!("{old:?} to remove is not there"))
}

fn update(rows: &mut Rows, table: usize, old: &Values, new: &Values) -> Result<(), String> {
    let held = remove(rows, table, if old.key.is_some() { old } else { new })?;
    put(rows, table, Some(held), new)
}

/// Writes a row where none is; what the new image leaves out is as it was.
fn put(rows: &mut Rows, table: usize, held: Option<Row>, new: &Values) -> Result<(), String> {
    let left_out = || format!("{new:?} leaves out what nobody knows");
    let row = Row {
        unique: new.unique.or(held.map(|row| row.unique)).ok_or_else(left_out)?,
        value: new.value.or(held.map(|row| row.value)).ok_or_else(left_out)?,
        toast: new.toast.or(held.map(|row| row.toast)).ok_or_else(left_out)?,
    };
    if table == UNIQUE_TABLE && rows.iter().flatten().any(|other| other.unique == row.unique) {
        return Err(format!("for {new:?}: another row has that unique value"));
    }
    let place = if table == KEYLESS_TABLE { rows.iter().position(Option::is_none) } else { Some(new.key()?) };
    match place.map(|place| rows[place].replace(row)) {
        Some(None) => Ok(()),
        Some(Some(_)) => Err(format!("{new:?} is there already")),
        None => Err(format!("{new:?} is more than there ever was")),
    }
}
