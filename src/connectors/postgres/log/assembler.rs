//! From messages to parts: the pure middle of the log. No sockets and no clock of its own.

use crate::connectors::postgres::errors::violation;
use crate::connectors::postgres::lsn::Lsn;
use crate::connectors::postgres::pgoutput::{Decoder, Message};
use crate::engine::batch::{Batch, Boundary, Heartbeat, Part};
use crate::engine::budget::Permit;
use crate::engine::error::Result;
use crate::engine::roles::BatchLimits;
use crate::engine::table::TableVersion;
use std::time::{Duration, Instant, SystemTime};

/// Bytes of the number of its (sub)transaction in a message of a streamed one.
const SUBTRANSACTION: usize = 4;

/// Builds one part after the other.
pub(super) struct Assembler {
    decoder: Decoder,
    limits: BatchLimits,
    batch: Batch,
    boundaries: Vec<Boundary<Lsn>>,
    /// The part continues a transaction that an earlier part left open.
    continues: bool,
    /// A transaction is under way; where its commit record starts.
    transaction: Option<Lsn>,
    /// Since when the part holds a whole transaction.
    whole_since: Option<Instant>,
    /// How long whole transactions may wait for more.
    delay: Duration,
    /// When the last transaction was committed on the source.
    committed_at: SystemTime,
    received: Lsn,
    /// Content of the last message of our own in the transaction that is under way.
    message: Option<String>,
    heartbeat: Option<Heartbeat<Lsn>>,
}

impl Assembler {
    pub(super) fn new(decoder: Decoder, limits: BatchLimits, from: Lsn) -> Self {
        Self {
            decoder,
            limits,
            batch: Batch::default(),
            boundaries: Vec::new(),
            continues: false,
            transaction: None,
            whole_since: None,
            delay: limits.delay,
            committed_at: SystemTime::UNIX_EPOCH,
            received: from,
            message: None,
            heartbeat: None,
        }
    }

    /// One for a transaction that has not ended, whose commit record will start where this stands or later. Its parts hold this
    /// share of what others may.
    pub(super) fn beside(&self, share: usize) -> Self {
        let limits = BatchLimits { rows: self.limits.rows / share, bytes: self.limits.bytes / share, ..self.limits };
        let beside = Self::new(self.decoder.anew(), limits, self.received);
        Self { transaction: Some(self.received), ..beside }
    }

    /// Goes on with a transaction that begins now and whose first parts another assembler has made. What has ended before goes out.
    pub(super) fn take_over(&mut self, beside: Self, commit_start: Lsn, out: &mut Vec<Part<Lsn>>) -> Result<()> {
        out.extend(self.take_whole());
        self.begin(commit_start)?;
        self.decoder.learn(beside.decoder);
        (self.batch, self.continues) = (beside.batch, true);
        Ok(())
    }

    /// The table of a relation; `None` when it is not mapped.
    pub(super) fn table(&self, relation: u32) -> Result<Option<&TableVersion>> {
        Ok(self.decoder.table(relation)?.map(AsRef::as_ref))
    }

    /// Takes one message of a whole transaction; a part that can't take more goes to `out`, at most one.
    pub(super) fn message(&mut self, message: &[u8], now: Instant, out: &mut Vec<Part<Lsn>>) -> Result<()> {
        self.make_room(message, 0, out)?;
        match self.decoder.decode(message, &mut self.batch)? {
            Message::Begin { commit_start } => self.begin(commit_start),
            Message::Commit { end, committed_at } => self.commit(end, committed_at, now, out),
            Message::Own { content } => {
                self.message = Some(content.to_owned());
                Ok(())
            }
            Message::Changes | Message::Other => Ok(()),
        }
    }

    /// The same with a message of a streamed transaction, between [`Self::begin`] and [`Self::commit`].
    pub(super) fn streamed(&mut self, message: &[u8], out: &mut Vec<Part<Lsn>>) -> Result<()> {
        self.make_room(message, SUBTRANSACTION, out)?;
        match self.decoder.decode_streamed(message, &mut self.batch)? {
            Message::Own { content } => self.message = Some(content.to_owned()),
            Message::Changes | Message::Other => {}
            Message::Begin { .. } | Message::Commit { .. } => return Err(violation("pgoutput: a transaction inside a streamed one")),
        }
        Ok(())
    }

    /// `skip`: bytes of the message behind its kind that say nothing of its content.
    fn make_room(&mut self, message: &[u8], skip: usize, out: &mut Vec<Part<Lsn>>) -> Result<()> {
        let described = self.decoder.describes(message, skip);
        if described.is_some_and(|id| self.batch.tables().iter().any(|version| version.id == id)) && !self.batch.is_empty() {
            out.push(self.seal_whole_or_open());
        }
        if Decoder::adds_changes(message) {
            if self.transaction.is_none() {
                return Err(violation("pgoutput: a change outside of a transaction"));
            }
            if !self.batch.is_empty() && (self.is_full(&self.batch) || self.batch.room() < message.len()) {
                out.push(self.seal());
            }
        }
        Ok(())
    }

    /// The server has nothing for us up to `end`; counts only between transactions.
    pub(super) fn keepalive(&mut self, end: Lsn) {
        if self.transaction.is_none() {
            self.received = self.received.max(end);
        }
    }

