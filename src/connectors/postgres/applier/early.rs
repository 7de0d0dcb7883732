//! The connection on which a transaction is written that has not ended on the source.
//!
//! It is a lane like the others, in a target transaction that stays open from the first piece until the transaction's last part is
//! committed on it, in its turn, or until something goes wrong: then it is rolled back, and the transaction comes again as a whole.
//!
//! Nobody may wait for it, since it waits for the end of a transaction on the source. On the source nobody holds its keys before that
//! either, and what pieces hold is bound to keys alone; should an earlier part still wait for it, it is rolled back.

use super::super::checkpoint::Claim;
use super::super::connect::Session;
use super::super::load;
use super::super::target::{PostgresTarget, within};
use super::lane::{Job, Lane, Outcome, Prepared};
use crate::engine::error::{Error, Result, reason};
use crate::engine::flow::lost_task;
use crate::engine::roles::{Applied, ApplyMode};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// Bound for making the connection, and for its answers between pieces.
const LIMIT: Duration = Duration::from_secs(5);
/// How long a part may take before it is looked whether it waits for this connection, and pause between two looks.
const LOOK: Duration = Duration::from_secs(1);

pub(super) struct EarlyLane {
    target: PostgresTarget,
    claim: Claim,
    place: Place,
    /// Pieces that come next.
    waiting: VecDeque<Job>,
    /// Outcomes that nobody has asked for yet.
    outcomes: VecDeque<Option<Applied>>,
    looked: Instant,
}

/// Where the lane is.
enum Place {
    /// There is none.
    Nowhere,
    /// Here. A transaction may be open on it.
    Here(Lane),
    /// It writes a piece.
    Writes(AbortOnDropHandle<(Lane, Result<Outcome>)>, Arc<Session>),
    /// It rolls back.
    RollsBack(AbortOnDropHandle<Option<Lane>>),
    /// Its transaction has ended on the source, and it writes the rest like any other lane.
    Away(Arc<Session>),
}

impl EarlyLane {
    pub fn new(target: PostgresTarget, claim: Claim) -> Self {
        Self { target, claim, place: Place::Nowhere, waiting: VecDeque::new(), outcomes: VecDeque::new(), looked: Instant::now() }
    }

    /// Begins to write a piece, or puts it behind the one that is being written. `false`: it is not written, and neither is
    /// anything before it.
    pub async fn accept(&mut self, job: Job) -> bool {
        if job.part.continues != self.is_open() {
            self.roll_back();
            return false;
        }
        if matches!(self.place, Place::Writes(..)) {
            self.waiting.push_back(job);
            return true;
        }
        match within(LIMIT, "prepare to write a transaction early", self.take_lane()).await {
            Ok(lane) => {
                self.start(lane, job);
                true
            }
            Err(error) => {
                tracing::debug!(%error, "a transaction is not written before it has ended");
                false
            }
        }
    }

    /// Whether a transaction is open, or something was written of it.
    pub fn is_open(&self) -> bool {
        match &self.place {
            Place::Here(lane) => lane.in_transaction,
            Place::Writes(..) => true,
            Place::Nowhere | Place::RollsBack(_) | Place::Away(_) => false,
        }
    }

    /// The session while something may run on it.
    pub fn session(&self) -> Option<Arc<Session>> {
        match &self.place {
            Place::Here(lane) => Some(Arc::clone(&lane.session)),
            Place::Writes(_, session) | Place::Away(session) => Some(Arc::clone(session)),
            Place::Nowhere | Place::RollsBack(_) => None,
        }
    }

    async fn take_lane(&mut self) -> Result<Lane> {
        let lane = match std::mem::replace(&mut self.place, Place::Nowhere) {
            // Should its session have ended, the piece fails, as it must.
            Place::Here(lane) if lane.in_transaction => return Ok(lane),
            Place::Here(lane) => Some(lane),
            Place::RollsBack(task) => task.await.unwrap_or_default(),
            Place::Nowhere => None,
            place @ (Place::Writes(..) | Place::Away(_)) => {
                self.place = place;
                return Err(Error::bug("the lane for a transaction that has not ended is in use"));
            }
        };
        if let Some(lane) = lane.filter(|lane| !lane.session.is_closed()) {
            return Ok(lane);
        }
        let (session, pid, _) = self.target.writer_session().await?;
        // Under this name the next claim finds and ends it; one that came before is seen here.
        let mode = load::set_up(&session, &self.claim).await?;
        self.claim.check(&session).await?;
        if mode != ApplyMode::Replica {
            return Err(Error::retry(reason::WRITE_REFUSED, "the target's role has lost the right to replica role"));
        }
        let prepared = Prepared::on(&session).await?;
        let mut lane = Lane::new(session, pid, prepared);
        lane.is_early = true;
        Ok(lane)
    }

