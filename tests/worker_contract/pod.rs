//! A pod's folders, a worker with fake sessions in it, and calls as the operator makes them.

use crate::support::eventually;
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use sluice::engine::error::{Error, Result};
use sluice::worker::contract::{DESIRED_FILE, Desired, Phase, Status};
use sluice::worker::registry::{Job, Sessions};
use sluice::worker::run::{Settings, run};
use sluice::worker::supervise::Exit;
use sluice::worker::token::{SigningKey, sign};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub const PASSWORD: &str = "correct horse";

/// What a fake session does.
pub enum Act {
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
pub struct Begun {
    pub generation: i64,
    pub password: String,
    pub rows: usize,
}

/// Sessions by script: one act after the other, then `Follow`.
#[derive(Clone, Default)]
pub struct Script {
    acts: Arc<Mutex<VecDeque<Act>>>,
    pub begun: Arc<Mutex<Vec<Begun>>>,
    running: Arc<AtomicUsize>,
    pub committed: Arc<AtomicUsize>,
}

/// Counts a session until its future is gone.
pub struct Running(Arc<AtomicUsize>);

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
    pub fn of(acts: impl IntoIterator<Item = Act>) -> Self {
        let script = Self::default();
        script.acts.lock().unwrap().extend(acts);
        script
    }

    pub fn count(&self) -> usize {
        self.begun.lock().unwrap().len()
    }

    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::SeqCst) == 1
    }
}

/// Folders of a pod: mounted configuration, mounted Secrets, state.
pub struct Pod {
    folder: tempfile::TempDir,
    pub key: SigningKey,
}

impl Pod {
    pub fn new() -> Self {
        let pod = Self { folder: tempfile::tempdir().unwrap(), key: SigningKey::generate().unwrap() };
        for folder in ["config", "state", "source/credentials", "target/credentials"] {
            fs::create_dir_all(pod.path(folder)).unwrap();
        }
        for end in ["source", "target"] {
            fs::write(pod.path(end).join("credentials/username"), "sluice").unwrap();
        }
        pod.set_passwords(PASSWORD);
        pod
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn set_passwords(&self, password: &str) {
        for end in ["source", "target"] {
            replace(&self.path(end).join("credentials/password"), password.as_bytes());
        }
    }

    pub fn document(&self, generation: i64) -> Value {
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

    pub fn suspended(&self, generation: i64) -> Value {
        let mut document = self.document(generation);
        document["suspend"] = true.into();
        document
    }

    pub fn mount(&self, document: &Value) {
        replace(&self.path("config").join(DESIRED_FILE), document.to_string().as_bytes());
    }

    pub fn stored_generation(&self) -> Option<i64> {
        let bytes = fs::read(self.path("state").join(DESIRED_FILE)).ok()?;
        Some(serde_json::from_slice::<Desired>(&bytes).unwrap().generation)
    }
}

/// As the kubelet does: readers see the old file or the new one.
pub fn replace(path: &Path, bytes: &[u8]) {
    let beside = path.with_extension("beside");
    fs::write(&beside, bytes).unwrap();
    fs::rename(beside, path).unwrap();
}

/// Calls one worker as the operator does.
pub struct Caller<'a> {
    pub client: Client,
    pub address: SocketAddr,
    key: &'a SigningKey,
}

impl<'a> Caller<'a> {
    pub fn new(address: SocketAddr, key: &'a SigningKey) -> Self {
        Self { client: Client::new(), address, key }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub async fn get(&self, path: &str) -> (StatusCode, String) {
        let response = self.client.get(self.url(path)).send().await.unwrap();
        (response.status(), response.text().await.unwrap())
    }

    pub async fn status_with(&self, token: &str) -> (StatusCode, Value) {
        let request = self.client.get(self.url("/v1/status")).bearer_auth(token);
        let response = request.send().await.unwrap();
        (response.status(), response.json().await.unwrap())
    }

    pub async fn status(&self) -> Status {
        let (code, body) = self.status_with(&sign(self.key, "5f0c", b"").unwrap()).await;
        assert_eq!(code, StatusCode::OK, "{body}");
        serde_json::from_value(body).unwrap()
    }

    pub async fn put_bytes(&self, body: Vec<u8>) -> (StatusCode, Value) {
        let token = sign(self.key, "5f0c", &body).unwrap();
        self.put_with(&token, body).await
    }

    pub async fn put_with(&self, token: &str, body: Vec<u8>) -> (StatusCode, Value) {
        let request = self.client.put(self.url("/v1/desired")).bearer_auth(token).body(body);
        let response = request.send().await.unwrap();
        let status = response.status();
        let text = response.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    pub async fn put(&self, document: &Value) -> (StatusCode, Value) {
        self.put_bytes(document.to_string().into_bytes()).await
    }

    /// Waits for a status like this; also for the worker to answer at all.
    pub async fn status_becomes(&self, what: &str, like: impl Fn(&Status) -> bool) -> Status {
        let found = RefCell::new(None);
        eventually(20, what, async || {
            let request = self.client.get(self.url("/v1/status")).bearer_auth(sign(self.key, "5f0c", b"").unwrap());
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

    pub async fn phase_becomes(&self, phase: Phase) -> Status {
        self.status_becomes(&format!("phase {phase:?}"), |status| status.phase == phase).await
    }
}

/// A worker in this process, with fake sessions.
pub struct Worker {
    pub address: SocketAddr,
    pub terminate: CancellationToken,
    pub exit: JoinHandle<Exit>,
}

impl Worker {
    pub async fn start(pod: &Pod, script: &Script) -> Self {
        Self::start_with(pod, script, Duration::from_secs(5)).await
    }

    pub async fn start_with(pod: &Pod, script: &Script, time_to_commit: Duration) -> Self {
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

    pub async fn end(self) -> Exit {
        self.terminate.cancel();
        self.exit.await.unwrap()
    }
}
