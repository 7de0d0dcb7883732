//! From the first second to the last: probes, client, kinds, keys, lease, controllers, drain.

use super::backoff::spread;
use super::cache::Caches;
use super::context::Context;
use super::databases::{Databases, Postgres};
use super::error::{OperatorError, chain};
use super::health::{self, Health};
use super::leader::{Candidate, Times};
use super::metrics::Metrics;
use super::options::Options;
use super::shutdown::{DRAIN, Shutdown};
use super::{binding, client, connection, mirror, permissions, poller, signing};
use kube::{Client, Config};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tracing::{error, info, warn};

/// Group and version of our kinds.
const GROUP_VERSION: &str = "sluice.dev/v1alpha1";
/// Our kinds' plurals.
const PLURALS: [&str; 3] = ["sources", "targets", "mirrors"];
/// Pace of what is tried again at start.
const RETRY: Duration = Duration::from_secs(3);
/// Pace of the heartbeat.
const BEAT: Duration = Duration::from_secs(5);

/// Why the operator ends with an error.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The port of probes and metrics cannot be opened.
    #[error("cannot listen on {0}: {1}")]
    Listen(std::net::SocketAddr, std::io::Error),
    /// Neither a cluster around it nor a kubeconfig.
    #[error("no way to a cluster: {0}")]
    Config(#[from] kube::config::InferConfigError),
    /// The way to the cluster cannot be used.
    #[error("no client for the cluster: {0}")]
    Client(#[from] kube::Error),
    /// Something of our own could not be made.
    #[error(transparent)]
    Operator(#[from] OperatorError),
    /// Another replica may lead; this one must not go on.
    #[error("lost the leadership: {0}")]
    LostLeadership(String),
    /// A controller, or the poller, ended by itself.
    #[error("a task of the operator ended: {0}")]
    TaskEnded(String),
}

/// The tasks of the controllers; each ends when the token is cancelled, after its running passes.
pub type Controllers = fn(&Arc<Context>, &Shutdown) -> JoinSet<()>;

/// Runs the operator until `shutdown`.
///
/// # Errors
/// [`RunError`]; the process is to end with a code other than 0 then.
pub async fn run(options: Options, shutdown: Shutdown) -> Result<(), RunError> {
    let listener = TcpListener::bind(options.listen).await.map_err(|error| RunError::Listen(options.listen, error))?;
    let runtime = Runtime { options, times: Times::default(), listener, shutdown, controllers };
    runtime.run(Config::infer).await
}

/// Starts the controllers of the product and the caches that they share.
pub fn spawn_controllers(tasks: &mut JoinSet<()>, ctx: &Arc<Context>, shutdown: &Shutdown, databases: Arc<dyn Databases>) {
    let mut caches = Caches::new(ctx);
    connection::spawn(tasks, ctx, shutdown, &mut caches, databases.clone());
    mirror::spawn(tasks, ctx, shutdown, &mut caches, databases);
    binding::spawn(tasks, ctx, shutdown);
    caches.spawn(tasks, shutdown);
}

fn controllers(ctx: &Arc<Context>, shutdown: &Shutdown) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    spawn_controllers(&mut tasks, ctx, shutdown, Arc::new(Postgres));
    tasks
}

/// One run of the operator, with what differs between a process and a test.
pub struct Runtime {
    /// Settings.
    pub options: Options,
    /// Times of the leader election.
    pub times: Times,
    /// Where probes and metrics are served.
    pub listener: TcpListener,
    /// Ends the run.
    pub shutdown: Shutdown,
    /// Starts the controllers.
    pub controllers: Controllers,
}

impl Runtime {
    /// Serves probes, waits for what is needed, leads, works, and hands over.
    ///
    /// # Errors
    /// [`RunError`].
    pub async fn run<F, Fut>(self, config: F) -> Result<(), RunError>
    where
        F: FnOnce() -> Fut,
        Fut: Future<Output = Result<Config, kube::config::InferConfigError>>,
    {
        let (health, metrics) = (Health::default(), Metrics::new(&self.options.release));
        info!(release = self.options.release, listen = %self.options.listen, "starting");
        // Dropped, and thereby ended, with this function.
        let mut background = JoinSet::new();
        background.spawn(beat(health.clone()));
        let starting = health.wait_for("the start");
        let served = health::serve(self.listener, health.clone(), metrics.clone());
        background.spawn(async move {
            if let Err(failure) = served.await {
                error!(error = %failure, "probes and metrics are no longer served");
            }
        });

        let client = client::client(config().await?, &metrics)?;
        let (options, shutdown) = (self.options, self.shutdown);
        let Some(keys) = shutdown.run_until_cancelled(prepare(&client, &options, &health)).await else {
            return Ok(());
        };
        let ctx = Context::new(client, options, metrics, health, keys)?;
        drop(starting);
        background.spawn(tell_missing_permissions(ctx.clone()));
        let (namespace, secret) = (ctx.options.namespace.clone(), ctx.options.signing_key_secret.clone());
        background.spawn(signing::follow(ctx.client.clone(), namespace, secret, ctx.signing_keys.clone(), signing::PACE));

        if !ctx.options.leader_election {
            ctx.metrics.set_leader(true);
            return work(&ctx, &shutdown, self.controllers, std::future::pending()).await;
        }
        let mut candidate = Candidate::new(ctx.client.clone(), &ctx.options, ctx.metrics.clone(), self.times);
        if shutdown.run_until_cancelled(candidate.acquire()).await.is_none() {
            candidate.release().await;
            return Ok(());
        }
        work(&ctx, &shutdown, self.controllers, candidate.keep()).await?;
        candidate.release().await;
        Ok(())
    }
}

/// Runs the controllers until `shutdown`, then waits for their running passes; gives up at once when `lost` says why.
async fn work(
    ctx: &Arc<Context>,
    shutdown: &Shutdown,
    controllers: Controllers,
    lost: impl Future<Output = String>,
) -> Result<(), RunError> {
    let mut tasks = controllers(ctx, shutdown);
    let poller = poller::run(ctx.poller.clone(), ctx.workers.clone(), ctx.metrics.clone(), shutdown.clone());
    tasks.spawn(poller);
    let drained = async {
        while let Some(ended) = tasks.join_next().await {
            if !shutdown.is_cancelled() {
                return Err(RunError::TaskEnded(ended.err().map_or_else(|| "without an error".to_owned(), |error| error.to_string())));
            }
        }
        Ok(())
    };
    let too_late = async {
        shutdown.cancelled().await;
        tokio::time::sleep(DRAIN).await;
    };
    tokio::select! {
        reason = lost => {
            error!(reason, "lost the leadership");
            Err(RunError::LostLeadership(reason))
        }
        result = drained => result,
        () = too_late => {
            warn!(seconds = DRAIN.as_secs(), "reconciles that run for too long are given up");
            Ok(())
        }
    }
}

/// Waits for the kinds and reads the keys, as often as it takes: a start before the chart is complete is no crash.
async fn prepare(client: &Client, options: &Options, health: &Health) -> signing::SigningKeys {
    {
        let _waiting = health.wait_for(format!("the CustomResourceDefinitions of {GROUP_VERSION}"));
        until_ok("looking for our kinds", || established(client)).await;
    }
    let _waiting = health.wait_for("the key that signs calls to workers");
    until_ok("reading the signing key", || signing::load_or_create(client, &options.namespace, &options.signing_key_secret)).await
}

async fn until_ok<T, Fut: Future<Output = super::Result<T>>>(what: &str, mut attempt: impl FnMut() -> Fut) -> T {
    loop {
        match attempt().await {
            Ok(value) => return value,
            Err(failure) => warn!(reason = failure.reason, message = failure.message, "{what}; trying again"),
        }
        tokio::time::sleep(spread(RETRY)).await;
    }
}

/// Whether the API server serves all our kinds with their status. Discovery needs no permission of its own.
async fn established(client: &Client) -> super::Result<()> {
    let served = client.list_api_group_resources(GROUP_VERSION).await?.resources;
    let absent = |name: &str| !served.iter().any(|resource| resource.name == name);
    let missing: Vec<_> =
        PLURALS.iter().flat_map(|plural| [(*plural).to_owned(), format!("{plural}/status")]).filter(|name| absent(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let message = format!("not served by the API server: {}; install the CRDs (chart value crds.enabled)", missing.join(", "));
    Err(OperatorError::new(super::ErrorClass::Missing, "DefinitionsMissing", message))
}

async fn tell_missing_permissions(ctx: Arc<Context>) {
    match permissions::missing(&ctx.client, &ctx.options).await {
        Ok(missing) => {
            ctx.metrics.set_missing_permissions(missing.len());
            for rule in missing {
                error!(rule, "a permission is missing: add this rule to the operator's role");
            }
        }
        Err(failure) => warn!(error = chain(&failure), "the operator's own permissions could not be checked"),
    }
}

async fn beat(health: Health) {
    let mut tick = tokio::time::interval(BEAT);
    loop {
        tick.tick().await;
        health.beat();
    }
}
