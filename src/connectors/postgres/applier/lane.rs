//! One connection of the applier, and how it writes one part.
//!
//! Invariants:
//! * a transaction of changes ends with the move of the checkpoint from where the part before has left it; that statement
//!   is sent only when the commit of the part before was answered, so commits happen in the order of the log;
//! * a part that was written beside an earlier one and fails proves nothing: it is rolled back and repeated by itself once
//!   the earlier one is committed. A part that is the first in line is repeated once after a deadlock;
//! * a part that waits for its turn gives way when an earlier one waits for a lock: rolled back, it can hold none.

use super::super::checkpoint::{self, Claim};
use super::super::connect::Session;
use super::super::lsn::Lsn;
use super::super::statements::TableWriter;
use super::super::target::failed;
use super::execute::{Executor, Statements};
use crate::engine::batch::Part;
use crate::engine::coalesce::{self, Plan, TableRule};
use crate::engine::error::{Class, Error, Result, reason};
use crate::engine::register::Reached;
use crate::engine::roles::{Applied, ApplyMode};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot::{self, error::TryRecvError};
use tokio_postgres::Statement;
use tokio_postgres::types::PgLsn;

/// How long a part waits for its turn before it looks whether it is in an earlier one's way, and between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// Bound for a roll-back after a failure.
const ROLL_BACK_LIMIT: Duration = Duration::from_secs(5);

/// From where to where a checkpoint moves; not back, and not at all when `to` lies before.
#[derive(Clone, Copy, Debug)]
pub(super) struct CheckpointMove {
    pub from: Lsn,
    pub to: Lsn,
    /// Rows that the transaction writes.
    pub rows: i64,
}

/// A part that is to be written.
pub(super) struct Job {
    pub part: Arc<Part<Lsn>>,
    /// By change: whether it is written.
    pub due: Vec<bool>,
    pub writers: Arc<HashMap<u32, TableWriter>>,
    pub mode: ApplyMode,
    pub claim: Claim,
    pub reached: Reached,
    /// The checkpoint when all earlier parts are committed; `None` before the first.
    pub from: Option<Lsn>,
    pub turn: Turn,
    /// Dropped without a word when the part fails: no later one is committed.
    pub done: oneshot::Sender<()>,
}

/// A part's turn to commit: when the part before has done so.
pub(super) struct Turn {
    before: Option<oneshot::Receiver<()>>,
    /// The part before has failed.
    never: bool,
    /// Backends that write earlier parts.
    earlier: Vec<i32>,
}

impl Turn {
    /// The turn of the first in line.
    pub fn now() -> Self {
        Self { before: None, never: false, earlier: Vec::new() }
    }

    /// The turn after a part whose end `before` tells.
    pub fn after(before: oneshot::Receiver<()>, earlier: Vec<i32>) -> Self {
        Self { before: Some(before), never: false, earlier }
    }

    fn has_come(&mut self) -> bool {
        if let Some(before) = &mut self.before {
            match before.try_recv() {
                Ok(()) => self.before = None,
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Closed) => (self.before, self.never) = (None, true),
            }
        }
        self.before.is_none() && !self.never
    }

    /// Safe to cancel.
    async fn wait(&mut self) -> Result<()> {
        if let Some(before) = &mut self.before {
            self.never = before.await.is_err();
            self.before = None;
        }
        if self.never {
            return Err(Error::retry(reason::TARGET_UNREACHABLE, "an earlier part was not committed"));
        }
        Ok(())
    }
}

/// What a part has brought.
pub(super) struct Outcome {
    pub applied: Applied,
    /// When it was committed: the checkpoint, and the target's log after it: inserted and flushed up to.
    pub committed: Option<Committed>,
}

/// A committed checkpoint and the target's log right after it.
pub(super) struct Committed {
    pub position: Lsn,
    pub inserted: Lsn,
    pub flushed: Lsn,
}

/// One connection.
pub(super) struct Lane {
    pub session: Arc<Session>,
    /// The session's backend.
    pub pid: i32,
    pub statements: Statements,
    move_position: Statement,
    pub log_positions: Statement,
    /// A transaction of changes is open.
    pub in_transaction: bool,
    /// The open transaction has altered a table: what is written can't be repeated without that.
    pub has_altered: bool,
    /// It is the one for transactions that have not ended on the source.
    pub is_early: bool,
    /// Rows that the open transaction has written.
    uncommitted_rows: i64,
}

