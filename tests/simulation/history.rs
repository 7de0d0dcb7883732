//! The simulated source's tables and their history: writers that overlap, roll back and wait for a standby; tables that are
//! altered; somebody who takes tables out of the publication; failovers.

use crate::dice::Dice;
use crate::loads::{COPIED_AT_ONCE, RollBack, Savepoint};
use std::collections::VecDeque;

pub const TABLES: usize = 3;
pub const KEYS: usize = 8;
/// Values of the unique column: few, so that a value that became free is soon taken by another row.
const UNIQUE_VALUES: u32 = KEYS as u32 + 2;
/// The table whose `unique` column is unique.
pub const UNIQUE_TABLE: usize = 1;
/// The table without a key: nothing but all its values names a row, and several rows may be equal.
pub const KEYLESS_TABLE: usize = 2;
/// Values of a column of that table: few, so that rows are equal.
const KEYLESS_VALUES: u32 = 3;
/// What a column holds that holds nothing.
pub const NULL: u32 = u32::MAX;
/// Definitions that a table may have, one after the other.
pub const DEFINITIONS: usize = 3;
/// What an ALTER TABLE does to all values of a column, without a word about the rows in the log.
const REWRITTEN: u32 = 10_000;

/// A row, without its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Row {
    pub unique: u32,
    pub value: u32,
    /// A large value: not sent again by an update that leaves it as it is.
    pub toast: u32,
}

/// A table's rows by key; where there is none, by where they lie.
pub type Rows = [Option<Row>; KEYS];
/// All tables.
pub type Tables = [Rows; TABLES];

/// What a statement did to a row.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Insert {
        key: usize,
        row: Row,
    },
    Update {
        old: usize,
        key: usize,
        row: Row,
        toast_sent: bool,
    },
    Delete {
        key: usize,
    },
    Truncate {
        group: u32,
    },
    /// Not sent.
    Alter,
}

#[derive(Clone, Copy, Debug)]
pub struct RowChange {
    pub table: usize,
    pub kind: Kind,
    /// The row that was updated or deleted.
    pub before: Option<Row>,
    /// The definition of the table since then.
    pub definition: usize,
    /// The table was in the publication when this was written.
    pub published: bool,
    /// How often the table had come into the publication by then.
    pub times_published: u32,
    /// Where the log ended before it: transactions that end there or earlier had ended.
    pub at: u64,
}

#[derive(Clone, Debug)]
pub struct Transaction {
    pub number: u64,
    pub commit_start: u64,
    pub end: u64,
    pub changes: Vec<RowChange>,
    /// Ordinary snapshots see it. The log holds it in any case.
    pub visible: bool,
}

impl Transaction {
    fn alters(&self) -> bool {
        self.changes.iter().any(|change| matches!(change.kind, Kind::Alter))
    }
}

/// A transaction that has not committed.
#[derive(Default)]
pub struct Writer {
    pub number: u64,
    pub changes: Vec<RowChange>,
    /// What was there before, to be put back.
    pub undo: Vec<Undo>,
    pub locks: Locks,
    /// It inserts many rows.
    pub loads: bool,
    /// Its last rows, which are in the log and have to wait for their keys.
    pub without_keys: VecDeque<(usize, Row)>,
    pub savepoint: Option<Savepoint>,
}

impl Writer {
    pub fn new(number: u64) -> Self {
        Self { number, ..Self::default() }
    }
}

/// What was in a place of a table.
type Undo = (usize, usize, Option<Row>);

/// A bit for each locked key of each table.
pub type Locks = [u16; TABLES];
const WHOLE: u16 = u16::MAX;

/// The lasting slot.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    pub made_at: u64,
    pub confirmed: u64,
}

