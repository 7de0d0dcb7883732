//! The simulated source: slot, snapshots, publication.

use crate::faults::{Moment, Point};
use crate::fence::{ConsistentPoint, Lock, Statement, unreachable};
use crate::history::TABLES;
use crate::log::SimLog;
use crate::mutants::Mutant;
use crate::seen::Rare;
use crate::tables::{MAPPED, by_name, number, table};
use crate::world::{Reach, World};
use sluice::connectors::postgres::Lsn;
use sluice::engine::error::{Error, Result, reason};
use sluice::engine::roles::{
    BatchLimits, BulkFormat, BulkStream, Fed, LogState, Proof, Range, Selection, Snapshot, Source, SourceIdentity,
};
use sluice::engine::structure::SequenceValue;
use sluice::engine::table::{MappedTable, QualifiedName};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Ranges of each table.
const RANGES: usize = 2;

/// The clock stands still while anybody has something to do.
const READ_PAUSE: Duration = Duration::from_millis(40);

/// How often it is looked whether the locks are free before the taking is given up.
const LOCK_TRIES: u32 = 200;

pub struct SimSource {
    reach: Reach,
    /// The timeline that this session has seen.
    timeline: AtomicI64,
    /// The sessions that change the source, by their lock. The log goes on with the second one.
    sessions: Mutex<[Option<usize>; 2]>,
    /// The slot as it was first seen.
    first_look: Mutex<Option<Option<LogState<Lsn>>>>,
}

impl SimSource {
    pub fn new(reach: Reach) -> Self {
        Self { reach, timeline: AtomicI64::new(0), sessions: Mutex::default(), first_look: Mutex::default() }
    }

    /// A replication session must be on the server that was seen.
    fn timeline(&self) -> Result<i64> {
        let (world, seen) = (self.reach.world(), self.timeline.load(Ordering::Relaxed));
        let is_same = world.history.timeline() == seen || world.breaks(Mutant::TimelineNotCompared);
        if is_same { Ok(world.history.timeline()) } else { Err(unreachable()) }
    }

    fn sessions(&self) -> std::sync::MutexGuard<'_, [Option<usize>; 2]> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session that has taken the source for what needs this lock, and no other one.
    fn fenced(&self, lock: Lock) -> Result<usize> {
        self.sessions()[lock as usize].filter(|session| self.reach.world().source.serves(*session)).ok_or_else(unreachable)
    }

    /// Has a statement run that changes the source, from its sending to the answer.
    async fn run(&self, point: Point, session: usize, statement: Statement) -> Result<Option<ConsistentPoint>> {
        self.reach.world().source.send(session, statement)?;
        self.reach.strike(point, Moment::Committing).await?;
        let answer = loop {
            {
                let mut world = self.reach.world();
                if let Some(answer) = world.source.answer(session)? {
                    break answer;
                }
                world.serve_source();
                let World { history, dice, .. } = &mut *world;
                (0..3).for_each(|_| history.step(dice));
            }
            self.reach.step().await;
        };
        self.reach.strike(point, Moment::After).await?;
        answer
    }

    async fn make_slot(&self, point: Point, session: usize, lasting: bool) -> Result<SimSnapshot> {
        let timeline = self.timeline()?;
        let made = self.run(point, session, Statement::MakeSlot { lasting, waits_for: None }).await?;
        let point = made.ok_or_else(|| Error::bug("a slot without a consistent point"))?;
        self.publish_late().await?;
        Ok(SimSnapshot { reach: self.reach.clone(), timeline, position: Lsn(point.position), point })
    }

    async fn alter(&self, wanted: [bool; TABLES]) -> Result<()> {
        let now = self.reach.world().history.published();
        if now == wanted {
            return Ok(());
        }
        let [add, remove] = [(wanted, now), (now, wanted)].map(|(these, those)| std::array::from_fn(|table| these[table] && !those[table]));
        self.run(Point::Publish, self.fenced(Lock::Statements)?, Statement::Alter { add, remove }).await.map(drop)
    }

    async fn publish_late(&self) -> Result<()> {
        let late = self.reach.world().late_publication.take();
        match late {
            Some(tables) => self.alter(tables).await,
            None => Ok(()),
        }
    }

    /// Ends whoever holds these locks, as far as the claim stands *after* they were seen.
    async fn end_holders(&self, held: &[Lock], claim: &mut impl Proof) -> Result<()> {
        let [without_proof, seen_late] =
            [Mutant::HoldersEndedWithoutProof, Mutant::HoldersSeenAfterProof].map(|mutant| self.reach.world().breaks(mutant));
        if seen_late {
            claim.prove().await?;
            self.reach.io(Point::Take).await?;
        }
        let seen: Vec<usize> = held.iter().filter_map(|lock| self.reach.world().source.holder(*lock)).collect();
        if !without_proof && !seen_late {
            claim.prove().await?;
        }
        self.reach.io(Point::Take).await?;
        if !self.reach.world().breaks(Mutant::HoldersNotEnded) {
            seen.iter().for_each(|session| self.reach.world().end_holder(*session, self.reach.epoch()));
        }
        self.reach.world().serve_source();
        self.reach.step().await;
        Ok(())
    }
}

