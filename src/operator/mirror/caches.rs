//! What this controller reads from the caches.

use super::peer::Peer;
use super::plan;
use super::sharing::is_same_server;
use crate::operator::cache;
use crate::operator::slim::{SlimDeployment, SlimMirror, SlimPod};
use crate::resources::names::{MIRROR_FINALIZER, MIRROR_LABEL, MIRROR_UID_LABEL, has_finalizer};
use crate::resources::{LocalRef, Source, Target};
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::ResourceExt as _;
use kube::core::PartialObjectMeta;
use kube::runtime::reflector::{ObjectRef, Store};
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;

/// The caches, to be read after [`Caches::filled`].
pub struct Caches {
    /// Mirrors without their tables.
    pub mirrors: Store<SlimMirror>,
    /// Sources.
    pub sources: Store<Source>,
    /// Targets.
    pub targets: Store<Target>,
    /// Deployments of workers.
    pub deployments: Store<SlimDeployment>,
    /// Pods of workers.
    pub pods: Store<SlimPod>,
    /// ConfigMaps of workers.
    config_maps: Store<PartialObjectMeta<ConfigMap>>,
    /// NetworkPolicies for workers, where the operator writes them.
    policies: Option<Store<PartialObjectMeta<NetworkPolicy>>>,
    /// Whether each of them has been filled once.
    filled: Vec<watch::Receiver<bool>>,
    /// Which pods a Mirror has had: a scan of all pods in every pass would not scale.
    pub pod_names: Arc<PodNames>,
}

impl Caches {
    /// Readers of the caches that all controllers share.
    pub fn of(shared: &cache::Caches) -> Self {
        Self {
            mirrors: shared.mirrors.store.clone(),
            sources: shared.sources.store.clone(),
            targets: shared.targets.store.clone(),
            deployments: shared.deployments.store.clone(),
            pods: shared.pods.store.clone(),
            config_maps: shared.config_maps.store.clone(),
            policies: shared.policies.as_ref().map(|policies| policies.store.clone()),
            filled: shared.filled(),
            pod_names: Arc::default(),
        }
    }

    /// Waits until all have been filled once.
    ///
    /// # Errors
    /// The watches have ended.
    pub async fn filled(&self) -> Result<(), watch::error::RecvError> {
        for cache in &self.filled {
            cache.clone().wait_for(|filled| *filled).await?;
        }
        Ok(())
    }

    /// The Mirror's Source.
    pub fn source(&self, mirror: &SlimMirror) -> Option<Arc<Source>> {
        self.sources.get(&ObjectRef::new(&mirror.spec.source_ref.name).within(plan::namespace(mirror)))
    }

    /// The Mirror's Target.
    pub fn target(&self, mirror: &SlimMirror) -> Option<Arc<Target>> {
        self.targets.get(&ObjectRef::new(&mirror.spec.target_ref.name).within(plan::namespace(mirror)))
    }

    /// Another Mirror, of any namespace, that names the same slot of the same server and that `counts`. Names made from uids are not
    /// looked for.
    pub fn namesake(&self, mirror: &SlimMirror, counts: impl Fn(&SlimMirror) -> bool) -> Option<Arc<SlimMirror>> {
        let slot = mirror.spec.slot_name.as_ref()?;
        let own = Peer::from(self.source(mirror)?.as_ref());
        let is_another = |other: &SlimMirror| other.spec.slot_name.as_ref() == Some(slot) && other.metadata.uid != mirror.metadata.uid;
        let on_server = |other: &SlimMirror| self.source(other).is_some_and(|source| is_same_server(&own, &Peer::from(source.as_ref())));
        self.mirrors.state().into_iter().find(|other| is_another(other) && counts(other) && on_server(other))
    }

    /// The Deployment that belongs to this very Mirror.
    pub fn deployment(&self, mirror: &SlimMirror) -> Option<Arc<SlimDeployment>> {
        let name = crate::resources::names::worker_name(plan::name(mirror));
        let found = self.deployments.get(&ObjectRef::new(&name).within(plan::namespace(mirror)))?;
        plan::is_owned(&found.metadata, mirror).then_some(found)
    }

