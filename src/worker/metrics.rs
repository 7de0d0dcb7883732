//! `/metrics`: read from the board at each scrape, so that nothing is counted twice.

use super::board::{Board, Facts, lag_bytes};
use super::contract::{Phase, WalBudgetSpec};
use super::supervise::State;
use crate::engine::error::reason;
use crate::engine::latency::Latency;
use crate::engine::progress::View;
use crate::engine::retention::Retention;
use crate::engine::roles::LogLoad;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use std::fmt;
use std::sync::Arc;

/// Media type of the text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

const PHASES: [Phase; 8] = [
    Phase::Starting,
    Phase::SettingUp,
    Phase::Copying,
    Phase::CatchingUp,
    Phase::Streaming,
    Phase::Suspended,
    Phase::Retrying,
    Phase::Stopped,
];

/// The metrics of one worker.
pub struct Metrics {
    registry: Registry,
}

impl Metrics {
    /// Of this board.
    #[must_use]
    pub fn new(board: Arc<Board>) -> Self {
        let mut registry = Registry::with_prefix("sluice_worker");
        registry.register("build", "The worker's program", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
        registry.register_collector(Box::new(FromBoard(board)));
        Self { registry }
    }

    /// The OpenMetrics text.
    ///
    /// # Errors
    /// A metric can't be written as text.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut body = String::new();
        text::encode(&mut body, &self.registry)?;
        Ok(body)
    }
}

#[derive(Debug)]
struct FromBoard(Arc<Board>);

impl Collector for FromBoard {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let mut out = Output(encoder);
        let phase = self.0.phase();
        let view = self.0.progress().view();
        encode_session(&mut out, &view)?;
        let facts = self.0.facts();
        encode_worker(&mut out, &facts, phase)?;
        let connected = matches!(facts.state, State::Running | State::Stopping(_));
        if let Some(bytes) = lag_bytes(&view, connected) {
            out.gauge("lag_bytes", "Bytes of log between the source's end and what is applied; without a session, confirmed", bytes)?;
        }
        if connected {
            encode_running(&mut out, &view)?;
        }
        if let Some(budget) = facts.desired.as_ref().and_then(|desired| desired.wal_budget.as_ref()) {
            encode_budget(&mut out, budget)?;
        }
        view.retention.as_ref().map_or(Ok(()), |seen| encode_retention(&mut out, seen))
    }
}

fn encode_session(out: &mut Output<'_>, view: &View) -> fmt::Result {
    let rows = [("insert", view.inserts), ("update", view.updates), ("delete", view.deletes)];
    out.counters("rows", "Rows written from the stream, by operation", "op", &rows)?;
    out.counter("batches", "Batches applied", view.batches)?;
    out.counter("bytes_applied", "Bytes of the batches applied", view.bytes_applied)?;
    out.histogram("latency_seconds", "From the source's commit to the target's, by transaction", &view.latency)?;
    out.gauge("rows_copied", "Rows that the initial copies have brought", view.rows_copied)?;
    out.gauge("rows_to_copy", "Rows to copy, by the source's statistics", view.rows_to_copy)?;
    out.gauge("epoch", "Epoch of the claim; 0 before", view.epoch.unsigned_abs())?;
    let tables: Vec<_> = view.tables.iter().map(|(state, count)| (*state, u64::from(*count))).collect();
    out.gauges("tables", "Tables by state", "state", &tables)
}

fn encode_worker(out: &mut Output<'_>, facts: &Facts, phase: Option<Phase>) -> fmt::Result {
    let generation = facts.desired.as_ref().map_or(0, |desired| desired.generation);
    out.gauge("generation", "Generation of the desired document in effect", generation.unsigned_abs())?;
    let phases: Vec<_> = PHASES.iter().map(|each| (word(*each), u64::from(Some(*each) == phase))).collect();
    out.gauges("phase", "1 for the phase the worker is in, else 0", "phase", &phases)?;
    out.counter("sessions", "Sessions begun; each but the first is a restart", facts.sessions)?;
    let failures: Vec<_> = facts.failures.iter().map(|(class, count)| (*class, *count)).collect();
    out.counters("failures", "Sessions that failed, by class", "class", &failures)?;
    let in_a_row = facts.failure.as_ref().map_or(0, |failure| u64::from(failure.count));
    out.gauge("failures_in_a_row", "Failures since a session last worked", in_a_row)
}

/// What is known only while a session runs.
fn encode_running(out: &mut Output<'_>, view: &View) -> fmt::Result {
    if let Some(seconds) = view.lag_seconds {
        out.gauge("lag_seconds", "Age of the last transaction applied while more is waiting; 0 when level", seconds)?;
    }
    out.gauge("early_bytes", "Changes that are written of a transaction which has not ended on the source", view.early_bytes)?;
    encode_load(out, &view.load)
}

