//! Writes for a Mirror: finalizers on what deletion will need, ConfigMap, Deployment, NetworkPolicy, and the push of a hot change.

use super::controller::Mirrors;
use super::intent::{Basis, Intent};
use super::observe::{Observed, is_stuck};
use super::peer::{Peer, Side};
use super::plan;
use super::problem::Problem;
use super::rollout::{self, Condition, Decision};
use crate::connectors::postgres::Endpoint;
use crate::engine::error::reason;
use crate::operator::apply::{self, Object};
use crate::operator::databases;
use crate::operator::error::{ErrorClass, OperatorError, Result};
use crate::operator::poller::Polled;
use crate::operator::slim::{SlimDeployment, SlimMirror};
use crate::resources::names::{IN_USE_FINALIZER, MANAGED_BY, MANAGED_BY_LABEL, MIRROR_FINALIZER, TOUCHED, has_finalizer, worker_name};
use crate::resources::{Connection, UpdatePolicy};
use crate::worker::contract::{Desired, Phase};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::core::PartialObjectMeta;
use kube::{Api, ResourceExt as _};
use serde_json::json;
use std::time::Duration;
use tokio::time::timeout;
use tracing::{debug, info};

/// Longest time of the touch of a pod.
const TOUCH: Duration = Duration::from_secs(3);

/// What has become of the writes.
#[derive(Debug, Default)]
pub struct Applied {
    /// The API server takes none of it.
    pub refused: Option<Problem>,
    /// Resource version of the ConfigMap that was written; `None`: it was as it should be.
    pub document: Option<String>,
    /// The worker waits for its turn to take a new release.
    pub waits_for_turn: bool,
}

impl Mirrors {
    /// Makes children as intended. Finalizers come first: from then on nothing is lost whatever is deleted when.
    ///
    /// # Errors
    /// As the API server answers, but for what it refuses: that is the Mirror's problem.
    pub async fn apply(&self, mirror: &SlimMirror, decision: &Decided, around: &Around) -> Result<Applied> {
        let (intent, mut applied) = (&decision.intent, Applied::default());
        if intent.told.is_none() {
            return Ok(applied);
        }
        if intent.deploy {
            self.hold(mirror).await?;
            self.protect_network(plan::namespace(mirror)).await?;
        }
        let written = async {
            if let Some(desired) = &intent.desired {
                applied.document = self.apply_document(mirror, desired, decision.config_map.as_ref()).await?;
            }
            if intent.deploy {
                applied.waits_for_turn = self.apply_deployment(mirror, intent, around).await?;
            }
            Ok::<_, OperatorError>(())
        };
        match written.await {
            Ok(()) => Ok(applied),
            Err(error) if error.class == ErrorClass::Invalid => {
                Ok(Applied { refused: Some(Problem::stop(reason::INVALID_SPEC, error.message)), ..applied })
            }
            Err(error) => Err(error),
        }
    }

    /// Keeps what the clean-up of this Mirror will need.
    async fn hold(&self, mirror: &SlimMirror) -> Result<()> {
        let ctx = &self.ctx;
        if !has_finalizer(&mirror.metadata, MIRROR_FINALIZER) {
            let _rights = ctx.bindings.hold(ctx, plan::namespace(mirror)).await?;
            apply::ensure_finalizer(ctx, mirror, MIRROR_FINALIZER).await?;
        }
        if let Some(source) = self.caches.source(mirror) {
            self.hold_connection(Side::Source, source.as_ref()).await?;
        }
        if let Some(target) = self.caches.target(mirror) {
            self.hold_connection(Side::Target, target.as_ref()).await?;
        }
        Ok(())
    }

    async fn hold_connection<K: Object + Connection>(&self, side: Side, object: &K) -> Result<()> {
        let namespace = object.namespace().unwrap_or_default();
        // Whoever released the object released its Secrets too: what is remembered of them no longer holds then.
        let was_free = hold_one(apply::ensure_finalizer(&self.ctx, object, IN_USE_FINALIZER).await)?;
        if self.ctx.options.protect_secrets {
            for name in object.connection().secret_names() {
                self.hold_secret(&namespace, name, was_free).await?;
            }
        }
        let place = (side, (namespace.clone(), object.name_any()));
        if !self.memory.endpoints.is_fresh(&place)
            && let Ok(endpoint) = databases::resolve(&self.ctx, &namespace, &object.connection()).await
        {
            self.memory.endpoints.put(place, endpoint);
        }
        Ok(())
    }

    async fn hold_secret(&self, namespace: &str, name: &str, look: bool) -> Result<()> {
        let place = (namespace.to_owned(), name.to_owned());
        if !look && self.memory.held.is_fresh(&place) {
            return Ok(());
        }
        // A missing one is the Source's or Target's trouble.
        if let Some(secret) = apply::get::<PartialObjectMeta<Secret>>(&self.ctx, namespace, name).await? {
            hold_one(apply::ensure_finalizer(&self.ctx, &secret, IN_USE_FINALIZER).await)?;
            self.memory.held.put(place, ());
        }
        Ok(())
    }

