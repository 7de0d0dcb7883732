//! Writes to the API server, each bounded in time and safe to repeat.
//!
//! Children and status have field managers of their own: server-side apply with a shared one would drop the other's fields.

use super::context::Context;
use super::error::{ErrorClass, OperatorError, Result};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ManagedFieldsEntry, ObjectMeta};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions};
use kube::core::{ObjectList, PartialObjectMeta};
use kube::{Api, Resource, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::fmt::Debug;
use std::fmt::Write as _;
use std::time::Duration;
use tokio::time::timeout;
use tracing::info;

/// Field manager of children.
pub const MANAGER: &str = "sluice-operator";
/// Field manager of status.
pub const STATUS_MANAGER: &str = "sluice-operator-status";
/// Annotation with the hash of what was applied last.
pub const APPLIED_HASH: &str = "sluice.dev/applied-hash";
/// Label with the digest of the fields that [`apply`] has left as ours. No annotation: each change of those counts as a new generation
/// of a Deployment.
pub const OWNED_FIELDS: &str = "sluice.dev/owned-fields";
/// Longest time of one write.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// Tries of a finalizer patch that somebody else's write came before.
const FINALIZER_TRIES: usize = 5;

/// A namespaced kind that can be written.
pub trait Object: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned {}
impl<K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned> Object for K {}

/// Makes `desired` so, by server-side apply with force, and returns what the server holds then. The annotation
/// [`APPLIED_HASH`] is added. Repeating it changes nothing on the server.
///
/// # Errors
/// As the API server answers, see [`super::error::classify`]; `DeadlineExceeded` after [`DEADLINE`].
pub async fn apply<K: Object + Serialize>(ctx: &Context, desired: &K) -> Result<K> {
    let (namespace, name) = place(desired)?;
    let mut body = to_json(desired)?;
    let hash = hash(&body);
    body["metadata"]["annotations"][APPLIED_HASH] = hash.into();
    let api = Api::<K>::namespaced(ctx.client.clone(), &namespace);
    let params = PatchParams::apply(MANAGER).force();
    let result = in_time::<K, _>("apply", &name, api.patch(&name, &params, &Patch::Apply(&body))).await;
    ctx.metrics.applied(&K::kind(&()), if result.is_ok() { "applied" } else { "failed" });
    result
}

/// [`apply`], unless `live` is `desired` already. Returns what was made of it when it was sent.
///
/// # Errors
/// As [`apply`].
pub async fn apply_if_changed<K: Object + Serialize>(ctx: &Context, desired: &K, live: Option<&K>) -> Result<Option<K>> {
    if let Some(live) = live.filter(|live| is_applied(live.meta(), desired)) {
        if holds(&to_json(live)?, &to_json(desired)?) {
            ctx.metrics.applied(&K::kind(&()), "unchanged");
            return Ok(None);
        }
        info!(kind = %K::kind(&()), namespace = live.namespace(), name = live.name_any(), "somebody has changed it; it is put right");
    }
    apply(ctx, desired).await.map(Some)
}

/// Whether all of `desired` is found in `live`. What others have added beside it does not count, but an element of a list does.
fn holds(live: &Value, desired: &Value) -> bool {
    match (live, desired) {
        (Value::Object(live), Value::Object(desired)) => {
            desired.iter().all(|(key, desired)| live.get(key).is_some_and(|live| holds(live, desired)))
        }
        (Value::Array(live), Value::Array(desired)) => {
            live.len() == desired.len() && live.iter().zip(desired).all(|(live, desired)| holds(live, desired))
        }
        _ => live == desired,
    }
}

/// Digest of the fields that [`apply`] has set and that nobody else has changed or removed since (Kubernetes manual: "Field
/// management"). What the server adds, and what others do, is not part of it.
pub fn owned_fields(meta: &ObjectMeta) -> Option<String> {
    let ours = |entry: &&ManagedFieldsEntry| {
        entry.manager.as_deref() == Some(MANAGER) && entry.operation.as_deref() == Some("Apply") && entry.subresource.is_none()
    };
    meta.managed_fields.iter().flatten().find(ours)?.fields_v1.as_ref().map(|fields| hash(&fields.0))
}

/// Notes on `applied`, as [`apply`] has returned it, which fields are ours, for [`is_edited`]. For kinds of which no cache holds the
/// spec.
///
/// # Errors
/// As the API server answers.
pub async fn note_owned_fields<K: Object>(ctx: &Context, applied: &K) -> Result<()> {
    let Some(owned) = owned_fields(applied.meta()).filter(|owned| applied.labels().get(OWNED_FIELDS) != Some(owned)) else { return Ok(()) };
    let (namespace, name) = place(applied)?;
    let api = Api::<K>::namespaced(ctx.client.clone(), &namespace);
    let patch = Patch::Merge(json!({"metadata": {"labels": {OWNED_FIELDS: owned}, "uid": applied.meta().uid}}));
    in_time::<K, _>("note", &name, api.patch_metadata(&name, &PatchParams::default(), &patch)).await.map(|_| ())
}

/// Whether somebody has changed or removed what [`apply`] had set when that was noted; `owned` as [`owned_fields`] of now.
pub fn is_edited(live: &ObjectMeta, owned: Option<&String>) -> bool {
    let noted = live.labels.as_ref().and_then(|all| all.get(OWNED_FIELDS));
    noted.is_some() && noted != owned
}

/// Whether `live` is what [`apply`] made of `desired`.
pub fn is_applied<K: Serialize>(live: &ObjectMeta, desired: &K) -> bool {
    let wanted = to_json(desired).map(|body| hash(&body)).ok();
    live.deletion_timestamp.is_none()
        && wanted.is_some()
        && live.annotations.as_ref().and_then(|all| all.get(APPLIED_HASH)) == wanted.as_ref()
}

/// Reports the status `new` of `object`, by server-side apply to the subresource, only when it differs from the one it had. Returns
/// whether it was written.
///
/// # Errors
/// As the API server answers; a missing object is no error: nothing is left to report.
pub async fn patch_status<K: Object, S: Serialize + PartialEq + Sync>(ctx: &Context, object: &K, old: Option<&S>, new: &S) -> Result<bool> {
    if old == Some(new) {
        return Ok(false);
    }
    let (namespace, name) = place(object)?;
    let status = to_json(new)?;
    let body = json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": {"name": name, "namespace": namespace},
        "status": status,
    });
    let api = Api::<K>::namespaced(ctx.client.clone(), &namespace);
    let params = PatchParams::apply(STATUS_MANAGER).force();
    match in_time::<K, _>("status", &name, api.patch_status(&name, &params, &Patch::Apply(&body))).await {
        Ok(_) => {
            ctx.metrics.status_written(&K::kind(&()));
            Ok(true)
        }
        Err(error) if error.class == ErrorClass::Missing => Ok(false),
        Err(error) => Err(error),
    }
}

