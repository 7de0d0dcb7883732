//! Everything that outlives a worker, and the check of it.

use crate::dice::Dice;
use crate::faults::{Fault, Faults, Moment, Point};
use crate::history::{History, Oracle, TABLES};
use crate::mutants::Mutant;
use crate::server::Server;
use sluice::engine::error::{Error, Result, reason};
use sluice::engine::table::TableState;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use tokio_util::sync::CancellationToken;

/// A right engine needs a small part of this.
const STEPS: u64 = 30_000;

pub struct World {
    pub dice: Dice,
    pub history: History,
    pub server: Server,
    /// What was asked of the publication, where that is done too late.
    pub late_publication: Option<[bool; TABLES]>,
    pub faults: Faults,
    /// The rule that is broken on purpose.
    pub mutant: Option<Mutant>,
    pub seen: Seen,
    /// What must never be.
    pub violation: Option<String>,
    /// The history ends when the target is level with the source.
    pub last_round: bool,
    pub round_over: CancellationToken,
    oracles: [Oracle; TABLES],
    steps_left: u64,
    round_left: u32,
    /// Where the target stood when the last commit left all tables ready.
    all_ready_at: Option<u64>,
    restless: bool,
    /// How often, of a thousand times, the target's server does nothing.
    slow: u32,
    to_the_end: bool,
}

/// What has happened, so that a test that proves nothing is noticed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    pub comparisons: u64,
    pub commits: u64,
    pub steps: u64,
    /// Tables that became ready with a transaction after their copy.
    pub joined_by_part: u64,
    /// Tables that became ready at a position that an idle source has told.
    pub joined_idle: u64,
    pub open_parts: u64,
    /// Parts that were accepted while another one was in flight.
    pub behind_others: u64,
    pub not_due: u64,
    pub target_crashes: u64,
    pub commits_lost: u64,
    pub orphans_committed: u64,
    pub fenced: u64,
    pub waited_for_writers: u64,
    pub stalled_at_snapshot: u64,
    pub stopped: u64,
    /// Order-dependent summary of all commits: the same for the same seed.
    pub digest: u64,
}

impl Seen {
    pub fn add(&mut self, other: &Self) {
        self.comparisons += other.comparisons;
        self.commits += other.commits;
        self.steps += other.steps;
        self.joined_by_part += other.joined_by_part;
        self.joined_idle += other.joined_idle;
        self.open_parts += other.open_parts;
        self.behind_others += other.behind_others;
        self.not_due += other.not_due;
        self.target_crashes += other.target_crashes;
        self.commits_lost += other.commits_lost;
        self.orphans_committed += other.orphans_committed;
        self.fenced += other.fenced;
        self.waited_for_writers += other.waited_for_writers;
        self.stalled_at_snapshot += other.stalled_at_snapshot;
        self.stopped += other.stopped;
    }
}

impl Seen {
    /// What must not be missing among many histories.
    pub fn rare(&self) -> [(&'static str, u64); 12] {
        [
            ("a join with a transaction", self.joined_by_part),
            ("a join on an idle source", self.joined_idle),
            ("an open part", self.open_parts),
            ("a part behind another", self.behind_others),
            ("a change that is not due", self.not_due),
            ("a crash of the target", self.target_crashes),
            ("a commit lost by it", self.commits_lost),
            ("a commit of a worker that is gone", self.orphans_committed),
            ("a worker that was fenced", self.fenced),
            ("a writer that a snapshot waits for", self.waited_for_writers),
            ("a commit that a snapshot sees first", self.stalled_at_snapshot),
            ("a session that was stopped", self.stopped),
        ]
    }
}

impl World {
    pub fn new(seed: u64, mutant: Option<Mutant>) -> Self {
        let mut dice = Dice::new(seed);
        let writes = [0, 20, 40, 60][dice.below(4) as usize];
        let history = History::new(writes, &mut dice);
        let faults = Faults::new(&mut dice);
        let (restless, to_the_end) = (dice.chance(500), dice.chance(200));
        let slow = [0, 0, 600, 800][dice.below(4) as usize];
        Self {
            history,
            server: Server::default(),
            late_publication: None,
            faults,
            mutant,
            seen: Seen::default(),
            violation: None,
            last_round: false,
            round_over: CancellationToken::new(),
            oracles: Default::default(),
            steps_left: STEPS,
            round_left: 0,
            all_ready_at: None,
            restless,
            slow,
            to_the_end,
            dice,
        }
    }

    pub fn breaks(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    /// A round of so many steps begins.
    pub fn begin_round(&mut self, steps: u32, last: bool) -> CancellationToken {
        self.round_left = steps;
        self.last_round = last;
        self.round_over = CancellationToken::new();
        if last {
            self.faults.end();
        }
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
            if self.history.is_over() && self.all_ready_at.is_some_and(|position| position >= end) {
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
            _ => {}
        }
        if self.faults.disaster(&mut self.dice) {
            self.seen.target_crashes += 1;
            self.seen.commits_lost += self.server.crash();
        }
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
                self.seen.orphans_committed += u64::from(committed.orphan);
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
        self.all_ready_at = None;
        let Some(position) = stored.position else { return };
        let mut all_ready = true;
        for table in 0..TABLES {
            let right_up_to = match stored.states[table].map(|entry| (entry.state, entry.position)) {
                Some((TableState::Ready, _)) => position,
                Some((TableState::CatchingUp | TableState::Copied, Some(own))) => own.max(position),
                _ => {
                    all_ready = false;
                    continue;
                }
            };
            all_ready &= stored.states[table].is_some_and(|entry| entry.state == TableState::Ready);
            self.seen.comparisons += 1;
            let wanted = self.oracles[table].at(&self.history, table, right_up_to);
            let held = &stored.tables[table];
            if held != wanted {
                let entry = stored.states[table];
                let text = format!(
                    "table {table} ({entry:?}) at {right_up_to}, checkpoint {position}:\n  is        {held:?}\n  should be {wanted:?}"
                );
                return self.violated(|| text);
            }
        }
        self.all_ready_at = all_ready.then_some(position);
    }
}

/// One worker's way to the world: it ends with the worker.
#[derive(Clone)]
pub struct Reach {
    world: Arc<Mutex<World>>,
    crash: CancellationToken,
}

impl Reach {
    pub fn new(world: &Arc<Mutex<World>>, crash: &CancellationToken) -> Self {
        Self { world: Arc::clone(world), crash: crash.clone() }
    }

    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().expect("no panic while the world is held")
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
        let steps = self.world().dice.below(2);
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
