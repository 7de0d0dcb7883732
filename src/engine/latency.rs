//! How long transactions take from the source's commit to the target's. Pure.

use std::time::{Duration, Instant};

/// Upper bounds of the classes: 1 ms, and then each √2 times the one before, up to about 70 minutes; one more for the rest.
const CLASSES: usize = 46;
/// The window of the percentiles is one to two of these.
const SLICE: Duration = Duration::from_secs(60);

type Counts = [u64; CLASSES];

/// Counts transactions by their latency: since the beginning, and in the last one to two minutes.
#[derive(Clone, Debug)]
pub struct Latency {
    total: Counts,
    sum: Duration,
    present: Counts,
    past: Counts,
    since: Option<Instant>,
}

impl Default for Latency {
    fn default() -> Self {
        Self { total: [0; CLASSES], sum: Duration::ZERO, present: [0; CLASSES], past: [0; CLASSES], since: None }
    }
}

/// Upper bound of a class, in seconds; the last one has none.
fn bound(class: usize) -> f64 {
    if class + 1 == CLASSES { f64::INFINITY } else { 0.001 * 2f64.powf(class as f64 / 2.0) }
}

impl Latency {
    /// One transaction.
    pub fn record(&mut self, latency: Duration, now: Instant) {
        self.turn(now);
        let seconds = latency.as_secs_f64();
        // The last bound is above everything.
        let class = (0..CLASSES).find(|class| seconds <= bound(*class)).unwrap_or(CLASSES - 1);
        self.total[class] += 1;
        self.present[class] += 1;
        self.sum = self.sum.saturating_add(latency);
    }

    fn turn(&mut self, now: Instant) {
        let since = *self.since.get_or_insert(now);
        let gone = now.saturating_duration_since(since);
        if gone >= SLICE {
            self.past = if gone < 2 * SLICE { self.present } else { [0; CLASSES] };
            self.present = [0; CLASSES];
            self.since = Some(now);
        }
    }

    /// The latency that this share of the transactions of the last one to two minutes has kept; right to a class, that is
    /// within a factor of √2. `None` when there were none.
    #[must_use]
    pub fn percentile(&self, share: f64, now: Instant) -> Option<Duration> {
        let mut recent = self.clone();
        recent.turn(now);
        let counts: Vec<u64> = recent.present.iter().zip(&recent.past).map(|(present, past)| present + past).collect();
        let all: u64 = counts.iter().sum();
        let rank = (all as f64 * share).ceil() as u64;
        let mut passed = 0;
        let class = counts.iter().position(|count| {
            passed += count;
            passed >= rank.max(1)
        })?;
        // Nothing is known of the rest but that it is longer.
        Some(Duration::from_secs_f64(bound(class.min(CLASSES - 2))))
    }

    /// Transactions since the beginning in classes of powers of two, with the upper bound of each in seconds.
    #[must_use]
    pub fn classes(&self) -> Vec<(f64, u64)> {
        let pairs = self.total[1..].chunks(2).zip(1..).map(|(pair, number)| (bound(2 * number - 2 + pair.len()), pair.iter().sum()));
        std::iter::once((bound(0), self.total[0])).chain(pairs).collect()
    }

    /// Sum over all transactions since the beginning.
    #[must_use]
    pub fn sum(&self) -> Duration {
        self.sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_last_minutes() {
        let (mut latency, begin) = (Latency::default(), Instant::now());
        assert_eq!(latency.percentile(0.5, begin), None);
        for n in 1..=100 {
            latency.record(Duration::from_millis(n), begin);
        }
        let within = |found: Option<Duration>, milliseconds: f64| {
            let found = found.expect("a figure").as_secs_f64() * 1000.0;
            assert!((milliseconds..=milliseconds * 1.42).contains(&found), "{found} for {milliseconds}");
        };
        within(latency.percentile(0.5, begin), 50.0);
        within(latency.percentile(0.99, begin), 99.0);
        // A slow one, a minute later: the old ones still count, and then no more.
        latency.record(Duration::from_secs(9), begin + SLICE);
        within(latency.percentile(0.5, begin + SLICE), 50.0);
        within(latency.percentile(0.5, begin + 2 * SLICE), 9000.0);
        assert_eq!(latency.percentile(0.5, begin + 5 * SLICE), None);
        assert_eq!(latency.classes().iter().map(|(_, count)| count).sum::<u64>(), 101);
        assert_eq!(latency.sum(), Duration::from_millis(5050 + 9000));
    }

    #[test]
    fn what_is_beyond_all_classes_is_counted() {
        let mut latency = Latency::default();
        latency.record(Duration::from_secs(100_000), Instant::now());
        latency.record(Duration::ZERO, Instant::now());
        let classes = latency.classes();
        assert_eq!((classes.first(), classes[1].0, classes.last()), (Some(&(0.001, 1)), 0.002, Some(&(f64::INFINITY, 1))));
        assert!(latency.percentile(1.0, Instant::now()).is_some());
    }
}
