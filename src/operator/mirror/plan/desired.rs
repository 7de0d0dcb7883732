//! The desired document and the ConfigMap that carries it.

use super::super::validate::Validated;
use super::{child_meta, name, namespace, publication, slot, uid};
use crate::operator::slim::SlimMirror;
use crate::resources::{MirrorSpec, Request, SchemaChanges};
use crate::worker::contract::{DESIRED_FILE, Desired, MirrorId, RequestSpec, VERSION};
use k8s_openapi::api::core::v1::ConfigMap;

/// What the worker was told last.
#[derive(Clone, Debug, Default)]
pub struct Live {
    /// The document in the ConfigMap; `None` when there is none that can be read.
    pub document: Option<Desired>,
    /// Generation that the worker says is in effect; 0 when unknown.
    pub in_effect: i64,
}

/// The document for a valid spec; its generation is still 0.
pub fn document(mirror: &SlimMirror, spec: &MirrorSpec, valid: Validated, public_keys: Vec<String>) -> Desired {
    Desired {
        contract: VERSION,
        generation: 0,
        mirror: MirrorId { namespace: namespace(mirror).to_owned(), name: name(mirror).to_owned(), uid: uid(mirror).to_owned() },
        source: valid.source,
        target: valid.target,
        slot: slot(mirror),
        publication: publication(mirror),
        tables: valid.tables,
        schemas: valid.schemas,
        snapshot: valid.snapshot,
        stream: valid.stream,
        stop_at_schema_changes: spec.schema_changes == SchemaChanges::Stop,
        wal_budget: valid.wal_budget,
        suspend: spec.suspend,
        request: spec.request.as_ref().map(request),
        public_keys,
    }
}

fn request(given: &Request) -> RequestSpec {
    RequestSpec { id: given.id.clone(), action: given.action.as_str().to_owned(), tables: given.tables.clone() }
}

/// The last good document under a spec that is not valid: `suspend` is followed all the same, and so are our keys.
pub fn last_good(spec: &MirrorSpec, live: &Desired, public_keys: Vec<String>) -> Desired {
    Desired { suspend: spec.suspend, public_keys, ..live.clone() }
}

/// The document with its generation: that of the live one when nothing else differs, else a higher one than the worker has ever had.
pub fn numbered(document: Desired, mirror: &SlimMirror, live: &Live) -> Desired {
    let given = mirror.metadata.generation.unwrap_or_default();
    let generation = match &live.document {
        Some(last) if last.generation >= live.in_effect && same_but_generation(last, &document) => last.generation,
        Some(last) => last.generation.max(live.in_effect).saturating_add(1).max(given),
        None if live.in_effect > 0 => live.in_effect.saturating_add(1).max(given),
        None => given.max(1),
    };
    Desired { generation, ..document }
}

fn same_but_generation(one: &Desired, other: &Desired) -> bool {
    let unnumbered = |document: &Desired| Desired { generation: 0, ..document.clone() };
    unnumbered(one) == unnumbered(other)
}

/// The ConfigMap with the document.
///
/// # Errors
/// Never in practice: the document is plain data.
pub fn config_map(mirror: &SlimMirror, desired: &Desired) -> serde_json::Result<ConfigMap> {
    Ok(ConfigMap {
        metadata: child_meta(mirror),
        data: Some([(DESIRED_FILE.to_owned(), serde_json::to_string(desired)?)].into()),
        ..ConfigMap::default()
    })
}
