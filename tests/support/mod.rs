//! Real PostgreSQL servers for tests: each with its own folder and port, gone when dropped.
#![allow(dead_code)] // each test target uses its part of it

pub mod apiserver;
pub mod operator;
mod standby;
mod template;

use std::io::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use template::copy as copy_folder;

/// Majors that are tested: the main one, an older and a newer.
pub const MAJORS: [u32; 3] = [14, 15, 17];

/// A running server.
pub struct Postgres {
    folder: Option<tempfile::TempDir>,
    process: Child,
    pub port: u16,
    pub major: u32,
    bin: PathBuf,
    as_nobody: bool,
}

/// Folder with what `make deps` has fetched.
pub fn cache() -> PathBuf {
    if let Some(folder) = std::env::var_os("SLUICE_CACHE") {
        return folder.into();
    }
    if is_root() {
        return "/var/cache/sluice".into();
    }
    PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache/sluice")
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0)
}

/// A port that nobody listens on now.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").expect("a port on loopback").local_addr().expect("an address").port()
}

impl Postgres {
    /// Starts a server with `wal_level=logical`, SCRAM passwords, TLS off, user `postgres`, password `pw`.
    pub fn start(major: u32) -> Self {
        Self::start_with(major, &[])
    }

    /// The same with more lines for postgresql.conf.
    pub fn start_with(major: u32, settings: &[&str]) -> Self {
        let bin = cache().join(format!("pg/{major}/bin"));
        assert!(bin.join("postgres").exists(), "{} is missing: run `make deps`", bin.display());
        let as_nobody = is_root();
        let folder = folder("sluice-pg", as_nobody);
        let data = folder.path().join("data");
        template::data_folder(as_nobody, &bin, &data);
        let port = free_port();
        let mut conf = std::fs::OpenOptions::new().append(true).open(data.join("postgresql.conf")).expect("postgresql.conf");
        writeln!(conf, "listen_addresses='127.0.0.1'\nport={port}\nunix_socket_directories=''\nwal_level=logical\nmax_wal_senders=20\nmax_replication_slots=20\nfsync=off\nlog_min_messages=warning").expect("settings");
        for setting in settings {
            writeln!(conf, "{setting}").expect("settings");
        }
        drop(conf);
        let process = spawn(as_nobody, &bin, folder.path());
        let mut server = Self { folder: Some(folder), process, port, major, bin, as_nobody };
        server.wait_ready();
        server
    }

    fn path(&self) -> &Path {
        self.folder.as_ref().expect("the server has a folder").path()
    }

    /// Data folder.
    pub fn data(&self) -> PathBuf {
        self.path().join("data")
    }

    fn wait_ready(&mut self) {
        if let Err(status) = self.until_ready() {
            panic!("postgres ended: {status}\n{}", self.log());
        }
    }

    /// Waits until connections are accepted; fails when the server ends before that.
    fn until_ready(&mut self) -> Result<(), ExitStatus> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(status) = self.process.try_wait().expect("the server's state") {
                return Err(status);
            }
            // The postmaster writes "ready" (a standby: "standby") into its pid file when it accepts connections. A killed one leaves
            // its file behind.
            let pid_file = std::fs::read_to_string(self.data().join("postmaster.pid")).unwrap_or_default();
            let is_ours = pid_file.lines().next() == Some(self.process.id().to_string().as_str());
            if is_ours && pid_file.lines().nth(7).is_some_and(|line| matches!(line.trim(), "ready" | "standby")) {
                return Ok(());
            }
            assert!(Instant::now() < deadline, "postgres is not ready\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What the server has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path().join("log")).unwrap_or_default()
    }

    /// Stops without a checkpoint, as a crash does, and starts again.
    pub fn crash_and_restart(&mut self) {
        self.signal("-QUIT");
        let _ = self.process.wait();
        self.process = spawn(self.as_nobody, &self.bin, self.path());
        self.wait_ready();
    }

    /// Signal 9 to the postmaster. It is started again as soon as the last of its children has noticed: until then the data
    /// folder is taken.
    pub fn kill_9_and_restart(&mut self) {
        let _ = self.process.kill();
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let _ = self.process.wait();
            self.process = spawn(self.as_nobody, &self.bin, self.path());
            match self.until_ready() {
                Ok(()) => return,
                Err(status) => assert!(Instant::now() < deadline, "postgres ended: {status}\n{}", self.log()),
            }
        }
    }

    /// Stops and does not start.
    pub fn stop(&mut self) {
        self.signal("-INT");
        let _ = self.process.wait();
    }

    /// Starts after [`Self::stop`].
    pub fn start_again(&mut self) {
        self.process = spawn(self.as_nobody, &self.bin, self.path());
        self.wait_ready();
    }

    fn signal(&self, signal: &str) {
        let pid_file = std::fs::read_to_string(self.data().join("postmaster.pid")).unwrap_or_default();
        if let Some(pid) = pid_file.lines().next() {
            let _ = Command::new("kill").arg(signal).arg(pid).stderr(Stdio::null()).status();
        }
    }

    /// How Sluice reaches it.
    pub fn endpoint(&self, database: &str) -> sluice::connectors::postgres::Endpoint {
        sluice::connectors::postgres::Endpoint {
            host: "127.0.0.1".into(),
            domain: None,
            port: self.port,
            database: database.into(),
            username: "postgres".into(),
            password: sluice::connectors::postgres::endpoint::Secret("pw".into()),
            tls: sluice::connectors::postgres::TlsMode::Prefer,
            ca: None,
            client_certificate: None,
            parameters: std::collections::BTreeMap::new(),
            connect_timeout: Duration::from_secs(10),
        }
    }

    /// A plain session of the test's own.
    pub async fn connect(&self, database: &str) -> tokio_postgres::Client {
        let (client, connection) = tokio_postgres::Config::new()
            .host("127.0.0.1")
            .port(self.port)
            .user("postgres")
            .password("pw")
            .dbname(database)
            .connect(tokio_postgres::NoTls)
            .await
            .expect("a connection");
        tokio::spawn(connection);
        client
    }

    /// Makes an empty database and connects to it.
    pub async fn create_database(&self, name: &str) -> tokio_postgres::Client {
        let admin = self.connect("postgres").await;
        admin.batch_execute(&format!("CREATE DATABASE {name}")).await.expect("a database");
        self.connect(name).await
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.signal("-QUIT");
        let _ = self.process.wait();
    }
}

/// A folder that goes away, for the user that servers run as.
fn folder(prefix: &str, as_nobody: bool) -> tempfile::TempDir {
    let folder = tempfile::Builder::new().prefix(prefix).tempdir().expect("a temporary folder");
    if as_nobody {
        run(Command::new("chown").arg("nobody").arg(folder.path()));
    }
    folder
}

fn as_user(nobody: bool, program: &Path) -> Command {
    if !nobody {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "nobody", "--regid", "nogroup", "--clear-groups"]).arg(program);
    command
}

fn spawn(nobody: bool, bin: &Path, folder: &Path) -> Child {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(folder.join("log")).expect("a log file");
    as_user(nobody, &bin.join("postgres"))
        .current_dir(folder)
        .arg("-D")
        .arg(folder.join("data"))
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a log file"))
        .stderr(log)
        .spawn()
        .expect("postgres starts")
}

fn run(command: &mut Command) {
    let output = command.output().expect("the program runs");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Waits until `check` says yes; fails with `what` after `seconds`.
pub async fn eventually<F, Fut>(seconds: u64, what: &str, mut check: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while !check().await {
        assert!(Instant::now() < deadline, "after {seconds} s still not: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
