//! What the worker knows about itself, shared by the loop that writes it and the HTTP server that shows it.

use super::contract::{Desired, DifferentRow, Failure, Notice, Phase, RequestReport, Retention, Status, VERSION, Verification};
use super::credentials::Redactor;
use super::plan::budget;
use super::supervise::State;
use crate::engine::error::{Class, Error, reason};
use crate::engine::progress::{self, Progress, View};
use crate::engine::request::{RequestRecord, verified};
use crate::engine::retention;
use crate::engine::roles::{self, LogLoad};
use crate::engine::table::QualifiedName;
use crate::engine::verify::{Difference, Key};
use k8s_openapi::jiff::Timestamp;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// Tables in state Error that a status document names.
const TABLE_ERRORS: usize = 20;
/// Requests that a status document tells of.
const REQUESTS: usize = 11;
/// Tables that a comparison has left out and that are shown.
const LEFT_OUT: usize = 10;
/// Characters of a key's column that are shown.
const KEY_CHARACTERS: usize = 128;
/// The event loop turns at least once a second; when it has not for so long, the process is of no use any more.
const HEARTBEAT_LIMIT: Duration = Duration::from_secs(30);

/// The last failure of a session, until a session has worked for a while.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastFailure {
    /// What is done about it.
    pub class: Class,
    /// CamelCase constant.
    pub reason: &'static str,
    /// For people; passwords are taken out.
    pub message: String,
    /// How often in a row.
    pub count: u32,
    /// When a session is tried again; `None` while one runs.
    pub next_try: Option<Instant>,
}

/// Everything but the progress of the session.
#[derive(Debug)]
pub struct Facts {
    /// The document in effect.
    pub desired: Option<Arc<Desired>>,
    /// Why the mounted document is not in effect.
    pub config_error: Option<String>,
    /// Where the worker stands.
    pub state: State,
    /// Last failure.
    pub failure: Option<LastFailure>,
    /// Sessions begun.
    pub sessions: u64,
    /// Failures by class.
    pub failures: BTreeMap<&'static str, u64>,
    /// Hides passwords.
    pub redactor: Redactor,
    /// Last turn of the event loop.
    pub heartbeat: Instant,
}

/// See the module.
#[derive(Debug)]
pub struct Board {
    pod: String,
    progress: Arc<Progress>,
    facts: Mutex<Facts>,
}

impl Board {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(pod: String) -> Self {
        Self {
            pod,
            progress: Progress::new(),
            facts: Mutex::new(Facts {
                desired: None,
                config_error: None,
                state: State::Idle,
                failure: None,
                sessions: 0,
                failures: BTreeMap::new(),
                redactor: Redactor::default(),
                heartbeat: Instant::now(),
            }),
        }
    }

    /// What the sessions report to.
    #[must_use]
    pub fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    /// The facts, for a moment.
    pub fn facts(&self) -> MutexGuard<'_, Facts> {
        // Every write is complete in itself, so the facts behind a panic are still right.
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The document in effect, or why there is none.
    ///
    /// # Errors
    /// For people: what the mounted document lacks.
    pub fn desired(&self) -> Result<Arc<Desired>, String> {
        let facts = self.facts();
        let why = || facts.config_error.clone().unwrap_or_else(|| "no desired document has arrived".to_owned());
        facts.desired.clone().ok_or_else(why)
    }

    /// Notes what is wrong with the mounted document, or that nothing is.
    pub fn set_config_error(&self, error: Option<String>) {
        self.facts().config_error = error;
    }

    /// The event loop turns.
    pub fn beat(&self) {
        self.facts().heartbeat = Instant::now();
    }

    /// Whether the event loop turns. Says nothing of databases: an outage of theirs must restart no worker.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.facts().heartbeat.elapsed() < HEARTBEAT_LIMIT
    }

    /// What the worker does; `None` before a document is in effect.
    #[must_use]
    pub fn phase(&self) -> Option<Phase> {
        let facts = self.facts();
        facts.desired.as_ref()?;
        Some(phase(facts.state, self.progress.view().phase))
    }

    /// The status document; `None` before a desired one is in effect.
    #[must_use]
    pub fn status(&self) -> Option<Status> {
        let view = self.progress.view();
        let facts = self.facts();
        let desired = facts.desired.as_ref()?;
        Some(status(&self.pod, desired, &facts, view))
    }
}

