//! The simulated writer: parts are planned, written as sets, and committed by the server in its own time.

use crate::faults::{Moment, Point};
use crate::history::{KEYS, Row, TABLES, Tables};
use crate::lane::EarlyLane;
use crate::loads::LOADED_TABLE;
use crate::mutants::Mutant;
use crate::register::SimRegister;
use crate::seen::Rare;
use crate::server::{Effect, Entry, Order, Stored, ended, lost_claim};
use crate::sets;
use crate::tables::by_name;
use crate::target::Connection;
use crate::world::World;
use sluice::connectors::postgres::Lsn;
use sluice::engine::batch::Part;
use sluice::engine::error::{Error, Result, reason};
use sluice::engine::register::{Reached, Register};
use sluice::engine::roles::{Applied, Apply, ApplyMode, Outcome, Proof};
use sluice::engine::table::{MappedTable, QualifiedName, TableState};
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// Parts in flight at a time.
const IN_FLIGHT: usize = 3;

pub struct SimApplier {
    connection: Connection,
    epoch: i64,
    /// The checkpoint after everything that was accepted.
    position: Option<u64>,
    /// The tables after everything that was accepted, while anything is open or in flight.
    tables: Option<Tables>,
    /// Of the transaction that is open: the tables before it.
    open: Option<Tables>,
    /// The connection that it is written on when it was begun with before its end, and the keys that it has written so far.
    lane: Option<Connection>,
    keys: u16,
    early: EarlyLane,
    in_flight: VecDeque<InFlight>,
    /// Positions that are committed and not known to be durable.
    waiting: Vec<u64>,
}

/// A part that was accepted.
enum InFlight {
    /// A piece of a transaction that is still open.
    Piece,
    Sent {
        number: u64,
        position: u64,
        keys: u16,
        /// It is kept until the end.
        _lane: Option<Connection>,
    },
}

impl SimApplier {
    pub fn new(connection: Connection, epoch: i64, position: Option<u64>) -> Self {
        Self {
            connection,
            epoch,
            position,
            tables: None,
            open: None,
            lane: None,
            keys: 0,
            early: EarlyLane::default(),
            in_flight: VecDeque::new(),
            waiting: Vec::new(),
        }
    }

