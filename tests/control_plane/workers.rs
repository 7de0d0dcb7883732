//! Children, hot changes, restarts and upgrades.

use crate::stage::{Kind, Stage};
use crate::support::eventually;
use k8s_openapi::ByteString;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use sluice::resources::names::{IN_USE_FINALIZER, MIRROR_FINALIZER, RESTART_HASH, TOUCHED};
use sluice::resources::{Mirror, Source, Target};
use std::time::{Duration, Instant};

fn template(deployment: &Deployment) -> Value {
    serde_json::to_value(&deployment.spec.as_ref().expect("a spec").template).expect("JSON")
}

fn image(deployment: &Deployment) -> String {
    template(deployment)["spec"]["containers"][0]["image"].as_str().expect("an image").to_owned()
}

async fn holds<K: Kind>(stage: &Stage, name: &str, finalizer: &str) -> bool {
    stage.get::<K>(name).await.is_some_and(|object| object.finalizers().iter().any(|held| held == finalizer))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_gets_what_is_planned_and_shows_what_its_worker_says() {
    let stage = Stage::set().await;
    let mirror = stage.with_worker(json!({})).await;
    let deployment = stage.get::<Deployment>("orders-worker").await.expect("the Deployment");
    let owner = &deployment.owner_references()[0];
    assert_eq!((owner.kind.as_str(), Some(&owner.uid)), ("Mirror", mirror.metadata.uid.as_ref()));
    assert_eq!(image(&deployment), "sluice:1");
    assert!(template(&deployment)["metadata"]["annotations"][RESTART_HASH].is_string());
    let document = stage.document().await.expect("a document");
    assert_eq!((document.source.host.as_str(), document.target.host.as_str(), document.generation), ("source-db", "target-db", 1));
    assert!(stage.get::<NetworkPolicy>("sluice-workers").await.is_some_and(|policy| policy.owner_references().is_empty()));

    // All that deletion needs is held before anything can be made outside.
    assert!(holds::<Mirror>(&stage, "orders", MIRROR_FINALIZER).await);
    assert!(holds::<Source>(&stage, "shop", IN_USE_FINALIZER).await && holds::<Target>(&stage, "dw", IN_USE_FINALIZER).await);
    assert!(
        holds::<Secret>(&stage, "source-login", IN_USE_FINALIZER).await && holds::<Secret>(&stage, "target-login", IN_USE_FINALIZER).await
    );

    stage.until("orders", "False", "WorkerStarting").await;
    assert_eq!(stage.status("orders").await.phase.as_deref(), Some("Pending"));
    let copying = json!({"phase": "Copying", "streaming": false, "snapshotCompleted": false, "tables": {"Copying": 1, "Ready": 1}});
    let worker = stage.run_worker(&mirror, copying).await;
    stage.until("orders", "False", "Copying").await;
    assert_eq!(stage.status("orders").await.tables.expect("tables").summary.as_deref(), Some("1/2"));
    // A failure that needs a human, and its end.
    worker.says(json!({"phase": "Stopped", "streaming": false,
        "error": {"class": "Stop", "reason": "PrivilegeMissing", "message": "no right to read public.users", "count": 1}}));
    stage.until("orders", "False", "PrivilegeMissing").await;
    assert_eq!(stage.condition("orders", "Stalled").await, ("True".into(), "PrivilegeMissing".into()));
    worker.says(json!({}));
    // Whoever is told something is asked at once.
    stage.patch::<Mirror>("orders", json!({"spec": {"stream": {"maxBatchRows": 7}}})).await;
    stage.until("orders", "True", "Streaming").await;
    assert_eq!(worker.pushed().last().map(|pushed| pushed.stream.max_batch_rows), Some(7));

    let status = stage.status("orders").await;
    let running = status.worker.expect("a worker");
    assert_eq!(running.address, Some(format!("127.0.0.1:{}", worker.port)));
    assert_eq!((running.pod.as_deref(), running.image.as_deref(), running.epoch), (Some("orders-worker-0"), Some("sluice:test"), Some(1)));
    assert_eq!((status.rows_copied, status.lag.as_deref(), status.observed_generation), (Some(7), Some("0 B, 0s"), Some(2)));
    assert_eq!(status.tables.expect("tables").summary.as_deref(), Some("1/1"));
    assert_eq!(status.last_error, None);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn suspend_reaches_the_worker_within_a_second() {
    let stage = Stage::set().await;
    let worker = stage.streaming(json!({})).await;
    let before = stage.get::<Deployment>("orders-worker").await.expect("the Deployment").resource_version();
    for (suspend, reason) in [(true, "Suspended"), (false, "Streaming")] {
        let pushes = worker.pushed().len();
        stage.patch::<Mirror>("orders", json!({"spec": {"suspend": suspend}})).await;
        let begin = Instant::now();
        eventually(10, "a push", async || worker.pushed().len() > pushes).await;
        assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
        let pushed = worker.pushed().pop().expect("a push");
        assert_eq!(pushed.suspend, suspend);
        assert_eq!(stage.document().await, Some(pushed.clone()), "file and call are the same");
        eventually(5, "the pod is touched", async || {
            let pod = stage.get::<Pod>("orders-worker-0").await.expect("the pod");
            pod.annotations().get(TOUCHED) == Some(&pushed.generation.to_string())
        })
        .await;
        stage.until("orders", "True", reason).await;
        assert_eq!(stage.condition("orders", "Suspended").await.0, if suspend { "True" } else { "False" });
        assert_eq!(stage.condition("orders", "Streaming").await.0, if suspend { "False" } else { "True" });
        eventually(10, "settled", async || stage.condition("orders", "Reconciling").await.0 == "False").await;
    }
    let after = stage.get::<Deployment>("orders-worker").await.expect("the Deployment").resource_version();
    assert_eq!(before, after, "no restart");
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_of_the_operator_restarts_nothing() {
    let mut stage = Stage::set().await;
    let worker = stage.streaming(json!({})).await;
    let before = stage.get::<Deployment>("orders-worker").await.expect("the Deployment");
    stage.stop_operator().await;
    stage
        .start_operator(|options| {
            options.worker_image = "sluice:2".into();
            options.worker_image_pull_policy = "Always".into();
            options.release = "2.0.0".into();
        })
        .await;
    eventually(10, "a pass", async || stage.passes() > 0).await;
    stage.look_again(1).await;
    assert_eq!(stage.get::<Deployment>("orders-worker").await, Some(before.clone()));
    assert!(worker.pushed().is_empty());

    // The next restart for another reason takes the new release.
    let resources = json!({"requests": {"cpu": "200m"}, "limits": {"memory": "1Gi"}});
    stage.patch::<Mirror>("orders", json!({"spec": {"worker": {"resources": resources}}})).await;
    eventually(10, "the new template", async || {
        image(&stage.get::<Deployment>("orders-worker").await.expect("the Deployment")) == "sluice:2"
    })
    .await;
    let after = stage.get::<Deployment>("orders-worker").await.expect("the Deployment");
    assert_eq!(after.metadata.generation, before.metadata.generation.map(|generation| generation + 1), "one change of the template");
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resume_takes_the_new_release_and_immediate_does_not_wait() {
    let mut stage = Stage::set().await;
    let mirror = stage.with_worker(json!({"suspend": true})).await;
    let _worker = stage.run_worker(&mirror, json!({})).await;
    stage.until("orders", "True", "Suspended").await;
    let at = async |stage: &Stage| image(&stage.get::<Deployment>("orders-worker").await.expect("the Deployment"));
    stage.stop_operator().await;
    stage.start_operator(|options| options.worker_image = "sluice:2".into()).await;
    eventually(10, "a pass", async || stage.passes() > 0).await;
    assert_eq!(at(&stage).await, "sluice:1");
    stage.patch::<Mirror>("orders", json!({"spec": {"suspend": null}})).await;
    eventually(10, "the new image", async || at(&stage).await == "sluice:2").await;

    stage.stop_operator().await;
    stage.start_operator(|options| options.worker_image = "sluice:3".into()).await;
    eventually(10, "a pass", async || stage.passes() > 0).await;
    assert_eq!(at(&stage).await, "sluice:2");
    stage.patch::<Mirror>("orders", json!({"spec": {"worker": {"updatePolicy": "Immediate"}}})).await;
    eventually(10, "the new image", async || at(&stage).await == "sluice:3").await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn passes_without_a_change_read_and_write_nothing() {
    let stage = Stage::set().await;
    let worker = stage.streaming(json!({})).await;
    let seen = async || {
        let mut versions = vec![
            stage.get::<Mirror>("orders").await.expect("the Mirror").resource_version(),
            stage.get::<ConfigMap>("orders-worker").await.expect("the ConfigMap").resource_version(),
            stage.get::<Deployment>("orders-worker").await.expect("the Deployment").resource_version(),
            stage.get::<NetworkPolicy>("sluice-workers").await.expect("the policy").resource_version(),
            stage.get::<Pod>("orders-worker-0").await.expect("the pod").resource_version(),
            stage.get::<Target>("dw").await.expect("the Target").resource_version(),
        ];
        for name in ["source-login", "target-login"] {
            versions.push(stage.get::<Secret>(name).await.expect("the Secret").resource_version());
        }
        versions
    };
    // The first passes after a change may still have to say that they are done.
    stage.look_again(100).await;
    stage.look_again(101).await;
    let (before, writes) = (seen().await, stage.counted("sluice_operator_status_writes_total{kind=\"Mirror\""));
    let reads = stage.requests_with("verb=\"get");
    for mark in 0..10 {
        stage.look_again(mark).await;
    }
    assert_eq!(before, seen().await);
    assert_eq!(writes, stage.counted("sluice_operator_status_writes_total{kind=\"Mirror\""));
    assert_eq!(reads, stage.requests_with("verb=\"get"));
    assert!(reads > 0 && worker.pushed().is_empty());
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_one_table_of_a_thousand_reaches_the_worker() {
    let tables = |last: &str| {
        let named = (0..999).map(|number| format!("table_{number:03}")).chain([last.to_owned()]);
        named.map(|name| json!({"name": name})).collect::<Vec<_>>()
    };
    let stage = Stage::set().await;
    let worker = stage.streaming(json!({"tables": tables("before")})).await;
    stage.patch::<Mirror>("orders", json!({"spec": {"tables": tables("after")}})).await;
    eventually(10, "a push", async || !worker.pushed().is_empty()).await;
    let pushed = worker.pushed().pop().expect("a push");
    let names: Vec<_> = pushed.tables.iter().flatten().map(|table| table.name.as_str()).collect();
    assert_eq!((names.len(), names[0], names[999]), (1_000, "table_000", "after"));
    assert_eq!(stage.document().await, Some(pushed), "file and call are the same");
    // So it is when the operator has known another list before.
    stage.patch::<Mirror>("orders", json!({"spec": {"tables": tables("before")}})).await;
    let told =
        async || worker.pushed().last().and_then(|last| last.tables.as_ref()?.last().map(|table| table.name == "before")) == Some(true);
    eventually(10, "another push", told).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_that_somebody_has_deleted_is_made_again_for_a_worker_that_does_not_answer() {
    let stage = Stage::set().await;
    let worker = stage.streaming(json!({})).await;
    let before = stage.document().await.expect("a document");
    stage.look_again(1).await;
    stage.delete::<ConfigMap>("orders-worker").await;
    worker.is_down(true);
    eventually(20, "the document is back", async || stage.document().await.is_some_and(|again| again.tables == before.tables)).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_ends_again_and_again_is_stalled_until_it_stays() {
    let stage = Stage::set().await;
    let worker = stage.streaming(json!({})).await;
    let api = stage.api::<Pod>();
    let kubelet_says = async |restarts: i32, ready: bool, state: Value| {
        let ended = Time(Timestamp::now());
        let status = json!({"status": {"conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}], "containerStatuses": [{
            "name": "worker", "image": "sluice:test", "imageID": "", "ready": ready, "restartCount": restarts, "state": state,
            "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137, "startedAt": ended, "finishedAt": ended}},
        }]}});
        api.patch_status("orders-worker-0", &PatchParams::default(), &Patch::Merge(status)).await.expect("patched");
    };
    let back_off = || json!({"waiting": {"reason": "CrashLoopBackOff"}});
    worker.is_down(true);
    kubelet_says(4, false, back_off()).await;
    stage.until("orders", "False", "WorkerFailed").await;
    assert_eq!(stage.condition("orders", "Stalled").await.0, "False", "it may be a bad moment");

    kubelet_says(5, false, back_off()).await;
    stage.until("orders", "False", "WorkerCrashLooping").await;
    let stalled = ("True".to_owned(), "WorkerCrashLooping".to_owned());
    assert_eq!(stage.condition("orders", "Stalled").await, stalled);
    assert_eq!(stage.condition("orders", "Reconciling").await.0, "False");
    let error = stage.status("orders").await.last_error.expect("an error");
    assert!(error.contains("memory") && error.contains("5 times") && error.contains("kubectl logs --previous"), "{error}");
    // One more start is no recovery.
    let passes = stage.passes();
    kubelet_says(5, false, json!({"running": {}})).await;
    eventually(10, "another pass", async || stage.passes() > passes).await;
    assert_eq!(stage.condition("orders", "Stalled").await, stalled);

    worker.is_down(false);
    kubelet_says(5, true, json!({"running": {}})).await;
    stage.until("orders", "True", "Streaming").await;
    assert_eq!(stage.condition("orders", "Stalled").await.0, "False");
    assert_eq!(stage.status("orders").await.last_error, None);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_never_starts_is_stalled_until_its_image_is_corrected() {
    let mut stage = Stage::set_with(|options| options.worker_image = "sluice:typo".into()).await;
    let mirror = stage.with_worker(json!({})).await;
    drop(stage.run_worker(&mirror, json!({})).await);
    // As the kubelet says it, four minutes ago.
    let since = Timestamp::now() - Duration::from_secs(240);
    let pulls = |since: Timestamp| {
        json!({"status": {
            "phase": "Pending", "conditions": [{"type": "Ready", "status": "False", "lastTransitionTime": Time(since)}],
            "containerStatuses": [{"name": "worker", "image": "sluice:typo", "imageID": "", "ready": false, "restartCount": 0,
                "state": {"waiting": {"reason": "ImagePullBackOff", "message": "sluice:typo: not found"}}}],
        }})
    };
    let api = stage.api::<Pod>();
    let kubelet_says = async |status: Value| {
        api.patch_status("orders-worker-0", &PatchParams::default(), &Patch::Merge(status)).await.expect("patched");
    };
    kubelet_says(pulls(Timestamp::now())).await;
    stage.until("orders", "False", "WorkerFailed").await;
    assert_eq!(stage.condition("orders", "Stalled").await.0, "False", "a registry may have a bad minute");
    kubelet_says(pulls(since)).await;
    stage.until("orders", "False", "WorkerCannotStart").await;
    assert_eq!(stage.condition("orders", "Stalled").await, ("True".into(), "WorkerCannotStart".into()));
    assert_eq!(stage.condition("orders", "Reconciling").await.0, "False");
    let error = stage.status("orders").await.last_error.expect("an error");
    assert!(error.contains("sluice:typo: not found") && error.contains("correct the image"), "{error}");

    // The release is corrected; the Deployment of a worker that runs would be left alone.
    stage.stop_operator().await;
    stage.start_operator(|options| options.worker_image = "sluice:2".into()).await;
    let is_corrected = async || stage.get::<Deployment>("orders-worker").await.is_some_and(|deployment| image(&deployment) == "sluice:2");
    eventually(20, "the new image", is_corrected).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signing_key_is_rotated_without_a_restart_and_without_a_gap() {
    let stage = Stage::set().await;
    let worker = stage.streaming(json!({})).await;
    let keys = async || stage.document().await.expect("a document").public_keys;
    let old = keys().await;
    assert_eq!(old.len(), 1);
    // As the book says.
    let made = std::process::Command::new("openssl").args(["genpkey", "-algorithm", "ed25519", "-outform", "DER"]).output();
    let next = ByteString(made.expect("openssl runs").stdout);
    stage.patch_signing_key(json!({"next.pk8": next})).await;
    let knows_both = async || worker.pushed().last().is_some_and(|pushed| pushed.public_keys.len() == 2);
    eventually(20, "the worker knows both keys", knows_both).await;
    let both = keys().await;
    assert_eq!(both[0], old[0]);

    stage.patch_signing_key(json!({"ed25519.pk8": next, "next.pk8": null})).await;
    let knows_new = async || worker.pushed().last().is_some_and(|pushed| pushed.public_keys == both[1..]);
    eventually(20, "the worker knows the new key only", knows_new).await;
    // It is the key that signs.
    stage.patch::<Mirror>("orders", json!({"spec": {"suspend": true}})).await;
    stage.until("orders", "True", "Suspended").await;
    assert!(worker.pushed().last().is_some_and(|pushed| pushed.suspend));
    let polls = |result: &str| stage.counted(&format!("sluice_operator_poll_total{{result=\"{result}\""));
    assert!(polls("ok") > 0 && polls("WorkerUnauthorized") == 0, "no call was refused");
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_ours_is_not_touched() {
    let stage = Stage::set().await;
    let theirs = json!({
        "metadata": {"name": "orders-worker"},
        "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}},
    });
    let theirs: Deployment = stage.create(theirs).await;
    stage.source(json!({})).await;
    stage.target().await;
    stage.mirror("orders", json!({})).await;
    stage.until("orders", "False", "InvalidSpec").await;
    assert_eq!(stage.get::<Deployment>("orders-worker").await, Some(theirs));
    // So is what the API server refuses.
    stage.mirror("other", json!({"worker": {"nodeSelector": {"not a label": "x"}}})).await;
    stage.until("other", "False", "InvalidSpec").await;
    assert_eq!(stage.condition("other", "Stalled").await.0, "True");
    stage.end().await;
}
