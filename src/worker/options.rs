//! Settings of `sluice worker mirror`: each a flag and an environment variable.

use super::contract::{CONFIG_FOLDER, PORT, STATE_FOLDER};
use super::run::Settings;
use crate::engine::spill::{Disk, Room};
use crate::telemetry::LogFormat;
use clap::Args;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// How often mounted files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Folder of the spill in the state folder.
const SPILL_FOLDER: &str = "spill";
const MIB: u64 = 1024 * 1024;
/// Bounds of the memory of the log.
const LOG_MEMORY: std::ops::RangeInclusive<u64> = 16 * MIB..=256 * MIB;

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
    /// Memory of the container in bytes. An eighth of it, at least 16 MiB and at most 256 MiB, is for the log: changes
    /// until they are applied, and transactions that have not ended.
    #[arg(long, env = "SLUICE_MEMORY_LIMIT", default_value_t = 512 * MIB)]
    pub memory_limit: u64,
    /// Bytes that the state folder may hold. Four fifths of them are for the spill: transactions that have not ended and do not fit
    /// into memory.
    #[arg(long, env = "SLUICE_STATE_LIMIT", default_value_t = 2048 * MIB)]
    pub state_limit: u64,
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

    /// What the log may take of the machine.
    #[must_use]
    pub fn room(&self) -> Room {
        let memory = (self.memory_limit / 8).clamp(*LOG_MEMORY.start(), *LOG_MEMORY.end());
        let disk = Disk { folder: self.state_folder.join(SPILL_FOLDER), limit: self.state_limit / 5 * 4 };
        Room { memory: usize::try_from(memory).unwrap_or(usize::MAX), disk: Some(disk) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    #[test]
    fn the_log_has_its_share_of_memory_and_disk() {
        let room = |arguments: &[&str]| Line::parse_from([&["worker", "--state-folder", "/state"], arguments].concat()).options.room();
        let disk = |limit| Some(Disk { folder: "/state/spill".into(), limit });
        assert_eq!(room(&["--memory-limit", "536870912", "--state-limit", "1000"]), Room { memory: 64 << 20, disk: disk(800) });
        assert_eq!(room(&["--memory-limit", "1", "--state-limit", "0"]), Room { memory: 16 << 20, disk: disk(0) });
        assert_eq!(room(&["--memory-limit", "99999999999", "--state-limit", "0"]).memory, 256 << 20);
    }
}
