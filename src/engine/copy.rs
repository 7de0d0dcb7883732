//! The copy of tables under one snapshot: tables in parallel, ranges of a table in parallel.
//!
//! Invariant: a range's done-row is written in the transaction that carries the range; a table's state changes only when
//! all of its ranges are done, and with it goes the position that the copy is tied to. So a failure costs a range while
//! the snapshot lives, the unfinished tables when it is lost, and nothing of a table whose rows are all there.

use super::error::{Class, Error, Result, reason};
use super::flow::{SnapshotConfig, lost_task};
use super::progress::{Phase, Progress};
use super::register::Register;
use super::retry::Backoff;
use super::roles::{Builders, BulkFormat, Claim, Range, Snapshot, Source, Target};
use super::table::{MappedTable, TableState};
use futures::{TryStreamExt as _, stream};
use std::sync::Arc;
use tokio::sync::Mutex;
use tokio_util::task::AbortOnDropHandle;

/// How often a range is tried again under the same snapshot before the copy is given up.
const RANGE_RETRIES: u32 = 5;

/// What a copy needs besides the tables.
pub(super) struct CopyJob<'a, S, T> {
    pub source: &'a Arc<S>,
    pub target: &'a Arc<T>,
    pub claim: &'a Claim,
    pub config: &'a SnapshotConfig,
    pub progress: &'a Progress,
}

/// Copies tables under a snapshot, which ends with it. Each is `CatchingUp` from the snapshot's position afterwards.
pub(super) async fn copy_tables<S, T, R>(
    job: &CopyJob<'_, S, T>,
    register: &mut R,
    snapshot: S::Snapshot,
    tables: &[&MappedTable],
    copied_before: u64,
) -> Result<()>
where
    S: Source,
    T: Target<Position = S::Position>,
    R: Register<Position = S::Position>,
{
    job.progress.set_phase(Phase::Copying);
    job.progress.begin_copy(copied_before, copied_before + tables.iter().map(|table| table.estimated_rows).sum::<u64>());
    let snapshot = Arc::new(snapshot);
    let register = Mutex::new(register);
    let waiting = Mutex::new(tables.to_vec());
    let result = stream::iter(tables.iter().map(Ok))
        .try_for_each_concurrent(job.config.tables_in_parallel.max(1), |table| copy_table(job, &register, &snapshot, &waiting, table))
        .await;
    if let Some(snapshot) = Arc::into_inner(snapshot) {
        snapshot.close().await;
    }
    result
}

async fn copy_table<'b, S, T, R>(
    job: &CopyJob<'b, S, T>,
    register: &Mutex<&'b mut R>,
    snapshot: &Arc<S::Snapshot>,
    waiting: &Mutex<Vec<&MappedTable>>,
    table: &MappedTable,
) -> Result<()>
where
    S: Source,
    T: Target<Position = S::Position>,
    R: Register<Position = S::Position>,
{
    let name = table.source();
    let generation = {
        let mut waiting = waiting.lock().await;
        waiting.retain(|other| other.source() != name);
        register.lock().await.begin_copy(table, &waiting, job.config.truncate).await.map_err(|error| error.context(name))?
    };
    job.progress.set_table(name, TableState::Copying);
    let format = job.target.bulk_format(table).await.map_err(|error| error.context(name))?;
    let copy = RangeCopy { job, register, snapshot, table, generation, format };
    stream::iter(snapshot.ranges(table, job.config.rows_per_range).into_iter().map(Ok))
        .try_for_each_concurrent(job.config.workers_per_table.max(1), |range| copy.run(range))
        .await
        .map_err(|error| error.context(name))?;
    register.lock().await.set_state(table, TableState::Copied, Some(snapshot.position())).await?;
    finish_table(job, register, table, snapshot.position()).await
}

