//! One watch and one cache of each kind, for all controllers together, and how a change of an object wakes whoever is to look.
//!
//! Invariants: a cache never waits for a controller; what waits to be looked at waits once, however often it was named.

use super::context::Context;
use super::health::Waiting;
use super::shutdown::Shutdown;
use super::slim::{SlimDeployment, SlimMirror, SlimPod};
use super::watch::Watchable;
use crate::resources::names::{POLICY_SELECTOR, WORKER_SELECTOR};
use crate::resources::{Source, Target};
use futures::stream::{self, BoxStream, Stream, StreamExt as _};
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::Resource;
use kube::core::PartialObjectMeta;
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{Lookup as _, ObjectRef, Store};
use kube::runtime::watcher::{self, Event};
use kube::runtime::{predicates, utils::Predicate};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

/// Mirrors of one page of a list: one may hold 5,000 tables, and a page is in memory as it came.
const MIRRORS_PER_PAGE: u32 = 100;

/// The caches of all controllers. They fill once they run, see [`Caches::spawn`].
pub struct Caches {
    /// Mirrors without their tables.
    pub mirrors: Watched<SlimMirror>,
    /// Sources.
    pub sources: Watched<Source>,
    /// Targets.
    pub targets: Watched<Target>,
    /// Deployments of workers.
    pub deployments: Watched<SlimDeployment>,
    /// Pods of workers.
    pub pods: Watched<SlimPod>,
    /// ConfigMaps of workers: of documents that may be large, metadata alone.
    pub config_maps: Watched<PartialObjectMeta<ConfigMap>>,
    /// NetworkPolicies for workers, where the operator writes them: metadata alone.
    pub policies: Option<Watched<PartialObjectMeta<NetworkPolicy>>>,
}

impl Caches {
    /// One per kind, over the served namespaces.
    pub fn new(ctx: &Context) -> Self {
        let all = watcher::Config::default().any_semantic();
        let workers = watcher::Config::default().any_semantic().labels(WORKER_SELECTOR);
        Self {
            // From the API server's own cache a list would come in one piece.
            mirrors: ctx.watch(&watcher::Config::default().page_size(MIRRORS_PER_PAGE)),
            sources: ctx.watch(&all),
            targets: ctx.watch(&all),
            deployments: ctx.watch(&workers),
            pods: ctx.watch(&workers),
            config_maps: ctx.watches.watch_metadata(&workers),
            policies: ctx.options.worker_network_policies.then(|| {
                let ours = watcher::Config::default().any_semantic().labels(POLICY_SELECTOR);
                ctx.watches.watch_metadata(&ours)
            }),
        }
    }

    /// Whether each of them has been filled once.
    pub fn filled(&self) -> Vec<watch::Receiver<bool>> {
        let always = [
            self.mirrors.filled(),
            self.sources.filled(),
            self.targets.filled(),
            self.deployments.filled(),
            self.pods.filled(),
            self.config_maps.filled(),
        ];
        always.into_iter().chain(self.policies.as_ref().map(Watched::filled)).collect()
    }

    /// Runs them until `shutdown`.
    pub fn spawn(self, tasks: &mut JoinSet<()>, shutdown: &Shutdown) {
        self.mirrors.spawn(tasks, shutdown);
        self.sources.spawn(tasks, shutdown);
        self.targets.spawn(tasks, shutdown);
        self.deployments.spawn(tasks, shutdown);
        self.pods.spawn(tasks, shutdown);
        self.config_maps.spawn(tasks, shutdown);
        if let Some(policies) = self.policies {
            policies.spawn(tasks, shutdown);
        }
    }
}

/// Told of each event, when the cache knows of it.
type Listener<K> = Box<dyn FnMut(&Event<K>) + Send>;

/// A watch with its cache and those who listen.
pub struct Watched<K: Watchable> {
    /// What is known; to be read once it is [`Watched::filled`].
    pub store: Store<K>,
    writer: Writer<K>,
    events: BoxStream<'static, Event<K>>,
    listeners: Vec<Listener<K>>,
    filling: Option<Waiting>,
    filled: watch::Sender<bool>,
}

impl<K: Watchable> Watched<K> {
    /// The cache that `writer` writes from `events`; `filling` is dropped when it has been filled once.
    pub fn new(writer: Writer<K>, events: BoxStream<'static, Event<K>>, filling: Waiting) -> Self {
        Self { store: writer.as_reader(), writer, events, listeners: vec![], filling: Some(filling), filled: watch::Sender::new(false) }
    }

    /// Whether the cache has been filled once. For all who wait but the one controller of the kind: of several that wait by
    /// [`Store::wait_until_ready`] kube wakes only the one that came last.
    pub fn filled(&self) -> watch::Receiver<bool> {
        self.filled.subscribe()
    }

