//! Whose slot it is. Two Mirrors that name one slot of one server would confirm each other's changes away, and the deletion of one would
//! drop the other's slot; so the first that is set up has it. Pure.

use super::peer::Peer;
use super::plan;
use super::problem::Problem;
use crate::engine::error::reason;
use crate::operator::slim::SlimMirror;
use crate::resources::names::{MIRROR_FINALIZER, has_finalizer};

/// Whether both are one server. Slots belong to the server, not to a database.
pub fn is_same_server(one: &Peer, other: &Peer) -> bool {
    let identifier = |peer: &Peer| peer.status.as_ref().and_then(|status| status.system_identifier.clone());
    match (identifier(one), identifier(other)) {
        (Some(one), Some(other)) => one == other,
        _ => one.endpoint.host.eq_ignore_ascii_case(&other.endpoint.host) && one.endpoint.port == other.endpoint.port,
    }
}

/// Whether `other`, which names the same slot of the same server, has it: it has been set up, or neither has and it is the older one.
pub fn has_it(other: &SlimMirror, mirror: &SlimMirror) -> bool {
    let is_set_up = |mirror: &SlimMirror| has_finalizer(&mirror.metadata, MIRROR_FINALIZER);
    let age = |mirror: &SlimMirror| (mirror.metadata.creation_timestamp.as_ref().map(|time| time.0), mirror.metadata.uid.clone());
    match (is_set_up(other), is_set_up(mirror)) {
        (true, false) => true,
        (false, true) => false,
        _ => age(other) < age(mirror),
    }
}

/// Why a Mirror that has not been set up waits while `other` has its slot. Of other namespaces nothing is told.
pub fn problem(mirror: &SlimMirror, other: &SlimMirror) -> Problem {
    let whose = if plan::namespace(other) == plan::namespace(mirror) {
        format!("Mirror {}", plan::name(other))
    } else {
        "a Mirror of another namespace".to_owned()
    };
    let slot = plan::slot(mirror);
    if other.metadata.deletion_timestamp.is_some() {
        return Problem::retry(reason::INVALID_SPEC, format!("slot {slot} belongs to {whose}, which is being deleted; it is waited for"));
    }
    Problem::stop(reason::INVALID_SPEC, format!("slot {slot} belongs to {whose}: make this Mirror anew with another slotName"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operator::mirror::peer::tests as peers;
    use serde_json::{Value, json};

    fn mirror(namespace: &str, uid: &str, created: &str, set_up: bool) -> SlimMirror {
        let finalizers: Value = if set_up { json!([MIRROR_FINALIZER]) } else { json!([]) };
        serde_json::from_value(json!({
            "apiVersion": "sluice.dev/v1alpha1", "kind": "Mirror",
            "metadata": {"name": format!("m-{uid}"), "namespace": namespace, "uid": uid, "creationTimestamp": created, "finalizers": finalizers},
            "spec": {"sourceRef": {"name": "s"}, "targetRef": {"name": "t"}, "tables": [{"name": "a"}], "slotName": "mine"},
        }))
        .expect("a mirror")
    }

    const EARLY: &str = "2026-01-01T00:00:00Z";
    const LATE: &str = "2026-01-02T00:00:00Z";

    #[test]
    fn who_is_set_up_has_the_slot_else_the_older_one() {
        let (early, late) = (mirror("n", "1", EARLY, false), mirror("n", "2", LATE, false));
        assert!(has_it(&early, &late) && !has_it(&late, &early));
        let running = mirror("n", "2", LATE, true);
        assert!(has_it(&running, &early) && !has_it(&early, &running), "whoever is set up has it, whatever the age");
    }

    #[test]
    fn a_server_is_known_by_its_identifier_or_its_address() {
        let peer = |host: &str, database: &str, identifier: Option<&str>| {
            let mut source = peers::source();
            source.spec.host = host.into();
            source.spec.database = database.into();
            source.status.get_or_insert_default().system_identifier = identifier.map(str::to_owned);
            Peer::from(&source)
        };
        assert!(is_same_server(&peer("a", "x", Some("7")), &peer("b", "y", Some("7"))), "one server under two names");
        assert!(!is_same_server(&peer("a", "x", Some("7")), &peer("a", "x", Some("8"))));
        assert!(is_same_server(&peer("A", "x", None), &peer("a", "y", Some("8"))));
        assert!(!is_same_server(&peer("a", "x", None), &peer("b", "x", None)));
    }

    #[test]
    fn the_problem_says_what_to_do_and_tells_nothing_of_other_namespaces() {
        let waits = mirror("n", "2", LATE, false);
        let mut has = mirror("n", "1", EARLY, true);
        let known = problem(&waits, &has);
        assert!(known.needs_human && known.message.contains("Mirror m-1") && known.message.contains("slotName"), "{}", known.message);
        let foreign = problem(&waits, &mirror("other", "1", EARLY, true));
        assert!(!foreign.message.contains("m-1") && !foreign.message.contains("other namespace "), "{}", foreign.message);
        has.metadata.deletion_timestamp = has.metadata.creation_timestamp.clone();
        assert!(!problem(&waits, &has).needs_human, "it goes by itself");
    }
}
