//! Settings of `sluice worker mirror`: each a flag and an environment variable.

use super::contract::{CONFIG_FOLDER, PORT, STATE_FOLDER};
use super::run::Settings;
use crate::telemetry::LogFormat;
use clap::Args;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// How often mounted files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Flags of `sluice worker mirror`. Everything else comes from the desired document.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Folder of the mounted ConfigMap with desired.json.
    #[arg(long, env = "SLUICE_CONFIG_FOLDER", default_value = CONFIG_FOLDER)]
    pub config_folder: PathBuf,
    /// Folder that outlives the process, for the copy of the desired document.
    #[arg(long, env = "SLUICE_STATE_FOLDER", default_value = STATE_FOLDER)]
    pub state_folder: PathBuf,
    /// Address of status, probes and metrics.
    #[arg(long, env = "SLUICE_LISTEN", default_value_t = SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT)))]
    pub listen: SocketAddr,
    /// Name of this pod, shown in status.
    #[arg(long, env = "POD_NAME", default_value = "")]
    pub pod_name: String,
    /// The pod's termination grace period in seconds. Half of it is the time to commit what is under way on SIGTERM;
    /// after that it is rolled back.
    #[arg(long, env = "SLUICE_GRACE_SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub grace_seconds: u64,
    /// Form of log lines.
    #[arg(long, env = "SLUICE_LOG_FORMAT", value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// Level, or filter such as `info,sluice=debug`.
    #[arg(long, env = "SLUICE_LOG_LEVEL", default_value = "info")]
    pub log_level: String,
}

impl Options {
    /// What the event loop takes.
    #[must_use]
    pub fn settings(&self) -> Settings {
        Settings {
            config_folder: self.config_folder.clone(),
            state_folder: self.state_folder.clone(),
            pod: self.pod_name.clone(),
            time_to_commit: Duration::from_secs(self.grace_seconds) / 2,
            look_every: LOOK_EVERY,
        }
    }
}
