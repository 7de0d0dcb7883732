//! The target's server: transactions that have been sent, a row lock, a log that is flushed later, and crashes.

use crate::dice::Dice;
use crate::history::{Rows, TABLES, Tables};
use sluice::engine::error::{Class, Error, Result, reason};
use sluice::engine::table::TableState;
use std::collections::VecDeque;

/// What the target holds for the stream.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stored {
    pub tables: Tables,
    pub epoch: i64,
    pub intended: bool,
    pub position: Option<u64>,
    pub timeline: i64,
    pub states: [Option<Entry>; TABLES],
}

/// A table in the checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub state: TableState,
    pub generation: i64,
    pub position: Option<u64>,
    /// A bit for each range.
    pub done: u32,
    /// The definition that it is copied under.
    pub definition: usize,
    /// The position that the copy is tied to: only the oracle knows it for good.
    pub copied_at: u64,
}

impl Entry {
    /// A table that begins its copy.
    pub fn copying(generation: i64, definition: usize) -> Self {
        Self { state: TableState::Copying, generation, position: None, done: 0, definition, copied_at: 0 }
    }
}

impl Stored {
    /// A table in the checkpoint; it comes into being when it is not there.
    pub fn entry(&mut self, table: usize) -> &mut Entry {
        self.states[table].get_or_insert(Entry { state: TableState::Init, ..Entry::copying(0, 0) })
    }

    pub fn rows(&mut self, table: usize) -> &mut Rows {
        &mut self.tables[table]
    }
}

/// What a transaction does at its commit, or why it can't. What must never be is an error of class `Bug`.
pub type Effect = Box<dyn FnOnce(&mut Stored) -> Result<()> + Send>;

/// A transaction that was sent with its commit.
struct Sent {
    number: u64,
    backend: usize,
    epoch: i64,
    /// The checkpoint must be here (compare and set).
    from: Option<Option<u64>>,
    durable: bool,
    /// The epoch was found right: the checkpoint's row is locked until the end.
    checked: bool,
    effect: Effect,
}

/// A connection's server side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backend {
    Serves,
    /// Its client is gone: what was sent still runs.
    Orphan,
    /// Its client is gone, and the server has not noticed: nothing goes on until it is ended.
    Hangs,
    Ended,
}

/// A commit, just now.
pub struct Committed {
    pub orphan: bool,
}

#[derive(Default)]
pub struct Server {
    pub stored: Stored,
    /// What is on disk.
    pub flushed: Stored,
    /// Commits after that, in order.
    unflushed: VecDeque<Stored>,
    backends: Vec<Backend>,
    sent: Vec<Sent>,
    outcomes: Vec<(u64, Result<()>)>,
    counter: u64,
}

impl Server {
    pub fn connect(&mut self) -> usize {
        self.backends.push(Backend::Serves);
        self.backends.len() - 1
    }

    pub fn is_alive(&self, backend: usize) -> bool {
        self.backends[backend] == Backend::Serves
    }

    /// The client is gone.
    pub fn disconnect(&mut self, backend: usize, hangs: bool) {
        if self.is_alive(backend) {
            self.backends[backend] = if hangs { Backend::Hangs } else { Backend::Orphan };
        }
    }

    /// Rolls back what has not committed.
    pub fn end(&mut self, backend: usize) {
        self.backends[backend] = Backend::Ended;
        self.sent.retain(|sent| sent.backend != backend);
    }

    pub fn end_all(&mut self) {
        (0..self.backends.len()).for_each(|backend| self.end(backend));
    }

    /// Whether a transaction has proved its epoch and not ended.
    pub fn is_locked(&self) -> bool {
        self.sent.iter().any(|sent| sent.checked)
    }

    /// Takes a transaction with its commit; the answer is an [`Self::outcome`].
    pub fn send(&mut self, backend: usize, epoch: i64, from: Option<Option<u64>>, durable: bool, effect: Effect) -> Result<u64> {
        if !self.is_alive(backend) {
            return Err(ended());
        }
        self.counter += 1;
        self.sent.push(Sent { number: self.counter, backend, epoch, from, durable, checked: false, effect });
        Ok(self.counter)
    }

    /// How a transaction has ended, when it has.
    pub fn outcome(&mut self, number: u64) -> Option<Result<()>> {
        if let Some(place) = self.outcomes.iter().position(|(known, _)| *known == number) {
            return Some(self.outcomes.swap_remove(place).1);
        }
        let running = self.sent.iter().any(|sent| sent.number == number);
        (!running).then(|| Err(ended()))
    }

    /// Goes on with one transaction: first the proof of the epoch, then the commit. Those of one backend run one after
    /// the other.
    pub fn work(&mut self, dice: &mut Dice, fenced: bool, any_order: bool) -> Result<Option<Committed>, String> {
        if self.sent.is_empty() {
            return Ok(None);
        }
        let mut chosen = dice.below(self.sent.len() as u32) as usize;
        let backend = self.sent[chosen].backend;
        if !any_order {
            chosen = self.sent.iter().position(|sent| sent.backend == backend).unwrap_or(chosen);
        }
        if self.backends[backend] == Backend::Hangs {
            return Ok(None);
        }
        if !self.sent[chosen].checked {
            let sent = &mut self.sent[chosen];
            sent.checked = true;
            if fenced && sent.epoch != self.stored.epoch {
                let sent = self.sent.remove(chosen);
                self.outcomes.push((sent.number, Err(lost_claim())));
            } else if fenced && !any_order && sent.from.is_some_and(|from| from != self.stored.position) {
                let sent = self.sent.remove(chosen);
                self.outcomes.push((sent.number, Err(Error::bug("the checkpoint is not what it was read as"))));
            }
            return Ok(None);
        }
        let sent = self.sent.remove(chosen);
        if fenced && sent.epoch != self.stored.epoch {
            return Err(format!("a commit of epoch {} after epoch {} was claimed", sent.epoch, self.stored.epoch));
        }
        let before = self.stored;
        if let Err(error) = (sent.effect)(&mut self.stored) {
            if error.class == Class::Bug {
                return Err(error.message);
            }
            self.stored = before;
            self.outcomes.push((sent.number, Err(error)));
            return Ok(None);
        }
        self.logged(sent.durable);
        self.outcomes.push((sent.number, Ok(())));
        Ok(Some(Committed { orphan: self.backends[backend] != Backend::Serves }))
    }

    /// The stored state has changed by a commit.
    pub fn logged(&mut self, durable: bool) {
        if durable {
            self.unflushed.clear();
            self.flushed = self.stored;
        } else {
            self.unflushed.push_back(self.stored);
        }
    }

    /// The log reaches the disk up to some commit.
    pub fn flush_some(&mut self, dice: &mut Dice) {
        let count = dice.below(self.unflushed.len() as u32 + 1) as usize;
        if let Some(flushed) = self.unflushed.drain(..count).next_back() {
            self.flushed = flushed;
        }
    }

    /// What is committed and not flushed is gone; so are all connections. Returns how many commits were lost.
    pub fn crash(&mut self) -> u64 {
        self.end_all();
        self.stored = self.flushed;
        let lost = self.unflushed.len() as u64;
        self.unflushed.clear();
        lost
    }
}

pub fn lost_claim() -> Error {
    Error::new(Class::Fenced, reason::FENCED, "another worker")
}

pub fn ended() -> Error {
    Error::retry(reason::TARGET_UNREACHABLE, "the server has closed the connection")
}