    /// Wakes whom `whom` names when an object has changed in what `predicate` looks at, or is gone. The cache knows it by then.
    pub fn wake<T, I>(
        &mut self,
        wake: &Wake<T>,
        predicate: impl Predicate<K> + Send + 'static,
        mut whom: impl FnMut(&K) -> I + Send + 'static,
    ) where
        T: Resource<DynamicType = ()> + Send + 'static,
        I: IntoIterator<Item = ObjectRef<T>>,
    {
        let (wake, store, mut seen) = (wake.clone(), self.store.clone(), HashMap::new());
        self.listeners.push(Box::new(move |event| {
            let object = match event {
                Event::Init => return,
                // What vanished while nobody watched.
                Event::InitDone => return seen.retain(|object, _| store.get(object).is_some()),
                Event::Delete(object) => {
                    seen.remove(&object.to_object_ref(()));
                    object
                }
                Event::Apply(object) | Event::InitApply(object) => {
                    let now = (object.meta().uid.clone(), predicate.hash_property(object));
                    if seen.insert(object.to_object_ref(()), now.clone()).is_some_and(|before| before == now) {
                        return;
                    }
                    object
                }
            };
            whom(object).into_iter().for_each(|one| wake.add(one));
        }));
    }

    /// Tells of each object that was deleted, when the cache has forgotten it.
    pub fn on_deletion(&mut self, mut tell: impl FnMut(&K) + Send + 'static) {
        self.listeners.push(Box::new(move |event| {
            if let Event::Delete(object) = event {
                tell(object);
            }
        }));
    }

    /// Runs until `shutdown`.
    pub fn spawn(self, tasks: &mut JoinSet<()>, shutdown: &Shutdown) {
        let shutdown = shutdown.clone();
        tasks.spawn(async move {
            shutdown.run_until_cancelled(self.run()).await;
        });
    }

    /// Keeps the cache and tells those who listen. A watch does not end by itself.
    pub async fn run(mut self) {
        while let Some(event) = self.events.next().await {
            self.writer.apply_watcher_event(&event);
            if matches!(event, Event::InitDone) {
                self.filling = None;
                self.filled.send_replace(true);
            }
            self.listeners.iter_mut().for_each(|listener| listener(&event));
        }
    }
}

/// Objects that wait to be looked at by one controller. Naming one never blocks, and there are never more than there are objects.
pub struct Wake<K: Resource<DynamicType = ()>> {
    waiting: Arc<WaitingObjects<K>>,
}

struct WaitingObjects<K: Resource<DynamicType = ()>> {
    named: Mutex<HashSet<ObjectRef<K>>>,
    more: Notify,
}

impl<K: Resource<DynamicType = ()>> Clone for Wake<K> {
    fn clone(&self) -> Self {
        Self { waiting: Arc::clone(&self.waiting) }
    }
}

impl<K: Resource<DynamicType = ()>> Default for Wake<K> {
    fn default() -> Self {
        Self { waiting: Arc::new(WaitingObjects { named: Mutex::default(), more: Notify::new() }) }
    }
}

impl<K: Resource<DynamicType = ()> + Send + 'static> Wake<K> {
    /// `object` is to be looked at.
    pub fn add(&self, object: ObjectRef<K>) {
        self.waiting.named.lock().unwrap_or_else(PoisonError::into_inner).insert(object);
        self.waiting.more.notify_one();
    }

    /// Those that are to be looked at, for the one controller that does. It never ends.
    pub fn objects(&self) -> impl Stream<Item = ObjectRef<K>> + Send + 'static + use<K> {
        stream::unfold((self.clone(), Vec::new()), |(wake, mut taken)| async move {
            loop {
                if let Some(object) = taken.pop() {
                    return Some((object, (wake, taken)));
                }
                taken.extend(std::mem::take(&mut *wake.waiting.named.lock().unwrap_or_else(PoisonError::into_inner)));
                if taken.is_empty() {
                    wake.waiting.more.notified().await;
                }
            }
        })
    }
}

/// A change of spec, labels, annotations, finalizers, or the begin of deletion; not one of status alone.
///
/// `predicates::generation` by itself would miss annotations (pause, force-delete) and the update that adds a finalizer.
pub fn beyond_status<K: Resource>() -> impl Predicate<K> {
    predicates::generation
        .combine(predicates::labels)
        .combine(predicates::annotations)
        .combine(predicates::finalizers)
        .combine(|object: &K| object.meta().deletion_timestamp.as_ref().map(|_| 1))
}

