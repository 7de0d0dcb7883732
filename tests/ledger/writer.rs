//! Writers: random transactions on the source, each with its row in table `ledger`, by which an answer that was lost is found out.

use crate::model::{LOG, Model, Row, TABLES, big};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{Mutex, MutexGuard, RwLock};
use tokio_postgres::Client;

/// Rows of the largest transactions.
const LARGE: i64 = 100_000;
/// Longest pause between two transactions of a writer, in milliseconds.
const PAUSE: u64 = 60;

/// What the writers share.
pub struct Shared {
    pub port: u16,
    pub models: Vec<Mutex<Model>>,
    /// Held for reading by transactions on rows of one writer, for writing by truncates and by those who want silence.
    pub gate: RwLock<()>,
    pub stop: AtomicBool,
    pub transactions: AtomicU64,
    /// Large transactions that are still to be made.
    pub large: AtomicU64,
}

/// Why a transaction did not come to its end.
#[derive(Debug)]
struct Lost;

/// A session on the source, as soon as there is one.
pub async fn connect(port: u16, database: &str) -> Client {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(port).user("postgres").password("pw").dbname(database);
        match config.connect(tokio_postgres::NoTls).await {
            Ok((client, connection)) => {
                tokio::spawn(connection);
                return client;
            }
            Err(error) => assert!(tokio::time::Instant::now() < deadline, "no connection to port {port}: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub struct Writer {
    number: usize,
    shared: Arc<Shared>,
    random: SmallRng,
    client: Client,
}

impl Writer {
    pub async fn new(number: usize, shared: Arc<Shared>, seed: u64) -> Self {
        let client = connect(shared.port, "shop").await;
        Self { number, shared, random: SmallRng::seed_from_u64(seed ^ (number as u64 + 1) << 32), client }
    }

    /// Rows to begin with.
    pub async fn fill(&mut self, rows: [i64; TABLES.len()]) {
        let shared = Arc::clone(&self.shared);
        let mut model = shared.models[self.number].lock().await;
        self.run("BEGIN").await.expect("a transaction");
        for (table, rows) in rows.into_iter().enumerate() {
            let long = rows / 20;
            self.insert(&mut model, table, rows - long, 0).await.expect("rows");
            self.insert(&mut model, table, long, 1).await.expect("long rows");
        }
        self.commit(vec![model]).await;
    }

    /// One transaction after the other.
    pub async fn write(mut self) {
        let shared = Arc::clone(&self.shared);
        while !shared.stop.load(Ordering::Relaxed) {
            if self.client.is_closed() {
                self.client = connect(shared.port, "shop").await;
            }
            if self.random.random_range(0..250) == 0 {
                let _silence = shared.gate.write().await;
                self.truncate().await;
            } else {
                let _turn = shared.gate.read().await;
                self.transaction().await;
            }
            shared.transactions.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(self.random.random_range(0..PAUSE))).await;
        }
    }

    async fn transaction(&mut self) {
        let shared = Arc::clone(&self.shared);
        let mut model = shared.models[self.number].lock().await;
        let large = shared.large.try_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).ok();
        let rolled_back = large.is_none() && self.random.random_range(0..20) == 0;
        let done = match large {
            Some(left) => self.large(&mut model, left).await,
            None => self.changes(&mut model).await,
        };
        if done.is_err() || rolled_back {
            model.roll_back(0);
            // A lost connection rolls back too.
            let _ = self.run("ROLLBACK").await;
        } else {
            self.commit(vec![model]).await;
        }
    }

    /// One row, or 64 in several statements, some of them taken back.
    async fn changes(&mut self, model: &mut Model) -> Result<(), Lost> {
        self.run("BEGIN").await?;
        if self.random.random_bool(0.6) {
            return self.change(model, 1).await;
        }
        for _ in 0..4 {
            let mark = model.mark();
            let savepoint = self.random.random_range(0..3);
            if savepoint > 0 {
                self.run("SAVEPOINT s").await?;
            }
            self.change(model, 16).await?;
            match savepoint {
                0 => {}
                1 => self.run("RELEASE s").await?,
                _ => {
                    self.run("ROLLBACK TO s").await?;
                    model.roll_back(mark);
                }
            }
        }
        Ok(())
    }

    /// 100,000 rows in one statement: they come, change, get other keys, go.
    async fn large(&mut self, model: &mut Model, left: u64) -> Result<(), Lost> {
        self.run("BEGIN").await?;
        let table = [0, 3][self.random.random_range(0..2)];
        let rows = model.rows(table);
        if (rows.len() as i64) < LARGE {
            return self.insert(model, table, LARGE, 0).await;
        }
        // The rows lie close together at the end of what was used.
        let last = *rows.keys().next_back().expect("a row");
        let first = *rows.keys().nth_back(LARGE as usize - 1).expect("a row").max(&(last - 4 * LARGE));
        match left % 3 {
            0 => self.delete(model, table, (first, last)).await,
            1 => self.update(model, table, (first, last)).await,
            _ => self.move_keys(model, table, (first, last)).await,
        }
    }

    /// A change of about so many rows.
    async fn change(&mut self, model: &mut Model, rows: i64) -> Result<(), Lost> {
        let table = self.random.random_range(0..TABLES.len());
        let Some(range) = self.range(model, table, rows) else { return self.insert(model, table, rows, 0).await };
        match self.random.random_range(0..12) {
            0..3 => {
                let long = self.random.random_range(0..3);
                self.insert(model, table, rows, long).await
            }
            3 | 4 => self.update(model, table, range).await,
            5 => self.update_long(model, table, range).await,
            6 => self.move_keys(model, table, range).await,
            7 => self.move_unique(model, table, range).await,
            8 => self.swap(model, table, range, "u").await,
            9 => self.swap(model, table, range, "id").await,
            10 => self.reuse(model, table, range).await,
            _ if table == LOG => self.take_one(model, range.0).await,
            _ => self.delete(model, table, range).await,
        }
    }

    /// First and last id of a run of rows.
    fn range(&mut self, model: &Model, table: usize, rows: i64) -> Option<(i64, i64)> {
        let all = model.rows(table);
        let (first, last) = (*all.keys().next()?, *all.keys().next_back()?);
        let from = self.random.random_range(first..=last);
        let first = *all.range(from..).next()?.0;
        // Moved rows lie far apart; a range takes its width of what was never used.
        let last = *all.range(first..first + 4 * rows).take(rows as usize).last()?.0;
        Some((first, last))
    }

    async fn insert(&mut self, model: &mut Model, table: usize, rows: i64, long: u32) -> Result<(), Lost> {
        if rows == 0 {
            return Ok(());
        }
        let first = model.take_fresh(rows);
        let (last, n) = (first + rows - 1, self.random.random_range(0..1_000));
        let copies = if table == LOG { self.random.random_range(1..3) } else { 1 };
        let seed = if long == 0 { 0 } else { self.random.random_range(1..100) };
        let (name, writer, big) = (TABLES[table], self.number, big(seed));
        self.run(&format!(
            "INSERT INTO {name} (w, id, n, u, big) SELECT {writer}, g, {n}, 'u' || g, {big} FROM generate_series({first}, {last}) g, generate_series(1, {copies})"
        ))
        .await?;
        (first..=last).for_each(|id| model.set(table, id, Some(Row { n, u: id, big: seed, copies })));
        Ok(())
    }

    /// Long values stay as they are and are not sent.
    async fn update(&mut self, model: &mut Model, table: usize, range: (i64, i64)) -> Result<(), Lost> {
        let by = self.random.random_range(1..10);
        self.set(table, range, &format!("n = n + {by}")).await?;
        model.update(table, range, |_, row| row.n += by);
        Ok(())
    }

    async fn update_long(&mut self, model: &mut Model, table: usize, range: (i64, i64)) -> Result<(), Lost> {
        let seed = self.random.random_range(0..100);
        self.set(table, range, &format!("big = {}", big(seed))).await?;
        model.update(table, range, |_, row| row.big = seed);
        Ok(())
    }

    async fn move_keys(&mut self, model: &mut Model, table: usize, range: (i64, i64)) -> Result<(), Lost> {
        let by = model.take_fresh(range.1 - range.0 + 1) - range.0;
        self.set(table, range, &format!("id = id + {by}")).await?;
        for (id, row) in model.remove(table, range) {
            model.set(table, id + by, Some(row));
        }
        Ok(())
    }

    async fn move_unique(&mut self, model: &mut Model, table: usize, range: (i64, i64)) -> Result<(), Lost> {
        let by = model.take_fresh(range.1 - range.0 + 1) - range.0;
        self.set(table, range, &format!("u = 'u' || id + {by}")).await?;
        model.update(table, range, |id, row| row.u = id + by);
        Ok(())
    }

    /// Two rows exchange their key, or their unique value, by way of a third.
    async fn swap(&mut self, model: &mut Model, table: usize, (one, other): (i64, i64), column: &str) -> Result<(), Lost> {
        let (Some(left), Some(right)) = (model.rows(table).get(&one).cloned(), model.rows(table).get(&other).cloned()) else {
            return Ok(());
        };
        if one == other {
            return Ok(());
        }
        let free = model.take_fresh(1);
        if column == "id" {
            for (from, to) in [(one, free), (other, one), (free, other)] {
                self.set(table, (from, from), &format!("id = {to}")).await?;
            }
            model.set(table, one, Some(right));
            model.set(table, other, Some(left));
        } else {
            for (id, u) in [(one, free), (other, left.u), (one, right.u)] {
                self.set(table, (id, id), &format!("u = 'u{u}'")).await?;
            }
            model.set(table, one, Some(Row { u: right.u, ..left.clone() }));
            model.set(table, other, Some(Row { u: left.u, ..right }));
        }
        Ok(())
    }

    async fn delete(&mut self, model: &mut Model, table: usize, range: (i64, i64)) -> Result<(), Lost> {
        self.run(&format!("DELETE FROM {} WHERE {}", TABLES[table], self.rows(range))).await?;
        model.remove(table, range);
        Ok(())
    }

    /// Rows go, and others come with their keys.
    async fn reuse(&mut self, model: &mut Model, table: usize, range: (i64, i64)) -> Result<(), Lost> {
        let ids: Vec<i64> = model.rows(table).range(range.0..=range.1).map(|(id, _)| *id).collect();
        self.delete(model, table, range).await?;
        let (name, writer) = (TABLES[table], self.number);
        let list = ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let fresh = model.take_fresh(range.1 - range.0 + 1) - range.0;
        self.run(&format!(
            "INSERT INTO {name} (w, id, n, u, big) SELECT {writer}, g, 7, 'u' || g + {fresh}, NULL FROM unnest(ARRAY[{list}]::bigint[]) g"
        ))
        .await?;
        ids.iter().for_each(|id| model.set(table, *id, Some(Row { n: 7, u: id + fresh, big: 0, copies: 1 })));
        Ok(())
    }

    /// Of rows that are the same, exactly one goes.
    async fn take_one(&mut self, model: &mut Model, id: i64) -> Result<(), Lost> {
        let name = TABLES[LOG];
        self.run(&format!("DELETE FROM {name} WHERE ctid = (SELECT ctid FROM {name} WHERE {} LIMIT 1)", self.rows((id, id)))).await?;
        let row = model.rows(LOG)[&id].clone();
        model.set(LOG, id, (row.copies > 1).then_some(Row { copies: row.copies - 1, ..row }));
        Ok(())
    }

    /// One statement over the rows of all writers, with changes before and behind it.
    async fn truncate(&mut self) {
        let shared = Arc::clone(&self.shared);
        let mut models = Vec::new();
        for model in &shared.models {
            models.push(model.lock().await);
        }
        let tables = if self.random.random_bool(0.5) { vec![LOG] } else { vec![1, 2] };
        let names: Vec<_> = tables.iter().map(|table| TABLES[*table]).collect();
        let work = async {
            self.run("BEGIN").await?;
            self.change(&mut models[self.number], 16).await?;
            self.run(&format!("TRUNCATE {}", names.join(", "))).await?;
            for model in &mut models {
                tables.iter().for_each(|table| drop(model.remove(*table, (i64::MIN, i64::MAX))));
            }
            self.insert(&mut models[self.number], tables[0], 16, 1).await
        };
        if work.await.is_err() {
            models.iter_mut().for_each(|model| model.roll_back(0));
            return;
        }
        self.commit(models).await;
    }

    fn rows(&self, (first, last): (i64, i64)) -> String {
        format!("w = {} AND id BETWEEN {first} AND {last}", self.number)
    }

    async fn set(&mut self, table: usize, range: (i64, i64), what: &str) -> Result<(), Lost> {
        self.run(&format!("UPDATE {} SET {what} WHERE {}", TABLES[table], self.rows(range))).await
    }

    /// Writes the ledger and commits; a lost answer is found out from the ledger's row.
    async fn commit(&mut self, mut models: Vec<MutexGuard<'_, Model>>) {
        let first = if models.len() == 1 { self.number } else { 0 };
        let number = models[0].committed + 1;
        let mut written = Ok(());
        for (index, model) in models.iter().enumerate() {
            let sql = format!("INSERT INTO ledger VALUES ({}, {}, '{}')", first + index, model.committed + 1, model.digest());
            written = self.run(&sql).await;
            if written.is_err() {
                break;
            }
        }
        let committed = match written {
            Err(Lost) => false,
            Ok(()) => match self.run("COMMIT").await {
                Ok(()) => true,
                Err(Lost) => {
                    self.client = connect(self.shared.port, "shop").await;
                    let sql = format!("SELECT count(*) FROM ledger WHERE w = {first} AND n = {number}");
                    self.client.query_one(&sql, &[]).await.expect("the ledger can be read").get::<_, i64>(0) == 1
                }
            },
        };
        for model in &mut models {
            if committed { model.commit() } else { model.roll_back(0) }
        }
    }

    /// Fails when the server is gone; anything else is an error of the test.
    async fn run(&self, sql: &str) -> Result<(), Lost> {
        self.client.batch_execute(sql).await.map_err(|error| {
            let gone = error.as_db_error().is_none_or(|error| error.code().code().starts_with("57P"));
            assert!(gone, "{error:?}: {sql}");
            Lost
        })
    }
}
