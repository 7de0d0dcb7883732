//! What shall exist for a Mirror: its ConfigMap, its Deployment, and the namespace's NetworkPolicy. Pure.
//!
//! Invariant: the same input gives the same bytes, so that a pass without a change writes nothing.

mod deployment;
mod desired;
mod policy;

pub use deployment::{Image, deployment, restart_hash};
pub use desired::{Live, config_map, document, last_good, numbered};
pub use policy::{POLICY_NAME, network_policy};

use crate::operator::slim::SlimMirror;
use crate::resources::names;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Resource as _;

/// Slot that the Mirror uses.
pub fn slot(mirror: &SlimMirror) -> String {
    mirror.spec.slot_name.clone().unwrap_or_else(|| names::default_slot_name(uid(mirror)))
}

/// Publication that the Mirror uses.
pub fn publication(mirror: &SlimMirror) -> String {
    mirror.spec.publication_name.clone().unwrap_or_else(|| names::default_publication_name(uid(mirror)))
}

/// The Mirror's uid; empty only for what was never on a server.
pub fn uid(mirror: &SlimMirror) -> &str {
    mirror.metadata.uid.as_deref().unwrap_or_default()
}

/// The Mirror's name.
pub fn name(mirror: &SlimMirror) -> &str {
    mirror.metadata.name.as_deref().unwrap_or_default()
}

/// The Mirror's namespace.
pub fn namespace(mirror: &SlimMirror) -> &str {
    mirror.metadata.namespace.as_deref().unwrap_or_default()
}

/// Whether an object belongs to this very Mirror.
pub fn is_owned(meta: &ObjectMeta, mirror: &SlimMirror) -> bool {
    owner_uid(meta).is_some_and(|owner| owner == uid(mirror))
}

/// Uid of the Mirror that an object belongs to.
pub fn owner_uid(meta: &ObjectMeta) -> Option<&str> {
    let owners = meta.owner_references.iter().flatten();
    owners.into_iter().find(|owner| owner.controller == Some(true) && owner.kind == SlimMirror::kind(&())).map(|owner| owner.uid.as_str())
}

/// Metadata of a child.
fn child_meta(mirror: &SlimMirror) -> ObjectMeta {
    ObjectMeta {
        name: Some(names::worker_name(name(mirror))),
        namespace: mirror.metadata.namespace.clone(),
        labels: Some(names::worker_labels(name(mirror), uid(mirror))),
        owner_references: Some(vec![OwnerReference { block_owner_deletion: Some(true), ..owner(mirror) }]),
        ..ObjectMeta::default()
    }
}

fn owner(mirror: &SlimMirror) -> OwnerReference {
    OwnerReference {
        api_version: SlimMirror::api_version(&()).into_owned(),
        kind: SlimMirror::kind(&()).into_owned(),
        name: name(mirror).to_owned(),
        uid: uid(mirror).to_owned(),
        controller: Some(true),
        block_owner_deletion: None,
    }
}

#[cfg(test)]
mod tests;
