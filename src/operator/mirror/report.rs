//! The status of a Mirror from what is known of it. Pure.
//!
//! Invariants: at most seven conditions; `Suspended` is Ready while the slot is not lost; what is only not known now keeps the last
//! word on what was reached.

mod requests;
mod text;

use super::observe::{Observed, Worker};
use super::plan;
use super::problem::{Problem, documented};
use crate::engine::error::reason as engine;
use crate::engine::request::WAY_OUT;
use crate::operator::slim::SlimMirror;
use crate::resources::conditions::{self, Finding, kind, reason};
use crate::resources::{DifferentRow, MirrorStatus, Position, Retention, TableCounts, VerificationStatus, WorkerStatus};
use crate::worker::contract::{self, Failure, Notice, Phase, Status};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use std::borrow::Cow;
use std::collections::BTreeMap;

/// Longest `status.lastError`, in bytes.
const LAST_ERROR_LIMIT: usize = 1024;
/// Columns of a key in the status, by the schema.
const KEY_COLUMNS: usize = 32;
/// Longest list of tables that have failed in a message.
const NAMED_TABLES: usize = 3;
/// State of a table that follows.
const READY_STATE: &str = "Ready";

/// What a report is made of.
pub struct Facts<'a> {
    /// The Mirror as it was read.
    pub mirror: &'a SlimMirror,
    /// Why its current spec is not carried out.
    pub problem: Option<&'a Problem>,
    /// What is seen of its worker.
    pub observed: &'a Observed,
    /// Generation of the document that the worker shall follow.
    pub told: Option<i64>,
}

/// What a Mirror is doing, the one thing that decides all conditions.
#[derive(Debug)]
enum Situation<'a> {
    /// Told to rest, and resting.
    Suspended,
    /// No worker may be made.
    Blocked(&'a Problem),
    /// A worker is on its way.
    Starting(&'a str),
    /// Its pod fails.
    Failed(&'a str),
    /// Its pod has failed for so long, or so often, that it will not do better by itself.
    Stuck(&'static str, &'a str),
    /// It does not answer.
    Unreachable(&'a str),
    /// It speaks an old contract.
    Outdated(&'a str),
    /// It is on the way to streaming.
    Working(&'static str, String),
    /// All is well.
    Streaming,
    /// It reports a failure.
    Broken(Problem),
}

/// The status, with what was known before where nothing newer is.
pub fn report(facts: &Facts<'_>, now: Timestamp) -> MirrorStatus {
    let (mirror, observed) = (facts.mirror, facts.observed);
    let old = mirror.status.clone().unwrap_or_default();
    let situation = situation(facts);
    let phase = phase(&situation, observed, &old);
    let error = last_error(facts, &situation);
    let mut conditions = old.conditions.clone();
    conditions::replace(&mut conditions, findings(facts, &situation, &old), mirror.metadata.generation, now);
    let status = MirrorStatus {
        observed_generation: mirror.metadata.generation,
        conditions,
        phase: Some(phase),
        slot: Some(plan::slot(mirror)),
        publication: Some(plan::publication(mirror)),
        worker: worker(observed),
        last_error: error.map(|error| conditions::cut(error, LAST_ERROR_LIMIT)),
        ..old
    };
    let said = observed.worker.status();
    let status = requests::requests(status, mirror, said.and_then(|said| said.requests.as_deref()));
    match said {
        Some(said) => progress(status, said),
        None => status,
    }
}

/// The status of a Mirror that the operator keeps its hands off: all as it was but for one condition.
pub fn paused(mirror: &SlimMirror, now: Timestamp) -> MirrorStatus {
    let mut status = mirror.status.clone().unwrap_or_default();
    status.observed_generation = status.observed_generation.filter(|seen| *seen >= 0).or(mirror.metadata.generation);
    let message = "the annotation sluice.dev/pause-reconciliation keeps the operator's hands off";
    let finding = Finding::no(kind::RECONCILING, reason::RECONCILIATION_PAUSED, message);
    conditions::set(&mut status.conditions, finding, mirror.metadata.generation, now);
    status
}

/// The status of a Mirror that is being deleted. `trouble` is what keeps the clean-up from its end.
pub fn deleting(mirror: &SlimMirror, doing: &str, trouble: Option<&str>, now: Timestamp) -> MirrorStatus {
    let mut status = mirror.status.clone().unwrap_or_default();
    let why = if trouble.is_some() { reason::CLEANUP_FAILED } else { reason::DELETING };
    let message = trouble.unwrap_or(doing);
    let findings = vec![
        Finding::no(kind::READY, why, message),
        Finding::yes(kind::RECONCILING, reason::DELETING, doing),
        Finding::no(kind::STALLED, reason::DELETING, ""),
        Finding::no(kind::STREAMING, reason::DELETING, ""),
        Finding::no(kind::WORKER_AVAILABLE, reason::DELETING, ""),
    ];
    conditions::replace(&mut status.conditions, findings, mirror.metadata.generation, now);
    status.observed_generation = mirror.metadata.generation;
    status.phase = Some("Deleting".to_owned());
    status.last_error = trouble.map(|trouble| conditions::cut(trouble.to_owned(), LAST_ERROR_LIMIT));
    status
}

/// What an event tells.
#[derive(Debug, PartialEq, Eq)]
pub struct News<'a> {
    /// Nobody needs to look.
    pub calm: bool,
    /// That of the condition.
    pub reason: &'static str,
    /// That of the condition.
    pub message: Cow<'a, str>,
}

/// What changed between `old` and `status`: another status or reason of Ready, a new reason to be stalled, another state of a request.
/// Not another message.
pub fn news<'a>(old: &MirrorStatus, status: &'a MirrorStatus) -> Vec<News<'a>> {
    let mut news = of_conditions(&old.conditions, status);
    news.extend(requests::news(old, status));
    news
}

fn of_conditions<'a>(old: &[Condition], status: &'a MirrorStatus) -> Vec<News<'a>> {
    let stalled = conditions::is_true(&status.conditions, kind::STALLED);
    let progresses = conditions::is_true(&status.conditions, kind::RECONCILING) && status.last_error.is_none();
    let mut news: Vec<News<'a>> = vec![];
    for name in [kind::READY, kind::STALLED] {
        let Some(new) = conditions::get(&status.conditions, name).filter(|new| name == kind::READY || new.status == "True") else {
            continue;
        };
        let is_old = conditions::get(old, name).is_some_and(|old| old.status == new.status && old.reason == new.reason);
        let reason = documented(&new.reason);
        if !is_old && news.iter().all(|told| told.reason != reason) {
            // A reason of the engine beside `True` is something to look at.
            let fine = new.status == "True" && !engine::ALL.contains(&reason);
            let calm = name == kind::READY && (fine || (progresses && !stalled && new.status != "True"));
            news.push(News { calm, reason, message: Cow::Borrowed(&new.message) });
        }
    }
    news
}