fn encode_retention(out: &mut Output<'_>, seen: &Retention) -> fmt::Result {
    out.gauge("slot_exists", "1 when the replication slot is on the source", seen.exists.into())?;
    if let Some(bytes) = seen.retained {
        out.gauge("slot_retained_bytes", "Log that the source keeps for the slot", bytes)?;
    }
    if let Some(bytes) = seen.safe {
        let bytes = u64::try_from(bytes).unwrap_or_default();
        out.gauge("slot_safe_bytes", "What may still be written before the slot may be lost; absent without a bound", bytes)?;
    }
    out.gauge("slot_lost", "1 when the source has invalidated the slot", seen.lost.is_some().into())?;
    let given_up = seen.given_up && !seen.exists;
    out.gauge("slot_given_up", "1 when the slot was dropped since more log was kept for it than the budget allows", given_up.into())
}

fn encode_budget(out: &mut Output<'_>, budget: &WalBudgetSpec) -> fmt::Result {
    if let Some(bytes) = budget.warn_bytes {
        out.gauge("wal_budget_warn_bytes", "Log from which it is told that the source keeps much for the slot", bytes)?;
    }
    budget.max_bytes.map_or(Ok(()), |bytes| out.gauge("wal_budget_max_bytes", "Log that the source may keep for the slot", bytes))
}

fn encode_load(out: &mut Output<'_>, load: &LogLoad) -> fmt::Result {
    out.gauge("log_memory_bytes", "Memory of changes until they are applied, and of transactions that have not ended", load.memory)?;
    out.gauge("log_memory_limit_bytes", "The most that this memory may be", load.memory_limit)?;
    out.gauge("spill_bytes", "Files of transactions that have not ended", load.spilled)?;
    out.gauge("spill_limit_bytes", "The most that these files may take", load.spill_limit)?;
    let full = load.notice.as_ref().is_some_and(|notice| notice.reason == reason::SPILL_FULL);
    out.gauge("spill_full", "1 while large transactions are received at their end only, since the spill was full", full.into())
}

fn word(phase: Phase) -> &'static str {
    match phase {
        Phase::Starting => "Starting",
        Phase::SettingUp => "SettingUp",
        Phase::Copying => "Copying",
        Phase::CatchingUp => "CatchingUp",
        Phase::Streaming => "Streaming",
        Phase::Suspended => "Suspended",
        Phase::Retrying => "Retrying",
        Phase::Stopped => "Stopped",
    }
}

struct Output<'a>(DescriptorEncoder<'a>);

impl Output<'_> {
    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let metric = ConstCounter::new(value);
        let encoder = self.0.encode_descriptor(name, help, None, metric.metric_type())?;
        metric.encode(encoder)
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let metric = ConstGauge::new(value);
        let encoder = self.0.encode_descriptor(name, help, None, metric.metric_type())?;
        metric.encode(encoder)
    }

    fn histogram(&mut self, name: &str, help: &str, latency: &Latency) -> fmt::Result {
        let classes = latency.classes();
        let count = classes.iter().map(|(_, count)| count).sum();
        let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Histogram)?;
        encoder.encode_histogram::<NoLabelSet>(latency.sum().as_secs_f64(), count, &classes, None)
    }

    fn counters(&mut self, name: &str, help: &str, label: &str, values: &[(&str, u64)]) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (value, count) in values {
            ConstCounter::new(*count).encode(encoder.encode_family(&[(label, *value)])?)?;
        }
        Ok(())
    }

    fn gauges(&mut self, name: &str, help: &str, label: &str, values: &[(&str, u64)]) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (value, count) in values {
            ConstGauge::new(*count).encode(encoder.encode_family(&[(label, *value)])?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::contract::tests::desired;

    #[test]
    fn the_text_names_everything_once() {
        let board = Arc::new(Board::new("pod".to_owned()));
        {
            let mut facts = board.facts();
            facts.desired = Some(Arc::new(desired(4)));
            facts.state = State::Suspended;
            facts.sessions = 2;
            facts.failures.insert("Retry", 1);
        }
        let text = Metrics::new(board).encode().unwrap();
        for line in [
            "sluice_worker_build_info{version=\"0.1.0\"} 1",
            "sluice_worker_generation 4",
            "sluice_worker_phase{phase=\"Suspended\"} 1",
            "sluice_worker_phase{phase=\"Streaming\"} 0",
            "sluice_worker_sessions_total 2",
            "sluice_worker_failures_total{class=\"Retry\"} 1",
            "sluice_worker_rows_total{op=\"insert\"} 0",
            "sluice_worker_batches_total 0",
            "sluice_worker_latency_seconds_count 0",
            "sluice_worker_latency_seconds_bucket{le=\"0.001\"} 0",
            "sluice_worker_latency_seconds_bucket{le=\"+Inf\"} 0",
            "# EOF",
        ] {
            assert_eq!(text.lines().filter(|found| *found == line).count(), 1, "{line}\n{text}");
        }
        assert!(!text.contains("lag_bytes"), "a suspended worker knows no lag");
        for (name, _) in text.lines().filter_map(|line| line.strip_prefix("# HELP ")).filter_map(|line| line.split_once(' ')) {
            assert!(name.starts_with("sluice_worker_"), "{name}");
        }
    }
}