/// Finishes tables whose rows are all there; each is `CatchingUp` from its position afterwards.
pub(super) async fn finish_tables<S, T, R>(job: &CopyJob<'_, S, T>, register: &mut R, tables: &[(MappedTable, S::Position)]) -> Result<()>
where
    S: Source,
    T: Target<Position = S::Position>,
    R: Register<Position = S::Position>,
{
    job.progress.set_phase(Phase::Copying);
    let register = Mutex::new(register);
    stream::iter(tables.iter().map(Ok))
        .try_for_each_concurrent(job.config.tables_in_parallel.max(1), |(table, position)| finish_table(job, &register, table, position))
        .await
}

async fn finish_table<S, T, R>(job: &CopyJob<'_, S, T>, register: &Mutex<&mut R>, table: &MappedTable, position: &S::Position) -> Result<()>
where
    S: Source,
    T: Target<Position = S::Position>,
    R: Register<Position = S::Position>,
{
    let name = table.source();
    job.progress.set_table(name, TableState::Copied);
    let builders = Builders { per_table: job.config.workers_per_table.max(1), tables: job.config.tables_in_parallel.max(1) };
    let finish = async {
        let values = if table.structure.sequences.is_empty() { Vec::new() } else { job.source.sequence_values(table).await? };
        let tell = |step| job.progress.set_step(name, Some(step));
        job.target.finish(job.claim, table, &values, builders, &tell).await
    };
    let finished = finish.await.map_err(|error| error.context(name));
    job.progress.set_step(name, None);
    finished?;
    register.lock().await.set_state(table, TableState::CatchingUp, Some(position)).await?;
    job.progress.set_table(name, TableState::CatchingUp);
    Ok(())
}

/// The copy of one table's ranges.
struct RangeCopy<'a, 'b, S: Source, T: Target, R> {
    job: &'a CopyJob<'b, S, T>,
    register: &'a Mutex<&'b mut R>,
    snapshot: &'a Arc<S::Snapshot>,
    table: &'a MappedTable,
    generation: i64,
    format: BulkFormat,
}

impl<S, T, R> RangeCopy<'_, '_, S, T, R>
where
    S: Source,
    T: Target<Position = S::Position>,
    R: Register<Position = S::Position>,
{
    /// Copies a range, again when a connection was lost on the way: the snapshot is still there.
    async fn run(&self, range: Range) -> Result<()> {
        let mut backoff = Backoff::new(self.job.claim.epoch.unsigned_abs() << 32 | u64::from(range.number.unsigned_abs()));
        loop {
            let error = match self.attempt(&range).await {
                Ok(rows) => {
                    self.job.progress.add_copied(rows);
                    return Ok(());
                }
                Err(error) => error,
            };
            if !passes(&error) || backoff.failures() == RANGE_RETRIES {
                return Err(error);
            }
            tracing::warn!(table = %self.table.source(), range = range.number, %error, "a range is copied again");
            tokio::time::sleep(backoff.next(error.class)).await;
            // Its commit may have come through, and only the answer not.
            if self.register.lock().await.done_ranges(self.table, self.generation).await?.contains(&range.number) {
                return Ok(());
            }
        }
    }

    /// In a task of its own, so that ranges use all cores.
    async fn attempt(&self, range: &Range) -> Result<u64> {
        let (snapshot, target, claim) = (Arc::clone(self.snapshot), Arc::clone(self.job.target), self.job.claim.clone());
        let (table, range, generation, format) = (self.table.clone(), range.clone(), self.generation, self.format);
        let task = tokio::spawn(async move {
            let (wanted, part) = (table.clone(), range.clone());
            // Begins when the target asks for rows, so that both ends get ready at the same time.
            let rows = stream::once(async move { snapshot.read(&wanted, &part, format).await }).try_flatten();
            target.load(&claim, &table, generation, &range, format, Box::pin(rows)).await
        });
        AbortOnDropHandle::new(task).await.map_err(|error| lost_task(&error))?
    }
}

/// Whether a range may succeed under the same snapshot.
fn passes(error: &Error) -> bool {
    error.class == Class::Retry && error.reason != reason::SNAPSHOT_LOST
}
