//! A Source or a Target as a Mirror needs it, and whether it may be used. Pure.

use super::problem::{Problem, documented};
use crate::engine::error::reason as engine;
use crate::resources::conditions::{self, kind, reason};
use crate::resources::{Connection, ConnectionStatus, Prerequisite, Source, Target, Tls};
use crate::worker::contract::{EndpointSpec, SOURCE_FOLDER, TARGET_FOLDER};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::Serialize;

/// Which end of a Mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Where changes are read.
    Source,
    /// Where they are written.
    Target,
}

impl Side {
    /// The kind's name.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Source => "Source",
            Self::Target => "Target",
        }
    }
}

/// A Source or a Target.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Which of the two.
    pub side: Side,
    /// Its metadata.
    pub meta: ObjectMeta,
    /// How the worker reaches it.
    pub endpoint: EndpointSpec,
    /// What is mounted into the worker.
    pub secrets: Secrets,
    /// What its controller has found.
    pub status: Option<ConnectionStatus>,
}

/// Names of the Secrets of one side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Secrets {
    /// User name and password.
    pub credentials: String,
    /// CA bundle: Secret and key.
    pub ca: Option<(String, String)>,
    /// Client certificate.
    pub client: Option<String>,
}

impl Secrets {
    fn of(credentials: &str, tls: &Tls) -> Self {
        Self {
            credentials: credentials.to_owned(),
            ca: tls.ca_ref.as_ref().map(|ca| (ca.name.clone(), ca.key.clone())),
            client: tls.client_certificate_ref.as_ref().map(|client| client.name.clone()),
        }
    }

    /// Their names; one may come twice.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let ca = self.ca.as_ref().map(|(name, _)| name.as_str());
        std::iter::once(self.credentials.as_str()).chain(ca).chain(self.client.as_deref())
    }
}

impl From<&Source> for Peer {
    fn from(source: &Source) -> Self {
        Self::new(Side::Source, SOURCE_FOLDER, source)
    }
}

impl From<&Target> for Peer {
    fn from(target: &Target) -> Self {
        Self::new(Side::Target, TARGET_FOLDER, target)
    }
}

impl Peer {
    fn new<K: Connection + Resource>(side: Side, folder: &str, object: &K) -> Self {
        let spec = object.connection();
        Self {
            side,
            meta: object.meta().clone(),
            endpoint: EndpointSpec {
                engine: format!("{:?}", spec.engine),
                host: spec.host.to_owned(),
                // The schema keeps it between 1 and 65535.
                port: u16::try_from(spec.port).unwrap_or_default(),
                database: spec.database.to_owned(),
                tls_mode: format!("{:?}", spec.tls.mode),
                folder: folder.to_owned(),
                ca_key: spec.tls.ca_ref.as_ref().map(|ca| ca.key.clone()),
                client_certificate: spec.tls.client_certificate_ref.is_some(),
                parameters: spec.parameters.iter().map(|(name, value)| (name.clone(), value.0.clone())).collect(),
                connect_timeout_seconds: u32::try_from(spec.connect_timeout_seconds).unwrap_or_default(),
            },
            secrets: Secrets::of(&spec.credentials_ref.name, spec.tls),
            status: object.connection_status().cloned(),
        }
    }

    fn name(&self) -> &str {
        self.meta.name.as_deref().unwrap_or_default()
    }

    /// Whether it is on its way out.
    pub fn is_deleting(&self) -> bool {
        self.meta.deletion_timestamp.is_some()
    }
}

/// Why the peer that a Mirror refers to by `name` may not be used by a new worker; `None` when it may.
pub fn problem(side: Side, name: &str, peer: Option<&Peer>) -> Option<Problem> {
    broken(side, name, peer).or_else(|| peer.and_then(unready))
}

