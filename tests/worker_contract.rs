//! The worker as the operator sees it: real HTTP on loopback, real files, real signals; sessions are fakes.

mod support;

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use sluice::engine::error::{Class, Error, Result, reason};
use sluice::worker::contract::{BODY_LIMIT, DESIRED_FILE, Desired, Failure, Phase, Status};
use sluice::worker::registry::{Job, Sessions};
use sluice::worker::run::{Settings, run};
use sluice::worker::supervise::Exit;
use sluice::worker::token::{SigningKey, sign};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};
use support::eventually;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const PASSWORD: &str = "correct horse";

/// What a fake session does.
enum Act {
    /// Works until it is told to end in either way.
    Follow,
    /// Has something to commit that takes this long, then ends.
    Commit(Duration),
    /// Hears nothing.
    Deaf,
    /// Fails at once.
    Fail(Error),
    /// Panics.
    Panic,
}

/// What a session was begun with.
struct Begun {
    generation: i64,
    password: String,
    rows: usize,
}

/// Sessions by script: one act after the other, then `Follow`.
#[derive(Clone, Default)]
struct Script {
    acts: Arc<Mutex<VecDeque<Act>>>,
    begun: Arc<Mutex<Vec<Begun>>>,
    running: Arc<AtomicUsize>,
    committed: Arc<AtomicUsize>,
}

