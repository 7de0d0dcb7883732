//! Large transactions that a worker writes into the target before they have ended on the source.

use crate::support::{Postgres, eventually};
use crate::worker::{Worker, assert_equal, wait_sql};
use std::time::{Duration, Instant};
use tokio_postgres::Client;

/// Sessions of the target that have written what is not committed. Each has an id by which its rows can be told.
const OPEN: &str = "SELECT backend_xid::text FROM pg_stat_activity WHERE application_name LIKE 'sluice load %' AND backend_xid IS NOT NULL";
/// What a worker logs when it gives up what it has written early.
const GIVEN_UP: &str = "is written when it has";

struct Stage {
    source: Postgres,
    target: Postgres,
    left: Client,
    right: Client,
    worker: Worker,
}

impl Stage {
    async fn new(major: u32) -> Self {
        let source = Postgres::start_with(major, &["logical_decoding_work_mem=64kB"]);
        let target = Postgres::start(15);
        let (left, right) = (source.create_database("shop").await, target.create_database("dw").await);
        left.batch_execute(
            "CREATE TABLE t (id bigint PRIMARY KEY, v text, n int); CREATE TABLE mark (id int PRIMARY KEY);
             INSERT INTO t SELECT i, 'seed', 0 FROM generate_series(1, 100) i",
        )
        .await
        .unwrap();
        let worker = Worker::start_with((&source, "shop"), (&target, "dw"), &["t", "mark"], |desired| {
            (desired.stream.max_batch_rows, desired.stream.max_batch_bytes) = (16_000, 8 << 20);
        });
        worker.wait_streaming().await;
        Self { source, target, left, right, worker }
    }

    /// Begins a transaction and inserts rows until some of it are in the target; gives the id of the transaction there.
    async fn begin(&self, from: u64, rows: u64) -> String {
        self.left.batch_execute("BEGIN").await.unwrap();
        self.insert(from, rows).await;
        self.early().await
    }

    async fn insert(&self, from: u64, rows: u64) {
        let insert = format!("INSERT INTO t SELECT i, repeat('x', 100), 1 FROM generate_series({from}, {from} + {rows} - 1) i");
        self.left.batch_execute(&insert).await.unwrap();
    }

