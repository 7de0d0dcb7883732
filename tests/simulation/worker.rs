//! Workers and their lives: sessions, crashes, restarts, two at a time, other tables, until the target is level.

use crate::faults::Faults;
use crate::history::TABLES;
use crate::mutants::Mutant;
use crate::source::{SimSource, table};
use crate::target::SimTarget;
use crate::world::{Reach, Seen, World};
use sluice::engine::error::Class;
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
    for round in 0..=rounds {
        let last = round == rounds;
        let (tables, over, second) = {
            let mut world = lock();
            let tables: Vec<usize> = (0..TABLES).filter(|table| last || *table == 0 || world.dice.chance(700)).collect();
            let steps = 20 + world.dice.below(300);
            let over = world.begin_round(steps, last);
            // Before there is a checkpoint, two workers would have to share the making of the slot.
            let second = !last && world.server.stored.position.is_some() && world.dice.chance(300);
            (tables, over, second)
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
        if lock().violation.is_some() {
            return;
        }
        lock().seen.stopped += 1;
    }
}

/// One process after the other, each with its sessions.
async fn worker(world: Arc<Mutex<World>>, config: StreamConfig, stop: Stop) {
    let mut held = None;
    loop {
        let crash = CancellationToken::new();
        let reach = Reach::new(&world, &crash);
        let (source, target) = (Arc::new(SimSource(reach.clone())), Arc::new(SimTarget(reach.clone())));
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

fn config(tables: &[usize]) -> StreamConfig {
    let selection = tables.iter().map(|number| TableSelection {
        source: table(*number).source().clone(),
        target: table(*number).target.clone(),
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
