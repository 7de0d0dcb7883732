//! Watches that cannot wedge the operator: each has its own backoff, its errors are counted and logged but not passed on, its
//! silence is noticed by `/livez`, and what it keeps in memory is small.
//!
//! kube's `Controller` merges all its triggers under one backoff, so that one failing watch would slow every healthy one; and one
//! object that cannot be decoded would stop the list it is in. Neither reaches a controller that is fed from here.

use super::client::listening;
use super::health::Health;
use super::join::Join;
use super::metrics::Metrics;
use futures::stream::{BoxStream, select_all};
use futures::{Stream, StreamExt as _};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::DeploymentCondition;
use k8s_openapi::api::core::v1::PodCondition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::DeserializeGuard;
use kube::runtime::reflector::{self, Store};
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt as _, predicates, utils::Predicate};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;
use tracing::{error, warn};

/// Annotation in which `kubectl apply` keeps a copy of the whole object.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// How long the API server keeps a watch open: kube's default.
const TIMEOUT: Duration = Duration::from_secs(290);
/// What a watch may be silent beyond that.
const GRACE: Duration = Duration::from_secs(60);
/// Refusals after which one of several namespaces counts as empty. New rights take a moment to be known everywhere.
const REFUSALS: u32 = 3;

/// A namespaced kind that can be watched.
pub trait Watchable:
    Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + Send + Sync + 'static
{
}
impl<K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + Send + Sync + 'static> Watchable
    for K
{
}

/// Makes watches over the served namespaces. Cheap to clone.
#[derive(Clone)]
pub struct Watches {
    client: Client,
    metrics: Metrics,
    health: Health,
    scopes: Vec<Option<String>>,
    timeout: Duration,
    grace: Duration,
}

/// A running watch with its cache.
pub struct Watched<K: Watchable> {
    /// What is known; to be read only after [`Store::wait_until_ready`].
    pub store: Store<K>,
    /// Every object that was added, changed or deleted; never an error. The cache is filled by polling it.
    pub changes: BoxStream<'static, watcher::Result<K>>,
}

impl Watches {
    /// `scopes` as [`super::options::Options::scopes`].
    pub fn new(client: Client, metrics: Metrics, health: Health, scopes: Vec<Option<String>>) -> Self {
        Self { client, metrics, health, scopes, timeout: TIMEOUT, grace: GRACE }
    }

    /// Other times than the defaults: how long the server keeps a watch open (whole seconds), and what silence beyond that is allowed.
    #[must_use]
    pub fn with_times(mut self, timeout: Duration, grace: Duration) -> Self {
        self.timeout = timeout;
        self.grace = grace;
        self
    }

    /// Watches `K` in the served namespaces. `config` chooses labels and fields; its timeout is replaced.
    pub fn watch<K: Watchable>(&self, config: &watcher::Config) -> Watched<K> {
        let (store, writer) = reflector::store();
        let mut filling = Some(self.health.wait_for(format!("the cache of {}", K::plural(&()))));
        let changes = self.events::<K>(config, store.clone()).map(Ok).reflect(writer).inspect(move |event| {
            if matches!(event, Ok(Event::InitDone)) {
                filling.take();
            }
        });
        Watched { store, changes: changes.touched_objects().boxed() }
    }

