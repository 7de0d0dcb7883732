//! Everything that outlives a worker, and the check of it.

use crate::dice::Dice;
use crate::faults::{Fault, Faults, Moment, Point};
use crate::fence::SourceServer;
use crate::history::{History, TABLES};
use crate::mutants::Mutant;
use crate::oracle::{Held, Oracle};
use crate::seen::{Rare, Seen};
use crate::server::{Entry, Server, Stored};
use sluice::engine::error::{Error, Result, reason};
use sluice::engine::roles::ApplyMode;
use sluice::engine::table::TableState;
use std::pin::Pin;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use tokio_util::sync::CancellationToken;

/// A right engine needs a small part of this.
const STEPS: u64 = 30_000;

pub struct World {
    pub dice: Dice,
    pub history: History,
    pub server: Server,
    pub source: SourceServer,
    /// What was asked of the publication, where that is done too late.
    pub late_publication: Option<[bool; TABLES]>,
    /// What was last asked of the publication.
    pub asked_to_publish: [bool; TABLES],
    pub faults: Faults,
    /// The rule that is broken on purpose.
    pub mutant: Option<Mutant>,
    pub seen: Seen,
    /// What must never be.
    pub violation: Option<String>,
    /// The round ends when the target is level with the source.
    last_round: bool,
    pub round_over: CancellationToken,
    /// Tables of the round.
    pub mapped: [bool; TABLES],
    /// The target holds what the source never had, or the slot is gone: people must begin anew.
    pub given_up: bool,
    oracles: [Oracle; TABLES],
    steps_left: u64,
    round_left: u32,
    /// Where the target stood when the last commit left nothing to be done about any table but by people.
    settled_at: Option<u64>,
    /// Tables that had left the publication and are not mapped.
    out: [bool; TABLES],
    restless: bool,
    /// How often, of a thousand times, the target's server does nothing.
    slow: u32,
    /// How often, of a thousand calls, a worker does nothing for long.
    pauses: u32,
    /// How often, of a thousand times, the reading of a range takes long while the stream goes on.
    long_reads: u32,
    /// Steps for which the target crashes more easily, since a table joins that was behind the checkpoint.
    pub joining: u32,
    /// Transactions that users begin meanwhile.
    writes_beside: u32,
    to_the_end: bool,
    /// How the target's role may write.
    pub mode: ApplyMode,
}

impl World {
    pub fn new(seed: u64, mutant: Option<Mutant>) -> Self {
        let mut dice = Dice::new(seed);
        let writes = [0, 20, 40, 60][dice.below(4) as usize];
        let history = History::new(writes, &mut dice);
        let faults = Faults::new(&mut dice);
        let (restless, to_the_end) = (dice.chance(500), dice.chance(200));
        let mode = if dice.chance(150) { ApplyMode::Ordered } else { ApplyMode::Replica };
        let slow = [0, 0, 600, 800][dice.below(4) as usize];
        let pauses = [0, 0, 3, 15][dice.below(4) as usize];
        let long_reads = [0, 0, 0, 500][dice.below(4) as usize];
        Self {
            history,
            server: Server::default(),
            source: SourceServer::default(),
            late_publication: None,
            asked_to_publish: [false; TABLES],
            faults,
            mutant,
            seen: Seen::default(),
            violation: None,
            last_round: false,
            round_over: CancellationToken::new(),
            mapped: [false; TABLES],
            given_up: false,
            oracles: Default::default(),
            steps_left: STEPS,
            round_left: 0,
            settled_at: None,
            out: [false; TABLES],
            restless,
            slow,
            pauses,
            long_reads,
            joining: 0,
            writes_beside: 24,
            to_the_end,
            mode,
            dice,
        }
    }

    pub fn breaks(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    /// A round begins. A table that has left the publication is taken out of the mirror; by and by, or when it has been forgotten,
    /// it is added again.
    pub fn begin_round(&mut self, last: bool) -> CancellationToken {
        for table in 0..TABLES {
            let state = self.server.stored.states[table].map(|entry| entry.state);
            let chosen = last || table == 0 || self.dice.chance(700);
            self.out[table] |= state == Some(TableState::Error);
            self.mapped[table] = chosen && state != Some(TableState::Error);
            if self.out[table] && self.mapped[table] {
                self.out[table] = false;
                self.seen.note(Rare::CameBack);
            }
        }
        self.round_left = 20 + self.dice.below(300);
        self.last_round = last;
        self.round_over = CancellationToken::new();
        if last {
            self.faults.end();
        }
        self.compare();
        self.round_over.clone()
    }

    /// Something that must not be has been seen: the first one is kept.
    pub fn violated(&mut self, what: impl FnOnce() -> String) {
        self.violation.get_or_insert_with(what);
        self.round_over.cancel();
    }

    pub fn require(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.violated(what);
        }
    }