    /// The part in the making, when it ends with a whole transaction.
    pub(super) fn take_whole(&mut self) -> Option<Part<Lsn>> {
        (self.transaction.is_none() && !self.boundaries.is_empty()).then(|| self.seal())
    }

    /// How long ago the last transaction was committed on the source, by the clocks of both.
    pub(super) fn age(&self) -> Duration {
        self.committed_at.elapsed().unwrap_or_default()
    }

    /// Lets whole transactions wait for more: at least for the limit that is always there.
    pub(super) fn set_delay(&mut self, delay: Duration) {
        self.delay = delay.max(self.limits.delay);
    }

    /// The position that a part without changes would carry; `None` while there is something else to hand over.
    pub(super) fn idle(&self) -> Option<Lsn> {
        (self.transaction.is_none() && self.boundaries.is_empty()).then_some(self.received)
    }

    /// Whether a part that nobody has taken yet can take more.
    pub(super) fn can_extend(&self, part: &Part<Lsn>) -> bool {
        let nothing_here = self.batch.is_empty() && self.boundaries.is_empty() && self.transaction.is_none();
        nothing_here && !part.is_idle() && part.early.is_none() && !part.open && !part.continues && !self.is_full(&part.batch)
    }

    /// Goes on with a part that was handed over and not taken.
    pub(super) fn extend(&mut self, part: Part<Lsn>, now: Instant) {
        self.batch = part.batch;
        self.boundaries = part.boundaries;
        self.heartbeat = part.heartbeat;
        self.whole_since = Some(now);
    }

    /// What is whole of the part in the making; the rest is dropped. For the end of a stream: everything that was committed
    /// before a change that can't be followed is still handed over.
    pub(super) fn finish(&mut self) -> Option<Part<Lsn>> {
        let whole = self.boundaries.last()?.changes;
        self.batch.truncate(whole);
        (self.transaction, self.message) = (None, None);
        Some(self.seal())
    }

    /// Bytes of the part in the making.
    pub(super) fn size(&self) -> usize {
        self.batch.size()
    }

    pub(super) fn received(&self) -> Lsn {
        self.received
    }

    /// Whether a transaction is under way.
    pub(super) fn is_inside(&self) -> bool {
        self.transaction.is_some()
    }

    /// Goes on with another connection, which describes all tables anew. Between transactions only.
    pub(super) fn reconnect(&mut self, decoder: Decoder) {
        self.decoder = decoder;
    }

    /// A transaction begins; where its commit record starts.
    pub(super) fn begin(&mut self, commit_start: Lsn) -> Result<()> {
        match self.transaction.replace(commit_start) {
            None => Ok(()),
            Some(_) => Err(violation("pgoutput: a transaction begins inside another")),
        }
    }

    /// The transaction that is under way ends.
    pub(super) fn commit(&mut self, end: Lsn, committed_at: SystemTime, now: Instant, out: &mut Vec<Part<Lsn>>) -> Result<()> {
        if self.transaction.take().is_none() {
            return Err(violation("pgoutput: a transaction ends that did not begin"));
        }
        let boundary = Boundary { changes: self.batch.changes().len(), end, committed_at };
        // Runs of transactions without changes keep only their last end. One with changes keeps its own: its rows are
        // judged by it.
        match self.boundaries.len() {
            0 => self.boundaries.push(boundary),
            count => {
                let before = count.checked_sub(2).map_or(0, |index| self.boundaries[index].changes);
                let last = &mut self.boundaries[count - 1];
                if last.changes == boundary.changes && last.changes == before {
                    *last = boundary;
                } else {
                    self.boundaries.push(boundary);
                }
            }
        }
        if let Some(content) = self.message.take() {
            self.heartbeat = Some(Heartbeat { content, end });
        }
        self.received = self.received.max(end);
        self.committed_at = committed_at;
        self.whole_since.get_or_insert(now);
        if self.continues || self.is_full(&self.batch) || self.has_waited(now) {
            out.push(self.seal());
        }
        Ok(())
    }

    fn is_full(&self, batch: &Batch) -> bool {
        batch.changes().len() >= self.limits.rows || batch.size() >= self.limits.bytes
    }

    pub(super) fn has_waited(&self, now: Instant) -> bool {
        self.whole_since.is_some_and(|since| now.saturating_duration_since(since) >= self.delay)
    }

    /// The part so far, which needs not be open when it holds nothing of the transaction that is under way.
    fn seal_whole_or_open(&mut self) -> Part<Lsn> {
        let ends_whole = !self.continues && self.boundaries.last().is_some_and(|last| last.changes == self.batch.changes().len());
        if !ends_whole {
            return self.seal();
        }
        let under_way = self.transaction.take();
        let part = self.seal();
        self.transaction = under_way;
        part
    }

    fn seal(&mut self) -> Part<Lsn> {
        let open = self.transaction.is_some();
        self.whole_since = None;
        Part {
            batch: std::mem::take(&mut self.batch),
            boundaries: std::mem::take(&mut self.boundaries),
            continues: std::mem::replace(&mut self.continues, open),
            open,
            open_from: self.transaction,
            received: self.received,
            heartbeat: self.heartbeat.take(),
            early: None,
            permit: Permit::default(),
        }
    }
}

#[cfg(test)]
mod tests;