/// Every change.
pub fn any_change<K: Resource>() -> impl Predicate<K> {
    predicates::resource_version
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operator::health::Health;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
    use k8s_openapi::jiff::Timestamp;
    use kube::runtime::watcher::Event::{Apply, Delete, Init, InitApply, InitDone};

    fn pod(name: &str, generation: i64, version: &str) -> SlimPod {
        let metadata = ObjectMeta {
            name: Some(name.into()),
            namespace: Some("n".into()),
            uid: Some(format!("uid of {name}")),
            generation: Some(generation),
            resource_version: Some(version.into()),
            ..ObjectMeta::default()
        };
        SlimPod { metadata, ..SlimPod::default() }
    }

    /// Who is woken by each of the events, when every pod names itself.
    async fn woken(events: Vec<Event<SlimPod>>, predicate: impl Predicate<SlimPod> + Send + 'static) -> Vec<String> {
        let (told, wake) = (Arc::new(Mutex::new(vec![])), Wake::<SlimPod>::default());
        let noted = told.clone();
        let mut watched = Watched::new(Writer::default(), stream::iter(events).boxed(), Health::default().wait_for("pods"));
        watched.wake(&wake, predicate, move |pod| {
            noted.lock().expect("no panic").push(pod.metadata.name.clone().unwrap_or_default());
            [ObjectRef::from_obj(pod)]
        });
        watched.run().await;
        std::mem::take(&mut *told.lock().expect("no panic"))
    }

    #[tokio::test]
    async fn a_list_that_is_repeated_wakes_for_what_is_new() {
        let first = || [Init, InitApply(pod("a", 1, "1")), InitApply(pod("b", 1, "2")), InitDone];
        let events = first().into_iter().chain(first()).chain([Apply(pod("b", 1, "3")), Apply(pod("b", 1, "3"))]);
        assert_eq!(woken(events.collect(), any_change()).await, ["a", "b", "b"]);
        // What came and went and came again is new.
        let again = [Apply(pod("a", 1, "1")), Delete(pod("a", 1, "1")), Apply(pod("a", 1, "1"))];
        assert_eq!(woken(again.into(), any_change()).await, ["a", "a", "a"]);
        let vanished = [Apply(pod("a", 1, "1")), Init, InitDone, Apply(pod("a", 1, "1"))];
        assert_eq!(woken(vanished.into(), any_change()).await, ["a", "a"]);
    }

    #[tokio::test]
    async fn status_alone_wakes_nobody_and_another_object_of_the_name_does() {
        let mut other = pod("a", 1, "4");
        other.metadata.uid = Some("another".into());
        let events = vec![Apply(pod("a", 1, "1")), Apply(pod("a", 1, "2")), Apply(pod("a", 2, "3")), Apply(pod("a", 2, "3")), Apply(other)];
        assert_eq!(woken(events, beyond_status()).await.len(), 3);
    }

    #[tokio::test]
    async fn all_who_wait_for_a_cache_are_told_when_it_is_filled() {
        let (events, later) = futures::channel::mpsc::unbounded::<Event<SlimPod>>();
        let watched = Watched::new(Writer::default(), later.boxed(), Health::default().wait_for("pods"));
        let waiting: Vec<_> = (0..3).map(|_| watched.filled()).collect();
        let waiting = waiting.into_iter().map(|mut filled| tokio::spawn(async move { filled.wait_for(|filled| *filled).await.is_ok() }));
        let waiting: Vec<_> = waiting.collect();
        let running = tokio::spawn(watched.run());
        tokio::task::yield_now().await;
        for event in [Init, InitDone] {
            events.unbounded_send(event).expect("taken");
        }
        let told = futures::future::join_all(waiting);
        let told = tokio::time::timeout(std::time::Duration::from_secs(5), told).await.expect("in time");
        assert!(told.into_iter().all(|told| told.expect("no panic")));
        running.abort();
    }

    #[tokio::test]
    async fn an_object_waits_once_however_often_it_is_named() {
        let wake = Wake::<SlimPod>::default();
        for round in 0..1_000 {
            wake.add(ObjectRef::new(if round % 2 == 0 { "a" } else { "b" }).within("n"));
        }
        let objects = wake.objects();
        let mut taken: Vec<_> = objects.take(2).map(|object| object.name).collect().await;
        taken.sort();
        assert_eq!(taken, ["a", "b"]);
        assert!(wake.waiting.named.lock().expect("no panic").is_empty());
    }

    #[test]
    fn pausing_and_deleting_are_changes_and_status_is_none() {
        let predicate = beyond_status::<SlimPod>();
        let base = pod("a", 1, "1");
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
        assert_ne!(before, with(|meta| meta.deletion_timestamp = Some(Time(Timestamp::now()))));
    }
}
