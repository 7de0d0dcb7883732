//! What is to be done for a Mirror in this pass: whether a worker may be made, what it shall be told, and what is wrong. Pure.

use super::peer::{self, Peer, Side};
use super::plan::{self, Live};
use super::problem::Problem;
use super::validate::validate;
use crate::resources::Mirror;
use crate::worker::contract::Desired;

/// What was found.
pub struct Found<'a> {
    /// The Source.
    pub source: Option<&'a Peer>,
    /// The Target.
    pub target: Option<&'a Peer>,
    /// What the worker was told last.
    pub live: &'a Live,
    /// Whether there is a worker.
    pub exists: bool,
}

/// What is to be done.
#[derive(Debug, PartialEq)]
pub struct Intent {
    /// What the worker shall be told; `None`: nothing new.
    pub desired: Option<Desired>,
    /// Whether the Deployment may be made or changed.
    pub deploy: bool,
    /// The worker was suspended and no longer is.
    pub resumes: bool,
    /// Why the current spec is not carried out.
    pub problem: Option<Problem>,
}

/// Decides. The first worker waits until all is well. A running one is never taken from what works: it keeps its last good spec, and the
/// addresses of a Source or Target that is not verified; only `suspend` is followed in any case.
pub fn intend(mirror: &Mirror, found: &Found<'_>, public_keys: Vec<String>) -> Intent {
    let (source, target) = (&mirror.spec.source_ref.name, &mirror.spec.target_ref.name);
    let unusable = [peer::problem(Side::Source, source, found.source), peer::problem(Side::Target, target, found.target)];
    let broken = || peer::broken(Side::Source, source, found.source).or_else(|| peer::broken(Side::Target, target, found.target));
    let last = found.live.document.as_ref().filter(|_| found.exists);
    let endpoint = |peer: Option<&Peer>, unusable: bool, last: Option<_>| {
        let verified = peer.filter(|_| !unusable).map(|peer| peer.endpoint.clone());
        verified.or(last).or_else(|| peer.filter(|_| found.exists).map(|peer| peer.endpoint.clone()))
    };
    let endpoints = (
        endpoint(found.source, unusable[0].is_some(), last.map(|last| last.source.clone())),
        endpoint(found.target, unusable[1].is_some(), last.map(|last| last.target.clone())),
    );
    let usable = unusable.iter().all(Option::is_none);
    let [first, second] = unusable;
    let (Some(source), Some(target)) = endpoints else {
        return Intent { desired: None, deploy: false, resumes: false, problem: first.or(second) };
    };
    let (document, invalid) = match validate(mirror, source, target) {
        Ok(valid) => (Some(plan::document(mirror, &valid, public_keys)), None),
        Err(problem) => (last.map(|last| plan::last_good(mirror, last, public_keys)), Some(problem)),
    };
    let desired = document.map(|document| plan::numbered(document, mirror, found.live));
    Intent {
        resumes: last.is_some_and(|last| last.suspend) && desired.as_ref().is_some_and(|desired| !desired.suspend),
        deploy: usable && invalid.is_none(),
        desired,
        problem: invalid.or_else(broken),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operator::mirror::peer::tests as peers;
    use crate::operator::mirror::validate::tests::mirror;
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

    fn decide(mirror: &Mirror, source: Option<&Peer>, live: &Live, exists: bool) -> Intent {
        intend(mirror, &Found { source, target: Some(&target()), live, exists }, vec!["key".into()])
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
}