#[derive(Default)]
pub struct History {
    pub transactions: Vec<Transaction>,
    /// Where the log ends.
    pub end: u64,
    published: [bool; TABLES],
    times_published: [u32; TABLES],
    pub slot: Option<Slot>,
    /// Old images of tables with a key hold the whole row, too.
    pub full_images: bool,
    /// Transactions that will still begin.
    pub writes_left: u32,
    alters_left: u32,
    takes_left: u32,
    failovers_left: u32,
    /// What the publication held, from which position on.
    publications: Vec<(u64, [bool; TABLES])>,
    /// Definitions of the tables, with everything that the log holds.
    definitions: [usize; TABLES],
    /// Transactions of earlier timelines, from the first on, and where each was left.
    left: Vec<(Vec<Transaction>, u64)>,
    /// With everything that open writers have done.
    pub rows: Tables,
    pub writers: Vec<Writer>,
    pub roll_backs: Vec<RollBack>,
    /// How often rows that are in the log had to wait for their keys, and how often they did not get them.
    pub copies_waited: u64,
    pub copies_failed: u64,
    /// Committed in the log and waiting for a standby: which transaction, its locks.
    stalled: Vec<(usize, Locks)>,
    pub locks: Locks,
    counter: u64,
}

impl History {
    pub fn new(writes: u32, dice: &mut Dice) -> Self {
        let mut history = Self { end: 100, writes_left: 10 + writes, ..Self::default() };
        while history.writes_left > writes {
            history.step(dice);
        }
        history.full_images = dice.chance(250);
        history.alters_left = dice.below(5).saturating_sub(2);
        history.takes_left = dice.below(6).saturating_sub(3);
        history.failovers_left = dice.below(7).saturating_sub(4);
        history
    }

    /// Which server this is, so to say.
    pub fn timeline(&self) -> i64 {
        self.left.len() as i64 + 1
    }

    /// Where the history left an earlier timeline.
    pub fn left_timeline_at(&self, timeline: i64) -> Option<u64> {
        self.left.get(timeline as usize - 1).map(|(_, switch)| *switch)
    }

    /// The transactions of a timeline; of one that was left, also those that were lost.
    pub fn on_timeline(&self, timeline: i64) -> &[Transaction] {
        self.left.get(timeline as usize - 1).map_or(&self.transactions, |(transactions, _)| transactions)
    }

    pub fn published(&self) -> [bool; TABLES] {
        self.published
    }

    pub fn publish(&mut self, tables: [bool; TABLES]) {
        self.end += 16;
        for (table, times) in self.times_published.iter_mut().enumerate() {
            *times += u32::from(tables[table] && !self.published[table]);
        }
        self.published = tables;
        self.publications.push((self.end, tables));
    }

    /// Sometimes somebody takes a table out of the publication.
    pub fn take_out(&mut self, dice: &mut Dice) -> bool {
        let table = dice.below(TABLES as u32) as usize;
        if self.takes_left == 0 || !self.published[table] {
            return false;
        }
        self.takes_left -= 1;
        let mut published = self.published;
        published[table] = false;
        self.publish(published);
        true
    }

    /// Sometimes a standby takes over, which may lack the last transactions. Whatever has not committed is gone.
    pub fn fail_over(&mut self, dice: &mut Dice) -> bool {
        let least = self.left.last().map_or(0, |(_, switch)| *switch);
        let kept = self.transactions.len().saturating_sub(dice.below(5) as usize);
        let lacks = kept < self.transactions.len();
        let switch = if lacks { self.transactions[..kept].last().map_or(0, |transaction| transaction.end) } else { self.end };
        if self.failovers_left == 0 || switch < least {
            return false;
        }
        self.failovers_left -= 1;
        self.left.push((self.transactions.clone(), switch));
        self.transactions.truncate(kept);
        self.end = switch + 16;
        self.slot = self.slot.filter(|slot| slot.made_at <= switch);
        if let Some(slot) = &mut self.slot {
            slot.confirmed = slot.confirmed.min(switch);
        }
        self.publications.retain(|(from, _)| *from <= switch);
        self.published = self.publications.last().map_or([false; TABLES], |(_, published)| *published);
        self.writers.clear();
        self.stalled.clear();
        self.locks = Locks::default();
        (self.rows, self.definitions) = (Tables::default(), Default::default());
        for transaction in &mut self.transactions {
            transaction.visible = true;
            for change in &transaction.changes {
                replay(&mut self.rows[change.table], &change.kind);
                self.definitions[change.table] = change.definition;
            }
        }
        true
    }

