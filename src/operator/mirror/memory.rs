//! What the leader remembers between passes. Losing it costs a few requests, never correctness.

use super::intent::{Basis, Intent};
use super::peer::Side;
use super::rollout::Rollouts;
use crate::connectors::postgres::Endpoint;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a look holds.
const FRESH: Duration = Duration::from_secs(600);

/// Things that were looked at, each for [`FRESH`].
#[derive(Debug)]
pub struct Recent<K, V> {
    seen: Mutex<HashMap<K, (Instant, V)>>,
}

impl<K, V> Default for Recent<K, V> {
    fn default() -> Self {
        Self { seen: Mutex::default() }
    }
}

impl<K: Eq + Hash, V: Clone> Recent<K, V> {
    /// Whether it was looked at lately.
    pub fn is_fresh(&self, key: &K) -> bool {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.get(key).is_some_and(|(at, _)| at.elapsed() < FRESH)
    }

    /// Notes what was seen now.
    pub fn put(&self, key: K, value: V) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).insert(key, (Instant::now(), value));
    }

    /// What was seen last, however long ago.
    pub fn last(&self, key: &K) -> Option<V> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).get(key).map(|(_, value)| value.clone())
    }

    /// Forgets one.
    pub fn remove(&self, key: &K) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }

    /// Forgets what nothing refers to any more.
    pub fn retain(&self, keep: impl Fn(&K) -> bool) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).retain(|key, _| keep(key));
    }
}

/// Namespace and name.
pub type Place = (String, String);

/// All of it.
#[derive(Debug, Default)]
pub struct Memory {
    /// Ways to databases in use: they help when Source or Secret is gone before a deleted Mirror has been cleaned up.
    pub endpoints: Recent<(Side, Place), Endpoint>,
    /// Secrets that carry our finalizer.
    pub held: Recent<Place, ()>,
    /// Namespaces that have the NetworkPolicy.
    pub policies: Recent<String, ()>,
    /// What was decided for a Mirror, by its uid, and on what it rests.
    pub decisions: Recent<String, (Basis, Intent)>,
    /// Workers that move to a new release.
    pub rollouts: Rollouts,
}

impl Memory {
    /// What was decided for the Mirror with this uid, while that rests on the same and its document is the one `in_effect`.
    pub fn decided(&self, uid: &str, basis: &Basis, in_effect: i64) -> Option<Intent> {
        let uid = uid.to_owned();
        let (was, intent) = self.decisions.last(&uid).filter(|_| self.decisions.is_fresh(&uid))?;
        (was == *basis && intent.told.unwrap_or_default() == in_effect).then_some(intent)
    }

    /// Forgets namespaces in which no Mirror is left.
    pub fn forget_namespace(&self, namespace: &str) {
        self.endpoints.retain(|(_, (of, _))| of != namespace);
        self.held.retain(|(of, _)| of != namespace);
        self.policies.retain(|of| of != namespace);
    }
}
