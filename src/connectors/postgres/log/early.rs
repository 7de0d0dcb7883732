//! The transaction of which rows are handed over before it has ended.
//!
//! One at a time: an open one of which much is kept. What is kept of it is looked at from its start, goes through an assembler of its
//! own, and leaves as full parts (pieces), no more than [`AHEAD`] of them unanswered. All of it stays kept: when the transaction has
//! ended, the replay goes on behind the pieces if they all are written, else it begins at the start, as if there had been none.
//!
//! Invariants:
//! * pieces hold rows that come, of tables of which such rows are wanted; at the first other change they end;
//! * a piece goes behind all transactions that ended before its rows were written on the source, so whatever these rows had to wait
//!   for there comes before it;
//! * when something of the transaction is rolled back, the consumer hears of it before it gets any transaction that ended later: that
//!   one may hold the same keys.

use super::assembler::Assembler;
use super::desk::Desk;
use super::streams::Streams;
use crate::connectors::postgres::lsn::Lsn;
use crate::connectors::postgres::replication::cursor::Cursor;
use crate::engine::batch::{Early as Mark, Part};
use crate::engine::error::{Error, Result, reason};
use crate::engine::spill::Chunk;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pieces that may be unanswered: enough for what the target writes while the stream says nothing and the reader waits for it.
pub(super) const AHEAD: u64 = 4;
/// Chunks that are decoded at a time: the stream must not wait long.
const CHUNKS: usize = 64;

/// When what is done; all but the tests use the default.
#[derive(Clone, Copy)]
pub(super) struct Pace {
    /// Bytes that are kept of a transaction before it is begun with.
    pub(super) begins_at: u64,
    /// Rows behind a row before it is handed over. A `COPY` writes up to 1,000 rows into its log before it looks whether their keys are
    /// taken, and then waits for a transaction that has not ended (PostgreSQL's sources: copyfrom.c, `MAX_BUFFERED_TUPLES`; all other
    /// inserts one row). With so many rows behind it a row has its key.
    pub(super) rows_behind: u64,
    /// A piece is this part of what a part may hold: what is left when the transaction has ended is small then.
    pub(super) share: usize,
    /// How long nothing may come of a transaction. One that its owner has forgotten must not hold locks on the target.
    pub(super) idle: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { begins_at: 1024 * 1024, rows_behind: 2000, share: 8, idle: Duration::from_secs(5) }
    }
}

pub(super) struct Early {
    desk: Arc<Desk>,
    pace: Pace,
    attempt: Option<Attempt>,
    /// Open transactions that are not begun with (again).
    avoided: HashSet<u32>,
}

/// What is handed over of one transaction.
struct Attempt {
    xid: u32,
    number: u64,
    wanted: Arc<HashSet<u32>>,
    assembler: Assembler,
    /// What is being read, and how many records of it were.
    reading: Option<(Chunk, usize)>,
    /// Records that were read, and those of them that described a table.
    records: u64,
    described: u64,
    /// The relation of the last row, which is wanted.
    relation: Option<u32>,
    /// The next piece, and the records before its end.
    next: Option<(Part<Lsn>, u64)>,
    sent: bool,
    /// Something else than a wanted row has come.
    is_over: bool,
    /// Records that were kept when it was looked last, and since when there is no news.
    kept: u64,
    since: Instant,
}

/// How the replay of a transaction that has ended begins.
pub(super) enum Replay {
    /// Not before the pieces are answered.
    Waits,
    /// At its start.
    Whole,
    /// Behind the pieces.
    Rest(Box<Rest>),
}

/// What is left of a transaction whose pieces are written.
pub(super) struct Rest {
    pub(super) assembler: Assembler,
    /// A piece that was not handed over.
    pub(super) next: Option<Part<Lsn>>,
    /// What was being read, and how many records of it were.
    pub(super) reading: Option<(Chunk, usize)>,
    /// Descriptions of tables so far.
    pub(super) described: u64,
}

impl Early {
    pub(super) fn new(desk: Arc<Desk>, pace: Pace) -> Self {
        Self { desk, pace, attempt: None, avoided: HashSet::new() }
    }

    /// Bytes of what is not handed over.
    pub(super) fn size(&self) -> usize {
        let next = |attempt: &Attempt| attempt.next.as_ref().map_or(0, |(part, _)| part.batch.size());
        self.attempt.as_ref().map_or(0, |attempt| attempt.assembler.size() + next(attempt))
    }

    /// The next piece when it is wanted and there, or the end of the pieces. Everything that has ended must be handed over before it;
    /// `main` is between transactions.
    pub(super) fn step(&mut self, streams: &mut Streams, main: &Assembler, now: Instant) -> Option<Part<Lsn>> {
        self.begin(streams, main, now);
        let attempt = self.attempt.as_mut()?;
        let kept = streams.records(attempt.xid);
        let Some(unanswered) = self.desk.unanswered() else {
            self.avoid();
            return None;
        };
        if kept > attempt.kept || unanswered > 0 {
            (attempt.kept, attempt.since) = (kept, now);
        } else if now.saturating_duration_since(attempt.since) >= self.pace.idle {
            tracing::debug!(xid = attempt.xid, "nothing more comes of a transaction that is handed over early");
            return self.end(main.received());
        }
        if unanswered >= AHEAD {
            return None;
        }
        if attempt.is_over && attempt.next.is_none() && !attempt.sent {
            // Another one may have more of what is wanted.
            self.avoid();
            return None;
        }
        match attempt.piece(streams, self.pace.rows_behind) {
            Ok(Some(part)) => {
                self.desk.sent();
                Some(part)
            }
            Ok(None) => None,
            Err(error) => {
                // Whoever replays it will say so.
                tracing::debug!(xid = attempt.xid, %error, "a transaction can't be handed over early");
                self.end(main.received())
            }
        }
    }

