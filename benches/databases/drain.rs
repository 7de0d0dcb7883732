//! Drain of a backlog: slots first, then the changes, then one reader after the other.
//!
//! Each competitor has its own slot, made at the same place, so one backlog serves all of a round. Nobody is connected when
//! the clock starts; it starts with the command to begin: `suspend: false` for a worker, `ENABLE` for a subscription, the
//! start of `pg_recvlogical`. It stops when the last change, a row in the table `mark`, is visible.

use crate::native::{self, Subscription};
use crate::options::Options;
use crate::run::{self, Meter, Sample, Samples};
use crate::scenario::{Competitor, Drain, Scenario, Work};
use crate::servers::{Servers, conninfo, contents, drop_database, drop_slot, expect_contents, fresh_database, rows_written};
use crate::worker::Worker;
use crate::{Result, visible};
use std::time::Instant;
use tokio::process::Command;
use tokio_postgres::Client;

const SOURCE: &str = "origin";
const SLUICE: &str = "by_sluice";
const NATIVE: &str = "by_native";
/// Slot of the reader that keeps nothing.
const NOWHERE: &str = "nowhere";
/// Rows of the table of which some are hot, and how many of them are.
const HOT_AMONG: i64 = 100_000;
const HOT: i64 = 1000;

/// The tables of all scenarios with a stream.
pub const TABLES: &str = "
    CREATE TABLE data (id bigint PRIMARY KEY, n int, s text, amount numeric(12,2), at timestamptz, flag bool, ratio float8, u uuid);
    CREATE TABLE mark (id bigint PRIMARY KEY);";

/// A row of `data` by its id.
pub fn row(id: &str) -> String {
    format!(
        "{id}, {id} % 1000003, md5({id}::text), ({id} % 100000007) / 100.0, timestamptz '2026-01-01 00:00:00+00' + {id} * interval '1 second',
         {id} % 2 = 0, {id} / 7.0, md5({id}::text)::uuid"
    )
}

/// Plays all rounds.
pub async fn play(scenario: &Scenario, drain: Drain, servers: &Servers, options: &Options) -> Result<Samples> {
    let changes = options.rows(drain.changes, drain.per_transaction);
    let mut samples = Samples::new();
    for round in 0..options.rounds {
        let source = fresh_database(&servers.source, SOURCE).await?;
        let mut contest = Contest { drain, servers, source, base: base_rows(drain.work, changes), end: String::new() };
        contest.prepare_source().await?;
        let mut worker = contest.prepare_sluice().await?;
        let native = contest.prepare_native().await?;
        contest.write(changes).await?;
        servers.settle().await?;
        let expected = contents(&contest.source, "data").await?;
        for competitor in run::order(scenario, round) {
            let mut sample = match competitor {
                Competitor::Sluice => contest.sluice(&mut worker, &expected).await?,
                Competitor::Nowhere => contest.nowhere().await?,
                _ => contest.native(&native, &expected).await?,
            };
            sample.insert("rows", changes as f64);
            run::note(&mut samples, scenario, round, competitor, sample);
            servers.settle().await?;
        }
        drop((worker, native));
        for slot in [run::SLUICE_SLOT, NOWHERE] {
            drop_slot(&contest.source, slot).await?;
        }
        for database in [SLUICE, NATIVE] {
            drop_database(&servers.target, database).await?;
        }
    }
    Ok(samples)
}

/// Rows that are there before the backlog.
fn base_rows(work: Work, changes: i64) -> i64 {
    match work {
        Work::Inserts => 0,
        Work::Updates => changes,
        Work::HotUpdates => HOT_AMONG,
    }
}

struct Contest<'a> {
    drain: Drain,
    servers: &'a Servers,
    source: Client,
    base: i64,
    /// Position behind the last change.
    end: String,
}

