//! Metrics of the operator, in the OpenMetrics text format; every name begins with `sluice_operator_`.
//!
//! No label ever names an object: the number of series does not grow with the number of Mirrors.

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime};

/// Media type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Upper bounds of the buckets, in seconds: from a pass without writes to the limit of a pass.
const SECONDS: [f64; 12] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reconciled {
    controller: &'static str,
    outcome: &'static str,
    class: &'static str,
}
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Controller {
    controller: &'static str,
}
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: String,
}
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindResult {
    kind: String,
    result: &'static str,
}
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ApiRequest {
    verb: &'static str,
    resource: String,
    code: u16,
}
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PollResult {
    result: &'static str,
}
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Phase {
    phase: String,
}
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindReady {
    kind: &'static str,
    ready: &'static str,
}

#[derive(Clone)]
struct InSeconds;
impl MetricConstructor<Histogram> for InSeconds {
    fn new_metric(&self) -> Histogram {
        Histogram::new(SECONDS)
    }
}

/// All metrics of one process. Cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Registry>,
    reconciles: Family<Reconciled, Counter>,
    reconcile_seconds: Family<Controller, Histogram, InSeconds>,
    inflight: Family<Controller, Gauge>,
    watch_errors: Family<Kind, Counter>,
    watch_last_event: Family<Kind, Gauge<f64, AtomicU64>>,
    undecodable: Family<Kind, Counter>,
    api_requests: Family<ApiRequest, Counter>,
    status_writes: Family<Kind, Counter>,
    applies: Family<KindResult, Counter>,
    events: Family<PollResult, Counter>,
    leader: Gauge,
    lease_failures: Counter,
    polls: Family<PollResult, Counter>,
    poll_seconds: Histogram,
    workers: Family<Phase, Gauge>,
    resources: Family<KindReady, Gauge>,
    orphaned_slots: Gauge,
    slots_without_mirror: Gauge,
    slots_without_mirror_bytes: Gauge,
    missing_permissions: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new(env!("CARGO_PKG_VERSION"))
    }
}

impl Metrics {
    /// Registers everything; `release` is shown by `build_info`.
    pub fn new(release: &str) -> Self {
        let mut metrics = Self {
            registry: Arc::default(),
            reconciles: Family::default(),
            reconcile_seconds: Family::new_with_constructor(InSeconds),
            inflight: Family::default(),
            watch_errors: Family::default(),
            watch_last_event: Family::default(),
            undecodable: Family::default(),
            api_requests: Family::default(),
            status_writes: Family::default(),
            applies: Family::default(),
            events: Family::default(),
            leader: Gauge::default(),
            lease_failures: Counter::default(),
            polls: Family::default(),
            poll_seconds: InSeconds.new_metric(),
            workers: Family::default(),
            resources: Family::default(),
            orphaned_slots: Gauge::default(),
            slots_without_mirror: Gauge::default(),
            slots_without_mirror_bytes: Gauge::default(),
            missing_permissions: Gauge::default(),
        };
        metrics.registry = Arc::new(metrics.register(release));
        metrics
    }

    fn register(&self, release: &str) -> Registry {
        let mut all = Registry::with_prefix("sluice_operator");
        all.register("reconcile", "Reconciles by outcome and class of error", self.reconciles.clone());
        all.register("reconcile_duration_seconds", "Time a reconcile took", self.reconcile_seconds.clone());
        all.register("inflight", "Reconciles that run now", self.inflight.clone());
        all.register("watch_errors", "Failures of watches", self.watch_errors.clone());
        all.register("watch_last_event_timestamp_seconds", "When a watch last heard from the API server", self.watch_last_event.clone());
        all.register("undecodable_objects", "Objects of a watch that could not be decoded and were left out", self.undecodable.clone());
        all.register("api_requests", "Requests to the API server; code 0: no answer", self.api_requests.clone());
        all.register("status_writes", "Writes of a status", self.status_writes.clone());
        all.register("apply", "Server-side applies of children by result", self.applies.clone());
        all.register("events", "Events by result", self.events.clone());
        all.register("leader", "Whether this process leads: it holds the lease, or needs none", self.leader.clone());
        all.register("lease_renew_failures", "Attempts to renew the lease that failed", self.lease_failures.clone());
        all.register("poll", "Polls of workers by result", self.polls.clone());
        all.register("poll_duration_seconds", "Time a poll of a worker took", self.poll_seconds.clone());
        all.register("workers", "Workers by phase; Unreachable: the last poll failed", self.workers.clone());
        all.register("resources", "Resources by readiness", self.resources.clone());
        all.register(
            "slots_without_mirror",
            "Slots on Sources that belong to no Mirror and that nobody reads",
            self.slots_without_mirror.clone(),
        );
        all.register(
            "slots_without_mirror_bytes",
            "Log that Sources keep for slots that belong to no Mirror",
            self.slots_without_mirror_bytes.clone(),
        );
        all.register("orphaned_slots", "Replication slots that deleted Mirrors left on their sources", self.orphaned_slots.clone());
        all.register("missing_permissions", "Rules that the operator's role lacks; the log names them", self.missing_permissions.clone());
        all.register("build", "The operator's release", Info::new([("release", release.to_owned())]));
        all
    }

