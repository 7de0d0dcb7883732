//! Takes the finalizer `sluice.dev/in-use` off what no Mirror uses any more: a Source or Target and the Secrets it names.
//!
//! A Mirror puts the finalizer on before it needs the way to its source, and exists until it has cleaned up; so what no Mirror
//! refers to is free. The object's own finalizer goes last: a release that was interrupted is begun again.

use super::Kind;
use crate::operator::apply::{self, Object};
use crate::operator::context::Context;
use crate::operator::error::Result;
use crate::resources::names::{IN_USE_FINALIZER, has_finalizer};
use crate::resources::{Connection, Mirror, Source, Target};
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt as _;
use kube::api::ListParams;
use kube::core::PartialObjectMeta;
use std::collections::BTreeSet;

/// Mirrors that are named in messages; one more is asked for, to know that there are more.
const NAMED: usize = 10;

/// Releases one object at a time: of two that share a Secret, the second must see that the first is free.
#[derive(Debug, Default)]
pub struct Releases {
    turn: tokio::sync::Mutex<()>,
}

/// Who uses an object.
#[derive(Debug, Default)]
pub struct Use {
    /// Names of Mirrors.
    pub users: Vec<String>,
    /// Secrets that carry the finalizer for it. Kept in its status: a Secret that the spec no longer names would otherwise be forgotten
    /// when the operator restarts at that moment, and its namespace could never be deleted.
    pub protected: BTreeSet<String>,
}

impl Releases {
    /// Mirrors that use `object`; when there are none, it and its Secrets are free.
    ///
    /// # Errors
    /// As the API server answers.
    pub async fn release_unless_used<K: Kind>(&self, ctx: &Context, object: &K) -> Result<Use> {
        if !has_finalizer(object.meta(), IN_USE_FINALIZER) {
            return Ok(Use::default());
        }
        let users = users(ctx, object).await?;
        let secrets: BTreeSet<_> = object.connection().secret_names().into_iter().map(str::to_owned).collect();
        let before = object.connection_status().map(|status| status.protected_secrets.iter().cloned().collect()).unwrap_or_default();
        if users.is_empty() {
            let _turn = self.turn.lock().await;
            self.release_secrets(ctx, object, &(&secrets | &before)).await?;
            apply::remove_finalizer(ctx, object, IN_USE_FINALIZER).await?;
            ctx.bindings.freed();
            return Ok(Use::default());
        }
        let replaced = &before - &secrets;
        if !replaced.is_empty() {
            let _turn = self.turn.lock().await;
            self.release_secrets(ctx, object, &replaced).await?;
        }
        Ok(Use { users, protected: if ctx.options.protect_secrets { secrets } else { BTreeSet::new() } })
    }

    /// Frees those of `secrets` that no other object in use names.
    async fn release_secrets<K: Kind>(&self, ctx: &Context, object: &K, secrets: &BTreeSet<String>) -> Result<()> {
        if !ctx.options.protect_secrets || secrets.is_empty() {
            return Ok(());
        }
        let namespace = object.namespace().unwrap_or_default();
        let own = object.meta().uid.as_deref();
        let mut needed = needed_secrets::<Source>(ctx, &namespace, own).await?;
        needed.append(&mut needed_secrets::<Target>(ctx, &namespace, own).await?);
        for name in secrets - &needed {
            if let Some(secret) = apply::get::<Secret>(ctx, &namespace, &name).await? {
                apply::remove_finalizer(ctx, &secret, IN_USE_FINALIZER).await?;
            }
        }
        Ok(())
    }
}

/// Names of the Mirrors that refer to `object`, live; of many, the first and a word.
async fn users<K: Kind>(ctx: &Context, object: &K) -> Result<Vec<String>> {
    let limit = u32::try_from(NAMED + 1).unwrap_or(u32::MAX);
    let selected = ListParams::default().fields(&format!("{}={}", K::REFERENCE, object.name_any())).limit(limit);
    let found = apply::list::<PartialObjectMeta<Mirror>>(ctx, &object.namespace().unwrap_or_default(), &selected).await?;
    let mut names: Vec<_> = found.iter().map(kube::ResourceExt::name_any).collect();
    names.sort();
    if names.len() > NAMED {
        names.truncate(NAMED);
        names.push("more".to_owned());
    }
    Ok(names)
}

/// Secrets that objects of kind `K` in use name, other than the object with the uid `own`.
async fn needed_secrets<K: Object + Connection>(ctx: &Context, namespace: &str, own: Option<&str>) -> Result<BTreeSet<String>> {
    let all = apply::list::<K>(ctx, namespace, &ListParams::default()).await?;
    let in_use = all.iter().filter(|other| other.meta().uid.as_deref() != own && has_finalizer(other.meta(), IN_USE_FINALIZER));
    Ok(in_use.flat_map(|other| other.connection().secret_names()).map(str::to_owned).collect())
}