    fn world(&self) -> std::sync::MutexGuard<'_, World> {
        self.connection.reach.world()
    }

    fn require_idle(&self, what: &str) {
        let idle = self.in_flight.is_empty() && self.open.is_none();
        self.world().require(idle, || format!("{what} while parts are in flight"));
    }

    fn register(&self) -> SimRegister<&Connection> {
        SimRegister { connection: &self.connection, epoch: self.epoch }
    }

    async fn commit(&mut self, point: Point, durable: bool, effect: impl FnOnce(&mut Stored) -> Result<()> + Send + 'static) -> Result<()> {
        self.require_idle("a state is written");
        self.connection.transaction(point, self.epoch, None, durable, Box::new(effect)).await
    }

    /// Moves the checkpoint alone.
    async fn move_to(&mut self, point: Point, position: u64, moves: Moves) -> Result<()> {
        let durable = !moves.joined.is_empty() && !self.world().breaks(Mutant::JoinNotOnDisk);
        let effect = move |stored: &mut Stored| moves.write(stored, position);
        self.connection.transaction(point, self.epoch, Some(self.position), durable, Box::new(effect)).await?;
        self.position = self.position.max(Some(position));
        self.waiting.extend(self.position);
        Ok(())
    }

    /// The rest of a transaction of which rows are written: what they leave.
    fn go_on_from_early(&mut self) -> Result<()> {
        let reach = self.connection.reach.clone();
        let mut world = reach.world();
        if let Some(backend) = self.early.backend()
            && world.dice.chance(60)
        {
            // In the last moment, when all pieces were answered.
            world.seen.note(Rare::EarlyLaneLost);
            world.server.end(backend);
        }
        // Its server side ends with it, which must not be while the world is held.
        let (lane, mut rows, is_complete) = self.early.lend(&world);
        if !is_complete {
            let missed = !world.breaks(Mutant::LostPiecesNotMissed);
            drop(world);
            drop(lane);
            if missed {
                return Err(Error::retry(reason::WRITE_REFUSED, "what was written before the end of a transaction is lost"));
            }
            (self.lane, rows) = (None, Vec::new());
            world = reach.world();
        } else {
            self.lane = lane;
        }
        let mut tables = world.server.stored.tables;
        self.open = Some(tables);
        for (key, row) in rows {
            self.keys |= 1 << key;
            let before = tables[LOADED_TABLE][key].replace(row);
            world.require(before.is_none(), || format!("row {key}, which came early, is there"));
        }
        self.tables = Some(tables);
        Ok(())
    }

    fn note(&self, part: &Part<Lsn>, reached: &Reached) {
        let mut world = self.world();
        let (position, stored) = (part.end().0, &world.server.stored);
        let over = stored.position.is_some_and(|held| position > held && part.boundaries.first().is_some_and(|first| first.end.0 <= held));
        let is_copying = |entry: &Option<Entry>| entry.is_some_and(|entry| entry.state == TableState::Copying);
        let beside_copy = stored.states.iter().any(is_copying) && stored.position < Some(position);
        let was_behind = |name: &&QualifiedName| {
            let own = stored.states[by_name(name)].and_then(|entry| entry.position);
            own < stored.position
        };
        let behind = reached.joined.iter().filter(was_behind).count() as u64;
        world.seen.note_all(Rare::JoinedByPart, reached.joined.len() as u64);
        world.seen.note_all(Rare::JoinedFromBehind, behind);
        world.joining = world.joining.max(20 * behind.min(1) as u32);
        world.seen.note_all(Rare::PartOverCheckpoint, (over && behind > 0).into());
        world.seen.note_all(Rare::ReadAgain, reached.own.len() as u64);
        world.seen.note_all(Rare::BesideCopy, beside_copy.into());
    }

    /// Writes the due rows of a part on top of everything accepted before.
    fn write(&mut self, part: &Part<Lsn>, due: &(dyn Fn(u32, usize) -> bool + Send + Sync)) -> Result<Tables> {
        let mut world = self.connection.reach.world();
        if !world.server.is_alive(self.connection.backend) {
            return Err(ended());
        }
        let before = self.tables.unwrap_or(world.server.stored.tables);
        let wrong = |index: usize| {
            // The rule with ≥ for >, told from what the target holds.
            let end = part.boundaries.iter().find(|boundary| boundary.changes > index).map(|boundary| boundary.end.0);
            world.breaks(Mutant::DueByGreaterOrEqual)
                && world.server.stored.states.iter().flatten().any(|entry| entry.position.is_some() && entry.position == end)
        };
        let due: Vec<bool> = part
            .batch
            .changes()
            .iter()
            .enumerate()
            .map(|(index, change)| {
                let table = part.batch.table(change).id;
                let end = part.boundaries.iter().find(|boundary| boundary.changes > index).map(|boundary| boundary.end.0);
                let passed_over = world.breaks(Mutant::DueByCheckpoint) && end <= world.server.stored.position;
                (due(table, index) && !passed_over) || (wrong(index) && world.server.stored.states[table as usize].is_some())
            })
            .collect();
        world.seen.note_all(Rare::NotDue, due.iter().filter(|due| !**due).count() as u64);
        check_definitions(&mut world, part, &due)?;
        self.keys |= sets::loaded_keys(&part.batch, &due);
        let mutant = world.mutant;
        match sets::apply(&before, &part.batch, &due, mutant, &mut world.dice) {
            Ok((after, of_equal)) => {
                world.seen.note_all(Rare::OneOfEqualRows, of_equal);
                Ok(after)
            }
            Err(what) => {
                // One whose claim is lost sees another's rows, and will never commit.
                if world.server.stored.epoch == self.epoch || world.breaks(Mutant::FenceLeftOut) {
                    world.violated(|| what.clone());
                }
                Err(Error::stop(reason::WRITE_REFUSED, what))
            }
        }
    }
}

impl SimApplier {
    /// Whether a piece goes on where the one before has ended, or a connection was made for it.
    fn may_go_on_early(&mut self, continues: bool) -> bool {
        let reach = self.connection.reach.clone();
        if self.early.is_open() {
            return continues || reach.world().breaks(Mutant::EarlyNotRolledBack);
        }
        if continues || reach.world().dice.chance(30) {
            return false;
        }
        self.early.begin(Connection::open(&reach));
        // A claim that came before the session had its name has not seen it; a server that has crashed may have forgotten commits.
        let world = reach.world();
        world.server.stored.epoch == self.epoch && world.server.is_alive(self.connection.backend)
    }

