//! The one writer of a stream: it owns the connections that have claimed it.
//!
//! Invariants:
//! * a transaction of changes ends with the move of the checkpoint, which fails when the claim is lost; parts that are
//!   written side by side have no row in common (`footprint`) and are committed in the order of the log (`lane`);
//! * a transaction that has not ended on the source is written on a lane of its own (`early`); it is committed as any other when it
//!   has ended, and nothing depends on it before;
//! * after a failure in the middle of a part nothing more is written: the next claim begins anew;
//! * changes are committed without waiting for the disk (`durability`). All other transactions wait for the disk.

mod durability;
mod early;
mod encode;
mod execute;
mod footprint;
mod lane;

use super::checkpoint::Claim;
use super::connect::Session;
use super::ddl;
use super::lsn::Lsn;
use super::statements::TableWriter;
use super::target::{PostgresTarget, failed, within};
use crate::engine::batch::{Batch, Part};
use crate::engine::coalesce::Order;
use crate::engine::error::{Error, Result, reason};
use crate::engine::flow::lost_task;
use crate::engine::roles::{self, Applied, Apply, ApplyMode, Proof};
use crate::engine::table::{MappedTable, QualifiedName, TableState};
use durability::Durability;
use early::EarlyLane;
use footprint::Footprint;
use futures::future::{join, join3, try_join_all};
pub(super) use lane::Prepared;
use lane::{Job, Lane, Outcome, Turn};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinError;
use tokio::time::Instant;
use tokio_postgres::types::PgLsn;
use tokio_util::task::AbortOnDropHandle;

/// Bound for each call but the writing of changes, which takes as long as it takes.
const CONTROL_LIMIT: Duration = Duration::from_secs(90);
/// Bound for the emptying of a table, which may have to be done row by row.
const EMPTY_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// Applies changes to PostgreSQL.
pub struct PostgresApplier {
    /// All sessions; the first one also writes what is no change.
    sessions: Vec<Arc<Session>>,
    claim: Claim,
    mode: ApplyMode,
    /// What fires on the target may.
    triggers_accepted: bool,
    /// The checkpoint when all accepted parts are committed; `None` before the first.
    position: Option<Lsn>,
    writers: Arc<HashMap<u32, TableWriter>>,
    durability: Durability,
    /// Lanes that write nothing now. One of them may have a transaction open.
    idle: Vec<Lane>,
    /// Parts that are being written, in the order of the log.
    flight: VecDeque<Flight>,
    early: EarlyLane,
    /// Outcomes that nobody has asked for yet; they come before those of `flight`.
    finished: VecDeque<Applied>,
    /// The last part left its transaction open.
    part_is_open: bool,
    /// A part has failed: what the target holds of it is not known.
    broken: bool,
}

/// The end of the oldest part; never when there is none. Safe to cancel.
async fn oldest(flight: &mut VecDeque<Flight>) -> Result<(Lane, Result<Outcome>), JoinError> {
    match flight.front_mut() {
        Some(oldest) => (&mut oldest.task).await,
        None => std::future::pending().await,
    }
}

