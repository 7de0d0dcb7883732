//! The simulated source's tables and their history: writers that overlap, roll back and wait for a standby.

use crate::dice::Dice;

pub const TABLES: usize = 3;
pub const KEYS: usize = 8;
/// Values of the unique column: few, so that a value that became free is soon taken by another row.
const UNIQUE_VALUES: u32 = KEYS as u32 + 2;
/// The table whose `unique` column is unique.
pub const UNIQUE_TABLE: usize = 1;

/// A row, without its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    pub unique: u32,
    pub value: u32,
    /// A large value: not sent again by an update that leaves it as it is.
    pub toast: u32,
}

/// A table's rows by key.
pub type Rows = [Option<Row>; KEYS];
/// All tables.
pub type Tables = [Rows; TABLES];

/// What a statement did to a row.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Insert { key: usize, row: Row },
    Update { old: usize, key: usize, row: Row, toast_sent: bool },
    Delete { key: usize },
    Truncate { group: u32 },
}

#[derive(Clone, Copy, Debug)]
pub struct RowChange {
    pub table: usize,
    pub kind: Kind,
    /// The table was in the publication when this was written.
    pub published: bool,
}

#[derive(Debug)]
pub struct Transaction {
    pub commit_start: u64,
    pub end: u64,
    pub changes: Vec<RowChange>,
    /// Ordinary snapshots see it. The log holds it in any case.
    pub visible: bool,
}

/// A transaction that has not committed.
#[derive(Default)]
struct Writer {
    number: u64,
    changes: Vec<RowChange>,
    /// What was there before, to be put back.
    undo: Vec<(usize, usize, Option<Row>)>,
    locks: Locks,
}

/// A bit for each locked key of each table.
type Locks = [u16; TABLES];
const WHOLE: u16 = u16::MAX;

#[derive(Default)]
pub struct History {
    pub transactions: Vec<Transaction>,
    /// Where the log ends.
    pub end: u64,
    pub published: [bool; TABLES],
    /// Confirmed position of the lasting slot.
    pub slot: Option<u64>,
    /// Transactions that will still begin.
    pub writes_left: u32,
    /// With everything that open writers have done.
    rows: Tables,
    writers: Vec<Writer>,
    /// Committed in the log and waiting for a standby: which transaction, its locks.
    stalled: Vec<(usize, Locks)>,
    locks: Locks,
    counter: u64,
}

impl History {
    pub fn new(writes: u32, dice: &mut Dice) -> Self {
        let mut history = Self { end: 100, writes_left: 10 + writes, ..Self::default() };
        while history.writes_left > writes {
            history.step(dice);
        }
        history
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
                let mut writer = self.writers.swap_remove(0);
                self.change(&mut writer, dice);
                match dice.below(6) {
                    0..=1 => self.commit(writer, dice),
                    2 => self.roll_back(writer),
                    _ => self.writers.push(writer),
                }
            }
            // Something that is no transaction of ours: another database's, a checkpoint.
            4 => self.end += 16,
            _ if self.writes_left > 0 => {
                self.writes_left -= 1;
                self.counter += 1;
                let mut writer = Writer { number: self.counter, ..Writer::default() };
                let changes = if dice.chance(100) { 4 + dice.below(8) } else { dice.below(4) };
                (0..changes).for_each(|_| self.change(&mut writer, dice));
                if self.writers.len() < 3 && dice.chance(200) { self.writers.push(writer) } else { self.commit(writer, dice) }
            }
            _ => {}
        }
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
        let value = self.counter as u32;
        let kind = match self.rows[table][key] {
            None => Kind::Insert { key, row: Row { unique: self.unique(table, dice), value, toast: value } },
            Some(row) => match dice.below(8) {
                0..=1 => Kind::Delete { key },
                choice => {
                    let toast_sent = dice.chance(300);
                    let unique = if dice.chance(400) { self.unique(table, dice) } else { row.unique };
                    let row = Row { unique, value, toast: if toast_sent { value } else { row.toast } };
                    let to = dice.below(KEYS as u32) as usize;
                    let moves = choice == 2 && self.rows[table][to].is_none() && self.lock(writer, table, 1 << to);
                    Kind::Update { old: key, key: if moves { to } else { key }, row, toast_sent }
                }
            },
        };
        self.write(writer, table, kind);
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
    fn unique(&self, table: usize, dice: &mut Dice) -> u32 {
        let mut unique = dice.below(UNIQUE_VALUES);
        while table == UNIQUE_TABLE && self.rows[table].iter().flatten().any(|row| row.unique == unique) {
            unique = (unique + 1) % UNIQUE_VALUES;
        }
        unique
    }

    fn write(&mut self, writer: &mut Writer, table: usize, kind: Kind) {
        let before = self.rows[table];
        replay(&mut self.rows[table], &kind);
        let changed = (0..KEYS).filter(|key| before[*key] != self.rows[table][*key]);
        writer.undo.extend(changed.map(|key| (table, key, before[key])));
        writer.changes.push(RowChange { table, kind, published: self.published[table] });
    }

    /// Where rows depend on each other a writer takes the whole table.
    fn lock(&mut self, writer: &mut Writer, table: usize, wanted: u16) -> bool {
        let wanted = if table == UNIQUE_TABLE { WHOLE } else { wanted };
        let free = self.locks[table] & !writer.locks[table] & wanted == 0;
        if free {
            self.locks[table] |= wanted;
            writer.locks[table] |= wanted;
        }
        free
    }

    fn unlock(&mut self, locks: Locks) {
        self.locks.iter_mut().zip(locks).for_each(|(held, freed)| *held &= !freed);
    }

    /// Sometimes the commit record starts right where the record before ended.
    fn commit(&mut self, writer: Writer, dice: &mut Dice) {
        let stalls = !writer.changes.is_empty() && dice.chance(80);
        let commit_start = self.end + if dice.chance(600) { 8 } else { 0 };
        self.end = commit_start + 32;
        if stalls {
            self.stalled.push((self.transactions.len(), writer.locks));
        } else {
            self.unlock(writer.locks);
        }
        self.transactions.push(Transaction { commit_start, end: self.end, changes: writer.changes, visible: !stalls });
    }

    fn roll_back(&mut self, writer: Writer) {
        for (table, key, row) in writer.undo.into_iter().rev() {
            self.rows[table][key] = row;
        }
        self.unlock(writer.locks);
    }

    /// A transaction without rows.
    pub fn mark(&mut self, dice: &mut Dice) {
        self.commit(Writer::default(), dice);
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
    }
}

/// The history applied row by row up to a position that moves on.
#[derive(Clone, Default)]
pub struct Oracle {
    applied: usize,
    rows: Rows,
}

impl Oracle {
    /// One table at a position: every transaction that has ended by then.
    pub fn at(&mut self, history: &History, table: usize, position: u64) -> &Rows {
        let goes_back = self.applied.checked_sub(1).is_some_and(|last| history.transactions[last].end > position);
        if goes_back {
            *self = Self::default();
        }
        for transaction in history.transactions[self.applied..].iter().take_while(|transaction| transaction.end <= position) {
            self.applied += 1;
            for change in transaction.changes.iter().filter(|change| change.table == table) {
                replay(&mut self.rows, &change.kind);
            }
        }
        &self.rows
    }
}
