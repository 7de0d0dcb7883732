//! The chart's rights are enough: whole lives under the true service account, with rights in the whole cluster or in one namespace.

use crate::chart;
use crate::stage::Stage;
use crate::support::eventually;
use crate::support::operator::options_with;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use kube::ResourceExt as _;
use kube::api::{DeleteParams, ListParams};
use serde_json::json;
use sluice::operator::permissions;
use sluice::resources::Mirror;
use sluice::resources::names::IN_USE_FINALIZER;
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

/// Sets up, suspends and deletes a Mirror; nothing that the operator asks for is forbidden.
async fn live_and_die(stage: &Stage) {
    let worker = stage.streaming(json!({"slotName": "mine"})).await;
    stage.patch::<Mirror>("orders", json!({"spec": {"suspend": true, "deletionProtection": true}})).await;
    stage.until("orders", "True", "Suspended").await;
    drop(worker);
    stage.delete::<Mirror>("orders").await;
    eventually(20, "the Mirror is gone", async || stage.is_gone::<Mirror>("orders").await).await;
    let free = async || stage.get::<Secret>("source-login").await.is_some_and(|secret| secret.finalizers().is_empty());
    eventually(20, "the Secret is free", free).await;
    assert_eq!(stage.databases.slots(), ["mine"]);
}

#[test]
fn the_chart_grants_what_the_operator_asks_for_and_no_more() {
    for scopes in [&[][..], &["shop", "dw"]] {
        let objects = chart::rendered("home", scopes);
        let options = options_with("home", chart::arguments(&objects).iter().map(String::as_str));
        let mut needed: BTreeSet<_> = permissions::needed(&options)
            .iter()
            .map(|right| {
                let resource = right.subresource.map_or_else(|| right.resource.to_owned(), |sub| format!("{}/{sub}", right.resource));
                chart::right(right.namespace.as_deref(), right.group, &resource, right.name.as_deref(), right.verb)
            })
            .collect();
        // To ask whether it has the others.
        needed.insert(chart::right(None, "authorization.k8s.io", "selfsubjectaccessreviews", None, "create"));
        let granted = chart::granted(&objects);
        let (missing, more): (Vec<_>, Vec<_>) = (needed.difference(&granted).collect(), granted.difference(&needed).collect());
        assert!(missing.is_empty() && more.is_empty(), "missing: {missing:#?}\ntoo many: {more:#?}");
    }
}

fn nothing_was_forbidden(stage: &Stage) {
    assert!(stage.requests_with("code=\"200\"") > 0);
    assert_eq!(stage.requests_with("code=\"403\""), 0, "nothing was forbidden");
}

/// The chart's RoleBinding in the stage's namespace.
async fn binding(stage: &Stage) -> RoleBinding {
    let all = stage.api::<RoleBinding>().list(&ListParams::default()).await.expect("an answer").items;
    let [binding] = all.as_slice() else { panic!("one RoleBinding, not {}", all.len()) };
    binding.clone()
}

async fn is_held(stage: &Stage) -> bool {
    binding(stage).await.finalizers() == [IN_USE_FINALIZER]
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rights_of_the_chart_are_enough_for_a_whole_life() {
    let stage = Stage::set_under_the_chart().await;
    live_and_die(&stage).await;
    nothing_was_forbidden(&stage);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rights_of_the_chart_outlive_the_namespace() {
    let stage = Stage::set_under_the_chart().await;
    let worker = stage.streaming(json!({"slotName": "mine"})).await;
    stage.delete_namespace().await;
    drop(worker);
    eventually(30, "the Mirror is gone", async || stage.is_gone::<Mirror>("orders").await).await;
    assert_eq!(stage.databases.slots(), ["mine"]);
    eventually(30, "the namespace is gone", async || stage.namespace_is_gone().await).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_in_one_namespace_are_enough_and_are_kept_as_long_as_they_are_needed() {
    let stage = Stage::set_under_the_scoped_chart(&[]).await;
    assert!(!is_held(&stage).await, "nobody needs it yet");
    live_and_die(&stage).await;
    eventually(20, "the RoleBinding is free", async || !is_held(&stage).await).await;
    nothing_was_forbidden(&stage);

    // `helm uninstall` after that does not wait for anybody.
    let name = binding(&stage).await.name_any();
    stage.delete::<RoleBinding>(&name).await;
    assert!(stage.is_gone::<RoleBinding>(&name).await);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_in_one_namespace_outlive_it_whatever_goes_first() {
    let mut stage = Stage::set_under_the_scoped_chart(&[]).await;
    let worker = stage.streaming(json!({"slotName": "mine"})).await;
    assert!(is_held(&stage).await, "before anything is outside the cluster");
    stage.databases.broken.store(true, Ordering::SeqCst);
    // The worst order in which the namespace controller may delete what lies in the namespace.
    stage.api::<RoleBinding>().delete_collection(&DeleteParams::default(), &ListParams::default()).await.expect("deleted");
    stage.api::<Role>().delete_collection(&DeleteParams::default(), &ListParams::default()).await.expect("deleted");
    stage.delete_namespace().await;
    drop(worker);
    stage.until("orders", "False", "CleanupFailed").await;
    assert!(binding(&stage).await.metadata.deletion_timestamp.is_some() && is_held(&stage).await);

    stage.stop_operator().await;
    stage.databases.broken.store(false, Ordering::SeqCst);
    stage.start_operator(|_| {}).await;
    eventually(30, "the Mirror is gone", async || stage.is_gone::<Mirror>("orders").await).await;
    assert_eq!(stage.databases.slots(), ["mine"]);
    eventually(30, "the namespace is gone", async || stage.namespace_is_gone().await).await;
    assert_eq!(stage.counted("sluice_operator_orphaned_slots"), 0);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_binding_that_is_held_wrongly_is_put_right_at_the_next_start() {
    let mut stage = Stage::set_under_the_scoped_chart(&[]).await;
    stage.with_worker(json!({"slotName": "mine"})).await;
    assert!(is_held(&stage).await);
    stage.stop_operator().await;
    let name = binding(&stage).await.name_any();
    stage.patch::<RoleBinding>(&name, json!({"metadata": {"finalizers": null}})).await;
    stage.start_operator(|_| {}).await;
    eventually(20, "it is held again", async || is_held(&stage).await).await;
    stage.delete::<Mirror>("orders").await;
    eventually(20, "it is free", async || !is_held(&stage).await).await;

    // As after a crash between the last object and the RoleBinding.
    stage.stop_operator().await;
    stage.patch::<RoleBinding>(&name, json!({"metadata": {"finalizers": [IN_USE_FINALIZER]}})).await;
    stage.delete_namespace().await;
    stage.start_operator(|_| {}).await;
    eventually(30, "the namespace is gone", async || stage.namespace_is_gone().await).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_that_is_gone_holds_up_no_other() {
    let stage = Stage::set_under_the_scoped_chart(&["gone"]).await;
    let worker = stage.streaming(json!({"slotName": "mine"})).await;
    assert!(stage.requests_with("code=\"403\"") > 0, "the other one is looked for");
    drop(worker);
    stage.delete::<Mirror>("orders").await;
    eventually(20, "the Mirror is gone", async || stage.is_gone::<Mirror>("orders").await).await;
    assert_eq!(stage.databases.slots(), ["mine"]);
    stage.end().await;
}
