//! Transactions that are sent before they have ended: what has come of them, kept apart until their end is known.
//!
//! Slices belong to one connection: after another start the same transaction may come whole. Relations stand in the slices too and
//! are decoded in their place; those of a rolled back subtransaction are sent again by the server (its sources: pgoutput.c,
//! cleanup_rel_sync_cache).

use crate::connectors::postgres::errors::violation;
use crate::connectors::postgres::pgoutput::streamed::{Ended, Framing, matters, subxid};
use crate::engine::error::{Error, Result};
use crate::engine::spill::{Chunk, Spill, SpillError};
use std::collections::{HashMap, HashSet};

/// Rolled back subtransactions of all transactions that are noted: some 10 MB of memory.
const MOST_ABORTED: usize = 500_000;

/// What became of a message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// It belongs to no streamed transaction.
    Not,
    /// It is kept, or was about a transaction that is kept.
    Yes,
    /// This transaction was rolled back, or a subtransaction of it.
    Aborted(u32),
    /// A transaction has ended: what is kept of it is to be replayed now.
    Ended(Ended),
}

/// Why nothing more can be kept.
#[derive(Debug)]
pub(super) enum Trouble {
    /// There is no room for what arrives. No transaction that has ended is lost by dropping all that is kept.
    NoRoom(NoRoom),
    /// The stream can't go on.
    Stream(Error),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Stream(error)
    }
}

/// What was kept when there was no more room.
#[derive(Debug)]
pub(super) struct NoRoom {
    /// The transaction of which most is kept.
    pub(super) xid: u32,
    /// Bytes of it.
    pub(super) bytes: u64,
    /// What is full.
    pub(super) cause: String,
}

pub(super) struct Streams {
    spill: Spill,
    /// Subtransactions that were rolled back, by transaction.
    open: HashMap<u32, HashSet<u32>>,
    aborted: usize,
    /// Inside a slice: of which transaction.
    current: Option<u32>,
}

impl Streams {
    pub(super) fn new(spill: Spill) -> Self {
        Self { spill, open: HashMap::new(), aborted: 0, current: None }
    }

    /// Takes one message of the stream.
    pub(super) fn take(&mut self, message: &[u8]) -> Result<Taken, Trouble> {
        match (Framing::read(message)?, self.current) {
            (None, None) => return Ok(Taken::Not),
            (None, Some(xid)) => self.keep(xid, message)?,
            (Some(Framing::Stop), Some(_)) => self.current = None,
            (Some(Framing::Start { xid, is_first }), None) => self.start(xid, is_first)?,
            (Some(Framing::Abort { xid, subxid }), None) => {
                self.abort(xid, subxid)?;
                return Ok(Taken::Aborted(xid));
            }
            (Some(Framing::Commit(ended)), None) if self.open.contains_key(&ended.xid) => return Ok(Taken::Ended(ended)),
            (Some(framing), _) => return Err(violation(format!("pgoutput: {framing:?} is not expected here")).into()),
        }
        Ok(Taken::Yes)
    }

    /// The next of what is kept of a transaction that has ended, with what its rolled back subtransactions have left.
    pub(super) fn next(&mut self, xid: u32) -> Result<Option<Chunk>, SpillError> {
        self.spill.take(xid)
    }

    /// More of what is kept of an open transaction, which stays kept.
    pub(super) fn look_ahead(&mut self, xid: u32) -> Result<Option<Chunk>, SpillError> {
        self.spill.look_ahead(xid)
    }

    /// What was looked at is kept no more.
    pub(super) fn pass(&mut self, xid: u32) {
        self.spill.pass(xid);
    }

    /// Messages that are kept of a transaction.
    pub(super) fn records(&self, xid: u32) -> u64 {
        self.spill.records(xid)
    }

    /// Transactions of which something is kept, with the bytes of it.
    pub(super) fn kept(&self) -> impl Iterator<Item = (u32, u64)> {
        self.spill.runs()
    }

    /// Whether a transaction has begun and its end is not known.
    pub(super) fn is_open(&self, xid: u32) -> bool {
        self.open.contains_key(&xid)
    }

    /// Whether a kept message of a transaction counts: its subtransaction was not rolled back.
    pub(super) fn counts(&self, xid: u32, message: &[u8]) -> Result<bool> {
        let aborted = self.open.get(&xid).filter(|aborted| !aborted.is_empty());
        aborted.map_or(Ok(true), |aborted| Ok(!aborted.contains(&subxid(message)?)))
    }

    /// Forgets a transaction.
    pub(super) fn free(&mut self, xid: u32) {
        self.spill.free(xid);
        self.aborted -= self.open.remove(&xid).map_or(0, |aborted| aborted.len());
    }

    /// Forgets all transactions.
    pub(super) fn clear(&mut self) {
        self.spill.clear();
        self.open.clear();
        (self.aborted, self.current) = (0, None);
    }

    /// Whether a slice is open: the log stands inside it.
    pub(super) fn is_inside(&self) -> bool {
        self.current.is_some()
    }

    /// Memory that is taken, in bytes.
    pub(super) fn memory(&self) -> usize {
        self.spill.taken().memory()
    }

    /// Memory and files that are taken, in bytes.
    #[cfg(test)]
    pub(super) fn taken_bytes(&self) -> u64 {
        self.memory() as u64 + self.spill.taken().disk()
    }

    fn start(&mut self, xid: u32, is_first: bool) -> Result<()> {
        if is_first == self.open.contains_key(&xid) {
            let which = if is_first { "a first" } else { "another" };
            return Err(violation(format!("pgoutput: {which} slice of transaction {xid} is not expected here")));
        }
        self.open.entry(xid).or_default();
        self.current = Some(xid);
        Ok(())
    }

    fn keep(&mut self, xid: u32, message: &[u8]) -> Result<(), Trouble> {
        if !matters(message) {
            return Ok(());
        }
        self.spill.append(xid, message).map_err(|error| self.no_room(&error))
    }

    /// A transaction of which nothing was sent may be rolled back too.
    fn abort(&mut self, xid: u32, subxid: u32) -> Result<(), Trouble> {
        if xid == subxid {
            self.free(xid);
        } else if let Some(aborted) = self.open.get_mut(&xid) {
            self.aborted += usize::from(aborted.insert(subxid));
            if self.aborted > MOST_ABORTED {
                return Err(self.no_room(&format!("more than {MOST_ABORTED} subtransactions of open transactions were rolled back")));
            }
        }
        Ok(())
    }

    fn no_room(&self, cause: &dyn std::fmt::Display) -> Trouble {
        let (xid, bytes) = self.spill.largest().unwrap_or_default();
        Trouble::NoRoom(NoRoom { xid, bytes, cause: cause.to_string() })
    }
}
