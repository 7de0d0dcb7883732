//! Memory of changes, counted from when they are read until nobody holds them any more: while they wait, and while they are applied.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bytes that a log may have in memory. Whoever reads waits for room; nothing that was read is refused.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    used: Mutex<Used>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct Used {
    /// By permits.
    permits: usize,
    /// In the reader's own hands, as it last said.
    own: usize,
}

impl Budget {
    /// Nothing is used.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, used: Mutex::default(), freed: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Used> {
        // The numbers are whole between any two statements that change them.
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The most that should be used, in bytes.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Bytes that are used.
    #[must_use]
    pub fn used(&self) -> usize {
        let used = self.lock();
        used.permits + used.own
    }

    /// Counts bytes until the permit is dropped. There need not be room for them.
    #[must_use]
    pub fn permit(self: &Arc<Self>, bytes: usize) -> Permit {
        self.lock().permits += bytes;
        Permit { bytes, budget: Some(Arc::clone(self)) }
    }

    /// Whether the reader, which holds `own` bytes itself, may read on; waits up to `time` for it. While no permit is out it may
    /// always: what is larger than the budget passes alone.
    pub fn wait_for_room(&self, own: usize, time: Duration) -> bool {
        let is_full = |used: &Used| used.permits > 0 && used.permits + used.own >= self.limit;
        let mut used = self.lock();
        used.own = own;
        if is_full(&used) {
            (used, _) = self.freed.wait_timeout_while(used, time, |used| is_full(used)).unwrap_or_else(PoisonError::into_inner);
        }
        !is_full(&used)
    }
}

/// Counts what it goes with, until it is dropped. The default one counts nothing.
#[derive(Debug, Default)]
pub struct Permit {
    bytes: usize,
    budget: Option<Arc<Budget>>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(budget) = &self.budget {
            budget.lock().permits -= self.bytes;
            budget.freed.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_comes_back_when_permits_are_dropped() {
        let budget = Budget::new(10);
        assert!(budget.wait_for_room(100, Duration::ZERO), "what is too large passes alone");
        let (first, second) = (budget.permit(4), budget.permit(5));
        assert!(budget.wait_for_room(0, Duration::ZERO));
        assert!(!budget.wait_for_room(1, Duration::ZERO));
        assert_eq!(budget.used(), 10);
        drop(first);
        assert!(budget.wait_for_room(4, Duration::ZERO));
        assert!(!budget.wait_for_room(5, Duration::ZERO));
        let waiting = Arc::clone(&budget);
        let waiter = std::thread::spawn(move || waiting.wait_for_room(5, Duration::from_secs(30)));
        drop(second);
        assert!(waiter.join().unwrap());
        assert_eq!(budget.used(), 5);
        drop(Permit::default());
    }
}
