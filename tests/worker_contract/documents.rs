//! Which desired document is in effect: mounted, pushed or kept.

use crate::pod::{Caller, Pod, Script, Worker};
use crate::support::eventually;
use reqwest::StatusCode;
use serde_json::json;
use sluice::engine::error::reason;
use sluice::worker::contract::{DESIRED_FILE, Phase};
use std::fs;

#[tokio::test]
async fn the_highest_generation_wins() {
    let pod = Pod::new();
    pod.mount(&pod.document(5));
    let script = Script::default();
    let worker = Worker::start(&pod, &script).await;
    let caller = Caller::new(worker.address, &pod.key);
    caller.phase_becomes(Phase::Starting).await;

    let (code, body) = caller.put(&pod.document(4)).await;
    assert_eq!((code, &body["code"]), (StatusCode::CONFLICT, &json!("OlderGeneration")));
    assert_eq!(caller.put(&pod.document(5)).await.0, StatusCode::NO_CONTENT);
    let (code, body) = caller.put(&pod.suspended(5)).await;
    assert_eq!((code, &body["code"]), (StatusCode::CONFLICT, &json!("SameGeneration")));
    let mut other = pod.document(9);
    other["mirror"]["uid"] = "another".into();
    let (code, body) = caller.put(&other).await;
    assert_eq!((code, &body["code"]), (StatusCode::CONFLICT, &json!("OtherMirror")));
    assert_eq!((caller.status().await.generation, script.count()), (5, 1));

    // Only the limits of the stream change: another session, not another process.
    let mut wider = pod.document(6);
    wider["stream"]["maxBatchRows"] = 7.into();
    assert_eq!(caller.put(&wider).await.0, StatusCode::NO_CONTENT);
    assert_eq!(pod.stored_generation(), Some(6), "stored before the answer");
    eventually(10, "another session", async || script.count() == 2).await;
    assert_eq!(script.begun.lock().unwrap().last().map(|begun| (begun.generation, begun.rows)), Some((6, 7)));

    // The mounted file comes later with the same, and then with more.
    pod.mount(&wider);
    pod.mount(&pod.document(8));
    caller.status_becomes("the mounted file is taken", |status| status.generation == 8).await;
    eventually(10, "another session", async || script.count() == 3).await;
    eventually(10, "the copy follows", async || pod.stored_generation() == Some(8)).await;

    // What can't be taken is told, and what works goes on.
    let mut unknown = pod.document(9);
    unknown["contract"] = 7.into();
    pod.mount(&unknown);
    let status = caller.status_becomes("the error is told", |status| status.error.is_some()).await;
    let error = status.error.unwrap();
    assert_eq!((error.class.as_str(), error.reason.as_str(), status.generation), ("Stop", reason::INVALID_SPEC, 8));
    assert!(error.message.contains("contract 7"), "{}", error.message);
    assert!(script.is_running());
    pod.mount(&pod.document(8));
    caller.status_becomes("the error has passed", |status| status.error.is_none()).await;
    assert_eq!(script.count(), 3);
    worker.end().await;
}

#[tokio::test]
async fn a_pause_outlives_a_crash_without_an_operator() {
    let pod = Pod::new();
    pod.mount(&pod.document(1));
    let worker = Worker::start(&pod, &Script::default()).await;
    let caller = Caller::new(worker.address, &pod.key);
    caller.phase_becomes(Phase::Starting).await;
    assert_eq!(caller.put(&pod.suspended(2)).await.0, StatusCode::NO_CONTENT);
    worker.exit.abort();
    let _ = worker.exit.await;

    // The mounted file is still the old one.
    let script = Script::default();
    let worker = Worker::start(&pod, &script).await;
    let caller = Caller::new(worker.address, &pod.key);
    let status = caller.phase_becomes(Phase::Suspended).await;
    assert_eq!((status.generation, script.count()), (2, 0));
    worker.end().await;

    // A newer mounted file wins over the copy; the copy of another Mirror is none.
    pod.mount(&pod.suspended(3));
    let worker = Worker::start(&pod, &script).await;
    let caller = Caller::new(worker.address, &pod.key);
    assert_eq!(caller.phase_becomes(Phase::Suspended).await.generation, 3);
    worker.end().await;
    let mut another = pod.document(99);
    another["mirror"]["uid"] = "another".into();
    fs::write(pod.path("state").join(DESIRED_FILE), another.to_string()).unwrap();
    let worker = Worker::start(&pod, &script).await;
    let caller = Caller::new(worker.address, &pod.key);
    assert_eq!(caller.phase_becomes(Phase::Suspended).await.generation, 3);
    worker.end().await;
}

#[tokio::test]
async fn a_document_that_cannot_be_stored_is_in_effect_and_told() {
    let pod = Pod::new();
    pod.mount(&pod.document(1));
    fs::remove_dir(pod.path("state")).unwrap();
    let worker = Worker::start(&pod, &Script::default()).await;
    let caller = Caller::new(worker.address, &pod.key);
    caller.phase_becomes(Phase::Starting).await;
    let (code, body) = caller.put(&pod.suspended(2)).await;
    assert_eq!((code, &body["code"]), (StatusCode::INTERNAL_SERVER_ERROR, &json!("NotStored")));
    assert_eq!(caller.phase_becomes(Phase::Suspended).await.generation, 2);
    fs::create_dir(pod.path("state")).unwrap();
    eventually(10, "it is stored", async || pod.stored_generation() == Some(2)).await;
    assert_eq!(caller.put(&pod.suspended(2)).await.0, StatusCode::NO_CONTENT);
    worker.end().await;
}