    /// Resource version of the ConfigMap of the Mirror's worker.
    pub fn document_version(&self, mirror: &SlimMirror) -> Option<String> {
        let name = crate::resources::names::worker_name(plan::name(mirror));
        self.config_maps.get(&ObjectRef::new(&name).within(plan::namespace(mirror)))?.resource_version()
    }

    /// Resource version of the namespace's NetworkPolicy for workers.
    pub fn policy_version(&self, namespace: &str) -> Option<String> {
        self.policies.as_ref()?.get(&ObjectRef::new(plan::POLICY_NAME).within(namespace))?.resource_version()
    }

    /// The pods of this very Mirror.
    pub fn pods(&self, mirror: &SlimMirror) -> Vec<Arc<SlimPod>> {
        let of_this = |pod: &Arc<SlimPod>| pod.labels().get(MIRROR_UID_LABEL).is_some_and(|uid| uid == plan::uid(mirror));
        let mut pods = self.pod_names.of(plan::namespace(mirror), plan::name(mirror), &self.pods);
        pods.retain(of_this);
        pods
    }
}

/// Names of pods by Mirror, kept from the stream of their changes.
#[derive(Debug, Default)]
pub struct PodNames {
    by_mirror: Mutex<HashMap<(String, String), BTreeSet<String>>>,
}

impl PodNames {
    /// Notes a pod that was added, changed or deleted, and says whose it is.
    pub fn note(&self, pod: &SlimPod) -> Option<ObjectRef<SlimMirror>> {
        let (namespace, mirror) = (pod.namespace()?, pod.labels().get(MIRROR_LABEL)?.clone());
        let mirror_ref = ObjectRef::new(&mirror).within(&namespace);
        let mut all = self.by_mirror.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry((namespace, mirror)).or_default().insert(pod.name_any());
        Some(mirror_ref)
    }

    /// The pods of a Mirror that are still there.
    fn of(&self, namespace: &str, mirror: &str, pods: &Store<SlimPod>) -> Vec<Arc<SlimPod>> {
        let key = (namespace.to_owned(), mirror.to_owned());
        let mut all = self.by_mirror.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(names) = all.get_mut(&key) else { return vec![] };
        let mut found = Vec::with_capacity(names.len());
        names.retain(|name| pods.get(&ObjectRef::new(name).within(namespace)).map(|pod| found.push(pod)).is_some());
        if names.is_empty() {
            all.remove(&key);
        }
        found
    }
}

/// The Mirrors of a namespace.
pub fn inhabitants(mirrors: &Store<SlimMirror>, namespace: Option<&str>) -> Vec<ObjectRef<SlimMirror>> {
    let all = mirrors.state().into_iter();
    all.filter(|mirror| mirror.metadata.namespace.as_deref() == namespace).map(|mirror| ObjectRef::from_obj(mirror.as_ref())).collect()
}

/// The Mirrors of a namespace that refer to `name`.
pub fn users(
    mirrors: &Store<SlimMirror>,
    namespace: Option<&str>,
    name: &str,
    of: fn(&SlimMirror) -> &LocalRef,
) -> Vec<ObjectRef<SlimMirror>> {
    let all = mirrors.state().into_iter();
    all.filter(|mirror| mirror.metadata.namespace.as_deref() == namespace && of(mirror).name == name)
        .map(|mirror| ObjectRef::from_obj(mirror.as_ref()))
        .collect()
}

/// Mirrors that may have waited for the slot of `gone`: those that name it and have not been set up.
pub fn waiting_for(mirrors: &Store<SlimMirror>, gone: &SlimMirror) -> Vec<ObjectRef<SlimMirror>> {
    if gone.spec.slot_name.is_none() {
        return vec![];
    }
    let waits = |other: &SlimMirror| other.spec.slot_name == gone.spec.slot_name && !has_finalizer(&other.metadata, MIRROR_FINALIZER);
    mirrors.state().iter().filter(|other| waits(other)).map(|other| ObjectRef::from_obj(other.as_ref())).collect()
}
