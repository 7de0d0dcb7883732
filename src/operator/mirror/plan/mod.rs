//! What shall exist for a Mirror: its ConfigMap, its Deployment, and the namespace's NetworkPolicy. Pure.
//!
//! Invariant: the same input gives the same bytes, so that a pass without a change writes nothing.

mod deployment;
mod desired;
mod policy;

pub use deployment::{Image, deployment, restart_hash};
pub use desired::{Live, config_map, document, last_good, numbered};
pub use policy::{POLICY_NAME, network_policy};

use crate::resources::Mirror;
use crate::resources::names;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Resource as _;

/// Slot that the Mirror uses.
pub fn slot(mirror: &Mirror) -> String {
    mirror.spec.slot_name.clone().unwrap_or_else(|| names::default_slot_name(uid(mirror)))
}

/// Publication that the Mirror uses.
pub fn publication(mirror: &Mirror) -> String {
    mirror.spec.publication_name.clone().unwrap_or_else(|| names::default_publication_name(uid(mirror)))
}

/// The Mirror's uid; empty only for what was never on a server.
pub fn uid(mirror: &Mirror) -> &str {
    mirror.metadata.uid.as_deref().unwrap_or_default()
}

/// The Mirror's name.
pub fn name(mirror: &Mirror) -> &str {
    mirror.metadata.name.as_deref().unwrap_or_default()
}

/// The Mirror's namespace.
pub fn namespace(mirror: &Mirror) -> &str {
    mirror.metadata.namespace.as_deref().unwrap_or_default()
}

/// Whether an object belongs to this very Mirror.
pub fn is_owned(meta: &ObjectMeta, mirror: &Mirror) -> bool {
    owner_uid(meta).is_some_and(|owner| owner == uid(mirror))
}

/// Uid of the Mirror that an object belongs to.
pub fn owner_uid(meta: &ObjectMeta) -> Option<&str> {
    let owners = meta.owner_references.iter().flatten();
    owners.into_iter().find(|owner| owner.controller == Some(true) && owner.kind == Mirror::kind(&())).map(|owner| owner.uid.as_str())
}

/// Metadata of a child.
fn child_meta(mirror: &Mirror) -> ObjectMeta {
    ObjectMeta {
        name: Some(names::worker_name(name(mirror))),
        namespace: mirror.metadata.namespace.clone(),
        labels: Some(names::worker_labels(name(mirror), uid(mirror))),
        owner_references: Some(vec![OwnerReference { block_owner_deletion: Some(true), ..owner(mirror) }]),
        ..ObjectMeta::default()
    }
}

fn owner(mirror: &Mirror) -> OwnerReference {
    OwnerReference {
        api_version: Mirror::api_version(&()).into_owned(),
        kind: Mirror::kind(&()).into_owned(),
        name: name(mirror).to_owned(),
        uid: uid(mirror).to_owned(),
        controller: Some(true),
        block_owner_deletion: None,
    }
}

#[cfg(test)]
mod tests;
