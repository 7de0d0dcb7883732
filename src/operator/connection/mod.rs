//! One controller for two kinds, Source and Target: is the database reached, and could a Mirror start?
//!
//! Invariants: a pass with nothing new writes nothing and opens no connection; an object and its Secrets stay until no Mirror uses
//! them.

#[cfg(test)]
mod fake;
mod inspections;
mod policy;
mod release;
mod report;

use super::apply::{self, Object};
use super::cache::{Caches, Wake, Watched, any_change, beyond_status};
use super::context::Context;
use super::databases::{self, Databases};
use super::error::{ErrorClass, Result};
use super::mirror::plan;
use super::reconcile;
use super::shutdown::Shutdown;
use super::slim::SlimMirror;
use super::watch::Watchable;
use crate::connectors::postgres::connect::Side;
use crate::resources::conditions::reason;
use crate::resources::names::is_paused;
use crate::resources::{Connection, LocalRef, Source, Target};
use inspections::{Inspections, pace_of_missing};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::controller::Action;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Resource, ResourceExt as _};
pub use policy::DeletionPolicy;
use release::{Releases, Use};
use report::{Failure, Observation, Outcome, Report};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

/// How long something that is referred to may be on its way.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A kind that this controller serves.
pub trait Kind: Object + Watchable + Connection {
    /// Which end of a Mirror it is.
    const SIDE: Side;
    /// Name of the controller in logs and metrics.
    const CONTROLLER: &'static str;
    /// Its name in metrics.
    const KIND: &'static str;
    /// Field of a Mirror that refers to it.
    const REFERENCE: &'static str;

    /// What that field holds.
    fn of(mirror: &SlimMirror) -> &LocalRef;

    /// The cache of this kind.
    fn cache(caches: &mut Caches) -> &mut Watched<Self>;
}

impl Kind for Source {
    const SIDE: Side = Side::Source;
    const CONTROLLER: &'static str = "source";
    const KIND: &'static str = "Source";
    const REFERENCE: &'static str = "spec.sourceRef.name";

    fn of(mirror: &SlimMirror) -> &LocalRef {
        &mirror.spec.source_ref
    }

    fn cache(caches: &mut Caches) -> &mut Watched<Self> {
        &mut caches.sources
    }
}

impl Kind for Target {
    const SIDE: Side = Side::Target;
    const CONTROLLER: &'static str = "target";
    const KIND: &'static str = "Target";
    const REFERENCE: &'static str = "spec.targetRef.name";

    fn of(mirror: &SlimMirror) -> &LocalRef {
        &mirror.spec.target_ref
    }

    fn cache(caches: &mut Caches) -> &mut Watched<Self> {
        &mut caches.targets
    }
}

/// What a pass needs beside the context.
struct Shared {
    inspections: Inspections,
    releases: Releases,
    policy: DeletionPolicy,
    mirrors: Mirrors,
}

/// All Mirrors that are served.
struct Mirrors {
    store: Store<SlimMirror>,
    filled: tokio::sync::watch::Receiver<bool>,
}

impl Mirrors {
    /// Slots of all of them, whatever their source: a slot that any of them names is nobody's orphan. `None` while not all are known.
    fn slots(&self) -> Option<BTreeSet<String>> {
        (*self.filled.borrow()).then(|| self.store.state().iter().map(|mirror| plan::slot(mirror)).collect())
    }
}

/// Starts the controllers of Source and Target; they end when `shutdown` is cancelled, after their running passes.
pub fn spawn(tasks: &mut JoinSet<()>, ctx: &Arc<Context>, shutdown: &Shutdown, caches: &mut Caches, databases: Arc<dyn Databases>) {
    let mirrors = Mirrors { store: caches.mirrors.store.clone(), filled: caches.mirrors.filled() };
    let (releases, policy) = (Releases::default(), DeletionPolicy::default());
    let shared = Arc::new(Shared { inspections: Inspections::new(databases), releases, policy, mirrors });
    control::<Source>(tasks, ctx, shutdown, caches, &shared);
    control::<Target>(tasks, ctx, shutdown, caches, &shared);
}

fn control<K: Kind>(tasks: &mut JoinSet<()>, ctx: &Arc<Context>, shutdown: &Shutdown, caches: &mut Caches, shared: &Arc<Shared>) {
    let wake = Wake::default();
    let objects = K::cache(caches);
    objects.wake(&wake, beyond_status(), |object| [ObjectRef::from_obj(object)]);
    let (store, known) = (objects.store.clone(), objects.store.clone());
    caches.mirrors.wake(&wake, any_change(), move |mirror| released_by(mirror, &known));
    let controller = reconcile::controller(store.clone(), &wake);
    let shared = shared.clone();
    let pass = move |object: Arc<K>, ctx: Arc<Context>| {
        let shared = shared.clone();
        async move { reconcile(object.as_ref(), &ctx, &shared).await }
    };
    tasks.spawn(reconcile::run(K::CONTROLLER, controller, ctx.clone(), shutdown.clone(), pass));
    if K::SIDE == Side::Source {
        tasks.spawn(count_orphans(ctx.clone(), store.clone(), shutdown.clone()));
    }
    tasks.spawn(reconcile::count_resources(ctx.clone(), store, K::KIND, is_ready::<K>, shutdown.clone()));
}