/// Puts `finalizer` on the object. Returns whether it had to be added. Repeats on conflict.
///
/// # Errors
/// `BeingDeleted` when the object has a deletion timestamp without it: Kubernetes takes no new finalizers then. `NotFound` when it is
/// gone. Otherwise as the API server answers.
pub async fn ensure_finalizer<K: Object>(ctx: &Context, object: &K, finalizer: &str) -> Result<bool> {
    edit_finalizers(ctx, object, |meta| add_finalizer(meta, finalizer)).await
}

/// Takes `finalizer` off the object. Returns whether it was there. A missing object is success. Repeats on conflict.
///
/// # Errors
/// As the API server answers.
pub async fn remove_finalizer<K: Object>(ctx: &Context, object: &K, finalizer: &str) -> Result<bool> {
    match edit_finalizers(ctx, object, |meta| Ok(drop_finalizer(meta, finalizer))).await {
        Err(error) if error.class == ErrorClass::Missing => Ok(false),
        other => other,
    }
}

/// Plans with the cached object first, then with fresh metadata as often as somebody else was faster.
async fn edit_finalizers<K: Object>(ctx: &Context, object: &K, plan: impl Fn(&ObjectMeta) -> Result<Option<Value>>) -> Result<bool> {
    let (namespace, name) = place(object)?;
    let api = Api::<K>::namespaced(ctx.client.clone(), &namespace);
    let meta_api = Api::<PartialObjectMeta<K>>::namespaced(ctx.client.clone(), &namespace);
    let mut meta = object.meta().clone();
    for _ in 0..FINALIZER_TRIES {
        let Some(patch) = plan(&meta)? else { return Ok(false) };
        let patch = Patch::Json::<()>(serde_json::from_value(patch).map_err(bug)?);
        match in_time::<K, _>("finalizer", &name, api.patch_metadata(&name, &PatchParams::default(), &patch)).await {
            Ok(_) => return Ok(true),
            // 422: a `test` of the patch did not hold; 409: written at the same time.
            Err(error) if matches!(error.class, ErrorClass::Invalid | ErrorClass::Conflict) => {
                let fresh = in_time::<K, _>("get", &name, meta_api.get(&name)).await?.metadata;
                if fresh.uid != object.meta().uid {
                    return Err(OperatorError::new(ErrorClass::Missing, "NotFound", format!("{} {name} was replaced", K::kind(&()))));
                }
                meta = fresh;
            }
            Err(error) => return Err(error),
        }
    }
    Err(OperatorError::new(ErrorClass::Conflict, "Conflict", format!("finalizers of {} {name} keep changing", K::kind(&()))))
}

