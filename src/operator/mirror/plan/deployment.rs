//! The worker's Deployment, and the hash of the inputs that need a restart.

use super::super::peer::{Peer, Secrets};
use super::{child_meta, name};
use crate::operator::Options;
use crate::operator::slim::SlimMirror;
use crate::resources::Worker;
use crate::resources::names::{RESTART_HASH, selector_labels};
use crate::worker::contract::{CONFIG_FOLDER, MMAP_THRESHOLD, PORT, SOURCE_FOLDER, STATE_FOLDER, TARGET_FOLDER};
use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy};
use k8s_openapi::api::core::v1::{
    Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvVar, EnvVarSource, HTTPGetAction, KeyToPath,
    ObjectFieldSelector, PodSecurityContext, PodSpec, PodTemplateSpec, Probe, ProjectedVolumeSource, ResourceFieldSelector,
    ResourceRequirements, SeccompProfile, SecretProjection, SecurityContext, Toleration, Volume, VolumeMount, VolumeProjection,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Name of the container.
const CONTAINER: &str = "worker";
/// Name of its port.
const PORT_NAME: &str = "http";
/// User and group of the image.
const USER: i64 = 65532;
/// Room for spill when the spec asks for none.
const STORAGE: &str = "2Gi";
/// Key of the room for spill among resources.
const STORAGE_KEY: &str = "ephemeral-storage";
/// Key of memory among resources.
const MEMORY_KEY: &str = "memory";
/// Seconds between SIGTERM and SIGKILL: half of it is the worker's time to commit.
const GRACE_SECONDS: i64 = 60;
/// Files are readable by the pod's user and group alone.
const FILE_MODE: i32 = 0o440;
/// Seconds that a worker stays on a node that is not heard of: a stream stands still meanwhile, the claim keeps two from writing.
const LOST_NODE_SECONDS: i64 = 30;

/// What the container runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Reference.
    pub name: String,
    /// Pull policy.
    pub pull_policy: String,
}

impl Image {
    /// The Mirror's own, else the operator's.
    pub fn of(mirror: &SlimMirror, options: &Options) -> Self {
        let own = mirror.spec.worker.as_ref().and_then(|worker| worker.image.clone());
        Self { name: own.unwrap_or_else(|| options.worker_image.clone()), pull_policy: options.worker_image_pull_policy.clone() }
    }
}

/// Hash of the inputs that need a restart: fields of the spec and what is mounted by name. Neither the operator's image nor its way to
/// render a template, so that upgrading the operator restarts nothing.
pub fn restart_hash(mirror: &SlimMirror, source: &Peer, target: &Peer) -> String {
    let default = Worker::default();
    let worker = mirror.spec.worker.as_ref().unwrap_or(&default);
    let inputs = json!({
        "resources": worker.resources,
        "nodeSelector": worker.node_selector,
        "tolerations": worker.tolerations,
        "priorityClassName": worker.priority_class_name,
        "image": worker.image,
        "source": source.secrets,
        "target": target.secrets,
    });
    let digest = Sha256::digest(inputs.to_string().as_bytes());
    digest.iter().take(16).fold(String::with_capacity(32), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The Deployment. `release` is shown as a label of the Deployment, never of its pods.
pub fn deployment(mirror: &SlimMirror, source: &Peer, target: &Peer, image: &Image, release: &str) -> Deployment {
    let mut metadata = child_meta(mirror);
    let pod_labels = metadata.labels.clone();
    let hash: BTreeMap<_, _> = [(RESTART_HASH.to_owned(), restart_hash(mirror, source, target))].into();
    metadata.labels.get_or_insert_default().insert("app.kubernetes.io/version".to_owned(), label_value(release));
    metadata.annotations = Some(hash.clone());
    Deployment {
        metadata,
        spec: Some(DeploymentSpec {
            replicas: Some(1),
            revision_history_limit: Some(1),
            progress_deadline_seconds: Some(600),
            // Two workers of one Mirror are harmless, but the second would take the claim from the first.
            strategy: Some(DeploymentStrategy { type_: Some("Recreate".to_owned()), ..DeploymentStrategy::default() }),
            selector: LabelSelector { match_labels: Some(selector_labels(name(mirror))), ..LabelSelector::default() },
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta { labels: pod_labels, annotations: Some(hash), ..ObjectMeta::default() }),
                spec: Some(pod(mirror, source, target, image)),
            },
            ..DeploymentSpec::default()
        }),
        ..Deployment::default()
    }
}

fn pod(mirror: &SlimMirror, source: &Peer, target: &Peer, image: &Image) -> PodSpec {
    let default = Worker::default();
    let worker = mirror.spec.worker.as_ref().unwrap_or(&default);
    let resources = resources(worker);
    PodSpec {
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        termination_grace_period_seconds: Some(GRACE_SECONDS),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            run_as_group: Some(USER),
            fs_group: Some(USER),
            seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), ..SeccompProfile::default() }),
            ..PodSecurityContext::default()
        }),
        node_selector: (!worker.node_selector.is_empty()).then(|| worker.node_selector.clone()),
        tolerations: Some(tolerations(worker)),
        priority_class_name: worker.priority_class_name.clone(),
        volumes: Some(volumes(mirror, source, target, &resources)),
        containers: vec![container(image, resources)],
        ..PodSpec::default()
    }
}