    fn roll_back_early(&mut self) {
        let reach = self.connection.reach.clone();
        let connection = self.early.roll_back(&mut reach.world());
        drop(connection);
    }

    /// Whether a part is being written that touches one of these keys.
    fn is_writing(&self, keys: u16) -> bool {
        let world = self.world();
        let touches = |part: &InFlight| match part {
            InFlight::Piece => false,
            InFlight::Sent { number, keys: theirs, .. } => theirs & keys != 0 && !world.server.is_over(*number),
        };
        !world.breaks(Mutant::EarlyBesideItsForerunners) && self.in_flight.iter().any(touches)
    }
}

impl Proof for SimApplier {
    async fn prove(&mut self) -> Result<()> {
        self.connection.reach.io(Point::Prove).await?;
        let world = self.world();
        match world.server.stored.epoch == self.epoch {
            false => Err(lost_claim()),
            true if world.server.is_alive(self.connection.backend) => Ok(()),
            true => Err(ended()),
        }
    }
}

impl Register for SimApplier {
    type Position = Lsn;

    async fn begin_copy(&mut self, table: &MappedTable, beside: &[&MappedTable], truncate: bool) -> Result<i64> {
        self.require_idle("a copy begins");
        self.register().begin_copy(table, beside, truncate).await
    }

    async fn set_state(&mut self, table: &MappedTable, state: TableState, position: Option<&Lsn>) -> Result<()> {
        self.require_idle("a state is written");
        self.register().set_state(table, state, position).await
    }

    async fn done_ranges(&mut self, table: &MappedTable, generation: i64) -> Result<Vec<i32>> {
        self.register().done_ranges(table, generation).await
    }
}

impl Apply for SimApplier {
    async fn intend_log(&mut self) -> Result<()> {
        let intend = |stored: &mut Stored| {
            stored.intended = true;
            Ok(())
        };
        self.commit(Point::IntendLog, true, intend).await
    }

    async fn initialize(&mut self, position: &Lsn, timeline: i64) -> Result<()> {
        let position = position.0;
        let initialize = move |stored: &mut Stored| {
            stored.timeline = timeline;
            match stored.position.replace(position) {
                Some(before) => Err(Error::bug(format!("the first checkpoint was written over one at {before}"))),
                None => Ok(()),
            }
        };
        self.commit(Point::Initialize, true, initialize).await?;
        self.position = Some(position);
        Ok(())
    }

    async fn start_over(&mut self) -> Result<()> {
        Err(Error::bug("nothing is given up here"))
    }

    async fn set_timeline(&mut self, timeline: i64) -> Result<()> {
        self.world().seen.note(Rare::WentOnAfterFailover);
        let set = move |stored: &mut Stored| {
            stored.timeline = timeline;
            Ok(())
        };
        self.commit(Point::SetTimeline, true, set).await
    }

    async fn forget(&mut self, tables: &[QualifiedName]) -> Result<()> {
        let tables: Vec<usize> = tables.iter().map(by_name).collect();
        let forget = move |stored: &mut Stored| {
            tables.iter().for_each(|table| stored.states[*table] = None);
            Ok(())
        };
        self.commit(Point::Forget, true, forget).await
    }

    async fn prepare(&mut self, _: &[MappedTable]) -> Result<()> {
        self.connection.reach.io(Point::Prepare).await
    }

