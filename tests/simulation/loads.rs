//! Writers that insert many rows, and what becomes of them: they go back to savepoints, and their rows may be in the log before their keys are theirs.

use crate::dice::Dice;
use crate::history::{History, KEYS, Kind, Locks, Row, RowChange, Writer};

/// The table that is loaded: its rows are told apart by their key and by nothing else.
pub const LOADED_TABLE: usize = 0;
/// A `COPY` writes so many rows into its log before it looks whether their keys are taken, one by one, and then waits (PostgreSQL's
/// sources: copyfrom.c, `MAX_BUFFERED_TUPLES`, there 1,000).
pub const COPIED_AT_ONCE: usize = 3;

/// What a transaction can go back to.
pub struct Savepoint {
    changes: usize,
    undo: usize,
    locks: Locks,
}

/// A roll-back, as the log tells it.
#[derive(Clone, Copy)]
pub struct RollBack {
    pub number: u64,
    /// Where its record ends.
    pub at: u64,
    /// Changes of the transaction that stay; `None`: it has ended.
    pub kept: Option<usize>,
}

impl History {
    /// A load begins, often where others have made room for it.
    pub fn begin_load(&mut self, number: u64, dice: &mut Dice) {
        let mut before = Writer::new(self.next_number());
        for key in 0..KEYS {
            if self.rows[LOADED_TABLE][key].is_some() && dice.chance(700) && self.lock(&mut before, LOADED_TABLE, 1 << key) {
                self.write(&mut before, LOADED_TABLE, Kind::Delete { key });
            }
        }
        // Sometimes nobody knows yet whether there is room.
        if dice.chance(200) {
            self.writers.push(before);
        } else {
            self.commit(before, dice);
        }
        let mut writer = Writer { loads: true, ..Writer::new(number) };
        self.copy(&mut writer, 1, dice);
        if dice.chance(800) {
            self.savepoint(&mut writer, dice);
        }
        self.copy(&mut writer, COPIED_AT_ONCE, dice);
        self.writers.push(writer);
    }

    /// Some rows of a load.
    pub fn copy(&mut self, writer: &mut Writer, rows: usize, dice: &mut Dice) {
        let mut keys: Vec<usize> = (0..KEYS).collect();
        dice.shuffle(&mut keys);
        let is_free = |key: &usize| self.rows[LOADED_TABLE][*key].is_none();
        let is_locked = |key: &usize| self.locks[LOADED_TABLE] & !writer.locks[LOADED_TABLE] & (1 << key) != 0;
        // The first row has its key at once: with it the table can't be altered or truncated.
        let Some(first) = keys.iter().position(|key| is_free(key) && !is_locked(key)) else { return };
        let first = keys.swap_remove(first);
        let others = keys.into_iter().filter(|key| is_free(key) || is_locked(key)).take(rows - 1);
        for key in std::iter::once(first).chain(others).collect::<Vec<_>>() {
            let value = self.next_number() as u32;
            let row = Row { unique: self.unique(LOADED_TABLE, dice), value, toast: value };
            let change = self.change_of(LOADED_TABLE, Kind::Insert { key, row }, None);
            writer.changes.push(change);
            writer.without_keys.push_back((key, row));
        }
        self.take_keys(writer);
    }

    /// Takes the keys of rows that are in the log, as far as nobody has them; says whether one is taken for good.
    pub fn take_keys(&mut self, writer: &mut Writer) -> bool {
        while let Some((key, row)) = writer.without_keys.front().copied() {
            if !self.lock(writer, LOADED_TABLE, 1 << key) {
                self.copies_waited += 1;
                return false;
            }
            if self.rows[LOADED_TABLE][key].is_some() {
                self.copies_failed += 1;
                return true;
            }
            self.rows[LOADED_TABLE][key] = Some(row);
            writer.undo.push((LOADED_TABLE, key, None));
            writer.without_keys.pop_front();
        }
        false
    }

    /// A savepoint is set, or gone back to; says whether it was gone back to.
    pub fn savepoint(&mut self, writer: &mut Writer, dice: &mut Dice) -> bool {
        let Some(savepoint) = writer.savepoint.take_if(|_| dice.chance(500)) else {
            let (changes, undo) = (writer.changes.len(), writer.undo.len());
            writer.savepoint.get_or_insert(Savepoint { changes, undo, locks: writer.locks });
            return false;
        };
        let undone = writer.undo.split_off(savepoint.undo);
        self.undo(undone);
        writer.changes.truncate(savepoint.changes);
        let freed = std::array::from_fn(|table| writer.locks[table] & !savepoint.locks[table]);
        writer.locks = savepoint.locks;
        self.unlock(freed);
        self.tell_roll_back(writer.number, Some(savepoint.changes));
        true
    }

    pub fn tell_roll_back(&mut self, number: u64, kept: Option<usize>) {
        self.end += 16;
        self.roll_backs.push(RollBack { number, at: self.end, kept });
    }

    /// Changes of a transaction that has not ended.
    pub fn open_transactions(&self) -> impl Iterator<Item = (u64, &[RowChange])> {
        self.writers.iter().map(|writer| (writer.number, &*writer.changes))
    }
}