    async fn protect_network(&self, namespace: &str) -> Result<()> {
        let place = namespace.to_owned();
        let is_untouched = || self.memory.policies.last(&place).is_some_and(|left| left == self.caches.policy_version(namespace));
        if !self.ctx.options.worker_network_policies || (self.memory.policies.is_fresh(&place) && is_untouched()) {
            return Ok(());
        }
        let live = apply::get::<NetworkPolicy>(&self.ctx, namespace, plan::POLICY_NAME).await?;
        let made = apply::apply_if_changed(&self.ctx, &plan::network_policy(namespace), live.as_ref()).await?;
        self.memory.policies.put(place, made.or(live).and_then(|policy| policy.resource_version()));
        Ok(())
    }

    /// With the last Mirror of a namespace goes the NetworkPolicy for its workers.
    pub async fn unprotect_network(&self, namespace: &str) -> Result<()> {
        if !self.ctx.options.worker_network_policies {
            return Ok(());
        }
        let live = apply::get::<PartialObjectMeta<NetworkPolicy>>(&self.ctx, namespace, plan::POLICY_NAME).await?;
        let ours = live.filter(|live| live.labels().get(MANAGED_BY_LABEL).is_some_and(|by| by == MANAGED_BY));
        if let Some(live) = ours {
            apply::delete_if_exists::<NetworkPolicy>(&self.ctx, namespace, plan::POLICY_NAME, live.metadata.uid.as_deref()).await?;
        }
        Ok(())
    }

    /// Returns the resource version of a ConfigMap that had to be written.
    async fn apply_document(&self, mirror: &SlimMirror, desired: &Desired, live: Option<&ConfigMap>) -> Result<Option<String>> {
        let planned =
            plan::config_map(mirror, desired).map_err(|error| OperatorError::new(ErrorClass::Bug, "InternalError", error.to_string()))?;
        self.make_room::<ConfigMap>(mirror, live.map(|live| &live.metadata)).await?;
        let made = apply::apply_if_changed(&self.ctx, &planned, live).await?;
        Ok(made.map(|made| made.resource_version().unwrap_or_default()))
    }

    /// Returns whether a new release waits for its turn.
    async fn apply_deployment(&self, mirror: &SlimMirror, intent: &Intent, around: &Around) -> Result<bool> {
        let (Some(source), Some(target)) = (&around.source, &around.target) else { return Ok(false) };
        let image = plan::Image::of(mirror, &self.ctx.options);
        let planned = plan::deployment(mirror, source, target, &image, &self.ctx.options.release);
        let seen = around.deployment.as_ref().map(|deployment| &deployment.metadata);
        let policy = mirror.spec.worker.as_ref().map(|worker| worker.update_policy).unwrap_or_default();
        // Of a worker that can't start, or ends whenever it does, nothing is lost: a corrected image reaches it without further ado.
        let is_edited = around.deployment.as_ref().is_some_and(|seen| apply::is_edited(&seen.metadata, seen.owned_fields.as_ref()));
        let is_free = is_edited || intent.resumes || is_stuck(&self.caches.pods(mirror), Timestamp::now());
        match rollout::decide(seen, &planned, is_free, policy) {
            Decision::Keep => return Ok(false),
            Decision::Roll if !self.may_roll(mirror) => return Ok(true),
            Decision::Roll => info!(image = image.name, "the worker moves to the current release"),
            Decision::Apply => {}
        }
        // Rare enough for a live look: the cache holds what carries our labels only.
        let name = worker_name(plan::name(mirror));
        let there = apply::get::<PartialObjectMeta<Deployment>>(&self.ctx, plan::namespace(mirror), &name).await?;
        let there = there.as_ref().map(|there| &there.metadata);
        self.make_room::<Deployment>(mirror, there).await?;
        let is_edited = there.is_some_and(|there| apply::is_edited(there, apply::owned_fields(there).as_ref()));
        if is_edited {
            info!(deployment = name, "somebody has changed it; it is put right");
        }
        if is_edited || there.is_none_or(|there| !apply::is_applied(there, &planned)) {
            apply::note_owned_fields(&self.ctx, &apply::apply(&self.ctx, &planned).await?).await?;
        }
        Ok(false)
    }

    /// Takes away what an earlier Mirror of the same name has left, and refuses to touch what is not ours.
    async fn make_room<K: Object>(&self, mirror: &SlimMirror, there: Option<&ObjectMeta>) -> Result<()> {
        let Some(there) = there.filter(|there| !plan::is_owned(there, mirror)) else { return Ok(()) };
        let (kind, name) = (K::kind(&()), there.name.as_deref().unwrap_or_default());
        if plan::owner_uid(there).is_none() {
            let message = format!("{kind} {name} exists and does not belong to this Mirror: rename one of them");
            return Err(OperatorError::new(ErrorClass::Invalid, reason::INVALID_SPEC, message));
        }
        apply::delete_if_exists::<K>(&self.ctx, plan::namespace(mirror), name, there.uid.as_deref()).await?;
        let message = format!("{kind} {name} of an earlier Mirror is being deleted");
        Err(OperatorError::new(ErrorClass::Transient, "ChildOfEarlierMirror", message))
    }

