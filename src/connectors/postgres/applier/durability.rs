//! Which committed positions are on the target's disk.
//!
//! Changes are committed without waiting for the disk; a position counts as durable when the target's flush position has
//! passed the insert position that was read after the commit.

use super::super::ddl;
use super::super::lsn::Lsn;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Committed positions that may wait to become durable; with more of them the newest share one place.
const WAITING: usize = 1024;
/// How often the flush position is asked for.
const FLUSH_LOOK: Duration = Duration::from_millis(10);

/// Which committed positions are on disk.
pub(super) struct Durability {
    pub durable: Option<Lsn>,
    /// Checkpoints with the end of the log right after their commit, ascending.
    waiting: VecDeque<(Lsn, Lsn)>,
    looked: Instant,
}

impl Durability {
    pub fn new(durable: Option<Lsn>) -> Self {
        Self { durable, waiting: VecDeque::new(), looked: Instant::now() }
    }

    pub fn committed(&mut self, position: Lsn, insert: Lsn) {
        let entry = (position, ddl::record_end(insert));
        if self.waiting.len() >= WAITING {
            self.waiting.pop_back();
        }
        self.waiting.push_back(entry);
    }

    pub fn flushed(&mut self, flush: Lsn) {
        self.looked = Instant::now();
        while let Some((position, _)) = self.waiting.pop_front_if(|(_, end)| *end <= flush) {
            self.durable = Some(position);
        }
    }

    pub fn wants_look(&self) -> bool {
        !self.waiting.is_empty() && self.looked.elapsed() >= FLUSH_LOOK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_durable_when_the_flush_has_passed_its_commit() {
        let mut durability = Durability::new(Some(Lsn(1)));
        durability.committed(Lsn(10), Lsn(1000));
        durability.committed(Lsn(20), Lsn(2000));
        durability.flushed(Lsn(999));
        assert_eq!(durability.durable, Some(Lsn(1)));
        durability.flushed(Lsn(1000));
        assert_eq!(durability.durable, Some(Lsn(10)));
        durability.flushed(Lsn(5000));
        assert_eq!((durability.durable, durability.wants_look()), (Some(Lsn(20)), false));
    }

    #[test]
    fn waiting_positions_are_bounded_and_the_oldest_still_become_durable() {
        let mut durability = Durability::new(None);
        for number in 0..5000 {
            durability.committed(Lsn(number), Lsn(number));
        }
        assert_eq!(durability.waiting.len(), WAITING);
        durability.flushed(Lsn(100));
        assert_eq!(durability.durable, Some(Lsn(100)));
        durability.flushed(Lsn(4999));
        assert_eq!(durability.durable, Some(Lsn(4999)));
    }
}
