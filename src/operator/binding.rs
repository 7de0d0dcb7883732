//! Keeps the operator's rights in a namespace for as long as it needs them there.
//!
//! With `--watch-namespaces` they come from one RoleBinding per namespace, and who deletes a namespace deletes that too, before or after
//! the Mirrors. So it carries the finalizer `sluice.dev/in-use` while something there waits for the operator: what is being deleted still
//! grants. It is the last to be let go, since nothing can be done in the namespace after it.
//!
//! Level-based: one task compares what is held with the finalizer, at start, when something was let go, and now and then. So neither a
//! crash in between nor a finalizer that somebody took off stays.

use super::apply;
use super::backoff::spread;
use super::context::Context;
use super::error::{ErrorClass, Result};
use super::shutdown::Shutdown;
use crate::resources::names::{IN_USE_FINALIZER, MIRROR_FINALIZER, has_finalizer};
use crate::resources::{Mirror, Source, Target};
use k8s_openapi::api::rbac::v1::RoleBinding;
use kube::ResourceExt as _;
use kube::api::ListParams;
use kube::core::PartialObjectMeta;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, MutexGuard, Notify};
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

/// Pace of the comparison when nothing happens.
const STEADY: Duration = Duration::from_secs(600);
/// Pace while a namespace can't be looked at; when it is gone, that is one small request each time.
const RETRY: Duration = Duration::from_secs(30);
/// What is let go within this time makes one comparison.
const DEBOUNCE: Duration = Duration::from_millis(200);
/// Objects that are looked at with one request.
const PAGE: u32 = 100;

/// Who may change the finalizer now, and whether there may be something to let go. Shared by all controllers.
#[derive(Debug, Default)]
pub struct Bindings {
    turn: Mutex<()>,
    freed: Notify,
}

impl Bindings {
    /// Holds the RoleBinding of `namespace`. It is not let go before the guard is dropped: until then, put the finalizer that needs it
    /// on the Mirror. `None`: rights do not come from RoleBindings.
    ///
    /// # Errors
    /// As the API server answers; `BeingDeleted` when the rights are about to go.
    pub async fn hold(&self, ctx: &Context, namespace: &str) -> Result<Option<MutexGuard<'_, ()>>> {
        if !is_used(ctx) {
            return Ok(None);
        }
        let turn = self.turn.lock().await;
        if let Some(binding) = find(ctx, namespace).await? {
            apply::ensure_finalizer(ctx, &binding, IN_USE_FINALIZER).await?;
        } else {
            warn!(namespace, name = ctx.options.role_binding, "no such RoleBinding: deleting the namespace may leave a slot");
        }
        Ok(Some(turn))
    }

    /// A Mirror, Source or Target was let go.
    pub fn freed(&self) {
        self.freed.notify_one();
    }
}

/// Starts the comparison, where rights come from RoleBindings; it ends when `shutdown` is cancelled.
pub fn spawn(tasks: &mut JoinSet<()>, ctx: &Arc<Context>, shutdown: &Shutdown) {
    if is_used(ctx) {
        let (ctx, shutdown) = (Arc::clone(ctx), shutdown.clone());
        tasks.spawn(async move {
            shutdown.run_until_cancelled(run(&ctx)).await;
        });
    }
}

fn is_used(ctx: &Context) -> bool {
    !ctx.options.role_binding.is_empty() && !ctx.options.watch_namespaces.is_empty()
}

async fn run(ctx: &Context) {
    loop {
        let mut pause = STEADY;
        for namespace in ctx.options.scopes().into_iter().flatten() {
            if let Err(error) = settle(ctx, &namespace).await {
                pause = RETRY;
                match error.class {
                    // It is gone, and with it the rights; the watches say so loudly enough.
                    ErrorClass::Bug | ErrorClass::Missing => debug!(namespace, %error, "the RoleBinding can't be looked at"),
                    _ => warn!(namespace, %error, "the RoleBinding can't be held or let go; trying again"),
                }
            }
        }
        tokio::select! {
            () = ctx.bindings.freed.notified() => tokio::time::sleep(DEBOUNCE).await,
            () = tokio::time::sleep(spread(pause)) => {}
        }
    }
}

/// Makes the finalizer as it should be in one namespace.
async fn settle(ctx: &Context, namespace: &str) -> Result<()> {
    let _turn = ctx.bindings.turn.lock().await;
    let Some(binding) = find(ctx, namespace).await? else { return Ok(()) };
    if !is_needed(ctx, namespace).await? {
        apply::remove_finalizer(ctx, &binding, IN_USE_FINALIZER).await?;
        return Ok(());
    }
    apply::ensure_finalizer(ctx, &binding, IN_USE_FINALIZER).await?;
    if binding.metadata.deletion_timestamp.is_some() {
        info!(
            namespace,
            name = binding.name_any(),
            "the RoleBinding is being deleted; it stays until the namespace's Mirrors are cleaned up"
        );
    }
    Ok(())
}

async fn find(ctx: &Context, namespace: &str) -> Result<Option<PartialObjectMeta<RoleBinding>>> {
    apply::get(ctx, namespace, &ctx.options.role_binding).await
}

/// Whether something in `namespace` waits for the operator. Secrets need no look: they are let go before their Source or Target.
async fn is_needed(ctx: &Context, namespace: &str) -> Result<bool> {
    Ok(any_has::<Mirror>(ctx, namespace, MIRROR_FINALIZER).await?
        || any_has::<Source>(ctx, namespace, IN_USE_FINALIZER).await?
        || any_has::<Target>(ctx, namespace, IN_USE_FINALIZER).await?)
}

/// Live, since what is overlooked here could never be let go.
async fn any_has<K: apply::Object>(ctx: &Context, namespace: &str, finalizer: &str) -> Result<bool> {
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let found = apply::list::<PartialObjectMeta<K>>(ctx, namespace, &page).await?;
        if found.items.iter().any(|object| has_finalizer(&object.metadata, finalizer)) {
            return Ok(true);
        }
        match found.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => return Ok(false),
        }
    }
}