fn situation<'a>(facts: &Facts<'a>) -> Situation<'a> {
    let observed = facts.observed;
    // Whatever else there is, a stream without its slot has no way on; one that rests would learn of it only when it is resumed.
    if let Some(problem) = observed.worker.status().and_then(|status| without_slot(facts.mirror, status)) {
        return Situation::Broken(problem);
    }
    if is_suspended(facts) {
        return Situation::Suspended;
    }
    match (&observed.worker, facts.problem) {
        (Worker::Answers(status), _) => of_worker(status),
        (_, Some(problem)) if !observed.exists => Situation::Blocked(problem),
        (Worker::Starting(why), _) => Situation::Starting(why),
        (Worker::CannotStart { why, lasts: true }, _) => Situation::Stuck(reason::WORKER_CANNOT_START, why),
        (Worker::KeepsEnding { why, lasts: true }, _) => Situation::Stuck(reason::WORKER_CRASH_LOOPING, why),
        (Worker::CannotStart { why, .. } | Worker::KeepsEnding { why, .. }, _) => Situation::Failed(why),
        (Worker::Unreachable(why), _) => Situation::Unreachable(why),
        (Worker::Outdated(why), _) => Situation::Outdated(why),
    }
}

/// The worker has seen that the source has given the slot up, or that it is gone.
fn without_slot(mirror: &SlimMirror, status: &Status) -> Option<Problem> {
    let is_final = |notice: &&Notice| notice.reason == engine::SLOT_GIVEN_UP || engine::LOST_SLOTS.contains(&notice.reason.as_str());
    if let Some(notice) = status.notice.as_ref().filter(is_final) {
        return Some(Problem::stop(documented(&notice.reason), notice.message.clone()));
    }
    // A worker that rests, or can't reach its target, does not know whether there ever was one. Once all tables have been copied there
    // was; unless they are just about to be copied anew.
    let copied = |mirror: &SlimMirror| {
        conditions::is_true(mirror.status.as_ref().map_or(&[][..], |status| &status.conditions), kind::SNAPSHOT_COMPLETED)
    };
    let unaware = status.phase == Phase::Suspended || (status.phase == Phase::Retrying && status.snapshot_completed);
    let gone = status.retention.as_ref().is_some_and(|seen| !seen.slot_exists) && status.notice.is_none();
    (unaware && gone && copied(mirror)).then(|| {
        let message =
            format!("slot {} is not on the source any more: changes are gone, the tables need a new copy: {WAY_OUT}", status.slot);
        Problem::stop(engine::SLOT_MISSING, message)
    })
}

