//! The copy of tables under one snapshot: tables in parallel, ranges of a table in parallel.
//!
//! Invariant: a range's done-row is written in the transaction that carries the range; a table's state changes only when
//! all of its ranges are done.

use super::error::Result;
use super::flow::{SnapshotConfig, lost_task};
use super::progress::{Phase, Progress};
use super::roles::{Apply, BulkFormat, Claim, Range, Snapshot, Source, Target};
use super::table::{MappedTable, TableState};
use futures::{TryStreamExt as _, stream};
use std::sync::Arc;
use tokio::sync::Mutex;
use tokio_util::task::AbortOnDropHandle;

/// What a copy needs besides the tables.
pub(super) struct CopyJob<'a, S, T> {
    pub source: &'a Arc<S>,
    pub target: &'a Arc<T>,
    pub claim: &'a Claim,
    pub config: &'a SnapshotConfig,
    pub progress: &'a Progress,
}

/// Copies tables under a snapshot, which ends with it. Each is `CatchingUp` from the snapshot's position afterwards.
pub(super) async fn copy_tables<S, T>(
    job: &CopyJob<'_, S, T>,
    applier: &mut T::Applier,
    snapshot: S::Snapshot,
    tables: &[&MappedTable],
    copied_before: u64,
) -> Result<()>
where
    S: Source,
    T: Target<Position = S::Position>,
{
    job.progress.set_phase(Phase::Copying);
    job.progress.begin_copy(copied_before, copied_before + tables.iter().map(|table| table.estimated_rows).sum::<u64>());
    let snapshot = Arc::new(snapshot);
    let applier = Mutex::new(applier);
    let result = stream::iter(tables.iter().map(Ok))
        .try_for_each_concurrent(job.config.tables_in_parallel.max(1), |table| copy_table(job, &applier, &snapshot, table))
        .await;
    if let Some(snapshot) = Arc::into_inner(snapshot) {
        snapshot.close().await;
    }
    result
}

async fn copy_table<S, T>(
    job: &CopyJob<'_, S, T>,
    applier: &Mutex<&mut T::Applier>,
    snapshot: &Arc<S::Snapshot>,
    table: &MappedTable,
) -> Result<()>
where
    S: Source,
    T: Target<Position = S::Position>,
{
    let name = table.source();
    let generation = applier.lock().await.begin_copy(table, job.config.truncate).await.map_err(|error| error.context(name))?;
    job.progress.set_table(name, TableState::Copying);
    let format = job.target.bulk_format(table).await.map_err(|error| error.context(name))?;
    stream::iter(snapshot.ranges(table, job.config.rows_per_range).into_iter().map(Ok))
        .try_for_each_concurrent(job.config.workers_per_table.max(1), |range| copy_range(job, snapshot, table, generation, range, format))
        .await
        .map_err(|error| error.context(name))?;
    applier.lock().await.set_state(table, TableState::Copied, None).await?;
    job.progress.set_table(name, TableState::Copied);
    job.target.finish(job.claim, table).await.map_err(|error| error.context(name))?;
    applier.lock().await.set_state(table, TableState::CatchingUp, Some(snapshot.position())).await?;
    job.progress.set_table(name, TableState::CatchingUp);
    Ok(())
}

/// One range, in a task of its own so that ranges use all cores.
async fn copy_range<S, T>(
    job: &CopyJob<'_, S, T>,
    snapshot: &Arc<S::Snapshot>,
    table: &MappedTable,
    generation: i64,
    range: Range,
    format: BulkFormat,
) -> Result<()>
where
    S: Source,
    T: Target<Position = S::Position>,
{
    let (snapshot, target, claim, table) = (Arc::clone(snapshot), Arc::clone(job.target), job.claim.clone(), table.clone());
    let task = tokio::spawn(async move {
        let rows = snapshot.read(&table, &range, format).await?;
        target.load(&claim, &table, generation, &range, format, rows).await
    });
    let rows = AbortOnDropHandle::new(task).await.map_err(|error| lost_task(&error))??;
    job.progress.add_copied(rows);
    Ok(())
}
