//! The operator's side of the contract with workers: signed calls and the poller, against a stub that checks tokens.

mod support;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, put};
use futures::StreamExt as _;
use kube::runtime::reflector::ObjectRef;
use serde_json::json;
use sluice::operator::metrics::Metrics;
use sluice::operator::poller;
use sluice::operator::shutdown::Shutdown;
use sluice::operator::signing::SigningKeys;
use sluice::operator::slim::SlimMirror;
use sluice::operator::worker_client::{WorkerClient, WorkerError};
use sluice::worker::contract::{Desired, Status};
use sluice::worker::token::{self, SigningKey};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::eventually;

fn keys() -> SigningKeys {
    SigningKeys::new(SigningKey::generate().expect("a key"), None)
}

#[derive(Clone)]
struct StubWorker {
    desired: Arc<Desired>,
    status: Arc<Mutex<Status>>,
    asked: Arc<AtomicUsize>,
}

fn desired(uid: &str, generation: i64, public_keys: &[String]) -> Desired {
    let endpoint = json!({"engine": "PostgreSQL", "host": "h", "port": 5432, "database": "d", "tlsMode": "Prefer", "folder": "/f", "connectTimeoutSeconds": 10});
    serde_json::from_value(json!({
        "contract": 1, "generation": generation, "mirror": {"namespace": "n", "name": "m", "uid": uid}, "source": endpoint, "target": endpoint,
        "slot": "s", "publication": "p", "tables": [],
        "snapshot": {"enabled": true, "truncate": false, "rowsPerPartition": 1, "tablesInParallel": 1, "workersPerTable": 1},
        "stream": {"maxBatchRows": 1, "maxBatchBytes": 1, "maxDelayMilliseconds": 1}, "publicKeys": public_keys,
    }))
    .expect("a desired document")
}

fn worker_status(phase: &str) -> Status {
    serde_json::from_value(json!({
        "contract": 1, "version": "0", "generation": 1, "pod": "p", "phase": phase, "epoch": 1, "slot": "s", "publication": "p",
        "tables": {"Copying": 1}, "rowsCopied": 0, "rowsToCopy": 10, "rowsStreamed": 0, "snapshotCompleted": false, "streaming": false,
    }))
    .expect("a status")
}

fn allowed(worker: &StubWorker, headers: &HeaderMap, body: &[u8]) -> bool {
    let token = headers.get("authorization").and_then(|value| value.to_str().ok()).and_then(|value| value.strip_prefix("Bearer "));
    token.is_some_and(|token| token::verify(&worker.desired, token).is_ok_and(|grant| grant.check_body(body).is_ok()))
}