/// Told to rest, and nothing moves: the worker says so, or there is none.
fn is_suspended(facts: &Facts<'_>) -> bool {
    let rests = match &facts.observed.worker {
        Worker::Answers(status) => status.phase == Phase::Suspended,
        Worker::Starting(_) | Worker::CannotStart { .. } => facts.observed.pod.is_none() || !facts.observed.exists,
        Worker::KeepsEnding { .. } | Worker::Unreachable(_) | Worker::Outdated(_) => false,
    };
    facts.mirror.spec.suspend && rests
}

fn of_worker(status: &Status) -> Situation<'static> {
    if let Some(error) = &status.error {
        return Situation::Broken(of_failure(error));
    }
    if let Some(problem) = failed_tables(&status.table_errors).filter(|_| status.phase == Phase::Streaming) {
        return Situation::Broken(problem);
    }
    let waiting = |else_: &str| status.waiting.clone().unwrap_or_else(|| else_.to_owned());
    match status.phase {
        Phase::Streaming if status.streaming => Situation::Streaming,
        Phase::Starting => Situation::Working(reason::STARTING, waiting("the worker connects and claims the stream")),
        Phase::SettingUp => Situation::Working(reason::SETTING_UP, waiting("publication, slot and tables are being made")),
        Phase::Copying => Situation::Working(reason::COPYING, text::copying(status)),
        Phase::CatchingUp | Phase::Streaming => {
            Situation::Working(reason::CATCHING_UP, waiting("copied tables follow the stream up to its position"))
        }
        Phase::Suspended => Situation::Working(reason::STARTING, "the worker takes up its work again".to_owned()),
        Phase::Retrying => Situation::Working(reason::STARTING, waiting("the worker tries again")),
        Phase::Stopped => Situation::Broken(Problem::stop(documented(""), "the worker has stopped and does not say why")),
    }
}

fn of_failure(error: &Failure) -> Problem {
    let known = documented(&error.reason);
    let message = if known == error.reason { error.message.clone() } else { format!("{}: {}", error.reason, error.message) };
    Problem { reason: known, message, needs_human: matches!(error.class.as_str(), "Stop" | "Bug") }
}

/// Tables that are left behind while the others stream. Each says `Reason: message`.
fn failed_tables(errors: &BTreeMap<String, String>) -> Option<Problem> {
    let (_, first) = errors.first_key_value()?;
    let word = first.split(':').next().unwrap_or_default();
    let named: Vec<_> = errors.iter().take(NAMED_TABLES).map(|(table, why)| format!("table {table}: {why}")).collect();
    let more = errors.len().saturating_sub(NAMED_TABLES);
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    Some(Problem::stop(documented(word), format!("{}{more}", named.join("; "))))
}

fn findings(facts: &Facts<'_>, situation: &Situation<'_>, old: &MirrorStatus) -> Vec<Finding> {
    vec![
        ready(facts, situation, old),
        reconciling(facts, situation),
        stalled(facts, situation),
        snapshot_completed(facts, situation, old),
        streaming(situation),
        worker_available(facts.observed, situation),
        suspended(facts),
    ]
}

