//! Whether a worker's Deployment is sent, and how many workers with `updatePolicy: Immediate` move to a new release at a time.

use crate::operator::apply;
use crate::resources::UpdatePolicy;
use crate::resources::names::RESTART_HASH;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Workers that move at the same time, of all: one in twenty.
const SHARE: usize = 20;
/// Lag that is as good as none, in bytes: a worker that was level before its restart need not be level to the byte.
const LEVEL: u64 = 1024 * 1024;

/// What is done with the Deployment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It stays as it is, whatever a newer release would write.
    Keep,
    /// It is made, or an input that needs a restart has changed, or no work is interrupted.
    Apply,
    /// A new release, to be taken at once: when it is this worker's turn.
    Roll,
}

/// Decides. `live` is the metadata of what is there; `is_free` when a restart interrupts no work, as when the Mirror is
/// being resumed, or somebody has interrupted it by an edit.
pub fn decide(live: Option<&ObjectMeta>, desired: &Deployment, is_free: bool, policy: UpdatePolicy) -> Decision {
    let Some(live) = live else { return Decision::Apply };
    if live.deletion_timestamp.is_some() {
        return Decision::Keep;
    }
    if restart_hash(live) != restart_hash(&desired.metadata) || is_free {
        return Decision::Apply;
    }
    if policy == UpdatePolicy::Immediate && !apply::is_applied(live, desired) { Decision::Roll } else { Decision::Keep }
}

fn restart_hash(meta: &ObjectMeta) -> Option<&String> {
    meta.annotations.as_ref()?.get(RESTART_HASH)
}

/// A worker that has been moved and is not yet what it was.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Roll {
    source: String,
    former_lag: u64,
}

/// How a worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Its pod is replaced, or not ready.
    Unsettled,
    /// It runs, and lags by so many bytes; `None`: it does not stream yet.
    Settled(Option<u64>),
}

/// Workers on the move. What it holds is lost with the leader; workers that are not settled count in any case.
#[derive(Debug, Default)]
pub struct Rollouts {
    rolls: Mutex<HashMap<String, Roll>>,
}

impl Rollouts {
    /// Whether the worker of Mirror `uid` may move now; it counts as moving from here on. `others` are all Mirrors with this policy: uid,
    /// source and condition.
    pub fn begin(&self, uid: &str, source: &str, lag: Option<u64>, others: &[(String, String, Condition)]) -> bool {
        let mut rolls = self.rolls.lock().unwrap_or_else(PoisonError::into_inner);
        rolls.retain(|uid, roll| {
            let condition = others.iter().find(|other| other.0 == *uid).map(|other| other.2);
            match condition {
                None => false,
                Some(Condition::Unsettled | Condition::Settled(None)) => true,
                Some(Condition::Settled(Some(lag))) => lag > roll.former_lag.max(LEVEL),
            }
        });
        let moving =
            |other: &&(String, String, Condition)| other.0 != uid && (rolls.contains_key(&other.0) || other.2 == Condition::Unsettled);
        let moving: Vec<_> = others.iter().filter(moving).collect();
        let room = (others.len() / SHARE).max(1);
        if moving.len() >= room || moving.iter().any(|other| other.1 == source) {
            return false;
        }
        rolls.insert(uid.to_owned(), Roll { source: source.to_owned(), former_lag: lag.unwrap_or_default() });
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operator::mirror::peer::{self, Peer};
    use crate::operator::mirror::plan;
    use crate::operator::mirror::validate::tests::slim;
    use serde_json::{Value, json};

    fn planned(spec: Value, image: &str) -> Deployment {
        let image = plan::Image { name: image.into(), pull_policy: "Never".into() };
        let mirror = slim(spec);
        plan::deployment(&mirror, &Peer::from(&peer::tests::source()), &Peer::from(&peer::tests::target()), &image, "1")
    }

    fn small() -> Value {
        json!({"tables": [{"name": "a"}]})
    }

    #[test]
    fn a_new_release_restarts_nothing() {
        let live = planned(small(), "sluice:1").metadata;
        let newer = planned(small(), "sluice:2");
        assert_eq!(decide(Some(&live), &newer, false, UpdatePolicy::OnRestart), Decision::Keep);
        assert_eq!(decide(Some(&live), &newer, false, UpdatePolicy::Immediate), Decision::Roll);
        assert_eq!(decide(Some(&live), &newer, true, UpdatePolicy::OnRestart), Decision::Apply, "a resume takes it");
        assert_eq!(decide(None, &newer, false, UpdatePolicy::OnRestart), Decision::Apply);
        let changed = planned(json!({"tables": [{"name": "a"}], "worker": {"priorityClassName": "high"}}), "sluice:2");
        assert_eq!(decide(Some(&live), &changed, false, UpdatePolicy::OnRestart), Decision::Apply);
    }

    #[test]
    fn one_worker_of_a_source_moves_at_a_time() {
        let all = |conditions: [Condition; 3]| {
            let named = ["a", "b", "c"].into_iter().zip(["s1", "s1", "s2"]).zip(conditions);
            named.map(|((uid, source), condition)| (uid.to_owned(), source.to_owned(), condition)).collect::<Vec<_>>()
        };
        let level = Condition::Settled(Some(10));
        let rollouts = Rollouts::default();
        assert!(rollouts.begin("a", "s1", Some(10), &all([level; 3])));
        assert!(rollouts.begin("a", "s1", Some(10), &all([Condition::Unsettled, level, level])), "its own move does not stop it");
        assert!(!rollouts.begin("b", "s1", Some(10), &all([Condition::Unsettled, level, level])));
        assert!(!rollouts.begin("c", "s2", Some(10), &all([Condition::Settled(None), level, level])), "one in twenty of all");
        assert!(!rollouts.begin("b", "s1", Some(10), &all([Condition::Settled(Some(LEVEL + 1)), level, level])), "it has not caught up");
        assert!(rollouts.begin("b", "s1", Some(10), &all([level; 3])));
    }

    #[test]
    fn a_move_of_a_former_leader_counts_too() {
        let others =
            vec![("a".to_owned(), "s".to_owned(), Condition::Unsettled), ("b".to_owned(), "s".to_owned(), Condition::Settled(Some(0)))];
        assert!(!Rollouts::default().begin("b", "s", None, &others));
    }

    #[test]
    fn many_sources_move_in_parallel() {
        let others: Vec<_> = (0..60).map(|n| (format!("m{n}"), format!("s{n}"), Condition::Settled(Some(0)))).collect();
        let rollouts = Rollouts::default();
        // What has been sent is not seen as unsettled at once; the memory of it counts.
        let begun = |n: usize| {
            let mut others = others.clone();
            others.iter_mut().take(n).for_each(|other| other.2 = Condition::Unsettled);
            rollouts.begin(&format!("m{n}"), &format!("s{n}"), Some(0), &others)
        };
        assert_eq!((0..5).map(begun).collect::<Vec<_>>(), [true, true, true, false, false]);
    }
}