    /// Waits until something is written early.
    async fn early(&self) -> String {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(xid) = self.open().await {
                return xid;
            }
            assert!(Instant::now() < deadline, "no rows are in the target before the transaction has ended");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Goes on inserting rows until a condition holds, so that the transaction never looks forgotten.
    async fn insert_until(&self, from: u64, sql: &str) {
        let deadline = Instant::now() + Duration::from_secs(60);
        for step in 0.. {
            if self.right.query_one(sql, &[]).await.expect("a look").get(0) {
                break;
            }
            assert!(Instant::now() < deadline, "still not: {sql}");
            self.insert(from + step * 500, 500).await;
        }
    }

    async fn open(&self) -> Option<String> {
        let open = self.right.query(OPEN, &[]).await.expect("a look");
        assert!(open.len() <= 1, "one at a time");
        open.first().map(|row| row.get(0))
    }

    async fn visible(&self, rows: &str) -> i64 {
        self.right.query_one(&format!("SELECT count(*) FROM t WHERE {rows}"), &[]).await.unwrap().get(0)
    }

    async fn level(&self) {
        self.worker.wait_level(&self.left).await;
        assert_equal(&self.left, &self.right, &["t", "mark"]).await;
        eventually(10, "nothing is open", || async { self.open().await.is_none() }).await;
    }
}

/// Everything that can become of such a transaction.
pub async fn early(major: u32) {
    let mut stage = Stage::new(major).await;
    committed(&stage).await;
    rolled_back(&stage).await;
    ends_in_other_changes(&stage).await;
    given_up(&stage).await;
    killed(&mut stage).await;
}

/// Rows are there before the commit, nobody sees them, and they are the very rows that are there afterwards.
async fn committed(stage: &Stage) {
    let xid = stage.begin(1_000, 60_000).await;
    // Rows that nobody sees take room all the same.
    stage.insert_until(1_000_000, "SELECT pg_relation_size('t') > 4 * 1024 * 1024").await;
    assert_eq!(stage.visible("id >= 1000").await, 0);
    // Others go on beside it.
    let other = stage.source.connect("shop").await;
    other
        .batch_execute("INSERT INTO t VALUES (900, 'other', 2); UPDATE t SET n = 3 WHERE id <= 10; DELETE FROM t WHERE id = 11")
        .await
        .unwrap();
    stage.insert_until(2_000_000, "SELECT count(*) = 1 AND (SELECT count(*) FROM t WHERE id = 11) = 0 FROM t WHERE id = 900").await;
    assert_eq!(stage.open().await.as_ref(), Some(&xid), "nothing was rolled back");
    stage.left.batch_execute("INSERT INTO mark VALUES (1); COMMIT").await.unwrap();
    stage.level().await;
    assert_eq!(stage.visible(&format!("id >= 1000 AND xmin::text <> '{xid}'")).await, 0, "all of them are of that transaction");
    assert!(stage.visible("id >= 1000").await >= 60_000);
}

/// What is rolled back on the source frees its keys for whoever comes next there.
async fn rolled_back(stage: &Stage) {
    let other = stage.source.connect("shop").await;
    for whole in [false, true] {
        let base = if whole { 200_000 } else { 100_000 };
        stage.left.batch_execute("BEGIN").await.unwrap();
        stage.insert(base, 100).await;
        stage.left.batch_execute("SAVEPOINT s").await.unwrap();
        stage.insert(base + 1_000, 40_000).await;
        stage.early().await;
        stage.left.batch_execute(if whole { "ROLLBACK" } else { "ROLLBACK TO s" }).await.unwrap();
        other
            .batch_execute(&format!("INSERT INTO t SELECT i, 'other', 2 FROM generate_series({base} + 1000, {base} + 2000) i"))
            .await
            .unwrap();
        wait_sql(&stage.right, 60, &format!("SELECT count(*) = 1001 FROM t WHERE id >= {base} AND v = 'other'")).await;
        if !whole {
            stage.insert(base + 50_000, 20_000).await;
            stage.left.batch_execute("COMMIT").await.unwrap();
        }
        stage.level().await;
    }
}

/// From the first other change on, the transaction waits for its commit.
async fn ends_in_other_changes(stage: &Stage) {
    let xid = stage.begin(300_000, 40_000).await;
    stage
        .left
        .batch_execute(
            "UPDATE t SET v = 'changed' WHERE id > 300000 AND id % 10 = 0; DELETE FROM t WHERE id > 300000 AND id % 10 = 1; TRUNCATE mark",
        )
        .await
        .unwrap();
    stage.insert(350_000, 20_000).await;
    assert_eq!(stage.visible("id BETWEEN 300000 AND 399999").await, 0);
    stage.left.batch_execute("COMMIT").await.unwrap();
    stage.level().await;
    assert!(stage.visible(&format!("id BETWEEN 300000 AND 399999 AND xmin::text = '{xid}'")).await > 50_000);
}

/// A failure before the end is none: the transaction comes again when it has ended.
async fn given_up(stage: &Stage) {
    assert!(!stage.worker.log().contains(GIVEN_UP), "nothing was given up so far\n{}", stage.worker.log());
    stage.right.batch_execute("INSERT INTO t VALUES (450000, 'not from the source', 0)").await.unwrap();
    stage.left.batch_execute("BEGIN").await.unwrap();
    stage.insert(400_000, 60_000).await;
    eventually(60, "it is given up", || async { stage.worker.log().contains(GIVEN_UP) }).await;
    wait_sql(&stage.right, 60, &format!("SELECT NOT EXISTS ({OPEN})")).await;
    stage.right.batch_execute("DELETE FROM t WHERE id = 450000").await.unwrap();
    stage.left.batch_execute("COMMIT").await.unwrap();
    stage.level().await;

    // Nor may a transaction that does nothing hold anything.
    stage.begin(500_000, 40_000).await;
    wait_sql(&stage.right, 60, &format!("SELECT NOT EXISTS ({OPEN})")).await;
    stage.left.batch_execute("COMMIT").await.unwrap();
    stage.level().await;

    // Its session ends.
    stage.begin(600_000, 40_000).await;
    stage
        .right
        .batch_execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'sluice load %'")
        .await
        .unwrap();
    stage.insert(650_000, 40_000).await;
    stage.left.batch_execute("COMMIT").await.unwrap();
    stage.level().await;
}

/// Signal 9 for the worker, and for the target: what was written early is gone, and nothing else.
async fn killed(stage: &mut Stage) {
    stage.begin(700_000, 40_000).await;
    stage.worker.kill9();
    stage.worker.spawn();
    stage.worker.wait_streaming().await;
    stage.early().await;
    stage.insert(750_000, 20_000).await;
    stage.left.batch_execute("COMMIT").await.unwrap();
    stage.level().await;

    stage.begin(800_000, 40_000).await;
    stage.target.kill_9_and_restart();
    stage.right = stage.target.connect("dw").await;
    stage.insert(850_000, 20_000).await;
    stage.left.batch_execute("COMMIT").await.unwrap();
    stage.level().await;
}
