//! Rounds: every competitor in turn, its figures gathered.

use crate::Result;
use crate::process::{cpu, cpu_of_ended_children, peak_memory};
use crate::scenario::{Commits, Competitor, Scenario};
use crate::servers::Servers;
use crate::worker::Worker;
use sluice::worker::contract::{Desired, Phase};
use std::collections::BTreeMap;
use std::time::Instant;

/// Figures of one measured run, by name; `seconds` is what competitors are compared by.
pub type Sample = BTreeMap<&'static str, f64>;
/// All runs of a scenario.
pub type Samples = BTreeMap<Competitor, Vec<Sample>>;

/// Name of the slot of every worker here; `desired` in the tests' support chooses it.
pub const SLUICE_SLOT: &str = "sluice_test";

/// Competitors in the order of this round, so that none is always first.
pub fn order(scenario: &Scenario, round: usize) -> Vec<Competitor> {
    let mut order = scenario.competitors.to_vec();
    let shift = round % order.len();
    order.rotate_left(shift);
    order
}

/// Notes a run and shows it.
pub fn note(samples: &mut Samples, scenario: &Scenario, round: usize, competitor: Competitor, sample: Sample) {
    let figures: Vec<String> = sample.iter().map(|(name, value)| format!("{name} {value:.3}")).collect();
    eprintln!("{} #{}: {}: {}", scenario.name, round + 1, competitor.name(), figures.join(", "));
    samples.entry(competitor).or_default().push(sample);
}

/// CPU seconds when a run begins.
pub struct Meter<'a> {
    servers: &'a Servers,
    began: (f64, f64),
    worker: Option<(u32, f64)>,
    children: f64,
}

impl<'a> Meter<'a> {
    /// Begins; with the worker's process when there is one already.
    pub fn begin(servers: &'a Servers, worker: Option<u32>) -> Self {
        Self { servers, began: servers.cpu(), worker: worker.map(|pid| (pid, cpu(pid))), children: cpu_of_ended_children() }
    }

    /// What a run has cost, and how long it took.
    pub fn end(self, seconds: f64, worker: Option<&Worker>) -> Sample {
        let ended = self.servers.cpu();
        let mut sample = Sample::from([("seconds", seconds)]);
        sample.insert("source_cpu_seconds", ended.0 - self.began.0);
        sample.insert("target_cpu_seconds", ended.1 - self.began.1);
        if let Some(worker) = worker {
            let before = self.worker.map_or(0.0, |(_, before)| before);
            sample.insert("client_cpu_seconds", cpu(worker.pid()) - before);
            sample.insert("client_peak_mib", peak_memory(worker.pid()));
        } else {
            sample.insert("client_cpu_seconds", cpu_of_ended_children() - self.children);
        }
        sample
    }
}

/// A worker with the defaults of the Mirror resource for these tables of schema `public`.
pub fn worker(servers: &Servers, source: &str, target: &str, tables: &[&str], change: impl FnOnce(&mut Desired)) -> Worker {
    Worker::start_with((&servers.source, source), (&servers.target, target), tables, |desired| {
        let snapshot = &mut desired.snapshot;
        (snapshot.rows_per_partition, snapshot.tables_in_parallel, snapshot.workers_per_table) = (250_000, 4, 2);
        let stream = &mut desired.stream;
        (stream.max_batch_rows, stream.max_batch_bytes, stream.max_delay_milliseconds) = (100_000, 16 << 20, 5);
        change(desired);
    })
}

/// Lets the commits of a worker wait for the target's disk, or not.
pub fn set_commits(desired: &mut Desired, commits: Commits) {
    if commits == Commits::OnDisk {
        desired.target.parameters.insert("synchronous_commit".into(), "on".into());
    }
}

/// Waits until the worker follows the log.
pub async fn streaming(worker: &Worker) -> Result<Instant> {
    crate::visible::status(worker, "streaming", |status| status.streaming).await
}

/// Stops the worker's session and keeps its position; waits until the slot is free.
pub async fn suspend(worker: &mut Worker) -> Result<()> {
    worker.change(|desired| desired.suspend = true).await;
    crate::visible::status(worker, "suspended", |status| status.phase == Phase::Suspended).await?;
    Ok(())
}
