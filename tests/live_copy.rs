//! Tables are copied while the others stream on: what the others get meanwhile, what the source keeps, and what kills leave behind.

mod support;
#[path = "support/worker.rs"]
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use support::{Postgres, eventually};
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use worker::{Worker, assert_equal, table, wait_sql};

/// Rows of the table that is added: several ranges.
const ROWS: i64 = 10_000;
/// Locks behind which the target's triggers on the added table wait: rows that are copied, rows that are updated.
const COPY_GATE: i64 = 42;
const UPDATE_GATE: i64 = 43;

/// A Mirror that streams `a`. The target has the table `b` already, with triggers that wait for the gates, replica role or not.
struct Stage {
    source: Postgres,
    _target: Postgres,
    left: Client,
    right: Client,
    /// Holds the gates.
    keeper: Client,
    worker: Worker,
}

impl Stage {
    async fn new(major: u32) -> Self {
        let (source, target) = (Postgres::start(major), Postgres::start(major));
        let (left, right) = (source.create_database("shop").await, target.create_database("dw").await);
        left.batch_execute(&format!(
            "CREATE TABLE a (id int PRIMARY KEY, note text); CREATE TABLE b (id int PRIMARY KEY, note text);
             INSERT INTO a SELECT g, 'first' FROM generate_series(1, 100) g;
             INSERT INTO b SELECT g, repeat('first', 20) FROM generate_series(1, {ROWS}) g; ANALYZE b"
        ))
        .await
        .expect("the seed");
        right
            .batch_execute(&format!(
                "CREATE TABLE b (id int PRIMARY KEY, note text);
                 CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN PERFORM pg_advisory_xact_lock_shared(TG_ARGV[0]::bigint); RETURN NULL; END $$;
                 CREATE TRIGGER copied BEFORE INSERT ON b FOR EACH STATEMENT EXECUTE FUNCTION wait_at_gate({COPY_GATE});
                 CREATE TRIGGER updated BEFORE UPDATE ON b FOR EACH STATEMENT EXECUTE FUNCTION wait_at_gate({UPDATE_GATE});
                 ALTER TABLE b ENABLE ALWAYS TRIGGER copied; ALTER TABLE b ENABLE ALWAYS TRIGGER updated"
            ))
            .await
            .expect("the gates");
        let keeper = target.connect("dw").await;
        let worker = Worker::start((&source, "shop"), (&target, "dw"), &["a"]);
        worker.wait_streaming().await;
        Self { source, _target: target, left, right, keeper, worker }
    }

    async fn close(&self, gate: i64) {
        self.keeper.batch_execute(&format!("SELECT pg_advisory_lock({gate})")).await.expect("a gate");
    }

    async fn open(&self, gate: i64) {
        self.keeper.batch_execute(&format!("SELECT pg_advisory_unlock({gate})")).await.expect("a gate");
    }

    async fn wait_at(&self, gate: i64) {
        let waits =
            format!("SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = {gate} AND objsubid = 1 AND NOT granted)");
        wait_sql(&self.right, 60, &waits).await;
    }

    async fn add_b(&mut self) {
        self.worker.change(|desired| desired.tables = Some(vec![table("a"), table("b")])).await;
    }

    /// A row of `a` that is committed now arrives.
    async fn marker_arrives(&self, id: i64) {
        self.left.batch_execute(&format!("INSERT INTO a VALUES ({id}, 'marker')")).await.expect("a marker");
        wait_sql(&self.right, 60, &format!("SELECT EXISTS (SELECT FROM a WHERE id = {id})")).await;
    }

    /// State of `b` in the checkpoint, and whether it is right up to a place before the checkpoint.
    async fn state(&self) -> (String, bool) {
        let sql = "SELECT state, coalesce(tables.position::pg_lsn < streams.position::pg_lsn, false)
                   FROM _sluice.tables JOIN _sluice.streams USING (slot) WHERE source_table = 'b'";
        let row = self.right.query_one(sql, &[]).await.expect("a state");
        (row.get(0), row.get(1))
    }

    async fn bytes(&self, expression: &str) -> i64 {
        let sql = format!("SELECT pg_wal_lsn_diff({expression}, '0/0')::int8 FROM pg_replication_slots WHERE slot_name = 'sluice_test'");
        self.left.query_one(&sql, &[]).await.expect("a position").get(0)
    }

    async fn finish(self, writer: Writer) {
        self.worker.wait_for(90, "both tables ready", |status| status.streaming && status.tables.get("Ready") == Some(&2)).await;
        writer.finish().await;
        self.worker.wait_level(&self.left).await;
        assert_equal(&self.left, &self.right, &["a", "b"]).await;
        let slots: i64 = self.left.query_one("SELECT count(*) FROM pg_replication_slots", &[]).await.expect("a count").get(0);
        assert_eq!(slots, 1, "no temporary slot stays");
    }
}

/// Changes rows of both tables until told to stop.
struct Writer {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Writer {
    async fn start(server: &Postgres) -> Self {
        let client = server.connect("shop").await;
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (told, counter) = (Arc::clone(&stop), Arc::clone(&count));
        let task = tokio::spawn(async move {
            while !told.load(Ordering::Relaxed) {
                let n = counter.fetch_add(1, Ordering::Relaxed) as i64;
                let (id, fresh) = (1 + n * 7919 % ROWS, ROWS + 1 + n);
                let sql = format!(
                    "BEGIN; UPDATE a SET note = 'n {n}' WHERE id = 1 + {n} % 100; UPDATE b SET note = 'n {n}' WHERE id BETWEEN {id} AND {id} + 3; COMMIT;
                     INSERT INTO b VALUES ({fresh}, 'fresh'); DELETE FROM b WHERE id = {id} + 5; UPDATE b SET id = -{fresh} WHERE id = {id} + 7"
                );
                client.batch_execute(&sql).await.expect("changes");
            }
        });
        Self { stop, count, task }
    }