    fn may_roll(&self, mirror: &SlimMirror) -> bool {
        let source = |mirror: &SlimMirror| format!("{}/{}", plan::namespace(mirror), mirror.spec.source_ref.name);
        let immediate =
            |mirror: &SlimMirror| mirror.spec.worker.as_ref().is_some_and(|worker| worker.update_policy == UpdatePolicy::Immediate);
        let all = self.caches.mirrors.state();
        let others: Vec<_> = all
            .iter()
            .filter(|other| immediate(other) && other.metadata.deletion_timestamp.is_none())
            .filter_map(|other| Some((plan::uid(other).to_owned(), source(other), self.condition(other)?)))
            .collect();
        let lag = self.ctx.poller.latest(plan::uid(mirror)).and_then(|polled| polled.current()?.lag_bytes);
        self.memory.rollouts.begin(plan::uid(mirror), &source(mirror), lag, &others)
    }

    /// How a worker does; `None` when there is none.
    fn condition(&self, mirror: &SlimMirror) -> Option<Condition> {
        let deployment = self.caches.deployment(mirror)?;
        if !is_settled(&deployment) {
            return Some(Condition::Unsettled);
        }
        let polled = self.ctx.poller.latest(plan::uid(mirror));
        let status = polled.as_ref().and_then(Polled::current);
        Some(Condition::Settled(status.and_then(|status| match status.phase {
            Phase::Streaming => status.lag_bytes.or(Some(0)),
            // It will not move before a human acts.
            Phase::Suspended | Phase::Stopped => Some(0),
            _ => None,
        })))
    }

    /// Tells the running worker what it shall do: by the mounted file, which the kubelet refreshes when the pod is touched, and at once
    /// by a call. Neither is needed for the other, so that neither's failure is one of the pass.
    pub async fn push(&self, mirror: &SlimMirror, desired: &Desired, observed: &Observed, touch: bool) {
        let (Some(pod), Some(address)) = (&observed.pod, &observed.address) else { return };
        let touched = async {
            if touch {
                self.touch(plan::namespace(mirror), pod, desired.generation).await;
            }
        };
        let put = self.ctx.workers.put_desired(address, plan::uid(mirror), desired);
        match futures::join!(touched, put).1 {
            Ok(()) => debug!(generation = desired.generation, "the worker has the document"),
            Err(error) => info!(generation = desired.generation, %error, "the worker was not told; it will read its file"),
        }
        self.ctx.poller.poll_soon(plan::uid(mirror));
    }

    async fn touch(&self, namespace: &str, pod: &str, generation: i64) {
        let api = Api::<Pod>::namespaced(self.ctx.client.clone(), namespace);
        let patch = Patch::Merge(json!({"metadata": {"annotations": {TOUCHED: generation.to_string()}}}));
        match timeout(TOUCH, api.patch_metadata(pod, &PatchParams::default(), &patch)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => debug!(pod, %error, "the pod was not touched"),
            Err(_) => debug!(pod, "the pod was not touched in time"),
        }
    }

    /// The way to a Mirror's database: from its Source or Target, else as it was last.
    ///
    /// # Errors
    /// When neither is known.
    pub async fn endpoint<K: Object + Connection>(&self, side: Side, namespace: &str, name: &str, object: Option<&K>) -> Result<Endpoint> {
        let resolved = match object {
            Some(object) => databases::resolve(&self.ctx, namespace, &object.connection()).await,
            None => {
                let message = format!("{} {name} is gone, and with it the way to the database", side.kind());
                Err(OperatorError::new(ErrorClass::Missing, "NotFound", message))
            }
        };
        let last = || self.memory.endpoints.last(&(side, (namespace.to_owned(), name.to_owned())));
        resolved.or_else(|error| last().ok_or(error))
    }
}

/// What there is around a Mirror, as caches know it.
pub struct Around {
    /// Of its worker.
    pub deployment: Option<std::sync::Arc<SlimDeployment>>,
    /// The Source.
    pub source: Option<Peer>,
    /// The Target.
    pub target: Option<Peer>,
    /// Generation of the document that the worker says is in effect; 0 when unknown.
    pub in_effect: i64,
}

/// What was decided.
pub struct Decided {
    /// What is to be done.
    pub intent: Intent,
    /// On what it rests, when it was decided in this pass.
    pub basis: Option<Basis>,
    /// The ConfigMap as it was read in this pass.
    pub config_map: Option<ConfigMap>,
}

impl Decided {
    /// One for which nothing had to be read.
    pub fn of(intent: Intent) -> Self {
        Self { intent, basis: None, config_map: None }
    }
}

/// What is on its way out takes no finalizer any more, and needs none when it has ours. Returns whether it had to be added.
fn hold_one(result: Result<bool>) -> Result<bool> {
    match result {
        Err(error) if error.class == ErrorClass::Missing => Ok(false),
        other => other,
    }
}

/// Whether the pod of the newest template is ready.
fn is_settled(deployment: &SlimDeployment) -> bool {
    let status = &deployment.status;
    status.observed_generation >= deployment.metadata.generation && status.updated_replicas == Some(1) && status.ready_replicas == Some(1)
}
