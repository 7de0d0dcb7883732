//! What follows the rows of a table: indexes, several at a time, each in a transaction of its own so that a crash costs only
//! those that were being built; then everything else in one transaction, with the statistics.

use super::checkpoint::Claim;
use super::connect::Session;
use super::ddl::structure::{Build, Present, build_indexes, settle};
use super::load::set_up;
use super::target::{PostgresTarget, failed};
use super::{ddl, target};
use crate::engine::error::Result;
use crate::engine::roles::{Builders, Tell};
use crate::engine::structure::SequenceValue;
use crate::engine::table::MappedTable;
use futures::{TryStreamExt as _, stream};
use std::sync::{Mutex, PoisonError};

/// More memory than this does not make a build faster, in KiB.
const MOST_MEMORY: i64 = 1 << 20;

/// One table whose rows are all there.
pub(super) struct Finishing<'a> {
    pub target: &'a PostgresTarget,
    pub claim: &'a Claim,
    pub table: &'a MappedTable,
    pub builders: Builders,
    pub tell: Tell<'a>,
}

/// See the module. Safe to repeat.
pub(super) async fn finish(finishing: &Finishing<'_>, values: &[SequenceValue]) -> Result<()> {
    let Finishing { claim, table, tell, .. } = finishing;
    let session = finishing.session().await?;
    let made = claim.has_made(&session, table).await?;
    if made {
        finishing.build_indexes(&session).await?;
    }
    tell(format!("constraints and statistics of {}", table.target));
    finishing.begin(&session).await?;
    if made {
        settle(&session, table, values).await?;
    }
    ddl::finish(&session, table).await?;
    claim.check(&session).await?;
    session.batch_execute("COMMIT").await.map_err(failed("commit what follows the rows"))
}

impl Finishing<'_> {
    /// A session that a later claim ends.
    async fn session(&self) -> Result<Session> {
        let session = self.target.session("").await?;
        set_up(&session, self.claim).await?;
        Ok(session)
    }

    /// Begins a transaction in which indexes are built.
    async fn begin(&self, session: &Session) -> Result<()> {
        let limits = Limits::read(session, self.builders).await?;
        let Limits { memory, workers } = limits;
        let sql = format!(
            "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL synchronous_commit = on;
             SET LOCAL maintenance_work_mem = '{memory}kB'; SET LOCAL max_parallel_maintenance_workers = {workers}"
        );
        session.batch_execute(&sql).await.map_err(failed("begin a transaction"))
    }

    async fn build_indexes(&self, session: &Session) -> Result<()> {
        let missing = Present::read(session, self.table).await?.missing(self.table);
        let steps = Mutex::new(Steps { under_way: Vec::new(), done: 0 });
        let step = |change: &dyn Fn(&mut Steps)| {
            let mut steps = steps.lock().unwrap_or_else(PoisonError::into_inner);
            change(&mut steps);
            let (names, done) = (steps.under_way.join(", "), steps.done);
            (self.tell)(format!("indexes of {} are being built: {names}; {done} of {} are done", self.table.target, missing.len()));
        };
        stream::iter(missing.iter().map(Ok))
            .try_for_each_concurrent(self.builders.per_table, async |build| {
                step(&|steps| steps.under_way.push(build.name.clone()));
                self.build(build).await?;
                step(&|steps| {
                    steps.under_way.retain(|name| *name != build.name);
                    steps.done += 1;
                });
                Ok(())
            })
            .await
    }

    async fn build(&self, build: &Build<'_>) -> Result<()> {
        let session = self.session().await?;
        self.begin(&session).await?;
        build_indexes(&session, self.table, std::slice::from_ref(build)).await?;
        self.claim.check(&session).await?;
        session.batch_execute("COMMIT").await.map_err(target::failed(format!("commit index {}", build.name)))
    }
}

/// How far the builds of a table are.
struct Steps {
    under_way: Vec<String>,
    done: usize,
}

/// What one build may use.
#[derive(Debug, PartialEq, Eq)]
struct Limits {
    /// KiB.
    memory: i64,
    /// Parallel workers.
    workers: i64,
}

impl Limits {
    async fn read(session: &Session, builders: Builders) -> Result<Self> {
        let row = session
            .query_one(
                "SELECT pg_size_bytes(current_setting('shared_buffers')) / 1024, pg_size_bytes(current_setting('maintenance_work_mem')) / 1024,
                        current_setting('max_parallel_workers')::int8, current_setting('max_parallel_maintenance_workers')::int8",
                &[],
            )
            .await
            .map_err(failed("read limits of the target"))?;
        let builds = i64::try_from(builders.per_table.saturating_mul(builders.tables)).unwrap_or(i64::MAX);
        Ok(Self::share(builds, row.get(0), row.get(1), row.get(2), row.get(3)))
    }

    /// All builds together may use half as much memory as the server's buffer cache, which is the only sign of how much
    /// there is, and all parallel workers; none gets less than it would have had anyway.
    fn share(builds: i64, shared_buffers: i64, memory: i64, parallel: i64, workers: i64) -> Self {
        let builds = builds.max(1);
        Self { memory: memory.max((shared_buffers / 2 / builds).min(MOST_MEMORY)), workers: workers.max(parallel / builds) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn builds_share_memory_and_workers_and_lose_none() {
        const GIB: i64 = 1 << 20;
        assert_eq!(Limits::share(4, 8 * GIB, 64 << 10, 8, 2), Limits { memory: GIB, workers: 2 });
        assert_eq!(Limits::share(1, 64 * GIB, 64 << 10, 16, 2), Limits { memory: GIB, workers: 16 });
        assert_eq!(Limits::share(16, 128 << 10, 64 << 10, 8, 2), Limits { memory: 64 << 10, workers: 2 });
    }
}