fn container(image: &Image, resources: ResourceRequirements) -> Container {
    Container {
        name: CONTAINER.to_owned(),
        image: Some(image.name.clone()),
        image_pull_policy: Some(image.pull_policy.clone()),
        args: Some(vec!["worker".to_owned(), "mirror".to_owned()]),
        env: Some(environment(&resources)),
        ports: Some(vec![ContainerPort {
            name: Some(PORT_NAME.to_owned()),
            container_port: i32::from(PORT),
            protocol: Some("TCP".to_owned()),
            ..ContainerPort::default()
        }]),
        resources: Some(resources),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            run_as_non_root: Some(true),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), ..Capabilities::default() }),
            seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), ..SeccompProfile::default() }),
            ..SecurityContext::default()
        }),
        volume_mounts: Some(
            [
                ("config", CONFIG_FOLDER, true),
                ("source", SOURCE_FOLDER, true),
                ("target", TARGET_FOLDER, true),
                ("state", STATE_FOLDER, false),
            ]
            .map(|(name, path, read_only)| VolumeMount {
                name: name.to_owned(),
                mount_path: path.to_owned(),
                read_only: read_only.then_some(true),
                ..VolumeMount::default()
            })
            .into(),
        ),
        // None of them looks at a database: a restart cures no outage there.
        startup_probe: Some(probe("/livez", 5, 60)),
        liveness_probe: Some(probe("/livez", 10, 6)),
        readiness_probe: Some(probe("/readyz", 5, 3)),
        ..Container::default()
    }
}

/// What the worker learns of its pod: its name, how much memory and disk are its own, and how its memory is to be had.
fn environment(resources: &ResourceRequirements) -> Vec<EnvVar> {
    let field = ObjectFieldSelector { field_path: "metadata.name".to_owned(), api_version: Some("v1".to_owned()) };
    let variable = |name: &str, source: EnvVarSource| EnvVar { name: name.to_owned(), value_from: Some(source), ..EnvVar::default() };
    let resource = |name: &str, resource: &str| {
        let selector = ResourceFieldSelector { resource: resource.to_owned(), ..ResourceFieldSelector::default() };
        variable(name, EnvVarSource { resource_field_ref: Some(selector), ..EnvVarSource::default() })
    };
    let has = |quantities: &Option<BTreeMap<String, Quantity>>| quantities.as_ref().is_some_and(|all| all.contains_key(MEMORY_KEY));
    // A limit that is not set would be read as the memory of the node.
    let memory = match (has(&resources.limits), has(&resources.requests)) {
        (true, _) => Some("limits.memory"),
        (false, true) => Some("requests.memory"),
        (false, false) => None,
    };
    let name = variable("POD_NAME", EnvVarSource { field_ref: Some(field), ..EnvVarSource::default() });
    let storage = resource("SLUICE_STATE_LIMIT", "requests.ephemeral-storage");
    let (threshold, value) = MMAP_THRESHOLD;
    let threshold = EnvVar { name: threshold.to_owned(), value: Some(value.to_owned()), ..EnvVar::default() };
    [name, threshold, storage].into_iter().chain(memory.map(|memory| resource("SLUICE_MEMORY_LIMIT", memory))).collect()
}

fn probe(path: &str, period: i32, failures: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String(PORT_NAME.to_owned()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period),
        timeout_seconds: Some(5),
        failure_threshold: Some(failures),
        ..Probe::default()
    }
}

fn volumes(mirror: &SlimMirror, source: &Peer, target: &Peer, resources: &ResourceRequirements) -> Vec<Volume> {
    let room = resources.requests.as_ref().and_then(|requests| requests.get(STORAGE_KEY)).cloned();
    vec![
        Volume {
            name: "config".to_owned(),
            config_map: Some(ConfigMapVolumeSource {
                name: child_meta(mirror).name.unwrap_or_default(),
                default_mode: Some(FILE_MODE),
                ..ConfigMapVolumeSource::default()
            }),
            ..Volume::default()
        },
        secret_volume("source", &source.secrets),
        secret_volume("target", &target.secrets),
        Volume {
            name: "state".to_owned(),
            empty_dir: Some(EmptyDirVolumeSource { size_limit: room, ..EmptyDirVolumeSource::default() }),
            ..Volume::default()
        },
    ]
}

/// All Secrets of one side in one folder: `credentials/`, `ca/`, `client/`.
fn secret_volume(name: &str, secrets: &Secrets) -> Volume {
    let key = |key: &str, folder: &str| KeyToPath { key: key.to_owned(), path: format!("{folder}/{key}"), mode: None };
    let part = |secret: &str, items: Vec<KeyToPath>| VolumeProjection {
        secret: Some(SecretProjection { name: secret.to_owned(), items: Some(items), optional: None }),
        ..VolumeProjection::default()
    };
    let mut sources = vec![part(&secrets.credentials, vec![key("username", "credentials"), key("password", "credentials")])];
    sources.extend(secrets.ca.as_ref().map(|(secret, ca)| part(secret, vec![key(ca, "ca")])));
    sources.extend(secrets.client.as_ref().map(|secret| part(secret, vec![key("tls.crt", "client"), key("tls.key", "client")])));
    Volume {
        name: name.to_owned(),
        projected: Some(ProjectedVolumeSource { default_mode: Some(FILE_MODE), sources: Some(sources) }),
        ..Volume::default()
    }
}