    fn events<K: Watchable>(&self, config: &watcher::Config, store: Store<K>) -> BoxStream<'static, Event<K>> {
        let streams: Vec<_> = self.scopes.iter().map(|scope| self.one(scope.as_deref(), config)).collect();
        if let [scope] = self.scopes.as_slice() {
            let named = scope.as_deref().unwrap_or("all namespaces");
            tracing::debug!(kind = %K::kind(&()), scope = named, "watching");
            return select_all(streams).boxed();
        }
        // One cache can be filled by one watch only: its Init and InitDone concern everything in it.
        let mut join = Join::new(streams.len());
        let namespaces: Vec<_> = self.scopes.iter().cloned().map(Option::unwrap_or_default).collect();
        let numbered = streams.into_iter().enumerate().map(|(number, stream)| stream.map(move |event| (number, event)).boxed());
        select_all(numbered)
            .flat_map(move |(number, event)| {
                let namespace = &namespaces[number];
                let known = || store.state().into_iter().filter(|object| object.namespace().as_deref() == Some(namespace)).collect();
                futures::stream::iter(join.take(number, event, known))
            })
            .boxed()
    }

    /// The events of one namespace, or of all, without errors and without what nobody reads.
    fn one<K: Watchable>(&self, namespace: Option<&str>, config: &watcher::Config) -> BoxStream<'static, Event<K>> {
        let kind = K::kind(&()).into_owned();
        let watch = self.health.watch(&kind, self.timeout + self.grace);
        let heard = {
            let (watch, metrics, kind) = (watch.clone(), self.metrics.clone(), kind.clone());
            Arc::new(move || {
                watch.heard();
                metrics.watch_heard(&kind);
            })
        };
        let client = listening(&self.client, heard);
        let api: Api<DeserializeGuard<K>> =
            namespace.map_or_else(|| Api::all(client.clone()), |namespace| Api::namespaced(client.clone(), namespace));
        let seconds = u32::try_from(self.timeout.as_secs()).unwrap_or(u32::MAX).max(1);
        let config = config.clone().any_semantic().timeout(seconds);
        let metrics = self.metrics.clone();
        // Of several namespaces one may be gone, and our rights with it: the caches of the others do not wait for it.
        let mut refusals = (self.scopes.len() > 1).then_some(0);
        watcher::watcher(api, config)
            .default_backoff()
            .flat_map(move |event| {
                let empty = counts_as_empty(&mut refusals, &event).then(|| [Event::Init, Event::InitDone]);
                let event = checked(event, &kind, &metrics, &watch);
                futures::stream::iter(empty.into_iter().flatten().chain(event))
            })
            .boxed()
    }
}

/// Whether a namespace that has not been listed yet is no longer waited for. What it holds is taken up when it can be listed.
fn counts_as_empty<K>(refusals: &mut Option<u32>, event: &watcher::Result<Event<K>>) -> bool {
    let Some(count) = refusals else { return false };
    match event {
        Err(watcher::Error::InitialListFailed(kube::Error::Api(status))) if status.code == 403 => *count += 1,
        Ok(Event::InitDone) => *refusals = None,
        _ => {}
    }
    refusals.take_if(|count| *count == REFUSALS).is_some()
}

/// Logs and counts what is wrong, passes on what is right. Holding `_watch` ties the demand for freshness to the life of the stream.
fn checked<K: Watchable>(
    event: watcher::Result<Event<DeserializeGuard<K>>>,
    kind: &str,
    metrics: &Metrics,
    _watch: &Arc<super::health::Watch>,
) -> Option<Event<K>> {
    let whole = |guard: DeserializeGuard<K>| match guard.0 {
        Ok(mut object) => {
            prune(object.meta_mut());
            Some(object)
        }
        Err(invalid) => {
            metrics.object_undecodable(kind);
            let (namespace, name) = (invalid.metadata.namespace.unwrap_or_default(), invalid.metadata.name.unwrap_or_default());
            error!(kind, namespace, name, error = invalid.error, "an object cannot be decoded and is left out");
            None
        }
    };
    match event {
        Ok(Event::Init) => Some(Event::Init),
        Ok(Event::InitDone) => Some(Event::InitDone),
        Ok(Event::InitApply(object)) => whole(object).map(Event::InitApply),
        Ok(Event::Apply(object)) => whole(object).map(Event::Apply),
        Ok(Event::Delete(object)) => whole(object).map(Event::Delete),
        Err(failure) => {
            metrics.watch_failed(kind);
            warn!(kind, error = super::error::chain(&failure), "a watch failed and is begun again");
            None
        }
    }
}