impl Drop for SimSource {
    fn drop(&mut self) {
        let sessions = *self.sessions();
        sessions.into_iter().flatten().for_each(|session| self.reach.leave_source(session));
    }
}

impl Source for SimSource {
    type Position = Lsn;
    type Snapshot = SimSnapshot;
    type Log = SimLog;

    async fn identity(&self) -> Result<SourceIdentity> {
        self.reach.io(Point::Identity).await?;
        let timeline = self.reach.world().history.timeline();
        self.timeline.store(timeline, Ordering::Relaxed);
        Ok(SourceIdentity { system_identifier: "1".into(), database: "d".into(), timeline })
    }

    async fn tables(&self, selection: &Selection) -> Result<Vec<MappedTable>> {
        self.reach.io(Point::Tables).await?;
        let Selection::Tables(tables) = selection else { panic!("the simulation selects tables") };
        let world = self.reach.world();
        let mapped = |number| table(number, world.history.visible_definition(number)).clone();
        Ok(tables.iter().map(|selected| mapped(by_name(&selected.source))).collect())
    }

    async fn fed(&self, _: &[MappedTable]) -> Result<Vec<Fed>> {
        Ok(Vec::new())
    }

    /// As src/connectors/postgres/fence.rs does it: the locks first, then the proof that the claim still stands.
    async fn take<P: Proof>(&self, claim: &mut P) -> Result<()> {
        self.reach.io(Point::Take).await?;
        self.timeline()?;
        let sessions = Lock::ALL.map(|_| self.reach.world().source.connect(self.reach.epoch()));
        *self.sessions() = sessions.map(Some);
        for _ in 0..LOCK_TRIES {
            let mut held = Vec::new();
            for (lock, session) in Lock::ALL.into_iter().zip(sessions) {
                let mut world = self.reach.world();
                if !world.source.try_lock(session, lock)? && !world.breaks(Mutant::SourceNotTaken) {
                    held.push(lock);
                }
            }
            if held.is_empty() {
                self.reach.io(Point::Take).await?;
                if !self.reach.world().breaks(Mutant::NoProofAfterLock) {
                    claim.prove().await?;
                }
                self.reach.world().source_taken(self.reach.epoch());
                return Ok(());
            }
            self.end_holders(&held, claim).await?;
        }
        Err(Error::retry(reason::SLOT_IN_USE, "another worker's session does not end"))
    }

    async fn publish(&self, tables: &[MappedTable], present: &[QualifiedName]) -> Result<()> {
        self.reach.io(Point::Publish).await?;
        let wanted: [bool; TABLES] = std::array::from_fn(|wanted| tables.iter().any(|table| number(table) == wanted));
        let now = self.reach.world().history.published();
        let left = present.iter().map(by_name).any(|table| wanted[table] && !now[table]);
        if left && !self.reach.world().breaks(Mutant::LeavingNotNoticed) {
            self.reach.world().seen.note(Rare::LeftAtTheLastMoment);
            return Err(Error::retry(reason::LEFT_PUBLICATION, "a table was taken out just now"));
        }
        self.reach.world().asked_to_publish = wanted;
        if self.reach.world().breaks(Mutant::PublishAfterSnapshot) {
            self.reach.world().late_publication = Some(wanted);
            return Ok(());
        }
        self.alter(wanted).await
    }

    async fn published(&self) -> Result<Vec<QualifiedName>> {
        self.reach.io(Point::Published).await?;
        let world = self.reach.world();
        let blind = world.breaks(Mutant::LeavingNotNoticed).then_some(world.asked_to_publish);
        let published = blind.or(world.late_publication).unwrap_or(world.history.published());
        Ok(MAPPED.iter().zip(published).filter(|(_, published)| *published).map(|([table, ..], _)| table.source().clone()).collect())
    }

    async fn log_state(&self) -> Result<Option<LogState<Lsn>>> {
        self.reach.io(Point::LogState).await?;
        let mut world = self.reach.world();
        // What a slot in the making will send is not known: nobody holds all that came before it.
        let making = world.source.is_making_slot().then_some(u64::MAX);
        let confirmed = world.history.slot.map(|slot| slot.confirmed).or(making);
        let now = confirmed.map(|confirmed| LogState { confirmed: Lsn(confirmed), lost: None, active: None });
        let mut first = self.first_look.lock().unwrap_or_else(PoisonError::into_inner);
        let first = first.get_or_insert_with(|| now.clone());
        world.seen.note_all(Rare::SlotChangedBeforeTake, (first.is_some() != now.is_some()).into());
        Ok(if world.breaks(Mutant::LookedOnlyBeforeTake) { first.clone() } else { now })
    }

    async fn create_log(&self) -> Result<SimSnapshot> {
        self.reach.io(Point::CreateLog).await?;
        self.make_slot(Point::CreateLog, self.fenced(Lock::Slots)?, true).await
    }

