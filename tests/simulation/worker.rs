//! Workers and their lives: sessions, crashes, restarts, two at a time, other tables, until the target is level.

use crate::faults::Faults;
use crate::history::TABLES;
use crate::mutants::Mutant;
use crate::seen::{Rare, Seen};
use crate::source::SimSource;
use crate::tables::table;
use crate::target::SimTarget;
use crate::world::{Reach, World};
use sluice::engine::error::{Class, Error, reason};
use sluice::engine::flow::{self, SnapshotConfig, Stop, StreamConfig};
use sluice::engine::progress::Progress;
use sluice::engine::retention::Budget;
use sluice::engine::roles::{BatchLimits, Owner, Selection, TableSelection};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

/// A history that was lived through.
pub struct Lived {
    pub seen: Seen,
    pub faults: Faults,
    pub violation: Option<String>,
}

/// Runs one history.
pub fn simulate(seed: u64, mutant: Option<Mutant>) -> Lived {
    let world = Arc::new(Mutex::new(World::new(seed, mutant)));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime");
    runtime.block_on(live(&world));
    drop(runtime);
    let world = Arc::into_inner(world).expect("all workers are gone").into_inner().expect("no panic while the world is held");
    let mut seen = world.seen;
    seen.note_all(Rare::CopyWaited, world.history.copies_waited);
    seen.note_all(Rare::CopyFailed, world.history.copies_failed);
    Lived { seen, faults: world.faults, violation: world.violation }
}

async fn live(world: &Arc<Mutex<World>>) {
    let lock = || world.lock().expect("no panic while the world is held");
    let rounds = 2 + lock().dice.below(7);
    let mut lost = Lost::default();
    for _ in 0..rounds {
        round(world, false, &mut lost).await;
    }
    lost.end(world).await;
    while lock().violation.is_none() && !lock().is_level() {
        round(world, true, &mut lost).await;
    }
}

/// Workers of an earlier round of which nobody knows whether they still live: others have begun in their place.
#[derive(Default)]
struct Lost {
    workers: JoinSet<()>,
}

impl Lost {
    /// They end at last.
    async fn end(&mut self, world: &Mutex<World>) {
        self.workers.abort_all();
        while let Some(ended) = self.workers.join_next().await {
            note_panic(world, ended);
        }
    }
}

fn note_panic(world: &Mutex<World>, ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        world.lock().expect("no panic while the world is held").violated(|| format!("a worker has panicked: {error}"));
    }
}

/// One mapping, and a worker for it, or two.
async fn round(world: &Arc<Mutex<World>>, last: bool, lost: &mut Lost) {
    let lock = || world.lock().expect("no panic while the world is held");
    if lock().violation.is_some() {
        return;
    }
    if lock().given_up {
        // People see to it that nobody is left.
        lost.end(world).await;
    }
    let (tables, over, second) = {
        let mut world = lock();
        world.begin_anew();
        let over = world.begin_round(last);
        let mapped: Vec<usize> = (0..TABLES).filter(|table| world.mapped[*table]).collect();
        let chance = if world.server.stored.position.is_some() { 300 } else { 900 };
        let second = !last && world.dice.chance(chance);
        (mapped, over, second)
    };
    let (stop, is_lost) = (Stop::default(), CancellationToken::new());
    let mut workers = JoinSet::new();
    for _ in 0..=u32::from(second) {
        workers.spawn(worker(Arc::clone(world), config(&tables), stop.clone(), is_lost.clone()));
    }
    loop {
        let ended = tokio::select! {
            biased;
            () = over.cancelled() => break,
            ended = workers.join_next() => ended,
        };
        match ended {
            Some(ended) => note_panic(world, ended),
            None => break,
        }
    }
    let how = if last || lock().given_up || lock().violation.is_some() { 0 } else { lock().dice.below(4) };
    match how {
        0 => workers.abort_all(),
        1 => stop.finish.cancel(),
        2 => stop.now.cancel(),
        _ => {
            is_lost.cancel();
            lost.end(world).await;
            lock().seen.note_all(Rare::LivedOn, workers.len() as u64);
            std::mem::swap(&mut lost.workers, &mut workers);
        }
    }
    while let Some(ended) = workers.join_next().await {
        note_panic(world, ended);
    }
    if lock().violation.is_none() {
        lock().seen.note(Rare::Stopped);
    }
}

/// One process after the other, each with its sessions.
async fn worker(world: Arc<Mutex<World>>, config: StreamConfig, stop: Stop, is_lost: CancellationToken) {
    let mut held = None;
    loop {
        let crash = CancellationToken::new();
        let reach = Reach::new(&world, &crash, &is_lost);
        let (source, target) = (Arc::new(SimSource::new(reach.clone())), Arc::new(SimTarget(reach.clone())));
        let progress = Progress::new();
        let ended = tokio::select! {
            biased;
            () = crash.cancelled() => None,
            ended = flow::run(source, target, &config, &progress, &stop, &mut held) => Some(ended),
        };
        match ended {
            // Nobody begins another process where nobody can reach it.
            None if is_lost.is_cancelled() => return,
            // Another process begins, which has never claimed.
            None => held = None,
            Some(Ok(())) => return,
            Some(Err(error)) if error.class == Class::Retry => {}
            Some(Err(error)) if error.class == Class::Fenced => return,
            // What another worker has done since its claim may puzzle this one. It claims again, and learns of it.
            Some(Err(error)) if error.class == Class::Stop && held != Some(reach.world().server.stored.epoch) => {}
            // People look, and in time another session does.
            Some(Err(error)) if error.reason == reason::SCHEMA_CHANGED && reach.world().history.was_altered() => {}
            Some(Err(error)) if needs_new_stream(&error) && reach.world().history.timeline() > 1 => return reach.world().give_up(),
            Some(Err(error)) => return reach.world().violated(|| format!("a session ends with {:?}: {error}", error.class)),
        }
        tokio::select! {
            biased;
            () = stop.finish.cancelled() => return,
            () = stop.now.cancelled() => return,
            () = tokio::time::sleep(Duration::from_millis(20)) => {}
        }
    }
}

/// Slot or target are not where the source's history goes on.
fn needs_new_stream(error: &Error) -> bool {
    [reason::TIMELINE_DIVERGED, reason::CHECKPOINT_WITHOUT_SLOT].contains(&error.reason)
}

fn config(tables: &[usize]) -> StreamConfig {
    let selection = tables.iter().map(|number| TableSelection {
        source: table(*number, 0).source().clone(),
        target: table(*number, 0).target.clone(),
        exclude_columns: Vec::new(),
        accept_narrower_types: false,
    });
    StreamConfig {
        selection: Selection::Tables(selection.collect()),
        owner: Owner { namespace: "n".into(), name: "m".into(), uid: "u".into() },
        slot: "s".into(),
        snapshot: SnapshotConfig {
            enabled: true,
            truncate: true,
            start_position: None,
            rows_per_range: 4,
            tables_in_parallel: 2,
            workers_per_table: 2,
            indexes: true,
            foreign_keys: true,
        },
        limits: BatchLimits { rows: 4, bytes: 1 << 20, delay: Duration::ZERO },
        follow_schema: true,
        request: None,
        budget: Budget::default(),
    }
}
