//! The simulated writer: parts are planned, written as sets, and committed by the server in its own time.

use crate::faults::{Moment, Point};
use crate::history::{KEYS, Row, Rows, TABLES, Tables};
use crate::mutants::Mutant;
use crate::seen::Rare;
use crate::server::{Effect, Entry, Stored, ended, lost_claim};
use crate::sets;
use crate::source::{by_name, definition, number};
use crate::target::Connection;
use crate::world::World;
use sluice::connectors::postgres::Lsn;
use sluice::engine::batch::Part;
use sluice::engine::error::{Error, Result, reason};
use sluice::engine::roles::{Applied, Apply, ApplyMode, Proof};
use sluice::engine::table::{MappedTable, QualifiedName, TableState};
use std::collections::VecDeque;
use std::sync::Arc;

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
    },
}

impl SimApplier {
    pub fn new(connection: Connection, epoch: i64, position: Option<u64>) -> Self {
        Self { connection, epoch, position, tables: None, open: None, in_flight: VecDeque::new(), waiting: Vec::new() }
    }

    fn world(&self) -> std::sync::MutexGuard<'_, World> {
        self.connection.reach.world()
    }

    async fn commit(&mut self, point: Point, durable: bool, effect: impl FnOnce(&mut Stored) -> Result<()> + Send + 'static) -> Result<()> {
        let idle = self.in_flight.is_empty() && self.open.is_none();
        self.world().require(idle, || format!("{point:?} while parts are in flight"));
        self.connection.transaction(point, self.epoch, None, durable, Box::new(effect)).await
    }

    /// Moves the checkpoint alone.
    async fn move_to(&mut self, point: Point, position: u64, joined: Vec<usize>) -> Result<()> {
        let effect = move |stored: &mut Stored| move_to(stored, position, &joined);
        self.connection.transaction(point, self.epoch, Some(self.position), false, Box::new(effect)).await?;
        self.position = Some(position);
        self.waiting.push(position);
        Ok(())
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
                due(table, index) || (wrong(index) && world.server.stored.states[table as usize].is_some())
            })
            .collect();
        world.seen.note_all(Rare::NotDue, due.iter().filter(|due| !**due).count() as u64);
        check_definitions(&mut world, part, &due)?;
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

impl Apply for SimApplier {
    type Position = Lsn;

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

    async fn set_timeline(&mut self, timeline: i64) -> Result<()> {
        self.world().seen.note(Rare::WentOnAfterFailover);
        let set = move |stored: &mut Stored| {
            stored.timeline = timeline;
            Ok(())
        };
        self.commit(Point::SetTimeline, true, set).await
    }

    async fn begin_copy(&mut self, table: &MappedTable, _: &[&MappedTable], _: bool) -> Result<i64> {
        let (table, definition) = (number(table), definition(table));
        {
            let mut world = self.world();
            if world.server.stored.states[table].is_some_and(|entry| entry.copied_at > 0 && entry.definition != definition) {
                world.seen.note(Rare::CopiedUnderNewDefinition);
            }
        }
        let begin = move |stored: &mut Stored| {
            *stored.rows(table) = Rows::default();
            let generation = stored.entry(table).generation + 1;
            *stored.entry(table) = Entry::copying(generation, definition);
            Ok(())
        };
        self.commit(Point::BeginCopy, true, begin).await?;
        Ok(self.world().server.stored.entry(table).generation)
    }

    async fn set_state(&mut self, table: &MappedTable, state: TableState, position: Option<&Lsn>) -> Result<()> {
        match state {
            TableState::Error => self.world().seen.note(Rare::LeftPublication),
            TableState::Init => self.world().seen.note(Rare::CopyBeyondSwitch),
            _ => {}
        }
        let (table, position) = (number(table), position.map(|position| position.0));
        let at_once = state == TableState::CatchingUp && self.world().breaks(Mutant::JoinAtOnce);
        let set = move |stored: &mut Stored| {
            let entry = stored.entry(table);
            entry.copied_at = position.unwrap_or(entry.copied_at);
            (entry.state, entry.position) = if at_once { (TableState::Ready, None) } else { (state, position) };
            Ok(())
        };
        self.commit(Point::SetState, true, set).await
    }

    async fn forget(&mut self, tables: &[QualifiedName]) -> Result<()> {
        let tables: Vec<usize> = tables.iter().map(by_name).collect();
        let forget = move |stored: &mut Stored| {
            tables.iter().for_each(|table| stored.states[*table] = None);
            Ok(())
        };
        self.commit(Point::Forget, true, forget).await
    }

    async fn done_ranges(&mut self, table: &MappedTable, generation: i64) -> Result<Vec<i32>> {
        self.connection.reach.io(Point::DoneRanges).await?;
        let entry = *self.world().server.stored.entry(number(table));
        let done = (0..32).filter(|range| entry.generation == generation && entry.done & (1 << range) != 0);
        Ok(done.collect())
    }

    async fn prepare(&mut self, _: &[MappedTable]) -> Result<()> {
        self.connection.reach.io(Point::Prepare).await
    }

    async fn apply(
        &mut self,
        part: Arc<Part<Lsn>>,
        due: &(dyn Fn(u32, usize) -> bool + Send + Sync),
        joined: &[QualifiedName],
    ) -> Result<()> {
        self.connection.reach.io(Point::Apply).await?;
        let (open, idle) = (self.open.is_some(), self.in_flight.is_empty());
        self.world().require(part.continues == open, || "a part does not continue what is open".into());
        self.world().require(joined.is_empty() || idle, || "tables join while parts are in flight".into());
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
        self.world().seen.note_all(Rare::JoinedByPart, joined.len() as u64);
        let (position, joined) = (part.end().0, joined.iter().map(by_name).collect::<Vec<_>>());
        let (from, patch) = (self.position, Patch::between(&before, &after));
        if self.world().breaks(Mutant::CheckpointBeforeData) {
            self.move_to(Point::Advance, position, joined.clone()).await?;
        }
        self.position = Some(position);
        let from = if self.world().breaks(Mutant::CheckpointBeforeData) { self.position } else { from };
        let effect: Effect = Box::new(move |stored| {
            patch.write(stored);
            move_to(stored, position, &joined)
        });
        let number = self.world().server.send(self.connection.backend, self.epoch, Some(from), false, effect)?;
        let behind = self.in_flight.iter().any(|part| matches!(part, InFlight::Sent { .. }));
        self.world().seen.note_all(Rare::BehindAnother, behind.into());
        self.in_flight.push_back(InFlight::Sent { number, position });
        self.connection.reach.strike(Point::Apply, Moment::Committing).await
    }

    fn has_room(&self) -> bool {
        self.in_flight.len() < IN_FLIGHT
    }

    async fn applied(&mut self) -> Result<Option<Applied>> {
        self.connection.reach.lives().await;
        let Some(InFlight::Sent { number, position }) = self.in_flight.front() else {
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
        self.move_to(Point::Advance, position.0, joined.iter().map(by_name).collect()).await
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
        let backend = self.connection.backend;
        self.world().server.end(backend);
    }

    fn mode(&self) -> ApplyMode {
        ApplyMode::Replica
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

fn move_to(stored: &mut Stored, position: u64, joined: &[usize]) -> Result<()> {
    if stored.position.is_none_or(|held| held > position) {
        return Err(Error::bug(format!("the checkpoint goes from {:?} back to {position}", stored.position)));
    }
    stored.position = Some(position);
    for table in joined {
        let entry = stored.entry(*table);
        (entry.state, entry.position) = (TableState::Ready, None);
    }
    Ok(())
}
