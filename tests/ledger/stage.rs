//! Two servers, a worker process between them, and the checks.

use crate::model::{self, LINE, Model, TABLES};
use crate::support::Postgres;
use crate::worker::{self, Worker};
use crate::writer::{Shared, Writer, connect};
use rand::RngExt as _;
use rand::rngs::SmallRng;
use sluice::connectors::postgres::Lsn;
use sluice::worker::contract::Status;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{Mutex, RwLock};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

const WRITERS: usize = 3;
/// Rows of each writer to begin with, per table.
const ROWS: [i64; TABLES.len()] = [15_000, 4_000, 1_000, 15_000, 100];
/// How long a worker may take to come level, in seconds.
const LEVEL: u64 = 240;

pub struct Stage {
    pub source: Postgres,
    pub target: Postgres,
    pub worker: Worker,
    pub random: SmallRng,
    /// Mapped tables of the writers.
    tables: Vec<usize>,
    shared: Arc<Shared>,
    writers: Vec<JoinHandle<()>>,
    /// Kills by what the worker was doing.
    pub kills: BTreeMap<String, u32>,
    pub digests: u32,
    begun: Instant,
}

/// When the worker is killed.
#[derive(Clone, Copy, Debug)]
pub enum Moment {
    /// At any time within so many milliseconds.
    Within(u64),
    /// When a table is in this state.
    State(&'static str),
}

impl Stage {
    /// Servers of these majors; the first tables are mapped.
    pub async fn open(seed: u64, mut random: SmallRng, majors: (u32, u32), tables: &[usize]) -> Self {
        // Transactions of more than a few rows are sent before their end.
        let (source, target) = (Postgres::start_with(majors.0, &["logical_decoding_work_mem=64kB"]), Postgres::start(majors.1));
        let (left, right) = (source.create_database("shop").await, target.create_database("dw").await);
        left.batch_execute(model::CREATE).await.expect("the tables");
        if random.random() {
            println!("the target checks more than the key while rows come");
            right.batch_execute(model::UNIQUE).await.expect("the target's tables");
        }
        let shared = Arc::new(Shared {
            port: source.port,
            models: (0..WRITERS).map(|writer| Mutex::new(Model::new(writer))).collect(),
            gate: RwLock::new(()),
            stop: AtomicBool::new(false),
            transactions: AtomicU64::new(0),
            large: AtomicU64::new(0),
        });
        let mut writers = Vec::new();
        for number in 0..WRITERS {
            let mut writer = Writer::new(number, Arc::clone(&shared), seed).await;
            writer.fill(ROWS).await;
            writers.push(writer);
        }
        left.batch_execute("ANALYZE").await.expect("statistics");
        let writers = writers.into_iter().map(|writer| tokio::spawn(writer.write())).collect();
        let names: Vec<_> = std::iter::once("ledger").chain(tables.iter().map(|table| TABLES[*table])).collect();
        let mut worker = Worker::start((&source, "shop"), (&target, "dw"), &names);
        // From the next process on the log has the least memory, and large transactions go through the spill.
        worker.arguments = ["--memory-limit", "0"].map(str::to_owned).to_vec();
        let tables = tables.to_vec();
        Self { source, target, worker, random, tables, shared, writers, kills: BTreeMap::new(), digests: 0, begun: Instant::now() }
    }

    pub fn say(&self, what: &str) {
        println!("{:6.1} s  {what}", self.begun.elapsed().as_secs_f64());
    }

    /// Maps one more table.
    pub async fn add_table(&mut self, table: usize) {
        self.say(&format!("{} is added", TABLES[table]));
        self.worker.wait_for(60, "an answer", |_| true).await;
        self.tables.push(table);
        self.worker.change(|desired| desired.tables.as_mut().expect("tables").push(worker::table(TABLES[table]))).await;
    }

    /// The writers' next transactions are large ones.
    pub fn large_transactions(&self, count: u64) {
        self.shared.large.fetch_add(count, Ordering::Relaxed);
    }

    /// Waits until so many more transactions were tried.
    pub async fn progress(&self, transactions: u64) {
        let goal = self.shared.transactions.load(Ordering::Relaxed) + transactions;
        crate::support::eventually(120, "writers go on", || async {
            assert!(!self.writers.iter().any(JoinHandle::is_finished), "a writer has failed");
            self.shared.transactions.load(Ordering::Relaxed) >= goal
        })
        .await;
    }

