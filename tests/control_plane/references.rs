//! What a Mirror refers to, and specs that can't be carried out.

use crate::stage::Stage;
use crate::support::eventually;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::ResourceExt as _;
use serde_json::json;
use sluice::resources::names::PAUSE_RECONCILIATION;
use sluice::resources::{Mirror, Source};

#[tokio::test(flavor = "multi_thread")]
async fn no_worker_is_made_before_all_is_well() {
    let stage = Stage::set().await;
    stage.mirror("orders", json!({})).await;
    stage.until("orders", "False", "SourceNotFound").await;
    assert_eq!(stage.condition("orders", "Stalled").await, ("True".into(), "SourceNotFound".into()));
    stage.source(json!({"host": "down", "credentialsRef": {"name": "later"}})).await;
    stage.until("orders", "False", "SecretNotFound").await;
    stage.create::<Secret>(json!({"metadata": {"name": "later"}, "stringData": {"username": "u", "password": "p"}})).await;
    // Secrets are not watched; a change of the Source is noticed at once.
    stage.patch::<Source>("shop", json!({"spec": {"connectTimeoutSeconds": 9}})).await;
    stage.until("orders", "False", "HostUnreachable").await;
    stage.patch::<Source>("shop", json!({"spec": {"host": "source-db"}})).await;
    stage.until("orders", "False", "TargetNotFound").await;
    let mirror = stage.get::<Mirror>("orders").await.expect("the Mirror");
    assert!(mirror.finalizers().is_empty(), "nothing is outside yet");
    assert!(stage.is_gone::<Deployment>("orders-worker").await && stage.is_gone::<ConfigMap>("orders-worker").await);
    assert_eq!(mirror.status.expect("a status").phase.as_deref(), Some("Pending"));

    stage.target().await;
    stage.until("orders", "False", "WorkerStarting").await;
    eventually(10, "the Deployment", async || stage.get::<Deployment>("orders-worker").await.is_some()).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spec_that_cannot_work_is_refused() {
    let stage = Stage::set().await;
    stage.source(json!({})).await;
    stage.target().await;
    stage.mirror("orders", json!({"snapshot": {"enabled": false}})).await;
    stage.until("orders", "False", "StartPositionRequired").await;
    assert!(stage.is_gone::<Deployment>("orders-worker").await);
    stage.delete::<Mirror>("orders").await;
    eventually(10, "gone at once: nothing is to be cleaned up", async || stage.is_gone::<Mirror>("orders").await).await;
    assert!(stage.databases.slots().is_empty());
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_new_spec_stops_nothing() {
    let stage = Stage::set().await;
    let worker = stage.streaming(json!({})).await;
    let before = stage.document().await;
    let wrong = json!([{"name": "users"}, {"name": "people", "target": {"name": "users"}}]);
    stage.patch::<Mirror>("orders", json!({"spec": {"tables": wrong}})).await;
    eventually(10, "stalled", async || stage.condition("orders", "Stalled").await == ("True".into(), "DuplicateTarget".into())).await;
    stage.until("orders", "True", "Streaming").await;
    assert_eq!(stage.status("orders").await.observed_generation, Some(2), "at once, not at the end");
    assert_eq!(stage.document().await, before);
    // Even so it can be stopped.
    stage.patch::<Mirror>("orders", json!({"spec": {"suspend": true}})).await;
    stage.until("orders", "True", "Suspended").await;
    assert!(
        worker.pushed().last().is_some_and(|pushed| pushed.suspend && Some(&pushed.tables) == before.as_ref().map(|before| &before.tables))
    );

    stage.patch::<Mirror>("orders", json!({"spec": {"suspend": null, "tables": [{"name": "users"}, {"name": "people"}]}})).await;
    stage.until("orders", "True", "Streaming").await;
    assert_eq!(stage.condition("orders", "Stalled").await.0, "False");
    assert_eq!(worker.pushed().last().and_then(|pushed| pushed.tables.as_ref().map(Vec::len)), Some(2));
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_worker_is_left_alone_when_its_source_is_in_trouble() {
    let stage = Stage::set().await;
    let worker = stage.streaming(json!({})).await;
    stage.patch::<Source>("shop", json!({"spec": {"host": "down"}})).await;
    eventually(10, "the Source knows", async || {
        let status = stage.get::<Source>("shop").await.and_then(|source| source.status).unwrap_or_default();
        status.conditions.iter().any(|condition| condition.type_ == "Ready" && condition.reason == "HostUnreachable")
    })
    .await;
    stage.look_again(1).await;
    assert!(worker.pushed().is_empty(), "an address that does not work is not passed on");
    stage.until("orders", "True", "Streaming").await;
    // A fail-over that works is.
    stage.patch::<Source>("shop", json!({"spec": {"host": "standby-db"}})).await;
    eventually(10, "the new address", async || worker.pushed().last().is_some_and(|pushed| pushed.source.host == "standby-db")).await;

    // Deleting what is in use waits, and says so.
    stage.delete::<Source>("shop").await;
    eventually(10, "stalled", async || stage.condition("orders", "Stalled").await == ("True".into(), "SourceDeleting".into())).await;
    stage.until("orders", "True", "Streaming").await;
    assert!(stage.get::<Source>("shop").await.is_some());
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hands_off_means_hands_off_until_deletion() {
    let stage = Stage::set().await;
    let worker = stage.streaming(json!({})).await;
    stage.patch::<Mirror>("orders", json!({"metadata": {"annotations": {PAUSE_RECONCILIATION: "true"}}})).await;
    eventually(10, "shown", async || stage.condition("orders", "Reconciling").await.1 == "ReconciliationPaused").await;
    let passes = stage.passes();
    stage.patch::<Mirror>("orders", json!({"spec": {"suspend": true}})).await;
    stage.delete::<Deployment>("orders-worker").await;
    eventually(10, "looked at", async || stage.passes() > passes).await;
    assert!(worker.pushed().is_empty() && stage.is_gone::<Deployment>("orders-worker").await);
    stage.delete::<Mirror>("orders").await;
    eventually(10, "deletion is honoured", async || stage.is_gone::<Mirror>("orders").await).await;
    assert_eq!(stage.databases.slots().len(), 1);
    stage.end().await;
}
