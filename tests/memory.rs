//! Memory of the worker process, from /proc: idle, and under one large transaction (`SLUICE_MEMORY_ROWS`; 5 million in `make chaos`).

mod support;
#[path = "support/worker.rs"]
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use support::Postgres;
use tokio_postgres::Client;
use worker::Worker;

/// Most that an idle worker may hold, in MiB.
const IDLE: u64 = 30;
/// Most that a worker may hold whatever it does, in MiB.
const BUSY: u64 = 256;
/// How long an idle worker is watched, so that its periodic work is seen too.
const WATCH: Duration = Duration::from_secs(12);
/// Rows of the large transaction.
const ROWS: u64 = 400_000;

/// Lines of a process's status, in MiB.
fn mebibytes(pid: u32, line: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a running process");
    let found = status.lines().find(|text| text.starts_with(line)).unwrap_or_else(|| panic!("{line} is not in {status}"));
    let kibibytes = found.split_whitespace().nth(1).and_then(|number| number.parse::<u64>().ok()).expect("a number");
    kibibytes.div_ceil(1024)
}

/// What a worker of this build holds, in MiB. The code of a build for debugging is several times as large as what is shipped: its pages,
/// which are those of a file and not the process's own, are counted only in a release build.
fn held(pid: u32) -> u64 {
    let line = if cfg!(debug_assertions) { "RssAnon:" } else { "VmRSS:" };
    mebibytes(pid, line)
}

/// Watches what a process holds until it is told to stop.
struct Watch {
    stop: Arc<AtomicBool>,
    most: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<()>,
}

impl Watch {
    fn start(pid: u32) -> Self {
        let (stop, most) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (told, seen) = (Arc::clone(&stop), Arc::clone(&most));
        let thread = std::thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                seen.fetch_max(held(pid), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Self { stop, most, thread }
    }

    /// The most that it held.
    fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the watch has not failed");
        self.most.load(Ordering::Relaxed)
    }
}

async fn pair() -> (Postgres, Postgres, Client, Client) {
    let (source, target) = (Postgres::start_with(15, &["max_wal_size=8GB"]), Postgres::start_with(15, &["max_wal_size=8GB"]));
    let (left, right) = (source.create_database("shop").await, target.create_database("dw").await);
    left.batch_execute("CREATE TABLE items (id bigint PRIMARY KEY, n int, name text, at timestamptz)").await.expect("a table");
    (source, target, left, right)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_worker_is_small() {
    let (source, target, left, _right) = pair().await;
    left.batch_execute("INSERT INTO items SELECT g, g, md5(g::text), now() FROM generate_series(1, 1000) g").await.expect("rows");
    let worker = Worker::start((&source, "shop"), (&target, "dw"), &["items"]);
    worker.wait_streaming().await;
    worker.wait_level(&left).await;
    let watch = Watch::start(worker.pid());
    tokio::time::sleep(WATCH).await;
    let most = watch.end();
    let pid = worker.pid();
    println!("idle: {most} MiB; now {} of its own and {} of files", mebibytes(pid, "RssAnon:"), mebibytes(pid, "RssFile:"));
    assert!(most < IDLE, "an idle worker holds {most} MiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_large_transaction_takes_bounded_memory() {
    let rows = std::env::var("SLUICE_MEMORY_ROWS").map_or(ROWS, |rows| rows.parse().expect("SLUICE_MEMORY_ROWS is a number"));
    let (source, target, left, right) = pair().await;
    let worker = Worker::start((&source, "shop"), (&target, "dw"), &["items"]);
    worker.wait_streaming().await;
    let watch = Watch::start(worker.pid());
    let begun = Instant::now();
    left.batch_execute(&format!("INSERT INTO items SELECT g, g % 1000, md5(g::text), now() FROM generate_series(1, {rows}) g"))
        .await
        .expect("rows");
    let written = begun.elapsed();
    let sum = "SELECT count(*), sum(hashtextextended(items::text, 0)::numeric)::text FROM items";
    let expected = left.query_one(sum, &[]).await.expect("a sum");
    // All of it is there at once.
    support::eventually(1800, "the transaction arrives", || async {
        let count: i64 = right.query_one("SELECT count(*) FROM (SELECT FROM items LIMIT 1) i", &[]).await.expect("a count").get(0);
        count == 1
    })
    .await;
    worker.wait_level(&left).await;
    let found = right.query_one(sum, &[]).await.expect("a sum");
    assert_eq!((found.get::<_, i64>(0), found.get::<_, String>(1)), (expected.get::<_, i64>(0), expected.get::<_, String>(1)));
    assert_eq!(found.get::<_, i64>(0) as u64, rows);
    let pid = worker.pid();
    let (most, peak) = (watch.end(), mebibytes(pid, "VmHWM:"));
    println!("{rows} rows, written in {written:.1?}, there after {:.1?}: {most} MiB seen, {peak} MiB at the most", begun.elapsed());
    assert!(peak < BUSY, "the worker held {peak} MiB under a transaction of {rows} rows");
}
