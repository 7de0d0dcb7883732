//! Takes a deleted Mirror down. Makes no object, since a namespace that is being deleted accepts nothing new, and needs no worker.
//!
//! Source, Target and Secrets are let go by their own controller, once this Mirror is gone.

use super::controller::Mirrors;
use super::deletion::{self, Facts, Step};
use super::peer::Side;
use super::plan;
use super::report;
use crate::connectors::postgres::Endpoint;
use crate::operator::apply;
use crate::operator::databases::Leftovers;
use crate::operator::error::{ErrorClass, OperatorError, Result, chain};
use crate::operator::events::EventKind;
use crate::operator::slim::{SlimMirror, SlimPod};
use crate::resources::conditions::reason;
use crate::resources::names::{MIRROR_FINALIZER, MIRROR_LABEL, MIRROR_UID_LABEL, has_finalizer, is_deletion_forced, worker_name};
use crate::worker::contract::{DESIRED_FILE, Desired, MirrorId};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::api::ListParams;
use kube::core::PartialObjectMeta;
use kube::runtime::controller::Action;
use kube::{Api, Resource as _, ResourceExt as _};
use std::time::Duration;
use tokio::time::timeout;
use tracing::{error, info, warn};

/// Longest try on the source.
const TRY: Duration = Duration::from_secs(30);
/// Longest try on the target, where nothing is lost when it fails.
const FORGET: Duration = Duration::from_secs(5);
/// Pace while the worker ends; its pods wake the Mirror too.
const SOON: Duration = Duration::from_secs(1);
/// Longest pause between two tries on the source.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Name under which failed tries are counted.
const TRIES: &str = "mirror-clean-up";

/// What runs for a deleted Mirror.
struct Remains {
    deployment: Option<ObjectMeta>,
    pods: Vec<SlimPod>,
}

impl Mirrors {
    /// One step of the way out.
    ///
    /// # Errors
    /// As the API server answers; what fails on the source is the Mirror's trouble and shown there.
    pub(super) async fn delete(&self, mirror: &SlimMirror) -> Result<Action> {
        self.ctx.poller.unregister(plan::uid(mirror));
        if !has_finalizer(&mirror.metadata, MIRROR_FINALIZER) {
            return Ok(Action::await_change());
        }
        let (remains, leftovers) = (self.remains(mirror).await?, deletion::leftovers(mirror));
        let facts = Facts {
            forced: is_deletion_forced(&mirror.metadata),
            leftovers: leftovers.is_some(),
            elapsed: since_deletion(mirror),
            bound: self.bound(),
            deployment: remains.deployment.is_some(),
            pods: remains.pods.len(),
        };
        match (deletion::next(facts), leftovers) {
            (Step::StopWorker | Step::AwaitPods, _) => self.stop_worker(mirror, &remains).await,
            (Step::CleanUp, Some(leftovers)) => self.clean_up(mirror, &leftovers).await,
            (Step::Skip, Some(leftovers)) => {
                self.tell_what_stays(mirror, &leftovers, reason::CLEANUP_SKIPPED).await;
                self.let_go(mirror).await
            }
            (Step::Release | Step::CleanUp | Step::Skip, _) => self.let_go(mirror).await,
        }
    }

    /// Live, since the cache may be behind and what is overlooked here would go on reading the slot.
    async fn remains(&self, mirror: &SlimMirror) -> Result<Remains> {
        let namespace = plan::namespace(mirror);
        let deployment = apply::get::<PartialObjectMeta<Deployment>>(&self.ctx, namespace, &worker_name(plan::name(mirror))).await?;
        let labels = format!("{MIRROR_LABEL}={},{MIRROR_UID_LABEL}={}", plan::name(mirror), plan::uid(mirror));
        let pods = Api::<SlimPod>::namespaced(self.ctx.client.clone(), namespace);
        let pods = timeout(apply::DEADLINE, pods.list(&ListParams::default().labels(&labels))).await;
        let pods = pods.map_err(|_| OperatorError::deadline("list pods"))??.items;
        let is_over = |pod: &SlimPod| matches!(pod.status.phase.as_deref(), Some("Failed" | "Succeeded"));
        Ok(Remains {
            deployment: deployment
                .map(|deployment| deployment.metadata)
                .filter(|meta| plan::is_owned(meta, mirror) && meta.deletion_timestamp.is_none()),
            pods: pods.into_iter().filter(|pod| !is_over(pod)).collect(),
        })
    }

