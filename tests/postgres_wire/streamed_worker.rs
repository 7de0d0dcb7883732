//! A worker that is killed while large transactions arrive: whatever it had kept of them is worth nothing, and nothing is lost.

use crate::streamed::streamed_starts;
use crate::support::Postgres;
use crate::worker::{Worker, assert_equal};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use std::time::Duration;

/// Kills of one run.
const KILLS: u32 = 3;
/// The least memory that a log takes is 16 MiB, half of it for what is kept.
const KEPT: u64 = 8 << 20;

pub async fn killed(major: u32) {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let source = Postgres::start_with(major, &["logical_decoding_work_mem=64kB", "log_replication_commands=on"]);
    let target = Postgres::start(15);
    let (left, right) = (source.create_database("shop").await, target.create_database("dw").await);
    left.batch_execute(
        "CREATE TABLE t (id bigint PRIMARY KEY, v text, n int); INSERT INTO t SELECT i, 'seed', 0 FROM generate_series(1, 100) i",
    )
    .await
    .unwrap();
    let mut worker = Worker::start((&source, "shop"), (&target, "dw"), &["t"]);
    worker.wait_streaming().await;
    // The least memory, and a spill of 40 MiB.
    worker.kill9();
    worker.arguments = ["--memory-limit", "0", "--state-limit", "52428800"].map(str::to_owned).to_vec();
    worker.spawn();
    worker.wait_streaming().await;

    let other = source.connect("shop").await;
    for kill in 1..=i64::from(KILLS) {
        let rows = |from: i64, count: i64, value: &str| {
            format!("INSERT INTO t SELECT i, repeat('{value}', 200), {kill} FROM generate_series({from}, {from} + {count} - 1) i")
        };
        let base = kill * 1_000_000;
        left.batch_execute("BEGIN").await.unwrap();
        left.batch_execute(&rows(base, 60_000, "a")).await.unwrap();
        left.batch_execute("SAVEPOINT s").await.unwrap();
        left.batch_execute(&rows(base + 100_000, 5_000, "b")).await.unwrap();
        left.batch_execute("ROLLBACK TO s; UPDATE t SET n = n + 1 WHERE id <= 100; DELETE FROM t WHERE n = -1").await.unwrap();
        other.batch_execute(&rows(base + 200_000, 10, "c")).await.unwrap();
        worker.wait_for(60, "slices are in the spill", |status| status.spill_bytes.is_some_and(|bytes| bytes > KEPT / 2)).await;
        // At a random moment from here on: while it arrives, is replayed or applied, or behind that.
        match kill % 3 {
            0 => worker.kill9(),
            _ => {
                left.batch_execute(if kill == 2 { "ROLLBACK" } else { "COMMIT" }).await.unwrap();
                let pause = Duration::from_millis(random.random_range(0..1500));
                tokio::time::sleep(pause).await;
                worker.kill9();
            }
        }
        worker.spawn();
        if kill % 3 == 0 {
            worker.wait_streaming().await;
            left.batch_execute("COMMIT").await.unwrap();
        }
    }
    worker.wait_streaming().await;
    worker.wait_level(&left).await;
    assert_equal(&left, &right, &["t"]).await;

    // A spill that is too small is told, and the transaction arrives all the same.
    worker.kill9();
    worker.arguments = ["--memory-limit", "0", "--state-limit", "5242880"].map(str::to_owned).to_vec();
    worker.spawn();
    worker.wait_streaming().await;
    left.batch_execute("BEGIN; INSERT INTO t SELECT i, repeat('d', 200), 0 FROM generate_series(90000000, 90099999) i").await.unwrap();
    let is_full = |status: &sluice::worker::contract::Status| status.notice.as_ref().is_some_and(|notice| notice.reason == "SpillFull");
    worker.wait_for(60, "the spill is full", is_full).await;
    // The target's connections are lost: the next session does not try again what can't be.
    let starts = streamed_starts(&source);
    let epoch = worker.status().await.expect("a status").epoch;
    let lose = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'dw' AND pid <> pg_backend_pid()";
    right.batch_execute(lose).await.unwrap();
    other.batch_execute("INSERT INTO t VALUES (80000000, 'meanwhile', 0)").await.unwrap();
    let next_session = |status: &sluice::worker::contract::Status| status.epoch > epoch && status.streaming && is_full(status);
    worker.wait_for(60, "another session knows of it", next_session).await;
    worker.wait_level(&other).await;
    assert!(is_full(&worker.status().await.expect("a status")));
    assert_eq!(streamed_starts(&source), starts);
    left.batch_execute("COMMIT").await.unwrap();
    worker.wait_level(&left).await;
    worker.wait_for(60, "it streams again", |status| status.streaming && status.notice.is_none()).await;
    assert_eq!((streamed_starts(&source), worker.log().matches("the spill is full").count()), (starts + 1, 1));
    assert_equal(&left, &right, &["t"]).await;
}