    /// The server goes down and comes again: what has not committed is gone, and nobody waits for a standby any more.
    pub fn crash(&mut self) {
        while let Some(writer) = self.writers.pop() {
            self.roll_back(writer);
        }
        while let Some((transaction, locks)) = self.stalled.pop() {
            self.transactions[transaction].visible = true;
            self.unlock(locks);
        }
    }

    /// The definition of a table as the log has it.
    pub fn definition(&self, table: usize) -> usize {
        self.definitions[table]
    }

    /// The definition of a table as the catalog shows it.
    pub fn visible_definition(&self, table: usize) -> usize {
        self.definitions[table] - usize::from(self.is_being_altered(table))
    }

    /// A table is locked by an ALTER TABLE that has not quite committed.
    pub fn is_being_altered(&self, table: usize) -> bool {
        let alters = |transaction: &Transaction| {
            transaction.changes.iter().any(|change| change.table == table && matches!(change.kind, Kind::Alter))
        };
        self.stalled.iter().any(|(transaction, _)| alters(&self.transactions[*transaction]))
    }

    pub fn was_altered(&self) -> bool {
        self.left.iter().map(|(transactions, _)| transactions).chain([&self.transactions]).flatten().any(Transaction::alters)
    }

    /// Nothing more will ever happen.
    pub fn is_over(&self) -> bool {
        self.writes_left == 0 && self.writers.is_empty() && self.stalled.is_empty()
    }

    /// Where the last transaction ends.
    pub fn last_end(&self) -> u64 {
        self.transactions.last().map_or(0, |transaction| transaction.end)
    }

    /// The source's users do something.
    pub fn step(&mut self, dice: &mut Dice) {
        match dice.below(8) {
            0 if !self.stalled.is_empty() => {
                let (transaction, locks) = self.stalled.swap_remove(0);
                self.transactions[transaction].visible = true;
                self.unlock(locks);
            }
            1..=3 if !self.writers.is_empty() => {
                let writer = self.writers.swap_remove(0);
                self.go_on(writer, dice);
            }
            // Something that is no transaction of ours: another database's, a checkpoint.
            4 => self.end += 16,
            _ if self.writes_left > 0 => {
                self.writes_left -= 1;
                let number = self.next_number();
                if self.alters_left > 0 && dice.chance(100) {
                    return self.alter(dice);
                }
                if self.writers.len() < 2 && dice.chance(160) {
                    return self.begin_load(number, dice);
                }
                let mut writer = Writer::new(number);
                let changes = if dice.chance(100) { 4 + dice.below(8) } else { dice.below(4) };
                (0..changes).for_each(|_| self.change(&mut writer, dice));
                if self.writers.len() < 3 && dice.chance(200) { self.writers.push(writer) } else { self.commit(writer, dice) }
            }
            _ => {}
        }
    }

    /// A transaction goes on, or ends.
    fn go_on(&mut self, mut writer: Writer, dice: &mut Dice) {
        let fails = if !writer.without_keys.is_empty() {
            // Sometimes two wait for each other.
            self.take_keys(&mut writer) || dice.chance(200)
        } else if writer.loads && dice.chance(700) {
            self.copy(&mut writer, COPIED_AT_ONCE, dice);
            false
        } else {
            self.change(&mut writer, dice);
            false
        };
        let waits = !writer.without_keys.is_empty();
        match dice.below(if writer.loads { 9 } else { 6 }) {
            _ if fails => self.roll_back(writer),
            0 if !waits => self.commit(writer, dice),
            1 if !waits && !writer.loads => self.commit(writer, dice),
            1 if !waits => self.roll_back(writer),
            2 if !waits && !writer.loads => self.roll_back(writer),
            2..=4 if !waits && (writer.loads || dice.chance(300)) => {
                let is_back = self.savepoint(&mut writer, dice);
                if is_back && dice.chance(500) { self.commit(writer, dice) } else { self.writers.push(writer) }
            }
            _ => self.writers.push(writer),
        }
    }

