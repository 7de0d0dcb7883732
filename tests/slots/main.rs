//! Slots of whole workers on real servers: the log that a source keeps, what becomes of a slot, and failover.

mod budget;
mod failover;
mod states;
#[path = "../support/mod.rs"]
mod support;
#[path = "../support/worker.rs"]
mod worker;

use support::Postgres;
use tokio_postgres::Client;
use worker::Worker;

const MIB: u64 = 1 << 20;

/// Source, target and a worker between them that streams table `t`.
struct Pair {
    source: Postgres,
    target: Postgres,
    left: Client,
    right: Client,
    worker: Worker,
}

impl Pair {
    async fn streaming(major: u32, change: impl FnOnce(&mut sluice::worker::contract::Desired)) -> Self {
        let pair = Self::start(Postgres::start(major), change).await;
        pair.worker.wait_streaming().await;
        pair
    }

    async fn start(source: Postgres, change: impl FnOnce(&mut sluice::worker::contract::Desired)) -> Self {
        let target = Postgres::start(15);
        let (left, right) = (source.create_database("shop").await, target.create_database("dw").await);
        left.batch_execute(
            "CREATE TABLE t (id int PRIMARY KEY, note text); INSERT INTO t SELECT g, 'seed' FROM generate_series(1, 5000) g",
        )
        .await
        .expect("a table");
        let worker = Worker::start_with((&source, "shop"), (&target, "dw"), &["t"], change);
        Self { source, target, left, right, worker }
    }

    async fn suspend(&mut self) {
        self.worker.change(|desired| desired.suspend = true).await;
        self.worker.wait_for(10, "suspended", |status| status.phase == sluice::worker::contract::Phase::Suspended).await;
    }

    async fn resume(&mut self) {
        self.worker.change(|desired| desired.suspend = false).await;
    }

    async fn assert_level(&self) {
        self.worker.wait_level(&self.left).await;
        worker::assert_equal(&self.left, &self.right, &["t"]).await;
    }

    /// Changes that must not be missing on the target: of all kinds, so that a copy over the old rows would show.
    async fn change_rows(&self) {
        let sql = "DELETE FROM t WHERE id % 7 = 0; UPDATE t SET note = 'changed' WHERE id % 5 = 0; INSERT INTO t SELECT max(id) + 1, 'new' FROM t";
        self.left.batch_execute(sql).await.expect("changes");
    }

    async fn slots(&self) -> i64 {
        let sql = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'sluice_test'";
        self.left.query_one(sql, &[]).await.expect("slots").get(0)
    }

    async fn comment(&self) -> Option<String> {
        let sql = "SELECT obj_description(oid, 'pg_publication') FROM pg_publication WHERE pubname = 'sluice_test'";
        self.left.query_one(sql, &[]).await.expect("the publication").get(0)
    }
}

/// Writes about so many mebibytes of log that no table gets to see.
async fn write(source: &Client, mebibytes: i32) {
    let sql = format!("SELECT pg_logical_emit_message(false, 'test', repeat('x', 1048576)) FROM generate_series(1, {mebibytes})");
    source.batch_execute(&sql).await.expect("log");
}

/// The reason of what the worker tells beside its work.
fn told(status: &sluice::worker::contract::Status) -> Option<&str> {
    status.notice.as_ref().map(|notice| notice.reason.as_str())
}