fn phase(state: State, session: progress::Phase) -> Phase {
    match state {
        State::Idle => Phase::Starting,
        State::Suspended => Phase::Suspended,
        State::Waiting(Class::Retry) => Phase::Retrying,
        State::Waiting(_) => Phase::Stopped,
        State::Running | State::Stopping(_) => match session {
            progress::Phase::Starting => Phase::Starting,
            progress::Phase::SettingUp => Phase::SettingUp,
            progress::Phase::Copying => Phase::Copying,
            progress::Phase::CatchingUp => Phase::CatchingUp,
            progress::Phase::Streaming => Phase::Streaming,
        },
    }
}

fn status(pod: &str, desired: &Desired, facts: &Facts, view: View) -> Status {
    let phase = phase(facts.state, view.phase);
    // Without a session nobody follows the source: an old lag would look like a level one.
    let connected = matches!(facts.state, State::Running | State::Stopping(_));
    let clean = |text: String| facts.redactor.clean(&text);
    let latency = |share| view.latency.percentile(share, Instant::now()).map(milliseconds).filter(|_| connected);
    let (latency_p50_milliseconds, latency_p99_milliseconds) = (latency(0.5), latency(0.99));
    let load = Some(&view.load).filter(|_| connected);
    let bytes = |count: fn(&LogLoad) -> u64| load.map(count);
    let of_log = load.and_then(|load| load.notice.clone());
    // A document that contradicts itself is told by the session that it fails.
    let budget = budget(desired.wal_budget.as_ref()).unwrap_or_default();
    let of_slot = || view.retention.as_ref().and_then(|seen| seen.notice(&desired.slot, &budget));
    let notice = of_log.or_else(of_slot).as_ref().map(notice);
    let (lag_bytes, retention) = (lag_bytes(&view, connected), view.retention.clone().map(retention));
    let (log_memory_bytes, log_memory_limit_bytes) = (bytes(|load| load.memory), bytes(|load| load.memory_limit));
    let (spill_bytes, spill_limit_bytes) = (bytes(|load| load.spilled), bytes(|load| load.spill_limit));
    let table_errors = view.table_errors.into_iter().take(TABLE_ERRORS);
    let requests = view.requests.map(|records| requests(&records, desired, &clean));
    let verification = view.verification.as_ref().map(|found| verification(found, &clean));
    Status {
        contract: VERSION,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        generation: desired.generation,
        pod: pod.to_owned(),
        phase,
        epoch: view.epoch,
        slot: desired.slot.clone(),
        publication: desired.publication.clone(),
        received: view.received,
        applied: view.applied,
        confirmed: view.confirmed,
        lag_bytes,
        lag_seconds: view.lag_seconds.filter(|_| connected),
        latency_p50_milliseconds,
        latency_p99_milliseconds,
        tables: view.tables.into_iter().map(|(state, count)| (state.to_owned(), count)).collect(),
        table_errors: table_errors.map(|(table, why)| (table, clean(why))).collect(),
        rows_copied: view.rows_copied,
        rows_to_copy: view.rows_to_copy,
        rows_streamed: view.rows_streamed,
        snapshot_completed: view.snapshot_completed,
        streaming: view.streaming && phase == Phase::Streaming,
        apply_mode: view.apply_mode.map(str::to_owned),
        waiting: view.waiting.filter(|_| connected).map(clean),
        log_memory_bytes,
        log_memory_limit_bytes,
        spill_bytes,
        spill_limit_bytes,
        retention,
        notice,
        requests,
        verification,
        error: failure(facts),
    }
}

/// What is not applied; without a session what is not confirmed, if the source can be asked.
pub(super) fn lag_bytes(view: &View, connected: bool) -> Option<u64> {
    if connected { view.lag_bytes } else { view.retention.as_ref()?.unconfirmed }
}

