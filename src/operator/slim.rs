//! What caches keep of an object: what decisions read, and no more. Never written back.
//!
//! Invariant: what is kept of a Mirror does not grow with the number of its tables.

use super::apply;
use crate::resources::{DeletionPolicy, LocalRef, MirrorStatus, WalBudget, Worker};
use k8s_openapi::api::apps::v1::DeploymentCondition;
use k8s_openapi::api::core::v1::PodCondition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Resource;
use serde::Deserialize;

/// What is read of a Mirror. Its tables or schemas, and how they are copied and streamed, concern the worker's document alone: for
/// that the whole Mirror is read live, when `metadata.generation` says that its spec is another one.
#[derive(Resource, Clone, Debug, Deserialize)]
#[resource(inherit = "crate::resources::Mirror")]
pub struct SlimMirror {
    /// Metadata without managed fields.
    pub metadata: ObjectMeta,
    /// What is read of its spec.
    pub spec: SlimMirrorSpec,
    /// What was reported of it last.
    #[serde(default)]
    pub status: Option<MirrorStatus>,
}

/// What is read of a Mirror's spec; the fields are explained at [`crate::resources::MirrorSpec`].
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SlimMirrorSpec {
    /// Source in the same namespace.
    pub source_ref: LocalRef,
    /// Target in the same namespace.
    pub target_ref: LocalRef,
    /// Replication slot.
    pub slot_name: Option<String>,
    /// Publication.
    pub publication_name: Option<String>,
    /// How much of its log the source may keep for the slot.
    pub wal_budget: Option<WalBudget>,
    /// What happens outside the cluster on deletion.
    pub deletion_policy: Option<DeletionPolicy>,
    /// Stop the stream and keep its position.
    #[serde(default)]
    pub suspend: bool,
    /// A one-off action, without its tables.
    pub request: Option<SlimRequest>,
    /// The pod that does the work.
    pub worker: Option<Worker>,
}

/// What is read of a request.
#[derive(Clone, Debug, Deserialize)]
pub struct SlimRequest {
    /// Its id.
    pub id: String,
    /// What is to be done.
    pub action: String,
}

/// What is read of a Pod: 31 MiB for ten thousand of them instead of 585. Never written back.
#[derive(Resource, Clone, Debug, Default, Deserialize)]
#[resource(inherit = "k8s_openapi::api::core::v1::Pod")]
pub struct SlimPod {
    /// Metadata without managed fields.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// Its containers' ports.
    #[serde(default)]
    pub spec: SlimPodSpec,
    /// What the kubelet reports.
    #[serde(default)]
    pub status: SlimPodStatus,
}

/// What is read of a Pod's spec.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct SlimPodSpec {
    /// One per container.
    #[serde(default)]
    pub containers: Vec<SlimContainer>,
}

/// What is read of a container's spec.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct SlimContainer {
    /// Its ports.
    #[serde(default)]
    pub ports: Vec<SlimPort>,
}

/// A port of a container.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SlimPort {
    /// Its name.
    #[serde(default)]
    pub name: String,
    /// Its number.
    #[serde(default)]
    pub container_port: u16,
}

/// What the kubelet reports of a Pod.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SlimPodStatus {
    /// Pending, Running, Succeeded, Failed, Unknown.
    pub phase: Option<String>,
    /// For example Evicted.
    pub reason: Option<String>,
    /// Its explanation.
    pub message: Option<String>,
    /// Address in the cluster.
    #[serde(rename = "podIP")]
    pub pod_ip: Option<String>,
    /// Ready, PodScheduled, …
    #[serde(default)]
    pub conditions: Vec<PodCondition>,
    /// One per container.
    #[serde(default)]
    pub container_statuses: Vec<SlimContainerStatus>,
}

/// State of a container.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SlimContainerStatus {
    /// Its name.
    #[serde(default)]
    pub name: String,
    /// Its image.
    #[serde(default)]
    pub image: String,
    /// How often it was restarted.
    #[serde(default)]
    pub restart_count: i32,
    /// Whether its readiness probe succeeds.
    #[serde(default)]
    pub ready: bool,
    /// Now.
    #[serde(default)]
    pub state: SlimContainerState,
    /// Before the last restart.
    #[serde(default)]
    pub last_state: SlimContainerState,
}

