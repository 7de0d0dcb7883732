//! What is to be done for a Mirror in this pass: whether a worker may be made, what it shall be told, and what is wrong. Pure.

use super::peer::{self, Peer, Side};
use super::plan::{self, Live};
use super::problem::Problem;
use super::validate::validate;
use crate::operator::slim::SlimMirror;
use crate::resources::MirrorSpec;
use crate::worker::contract::{Desired, EndpointSpec};

/// What a decision rests on, with the generation in place of the spec. It holds as long as this is the same and nobody has changed the
/// document that was made by it.
#[derive(Clone, Debug, PartialEq)]
pub struct Basis {
    generation: Option<i64>,
    source: End,
    target: End,
    exists: bool,
    public_keys: Vec<String>,
}

/// Source or Target.
#[derive(Clone, Debug, PartialEq)]
struct End {
    endpoint: Option<EndpointSpec>,
    /// Why a new worker may not use it.
    unusable: Option<Problem>,
    /// Why a running one is in trouble.
    broken: Option<Problem>,
}

impl End {
    fn of(side: Side, name: &str, peer: Option<&Peer>) -> Self {
        Self {
            endpoint: peer.map(|peer| peer.endpoint.clone()),
            unusable: peer::problem(side, name, peer),
            broken: peer::broken(side, name, peer),
        }
    }

    /// Where a worker finds it: as it is when that is verified, else as the worker was told `last`, else as it is all the same.
    fn endpoint(&self, last: Option<&EndpointSpec>) -> Option<EndpointSpec> {
        let verified = self.endpoint.as_ref().filter(|_| self.unusable.is_none());
        verified.or(last).or(self.endpoint.as_ref()).cloned()
    }
}

impl Basis {
    /// From what caches hold; `exists`: whether there is a worker.
    pub fn of(mirror: &SlimMirror, source: Option<&Peer>, target: Option<&Peer>, exists: bool, public_keys: Vec<String>) -> Self {
        Self {
            generation: mirror.metadata.generation,
            source: End::of(Side::Source, &mirror.spec.source_ref.name, source),
            target: End::of(Side::Target, &mirror.spec.target_ref.name, target),
            exists,
            public_keys,
        }
    }

    /// Why no worker can be thought of yet, whatever the spec says: the first one waits until all is well.
    pub fn blocked(&self) -> Option<Intent> {
        let unusable = self.unusable().filter(|_| !self.exists)?;
        Some(Intent::blocked(unusable.clone()))
    }

    fn unusable(&self) -> Option<&Problem> {
        self.source.unusable.as_ref().or(self.target.unusable.as_ref())
    }
}

/// What is to be done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Intent {
    /// Generation of the document that the worker shall follow; `None`: there is none.
    pub told: Option<i64>,
    /// The document, but when it is known to be in effect.
    pub desired: Option<Desired>,
    /// Whether the Deployment may be made or changed.
    pub deploy: bool,
    /// The worker was suspended and no longer is.
    pub resumes: bool,
    /// Why the current spec is not carried out.
    pub problem: Option<Problem>,
}

impl Intent {
    /// Nothing but a problem.
    pub fn blocked(problem: Problem) -> Self {
        Self { problem: Some(problem), ..Self::default() }
    }

    /// What stands of it once it has been carried out.
    pub fn carried_out(&self) -> Self {
        Self { told: self.told, deploy: self.deploy, problem: self.problem.clone(), desired: None, resumes: false }
    }
}