fn ready(facts: &Facts<'_>, situation: &Situation<'_>, old: &MirrorStatus) -> Finding {
    let status = facts.observed.worker.status();
    let notice = status.and_then(|status| status.notice.as_ref());
    let aside = status.and_then(|status| status.waiting.as_ref()).map(|aside| format!("; {aside}")).unwrap_or_default();
    match (situation, notice) {
        (Situation::Suspended | Situation::Streaming, Some(notice)) => {
            Finding::yes(kind::READY, documented(&notice.reason), notice.message.clone())
        }
        (Situation::Suspended, None) => Finding::yes(kind::READY, reason::SUSPENDED, "suspended; the source keeps its log"),
        (Situation::Streaming, None) => Finding::yes(kind::READY, reason::STREAMING, format!("every table follows the stream{aside}")),
        // It streams on, as far as anybody knows.
        (Situation::Working(..), _) if keeps_ready(facts, old) => kept(kind::READY, situation.reason(), old),
        (Situation::Outdated(why), _) => Finding { message: (*why).to_owned(), ..kept(kind::READY, reason::WORKER_OUTDATED, old) },
        (other, _) => Finding::no(kind::READY, other.reason(), other.message()),
    }
}

/// A session begins for a request that leaves the Mirror as ready as it was.
fn keeps_ready(facts: &Facts<'_>, old: &MirrorStatus) -> bool {
    let said = facts.observed.worker.status().and_then(|said| said.requests.as_deref());
    conditions::is_true(&old.conditions, kind::READY) && requests::keeps_ready(facts.mirror, old, said)
}

fn reconciling(facts: &Facts<'_>, situation: &Situation<'_>) -> Finding {
    let status = facts.observed.worker.status();
    let behind = facts.told.zip(status).is_some_and(|(told, status)| status.generation < told);
    let switching = facts.mirror.spec.suspend && !is_suspended(facts);
    let progresses = match situation {
        Situation::Suspended | Situation::Outdated(_) | Situation::Stuck(..) => false,
        Situation::Streaming => behind || switching,
        Situation::Blocked(problem) => !problem.needs_human,
        Situation::Broken(problem) => behind || switching || !problem.needs_human,
        Situation::Starting(_) | Situation::Failed(_) | Situation::Unreachable(_) | Situation::Working(..) => true,
    };
    if !progresses {
        return Finding::no(
            kind::RECONCILING,
            if matches!(situation, Situation::Suspended) { reason::SUSPENDED } else { reason::RECONCILED },
            "",
        );
    }
    let message = match (behind || switching, situation) {
        (true, _) if facts.mirror.spec.suspend => "the worker is being suspended".to_owned(),
        (true, _) => "the worker takes up the current spec".to_owned(),
        (false, other) => other.message(),
    };
    Finding::yes(kind::RECONCILING, reason::PROGRESSING, message)
}

/// A wrong spec stalls also while the last good one goes on.
fn stalled(facts: &Facts<'_>, situation: &Situation<'_>) -> Finding {
    let broken = match situation {
        Situation::Stuck(reason, why) => return Finding::yes(kind::STALLED, reason, *why),
        Situation::Broken(problem) => Some(problem),
        _ => None,
    };
    match facts.problem.into_iter().chain(broken).find(|problem| problem.needs_human) {
        Some(problem) => Finding::yes(kind::STALLED, problem.reason, problem.message.clone()),
        None => Finding::no(kind::STALLED, reason::RECONCILED, ""),
    }
}

fn snapshot_completed(facts: &Facts<'_>, situation: &Situation<'_>, old: &MirrorStatus) -> Finding {
    match facts.observed.worker.status() {
        Some(status) if status.snapshot_completed => {
            Finding::yes(kind::SNAPSHOT_COMPLETED, reason::SNAPSHOT_COMPLETED, "all tables have been copied")
        }
        // A resting or failing worker does not look; what was copied stays copied.
        Some(status) if matches!(status.phase, Phase::Copying | Phase::SettingUp) => {
            Finding::no(kind::SNAPSHOT_COMPLETED, situation.reason(), "")
        }
        _ => kept_or_no(kind::SNAPSHOT_COMPLETED, situation.reason(), old),
    }
}

fn streaming(situation: &Situation<'_>) -> Finding {
    match situation {
        Situation::Streaming => Finding::yes(kind::STREAMING, reason::STREAMING, "every table follows the stream"),
        Situation::Unreachable(_) | Situation::Outdated(_) => {
            Finding::unknown(kind::STREAMING, situation.reason(), "the worker may stream; it can't be asked")
        }
        other => Finding::no(kind::STREAMING, other.reason(), ""),
    }
}

