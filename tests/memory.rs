//! Memory of the worker process, from /proc: idle, under one large transaction (`SLUICE_MEMORY_ROWS`; 5 million in `make chaos`), and
//! when the target stands still. `SLUICE_BIN` names a release build of the worker instead of the one that the tests are built with.

mod support;
#[path = "support/worker.rs"]
mod worker;

use sluice::worker::contract::Desired;
use std::path::Path;
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
/// Rows that come while the target stands still.
const WAITING_ROWS: u64 = 200_000;
const MIB: u64 = 1 << 20;
/// The least memory of a log, which `--memory-limit 0` gives.
const LEAST: u64 = 16 * MIB;
/// What a worker may hold besides its log when it applies, in MiB: what it knows of the rows of a batch, and fragments.
const SLACK: u64 = 12;
/// Times that a target stands still on one process.
const STANDSTILLS: u64 = 10;
/// What a log may hold beyond its memory for a moment: one read.
const READ: u64 = MIB / 4;

fn rows_of_the_large_transaction() -> u64 {
    std::env::var("SLUICE_MEMORY_ROWS").map_or(ROWS, |rows| rows.parse().expect("SLUICE_MEMORY_ROWS is a number"))
}

/// Lines of a process's status, in MiB.
fn mebibytes(pid: u32, line: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a running process");
    let found = status.lines().find(|text| text.starts_with(line)).unwrap_or_else(|| panic!("{line} is not in {status}"));
    let kibibytes = found.split_whitespace().nth(1).and_then(|number| number.parse::<u64>().ok()).expect("a number");
    kibibytes.div_ceil(1024)
}

/// What a worker holds, in MiB. The code of a build for debugging is several times as large as what is shipped: its pages, which are
/// those of a file and not the process's own, are counted only in a release build.
fn held(pid: u32) -> u64 {
    let is_release = !cfg!(debug_assertions) || std::env::var_os("SLUICE_BIN").is_some_and(|path| !path.is_empty());
    mebibytes(pid, if is_release { "VmRSS:" } else { "RssAnon:" })
}

/// Bytes of the files in a folder and below.
fn size(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    // A file may go while it is looked at.
    entries.map(|entry| if entry.path().is_dir() { size(&entry.path()) } else { entry.metadata().map_or(0, |file| file.len()) }).sum()
}

/// Watches what a process holds until it is told to stop, and its folder.
struct Watch {
    stop: Arc<AtomicBool>,
    most: Arc<AtomicU64>,
    spilled: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<()>,
}

