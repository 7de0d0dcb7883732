//! Waiting for something to be seen, at a short and steady pace.

use crate::worker::Worker;
use crate::{Error, Result};
use sluice::worker::contract::Status;
use std::time::{Duration, Instant};
use tokio_postgres::Client;

/// How often it is looked.
const LOOK: Duration = Duration::from_millis(5);
/// A run that takes longer has failed.
pub const LIMIT: u64 = 900;

/// Waits until `look` says yes; the moment at which it did.
pub async fn until(seconds: u64, what: &str, mut look: impl AsyncFnMut() -> Result<bool>) -> Result<Instant> {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    loop {
        let seen = look().await?;
        let now = Instant::now();
        if seen {
            return Ok(now);
        }
        if now > deadline {
            return Err(format!("after {seconds} s still not: {what}").into());
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Waits until the row of the table `mark` can be seen, that was written last.
pub async fn marker(target: &Client, id: i64) -> Result<Instant> {
    let look = target.prepare("SELECT EXISTS (SELECT FROM mark WHERE id = $1)").await?;
    until(LIMIT, "the last change is visible", async || Ok(target.query_one(&look, &[&id]).await?.get(0))).await
}

/// The same for a worker; ends with what it says when it has stopped for good.
pub async fn marker_by(worker: &Worker, target: &Client, id: i64) -> Result<Instant> {
    tokio::select! {
        seen = marker(target, id) => seen,
        failure = stopped(worker) => Err(failure),
    }
}

/// Waits until a worker stops for good, for a reason that does not pass by itself.
async fn stopped(worker: &Worker) -> Error {
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        if let Some(failure) = worker.status().await.and_then(|status| failure_of(&status, worker)) {
            return failure;
        }
    }
}

fn failure_of(status: &Status, worker: &Worker) -> Option<Error> {
    let failure = status.error.as_ref().filter(|failure| failure.class != "Retry")?;
    Some(format!("the worker has stopped: {}: {}\n{}", failure.reason, failure.message, worker.log()).into())
}

/// Waits until the first row of a table can be seen, and with it all others that one transaction has brought.
pub async fn first_row(target: &Client) -> Result<Instant> {
    let look = target.prepare("SELECT EXISTS (SELECT FROM data WHERE ctid = '(0,1)')").await?;
    until(LIMIT, "the rows are visible", async || Ok(target.query_one(&look, &[]).await?.get(0))).await
}

/// Waits for a status of a worker; ends with what it says when it has stopped for good.
pub async fn status(worker: &Worker, what: &str, check: impl Fn(&Status) -> bool) -> Result<Instant> {
    until(LIMIT, what, async || {
        let status = worker.status().await;
        if let Some(failure) = status.as_ref().and_then(|status| failure_of(status, worker)) {
            return Err(failure);
        }
        Ok(status.is_some_and(|status| check(&status)))
    })
    .await
}
