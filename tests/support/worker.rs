//! Real worker processes for tests: configuration in a folder of their own, driven over HTTP as the operator does.
#![allow(dead_code)] // each test target uses its part of it

use crate::support::{Postgres, eventually, free_port};
use serde_json::Value;
use sluice::worker::contract::{Desired, EndpointSpec, MMAP_THRESHOLD, MirrorId, SnapshotSpec, Status, StreamSpec, TableSpec};
use sluice::worker::token::{SigningKey, sign};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

pub const UID: &str = "6f2d0f8e-5d0c-4b8e-9e5c-0d9a3b6f7c11";

/// The program under test; benchmarks can name another one.
fn program() -> PathBuf {
    std::env::var_os("SLUICE_BIN").filter(|path| !path.is_empty()).map_or_else(|| env!("CARGO_BIN_EXE_sluice").into(), PathBuf::from)
}

/// A worker and its folder. It is killed when dropped.
pub struct Worker {
    folder: tempfile::TempDir,
    process: Option<Child>,
    pub port: u16,
    key: SigningKey,
    pub desired: Desired,
    /// More arguments for the next process.
    pub arguments: Vec<String>,
}

/// A desired document for a mirror between two test servers.
pub fn desired(source: (&Postgres, &str), target: (&Postgres, &str), tables: &[&str], key: &SigningKey, folder: &Path) -> Desired {
    let endpoint = |(server, database): (&Postgres, &str), side: &str| EndpointSpec {
        engine: "PostgreSQL".into(),
        host: "127.0.0.1".into(),
        port: server.port,
        database: database.into(),
        tls_mode: "Prefer".into(),
        folder: folder.join(side).display().to_string(),
        ca_key: None,
        client_certificate: false,
        parameters: std::collections::BTreeMap::new(),
        connect_timeout_seconds: 10,
    };
    Desired {
        contract: sluice::worker::contract::VERSION,
        generation: 1,
        mirror: MirrorId { namespace: "shop".into(), name: "shop".into(), uid: UID.into() },
        source: endpoint(source, "source"),
        target: endpoint(target, "target"),
        slot: "sluice_test".into(),
        publication: "sluice_test".into(),
        tables: Some(tables.iter().map(|name| table(name)).collect()),
        schemas: None,
        snapshot: SnapshotSpec {
            enabled: true,
            truncate: false,
            start_position: None,
            rows_per_partition: 2000,
            tables_in_parallel: 2,
            workers_per_table: 2,
            indexes: true,
            foreign_keys: true,
        },
        stream: StreamSpec {
            max_batch_rows: 1000,
            max_batch_bytes: 1 << 20,
            max_delay_milliseconds: 5,
            apply_connections: 2,
            accept_target_triggers: false,
        },
        stop_at_schema_changes: false,
        wal_budget: None,
        suspend: false,
        request: None,
        public_keys: vec![key.public_key_base64()],
    }
}

/// A table of schema public that keeps its name.
pub fn table(name: &str) -> TableSpec {
    TableSpec {
        schema: "public".into(),
        name: name.into(),
        target_schema: "public".into(),
        target_name: name.into(),
        exclude_columns: Vec::new(),
        accept_narrower_types: false,
    }
}

impl Worker {
    /// Starts a worker for these tables.
    pub fn start(source: (&Postgres, &str), target: (&Postgres, &str), tables: &[&str]) -> Self {
        Self::start_with(source, target, tables, |_| {})
    }

    /// The same with a changed document.
    pub fn start_with(source: (&Postgres, &str), target: (&Postgres, &str), tables: &[&str], change: impl FnOnce(&mut Desired)) -> Self {
        let folder = tempfile::Builder::new().prefix("sluice-worker").tempdir().expect("a temporary folder");
        let key = SigningKey::generate().expect("a key");
        let mut desired = desired(source, target, tables, &key, folder.path());
        change(&mut desired);
        let mut worker = Self { folder, process: None, port: 0, key, desired, arguments: Vec::new() };
        for side in ["source", "target"] {
            worker.write_credentials(side, "postgres", "pw");
        }
        worker.write_desired();
        worker.spawn();
        worker
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The state folder.
    pub fn state_folder(&self) -> PathBuf {
        self.path("state")
    }

    /// Writes the mounted Secret of one side.
    pub fn write_credentials(&self, side: &str, username: &str, password: &str) {
        let folder = self.path(side).join("credentials");
        std::fs::create_dir_all(&folder).expect("a folder");
        std::fs::write(folder.join("username"), username).expect("a file");
        std::fs::write(folder.join("password"), password).expect("a file");
    }

    fn write_desired(&self) {
        std::fs::create_dir_all(self.path("config")).expect("a folder");
        std::fs::write(self.path("config/desired.json"), serde_json::to_vec(&self.desired).expect("JSON")).expect("a file");
    }

    /// Starts the process with the configuration as it is.
    pub fn spawn(&mut self) {
        assert!(self.process.is_none(), "one process at a time");
        self.port = free_port();
        std::fs::create_dir_all(self.path("state")).expect("a folder");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.path("log")).expect("a log file");
        let child = Command::new(program())
            .args(["worker", "mirror", "--listen", &format!("127.0.0.1:{}", self.port), "--pod-name", "test-pod"])
            .arg("--config-folder")
            .arg(self.path("config"))
            .arg("--state-folder")
            .arg(self.path("state"))
            .args(&self.arguments)
            .envs([MMAP_THRESHOLD])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log file"))
            .stderr(log)
            .spawn()
            .expect("the worker starts");
        self.process = Some(child);
    }

