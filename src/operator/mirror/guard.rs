//! Looks at what the source keeps in place of a worker that does not answer: log piles up just then.
//!
//! Only for a Mirror whose `walBudget` drops the slot. A worker that streams on and can't be reached from here does the same by the same
//! rule, so it does no harm that both look.

use super::controller::Mirrors;
use super::observe::{Observed, Worker};
use super::plan;
use crate::engine::error::reason;
use crate::engine::retention::{Action, Budget};
use crate::operator::databases::WatchedSlot;
use crate::operator::events::EventKind;
use crate::operator::slim::SlimMirror;
use crate::resources::names::{MIRROR_FINALIZER, has_finalizer};
use crate::resources::{WalBudget, WalBudgetAction};
use kube::Resource as _;
use std::time::Duration;
use tokio::time::timeout;
use tracing::warn;

/// Pace of a Mirror that is watched from here.
pub(super) const PACE: Duration = Duration::from_secs(60);
/// Shortest pause between two looks: pods that come and go wake a Mirror more often.
const PAUSE: Duration = Duration::from_secs(40);
/// Longest look.
const LOOK: Duration = Duration::from_secs(30);

/// The budget that is to be watched from here, if any.
pub(super) fn watched(mirror: &SlimMirror, observed: &Observed) -> Option<Budget> {
    let silent = match observed.worker {
        // One that starts will look by itself in a moment; should it not come up, that gets another name.
        Worker::Answers(_) | Worker::Outdated(_) | Worker::Starting(_) => false,
        Worker::CannotStart { .. } | Worker::KeepsEnding { .. } | Worker::Unreachable(_) => true,
    };
    let budget = mirror.spec.wal_budget.as_ref().map(budget)?;
    // Before it was set up it has no slot.
    (silent && budget.action != Action::Warn && has_finalizer(&mirror.metadata, MIRROR_FINALIZER)).then_some(budget)
}

fn budget(spec: &WalBudget) -> Budget {
    let bytes = |bytes: Option<i64>| bytes.and_then(|bytes| u64::try_from(bytes).ok());
    let action = match spec.action {
        WalBudgetAction::Warn => Action::Warn,
        WalBudgetAction::DropSlot => Action::DropSlot,
        WalBudgetAction::DropSlotAndResync => Action::DropSlotAndResync,
    };
    Budget { warn: bytes(spec.warn_bytes), max: bytes(spec.max_bytes), action }
}

impl Mirrors {
    /// Drops the slot when the budget says so, and tells of it. What fails is tried again after a pause.
    pub(super) async fn guard_source(&self, mirror: &SlimMirror, budget: Budget) {
        let uid = plan::uid(mirror).to_owned();
        if self.memory.guarded.is_younger(&uid, PAUSE) {
            return;
        }
        self.memory.guarded.put(uid, ());
        let slot = WatchedSlot { slot: plan::slot(mirror), publication: plan::publication(mirror), budget };
        let look = async {
            let endpoint = self.source_endpoint(mirror).await.map_err(|error| error.to_string())?;
            self.databases.keep_budget(&endpoint, &slot).await.map_err(|error| error.to_string())
        };
        match timeout(LOOK, look).await.unwrap_or_else(|_| Err(format!("no answer within {} s", LOOK.as_secs()))) {
            Ok(false) => {}
            Ok(true) => {
                let note = format!(
                    "slot {} was dropped: the source kept more log for it than walBudget.maxBytes, and the worker does not answer",
                    slot.slot
                );
                warn!(slot = slot.slot, "{note}");
                let regarding = mirror.object_ref(&());
                self.ctx.events.publish(&regarding, EventKind::Warning, reason::WAL_BUDGET_EXCEEDED, "DropSlot", &note).await;
            }
            Err(trouble) => warn!(slot = slot.slot, trouble, "what the source keeps can't be looked at in place of the worker"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_source_is_watched_for_a_silent_worker_whose_budget_drops_the_slot() {
        let mirror = |action: &str, finalizer: &str| -> SlimMirror {
            serde_json::from_value(json!({
                "apiVersion": "sluice.dev/v1alpha1", "kind": "Mirror", "metadata": {"name": "m", "namespace": "n", "uid": "u", "finalizers": [finalizer]},
                "spec": {"sourceRef": {"name": "s"}, "targetRef": {"name": "t"}, "tables": [{"name": "a"}], "walBudget": {"maxBytes": 7, "action": action}},
            }))
            .expect("a mirror")
        };
        let seen = |worker| Observed { exists: true, worker, pod: None, address: None, image: None };
        let silent = || seen(Worker::Unreachable("w".into()));
        let budget = watched(&mirror("DropSlotAndResync", MIRROR_FINALIZER), &silent());
        assert_eq!(budget, Some(Budget { warn: None, max: Some(7), action: Action::DropSlotAndResync }));
        assert!(watched(&mirror("DropSlot", MIRROR_FINALIZER), &seen(Worker::CannotStart { why: "w".into(), lasts: true })).is_some());
        assert_eq!(watched(&mirror("Warn", MIRROR_FINALIZER), &silent()), None);
        assert_eq!(watched(&mirror("DropSlot", "another"), &silent()), None, "it has no slot yet");
        assert_eq!(watched(&mirror("DropSlot", MIRROR_FINALIZER), &seen(Worker::Outdated("w".into()))), None, "it looks by itself");
    }
}
