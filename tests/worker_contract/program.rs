//! The real program: command line, signals, exit codes, logs.

use crate::pod::{Caller, PASSWORD, Pod};
use crate::support::free_port;
use reqwest::StatusCode;
use serde_json::Value;
use sluice::engine::error::reason;
use sluice::worker::contract::Phase;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The real program.
struct Program {
    child: Child,
    address: SocketAddr,
}

impl Program {
    fn start(pod: &Pod) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
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
        let output = tokio::time::timeout(Duration::from_secs(20), waited).await.expect("it ends").unwrap();
        let log = String::from_utf8(output.stderr).unwrap();
        assert_ne!(output.status.signal(), Some(9), "{log}");
        (output.status.code(), log.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
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