fn worker_available(observed: &Observed, situation: &Situation<'_>) -> Finding {
    let no = |reason, why: &String| Finding::no(kind::WORKER_AVAILABLE, reason, why);
    let failed = if let Situation::Stuck(reason, _) = situation { *reason } else { reason::WORKER_FAILED };
    match &observed.worker {
        Worker::Answers(_) => Finding::yes(kind::WORKER_AVAILABLE, reason::WORKER_RUNNING, "the worker answers"),
        Worker::Starting(why) => no(reason::WORKER_STARTING, why),
        Worker::CannotStart { why, .. } | Worker::KeepsEnding { why, .. } => no(failed, why),
        Worker::Unreachable(why) => no(reason::WORKER_UNREACHABLE, why),
        Worker::Outdated(why) => no(reason::WORKER_OUTDATED, why),
    }
}

fn suspended(facts: &Facts<'_>) -> Finding {
    match (facts.mirror.spec.suspend, is_suspended(facts)) {
        (_, true) => Finding::yes(kind::SUSPENDED, reason::SUSPENDED, "the position is kept, and the source keeps its log from there"),
        (true, false) => Finding::no(kind::SUSPENDED, reason::PROGRESSING, "the worker has not stopped yet"),
        (false, false) => Finding::no(kind::SUSPENDED, reason::RECONCILED, ""),
    }
}

impl Situation<'_> {
    fn reason(&self) -> &'static str {
        match self {
            Self::Suspended => reason::SUSPENDED,
            Self::Blocked(problem) => problem.reason,
            Self::Starting(_) => reason::WORKER_STARTING,
            Self::Failed(_) => reason::WORKER_FAILED,
            Self::Stuck(reason, _) => reason,
            Self::Unreachable(_) => reason::WORKER_UNREACHABLE,
            Self::Outdated(_) => reason::WORKER_OUTDATED,
            Self::Working(reason, _) => reason,
            Self::Streaming => reason::STREAMING,
            Self::Broken(problem) => problem.reason,
        }
    }

    fn message(&self) -> String {
        match self {
            Self::Suspended | Self::Streaming => String::new(),
            Self::Blocked(problem) => problem.message.clone(),
            Self::Broken(problem) => problem.message.clone(),
            Self::Starting(why) | Self::Failed(why) | Self::Stuck(_, why) | Self::Unreachable(why) | Self::Outdated(why) => {
                (*why).to_owned()
            }
            Self::Working(_, what) => what.clone(),
        }
    }
}

/// The condition as it was; not known when it was not there.
fn kept(kind: &'static str, reason: &'static str, old: &MirrorStatus) -> Finding {
    match conditions::get(&old.conditions, kind) {
        Some(condition) => Finding {
            kind,
            status: match condition.status.as_str() {
                "True" => Some(true),
                "False" => Some(false),
                _ => None,
            },
            reason: documented(&condition.reason),
            message: condition.message.clone(),
        },
        None => Finding::unknown(kind, reason, ""),
    }
}

/// True stays; everything else is as now.
fn kept_or_no(kind: &'static str, reason: &'static str, old: &MirrorStatus) -> Finding {
    if conditions::is_true(&old.conditions, kind) { kept(kind, reason, old) } else { Finding::no(kind, reason, "") }
}

fn phase(situation: &Situation<'_>, observed: &Observed, old: &MirrorStatus) -> String {
    let said = || observed.worker.status().map(|status| format!("{:?}", status.phase));
    match situation {
        Situation::Suspended => "Suspended".to_owned(),
        Situation::Blocked(_) => "Pending".to_owned(),
        Situation::Starting(_) => "Pending".to_owned(),
        Situation::Failed(_) | Situation::Stuck(..) if matches!(observed.worker, Worker::KeepsEnding { .. }) => "Retrying".to_owned(),
        Situation::Failed(_) | Situation::Stuck(..) => "Pending".to_owned(),
        // Nobody can say; the last word stays.
        Situation::Unreachable(_) | Situation::Outdated(_) => old.phase.clone().unwrap_or_else(|| "Pending".to_owned()),
        Situation::Working(reason, _) if *reason == reason::STARTING => {
            said().filter(|said| said == "Retrying").unwrap_or_else(|| "Starting".to_owned())
        }
        Situation::Working(..) | Situation::Streaming | Situation::Broken(_) => said().unwrap_or_else(|| "Starting".to_owned()),
    }
}

