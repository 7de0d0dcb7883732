//! The loop of one Mirror, as a list of steps, and the watches that wake it.

use super::caches::{Caches, PodNames, users, waiting_for};
use super::children::{Applied, LiveChildren};
use super::intent::{Found, Intent, intend};
use super::memory::Memory;
use super::observe::{Observed, observe};
use super::peer::Peer;
use super::plan::{self, Live};
use super::problem::Problem;
use super::report::{self, Facts};
use super::sharing::{self, has_it};
use crate::operator::apply;
use crate::operator::connection::{PATIENCE, age};
use crate::operator::context::Context;
use crate::operator::databases::Databases;
use crate::operator::error::{ErrorClass, OperatorError, Result};
use crate::operator::events::EventKind;
use crate::operator::reconcile::{self, requeue};
use crate::operator::shutdown::Shutdown;
use crate::operator::watch::{SlimDeployment, SlimPod, any_change, beyond_status};
use crate::resources::conditions::{self, kind, reason};
use crate::resources::names::{self, MIRROR_FINALIZER, MIRROR_LABEL, WORKER_SELECTOR, has_finalizer, worker_name};
use crate::resources::{Mirror, MirrorStatus, Source, Target};
use crate::worker::contract::DESIRED_FILE;
use futures::channel::mpsc;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::controller::{Action, Controller};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher;
use kube::{Resource, ResourceExt as _};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

/// Its name in logs and metrics.
pub const CONTROLLER: &str = "mirror";
/// Pace of a Mirror in which nothing happens; changes wake it.
const STEADY: Duration = Duration::from_secs(600);
/// Pace of a Mirror on its way, for what no watch tells.
const MOVING: Duration = Duration::from_secs(60);
/// Mirrors that are woken at once when a slot becomes free.
const WAITING_MIRRORS: usize = 256;
/// Pace while a worker has not taken what it was told, or waits for its turn.
const WAITING: Duration = Duration::from_secs(5);

/// The controller of Mirrors.
pub struct Mirrors {
    pub(super) ctx: Arc<Context>,
    pub(super) databases: Arc<dyn Databases>,
    pub(super) caches: Caches,
    pub(super) memory: Memory,
}

/// Starts the controller; it ends when `shutdown` is cancelled, after its running passes.
pub fn spawn(tasks: &mut JoinSet<()>, ctx: &Arc<Context>, shutdown: &Shutdown, databases: Arc<dyn Databases>) {
    let workers = watcher::Config::default().labels(WORKER_SELECTOR);
    let mirrors = ctx.watch::<Mirror>(&watcher::Config::default());
    let (sources, targets) = (ctx.watch::<Source>(&watcher::Config::default()), ctx.watch::<Target>(&watcher::Config::default()));
    let (deployments, pods) = (ctx.watch::<SlimDeployment>(&workers), ctx.watch::<SlimPod>(&workers));
    let caches = Caches {
        mirrors: mirrors.store.clone(),
        sources: sources.store.clone(),
        targets: targets.store.clone(),
        deployments: deployments.store.clone(),
        pods: pods.store.clone(),
        pod_names: Arc::new(PodNames::default()),
    };
    let store = mirrors.store.clone();
    let (mut freed, waiting) = mpsc::channel(WAITING_MIRRORS);
    let known = store.clone();
    let mirrors = mirrors.telling(move |gone| {
        for mirror in waiting_for(&known, gone) {
            // When there are too many, the rest finds out at its own pace.
            let _ = freed.try_send(mirror);
        }
    });
    let (of_source, of_target, pod_names) = (store.clone(), store.clone(), Arc::clone(&caches.pod_names));
    let controller = Controller::for_stream(mirrors.only(beyond_status()), store.clone())
        .watches_stream(sources.only(any_change()), move |source| {
            users(&of_source, source.metadata.namespace.as_deref(), &source.name_any(), |mirror| &mirror.spec.source_ref)
        })
        .watches_stream(targets.only(any_change()), move |target| {
            users(&of_target, target.metadata.namespace.as_deref(), &target.name_any(), |mirror| &mirror.spec.target_ref)
        })
        .watches_stream(deployments.only(any_change()), |deployment| owner(&deployment))
        .watches_stream(pods.only(any_change()), move |pod| pod_names.note(&pod))
        .reconcile_on(waiting)
        .reconcile_all_on(ctx.signing_keys.changes())
        .reconcile_on(ctx.poller.changes());
    let this = Arc::new(Mirrors { ctx: Arc::clone(ctx), databases, caches, memory: Memory::default() });
    let pass = move |mirror: Arc<Mirror>, _| {
        let this = Arc::clone(&this);
        async move { this.reconcile(&mirror).await }
    };
    tasks.spawn(reconcile::run(CONTROLLER, controller, Arc::clone(ctx), shutdown.clone(), pass));
    tasks.spawn(reconcile::count_resources(Arc::clone(ctx), store, "Mirror", is_ready, shutdown.clone()));
}

