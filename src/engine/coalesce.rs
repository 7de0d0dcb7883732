//! Turns the changes of a batch into an ordered list of set operations.
//!
//! Applying the steps of a [`Plan`] in order leaves the same rows as applying the changes one by one in the order of the
//! log. What a table's changes become is said by its [`Order`]:
//! * where rows are told apart by the bytes of their key, a run of changes becomes one net effect per row ([`net`]), written
//!   as at most four sets: rows that go, rows that are written anew, rows that change in place, rows that come. A run ends
//!   at a truncate, and wherever a change does not go with what the run knows of its keys;
//! * everywhere else changes keep their order and only neighbours gather.
//!
//! The strict rule stays: each row of a step must be there (or, to be inserted, must not), else the target's answer is an
//! error.

mod images;
mod net;
mod places;

pub use images::Images;

use super::batch::{Batch, Cell, CellKind, Change, Image, Op};
use super::error::{Error, Result, reason};
use super::roles::Applied;
use net::Net;

#[cfg(test)]
mod tests;

/// Which changes of a table may overtake each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Changes of different keys. For tables with a key whose equality is equality of bytes, where rows with different keys
    /// are never in each other's way: no other unique index or exclusion constraint on the target, no foreign keys or
    /// triggers that fire.
    Key,
    /// As `Key`, but rows with different keys may want the same value of another unique index or exclusion constraint. So
    /// what touches such a value is written in phases, and batches may not be applied side by side.
    Guarded,
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
    /// A row whose key changes may be written anew ([`Action::Rewrite`]). Where it may not, it is updated in its place in
    /// commit order. Always so with [`Order::Guarded`].
    pub rewrites: bool,
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
    /// Rows found by their key get new values, the key among them, in one statement for all rows: those whose key or
    /// guarded columns change go, and come again when all of them are gone; the others change in place. The key is the old
    /// image's where there is one.
    Rewrite,
    /// Rows go.
    Delete,
}

/// One row that a statement writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Names the row in the target; absent when the new image does.
    pub old: Image,
    /// Its new values; absent for a delete.
    pub new: Image,
}

/// Many rows written alike.
#[derive(Debug, PartialEq, Eq)]
pub struct Write {
    /// What is done with them.
    pub action: Action,
    /// Index into [`Batch::tables`].
    pub table: u32,
    /// Index into [`Plan::column_sets`].
    pub columns: u32,
    /// The rows must be written one after the other; else no order is kept between them, and none is there twice.
    pub one_by_one: bool,
    /// The rows.
    pub rows: Vec<Row>,
}

/// One step of a plan.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Rows are written.
    Write(Write),
    /// All rows of these tables (indices into [`Batch::tables`]) go, in one statement.
    Truncate(Vec<u32>),
}

/// Columns that new images leave out since the source did not send what did not change; ascending positions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ColumnSet {
    /// No row has a value for these.
    pub never: Vec<u32>,
    /// Some rows have, some have not.
    pub some: Vec<u32>,
}

impl ColumnSet {
    /// What the new images of rows leave out.
    #[must_use]
    pub fn of(images: &Images<'_>, rows: &[Row]) -> Self {
        let columns = rows.first().map_or(0, |row| images.cells(row.new).len());
        let mut left_out = vec![0; columns];
        for row in rows {
            for (count, cell) in left_out.iter_mut().zip(images.cells(row.new)) {
                *count += usize::from(is_unchanged(*cell));
            }
        }
        let columns = || (0u32..).zip(&left_out);
        Self {
            never: columns().filter(|(_, count)| **count == rows.len()).map(|(column, _)| column).collect(),
            some: columns().filter(|(_, count)| (1..rows.len()).contains(*count)).map(|(column, _)| column).collect(),
        }
    }
}

/// Set operations, to be done in this order.
#[derive(Debug)]
pub struct Plan<'a> {
    /// The statements.
    pub steps: Vec<Step>,
    /// Sets of left-out columns that occur; the first is the empty one.
    pub column_sets: Vec<ColumnSet>,
    /// What the rows of the steps refer to.
    pub images: Images<'a>,
    /// Changes of the source that are planned, truncates not counted; they may be fewer rows.
    pub applied: Applied,
}

impl Plan<'_> {
    /// Nothing is planned. Changes that cancel each other out are planned although they have no step.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.rows() == 0
    }

    /// Changes of the source that are planned, truncates not counted.
    #[must_use]
    pub fn rows(&self) -> i64 {
        let applied = &self.applied;
        i64::try_from(applied.inserts + applied.updates + applied.deletes).unwrap_or(i64::MAX)
    }
}