    async fn apply(&mut self, part: Arc<Part<Lsn>>, due: &(dyn Fn(u32, usize) -> bool + Send + Sync), reached: &Reached) -> Result<()> {
        self.connection.reach.io(Point::Apply).await?;
        let idle = self.in_flight.is_empty();
        if part.continues && self.open.is_none() {
            self.world().require(idle, || "the rest of a transaction comes while parts are in flight".into());
            self.go_on_from_early()?;
        }
        let open = self.open.is_some();
        self.world().require(part.continues == open, || "a part does not continue what is open".into());
        self.world().require(reached.is_empty() || idle, || "tables move while parts are in flight".into());
        let before = self.open.or(self.tables).unwrap_or(self.world().server.stored.tables);
        let after = self.write(&part, due)?;
        self.tables = Some(after);
        if part.open {
            self.world().seen.note(Rare::OpenPart);
            self.open = Some(before);
            self.in_flight.push_back(InFlight::Piece);
            return Ok(());
        }
        self.open = None;
        let (lane, keys) = (self.lane.take(), std::mem::take(&mut self.keys));
        self.note(&part, reached);
        let (position, moves) = (part.end().0, Moves::new(reached, &self.world()));
        let (from, patch) = (self.position, Patch::between(&before, &after));
        if self.world().breaks(Mutant::CheckpointBeforeData) {
            self.move_to(Point::Advance, position, moves.clone()).await?;
        }
        self.position = self.position.max(Some(position));
        let from = if self.world().breaks(Mutant::CheckpointBeforeData) { self.position } else { from };
        let apart = lane.is_some() && self.world().breaks(Mutant::EarlyCheckpointApart);
        let effect: Effect = Box::new(move |stored| {
            patch.write(stored);
            if apart { Ok(()) } else { moves.write(stored, position) }
        });
        let backend = lane.as_ref().map_or(self.connection.backend, |lane| lane.backend);
        let durable = !reached.joined.is_empty() && !self.world().breaks(Mutant::JoinNotOnDisk);
        let order = Order { backend, epoch: self.epoch, from: Some(from), durable, keys, effect: Some(effect) };
        let number = self.world().server.send(order)?;
        let behind = self.in_flight.iter().any(|part| matches!(part, InFlight::Sent { .. }));
        self.world().seen.note_all(Rare::BehindAnother, behind.into());
        let position = self.position.unwrap_or(position);
        self.in_flight.push_back(InFlight::Sent { number, position, keys, _lane: lane });
        self.connection.reach.strike(Point::Apply, Moment::Committing).await
    }

    fn early_tables(&self) -> HashSet<u32> {
        [LOADED_TABLE as u32].into()
    }

    async fn apply_early(&mut self, piece: Arc<Part<Lsn>>) -> Result<bool> {
        self.connection.reach.io(Point::ApplyEarly).await?;
        let rows = sets::inserted(&piece.batch).map_err(Error::bug)?;
        let keys = rows.iter().fold(0, |keys, (key, _)| keys | 1 << key);
        if !self.may_go_on_early(piece.continues) {
            self.roll_back_early();
            return Ok(false);
        }
        // What its rows had to wait for on the source was accepted before it, and must be there before it.
        while self.is_writing(keys) {
            self.world().work();
            self.connection.reach.step().await;
        }
        let Some(backend) = self.early.backend() else { return Ok(false) };
        let order = Order { backend, epoch: self.epoch, from: None, durable: false, keys, effect: None };
        let Ok(number) = self.world().server.send(order) else {
            self.roll_back_early();
            return Ok(false);
        };
        self.early.sent(number, rows);
        Ok(true)
    }

    fn drop_early(&mut self) {
        if !self.world().breaks(Mutant::EarlyNotRolledBack) {
            self.roll_back_early();
        }
    }

    async fn outcome(&mut self) -> Result<Outcome> {
        loop {
            let over = match self.in_flight.front() {
                Some(InFlight::Piece) => true,
                Some(InFlight::Sent { number, .. }) => self.world().server.is_over(*number),
                None => false,
            };
            if over {
                return self.applied().await.map(Outcome::Part);
            }
            let (early, idle) = {
                let reach = self.connection.reach.clone();
                let mut world = reach.world();
                // Somebody ends it, or it was in somebody's way.
                if let Some(backend) = self.early.backend()
                    && world.dice.chance(10)
                {
                    world.seen.note(Rare::EarlyLaneLost);
                    world.server.end(backend);
                }
                (self.early.outcome(&mut world), self.in_flight.is_empty() && !self.early.is_writing())
            };
            if let Some(outcome) = early {
                if outcome.is_none() {
                    self.roll_back_early();
                }
                return Ok(Outcome::Early(outcome));
            }
            if idle {
                tokio::time::sleep(Duration::from_millis(10)).await;
            } else {
                self.world().work();
            }
            self.connection.reach.step().await;
        }
    }

    fn has_room(&self) -> bool {
        self.in_flight.len() < IN_FLIGHT
    }

    async fn applied(&mut self) -> Result<Option<Applied>> {
        self.connection.reach.lives().await;
        let Some(InFlight::Sent { number, position, .. }) = self.in_flight.front() else {
            return Ok(self.in_flight.pop_front().map(|_| Applied::default()));
        };
        let position = *position;
        self.connection.outcome(*number).await?;
        self.in_flight.pop_front();
        if self.in_flight.is_empty() && self.open.is_none() {
            self.tables = None;
        }
        self.waiting.push(position);
        self.connection.reach.strike(Point::Apply, Moment::After).await?;
        Ok(Some(Applied { committed: true, ..Applied::default() }))
    }