/// What is applied together does not arrive together: what is missing may be on its way for a while.
fn patient(mut intent: Intent, age: Duration) -> Intent {
    let is_missing = |problem: &&mut Problem| [reason::SOURCE_NOT_FOUND, reason::TARGET_NOT_FOUND].contains(&problem.reason);
    if let Some(problem) = intent.problem.as_mut().filter(is_missing) {
        problem.needs_human = age >= PATIENCE;
    }
    intent
}

fn owner(deployment: &SlimDeployment) -> Option<ObjectRef<Mirror>> {
    Some(ObjectRef::new(deployment.labels().get(MIRROR_LABEL)?).within(&deployment.namespace()?))
}

fn is_ready(mirror: &Mirror) -> bool {
    mirror.status.as_ref().is_some_and(|status| conditions::is_true(&status.conditions, kind::READY))
}

impl Mirrors {
    async fn reconcile(&self, mirror: &Mirror) -> Result<Action> {
        self.caches.filled().await.map_err(|error| OperatorError::new(ErrorClass::Transient, "ShuttingDown", error.to_string()))?;
        if mirror.metadata.deletion_timestamp.is_some() {
            return self.delete(mirror).await;
        }
        if names::is_paused(&mirror.metadata) {
            return self.leave_alone(mirror).await;
        }
        let (children, live) = self.resolve(mirror).await?;
        let intent = self.plan(mirror, &children, &live);
        let applied = self.apply(mirror, &intent, &children).await?;
        let observed = self.observe(mirror);
        let behind = self.tell(mirror, &intent, &applied, &observed, live.in_effect).await;
        self.report(mirror, &intent, &applied, &observed).await?;
        Ok(next_look(&intent, &applied, &observed, behind))
    }

    async fn leave_alone(&self, mirror: &Mirror) -> Result<Action> {
        apply::patch_status(&self.ctx, mirror, &report::paused(mirror, Timestamp::now())).await?;
        Ok(Action::await_change())
    }

    /// What there is: from caches, but for the document, whose generation must never be an old one.
    async fn resolve(&self, mirror: &Mirror) -> Result<(LiveChildren, Live)> {
        let config_map = apply::get::<ConfigMap>(&self.ctx, plan::namespace(mirror), &worker_name(plan::name(mirror))).await?;
        let text =
            config_map.as_ref().filter(|map| plan::is_owned(&map.metadata, mirror)).and_then(|map| map.data.as_ref()?.get(DESIRED_FILE));
        let said = self.ctx.poller.latest(plan::uid(mirror)).and_then(|polled| Some(polled.current()?.generation));
        let live = Live { document: text.and_then(|text| serde_json::from_str(text).ok()), in_effect: said.unwrap_or_default() };
        let children = LiveChildren {
            config_map,
            deployment: self.caches.deployment(mirror),
            source: self.caches.source(mirror).map(|source| Peer::from(source.as_ref())),
            target: self.caches.target(mirror).map(|target| Peer::from(target.as_ref())),
        };
        Ok((children, live))
    }

