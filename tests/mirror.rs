//! A whole worker between two real servers: contents are compared row by row, processes are killed with signal 9.

mod support;
#[path = "support/worker.rs"]
mod worker;

use rand::RngExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use support::Postgres;
use tokio_postgres::Client;
use worker::{Worker, assert_equal, wait_sql};

const TABLES: [&str; 4] = ["accounts", "\"Mixed Case\"", "notes", "log"];
const TABLE_NAMES: [&str; 4] = ["accounts", "Mixed Case", "notes", "log"];

/// Tables of different kinds, filled with `rows` rows each.
async fn seed(client: &Client, rows: i64) {
    client
        .batch_execute(&format!(
            "CREATE TABLE accounts (id bigint PRIMARY KEY, owner text NOT NULL, balance numeric(12,2), at timestamptz DEFAULT now(), tags text[], extra jsonb);
             CREATE TABLE \"Mixed Case\" (a int, \"B b\" uuid, note text, PRIMARY KEY (a, \"B b\"));
             CREATE TABLE notes (id int PRIMARY KEY, short int, long text, data bytea);
             ALTER TABLE notes ALTER long SET STORAGE EXTERNAL;
             CREATE TABLE log (what text, n int);
             ALTER TABLE log REPLICA IDENTITY FULL;
             INSERT INTO accounts SELECT g, 'owner ' || g, g / 7.0, '2026-01-01'::timestamptz + g * interval '1 s', ARRAY['a', 'b' || g], jsonb_build_object('g', g) FROM generate_series(1, {rows}) g;
             INSERT INTO \"Mixed Case\" SELECT g, md5(g::text)::uuid, NULLIF('n' || g % 5, 'n0') FROM generate_series(1, {rows}) g;
             INSERT INTO notes SELECT g, g, repeat(md5(g::text), 100), sha256(g::text::bytea) FROM generate_series(1, {rows} / 10) g;
             INSERT INTO log SELECT 'seed', g % 10 FROM generate_series(1, 100) g;"
        ))
        .await
        .expect("the seed");
}

/// One random transaction.
async fn change(client: &Client, n: u64, rows: i64) -> Result<(), tokio_postgres::Error> {
    let (pick, id) = {
        let mut rng = rand::rng();
        (rng.random_range(0..12), rng.random_range(1..=rows))
    };
    let fresh = rows + n as i64 * 10;
    let sql = match pick {
        0 | 1 => format!(
            "INSERT INTO accounts SELECT g, 'new', g, now(), NULL, '{{\"x\": [1, null]}}' FROM generate_series({fresh}, {fresh} + 5) g ON CONFLICT DO NOTHING"
        ),
        2 => format!("UPDATE accounts SET balance = balance + 1, extra = NULL WHERE id BETWEEN {id} AND {id} + 20"),
        3 => format!("DELETE FROM accounts WHERE id BETWEEN {id} AND {id} + 3"),
        4 => format!("UPDATE accounts SET id = {fresh} + 7 WHERE id = {id} AND NOT EXISTS (SELECT FROM accounts WHERE id = {fresh} + 7)"),
        5 => format!("UPDATE notes SET short = short + 1 WHERE id = {id} / 10"),
        6 => format!("UPDATE notes SET long = repeat('z{n}', 2000) WHERE id = {id} / 10"),
        7 => format!("UPDATE \"Mixed Case\" SET note = 'changed {n}' WHERE a % 97 = {id} % 97"),
        8 => format!(
            "BEGIN; DELETE FROM \"Mixed Case\" WHERE a = {id}; INSERT INTO \"Mixed Case\" SELECT {id}, md5('{id}')::uuid, 'again' ; COMMIT"
        ),
        9 => {
            format!("INSERT INTO log VALUES ('w', {id} % 3), ('w', {id} % 3); DELETE FROM log WHERE ctid = (SELECT ctid FROM log LIMIT 1)")
        }
        10 => format!("UPDATE log SET what = 'u' WHERE ctid = (SELECT ctid FROM log WHERE n = {id} % 3 LIMIT 1)"),
        _ => format!("BEGIN; INSERT INTO accounts SELECT g FROM generate_series({fresh}, {fresh} + 100) g; ROLLBACK"),
    };
    match client.batch_execute(&sql).await {
        Err(error) if error.as_db_error().is_some() => client.batch_execute("ROLLBACK").await,
        other => other,
    }
}

