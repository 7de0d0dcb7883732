//! The steady state: parts of the log are applied in order, what is durable is confirmed.
//!
//! The applier may hold several parts in flight. What is known of the stream moves only with their outcomes: the
//! checkpoint of the hand-over is the one that is committed. Whatever else is written (states, joins, an idle stream's
//! position) waits until nothing is in flight.
//!
//! Where tables lie behind the checkpoint, the log is opened at the position of the first of them and read again: its changes are due
//! for those tables alone, and the others wait until they have joined.
//!
//! A large transaction of the source may be written while it is open there (`early`). Its pieces stand beside all of this: nothing
//! waits for them but the rest of their transaction.

use super::altered::Versions;
use super::batch::Part;
use super::early::{Early, Step};
use super::error::{Class, Error, Result, reason};
use super::flow::{ReadyStream, Stop, StreamConfig};
use super::handover::Handover;
use super::heartbeat::Heartbeat;
use super::position::Position as _;
use super::progress::{Phase, Progress};
use super::register::Reached;
use super::resume::left_publication;
use super::roles::{Applied, Apply, ChangeLog, Outcome, Source};
use super::table::{MappedTable, TableState, TableVersion};
use std::collections::{HashSet, VecDeque};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// How often durable positions are looked for and shown.
const TICK: Duration = Duration::from_millis(200);
/// How often an idle stream writes its position into the checkpoint.
const IDLE_ADVANCE: Duration = Duration::from_secs(10);
/// How often the publication is compared with what should be in it, besides each time the log describes a table anew.
const MEMBERSHIP_CHECK: Duration = Duration::from_secs(60);
/// Bound for writing a message into the source's log.
const HEARTBEAT_LIMIT: Duration = Duration::from_secs(5);
/// Bound for rolling back when the session is told to end.
const ABORT_LIMIT: Duration = Duration::from_secs(1);

struct Follower<'a, S: Source, A> {
    source: &'a S,
    log: S::Log,
    tables: Vec<MappedTable>,
    handover: Handover<S::Position>,
    applier: A,
    progress: &'a Progress,
    /// Other tables are copied meanwhile.
    beside_copy: bool,
    /// Parts that the applier has accepted and whose outcome is not known yet, in order.
    in_flight: VecDeque<Arc<Part<S::Position>>>,
    /// A transaction of the source that is larger than a batch and not committed yet.
    open: Option<Open<S::Position>>,
    /// Whether the last part that was accepted left its transaction open.
    part_is_open: bool,
    /// A transaction that is open on the source.
    early: Early,
    /// Pieces of it that the applier has accepted and whose outcome is not known yet, in order.
    early_in_flight: VecDeque<Arc<Part<S::Position>>>,
    /// Nothing but this stream changes target tables any more: locks may be held on them for long.
    related: &'a AtomicBool,
    /// Descriptions of tables that have been looked at.
    versions: Versions,
    follow_schema: bool,
    /// An idle source's position that is not in the checkpoint yet.
    idle: Option<S::Position>,
    idle_since: Instant,
    membership_checked: Instant,
    heartbeat: Heartbeat<S::Position>,
    /// Descriptions of tables that the last check of the membership has seen.
    announced: u64,
}

/// A transaction of the source that is larger than a batch.
struct Open<P> {
    commit_start: Option<P>,
    bytes: usize,
}

/// The next part. Beside others it pays only for large ones: small ones cost a transaction each and are better left to grow.
async fn next<L: ChangeLog>(log: &mut L, beside: bool) -> Result<Part<L::Position>> {
    if beside { log.next_grown().await } else { log.next().await }
}

/// Does a step that takes as long as the target likes; what has become of the log meanwhile is shown.
async fn shown<L: ChangeLog, T>(log: &L, progress: &Progress, checkpoint: &L::Position, step: impl Future<Output = T>) -> T {
    let mut step = pin!(step);
    loop {
        if let Ok(done) = tokio::time::timeout(TICK, &mut step).await {
            return done;
        }
        progress.set_load(log.load());
        let (received, head) = log.received();
        progress.set_position(&received, checkpoint, &head);
    }
}