    fn begin(&mut self, streams: &Streams, main: &Assembler, now: Instant) {
        let wanted = self.desk.wanted();
        if self.attempt.is_some() || wanted.is_empty() {
            return;
        }
        let candidates = streams.kept().filter(|(xid, bytes)| *bytes >= self.pace.begins_at && !self.avoided.contains(xid));
        if let Some((xid, _)) = candidates.max_by_key(|(_, bytes)| *bytes) {
            self.attempt = Some(Attempt {
                xid,
                number: self.desk.begin(),
                wanted,
                assembler: main.beside(self.pace.share),
                reading: None,
                records: 0,
                described: 0,
                relation: None,
                next: None,
                sent: false,
                is_over: false,
                kept: 0,
                since: now,
            });
        }
    }

    /// Something of a transaction was rolled back. Returns what the consumer must hear of before anything else.
    pub(super) fn aborted(&mut self, xid: u32, streams: &Streams, received: Lsn) -> Option<Part<Lsn>> {
        let concerned = self.attempt.as_ref().is_some_and(|attempt| attempt.xid == xid);
        let end = if concerned { self.end(received) } else { None };
        if streams.is_open(xid) {
            self.avoided.insert(xid);
        } else {
            self.avoided.remove(&xid);
        }
        end
    }

    /// The connection has ended, and all that is kept is dropped.
    pub(super) fn clear(&mut self, received: Lsn) -> Option<Part<Lsn>> {
        let end = self.end(received);
        self.avoided.clear();
        end
    }

    /// Nothing more is handed over of the transaction. The consumer must hear of it when it has got pieces.
    fn end(&mut self, received: Lsn) -> Option<Part<Lsn>> {
        let sent = self.avoid();
        sent.then(|| Part::dropped(received))
    }

    fn avoid(&mut self) -> bool {
        let Some(attempt) = self.attempt.take() else { return false };
        self.avoided.insert(attempt.xid);
        attempt.sent
    }

    /// A transaction has been replayed.
    pub(super) fn forget(&mut self, xid: u32) {
        self.avoided.remove(&xid);
    }

    /// A transaction has ended and is to be replayed.
    pub(super) fn replay(&mut self, xid: u32) -> Replay {
        let Some(attempt) = self.attempt.take_if(|attempt| attempt.xid == xid) else { return Replay::Whole };
        if !attempt.sent {
            return Replay::Whole;
        }
        match self.desk.seal() {
            None => {
                self.attempt = Some(attempt);
                Replay::Waits
            }
            Some(false) => Replay::Whole,
            Some(true) => {
                let Attempt { assembler, next, reading, described, .. } = attempt;
                let next = next.map(|(part, _)| part);
                Replay::Rest(Box::new(Rest { assembler, next, reading, described }))
            }
        }
    }

    /// Waits a moment for answers; says whether they are there.
    pub(super) fn wait(&self, limit: Duration) -> bool {
        self.desk.wait(limit)
    }
}

impl Attempt {
    /// The next piece, when all of its rows have enough others behind them.
    fn piece(&mut self, streams: &mut Streams, rows_behind: u64) -> Result<Option<Part<Lsn>>> {
        for _ in 0..CHUNKS {
            if self.next.is_some() || self.is_over || !self.read(streams)? {
                break;
            }
        }
        let kept = streams.records(self.xid);
        let Some((part, _)) = self.next.take_if(|(_, records)| *records + rows_behind <= kept) else { return Ok(None) };
        self.sent = true;
        Ok(Some(Part { early: Some(Mark::Piece { attempt: self.number }), ..part }))
    }

    /// Reads on, up to the end of a chunk or a piece; says whether there was something.
    fn read(&mut self, streams: &mut Streams) -> Result<bool> {
        let unreadable = |error| Error::retry(reason::SPILL_FAILED, "what is kept of a transaction can't be read").caused_by(error);
        let (chunk, read) = match self.reading.take() {
            Some(reading) => reading,
            None => match streams.look_ahead(self.xid).map_err(unreadable)? {
                Some(chunk) => (chunk, 0),
                None => return Ok(false),
            },
        };
        let (mut out, mut rest) = (Vec::new(), None);
        for (at, message) in chunk.records().enumerate().skip(read) {
            if !self.is_wanted(message)? {
                (self.is_over, rest) = (true, Some(at));
                break;
            }
            self.assembler.streamed(message, &mut out)?;
            self.records += 1;
            if let Some(part) = out.pop() {
                // This record is the first behind it.
                (self.next, rest) = (Some((part, self.records - 1)), Some(at + 1));
                break;
            }
        }
        self.reading = rest.map(|at| (chunk, at));
        Ok(true)
    }

    /// Whether a message is a row that is wanted early, or tells of a table.
    fn is_wanted(&mut self, message: &[u8]) -> Result<bool> {
        let mut body = Cursor::new(message);
        match body.u8()? {
            b'R' => {
                self.described += 1;
                self.relation = None;
                Ok(true)
            }
            b'I' => {
                let _subxid = body.u32()?;
                let relation = body.u32()?;
                if self.relation != Some(relation) {
                    let table = self.assembler.table(relation)?;
                    if table.is_some_and(|table| table.differs.is_some() || !self.wanted.contains(&table.id)) {
                        return Ok(false);
                    }
                    self.relation = Some(relation);
                }
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}