/// Shows in the metrics how many slots without a Mirror the Sources list, and what is kept for them.
async fn count_orphans<K: Kind>(ctx: Arc<Context>, store: Store<K>, shutdown: Shutdown) {
    let mut tick = tokio::time::interval(Duration::from_secs(15));
    while shutdown.run_until_cancelled(tick.tick()).await.is_some() {
        let all = store.state();
        let listed = all.iter().filter_map(|object| object.connection_status()).flat_map(|status| &status.orphaned_slots);
        let idle = listed.filter(|slot| !slot.active);
        let (count, bytes) =
            idle.fold((0, 0), |(count, bytes), slot| (count + 1, slot.retained_bytes.unwrap_or_default().saturating_add(bytes)));
        ctx.metrics.set_slots_without_mirror(count, bytes);
    }
}

fn is_ready<K: Kind>(object: &K) -> bool {
    object.connection_status().is_some_and(|status| status.is_ready(object.meta().generation))
}

/// The object that a change of `mirror` may set free: one of both is being deleted.
fn released_by<K: Kind>(mirror: &SlimMirror, known: &Store<K>) -> Option<ObjectRef<K>> {
    let object = ObjectRef::new(&K::of(mirror).name).within(&mirror.namespace()?);
    let ends = |meta: &ObjectMeta| meta.deletion_timestamp.is_some();
    (ends(mirror.meta()) || known.get(&object).is_some_and(|object| ends(object.meta()))).then_some(object)
}

/// Release, look, report.
async fn reconcile<K: Kind>(object: &K, ctx: &Context, shared: &Shared) -> Result<Action> {
    let old = object.connection_status().cloned().unwrap_or_default();
    let is_deleting = object.meta().deletion_timestamp.is_some();
    if is_paused(object.meta()) && !is_deleting {
        apply::patch_status(ctx, object, object.connection_status(), &report::paused(&old, object.meta().generation, Timestamp::now()))
            .await?;
        return Ok(Action::await_change());
    }
    let Use { users, protected } = shared.releases.release_unless_used(ctx, object).await?;
    if is_deleting && users.is_empty() {
        return Ok(Action::await_change());
    }
    let (outcome, again) = look(object, ctx, shared).await?;
    let observation = Observation {
        generation: object.meta().generation,
        old: &old,
        outcome: &outcome,
        protection: protection(object, ctx, shared).await,
        users: if is_deleting { &users } else { &[] },
        protected: &protected,
    };
    tell(object, ctx, report::report(observation, Timestamp::now())).await?;
    Ok(Action::requeue(again))
}

/// What is known of the database, and when to look again.
async fn look<K: Kind>(object: &K, ctx: &Context, shared: &Shared) -> Result<(Outcome, Duration)> {
    let namespace = object.namespace().unwrap_or_default();
    match databases::resolve(ctx, &namespace, &object.connection()).await {
        Ok(endpoint) => {
            let uid = object.meta().uid.as_deref().unwrap_or_default();
            Ok(shared.inspections.outcome(uid, K::SIDE, endpoint, &|| shared.mirrors.slots()).await)
        }
        // Secrets are not watched; they are read again at this pace.
        Err(error) if matches!(error.class, ErrorClass::Missing | ErrorClass::Invalid) => {
            let age = age(object.meta());
            Ok((Outcome::Failed(patient(Failure::from(error), age)), pace_of_missing(age)))
        }
        Err(error) => Err(error),
    }
}

/// What is applied together does not arrive together: a Secret may be on its way for a while.
fn patient(failure: Failure, age: Duration) -> Failure {
    Failure { may_pass: failure.reason == reason::SECRET_NOT_FOUND && age < PATIENCE, ..failure }
}

/// How long the object has been there.
pub fn age(meta: &ObjectMeta) -> Duration {
    let created = meta.creation_timestamp.as_ref().map_or_else(Timestamp::now, |time| time.0);
    Timestamp::now().duration_since(created).try_into().unwrap_or_default()
}

async fn protection<K: Kind>(object: &K, ctx: &Context, shared: &Shared) -> Option<Option<bool>> {
    if object.connection().deletion_protection { Some(shared.policy.is_in_force(ctx).await) } else { None }
}

/// Writes the status; when that said something new, events tell of it.
async fn tell<K: Kind>(object: &K, ctx: &Context, report: Report) -> Result<()> {
    let Report { status, news } = report;
    if !apply::patch_status(ctx, object, object.connection_status(), &status).await? {
        return Ok(());
    }
    let regarding = object.object_ref(&());
    for event in news {
        ctx.events.publish(&regarding, event.kind, event.reason, "Inspect", &event.note).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_may_be_on_its_way_and_a_wrong_one_is_wrong() {
        let failure = |reason| Failure { may_pass: false, reason, message: String::new() };
        assert!(patient(failure(reason::SECRET_NOT_FOUND), Duration::ZERO).may_pass);
        assert!(!patient(failure(reason::SECRET_NOT_FOUND), PATIENCE).may_pass);
        assert!(!patient(failure(reason::SECRET_KEY_MISSING), Duration::ZERO).may_pass);
    }
}