/// The part of [`problem`] that also matters while a worker runs: only a human can put a missing peer right.
pub fn broken(side: Side, name: &str, peer: Option<&Peer>) -> Option<Problem> {
    let (not_found, deleting) = match side {
        Side::Source => (reason::SOURCE_NOT_FOUND, reason::SOURCE_DELETING),
        Side::Target => (reason::TARGET_NOT_FOUND, reason::TARGET_DELETING),
    };
    match peer {
        None => Some(Problem::stop(not_found, format!("{} {name} does not exist in this namespace", side.kind()))),
        Some(peer) if peer.is_deleting() => {
            let cure = "delete this Mirror too, or make both anew";
            Some(Problem::stop(deleting, format!("{} {name} is being deleted; {cure}", side.kind())))
        }
        Some(_) => None,
    }
}

fn unready(peer: &Peer) -> Option<Problem> {
    let not_ready = match peer.side {
        Side::Source => reason::SOURCE_NOT_READY,
        Side::Target => reason::TARGET_NOT_READY,
    };
    let (name, kind) = (peer.name(), peer.side.kind());
    let unverified = || Some(Problem::retry(not_ready, format!("{kind} {name} has not been verified yet")));
    let Some(status) = peer.status.as_ref().filter(|status| status.observed_generation == peer.meta.generation) else {
        return unverified();
    };
    let Some(ready) = conditions::get(&status.conditions, kind::READY).filter(|ready| ready.status != "Unknown") else {
        return unverified();
    };
    if ready.status != "True" {
        let problem = Problem {
            reason: documented(&ready.reason),
            message: format!("{kind} {name}: {}", ready.message),
            needs_human: conditions::is_true(&status.conditions, kind::STALLED),
        };
        return Some(problem);
    }
    match conditions::get(&status.conditions, kind::PREREQUISITES_MET).map(|met| met.status.as_str()) {
        Some("True") => None,
        Some("False") => missing(peer, &status.failed_prerequisites),
        _ => unverified(),
    }
}