    /// Signal 9, and the process is gone.
    pub fn kill9(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// SIGTERM; the exit code.
    pub fn terminate(&mut self) -> Option<i32> {
        let mut process = self.process.take()?;
        let _ = Command::new("kill").arg(process.id().to_string()).status();
        process.wait().ok()?.code()
    }

    /// The exit code when the process has ended by itself.
    pub fn exit_code(&mut self) -> Option<i32> {
        self.process.as_mut()?.try_wait().ok()??.code()
    }

    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("a process").id()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    fn token(&self, body: &[u8]) -> String {
        sign(&self.key, &self.desired.mirror.uid, body).expect("a token")
    }

    /// The status as JSON; `None` while the process does not answer.
    pub async fn status_json(&self) -> Option<Value> {
        let answer = reqwest::Client::new().get(self.url("/v1/status")).bearer_auth(self.token(b"")).send().await.ok()?;
        answer.status().is_success().then_some(())?;
        answer.json().await.ok()
    }

    pub async fn status(&self) -> Option<Status> {
        serde_json::from_value(self.status_json().await?).ok()
    }

    /// Changes what is desired: the mounted file and, at once, the push.
    pub async fn change(&mut self, change: impl FnOnce(&mut Desired)) {
        change(&mut self.desired);
        self.desired.generation += 1;
        self.write_desired();
        let body = serde_json::to_vec(&self.desired).expect("JSON");
        let request = reqwest::Client::new().put(self.url("/v1/desired")).bearer_auth(self.token(&body));
        let answer = request.header("content-type", "application/json").body(body).send().await;
        assert_eq!(answer.expect("an answer").status().as_u16(), 204);
    }

    /// Waits for a status; fails with the last one and the log.
    pub async fn wait_for(&self, seconds: u64, what: &str, check: impl Fn(&Status) -> bool) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
        loop {
            let status = self.status().await;
            if status.as_ref().is_some_and(&check) {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "after {seconds} s still not: {what}\n{status:#?}\n{}", self.log());
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    pub async fn wait_streaming(&self) {
        self.wait_for(90, "streaming", |status| status.streaming).await;
    }

    /// Waits until this reason is shown.
    pub async fn wait_reason(&self, reason: &str) -> Status {
        let wanted = |status: &Status| status.error.as_ref().is_some_and(|error| error.reason == reason);
        self.wait_for(60, reason, wanted).await;
        self.status().await.expect("a status")
    }

    /// Waits until everything that the source has committed by now is applied.
    pub async fn wait_level(&self, source: &tokio_postgres::Client) {
        let head: String = source.query_one("SELECT pg_current_wal_lsn()::text", &[]).await.expect("an LSN").get(0);
        let head: sluice::connectors::postgres::Lsn = head.parse().expect("an LSN");
        // The log moves on by itself only with the next record.
        source.batch_execute("SELECT pg_logical_emit_message(true, 'test', '')").await.expect("a message");
        let reached = move |status: &Status| {
            let applied = status.applied.as_deref().and_then(|applied| applied.parse::<sluice::connectors::postgres::Lsn>().ok());
            status.streaming && applied.is_some_and(|applied| applied >= head)
        };
        self.wait_for(90, &format!("level with {head}"), reached).await;
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill9();
        if std::thread::panicking() {
            eprintln!("--- worker log\n{}", self.log());
        }
    }
}

/// All rows of a table as text, ordered.
pub async fn rows(client: &tokio_postgres::Client, table: &str) -> Vec<String> {
    let sql = format!("SELECT t::text FROM {table} AS t ORDER BY t::text COLLATE \"C\"");
    client.query(&sql, &[]).await.expect("rows").iter().map(|row| row.get(0)).collect()
}

/// Fails with the first rows that differ.
pub async fn assert_equal(source: &tokio_postgres::Client, target: &tokio_postgres::Client, tables: &[&str]) {
    for table in tables {
        let (left, right) = (rows(source, table).await, rows(target, table).await);
        if left != right {
            let only =
                |a: &[String], b: &[String]| a.iter().filter(|row| b.binary_search(row).is_err()).take(5).cloned().collect::<Vec<_>>();
            panic!(
                "{table}: {} rows in the source, {} in the target\nonly in the source: {:#?}\nonly in the target: {:#?}",
                left.len(),
                right.len(),
                only(&left, &right),
                only(&right, &left)
            );
        }
    }
}

/// Waits until a query gives true.
pub async fn wait_sql(client: &tokio_postgres::Client, seconds: u64, sql: &str) {
    eventually(seconds, sql, || async { client.query_one(sql, &[]).await.is_ok_and(|row| row.get(0)) }).await;
}
