//! The one buffer between the reader's thread and the consumer: bounded by bytes, never by refusing what was received.
//!
//! The last part stays open to the reader until the consumer takes it. So a consumer that is busy finds a large part when it
//! comes back, and one that waits gets each transaction at once; no timer is needed for either.
//!
//! A part that was taken counts on until the consumer has dropped it.

use crate::connectors::postgres::lsn::Lsn;
use crate::engine::batch::Part;
use crate::engine::budget::Budget;
use crate::engine::error::{Error, Result, reason};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

pub(super) struct Buffer {
    budget: Arc<Budget>,
    state: Mutex<State>,
    /// Wakes the consumer: there is a part, or the end.
    news: Notify,
}

#[derive(Default)]
struct State {
    parts: VecDeque<Part<Lsn>>,
    /// Why the reader has ended; taken by the consumer.
    failure: Option<Error>,
    ended: bool,
    closed: bool,
}

impl Buffer {
    pub(super) fn new(budget: usize) -> Self {
        Self { budget: Budget::new(budget), state: Mutex::default(), news: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two statements that change it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory of the parts that wait or are being applied, and of what the reader holds.
    pub(super) fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Adds a part; the reader asks for room before it reads more, not here.
    pub(super) fn push(&self, mut part: Part<Lsn>) {
        part.permit = self.budget.permit(part.batch.size());
        self.lock().parts.push_back(part);
        self.news.notify_one();
    }

    /// Adds a part that holds only a position; one that nobody has taken yet is moved instead.
    pub(super) fn push_idle(&self, received: Lsn) {
        let mut state = self.lock();
        match state.parts.back_mut() {
            Some(last) if last.is_idle() => last.received = received,
            _ => state.parts.push_back(Part::idle(received)),
        }
        drop(state);
        self.news.notify_one();
    }

    /// Takes the last part back if nobody has taken it and `can_extend` says yes.
    pub(super) fn take_back(&self, can_extend: impl FnOnce(&Part<Lsn>) -> bool) -> Option<Part<Lsn>> {
        let mut state = self.lock();
        if state.parts.back().is_some_and(can_extend) { state.parts.pop_back() } else { None }
    }

    /// The reader has ended. Only the first reason counts.
    pub(super) fn end(&self, failure: Error) {
        let mut state = self.lock();
        if !state.ended {
            state.ended = true;
            state.failure = Some(failure);
        }
        drop(state);
        self.news.notify_one();
    }

    /// The consumer has gone: what waits is of no use any more, and makes room for a reader that waits for it.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let parts = std::mem::take(&mut state.parts);
        drop(state);
        drop(parts);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// The next part; after the last one the reason why there are no more. Safe to cancel.
    pub(super) async fn next(&self) -> Result<Part<Lsn>> {
        loop {
            if let Some(outcome) = self.try_next() {
                return outcome;
            }
            // A notice given since the look above is kept for this.
            self.news.notified().await;
        }
    }

    /// The next part, once it can't grow any more because another one follows it, or by its kind. Safe to cancel.
    pub(super) async fn next_grown(&self) -> Result<Part<Lsn>> {
        loop {
            let grown = {
                let state = self.lock();
                state.parts.len() > 1 || state.ended || state.parts.front().is_some_and(|part| part.early.is_some())
            };
            if grown && let Some(outcome) = self.try_next() {
                return outcome;
            }
            self.news.notified().await;
        }
    }

    fn try_next(&self) -> Option<Result<Part<Lsn>>> {
        let mut state = self.lock();
        if let Some(part) = state.parts.pop_front() {
            return Some(Ok(part));
        }
        let ended = || Error::retry(reason::SOURCE_UNREACHABLE, "the stream has ended");
        state.ended.then(|| Err(state.failure.take().unwrap_or_else(ended)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::batch::{Boundary, CellKind};
    use std::time::{Duration, SystemTime};

    fn part(end: u64) -> Part<Lsn> {
        let boundary = Boundary { changes: 0, end: Lsn(end), committed_at: SystemTime::UNIX_EPOCH };
        Part { boundaries: vec![boundary], ..Part::idle(Lsn(end)) }
    }

    #[tokio::test]
    async fn parts_come_in_order_and_then_the_reason() {
        let buffer = Buffer::new(1);
        buffer.push(part(1));
        buffer.push_idle(Lsn(5));
        buffer.push_idle(Lsn(6));
        buffer.end(Error::bug("first"));
        buffer.end(Error::bug("second"));
        assert_eq!(*buffer.next().await.unwrap().end(), Lsn(1));
        assert_eq!(buffer.next().await.unwrap().received, Lsn(6));
        assert_eq!(buffer.next().await.unwrap_err().message, "first");
        assert_eq!(buffer.next().await.unwrap_err().reason, reason::SOURCE_UNREACHABLE);
    }

    #[test]
    fn the_last_part_can_be_taken_back() {
        let buffer = Buffer::new(1);
        buffer.push(part(1));
        assert!(buffer.take_back(|_| false).is_none());
        assert_eq!(*buffer.take_back(|_| true).unwrap().end(), Lsn(1));
        assert!(buffer.take_back(|_| true).is_none());
    }

    #[tokio::test]
    async fn a_part_has_grown_when_another_one_follows() {
        let buffer = Arc::new(Buffer::new(10));
        buffer.push(part(1));
        let waiting = Arc::clone(&buffer);
        let waiter = tokio::spawn(async move { waiting.next_grown().await });
        tokio::task::yield_now().await;
        assert_eq!(*buffer.take_back(|_| true).expect("nobody has taken it").end(), Lsn(1));
        buffer.push(part(2));
        buffer.push(part(3));
        assert_eq!(*waiter.await.unwrap().unwrap().end(), Lsn(2));
        buffer.end(Error::bug("over"));
        assert_eq!(*buffer.next_grown().await.unwrap().end(), Lsn(3), "the last one grows no more");
        assert_eq!(buffer.next_grown().await.unwrap_err().message, "over");
    }

    #[tokio::test]
    async fn a_part_counts_until_nobody_holds_it() {
        let full = |end| {
            let mut part = part(end);
            part.batch.push_cell(CellKind::Text, &[b'x'; 100]);
            part
        };
        let size = full(1).batch.size();
        let buffer = Buffer::new(2 * size);
        buffer.push(full(1));
        buffer.push(full(2));
        let applied = Arc::new(buffer.next().await.unwrap());
        let held = Arc::clone(&applied);
        drop(applied);
        assert!(!buffer.budget().wait_for_room(0, Duration::ZERO), "it is being applied");
        drop(held);
        assert!(buffer.budget().wait_for_room(0, Duration::ZERO));
        assert_eq!(buffer.budget().used(), size);
        buffer.close();
        assert_eq!(buffer.budget().used(), 0, "what waited is gone");
    }
}