/// Drops the two largest parts of metadata that no controller reads.
fn prune(meta: &mut ObjectMeta) {
    meta.managed_fields = None;
    if let Some(annotations) = &mut meta.annotations {
        annotations.remove(LAST_APPLIED);
    }
}

/// Lets through a change of spec, labels, annotations, finalizers or the begin of deletion; holds back changes of status alone.
///
/// `predicates::generation` by itself would miss annotations (pause, force-delete) and the update that adds a finalizer.
pub fn beyond_status<K: Resource>() -> impl Predicate<K> {
    predicates::generation
        .combine(predicates::labels)
        .combine(predicates::annotations)
        .combine(predicates::finalizers)
        .combine(|object: &K| object.meta().deletion_timestamp.as_ref().map(|_| 1))
}

/// Lets through every change of a child, its deletion included.
pub fn any_change<K: Resource>() -> impl Predicate<K> {
    predicates::resource_version
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
}

impl SlimPod {
    /// Whether the condition `Ready` is True.
    pub fn is_ready(&self) -> bool {
        self.status.conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
    }
}

/// What is read of a Deployment. Never written back.
#[derive(Resource, Clone, Debug, Default, Deserialize)]
#[resource(inherit = "k8s_openapi::api::apps::v1::Deployment")]
pub struct SlimDeployment {
    /// Metadata without managed fields.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// What the Deployment controller reports.
    #[serde(default)]
    pub status: SlimDeploymentStatus,
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

impl<K: Watchable> Watched<K> {
    /// Tells of each change, when the cache knows it.
    #[must_use]
    pub fn telling(mut self, mut tell: impl FnMut(&K) + Send + 'static) -> Self {
        self.changes = self.changes.inspect(move |change| change.iter().for_each(&mut tell)).boxed();
        self
    }

    /// The changes that `predicate` lets through.
    pub fn only(self, predicate: impl Predicate<K> + Send + 'static) -> impl Stream<Item = watcher::Result<K>> + Send + 'static {
        self.changes.predicate_filter(predicate, kube::runtime::utils::PredicateConfig::default())
    }
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
        assert!(deployment.status.conditions.is_empty());
        assert_eq!(SlimPod::url_path(&(), Some("n")), "/api/v1/namespaces/n/pods");
    }

    #[test]
    fn caches_hold_no_copy_of_the_object() {
        let mut meta = ObjectMeta {
            managed_fields: Some(vec![]),
            annotations: Some([(LAST_APPLIED.to_owned(), "{}".to_owned()), ("keep".to_owned(), String::new())].into()),
            ..ObjectMeta::default()
        };
        prune(&mut meta);
        assert!(meta.managed_fields.is_none());
        assert_eq!(meta.annotations.expect("annotations").into_keys().collect::<Vec<_>>(), ["keep"]);
    }

    #[test]
    fn pausing_and_deleting_are_changes_and_status_is_none() {
        let predicate = beyond_status::<SlimPod>();
        let base = SlimPod {
            metadata: ObjectMeta { generation: Some(1), resource_version: Some("1".into()), ..ObjectMeta::default() },
            ..SlimPod::default()
        };
        let with = |change: fn(&mut ObjectMeta)| {
            let mut other = base.clone();
            change(&mut other.metadata);
            predicate.hash_property(&other)
        };
        let before = predicate.hash_property(&base);
        assert_eq!(before, with(|meta| meta.resource_version = Some("2".into())));
        assert_ne!(before, with(|meta| meta.generation = Some(2)));
        assert_ne!(before, with(|meta| meta.annotations = Some([("a".to_owned(), "b".to_owned())].into())));
        assert_ne!(before, with(|meta| meta.finalizers = Some(vec!["f".into()])));
        assert_ne!(
            before,
            with(|meta| meta.deletion_timestamp =
                Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(k8s_openapi::jiff::Timestamp::now())))
        );
    }
}
