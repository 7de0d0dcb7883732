//! The source fails over to a physical standby.

use crate::support::eventually;
use crate::worker::{Worker, assert_equal, wait_sql};
use crate::{Pair, Postgres};
use sluice::connectors::postgres::connect::Side;
use sluice::connectors::postgres::inspect::{Checks, inspect};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio_postgres::Client;

/// What a standby needs to have the slots of its primary. What holds for the primary would hold for it after a promotion, too.
const SYNCED: [&str; 3] = ["hot_standby_feedback=on", "sync_replication_slots=on", "synchronized_standby_slots=''"];
const IS_SYNCED: &str = "SELECT count(*) = 1 FROM pg_replication_slots
    WHERE slot_name = 'sluice_test' AND synced AND NOT temporary AND invalidation_reason IS NULL";

async fn warnings(server: &Postgres) -> Vec<&'static str> {
    let found = inspect(&server.endpoint("postgres"), Side::Source, Checks::default()).await.expect("an inspection");
    assert!(found.failed.iter().all(|failed| failed.warning && failed.cure.is_some()), "{found:?}");
    found.failed.iter().map(|failed| failed.name).filter(|name| *name != "SlotWalUnlimited").collect()
}

/// Changes rows of `t` until the server is gone; counts.
fn writer(client: Client) -> (Arc<AtomicU64>, tokio::task::JoinHandle<()>) {
    let done = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&done);
    let task = tokio::spawn(async move {
        for n in 0u64.. {
            let id = 10_000 + n;
            let sql = format!(
                "BEGIN; INSERT INTO t VALUES ({id}, 'new'); UPDATE t SET note = 'u{n}' WHERE id % 1000 = {n} % 1000; DELETE FROM t WHERE id = {id} - 50; COMMIT"
            );
            if client.batch_execute(&sql).await.is_err() {
                break;
            }
            count.store(n, Ordering::Relaxed);
        }
    });
    (done, task)
}

