//! The simulated target: claims, copied ranges, and the connections that they use.

use crate::applier::SimApplier;
use crate::faults::{Moment, Point};
use crate::history::{KEYLESS_TABLE, KEYS, Row, in_order};
use crate::mutants::Mutant;
use crate::register::SimRegister;
use crate::seen::Rare;
use crate::server::{Effect, Entry, Order, Stored, ended, lost_claim};
use crate::tables::{number, table};
use crate::world::Reach;
use futures::TryStreamExt as _;
use sluice::connectors::postgres::Lsn;
use sluice::engine::error::{Error, Result, reason};
use sluice::engine::roles::{
    Builders, BulkFormat, BulkStream, Checkpoint, Claim, Claimed, Fed, Owner, Range, SourceIdentity, StreamKey, TableCheckpoint, Target,
    Tell,
};
use sluice::engine::structure::SequenceValue;
use sluice::engine::table::{MappedTable, TableState};

/// How often a claim looks whether the checkpoint's row is free before it gives up.
const LOCK_TRIES: u32 = 200;

/// A connection; what it has sent stays when it is dropped.
pub struct Connection {
    pub reach: Reach,
    pub backend: usize,
}

impl Connection {
    pub fn open(reach: &Reach) -> Self {
        let backend = reach.world().server.connect();
        Self { reach: reach.clone(), backend }
    }

    /// One transaction, from its beginning to the answer.
    pub async fn transaction(&self, point: Point, epoch: i64, from: Option<Option<u64>>, durable: bool, effect: Effect) -> Result<()> {
        self.reach.io(point).await?;
        let order = Order { backend: self.backend, epoch, from, durable, keys: 0, effect: Some(effect) };
        let number = self.reach.world().server.send(order)?;
        self.reach.strike(point, Moment::Committing).await?;
        self.outcome(number).await?;
        self.reach.strike(point, Moment::After).await
    }

    /// Waits for the outcome of what was sent.
    pub async fn outcome(&self, number: u64) -> Result<()> {
        loop {
            if let Some(outcome) = self.reach.world().server.outcome(number) {
                return outcome;
            }
            self.reach.world().work();
            self.reach.step().await;
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut world = self.reach.world();
        let hangs = world.dice.chance(300);
        world.server.disconnect(self.backend, hangs);
    }
}

#[derive(Clone)]
pub struct SimTarget(pub Reach);

impl SimTarget {
    fn may_claim(&self, held: Option<i64>) -> Result<()> {
        let mut world = self.0.world();
        if held.is_some_and(|held| world.server.stored.epoch > held) && !world.breaks(Mutant::FenceLeftOut) {
            world.seen.note(Rare::Fenced);
            return Err(lost_claim());
        }
        Ok(())
    }

    async fn end_old_claim(&self) -> Result<()> {
        for _ in 0..LOCK_TRIES {
            {
                let mut world = self.0.world();
                let left_alone = world.breaks(Mutant::OldBackendsNotEnded) || world.breaks(Mutant::FenceLeftOut);
                // The early lane's session has the name of the claim, like those of range copies.
                if world.breaks(Mutant::EarlyLaneLeftAlone) {
                    world.server.end_all_but_early();
                } else if !left_alone {
                    world.server.end_all();
                }
                if !world.server.is_locked() || world.breaks(Mutant::FenceLeftOut) {
                    return Ok(());
                }
            }
            self.0.step().await;
        }
        Err(Error::retry(reason::FENCED, "the checkpoint's row is locked"))
    }
}

impl Target for SimTarget {
    type Position = Lsn;
    type Applier = SimApplier;
    type Register = SimRegister;

    async fn check(&self, _: &SourceIdentity, _: &[MappedTable], _: &[Fed]) -> Result<Vec<String>> {
        self.0.io(Point::Check).await?;
        Ok(Vec::new())
    }

    async fn claim(&self, key: &StreamKey, owner: &Owner, held: Option<i64>) -> Result<(Claimed<Lsn>, SimApplier)> {
        self.0.io(Point::Claim).await?;
        self.may_claim(held)?;
        self.end_old_claim().await?;
        let connection = Connection::open(&self.0);
        let (stored, claim) = {
            let mut world = self.0.world();
            world.server.stored.epoch += 1;
            world.server.logged(true);
            let stored = world.server.stored;
            (stored, Claim { key: key.clone(), epoch: stored.epoch })
        };
        self.0.has_claimed(claim.epoch);
        // What the catalog says now, which has nothing to do with what was copied.
        let today = self.0.world().breaks(Mutant::CopiedDefinitionForgotten);
        let definition = |number, entry: &Entry| if today { self.0.world().history.visible_definition(number) } else { entry.definition };
        self.0.strike(Point::Claim, Moment::After).await?;
        let kept = self.0.world().breaks(Mutant::CopyBeyondSwitchKept);
        let switch = stored.position.filter(|_| kept).and_then(|_| self.0.world().history.left_timeline_at(stored.timeline));
        let tables = stored
            .states
            .iter()
            .enumerate()
            .filter_map(|(number, entry)| entry.map(|entry| known(number, definition(number, &entry), &entry, switch)));
        let checkpoint = stored.position.map(|position| Checkpoint {
            position: Lsn(position),
            timeline: stored.timeline,
            owner: owner.clone(),
            rows_streamed: 0,
            tables: tables.map(|table| (table.source.clone(), table)).collect(),
        });
        let applier = SimApplier::new(connection, claim.epoch, stored.position);
        Ok((Claimed { claim, checkpoint, log_intended: stored.intended, requests: Vec::new() }, applier))
    }