/// Decides. The first worker waits until all is well. A running one is never taken from what works: it keeps its last good spec, and the
/// addresses of a Source or Target that is not verified; only `suspend` is followed in any case.
pub fn intend(mirror: &SlimMirror, spec: &MirrorSpec, basis: &Basis, live: &Live) -> Intent {
    if let Some(blocked) = basis.blocked() {
        return blocked;
    }
    let last = live.document.as_ref().filter(|_| basis.exists);
    let source = basis.source.endpoint(last.map(|last| &last.source));
    let target = basis.target.endpoint(last.map(|last| &last.target));
    let (Some(source), Some(target)) = (source, target) else {
        return Intent { problem: basis.unusable().cloned(), ..Intent::default() };
    };
    let (document, invalid) = match validate(spec, source, target) {
        Ok(valid) => (Some(plan::document(mirror, spec, valid, basis.public_keys.clone())), None),
        Err(problem) => (last.map(|last| plan::last_good(spec, last, basis.public_keys.clone())), Some(problem)),
    };
    let desired = document.map(|document| plan::numbered(document, mirror, live));
    Intent {
        told: desired.as_ref().map(|desired| desired.generation),
        resumes: last.is_some_and(|last| last.suspend) && desired.as_ref().is_some_and(|desired| !desired.suspend),
        deploy: basis.unusable().is_none() && invalid.is_none(),
        desired,
        problem: invalid.or_else(|| basis.source.broken.clone()).or_else(|| basis.target.broken.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operator::mirror::peer::tests as peers;
    use crate::operator::mirror::validate::tests::{mirror, slimmed};
    use crate::resources::Mirror;
    use serde_json::json;

    fn source() -> Peer {
        Peer::from(&peers::source())
    }

    fn target() -> Peer {
        Peer::from(&peers::target())
    }

    fn good() -> Mirror {
        mirror(json!({"tables": [{"name": "users"}]}))
    }

    fn basis(mirror: &Mirror, source: Option<&Peer>, exists: bool) -> Basis {
        Basis::of(&slimmed(mirror), source, Some(&target()), exists, vec!["key".into()])
    }

    fn decide(mirror: &Mirror, source: Option<&Peer>, live: &Live, exists: bool) -> Intent {
        intend(&slimmed(mirror), &mirror.spec, &basis(mirror, source, exists), live)
    }

    fn running() -> Live {
        Live { document: decide(&good(), Some(&source()), &Live::default(), false).desired, in_effect: 3 }
    }

    fn failing() -> Peer {
        let mut failing = peers::source();
        failing.spec.host = "elsewhere".into();
        failing.status = serde_json::from_value(peers::status("False", "HostUnreachable", "True")).expect("a status");
        Peer::from(&failing)
    }

    #[test]
    fn the_first_worker_waits_until_all_is_well() {
        let none = Live::default();
        let missing = decide(&good(), None, &none, false);
        assert_eq!((missing.deploy, missing.desired, missing.problem.expect("a problem").reason), (false, None, "SourceNotFound"));
        let unverified = decide(&good(), Some(&failing()), &none, false);
        assert_eq!(
            (unverified.deploy, unverified.desired, unverified.problem.expect("a problem").reason),
            (false, None, "HostUnreachable")
        );
        let wrong = decide(&mirror(json!({"tables": [{"name": "a"}, {"name": "a"}]})), Some(&source()), &none, false);
        assert_eq!((wrong.deploy, wrong.desired, wrong.problem.expect("a problem").reason), (false, None, "InvalidSpec"));
        let fine = decide(&good(), Some(&source()), &none, false);
        assert!(fine.deploy && fine.problem.is_none() && fine.desired.is_some_and(|desired| desired.generation == 3));
    }

    #[test]
    fn a_running_worker_keeps_what_works() {
        let live = running();
        let unverified = decide(&good(), Some(&failing()), &live, true);
        assert_eq!((unverified.deploy, unverified.problem), (false, None), "the Source shows its trouble itself");
        assert_eq!(unverified.desired, live.document, "the old address stays");
        let missing = decide(&good(), None, &live, true);
        assert_eq!(
            (missing.deploy, missing.desired, missing.problem.expect("a problem").reason),
            (false, live.document.clone(), "SourceNotFound")
        );
        let wrong = decide(&mirror(json!({"tables": [{"name": "a"}, {"name": "a"}]})), Some(&source()), &live, true);
        assert_eq!((wrong.deploy, &wrong.desired, wrong.problem.expect("a problem").reason), (false, &live.document, "InvalidSpec"));
    }

    #[test]
    fn suspend_is_followed_from_every_state() {
        let live = running();
        let suspended = mirror(json!({"tables": [{"name": "users"}], "suspend": true}));
        let wrong = mirror(json!({"tables": [{"name": "a"}, {"name": "a"}], "suspend": true}));
        for (mirror, source) in [(&suspended, Some(source())), (&suspended, Some(failing())), (&suspended, None), (&wrong, Some(source()))]
        {
            let intent = decide(mirror, source.as_ref(), &live, true);
            let desired = intent.desired.expect("a document");
            assert_eq!((desired.suspend, desired.generation, intent.resumes), (true, 4, false));
        }
    }

    #[test]
    fn resuming_is_noticed_once() {
        let mut live = running();
        live.document.as_mut().expect("a document").suspend = true;
        let resumed = decide(&good(), Some(&source()), &live, true);
        assert!(resumed.resumes && resumed.deploy);
        let live = Live { document: resumed.desired, in_effect: 3 };
        assert!(!decide(&good(), Some(&source()), &live, true).resumes);
    }

    #[test]
    fn a_lost_document_is_made_again() {
        let lost = Live { document: None, in_effect: 5 };
        assert_eq!(decide(&good(), Some(&source()), &lost, true).desired.expect("a document").generation, 6);
        assert!(decide(&good(), Some(&failing()), &lost, true).desired.is_some());
        assert!(decide(&good(), None, &lost, true).desired.is_none(), "nobody knows the address");
    }
    #[test]
    fn a_decision_holds_until_something_that_it_rests_on_changes() {
        let before = basis(&good(), Some(&source()), true);
        let mut looked_at = peers::source();
        looked_at.metadata.resource_version = Some("8".into());
        looked_at.status.as_mut().expect("a status").server_version = Some("18.0".into());
        assert_eq!(basis(&good(), Some(&Peer::from(&looked_at)), true), before, "what no worker is told");
        let mut edited = good();
        edited.metadata.generation = Some(4);
        for other in [
            basis(&edited, Some(&source()), true),
            basis(&good(), Some(&failing()), true),
            basis(&good(), None, true),
            basis(&good(), Some(&source()), false),
            Basis { public_keys: vec!["key".into(), "next".into()], ..before.clone() },
        ] {
            assert_ne!(other, before);
        }
    }

    #[test]
    fn a_decision_that_was_carried_out_says_the_same_without_the_document() {
        let intent = decide(&good(), Some(&source()), &Live::default(), false);
        let standing = intent.carried_out();
        assert_eq!((standing.told, standing.deploy, &standing.problem), (Some(3), true, &None));
        assert!(intent.desired.is_some() && standing.desired.is_none());
    }
}