/// The next session begins the transaction again, and writes nothing of its tables early.
fn written_under_another_version() -> Error {
    Error::retry(reason::SCHEMA_CHANGED, "a table was altered in a transaction of which rows were written before it had ended")
}

/// What made a step.
enum Event<P> {
    Part(Arc<Part<P>>),
    Outcome(Outcome),
    Tick,
    Finish,
}

/// Follows the log until told to end. `related`: from when on nothing else changes the target's tables.
pub(super) async fn follow<S, A>(
    source: &S,
    ready: ReadyStream<S, A>,
    config: &StreamConfig,
    progress: &Progress,
    stop: &Stop,
    related: &AtomicBool,
) -> Result<()>
where
    S: Source,
    A: Apply<Position = S::Position>,
{
    let ReadyStream { tables, handover, applier, beside_copy } = ready;
    let start = handover.start();
    let log = tokio::select! {
        biased;
        () = stop.now.cancelled() => return Ok(()),
        log = source.open(&start, &tables, config.limits) => log?,
    };
    let now = Instant::now();
    let heartbeat = Heartbeat::new(handover.checkpoint().clone(), now.into_std());
    let mut follower = Follower {
        source,
        log,
        tables,
        handover,
        applier,
        progress,
        beside_copy,
        in_flight: VecDeque::new(),
        open: None,
        part_is_open: false,
        early: Early::default(),
        early_in_flight: VecDeque::new(),
        related,
        versions: Versions::default(),
        follow_schema: config.follow_schema,
        idle: None,
        idle_since: now,
        membership_checked: now,
        heartbeat,
        announced: 0,
    };
    let result = tokio::select! {
        biased;
        () = stop.now.cancelled() => None,
        result = follower.run(stop) => Some(result),
    };
    if let Some(open) = &follower.open {
        progress.rolled_back(open.commit_start.as_ref().map(ToString::to_string), open.bytes);
    }
    match result {
        Some(Err(error)) => Err(error),
        // Told to end: what is running is cancelled and an open transaction rolled back; the position stays.
        Some(Ok(())) | None => {
            let _ = tokio::time::timeout(ABORT_LIMIT, follower.applier.abort()).await;
            Ok(())
        }
    }
}

