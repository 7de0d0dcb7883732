//! The order in which a deleted Mirror is taken down. Pure; `clean_up.rs` carries it out.
//!
//! worker → its pods → slot and publication → finalizers of what was needed → the own finalizer. Bounded in time.

use crate::connectors::postgres::sql::{quote_ident, quote_literal};
use crate::operator::databases::Leftovers;
use crate::operator::slim::SlimMirror;
use crate::resources::Reclaim;
use std::time::Duration;

/// Longest wait for the end of the worker's pods; a node that is lost never tells. The slot can't be dropped while a worker reads it,
/// so nothing is lost by trying.
const PODS: Duration = Duration::from_secs(120);

/// What is known.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// The annotation that skips the clean-up.
    pub forced: bool,
    /// There is something to clean up on the source.
    pub leftovers: bool,
    /// Time since the deletion began.
    pub elapsed: Duration,
    /// When it is given up.
    pub bound: Duration,
    /// The Deployment is there and nobody has deleted it.
    pub deployment: bool,
    /// Pods of the worker that have not ended.
    pub pods: usize,
}

/// What is done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Delete the Deployment.
    StopWorker,
    /// Look again when the pods have ended.
    AwaitPods,
    /// Drop slot and publication. Whether a failure is the last one decides the clock afterwards: without a try nothing is given up, as
    /// when no operator was there for longer than the bound.
    CleanUp,
    /// Leave them and say so: somebody wants it.
    Skip,
    /// Let everything go.
    Release,
}

/// Decides.
pub fn next(facts: Facts) -> Step {
    match facts {
        Facts { forced: true, leftovers: true, .. } => Step::Skip,
        Facts { forced: true, .. } => Step::Release,
        Facts { deployment: true, .. } => Step::StopWorker,
        Facts { pods: 1.., elapsed, bound, .. } if elapsed < PODS.min(bound / 2) => Step::AwaitPods,
        Facts { leftovers: true, .. } => Step::CleanUp,
        _ => Step::Release,
    }
}

/// Whether a clean-up that has failed is given up.
pub fn is_over(elapsed: Duration, bound: Duration) -> bool {
    elapsed >= bound
}

/// What the Mirror's policy wants dropped; `None` when all stays.
pub fn leftovers(mirror: &SlimMirror) -> Option<Leftovers> {
    let policy = mirror.spec.deletion_policy.clone().unwrap_or_default();
    let leftovers = Leftovers {
        slot: super::plan::slot(mirror),
        drop_slot: policy.slot == Reclaim::Delete,
        publication: (policy.publication == Reclaim::Delete).then(|| super::plan::publication(mirror)),
    };
    (leftovers.drop_slot || leftovers.publication.is_some()).then_some(leftovers)
}

/// What a human has to run on the source instead.
pub fn statements(leftovers: &Leftovers) -> String {
    let slot = leftovers.drop_slot.then(|| format!("SELECT pg_drop_replication_slot({});", quote_literal(&leftovers.slot)));
    let publication = leftovers.publication.as_ref().map(|name| format!("DROP PUBLICATION IF EXISTS {};", quote_ident(name)));
    slot.into_iter().chain(publication).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operator::mirror::validate::tests::slim;
    use serde_json::json;

    fn facts() -> Facts {
        Facts {
            forced: false,
            leftovers: true,
            elapsed: Duration::from_secs(1),
            bound: Duration::from_secs(600),
            deployment: false,
            pods: 0,
        }
    }

    #[test]
    fn the_worker_ends_before_its_slot() {
        assert_eq!(next(Facts { deployment: true, pods: 1, ..facts() }), Step::StopWorker);
        assert_eq!(next(Facts { pods: 1, ..facts() }), Step::AwaitPods);
        assert_eq!(next(facts()), Step::CleanUp);
        assert_eq!(next(Facts { leftovers: false, ..facts() }), Step::Release);
        assert_eq!(next(Facts { leftovers: false, pods: 1, ..facts() }), Step::AwaitPods);
    }

    #[test]
    fn every_wait_is_bounded() {
        assert_eq!(next(Facts { pods: 1, elapsed: PODS, ..facts() }), Step::CleanUp, "a lost node");
        assert_eq!(next(Facts { pods: 1, elapsed: Duration::from_secs(30), bound: Duration::from_secs(60), ..facts() }), Step::CleanUp);
        let late = Duration::from_secs(6000);
        assert_eq!(next(Facts { elapsed: late, pods: 1, ..facts() }), Step::CleanUp, "one try, however late the operator is");
        assert!(is_over(late, facts().bound) && !is_over(Duration::from_secs(599), facts().bound));
        assert_eq!(next(Facts { elapsed: Duration::from_secs(600), leftovers: false, pods: 1, ..facts() }), Step::Release);
    }

    #[test]
    fn force_skips_everything() {
        assert_eq!(next(Facts { forced: true, deployment: true, pods: 1, ..facts() }), Step::Skip);
        assert_eq!(next(Facts { forced: true, leftovers: false, ..facts() }), Step::Release);
    }

    #[test]
    fn the_policy_chooses_what_is_dropped() {
        let of = |policy| {
            leftovers(&slim(json!({"tables": [{"name": "a"}], "slotName": "s", "publicationName": "My \"P\"", "deletionPolicy": policy})))
        };
        let both = of(json!({})).expect("leftovers");
        assert_eq!(both, Leftovers { slot: "s".into(), drop_slot: true, publication: Some("My \"P\"".into()) });
        assert_eq!(statements(&both), "SELECT pg_drop_replication_slot('s'); DROP PUBLICATION IF EXISTS \"My \"\"P\"\"\";");
        let one = of(json!({"slot": "Retain"})).expect("leftovers");
        assert_eq!(statements(&one), "DROP PUBLICATION IF EXISTS \"My \"\"P\"\"\";");
        assert_eq!(of(json!({"slot": "Retain", "publication": "Retain"})), None);
    }
}
