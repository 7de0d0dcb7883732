//! One-off actions: from the spec to the worker, from the worker to status and events.

use crate::stage::Stage;
use crate::support::eventually;
use k8s_openapi::api::events::v1::Event;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::{Value, json};
use sluice::resources::Mirror;

fn record(id: &str, action: &str, state: &str) -> Value {
    json!({"id": id, "action": action, "state": state, "startedAt": "2026-01-01T00:00:00.5Z",
        "finishedAt": (state != "Running").then_some("2026-01-01T00:01:00Z"), "message": "what was done"})
}

/// The request's id and state, then those before it.
async fn shown(stage: &Stage) -> Vec<String> {
    let status = stage.status("orders").await;
    status.request.iter().chain(&status.request_history).map(|known| format!("{} {}", known.id, known.state)).collect()
}

async fn until(stage: &Stage, expected: &[&str]) {
    eventually(20, &format!("{expected:?}"), async || shown(stage).await == expected).await;
}

async fn events(stage: &Stage) -> Vec<String> {
    let events = stage.api::<Event>().list(&ListParams::default()).await.expect("events");
    let mut reasons: Vec<String> =
        events.into_iter().filter_map(|event| event.reason).filter(|reason| reason.starts_with("Request")).collect();
    reasons.sort();
    reasons
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_reaches_the_worker_and_its_outcome_the_status() {
    let stage = Stage::set().await;
    let worker = stage.streaming(json!({})).await;
    stage.patch::<Mirror>("orders", json!({"spec": {"request": {"id": "r1", "action": "Resync", "tables": ["public.users"]}}})).await;
    eventually(10, "the push", async || worker.pushed().last().is_some_and(|pushed| pushed.request.is_some())).await;
    let pushed = worker.pushed().pop().and_then(|pushed| pushed.request).expect("a request");
    assert_eq!((pushed.id.as_str(), pushed.action.as_str(), pushed.tables), ("r1", "Resync", vec!["public.users".to_owned()]));
    until(&stage, &["r1 Pending"]).await;

    let changed = Patch::Merge(json!({"spec": {"request": {"action": "Retry", "tables": null}}}));
    let refused = stage.api::<Mirror>().patch("orders", &PatchParams::default(), &changed).await;
    let error = refused.expect_err("it is immutable").to_string();
    assert!(error.contains("a request cannot be changed: give it another id"), "{error}");

    // A session begins, and Ready stays as it was.
    worker.says(json!({"phase": "Copying", "streaming": false, "requests": [record("r1", "Resync", "Running")]}));
    until(&stage, &["r1 Running"]).await;
    assert_eq!(stage.condition("orders", "Ready").await, ("True".into(), "Streaming".into()));
    assert_eq!(stage.condition("orders", "Streaming").await.0, "False");
    worker.says(json!({"requests": [record("r1", "Resync", "Succeeded")]}));
    until(&stage, &["r1 Succeeded"]).await;
    let status = stage.status("orders").await.request.expect("the request");
    assert!(status.started_at.is_some() && status.finished_at.is_some(), "{status:?}");
    assert_eq!(status.message.as_deref(), Some("what was done"));
    eventually(10, "events", async || events(&stage).await == ["RequestSucceeded", "RequestTaken"]).await;

    stage.patch::<Mirror>("orders", json!({"spec": {"request": null}})).await;
    eventually(10, "a document without it", async || worker.pushed().last().is_some_and(|pushed| pushed.request.is_none())).await;
    until(&stage, &["r1 Succeeded"]).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_status_comes_back_from_the_worker() {
    let stage = Stage::set().await;
    let worker = stage.streaming(json!({"request": {"id": "r1", "action": "Retry"}})).await;
    worker.says(json!({"requests": [record("r1", "Retry", "Skipped"), record("r0", "Resync", "Failed")]}));
    until(&stage, &["r1 Skipped", "r0 Failed"]).await;
    let lost = json!({"status": {"request": null, "requestHistory": null}});
    stage.api::<Mirror>().patch_status("orders", &PatchParams::default(), &Patch::Merge(lost)).await.expect("a status without it");
    stage.patch::<Mirror>("orders", json!({"spec": {"stream": {"maxBatchRows": 7}}})).await;
    until(&stage, &["r1 Skipped", "r0 Failed"]).await;
    assert!(events(&stage).await.iter().all(|reason| reason == "RequestSkipped"), "nothing far back is told again");
    stage.end().await;
}
