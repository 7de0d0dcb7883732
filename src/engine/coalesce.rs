//! Turns the changes of a batch into an ordered list of set operations.
//!
//! Applying the steps of a [`Plan`] in order, each as one set, leaves the same rows as applying the changes one by one in
//! the order of the log. Three rules make it so:
//! * a set holds changes of one table, one action and one set of columns, and no key twice (neither as old nor as new);
//! * a change lies in a set behind every set that holds one of its keys;
//! * where keys are not independent of each other ([`Order::Table`], [`Order::All`]) a set holds only neighbours.
//!
//! A truncate is a barrier for its tables. Nothing is netted yet: each change stays a row of some statement.

use super::batch::{Batch, Cell, CellKind, Change, Op};
use super::error::{Error, Result, reason};
use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{BuildHasherDefault, Hasher};

#[cfg(test)]
mod tests;

/// Which changes of a table may overtake each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Changes of different keys. For tables with a key whose equality is equality of bytes, without any other unique
    /// index or exclusion constraint on the target, and without foreign keys or triggers that fire.
    Key,
    /// None: commit order inside the table, which is independent of other tables.
    Table,
    /// None, and it keeps commit order with all other tables of this kind too (foreign keys, triggers).
    All,
}

/// What the plan must know of a table.
#[derive(Clone, Copy, Debug)]
pub struct TableRule<'a> {
    /// Positions of the columns that name a row; empty when only the whole old row names it.
    pub key: &'a [usize],
    /// Which changes may overtake each other.
    pub order: Order,
}

/// What one statement does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// New rows.
    Insert,
    /// Rows found by the key of their new image (tables without a key: by the old image) get new values.
    Update,
    /// Rows found by the key of their old image get new values, the key among them.
    UpdateKey,
    /// Rows go.
    Delete,
    /// All rows of the changes' tables go, in one statement.
    Truncate,
}

/// One statement over many rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What it does.
    pub action: Action,
    /// Index into [`Batch::tables`]; for a truncate the first table of several.
    pub table: u32,
    /// Index into [`Plan::column_sets`].
    pub columns: u32,
    /// Indices of its changes, in the order of the log.
    pub changes: Vec<u32>,
}

/// Columns of new images that the source left out since they did not change; ascending positions.
pub type MissingColumns = Vec<u32>;

/// Set operations, to be done in this order.
#[derive(Debug)]
pub struct Plan {
    /// The statements.
    pub steps: Vec<Step>,
    /// Sets of left-out columns that occur; the first is the empty one.
    pub column_sets: Vec<MissingColumns>,
}

impl Plan {
    /// Rows that the steps write; a truncate writes none.
    #[must_use]
    pub fn rows(&self) -> i64 {
        let rows = self.steps.iter().filter(|step| step.action != Action::Truncate).map(|step| step.changes.len());
        i64::try_from(rows.sum::<usize>()).unwrap_or(i64::MAX)
    }
}

/// Plans the changes for which `due` (by index) says yes. `rules` has one entry per table of the batch.
///
/// Fails when an image that is needed to find a row was not sent.
pub fn plan(batch: &Batch, rules: &[TableRule<'_>], due: impl Fn(&Change, usize) -> bool) -> Result<Plan> {
    let mut planner = Planner::new(batch, rules);
    for (index, change) in batch.changes().iter().enumerate() {
        if due(change, index) {
            planner.add(change, index as u32)?;
        } else {
            planner.skip(change);
        }
    }
    Ok(Plan { steps: planner.steps, column_sets: planner.column_sets })
}

/// The last step of each key by the hash of its bytes. Two keys with one hash count as one: that costs a step and
/// nothing else, so no key has to be kept.
type LastSteps = HashMap<u64, u32, BuildHasherDefault<AlreadyHashed>>;

#[derive(Default)]
struct AlreadyHashed(u64);

impl Hasher for AlreadyHashed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("keys of this map are u64");
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

/// Steps of one table with the same action and columns, ascending.
struct Alike {
    action: Action,
    columns: u32,
    steps: Vec<u32>,
}

/// What is known of one table while planning.
#[derive(Default)]
struct TableLane {
    /// Nothing goes into a step before this one.
    floor: u32,
    /// Order::Key: the last step of each key.
    last_of_key: LastSteps,
    /// Order::Key: steps that can still take rows.
    alike: Vec<Alike>,
    /// Order::Key: how key cells are encoded. Equal keys have equal bytes only within one encoding.
    encodings: Vec<CellKind>,
    /// Order::Table: its last step.
    last: Option<u32>,
}

struct Planner<'a> {
    batch: &'a Batch,
    rules: &'a [TableRule<'a>],
    lanes: Vec<TableLane>,
    /// Order::All: the last step of all its tables.
    last_of_all: Option<u32>,
    /// Group of the truncate seen just before.
    truncating: Option<u32>,
    steps: Vec<Step>,
    column_sets: Vec<MissingColumns>,
    missing: MissingColumns,
}