/// Running, waiting or terminated; at most one is set.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SlimContainerState {
    /// Why it has not started, for example ImagePullBackOff.
    pub waiting: Option<Why>,
    /// Why it ended, for example OOMKilled.
    pub terminated: Option<Why>,
}

/// Reason and explanation.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Why {
    /// CamelCase.
    pub reason: Option<String>,
    /// For people.
    pub message: Option<String>,
    /// Of a process that ended.
    pub exit_code: Option<i32>,
    /// When that process began.
    pub started_at: Option<Time>,
    /// When it ended.
    pub finished_at: Option<Time>,
}

impl SlimPod {
    /// Whether the condition `Ready` is True.
    pub fn is_ready(&self) -> bool {
        self.status.conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
    }
}

/// What is read of a Deployment. Never written back.
#[derive(Resource, Clone, Debug, Default, Deserialize)]
#[serde(from = "DeploymentAsSent")]
#[resource(inherit = "k8s_openapi::api::apps::v1::Deployment")]
pub struct SlimDeployment {
    /// Metadata without managed fields.
    pub metadata: ObjectMeta,
    /// Digest of the fields that are ours, see [`apply::owned_fields`].
    pub owned_fields: Option<String>,
    /// What the Deployment controller reports.
    pub status: SlimDeploymentStatus,
}

#[derive(Deserialize)]
struct DeploymentAsSent {
    #[serde(default)]
    metadata: ObjectMeta,
    #[serde(default)]
    status: SlimDeploymentStatus,
}

impl From<DeploymentAsSent> for SlimDeployment {
    fn from(sent: DeploymentAsSent) -> Self {
        let owned_fields = apply::owned_fields(&sent.metadata);
        Self { metadata: ObjectMeta { managed_fields: None, ..sent.metadata }, owned_fields, status: sent.status }
    }
}

/// What the Deployment controller reports.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SlimDeploymentStatus {
    /// Generation of the spec it has seen.
    pub observed_generation: Option<i64>,
    /// Pods.
    pub replicas: Option<i32>,
    /// Pods of the newest template.
    pub updated_replicas: Option<i32>,
    /// Pods that are ready.
    pub ready_replicas: Option<i32>,
    /// Progressing, Available, ReplicaFailure.
    #[serde(default)]
    pub conditions: Vec<DeploymentCondition>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn slim_kinds_keep_what_is_read() {
        let pod: SlimPod = serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "n"},
            "spec": {"containers": [{"name": "worker"}]},
            "status": {"phase": "Running", "podIP": "10.0.0.7", "conditions": [{"type": "Ready", "status": "True"}],
                "containerStatuses": [{"name": "worker", "image": "i", "imageID": "", "restartCount": 3, "ready": true,
                    "state": {"running": {}}, "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}]},
        }))
        .expect("a pod");
        assert!(pod.is_ready());
        assert_eq!(pod.status.pod_ip.as_deref(), Some("10.0.0.7"));
        let container = &pod.status.container_statuses[0];
        assert_eq!((container.restart_count, container.last_state.terminated.as_ref().and_then(|why| why.exit_code)), (3, Some(137)));
        let deployment: SlimDeployment =
            serde_json::from_value(json!({"metadata": {"name": "d"}, "spec": {"replicas": 1}})).expect("a deployment");
        assert!(deployment.status.conditions.is_empty() && deployment.owned_fields.is_none());
        let ours = json!([{"manager": apply::MANAGER, "operation": "Apply", "fieldsV1": {"f:spec": {"f:replicas": {}}}}]);
        let deployment: SlimDeployment = serde_json::from_value(json!({"metadata": {"managedFields": ours}})).expect("a deployment");
        assert!(deployment.owned_fields.is_some() && deployment.metadata.managed_fields.is_none());
        assert_eq!(SlimPod::url_path(&(), Some("n")), "/api/v1/namespaces/n/pods");
    }
}
