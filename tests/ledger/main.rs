//! The ledger test: writers keep their own record of what they have committed, while the worker process and both servers are killed
//! again and again. Source, target and the record are compared row by row; slot and checkpoint too.
//!
//! One round by default; rounds until `SLUICE_CHAOS_MINUTES` are over with `make chaos`. Each round prints its seed; `SLUICE_SEED`
//! repeats it: the same transactions, kills and pauses, as far as time allows.

#[path = "../support/mod.rs"]
mod support;
#[path = "../support/worker.rs"]
mod worker;

mod model;
mod stage;
mod writer;

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use stage::{Moment, Stage};
use std::time::{Duration, Instant};

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_killed_nothing_is_lost_or_doubled() {
    let begun = Instant::now();
    let time = Duration::from_secs(60 * variable("SLUICE_CHAOS_MINUTES").unwrap_or(0));
    let mut seed = variable("SLUICE_SEED").unwrap_or_else(|| rand::random::<u32>().into());
    loop {
        round(seed).await;
        if begun.elapsed() >= time {
            return;
        }
        seed += 1;
    }
}

async fn round(seed: u64) {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut major = || support::MAJORS[random.random_range(0..3)];
    let majors = (major(), major());
    println!("SLUICE_SEED={seed}: PostgreSQL {} to {}", majors.0, majors.1);
    let mut stage = Stage::open(seed, random, majors, &[0, 1]).await;

    // The first copy.
    for moment in
        [Moment::Within(1500), Moment::State("Copying"), Moment::Within(1500), Moment::State("Copied"), Moment::State("CatchingUp")]
    {
        stage.kill(moment).await;
    }
    stage.compare().await;

    // The stream.
    for step in 0..4 {
        stage.large_transactions((step % 2) as u64);
        stage.progress(40).await;
        stage.kill(Moment::Within(1500)).await;
        stage.kill(Moment::Within(3000)).await;
        stage.kill_server(["target", "source"][step % 2]).await;
        stage.progress(20).await;
    }
    stage.compare().await;

    // Tables that come later, each with its own copy and hand-over.
    for table in [3, 2, 4] {
        stage.add_table(table).await;
        for moment in [Moment::State("Copying"), Moment::State("Copied"), Moment::State("CatchingUp"), Moment::Within(1000)] {
            stage.kill(moment).await;
        }
        if table == 3 {
            stage.kill_server("target").await;
            stage.kill_server("source").await;
        }
        stage.compare().await;
    }

    // All tables.
    for step in 0..6 {
        stage.large_transactions(step % 2);
        stage.progress(20).await;
        stage.kill(Moment::Within(2000)).await;
    }
    stage.finish().await;
    stage.compare().await;
    let kills: u32 = stage.kills.values().sum();
    stage.say(&format!(
        "{} transactions, {kills} kills: {:?}, {} looks at count and sum",
        stage.transactions(),
        stage.kills,
        stage.digests
    ));
    assert!(kills >= 30, "{kills} kills");
    for state in ["in Copying", "in Copied", "in CatchingUp"] {
        assert!(stage.kills.contains_key(state), "no kill {state}: {:?}", stage.kills);
    }
}