fn retention(seen: retention::Retention) -> Retention {
    Retention { slot_exists: seen.exists, retained_bytes: seen.retained, wal_status: seen.wal_status, safe_wal_size: seen.safe }
}

/// Rounded up.
fn milliseconds(latency: Duration) -> u64 {
    u64::try_from(latency.as_micros().div_ceil(1000)).unwrap_or(u64::MAX)
}

fn notice(notice: &roles::Notice) -> Notice {
    Notice { reason: notice.reason.to_owned(), message: notice.message.clone() }
}

fn requests(records: &[RequestRecord], desired: &Desired, clean: &dyn Fn(String) -> String) -> Vec<RequestReport> {
    let is_asked = |record: &RequestRecord| desired.request.as_ref().is_some_and(|asked| asked.id == record.id);
    let shown = records.iter().enumerate().filter(|(number, record)| *number < REQUESTS || is_asked(record));
    let report = |record: &RequestRecord| RequestReport {
        id: record.id.clone(),
        action: record.action.clone(),
        is_full_resync: record.is_full_resync(),
        state: record.state.as_str().to_owned(),
        started_at: time(record.started_at),
        finished_at: record.finished_at.map(time),
        message: clean(record.message.clone()),
    };
    shown.map(|(_, record)| report(record)).collect()
}

/// As RFC 3339.
fn time(time: SystemTime) -> String {
    Timestamp::try_from(time).map(|time| time.to_string()).unwrap_or_default()
}

fn verification(found: &verified::Verification, clean: &dyn Fn(String) -> String) -> Verification {
    let short = |value: &String| clean(value.chars().take(KEY_CHARACTERS).collect());
    let row = |(table, key, difference): &(QualifiedName, Key, Difference)| DifferentRow {
        table: table.to_string(),
        key: key.iter().map(short).collect(),
        difference: difference.as_str().to_owned(),
    };
    Verification {
        request: found.request.clone(),
        tables: found.tables as u64,
        of: found.of as u64,
        left_out: found.left_out.iter().take(LEFT_OUT).map(ToString::to_string).collect(),
        rows: found.rows,
        differences: found.differences,
        undecided: found.undecided,
        more: found.more,
        examples: found.examples.iter().map(row).collect(),
        finished_at: found.finished_at.map(time),
    }
}

/// A session's failure comes first; a document that is not taken is told when nothing else is wrong.
fn failure(facts: &Facts) -> Option<Failure> {
    let of_session = facts.failure.as_ref().map(|failure| Failure {
        class: failure.class.as_str().to_owned(),
        reason: failure.reason.to_owned(),
        message: failure.message.clone(),
        count: failure.count,
        retry_in_seconds: failure.next_try.map(seconds_until),
    });
    let of_document = facts.config_error.as_ref().map(|message| Failure {
        class: Class::Stop.as_str().to_owned(),
        reason: reason::INVALID_SPEC.to_owned(),
        message: facts.redactor.clean(message),
        count: 1,
        retry_in_seconds: None,
    });
    of_session.or(of_document)
}

/// Rounded up, so that 0 means now.
fn seconds_until(moment: Instant) -> u64 {
    let left = moment.saturating_duration_since(Instant::now());
    left.as_secs() + u64::from(left.subsec_nanos() > 0)
}