/// Plans the changes for which `due` (by index) says yes. `rules` has one entry per table of the batch.
///
/// Fails when an image that is needed to find a row was not sent.
pub fn plan<'a>(batch: &'a Batch, rules: &[TableRule<'_>], due: impl Fn(&Change, usize) -> bool) -> Result<Plan<'a>> {
    let mut planner = Planner::new(batch, rules);
    for (index, change) in batch.changes().iter().enumerate() {
        if due(change, index) {
            planner.add(change)?;
        } else {
            planner.skip(change);
        }
    }
    Ok(planner.finish())
}

/// What is known of one table while planning.
struct Lane {
    /// Its run of changes, where there are net effects.
    net: Net,
    /// The last step, where commit order is kept.
    last: Option<usize>,
}

struct Planner<'a, 'r> {
    rules: &'r [TableRule<'r>],
    lanes: Vec<Lane>,
    /// Order::All: the last step of all its tables.
    last_of_all: Option<usize>,
    /// Group and tables of the truncate seen just before.
    truncating: Option<(u32, Vec<u32>)>,
    plan: Plan<'a>,
}

impl<'a, 'r> Planner<'a, 'r> {
    fn new(batch: &'a Batch, rules: &'r [TableRule<'r>]) -> Self {
        let plan =
            Plan { steps: Vec::new(), column_sets: vec![ColumnSet::default()], images: Images::new(batch), applied: Applied::default() };
        let lanes = rules.iter().map(|_| Lane { net: Net::new(), last: None }).collect();
        Self { rules, lanes, last_of_all: None, truncating: None, plan }
    }

    fn add(&mut self, change: &Change) -> Result<()> {
        if change.op == Op::Truncate {
            self.truncate(change);
            return Ok(());
        }
        self.end_truncate();
        let action = self.action(change)?;
        let applied = &mut self.plan.applied;
        *match change.op {
            Op::Insert => &mut applied.inserts,
            Op::Update => &mut applied.updates,
            Op::Delete | Op::Truncate => &mut applied.deletes,
        } += 1;
        match self.rules[change.table as usize].order {
            Order::Key | Order::Guarded => self.add_net(change, action),
            Order::Table | Order::All => {
                self.add_in_order(change, action);
                Ok(())
            }
        }
    }

    fn skip(&mut self, change: &Change) {
        if change.op != Op::Truncate {
            self.end_truncate();
        }
    }

    fn finish(mut self) -> Plan<'a> {
        self.end_truncate();
        for table in 0..self.lanes.len() {
            self.end_run(table as u32);
        }
        self.plan
    }

    /// What the change does, after looking whether all images that it needs are there.
    fn action(&self, change: &Change) -> Result<Action> {
        let key = self.rules[change.table as usize].key;
        let images = &self.plan.images;
        let needs_new = matches!(change.op, Op::Insert | Op::Update);
        let needs_old = change.op == Op::Delete || (change.op == Op::Update && key.is_empty());
        let left_out = || images.cells(change.new).iter().copied().any(is_unchanged);
        let wrong = if needs_new && !change.new.is_present() {
            Some("a new row without values")
        } else if needs_old && !change.old.is_present() {
            Some("an update or delete without the old row")
        } else if needs_old && key.is_empty() && !change.old_is_full {
            Some("an update or delete with only a part of the old row, for a table without a key")
        } else if change.old.is_present() && self.key_leaves_out(change.old, key) {
            Some("an old row without its key")
        } else if change.op == Op::Update && !change.old.is_present() && self.key_leaves_out(change.new, key) {
            Some("an update without its key")
        } else if change.op == Op::Insert && left_out() {
            Some("a new row with a value left out")
        } else {
            None
        };
        if let Some(wrong) = wrong {
            let table = &images.batch().table(change).name;
            return Err(Error::stop(reason::PROTOCOL_VIOLATION, format!("the source sent {wrong} (table {table})")));
        }
        Ok(match change.op {
            Op::Insert => Action::Insert,
            Op::Update if self.key_moves(change, key) => Action::UpdateKey,
            Op::Update => Action::Update,
            Op::Delete | Op::Truncate => Action::Delete,
        })
    }

