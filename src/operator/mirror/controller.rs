//! The loop of one Mirror, as a list of steps, and the watches that wake it.

use super::caches::{Caches, PodNames, inhabitants, users, waiting_for};
use super::children::{Applied, Around, Decided};
use super::guard;
use super::intent::{Basis, Intent, intend};
use super::memory::{Memory, Standing};
use super::observe::{Observed, observe};
use super::peer::Peer;
use super::plan::{self, Live};
use super::problem::Problem;
use super::report::{self, Facts};
use super::sharing::{self, has_it};
use crate::operator::apply;
use crate::operator::cache::{self, Wake, any_change, beyond_status};
use crate::operator::connection::{PATIENCE, age};
use crate::operator::context::Context;
use crate::operator::databases::Databases;
use crate::operator::error::{ErrorClass, OperatorError, Result};
use crate::operator::events::EventKind;
use crate::operator::reconcile::{self, requeue};
use crate::operator::shutdown::Shutdown;
use crate::operator::slim::SlimMirror;
use crate::resources::conditions::{self, kind, reason};
use crate::resources::names::{self, MIRROR_FINALIZER, MIRROR_LABEL, has_finalizer, worker_name};
use crate::resources::{Mirror, MirrorStatus};
use crate::worker::contract::{DESIRED_FILE, Desired};
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::controller::Action;
use kube::runtime::reflector::ObjectRef;
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
pub fn spawn(tasks: &mut JoinSet<()>, ctx: &Arc<Context>, shutdown: &Shutdown, shared: &mut cache::Caches, databases: Arc<dyn Databases>) {
    let caches = Caches::of(shared);
    let (store, pod_names) = (caches.mirrors.clone(), Arc::clone(&caches.pod_names));
    let this = Arc::new(Mirrors { ctx: Arc::clone(ctx), databases, caches, memory: Memory::default() });
    let wake = Wake::default();
    listen(shared, &wake, &this, pod_names);
    let controller =
        reconcile::controller(store.clone(), &wake).reconcile_all_on(ctx.signing_keys.changes()).reconcile_on(ctx.poller.changes());
    let pass = move |mirror: Arc<SlimMirror>, _| {
        let this = Arc::clone(&this);
        async move { this.reconcile(&mirror).await }
    };
    tasks.spawn(reconcile::run(CONTROLLER, controller, Arc::clone(ctx), shutdown.clone(), pass));
    tasks.spawn(reconcile::count_resources(Arc::clone(ctx), store, "Mirror", is_ready, shutdown.clone()));
}

/// What wakes a Mirror.
fn listen(shared: &mut cache::Caches, wake: &Wake<SlimMirror>, this: &Arc<Mirrors>, pod_names: Arc<PodNames>) {
    let [of_source, of_target, of_policy, known] = std::array::from_fn(|_| this.caches.mirrors.clone());
    shared.mirrors.wake(wake, beyond_status(), |mirror| [ObjectRef::from_obj(mirror)]);
    shared.sources.wake(wake, any_change(), move |source| {
        users(&of_source, source.metadata.namespace.as_deref(), &source.name_any(), |mirror| &mirror.spec.source_ref)
    });
    shared.targets.wake(wake, any_change(), move |target| {
        users(&of_target, target.metadata.namespace.as_deref(), &target.name_any(), |mirror| &mirror.spec.target_ref)
    });
    shared.deployments.wake(wake, any_change(), owner);
    shared.config_maps.wake(wake, any_change(), owner);
    if let Some(policies) = &mut shared.policies {
        policies.wake(wake, any_change(), move |policy| inhabitants(&of_policy, policy.metadata.namespace.as_deref()));
    }
    shared.pods.wake(wake, any_change(), move |pod| pod_names.note(pod));
    let (this, wake) = (Arc::clone(this), wake.clone());
    shared.mirrors.on_deletion(move |gone| {
        this.memory.decisions.remove(&plan::uid(gone).to_owned());
        this.memory.guarded.remove(&plan::uid(gone).to_owned());
        waiting_for(&known, gone).into_iter().for_each(|mirror| wake.add(mirror));
    });
}

