//! A writer that alters and writes while the worker is killed with signal 9 again and again.

use super::Pair;
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;
use tokio_postgres::Client;

/// Columns that come and go besides the key.
#[derive(Default)]
struct Table {
    /// Name, and which it is.
    columns: Vec<(String, u32)>,
    next: u32,
    key: i64,
}

impl Table {
    /// One statement or transaction.
    fn step(&mut self, random: &mut SmallRng) -> String {
        match random.random_range(0..12) {
            0 | 1 => self.alter(random),
            2 => format!("BEGIN; {}; {}; {}; COMMIT", self.write(random), self.alter(random), self.write(random)),
            3 => format!("BEGIN; {}; {}; ROLLBACK", self.write(random), "ALTER TABLE t ADD COLUMN never int DEFAULT 1"),
            _ => self.write(random),
        }
    }

    fn write(&mut self, random: &mut SmallRng) -> String {
        let some = random.random_range(1..=self.key.max(1));
        let value = random.random_range(0..1000);
        let column =
            self.columns.get(random.random_range(0..self.columns.len().max(1))).map_or("fixed", |(name, _)| name.as_str()).to_owned();
        match random.random_range(0..4) {
            0 => format!("DELETE FROM t WHERE id = {some}"),
            1 | 2 => format!("UPDATE t SET {column} = {value} WHERE id BETWEEN {some} AND {some} + 3"),
            _ => {
                let from = self.key + 1;
                self.key += 5;
                format!("INSERT INTO t (id, {column}) SELECT g, {value} FROM generate_series({from}, {}) g", self.key)
            }
        }
    }

    fn alter(&mut self, random: &mut SmallRng) -> String {
        let place = random.random_range(0..self.columns.len().max(1));
        match random.random_range(0..5) {
            0 if !self.columns.is_empty() => format!("ALTER TABLE t DROP COLUMN {}", self.columns.remove(place).0),
            1 if !self.columns.is_empty() => {
                self.next += 1;
                let new = format!("r{}", self.next);
                let old = std::mem::replace(&mut self.columns[place].0, new.clone());
                format!("ALTER TABLE t RENAME COLUMN {old} TO {new}")
            }
            2 if !self.columns.is_empty() => format!("ALTER TABLE t ALTER COLUMN {} TYPE bigint", self.columns[place].0),
            _ => {
                self.next += 1;
                let name = format!("c{}", self.next);
                self.columns.push((name.clone(), self.next));
                let default = if random.random() { format!(" DEFAULT {}", self.next) } else { String::new() };
                format!("ALTER TABLE t ADD COLUMN {name} int{default}")
            }
        }
    }
}

async fn write(client: Client, seed: u64, stop: Arc<AtomicBool>, count: Arc<AtomicU32>) {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut table = Table::default();
    while !stop.load(Ordering::Relaxed) {
        let sql = table.step(&mut random);
        client.batch_execute(&sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        count.fetch_add(1, Ordering::Relaxed);
        // Leaves the worker some time to see what is between.
        tokio::time::sleep(Duration::from_millis(random.random_range(0..8))).await;
    }
}

async fn crashes(major: u32) {
    let seed = rand::random();
    println!("seed {seed}");
    let pair = Pair::start(major).await;
    pair.left("CREATE TABLE t (id bigint PRIMARY KEY, fixed int); INSERT INTO t SELECT g, g FROM generate_series(-500, 0) g").await;
    let mut worker = pair.worker(&["t"]);
    worker.wait_streaming().await;
    let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let client = pair.source.connect("shop").await;
    let writer = tokio::spawn(write(client, seed, Arc::clone(&stop), Arc::clone(&count)));
    let mut random = SmallRng::seed_from_u64(seed);
    for _ in 0..8 {
        let goal = count.load(Ordering::Relaxed) + random.random_range(5..60);
        crate::support::eventually(60, "the writer goes on", || async { count.load(Ordering::Relaxed) >= goal || writer.is_finished() })
            .await;
        worker.kill9();
        worker.spawn();
        if random.random() {
            worker.wait_streaming().await;
        }
    }
    stop.store(true, Ordering::Relaxed);
    writer.await.expect("the writer has not failed");
    pair.left("INSERT INTO t (id) VALUES (1000000)").await;
    pair.left("INSERT INTO t (id) VALUES (1000001)").await;
    // A worker that comes late may find that log and catalog leave something open. Then it says what to do.
    loop {
        let arrived = "SELECT EXISTS (SELECT FROM t WHERE id = 1000001)";
        let refused = std::cell::RefCell::new(None);
        crate::support::eventually(120, "all is there, or a new copy is needed", || {
            let status = worker.status();
            let (right, refused) = (&pair.right, &refused);
            async move {
                let error = status.await.and_then(|status| status.error).filter(|error| error.reason == "SchemaChanged");
                let statement = error.and_then(|error| error.message.split_once("is gone: ").map(|(_, statement)| statement.to_owned()));
                refused.replace(statement);
                refused.borrow().is_some() || right.query_one(arrived, &[]).await.is_ok_and(|row| row.get(0))
            }
        })
        .await;
        let Some(statement) = refused.take() else { break };
        println!("{statement}");
        pair.right(&statement).await;
        worker.kill9();
        worker.spawn();
    }
    worker.wait_level(&pair.left).await;
    pair.assert_equal("t").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_while_a_table_is_altered_and_written_loses_nothing_from_postgres_14() {
    crashes(14).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_while_a_table_is_altered_and_written_loses_nothing_from_postgres_17() {
    crashes(17).await;
}