    fn start(&mut self, lane: Lane, job: Job) {
        let session = Arc::clone(&lane.session);
        self.place = Place::Writes(AbortOnDropHandle::new(tokio::spawn(lane.run(job))), session);
    }

    /// Waits until the piece that is being written is over; for ever when there is none. Safe to cancel.
    pub async fn finish(&mut self) {
        let Place::Writes(task, _) = &mut self.place else { return std::future::pending().await };
        let failure = match task.await {
            Ok((lane, Ok(outcome))) => {
                self.outcomes.push_back(Some(outcome.applied));
                match self.waiting.pop_front() {
                    Some(next) => self.start(lane, next),
                    None => self.place = Place::Here(lane),
                }
                return;
            }
            // Without the lane its session ends.
            Ok((_, Err(error))) => error,
            Err(error) => lost_task(&error),
        };
        tracing::info!(error = %failure, "a transaction that has not ended on the source is written when it has");
        self.place = Place::Nowhere;
        self.lost();
    }

    /// Nothing is written any more, and whoever asks next hears of it.
    fn lost(&mut self) {
        self.waiting.clear();
        self.outcomes.clear();
        self.outcomes.push_back(None);
    }

    pub fn next_outcome(&mut self) -> Option<Option<Applied>> {
        self.outcomes.pop_front()
    }

    /// Rolls back what was written, beside everything else.
    pub fn roll_back(&mut self) {
        self.waiting.clear();
        self.outcomes.clear();
        self.place = match std::mem::replace(&mut self.place, Place::Nowhere) {
            Place::Here(lane) if lane.in_transaction => Place::RollsBack(AbortOnDropHandle::new(tokio::spawn(rolled_back(lane)))),
            Place::Writes(task, _) => Place::RollsBack(AbortOnDropHandle::new(tokio::spawn(async move {
                // A failure has rolled it back already.
                let (lane, _) = task.await.ok()?;
                rolled_back(lane).await
            }))),
            place => place,
        };
    }

    /// The lane, to write the rest of the transaction on it. `None` when not all that came was written.
    pub fn lend(&mut self) -> Option<Lane> {
        let is_complete = self.is_open() && self.outcomes.is_empty();
        match std::mem::replace(&mut self.place, Place::Nowhere) {
            Place::Here(lane) if is_complete => {
                self.place = Place::Away(Arc::clone(&lane.session));
                Some(lane)
            }
            place => {
                self.place = place;
                None
            }
        }
    }

    /// The lane comes back.
    pub fn give_back(&mut self, lane: Lane) {
        self.place = Place::Here(lane);
    }

    /// Tables have changed.
    pub fn forget_statements(&mut self) {
        if let Place::Here(lane) = &mut self.place {
            lane.statements.clear();
        }
    }

    /// When to look whether a part that is written since then waits for this connection; `None` when it can't.
    pub fn look_at(&self, since: Instant) -> Option<Instant> {
        self.is_open().then(|| since.max(self.looked) + LOOK)
    }

    /// Rolls back if one of these backends waits for it. While a piece is written the server itself sees a circle.
    pub async fn give_way(&mut self, pids: &[i32]) {
        self.looked = Instant::now();
        let Place::Here(lane) = &self.place else { return };
        const WAITS: &str =
            "SELECT EXISTS (SELECT FROM unnest($1::int4[]) AS writer (pid) WHERE pg_backend_pid() = ANY (pg_blocking_pids(pid)))";
        let look = tokio::time::timeout(LIMIT, lane.session.query_one(WAITS, &[&pids])).await;
        let waits = look.ok().and_then(Result::ok).is_none_or(|row| row.get(0));
        if waits {
            tracing::info!("a part waits for a transaction that has not ended on the source; that one is written when it has");
            self.roll_back();
            self.lost();
        }
    }
}

/// The lane behind a roll-back; `None` when the server did not answer.
async fn rolled_back(mut lane: Lane) -> Option<Lane> {
    lane.roll_back().await.then_some(lane)
}