/// What is applied together does not arrive together: what is missing may be on its way for a while.
fn patient(mut intent: Intent, age: Duration) -> Intent {
    let is_missing = |problem: &&mut Problem| [reason::SOURCE_NOT_FOUND, reason::TARGET_NOT_FOUND].contains(&problem.reason);
    if let Some(problem) = intent.problem.as_mut().filter(is_missing) {
        problem.needs_human = age >= PATIENCE;
    }
    intent
}

fn owner<K: Resource>(child: &K) -> Option<ObjectRef<SlimMirror>> {
    Some(ObjectRef::new(child.labels().get(MIRROR_LABEL)?).within(&child.namespace()?))
}

fn is_ready(mirror: &SlimMirror) -> bool {
    mirror.status.as_ref().is_some_and(|status| conditions::is_true(&status.conditions, kind::READY))
}

impl Mirrors {
    async fn reconcile(&self, mirror: &SlimMirror) -> Result<Action> {
        self.caches.filled().await.map_err(|error| OperatorError::new(ErrorClass::Transient, "ShuttingDown", error.to_string()))?;
        if mirror.metadata.deletion_timestamp.is_some() {
            return self.delete(mirror).await;
        }
        if names::is_paused(&mirror.metadata) {
            return self.leave_alone(mirror).await;
        }
        let around = self.resolve(mirror);
        let Some(decision) = self.decide(mirror, &around).await? else { return Ok(Action::await_change()) };
        let applied = self.apply(mirror, &decision, &around).await?;
        let observed = self.observe(mirror);
        let intent = self.remember(mirror, decision, &applied);
        let behind = self.tell(mirror, &intent, &applied, &observed, around.in_effect).await;
        self.report(mirror, &intent, &applied, &observed).await?;
        let watched = guard::watched(mirror, &observed);
        if let Some(budget) = watched {
            self.guard_source(mirror, budget).await;
        }
        Ok(next_look(&intent, &applied, &observed, behind, watched.is_some()))
    }

    async fn leave_alone(&self, mirror: &SlimMirror) -> Result<Action> {
        apply::patch_status(&self.ctx, mirror, mirror.status.as_ref(), &report::paused(mirror, Timestamp::now())).await?;
        Ok(Action::await_change())
    }

    /// What there is, as far as caches know.
    fn resolve(&self, mirror: &SlimMirror) -> Around {
        let said = self.ctx.poller.latest(plan::uid(mirror)).and_then(|polled| Some(polled.current()?.generation));
        Around {
            deployment: self.caches.deployment(mirror),
            source: self.caches.source(mirror).map(|source| Peer::from(source.as_ref())),
            target: self.caches.target(mirror).map(|target| Peer::from(target.as_ref())),
            in_effect: said.unwrap_or_default(),
        }
    }

    /// What is to be done. What no cache holds, the lists of tables and the worker's document, is read when the last decision may no
    /// longer hold. `None`: the Mirror is gone.
    async fn decide(&self, mirror: &SlimMirror, around: &Around) -> Result<Option<Decided>> {
        if !has_finalizer(&mirror.metadata, MIRROR_FINALIZER)
            && let Some(other) = self.caches.namesake(mirror, |other| has_it(other, mirror))
        {
            return Ok(Some(Decided::of(Intent::blocked(sharing::problem(mirror, &other)))));
        }
        let (source, target, exists) = (around.source.as_ref(), around.target.as_ref(), around.deployment.is_some());
        let basis = Basis::of(mirror, source, target, exists, self.ctx.signing_keys.public_keys());
        if let Some(intent) = basis.blocked() {
            return Ok(Some(Decided::of(patient(intent, age(&mirror.metadata)))));
        }
        let uid = plan::uid(mirror);
        if let Some(intent) = self.memory.decided(uid, &basis, around.in_effect, self.caches.document_version(mirror).as_deref()) {
            return Ok(Some(Decided::of(intent)));
        }
        let (namespace, name) = (plan::namespace(mirror), plan::name(mirror));
        let worker = worker_name(name);
        let (whole, config_map) =
            futures::try_join!(apply::get::<Mirror>(&self.ctx, namespace, name), apply::get::<ConfigMap>(&self.ctx, namespace, &worker))?;
        let Some(whole) = whole.filter(|whole| whole.metadata.uid.as_deref() == Some(uid)) else { return Ok(None) };
        let live = Live { document: document_in(mirror, config_map.as_ref()), in_effect: around.in_effect };
        let intent = intend(mirror, &whole.spec, &basis, &live);
        Ok(Some(Decided { intent, basis: Some(basis), config_map }))
    }