impl<'a> Planner<'a> {
    fn new(batch: &'a Batch, rules: &'a [TableRule<'a>]) -> Self {
        Self {
            batch,
            rules,
            lanes: rules.iter().map(|_| TableLane::default()).collect(),
            last_of_all: None,
            truncating: None,
            steps: Vec::new(),
            column_sets: vec![Vec::new()],
            missing: Vec::new(),
        }
    }

    fn add(&mut self, change: &Change, index: u32) -> Result<()> {
        if change.op == Op::Truncate {
            self.truncate(change, index);
            return Ok(());
        }
        self.truncating = None;
        let action = self.action(change)?;
        let columns = match action {
            Action::Update | Action::UpdateKey => self.columns(change),
            Action::Insert | Action::Delete | Action::Truncate => 0,
        };
        let step = match self.rules[change.table as usize].order {
            Order::Key => self.step_by_key(change, action, columns),
            Order::Table | Order::All => self.step_in_order(change.table, action, columns),
        };
        self.steps[step as usize].changes.push(index);
        Ok(())
    }

    fn skip(&mut self, change: &Change) {
        if change.op != Op::Truncate {
            self.truncating = None;
        }
    }

    /// What the change does, after looking whether all images that it needs are there.
    fn action(&self, change: &Change) -> Result<Action> {
        let key = self.rules[change.table as usize].key;
        let needs_new = matches!(change.op, Op::Insert | Op::Update);
        let needs_old = change.op == Op::Delete || (change.op == Op::Update && key.is_empty());
        let wrong = if needs_new && !change.new.is_present() {
            Some("a new row without values")
        } else if needs_old && !change.old.is_present() {
            Some("an update or delete without the old row")
        } else if needs_old && key.is_empty() && !change.old_is_full {
            Some("an update or delete with only a part of the old row, for a table without a key")
        } else if change.op == Op::Update && !change.old.is_present() && self.key_cells(change, Side::New).any(is_unchanged) {
            Some("an update without its key")
        } else if change.op == Op::Insert && self.batch.cells(change.new).iter().copied().any(is_unchanged) {
            Some("a new row with a value left out")
        } else {
            None
        };
        if let Some(wrong) = wrong {
            let table = &self.batch.table(change).name;
            return Err(Error::stop(reason::PROTOCOL_VIOLATION, format!("the source sent {wrong} (table {table})")));
        }
        Ok(match change.op {
            Op::Insert => Action::Insert,
            Op::Update if self.key_moves(change) => Action::UpdateKey,
            Op::Update => Action::Update,
            Op::Delete => Action::Delete,
            Op::Truncate => Action::Truncate,
        })
    }

    /// Key cells of one side. A key column that the new image leaves out is the old one's.
    fn key_cells(&self, change: &Change, side: Side) -> impl Iterator<Item = Cell> + Clone + use<'a> {
        let batch = self.batch;
        let cells = |image| batch.cells(image);
        let (first, fallback) = match side {
            Side::Old => (cells(change.old), cells(change.old)),
            Side::New if change.old.is_present() => (cells(change.new), cells(change.old)),
            Side::New => (cells(change.new), cells(change.new)),
        };
        let key = self.rules[change.table as usize].key;
        key.iter().map(move |&column| if is_unchanged(first[column]) { fallback[column] } else { first[column] })
    }

    fn key_moves(&self, change: &Change) -> bool {
        let same = |(old, new): (Cell, Cell)| old.kind == new.kind && self.batch.bytes(old) == self.batch.bytes(new);
        change.old.is_present() && !self.key_cells(change, Side::Old).zip(self.key_cells(change, Side::New)).all(same)
    }

    /// Number of the set of columns that the new image leaves out.
    fn columns(&mut self, change: &Change) -> u32 {
        self.missing.clear();
        let cells = self.batch.cells(change.new).iter().zip(0u32..);
        self.missing.extend(cells.filter(|(cell, _)| is_unchanged(**cell)).map(|(_, column)| column));
        let known = self.column_sets.iter().position(|set| *set == self.missing);
        let number = known.unwrap_or_else(|| {
            self.column_sets.push(self.missing.clone());
            self.column_sets.len() - 1
        });
        number as u32
    }