/// The JSON patch that adds it; each rests on what was seen.
fn add_finalizer(meta: &ObjectMeta, finalizer: &str) -> Result<Option<Value>> {
    let present = meta.finalizers.clone().unwrap_or_default();
    if present.iter().any(|other| other == finalizer) {
        return Ok(None);
    }
    if meta.deletion_timestamp.is_some() {
        return Err(OperatorError::new(ErrorClass::Missing, "BeingDeleted", "it is being deleted"));
    }
    Ok(Some(if present.is_empty() {
        json!([
            {"op": "test", "path": "/metadata/uid", "value": meta.uid},
            {"op": "test", "path": "/metadata/resourceVersion", "value": meta.resource_version},
            {"op": "add", "path": "/metadata/finalizers", "value": [finalizer]},
        ])
    } else {
        json!([
            {"op": "test", "path": "/metadata/uid", "value": meta.uid},
            {"op": "test", "path": "/metadata/finalizers", "value": present},
            {"op": "add", "path": "/metadata/finalizers/-", "value": finalizer},
        ])
    }))
}

/// The JSON patch that takes it off.
fn drop_finalizer(meta: &ObjectMeta, finalizer: &str) -> Option<Value> {
    let position = meta.finalizers.as_ref()?.iter().position(|other| other == finalizer)?;
    let path = format!("/metadata/finalizers/{position}");
    Some(json!([
        {"op": "test", "path": "/metadata/uid", "value": meta.uid},
        {"op": "test", "path": path, "value": finalizer},
        {"op": "remove", "path": path},
    ]))
}

