//! Names, labels, annotations and finalizers that the operator uses.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Longest DNS label and longest value of a Kubernetes label (RFC 1123).
pub const LABEL_LIMIT: usize = 63;

/// Annotation, value `true`: the operator keeps its hands off; deletion is still honoured.
pub const PAUSE_RECONCILIATION: &str = "sluice.dev/pause-reconciliation";
/// Annotation, value `true`: deletion gives up what can't be cleaned up.
pub const FORCE_DELETE: &str = "sluice.dev/force-delete";
/// Annotation of a worker's pod template: hash of the inputs that need a restart.
pub const RESTART_HASH: &str = "sluice.dev/restart-hash";
/// Annotation of a worker's pod: any change makes the kubelet refresh mounted files at once.
pub const TOUCHED: &str = "sluice.dev/touched";

/// Finalizer of a Mirror: something on the source must be undone.
pub const MIRROR_FINALIZER: &str = "sluice.dev/mirror";
/// Finalizer of Sources, Targets and their Secrets: a Mirror needs them to clean up.
pub const IN_USE_FINALIZER: &str = "sluice.dev/in-use";

/// Label: what made an object.
pub const MANAGED_BY_LABEL: &str = "app.kubernetes.io/managed-by";
/// Value of [`MANAGED_BY_LABEL`].
pub const MANAGED_BY: &str = "sluice";
/// Label: part of Sluice.
pub const COMPONENT_LABEL: &str = "app.kubernetes.io/component";
/// Value of [`COMPONENT_LABEL`] of workers.
pub const WORKER: &str = "worker";
/// Label: name of the Mirror.
pub const MIRROR_LABEL: &str = "sluice.dev/mirror";
/// Label: uid of the Mirror.
pub const MIRROR_UID_LABEL: &str = "sluice.dev/mirror-uid";
/// Selects the NetworkPolicies that the operator makes for workers.
pub const POLICY_SELECTOR: &str = "app.kubernetes.io/managed-by=sluice";
/// Selects all objects that the operator makes for Mirrors.
pub const WORKER_SELECTOR: &str = "app.kubernetes.io/managed-by=sluice,app.kubernetes.io/component=worker";

/// Name of everything that the operator makes for a Mirror: `<mirror>-worker`, at most 63 characters. A longer name is cut and
/// told apart by a hash.
pub fn worker_name(mirror: &str) -> String {
    const SUFFIX: &str = "-worker";
    const HASH: usize = 8;
    if mirror.len() + SUFFIX.len() <= LABEL_LIMIT {
        return format!("{mirror}{SUFFIX}");
    }
    let room = LABEL_LIMIT - SUFFIX.len() - HASH - 1;
    let head = mirror[..mirror.floor_char_boundary(room)].trim_end_matches(['-', '.']);
    format!("{head}-{}{SUFFIX}", short_hash(mirror, HASH))
}

/// Labels of the pods of a Mirror; its Deployment selects by them, so they never change.
pub fn selector_labels(mirror: &str) -> BTreeMap<String, String> {
    labels([(MANAGED_BY_LABEL, MANAGED_BY), (COMPONENT_LABEL, WORKER), (MIRROR_LABEL, mirror)])
}

/// Labels of everything that the operator makes for a Mirror.
pub fn worker_labels(mirror: &str, uid: &str) -> BTreeMap<String, String> {
    let mut all = selector_labels(mirror);
    all.extend(labels([("app.kubernetes.io/name", "sluice"), ("app.kubernetes.io/instance", mirror), (MIRROR_UID_LABEL, uid)]));
    all
}

/// Replication slot of a Mirror whose spec names none. PostgreSQL allows lower-case letters, digits and underscores, 63 bytes.
pub fn default_slot_name(uid: &str) -> String {
    format!("sluice_{}", uid.replace('-', "_"))
}

/// Publication of a Mirror whose spec names none.
pub fn default_publication_name(uid: &str) -> String {
    default_slot_name(uid)
}

/// Whether the operator is to keep its hands off.
pub fn is_paused(meta: &ObjectMeta) -> bool {
    annotation(meta, PAUSE_RECONCILIATION) == Some("true")
}

/// Whether deletion is to give up what can't be cleaned up.
pub fn is_deletion_forced(meta: &ObjectMeta) -> bool {
    annotation(meta, FORCE_DELETE) == Some("true")
}

/// Whether the object carries `finalizer`.
pub fn has_finalizer(meta: &ObjectMeta, finalizer: &str) -> bool {
    meta.finalizers.iter().flatten().any(|present| present == finalizer)
}

fn annotation<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    meta.annotations.as_ref()?.get(key).map(String::as_str)
}

fn labels<const N: usize>(pairs: [(&str, &str); N]) -> BTreeMap<String, String> {
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

/// The first `length` hexadecimal digits of SHA-256.
fn short_hash(text: &str, length: usize) -> String {
    let mut hex = Sha256::digest(text.as_bytes()).iter().fold(String::new(), |mut hex, byte| {
        // Writing to a string does not fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    hex.truncate(length);
    hex
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worker_names_are_dns_labels_and_differ() {
        assert_eq!(worker_name("shop"), "shop-worker");
        assert_eq!(worker_name(&"a".repeat(56)), format!("{}-worker", "a".repeat(56)));
        let (one, other) = (worker_name(&"a".repeat(57)), worker_name(&"a".repeat(63)));
        for name in [&one, &other, &worker_name(&format!("{}-{}", "a".repeat(46), "b".repeat(16)))] {
            assert!(name.len() <= LABEL_LIMIT && name.ends_with("-worker") && !name.contains("--"), "{name}");
        }
        assert_ne!(one, other);
    }

    #[test]
    fn slots_are_named_by_the_uid() {
        let slot = default_slot_name("6f9619ff-8b86-d011-b42d-00c04fc964ff");
        assert_eq!(slot, "sluice_6f9619ff_8b86_d011_b42d_00c04fc964ff");
        assert!(slot.len() <= 63);
    }

    #[test]
    fn annotations_say_yes_or_no() {
        let with = |key: &str, value: &str| ObjectMeta { annotations: Some(labels([(key, value)])), ..ObjectMeta::default() };
        assert!(is_paused(&with(PAUSE_RECONCILIATION, "true")));
        assert!(!is_paused(&with(PAUSE_RECONCILIATION, "false")) && !is_paused(&ObjectMeta::default()));
        assert!(is_deletion_forced(&with(FORCE_DELETE, "true")) && !is_deletion_forced(&with(FORCE_DELETE, "false")));
    }

    #[test]
    fn the_selector_finds_what_is_labelled() {
        let labels = worker_labels("shop", "u");
        assert!(WORKER_SELECTOR.split(',').all(|term| {
            let (key, value) = term.split_once('=').expect("key=value");
            labels.get(key).map(String::as_str) == Some(value)
        }));
        assert!(selector_labels("shop").iter().all(|(key, value)| labels.get(key) == Some(value)));
    }
}
