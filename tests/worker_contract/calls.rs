//! Who may call, what is refused, and the exact words of the status document.

use crate::pod::{Caller, Pod, Script, Worker};
use crate::support::eventually;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use reqwest::StatusCode;
use serde_json::{Value, json};
use sluice::worker::contract::{BODY_LIMIT, DifferentRow, Failure, Notice, Phase, RequestReport, Retention, Status, Verification};
use sluice::worker::supervise::Exit;
use sluice::worker::token::{SigningKey, sign};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

#[tokio::test]
async fn only_the_operators_tokens_are_taken() {
    let pod = Pod::new();
    let worker = Worker::start(&pod, &Script::default()).await;
    let caller = Caller::new(worker.address, &pod.key);
    let good = || sign(&pod.key, "5f0c", b"").unwrap();

    // Nobody is known before a document is.
    let (code, body) = caller.status_with(&good()).await;
    assert_eq!((code, &body["code"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("NotReady")));
    let (code, _) = caller.put(&pod.document(1)).await;
    assert_eq!(code, StatusCode::SERVICE_UNAVAILABLE);
    pod.mount(&pod.document(1));
    eventually(10, "the document is in effect", async || caller.status_with(&good()).await.0 == StatusCode::OK).await;

    let private = EncodingKey::from_ed_der(pod.key.to_pkcs8());
    // SHA-256 of nothing.
    let body = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    let claims = |iat: u64, exp: u64| json!({"aud": "5f0c", "iat": iat, "nbf": iat, "exp": exp, "body": body});
    let eddsa = |claims: &Value| jsonwebtoken::encode(&Header::new(Algorithm::EdDSA), claims, &private).unwrap();
    let hmac = |secret: &[u8]| {
        let claims = claims(now(), now() + 60);
        jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &EncodingKey::from_secret(secret)).unwrap()
    };
    assert_eq!(caller.status_with(&eddsa(&claims(now(), now() + 60))).await.0, StatusCode::OK);
    let payload = good().split('.').nth(1).unwrap().to_owned();
    let refused = [
        ("wrong key", sign(&SigningKey::generate().unwrap(), "5f0c", b"").unwrap()),
        ("wrong audience", sign(&pod.key, "another", b"").unwrap()),
        ("another body", sign(&pod.key, "5f0c", b"{}").unwrap()),
        ("expired", eddsa(&claims(now() - 120, now() - 60))),
        ("lives for too long", eddsa(&claims(now(), now() + 3600))),
        ("of the future", eddsa(&claims(now() + 120, now() + 180))),
        ("no expiry", eddsa(&json!({"aud": "5f0c", "iat": now(), "nbf": now(), "body": body}))),
        ("alg none", format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{payload}.")),
        ("HMAC with the public key", hmac(pod.key.public_key_base64().as_bytes())),
        ("nonsense", "x.y.z".to_owned()),
        ("empty", String::new()),
    ];
    for (what, token) in refused {
        let (code, answer) = caller.status_with(&token).await;
        assert_eq!((code, &answer["code"]), (StatusCode::UNAUTHORIZED, &json!("Unauthorized")), "{what}");
        let (code, _) = caller.put_with(&token, pod.document(2).to_string().into_bytes()).await;
        assert_eq!(code, StatusCode::UNAUTHORIZED, "{what}");
    }
    let bare = caller.client.get(caller.url("/v1/status")).send().await.unwrap();
    assert_eq!(bare.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(caller.status().await.generation, 1);
    assert_eq!(worker.end().await, Exit::Stopped);
}

#[tokio::test]
async fn keys_are_rotated_without_a_gap() {
    let pod = Pod::new();
    pod.mount(&pod.document(1));
    let script = Script::default();
    let worker = Worker::start(&pod, &script).await;
    let old = Caller::new(worker.address, &pod.key);
    old.phase_becomes(Phase::Starting).await;
    let next = SigningKey::generate().unwrap();
    let mut both = pod.document(2);
    both["publicKeys"] = json!([pod.key.public_key_base64(), next.public_key_base64()]);
    assert_eq!(old.put(&both).await.0, StatusCode::NO_CONTENT);
    let new = Caller::new(worker.address, &next);
    assert_eq!((old.status().await.generation, new.status().await.generation), (2, 2));
    let mut only_new = pod.document(3);
    only_new["publicKeys"] = json!([next.public_key_base64()]);
    assert_eq!(new.put(&only_new).await.0, StatusCode::NO_CONTENT);
    assert_eq!(old.put(&both).await.0, StatusCode::UNAUTHORIZED);
    assert_eq!(script.count(), 1, "keys concern no session");
    worker.end().await;
}

#[tokio::test]
async fn requests_are_bounded_and_refused_in_json() {
    let pod = Pod::new();
    pod.mount(&pod.document(1));
    let worker = Worker::start(&pod, &Script::default()).await;
    let caller = Caller::new(worker.address, &pod.key);
    caller.phase_becomes(Phase::Starting).await;

    let (code, body) = caller.put_bytes(b"{".to_vec()).await;
    assert_eq!((code, &body["code"]), (StatusCode::BAD_REQUEST, &json!("InvalidDocument")));
    let (code, body) = caller.put(&json!({"contract": 2, "generation": 9})).await;
    assert_eq!(code, StatusCode::BAD_REQUEST);
    assert!(body["message"].as_str().unwrap().contains("contract 2"), "{body}");
    // Just fits, and is no document.
    let (code, _) = caller.put_bytes(vec![b' '; BODY_LIMIT]).await;
    assert_eq!(code, StatusCode::BAD_REQUEST);

    // The limit, told by Content-Length and found while reading. A server may hang up on a client that goes on sending.
    let large = vec![b' '; BODY_LIMIT + 1];
    let token = sign(&pod.key, "5f0c", &large).unwrap();
    let request = caller.client.put(caller.url("/v1/desired")).bearer_auth(token).body(large);
    if let Ok(response) = request.send().await {
        assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
    }
    let head = format!(
        "PUT /v1/desired HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-length: {}\r\n\r\n",
        sign(&pod.key, "5f0c", b"").unwrap(),
        BODY_LIMIT + 1
    );
    assert!(raw(worker.address, &head).await.starts_with("HTTP/1.1 413 "));
    // Nobody without a token makes the worker read a body.
    let head = format!("PUT /v1/desired HTTP/1.1\r\nhost: x\r\ncontent-length: {BODY_LIMIT}\r\n\r\n");
    assert!(raw(worker.address, &head).await.starts_with("HTTP/1.1 401 "));

    let (code, text) = caller.get("/v2/status").await;
    assert_eq!((code, text.as_str()), (StatusCode::NOT_FOUND, r#"{"code":"NotFound","message":"no such path"}"#));
    let (code, text) = caller.get("/v1/desired").await;
    assert_eq!(code, StatusCode::METHOD_NOT_ALLOWED);
    assert!(text.contains("MethodNotAllowed"), "{text}");
    assert_eq!(caller.status().await.generation, 1);
    worker.end().await;
}

/// Sends a head without the body it announces and reads the start of the answer.
async fn raw(address: SocketAddr, head: &str) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 64];
    let read = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut answer));
    let size = read.await.expect("an answer").unwrap();
    String::from_utf8_lossy(&answer[..size]).into_owned()
}