impl Contest<'_> {
    async fn fill(&self, client: &Client) -> Result<()> {
        client.batch_execute(TABLES).await?;
        client.batch_execute(&format!("INSERT INTO data SELECT {} FROM generate_series(1::bigint, {}) g", row("g"), self.base)).await?;
        Ok(client.batch_execute("VACUUM (FREEZE, ANALYZE)").await?)
    }

    async fn prepare_source(&self) -> Result<()> {
        self.fill(&self.source).await?;
        native::publish(&self.source).await?;
        self.source.execute("SELECT pg_create_logical_replication_slot($1, 'pgoutput')", &[&NOWHERE]).await?;
        Ok(())
    }

    /// A worker that has copied what is there and was stopped.
    async fn prepare_sluice(&self) -> Result<Worker> {
        let target = fresh_database(&self.servers.target, SLUICE).await?;
        let mut worker =
            run::worker(self.servers, SOURCE, SLUICE, &["data", "mark"], |desired| run::set_commits(desired, self.drain.commits));
        run::streaming(&worker).await?;
        run::suspend(&mut worker).await?;
        target.batch_execute("VACUUM (FREEZE, ANALYZE)").await?;
        Ok(worker)
    }

    async fn prepare_native(&self) -> Result<Client> {
        let target = fresh_database(&self.servers.target, NATIVE).await?;
        self.fill(&target).await?;
        let subscription = Subscription { source: SOURCE, streaming: "parallel", commits: self.drain.commits, copy: false, enabled: false };
        subscription.create(self.servers, &target).await?;
        Ok(target)
    }

    async fn write(&mut self, changes: i64) -> Result<()> {
        let source = &self.source;
        let settings = ["synchronous_commit", "enable_hashjoin", "enable_mergejoin", "enable_seqscan"];
        for setting in settings {
            source.batch_execute(&format!("SET {setting} = off")).await?;
        }
        source.batch_execute(&backlog(self.drain, changes)).await?;
        for setting in settings {
            source.batch_execute(&format!("RESET {setting}")).await?;
        }
        source.batch_execute("INSERT INTO mark VALUES (1)").await?;
        self.end = source.query_one("SELECT pg_current_wal_lsn()::text", &[]).await?.get(0);
        Ok(source.batch_execute("VACUUM").await?)
    }

    async fn sluice(&self, worker: &mut Worker, expected: &(i64, String)) -> Result<Sample> {
        let target = self.servers.target.connect(SLUICE).await;
        let before = rows_written(&target).await?;
        let meter = Meter::begin(self.servers, Some(worker.pid()));
        let begin = Instant::now();
        worker.change(|desired| desired.suspend = false).await;
        let end = visible::marker_by(worker, &target, 1).await?;
        let mut sample = meter.end((end - begin).as_secs_f64(), Some(worker));
        expect_contents(&target, "data", expected, Competitor::Sluice.name()).await?;
        worker.terminate();
        until_disconnected(&target).await?;
        sample.insert("rows_written", (rows_written(&target).await? - before) as f64);
        Ok(sample)
    }

    async fn native(&self, target: &Client, expected: &(i64, String)) -> Result<Sample> {
        let before = rows_written(target).await?;
        let meter = Meter::begin(self.servers, None);
        let begin = Instant::now();
        native::enable(target).await?;
        let end = visible::marker(target, 1).await?;
        let mut sample = meter.end((end - begin).as_secs_f64(), None);
        expect_contents(target, "data", expected, Competitor::Native.name()).await?;
        native::drop(target).await?;
        until_disconnected(target).await?;
        sample.insert("rows_written", (rows_written(target).await? - before) as f64);
        Ok(sample)
    }

    async fn nowhere(&self) -> Result<Sample> {
        let mut command = Command::new("pg_recvlogical");
        command.args(["-d", &conninfo(&self.servers.source, SOURCE), "-S", NOWHERE, "--start", "--no-loop", "-f", "/dev/null"]);
        command.args(["--endpos", &self.end, "-o", "proto_version=1", "-o", "binary=true"]);
        command.args(["-o", &format!("publication_names={}", native::NAME)]);
        let meter = Meter::begin(self.servers, None);
        let begin = Instant::now();
        let output = command.kill_on_drop(true).output().await?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into());
        }
        Ok(meter.end(begin.elapsed().as_secs_f64(), None))
    }
}

/// Waits until nobody else is connected to the database: what they have done is in its statistics then.
async fn until_disconnected(target: &Client) -> Result<()> {
    let sql = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid())";
    visible::until(60, "nobody else is connected", async || Ok(target.query_one(sql, &[]).await?.get(0))).await?;
    Ok(())
}

/// The statement that writes the backlog, with its own commits.
fn backlog(drain: Drain, changes: i64) -> String {
    let per_transaction = drain.per_transaction;
    let transactions = changes / per_transaction;
    let update = "UPDATE data SET n = n + 1, s = md5(s), amount = amount / 2, flag = NOT flag WHERE id IN";
    let statement = match drain.work {
        Work::Inserts if per_transaction == 1 => format!("INSERT INTO data SELECT {}", row("t")),
        Work::Inserts => {
            let ids = format!("generate_series((t - 1) * {per_transaction} + 1, t * {per_transaction})");
            format!("INSERT INTO data SELECT {} FROM {ids} g", row("g"))
        }
        Work::Updates => format!("{update} (SELECT t + {transactions} * j FROM generate_series(0, {per_transaction} - 1) j)"),
        Work::HotUpdates => format!("{update} (SELECT {} * j FROM generate_series(1, {HOT}) j)", HOT_AMONG / HOT),
    };
    format!("DO $$ DECLARE t bigint; BEGIN FOR t IN 1..{transactions} LOOP {statement}; COMMIT; END LOOP; END $$")
}
