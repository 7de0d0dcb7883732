//! Workers and their lives: sessions, crashes, restarts, two at a time, other tables, until the target is level.

use crate::faults::Faults;
use crate::history::TABLES;
use crate::mutants::Mutant;
use crate::seen::{Rare, Seen};
use crate::source::{SimSource, table};
use crate::target::SimTarget;
use crate::world::{Reach, World};
use sluice::engine::error::{Class, Error, reason};
use sluice::engine::flow::{self, SnapshotConfig, Stop, StreamConfig};
use sluice::engine::progress::Progress;
use sluice::engine::roles::{BatchLimits, Owner, Selection, TableSelection};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::JoinSet;
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
    Lived { seen: world.seen, faults: world.faults, violation: world.violation }
}

async fn live(world: &Arc<Mutex<World>>) {
    let lock = || world.lock().expect("no panic while the world is held");
    let rounds = 2 + lock().dice.below(7);
    for _ in 0..rounds {
        round(world, false).await;
    }
    while lock().violation.is_none() && !lock().is_level() {
        round(world, true).await;
    }
}

/// One mapping, and a worker for it, or two.
async fn round(world: &Arc<Mutex<World>>, last: bool) {
    let lock = || world.lock().expect("no panic while the world is held");
    if lock().violation.is_some() {
        return;
    }
    let (tables, over, second) = {
        let mut world = lock();
        world.begin_anew();
        let over = world.begin_round(last);
        let mapped: Vec<usize> = (0..TABLES).filter(|table| world.mapped[*table]).collect();
        // Before there is a checkpoint, two workers would have to share the making of the slot.
        let second = !last && world.server.stored.position.is_some() && world.dice.chance(300);
        (mapped, over, second)
    };
    let stop = Stop::default();
    let mut workers = JoinSet::new();
    for _ in 0..=u32::from(second) {
        workers.spawn(worker(Arc::clone(world), config(&tables), stop.clone()));
    }
    loop {
        let ended = tokio::select! {
            biased;
            () = over.cancelled() => break,
            ended = workers.join_next() => ended,
        };
        match ended {
            Some(Err(error)) => lock().violated(|| format!("a worker has panicked: {error}")),
            Some(Ok(())) => {}
            None => break,
        }
    }
    let how = if last || lock().violation.is_some() { 0 } else { lock().dice.below(3) };
    match how {
        0 => workers.abort_all(),
        1 => stop.finish.cancel(),
        _ => stop.now.cancel(),
    }
    while workers.join_next().await.is_some() {}
    if lock().violation.is_none() {
        lock().seen.note(Rare::Stopped);
    }
}

/// One process after the other, each with its sessions.
async fn worker(world: Arc<Mutex<World>>, config: StreamConfig, stop: Stop) {
    let mut held = None;
    loop {
        let crash = CancellationToken::new();
        let reach = Reach::new(&world, &crash);
        let (source, target) = (Arc::new(SimSource::new(reach.clone())), Arc::new(SimTarget(reach.clone())));
        let progress = Progress::new();
        let ended = tokio::select! {
            biased;
            () = crash.cancelled() => None,
            ended = flow::run(source, target, &config, &progress, &stop, &mut held) => Some(ended),
        };
        match ended {
            // Another process begins, which has never claimed.
            None => held = None,
            Some(Ok(())) => return,
            Some(Err(error)) if error.class == Class::Retry => {}
            Some(Err(error)) if error.class == Class::Fenced => return,
            // People look, and in time another session does.
            Some(Err(error)) if error.reason == reason::SCHEMA_CHANGED && reach.world().history.was_altered() => {}
            Some(Err(error)) if needs_new_stream(&error) && reach.world().history.timeline() > 1 => return reach.world().give_up(),
            // What another worker has done since its claim may puzzle this one. It claims again, and learns of it.
            Some(Err(error)) if error.class == Class::Stop && held != Some(reach.world().server.stored.epoch) => {}
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
    }
}
