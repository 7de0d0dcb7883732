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
        self.is_younger(key, FRESH)
    }

    /// Whether it was looked at less than `age` ago.
    pub fn is_younger(&self, key: &K, age: Duration) -> bool {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.get(key).is_some_and(|(at, _)| at.elapsed() < age)
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
    /// Resource versions of the NetworkPolicies that are right, by namespace.
    pub policies: Recent<String, Option<String>>,
    /// What was decided for a Mirror, by its uid.
    pub decisions: Recent<String, Standing>,
    /// Mirrors, by uid, whose source was looked at in place of the worker.
    pub guarded: Recent<String, ()>,
    /// Workers that move to a new release.
    pub rollouts: Rollouts,
}

/// A decision that was carried out.
#[derive(Clone, Debug)]
pub struct Standing {
    /// On what it rests.
    pub basis: Basis,
    /// What is done.
    pub intent: Intent,
    /// Resource version of the ConfigMap that was found or made; `None`: there was none.
    pub document: Option<String>,
}

impl Memory {
    /// What was decided for the Mirror with this uid, while that rests on the same, its document is the one `in_effect`, and nobody has
    /// touched the ConfigMap: this is its resource version as the cache knows it.
    pub fn decided(&self, uid: &str, basis: &Basis, in_effect: i64, document: Option<&str>) -> Option<Intent> {
        let uid = uid.to_owned();
        let Standing { basis: was, intent, document: left } = self.decisions.last(&uid).filter(|_| self.decisions.is_fresh(&uid))?;
        (was == *basis && intent.told.unwrap_or_default() == in_effect && left.as_deref() == document).then_some(intent)
    }

    /// Forgets namespaces in which no Mirror is left.
    pub fn forget_namespace(&self, namespace: &str) {
        self.endpoints.retain(|(_, (of, _))| of != namespace);
        self.held.retain(|(of, _)| of != namespace);
        self.policies.retain(|of| of != namespace);
    }
}