/// Waits for a moment; for ever when there is none.
async fn moment(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// A part that is being written.
struct Flight {
    task: AbortOnDropHandle<(Lane, Result<Outcome>)>,
    footprint: Footprint,
    pid: i32,
    since: Instant,
    /// Fires when the part is committed; the next part takes it.
    done: Option<oneshot::Receiver<()>>,
}

impl PostgresApplier {
    /// A writer whose claim was just made on these sessions (with their backends' pids), at least one; `position` is the
    /// checkpoint that was read then.
    pub(super) fn new(
        target: &PostgresTarget,
        sessions: Vec<(Session, i32, Prepared)>,
        claim: Claim,
        mode: ApplyMode,
        position: Option<Lsn>,
    ) -> Self {
        let lanes: Vec<Lane> = sessions.into_iter().map(|(session, pid, prepared)| Lane::new(session, pid, prepared)).collect();
        Self {
            sessions: lanes.iter().map(|lane| Arc::clone(&lane.session)).collect(),
            early: EarlyLane::new(target.clone(), claim.clone()),
            claim,
            mode,
            triggers_accepted: target.triggers_accepted,
            position,
            writers: Arc::default(),
            // The claim was flushed to disk, and with it all that was committed before.
            durability: Durability::new(position),
            idle: lanes,
            flight: VecDeque::new(),
            finished: VecDeque::new(),
            part_is_open: false,
            broken: false,
        }
    }

    fn session(&self) -> &Session {
        &self.sessions[0]
    }

    fn usable(&self) -> Result<()> {
        if self.broken {
            return Err(Error::bug("a writer was used after it had failed"));
        }
        Ok(())
    }

    fn may_begin(&self) -> Result<()> {
        self.usable()?;
        if !self.flight.is_empty() || self.part_is_open {
            return Err(Error::bug("the checkpoint was written in the middle of a transaction"));
        }
        Ok(())
    }

    /// Begins a transaction that is on disk when it is committed.
    async fn begin(&self) -> Result<()> {
        let sql = format!("BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL synchronous_commit = on; {}", ddl::LOCK_TIMEOUT);
        self.session().batch_execute(&sql).await.map_err(failed("begin a transaction"))
    }

    async fn commit(&self) -> Result<()> {
        self.session().batch_execute("COMMIT").await.map_err(failed("commit"))
    }

    /// One statement that is bound to the claim by itself, and says so when the claim is lost: a transaction in one round trip.
    async fn statement(&self, what: &str, written: impl Future<Output = Result<()>>) -> Result<()> {
        self.may_begin()?;
        let transaction = async { Ok(join3(self.begin(), written, self.commit()).await) };
        let (begun, written, committed) = within(CONTROL_LIMIT, what, transaction).await?;
        begun?;
        written?;
        committed
    }

    /// Statements in a transaction. They are not sent before it has begun: outside of it each would stand for itself.
    async fn statements(&self, what: &str, written: impl Future<Output = Result<()>>) -> Result<()> {
        self.may_begin()?;
        within(CONTROL_LIMIT, what, async {
            self.begin().await?;
            let written = self.prove_behind(written).await;
            self.end(written).await
        })
        .await
    }

    /// Statements that are sent together, and the proof of the claim with them, as the last one.
    async fn prove_behind<T>(&self, written: impl Future<Output = Result<T>>) -> Result<T> {
        let (written, proven) = join(written, self.claim.check(self.session())).await;
        let written = written?;
        proven.map(|()| written)
    }

    /// Commits what has succeeded, or rolls back.
    async fn end<T>(&self, result: Result<T>) -> Result<T> {
        match result {
            Ok(value) => {
                self.commit().await?;
                Ok(value)
            }
            Err(error) => {
                // The error is what matters; a lost connection has rolled back by itself.
                let _ = self.session().batch_execute("ROLLBACK").await;
                Err(error)
            }
        }
    }

    async fn begin_copy_inside(&self, table: &MappedTable, beside: &[&MappedTable], truncate: bool, place: ddl::Place) -> Result<i64> {
        let session = self.session();
        let made = place.present.is_none();
        if !made {
            self.empty(table, beside, truncate).await?;
        }
        let create = async { if made { ddl::create(session, table, place.has_schema).await } else { Ok(()) } };
        let written = async {
            let (created, generation) = join(create, self.claim.begin_table(session, table, made)).await;
            created.and(generation)
        };
        self.prove_behind(written).await
    }

    /// Empties a table, and with it those that foreign keys make one with it.
    async fn empty(&self, table: &MappedTable, beside: &[&MappedTable], truncate: bool) -> Result<()> {
        let session = self.session();
        let tables: Vec<&MappedTable> = std::iter::once(table).chain(beside.iter().copied()).collect();
        let names: Vec<&QualifiedName> = tables.iter().map(|table| &table.target).collect();
        let related = ddl::related(session, &names).await?;
        let members: Vec<&QualifiedName> = related.members.iter().map(|number| names[*number]).collect();
        let mut full = Vec::new();
        for number in &related.members {
            if ddl::has_rows(session, names[*number]).await? {
                self.check_may_empty(tables[*number], truncate).await?;
                full.push(names[*number]);
            }
        }
        for emptied in related.empty(session, &members, &full, self.mode).await? {
            // Nobody may take it for what it was, should its own copy never begin.
            if let Some(other) = tables.iter().find(|table| table.target == *emptied) {
                self.claim.begin_table(session, other, false).await?;
            }
        }
        Ok(())
    }

    /// Rows of an earlier copy by this very stream that was not finished are its own.
    async fn check_may_empty(&self, table: &MappedTable, truncate: bool) -> Result<()> {
        let known = self.claim.known_table(self.session(), table).await?;
        let unfinished =
            known.is_some_and(|known| known.generation > 0 && !matches!(known.state, TableState::CatchingUp | TableState::Ready));
        if truncate || unfinished {
            return Ok(());
        }
        Err(Error::stop(
            reason::TARGET_TABLE_NOT_EMPTY,
            format!("target table {} holds rows: empty it, or set snapshot.existingRows to Truncate", table.target),
        ))
    }

    /// Begins to write a part as soon as it may.
    async fn accept(
        &mut self,
        part: Arc<Part<Lsn>>,
        due: &(dyn Fn(u32, usize) -> bool + Send + Sync),
        joined: &[QualifiedName],
    ) -> Result<()> {
        if part.continues && !self.part_is_open {
            // What may fail early fails without a loss; the log goes on behind it only when nothing has failed.
            let lost = || Error::retry(reason::WRITE_REFUSED, "what was written of a transaction before it had ended is lost");
            self.idle.push(self.early.lend().ok_or_else(lost)?);
            self.part_is_open = true;
        }
        let busy = !self.flight.is_empty() || !self.finished.is_empty();
        if part.continues != self.part_is_open || (!joined.is_empty() && (part.open || busy)) {
            return Err(Error::bug("a part does not continue where the one before has ended"));
        }
        let batch = &part.batch;
        let due: Vec<bool> = batch.changes().iter().enumerate().map(|(index, change)| due(batch.table(change).id, index)).collect();
        self.check_versions(batch, &due)?;
        let footprint = self.footprint(&part, &due, joined);
        let lane = loop {
            let apart = self.flight.iter().all(|other| other.footprint.is_apart_from(&footprint));
            if apart && let Some(lane) = self.take_lane() {
                break lane;
            }
            self.finish_oldest().await?;
        };
        let earlier = self.flight.iter().map(|flight| flight.pid).collect();
        let turn = match self.flight.back_mut().and_then(|last| last.done.take()) {
            Some(before) => Turn::after(before, earlier),
            None => Turn::now(),
        };
        let (done, done_receiver) = oneshot::channel();
        let from = self.position;
        self.part_is_open = part.open;
        if !part.open {
            self.position = from.map(|from| from.max(*part.end()));
        }
        let job = Job {
            part,
            due,
            writers: Arc::clone(&self.writers),
            mode: self.mode,
            claim: self.claim.clone(),
            joined: joined.to_vec(),
            from,
            turn,
            done,
        };
        let pid = lane.pid;
        let task = AbortOnDropHandle::new(tokio::spawn(lane.run(job)));
        self.flight.push_back(Flight { task, footprint, pid, since: Instant::now(), done: Some(done_receiver) });
        Ok(())
    }

    fn footprint(&self, part: &Part<Lsn>, due: &[bool], joined: &[QualifiedName]) -> Footprint {
        let whole = !part.open && !part.continues && joined.is_empty();
        if self.sessions.len() > 1 && whole && self.mode == ApplyMode::Replica {
            Footprint::of(&part.batch, &self.writers, due)
        } else {
            Footprint::Alone
        }
    }

    /// A lane that writes nothing: the one with the open transaction, if there is one.
    fn take_lane(&mut self) -> Option<Lane> {
        let open = self.idle.iter().position(|lane| lane.in_transaction);
        match open {
            Some(place) => Some(self.idle.swap_remove(place)),
            None => self.idle.pop(),
        }
    }

    /// Waits for the oldest part that is being written. Safe to cancel.
    async fn finish_oldest(&mut self) -> Result<()> {
        if self.flight.is_empty() {
            return Err(Error::bug("there is no connection to write on"));
        }
        let known = self.finished.len();
        while self.finished.len() == known {
            self.step().await?;
        }
        Ok(())
    }

    /// Waits for the oldest part or the piece that is being written, whatever is over first; for ever when there is neither. Safe to
    /// cancel.
    async fn step(&mut self) -> Result<()> {
        let look_at = self.flight.front().and_then(|oldest| self.early.look_at(oldest.since));
        let look = tokio::select! {
            biased;
            ended = oldest(&mut self.flight) => return self.ended(ended),
            () = self.early.finish() => false,
            () = moment(look_at) => true,
        };
        if look {
            let pids: Vec<i32> = self.flight.iter().map(|flight| flight.pid).collect();
            self.early.give_way(&pids).await;
        }
        Ok(())
    }

    /// The oldest part is over.
    fn ended(&mut self, ended: Result<(Lane, Result<Outcome>), JoinError>) -> Result<()> {
        self.flight.pop_front();
        let outcome = match ended {
            Ok((lane, outcome)) => {
                if lane.is_early && !lane.in_transaction {
                    self.early.give_back(lane);
                } else {
                    self.idle.push(lane);
                }
                outcome
            }
            Err(error) => Err(lost_task(&error)),
        };
        match outcome {
            Ok(Outcome { applied, committed }) => {
                if let Some(committed) = committed {
                    self.durability.committed(committed.position, committed.inserted);
                    self.durability.flushed(committed.flushed);
                }
                self.finished.push_back(applied);
                Ok(())
            }
            Err(error) => {
                self.broken = true;
                Err(error)
            }
        }
    }

    /// Rows come under the versions that were prepared. Under another one they can be skipped, not written.
    fn check_versions(&self, batch: &Batch, due: &[bool]) -> Result<()> {
        for (version, number) in batch.tables().iter().zip(0u32..) {
            let Some(writer) = self.writers.get(&version.id) else { continue };
            let difference = match &version.differs {
                Some(difference) => difference.as_str(),
                None if writer.version.columns == version.columns => continue,
                None => "its columns are not those that were prepared",
            };
            if batch.changes().iter().zip(due).any(|(change, due)| *due && change.table == number) {
                return Err(Error::stop(reason::SCHEMA_CHANGED, format!("table {}: {difference}", version.name)));
            }
        }
        Ok(())
    }
}

impl Proof for PostgresApplier {
    async fn prove(&mut self) -> Result<()> {
        self.usable()?;
        within(CONTROL_LIMIT, "check the claim", self.claim.check(self.session())).await
    }
}

impl Apply for PostgresApplier {
    type Position = Lsn;

    async fn intend_log(&mut self) -> Result<()> {
        self.statement("note the slot to come", self.claim.intend_log(self.session())).await
    }

    async fn initialize(&mut self, position: &Lsn, timeline: i64) -> Result<()> {
        self.statement("write the first checkpoint", self.claim.initialize(self.session(), *position, timeline)).await?;
        self.position = Some(*position);
        self.durability = Durability::new(Some(*position));
        Ok(())
    }

    async fn start_over(&mut self) -> Result<()> {
        self.statements("forget the copies", self.claim.start_over(self.session())).await?;
        self.position = None;
        self.durability = Durability::new(None);
        Ok(())
    }

    async fn set_timeline(&mut self, timeline: i64) -> Result<()> {
        self.statement("write the timeline", self.claim.set_timeline(self.session(), timeline)).await
    }

    async fn begin_copy(&mut self, table: &MappedTable, beside: &[&MappedTable], truncate: bool) -> Result<i64> {
        self.may_begin()?;
        within(EMPTY_LIMIT, "begin a copy", async {
            // Three round trips where the table is made: what is there; what is made and written; the commit.
            let (begun, place) = join(self.begin(), ddl::look(self.session(), table)).await;
            begun?;
            let generation = match place {
                Ok(place) => self.begin_copy_inside(table, beside, truncate, place).await,
                Err(error) => Err(error),
            };
            self.end(generation).await
        })
        .await
    }

    async fn set_state(&mut self, table: &MappedTable, state: TableState, position: Option<&Lsn>) -> Result<()> {
        self.statements("write a table's state", self.claim.set_state(self.session(), table, state, position.copied())).await
    }

    async fn forget(&mut self, tables: &[QualifiedName]) -> Result<()> {
        self.statements("forget tables", self.claim.forget(self.session(), tables)).await
    }

    async fn done_ranges(&mut self, table: &MappedTable, generation: i64) -> Result<Vec<i32>> {
        self.usable()?;
        let read = self.claim.done_ranges(self.session(), table.source(), generation);
        within(CONTROL_LIMIT, "read the copied ranges", read).await
    }

    async fn prepare(&mut self, tables: &[MappedTable]) -> Result<()> {
        self.usable()?;
        let mut writers = HashMap::new();
        for some in tables.chunks(ddl::LOOKS) {
            let looks = try_join_all(some.iter().map(|table| ddl::describe(self.session(), &table.target)));
            let present = within(CONTROL_LIMIT, "read the target tables", looks).await?;
            for (table, present) in some.iter().zip(present) {
                let Some(present) = present else {
                    return Err(Error::stop(reason::TARGET_TABLE_INCOMPATIBLE, format!("target table {} is gone", table.target)));
                };
                ddl::check_compatible(table, &present)?;
                writers.insert(table.version.id, TableWriter::new(table, &present, self.mode, self.triggers_accepted)?);
            }
        }
        self.idle.iter_mut().for_each(|lane| lane.statements.clear());
        self.early.forget_statements();
        self.writers = Arc::new(writers);
        Ok(())
    }

    async fn apply(
        &mut self,
        part: Arc<Part<Lsn>>,
        due: &(dyn Fn(u32, usize) -> bool + Send + Sync),
        joined: &[QualifiedName],
    ) -> Result<()> {
        self.usable()?;
        self.accept(part, due, joined).await.inspect_err(|_| self.broken = true)
    }

    fn early_tables(&self) -> HashSet<u32> {
        // Whoever wants one connection gets no second one.
        let several = self.sessions.len() > 1 && self.mode == ApplyMode::Replica;
        let is_possible = |writer: &TableWriter| several && writer.order == Order::Key;
        self.writers.iter().filter(|(_, writer)| is_possible(writer)).map(|(id, _)| *id).collect()
    }

    async fn apply_early(&mut self, piece: Arc<Part<Lsn>>) -> Result<bool> {
        self.usable()?;
        let due = vec![true; piece.batch.changes().len()];
        if self.check_versions(&piece.batch, &due).is_err() {
            return Ok(false);
        }
        // What its rows had to wait for on the source was accepted before it, and must be there before it.
        if !self.flight.is_empty() {
            let footprint = Footprint::of(&piece.batch, &self.writers, &due);
            while !self.flight.iter().all(|other| other.footprint.is_apart_from(&footprint)) {
                self.finish_oldest().await?;
            }
        }
        let job = Job {
            part: piece,
            due,
            writers: Arc::clone(&self.writers),
            mode: self.mode,
            claim: self.claim.clone(),
            joined: Vec::new(),
            from: None,
            turn: Turn::now(),
            done: oneshot::channel().0,
        };
        let accepted = self.early.accept(job).await;
        // A server that has crashed may have forgotten commits: what is written on a new connection to it would go with another state
        // than the one that was left.
        if self.sessions.iter().any(|session| session.is_closed()) {
            self.early.roll_back();
            return Ok(false);
        }
        Ok(accepted)
    }

    fn drop_early(&mut self) {
        self.early.roll_back();
    }

    async fn outcome(&mut self) -> Result<roles::Outcome> {
        self.usable()?;
        loop {
            if let Some(applied) = self.finished.pop_front() {
                return Ok(roles::Outcome::Part(Some(applied)));
            }
            if let Some(applied) = self.early.next_outcome() {
                return Ok(roles::Outcome::Early(applied));
            }
            self.step().await?;
        }
    }

    fn has_room(&self) -> bool {
        !self.idle.is_empty()
    }

    async fn applied(&mut self) -> Result<Option<Applied>> {
        self.usable()?;
        if self.finished.is_empty() && !self.flight.is_empty() {
            self.finish_oldest().await?;
        }
        Ok(self.finished.pop_front())
    }

    async fn advance(&mut self, position: &Lsn, joined: &[QualifiedName]) -> Result<()> {
        self.usable()?;
        let idle = Part::idle(*position);
        let apply = self.apply(Arc::new(idle), &|_, _| false, joined);
        within(CONTROL_LIMIT, "advance the checkpoint", apply).await?;
        self.applied().await.map(|_| ())
    }

    async fn durable(&mut self) -> Result<Option<Lsn>> {
        self.usable()?;
        // While all lanes write, the next commit brings the answer with it.
        if self.durability.wants_look()
            && let Some(lane) = self.idle.first()
        {
            let look = async {
                lane.session.prepared().query_one(&lane.log_positions, &[]).await.map_err(failed("read the target's log position"))
            };
            let row = within(CONTROL_LIMIT, "read the target's log position", look).await?;
            self.durability.flushed(Lsn(row.get::<_, PgLsn>(1).into()));
        }
        Ok(self.durability.durable)
    }

    async fn abort(self) {
        let Self { mut sessions, flight, early, .. } = self;
        let busy = !flight.is_empty() || early.is_open();
        sessions.extend(early.session());
        drop(early);
        if busy {
            drop(flight);
            // Statements may still run on the server, which would notice the closed socket only at their end.
            futures::future::join_all(sessions.iter().map(|session| session.cancel())).await;
        }
        futures::future::join_all(sessions.iter().map(|session| session.batch_execute("ROLLBACK"))).await;
    }

    fn mode(&self) -> ApplyMode {
        self.mode
    }
}