/// Statements of a session that are prepared once, since each writing transaction ends with them.
pub(in super::super) struct Prepared {
    move_position: Statement,
    log_positions: Statement,
}

impl Prepared {
    /// Prepares them in one round trip.
    pub async fn on(session: &Session) -> Result<Self> {
        let log_positions = async {
            let prepared = session.prepare("SELECT pg_current_wal_insert_lsn(), pg_current_wal_flush_lsn()").await;
            prepared.map_err(failed("prepare to read the target's log position"))
        };
        let (move_position, log_positions) = futures::future::try_join(checkpoint::prepare_move(session), log_positions).await?;
        Ok(Self { move_position, log_positions })
    }
}

impl Lane {
    /// On a session that is claimed and set up.
    pub fn new(session: Session, pid: i32, prepared: Prepared) -> Self {
        let Prepared { move_position, log_positions } = prepared;
        Self {
            session: Arc::new(session),
            pid,
            statements: Statements::default(),
            move_position,
            log_positions,
            in_transaction: false,
            has_altered: false,
            is_early: false,
            uncommitted_rows: 0,
        }
    }

    /// Writes a part; gives the lane back with the outcome. After a failure nothing more is written on it.
    pub async fn run(mut self, mut job: Job) -> (Self, Result<Outcome>) {
        let result = self.write(&mut job).await;
        if result.is_err() {
            self.roll_back().await;
        } else {
            // Nobody waits when there is no later part.
            let _ = job.done.send(());
        }
        (self, result)
    }

    async fn write(&mut self, job: &mut Job) -> Result<Outcome> {
        let part = Arc::clone(&job.part);
        let job_writers = Arc::clone(&job.writers);
        let writers: Vec<Option<&TableWriter>> = part.batch.tables().iter().map(|version| job_writers.get(&version.id)).collect();
        let plan = coalesce::plan(&part.batch, &rules(&writers), |_, index| job.due[index])?;
        let checkpoint = if part.open { None } else { Some(self.checkpoint_move(job, plan.rows())?) };
        if plan.is_empty() && !self.in_transaction {
            if checkpoint.is_none_or(|checkpoint| checkpoint.to <= checkpoint.from) && job.reached.is_empty() {
                job.turn.wait().await?;
                return Ok(Outcome { applied: Applied { committed: !part.open, ..Applied::default() }, committed: None });
            }
        } else if job.reached.own.is_empty() && checkpoint.is_some_and(|checkpoint| checkpoint.to < checkpoint.from) {
            return Err(Error::bug("changes came from before the checkpoint"));
        }
        for first_try in [true, false] {
            let beside = !job.turn.has_come();
            match self.attempt(job, &plan, &writers, checkpoint).await {
                Err(error) if first_try && !part.continues && !self.has_altered && self.may_repeat(&error, beside) => {
                    tracing::debug!(%error, "a part is repeated by itself");
                    self.roll_back().await;
                    job.turn.wait().await?;
                }
                result => return result,
            }
        }
        Err(Error::bug("a part was given up without a failure"))
    }

    /// Whether a failure may be gone when nothing else is written.
    fn may_repeat(&self, error: &Error, beside: bool) -> bool {
        let lost_a_lock = error.class == Class::Retry && error.reason == reason::WRITE_REFUSED;
        !self.session.is_closed() && error.class != Class::Fenced && (beside || lost_a_lock)
    }

    async fn attempt(
        &mut self,
        job: &mut Job,
        plan: &Plan<'_>,
        writers: &[Option<&TableWriter>],
        checkpoint: Option<CheckpointMove>,
    ) -> Result<Outcome> {
        let session = Arc::clone(&self.session);
        let part = Arc::clone(&job.part);
        let claim = job.claim.clone();
        let mut executor = Executor::new(&session, &mut self.statements, &plan.images, writers);
        if !self.in_transaction {
            executor.command(begin_changes(job.mode)).await?;
            self.in_transaction = true;
        }
        executor.run(plan).await?;
        if let Some(checkpoint) = &checkpoint {
            if !job.turn.has_come() {
                executor.drain().await?;
                take_turn(&session, &mut job.turn).await?;
            }
            if !job.reached.is_empty() {
                executor.drain().await?;
                claim.reached(&session, &job.reached, checkpoint.to).await?;
            }
            executor.move_checkpoint(&self.move_position, &claim, checkpoint).await?;
        }
        executor.drain().await?;
        let (applied, moved) = (Applied { committed: !part.open, ..executor.applied }, executor.moved);
        drop(executor);
        let Some(checkpoint) = checkpoint else {
            self.uncommitted_rows += plan.rows();
            return Ok(Outcome { applied, committed: None });
        };
        if !moved {
            return Err(claim.lost(&session, "the checkpoint").await);
        }
        let committed = self.commit(checkpoint.to.max(checkpoint.from)).await?;
        Ok(Outcome { applied, committed: Some(committed) })
    }

