//! The chart's rights are enough: whole lives under the true service account.

use crate::stage::Stage;
use crate::support::eventually;
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt as _;
use serde_json::json;
use sluice::resources::Mirror;

#[tokio::test(flavor = "multi_thread")]
async fn the_rights_of_the_chart_are_enough_for_a_whole_life() {
    let stage = Stage::set_under_the_chart().await;
    let worker = stage.streaming(json!({"slotName": "mine"})).await;
    stage.patch::<Mirror>("orders", json!({"spec": {"suspend": true, "deletionProtection": true}})).await;
    stage.until("orders", "True", "Suspended").await;
    drop(worker);
    stage.delete::<Mirror>("orders").await;
    eventually(20, "the Mirror is gone", async || stage.is_gone::<Mirror>("orders").await).await;
    let free = async || stage.get::<Secret>("source-login").await.is_some_and(|secret| secret.finalizers().is_empty());
    eventually(20, "the Secret is free", free).await;
    assert_eq!(stage.databases.slots(), ["mine"]);
    assert!(stage.requests_with("code=\"200\"") > 0);
    assert_eq!(stage.requests_with("code=\"403\""), 0, "nothing was forbidden");
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
