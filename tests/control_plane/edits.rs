//! What somebody changes by hand in what the operator makes.

use crate::stage::Stage;
use crate::support::eventually;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::ResourceExt as _;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use sluice::worker::contract::Desired;

/// Seconds in which what somebody has edited is as it was.
const PUT_RIGHT: u64 = 10;

fn spec(deployment: &Deployment) -> Value {
    serde_json::to_value(&deployment.spec).expect("JSON")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_config_map_that_somebody_edits_under_a_healthy_worker_is_put_right() {
    let stage = Stage::set().await;
    let worker = stage.streaming(json!({})).await;
    let before = stage.document().await.expect("a document");
    let text = async || stage.get::<ConfigMap>("orders-worker").await.and_then(|map| map.data?.remove("desired.json")).expect("a document");
    stage.look_again(1).await;
    stage.look_again(2).await;

    // A setting of the running worker, as `kubectl edit` changes it.
    let mut edited = before.clone();
    edited.stream.max_batch_rows = 7;
    edited.suspend = true;
    stage.patch::<ConfigMap>("orders-worker", json!({"data": {"desired.json": serde_json::to_string(&edited).expect("JSON")}})).await;
    eventually(PUT_RIGHT, "the document is as it was", async || {
        stage.document().await.is_some_and(|now| now == Desired { generation: now.generation, ..before.clone() })
    })
    .await;
    let after = stage.document().await.expect("a document");
    assert!(after.generation > before.generation, "a worker that has read the edited one takes it");
    eventually(PUT_RIGHT, "the worker is told", async || worker.pushed().last() == Some(&after)).await;

    // What can't be read, what says the same in other words, and what makes the operator's own watch lose sight of it.
    let right = text().await;
    for edited in ["nonsense".to_owned(), format!("{right}\n")] {
        stage.patch::<ConfigMap>("orders-worker", json!({"data": {"desired.json": edited}})).await;
        eventually(PUT_RIGHT, "the document can be read", async || {
            stage.document().await.is_some_and(|now| now.tables == before.tables) && text().await != edited
        })
        .await;
    }
    stage.patch::<ConfigMap>("orders-worker", json!({"metadata": {"labels": {"app.kubernetes.io/managed-by": null}}})).await;
    let is_labelled =
        async || stage.get::<ConfigMap>("orders-worker").await.is_some_and(|map| map.labels().contains_key("app.kubernetes.io/managed-by"));
    eventually(PUT_RIGHT, "the label is back", is_labelled).await;

    // What others add is theirs, and writes nothing.
    stage.until("orders", "True", "Streaming").await;
    stage.look_again(3).await;
    let passes = stage.passes();
    stage.patch::<ConfigMap>("orders-worker", json!({"metadata": {"annotations": {"theirs": "stays"}}})).await;
    eventually(PUT_RIGHT, "another pass", async || stage.passes() > passes).await;
    let left = stage.get::<ConfigMap>("orders-worker").await.expect("the ConfigMap");
    stage.look_again(4).await;
    let map = stage.get::<ConfigMap>("orders-worker").await.expect("the ConfigMap");
    assert_eq!((map.annotations()["theirs"].as_str(), map.resource_version()), ("stays", left.resource_version()));
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deployment_that_somebody_edits_is_put_right() {
    let mut stage = Stage::set().await;
    let _worker = stage.streaming(json!({})).await;
    let deployment = async |stage: &Stage| stage.get::<Deployment>("orders-worker").await.expect("the Deployment");
    let before = spec(&deployment(&stage).await);
    let is_as_it_was = async |stage: &Stage| spec(&deployment(stage).await) == before;
    stage.look_again(1).await;
    let container = |more: Value| {
        let mut container = json!({"name": "worker"});
        container.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        json!({"spec": {"template": {"spec": {"containers": [container]}}}})
    };
    let edit = async |stage: &Stage, patch: Value| {
        stage.api::<Deployment>().patch("orders-worker", &PatchParams::default(), &Patch::Strategic(patch)).await.expect("patched");
    };
    for patch in [json!({"spec": {"replicas": 0}}), container(json!({"image": "sluice:theirs"})), container(json!({"livenessProbe": null}))]
    {
        edit(&stage, patch).await;
        eventually(PUT_RIGHT, "the Deployment is as it was", async || is_as_it_was(&stage).await).await;
    }
    // So it is when nobody was there to see it.
    stage.stop_operator().await;
    edit(&stage, json!({"spec": {"replicas": 2}})).await;
    stage.start_operator(|_| {}).await;
    eventually(PUT_RIGHT * 2, "the Deployment is as it was", async || is_as_it_was(&stage).await).await;
    stage.patch::<Deployment>("orders-worker", json!({"metadata": {"labels": {"app.kubernetes.io/component": null}}})).await;
    eventually(PUT_RIGHT, "the label is back", async || {
        deployment(&stage).await.labels().get("app.kubernetes.io/component").map(String::as_str) == Some("worker")
    })
    .await;

    // As `kubectl rollout restart` does it: what others add is theirs.
    edit(&stage, json!({"spec": {"template": {"metadata": {"annotations": {"kubectl.kubernetes.io/restartedAt": "now"}}}}})).await;
    let left = deployment(&stage).await;
    stage.look_again(2).await;
    stage.look_again(3).await;
    assert_eq!(deployment(&stage).await.resource_version(), left.resource_version());
    assert_eq!(spec(&left)["template"]["metadata"]["annotations"]["kubectl.kubernetes.io/restartedAt"], "now");
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_policy_that_somebody_edits_is_put_right() {
    let stage = Stage::set().await;
    let _worker = stage.streaming(json!({})).await;
    let policy = async || stage.get::<NetworkPolicy>("sluice-workers").await;
    let before = policy().await.expect("the policy").spec;
    stage.look_again(1).await;
    stage.patch::<NetworkPolicy>("sluice-workers", json!({"spec": {"ingress": [{}]}})).await;
    eventually(PUT_RIGHT, "the policy is as it was", async || policy().await.is_some_and(|policy| policy.spec == before)).await;
    stage.delete::<NetworkPolicy>("sluice-workers").await;
    eventually(PUT_RIGHT, "the policy is back", async || policy().await.is_some_and(|policy| policy.spec == before)).await;
    stage.end().await;
}
