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
use super::register::{CONTROL_LIMIT, EMPTY_LIMIT, PostgresRegister};
use super::sql::qualified;
use super::statements::TableWriter;
use super::target::{PostgresTarget, failed, within};
use crate::engine::batch::{Batch, Part};
use crate::engine::coalesce::Order;
use crate::engine::error::{Error, Result, reason};
use crate::engine::flow::lost_task;
use crate::engine::register::{Reached, Register};
use crate::engine::request::{Effect, RequestChange, RequestRecord};
use crate::engine::roles::{self, Applied, Apply, ApplyMode, Proof};
use crate::engine::table::{Altered, Column, Identity, MappedTable, QualifiedName, TableState, TableVersion};
use durability::Durability;
use early::EarlyLane;
use footprint::Footprint;
use futures::future::try_join_all;
pub(super) use lane::Prepared;
use lane::{Job, Lane, Outcome, Turn};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use tokio::sync::oneshot;
use tokio::task::JoinError;
use tokio::time::Instant;
use tokio_postgres::types::PgLsn;
use tokio_util::task::AbortOnDropHandle;

/// Applies changes to PostgreSQL.
pub struct PostgresApplier {
    /// All sessions; the first one also writes what is no change.
    sessions: Vec<Arc<Session>>,
    /// Writes on the first one.
    register: PostgresRegister,
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
            register: PostgresRegister::new(Arc::clone(&lanes[0].session), claim.clone(), mode),
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

    /// Begins to write a part as soon as it may.
    async fn accept(&mut self, part: Arc<Part<Lsn>>, due: &(dyn Fn(u32, usize) -> bool + Send + Sync), reached: &Reached) -> Result<()> {
        if part.continues && !self.part_is_open {
            // What may fail early fails without a loss; the log goes on behind it only when nothing has failed.
            let lost = || Error::retry(reason::WRITE_REFUSED, "what was written of a transaction before it had ended is lost");
            self.idle.push(self.early.lend().ok_or_else(lost)?);
            self.part_is_open = true;
        }
        let busy = !self.flight.is_empty() || !self.finished.is_empty();
        if part.continues != self.part_is_open || (!reached.is_empty() && (part.open || busy)) {
            return Err(Error::bug("a part does not continue where the one before has ended"));
        }
        let batch = &part.batch;
        let due: Vec<bool> = batch.changes().iter().enumerate().map(|(index, change)| due(batch.table(change).id, index)).collect();
        self.check_versions(batch, &due)?;
        let footprint = self.footprint(&part, &due, reached);
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
            reached: reached.clone(),
            from,
            turn,
            done,
        };
        let pid = lane.pid;
        let task = AbortOnDropHandle::new(tokio::spawn(lane.run(job)));
        self.flight.push_back(Flight { task, footprint, pid, since: Instant::now(), done: Some(done_receiver) });
        Ok(())
    }

    fn footprint(&self, part: &Part<Lsn>, due: &[bool], reached: &Reached) -> Footprint {
        let whole = !part.open && !part.continues && reached.is_empty();
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

    /// Statements that were prepared for tables as they were are of no use any more.
    fn set_writers(&mut self, writers: HashMap<u32, TableWriter>) {
        self.idle.iter_mut().for_each(|lane| lane.statements.clear());
        self.early.forget_statements();
        self.writers = Arc::new(writers);
    }

    /// Alters a table in the lane's transaction, which the next part ends.
    async fn adapt_on(&self, lane: &mut Lane, known: &MappedTable, altered: &Altered, follow: bool) -> Result<TableWriter> {
        lane.begin(self.mode).await?;
        lane.has_altered = true;
        let session = &*lane.session;
        session.batch_execute(ddl::LOCK_TIMEOUT).await.map_err(failed("bound the wait for a lock"))?;
        let present = ddl::alter(session, known, altered, follow).await?;
        session.batch_execute("SET LOCAL lock_timeout = 0").await.map_err(failed("wait for locks"))?;
        self.claim.set_versions(session, &[&altered.table]).await?;
        TableWriter::new(&altered.table, &present, self.mode, self.triggers_accepted)
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
            if is_written_as(&writer.version, version) {
                continue;
            }
            let difference = version.differs.as_deref().unwrap_or("its columns are not those that were prepared");
            if batch.changes().iter().zip(due).any(|(change, due)| *due && change.table == number) {
                return Err(Error::stop(reason::SCHEMA_CHANGED, format!("table {}: {difference}", version.name)));
            }
        }
        Ok(())
    }
}

/// Whether rows of a version can be written as those of the prepared one.
fn is_written_as(prepared: &TableVersion, version: &TableVersion) -> bool {
    let full = version.identity == Identity::Full;
    let alike = |(prepared, column): (&Column, &Column)| {
        (&prepared.name, prepared.type_id) == (&column.name, column.type_id) && (full || prepared.key == column.key)
    };
    prepared.identity == version.identity
        && prepared.columns.len() == version.columns.len()
        && prepared.columns.iter().zip(&version.columns).all(alike)
}

