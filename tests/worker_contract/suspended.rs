//! What a source keeps for a Mirror that rests, from a real server.

use crate::support::Postgres;
use crate::worker::Worker;
use sluice::worker::contract::{Phase, Retention, Status};
use tokio_postgres::Client;

/// Writes about so many mebibytes of log that no stream gets to see.
async fn write(source: &Client, mebibytes: i32) {
    let sql = format!("SELECT pg_logical_emit_message(false, 'test', repeat('x', 1048576)) FROM generate_series(1, {mebibytes})");
    source.batch_execute(&sql).await.unwrap();
}

/// Waits until the slot is seen like this.
async fn wait_seen(worker: &Worker, what: &str, like: impl Fn(&Status, &Retention) -> bool) -> Status {
    worker.wait_for(40, what, |status| status.retention.as_ref().is_some_and(|seen| like(status, seen))).await;
    worker.status().await.expect("a status")
}

fn told(status: &Status) -> Option<&str> {
    status.notice.as_ref().map(|notice| notice.reason.as_str())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_worker_watches_what_the_source_keeps() {
    const MIB: u64 = 1 << 20;
    let mut source = Postgres::start_with(15, &["max_slot_wal_keep_size=96MB", "min_wal_size=32MB", "max_wal_size=4GB"]);
    let target = Postgres::start(15);
    let (left, _right) = (source.create_database("shop").await, target.create_database("dw").await);
    left.batch_execute("CREATE TABLE t (id int PRIMARY KEY)").await.unwrap();
    let mut worker = Worker::start((&source, "shop"), (&target, "dw"), &["t"]);
    worker.wait_streaming().await;
    let status = wait_seen(&worker, "the slot is seen while it streams", |_, seen| seen.slot_exists).await;
    let before = status.retention.expect("it was seen");
    assert_eq!((before.wal_status.as_deref(), status.notice), (Some("reserved"), None));

    // It grows while nobody reads.
    worker.change(|desired| desired.suspend = true).await;
    worker.wait_for(10, "suspended", |status| status.phase == Phase::Suspended).await;
    write(&left, 40).await;
    let grown = |_: &Status, seen: &Retention| seen.retained_bytes.is_some_and(|bytes| bytes > 40 * MIB);
    let status = wait_seen(&worker, "the log grows", grown).await;
    let seen = status.retention.clone().expect("it was seen");
    assert!(status.lag_bytes.is_some_and(|bytes| bytes > 40 * MIB), "{status:?}");
    assert!(seen.safe_wal_size < before.safe_wal_size && seen.safe_wal_size > Some(0), "{seen:?}");
    assert_eq!((status.phase, status.epoch > 0, told(&status)), (Phase::Suspended, true, None));
    let metrics = reqwest::get(format!("http://127.0.0.1:{}/metrics", worker.port)).await.unwrap().text().await.unwrap();
    for line in [
        format!("sluice_worker_slot_retained_bytes {}", seen.retained_bytes.unwrap()),
        format!("sluice_worker_slot_safe_bytes {}", seen.safe_wal_size.unwrap()),
        format!("sluice_worker_lag_bytes {}", status.lag_bytes.unwrap()),
        "sluice_worker_slot_exists 1".into(),
        "sluice_worker_slot_lost 0".into(),
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line}\n{metrics}");
    }

    // Danger is told before the loss, also by a process that has never had a session.
    worker.kill9();
    let short = "SELECT safe_wal_size < 12 * 1048576 AND wal_status <> 'lost' FROM pg_replication_slots WHERE slot_name = 'sluice_test'";
    while !left.query_one(short, &[]).await.unwrap().get::<_, bool>(0) {
        write(&left, 2).await;
    }
    worker.spawn();
    let status = wait_seen(&worker, "danger is told", |status, _| told(status) == Some("SlotAtRisk")).await;
    assert_eq!((status.phase, status.epoch), (Phase::Suspended, 0));
    assert!(status.notice.expect("a notice").message.contains("sluice_test"));

    write(&left, 64).await;
    left.batch_execute("CHECKPOINT").await.unwrap();
    let lost = |status: &Status, seen: &Retention| seen.wal_status.as_deref() == Some("lost") && told(status) == Some("SlotLost");
    let status = wait_seen(&worker, "the loss is told", lost).await;
    assert!(status.notice.expect("a notice").message.contains("a Resync without tables"));
    left.batch_execute("SELECT pg_drop_replication_slot('sluice_test')").await.unwrap();
    let gone = Retention { slot_exists: false, retained_bytes: None, wal_status: None, safe_wal_size: None };
    wait_seen(&worker, "the slot is gone", |_, seen| *seen == gone).await;

    // Of a source that can't be asked nothing is known.
    source.stop();
    worker.wait_for(40, "nothing is known", |status| status.retention.is_none() && status.phase == Phase::Suspended).await;
}