async fn reach(count: &AtomicU64, more: u64) {
    let goal = count.load(Ordering::Relaxed) + more;
    eventually(60, "the writer goes on", || async { count.load(Ordering::Relaxed) >= goal }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_standby_with_the_slot_is_gone_on_with_and_nothing_is_lost() {
    let mut primary = Postgres::start_with(17, &["synchronized_standby_slots='standby'"]);
    let standby = primary.standby(&SYNCED).await;
    let mut pair = Pair::start(primary, |_| {}).await;
    pair.worker.wait_streaming().await;
    eventually(60, "the standby fits", async || warnings(&pair.source).await.is_empty()).await;
    wait_sql(&pair.left, 5, "SELECT failover FROM pg_replication_slots WHERE slot_name = 'sluice_test'").await;
    let (count, writing) = writer(pair.source.connect("shop").await);
    let on_standby = standby.connect("postgres").await;
    wait_sql(&on_standby, 120, IS_SYNCED).await;
    reach(&count, 300).await;
    let copied = pair.worker.status().await.expect("a status").rows_copied;

    pair.source.kill_9();
    writing.await.expect("the writer ends with its server");
    // While nobody is the primary the worker waits.
    pair.worker.change(|desired| desired.source.port = standby.port).await;
    pair.worker.wait_reason("ServerUnsupported").await;
    standby.promote().await;
    pair.left = standby.connect("shop").await;
    let (count, writing) = writer_after(&standby).await;
    reach(&count, 100).await;
    pair.assert_level_while(writing).await;
    assert_eq!(pair.worker.status().await.expect("a status").rows_copied, copied, "nothing was copied again");
    let timeline: i64 = pair.right.query_one("SELECT timeline FROM _sluice.streams", &[]).await.expect("the checkpoint").get(0);
    assert_eq!(timeline, 2);
}

/// Another writer on the new primary, with ids of its own.
async fn writer_after(server: &Postgres) -> (Arc<AtomicU64>, tokio::task::JoinHandle<()>) {
    let client = server.connect("shop").await;
    client.batch_execute("UPDATE t SET id = -id WHERE id >= 10000").await.expect("a change");
    writer(client)
}

impl Pair {
    /// Stops the writer and compares.
    async fn assert_level_while(&self, writing: tokio::task::JoinHandle<()>) {
        writing.abort();
        let _ = writing.await;
        self.assert_level().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_lacks_what_the_target_has_is_not_gone_on_with() {
    let mut primary = Postgres::start(17);
    let standby = primary.standby(&SYNCED).await;
    let mut pair = Pair::start(primary, |_| {}).await;
    pair.worker.wait_streaming().await;
    eventually(60, "the risk is told", async || warnings(&pair.source).await == ["FailoverSlotsNotAwaited"]).await;
    let on_standby = standby.connect("postgres").await;
    pair.left.batch_execute("INSERT INTO t VALUES (20000, 'on both')").await.unwrap();
    wait_sql(&on_standby, 120, IS_SYNCED).await;
    // The standby falls behind, and the target does not.
    on_standby.batch_execute("ALTER SYSTEM SET primary_conninfo = 'host=127.0.0.1 port=1'").await.unwrap();
    on_standby.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    wait_sql(&pair.left, 30, "SELECT NOT active FROM pg_replication_slots WHERE slot_name = 'standby'").await;
    pair.left.batch_execute("INSERT INTO t VALUES (20001, 'not on the standby')").await.unwrap();
    pair.assert_level().await;
    let before = crate::worker::rows(&pair.right, "t").await;
    pair.source.kill_9();
    standby.promote().await;
    pair.worker.change(|desired| desired.source.port = standby.port).await;
    let error = pair.worker.wait_reason("TimelineDiverged").await.error.expect("an error");
    assert_eq!(error.class, "Stop");
    let promoted = standby.connect("shop").await;
    promoted.batch_execute("INSERT INTO t VALUES (20002, 'after')").await.unwrap();
    pair.worker.wait_for(60, "it was looked at again", |status| status.error.as_ref().is_some_and(|error| error.count > 1)).await;
    assert_eq!(crate::worker::rows(&pair.right, "t").await, before, "nothing is guessed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_is_awaited_and_away_is_told() {
    let mut primary = Postgres::start_with(17, &["synchronized_standby_slots='standby'"]);
    assert_eq!(warnings(&primary).await, ["FailoverStandbyAway"]);
    let mut standby = primary.standby(&["synchronized_standby_slots=''"]).await;
    eventually(60, "it does not synchronize slots", async || warnings(&primary).await == ["FailoverSlotsNotSynced"]).await;
    standby.stop();
    eventually(60, "it is away", async || warnings(&primary).await == ["FailoverStandbyAway"]).await;
}

/// A slot that was invalidated on a standby, which is then promoted: the reason that a worker gives.
async fn invalidated_on_a_standby(invalidate: impl AsyncFnOnce(&mut Postgres), cause: &str, reason: &str) {
    let mut primary = Postgres::start(17);
    let standby = primary.standby(&["hot_standby_feedback=off", "max_standby_streaming_delay=1s"]).await;
    let left = primary.create_database("shop").await;
    left.batch_execute("CREATE TABLE t (id int PRIMARY KEY, note text)").await.unwrap();
    let on_standby = standby.connect("postgres").await;
    wait_sql(&on_standby, 30, "SELECT count(*) = 1 FROM pg_database WHERE datname = 'shop'").await;
    let maker = standby.connect("shop").await;
    let making =
        tokio::spawn(async move { maker.batch_execute("SELECT pg_create_logical_replication_slot('sluice_test', 'pgoutput')").await });
    // It waits for a record of the primary.
    eventually(30, "the slot is made", async || {
        left.batch_execute("SELECT pg_log_standby_snapshot()").await.expect("a record");
        making.is_finished()
    })
    .await;
    making.await.expect("no panic").expect("a slot");
    invalidate(&mut primary).await;
    let sql =
        format!("SELECT invalidation_reason IS NOT DISTINCT FROM '{cause}' FROM pg_replication_slots WHERE slot_name = 'sluice_test'");
    wait_sql(&on_standby, 60, &sql).await;
    standby.promote().await;
    let target = Postgres::start(15);
    let right = target.create_database("dw").await;
    let worker = Worker::start((&standby, "shop"), (&target, "dw"), &["t"]);
    let error = worker.wait_reason(reason).await.error.expect("an error");
    assert!(error.class == "Stop" && error.message.contains(cause), "{error:?}");
    // Once it is gone there is nothing that could be missing: the target has never had anything of it.
    standby.connect("shop").await.batch_execute("SELECT pg_drop_replication_slot('sluice_test')").await.unwrap();
    worker.wait_streaming().await;
    assert_equal(&standby.connect("shop").await, &right, &["t"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_invalidated_by_removed_rows_has_that_reason() {
    let remove = async |primary: &mut Postgres| {
        let left = primary.connect("shop").await;
        left.batch_execute("CREATE TABLE gone (id int); DROP TABLE gone").await.unwrap();
        left.batch_execute("VACUUM FULL pg_class").await.unwrap();
        left.batch_execute("SELECT pg_log_standby_snapshot()").await.unwrap();
    };
    invalidated_on_a_standby(remove, "rows_removed", "SlotRowsRemoved").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_invalidated_by_wal_level_has_that_reason() {
    let lower = async |primary: &mut Postgres| {
        primary.connect("postgres").await.batch_execute("ALTER SYSTEM SET wal_level = replica").await.unwrap();
        primary.stop();
        primary.start_again();
    };
    invalidated_on_a_standby(lower, "wal_level_insufficient", "SlotWalLevelInsufficient").await;
}
