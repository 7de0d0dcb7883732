//! The session flow against a simulated source and a simulated target, with faults at any step.
//!
//! The oracle is the source's history applied row by row. It is asked at *every* commit of the target, since a later
//! change can heal a loss. `SLUICE_SEED=<n> SLUICE_SEEDS=1` repeats one history.

mod ahead;
mod applier;
mod dice;
mod faults;
mod fence;
mod history;
mod lane;
mod loads;
mod log;
mod mutants;
mod oracle;
mod register;
mod seen;
mod server;
mod sets;
mod source;
mod tables;
mod target;
mod worker;
mod world;

use faults::Point;
use mutants::Mutant;
use seen::{Rare, Seen};
use std::sync::atomic::{AtomicU64, Ordering};
use worker::{Lived, simulate};

/// Histories of one run.
const ENOUGH: u64 = 20_000;
/// Within so many histories each broken rule must show.
const MUTANT_SEEDS: u64 = 2000;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Runs histories on two threads.
fn simulate_all(first: u64, count: u64) -> Vec<Lived> {
    let next = AtomicU64::new(first);
    let run = || {
        let mut lived = Vec::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + count {
                return lived;
            }
            let history = simulate(seed, None);
            if let Some(violation) = &history.violation {
                next.fetch_add(count, Ordering::Relaxed);
                panic!("{violation}\nSLUICE_SEED={seed} SLUICE_SEEDS=1 cargo test --test simulation at_every_commit");
            }
            lived.push(history);
        }
    };
    std::thread::scope(|scope| {
        let threads = [scope.spawn(run), scope.spawn(run)];
        threads.into_iter().flat_map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

#[test]
fn at_every_commit_of_every_history_the_target_equals_the_source() {
    let count = number("SLUICE_SEEDS", ENOUGH);
    let began = std::time::Instant::now();
    let histories = simulate_all(number("SLUICE_SEED", 1), count);
    let seconds = began.elapsed().as_secs_f64();
    let mut seen = Seen::default();
    histories.iter().for_each(|history| seen.add(&history.seen));
    println!("{count} histories in {seconds:.1} s: {seen:#?}");
    if count < ENOUGH {
        return;
    }
    // A test that has not seen the faults proves nothing about them.
    for point in Point::ALL {
        for fault in point.faults() {
            let times: u64 = histories.iter().map(|history| history.faults.count[point as usize][*fault as usize]).sum();
            assert!(times >= 3, "{point:?} {fault:?} happened {times} times");
        }
    }
    for what in Rare::ALL {
        let times = seen.times(what);
        assert!(times >= 100, "{what:?} happened {times} times");
    }
}

#[test]
fn a_seed_is_one_history() {
    for seed in 1..=20 {
        let [once, again] = [simulate(seed, None), simulate(seed, None)].map(|history| (history.seen.digest, history.seen.steps));
        assert_eq!(once, again, "seed {seed}");
    }
}

#[test]
fn every_broken_rule_is_caught() {
    let missed = Mutant::ALL.into_iter().filter(|mutant| {
        let caught = (1..=MUTANT_SEEDS).find_map(|seed| simulate(seed, Some(*mutant)).violation.map(|violation| (seed, violation)));
        let Some((seed, violation)) = caught else { return true };
        println!("{mutant:?} is caught by seed {seed}: {violation}");
        assert_eq!(simulate(seed, None).violation, None, "seed {seed} with all rules kept");
        false
    });
    assert_eq!(missed.collect::<Vec<_>>(), [], "not caught by {MUTANT_SEEDS} seeds");
}
