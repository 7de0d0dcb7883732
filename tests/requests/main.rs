//! One-off actions between two real servers: each is done once per id, whatever dies, and leaves the target equal to the source.

#[path = "../support/mod.rs"]
mod support;
#[path = "../support/worker.rs"]
mod worker;

mod cancelled;
mod once;
mod resynced;
mod small;

use sluice::worker::contract::{RequestReport, RequestSpec, Status};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use support::Postgres;
use tokio_postgres::Client;
use worker::Worker;

/// A Mirror of tables `a` (larger) and `b` that streams.
struct Stage {
    source: Postgres,
    target: Postgres,
    left: Client,
    right: Client,
    worker: Worker,
}

impl Stage {
    async fn streaming(rows: i32) -> Self {
        Self::with(rows, |_| {}).await
    }

    async fn with(rows: i32, change: impl FnOnce(&mut sluice::worker::contract::Desired)) -> Self {
        let (source, target) = (Postgres::start(15), Postgres::start(15));
        let (left, right) = (source.create_database("shop").await, target.create_database("dw").await);
        left.batch_execute(&format!(
            "CREATE TABLE a (id int PRIMARY KEY, note text NOT NULL);
             CREATE TABLE b (id int PRIMARY KEY, note text NOT NULL);
             INSERT INTO a SELECT g, 'first ' || g FROM generate_series(1, {rows}) g;
             INSERT INTO b SELECT g, 'first ' || g FROM generate_series(1, 100) g"
        ))
        .await
        .expect("the seed");
        let worker = Worker::start_with((&source, "shop"), (&target, "dw"), &["a", "b"], change);
        worker.wait_streaming().await;
        worker.wait_level(&left).await;
        Self { source, target, left, right, worker }
    }

    async fn assert_equal(&self) {
        self.worker.wait_level(&self.left).await;
        worker::assert_equal(&self.left, &self.right, &["a", "b"]).await;
    }

    /// Makes the target wrong behind our back.
    async fn spoil(&self, table: &str) {
        self.right
            .batch_execute(&format!("UPDATE {table} SET note = 'wrong' WHERE id <= 10; INSERT INTO {table} VALUES (-1, 'not there')"))
            .await
            .expect("wrong rows");
    }

    async fn generation(&self, table: &str) -> i64 {
        let sql = "SELECT generation FROM _sluice.tables WHERE source_table = $1";
        self.right.query_one(sql, &[&table]).await.expect("the table").get(0)
    }
}

/// Asks for an action.
async fn ask(worker: &mut Worker, id: &str, action: &str, tables: &[&str]) {
    let request = RequestSpec { id: id.into(), action: action.into(), tables: tables.iter().map(|&table| table.to_owned()).collect() };
    worker.change(|desired| desired.request = Some(request)).await;
}

fn found(status: &Status, id: &str) -> Option<RequestReport> {
    status.requests.as_ref()?.iter().find(|request| request.id == id).cloned()
}

/// Waits until a request is in this state; what is told of it.
async fn wait_state(worker: &Worker, id: &str, state: &str) -> RequestReport {
    worker.wait_for(90, &format!("{id} {state}"), |status| found(status, id).is_some_and(|request| request.state == state)).await;
    let status = worker.status().await.expect("a status");
    found(&status, id).expect("the request")
}

/// Changes rows of both tables until it is told to stop.
struct Writer {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<()>,
}

impl Writer {
    async fn start(stage: &Stage) -> Self {
        let client = stage.source.connect("shop").await;
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let task = tokio::spawn(async move {
            let mut n = 1_000_000;
            while !told.load(Ordering::Relaxed) {
                n += 1;
                let sql = format!(
                    "BEGIN; INSERT INTO a VALUES ({n}, 'new'); UPDATE a SET note = note || '.' WHERE id = {n} % 97 + 1;
                     DELETE FROM a WHERE id = {n} - 500; UPDATE b SET note = 'at {n}' WHERE id = {n} % 100 + 1; COMMIT"
                );
                client.batch_execute(&sql).await.expect("a change");
            }
        });
        Self { stop, task }
    }

    async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.expect("the writer");
    }
}
