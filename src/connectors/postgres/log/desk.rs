//! Where the reader and the consumer agree on the transaction that is handed over before it has ended.

use super::guard;
use crate::engine::error::{Error, Result, reason};
use std::collections::HashSet;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

#[derive(Default)]
pub(super) struct Desk {
    state: Mutex<State>,
    /// Wakes the reader: something was answered.
    news: Condvar,
}

#[derive(Default)]
struct State {
    /// Tables of which rows are wanted early.
    wanted: Arc<HashSet<u32>>,
    /// The transaction that is handed over now.
    attempt: u64,
    /// Pieces of it that were handed over, and those that are written.
    sent: u64,
    written: u64,
    /// What was written is rolled back.
    refused: bool,
    /// It has ended, and what was written counts.
    sealed: bool,
}

impl State {
    fn is_answered(&self) -> bool {
        self.refused || self.written == self.sent
    }
}

impl Desk {
    /// From now on rows of these tables are wanted.
    pub(super) fn want(&self, tables: HashSet<u32>) {
        guard(&self.state).wanted = Arc::new(tables);
    }

    pub(super) fn wanted(&self) -> Arc<HashSet<u32>> {
        Arc::clone(&guard(&self.state).wanted)
    }

    /// Numbers another attempt. Answers to earlier ones mean nothing any more.
    pub(super) fn begin(&self) -> u64 {
        let mut state = guard(&self.state);
        *state = State { wanted: Arc::clone(&state.wanted), attempt: state.attempt + 1, ..State::default() };
        state.attempt
    }

    /// A piece is handed over.
    pub(super) fn sent(&self) {
        guard(&self.state).sent += 1;
    }

    /// Pieces that wait for an answer; `None` when one was refused.
    pub(super) fn unanswered(&self) -> Option<u64> {
        let state = guard(&self.state);
        (!state.refused).then(|| state.sent - state.written)
    }

    /// The transaction has ended: whether all its pieces are written, and stay so. `None` while that is not known.
    pub(super) fn seal(&self) -> Option<bool> {
        let mut state = guard(&self.state);
        if !state.is_answered() {
            return None;
        }
        state.sealed = !state.refused;
        Some(state.sealed)
    }

    /// Answers a piece, or takes back what was answered.
    pub(super) fn answer(&self, attempt: u64, written: bool) -> Result<()> {
        let mut state = guard(&self.state);
        if attempt != state.attempt || state.refused {
            return Ok(());
        }
        if written {
            state.written += 1;
        } else if state.sealed {
            return Err(Error::retry(reason::WRITE_REFUSED, "what was written of a transaction before it had ended is lost"));
        } else {
            state.refused = true;
        }
        drop(state);
        self.news.notify_one();
        Ok(())
    }

    /// Waits until all pieces are answered; says whether they are.
    pub(super) fn wait(&self, limit: Duration) -> bool {
        let state = guard(&self.state);
        let (state, _) = self.news.wait_timeout_while(state, limit, |state| !state.is_answered()).unwrap_or_else(PoisonError::into_inner);
        state.is_answered()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_count_when_all_are_written() {
        let desk = Desk::default();
        let attempt = desk.begin();
        desk.sent();
        desk.sent();
        assert_eq!((desk.unanswered(), desk.seal()), (Some(2), None));
        desk.answer(attempt, true).unwrap();
        assert_eq!((desk.unanswered(), desk.seal()), (Some(1), None));
        desk.answer(attempt, true).unwrap();
        assert_eq!((desk.unanswered(), desk.seal()), (Some(0), Some(true)));
        assert_eq!(desk.answer(attempt, false).unwrap_err().reason, reason::WRITE_REFUSED, "the rest is on its way");
    }

    #[test]
    fn what_was_rolled_back_does_not_count() {
        let desk = Desk::default();
        desk.want([7].into());
        let first = desk.begin();
        desk.sent();
        desk.answer(first, true).unwrap();
        desk.answer(first, false).unwrap();
        desk.answer(first, true).unwrap();
        assert_eq!((desk.unanswered(), desk.seal()), (None, Some(false)));
        let second = desk.begin();
        desk.sent();
        desk.answer(first, false).unwrap();
        assert_eq!((desk.unanswered(), desk.seal()), (Some(1), None), "answers to an earlier attempt");
        assert_ne!(first, second);
        assert_eq!(*desk.wanted(), [7].into());
    }
}