impl Watch {
    fn start(worker: &Worker) -> Self {
        let (stop, most, spilled) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (told, held_most, spilled_most) = (Arc::clone(&stop), Arc::clone(&most), Arc::clone(&spilled));
        let (pid, folder) = (worker.pid(), worker.state_folder());
        let thread = std::thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                held_most.fetch_max(held(pid), Ordering::Relaxed);
                spilled_most.fetch_max(size(&folder), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Self { stop, most, spilled, thread }
    }

    /// The most that it held, in MiB, and that its folder held, in bytes.
    fn end(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the watch has not failed");
        (self.most.load(Ordering::Relaxed), self.spilled.load(Ordering::Relaxed))
    }
}

async fn pair() -> (Postgres, Postgres, Client, Client) {
    let source = Postgres::start_with(15, &["max_wal_size=8GB", "logical_decoding_work_mem=4MB"]);
    let target = Postgres::start_with(15, &["max_wal_size=8GB"]);
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
    let watch = Watch::start(&worker);
    tokio::time::sleep(WATCH).await;
    let (most, _) = watch.end();
    let pid = worker.pid();
    println!("idle: {most} MiB; now {} of its own and {} of files", mebibytes(pid, "RssAnon:"), mebibytes(pid, "RssFile:"));
    assert!(most < IDLE, "an idle worker holds {most} MiB");
}

/// A worker that follows `items` with these arguments and a changed document.
async fn follow(source: &Postgres, target: &Postgres, arguments: &[&str], change: impl FnOnce(&mut Desired)) -> Worker {
    let mut worker = Worker::start_with((source, "shop"), (target, "dw"), &["items"], change);
    worker.wait_streaming().await;
    worker.kill9();
    worker.arguments = arguments.iter().map(ToString::to_string).collect();
    worker.spawn();
    worker.wait_streaming().await;
    worker
}

/// The statement that inserts rows with these numbers.
fn insert(from: u64, to: u64) -> String {
    format!("INSERT INTO items SELECT g, g % 1000, repeat(md5(g::text), 5), now() FROM generate_series({from}, {to}) g")
}

/// Source and target hold so many rows, the same by a hash of each.
async fn assert_same(left: &Client, right: &Client, rows: u64) {
    let sum = "SELECT count(*), sum(hashtextextended(items::text, 0)::numeric)::text FROM items";
    let (expected, found) = (left.query_one(sum, &[]).await.expect("a sum"), right.query_one(sum, &[]).await.expect("a sum"));
    assert_eq!((found.get::<_, i64>(0), found.get::<_, String>(1)), (expected.get::<_, i64>(0), expected.get::<_, String>(1)));
    assert_eq!(found.get::<_, i64>(0) as u64, rows);
}

/// What a transaction of many rows took.
struct Taken {
    /// Bytes of spill.
    spill: u64,
    /// The worker has said that the spill was full.
    told: bool,
}

/// One transaction through a worker with these arguments; source and target are compared by a hash of each row.
async fn large_transaction(rows: u64, arguments: &[&str]) -> Taken {
    let (source, target, left, right) = pair().await;
    let worker = follow(&source, &target, arguments, |_| {}).await;
    let watch = Watch::start(&worker);
    let begun = Instant::now();
    let writer = tokio::spawn(async move {
        left.batch_execute(&insert(1, rows)).await.expect("rows");
        left
    });
    let mut told = false;
    let arrived = || async { right.query_one("SELECT EXISTS (SELECT FROM items)", &[]).await.expect("a look").get::<_, bool>(0) };
    while !arrived().await {
        assert!(begun.elapsed() < Duration::from_secs(1800), "the transaction does not arrive\n{}", worker.log());
        let notice = worker.status().await.and_then(|status| status.notice);
        told |= notice.is_some_and(|notice| notice.reason == "SpillFull");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let left = writer.await.expect("the writer has not failed");
    worker.wait_level(&left).await;
    assert_same(&left, &right, rows).await;
    let (most, spill) = watch.end();
    let memory = mebibytes(worker.pid(), "VmHWM:");
    println!("{rows} rows after {:.1?}: {most} MiB seen, {memory} MiB at the most, {} MiB of spill", begun.elapsed(), spill >> 20);
    assert!(memory < BUSY, "the worker held {memory} MiB under a transaction of {rows} rows");
    Taken { spill, told }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_large_transaction_takes_bounded_memory() {
    // The shipped sizes.
    let taken = large_transaction(rows_of_the_large_transaction(), &[]).await;
    assert!(!taken.told, "it fits into the spill");
    assert!(taken.spill > 0, "it does not fit into memory");
    assert!(taken.spill <= 2048 * MIB / 5 * 4, "{} bytes of spill", taken.spill);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spill_of_64_mib_holds_no_more() {
    // Four fifths of the state folder are for the spill.
    let state = (80 * MIB).to_string();
    let taken = large_transaction(rows_of_the_large_transaction(), &["--memory-limit", "0", "--state-limit", &state]).await;
    assert!(taken.told, "the transaction is larger than the spill, and that is said");
    assert!(taken.spill <= 64 * MIB, "{} bytes of spill", taken.spill);
    assert!(taken.spill > 32 * MIB, "it was used: {} bytes", taken.spill);
}

/// Batches that were read count until they are applied, however many connections hold some: reading stops at the bound.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_stands_still_stops_the_reading() {
    let (source, target, left, right) = pair().await;
    let mut worker = follow(&source, &target, &["--memory-limit", "0"], eager).await;
    // Once a minute the worker looks at the publication with nothing in flight. When that happens while the target stands still, one
    // batch alone is in flight: then it is done again, by a new process, so that what it held before is known each time.
    let mut in_flight = false;
    let mut rows = 0;
    while !in_flight {
        assert!(rows < 5 * WAITING_ROWS, "never are several batches in flight");
        if rows > 0 {
            worker.kill9();
            worker.spawn();
            worker.wait_streaming().await;
        }
        rows = describe(&worker, &left, rows).await;
        let before = held(worker.pid());
        right.batch_execute(LOCK).await.expect("a lock");
        let watch = Watch::start(&worker);
        rows = write_waiting(&left, rows).await;
        stands_still(&worker).await;
        let many = "SELECT count(*) > 2 FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
        in_flight = target.connect("dw").await.query_one(many, &[]).await.expect("an answer").get(0);
        let (most, _) = watch.end();
        println!("{before} MiB before, {most} MiB at the most");
        assert!(most <= before + LEAST / MIB + SLACK, "the worker held {most} MiB, {before} MiB before");
        right.batch_execute("COMMIT").await.expect("a commit");
        worker.wait_level(&left).await;
    }
    assert_same(&left, &right, rows).await;
}

/// What was held once is given back or used again.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_stands_still_again_and_again_takes_no_more_each_time() {
    let (source, target, left, right) = pair().await;
    let worker = follow(&source, &target, &["--memory-limit", "0"], eager).await;
    let begun = held(worker.pid());
    let mut rows = 0;
    for _ in 0..STANDSTILLS {
        right.batch_execute(LOCK).await.expect("a lock");
        let watch = Watch::start(&worker);
        rows = write_waiting(&left, rows).await;
        memory_is_used_up(&worker).await;
        right.batch_execute("COMMIT").await.expect("a commit");
        worker.wait_level(&left).await;
        let (most, _) = watch.end();
        println!("{begun} MiB at the start, {most} MiB at the most");
        assert!(most <= begun + LEAST / MIB + SLACK, "the worker held {most} MiB, {begun} MiB at the start");
    }
    assert_same(&left, &right, rows).await;
}

/// As much as possible would be in flight: large batches without a row in common, and connections enough.
fn eager(desired: &mut Desired) {
    (desired.stream.max_batch_rows, desired.stream.max_batch_bytes, desired.stream.apply_connections) = (1_000_000, 64 << 20, 8);
}

/// Writes a row: with the first one the source describes the table to each new session, which then looks at the publication with nothing
/// in flight. Waits until that is over; how many rows there are then.
async fn describe(worker: &Worker, left: &Client, rows: u64) -> u64 {
    let now: String = left.query_one("SELECT clock_timestamp()::text", &[]).await.expect("a time").get(0);
    left.batch_execute(&insert(rows + 1, rows + 1)).await.expect("a row");
    worker.wait_level(left).await;
    let looked = format!(
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'sluice' AND backend_type = 'client backend'
             AND state = 'idle' AND query_start > '{now}')"
    );
    worker::wait_sql(left, 60, &looked).await;
    rows + 1
}

/// Nothing can be written to the target until its transaction ends.
const LOCK: &str = "BEGIN; LOCK TABLE items IN ACCESS EXCLUSIVE MODE";

/// Writes more rows than fit into the memory of a log, in small transactions; how many there are then.
async fn write_waiting(left: &Client, rows: u64) -> u64 {
    for from in (rows + 1..=rows + WAITING_ROWS).step_by(1000) {
        left.batch_execute(&insert(from, from + 999)).await.expect("rows");
    }
    rows + WAITING_ROWS
}

async fn memory_is_used_up(worker: &Worker) {
    worker.wait_for(60, "the memory is used up", |status| status.log_memory_bytes.is_some_and(|bytes| bytes >= LEAST)).await;
}

/// The memory is used up, and nothing more is read.
async fn stands_still(worker: &Worker) {
    memory_is_used_up(worker).await;
    let stopped = worker.status().await.expect("a status");
    assert_eq!(stopped.log_memory_limit_bytes, Some(LEAST));
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(3) {
        let status = worker.status().await.expect("a status");
        let memory = status.log_memory_bytes.expect("a figure");
        assert!((LEAST..=LEAST + 2 * READ).contains(&memory), "{memory} bytes");
        assert_eq!(status.received, stopped.received, "nothing more is read");
        assert!(status.lag_bytes.is_some_and(|bytes| bytes > LEAST), "what waits at the source is shown: {status:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
