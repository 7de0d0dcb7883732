//! The simulated writer of what becomes of tables: the stream's own, or one beside it.

use crate::faults::Point;
use crate::history::Rows;
use crate::mutants::Mutant;
use crate::seen::Rare;
use crate::server::{Entry, Stored};
use crate::tables::{definition, number};
use crate::target::Connection;
use crate::world::World;
use sluice::connectors::postgres::Lsn;
use sluice::engine::error::Result;
use sluice::engine::register::Register;
use sluice::engine::table::{MappedTable, TableState};
use std::borrow::Borrow;
use std::sync::MutexGuard;

pub struct SimRegister<C = Connection> {
    pub connection: C,
    pub epoch: i64,
}

impl<C: Borrow<Connection>> SimRegister<C> {
    fn world(&self) -> MutexGuard<'_, World> {
        self.connection.borrow().reach.world()
    }

    /// Whether it was copied under the definition that it is mapped under.
    fn is_known_as(&self, table: &MappedTable) -> bool {
        self.world().server.stored.states[number(table)].is_some_and(|entry| entry.definition == definition(table))
    }

    async fn commit(&self, point: Point, effect: impl FnOnce(&mut Stored) -> Result<()> + Send + 'static) -> Result<()> {
        self.connection.borrow().transaction(point, self.epoch, None, true, Box::new(effect)).await
    }
}

impl<C: Borrow<Connection> + Send + Sync> Register for SimRegister<C> {
    type Position = Lsn;

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
        self.commit(Point::BeginCopy, begin).await?;
        Ok(self.world().server.stored.entry(table).generation)
    }

    async fn set_state(&mut self, table: &MappedTable, state: TableState, position: Option<&Lsn>) -> Result<()> {
        match state {
            TableState::Error => self.world().seen.note(Rare::LeftPublication),
            TableState::Init if self.is_known_as(table) => self.world().seen.note(Rare::CopyBeyondSwitch),
            _ => {}
        }
        if state == TableState::Init && self.world().breaks(Mutant::OldCopyTakenForGood) {
            return Ok(());
        }
        let (table, position) = (number(table), position.map(|position| position.0));
        let at_once = state == TableState::CatchingUp && self.world().breaks(Mutant::JoinAtOnce);
        let set = move |stored: &mut Stored| {
            let entry = stored.entry(table);
            entry.copied_at = position.unwrap_or(entry.copied_at);
            (entry.state, entry.position) = if at_once { (TableState::Ready, None) } else { (state, position) };
            Ok(())
        };
        self.commit(Point::SetState, set).await
    }

    async fn done_ranges(&mut self, table: &MappedTable, generation: i64) -> Result<Vec<i32>> {
        self.connection.borrow().reach.io(Point::DoneRanges).await?;
        let entry = *self.world().server.stored.entry(number(table));
        let done = (0..32).filter(|range| entry.generation == generation && entry.done & (1 << range) != 0);
        Ok(done.collect())
    }
}