impl StubWorker {
    async fn serve(uid: &str, keys: &SigningKeys) -> (Self, String, tokio::task::JoinHandle<()>) {
        let worker = Self {
            desired: Arc::new(desired(uid, 5, &keys.public_keys())),
            status: Arc::new(Mutex::new(worker_status("Copying"))),
            asked: Arc::default(),
        };
        let router = axum::Router::new()
            .route(
                "/v1/status",
                get(async |State(worker): State<Self>, headers: HeaderMap| {
                    worker.asked.fetch_add(1, Ordering::Relaxed);
                    if !allowed(&worker, &headers, b"") {
                        return Err(StatusCode::UNAUTHORIZED);
                    }
                    Ok(axum::Json(worker.status.lock().expect("no panic").clone()))
                }),
            )
            .route(
                "/v1/desired",
                put(async |State(worker): State<Self>, headers: HeaderMap, body: axum::body::Bytes| {
                    if !allowed(&worker, &headers, &body) {
                        return (StatusCode::UNAUTHORIZED, String::new());
                    }
                    let pushed: Desired = serde_json::from_slice(&body).expect("a desired document");
                    if pushed.generation < worker.desired.generation {
                        (StatusCode::CONFLICT, "5 is in effect".to_owned())
                    } else {
                        (StatusCode::NO_CONTENT, String::new())
                    }
                }),
            )
            .with_state(worker.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let task = tokio::spawn(async move { axum::serve(listener, router).await.expect("serves") });
        (worker, address, task)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn transitions_of_a_worker_wake_its_mirror() {
    let keys = keys();
    let (worker, address, serving) = StubWorker::serve("uid-1", &keys).await;
    let handle = poller::PollerHandle::default();
    let shutdown = Shutdown::new();
    let client = WorkerClient::new(keys).expect("a client");
    let metrics = Metrics::default();
    let polling = tokio::spawn(poller::run(handle.clone(), client, metrics.clone(), shutdown.clone()));
    let mut changes = Box::pin(handle.changes());
    let mut woken = async || tokio::time::timeout(Duration::from_secs(15), changes.next()).await.expect("woken in time").expect("a mirror");

    let mirror = ObjectRef::<SlimMirror>::new("m").within("n");
    handle.register(mirror.clone(), "uid-1", &address);
    assert_eq!(woken().await, mirror, "the first answer");
    assert_eq!(
        handle.latest("uid-1").and_then(|polled| polled.current().map(|status| format!("{:?}", status.phase))).as_deref(),
        Some("Copying")
    );

    worker.status.lock().expect("no panic").epoch = 2;
    handle.poll_soon("uid-1");
    woken().await;
    assert_eq!(handle.latest("uid-1").and_then(|polled| polled.current().map(|status| status.epoch)), Some(2));

    // Nothing new: asked again, not woken.
    let asked = worker.asked.load(Ordering::Relaxed);
    handle.poll_soon("uid-1");
    eventually(5, "asked again", || async { worker.asked.load(Ordering::Relaxed) > asked }).await;
    assert!(metrics.encode().expect("text").contains("sluice_operator_poll_total{result=\"ok\"}"));

    serving.abort();
    eventually(5, "the stub is gone", || async { tokio::net::TcpStream::connect(&address).await.is_err() }).await;
    handle.poll_soon("uid-1");
    woken().await;
    let failure = handle.latest("uid-1").and_then(|polled| polled.failure).expect("a failure");
    assert!(failure.count >= 2 && failure.error.reason() == "WorkerUnreachable", "{failure:?}");

    handle.unregister("uid-1");
    assert!(handle.latest("uid-1").is_none());
    shutdown.cancel();
    polling.await.expect("ends cleanly");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_to_workers_are_signed_and_refusals_are_told_apart() {
    let ours = keys();
    let (_, address, _serving) = StubWorker::serve("uid-1", &ours).await;
    let client = WorkerClient::new(ours.clone()).expect("a client");
    client.status(&address, "uid-1").await.expect("a status");
    assert_eq!(client.status(&address, "uid-2").await, Err(WorkerError::Unauthorized), "a worker of another Mirror");
    let stranger = WorkerClient::new(keys()).expect("a client");
    assert_eq!(stranger.status(&address, "uid-1").await, Err(WorkerError::Unauthorized), "another operator");
    client.put_desired(&address, "uid-1", &desired("uid-1", 6, &[])).await.expect("taken");
    let older = client.put_desired(&address, "uid-1", &desired("uid-1", 4, &[])).await;
    assert_eq!(older, Err(WorkerError::Outdated("5 is in effect".into())));

    // A pod that takes the connection and says nothing, one that says too much, and one that speaks a later contract.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let begin = Instant::now();
    let unreachable = client.status(&silent.local_addr().expect("an address").to_string(), "uid-1").await.expect_err("silence");
    assert!(unreachable.reason() == "WorkerUnreachable" && begin.elapsed() < Duration::from_secs(4), "{unreachable}");
    let loud = |body: String| async move {
        let router = axum::Router::new().route("/v1/status", get(move || async move { body }));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        tokio::spawn(async move { axum::serve(listener, router).await.expect("serves") });
        address
    };
    let long = client.status(&loud("x".repeat(300 * 1024)).await, "uid-1").await.expect_err("too long");
    assert!(matches!(&long, WorkerError::BadAnswer(why) if why.contains("longer")), "{long}");
    let later = serde_json::to_string(&Status { contract: 99, ..worker_status("Streaming") }).expect("json");
    assert_eq!(client.status(&loud(later).await, "uid-1").await, Err(WorkerError::Contract(99)));
}
