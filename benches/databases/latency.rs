//! From commit to visible at a steady rate.
//!
//! Four sessions commit a row every 4 ms each. A row's time runs from the answer to its commit until a session on the target
//! has seen it; that one looks every millisecond, so up to a millisecond of each figure is the look itself.

use crate::drain::row;
use crate::options::Options;
use crate::run::{self, Meter, Sample, Samples};
use crate::scenario::{Commits, Scenario};
use crate::servers::{Servers, contents, expect_contents, fresh_database};
use crate::transaction::Follower;
use crate::{Result, visible};
use std::time::{Duration, Instant};
use tokio::time::MissedTickBehavior;
use tokio_postgres::Client;

/// Sessions that write.
const WRITERS: i64 = 4;
/// Pause between two rows of one session.
const PACE: Duration = Duration::from_millis(4);
/// Ids of one session.
const IDS: i64 = 1_000_000_000;
/// How often the target is looked at.
const LOOK: Duration = Duration::from_millis(1);
/// Rows of the first second are not counted.
const WARM_UP: usize = 250;

/// Plays all rounds.
pub async fn play(scenario: &Scenario, commits: Commits, servers: &Servers, options: &Options) -> Result<Samples> {
    // At least 3 s, whatever the scale.
    let rows = options.rows(3750, 1).max(750);
    let mut samples = Samples::new();
    for round in 0..options.rounds {
        for competitor in run::order(scenario, round) {
            let source = fresh_database(&servers.source, "origin").await?;
            let target = fresh_database(&servers.target, "copy").await?;
            source.batch_execute(crate::drain::TABLES).await?;
            let follower = Follower::start(competitor, commits, servers, &source, &target).await?;
            servers.settle().await?;

            let meter = Meter::begin(servers, follower.worker().map(crate::worker::Worker::pid));
            let begin = Instant::now();
            let mut latencies = measure(servers, rows).await?;
            let mut sample = meter.end(begin.elapsed().as_secs_f64(), follower.worker());
            sample.insert("rows", (WRITERS * rows) as f64);
            add_percentiles(&mut sample, &mut latencies)?;

            source.batch_execute("INSERT INTO mark VALUES (1)").await?;
            follower.marker(&target).await?;
            expect_contents(&target, "data", &contents(&source, "data").await?, competitor.name()).await?;
            follower.stop(&source, &target).await?;
            run::note(&mut samples, scenario, round, competitor, sample);
        }
    }
    Ok(samples)
}

fn add_percentiles(sample: &mut Sample, latencies: &mut [Duration]) -> Result<()> {
    latencies.sort_unstable();
    let last = latencies.len().checked_sub(1).ok_or("no rows were measured")?;
    for (name, part) in [("p50_milliseconds", 0.5), ("p99_milliseconds", 0.99), ("max_milliseconds", 1.0)] {
        sample.insert(name, latencies[(last as f64 * part).round() as usize].as_secs_f64() * 1e3);
    }
    Ok(())
}

/// Writes and looks at once; the times of all rows but the first ones.
async fn measure(servers: &Servers, rows: i64) -> Result<Vec<Duration>> {
    let watcher = tokio::spawn(watch(servers.target.connect("copy").await, rows));
    let mut writers = Vec::new();
    for writer in 0..WRITERS {
        writers.push(tokio::spawn(write(servers.source.connect("origin").await, writer, rows)));
    }
    let mut committed = Vec::new();
    for writer in writers {
        committed.push(writer.await??);
    }
    let seen = watcher.await??;
    let pairs = committed.iter().zip(&seen).flat_map(|(committed, seen)| committed.iter().zip(seen).skip(WARM_UP));
    // A row may be seen before the answer to its commit has arrived.
    Ok(pairs.map(|(committed, seen)| seen.saturating_duration_since(*committed)).collect())
}

/// Commits rows at the pace; when each commit was answered.
async fn write(source: Client, writer: i64, rows: i64) -> Result<Vec<Instant>> {
    let insert = source.prepare(&format!("INSERT INTO data SELECT {}", row("$1::bigint"))).await?;
    let begin = tokio::time::Instant::now() + PACE / WRITERS as u32 * writer as u32;
    let mut pace = tokio::time::interval_at(begin, PACE);
    // Late rows are made up for: the rate is what it says.
    pace.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut committed = Vec::with_capacity(rows as usize);
    for number in 1..=rows {
        pace.tick().await;
        source.execute(&insert, &[&(writer * IDS + number)]).await?;
        committed.push(Instant::now());
    }
    Ok(committed)
}

/// Looks until all rows are there; when each was seen first, by writer.
async fn watch(target: Client, rows: i64) -> Result<Vec<Vec<Instant>>> {
    let newest = |writer: i64| {
        let first = writer * IDS;
        format!("(SELECT coalesce(max(id), {first}) - {first} FROM data WHERE id > {first} AND id < {})", first + IDS)
    };
    let look = target.prepare(&format!("SELECT {}", (0..WRITERS).map(newest).collect::<Vec<_>>().join(", "))).await?;
    let deadline = Instant::now() + Duration::from_secs(visible::LIMIT);
    let mut seen = vec![Vec::with_capacity(rows as usize); WRITERS as usize];
    while seen.iter().any(|seen| seen.len() < rows as usize) {
        let answer = target.query_one(&look, &[]).await?;
        let now = Instant::now();
        for (writer, seen) in seen.iter_mut().enumerate() {
            seen.resize(answer.get::<_, i64>(writer) as usize, now);
        }
        if now > deadline {
            return Err("the rows did not arrive".into());
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(seen)
}