    /// A step of the worker, and what others do meanwhile.
    pub fn step(&mut self) {
        self.seen.steps += 1;
        self.steps_left = self.steps_left.saturating_sub(1);
        if self.steps_left == 0 {
            let what =
                format!("the target never becomes level with the source: {:?}, the log ends at {}", self.server.stored, self.history.end);
            self.violated(|| what);
        }
        if self.last_round {
            // Up to the last transaction; to the end of the log it takes an idle stream ten seconds.
            let end = if self.to_the_end { self.history.end } else { self.history.last_end() };
            if self.history.is_over() && self.settled_at.is_some_and(|position| position >= end) {
                self.round_over.cancel();
            }
        } else {
            self.wear_out(1);
        }
        match self.dice.below(16) {
            0 => self.history.step(&mut self.dice),
            1 if self.restless => self.history.step(&mut self.dice),
            2 => self.server.flush_some(&mut self.dice),
            3..=8 => self.work(),
            9..=10 => self.serve_source(),
            _ => {}
        }
        let tries = if self.joining > 0 { 10 } else { 1 };
        self.joining = self.joining.saturating_sub(1);
        if (0..tries).any(|_| self.faults.disaster(&mut self.dice)) {
            self.seen.note(Rare::TargetCrash);
            let lost = self.server.crash();
            self.seen.note_all(Rare::CommitLost, lost);
        }
        if self.dice.chance(250) && self.faults.disaster(&mut self.dice) {
            self.seen.note(Rare::SourceCrash);
            self.history.crash();
            self.source.crash();
        }
        if self.dice.chance(6) && self.history.take_out(&mut self.dice) {
            self.seen.note(Rare::TakenOut);
        }
        if self.dice.chance(3) && self.history.fail_over(&mut self.dice) {
            self.seen.note(Rare::Failover);
            self.source.crash();
            self.settled_at = None;
        }
    }

    /// Steps that a worker sleeps through before its next call.
    fn pause(&mut self, point: Point, is_lost: bool) -> u32 {
        // Between a claim and what is done on the source under it much may happen, most of all when there is nothing yet.
        let is_new = self.server.stored.position.is_none();
        let (often, longest) = match point {
            Point::Take if is_new => (30, 150),
            Point::CreateLog if is_new => (30, 100),
            Point::Take => (10, 100),
            _ => (1, 100),
        };
        let (chance, longest) = if is_lost { (80, 300) } else { (self.pauses * often, longest) };
        if self.last_round || chance == 0 || !self.dice.chance(chance) {
            return self.dice.below(2);
        }
        self.seen.note(Rare::Paused);
        let steps = 20 + self.dice.below(longest);
        self.round_left += steps;
        steps
    }

    /// How long the reading of a range takes beyond its steps. Meanwhile users write, and the stream goes on.
    pub fn long_read(&mut self) -> u32 {
        if self.server.stored.position.is_none() || !self.dice.chance(self.long_reads) {
            return 0;
        }
        let (rounds, writes) = (5 + self.dice.below(20), self.dice.below(8).min(self.writes_beside));
        self.writes_beside -= writes;
        self.history.writes_left += writes;
        self.round_left += 4 * rounds;
        rounds
    }

    /// Takes so many steps off the round.
    pub fn wear_out(&mut self, steps: u32) {
        self.round_left = self.round_left.saturating_sub(steps);
        if self.round_left == 0 && !self.last_round {
            self.round_over.cancel();
        }
    }

    /// The target's server goes on with one of the transactions that it has been sent.
    pub fn work(&mut self) {
        if self.dice.chance(self.slow) {
            return;
        }
        let any_order = self.breaks(Mutant::LaterPartCommitsFirst);
        let fenced = !self.breaks(Mutant::FenceLeftOut);
        match self.server.work(&mut self.dice, fenced, any_order) {
            Ok(None) => {}
            Ok(Some(committed)) => {
                self.seen.note_all(Rare::OrphanCommitted, committed.orphan.into());
                self.committed();
            }
            Err(violation) => self.violated(|| violation),
        }
    }

    /// The oracle, asked at every commit: a table whose rows are all there equals the source's history, applied row by
    /// row, up to the position that its copy or the stream has reached.
    fn committed(&mut self) {
        self.seen.commits += 1;
        let stored = &self.server.stored;
        self.seen.digest =
            (self.seen.digest ^ stored.position.unwrap_or(1) ^ (stored.epoch as u64) << 32).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.compare();
    }