    fn key_leaves_out(&self, image: Image, key: &[usize]) -> bool {
        let cells = self.plan.images.cells(image);
        key.iter().any(|&column| is_unchanged(cells[column]))
    }

    /// A key column that the new image leaves out has not changed.
    fn key_moves(&self, change: &Change, key: &[usize]) -> bool {
        let images = &self.plan.images;
        let (old, new) = (images.cells(change.old), images.cells(change.new));
        let differs = |old: Cell, new: Cell| old.kind != new.kind || images.bytes(old) != images.bytes(new);
        change.old.is_present() && key.iter().any(|&column| !is_unchanged(new[column]) && differs(old[column], new[column]))
    }

    fn add_net(&mut self, change: &Change, action: Action) -> Result<()> {
        let (table, rule) = (change.table, self.rules[change.table as usize]);
        let moves = action == Action::UpdateKey;
        if moves && !(rule.rewrites || rule.order == Order::Guarded) {
            self.end_run(table);
            self.add_in_order(change, action);
            return Ok(());
        }
        let mut facts = self.lanes[table as usize].net.add(&mut self.plan.images, change, rule.key, moves);
        if facts.is_none() {
            self.end_run(table);
            facts = self.lanes[table as usize].net.add(&mut self.plan.images, change, rule.key, moves);
        }
        let facts = facts.ok_or_else(|| Error::bug("a change does not go with an empty run"))?;
        if facts.mixed {
            self.end_run(table);
        }
        Ok(())
    }

    /// Writes down what a table's run has led to.
    fn end_run(&mut self, table: u32) {
        let lane = &mut self.lanes[table as usize];
        let phases = lane.net.end(&self.plan.images, &self.rules[table as usize]);
        for (action, rows) in phases.writes.into_iter().filter(|(_, rows)| !rows.is_empty()) {
            let writes_some = phases.leaves_out && matches!(action, Action::Rewrite | Action::Update);
            let columns = if writes_some { self.columns(ColumnSet::of(&self.plan.images, &rows)) } else { 0 };
            self.plan.steps.push(Step::Write(Write { action, table, columns, one_by_one: false, rows }));
            self.lanes[table as usize].last = None;
        }
    }

    /// Number of a column set.
    fn columns(&mut self, set: ColumnSet) -> u32 {
        let sets = &mut self.plan.column_sets;
        let known = sets.iter().position(|known| *known == set);
        known.unwrap_or_else(|| {
            sets.push(set);
            sets.len() - 1
        }) as u32
    }

    /// To the last step of its order when it is of the same kind, else to a new one. Updates go one by one: whether they
    /// are independent of each other can't be seen.
    fn add_in_order(&mut self, change: &Change, action: Action) {
        let rule = self.rules[change.table as usize];
        let row = Row { old: change.old, new: change.new };
        let updates = matches!(action, Action::Update | Action::UpdateKey);
        let columns = if updates { self.columns(ColumnSet::of(&self.plan.images, &[row])) } else { 0 };
        let last = if rule.order == Order::All { self.last_of_all } else { self.lanes[change.table as usize].last };
        if let Some(Step::Write(write)) = last.and_then(|last| self.plan.steps.get_mut(last))
            && (write.action, write.table, write.columns) == (action, change.table, columns)
        {
            write.rows.push(row);
            return;
        }
        let one_by_one = updates || (action == Action::Delete && rule.key.is_empty());
        self.plan.steps.push(Step::Write(Write { action, table: change.table, columns, one_by_one, rows: vec![row] }));
        let last = Some(self.plan.steps.len() - 1);
        self.lanes[change.table as usize].last = last;
        if rule.order == Order::All {
            self.last_of_all = last;
        }
    }

    /// Truncates of one statement are gathered; they end what came before in their tables.
    fn truncate(&mut self, change: &Change) {
        if self.truncating.as_ref().is_some_and(|(group, _)| *group != change.group) {
            self.end_truncate();
        }
        self.end_run(change.table);
        self.lanes[change.table as usize].last = None;
        if self.rules[change.table as usize].order == Order::All {
            self.last_of_all = None;
        }
        self.truncating.get_or_insert_with(|| (change.group, Vec::new())).1.push(change.table);
    }

    fn end_truncate(&mut self) {
        if let Some((_, tables)) = self.truncating.take() {
            self.plan.steps.push(Step::Truncate(tables));
        }
    }
}

fn is_unchanged(cell: Cell) -> bool {
    cell.kind == CellKind::Unchanged
}