    /// Signal 9 at a moment, then the checks that hold at any time, then a new process.
    pub async fn kill(&mut self, moment: Moment) {
        let reached = self.wait_moment(moment).await;
        self.worker.kill9();
        self.say(&format!("the worker is killed {reached}"));
        *self.kills.entry(reached).or_default() += 1;
        self.check_slot().await;
        self.check_digests().await;
        self.worker.spawn();
    }

    /// What was reached: the state that was waited for, or what the checkpoint says at that time.
    async fn wait_moment(&mut self, moment: Moment) -> String {
        let target = connect(self.target.port, "dw").await;
        if let Moment::State(state) = moment {
            let deadline = Instant::now() + Duration::from_secs(30);
            let sql = "SELECT FROM _sluice.tables WHERE state = $1";
            while Instant::now() < deadline {
                if target.query(sql, &[&state]).await.is_ok_and(|rows| !rows.is_empty()) {
                    let pause = self.random.random_range(0..15_000);
                    tokio::time::sleep(Duration::from_micros(pause)).await;
                    return format!("in {state}");
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            return format!("without {state}");
        }
        let Moment::Within(milliseconds) = moment else { unreachable!() };
        let pause = self.random.random_range(0..milliseconds);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let states = target.query("SELECT DISTINCT state FROM _sluice.tables ORDER BY 1", &[]).await.unwrap_or_default();
        format!("at random in {}", states.iter().map(|row| row.get(0)).collect::<Vec<String>>().join(" and "))
    }

    /// What was confirmed to the source is durable on the target.
    async fn check_slot(&self) {
        let (left, right) = (connect(self.source.port, "shop").await, connect(self.target.port, "dw").await);
        // In this order: the checkpoint can only grow.
        let slot = left.query_opt("SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = 'sluice_test'", &[]);
        let Some(confirmed) = slot.await.expect("the slots").and_then(|row| row.get::<_, Option<String>>(0)) else { return };
        let checkpoint = right.query_opt("SELECT position FROM _sluice.streams", &[]).await;
        let Ok(Some(Some(position))) = checkpoint.map(|row| row.map(|row| row.get::<_, Option<String>>(0))) else { return };
        let (confirmed, position) = (confirmed.parse::<Lsn>().expect("an LSN"), position.parse::<Lsn>().expect("an LSN"));
        assert!(position >= confirmed, "the slot is confirmed up to {confirmed}, the checkpoint stands at {position}");
    }

    /// At any time, the target holds what the source held after the last transaction that it has: each writer's ledger has no gap,
    /// and its last row says what count and sum its tables have.
    async fn check_digests(&mut self) {
        let right = connect(self.target.port, "dw").await;
        // TRUNCATE empties a table for older snapshots too, so that the tables are locked before the snapshot is taken.
        let there = "SELECT format('LOCK TABLE %s IN ACCESS SHARE MODE', string_agg(oid::regclass::text, ', '))
                       FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
                     HAVING count(*) > 0";
        let Some(lock) = right.query_opt(there, &[]).await.expect("the tables") else { return };
        let begin = format!("BEGIN ISOLATION LEVEL REPEATABLE READ; {}", lock.get::<_, &str>(0));
        right.batch_execute(&begin).await.expect("a transaction");
        let Ok(states) = right.query("SELECT source_table FROM _sluice.tables WHERE state = 'Ready'", &[]).await else { return };
        let ready: Vec<String> = states.iter().map(|row| row.get(0)).collect();
        if !ready.iter().any(|table| table == "ledger") {
            return;
        }
        let sql = "SELECT DISTINCT ON (w) w, n, count(*) OVER (PARTITION BY w), digest FROM ledger ORDER BY w, n DESC";
        let ledger = right.query(sql, &[]).await.expect("the ledger");
        let expected: BTreeMap<i32, Vec<String>> = ledger
            .iter()
            .map(|row| {
                let (writer, last, count) = (row.get::<_, i32>(0), row.get::<_, i64>(1), row.get::<_, i64>(2));
                assert_eq!(last, count, "the ledger of writer {writer} has a gap");
                (writer, row.get::<_, &str>(3).split(' ').map(str::to_owned).collect())
            })
            .collect();
        for (index, table) in TABLES.iter().enumerate().filter(|(_, table)| ready.iter().any(|name| name == *table)) {
            let rows = right.query(&format!("{} {table} GROUP BY w", model::DIGEST), &[]).await.expect("a digest");
            let found: BTreeMap<i32, String> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
            for (writer, digests) in &expected {
                let found = found.get(writer).map_or("0:0", String::as_str);
                assert_eq!(found, digests[index], "{table} of writer {writer} is not as after its last transaction");
            }
        }
        self.digests += 1;
    }

    /// Nobody writes; the target comes level; it, the source and the ledger are compared row by row.
    pub async fn compare(&mut self) {
        let shared = Arc::clone(&self.shared);
        let _silence = shared.gate.write().await;
        let (left, right) = (connect(self.source.port, "shop").await, connect(self.target.port, "dw").await);
        let ready = self.tables.len() as u32 + 1;
        self.level(&left, ready).await;
        let mut rows = 0;
        for table in &self.tables {
            let mut expected = Vec::new();
            for model in &shared.models {
                expected.extend(model.lock().await.lines(*table));
            }
            expected.sort_unstable();
            rows += expected.len();
            let name = TABLES[*table];
            assert_lines(name, "the ledger", &expected, "the source", &lines(&left, name).await);
            assert_lines(name, "the ledger", &expected, "the target", &lines(&right, name).await);
        }
        let names: Vec<_> = std::iter::once("ledger").chain(self.tables.iter().map(|table| TABLES[*table])).collect();
        for name in names {
            // Columns in the same order: the target's table was made from the source's.
            worker::assert_equal(&left, &right, &[name]).await;
        }
        self.check_slot().await;
        self.check_digests().await;
        self.say(&format!("{rows} rows are the same in ledger, source and target"));
    }

    async fn level(&self, left: &Client, ready: u32) {
        let head: String = left.query_one("SELECT pg_current_wal_lsn()::text", &[]).await.expect("an LSN").get(0);
        let head: Lsn = head.parse().expect("an LSN");
        // The log moves on by itself only with the next record.
        left.batch_execute("SELECT pg_logical_emit_message(true, 'test', '')").await.expect("a message");
        let reached = move |status: &Status| {
            let applied = status.applied.as_deref().and_then(|applied| applied.parse::<Lsn>().ok());
            status.streaming && status.tables.get("Ready") == Some(&ready) && applied.is_some_and(|applied| applied >= head)
        };
        self.worker.wait_for(LEVEL, &format!("level with {head}"), reached).await;
    }

    /// One of the servers goes down hard and comes back.
    pub async fn kill_server(&mut self, which: &str) {
        let with_9 = self.random.random_bool(0.5);
        let how = if with_9 { "signal 9" } else { "an immediate shutdown" };
        self.say(&format!("the {which} goes down by {how}"));
        let server = if which == "source" { &mut self.source } else { &mut self.target };
        tokio::task::block_in_place(|| if with_9 { server.kill_9_and_restart() } else { server.crash_and_restart() });
        self.check_slot().await;
        self.check_digests().await;
    }

    /// The writers end.
    pub async fn finish(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for writer in self.writers.drain(..) {
            writer.await.expect("the writer has not failed");
        }
    }

    pub fn transactions(&self) -> u64 {
        self.shared.transactions.load(Ordering::Relaxed)
    }
}

async fn lines(client: &Client, table: &str) -> Vec<String> {
    let sql = format!("SELECT {LINE} FROM {table} ORDER BY {LINE} COLLATE \"C\"");
    client.query(&sql, &[]).await.expect("rows").iter().map(|row| row.get(0)).collect()
}

fn assert_lines(table: &str, one: &str, left: &[String], other: &str, right: &[String]) {
    if left == right {
        return;
    }
    let only = |a: &[String], b: &[String]| a.iter().filter(|line| b.binary_search(line).is_err()).take(5).cloned().collect::<Vec<_>>();
    panic!(
        "{table}: {} rows in {one}, {} in {other}\nonly in {one}: {:#?}\nonly in {other}: {:#?}",
        left.len(),
        right.len(),
        only(left, right),
        only(right, left)
    );
}