/// Counts a session until its future is gone.
struct Running(Arc<AtomicUsize>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Sessions for Script {
    fn start(&self, job: Job) -> JoinHandle<Result<()>> {
        self.begun.lock().unwrap().push(Begun {
            generation: job.desired.generation,
            password: job.credentials.source.password.0.clone(),
            rows: job.desired.stream.max_batch_rows,
        });
        let act = self.acts.lock().unwrap().pop_front().unwrap_or(Act::Follow);
        assert_eq!(self.running.fetch_add(1, Ordering::SeqCst), 0, "one session at a time");
        let running = Running(Arc::clone(&self.running));
        let committed = Arc::clone(&self.committed);
        tokio::spawn(async move {
            let _running = running;
            match act {
                Act::Follow => tokio::select! {
                    () = job.stop.finish.cancelled() => Ok(()),
                    () = job.stop.now.cancelled() => Ok(()),
                },
                Act::Commit(time) => {
                    job.stop.finish.cancelled().await;
                    tokio::select! {
                        () = tokio::time::sleep(time) => { committed.fetch_add(1, Ordering::SeqCst); }
                        () = job.stop.now.cancelled() => {}
                    }
                    Ok(())
                }
                Act::Deaf => std::future::pending().await,
                Act::Fail(error) => Err(error),
                Act::Panic => panic!("cannot divide {PASSWORD}"),
            }
        })
    }
}

impl Script {
    fn of(acts: impl IntoIterator<Item = Act>) -> Self {
        let script = Self::default();
        script.acts.lock().unwrap().extend(acts);
        script
    }

    fn count(&self) -> usize {
        self.begun.lock().unwrap().len()
    }

    fn is_running(&self) -> bool {
        self.running.load(Ordering::SeqCst) == 1
    }
}

/// Folders of a pod: mounted configuration, mounted Secrets, state.
struct Pod {
    folder: tempfile::TempDir,
    key: SigningKey,
}

impl Pod {
    fn new() -> Self {
        let pod = Self {
            folder: tempfile::tempdir().unwrap(),
            key: SigningKey::generate().unwrap(),
        };
        for folder in ["config", "state", "source/credentials", "target/credentials"] {
            fs::create_dir_all(pod.path(folder)).unwrap();
        }
        for end in ["source", "target"] {
            fs::write(pod.path(end).join("credentials/username"), "sluice").unwrap();
        }
        pod.set_passwords(PASSWORD);
        pod
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn set_passwords(&self, password: &str) {
        for end in ["source", "target"] {
            replace(&self.path(end).join("credentials/password"), password.as_bytes());
        }
    }

    fn document(&self, generation: i64) -> Value {
        let endpoint = |end: &str| {
            json!({
                "engine": "PostgreSQL", "host": "127.0.0.1", "port": 1, "database": "shop", "tlsMode": "Disable",
                "folder": self.path(end), "connectTimeoutSeconds": 5,
            })
        };
        json!({
            "contract": 1,
            "generation": generation,
            "mirror": {"namespace": "shop", "name": "users", "uid": "5f0c"},
            "source": endpoint("source"),
            "target": endpoint("target"),
            "slot": "sluice_users",
            "publication": "sluice_users",
            "tables": [{"schema": "public", "name": "users", "targetSchema": "public", "targetName": "users"}],
            "snapshot": {"enabled": true, "truncate": false, "rowsPerPartition": 1000, "tablesInParallel": 1, "workersPerTable": 1},
            "stream": {"maxBatchRows": 1000, "maxBatchBytes": 1_000_000, "maxDelayMilliseconds": 10},
            "publicKeys": [self.key.public_key_base64()],
        })
    }

    fn suspended(&self, generation: i64) -> Value {
        let mut document = self.document(generation);
        document["suspend"] = true.into();
        document
    }

    fn mount(&self, document: &Value) {
        replace(&self.path("config").join(DESIRED_FILE), document.to_string().as_bytes());
    }

    fn stored_generation(&self) -> Option<i64> {
        let bytes = fs::read(self.path("state").join(DESIRED_FILE)).ok()?;
        Some(serde_json::from_slice::<Desired>(&bytes).unwrap().generation)
    }
}

/// As the kubelet does: readers see the old file or the new one.
fn replace(path: &Path, bytes: &[u8]) {
    let beside = path.with_extension("beside");
    fs::write(&beside, bytes).unwrap();
    fs::rename(beside, path).unwrap();
}

/// Calls one worker as the operator does.
struct Caller<'a> {
    client: Client,
    address: SocketAddr,
    key: &'a SigningKey,
}

impl<'a> Caller<'a> {
    fn new(address: SocketAddr, key: &'a SigningKey) -> Self {
        Self {
            client: Client::new(),
            address,
            key,
        }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    async fn get(&self, path: &str) -> (StatusCode, String) {
        let response = self.client.get(self.url(path)).send().await.unwrap();
        (response.status(), response.text().await.unwrap())
    }

    async fn status_with(&self, token: &str) -> (StatusCode, Value) {
        let request = self.client.get(self.url("/v1/status")).bearer_auth(token);
        let response = request.send().await.unwrap();
        (response.status(), response.json().await.unwrap())
    }

    async fn status(&self) -> Status {
        let (code, body) = self.status_with(&sign(self.key, "5f0c", b"").unwrap()).await;
        assert_eq!(code, StatusCode::OK, "{body}");
        serde_json::from_value(body).unwrap()
    }

    async fn put_bytes(&self, body: Vec<u8>) -> (StatusCode, Value) {
        let token = sign(self.key, "5f0c", &body).unwrap();
        self.put_with(&token, body).await
    }

    async fn put_with(&self, token: &str, body: Vec<u8>) -> (StatusCode, Value) {
        let request = self.client.put(self.url("/v1/desired")).bearer_auth(token).body(body);
        let response = request.send().await.unwrap();
        let status = response.status();
        let text = response.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    async fn put(&self, document: &Value) -> (StatusCode, Value) {
        self.put_bytes(document.to_string().into_bytes()).await
    }

    /// Waits for a status like this; also for the worker to answer at all.
    async fn status_becomes(&self, what: &str, like: impl Fn(&Status) -> bool) -> Status {
        let found = RefCell::new(None);
        eventually(20, what, async || {
            let request = self
                .client
                .get(self.url("/v1/status"))
                .bearer_auth(sign(self.key, "5f0c", b"").unwrap());
            let status: Option<Status> = match request.send().await {
                Ok(response) if response.status() == StatusCode::OK => Some(response.json().await.unwrap()),
                Ok(_) | Err(_) => None,
            };
            let is_like = status.as_ref().is_some_and(&like);
            found.replace(status);
            is_like
        })
        .await;
        found.into_inner().unwrap()
    }

    async fn phase_becomes(&self, phase: Phase) -> Status {
        self.status_becomes(&format!("phase {phase:?}"), |status| status.phase == phase)
            .await
    }
}

/// A worker in this process, with fake sessions.
struct Worker {
    address: SocketAddr,
    terminate: CancellationToken,
    exit: JoinHandle<Exit>,
}

impl Worker {
    async fn start(pod: &Pod, script: &Script) -> Self {
        Self::start_with(pod, script, Duration::from_secs(5)).await
    }

    async fn start_with(pod: &Pod, script: &Script, time_to_commit: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let terminate = CancellationToken::new();
        let settings = Settings {
            config_folder: pod.path("config"),
            state_folder: pod.path("state"),
            pod: "users-0".to_owned(),
            time_to_commit,
            look_every: Duration::from_millis(20),
        };
        let exit = tokio::spawn(run(settings, listener, script.clone(), terminate.clone()));
        Self { address, terminate, exit }
    }

    async fn end(self) -> Exit {
        self.terminate.cancel();
        self.exit.await.unwrap()
    }
}

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
    eventually(10, "the document is in effect", async || {
        caller.status_with(&good()).await.0 == StatusCode::OK
    })
    .await;

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
        (
            "no expiry",
            eddsa(&json!({"aud": "5f0c", "iat": now(), "nbf": now(), "body": body})),
        ),
        ("alg none", format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{payload}.")),
        ("HMAC with the public key", hmac(pod.key.public_key_base64().as_bytes())),
        ("nonsense", "x.y.z".to_owned()),
        ("empty", String::new()),
    ];
    for (what, token) in refused {
        let (code, answer) = caller.status_with(&token).await;
        assert_eq!(
            (code, &answer["code"]),
            (StatusCode::UNAUTHORIZED, &json!("Unauthorized")),
            "{what}"
        );
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
    assert_eq!(
        (code, text.as_str()),
        (StatusCode::NOT_FOUND, r#"{"code":"NotFound","message":"no such path"}"#)
    );
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
    assert_eq!(
        script.begun.lock().unwrap().last().map(|begun| (begun.generation, begun.rows)),
        Some((6, 7))
    );

    // The mounted file comes later with the same, and then with more.
    pod.mount(&wider);
    pod.mount(&pod.document(8));
    caller
        .status_becomes("the mounted file is taken", |status| status.generation == 8)
        .await;
    eventually(10, "another session", async || script.count() == 3).await;
    eventually(10, "the copy follows", async || pod.stored_generation() == Some(8)).await;

    // What can't be taken is told, and what works goes on.
    let mut unknown = pod.document(9);
    unknown["contract"] = 7.into();
    pod.mount(&unknown);
    let status = caller.status_becomes("the error is told", |status| status.error.is_some()).await;
    let error = status.error.unwrap();
    assert_eq!(
        (error.class.as_str(), error.reason.as_str(), status.generation),
        ("Stop", reason::INVALID_SPEC, 8)
    );
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
    // Both databases get the new password, one file after the other; the last is what counts.
    replace(&pod.path("target/credentials/password"), b"battery staple\n");
    eventually(10, "another session", async || script.count() == 2).await;
    replace(&pod.path("source/credentials/password"), b"battery staple\n");
    eventually(10, "another session", async || script.count() == 3 && script.is_running()).await;
    let passwords: Vec<_> = script.begun.lock().unwrap().iter().map(|begun| begun.password.clone()).collect();
    assert_eq!(passwords, [PASSWORD, PASSWORD, "battery staple"]);
    // The same content again, and a file that goes away for a while, change nothing.
    pod.set_passwords("battery staple");
    fs::remove_file(pod.path("source/credentials/username")).unwrap();
    let looks = caller.status().await.generation;
    assert_eq!(caller.put(&pod.document(looks)).await.0, StatusCode::NO_CONTENT);
    fs::write(pod.path("source/credentials/username"), "sluice").unwrap();
    // A further change shows that the ones before have been looked at.
    pod.set_passwords("third");
    eventually(10, "the third password is used", async || {
        script.begun.lock().unwrap().last().is_some_and(|begun| begun.password == "third")
    })
    .await;
    assert!((4..=5).contains(&script.count()), "{} sessions", script.count());
    worker.end().await;
}

#[tokio::test]
async fn failures_are_told_and_tried_again() {
    let pod = Pod::new();
    pod.mount(&pod.document(1));
    let refused = || {
        Error::retry(
            reason::SOURCE_UNREACHABLE,
            format!("source: \"{PASSWORD}\" was refused {}", "x".repeat(2000)),
        )
    };
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
    assert_eq!(
        caller.get("/livez").await.0,
        StatusCode::OK,
        "an outage of a database is none of the process"
    );
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
    assert_eq!(
        (error.class.as_str(), error.reason.as_str(), error.count),
        ("Stop", "TableMissing", 1)
    );
    assert!(error.retry_in_seconds.is_some_and(|seconds| seconds > 2));

    // A change does not wait for the pause; this one runs into a defect of ours.
    let mut fixed = pod.document(2);
    fixed["tables"][0]["name"] = "people".into();
    assert_eq!(caller.put(&fixed).await.0, StatusCode::NO_CONTENT);
    let of_ours = |status: &Status| status.error.as_ref().is_some_and(|error| error.class == "Bug");
    let status = caller.status_becomes("the panic is told", of_ours).await;
    let error = status.error.unwrap();
    assert_eq!(
        (status.phase, error.reason.as_str(), error.count),
        (Phase::Stopped, "InternalError", 1)
    );
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
    assert!(
        error.message.contains("target") && error.message.contains("password: missing"),
        "{}",
        error.message
    );
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
    let script = Script::of([
        Act::Commit(Duration::from_millis(200)),
        Act::Commit(Duration::from_secs(60)),
        Act::Deaf,
    ]);
    for (committed, limit) in [
        (1, Duration::from_secs(30)),
        (1, Duration::from_millis(100)),
        (1, Duration::from_millis(100)),
    ] {
        let worker = Worker::start_with(&pod, &script, limit).await;
        eventually(10, "a session runs", async || script.is_running()).await;
        let begin = Instant::now();
        assert_eq!(worker.end().await, Exit::Stopped);
        assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
        assert_eq!(script.committed.load(Ordering::SeqCst), committed);
        assert!(!script.is_running());
    }
}

/// The real program.
struct Program {
    child: Child,
    address: SocketAddr,
}

impl Program {
    fn start(pod: &Pod) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], support::free_port()));
        let child = Command::new(env!("CARGO_BIN_EXE_sluice"))
            .args(["worker", "mirror", "--log-format=json", "--grace-seconds=10"])
            .arg(format!("--listen={address}"))
            .arg("--config-folder")
            .arg(pod.path("config"))
            .arg("--state-folder")
            .arg(pod.path("state"))
            .env("POD_NAME", "users-0")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self { child, address }
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").arg(name).arg(self.child.id().to_string()).status().unwrap();
        assert!(sent.success());
    }

    /// Exit code and log lines.
    async fn ended(self) -> (Option<i32>, Vec<Value>) {
        let waited = tokio::task::spawn_blocking(move || self.child.wait_with_output().unwrap());
        let output = tokio::time::timeout(Duration::from_secs(20), waited)
            .await
            .expect("it ends")
            .unwrap();
        let log = String::from_utf8(output.stderr).unwrap();
        assert_ne!(output.status.signal(), Some(9), "{log}");
        (
            output.status.code(),
            log.lines().map(|line| serde_json::from_str(line).unwrap()).collect(),
        )
    }
}