    /// What was decided in this pass and carried out holds for the next ones.
    fn remember(&self, mirror: &SlimMirror, decision: Decided, applied: &Applied) -> Intent {
        if let Some(basis) = decision.basis.filter(|_| applied.refused.is_none()) {
            let document = applied.document.clone().or_else(|| decision.config_map.as_ref()?.resource_version());
            let standing = Standing { basis, intent: decision.intent.carried_out(), document };
            self.memory.decisions.put(plan::uid(mirror).to_owned(), standing);
        }
        decision.intent
    }

    fn observe(&self, mirror: &SlimMirror) -> Observed {
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
    async fn tell(&self, mirror: &SlimMirror, intent: &Intent, applied: &Applied, observed: &Observed, in_effect: i64) -> bool {
        let Some(desired) = intent.desired.as_ref().filter(|_| applied.refused.is_none()) else { return false };
        let behind = in_effect > 0 && in_effect < desired.generation;
        if applied.document.is_some() || behind {
            self.push(mirror, desired, observed, applied.document.is_some()).await;
        }
        behind
    }

    async fn report(&self, mirror: &SlimMirror, intent: &Intent, applied: &Applied, observed: &Observed) -> Result<()> {
        let facts = Facts { mirror, problem: applied.refused.as_ref().or(intent.problem.as_ref()), observed, told: intent.told };
        self.write(mirror, &report::report(&facts, Timestamp::now())).await
    }

    /// Writes the status when it differs, and tells of transitions.
    pub(super) async fn write(&self, mirror: &SlimMirror, status: &MirrorStatus) -> Result<()> {
        if !apply::patch_status(&self.ctx, mirror, mirror.status.as_ref(), status).await? {
            return Ok(());
        }
        let old = mirror.status.clone().unwrap_or_default();
        for news in report::news(&old, status) {
            let event = if news.calm { EventKind::Normal } else { EventKind::Warning };
            self.ctx.events.publish(&mirror.object_ref(&()), event, news.reason, "Reconcile", &news.message).await;
        }
        Ok(())
    }
}

/// The document in the ConfigMap of this very Mirror's worker, if it can be read.
fn document_in(mirror: &SlimMirror, config_map: Option<&ConfigMap>) -> Option<Desired> {
    let map = config_map.filter(|map| plan::is_owned(&map.metadata, mirror))?;
    serde_json::from_str(map.data.as_ref()?.get(DESIRED_FILE)?).ok()
}

/// Watches and the poller tell of nearly everything; this is for the rest.
fn next_look(intent: &Intent, applied: &Applied, observed: &Observed, behind: bool, watched: bool) -> Action {
    let problem: Option<&Problem> = applied.refused.as_ref().or(intent.problem.as_ref());
    let settled = observed.worker.status().is_some_and(|status| status.streaming || status.error.is_some());
    requeue(if behind || applied.waits_for_turn || (applied.document.is_some() && observed.address.is_some()) {
        WAITING
    } else if watched {
        guard::PACE
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
        let with = |reason, age| patient(Intent::blocked(Problem::stop(reason, "")), age).problem.expect("a problem").needs_human;
        assert!(!with(reason::SOURCE_NOT_FOUND, Duration::ZERO) && !with(reason::TARGET_NOT_FOUND, Duration::ZERO));
        assert!(with(reason::SOURCE_NOT_FOUND, PATIENCE));
        assert!(with(reason::SOURCE_DELETING, Duration::ZERO));
    }
}
