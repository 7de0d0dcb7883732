//! All the ways out.

use crate::stage::Stage;
use crate::support::eventually;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::ResourceExt as _;
use serde_json::json;
use sluice::resources::names::{FORCE_DELETE, IN_USE_FINALIZER, default_slot_name};
use sluice::resources::{Mirror, Source};
use std::sync::atomic::Ordering;

#[tokio::test(flavor = "multi_thread")]
async fn deletion_drops_the_slot_and_lets_go() {
    let stage = Stage::set().await;
    let _worker = stage.streaming(json!({"publicationName": "of_shop"})).await;
    let slot = default_slot_name(&stage.get::<Mirror>("orders").await.expect("the Mirror").uid().expect("a uid"));
    stage.delete::<Mirror>("orders").await;
    eventually(20, "the Mirror is gone", async || stage.is_gone::<Mirror>("orders").await).await;
    assert!(stage.is_gone::<Deployment>("orders-worker").await && stage.is_gone::<Pod>("orders-worker-0").await, "the worker went first");
    {
        let dropped = stage.databases.dropped.lock().expect("no panic");
        let [(endpoint, leftovers)] = dropped.as_slice() else { panic!("one clean-up, not {}", dropped.len()) };
        assert_eq!((endpoint.host.as_str(), endpoint.password.0.as_str()), ("source-db", "of source-login"));
        assert_eq!(
            (leftovers.slot.as_str(), leftovers.drop_slot, leftovers.publication.as_deref()),
            (slot.as_str(), true, Some("of_shop"))
        );
        assert_eq!(*stage.databases.forgotten.lock().expect("no panic"), [("target-db".to_owned(), slot)]);
    }
    let free = async || {
        let source = stage.get::<Source>("shop").await.expect("the Source");
        let secret = stage.get::<Secret>("source-login").await.expect("the Secret");
        source.finalizers().is_empty() && secret.finalizers().is_empty()
    };
    eventually(20, "Source and Secret are free", free).await;

    // Another Mirror takes them up again.
    stage.mirror("orders", json!({})).await;
    eventually(20, "Source and Secret are held", async || !free().await && stage.get::<Deployment>("orders-worker").await.is_some()).await;
    let secret = stage.get::<Secret>("source-login").await.expect("the Secret");
    assert_eq!(secret.finalizers(), [IN_USE_FINALIZER]);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_to_stay_stays() {
    let stage = Stage::set().await;
    stage.with_worker(json!({"deletionPolicy": {"slot": "Retain", "publication": "Retain"}})).await;
    stage.databases.broken.store(true, Ordering::SeqCst);
    stage.delete::<Mirror>("orders").await;
    eventually(20, "the Mirror is gone", async || stage.is_gone::<Mirror>("orders").await).await;
    assert!(stage.is_gone::<Deployment>("orders-worker").await);
    assert!(stage.databases.slots().is_empty() && stage.databases.forgotten.lock().expect("no panic").is_empty());
    assert_eq!(stage.counted("sluice_operator_orphaned_slots"), 0);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_source_is_shown_and_tried_again() {
    let stage = Stage::set().await;
    stage.with_worker(json!({})).await;
    stage.databases.broken.store(true, Ordering::SeqCst);
    stage.delete::<Mirror>("orders").await;
    stage.until("orders", "False", "CleanupFailed").await;
    let status = stage.status("orders").await;
    assert!(status.phase.as_deref() == Some("Deleting") && status.last_error.is_some_and(|error| error.contains("no route")));
    stage.databases.broken.store(false, Ordering::SeqCst);
    eventually(20, "the Mirror is gone", async || stage.is_gone::<Mirror>("orders").await).await;
    assert_eq!(stage.databases.slots().len(), 1);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn force_skips_the_clean_up_and_leaves_a_note() {
    let stage = Stage::set().await;
    stage.with_worker(json!({"slotName": "of_orders"})).await;
    stage.databases.broken.store(true, Ordering::SeqCst);
    stage.delete::<Mirror>("orders").await;
    stage.until("orders", "False", "CleanupFailed").await;
    stage.patch::<Mirror>("orders", json!({"metadata": {"annotations": {FORCE_DELETE: "true"}}})).await;
    eventually(10, "the Mirror is gone", async || stage.is_gone::<Mirror>("orders").await).await;
    let notes = stage.notes_at_home("CleanupSkipped").await;
    assert!(
        notes.len() == 1 && notes[0].contains("SELECT pg_drop_replication_slot('of_orders')") && notes[0].contains("source-db"),
        "{notes:?}"
    );
    assert_eq!(stage.counted("sluice_operator_orphaned_slots"), 1);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bound_lets_go_and_leaves_a_note() {
    // As if the time were over already.
    let stage = Stage::set_with(|options| options.clean_up_minutes = 0).await;
    stage.with_worker(json!({"slotName": "of_orders"})).await;
    stage.databases.broken.store(true, Ordering::SeqCst);
    stage.delete::<Mirror>("orders").await;
    eventually(10, "the Mirror is gone", async || stage.is_gone::<Mirror>("orders").await).await;
    let notes = stage.notes_at_home("SlotOrphaned").await;
    assert!(notes.len() == 1 && notes[0].contains("SELECT pg_drop_replication_slot('of_orders')"), "{notes:?}");
    assert_eq!(stage.counted("sluice_operator_orphaned_slots"), 1);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_the_namespace_leaves_no_slot_even_with_a_restart_in_between() {
    let mut stage = Stage::set().await;
    let worker = stage.streaming(json!({})).await;
    stage.databases.broken.store(true, Ordering::SeqCst);
    stage.delete_namespace().await;
    stage.until("orders", "False", "CleanupFailed").await;
    drop(worker);
    // What the next leader knows is what is still in the cluster: Source and Secret are held.
    stage.stop_operator().await;
    stage.databases.broken.store(false, Ordering::SeqCst);
    stage.start_operator(|_| {}).await;
    eventually(20, "the Mirror is gone", async || stage.is_gone::<Mirror>("orders").await).await;
    {
        let dropped = stage.databases.dropped.lock().expect("no panic");
        assert!(dropped.len() == 1 && dropped[0].0.password.0 == "of source-login");
    }
    eventually(30, "the namespace is gone", async || stage.namespace_is_gone().await).await;
    stage.end().await;
}
