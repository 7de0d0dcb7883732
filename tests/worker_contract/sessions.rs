//! What becomes of sessions: suspended, begun again, failed, fenced, ended.

use crate::pod::{Act, Caller, PASSWORD, Pod, Script, Worker, replace};
use crate::support::eventually;
use reqwest::StatusCode;
use sluice::engine::error::{Class, Error, reason};
use sluice::worker::contract::{Phase, Status};
use sluice::worker::supervise::Exit;
use std::fs;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

#[tokio::test]
async fn suspend_acts_within_a_second() {
    let pod = Pod::new();
    pod.mount(&pod.document(1));
    let script = Script::of([Act::Follow, Act::Deaf]);
    let worker = Worker::start(&pod, &script).await;
    let caller = Caller::new(worker.address, &pod.key);
    for (generation, sessions) in [(2, 1), (4, 2)] {
        eventually(10, "a session runs", async || script.is_running()).await;
        assert_eq!(script.count(), sessions);
        let begin = Instant::now();
        assert_eq!(caller.put(&pod.suspended(generation)).await.0, StatusCode::NO_CONTENT);
        caller.phase_becomes(Phase::Suspended).await;
        assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
        assert!(!script.is_running());
        assert_eq!(caller.get("/readyz").await.0, StatusCode::OK);
        assert_eq!(caller.put(&pod.document(generation + 1)).await.0, StatusCode::NO_CONTENT);
    }
    eventually(10, "the third session runs", async || script.count() == 3).await;
    worker.end().await;
}

#[tokio::test]
async fn changed_credentials_begin_one_other_session() {
    let pod = Pod::new();
    pod.mount(&pod.document(1));
    let script = Script::default();
    let worker = Worker::start(&pod, &script).await;
    let caller = Caller::new(worker.address, &pod.key);
    eventually(10, "a session runs", async || script.is_running()).await;
    let source = pod.path("source/credentials");
    replace(&source.join("password"), b"battery staple\n");
    eventually(10, "another session", async || script.count() == 2 && script.is_running()).await;
    // The same content again, and a file that is away for a while, change nothing.
    replace(&source.join("password"), b"battery staple");
    fs::rename(source.join("username"), source.join("away")).unwrap();
    fs::rename(source.join("away"), source.join("username")).unwrap();
    assert_eq!(caller.put(&pod.document(1)).await.0, StatusCode::NO_CONTENT);
    // A further change shows that the ones before have been looked at.
    replace(&source.join("password"), b"third");
    eventually(10, "another session", async || script.count() >= 3).await;
    let passwords: Vec<_> = script.begun.lock().unwrap().iter().map(|begun| begun.password.clone()).collect();
    assert_eq!(passwords, [PASSWORD, "battery staple", "third"]);
    assert_eq!(caller.status().await.error, None);
    worker.end().await;
}

#[tokio::test]
async fn failures_are_told_and_tried_again() {
    let pod = Pod::new();
    pod.mount(&pod.document(1));
    let refused = || Error::retry(reason::SOURCE_UNREACHABLE, format!("source: \"{PASSWORD}\" was refused {}", "x".repeat(2000)));
    let script = Script::of([Act::Fail(refused()), Act::Fail(refused()), Act::Fail(refused())]);
    let worker = Worker::start(&pod, &script).await;
    let caller = Caller::new(worker.address, &pod.key);
    let three = |status: &Status| status.error.as_ref().is_some_and(|error| error.count == 3);
    let status = caller.status_becomes("three failures", three).await;
    assert_eq!(status.phase, Phase::Retrying);
    let error = status.error.unwrap();
    assert_eq!((error.class.as_str(), error.reason.as_str()), ("Retry", "SourceUnreachable"));
    assert!(error.message.starts_with("source: \"***\" was refused"), "{}", error.message);
    assert!(error.message.len() <= 1024);
    assert!(error.retry_in_seconds.is_some_and(|seconds| seconds <= 2));
    assert_eq!(caller.get("/livez").await.0, StatusCode::OK, "an outage of a database is none of the process");
    let (code, body) = caller.get("/readyz").await;
    assert_eq!(code, StatusCode::SERVICE_UNAVAILABLE, "{body}");
    eventually(10, "a session runs", async || script.count() == 4 && script.is_running()).await;
    let error = caller.status().await.error.expect("shown until the session works");
    assert_eq!((error.count, error.retry_in_seconds), (3, None));
    let (_, metrics) = caller.get("/metrics").await;
    assert!(metrics.contains("sluice_worker_failures_total{class=\"Retry\"} 3\n"), "{metrics}");
    assert!(metrics.contains("sluice_worker_sessions_total 4\n"), "{metrics}");
    worker.end().await;
}