    async fn register(&self, claim: &Claim) -> Result<SimRegister> {
        self.0.io(Point::Register).await?;
        Ok(SimRegister { connection: Connection::open(&self.0), epoch: claim.epoch })
    }

    async fn bulk_format(&self, _: &MappedTable) -> Result<BulkFormat> {
        Ok(BulkFormat::PostgresText)
    }

    async fn load(
        &self,
        claim: &Claim,
        table: &MappedTable,
        generation: i64,
        range: &Range,
        _: BulkFormat,
        rows: BulkStream,
    ) -> Result<u64> {
        let connection = Connection::open(&self.0);
        let text: Vec<u8> = rows.try_collect::<Vec<_>>().await?.concat();
        let rows: Vec<(usize, Row)> = String::from_utf8_lossy(&text).lines().map(parse).collect();
        let (table, bit, count, epoch) = (number(table), 1 << range.number, rows.len() as u64, claim.epoch);
        if !self.0.world().server.is_alive(connection.backend) {
            return Err(ended());
        }
        let load = move |stored: &mut Stored| {
            if !is_copying(stored, table, generation) && stored.epoch != epoch {
                return Err(lost_claim());
            }
            if !is_copying(stored, table, generation) {
                let entry = stored.states[table];
                return Err(Error::bug(format!("a range of table {table}, generation {generation}, came too late: {entry:?}")));
            }
            if stored.entry(table).done & bit != 0 {
                return Err(Error::retry(reason::WRITE_REFUSED, "an earlier try has come through"));
            }
            for (key, row) in rows {
                let held = stored.rows(table);
                let free = if table == KEYLESS_TABLE { held.iter().position(Option::is_none) } else { held[key].is_none().then_some(key) };
                let Some(free) = free else {
                    return Err(Error::bug(format!("row {key} of table {table} was copied twice")));
                };
                held[free] = Some(row);
            }
            *stored.rows(table) = in_order(table, *stored.rows(table));
            Ok(())
        };
        let done = move |stored: &mut Stored| {
            stored.entry(table).done |= bit;
            Ok(())
        };
        if self.0.world().breaks(Mutant::DoneRowApart) {
            connection.transaction(Point::Load, claim.epoch, None, false, Box::new(load)).await?;
            connection.transaction(Point::Load, claim.epoch, None, false, Box::new(done)).await?;
        } else {
            let both = move |stored: &mut Stored| load(stored).and_then(|()| done(stored));
            connection.transaction(Point::Load, claim.epoch, None, false, Box::new(both)).await?;
        }
        Ok(count)
    }

    async fn finish(&self, claim: &Claim, _: &MappedTable, _: &[SequenceValue], _: Builders, _: Tell<'_>) -> Result<()> {
        Connection::open(&self.0).transaction(Point::Finish, claim.epoch, None, true, Box::new(|_| Ok(()))).await
    }

    async fn relate(&self, _: &Claim, _: &[MappedTable], _: Tell<'_>) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

/// `at_most`: a later position is not told.
fn known(number: usize, definition: usize, entry: &Entry, at_most: Option<u64>) -> TableCheckpoint<Lsn> {
    let table = table(number, definition);
    TableCheckpoint {
        source: table.source().clone(),
        target: table.target.clone(),
        state: entry.state,
        generation: entry.generation,
        position: entry.position.map(|position| Lsn(position.min(at_most.unwrap_or(position)))),
        rows_copied: 0,
        columns: table.signature(),
        error: None,
    }
}

fn is_copying(stored: &Stored, table: usize, generation: i64) -> bool {
    stored.states[table].is_some_and(|entry| entry.state == TableState::Copying && entry.generation == generation)
}

fn parse(line: &str) -> (usize, Row) {
    let numbers: Vec<u32> = line.split(' ').map(|number| number.parse().expect("a number")).collect();
    let [key, unique, value, toast] = numbers[..] else { panic!("four columns") };
    assert!((key as usize) < KEYS);
    (key as usize, Row { unique, value, toast })
}
