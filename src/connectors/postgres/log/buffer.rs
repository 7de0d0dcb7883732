//! The one buffer between the reader's thread and the consumer: bounded by bytes, never by refusing what was received.
//!
//! The last part stays open to the reader until the consumer takes it. So a consumer that is busy finds a large part when it
//! comes back, and one that waits gets each transaction at once; no timer is needed for either.

use crate::connectors::postgres::lsn::Lsn;
use crate::engine::batch::Part;
use crate::engine::error::{Error, Result, reason};
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

/// Parts that may always wait, however large they are.
const AT_LEAST: usize = 2;

pub(super) struct Buffer {
    budget: usize,
    state: Mutex<State>,
    /// Wakes the reader: there may be space, or the consumer is gone.
    space: Condvar,
    /// Wakes the consumer: there is a part, or the end.
    news: Notify,
}

#[derive(Default)]
struct State {
    parts: VecDeque<Part<Lsn>>,
    bytes: usize,
    /// Why the reader has ended; taken by the consumer.
    failure: Option<Error>,
    ended: bool,
    closed: bool,
}

impl State {
    fn push(&mut self, part: Part<Lsn>) {
        self.bytes += part.batch.size();
        self.parts.push_back(part);
    }

    fn removed(&mut self, part: Part<Lsn>) -> Part<Lsn> {
        self.bytes -= part.batch.size();
        part
    }
}

impl Buffer {
    pub(super) fn new(budget: usize) -> Self {
        Self { budget, state: Mutex::default(), space: Condvar::new(), news: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two statements that change it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that wait.
    pub(super) fn bytes(&self) -> usize {
        self.lock().bytes
    }

    /// Adds a part; the reader asks for space before it reads more, not here.
    pub(super) fn push(&self, part: Part<Lsn>) {
        self.lock().push(part);
        self.news.notify_one();
    }

    /// Adds a part that holds only a position; one that nobody has taken yet is moved instead.
    pub(super) fn push_idle(&self, received: Lsn) {
        let mut state = self.lock();
        match state.parts.back_mut() {
            Some(last) if last.is_idle() => last.received = received,
            _ => state.push(Part::idle(received)),
        }
        drop(state);
        self.news.notify_one();
    }

    /// Takes the last part back if nobody has taken it and `can_extend` says yes.
    pub(super) fn take_back(&self, can_extend: impl FnOnce(&Part<Lsn>) -> bool) -> Option<Part<Lsn>> {
        let mut state = self.lock();
        if !state.parts.back().is_some_and(can_extend) {
            return None;
        }
        let part = state.parts.pop_back()?;
        Some(state.removed(part))
    }

    /// Whether the reader may read on; waits up to `limit` for it. `held` bytes are in its hands.
    pub(super) fn wait_for_space(&self, held: usize, limit: Duration) -> bool {
        let is_full = |state: &State| state.parts.len() >= AT_LEAST && state.bytes + held >= self.budget;
        let state = self.lock();
        if !is_full(&state) {
            return true;
        }
        let (state, _) =
            self.space.wait_timeout_while(state, limit, |state| is_full(state) && !state.closed).unwrap_or_else(PoisonError::into_inner);
        !is_full(&state)
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

    /// The consumer has gone.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.space.notify_one();
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

    /// The next part, once it can't grow any more because another one follows it. Safe to cancel.
    pub(super) async fn next_grown(&self) -> Result<Part<Lsn>> {
        loop {
            let grown = {
                let state = self.lock();
                state.parts.len() > 1 || state.ended
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
            let part = state.removed(part);
            drop(state);
            self.space.notify_one();
            return Some(Ok(part));
        }
        let ended = || Error::retry(reason::SOURCE_UNREACHABLE, "the stream has ended");
        state.ended.then(|| Err(state.failure.take().unwrap_or_else(ended)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::batch::Boundary;
    use std::sync::Arc;
    use std::time::SystemTime;

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
    async fn space_comes_back() {
        let buffer = Arc::new(Buffer::new(10));
        buffer.push(part(1));
        assert!(buffer.wait_for_space(100, Duration::ZERO), "two parts may always wait");
        buffer.push(part(2));
        assert!(buffer.wait_for_space(9, Duration::ZERO));
        assert!(!buffer.wait_for_space(10, Duration::ZERO));
        let waiting = Arc::clone(&buffer);
        let waiter = std::thread::spawn(move || waiting.wait_for_space(10, Duration::from_secs(30)));
        buffer.next().await.unwrap();
        assert!(waiter.join().unwrap());
    }
}