#[tokio::test]
async fn what_needs_a_human_waits_for_a_change() {
    let pod = Pod::new();
    pod.mount(&pod.document(1));
    let missing = Error::stop(reason::TABLE_MISSING, "public.users is not in the source");
    let script = Script::of([Act::Fail(missing), Act::Panic]);
    let worker = Worker::start(&pod, &script).await;
    let caller = Caller::new(worker.address, &pod.key);
    let error = caller.phase_becomes(Phase::Stopped).await.error.unwrap();
    assert_eq!((error.class.as_str(), error.reason.as_str(), error.count), ("Stop", "TableMissing", 1));
    assert!(error.retry_in_seconds.is_some_and(|seconds| seconds > 2));

    // A change does not wait for the pause; this one runs into a defect of ours.
    let mut fixed = pod.document(2);
    fixed["tables"][0]["name"] = "people".into();
    assert_eq!(caller.put(&fixed).await.0, StatusCode::NO_CONTENT);
    let of_ours = |status: &Status| status.error.as_ref().is_some_and(|error| error.class == "Bug");
    let status = caller.status_becomes("the panic is told", of_ours).await;
    let error = status.error.unwrap();
    assert_eq!((status.phase, error.reason.as_str(), error.count), (Phase::Stopped, "InternalError", 1));
    assert_eq!(error.message, "the session panicked: cannot divide ***");

    // So does a repaired Secret.
    pod.set_passwords("battery staple");
    eventually(10, "a session runs", async || script.is_running()).await;
    worker.end().await;
}

#[tokio::test]
async fn a_missing_key_of_a_secret_is_told() {
    let pod = Pod::new();
    pod.mount(&pod.document(1));
    fs::remove_file(pod.path("target/credentials/password")).unwrap();
    let script = Script::default();
    let worker = Worker::start(&pod, &script).await;
    let caller = Caller::new(worker.address, &pod.key);
    let error = caller.phase_becomes(Phase::Stopped).await.error.unwrap();
    assert_eq!((error.class.as_str(), error.reason.as_str()), ("Stop", reason::INVALID_SPEC));
    assert!(error.message.contains("target") && error.message.contains("password: missing"), "{}", error.message);
    fs::write(pod.path("target/credentials/password"), PASSWORD).unwrap();
    eventually(10, "a session runs", async || script.is_running()).await;
    assert_eq!(script.count(), 1);
    worker.end().await;
}

#[tokio::test]
async fn a_fenced_worker_ends() {
    let pod = Pod::new();
    pod.mount(&pod.document(1));
    let fenced = Error::new(Class::Fenced, reason::FENCED, "epoch 4 was claimed by another worker");
    let script = Script::of([Act::Fail(fenced)]);
    let worker = Worker::start(&pod, &script).await;
    let exit = tokio::time::timeout(Duration::from_secs(5), worker.exit).await.unwrap().unwrap();
    assert_eq!((exit, exit.code(), script.count()), (Exit::Fenced, 3, 1));
}

#[tokio::test]
async fn the_end_commits_in_time_or_rolls_back() {
    let pod = Pod::new();
    pod.mount(&pod.document(1));
    let script = Script::of([Act::Commit(Duration::from_millis(200)), Act::Commit(Duration::from_secs(60)), Act::Deaf]);
    for (committed, limit) in [(1, Duration::from_secs(30)), (1, Duration::from_millis(100)), (1, Duration::from_millis(100))] {
        let worker = Worker::start_with(&pod, &script, limit).await;
        eventually(10, "a session runs", async || script.is_running()).await;
        let begin = Instant::now();
        assert_eq!(worker.end().await, Exit::Stopped);
        assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
        assert_eq!(script.committed.load(Ordering::SeqCst), committed);
        assert!(!script.is_running());
    }
}