/// Warnings stop nothing.
fn missing(peer: &Peer, failed: &[Prerequisite]) -> Option<Problem> {
    let stops: Vec<_> = failed.iter().filter(|failed| failed.name != engine::SLOT_WAL_UNLIMITED).collect();
    if stops.is_empty() && !failed.is_empty() {
        return None;
    }
    let list: Vec<_> = stops.iter().map(|failed| format!("{}: {}", failed.name, failed.message)).collect();
    let list = if list.is_empty() { "see its condition PrerequisitesMet".to_owned() } else { list.join("; ") };
    Some(Problem::stop(reason::PREREQUISITES_MISSING, format!("{} {}: {list}", peer.side.kind(), peer.name())))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// A Source that a Mirror may use.
    pub fn source() -> Source {
        serde_json::from_value(json!({
            "apiVersion": "sluice.dev/v1alpha1", "kind": "Source",
            "metadata": {"name": "shop", "namespace": "shop", "generation": 1, "uid": "s"},
            "spec": {"engine": "PostgreSQL", "host": "shop-db", "port": 5432, "database": "shop", "credentialsRef": {"name": "shop-db"}},
            "status": status("True", "Available", "True"),
        }))
        .expect("a source")
    }

    /// A Target that a Mirror may use.
    pub fn target() -> Target {
        serde_json::from_value(json!({
            "apiVersion": "sluice.dev/v1alpha1", "kind": "Target",
            "metadata": {"name": "dw", "namespace": "shop", "generation": 1, "uid": "t"},
            "spec": {"engine": "PostgreSQL", "host": "dw-db", "database": "dw", "credentialsRef": {"name": "dw-db"},
                "tls": {"mode": "VerifyFull", "caRef": {"name": "dw-ca", "key": "root.pem"}, "clientCertificateRef": {"name": "dw-client"}},
                "parameters": {"application_name": "sluice"}},
            "status": status("True", "Available", "True"),
        }))
        .expect("a target")
    }

    pub fn status(ready: &str, reason: &str, met: &str) -> Value {
        let condition = |kind: &str, status: &str, reason: &str| json!({"type": kind, "status": status, "reason": reason, "message": "said", "lastTransitionTime": "2026-01-01T00:00:00Z"});
        json!({"observedGeneration": 1, "conditions": [
            condition("Ready", ready, reason), condition("PrerequisitesMet", met, "PrerequisitesMissing"),
        ]})
    }

    fn with(status: Value) -> Option<Problem> {
        let mut source = source();
        source.status = serde_json::from_value(status).expect("a status");
        problem(Side::Source, "shop", Some(&Peer::from(&source)))
    }

    #[test]
    fn a_verified_peer_may_be_used() {
        assert_eq!(problem(Side::Source, "shop", Some(&Peer::from(&source()))), None);
        assert_eq!(problem(Side::Target, "dw", Some(&Peer::from(&target()))), None);
    }

    #[test]
    fn a_missing_or_leaving_peer_needs_a_human() {
        let found = problem(Side::Target, "dw", None).expect("a problem");
        assert_eq!((found.reason, found.needs_human), ("TargetNotFound", true));
        let mut source = source();
        source.metadata.deletion_timestamp =
            Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(k8s_openapi::jiff::Timestamp::UNIX_EPOCH));
        assert_eq!(broken(Side::Source, "shop", Some(&Peer::from(&source))).expect("a problem").reason, "SourceDeleting");
    }

    #[test]
    fn what_is_not_verified_for_this_generation_waits() {
        let found = with(Value::Null).expect("a problem");
        assert_eq!((found.reason, found.needs_human), ("SourceNotReady", false));
        let mut old = status("True", "Available", "True");
        old["observedGeneration"] = json!(-1);
        assert_eq!(with(old).expect("a problem").reason, "SourceNotReady");
        assert_eq!(with(status("Unknown", "Progressing", "True")).expect("a problem").reason, "SourceNotReady");
        assert_eq!(with(status("True", "Available", "Unknown")).expect("a problem").reason, "SourceNotReady");
    }

    #[test]
    fn the_reason_of_the_source_is_shown_on_the_mirror() {
        let found = with(status("False", "SecretNotFound", "True")).expect("a problem");
        assert_eq!((found.reason, found.needs_human, found.message.as_str()), ("SecretNotFound", false, "Source shop: said"));
        let mut stalled = status("False", "AuthenticationFailed", "True");
        stalled["conditions"].as_array_mut().expect("a list").push(json!({"type": "Stalled", "status": "True",
            "reason": "AuthenticationFailed", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}));
        assert!(with(stalled).expect("a problem").needs_human);
    }

    #[test]
    fn failed_prerequisites_stop_and_warnings_do_not() {
        let mut failed = status("True", "Available", "False");
        failed["failedPrerequisites"] = json!([{"name": "SlotWalUnlimited", "message": "w"}]);
        assert_eq!(with(failed.clone()), None);
        failed["failedPrerequisites"] =
            json!([{"name": "SlotWalUnlimited", "message": "w"}, {"name": "WalLevelNotLogical", "message": "m"}]);
        let found = with(failed).expect("a problem");
        assert_eq!((found.reason, found.needs_human), ("PrerequisitesMissing", true));
        assert_eq!(found.message, "Source shop: WalLevelNotLogical: m");
        assert_eq!(with(status("True", "Available", "False")).expect("a problem").reason, "PrerequisitesMissing");
    }

    #[test]
    fn names_of_secrets() {
        let peer = Peer::from(&target());
        assert_eq!(peer.secrets.names().collect::<Vec<_>>(), ["dw-db", "dw-ca", "dw-client"]);
        assert_eq!(
            (peer.endpoint.tls_mode.as_str(), peer.endpoint.ca_key.as_deref(), peer.endpoint.port),
            ("VerifyFull", Some("root.pem"), 5432)
        );
    }
}