/// Changes rows until told to stop.
struct Writers {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Writers {
    async fn start(server: &Postgres, database: &str, writers: u64, rows: i64) -> Self {
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(1)));
        let mut tasks = Vec::new();
        for _ in 0..writers {
            let client = server.connect(database).await;
            let (stop, count) = (Arc::clone(&stop), Arc::clone(&count));
            tasks.push(tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let n = count.fetch_add(1, Ordering::Relaxed);
                    change(&client, n, rows).await.expect("a change");
                }
            }));
        }
        Self { stop, count, tasks }
    }

    /// Waits until so many more transactions have run.
    async fn progress(&self, transactions: u64) {
        let goal = self.count.load(Ordering::Relaxed) + transactions;
        support::eventually(60, "writers go on", || async { self.count.load(Ordering::Relaxed) >= goal }).await;
    }

    async fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.expect("the writer has not failed");
        }
    }
}

async fn pair(major: u32) -> (Postgres, Postgres, Client, Client) {
    let (source, target) = (Postgres::start(major), Postgres::start(15));
    let (left, right) = (source.create_database("shop").await, target.create_database("dw").await);
    (source, target, left, right)
}

async fn copy_and_stream(major: u32) {
    let (source, target, left, right) = pair(major).await;
    seed(&left, 5_000).await;
    let writers = Writers::start(&source, "shop", 2, 5_000).await;
    let worker = Worker::start((&source, "shop"), (&target, "dw"), &TABLE_NAMES);
    worker.wait_streaming().await;
    writers.progress(300).await;
    writers.finish().await;
    worker.wait_level(&left).await;
    assert_equal(&left, &right, &TABLES).await;
    let keys: i64 = right
        .query_one(
            "SELECT count(*) FROM pg_index WHERE indisprimary AND indrelid::regclass::text IN ('accounts', '\"Mixed Case\"', 'notes')",
            &[],
        )
        .await
        .unwrap()
        .get(0);
    assert_eq!(keys, 3, "primary keys are built after the data");
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_written_during_the_copy_and_after_it_arrive_from_postgres_14() {
    copy_and_stream(14).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_written_during_the_copy_and_after_it_arrive_from_postgres_15() {
    copy_and_stream(15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_written_during_the_copy_and_after_it_arrive_from_postgres_17() {
    copy_and_stream(17).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_at_random_moments_loses_and_doubles_nothing() {
    let (source, target, left, right) = pair(15).await;
    seed(&left, 20_000).await;
    let writers = Writers::start(&source, "shop", 2, 20_000).await;
    let mut worker = Worker::start((&source, "shop"), (&target, "dw"), &TABLE_NAMES);
    for _ in 0..8 {
        // Early kills hit set-up and copy, later ones the stream.
        let pause = rand::rng().random_range(20..900);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        worker.kill9();
        worker.spawn();
    }
    worker.wait_streaming().await;
    for _ in 0..5 {
        writers.progress(rand::rng().random_range(5..60)).await;
        worker.kill9();
        worker.spawn();
        worker.wait_streaming().await;
    }
    writers.finish().await;
    worker.wait_level(&left).await;
    assert_equal(&left, &right, &TABLES).await;
    let slots: i64 = left.query_one("SELECT count(*) FROM pg_replication_slots", &[]).await.unwrap().get(0);
    assert_eq!(slots, 1, "no temporary slot stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_crashes_under_load_loses_nothing() {
    let (source, mut target, left, right) = pair(15).await;
    drop(right);
    seed(&left, 2_000).await;
    let worker = Worker::start((&source, "shop"), (&target, "dw"), &TABLE_NAMES);
    worker.wait_streaming().await;
    let writers = Writers::start(&source, "shop", 3, 2_000).await;
    for _ in 0..4 {
        writers.progress(rand::rng().random_range(50..200)).await;
        target.crash_and_restart();
        worker.wait_streaming().await;
    }
    writers.finish().await;
    worker.wait_level(&left).await;
    let right = target.connect("dw").await;
    assert_equal(&left, &right, &TABLES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_crashes_is_followed_again() {
    let (mut source, target, left, right) = pair(15).await;
    seed(&left, 1_000).await;
    let worker = Worker::start((&source, "shop"), (&target, "dw"), &TABLE_NAMES);
    worker.wait_streaming().await;
    left.batch_execute("UPDATE accounts SET owner = 'before'").await.unwrap();
    source.crash_and_restart();
    let left = source.connect("shop").await;
    left.batch_execute("UPDATE accounts SET balance = 1").await.unwrap();
    worker.wait_level(&left).await;
    assert_equal(&left, &right, &TABLES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_workers_with_one_identity_exactly_one_writes() {
    let (source, target, left, right) = pair(15).await;
    seed(&left, 1_000).await;
    let mut first = Worker::start((&source, "shop"), (&target, "dw"), &TABLE_NAMES);
    first.wait_streaming().await;
    let writers = Writers::start(&source, "shop", 2, 1_000).await;
    let second = Worker::start((&source, "shop"), (&target, "dw"), &TABLE_NAMES);
    support::eventually(60, "the first worker ends", || {
        let code = first.exit_code();
        async move { code == Some(3) }
    })
    .await;
    second.wait_streaming().await;
    writers.finish().await;
    second.wait_level(&left).await;
    assert_equal(&left, &right, &TABLES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_larger_than_a_batch_is_one_target_transaction() {
    let (source, target, left, right) = pair(15).await;
    seed(&left, 1_000).await;
    let worker = Worker::start((&source, "shop"), (&target, "dw"), &TABLE_NAMES);
    worker.wait_streaming().await;
    left.batch_execute("INSERT INTO accounts SELECT g, repeat('x', 200), g, now(), NULL, NULL FROM generate_series(100000, 150000) g")
        .await
        .unwrap();
    // Readers of the target see none of it or all of it.
    let mut seen = 0i64;
    support::eventually(60, "the transaction arrives", || async {
        let count: i64 = right.query_one("SELECT count(*) FROM accounts WHERE id >= 100000", &[]).await.unwrap().get(0);
        assert!(count == 0 || count == 50_001, "a part of the transaction is visible: {count}");
        count == 50_001
    })
    .await;
    seen += 1;
    assert_eq!(seen, 1);
    worker.wait_level(&left).await;
    assert_equal(&left, &right, &TABLES).await;
    let rss = resident_bytes(worker.pid());
    assert!(rss < 256 << 20, "the worker holds {} MiB", rss >> 20);
}

fn resident_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a running process");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("VmHWM");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number") * 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn suspend_acts_within_a_second_and_resume_goes_on() {
    let (source, target, left, right) = pair(15).await;
    seed(&left, 1_000).await;
    let mut worker = Worker::start((&source, "shop"), (&target, "dw"), &TABLE_NAMES);
    worker.wait_streaming().await;
    let writers = Writers::start(&source, "shop", 1, 1_000).await;
    writers.progress(50).await;
    let asked = std::time::Instant::now();
    worker.change(|desired| desired.suspend = true).await;
    worker.wait_for(5, "suspended", |status| status.phase == sluice::worker::contract::Phase::Suspended).await;
    assert!(asked.elapsed() < Duration::from_secs(2), "suspend took {:?}", asked.elapsed());
    wait_sql(&left, 5, "SELECT NOT active FROM pg_replication_slots WHERE slot_name = 'sluice_test'").await;
    let position = worker.status().await.unwrap().applied;
    writers.progress(50).await;
    assert_eq!(worker.status().await.unwrap().applied, position, "nothing is applied while suspended");
    // A restart while suspended stays suspended.
    worker.kill9();
    worker.spawn();
    worker.wait_for(10, "suspended again", |status| status.phase == sluice::worker::contract::Phase::Suspended).await;
    worker.change(|desired| desired.suspend = false).await;
    writers.finish().await;
    worker.wait_level(&left).await;
    assert_equal(&left, &right, &TABLES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_password_leads_to_a_reconnect_not_a_restart() {
    let (source, target, left, right) = pair(15).await;
    seed(&left, 100).await;
    left.batch_execute("CREATE ROLE cdc SUPERUSER LOGIN PASSWORD 'one'").await.unwrap();
    let worker = Worker::start((&source, "shop"), (&target, "dw"), &TABLE_NAMES);
    worker.write_credentials("source", "cdc", "one");
    worker.wait_streaming().await;
    wait_sql(&left, 10, "SELECT count(*) > 0 FROM pg_stat_replication WHERE usename = 'cdc'").await;
    let pid = worker.pid();
    left.batch_execute("ALTER ROLE cdc PASSWORD 'two'").await.unwrap();
    left.batch_execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'cdc'").await.unwrap();
    worker.wait_reason("AuthenticationFailed").await;
    worker.write_credentials("source", "cdc", "two");
    worker.wait_for(30, "streaming with the new password", |status| status.streaming && status.error.is_none()).await;
    left.batch_execute("UPDATE accounts SET owner = 'rotated'").await.unwrap();
    worker.wait_level(&left).await;
    assert_equal(&left, &right, &TABLES).await;
    assert_eq!(worker.pid(), pid);
    for secret in ["one", "two", "pw"] {
        assert!(
            !worker.log().contains(&format!("\"{secret}\"")) && !worker.log().contains(&format!("password={secret}")),
            "a password in the log"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_can_be_added_and_removed_while_the_others_stream() {
    let (source, target, left, right) = pair(15).await;
    seed(&left, 2_000).await;
    let mut worker = Worker::start((&source, "shop"), (&target, "dw"), &["accounts", "notes"]);
    worker.wait_streaming().await;
    let writers = Writers::start(&source, "shop", 2, 2_000).await;
    writers.progress(50).await;
    worker
        .change(|desired| desired.tables = Some(vec![worker::table("accounts"), worker::table("Mixed Case"), worker::table("log")]))
        .await;
    worker.wait_for(60, "three tables ready", |status| status.streaming && status.tables.get("Ready") == Some(&3)).await;
    writers.progress(50).await;
    writers.finish().await;
    worker.wait_level(&left).await;
    assert_equal(&left, &right, &["accounts", "\"Mixed Case\"", "log"]).await;
    let kept: i64 = right.query_one("SELECT count(*) FROM notes", &[]).await.unwrap().get(0);
    assert!(kept > 0, "the data of a removed table stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn excluded_columns_never_leave_the_source() {
    let (source, target, left, right) = pair(15).await;
    seed(&left, 500).await;
    let worker = Worker::start_with((&source, "shop"), (&target, "dw"), &["accounts"], |desired| {
        desired.tables.as_mut().unwrap()[0].exclude_columns = vec!["balance".into(), "extra".into()];
        desired.tables.as_mut().unwrap()[0].target_schema = "other".into();
        desired.tables.as_mut().unwrap()[0].target_name = "people".into();
    });
    worker.wait_streaming().await;
    left.batch_execute("UPDATE accounts SET balance = 4711, owner = 'x' WHERE id < 10; INSERT INTO accounts VALUES (9999, 'n', 4711)")
        .await
        .unwrap();
    worker.wait_level(&left).await;
    let wanted = worker::rows(&left, "(SELECT id, owner, at, tags FROM accounts)").await;
    assert_eq!(wanted, worker::rows(&right, "other.people").await);
    let columns: i64 = right
        .query_one("SELECT count(*) FROM pg_attribute WHERE attrelid = 'other.people'::regclass AND attnum > 0", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(columns, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn truncate_is_one_statement_for_all_its_tables() {
    let (source, target, left, right) = pair(15).await;
    seed(&left, 500).await;
    let worker = Worker::start((&source, "shop"), (&target, "dw"), &TABLE_NAMES);
    worker.wait_streaming().await;
    left.batch_execute(
        "BEGIN; INSERT INTO accounts VALUES (7777, 'gone'); TRUNCATE accounts, notes; INSERT INTO accounts VALUES (1, 'after'); COMMIT",
    )
    .await
    .unwrap();
    worker.wait_level(&left).await;
    assert_equal(&left, &right, &TABLES).await;
}

/// For a while two rows may share a key that is checked later, so it names neither of them.
#[tokio::test(flavor = "multi_thread")]
async fn rows_exchange_a_primary_key_that_is_checked_at_the_commit() {
    let (source, target, left, right) = pair(15).await;
    left.batch_execute(
        "CREATE TABLE places (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, name text, n int);
         ALTER TABLE places REPLICA IDENTITY FULL;
         INSERT INTO places SELECT g, 'name ' || g, 0 FROM generate_series(1, 1000) g",
    )
    .await
    .unwrap();
    let worker = Worker::start((&source, "shop"), (&target, "dw"), &["places"]);
    worker.wait_streaming().await;
    for change in [
        "UPDATE places SET id = 3 - id WHERE id < 3",
        "UPDATE places SET id = 1 + id % 500 WHERE id <= 500",
        "UPDATE places SET id = 7 WHERE id = 8; UPDATE places SET n = 1 WHERE name = (SELECT min(name) FROM places WHERE id = 7); \
         UPDATE places SET id = 8 WHERE id = 7 AND n = 0; DELETE FROM places WHERE id = 9",
        "INSERT INTO places VALUES (600, 'second', 2); DELETE FROM places WHERE id = 600 AND n = 0",
    ] {
        left.batch_execute(&format!("BEGIN; {change}; COMMIT")).await.unwrap();
    }
    worker.wait_level(&left).await;
    assert_equal(&left, &right, &["places"]).await;
    let deferred = "SELECT condeferrable AND condeferred FROM pg_constraint WHERE conrelid = 'places'::regclass AND contype = 'p'";
    assert!(right.query_one(deferred, &[]).await.unwrap().get::<_, bool>(0), "the target's key is the source's");
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_the_worker_in_time_with_its_position_kept() {
    let (source, target, left, right) = pair(15).await;
    seed(&left, 1_000).await;
    let mut worker = Worker::start((&source, "shop"), (&target, "dw"), &TABLE_NAMES);
    worker.wait_streaming().await;
    let writers = Writers::start(&source, "shop", 2, 1_000).await;
    writers.progress(100).await;
    let asked = std::time::Instant::now();
    assert_eq!(worker.terminate(), Some(0));
    assert!(asked.elapsed() < Duration::from_secs(30));
    writers.finish().await;
    worker.spawn();
    worker.wait_level(&left).await;
    assert_equal(&left, &right, &TABLES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_streamed_are_counted_once_whatever_happens_to_the_worker() {
    let (source, target, left, right) = pair(15).await;
    seed(&left, 1_000).await;
    let mut worker = Worker::start((&source, "shop"), (&target, "dw"), &TABLE_NAMES);
    worker.wait_streaming().await;
    left.batch_execute("UPDATE accounts SET owner = 'one' WHERE id <= 100; DELETE FROM accounts WHERE id <= 10").await.unwrap();
    worker.wait_level(&left).await;
    worker.kill9();
    worker.spawn();
    left.batch_execute("INSERT INTO log VALUES ('x', 1), ('y', 2)").await.unwrap();
    worker.wait_level(&left).await;
    assert_eq!(worker.status().await.unwrap().rows_streamed, 112);
    assert_equal(&left, &right, &TABLES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_only_others_move_is_followed_with_a_known_latency() {
    let (source, target, left, _right) = pair(15).await;
    seed(&left, 100).await;
    let others = source.create_database("others").await;
    let worker = Worker::start((&source, "shop"), (&target, "dw"), &TABLE_NAMES);
    worker.wait_streaming().await;
    // Nothing of these rows is sent: all that comes is a message of the worker's own.
    others.batch_execute("CREATE TABLE t AS SELECT repeat('x', 100) FROM generate_series(1, 10000)").await.expect("log");
    worker.wait_for(60, "a heartbeat", |status| status.latency_p50_milliseconds.is_some()).await;
    let status = worker.status().await.expect("a status");
    let (median, slow) = (status.latency_p50_milliseconds.expect("a median"), status.latency_p99_milliseconds.expect("a percentile"));
    assert!(median >= 1 && median <= slow && slow < 20_000, "{median} ms, {slow} ms");
    assert_eq!(status.rows_streamed, 0);
    wait_sql(&left, 30, "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn) < 65536 FROM pg_replication_slots").await;
}
