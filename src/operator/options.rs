//! Settings of `sluice operator`: each a flag and an environment variable.

use crate::telemetry::LogFormat;
use clap::{ArgAction, Args};
use std::net::SocketAddr;

/// Flags of `sluice operator`; see `docs/src/reference/operator.md`.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Address of probes and metrics.
    #[arg(long, env = "SLUICE_LISTEN", default_value = "0.0.0.0:8080")]
    pub listen: SocketAddr,
    /// The operator's own namespace: lease, signing key, events about what outlives a user's namespace.
    #[arg(long, env = "POD_NAMESPACE", default_value = "sluice-system")]
    pub namespace: String,
    /// Name of the operator's pod: identity in the leader election and reporter of events.
    #[arg(long, env = "POD_NAME", default_value = "sluice-operator")]
    pub pod_name: String,
    /// Uid of the operator's pod: tells two pods of one name apart in the leader election.
    #[arg(long, env = "POD_UID", default_value = "")]
    pub pod_uid: String,
    /// Namespaces to serve, separated by commas; all when empty.
    #[arg(long, env = "SLUICE_WATCH_NAMESPACES", value_delimiter = ',', num_args = 0..)]
    pub watch_namespaces: Vec<String>,
    /// RoleBinding that gives the operator its rights in each of `--watch-namespaces`; it is kept while a Mirror there has something to
    /// clean up. Empty: none is kept.
    #[arg(long, env = "SLUICE_ROLE_BINDING", default_value = "")]
    pub role_binding: String,
    /// Image of workers.
    #[arg(long, env = "SLUICE_WORKER_IMAGE", default_value = concat!("sluice:", env!("CARGO_PKG_VERSION")))]
    pub worker_image: String,
    /// Pull policy of workers' images.
    #[arg(long, env = "SLUICE_WORKER_IMAGE_PULL_POLICY", default_value = "IfNotPresent", value_parser = ["Always", "IfNotPresent", "Never"])]
    pub worker_image_pull_policy: String,
    /// Form of log lines.
    #[arg(long, env = "SLUICE_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Level, or filter such as `info,sluice=debug`.
    #[arg(long, env = "SLUICE_LOG_LEVEL", default_value = "info")]
    pub log_level: String,
    /// Hold a lease before working. Off only with a single replica.
    #[arg(long, env = "SLUICE_LEADER_ELECTION", default_value_t = true, action = ArgAction::Set)]
    pub leader_election: bool,
    /// Name of the Lease in the own namespace.
    #[arg(long, env = "SLUICE_LEASE_NAME", default_value = "sluice-operator")]
    pub lease_name: String,
    /// Resources reconciled at the same time, per controller.
    #[arg(long, env = "SLUICE_CONCURRENCY", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub concurrency: u16,
    /// Put a finalizer on Secrets while a Mirror needs them.
    #[arg(long, env = "SLUICE_PROTECT_SECRETS", default_value_t = true, action = ArgAction::Set)]
    pub protect_secrets: bool,
    /// Write a NetworkPolicy for each worker.
    #[arg(long, env = "SLUICE_WORKER_NETWORK_POLICIES", default_value_t = true, action = ArgAction::Set)]
    pub worker_network_policies: bool,
    /// Secret in the own namespace with the key that signs calls to workers; made when missing.
    #[arg(long, env = "SLUICE_SIGNING_KEY_SECRET", default_value = "sluice-signing-key")]
    pub signing_key_secret: String,
    /// ValidatingAdmissionPolicy that enforces `deletionProtection`.
    #[arg(long, env = "SLUICE_DELETION_POLICY_NAME", default_value = "sluice-deletion-protection")]
    pub deletion_policy_name: String,
    /// Text put into labels of what the operator makes.
    #[arg(long, env = "SLUICE_RELEASE", default_value = env!("CARGO_PKG_VERSION"))]
    pub release: String,
    /// Minutes after which cleaning up an unreachable source is given up.
    #[arg(long, env = "SLUICE_CLEAN_UP_MINUTES", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1440))]
    pub clean_up_minutes: u32,
}

impl Options {
    /// The level, with kube's client quiet unless it is named: it logs each failed request as an error of its own, and whoever made the
    /// request logs what becomes of it.
    pub fn log_filter(&self) -> String {
        if self.log_level.contains("kube") { self.log_level.clone() } else { format!("{},kube_client=off", self.log_level) }
    }

    /// Namespaces to serve: one entry `None` for all, or each named once.
    pub fn scopes(&self) -> Vec<Option<String>> {
        let mut named: Vec<_> = self.watch_namespaces.iter().map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect();
        named.sort();
        named.dedup();
        if named.is_empty() { vec![None] } else { named.into_iter().map(Some).collect() }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::Options;
    use clap::{Args as _, FromArgMatches as _};

    /// The options that these flags give.
    pub fn parse(args: &[&str]) -> Options {
        let command = Options::augment_args(clap::Command::new("operator"));
        Options::from_arg_matches(&command.get_matches_from(std::iter::once(&"operator").chain(args))).expect("valid flags")
    }

    #[test]
    fn flags_of_the_chart_are_understood() {
        let options = parse(&["--watch-namespaces=a,b,a", "--leader-election=false", "--protect-secrets=true", "--listen=[::]:8080"]);
        assert_eq!(options.scopes(), [Some("a".to_owned()), Some("b".to_owned())]);
        assert!(!options.leader_election && options.protect_secrets);
    }

    #[test]
    fn the_filter_of_the_logs_is_valid_and_can_be_overruled() {
        for (level, filter) in
            [("info", "info,kube_client=off"), ("info,sluice=debug", "info,sluice=debug,kube_client=off"), ("kube=debug", "kube=debug")]
        {
            let options = parse(&[&format!("--log-level={level}")]);
            assert_eq!(options.log_filter(), filter);
            assert!(crate::telemetry::filter(filter).is_ok());
        }
    }

    #[test]
    fn an_empty_list_means_all_namespaces() {
        assert_eq!(parse(&[]).scopes(), [None]);
        assert_eq!(parse(&["--watch-namespaces="]).scopes(), [None]);
    }
}