impl<S: Source, A: Apply<Position = S::Position>> Follower<'_, S, A> {
    async fn run(&mut self, stop: &Stop) -> Result<()> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.show_phase();
        loop {
            let event = tokio::select! {
                biased;
                // An open transaction is finished first: its rest is on its way.
                () = stop.finish.cancelled(), if self.open.is_none() => Event::Finish,
                _ = tick.tick() => Event::Tick,
                outcome = self.applier.outcome(), if !self.in_flight.is_empty() || self.early.is_open() => Event::Outcome(outcome?),
                part = next(&mut self.log, !self.in_flight.is_empty()), if self.applier.has_room() => Event::Part(Arc::new(part?)),
            };
            match event {
                Event::Finish => {
                    self.settle().await?;
                    return self.confirm().await;
                }
                Event::Tick => self.tick().await?,
                Event::Outcome(Outcome::Part(applied)) => self.applied(applied).await?,
                Event::Outcome(Outcome::Early(applied)) => self.early_applied(applied)?,
                Event::Part(part) if part.early.is_some() => self.apply_early(part).await?,
                Event::Part(part) if part.is_idle() => self.note_idle(part.received.clone()).await?,
                Event::Part(part) => self.apply(part).await?,
            }
        }
    }

    async fn apply(&mut self, part: Arc<Part<S::Position>>) -> Result<()> {
        let reached = self.reached(&part);
        let goes_on_from_early = part.continues && !self.part_is_open;
        if !reached.is_empty() || goes_on_from_early || (part.open && !part.continues) {
            self.settle().await?;
        }
        if goes_on_from_early {
            self.go_on_from_early().await?;
        }
        self.follow_schema(&part, goes_on_from_early).await?;
        let Self { log, progress, handover, applier, .. } = self;
        let due = |table: u32, index: usize| handover.is_due(&part, table, index);
        // It may have to wait for parts in flight.
        shown(log, progress, handover.checkpoint(), applier.apply(Arc::clone(&part), &due, &reached)).await?;
        self.part_is_open = part.open;
        if part.open {
            let open = self.open.get_or_insert(Open { commit_start: part.open_from.clone(), bytes: 0 });
            open.bytes += part.batch.size();
        }
        self.in_flight.push_back(part);
        if !reached.is_empty() {
            self.settle().await?;
        }
        Ok(())
    }

    /// Before rows under a new description of their table are applied the target is made what they take.
    async fn follow_schema(&mut self, part: &Part<S::Position>, goes_on_from_early: bool) -> Result<()> {
        let handover = &self.handover;
        for version in self.versions.unseen(part, |table, index| handover.is_due(part, table, index)) {
            if Box::pin(self.look(version)).await? && goes_on_from_early {
                return Err(written_under_another_version());
            }
        }
        Ok(())
    }

    /// Looks what has become of a table, and follows it. Says whether it was altered.
    async fn look(&mut self, version: Arc<TableVersion>) -> Result<bool> {
        let Some(place) = self.tables.iter().position(|table| table.version.id == version.id) else { return Ok(false) };
        let applied = self.handover.start();
        let altered = self.source.look(&self.tables[place], &version, &applied).await?;
        let Some(altered) = altered else {
            let in_doubt = self.versions.is_in_doubt(version.id);
            self.versions.looked(version, in_doubt);
            return Ok(false);
        };
        self.settle().await?;
        if let Some((attempt, _)) = self.early.end() {
            self.drop_early();
            self.log.early(attempt, false)?;
        }
        let Self { log, progress, handover, applier, tables, .. } = self;
        shown(log, progress, handover.checkpoint(), applier.adapt(&tables[place], &altered, self.follow_schema)).await?;
        self.versions.looked(version, altered.key_in_doubt);
        self.tables[place] = altered.table;
        Ok(true)
    }

    /// What the commit of a part makes of tables. Where nothing is written, it need not be known that they have come further.
    fn reached(&self, part: &Part<S::Position>) -> Reached {
        if part.open {
            return Reached::default();
        }
        let mut reached = self.handover.reached(part.end());
        if !reached.own.is_empty() && !part.continues && !self.handover.has_due(part) {
            reached.own.clear();
        }
        reached
    }

    /// Which tables' rows may be written before their transaction has ended: those of which all that comes is due, and while nothing
    /// else wants to change the tables. While the log is read again, what has not ended where it is read may be applied already.
    fn want_early(&mut self) {
        let may_begin = self.related.load(Ordering::Acquire) && self.handover.behind().next().is_none();
        // One that is behind may have been altered by then.
        let behind: HashSet<u32> = self.tables.iter().filter(|table| table.lineage.behind).map(|table| table.version.id).collect();
        let joined = may_begin.then(|| self.handover.joined().filter(|table| !behind.contains(table)));
        let possible = self.applier.early_tables();
        let tables = joined.into_iter().flatten().filter(|table| possible.contains(table)).collect();
        if self.early.set_tables(tables) {
            self.log.want_early(self.early.tables().clone());
        }
    }

    /// A part about a transaction that has not ended.
    async fn apply_early(&mut self, part: Arc<Part<S::Position>>) -> Result<()> {
        let Some(mark) = part.early else { return Ok(()) };
        let refused = match self.early.step(&part, mark) {
            Step::Write(attempt) => {
                // It may have to wait for parts in flight.
                let Self { log, progress, handover, applier, .. } = self;
                if shown(log, progress, handover.checkpoint(), applier.apply_early(Arc::clone(&part))).await? {
                    self.versions.add_early(&part);
                    self.early_in_flight.push_back(part);
                    return Ok(());
                }
                attempt
            }
            Step::Refuse(attempt) => attempt,
            Step::RollBack => {
                self.drop_early();
                return Ok(());
            }
        };
        self.drop_early();
        self.log.early(refused, false)
    }

    fn drop_early(&mut self) {
        self.applier.drop_early();
        self.early_in_flight.clear();
        self.early.end();
        self.versions.end_early();
    }

    /// The oldest piece is over.
    fn early_applied(&mut self, applied: Option<Applied>) -> Result<()> {
        if let Some(applied) = applied {
            let bytes = self.early_in_flight.pop_front().map_or(0, |part| part.batch.size());
            return self.early.written(applied, bytes).map_or(Ok(()), |attempt| self.log.early(attempt, true));
        }
        self.early_in_flight.clear();
        self.versions.end_early();
        self.early.end().map_or(Ok(()), |(attempt, _)| self.log.early(attempt, false))
    }

    /// The transaction of the pieces has ended, and its rest follows: what was written counts from now on.
    async fn go_on_from_early(&mut self) -> Result<()> {
        for version in self.versions.end_early() {
            let Some(table) = self.tables.iter().find(|table| table.version.id == version.id) else { continue };
            if self.source.look(table, &version, &self.handover.start()).await?.is_some() {
                return Err(written_under_another_version());
            }
        }
        if let Some((_, written)) = self.early.end() {
            self.progress.applied(written.applied, written.bytes, None);
        }
        Ok(())
    }

    /// Waits until nothing is in flight.
    async fn settle(&mut self) -> Result<()> {
        while !self.in_flight.is_empty() {
            let Self { log, progress, handover, applier, .. } = self;
            let applied = shown(log, progress, handover.checkpoint(), applier.applied()).await?;
            self.applied(applied).await?;
        }
        Ok(())
    }

    /// The oldest part in flight is over.
    async fn applied(&mut self, applied: Option<Applied>) -> Result<()> {
        let (Some(applied), Some(part)) = (applied, self.in_flight.pop_front()) else {
            return Err(Error::bug("a part that was accepted has no outcome"));
        };
        let checkpoint = self.handover.checkpoint().clone();
        if !part.open {
            if part.continues && self.open.take().is_some() {
                self.progress.large_transaction_ended();
            }
            self.moved(part.end());
        }
        // What is read again says nothing of how fast changes arrive.
        let new = part.boundaries.iter().filter(|boundary| boundary.end > checkpoint);
        let commits = new.map(|boundary| boundary.committed_at);
        self.progress.applied(applied, part.batch.size(), commits);
        self.heartbeat.came(self.log.received().1, Instant::now().into_std());
        self.show_position();
        self.confirm().await
    }

    fn moved(&mut self, position: &S::Position) {
        let waiting = self.handover.waiting();
        self.handover.moved(position.clone());
        self.idle.take_if(|idle| *idle <= *position);
        self.idle_since = Instant::now();
        if waiting != self.handover.waiting() {
            self.show_phase();
        }
    }

    /// The source has nothing for us up to this position. It goes through the checkpoint before it is confirmed, but not
    /// each time: an idle stream should not keep the target busy.
    async fn note_idle(&mut self, received: S::Position) -> Result<()> {
        let joins = !self.handover.reached(&received).joined.is_empty();
        self.idle = (joins || received > *self.handover.checkpoint()).then_some(received);
        if self.handover.waiting() > 0 {
            self.settle().await?;
            self.advance().await?;
        }
        Ok(())
    }

    /// Only when nothing is in flight.
    async fn advance(&mut self) -> Result<()> {
        let Some(position) = self.idle.take() else { return Ok(()) };
        let joined = self.handover.reached(&position).joined;
        self.applier.advance(&position, &joined).await?;
        self.moved(&position);
        Ok(())
    }

    async fn tick(&mut self) -> Result<()> {
        self.progress.set_load(self.log.load());
        if self.in_flight.is_empty() && self.open.is_none() && self.idle_since.elapsed() >= IDLE_ADVANCE {
            self.advance().await?;
            self.idle_since = Instant::now();
        }
        let announced = self.log.announced();
        if announced != self.announced || self.membership_checked.elapsed() >= MEMBERSHIP_CHECK {
            self.settle().await?;
            if self.open.is_none() {
                self.announced = announced;
                self.membership_checked = Instant::now();
                self.check_membership().await?;
            }
        }
        self.want_early();
        self.progress.set_early(self.early.bytes());
        self.confirm().await?;
        self.show_position();
        self.show_behind();
        self.write_heartbeat().await;
        Ok(())
    }

    /// Where the log moves and nothing in it is for us, a message of our own makes the stream move and shows its latency.
    async fn write_heartbeat(&mut self) {
        let waits = !self.in_flight.is_empty() || self.open.is_some();
        if waits || !self.heartbeat.is_due(&self.log.received().1, Instant::now().into_std()) {
            return;
        }
        match tokio::time::timeout(HEARTBEAT_LIMIT, self.source.mark()).await {
            Ok(Err(error)) if error.class != Class::Retry => {
                tracing::info!(%error, "the source takes no messages of ours: none is written any more");
                self.heartbeat.refused();
            }
            // Nothing depends on it: the next one is tried in its time, and a source that is gone ends the log too.
            Ok(Err(_) | Ok(())) | Err(_) => {}
        }
    }

    /// Only what is durable on the target is confirmed to the source, and nothing that a table still needs.
    async fn confirm(&mut self) -> Result<()> {
        if let Some(durable) = self.applier.durable().await? {
            let confirmed = self.handover.confirmable(durable);
            self.log.confirm(&confirmed);
            self.progress.set_confirmed(&confirmed);
        }
        Ok(())
    }

    /// A table can be taken out of a publication without a word in the log (`DROP COLUMN … CASCADE` of a listed column
    /// does it): what happened to it since is gone.
    async fn check_membership(&mut self) -> Result<()> {
        let published = self.source.published().await?;
        for table in self.tables.iter().filter(|table| !published.contains(table.source())) {
            if self.handover.leave(table.source()) {
                self.applier.set_state(table, TableState::Error, None).await?;
                self.progress.set_step(table.source(), None);
                self.progress.table_failed(table.source(), left_publication());
            }
        }
        Ok(())
    }

    fn show_phase(&self) {
        for (name, state) in self.handover.states().filter(|(_, state)| *state != TableState::Error) {
            self.progress.set_table(name, state);
            self.progress.set_step(name, None);
        }
        self.progress.set_phase(match self.handover.waiting() {
            _ if self.beside_copy => Phase::Copying,
            0 => Phase::Streaming,
            _ => Phase::CatchingUp,
        });
    }

    /// Says how much of the log is left to be read again, while the other tables wait for it.
    fn show_behind(&self) {
        let left = self.handover.checkpoint().bytes_since(&self.log.received().0);
        for name in self.handover.behind() {
            let left = left.map(|bytes| format!("{} MiB of ", bytes >> 20)).unwrap_or_default();
            self.progress.set_step(name, Some(format!("{left}the log are read again for {name}; other tables wait until then")));
        }
    }

    fn show_position(&self) {
        let (received, head) = self.log.received();
        // While nothing is waiting here, what an idle source has sent counts as applied: it held nothing for us.
        let idle = self.idle.as_ref().filter(|_| self.in_flight.is_empty());
        let applied = idle.unwrap_or_else(|| self.handover.checkpoint());
        self.progress.set_position(&received, applied, &head);
    }
}