    fn compare(&mut self) {
        self.settled_at = None;
        let stored = &self.server.stored;
        let Some(position) = stored.position else { return };
        let mut settled = stored.timeline == self.history.timeline();
        for table in 0..TABLES {
            let Some(entry) = stored.states[table] else {
                settled &= !self.mapped[table];
                continue;
            };
            settled &= self.mapped[table] && matches!(entry.state, TableState::Ready | TableState::Error);
            let right_up_to = match (entry.state, entry.position) {
                (TableState::Ready, _) => position,
                (TableState::CatchingUp | TableState::Copied, Some(own)) => own,
                _ => continue,
            };
            self.seen.comparisons += 1;
            let Entry { copied_at, definition, .. } = entry;
            let held = Held { table, timeline: stored.timeline, copied_at, definition };
            let wanted = self.oracles[table].at(&self.history, held, right_up_to);
            settled &= !self.oracles[table].has_gap();
            if wanted.as_ref() != Ok(&stored.tables[table]) {
                let is = stored.tables[table];
                let text = format!(
                    "table {table} ({entry:?}) at {right_up_to}, checkpoint {position}:\n  is        {is:?}\n  should be {wanted:?}"
                );
                return self.violated(|| text);
            }
        }
        self.settled_at = settled.then_some(position);
    }

    /// Nothing is left that people should do.
    pub fn is_level(&self) -> bool {
        let ready = |entry: &Option<Entry>| entry.is_some_and(|entry| entry.state == TableState::Ready);
        self.settled_at.is_some() && self.server.stored.states.iter().all(ready)
    }

    /// Only people can say what is right now. Other workers end too.
    pub fn give_up(&mut self) {
        self.given_up = true;
        self.round_over.cancel();
    }

    /// People drop slot and checkpoint, so that the stream begins anew.
    pub fn begin_anew(&mut self) {
        if std::mem::take(&mut self.given_up) {
            self.seen.note(Rare::Diverged);
            self.server.end_all();
            self.server.stored = Stored { tables: self.server.stored.tables, epoch: self.server.stored.epoch, ..Stored::default() };
            self.server.logged(true);
            self.history.slot = None;
        }
    }
}

/// One worker's way to the world: it ends with the worker.
#[derive(Clone)]
pub struct Reach {
    world: Arc<Mutex<World>>,
    crash: CancellationToken,
    /// Nobody knows whether the worker lives.
    is_lost: CancellationToken,
    /// The claim of the session.
    epoch: Arc<AtomicI64>,
}

impl Reach {
    pub fn new(world: &Arc<Mutex<World>>, crash: &CancellationToken, is_lost: &CancellationToken) -> Self {
        Self { world: Arc::clone(world), crash: crash.clone(), is_lost: is_lost.clone(), epoch: Arc::default() }
    }

    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().expect("no panic while the world is held")
    }

    /// The claim of the session; 0 before.
    pub fn epoch(&self) -> i64 {
        self.epoch.load(Ordering::Relaxed)
    }

    pub fn has_claimed(&self, epoch: i64) {
        self.epoch.store(epoch, Ordering::Relaxed);
    }

    /// A session on the source is dropped.
    pub fn leave_source(&self, session: usize) {
        let mut world = self.world();
        let hangs = world.dice.chance(300);
        world.source.disconnect(session, hangs);
    }

    /// A worker that has crashed does nothing more.
    pub async fn lives(&self) {
        if self.crash.is_cancelled() {
            std::future::pending::<()>().await;
        }
    }

    /// One step of waiting.
    pub async fn step(&self) {
        self.lives().await;
        self.world().step();
        Yield(false).await;
    }

    /// A call goes out: others run meanwhile, and it may never arrive.
    pub async fn io(&self, point: Point) -> Result<()> {
        let steps = self.world().pause(point, self.is_lost.is_cancelled());
        for _ in 0..steps {
            self.step().await;
        }
        self.strike(point, Moment::Before).await
    }

    /// Now and then something goes wrong.
    pub async fn strike(&self, point: Point, moment: Moment) -> Result<()> {
        self.lives().await;
        let fault = {
            let mut world = self.world();
            let World { faults, dice, .. } = &mut *world;
            faults.draw(point, moment, dice)
        };
        match fault {
            None => Ok(()),
            Some(Fault::Fails | Fault::AnswerLost) => Err(Error::retry(reason::TARGET_UNREACHABLE, "injected")),
            Some(Fault::CrashBefore | Fault::CrashCommitting | Fault::CrashAfter) => {
                self.crash.cancel();
                std::future::pending().await
            }
        }
    }
}

/// Lets all others run once. (Tokio's own looks at the clock each time.)
struct Yield(bool);

impl Future for Yield {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.0, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }
}
