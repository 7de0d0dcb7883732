//! One large transaction, with everybody connected before it begins.
//!
//! `seconds` runs from the answer to its COMMIT until it is visible in the target, `total_seconds` from its BEGIN.

use crate::drain::{TABLES, row};
use crate::native::{self, Subscription};
use crate::options::Options;
use crate::run::{self, Meter, Samples};
use crate::scenario::{Commits, Competitor, Scenario};
use crate::servers::{Servers, contents, drop_database, drop_slot, expect_contents, fresh_database};
use crate::{Result, visible};
use std::time::Instant;
use tokio_postgres::Client;

const SOURCE: &str = "origin";
const TARGET: &str = "copy";

/// Plays all rounds.
pub async fn play(scenario: &Scenario, commits: Commits, servers: &Servers, options: &Options) -> Result<Samples> {
    let rows = options.rows(1_000_000, 1);
    let mut samples = Samples::new();
    for round in 0..options.rounds {
        for competitor in run::order(scenario, round) {
            let source = fresh_database(&servers.source, SOURCE).await?;
            let target = fresh_database(&servers.target, TARGET).await?;
            source.batch_execute(TABLES).await?;
            let follower = Follower::start(competitor, commits, servers, &source, &target).await?;
            servers.settle().await?;

            let worker = follower.worker();
            let meter = Meter::begin(servers, worker.map(crate::worker::Worker::pid));
            let begin = Instant::now();
            let committed = write(&source, rows).await?;
            let end = follower.marker(&target).await?;
            let mut sample = meter.end(end.saturating_duration_since(committed).as_secs_f64(), worker);
            sample.insert("total_seconds", (end - begin).as_secs_f64());
            sample.insert("rows", rows as f64);

            let expected = contents(&source, "data").await?;
            expect_contents(&target, "data", &expected, competitor.name()).await?;
            follower.stop(&source, &target).await?;
            run::note(&mut samples, scenario, round, competitor, sample);
        }
        drop_database(&servers.target, TARGET).await?;
    }
    Ok(samples)
}

/// Writes the transaction; the moment at which its COMMIT was answered.
async fn write(source: &Client, rows: i64) -> Result<Instant> {
    source.batch_execute("BEGIN").await?;
    source.batch_execute(&format!("INSERT INTO data SELECT {} FROM generate_series(1::bigint, {rows}) g", row("g"))).await?;
    source.batch_execute("INSERT INTO mark VALUES (1)").await?;
    source.batch_execute("COMMIT").await?;
    Ok(Instant::now())
}

/// Who follows the source, connected and waiting for changes.
pub enum Follower {
    /// A worker.
    Sluice(Box<crate::worker::Worker>),
    /// A subscription.
    Native,
}

impl Follower {
    /// Connects a competitor to the tables `data` and `mark` of databases `origin` and `copy`.
    pub async fn start(competitor: Competitor, commits: Commits, servers: &Servers, source: &Client, target: &Client) -> Result<Self> {
        if competitor == Competitor::Sluice {
            let worker = run::worker(servers, SOURCE, TARGET, &["data", "mark"], |desired| run::set_commits(desired, commits));
            run::streaming(&worker).await?;
            return Ok(Self::Sluice(Box::new(worker)));
        }
        native::publish(source).await?;
        target.batch_execute(TABLES).await?;
        let streaming = if competitor == Competitor::NativeStreamingOn { "on" } else { "parallel" };
        let subscription = Subscription { source: SOURCE, streaming, commits, copy: false, enabled: true };
        subscription.create(servers, target).await?;
        native::streaming(source).await?;
        Ok(Self::Native)
    }

    /// The worker, when it is one.
    pub fn worker(&self) -> Option<&crate::worker::Worker> {
        match self {
            Self::Sluice(worker) => Some(worker),
            Self::Native => None,
        }
    }

    /// Waits until the last change is visible.
    pub async fn marker(&self, target: &Client) -> Result<Instant> {
        match self {
            Self::Sluice(worker) => visible::marker_by(worker, target, 1).await,
            Self::Native => visible::marker(target, 1).await,
        }
    }

    /// Ends it and drops its slot.
    pub async fn stop(self, source: &Client, target: &Client) -> Result<()> {
        match self {
            Self::Sluice(mut worker) => {
                worker.terminate();
                drop_slot(source, run::SLUICE_SLOT).await
            }
            Self::Native => native::drop(target).await,
        }
    }
}
