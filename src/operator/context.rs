//! What all controllers share.

use super::backoff::Backoff;
use super::binding::Bindings;
use super::cache::Watched;
use super::error::{ErrorClass, OperatorError, Result};
use super::events::Events;
use super::health::Health;
use super::metrics::Metrics;
use super::options::Options;
use super::poller::PollerHandle;
use super::signing::SigningKeys;
use super::watch::{Watchable, Watches};
use super::worker_client::WorkerClient;
use kube::Client;
use kube::runtime::watcher;
use std::sync::Arc;

/// What all controllers share; handed round as `Arc<Context>`.
pub struct Context {
    /// The API server; every request has a deadline, see [`super::client`].
    pub client: Client,
    /// Settings.
    pub options: Options,
    /// Metrics.
    pub metrics: Metrics,
    /// Events.
    pub events: Events,
    /// Keys that sign calls to workers; their public halves go into the desired document.
    pub signing_keys: SigningKeys,
    /// What workers say.
    pub poller: PollerHandle,
    /// Calls to workers.
    pub workers: WorkerClient,
    /// Makes watches.
    pub watches: Watches,
    /// Failures in a row, per object.
    pub backoff: Backoff,
    /// What gives the operator its rights in the served namespaces.
    pub bindings: Bindings,
}

impl Context {
    /// Puts it together. `client` comes from [`super::client::client`].
    ///
    /// # Errors
    /// When the HTTP client for workers cannot be made.
    pub fn new(client: Client, options: Options, metrics: Metrics, health: Health, signing_keys: SigningKeys) -> Result<Arc<Self>> {
        let workers = WorkerClient::new(signing_keys.clone())
            .map_err(|error| OperatorError::new(ErrorClass::Bug, "InternalError", error.to_string()).with_source(error))?;
        Ok(Arc::new(Self {
            events: Events::new(client.clone(), metrics.clone(), &options),
            watches: Watches::new(client.clone(), metrics.clone(), health, options.scopes()),
            poller: PollerHandle::default(),
            backoff: Backoff::default(),
            bindings: Bindings::default(),
            client,
            options,
            metrics,
            signing_keys,
            workers,
        }))
    }

    /// Watches `K` in the served namespaces, see [`Watches::watch`].
    pub fn watch<K: Watchable>(&self, config: &watcher::Config) -> Watched<K> {
        self.watches.watch(config)
    }
}
