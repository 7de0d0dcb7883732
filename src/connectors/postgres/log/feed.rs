//! The way of a message from the stream to the parts: at once, or by way of what is kept of streamed transactions.
//!
//! A streamed transaction that has ended is replayed step by step, before anything else is read: so what is kept never holds a
//! whole transaction while more is read, and dropping all of it loses nothing. Rows of one of them may have gone ahead (early.rs).

use super::assembler::Assembler;
use super::early::{self, Early};
use super::streams::{Streams, Taken, Trouble};
use crate::connectors::postgres::errors::violation;
use crate::connectors::postgres::lsn::Lsn;
use crate::connectors::postgres::pgoutput::Decoder;
use crate::connectors::postgres::pgoutput::streamed::Ended;
use crate::engine::batch::Part;
use crate::engine::error::{Error, Result, reason};
use crate::engine::spill::Chunk;
use std::time::{Duration, Instant};

/// First byte of a message that describes a table.
const RELATION: u8 = b'R';

pub(super) struct Feed {
    pub(super) assembler: Assembler,
    streams: Streams,
    early: Early,
    /// The streamed transaction that is being replayed.
    replay: Option<Replay>,
    /// Descriptions of tables so far.
    announced: u64,
}

/// The replay of a streamed transaction that has ended.
struct Replay {
    ended: Ended,
    /// It waits for the answers to what has gone ahead.
    waits: bool,
    /// Comes before what is kept: what is left of a chunk, and how many records of it are not.
    rest: Option<(Chunk, usize)>,
}

impl Feed {
    pub(super) fn new(assembler: Assembler, streams: Streams, early: Early) -> Self {
        Self { assembler, streams, early, replay: None, announced: 0 }
    }

    /// Takes one message; parts that can't take more go to `out`. Nothing may be given while [`Self::is_replaying`].
    pub(super) fn message(&mut self, message: &[u8], now: Instant, out: &mut Vec<Part<Lsn>>) -> Result<(), Trouble> {
        match self.streams.take(message)? {
            Taken::Not => {
                self.announced += u64::from(message.first() == Some(&RELATION));
                self.assembler.message(message, now, out)?;
            }
            Taken::Ended(ended) => self.begin_replay(ended, out)?,
            Taken::Yes | Taken::Aborted(_) if self.assembler.is_inside() => {
                return Err(violation("pgoutput: a streamed transaction inside a whole one").into());
            }
            Taken::Aborted(xid) => out.extend(self.early.aborted(xid, &self.streams, self.assembler.received())),
            Taken::Yes => {}
        }
        Ok(())
    }

    /// A piece of a transaction that has not ended, when one is wanted, or the end of its pieces. Parts before it must go before it.
    pub(super) fn early(&mut self, now: Instant) -> Option<Part<Lsn>> {
        let between = !self.assembler.is_inside() && !self.is_replaying();
        if between { self.early.step(&mut self.streams, &self.assembler, now) } else { None }
    }

    fn begin_replay(&mut self, ended: Ended, out: &mut Vec<Part<Lsn>>) -> Result<()> {
        let (mut waits, mut rest) = (false, None);
        match self.early.replay(ended.xid) {
            early::Replay::Waits => waits = true,
            early::Replay::Whole => self.assembler.begin(ended.commit_start)?,
            early::Replay::Rest(left) => {
                self.assembler.take_over(left.assembler, ended.commit_start, out)?;
                out.extend(left.next.map(|part| Part { open_from: Some(ended.commit_start), ..part }));
                self.streams.pass(ended.xid);
                self.announced += left.described;
                rest = left.reading;
            }
        }
        self.replay = Some(Replay { ended, waits, rest });
        Ok(())
    }

    /// Whether a streamed transaction that has ended waits to be handed over.
    pub(super) fn is_replaying(&self) -> bool {
        self.replay.is_some()
    }

    /// Waits a moment when the replay must wait for answers to what has gone ahead; says whether it must.
    pub(super) fn wait_for_answers(&self, limit: Duration) -> bool {
        let waits = self.replay.as_ref().is_some_and(|replay| replay.waits);
        waits && !self.early.wait(limit)
    }

    /// Replays a piece of the streamed transaction that has ended.
    pub(super) fn replay(&mut self, now: Instant, out: &mut Vec<Part<Lsn>>) -> Result<()> {
        let Some(replay) = &mut self.replay else { return Ok(()) };
        let ended = replay.ended;
        if replay.waits {
            return self.begin_replay(ended, out);
        }
        let unreadable = |error| Error::retry(reason::SPILL_FAILED, "what was kept of a transaction can't be read").caused_by(error);
        let next = match replay.rest.take() {
            Some(rest) => Some(rest),
            None => self.streams.next(ended.xid).map_err(unreadable)?.map(|chunk| (chunk, 0)),
        };
        if let Some((chunk, gone)) = next {
            for message in chunk.records().skip(gone) {
                if self.streams.counts(ended.xid, message)? {
                    self.announced += u64::from(message.first() == Some(&RELATION));
                    self.assembler.streamed(message, out)?;
                }
            }
            return Ok(());
        }
        self.streams.free(ended.xid);
        self.early.forget(ended.xid);
        self.replay = None;
        self.assembler.commit(ended.end, ended.committed_at, now, out)
    }

    /// The server has nothing for us up to `end` besides transactions that have not ended: their ends lie behind it.
    pub(super) fn keepalive(&mut self, end: Lsn) {
        if !self.streams.is_inside() && !self.is_replaying() {
            self.assembler.keepalive(end);
        }
    }

    /// Memory that is taken by what is not handed over, in bytes.
    pub(super) fn memory(&self) -> usize {
        self.assembler.size() + self.early.size() + self.streams.memory()
    }

    /// How often the log has described a table.
    pub(super) fn announced(&self) -> u64 {
        self.announced
    }

    /// Goes on with another connection, on which nothing has begun.
    pub(super) fn reconnect(&mut self, decoder: Decoder, out: &mut Vec<Part<Lsn>>) {
        out.extend(self.early.clear(self.assembler.received()));
        self.streams.clear();
        self.assembler.reconnect(decoder);
    }
}

#[cfg(test)]
mod early_tests;
#[cfg(test)]
mod history;
#[cfg(test)]
mod tests;
