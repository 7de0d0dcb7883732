//! What must not be lost, left behind or waited for in vain.

use crate::stage::Stage;
use crate::support::eventually;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::ResourceExt as _;
use serde_json::json;
use sluice::engine::retention::{Action, Budget};
use sluice::resources::conditions::kind;
use sluice::resources::names::{IN_USE_FINALIZER, MIRROR_FINALIZER};
use sluice::resources::{Mirror, Source};

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_belongs_to_one_mirror() {
    let stage = Stage::set().await;
    stage.with_worker(json!({"slotName": "mine"})).await;
    // As when a manifest is copied.
    let copy = json!({"slotName": "mine", "tables": [{"name": "users", "target": {"name": "copy"}}]});
    stage.mirror("copy", copy).await;
    stage.until("copy", "False", "InvalidSpec").await;
    assert_eq!(stage.condition("copy", kind::STALLED).await.0, "True");
    assert!(stage.is_gone::<Deployment>("copy-worker").await, "it has no worker");
    let set_up =
        async |name: &str| stage.get::<Mirror>(name).await.is_some_and(|mirror| mirror.finalizers().contains(&MIRROR_FINALIZER.to_owned()));
    assert!(set_up("orders").await && !set_up("copy").await);

    stage.delete::<Mirror>("copy").await;
    eventually(20, "the copy is gone", async || stage.is_gone::<Mirror>("copy").await).await;
    assert!(stage.databases.slots().is_empty(), "the other one's slot stays");

    // Whoever waits for a slot has it as soon as the other one is gone, not at its own slow pace.
    stage.mirror("heir", json!({"slotName": "mine"})).await;
    stage.until("heir", "False", "InvalidSpec").await;
    stage.delete::<Mirror>("orders").await;
    eventually(20, "the Mirror is gone", async || stage.is_gone::<Mirror>("orders").await).await;
    assert_eq!(stage.databases.slots(), ["mine"]);
    eventually(10, "the heir is set up", async || set_up("heir").await && stage.get::<Deployment>("heir-worker").await.is_some()).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_is_lost_while_suspended_is_told_at_once() {
    let stage = Stage::set().await;
    let worker = stage.streaming(json!({})).await;
    stage.patch::<Mirror>("orders", json!({"spec": {"suspend": true}})).await;
    stage.until("orders", "True", "Suspended").await;
    // As a worker says it that looks at the slot while it rests.
    let kept = json!({"slotExists": true, "walStatus": "lost"});
    worker.says(json!({"retention": kept, "notice": {"reason": "SlotLost", "message": "delete the Mirror and create it again"}}));
    stage.until("orders", "False", "SlotLost").await;
    let retention = stage.status("orders").await.retention.expect("what is kept");
    assert_eq!((retention.wal_status.as_deref(), retention.retained_bytes), (Some("lost"), None));
    assert_eq!(stage.condition("orders", kind::STALLED).await, ("True".into(), "SlotLost".into()));
    assert_eq!(stage.condition("orders", kind::SUSPENDED).await.0, "True");
    assert_eq!(stage.status("orders").await.last_error.as_deref(), Some("SlotLost: delete the Mirror and create it again"));
    // Dropped by somebody: the worker sees only that there is none.
    worker.says(json!({"retention": {"slotExists": false}}));
    stage.until("orders", "False", "SlotMissing").await;
    assert_eq!(stage.condition("orders", kind::STALLED).await, ("True".into(), "SlotMissing".into()));
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_keeps_the_budget_of_a_worker_that_does_not_answer() {
    const GIB: i64 = 1 << 30;
    let stage = Stage::set().await;
    let worker = stage.streaming(json!({"slotName": "mine", "walBudget": {"maxBytes": GIB, "action": "DropSlot"}})).await;
    assert!(stage.databases.watched.lock().unwrap().is_empty(), "the worker looks by itself");
    worker.is_down(true);
    stage.until("orders", "False", "WorkerUnreachable").await;
    eventually(20, "the source is looked at", async || !stage.databases.watched.lock().unwrap().is_empty()).await;
    let seen = stage.databases.watched.lock().unwrap().last().cloned().expect("a look");
    assert_eq!((seen.slot.as_str(), seen.publication.is_empty()), ("mine", false));
    assert_eq!(seen.budget, Budget { warn: None, max: Some(1 << 30), action: Action::DropSlot });
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_given_up_without_a_try() {
    let mut stage = Stage::set().await;
    stage.with_worker(json!({"slotName": "mine"})).await;
    stage.stop_operator().await;
    stage.delete::<Mirror>("orders").await;
    // The bound has passed before an operator is there again.
    stage.start_operator(|options| options.clean_up_minutes = 0).await;
    eventually(20, "the Mirror is gone", async || stage.is_gone::<Mirror>("orders").await).await;
    assert_eq!(stage.databases.slots(), ["mine"]);
    assert_eq!(stage.counted("sluice_operator_orphaned_slots"), 0);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_that_was_replaced_while_no_operator_was_there_is_free() {
    let mut stage = Stage::set().await;
    stage.with_worker(json!({})).await;
    let held =
        async |name: &str| stage.get::<Secret>(name).await.is_some_and(|secret| secret.finalizers().contains(&IN_USE_FINALIZER.to_owned()));
    let protected = async || stage.get::<Source>("shop").await.and_then(|source| source.status).unwrap_or_default().protected_secrets;
    eventually(20, "the Source says what is kept for it", async || protected().await == ["source-login"]).await;
    assert!(held("source-login").await);

    stage.stop_operator().await;
    stage.create::<Secret>(json!({"metadata": {"name": "newer"}, "stringData": {"username": "u", "password": "p"}})).await;
    stage.patch::<Source>("shop", json!({"spec": {"credentialsRef": {"name": "newer"}}})).await;
    stage.start_operator(|_| {}).await;
    let held =
        async |name: &str| stage.get::<Secret>(name).await.is_some_and(|secret| secret.finalizers().contains(&IN_USE_FINALIZER.to_owned()));
    eventually(20, "the old Secret is free and the new one is kept", async || !held("source-login").await && held("newer").await).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_network_policy_goes_with_the_last_mirror() {
    let stage = Stage::set().await;
    stage.with_worker(json!({})).await;
    stage.mirror("users", json!({"tables": [{"name": "users", "target": {"name": "copy"}}]})).await;
    eventually(20, "a second worker", async || stage.get::<Deployment>("users-worker").await.is_some()).await;
    assert!(stage.get::<NetworkPolicy>("sluice-workers").await.is_some());
    stage.delete::<Mirror>("orders").await;
    eventually(20, "one Mirror is gone", async || stage.is_gone::<Mirror>("orders").await).await;
    assert!(stage.get::<NetworkPolicy>("sluice-workers").await.is_some(), "the other one's worker needs it");
    stage.delete::<Mirror>("users").await;
    eventually(20, "the last Mirror is gone", async || stage.is_gone::<Mirror>("users").await).await;
    assert!(stage.is_gone::<NetworkPolicy>("sluice-workers").await);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_applied_together_may_arrive_in_any_order() {
    let stage = Stage::set().await;
    stage.mirror("orders", json!({})).await;
    stage.until("orders", "False", "SourceNotFound").await;
    assert_eq!(stage.condition("orders", kind::STALLED).await.0, "False", "it may be on its way");
    assert_eq!(stage.condition("orders", kind::RECONCILING).await.0, "True");
    stage.source(json!({"credentialsRef": {"name": "late-login"}})).await;
    stage.target().await;
    stage.until("orders", "False", "SecretNotFound").await;
    assert_eq!(stage.condition("orders", kind::STALLED).await.0, "False", "it may be on its way, too");
    stage.create::<Secret>(json!({"metadata": {"name": "late-login"}, "stringData": {"username": "u", "password": "p"}})).await;
    eventually(20, "the worker is made", async || stage.get::<Deployment>("orders-worker").await.is_some()).await;
    stage.end().await;
}
