//! When a failed session is tried again.

use super::error::Class;
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use std::time::Duration;

const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_LIMIT: Duration = Duration::from_secs(30);
const STOP_FIRST: Duration = Duration::from_secs(15);
const STOP_LIMIT: Duration = Duration::from_secs(120);

/// Counts failures in a row and says how long to wait after each.
#[derive(Clone, Debug)]
pub struct Backoff {
    failures: u32,
    jitter: SmallRng,
}

impl Backoff {
    /// No failure yet. The seed decides how much is taken off each pause: what shall not come back together has different
    /// ones.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { failures: 0, jitter: SmallRng::seed_from_u64(seed) }
    }

    /// Failures in a row.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// One more failure: the pause before the next try, doubled with each, with up to half of it taken off at random so
    /// that many workers of one database do not come back together.
    pub fn next(&mut self, class: Class) -> Duration {
        let pause = self.ceiling(class);
        self.failures = self.failures.saturating_add(1);
        pause.mul_f64(1.0 - self.jitter.random_range(0.0..0.5))
    }

    fn ceiling(&self, class: Class) -> Duration {
        let (first, limit) = match class {
            Class::Retry => (RETRY_FIRST, RETRY_LIMIT),
            Class::Stop | Class::Bug | Class::Fenced => (STOP_FIRST, STOP_LIMIT),
        };
        first.saturating_mul(1 << self.failures.min(16)).min(limit)
    }

    /// A success.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit_and_start_over_after_a_success() {
        let mut backoff = Backoff::new(1);
        for expected in [500, 1000, 2000, 4000, 8000, 16000, 30000, 30000] {
            assert_eq!(backoff.ceiling(Class::Retry), Duration::from_millis(expected));
            let pause = backoff.next(Class::Retry);
            assert!(pause <= Duration::from_millis(expected) && pause >= Duration::from_millis(expected / 2));
        }
        backoff.reset();
        assert_eq!(backoff.ceiling(Class::Retry), RETRY_FIRST);
        assert_eq!(backoff.ceiling(Class::Stop), STOP_FIRST);
        (0..40).for_each(|_| {
            backoff.next(Class::Stop);
        });
        assert_eq!(backoff.ceiling(Class::Stop), STOP_LIMIT);
    }
}