fn last_error(facts: &Facts<'_>, situation: &Situation<'_>) -> Option<String> {
    match situation {
        Situation::Broken(problem) => Some(format!("{}: {}", problem.reason, problem.message)),
        Situation::Failed(why) | Situation::Stuck(_, why) => Some(format!("{}: {why}", situation.reason())),
        _ => facts.problem.filter(|problem| problem.needs_human).map(|problem| format!("{}: {}", problem.reason, problem.message)),
    }
}

fn worker(observed: &Observed) -> Option<WorkerStatus> {
    observed.pod.as_ref()?;
    Some(WorkerStatus {
        pod: observed.pod.clone(),
        address: observed.address.clone(),
        image: observed.image.clone(),
        epoch: observed.worker.status().map(|status| status.epoch).filter(|epoch| *epoch > 0),
    })
}

/// Numbers as the worker gives them. What it does not know now, such as the position while it rests, stays as it was.
fn progress(status: MirrorStatus, said: &Status) -> MirrorStatus {
    let old = status.position.clone();
    let received = said.received.clone().or_else(|| old.as_ref()?.received.clone());
    // What is on the target's disk; before the first confirmation, what is committed there.
    let applied = said.confirmed.clone().or_else(|| said.applied.clone()).or_else(|| old.as_ref()?.applied.clone());
    let position = (received.is_some() || applied.is_some()).then_some(Position { received, applied });
    // A worker that has only just started reads with its claim what earlier ones have done.
    let has_counts = said.epoch > 0;
    MirrorStatus {
        slot: Some(said.slot.clone()).filter(|slot| !slot.is_empty()).or(status.slot),
        publication: Some(said.publication.clone()).filter(|publication| !publication.is_empty()).or(status.publication),
        position,
        retention: said.retention.as_ref().and_then(retention),
        lag: text::lag(said.lag_bytes, said.lag_seconds),
        lag_bytes: said.lag_bytes.map(signed),
        lag_seconds: said.lag_seconds.map(signed),
        latency_p50_milliseconds: said.latency_p50_milliseconds.map(signed),
        latency_p99_milliseconds: said.latency_p99_milliseconds.map(signed),
        tables: tables(&said.tables).or(status.tables),
        rows_copied: Some(signed(said.rows_copied)).filter(|_| has_counts).or(status.rows_copied),
        rows_streamed: Some(signed(said.rows_streamed)).filter(|_| has_counts).or(status.rows_streamed),
        apply_mode: said.apply_mode.clone().or(status.apply_mode),
        verification: said.verification.as_ref().map(verification).or(status.verification),
        ..status
    }
}

fn verification(said: &contract::Verification) -> VerificationStatus {
    let row = |row: &contract::DifferentRow| DifferentRow {
        table: row.table.clone(),
        key: row.key.iter().take(KEY_COLUMNS).cloned().collect(),
        difference: row.difference.clone(),
    };
    VerificationStatus {
        request: said.request.clone(),
        tables: format!("{}/{}", said.tables, said.of),
        rows: signed(said.rows),
        differences: signed(said.differences),
        undecided: signed(said.undecided),
        more: said.more,
        left_out: said.left_out.clone(),
        examples: said.examples.iter().map(row).collect(),
        finished_at: said.finished_at.as_ref().and_then(|time| time.parse().ok()).map(Time),
    }
}

/// Nothing is kept for a slot that is not there.
fn retention(seen: &contract::Retention) -> Option<Retention> {
    seen.slot_exists.then(|| Retention {
        summary: seen.retained_bytes.map(text::bytes),
        retained_bytes: seen.retained_bytes.map(signed),
        wal_status: seen.wal_status.clone(),
        safe_wal_bytes: seen.safe_wal_size,
    })
}

fn tables(by_state: &BTreeMap<String, u32>) -> Option<TableCounts> {
    if by_state.is_empty() {
        return None;
    }
    let total: u64 = by_state.values().map(|count| u64::from(*count)).sum();
    let ready = by_state.get(READY_STATE).copied().unwrap_or_default();
    let by_state = by_state.iter().map(|(state, count)| (state.clone(), i32::try_from(*count).unwrap_or(i32::MAX))).collect();
    Some(TableCounts { summary: Some(format!("{ready}/{total}")), by_state })
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value)] // documents are written in place
mod tests;