    /// The text that `/metrics` serves.
    ///
    /// # Errors
    /// Never in practice: writing to a string does not fail.
    pub fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut body = String::new();
        text::encode(&mut body, &self.registry)?;
        Ok(body)
    }

    /// One reconcile has begun.
    pub fn reconcile_started(&self, controller: &'static str) {
        self.inflight.get_or_create(&Controller { controller }).inc();
    }

    /// One reconcile has ended. `outcome` is `success`, `failure`, `timeout` or `panic`; `class` is empty on success.
    pub fn reconcile_ended(&self, controller: &'static str, outcome: &'static str, class: &'static str, took: Duration) {
        self.reconciles.get_or_create(&Reconciled { controller, outcome, class }).inc();
        self.reconcile_seconds.get_or_create(&Controller { controller }).observe(took.as_secs_f64());
        self.inflight.get_or_create(&Controller { controller }).dec();
    }

    /// A watch of `kind` failed.
    pub fn watch_failed(&self, kind: &str) {
        self.watch_errors.get_or_create(&Kind { kind: kind.into() }).inc();
    }

    /// A watch of `kind` heard from the API server now.
    pub fn watch_heard(&self, kind: &str) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.watch_last_event.get_or_create(&Kind { kind: kind.into() }).set(now.as_secs_f64());
    }

    /// An object of `kind` could not be decoded.
    pub fn object_undecodable(&self, kind: &str) {
        self.undecodable.get_or_create(&Kind { kind: kind.into() }).inc();
    }

    /// A request to the API server ended; `code` 0 when there was no answer.
    pub fn api_request(&self, verb: &'static str, resource: &str, code: u16) {
        self.api_requests.get_or_create(&ApiRequest { verb, resource: resource.into(), code }).inc();
    }

    /// A status of `kind` was written.
    pub fn status_written(&self, kind: &str) {
        self.status_writes.get_or_create(&Kind { kind: kind.into() }).inc();
    }

    /// A child of `kind` was applied: `applied`, `unchanged` (not sent) or `failed`.
    pub fn applied(&self, kind: &str, result: &'static str) {
        self.applies.get_or_create(&KindResult { kind: kind.into(), result }).inc();
    }

    /// An event was `created`, `repeated` or `failed`.
    pub fn event(&self, result: &'static str) {
        self.events.get_or_create(&PollResult { result }).inc();
    }

    /// Whether this process leads.
    pub fn set_leader(&self, leads: bool) {
        self.leader.set(leads.into());
    }

    /// An attempt to take or renew the lease failed.
    pub fn lease_failed(&self) {
        self.lease_failures.inc();
    }

    /// A worker was polled: `ok` or the reason of the failure.
    pub fn polled(&self, result: &'static str, took: Duration) {
        self.polls.get_or_create(&PollResult { result }).inc();
        self.poll_seconds.observe(took.as_secs_f64());
    }

    /// Number of workers by phase; phases that are not named have none.
    pub fn set_workers(&self, counts: &[(String, usize)]) {
        self.workers.clear();
        for (phase, count) in counts {
            self.workers.get_or_create(&Phase { phase: phase.clone() }).set(gauge(*count));
        }
    }

    /// Number of resources of `kind` that are ready, and that are not.
    pub fn set_resources(&self, kind: &'static str, ready: usize, not_ready: usize) {
        self.resources.get_or_create(&KindReady { kind, ready: "true" }).set(gauge(ready));
        self.resources.get_or_create(&KindReady { kind, ready: "false" }).set(gauge(not_ready));
    }

    /// Number of rules that the operator's role lacks.
    pub fn set_missing_permissions(&self, count: usize) {
        self.missing_permissions.set(gauge(count));
    }

    /// Slots on Sources that belong to no Mirror and that nobody reads, and bytes of log that are kept for them.
    pub fn set_slots_without_mirror(&self, count: i64, bytes: i64) {
        self.slots_without_mirror.set(count);
        self.slots_without_mirror_bytes.set(bytes);
    }

    /// A slot was left behind on a source.
    pub fn slot_orphaned(&self) {
        self.orphaned_slots.inc();
    }
}

fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::Metrics;
    use std::time::Duration;

    #[test]
    fn names_are_those_of_the_book() {
        let metrics = Metrics::new("1.2.3");
        metrics.reconcile_started("mirror");
        metrics.reconcile_ended("mirror", "failure", "transient", Duration::from_millis(7));
        metrics.watch_failed("Pod");
        metrics.watch_heard("Pod");
        metrics.api_request("patch", "mirrors", 200);
        metrics.status_written("Mirror");
        metrics.applied("ConfigMap", "applied");
        metrics.set_leader(true);
        metrics.polled("ok", Duration::from_millis(3));
        metrics.set_workers(&[("Streaming".into(), 3)]);
        metrics.set_resources("Mirror", 2, 1);
        metrics.slot_orphaned();
        let text = metrics.encode().expect("text");
        for line in [
            r#"sluice_operator_reconcile_total{controller="mirror",outcome="failure",class="transient"} 1"#,
            r#"sluice_operator_reconcile_duration_seconds_count{controller="mirror"} 1"#,
            r#"sluice_operator_watch_errors_total{kind="Pod"} 1"#,
            r#"sluice_operator_api_requests_total{verb="patch",resource="mirrors",code="200"} 1"#,
            r#"sluice_operator_status_writes_total{kind="Mirror"} 1"#,
            r#"sluice_operator_apply_total{kind="ConfigMap",result="applied"} 1"#,
            "sluice_operator_leader 1",
            r#"sluice_operator_poll_total{result="ok"} 1"#,
            r#"sluice_operator_workers{phase="Streaming"} 3"#,
            r#"sluice_operator_resources{kind="Mirror",ready="true"} 2"#,
            "sluice_operator_orphaned_slots 1",
            r#"sluice_operator_build_info{release="1.2.3"} 1"#,
        ] {
            assert!(text.lines().any(|other| other == line), "{line} is missing in\n{text}");
        }
    }

    #[test]
    fn a_phase_without_workers_goes_away() {
        let metrics = Metrics::default();
        metrics.set_workers(&[("Copying".into(), 1)]);
        metrics.set_workers(&[("Streaming".into(), 1)]);
        assert!(!metrics.encode().expect("text").contains("Copying"));
    }
}
