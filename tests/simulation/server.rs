//! The target's server: transactions that have been sent, a row lock, a log that is flushed later, and crashes.

use crate::dice::Dice;
use crate::history::{KEYS, Rows, TABLES, Tables};
use crate::loads::LOADED_TABLE;
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

/// What is sent to the server.
pub struct Order {
    pub backend: usize,
    pub epoch: i64,
    /// The checkpoint must be here (compare and set).
    pub from: Option<Option<u64>>,
    pub durable: bool,
    /// Rows of the loaded table that it writes: a bit for each key.
    pub keys: u16,
    /// `None`: rows that come, in a transaction that stays open.
    pub effect: Option<Effect>,
}

/// An order that was sent; one with an effect is a transaction with its commit.
struct Sent {
    number: u64,
    order: Order,
    /// The epoch was found right: the checkpoint's row is locked until the end.
    checked: bool,
}

/// Rows that open transactions hold.
struct Held {
    backend: usize,
    keys: u16,
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
    held: Vec<Held>,
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
        if !self.is_alive(backend) {
            return;
        }
        self.backends[backend] = if hangs { Backend::Hangs } else { Backend::Orphan };
        if !hangs && !self.sent.iter().any(|sent| sent.order.backend == backend) {
            self.end(backend);
        }
    }

    /// Rolls back what has not committed.
    pub fn end(&mut self, backend: usize) {
        self.backends[backend] = Backend::Ended;
        self.sent.retain(|sent| sent.order.backend != backend);
        self.held.retain(|held| held.backend != backend);
    }

    pub fn end_all(&mut self) {
        (0..self.backends.len()).for_each(|backend| self.end(backend));
    }

    /// The same, but for those that hold rows in an open transaction.
    pub fn end_all_but_early(&mut self) {
        let holds = |backend: &usize| self.held.iter().any(|held| held.backend == *backend);
        let ended: Vec<usize> = (0..self.backends.len()).filter(|backend| !holds(backend)).collect();
        ended.into_iter().for_each(|backend| self.end(backend));
    }

    /// Whether a transaction has proved its epoch and not ended.
    pub fn is_locked(&self) -> bool {
        self.sent.iter().any(|sent| sent.checked)
    }

    /// Takes an order; the answer is an [`Self::outcome`].
    pub fn send(&mut self, order: Order) -> Result<u64> {
        if !self.is_alive(order.backend) {
            return Err(ended());
        }
        self.counter += 1;
        self.sent.push(Sent { number: self.counter, order, checked: false });
        Ok(self.counter)
    }

    /// Whether an order has come to its end.
    pub fn is_over(&self, number: u64) -> bool {
        !self.sent.iter().any(|sent| sent.number == number)
    }

    /// How a transaction has ended, when it has.
    pub fn outcome(&mut self, number: u64) -> Option<Result<()>> {
        if let Some(place) = self.outcomes.iter().position(|(known, _)| *known == number) {
            return Some(self.outcomes.swap_remove(place).1);
        }
        let running = self.sent.iter().any(|sent| sent.number == number);
        (!running).then(|| Err(ended()))
    }

    /// Goes on with one order: first the proof of the epoch, then the commit. Those of one backend run one after the other, and a part's
    /// commit is sent when that of the part before was answered.
    pub fn work(&mut self, dice: &mut Dice, fenced: bool, any_order: bool) -> Result<Option<Committed>, String> {
        if self.sent.is_empty() {
            return Ok(None);
        }
        let mut chosen = dice.below(self.sent.len() as u32) as usize;
        if !any_order {
            let order = &self.sent[chosen].order;
            let is_before = |other: &Sent| {
                let are_parts = order.from.is_some() && other.order.from.is_some() && order.epoch == other.order.epoch;
                other.order.backend == order.backend || are_parts
            };
            chosen = self.sent.iter().position(is_before).unwrap_or(chosen);
        }
        let backend = self.sent[chosen].order.backend;
        if self.backends[backend] == Backend::Hangs {
            return Ok(None);
        }
        if self.sent[chosen].order.effect.is_none() {
            return self.hold(chosen).map(|()| None);
        }
        if !self.sent[chosen].checked {
            let sent = &mut self.sent[chosen];
            sent.checked = true;
            if fenced && sent.order.epoch != self.stored.epoch {
                self.failed(chosen, lost_claim());
            } else if fenced && !any_order && sent.order.from.is_some_and(|from| from != self.stored.position) {
                self.failed(chosen, Error::bug("the checkpoint is not what it was read as"));
            } else if self.held.iter().any(|held| held.backend != backend && held.keys & sent.order.keys != 0) {
                return Err("a part waits for a transaction that has not ended on the source".into());
            }
            return Ok(None);
        }
        let Sent { number, order, .. } = self.sent.remove(chosen);
        if fenced && order.epoch != self.stored.epoch {
            return Err(format!("a commit of epoch {} after epoch {} was claimed", order.epoch, self.stored.epoch));
        }
        self.held.retain(|held| held.backend != backend);
        let before = self.stored;
        if let Some(Err(error)) = order.effect.map(|effect| effect(&mut self.stored)) {
            if error.class == Class::Bug {
                return Err(error.message);
            }
            self.stored = before;
            self.outcomes.push((number, Err(error)));
            return Ok(None);
        }
        self.logged(order.durable);
        self.outcomes.push((number, Ok(())));
        Ok(Some(Committed { orphan: self.backends[backend] != Backend::Serves }))
    }

    fn failed(&mut self, chosen: usize, error: Error) {
        let sent = self.sent.remove(chosen);
        self.outcomes.push((sent.number, Err(error)));
    }

    /// Rows come in a transaction that stays open. As far as the source's rows are concerned, nobody is in their way.
    fn hold(&mut self, chosen: usize) -> Result<(), String> {
        let Sent { number, order: Order { backend, epoch, keys, .. }, .. } = self.sent.remove(chosen);
        if epoch == self.stored.epoch {
            let beside = |sent: &Sent| sent.order.epoch == epoch && sent.order.effect.is_some() && sent.order.keys & keys != 0;
            let is_there = |key: usize| keys & (1 << key) != 0 && self.stored.tables[LOADED_TABLE][key].is_some();
            if self.sent.iter().any(beside) {
                return Err("rows come early beside a part that they depend on".into());
            }
            if (0..KEYS).any(is_there) {
                return Err("a row comes early that is there".into());
            }
        }
        self.held.push(Held { backend, keys });
        self.outcomes.push((number, Ok(())));
        Ok(())
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
