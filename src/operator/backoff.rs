//! When a failed object is tried again: exponential with full jitter per object, by class of error.
//!
//! Invariant: an object's delay grows only with its own failures, and one success forgets them.

use super::error::ErrorClass;
use rand::RngExt as _;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// First delay of the exponential classes.
pub const FIRST: Duration = Duration::from_secs(1);
/// Longest delay of the exponential classes.
pub const LONGEST: Duration = Duration::from_secs(300);
/// Pace of objects that only a change can help; the change itself wakes them at once.
pub const INVALID: Duration = Duration::from_secs(600);
/// Bounds of the delay while something is missing; its watch wakes the object earlier where there is one.
pub const MISSING: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(60));
/// Entries of objects that have not failed for this long belong to deleted objects.
const FORGET_AFTER: Duration = Duration::from_secs(3600);

/// Delay before the next try. `failures` counts those in a row, this one included; `random` lies in `0.0..1.0`.
///
/// Full jitter (uniform between [`FIRST`] and the exponential bound) spreads objects that failed together.
pub fn delay(class: ErrorClass, failures: u32, random: f64) -> Duration {
    let between = |low: Duration, high: Duration| low + (high - low).mul_f64(random.clamp(0.0, 1.0));
    match class {
        ErrorClass::Invalid => between(INVALID.mul_f64(0.8), INVALID.mul_f64(1.2)),
        ErrorClass::Missing => between(MISSING.0, MISSING.1),
        ErrorClass::Transient | ErrorClass::Conflict | ErrorClass::Bug => {
            let doublings = failures.saturating_sub(1).min(16);
            between(FIRST, (FIRST * 2u32.pow(doublings)).min(LONGEST))
        }
    }
}

/// `duration` ± 20 %, so that what happened together does not come back together.
pub fn spread(duration: Duration) -> Duration {
    duration.mul_f64(0.8 + 0.4 * rand::rng().random::<f64>())
}

/// A controller and the uid of one of its objects.
type Key = (&'static str, String);

/// Failures in a row, per controller and object.
#[derive(Debug, Default)]
pub struct Backoff {
    /// How many, and when the last of them was.
    failures: Mutex<HashMap<Key, (u32, Instant)>>,
}

impl Backoff {
    /// Counts a failure and says when to try again.
    pub fn failed(&self, controller: &'static str, object: &str, class: ErrorClass) -> Duration {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        failures.retain(|_, (_, last)| now.duration_since(*last) < FORGET_AFTER);
        let entry = failures.entry((controller, object.to_owned())).or_insert((0, now));
        *entry = (entry.0.saturating_add(1), now);
        delay(class, entry.0, rand::rng().random())
    }

    /// Forgets the object's failures.
    pub fn succeeded(&self, controller: &'static str, object: &str) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if !failures.is_empty() {
            failures.remove(&(controller, object.to_owned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transient_failures_back_off_exponentially_up_to_five_minutes() {
        let longest: Vec<_> = (1..=12).map(|n| delay(ErrorClass::Transient, n, 1.0).as_secs()).collect();
        assert_eq!(longest, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]);
        assert_eq!(delay(ErrorClass::Conflict, 9, 0.0), FIRST, "full jitter reaches down to the first delay");
        assert_eq!(delay(ErrorClass::Bug, u32::MAX, 1.0), LONGEST);
    }

    #[test]
    fn invalid_waits_for_a_change_and_missing_for_its_object() {
        assert!(delay(ErrorClass::Invalid, 1, 0.5).as_secs().abs_diff(600) <= 1);
        assert_eq!(delay(ErrorClass::Invalid, 1, 0.0), delay(ErrorClass::Invalid, 50, 0.0));
        assert_eq!(delay(ErrorClass::Missing, 7, 0.0).as_secs(), 30);
        assert_eq!(delay(ErrorClass::Missing, 7, 1.0).as_secs(), 60);
    }

    #[test]
    fn one_success_forgets_the_failures_of_that_object_alone() {
        let backoff = Backoff::default();
        for _ in 0..10 {
            backoff.failed("mirror", "a", ErrorClass::Transient);
            backoff.failed("mirror", "b", ErrorClass::Transient);
        }
        backoff.succeeded("mirror", "a");
        assert_eq!(backoff.failed("mirror", "a", ErrorClass::Transient), FIRST);
        let counted = backoff.failures.lock().expect("no panic while counting")[&("mirror", "b".to_owned())].0;
        assert_eq!(counted, 10);
    }
}
