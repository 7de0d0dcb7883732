//! The way of a message from the stream to the parts: at once, or by way of what is kept of streamed transactions.
//!
//! A streamed transaction that has ended is replayed step by step, before anything else is read: so what is kept never holds a
//! whole transaction while more is read, and dropping all of it loses nothing.

use super::assembler::Assembler;
use super::streams::{Streams, Taken, Trouble};
use crate::connectors::postgres::errors::violation;
use crate::connectors::postgres::lsn::Lsn;
use crate::connectors::postgres::pgoutput::Decoder;
use crate::connectors::postgres::pgoutput::streamed::Ended;
use crate::engine::batch::Part;
use crate::engine::error::{Error, Result, reason};
use std::time::Instant;

/// First byte of a message that describes a table.
const RELATION: u8 = b'R';

pub(super) struct Feed {
    pub(super) assembler: Assembler,
    streams: Streams,
    /// The streamed transaction that is being replayed.
    replayed: Option<Ended>,
    /// Descriptions of tables so far.
    announced: u64,
}

impl Feed {
    pub(super) fn new(assembler: Assembler, streams: Streams) -> Self {
        Self { assembler, streams, replayed: None, announced: 0 }
    }

    /// Takes one message; parts that can't take more go to `out`. Nothing may be given while [`Self::is_replaying`].
    pub(super) fn message(&mut self, message: &[u8], now: Instant, out: &mut Vec<Part<Lsn>>) -> Result<(), Trouble> {
        match self.streams.take(message)? {
            Taken::Not => {
                self.announced += u64::from(message.first() == Some(&RELATION));
                self.assembler.message(message, now, out)?;
            }
            Taken::Ended(ended) => {
                self.assembler.begin(ended.commit_start)?;
                self.replayed = Some(ended);
            }
            Taken::Yes if self.assembler.is_inside() => {
                return Err(violation("pgoutput: a streamed transaction inside a whole one").into());
            }
            Taken::Yes => {}
        }
        Ok(())
    }

    /// Whether a streamed transaction that has ended waits to be handed over.
    pub(super) fn is_replaying(&self) -> bool {
        self.replayed.is_some()
    }

    /// Replays a piece of the streamed transaction that has ended.
    pub(super) fn replay(&mut self, now: Instant, out: &mut Vec<Part<Lsn>>) -> Result<()> {
        let Some(ended) = self.replayed else { return Ok(()) };
        let unreadable = |error| Error::retry(reason::SPILL_FAILED, "what was kept of a transaction can't be read").caused_by(error);
        if let Some(chunk) = self.streams.next(ended.xid).map_err(unreadable)? {
            for message in chunk.records() {
                if self.streams.counts(ended.xid, message)? {
                    self.announced += u64::from(message.first() == Some(&RELATION));
                    self.assembler.streamed(message, out)?;
                }
            }
            return Ok(());
        }
        self.streams.free(ended.xid);
        self.replayed = None;
        self.assembler.commit(ended.end, ended.committed_at, now, out)
    }

    /// The server has nothing for us up to `end` besides transactions that have not ended: their ends lie behind it.
    pub(super) fn keepalive(&mut self, end: Lsn) {
        if !self.streams.is_inside() {
            self.assembler.keepalive(end);
        }
    }

    /// Memory that is taken by what is not handed over, in bytes.
    pub(super) fn memory(&self) -> usize {
        self.assembler.size() + self.streams.memory()
    }

    /// How often the log has described a table.
    pub(super) fn announced(&self) -> u64 {
        self.announced
    }

    /// Goes on with another connection, on which nothing has begun.
    pub(super) fn reconnect(&mut self, decoder: Decoder) {
        self.streams.clear();
        self.assembler.reconnect(decoder);
    }
}

#[cfg(test)]
mod history;
#[cfg(test)]
mod tests;
