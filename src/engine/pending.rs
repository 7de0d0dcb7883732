//! Tables that are copied while the stream goes on with the others.
//!
//! Meanwhile nothing of them is due, and nothing is confirmed to the source that they will need. When all of them are copied the
//! session ends, and the next one reads the log from where the copies stand.

use super::copy::{CopyJob, copy_tables, finish_tables};
use super::error::{Class, Error, Result};
use super::flow::watched;
use super::position::Position;
use super::register::Register;
use super::retry::Backoff;
use super::roles::{Snapshot as _, Source, Target};
use super::table::MappedTable;
use tokio_util::sync::CancellationToken;

/// Tables that do not follow the stream yet.
#[derive(Debug)]
pub(super) struct Pending<P> {
    /// Have all rows as of a position; what comes after the rows was interrupted.
    pub to_finish: Vec<(MappedTable, P)>,
    /// Need a copy.
    pub to_copy: Vec<MappedTable>,
    /// Rows that earlier copies have brought.
    pub rows_copied: u64,
}

impl<P> Default for Pending<P> {
    fn default() -> Self {
        Self { to_finish: Vec::new(), to_copy: Vec::new(), rows_copied: 0 }
    }
}

impl<P: Position> Pending<P> {
    pub fn is_empty(&self) -> bool {
        self.to_finish.is_empty() && self.to_copy.is_empty()
    }

    pub fn holds(&self, table: &MappedTable) -> bool {
        let finishing = self.to_finish.iter().map(|(table, _)| table);
        finishing.chain(&self.to_copy).any(|pending| pending.version.id == table.version.id)
    }

    /// From where on they will need the log. A copy that begins later than `checkpoint` was read is right up to a later position.
    pub fn hold(&self, checkpoint: P) -> P {
        self.to_finish.iter().fold(checkpoint, |hold, (_, own)| if *own < hold { own.clone() } else { hold })
    }
}

/// Copies the tables; each is `CatchingUp` afterwards, from the position that is returned with it.
pub(super) async fn copy_pending<S, T, R>(
    job: &CopyJob<'_, S, T>,
    register: &mut R,
    pending: &Pending<S::Position>,
) -> Result<Vec<(MappedTable, S::Position)>>
where
    S: Source,
    T: Target<Position = S::Position>,
    R: Register<Position = S::Position>,
{
    let Pending { to_finish, to_copy, rows_copied } = pending;
    let mut copied = to_finish.clone();
    if !to_finish.is_empty() {
        finish_tables(job, register, to_finish).await?;
    }
    if !to_copy.is_empty() {
        let snapshot = watched(job, job.source.snapshot()).await?;
        let right_up_to = snapshot.position().clone();
        copy_tables(job, register, snapshot, &to_copy.iter().collect::<Vec<_>>(), *rows_copied).await?;
        copied.extend(to_copy.iter().map(|table| (table.clone(), right_up_to.clone())));
    }
    // An idle source would never move past the new tables' positions by itself.
    job.source.mark().await?;
    Ok(copied)
}

/// Copies the tables beside the stream, and ends that by `end`: when they are copied, or some time after a failure that may pass by
/// itself. Any other failure is returned.
pub(super) async fn copy_beside<S, T>(
    job: &CopyJob<'_, S, T>,
    pending: &Pending<S::Position>,
    failures: &mut Backoff,
    end: &CancellationToken,
) -> Error
where
    S: Source,
    T: Target<Position = S::Position>,
{
    if !pending.is_empty() {
        let copied = async {
            let mut register = job.target.register(job.claim).await?;
            copy_pending(job, &mut register, pending).await
        };
        match copied.await {
            Ok(_) => failures.reset(),
            Err(error) if error.class == Class::Retry => {
                tracing::warn!(%error, "tables are copied again; the others stream on");
                job.progress.set_waiting(Some(format!("a copy is tried again: {error}")));
                tokio::time::sleep(failures.next(error.class)).await;
            }
            Err(error) => return error,
        }
        end.cancel();
    }
    std::future::pending().await
}