    async fn drop_log(&self) -> Result<()> {
        self.reach.io(Point::DropLog).await?;
        self.run(Point::DropLog, self.fenced(Lock::Statements)?, Statement::DropSlot).await.map(drop)
    }

    async fn snapshot(&self) -> Result<SimSnapshot> {
        self.reach.io(Point::Snapshot).await?;
        // A session of its own, without a lock: nothing of a temporary slot outlives it.
        let session = Passing::open(&self.reach);
        self.make_slot(Point::Snapshot, session.number, false).await
    }

    async fn open(&self, from: &Lsn, tables: &[MappedTable], limits: BatchLimits) -> Result<SimLog> {
        self.reach.io(Point::Open).await?;
        self.publish_late().await?;
        let timeline = self.timeline()?;
        self.fenced(Lock::Statements)?;
        let session = self.fenced(Lock::Slots)?;
        let world = self.reach.world();
        let Some(slot) = world.history.slot else {
            return Err(Error::stop(reason::CHECKPOINT_WITHOUT_SLOT, "there is no slot"));
        };
        if slot.confirmed > from.0 {
            return Err(Error::stop(reason::CHECKPOINT_BEHIND_SLOT, format!("{from} can't be read, the slot is at {}", slot.confirmed)));
        }
        self.sessions()[Lock::Slots as usize] = None;
        drop(world);
        Ok(SimLog::open(self.reach.clone(), session, timeline, from.0, tables, limits.rows))
    }

    async fn left_timeline_at(&self, timeline: i64) -> Result<Option<Lsn>> {
        self.reach.io(Point::LeftTimeline).await?;
        self.timeline()?;
        let world = self.reach.world();
        let left_at = world.history.left_timeline_at(timeline);
        Ok(if world.breaks(Mutant::SwitchPointLeftOut) { Some(Lsn(u64::MAX)) } else { left_at.map(Lsn) })
    }

    async fn head(&self) -> Result<Lsn> {
        Ok(Lsn(self.reach.world().history.end))
    }

    async fn mark(&self) -> Result<()> {
        self.reach.io(Point::Mark).await?;
        {
            let mut world = self.reach.world();
            let World { history, dice, .. } = &mut *world;
            history.mark(dice);
        }
        self.reach.strike(Point::Mark, Moment::After).await
    }

    async fn sequence_values(&self, _: &MappedTable) -> Result<Vec<SequenceValue>> {
        Ok(Vec::new())
    }

    fn waiting(&self) -> Option<String> {
        None
    }
}

/// A session that ends with what it was opened for.
struct Passing {
    reach: Reach,
    number: usize,
}

impl Passing {
    fn open(reach: &Reach) -> Self {
        let number = reach.world().source.connect(reach.epoch());
        Self { reach: reach.clone(), number }
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        self.reach.leave_source(self.number);
    }
}

pub struct SimSnapshot {
    reach: Reach,
    timeline: i64,
    position: Lsn,
    point: ConsistentPoint,
}

impl SimSnapshot {
    /// A reader takes a lock, and sees whether the table is still the one that the snapshot knows.
    async fn enter(&self, table: usize) -> Result<()> {
        while self.reach.world().history.is_being_altered(table) {
            self.reach.step().await;
            let mut world = self.reach.world();
            let World { history, dice, .. } = &mut *world;
            history.step(dice);
        }
        let mut world = self.reach.world();
        if (world.history.timeline(), world.history.definition(table)) == (self.timeline, self.point.definitions[table]) {
            return Ok(());
        }
        world.seen.note(Rare::SnapshotLost);
        Err(Error::retry(reason::SNAPSHOT_LOST, "the table was rewritten, or the server is gone"))
    }
}

impl Snapshot for SimSnapshot {
    type Position = Lsn;

    fn position(&self) -> &Lsn {
        &self.position
    }

    fn ranges(&self, _: &MappedTable, _: u64) -> Vec<Range> {
        (0..RANGES).map(|number| Range { number: number as i32, blocks: Some((number as u64, number as u64 + 1)) }).collect()
    }

    /// A range is every second key; its bytes are lines of numbers.
    async fn read(&self, table: &MappedTable, range: &Range, _: BulkFormat) -> Result<BulkStream> {
        self.reach.io(Point::Read).await?;
        let rounds = self.reach.world().long_read();
        for _ in 0..rounds {
            tokio::time::sleep(READ_PAUSE).await;
            self.reach.step().await;
        }
        self.enter(number(table)).await?;
        let rows = &self.point.tables[number(table)];
        let mut text = String::new();
        for (key, row) in rows.iter().enumerate().skip(range.number as usize).step_by(RANGES) {
            if let Some(row) = row {
                writeln!(text, "{key} {} {} {}", row.unique, row.value, row.toast).expect("text");
            }
        }
        Ok(Box::pin(futures::stream::iter([Ok(text.into_bytes().into())])))
    }

    async fn close(self) {}
}
