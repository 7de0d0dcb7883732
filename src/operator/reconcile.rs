//! The loop that every controller runs in: a span, a time limit, a net for panics, metrics, and the requeue of what failed.
//!
//! Invariant: whatever one object does to its reconcile, the others go on.

use super::backoff::spread;
use super::cache::Wake;
use super::context::Context;
use super::error::{ErrorClass, OperatorError, Result};
use super::shutdown::Shutdown;
use futures::{FutureExt as _, StreamExt as _};
use kube::runtime::controller::{self, Action, Controller};
use kube::runtime::reflector::{Lookup, Store};
use kube::{Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use std::convert::Infallible;
use std::fmt::Debug;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tracing::{Instrument as _, debug, error, info_span, warn};

/// Longest time of one pass.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Changes of one object within this time make one pass.
const DEBOUNCE: Duration = Duration::from_millis(50);

/// A controller of the objects in `store`, which looks at those that `wake` names.
pub fn controller<K>(store: Store<K>, wake: &Wake<K>) -> Controller<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    Controller::for_stream(futures::stream::pending(), store).reconcile_on(wake.objects())
}

/// Runs `controller` until `shutdown`, then lets running passes end. `reconcile` says when to look again; on an error the class does
/// (see [`super::backoff`]).
pub async fn run<K, F, Fut>(name: &'static str, controller: Controller<K>, ctx: Arc<Context>, shutdown: Shutdown, reconcile: F)
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    F: Fn(Arc<K>, Arc<Context>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Action>> + Send + 'static,
{
    let concurrency = ctx.options.concurrency;
    controller
        .with_config(controller::Config::default().concurrency(concurrency).debounce(DEBOUNCE))
        .graceful_shutdown_on(async move { shutdown.cancelled().await })
        .run(
            move |object, ctx| {
                let pass = reconcile(object.clone(), ctx.clone());
                instrumented(name, object, ctx, pass)
            },
            // `instrumented` never fails; errors have become requeues there.
            |_, never: &Infallible, _| match *never {},
            ctx,
        )
        .for_each(|result| {
            match result {
                Ok(_) => {}
                Err(controller::Error::ObjectNotFound(object)) => debug!(controller = name, %object, "gone"),
                Err(failure) => warn!(controller = name, error = super::error::chain(&failure), "the controller's queue"),
            }
            std::future::ready(())
        })
        .await;
}

/// One pass with everything around it. Never fails.
async fn instrumented<K, Fut>(
    controller: &'static str,
    object: Arc<K>,
    ctx: Arc<Context>,
    pass: Fut,
) -> std::result::Result<Action, Infallible>
where
    K: Resource<DynamicType = ()>,
    Fut: Future<Output = Result<Action>> + Send + 'static,
{
    let key = object.meta().uid.clone().unwrap_or_else(|| object.name_any());
    let span = info_span!("reconcile", controller, namespace = object.meta().namespace.as_deref(), name = object.name_any());
    async {
        let begin = Instant::now();
        ctx.metrics.reconcile_started(controller);
        let (outcome, result) = bounded(LIMIT, pass).await;
        let class = result.as_ref().map_or_else(|error| error.class.as_str(), |_| "");
        ctx.metrics.reconcile_ended(controller, outcome, class, begin.elapsed());
        let action = match result {
            Ok(action) => {
                ctx.backoff.succeeded(controller, &key);
                action
            }
            Err(error) => {
                let delay = ctx.backoff.failed(controller, &key, error.class);
                log(&error, delay);
                Action::requeue(delay)
            }
        };
        debug!(outcome, milliseconds = begin.elapsed().as_millis(), "done");
        Ok(action)
    }
    .instrument(span)
    .await
}

/// The result of a pass that neither panics nor takes longer than `limit`, with its name for metrics.
async fn bounded(limit: Duration, pass: impl Future<Output = Result<Action>>) -> (&'static str, Result<Action>) {
    match tokio::time::timeout(limit, AssertUnwindSafe(pass).catch_unwind()).await {
        Ok(Ok(Ok(action))) => ("success", Ok(action)),
        Ok(Ok(Err(error))) => ("failure", Err(error)),
        Ok(Err(panic)) => {
            let said = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
            (
                "panic",
                Err(OperatorError::new(
                    ErrorClass::Bug,
                    "InternalError",
                    format!("the reconcile panicked: {}", said.unwrap_or("no message")),
                )),
            )
        }
        Err(_) => ("timeout", Err(OperatorError::deadline("the reconcile"))),
    }
}

fn log(failure: &OperatorError, delay: Duration) {
    let seconds = delay.as_secs();
    if failure.class == ErrorClass::Bug {
        error!(reason = failure.reason, message = failure.message, class = failure.class.as_str(), retry_in_seconds = seconds, "failed");
    } else {
        warn!(reason = failure.reason, message = failure.message, class = failure.class.as_str(), retry_in_seconds = seconds, "failed");
    }
}

/// `duration` ± 20 %, so that objects which settled together do not come back together.
pub fn requeue(duration: Duration) -> Action {
    Action::requeue(spread(duration))
}

/// Keeps `sluice_operator_resources` up to date from the cache until `shutdown`; `ready` judges one object.
pub async fn count_resources<K>(ctx: Arc<Context>, store: Store<K>, kind: &'static str, ready: fn(&K) -> bool, shutdown: Shutdown)
where
    K: Lookup<DynamicType = ()> + Clone + 'static,
{
    let mut tick = tokio::time::interval(Duration::from_secs(15));
    while shutdown.run_until_cancelled(tick.tick()).await.is_some() {
        let all = store.state();
        let good = all.iter().filter(|object| ready(object)).count();
        ctx.metrics.set_resources(kind, good, all.len() - good);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_and_a_hang_become_errors() {
        tokio::time::pause();
        let (outcome, result) = bounded(LIMIT, async { panic!("of {}", "ours") }).await;
        let error = result.expect_err("a panic");
        assert_eq!((outcome, error.class), ("panic", ErrorClass::Bug));
        assert!(error.message.contains("of ours"), "{error}");
        let (outcome, result) = bounded(LIMIT, std::future::pending()).await;
        assert_eq!((outcome, result.expect_err("a hang").class), ("timeout", ErrorClass::Transient));
        assert_eq!(bounded(LIMIT, async { Ok(Action::await_change()) }).await.0, "success");
    }
}