    async fn stop_worker(&self, mirror: &SlimMirror, remains: &Remains) -> Result<Action> {
        let namespace = plan::namespace(mirror);
        if let Some(deployment) = &remains.deployment {
            apply::delete_if_exists::<Deployment>(&self.ctx, namespace, &worker_name(plan::name(mirror)), deployment.uid.as_deref())
                .await?;
        } else {
            // The garbage collector is on its way to them; there is no reason to wait for it.
            for pod in remains.pods.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()) {
                apply::delete_if_exists::<Pod>(&self.ctx, namespace, &pod.name_any(), pod.metadata.uid.as_deref()).await?;
            }
        }
        self.write(mirror, &report::deleting(mirror, "the worker is being stopped", None, Timestamp::now())).await?;
        Ok(Action::requeue(SOON))
    }

    async fn clean_up(&self, mirror: &SlimMirror, leftovers: &Leftovers) -> Result<Action> {
        // Two that were set up at the same moment: the one that stays keeps what both name.
        let stays = |other: &SlimMirror| other.metadata.deletion_timestamp.is_none() && has_finalizer(&other.metadata, MIRROR_FINALIZER);
        if let Some(other) = self.caches.namesake(mirror, stays) {
            let whose = other.name_any();
            warn!(slot = leftovers.slot, whose, "the slot stays, for another Mirror names it too");
            return self.let_go(mirror).await;
        }
        let trouble = match self.drop_leftovers(mirror, leftovers).await {
            Ok(()) => {
                if leftovers.drop_slot {
                    self.forget_stream(mirror, &leftovers.slot).await;
                }
                return self.let_go(mirror).await;
            }
            Err(trouble) => trouble,
        };
        let bound = self.bound();
        if deletion::is_over(since_deletion(mirror), bound) {
            self.tell_what_stays(mirror, leftovers, reason::SLOT_ORPHANED).await;
            return self.let_go(mirror).await;
        }
        let doing = "slot and publication are being dropped on the source";
        warn!(slot = leftovers.slot, trouble, "the clean-up has failed and is tried again");
        self.write(mirror, &report::deleting(mirror, doing, Some(&trouble), Timestamp::now())).await?;
        let pause = self.ctx.backoff.failed(TRIES, plan::uid(mirror), ErrorClass::Transient);
        // One try falls on the bound.
        let left = bound.saturating_sub(since_deletion(mirror)).max(SOON);
        Ok(Action::requeue(pause.min(LONGEST_PAUSE).min(left)))
    }

    fn bound(&self) -> Duration {
        Duration::from_secs(60) * self.ctx.options.clean_up_minutes
    }

    /// The error is for people.
    async fn drop_leftovers(&self, mirror: &SlimMirror, leftovers: &Leftovers) -> Result<(), String> {
        let endpoint = self.source_endpoint(mirror).await.map_err(|error| error.to_string())?;
        match timeout(TRY, self.databases.clean_up(&endpoint, leftovers)).await {
            Ok(Ok(done)) => {
                info!(
                    slot = leftovers.slot,
                    slot_dropped = done.slot_dropped,
                    publication_dropped = done.publication_dropped,
                    "cleaned up"
                );
                Ok(())
            }
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("{}:{} did not answer within {} s", endpoint.host, endpoint.port, TRY.as_secs())),
        }
    }

    pub(super) async fn source_endpoint(&self, mirror: &SlimMirror) -> Result<Endpoint> {
        let source = self.caches.source(mirror);
        self.endpoint(Side::Source, plan::namespace(mirror), &mirror.spec.source_ref.name, source.as_deref()).await
    }

    /// So that another Mirror may write the same tables. A target that is gone must not hold up the deletion.
    async fn forget_stream(&self, mirror: &SlimMirror, slot: &str) {
        let (namespace, name) = (plan::namespace(mirror), &mirror.spec.target_ref.name);
        let id = MirrorId { namespace: namespace.to_owned(), name: plan::name(mirror).to_owned(), uid: plan::uid(mirror).to_owned() };
        let forgotten = async {
            let target = self.caches.target(mirror);
            let endpoint = self.endpoint(Side::Target, namespace, name, target.as_deref()).await.map_err(|error| chain(&error))?;
            self.databases.forget_stream(&endpoint, slot, &id).await.map_err(|error| chain(&error))
        };
        match timeout(FORGET, forgotten).await {
            Ok(Ok(())) => {}
            Ok(Err(trouble)) => warn!(slot, trouble, "the checkpoint stays on the target"),
            Err(_) => warn!(slot, "the checkpoint stays on the target, which does not answer"),
        }
    }

    /// Outside the namespace, which may be gone in a moment.
    async fn tell_what_stays(&self, mirror: &SlimMirror, leftovers: &Leftovers, why: &'static str) {
        let host = self.last_host(mirror).await;
        let cause = if why == reason::CLEANUP_SKIPPED { "its deletion was forced" } else { "its source could not be cleaned up in time" };
        let statements = deletion::statements(leftovers);
        let note = format!(
            "Mirror {}/{} is gone, and {cause}. Slot {} stays on {host} and keeps its log. Run there: {statements}",
            plan::namespace(mirror),
            plan::name(mirror),
            leftovers.slot
        );
        error!(reason = why, slot = leftovers.slot, host, statements, "a replication slot or publication is left behind");
        if leftovers.drop_slot {
            self.ctx.metrics.slot_orphaned();
        }
        self.ctx.events.publish_in_operator_namespace(&mirror.object_ref(&()), EventKind::Warning, why, "CleanUp", &note).await;
    }

    /// `host:port/database` of the source, from wherever it is still known.
    async fn last_host(&self, mirror: &SlimMirror) -> String {
        if let Some(source) = self.caches.source(mirror) {
            return format!("{}:{}/{}", source.spec.host, source.spec.port, source.spec.database);
        }
        let map = apply::get::<ConfigMap>(&self.ctx, plan::namespace(mirror), &worker_name(plan::name(mirror))).await.ok().flatten();
        let document = map.and_then(|map| serde_json::from_str::<Desired>(map.data?.get(DESIRED_FILE)?).ok());
        if let Some(source) = document.map(|document| document.source) {
            return format!("{}:{}/{}", source.host, source.port, source.database);
        }
        match self.source_endpoint(mirror).await {
            Ok(endpoint) => format!("{}:{}/{}", endpoint.host, endpoint.port, endpoint.database),
            Err(_) => format!("the server of Source {}", mirror.spec.source_ref.name),
        }
    }

    async fn let_go(&self, mirror: &SlimMirror) -> Result<Action> {
        self.ctx.backoff.succeeded(TRIES, plan::uid(mirror));
        self.ctx.events.forget(&mirror.object_ref(&()));
        let others = self.caches.mirrors.state();
        let is_other =
            |other: &SlimMirror| other.metadata.namespace == mirror.metadata.namespace && other.metadata.uid != mirror.metadata.uid;
        if !others.iter().any(|other| is_other(other)) {
            self.memory.forget_namespace(plan::namespace(mirror));
            self.unprotect_network(plan::namespace(mirror)).await?;
        }
        apply::remove_finalizer(&self.ctx, mirror, MIRROR_FINALIZER).await?;
        self.ctx.bindings.freed();
        Ok(Action::await_change())
    }
}

/// A clock that is behind the API server's counts from zero.
fn since_deletion(mirror: &SlimMirror) -> Duration {
    let begun = mirror.metadata.deletion_timestamp.as_ref().map(|time| time.0);
    let seconds = begun.map_or(0, |begun| Timestamp::now().as_second().saturating_sub(begun.as_second()));
    Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
}
