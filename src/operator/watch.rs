//! Watches that cannot wedge the operator: each has its own backoff, its errors are counted and logged but not passed on, its
//! silence is noticed by `/livez`, and what it keeps in memory is small.
//!
//! kube's `Controller` merges all its triggers under one backoff, so that one failing watch would slow every healthy one; and one
//! object that cannot be decoded would stop the list it is in. Neither reaches a controller that is fed from here.

use super::cache::Watched;
use super::client::listening;
use super::health::Health;
use super::join::Join;
use super::metrics::Metrics;
use futures::stream::{BoxStream, select_all};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::{DeserializeGuard, PartialObjectMeta};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::reflector::{self, Store};
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;
use tracing::{error, warn};

/// Begin of the names of labels and annotations that are read.
const OURS: &str = "sluice.dev/";
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

    /// Watches `K` in the served namespaces. `config` says what and how it is listed; its timeout is replaced.
    pub fn watch<K: Watchable>(&self, config: &watcher::Config) -> Watched<K> {
        self.watched(config, whole)
    }

    /// The same of metadata alone: the API server sends no more.
    pub fn watch_metadata<K: Watchable>(&self, config: &watcher::Config) -> Watched<PartialObjectMeta<K>> {
        self.watched(config, metadata)
    }

    fn watched<K: Watchable>(&self, config: &watcher::Config, open: Open<K>) -> Watched<K> {
        let (store, writer) = reflector::store();
        Watched::new(writer, self.events(config, open, store), self.health.wait_for(format!("the cache of {}", K::plural(&()))))
    }

    fn events<K: Watchable>(&self, config: &watcher::Config, open: Open<K>, store: Store<K>) -> BoxStream<'static, Event<K>> {
        let streams: Vec<_> = self.scopes.iter().map(|scope| self.one(scope.as_deref(), config, open)).collect();
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
    fn one<K: Watchable>(&self, namespace: Option<&str>, config: &watcher::Config, open: Open<K>) -> BoxStream<'static, Event<K>> {
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
        let seconds = u32::try_from(self.timeout.as_secs()).unwrap_or(u32::MAX).max(1);
        let config = config.clone().timeout(seconds);
        let metrics = self.metrics.clone();
        // Of several namespaces one may be gone, and our rights with it: the caches of the others do not wait for it.
        let mut refusals = (self.scopes.len() > 1).then_some(0);
        open(client, namespace, config)
            .flat_map(move |event| {
                let empty = counts_as_empty(&mut refusals, &event).then(|| [Event::Init, Event::InitDone]);
                let event = checked(event, &kind, &metrics, &watch);
                futures::stream::iter(empty.into_iter().flatten().chain(event))
            })
            .boxed()
    }
}

/// What a watch tells.
type Told<K> = watcher::Result<Event<DeserializeGuard<K>>>;
/// Opens a watch of one namespace, or of all.
type Open<K> = fn(Client, Option<&str>, watcher::Config) -> BoxStream<'static, Told<K>>;

fn whole<K: Watchable>(client: Client, namespace: Option<&str>, config: watcher::Config) -> BoxStream<'static, Told<K>> {
    watcher::watcher(api::<DeserializeGuard<K>>(client, namespace), config).default_backoff().boxed()
}

/// There is none that cannot be decoded.
fn metadata<K: Watchable>(
    client: Client,
    namespace: Option<&str>,
    config: watcher::Config,
) -> BoxStream<'static, Told<PartialObjectMeta<K>>> {
    let decoded = |object| DeserializeGuard(Ok(object));
    let watch = watcher::watcher(api::<PartialObjectMeta<K>>(client, namespace), config).default_backoff();
    let events = watch.map_ok(move |event| match event {
        Event::Init => Event::Init,
        Event::InitDone => Event::InitDone,
        Event::InitApply(object) => Event::InitApply(decoded(object)),
        Event::Apply(object) => Event::Apply(decoded(object)),
        Event::Delete(object) => Event::Delete(decoded(object)),
    });
    events.boxed()
}

fn api<K: Resource<DynamicType = (), Scope = NamespaceResourceScope>>(client: Client, namespace: Option<&str>) -> Api<K> {
    match namespace {
        Some(namespace) => Api::namespaced(client, namespace),
        None => Api::all(client),
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
fn checked<K: Watchable>(event: Told<K>, kind: &str, metrics: &Metrics, _watch: &Arc<super::health::Watch>) -> Option<Event<K>> {
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

/// Drops what no controller reads of metadata: managed fields, and labels and annotations of others, among them the copy of the whole
/// object that `kubectl apply` keeps.
fn prune(meta: &mut ObjectMeta) {
    meta.managed_fields = None;
    for texts in [&mut meta.labels, &mut meta.annotations] {
        *texts = texts.take().map(|texts| texts.into_iter().filter(|(key, _)| key.starts_with(OURS)).collect());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operator::slim::SlimMirror;
    use serde_json::json;

    /// A Mirror as `kubectl apply` leaves it, as the cache keeps it.
    fn kept(tables: usize) -> SlimMirror {
        let tables: Vec<_> = (0..tables).map(|number| json!({"schema": "sales", "name": format!("a_table_{number:05}")})).collect();
        let spec = json!({"sourceRef": {"name": "shop"}, "targetRef": {"name": "dw"}, "tables": tables, "suspend": true});
        let metadata = json!({
            "name": "m", "namespace": "n", "uid": "u", "generation": 7, "finalizers": ["sluice.dev/mirror"],
            "labels": {"app": "x".repeat(63)},
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": spec.to_string(), "sluice.dev/pause-reconciliation": "true"},
            "managedFields": [{"manager": "kubectl", "operation": "Apply", "fieldsType": "FieldsV1", "fieldsV1": {"f:spec": {"f:tables": {}}}}],
        });
        let mut mirror: SlimMirror =
            serde_json::from_value(json!({"apiVersion": "sluice.dev/v1alpha1", "kind": "Mirror", "metadata": metadata, "spec": spec}))
                .expect("a mirror");
        prune(&mut mirror.metadata);
        mirror
    }

    #[test]
    fn what_is_kept_of_a_mirror_does_not_grow_with_its_tables() {
        let of = |tables| format!("{:?}", kept(tables));
        assert_eq!(of(1), of(5_000));
        assert!(of(5_000).len() < 2_048, "{}", of(5_000));
    }

    #[test]
    fn what_is_read_is_kept() {
        let mirror = kept(3);
        assert!(crate::resources::names::is_paused(&mirror.metadata) && mirror.spec.suspend);
        assert_eq!((mirror.spec.source_ref.name.as_str(), mirror.metadata.generation), ("shop", Some(7)));
        assert!(mirror.metadata.managed_fields.is_none() && mirror.metadata.labels.is_some_and(|labels| labels.is_empty()));
        assert_eq!(mirror.metadata.annotations.expect("annotations").len(), 1);
    }
}