    /// Waits until so many more rounds are done.
    async fn progress(&self, rounds: u64) {
        let goal = self.count.load(Ordering::Relaxed) + rounds;
        eventually(60, "the writer goes on", || async { self.count.load(Ordering::Relaxed) >= goal }).await;
    }

    async fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.expect("the writer has not failed");
    }
}

async fn others_stream_on_while_a_table_is_copied(major: u32) {
    let mut stage = Stage::new(major).await;
    let writer = Writer::start(&stage.source).await;
    stage.close(COPY_GATE).await;
    stage.add_b().await;
    stage.wait_at(COPY_GATE).await;

    // What the copy needs later is held on the source, however far the others come.
    let held = stage.bytes("confirmed_flush_lsn").await;
    for id in [-1, -2, -3] {
        writer.progress(20).await;
        stage.marker_arrives(id).await;
        assert_eq!(stage.state().await, ("Copying".into(), false));
    }
    stage
        .worker
        .wait_for(30, "one table is ready, one is copied", |status| {
            !status.streaming && status.tables.get("Ready") == Some(&1) && status.tables.get("Copying") == Some(&1)
        })
        .await;
    let confirmed = stage.bytes("confirmed_flush_lsn").await;
    let applied: String = stage.right.query_one("SELECT position FROM _sluice.streams", &[]).await.expect("a position").get(0);
    let applied = stage.bytes(&format!("'{applied}'")).await;
    assert!(held <= confirmed && confirmed < applied, "held at {held}, confirmed {confirmed}, applied {applied}");

    stage.open(COPY_GATE).await;
    stage.finish(writer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn others_stream_on_while_a_table_is_copied_from_postgres_14() {
    others_stream_on_while_a_table_is_copied(14).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn others_stream_on_while_a_table_is_copied_from_postgres_15() {
    others_stream_on_while_a_table_is_copied(15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn others_stream_on_while_a_table_is_copied_from_postgres_17() {
    others_stream_on_while_a_table_is_copied(17).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_in_the_copy_and_in_the_catch_up_loses_and_doubles_nothing() {
    let mut stage = Stage::new(15).await;
    let writer = Writer::start(&stage.source).await;
    stage.close(COPY_GATE).await;
    stage.close(UPDATE_GATE).await;
    stage.add_b().await;
    stage.wait_at(COPY_GATE).await;
    writer.progress(20).await;
    stage.marker_arrives(-1).await;
    stage.worker.kill9();
    stage.worker.spawn();
    // The successor begins the copy again, and the others stream on.
    let again = "SELECT state = 'Copying' AND generation = 2 FROM _sluice.tables WHERE source_table = 'b'";
    wait_sql(&stage.right, 60, again).await;
    stage.wait_at(COPY_GATE).await;
    writer.progress(20).await;
    stage.marker_arrives(-2).await;

    // Its copy ends behind the checkpoint, and its first update waits.
    stage.open(COPY_GATE).await;
    stage.wait_at(UPDATE_GATE).await;
    assert_eq!(stage.state().await, ("CatchingUp".into(), true));
    stage.worker.wait_for(30, "it is told", |status| status.waiting.as_deref().is_some_and(|told| told.contains("read again"))).await;
    stage.worker.kill9();
    stage.worker.spawn();
    stage.wait_at(UPDATE_GATE).await;
    assert_eq!(stage.state().await, ("CatchingUp".into(), true));
    stage.open(UPDATE_GATE).await;
    let generations: i64 =
        stage.right.query_one("SELECT generation FROM _sluice.tables WHERE source_table = 'b'", &[]).await.expect("a number").get(0);
    assert_eq!(generations, 2, "the copy was kept");
    stage.finish(writer).await;
}

/// The slot of a copy waits for an old transaction; the others do not.
#[tokio::test(flavor = "multi_thread")]
async fn others_stream_on_while_a_copy_waits_for_an_old_transaction() {
    let mut stage = Stage::new(15).await;
    let old = stage.source.connect("shop").await;
    old.batch_execute("BEGIN; INSERT INTO b VALUES (-1, 'old')").await.expect("an old transaction");
    stage.add_b().await;
    let waits = "SELECT EXISTS (SELECT FROM pg_replication_slots WHERE temporary AND confirmed_flush_lsn IS NULL AND active)";
    wait_sql(&stage.left, 60, waits).await;
    stage.marker_arrives(-1).await;
    stage
        .worker
        .wait_for(30, "it is told", |status| status.waiting.as_deref().is_some_and(|told| told.contains("older transactions")))
        .await;

    // Whoever comes next ends the one that waits.
    let first: String =
        stage.left.query_one("SELECT slot_name::text FROM pg_replication_slots WHERE temporary", &[]).await.expect("a slot").get(0);
    stage.worker.kill9();
    stage.worker.spawn();
    wait_sql(&stage.left, 60, &format!("SELECT NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = '{first}')")).await;
    wait_sql(&stage.left, 60, waits).await;
    stage.marker_arrives(-2).await;
    old.batch_execute("COMMIT").await.expect("a commit");
    let writer = Writer::start(&stage.source).await;
    stage.finish(writer).await;
}