#[test]
fn the_status_document_is_as_written_down() {
    let status = Status {
        contract: 1,
        version: "0.1.0".to_owned(),
        generation: 3,
        pod: "users-0".to_owned(),
        phase: Phase::CatchingUp,
        epoch: 2,
        slot: "sluice_users".to_owned(),
        publication: "sluice_users".to_owned(),
        received: Some("0/30".to_owned()),
        applied: Some("0/20".to_owned()),
        confirmed: Some("0/10".to_owned()),
        lag_bytes: Some(16),
        lag_seconds: Some(1),
        latency_p50_milliseconds: Some(4),
        latency_p99_milliseconds: Some(12),
        tables: [("Ready".to_owned(), 1), ("Error".to_owned(), 1)].into(),
        table_errors: [("public.log".to_owned(), "LeftPublication".to_owned())].into(),
        rows_copied: 10,
        rows_to_copy: 20,
        rows_streamed: 30,
        snapshot_completed: true,
        streaming: false,
        apply_mode: Some("Replica".to_owned()),
        waiting: Some("pid 7".to_owned()),
        log_memory_bytes: Some(1),
        log_memory_limit_bytes: Some(4),
        spill_bytes: Some(2),
        spill_limit_bytes: Some(3),
        retention: Some(Retention {
            slot_exists: true,
            retained_bytes: Some(5),
            wal_status: Some("extended".to_owned()),
            safe_wal_size: Some(-1),
        }),
        notice: Some(Notice { reason: "SpillFull".to_owned(), message: "no room".to_owned() }),
        verification: Some(Verification {
            request: "v".into(),
            tables: 1,
            of: 2,
            left_out: vec!["public.c".into()],
            rows: 10,
            differences: 1,
            undecided: 1,
            more: true,
            examples: vec![DifferentRow { table: "public.a".into(), key: vec!["7".into()], difference: "Missing".into() }],
            finished_at: None,
        }),
        requests: Some(vec![RequestReport {
            id: "a".to_owned(),
            action: "Resync".to_owned(),
            is_full_resync: true,
            state: "Failed".to_owned(),
            started_at: "2026-01-01T00:00:00Z".to_owned(),
            finished_at: Some("2026-01-01T00:00:01Z".to_owned()),
            message: "why".to_owned(),
        }]),
        error: Some(Failure {
            class: "Retry".to_owned(),
            reason: "SourceUnreachable".to_owned(),
            message: "no route".to_owned(),
            count: 2,
            retry_in_seconds: Some(4),
        }),
    };
    let verification = json!({"request": "v", "tables": 1, "of": 2, "leftOut": ["public.c"], "rows": 10, "differences": 1, "undecided": 1,
        "more": true, "examples": [{"table": "public.a", "key": ["7"], "difference": "Missing"}]});
    let full = json!({
        "contract": 1, "version": "0.1.0", "generation": 3, "pod": "users-0", "phase": "CatchingUp", "epoch": 2,
        "slot": "sluice_users", "publication": "sluice_users",
        "received": "0/30", "applied": "0/20", "confirmed": "0/10", "lagBytes": 16, "lagSeconds": 1, "latencyP50Milliseconds": 4, "latencyP99Milliseconds": 12,
        "tables": {"Ready": 1, "Error": 1}, "tableErrors": {"public.log": "LeftPublication"},
        "rowsCopied": 10, "rowsToCopy": 20, "rowsStreamed": 30, "snapshotCompleted": true, "streaming": false,
        "applyMode": "Replica", "waiting": "pid 7", "logMemoryBytes": 1, "logMemoryLimitBytes": 4, "spillBytes": 2, "spillLimitBytes": 3,
        "retention": {"slotExists": true, "retainedBytes": 5, "walStatus": "extended", "safeWalSize": -1},
        "notice": {"reason": "SpillFull", "message": "no room"},
        "requests": [{"id": "a", "action": "Resync", "isFullResync": true, "state": "Failed", "startedAt": "2026-01-01T00:00:00Z",
            "finishedAt": "2026-01-01T00:00:01Z", "message": "why"}],
        "verification": verification,
        "error": {"class": "Retry", "reason": "SourceUnreachable", "message": "no route", "count": 2, "retryInSeconds": 4},
    });
    assert_eq!(serde_json::to_value(&status).unwrap(), full);
    assert_eq!(serde_json::from_value::<Status>(full).unwrap(), status);

    // What an operator may count on, and what it must not stumble over.
    let least = json!({
        "contract": 1, "version": "9.9.9", "generation": 1, "pod": "", "phase": "Starting", "epoch": 0, "slot": "", "publication": "",
        "tables": {}, "rowsCopied": 0, "rowsToCopy": 0, "rowsStreamed": 0, "snapshotCompleted": false, "streaming": false,
        "ofALaterWorker": {"x": 1},
    });
    let status: Status = serde_json::from_value(least).unwrap();
    assert_eq!(status.phase, Phase::Starting);
    for phase in ["Starting", "SettingUp", "Copying", "CatchingUp", "Streaming", "Suspended", "Retrying", "Stopped"] {
        let read: Phase = serde_json::from_value(json!(phase)).unwrap();
        assert_eq!(format!("{read:?}"), phase);
    }
}

#[tokio::test]
async fn the_served_status_holds_nothing_else() {
    let pod = Pod::new();
    pod.mount(&pod.suspended(1));
    let worker = Worker::start(&pod, &Script::default()).await;
    let caller = Caller::new(worker.address, &pod.key);
    caller.phase_becomes(Phase::Suspended).await;
    let (_, body) = caller.status_with(&sign(&pod.key, "5f0c", b"").unwrap()).await;
    assert_eq!(
        body,
        json!({
            "contract": 1, "version": env!("CARGO_PKG_VERSION"), "generation": 1, "pod": "users-0", "phase": "Suspended", "epoch": 0,
            "slot": "sluice_users", "publication": "sluice_users", "tables": {}, "rowsCopied": 0, "rowsToCopy": 0, "rowsStreamed": 0,
            "snapshotCompleted": false, "streaming": false,
        })
    );
    worker.end().await;
}