/// Deletes the object if it is there. With `uid`, only that very object. Returns whether something was deleted.
///
/// # Errors
/// As the API server answers; a missing object, or another uid, is no error.
pub async fn delete_if_exists<K: Object>(ctx: &Context, namespace: &str, name: &str, uid: Option<&str>) -> Result<bool> {
    let mut params = DeleteParams::background();
    if let Some(uid) = uid {
        params = params.preconditions(Preconditions { uid: Some(uid.to_owned()), ..Preconditions::default() });
    }
    let api = Api::<K>::namespaced(ctx.client.clone(), namespace);
    match in_time::<K, _>("delete", name, api.delete(name, &params)).await {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.class, ErrorClass::Missing | ErrorClass::Conflict) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reads one object by name, live.
///
/// # Errors
/// As the API server answers; a missing object is `None`.
pub async fn get<K: Object>(ctx: &Context, namespace: &str, name: &str) -> Result<Option<K>> {
    let api = Api::<K>::namespaced(ctx.client.clone(), namespace);
    in_time::<K, _>("get", name, api.get_opt(name)).await
}

/// Lists what `selected` chooses, live; when it sets a limit, one page.
///
/// # Errors
/// As the API server answers.
pub async fn list<K: Object>(ctx: &Context, namespace: &str, selected: &ListParams) -> Result<ObjectList<K>> {
    let api = Api::<K>::namespaced(ctx.client.clone(), namespace);
    in_time::<K, _>("list", namespace, api.list(selected)).await
}

async fn in_time<K: Resource<DynamicType = ()>, T>(verb: &str, name: &str, call: impl Future<Output = kube::Result<T>>) -> Result<T> {
    match timeout(DEADLINE, call).await {
        Ok(result) => result.map_err(OperatorError::from),
        Err(_) => Err(OperatorError::deadline(format!("{verb} {} {name}", K::kind(&())))),
    }
}

fn place<K: Resource>(object: &K) -> Result<(String, String)> {
    match (object.namespace(), object.meta().name.clone()) {
        (Some(namespace), Some(name)) => Ok((namespace, name)),
        _ => Err(OperatorError::new(ErrorClass::Bug, "InternalError", "an object without namespace or name")),
    }
}

fn to_json(object: &impl Serialize) -> Result<Value> {
    serde_json::to_value(object).map_err(bug)
}

fn bug(error: serde_json::Error) -> OperatorError {
    OperatorError::new(ErrorClass::Bug, "InternalError", error.to_string()).with_source(error)
}

/// SHA-256 over the JSON with sorted keys (serde_json's map is sorted), 16 bytes in hex.
fn hash(body: &Value) -> String {
    let digest = Sha256::digest(body.to_string().as_bytes());
    digest.iter().take(16).fold(String::with_capacity(32), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ConfigMap;

    fn meta(finalizers: &[&str]) -> ObjectMeta {
        ObjectMeta {
            uid: Some("u".into()),
            resource_version: Some("7".into()),
            finalizers: (!finalizers.is_empty()).then(|| finalizers.iter().map(|&name| name.to_owned()).collect()),
            ..ObjectMeta::default()
        }
    }

    #[test]
    fn a_finalizer_is_added_once_and_only_to_what_was_seen() {
        assert!(add_finalizer(&meta(&["a", "x"]), "x").expect("a plan").is_none());
        let first = add_finalizer(&meta(&[]), "x").expect("a plan").expect("a patch");
        assert_eq!(first[1]["path"], "/metadata/resourceVersion");
        let second = add_finalizer(&meta(&["a"]), "x").expect("a plan").expect("a patch");
        assert_eq!(second[1]["value"], json!(["a"]));
    }

    #[test]
    fn nothing_is_added_to_what_is_being_deleted() {
        let going = ObjectMeta {
            deletion_timestamp: Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(k8s_openapi::jiff::Timestamp::now())),
            ..meta(&[])
        };
        assert_eq!(add_finalizer(&going, "x").expect_err("refused").reason, "BeingDeleted");
    }

    #[test]
    fn a_finalizer_is_removed_by_its_position() {
        assert!(drop_finalizer(&meta(&[]), "x").is_none());
        assert!(drop_finalizer(&meta(&["a"]), "x").is_none());
        let patch = drop_finalizer(&meta(&["a", "x"]), "x").expect("a patch");
        assert_eq!(patch[2], json!({"op": "remove", "path": "/metadata/finalizers/1"}));
        assert_eq!(patch[1]["value"], "x");
    }

    #[test]
    fn what_was_applied_is_recognised() {
        let desired = ConfigMap { data: Some([("k".to_owned(), "v".to_owned())].into()), ..ConfigMap::default() };
        let mut live = ObjectMeta::default();
        assert!(!is_applied(&live, &desired));
        let hash = hash(&to_json(&desired).expect("json"));
        live.annotations = Some([(APPLIED_HASH.to_owned(), hash)].into());
        assert!(is_applied(&live, &desired));
        let changed = ConfigMap { data: Some([("k".to_owned(), "w".to_owned())].into()), ..desired };
        assert!(!is_applied(&live, &changed));
    }

    #[test]
    fn what_others_have_added_does_not_count_and_what_they_have_changed_does() {
        let desired = json!({"metadata": {"labels": {"a": "1"}}, "spec": {"ingress": [{"port": 1, "from": []}]}});
        let changed = |path: &str, value: Value| {
            let mut live =
                json!({"metadata": {"labels": {"a": "1", "b": "2"}, "uid": "u"}, "spec": {"ingress": [{"port": 1, "from": [], "x": 0}]}});
            assert!(holds(&live, &desired));
            *live.pointer_mut(path).expect("a place") = value;
            holds(&live, &desired)
        };
        assert!(changed("/metadata/labels/b", json!("3")));
        assert!(!changed("/metadata/labels/a", json!("2")));
        assert!(!changed("/metadata/labels", json!({"b": "2"})));
        assert!(!changed("/spec/ingress/0/port", json!(2)));
        assert!(!changed("/spec/ingress", json!([{"port": 1, "from": []}, {}])), "another rule lets in more");
        assert!(!changed("/spec", Value::Null));
    }

    #[test]
    fn a_field_that_is_no_longer_ours_was_edited() {
        let with = |noted: Option<&str>, fields: Value| {
            let managed = json!([
                {"manager": "kubectl-edit", "operation": "Update", "fieldsV1": {"f:spec": {"f:replicas": {}}}},
                {"manager": MANAGER, "operation": "Apply", "fieldsV1": fields},
                {"manager": STATUS_MANAGER, "operation": "Apply", "subresource": "status", "fieldsV1": {"f:status": {}}},
            ]);
            let labels = noted.map(|noted| json!({OWNED_FIELDS: noted}));
            serde_json::from_value::<ObjectMeta>(json!({"managedFields": managed, "labels": labels})).expect("metadata")
        };
        let is_edited = |meta: &ObjectMeta| is_edited(meta, owned_fields(meta).as_ref());
        let all = json!({"f:spec": {"f:replicas": {}, "f:template": {}}});
        let noted = owned_fields(&with(None, all.clone())).expect("a digest");
        assert!(!is_edited(&with(Some(&noted), all.clone())));
        assert!(is_edited(&with(Some(&noted), json!({"f:spec": {"f:template": {}}}))));
        assert!(!is_edited(&with(None, all)), "nobody knows");
        assert!(is_edited(&ObjectMeta { managed_fields: None, ..with(Some(&noted), json!({})) }));
    }
}
