//! What the figures were measured on.

use crate::Result;
use crate::servers::Servers;
use serde_json::{Value, json};
use std::process::Command;
use std::time::Duration;

/// Machine, versions and settings.
pub async fn facts(servers: &Servers) -> Result<Value> {
    let client = servers.target.connect("postgres").await;
    let version: String = client.query_one("SHOW server_version", &[]).await?.get(0);
    let rows = client
        .query(
            "SELECT name || ' = ' || current_setting(name) FROM pg_settings
             WHERE sourcefile IS NOT NULL AND name NOT IN ('port', 'listen_addresses', 'unix_socket_directories', 'log_min_messages')
               AND name !~ '^(lc_|log_|TimeZone|DateStyle|default_text_search_config)' ORDER BY name",
            &[],
        )
        .await?;
    let settings: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    let folder = std::env::temp_dir();
    Ok(json!({
        "machine": {
            "processor": line("/proc/cpuinfo", "model name").unwrap_or_default(),
            "cores": std::thread::available_parallelism().map_or(0, usize::from),
            "memory": line("/proc/meminfo", "MemTotal").unwrap_or_default(),
            "Linux": said(Command::new("uname").arg("-r")).split('-').next(),
            "file system": said(Command::new("findmnt").args(["-n", "-o", "FSTYPE", "-T"]).arg(folder)),
        },
        "versions": {
            "PostgreSQL, source and target": version,
            "psql": said(Command::new("psql").arg("--version")),
            "pg_recvlogical": said(Command::new("pg_recvlogical").arg("--version")),
            "pgcopydb": said(Command::new("pgcopydb").arg("--version")),
        },
        "settings": settings,
    }))
}

/// What is measured: the version and, in a checkout, its commit.
pub fn sluice() -> String {
    let version = env!("CARGO_PKG_VERSION");
    match std::env::var("SLUICE_BIN") {
        Ok(program) if !program.is_empty() => "of another build".to_owned(),
        _ => format!("{version} ({})", said(Command::new("git").args(["describe", "--always", "--dirty"]))),
    }
}

/// Part of the processors' time that nobody used in the last second: how quiet the machine is.
pub async fn idle() -> f64 {
    let before = processor_time();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let after = processor_time();
    (after.0 - before.0) / (after.1 - before.1).max(1.0)
}

/// Idle and all ticks of all processors (manual: proc(5), `/proc/stat`).
fn processor_time() -> (f64, f64) {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = text.lines().next().unwrap_or_default();
    // user, nice, system, idle, iowait, irq, softirq, steal; guests are in user already.
    let ticks: Vec<f64> = line.split_whitespace().skip(1).take(8).filter_map(|ticks| ticks.parse().ok()).collect();
    (ticks.get(3).copied().unwrap_or(0.0), ticks.iter().sum())
}

fn line(file: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// First line of what a program says; nothing when it is not there.
fn said(command: &mut Command) -> String {
    let output = command.output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).lines().next().unwrap_or_default().trim().to_owned()
}
