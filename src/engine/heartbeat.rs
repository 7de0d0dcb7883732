//! When a message of our own is written into the source's log, so that a stream that gets nothing still moves and its
//! latency is known. Pure.
//!
//! Only a log that moves by itself is written to: an idle source is left alone, and the message's own few bytes (with what
//! the server adds about itself) never lead to the next one.

use super::position::Position;
use std::time::{Duration, Instant};

/// How long nothing must have come, and the shortest time between two messages.
const INTERVAL: Duration = Duration::from_secs(10);
/// How far the log must have moved, in bytes.
const DISTANCE: u64 = 64 * 1024;

/// Decides when a message is due.
#[derive(Debug)]
pub(super) struct Heartbeat<P> {
    /// Where the log ended when something came last, or when a message was written.
    seen: P,
    at: Instant,
    /// The source refuses messages.
    refused: bool,
}

impl<P: Position> Heartbeat<P> {
    pub(super) fn new(position: P, now: Instant) -> Self {
        Self { seen: position, at: now, refused: false }
    }

    /// A transaction came: the stream moves without help. `head` is the end of the source's log.
    pub(super) fn came(&mut self, head: P, now: Instant) {
        (self.seen, self.at) = (head, now);
    }

    /// Whether a message is to be written now; it counts as written. Where the log is not counted in bytes any move will do.
    pub(super) fn is_due(&mut self, head: &P, now: Instant) -> bool {
        let moved = *head > self.seen && head.bytes_since(&self.seen).is_none_or(|bytes| bytes >= DISTANCE);
        let due = !self.refused && moved && now.saturating_duration_since(self.at) >= INTERVAL;
        if due {
            self.came(head.clone(), now);
        }
        due
    }

    /// The source does not let us write: nothing is tried again on this connection.
    pub(super) fn refused(&mut self) {
        self.refused = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::testing::Pos;

    #[test]
    fn a_log_that_moves_without_us_is_marked_at_most_every_ten_seconds() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut heartbeat = Heartbeat::new(Pos(0), begin);
        assert!(!heartbeat.is_due(&Pos(DISTANCE), at(9)), "too early");
        assert!(heartbeat.is_due(&Pos(DISTANCE), at(10)));
        assert!(!heartbeat.is_due(&Pos(DISTANCE + 200), at(60)), "its own bytes");
        assert!(heartbeat.is_due(&Pos(2 * DISTANCE), at(60)));
        heartbeat.came(Pos(4 * DISTANCE), at(65));
        assert!(!heartbeat.is_due(&Pos(9 * DISTANCE), at(70)), "something came");
        assert!(heartbeat.is_due(&Pos(9 * DISTANCE), at(75)));
        heartbeat.refused();
        assert!(!heartbeat.is_due(&Pos(99 * DISTANCE), at(900)));
    }
}