impl Proof for PostgresApplier {
    async fn prove(&mut self) -> Result<()> {
        self.usable()?;
        within(CONTROL_LIMIT, "check the claim", self.claim.check(self.session())).await
    }
}

impl Register for PostgresApplier {
    type Position = Lsn;

    async fn begin_copy(&mut self, table: &MappedTable, beside: &[&MappedTable], truncate: bool) -> Result<i64> {
        self.may_begin()?;
        self.register.begin_copy(table, beside, truncate).await
    }

    async fn set_state(&mut self, table: &MappedTable, state: TableState, position: Option<&Lsn>) -> Result<()> {
        self.may_begin()?;
        self.register.set_state(table, state, position).await
    }

    async fn done_ranges(&mut self, table: &MappedTable, generation: i64) -> Result<Vec<i32>> {
        self.usable()?;
        self.register.done_ranges(table, generation).await
    }
}

impl Apply for PostgresApplier {
    async fn intend_log(&mut self) -> Result<()> {
        self.may_begin()?;
        self.register.statement("note the slot to come", self.claim.intend_log(self.session())).await
    }

    async fn initialize(&mut self, position: &Lsn, timeline: i64) -> Result<()> {
        self.may_begin()?;
        self.register.statement("write the first checkpoint", self.claim.initialize(self.session(), *position, timeline)).await?;
        self.position = Some(*position);
        self.durability = Durability::new(Some(*position));
        Ok(())
    }

    async fn start_over(&mut self) -> Result<()> {
        self.may_begin()?;
        self.register.statements("forget the copies", self.claim.start_over(self.session())).await?;
        self.position = None;
        self.durability = Durability::new(None);
        Ok(())
    }

    async fn set_timeline(&mut self, timeline: i64) -> Result<()> {
        self.may_begin()?;
        self.register.statement("write the timeline", self.claim.set_timeline(self.session(), timeline)).await
    }

    async fn record(&mut self, change: &RequestChange<'_, Lsn>) -> Result<Vec<RequestRecord>> {
        self.may_begin()?;
        let records = self.register.record(change).await?;
        if matches!(change.effect, Effect::Anew) {
            self.position = None;
            self.durability = Durability::new(None);
        }
        Ok(records)
    }

    async fn forget(&mut self, tables: &[QualifiedName]) -> Result<()> {
        self.may_begin()?;
        self.register.statements("forget tables", self.claim.forget(self.session(), tables)).await
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
                let fits = ddl::check_compatible(table, &present);
                if table.lineage.behind && fits.is_err() {
                    // It was altered by hand to what its next rows take: they are looked at then.
                    continue;
                }
                fits?;
                writers.insert(table.version.id, TableWriter::new(table, &present, self.mode, self.triggers_accepted)?);
            }
        }
        // What tells whether a table is written anew is read with each session.
        let current: Vec<&MappedTable> = tables.iter().filter(|table| !table.lineage.behind).collect();
        self.may_begin()?;
        self.register.statements("write the columns of tables", self.claim.set_versions(self.session(), &current)).await?;
        self.set_writers(writers);
        Ok(())
    }

    async fn has_target(&mut self, table: &MappedTable) -> Result<bool> {
        self.usable()?;
        let there = within(CONTROL_LIMIT, "look for the target table", ddl::describe(self.session(), &table.target)).await?;
        Ok(there.is_some())
    }

    async fn discard(&mut self, table: &MappedTable) -> Result<()> {
        let drop = async {
            let session = self.session();
            if !self.claim.has_made(session, table).await? {
                return Ok(());
            }
            let sql = format!("DROP TABLE IF EXISTS {}", qualified(&table.target));
            session.batch_execute(&sql).await.map_err(failed(&sql))
        };
        self.may_begin()?;
        self.register.statements("drop a table whose copy was not finished", drop).await
    }

    async fn adapt(&mut self, known: &MappedTable, altered: &Altered, follow: bool) -> Result<()> {
        self.usable()?;
        if !self.flight.is_empty() {
            return Err(Error::bug("a table was to be altered while changes are being written"));
        }
        self.early.roll_back();
        let mut lane = self.take_lane().ok_or_else(|| Error::bug("there is no connection to alter a table on"))?;
        let adapted = within(EMPTY_LIMIT, "alter a target table", Box::pin(self.adapt_on(&mut lane, known, altered, follow))).await;
        match adapted {
            Ok(writer) => {
                let mut writers = HashMap::clone(&self.writers);
                writers.insert(altered.table.version.id, writer);
                self.idle.push(lane);
                self.set_writers(writers);
                Ok(())
            }
            Err(error) => {
                self.broken = true;
                lane.roll_back().await;
                Err(error)
            }
        }
    }

    async fn apply(&mut self, part: Arc<Part<Lsn>>, due: &(dyn Fn(u32, usize) -> bool + Send + Sync), reached: &Reached) -> Result<()> {
        self.usable()?;
        self.accept(part, due, reached).await.inspect_err(|_| self.broken = true)
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
            reached: Reached::default(),
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
        let reached = Reached { joined: joined.to_vec(), own: Vec::new() };
        let apply = self.apply(Arc::new(idle), &|_, _| false, &reached);
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
