//! Initial copy of one table.
//!
//! The clock starts with the command: the start of the programs, or `CREATE SUBSCRIPTION`. Without keys it stops when all
//! rows are visible. What one transaction brings is visible with its first row; a worker commits ranges, so its own count of
//! committed rows is asked for and then proven by counting. With keys it stops when the key and the statistics are there too:
//! when the program has ended, or the worker follows the log. A subscription needs the key from the start. What is to be on
//! the target's disk is there when a worker follows the log, too.

use crate::native::{self, Subscription};
use crate::options::Options;
use crate::run::{self, Meter, Sample, Samples};
use crate::scenario::{Commits, Competitor, Copy, Scenario};
use crate::servers::{Servers, conninfo, contents, drop_database, drop_slot, expect_contents, fresh_database};
use crate::{Result, visible};
use std::path::Path;
use std::time::Instant;
use tokio::process::Command;
use tokio_postgres::Client;

const SOURCE: &str = "origin";
const TARGET: &str = "copies";

/// Plays all rounds.
pub async fn play(scenario: &Scenario, copy: Copy, servers: &Servers, options: &Options) -> Result<Samples> {
    let rows = options.rows(if copy.wide { 1_000_000 } else { 5_000_000 }, 1);
    let source = fresh_database(&servers.source, SOURCE).await?;
    fill(&source, copy, rows).await?;
    native::publish(&source).await?;
    let expected = contents(&source, "data").await?;
    let mut samples = Samples::new();
    for round in 0..options.rounds {
        for competitor in run::order(scenario, round) {
            let target = fresh_database(&servers.target, TARGET).await?;
            if competitor != Competitor::Sluice {
                target.batch_execute(&create(copy)).await?;
            }
            if competitor == Competitor::Native && copy.keys {
                target.batch_execute(KEY).await?;
            }
            servers.settle().await?;
            let contest = Contest { copy, rows, servers, source: &source, target: &target };
            let mut sample = match competitor {
                Competitor::Sluice => contest.sluice().await?,
                Competitor::Psql => contest.psql().await?,
                Competitor::Pgcopydb => contest.pgcopydb().await?,
                _ => contest.native().await?,
            };
            sample.insert("rows", rows as f64);
            expect_contents(&target, "data", &expected, competitor.name()).await?;
            drop(target);
            drop_database(&servers.target, TARGET).await?;
            run::note(&mut samples, scenario, round, competitor, sample);
        }
    }
    Ok(samples)
}

const KEY: &str = "ALTER TABLE data ADD PRIMARY KEY (id)";

fn create(copy: Copy) -> String {
    let columns = if copy.wide { "payload text" } else { "n int, s text, at timestamptz, amount numeric(12,2)" };
    format!("CREATE TABLE data (id bigint NOT NULL, {columns})")
}

async fn fill(source: &Client, copy: Copy, rows: i64) -> Result<()> {
    let values = if copy.wide {
        "repeat(md5(g::text), 31)"
    } else {
        "g % 1000003, md5(g::text), timestamptz '2026-01-01 00:00:00+00' + g * interval '1 second', (g % 100000007) / 100.0"
    };
    source.batch_execute(&create(copy)).await?;
    source.batch_execute(&format!("INSERT INTO data SELECT g, {values} FROM generate_series(1::bigint, {rows}) g")).await?;
    // A worker makes the keys that the source has; without one it needs to be told how rows are named.
    source.batch_execute(if copy.keys { KEY } else { "ALTER TABLE data REPLICA IDENTITY FULL" }).await?;
    source.batch_execute("VACUUM (FREEZE, ANALYZE) data").await?;
    Ok(())
}

struct Contest<'a> {
    copy: Copy,
    rows: i64,
    servers: &'a Servers,
    source: &'a Client,
    target: &'a Client,
}

impl Contest<'_> {
    async fn sluice(&self) -> Result<Sample> {
        let meter = Meter::begin(self.servers, None);
        let begin = Instant::now();
        let mut worker = run::worker(self.servers, SOURCE, TARGET, &["data"], |_| {});
        let end = if self.copy.keys || self.copy.commits == Commits::OnDisk {
            // What follows the rows is committed with `synchronous_commit = on`, and with it the rows are on the disk.
            run::streaming(&worker).await?
        } else {
            visible::status(&worker, "all rows are copied", |status| status.rows_copied >= self.rows.unsigned_abs()).await?
        };
        let sample = meter.end((end - begin).as_secs_f64(), Some(&worker));
        let count: i64 = self.target.query_one("SELECT count(*) FROM data", &[]).await?.get(0);
        if count != self.rows {
            return Err(format!("the worker said that it had copied {} rows when {count} were visible", self.rows).into());
        }
        run::streaming(&worker).await?;
        worker.terminate();
        drop_slot(self.source, run::SLUICE_SLOT).await?;
        self.source.batch_execute(&format!("DROP PUBLICATION {}", worker.desired.publication)).await?;
        Ok(sample)
    }

    async fn psql(&self) -> Result<Sample> {
        let mut script = "set -o pipefail
            psql -X -q -d \"$1\" -c 'COPY data TO STDOUT (FORMAT binary)' | psql -X -q -d \"$2\" -c 'COPY data FROM STDIN (FORMAT binary)'"
            .to_owned();
        if self.copy.keys {
            script += &format!(" && psql -X -q -d \"$2\" -c '{KEY}' -c 'ANALYZE data'");
        }
        let mut command = Command::new("bash");
        command.args(["-c", &script, "bash", &self.from(), &self.to()]);
        self.program(command).await
    }

    async fn pgcopydb(&self) -> Result<Sample> {
        let folder = tempfile::tempdir()?;
        let mut command = Command::new("pgcopydb");
        let what = if self.copy.keys { "data" } else { "table-data" };
        command.args(["copy", what, "--source", &self.from(), "--target", &self.to()]);
        command.args(["--table-jobs", "1", "--index-jobs", "1", "--not-consistent", "--dir"]).arg(work_folder(folder.path()));
        self.program(command).await
    }

    /// Runs a program to its end.
    async fn program(&self, mut command: Command) -> Result<Sample> {
        let meter = Meter::begin(self.servers, None);
        let begin = Instant::now();
        let ended = async {
            let output = command.kill_on_drop(true).output().await?;
            if output.status.success() { Ok(Instant::now()) } else { Err(String::from_utf8_lossy(&output.stderr).into()) }
        };
        let end = if self.copy.keys {
            ended.await?
        } else {
            let (_, seen) = tokio::try_join!(ended, visible::first_row(self.target))?;
            seen
        };
        Ok(meter.end((end - begin).as_secs_f64(), None))
    }

    async fn native(&self) -> Result<Sample> {
        let meter = Meter::begin(self.servers, None);
        let begin = Instant::now();
        let subscription = Subscription { source: SOURCE, streaming: "parallel", commits: self.copy.commits, copy: true, enabled: true };
        subscription.create(self.servers, self.target).await?;
        let end = visible::first_row(self.target).await?;
        let sample = meter.end((end - begin).as_secs_f64(), None);
        native::ready(self.target).await?;
        native::drop(self.target).await?;
        Ok(sample)
    }

    fn from(&self) -> String {
        conninfo(&self.servers.source, SOURCE)
    }

    fn to(&self) -> String {
        conninfo(&self.servers.target, TARGET)
    }
}

/// pgcopydb wants to make its folder itself.
fn work_folder(parent: &Path) -> std::path::PathBuf {
    parent.join("pgcopydb")
}