    /// A step of the same kind behind all steps with a key of the change; the earliest, so that rows gather.
    fn step_by_key(&mut self, change: &Change, action: Action, columns: u32) -> u32 {
        let side = if action == Action::Delete { Side::Old } else { Side::New };
        self.split_where_encodings_change(change, side);
        let hash = self.hash(change, side);
        let old_hash = if action == Action::UpdateKey { self.hash(change, Side::Old) } else { hash };

        let end = self.steps.len() as u32;
        let lane = &mut self.lanes[change.table as usize];
        let behind = |hash: &u64| lane.last_of_key.get(hash).map_or(0, |last| last + 1);
        let earliest = lane.floor.max(behind(&hash)).max(behind(&old_hash));
        let alike = match lane.alike.iter().position(|alike| alike.action == action && alike.columns == columns) {
            Some(position) => &mut lane.alike[position],
            None => lane.alike.push_mut(Alike { action, columns, steps: Vec::new() }),
        };
        let place = alike.steps.partition_point(|step| *step < earliest);
        let step = alike.steps.get(place).copied().unwrap_or(end);
        if step == end {
            alike.steps.push(end);
        }
        lane.last_of_key.insert(hash, step);
        lane.last_of_key.insert(old_hash, step);
        if step == end {
            self.new_step(action, change.table, columns);
        }
        step
    }

    /// The last step of the lane when it is of the same kind, else a new one. Updates stand alone: whether a value of
    /// another unique index moves from row to row can't be seen.
    fn step_in_order(&mut self, table: u32, action: Action, columns: u32) -> u32 {
        let rule = self.rules[table as usize];
        let last = match rule.order {
            Order::All => self.last_of_all,
            Order::Key | Order::Table => self.lanes[table as usize].last,
        };
        let gathers = action == Action::Insert || (action == Action::Delete && !rule.key.is_empty());
        if let Some(last) = last
            && gathers
            && self.steps[last as usize].action == action
            && self.steps[last as usize].table == table
        {
            return last;
        }
        let step = self.new_step(action, table, columns);
        self.lanes[table as usize].last = Some(step);
        if rule.order == Order::All {
            self.last_of_all = Some(step);
        }
        step
    }

    fn truncate(&mut self, change: &Change, index: u32) {
        let table = change.table as usize;
        if self.truncating == Some(change.group) {
            // The step is the last one: nothing but truncates of the same statement came after it.
            if let Some(step) = self.steps.last_mut() {
                step.changes.push(index);
            }
        } else {
            let step = self.new_step(Action::Truncate, change.table, 0);
            self.steps[step as usize].changes.push(index);
            self.truncating = Some(change.group);
        }
        let end = self.steps.len() as u32;
        self.lanes[table].raise_floor(end);
        self.lanes[table].last = Some(end - 1);
        if self.rules[table].order == Order::All {
            self.last_of_all = Some(end - 1);
        }
    }

    fn new_step(&mut self, action: Action, table: u32, columns: u32) -> u32 {
        self.steps.push(Step { action, table, columns, changes: Vec::new() });
        (self.steps.len() - 1) as u32
    }

    /// Equal keys are found by equal bytes. Where the encoding of a key column changes, all that came before is kept before.
    fn split_where_encodings_change(&mut self, change: &Change, side: Side) {
        let end = self.steps.len() as u32;
        let kinds = self.key_cells(change, side).map(|cell| cell.kind);
        let old_side = if change.old.is_present() { Side::Old } else { side };
        let mixed = !kinds.clone().eq(self.key_cells(change, old_side).map(|cell| cell.kind));
        let lane = &mut self.lanes[change.table as usize];
        if mixed || !lane.encodings.iter().copied().eq(kinds.clone()) {
            lane.raise_floor(end);
            lane.encodings.clear();
            // After a change with both encodings nothing is known: the next one splits again.
            lane.encodings.extend(kinds.filter(|_| !mixed));
        }
    }

    fn hash(&self, change: &Change, side: Side) -> u64 {
        let mut hasher = DefaultHasher::new();
        for cell in self.key_cells(change, side) {
            let bytes = self.batch.bytes(cell);
            hasher.write_usize(bytes.len());
            hasher.write(bytes);
        }
        hasher.finish()
    }
}

impl TableLane {
    fn raise_floor(&mut self, step: u32) {
        self.floor = step;
        self.last_of_key.clear();
        self.alike.clear();
    }
}

#[derive(Clone, Copy)]
enum Side {
    Old,
    New,
}

fn is_unchanged(cell: Cell) -> bool {
    cell.kind == CellKind::Unchanged
}