#[tokio::test]
async fn the_program_ends_on_signals_and_starts_where_it_stood() {
    let pod = Pod::new();
    pod.mount(&pod.suspended(1));
    let program = Program::start(&pod);
    let caller = Caller::new(program.address, &pod.key);
    caller.phase_becomes(Phase::Suspended).await;
    assert_eq!(caller.put(&pod.suspended(2)).await.0, StatusCode::NO_CONTENT);
    program.signal("-TERM");
    let (code, log) = program.ended().await;
    assert_eq!(code, Some(0));
    assert!(log.iter().any(|line| line["message"] == "told to end"), "{log:?}");

    let program = Program::start(&pod);
    let caller = Caller::new(program.address, &pod.key);
    let status = caller.phase_becomes(Phase::Suspended).await;
    assert_eq!((status.generation, status.pod.as_str()), (2, "users-0"));
    program.signal("-INT");
    assert_eq!(program.ended().await.0, Some(0));
}

#[tokio::test]
async fn a_mirror_between_strange_engines_is_stopped_not_crashed() {
    let pod = Pod::new();
    let mut strange = pod.document(1);
    strange["target"]["engine"] = "Abacus".into();
    pod.mount(&strange);
    let program = Program::start(&pod);
    let caller = Caller::new(program.address, &pod.key);
    let error = caller.phase_becomes(Phase::Stopped).await.error.unwrap();
    assert_eq!(error.reason, reason::INVALID_SPEC);
    assert!(error.message.contains("Abacus"), "{}", error.message);
    program.signal("-TERM");
    let (code, log) = program.ended().await;
    assert_eq!(code, Some(0));
    assert!(!log.iter().any(|line| line.to_string().contains(PASSWORD)));
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
        tables: [("Ready".to_owned(), 1), ("Error".to_owned(), 1)].into(),
        table_errors: [("public.log".to_owned(), "LeftPublication".to_owned())].into(),
        rows_copied: 10,
        rows_to_copy: 20,
        rows_streamed: 30,
        snapshot_completed: true,
        streaming: false,
        apply_mode: Some("Replica".to_owned()),
        waiting: Some("pid 7".to_owned()),
        error: Some(Failure {
            class: "Retry".to_owned(),
            reason: "SourceUnreachable".to_owned(),
            message: "no route".to_owned(),
            count: 2,
            retry_in_seconds: Some(4),
        }),
    };
    let full = json!({
        "contract": 1, "version": "0.1.0", "generation": 3, "pod": "users-0", "phase": "CatchingUp", "epoch": 2,
        "slot": "sluice_users", "publication": "sluice_users",
        "received": "0/30", "applied": "0/20", "confirmed": "0/10", "lagBytes": 16, "lagSeconds": 1,
        "tables": {"Ready": 1, "Error": 1}, "tableErrors": {"public.log": "LeftPublication"},
        "rowsCopied": 10, "rowsToCopy": 20, "rowsStreamed": 30, "snapshotCompleted": true, "streaming": false,
        "applyMode": "Replica", "waiting": "pid 7",
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
    for phase in [
        "Starting",
        "SettingUp",
        "Copying",
        "CatchingUp",
        "Streaming",
        "Suspended",
        "Retrying",
        "Stopped",
    ] {
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