/// The spec's, or ours. The request for storage is always there: it is the budget of the spill, and the kubelet evicts beyond it.
fn resources(worker: &Worker) -> ResourceRequirements {
    let quantities = |pairs: &[(&str, &str)]| pairs.iter().map(|(key, value)| ((*key).to_owned(), Quantity((*value).to_owned()))).collect();
    let mut resources = worker.resources.clone().unwrap_or_else(|| ResourceRequirements {
        requests: Some(quantities(&[("cpu", "100m"), ("memory", "128Mi")])),
        limits: Some(quantities(&[("memory", "512Mi")])),
        ..ResourceRequirements::default()
    });
    let limit = resources.limits.as_ref().and_then(|limits| limits.get(STORAGE_KEY)).cloned();
    let room = limit.unwrap_or_else(|| Quantity(STORAGE.to_owned()));
    resources.requests.get_or_insert_default().entry(STORAGE_KEY.to_owned()).or_insert(room);
    resources
}

/// The user's, and a short stay on lost nodes unless the user says how long.
fn tolerations(worker: &Worker) -> Vec<Toleration> {
    let given = |key: &str| worker.tolerations.iter().any(|own| own.key.as_deref() == Some(key));
    let lost = ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"].into_iter().filter(|key| !given(key));
    let ours = lost.map(|key| Toleration {
        key: Some(key.to_owned()),
        operator: Some("Exists".to_owned()),
        effect: Some("NoExecute".to_owned()),
        toleration_seconds: Some(LOST_NODE_SECONDS),
        ..Toleration::default()
    });
    ours.chain(worker.tolerations.iter().cloned()).collect()
}

/// The text as a value of a label: at most 63 of `[A-Za-z0-9._-]`, with a letter or digit at both ends.
fn label_value(text: &str) -> String {
    let kept: String =
        text.chars().map(|char| if char.is_ascii_alphanumeric() || "._-".contains(char) { char } else { '-' }).take(63).collect();
    kept.trim_matches(|char: char| !char.is_ascii_alphanumeric()).to_owned()
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value)] // documents are written in place
mod tests {
    use super::*;
    use crate::operator::mirror::validate::tests::slim;

    fn worker(spec: serde_json::Value) -> Worker {
        slim(json!({"tables": [{"name": "a"}], "worker": spec})).spec.worker.expect("a worker")
    }

    #[test]
    fn storage_is_always_requested() {
        let requests = |spec| resources(&worker(spec)).requests.expect("requests");
        assert_eq!(requests(json!({}))["ephemeral-storage"].0, "2Gi");
        assert_eq!(requests(json!({"resources": {"requests": {"ephemeral-storage": "1Gi"}}}))["ephemeral-storage"].0, "1Gi");
        let limited = requests(json!({"resources": {"limits": {"ephemeral-storage": "500Mi"}}}));
        assert_eq!(limited["ephemeral-storage"].0, "500Mi");
        assert!(!limited.contains_key("cpu"), "the user's resources are not mixed with ours");
    }

    #[test]
    fn the_worker_learns_what_is_its_own() {
        let learned = |spec| {
            let variables = environment(&resources(&worker(spec)));
            let resource = |variable: EnvVar| Some((variable.name, variable.value_from?.resource_field_ref?.resource));
            variables.into_iter().filter_map(resource).collect::<Vec<_>>()
        };
        let storage = ("SLUICE_STATE_LIMIT".to_owned(), "requests.ephemeral-storage".to_owned());
        let memory = |from: &str| ("SLUICE_MEMORY_LIMIT".to_owned(), from.to_owned());
        assert_eq!(learned(json!({})), [storage.clone(), memory("limits.memory")]);
        assert_eq!(learned(json!({"resources": {"requests": {"memory": "1Gi"}}})), [storage.clone(), memory("requests.memory")]);
        assert_eq!(learned(json!({"resources": {"limits": {"cpu": "1"}}})), [storage]);
    }

    #[test]
    fn a_toleration_of_the_user_replaces_ours() {
        let own = json!({"tolerations": [{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"}]});
        let all = tolerations(&worker(own));
        assert_eq!(all.len(), 2);
        assert_eq!(all.iter().filter_map(|one| one.toleration_seconds).collect::<Vec<_>>(), [30]);
    }

    #[test]
    fn any_release_is_a_label() {
        assert_eq!(label_value("1.2.3"), "1.2.3");
        assert_eq!(label_value("1.2.3+build 7-"), "1.2.3-build-7");
        assert_eq!(label_value(&"é".repeat(99)), "");
        assert_eq!(label_value(&"a".repeat(99)).len(), 63);
    }
}