    /// Numbers transactions and values.
    pub fn next_number(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    fn change(&mut self, writer: &mut Writer, dice: &mut Dice) {
        let (table, key) = (dice.below(TABLES as u32) as usize, dice.below(KEYS as u32) as usize);
        if dice.chance(25) {
            return self.truncate(writer, table, dice);
        }
        if !self.lock(writer, table, 1 << key) {
            return;
        }
        self.counter += 1;
        let value = if table == KEYLESS_TABLE { keyless_value(dice) } else { self.counter as u32 };
        let kind = match self.rows[table][key] {
            None => Kind::Insert { key, row: Row { unique: self.unique(table, dice), value, toast: value } },
            Some(row) => match dice.below(8) {
                0..=1 => Kind::Delete { key },
                choice => {
                    let toast_sent = dice.chance(300);
                    let unique = if dice.chance(400) { self.unique(table, dice) } else { row.unique };
                    let row = Row { unique, value, toast: if toast_sent { value } else { row.toast } };
                    let to = dice.below(KEYS as u32) as usize;
                    let may_move = choice == 2 && table != KEYLESS_TABLE;
                    let moves = may_move && self.rows[table][to].is_none() && self.lock(writer, table, 1 << to);
                    Kind::Update { old: key, key: if moves { to } else { key }, row, toast_sent }
                }
            },
        };
        self.write(writer, table, kind);
    }

    /// A table gets another definition, in a transaction that may do more.
    fn alter(&mut self, dice: &mut Dice) {
        let table = dice.below(TABLES as u32) as usize;
        let mut writer = Writer::new(self.counter);
        if self.definitions[table] + 1 == DEFINITIONS || !self.lock(&mut writer, table, WHOLE) {
            return;
        }
        self.alters_left -= 1;
        (0..dice.below(3)).for_each(|_| self.change(&mut writer, dice));
        self.definitions[table] += 1;
        self.write(&mut writer, table, Kind::Alter);
        (0..dice.below(3)).for_each(|_| self.change(&mut writer, dice));
        self.commit(writer, dice);
    }

    fn truncate(&mut self, writer: &mut Writer, table: usize, dice: &mut Dice) {
        self.counter += 1;
        let group = self.counter as u32;
        let also = dice.below(TABLES as u32) as usize;
        let mut tables = vec![table];
        tables.extend((also != table).then_some(also));
        for table in tables {
            if self.lock(writer, table, WHOLE) {
                self.write(writer, table, Kind::Truncate { group });
            }
        }
    }

    /// A value that no row has, as far as rows must not share one.
    pub fn unique(&self, table: usize, dice: &mut Dice) -> u32 {
        if table == KEYLESS_TABLE {
            return keyless_value(dice);
        }
        let mut unique = dice.below(UNIQUE_VALUES);
        while table == UNIQUE_TABLE && self.rows[table].iter().flatten().any(|row| row.unique == unique) {
            unique = (unique + 1) % UNIQUE_VALUES;
        }
        unique
    }

    pub fn write(&mut self, writer: &mut Writer, table: usize, kind: Kind) {
        let before = self.rows[table];
        replay(&mut self.rows[table], &kind);
        let changed = (0..KEYS).filter(|key| before[*key] != self.rows[table][*key]);
        writer.undo.extend(changed.map(|key| (table, key, before[key])));
        let old = match kind {
            Kind::Update { old, .. } => before[old],
            Kind::Delete { key } => before[key],
            Kind::Insert { .. } | Kind::Truncate { .. } | Kind::Alter => None,
        };
        let change = self.change_of(table, kind, old);
        writer.changes.push(change);
    }

    /// A change as it is written now.
    pub fn change_of(&self, table: usize, kind: Kind, before: Option<Row>) -> RowChange {
        RowChange {
            table,
            kind,
            before,
            definition: self.definitions[table],
            published: self.published[table],
            times_published: self.times_published[table],
            at: self.end,
        }
    }

    /// Where rows depend on each other a writer takes the whole table.
    pub fn lock(&mut self, writer: &mut Writer, table: usize, wanted: u16) -> bool {
        let wanted = if table == UNIQUE_TABLE { WHOLE } else { wanted };
        let free = self.locks[table] & !writer.locks[table] & wanted == 0;
        if free {
            self.locks[table] |= wanted;
            writer.locks[table] |= wanted;
        }
        free
    }

    pub fn unlock(&mut self, locks: Locks) {
        self.locks.iter_mut().zip(locks).for_each(|(held, freed)| *held &= !freed);
    }

    /// Sometimes the commit record starts right where the record before ended.
    pub fn commit(&mut self, writer: Writer, dice: &mut Dice) {
        let stalls = !writer.changes.is_empty() && dice.chance(80);
        let commit_start = self.end + if dice.chance(600) { 8 } else { 0 };
        self.end = commit_start + 32;
        if stalls {
            self.stalled.push((self.transactions.len(), writer.locks));
        } else {
            self.unlock(writer.locks);
        }
        self.transactions.push(Transaction {
            number: writer.number,
            commit_start,
            end: self.end,
            changes: writer.changes,
            visible: !stalls,
        });
    }

    fn roll_back(&mut self, writer: Writer) {
        self.undo(writer.undo);
        self.unlock(writer.locks);
        self.tell_roll_back(writer.number, None);
    }

    pub fn undo(&mut self, undone: Vec<Undo>) {
        for (table, key, row) in undone.into_iter().rev() {
            self.rows[table][key] = row;
        }
    }

    /// A transaction without rows.
    pub fn mark(&mut self, dice: &mut Dice) {
        let number = self.next_number();
        self.commit(Writer::new(number), dice);
    }

    /// Writers that are open now.
    pub fn open_writers(&self) -> Vec<u64> {
        self.writers.iter().map(|writer| writer.number).collect()
    }

    /// Whether one of these has not ended.
    pub fn any_open(&self, writers: &[u64]) -> bool {
        self.writers.iter().any(|writer| writers.contains(&writer.number))
    }

    /// Whether a commit is in the log and not visible.
    pub fn has_stalled(&self) -> bool {
        !self.stalled.is_empty()
    }

    /// All tables as an ordinary snapshot sees them now.
    pub fn visible(&self) -> Tables {
        let mut tables = Tables::default();
        for change in self.transactions.iter().filter(|transaction| transaction.visible).flat_map(|transaction| &transaction.changes) {
            replay(&mut tables[change.table], &change.kind);
        }
        tables
    }
}

pub fn replay(rows: &mut Rows, kind: &Kind) {
    match *kind {
        Kind::Insert { key, row } => rows[key] = Some(row),
        Kind::Update { old, key, row, .. } => {
            rows[old] = None;
            rows[key] = Some(row);
        }
        Kind::Delete { key } => rows[key] = None,
        Kind::Truncate { .. } => *rows = Rows::default(),
        Kind::Alter => rows.iter_mut().flatten().filter(|row| row.value != NULL).for_each(|row| row.value += REWRITTEN),
    }
}

fn keyless_value(dice: &mut Dice) -> u32 {
    Some(dice.below(KEYLESS_VALUES)).filter(|value| *value > 0).unwrap_or(NULL)
}

/// Rows without a key lie anywhere: those of a table are put into an order in which equal tables are equal.
pub fn in_order(table: usize, mut rows: Rows) -> Rows {
    if table == KEYLESS_TABLE {
        rows.sort_unstable_by_key(|row| (row.is_none(), *row));
    }
    rows
}