    async fn advance(&mut self, position: &Lsn, joined: &[QualifiedName]) -> Result<()> {
        let idle = self.in_flight.is_empty() && self.open.is_none();
        self.world().require(idle, || "an idle position is written while parts are in flight".into());
        self.world().seen.note_all(Rare::JoinedIdle, joined.len() as u64);
        let reached = Reached { joined: joined.to_vec(), own: Vec::new() };
        let moves = Moves::new(&reached, &self.world());
        self.move_to(Point::Advance, position.0, moves).await
    }

    async fn durable(&mut self) -> Result<Option<Lsn>> {
        self.connection.reach.lives().await;
        let (alive, flushed) = {
            let world = self.world();
            let stored = if world.breaks(Mutant::ConfirmBeforeDurable) { &world.server.stored } else { &world.server.flushed };
            (world.server.is_alive(self.connection.backend), stored.position)
        };
        if !alive {
            return Err(ended());
        }
        let passed = self.waiting.iter().filter(|waiting| Some(**waiting) <= flushed).max().copied();
        self.waiting.retain(|waiting| Some(*waiting) > flushed);
        Ok(passed.map(Lsn))
    }

    async fn abort(self) {
        let backends = [Some(self.connection.backend), self.early.backend(), self.lane.as_ref().map(|lane| lane.backend)];
        backends.into_iter().flatten().for_each(|backend| self.world().server.end(backend));
    }

    fn mode(&self) -> ApplyMode {
        self.world().mode
    }
}

/// Rows under another definition than the mapped one can be skipped, not written.
fn check_definitions(world: &mut World, part: &Part<Lsn>, due: &[bool]) -> Result<()> {
    for (change, due) in part.batch.changes().iter().zip(due) {
        let Some(difference) = &part.batch.table(change).differs else { continue };
        if *due && !world.breaks(Mutant::DefinitionNotCompared) || world.breaks(Mutant::DefinitionJudgedTooEarly) {
            world.seen.note(Rare::DefinitionRefused);
            return Err(Error::stop(reason::SCHEMA_CHANGED, difference.clone()));
        }
        world.seen.note(Rare::OldDefinitionSkipped);
    }
    Ok(())
}

/// The rows that a transaction leaves changed.
struct Patch([[Option<Option<Row>>; KEYS]; TABLES]);

impl Patch {
    fn between(before: &Tables, after: &Tables) -> Self {
        let row = |table: usize, key: usize| (before[table][key] != after[table][key]).then_some(after[table][key]);
        Self(std::array::from_fn(|table| std::array::from_fn(|key| row(table, key))))
    }

    fn write(&self, stored: &mut Stored) {
        for (held, patch) in stored.tables.iter_mut().flatten().zip(self.0.iter().flatten()) {
            if let Some(row) = patch {
                *held = *row;
            }
        }
    }
}

/// What a commit of the stream makes of checkpoint and tables.
#[derive(Clone)]
struct Moves {
    joined: Vec<usize>,
    own: Vec<usize>,
    /// The checkpoint goes back to where the log is read again.
    goes_back: bool,
}

impl Moves {
    fn new(reached: &Reached, world: &World) -> Self {
        let [joined, own] = [&reached.joined, &reached.own].map(|names| names.iter().map(by_name).collect::<Vec<_>>());
        let own = if world.breaks(Mutant::OwnPositionApart) { Vec::new() } else { own };
        Self { joined, goes_back: world.breaks(Mutant::CheckpointGoesBack) && !own.is_empty(), own }
    }

    fn write(&self, stored: &mut Stored, position: u64) -> Result<()> {
        let Some(held) = stored.position else { return Err(Error::bug("the checkpoint was moved before its first position was written")) };
        if position < held && !self.joined.is_empty() {
            return Err(Error::bug(format!("tables join at {position}, before the checkpoint at {held}")));
        }
        stored.position = Some(if self.goes_back { position } else { held.max(position) });
        for table in &self.joined {
            let entry = stored.entry(*table);
            (entry.state, entry.position) = (TableState::Ready, None);
        }
        for table in &self.own {
            let entry = stored.entry(*table);
            if entry.state != TableState::CatchingUp || entry.position >= Some(position) || position >= held {
                return Err(Error::bug(format!("{entry:?} moves to {position}, the checkpoint is at {held}")));
            }
            entry.position = Some(position);
        }
        Ok(())
    }
}