    fn plan(&self, mirror: &Mirror, children: &LiveChildren, live: &Live) -> Intent {
        let exists = children.deployment.is_some();
        if !has_finalizer(&mirror.metadata, MIRROR_FINALIZER)
            && let Some(other) = self.caches.namesake(mirror, |other| has_it(other, mirror))
        {
            return Intent { desired: None, deploy: false, resumes: false, problem: Some(sharing::problem(mirror, &other)) };
        }
        let found = Found { source: children.source.as_ref(), target: children.target.as_ref(), live, exists };
        let intent = intend(mirror, &found, self.ctx.signing_keys.public_keys());
        if exists { intent } else { patient(intent, age(&mirror.metadata)) }
    }

    fn observe(&self, mirror: &Mirror) -> Observed {
        let (uid, pods) = (plan::uid(mirror), self.caches.pods(mirror));
        let address = super::observe::current(&pods).and_then(super::observe::address_of);
        match address {
            Some(address) => self.ctx.poller.register(ObjectRef::from_obj(mirror), uid, &address),
            None => self.ctx.poller.unregister(uid),
        }
        let deployment = self.caches.deployment(mirror);
        observe(deployment.as_deref(), &pods, self.ctx.poller.latest(uid).as_ref(), Timestamp::now())
    }

    /// Pushes the document to a worker that does not follow it yet. Returns whether there is such a worker.
    async fn tell(&self, mirror: &Mirror, intent: &Intent, applied: &Applied, observed: &Observed, in_effect: i64) -> bool {
        let Some(desired) = intent.desired.as_ref().filter(|_| applied.refused.is_none()) else { return false };
        let behind = in_effect > 0 && in_effect < desired.generation;
        if applied.document_changed || behind {
            self.push(mirror, desired, observed, applied.document_changed).await;
        }
        behind
    }

    async fn report(&self, mirror: &Mirror, intent: &Intent, applied: &Applied, observed: &Observed) -> Result<()> {
        let facts = Facts {
            mirror,
            problem: applied.refused.as_ref().or(intent.problem.as_ref()),
            observed,
            told: intent.desired.as_ref().map(|desired| desired.generation),
        };
        self.write(mirror, &report::report(&facts, Timestamp::now())).await
    }

    /// Writes the status when it differs, and tells of transitions.
    pub(super) async fn write(&self, mirror: &Mirror, status: &MirrorStatus) -> Result<()> {
        if !apply::patch_status(&self.ctx, mirror, status).await? {
            return Ok(());
        }
        let old = mirror.status.as_ref().map_or(&[][..], |status| &status.conditions);
        for news in report::news(old, status) {
            let event = if news.calm { EventKind::Normal } else { EventKind::Warning };
            self.ctx.events.publish(&mirror.object_ref(&()), event, news.reason, "Reconcile", news.message).await;
        }
        Ok(())
    }
}

/// Watches and the poller tell of nearly everything; this is for the rest.
fn next_look(intent: &Intent, applied: &Applied, observed: &Observed, behind: bool) -> Action {
    let problem: Option<&Problem> = applied.refused.as_ref().or(intent.problem.as_ref());
    let settled = observed.worker.status().is_some_and(|status| status.streaming || status.error.is_some());
    requeue(if behind || applied.waits_for_turn || (applied.document_changed && observed.address.is_some()) {
        WAITING
    } else if settled || problem.is_some_and(|problem| problem.needs_human) {
        STEADY
    } else {
        MOVING
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_may_be_on_its_way_for_a_while() {
        let with = |reason, age| {
            let intent = Intent { desired: None, deploy: false, resumes: false, problem: Some(Problem::stop(reason, "")) };
            patient(intent, age).problem.expect("a problem").needs_human
        };
        assert!(!with(reason::SOURCE_NOT_FOUND, Duration::ZERO) && !with(reason::TARGET_NOT_FOUND, Duration::ZERO));
        assert!(with(reason::SOURCE_NOT_FOUND, PATIENCE));
        assert!(with(reason::SOURCE_DELETING, Duration::ZERO));
    }
}
