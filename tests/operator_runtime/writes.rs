//! Writes: children, status, finalizers, events; keys and permissions.

use crate::support::apiserver::ApiServer;
use crate::support::eventually;
use crate::{config_map, context, definitions, mirror, options};
use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::api::rbac::v1::{ClusterRoleBinding, RoleRef, Subject};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Resource as _, ResourceExt as _};
use serde_json::{Value, json};
use sluice::operator::events::EventKind;
use sluice::operator::signing::load_or_create;
use sluice::operator::{ErrorClass, apply, permissions};
use sluice::resources::{Mirror, MirrorStatus};

#[tokio::test(flavor = "multi_thread")]
async fn repeating_an_apply_writes_nothing() {
    let server = ApiServer::shared().await;
    let namespace = server.namespace("apply").await;
    let ctx = context(&server, &namespace).await;
    let first = apply::apply(&ctx, &config_map(&namespace, "c", "1")).await.expect("applied");
    let again = apply::apply(&ctx, &config_map(&namespace, "c", "1")).await.expect("applied");
    assert_eq!(first.resource_version(), again.resource_version());
    let unchanged = apply::apply_if_changed(&ctx, &config_map(&namespace, "c", "1"), Some(&again)).await;
    assert!(unchanged.expect("nothing to send").is_none());
    let other = apply::apply_if_changed(&ctx, &config_map(&namespace, "c", "2"), Some(&again)).await.expect("sent");
    assert_ne!(other.expect("it is another one").resource_version(), again.resource_version());

    // What somebody else added stays, what they changed of ours comes back.
    let api = Api::<ConfigMap>::namespaced(ctx.client.clone(), &namespace);
    let patch = async |data: Value| api.patch("c", &PatchParams::default(), &Patch::Merge(json!({"data": data}))).await.expect("a patch");
    let added = patch(json!({"other": "stays"})).await;
    assert!(apply::apply_if_changed(&ctx, &config_map(&namespace, "c", "2"), Some(&added)).await.expect("nothing to send").is_none());
    let changed = patch(json!({"key": "theirs"})).await;
    let again = apply::apply_if_changed(&ctx, &config_map(&namespace, "c", "2"), Some(&changed)).await.expect("sent");
    let data = again.and_then(|again| again.data).expect("data");
    assert_eq!((data["key"].as_str(), data["other"].as_str()), ("2", "stays"));

    assert!(apply::delete_if_exists::<ConfigMap>(&ctx, &namespace, "c", Some("another uid")).await.is_ok_and(|deleted| !deleted));
    assert!(apply::delete_if_exists::<ConfigMap>(&ctx, &namespace, "c", None).await.expect("deleted"));
    assert!(!apply::delete_if_exists::<ConfigMap>(&ctx, &namespace, "c", None).await.expect("gone"));
    assert!(apply::get::<ConfigMap>(&ctx, &namespace, "c").await.expect("an answer").is_none());
    let nowhere = apply::apply(&ctx, &config_map("no-such-namespace", "c", "1")).await.expect_err("no namespace");
    assert_eq!(nowhere.class, ErrorClass::Missing);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_is_written_only_when_it_differs() {
    let server = ApiServer::shared().await;
    server.install(definitions()).await;
    let namespace = server.namespace("status").await;
    let ctx = context(&server, &namespace).await;
    let api = Api::<Mirror>::namespaced(ctx.client.clone(), &namespace);
    let created = api.create(&PostParams::default(), &mirror(&namespace, "m")).await.expect("a mirror");
    let status =
        MirrorStatus { phase: Some("Copying".into()), observed_generation: Some(1), rows_copied: Some(7), ..MirrorStatus::default() };
    assert!(apply::patch_status(&ctx, &created, None, &status).await.expect("written"));
    let reported = api.get("m").await.expect("the mirror");
    assert_eq!(reported.status.as_ref(), Some(&status));
    assert!(!apply::patch_status(&ctx, &reported, reported.status.as_ref(), &status).await.expect("the same"));
    // A field that is no longer reported goes away.
    let less = MirrorStatus { rows_copied: None, ..status };
    assert!(apply::patch_status(&ctx, &reported, reported.status.as_ref(), &less).await.expect("written"));
    assert_eq!(api.get("m").await.expect("the mirror").status, Some(less.clone()));

    api.delete("m", &DeleteParams::default()).await.expect("deleted");
    assert!(!apply::patch_status(&ctx, &reported, reported.status.as_ref(), &MirrorStatus::default()).await.expect("nothing to report to"));
}

#[tokio::test(flavor = "multi_thread")]
async fn finalizers_survive_writers_and_repetition() {
    let server = ApiServer::shared().await;
    let namespace = server.namespace("finalizers").await;
    let ctx = context(&server, &namespace).await;
    let api = Api::<ConfigMap>::namespaced(ctx.client.clone(), &namespace);
    let stale = api.create(&PostParams::default(), &config_map(&namespace, "c", "1")).await.expect("an object");
    // Ten writers with the same old view: all come through, none drops another's.
    let names: Vec<_> = (0..4).map(|number| format!("sluice.dev/f{number}")).collect();
    futures::future::join_all(names.iter().map(|name| apply::ensure_finalizer(&ctx, &stale, name)))
        .await
        .into_iter()
        .collect::<Result<Vec<_>, _>>()
        .expect("all added");
    let mut present = api.get("c").await.expect("the object").finalizers().to_vec();
    present.sort();
    assert_eq!(present, names);
    assert!(!apply::ensure_finalizer(&ctx, &api.get("c").await.expect("the object"), &names[0]).await.expect("there already"));

    api.delete("c", &DeleteParams::default()).await.expect("deletion begins");
    let late = apply::ensure_finalizer(&ctx, &stale, "sluice.dev/late").await.expect_err("too late");
    assert_eq!(late.reason, "BeingDeleted");
    for name in &names {
        let seen = api.get("c").await.expect("the object");
        assert!(apply::remove_finalizer(&ctx, &seen, name).await.expect("removed"));
    }
    assert!(api.get_opt("c").await.expect("an answer").is_none(), "the last one lets it go");
    let gone = ConfigMap { metadata: ObjectMeta { finalizers: Some(names.clone()), ..stale.metadata }, ..stale };
    assert!(!apply::remove_finalizer(&ctx, &gone, &names[0]).await.expect("nothing left to do"));
}

#[tokio::test(flavor = "multi_thread")]
async fn events_show_each_new_note_and_count_repetitions() {
    let server = ApiServer::shared().await;
    let namespace = server.namespace("events").await;
    let ctx = context(&server, &namespace).await;
    let object = Api::<ConfigMap>::namespaced(ctx.client.clone(), &namespace)
        .create(&PostParams::default(), &config_map(&namespace, "c", "1"))
        .await
        .expect("an object")
        .object_ref(&());
    let api = Api::<Event>::namespaced(ctx.client.clone(), &namespace);
    let all = async || {
        let mut events = api.list(&ListParams::default()).await.expect("events").items;
        events.sort_by_key(|event| event.event_time.clone().map(|time| time.0));
        events
    };
    let publish = async |note: &str| ctx.events.publish(&object, EventKind::Warning, "SourceUnreachable", "Connecting", note).await;

    publish("host a is unknown").await;
    publish("host a is unknown").await;
    publish("host b is unknown").await;
    let events = all().await;
    assert_eq!(events.len(), 2, "a new note is a new event");
    assert_eq!(events[0].series.as_ref().map(|series| series.count), Some(2));
    assert_eq!(events[1].note.as_deref(), Some("host b is unknown"));

    // Forgotten by the server, then by us.
    api.delete(&events[1].name_any(), &DeleteParams::default()).await.expect("deleted");
    publish("host b is unknown").await;
    ctx.events.forget(&object);
    publish("host b is unknown").await;
    assert_eq!(all().await.len(), 3);

    publish(&"é".repeat(2_000)).await;
    let long = all().await.pop().and_then(|event| event.note).expect("a note");
    assert!(long.len() <= 1024 && long.ends_with('…'));

    ctx.events.publish_in_operator_namespace(&object, EventKind::Warning, "SlotLeftBehind", "CleaningUp", "drop it by hand").await;
    let outside = all().await.pop().expect("an event");
    assert_eq!(outside.regarding.and_then(|object| object.kind).as_deref(), Some("Pod"));
    assert_eq!(outside.related.and_then(|object| object.name).as_deref(), Some("c"));

    // A namespace that is gone is counted, not an error.
    let nowhere = k8s_openapi::api::core::v1::ObjectReference { namespace: Some("no-such-namespace".into()), ..object.clone() };
    ctx.events.publish(&nowhere, EventKind::Normal, "Nothing", "Nothing", "nothing").await;
    assert!(ctx.metrics.encode().expect("text").contains("sluice_operator_events_total{result=\"failed\"} 1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_start_at_once_share_one_key() {
    let server = ApiServer::shared().await;
    let namespace = server.namespace("keys").await;
    let client = server.client().await;
    let loads = (0..6).map(|_| load_or_create(&client, &namespace, "sluice-signing-key"));
    let keys: Vec<_> = futures::future::join_all(loads).await.into_iter().map(|keys| keys.expect("keys").public_keys()).collect();
    assert!(keys.iter().all(|other| *other == keys[0]), "{keys:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_permissions_are_named_as_rules() {
    let server = ApiServer::shared().await;
    let namespace = server.namespace("rights").await;
    let admin = server.client().await;
    let account =
        ServiceAccount { metadata: ObjectMeta { name: Some("operator".into()), ..ObjectMeta::default() }, ..ServiceAccount::default() };
    Api::<ServiceAccount>::namespaced(admin.clone(), &namespace).create(&PostParams::default(), &account).await.expect("an account");
    let client = server.client_as_service_account(&namespace, "operator").await;
    let missing = permissions::missing(&client, &options(&namespace, "operator")).await.expect("answers");
    let rule = format!(
        r#"{{apiGroups: ["apps"], resources: ["deployments"], verbs: ["get", "list", "watch", "create", "patch", "delete"]}} in namespace {namespace}"#
    );
    assert!(missing.contains(&rule), "{missing:#?}");
    let refused = Api::<ConfigMap>::namespaced(client.clone(), &namespace).list(&ListParams::default()).await.expect_err("no right");
    let error = sluice::operator::OperatorError::from(refused);
    assert_eq!((error.class, error.reason), (ErrorClass::Bug, "Forbidden"));
    assert!(error.message.contains("list") && error.message.contains("configmaps"), "{error}");

    let binding = ClusterRoleBinding {
        metadata: ObjectMeta { name: Some(namespace.clone()), ..ObjectMeta::default() },
        role_ref: RoleRef { api_group: "rbac.authorization.k8s.io".into(), kind: "ClusterRole".into(), name: "cluster-admin".into() },
        subjects: Some(vec![Subject {
            kind: "ServiceAccount".into(),
            name: "operator".into(),
            namespace: Some(namespace.clone()),
            ..Subject::default()
        }]),
    };
    Api::all(admin).create(&PostParams::default(), &binding).await.expect("a binding");
    eventually(10, "all rights are there", || async {
        permissions::missing(&client, &options(&namespace, "operator")).await.is_ok_and(|missing| missing.is_empty())
    })
    .await;
}