    /// Where the checkpoint goes, and how many rows its transaction writes.
    fn checkpoint_move(&self, job: &Job, rows: i64) -> Result<CheckpointMove> {
        let from = job.from.ok_or_else(|| Error::bug("the checkpoint was moved before its first position was written"))?;
        Ok(CheckpointMove { from, to: *job.part.end(), rows: self.uncommitted_rows + rows })
    }

    /// Commits and reads the log's positions in one round trip.
    async fn commit(&mut self, position: Lsn) -> Result<Committed> {
        let commit = self.session.batch_execute("COMMIT");
        let look = self.session.prepared().query_one(&self.log_positions, &[]);
        let (committed, looked) = futures::future::join(commit, look).await;
        committed.map_err(failed("commit changes"))?;
        (self.in_transaction, self.has_altered) = (false, false);
        self.uncommitted_rows = 0;
        let row = looked.map_err(failed("read the target's log position"))?;
        Ok(Committed { position, inserted: Lsn(row.get::<_, PgLsn>(0).into()), flushed: Lsn(row.get::<_, PgLsn>(1).into()) })
    }

    /// Opens a transaction, if none is open, that what comes next is a part of.
    pub async fn begin(&mut self, mode: ApplyMode) -> Result<()> {
        if !self.in_transaction {
            self.session.batch_execute(begin_changes(mode)).await.map_err(failed("begin a transaction"))?;
            self.in_transaction = true;
        }
        Ok(())
    }

    /// Says whether the server has answered. A lost connection has rolled back by itself; a session that does not answer is not used
    /// again.
    pub async fn roll_back(&mut self) -> bool {
        let answer = tokio::time::timeout(ROLL_BACK_LIMIT, self.session.batch_execute("ROLLBACK")).await;
        (self.in_transaction, self.has_altered) = (false, false);
        self.uncommitted_rows = 0;
        matches!(answer, Ok(Ok(())))
    }
}

/// Waits for the turn of a part whose rows are written. Should an earlier part wait for a lock, it may be this one's, or
/// that of somebody who waits for this one's; no server sees such a circle, so this part gives way.
async fn take_turn(session: &Session, turn: &mut Turn) -> Result<()> {
    loop {
        let earlier = turn.earlier.clone();
        if let Ok(came) = tokio::time::timeout(LOOK, turn.wait()).await {
            return came;
        }
        let blocked = "SELECT EXISTS (SELECT FROM unnest($1::int4[]) AS earlier (pid) WHERE cardinality(pg_blocking_pids(pid)) > 0)";
        let row = session.query_one(blocked, &[&earlier]).await.map_err(failed("look whether an earlier part waits"))?;
        if row.get(0) {
            return Err(Error::retry(reason::WRITE_REFUSED, "an earlier part waits for a lock"));
        }
    }
}

/// Opens a transaction of changes. Without replica role constraints that can wait for the end do: the source may have
/// checked them there.
fn begin_changes(mode: ApplyMode) -> &'static str {
    match mode {
        ApplyMode::Replica => "BEGIN ISOLATION LEVEL READ COMMITTED",
        ApplyMode::Ordered => "BEGIN ISOLATION LEVEL READ COMMITTED; SET CONSTRAINTS ALL DEFERRED",
    }
}

/// A table that is not prepared has no due changes; should there be one, running it fails.
fn rules<'a>(writers: &[Option<&'a TableWriter>]) -> Vec<TableRule<'a>> {
    let unknown = TableRule { key: &[], order: coalesce::Order::Table, rewrites: false };
    writers.iter().map(|writer| writer.map_or(unknown, TableWriter::rule)).collect()
}
