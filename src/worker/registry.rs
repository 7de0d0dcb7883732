//! From the engines' names in the desired document to connectors, and from there to a session.

use super::contract::Desired;
use super::credentials::Credentials;
use super::plan::{budget, postgres_endpoint, stream_config};
use crate::connectors::postgres::log::StreamingPause;
use crate::connectors::postgres::source::PostgresSource;
use crate::connectors::postgres::target::PostgresTarget;
use crate::engine::error::{Error, Result, reason};
use crate::engine::flow::{self, Stop, StreamConfig};
use crate::engine::progress::Progress;
use crate::engine::retention::{self, Retention};
use crate::engine::roles::{Source, Target};
use crate::engine::spill::Room;
use futures::future::BoxFuture;
use std::sync::Arc;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

/// Everything that one session needs.
#[derive(Debug)]
pub struct Job {
    /// What it shall do.
    pub desired: Arc<Desired>,
    /// How it logs in.
    pub credentials: Credentials,
    /// What it reports to.
    pub progress: Arc<Progress>,
    /// How it is told to end.
    pub stop: Stop,
    /// Epoch of this process's last claim. It outlives a session, however that ends.
    pub held: Arc<Mutex<Option<i64>>>,
}

/// Begins sessions; replaced in tests.
pub trait Sessions: Send + 'static {
    /// Begins one. The task ends when the session does.
    fn start(&self, job: Job) -> JoinHandle<Result<()>>;

    /// One look at what the source keeps for the stream, while no session runs, and what the budget says to it; `None` when it can't tell.
    fn look(&self, _desired: Arc<Desired>, _credentials: Credentials) -> BoxFuture<'static, Result<Option<Retention>>> {
        Box::pin(async { Ok(None) })
    }
}

/// Sessions of the connectors in this program, and what outlives each of them.
#[derive(Clone, Debug)]
pub struct Connectors {
    /// What the log of a session may take of the machine.
    room: Room,
    /// PostgreSQL: that it can't stream is found out once.
    pause: StreamingPause,
}

impl Connectors {
    /// With this room for the log of a session.
    #[must_use]
    pub fn new(room: Room) -> Self {
        Self { room, pause: StreamingPause::default() }
    }
}

impl Sessions for Connectors {
    fn start(&self, job: Job) -> JoinHandle<Result<()>> {
        tokio::spawn(session(job, self.clone()))
    }

    fn look(&self, desired: Arc<Desired>, credentials: Credentials) -> BoxFuture<'static, Result<Option<Retention>>> {
        Box::pin(async move {
            match desired.source.engine.as_str() {
                "PostgreSQL" => {
                    let budget = budget(desired.wal_budget.as_ref())?;
                    retention::look(&postgres_source(&desired, &credentials)?, &desired.slot, &budget).await
                }
                _ => Ok(None),
            }
        })
    }
}

fn postgres_source(desired: &Desired, credentials: &Credentials) -> Result<PostgresSource> {
    let endpoint = postgres_endpoint(&desired.source, &credentials.source)?;
    Ok(PostgresSource::new(endpoint, desired.slot.clone(), desired.publication.clone()))
}

async fn session(job: Job, connectors: Connectors) -> Result<()> {
    let config = stream_config(&job.desired)?;
    match (job.desired.source.engine.as_str(), job.desired.target.engine.as_str()) {
        ("PostgreSQL", "PostgreSQL") => postgres_to_postgres(job, &config, connectors).await,
        (source, target) => Err(Error::stop(reason::INVALID_SPEC, format!("this worker knows no mirror from {source} to {target}"))),
    }
}

async fn postgres_to_postgres(job: Job, config: &StreamConfig, Connectors { room, pause }: Connectors) -> Result<()> {
    let source = postgres_source(&job.desired, &job.credentials)?.with_room(room).with_streaming_pause(pause);
    let target = postgres_endpoint(&job.desired.target, &job.credentials.target)?;
    let stream = &job.desired.stream;
    let target = PostgresTarget::new(target, config.owner.clone())
        .with_apply_connections(stream.apply_connections)
        .with_triggers_accepted(stream.accept_target_triggers);
    mirror(source, target, config, job).await
}

/// Runs a session between two connectors.
///
/// # Errors
/// See [`flow::run`].
pub async fn mirror<S, T>(source: S, target: T, config: &StreamConfig, job: Job) -> Result<()>
where
    S: Source,
    T: Target<Position = S::Position>,
{
    // Free since the session before has ended; a session that is dropped leaves what it claimed last.
    let mut held = job.held.lock().await;
    flow::run(Arc::new(source), Arc::new(target), config, &job.progress, &job.stop, &mut held).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::contract::tests::desired;
    use crate::worker::credentials::tests::credentials;

    #[tokio::test]
    async fn an_unknown_engine_is_told() {
        let mut desired = desired(1);
        desired.target.engine = "Oracle".to_owned();
        let job = Job {
            desired: Arc::new(desired),
            credentials: credentials("a", "b"),
            progress: Progress::new(),
            stop: Stop::default(),
            held: Arc::default(),
        };
        let error = Connectors::new(Room::in_memory(0)).start(job).await.unwrap().unwrap_err();
        assert_eq!(error.reason, reason::INVALID_SPEC);
        assert!(error.message.contains("PostgreSQL to Oracle"), "{error}");
    }
}