impl LastFailure {
    /// What is shown of an engine's error.
    #[must_use]
    pub fn of(error: &Error, redactor: &Redactor, count: u32, next_try: Option<Instant>) -> Self {
        Self { class: error.class, reason: error.reason, message: redactor.clean(&error.message), count, next_try }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::contract::tests::desired;
    use crate::worker::credentials::tests::credentials;
    use crate::worker::supervise::Urgency;

    #[test]
    fn phases_follow_the_state_then_the_session() {
        let streaming = progress::Phase::Streaming;
        for (state, expected) in [
            (State::Idle, Phase::Starting),
            (State::Running, Phase::Streaming),
            (State::Stopping(Urgency::Finish), Phase::Streaming),
            (State::Waiting(Class::Retry), Phase::Retrying),
            (State::Waiting(Class::Stop), Phase::Stopped),
            (State::Waiting(Class::Bug), Phase::Stopped),
            (State::Suspended, Phase::Suspended),
        ] {
            assert_eq!(phase(state, streaming), expected, "{state:?}");
        }
        assert_eq!(phase(State::Running, progress::Phase::SettingUp), Phase::SettingUp);
    }

    #[test]
    fn a_view_becomes_a_status() {
        let board = Board::new("pod-1".to_owned());
        assert!(board.status().is_none());
        let mut facts = board.facts();
        facts.redactor.learn(&credentials("hunter2", ""));
        facts.state = State::Running;
        let view = View {
            phase: progress::Phase::Streaming,
            epoch: 3,
            lag_bytes: Some(10),
            lag_seconds: Some(2),
            tables: BTreeMap::from([("Ready", 2), ("Error", 30)]),
            table_errors: (0..30).map(|n| (format!("public.t{n:02}"), "said hunter2".to_owned())).collect(),
            streaming: true,
            apply_mode: Some("Replica"),
            waiting: Some("pid 1".to_owned()),
            load: LogLoad {
                memory: 1,
                memory_limit: 4,
                spilled: 2,
                spill_limit: 3,
                notice: Some(roles::Notice { reason: reason::SPILL_FULL, message: "full".to_owned() }),
            },
            ..View::default()
        };
        let running = status("pod-1", &desired(7), &facts, view.clone());
        assert_eq!((running.log_memory_bytes, running.log_memory_limit_bytes), (Some(1), Some(4)));
        assert_eq!((running.spill_bytes, running.spill_limit_bytes), (Some(2), Some(3)));
        assert_eq!(running.notice.map(|notice| notice.reason), Some("SpillFull".to_owned()));
        assert_eq!((running.generation, running.epoch, running.phase), (7, 3, Phase::Streaming));
        assert_eq!((running.lag_bytes, running.lag_seconds, running.streaming), (Some(10), Some(2), true));
        assert_eq!(running.table_errors.len(), TABLE_ERRORS);
        assert_eq!(running.table_errors["public.t00"], "said ***");
        assert_eq!(running.error, None);

        facts.state = State::Waiting(Class::Retry);
        let error = Error::retry(reason::SOURCE_UNREACHABLE, "no route, password hunter2");
        let next_try = Instant::now() + Duration::from_secs(20);
        facts.failure = Some(LastFailure::of(&error, &facts.redactor, 2, Some(next_try)));
        facts.config_error = Some("also".to_owned());
        let waiting = status("pod-1", &desired(7), &facts, view);
        assert_eq!((waiting.spill_bytes, waiting.notice), (None, None));
        assert_eq!((waiting.lag_bytes, waiting.lag_seconds, waiting.streaming, waiting.waiting), (None, None, false, None));
        let shown = waiting.error.unwrap();
        assert_eq!((shown.class.as_str(), shown.reason.as_str(), shown.count), ("Retry", "SourceUnreachable", 2));
        assert_eq!((shown.message.as_str(), shown.retry_in_seconds), ("no route, password ***", Some(20)));
        let lost = retention::Retention {
            exists: true,
            unconfirmed: Some(9),
            wal_status: Some("lost".to_owned()),
            lost: Some(retention::Lost { reason: reason::SLOT_LOST, cause: "gone".to_owned() }),
            ..Default::default()
        };
        let lost = status("pod-1", &desired(7), &facts, View { retention: Some(lost), ..View::default() });
        assert_eq!((lost.lag_bytes, lost.notice.map(|notice| notice.reason)), (Some(9), Some("SlotLost".to_owned())));
        assert_eq!(lost.retention.map(|seen| (seen.slot_exists, seen.wal_status)), Some((true, Some("lost".to_owned()))));
        facts.failure = None;
        assert_eq!(failure(&facts).unwrap().reason, reason::INVALID_SPEC);
    }
}
