//! Conditions: their types, the reasons that the operator adds, and how they are set.
//!
//! Invariants: one condition per type; `lastTransitionTime` moves only when the status does, so that repeating a report
//! changes nothing.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

/// Longest message, in bytes; what is longer is cut.
pub const MESSAGE_LIMIT: usize = 1024;

/// Types of conditions, see `docs/src/operations/status.md`.
pub mod kind {
    /// The resource does its job.
    pub const READY: &str = "Ready";
    /// Work towards the current spec is under way.
    pub const RECONCILING: &str = "Reconciling";
    /// No progress without a change by a human.
    pub const STALLED: &str = "Stalled";
    /// Source, Target: host, TLS, user and database are right.
    pub const CONNECTION_VERIFIED: &str = "ConnectionVerified";
    /// Source, Target: a Mirror could start from or to this database.
    pub const PREREQUISITES_MET: &str = "PrerequisitesMet";
    /// Something enforces `spec.deletionProtection`.
    pub const DELETION_PROTECTED: &str = "DeletionProtected";
    /// Mirror: all tables have been copied.
    pub const SNAPSHOT_COMPLETED: &str = "SnapshotCompleted";
    /// Mirror: every table follows the stream.
    pub const STREAMING: &str = "Streaming";
    /// Mirror: the worker answers and speaks a known version of the contract.
    pub const WORKER_AVAILABLE: &str = "WorkerAvailable";
    /// Mirror: `spec.suspend` is in effect.
    pub const SUSPENDED: &str = "Suspended";
    /// Mirror: the pause annotation keeps the operator's hands off.
    pub const RECONCILIATION_PAUSED: &str = "ReconciliationPaused";
}

/// Reasons that the operator adds to those of [`crate::engine::error::reason`].
pub mod reason {
    macro_rules! reasons {
        ($($constant:ident = $text:literal, $doc:literal;)*) => {
            $(#[doc = $doc] pub const $constant: &str = $text;)*
            /// All reasons of the operator; the documentation must name each.
            pub const ALL: &[&str] = &[$($text),*];
        };
    }
    reasons! {
        AVAILABLE = "Available", "Reachable and inspected.";
        PROGRESSING = "Progressing", "Work towards the current spec is under way.";
        RECONCILED = "Reconciled", "Nothing left to do.";
        DELETING = "Deleting", "Is being cleaned up.";
        SOURCE_NOT_FOUND = "SourceNotFound", "The Source does not exist in this namespace.";
        TARGET_NOT_FOUND = "TargetNotFound", "The Target does not exist in this namespace.";
        SOURCE_DELETING = "SourceDeleting", "The Source is being deleted while a Mirror uses it.";
        TARGET_DELETING = "TargetDeleting", "The Target is being deleted while a Mirror uses it.";
        SOURCE_NOT_READY = "SourceNotReady", "The Source has not been verified yet.";
        TARGET_NOT_READY = "TargetNotReady", "The Target has not been verified yet.";
        SECRET_NOT_FOUND = "SecretNotFound", "A Secret that the spec names does not exist.";
        SECRET_KEY_MISSING = "SecretKeyMissing", "A Secret lacks a key.";
        PREREQUISITES_MET = "PrerequisitesMet", "Nothing is missing.";
        PREREQUISITES_MISSING = "PrerequisitesMissing", "Prerequisites of the Source or Target fail.";
        INVALID_SPEC = "InvalidSpec", "The spec can't be carried out.";
        STARTING = "Starting", "The worker connects, claims the stream and checks.";
        SETTING_UP = "SettingUp", "Publication, slot and tables are being made.";
        COPYING = "Copying", "The initial copy runs.";
        CATCHING_UP = "CatchingUp", "Copied tables follow the stream up to its position.";
        STREAMING = "Streaming", "Every table follows the stream.";
        SNAPSHOT_COMPLETED = "SnapshotCompleted", "All tables have been copied.";
        SUSPENDED = "Suspended", "`spec.suspend` is in effect.";
        WORKER_STARTING = "WorkerStarting", "The worker's pod is not there or not ready yet.";
        WORKER_RUNNING = "WorkerRunning", "The worker answers.";
        WORKER_FAILED = "WorkerFailed", "The worker's pod fails to start or keeps ending.";
        WORKER_CANNOT_START = "WorkerCannotStart", "The worker's pod has not started for so long that it will not by itself.";
        WORKER_CRASH_LOOPING = "WorkerCrashLooping", "The worker has ended soon after each of many starts.";
        WORKER_UNREACHABLE = "WorkerUnreachable", "The worker's pod runs but does not answer.";
        WORKER_OUTDATED = "WorkerOutdated", "The worker speaks a contract that this operator no longer knows.";
        POLICY_MISSING = "PolicyMissing", "No admission policy enforces `spec.deletionProtection`.";
        POLICY_IN_FORCE = "PolicyInForce", "`spec.deletionProtection` is enforced.";
        CLEANUP_FAILED = "CleanupFailed", "Slot or publication could not be dropped yet.";
        CLEANUP_SKIPPED = "CleanupSkipped", "Deletion was forced; what was left stands in the message.";
        SLOT_ORPHANED = "SlotOrphaned", "Clean-up was given up; a slot was left on the source.";
        REQUEST_TAKEN = "RequestTaken", "A worker has taken `spec.request`.";
        REQUEST_SUCCEEDED = "RequestSucceeded", "A request is done.";
        REQUEST_FAILED = "RequestFailed", "A request was not done; the message says why.";
        REQUEST_CANCELLED = "RequestCancelled", "A request was ended by `Cancel`.";
        REQUEST_SKIPPED = "RequestSkipped", "A request was there before the first copy: nothing to do.";
        RECONCILIATION_PAUSED = "ReconciliationPaused", "The pause annotation keeps the operator's hands off.";
    }
}

/// What is known about one aspect: the condition without its bookkeeping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Type, one of [`kind`].
    pub kind: &'static str,
    /// `None`: not known.
    pub status: Option<bool>,
    /// One of [`reason`] or of [`crate::engine::error::reason`].
    pub reason: &'static str,
    /// For people, without secrets.
    pub message: String,
}

impl Finding {
    /// It is so.
    pub fn yes(kind: &'static str, reason: &'static str, message: impl Into<String>) -> Self {
        Self { kind, status: Some(true), reason, message: message.into() }
    }

    /// It is not so.
    pub fn no(kind: &'static str, reason: &'static str, message: impl Into<String>) -> Self {
        Self { kind, status: Some(false), reason, message: message.into() }
    }

    /// Nobody knows yet.
    pub fn unknown(kind: &'static str, reason: &'static str, message: impl Into<String>) -> Self {
        Self { kind, status: None, reason, message: message.into() }
    }

    fn status_word(&self) -> &'static str {
        match self.status {
            Some(true) => "True",
            Some(false) => "False",
            None => "Unknown",
        }
    }

    /// Whether `conditions` do not say so yet, by status and reason: what an event tells of.
    pub fn is_news(&self, conditions: &[Condition]) -> bool {
        get(conditions, self.kind).is_none_or(|known| known.status != self.status_word() || known.reason != self.reason)
    }
}

/// Sets the condition of the finding's type. Its `lastTransitionTime` is `now` when the condition is new or its status changes.
pub fn set(conditions: &mut Vec<Condition>, finding: Finding, generation: Option<i64>, now: Timestamp) {
    let status = finding.status_word();
    let old = conditions.iter_mut().find(|condition| condition.type_ == finding.kind);
    let since = old.as_ref().filter(|old| old.status == status).map_or(Time(whole_seconds(now)), |old| old.last_transition_time.clone());
    let new = Condition {
        type_: finding.kind.to_owned(),
        status: status.to_owned(),
        reason: finding.reason.to_owned(),
        message: cut(finding.message, MESSAGE_LIMIT),
        observed_generation: generation,
        last_transition_time: since,
    };
    match old {
        Some(old) => *old = new,
        None => conditions.push(new),
    }
}

/// Makes `findings` all there is: sets each of them and removes conditions of other types.
pub fn replace(conditions: &mut Vec<Condition>, findings: Vec<Finding>, generation: Option<i64>, now: Timestamp) {
    conditions.retain(|condition| findings.iter().any(|finding| finding.kind == condition.type_));
    for finding in findings {
        set(conditions, finding, generation, now);
    }
}

/// Removes the condition of type `kind`, if there is one.
pub fn remove(conditions: &mut Vec<Condition>, kind: &str) {
    conditions.retain(|condition| condition.type_ != kind);
}

/// The condition of type `kind`.
pub fn get<'a>(conditions: &'a [Condition], kind: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == kind)
}

/// Whether the condition of type `kind` is there and True.
pub fn is_true(conditions: &[Condition], kind: &str) -> bool {
    get(conditions, kind).is_some_and(|condition| condition.status == "True")
}

/// `text`, shortened to at most `limit` bytes on a character boundary.
pub fn cut(mut text: String, limit: usize) -> String {
    const MARK: &str = "…";
    if text.len() > limit {
        text.truncate(text.floor_char_boundary(limit.saturating_sub(MARK.len())));
        text.push_str(MARK);
    }
    text
}

/// Kubernetes writes these times in whole seconds.
fn whole_seconds(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::new(second, 999).expect("a time")
    }

    #[test]
    fn the_time_moves_only_with_the_status() {
        let mut all = Vec::new();
        set(&mut all, Finding::no(kind::READY, reason::PROGRESSING, "a"), Some(1), at(10));
        set(&mut all, Finding::no(kind::READY, reason::SECRET_NOT_FOUND, "b"), Some(2), at(20));
        let ready = get(&all, kind::READY).expect("the condition");
        assert_eq!(
            (ready.last_transition_time.0.as_second(), ready.reason.as_str(), ready.observed_generation),
            (10, "SecretNotFound", Some(2))
        );
        assert_eq!(ready.last_transition_time.0.subsec_nanosecond(), 0);
        set(&mut all, Finding::yes(kind::READY, reason::AVAILABLE, "c"), Some(2), at(30));
        assert_eq!((all.len(), all[0].last_transition_time.0.as_second(), is_true(&all, kind::READY)), (1, 30, true));
    }

    #[test]
    fn a_repeated_report_changes_nothing() {
        let report = || vec![Finding::yes(kind::READY, reason::AVAILABLE, "m"), Finding::unknown(kind::STREAMING, reason::PROGRESSING, "")];
        let mut first = vec![];
        replace(&mut first, report(), Some(1), at(1));
        let mut second = first.clone();
        replace(&mut second, report(), Some(1), at(2));
        assert_eq!(first, second);
        replace(&mut second, vec![Finding::no(kind::STREAMING, reason::SUSPENDED, "")], Some(1), at(3));
        assert_eq!(second.len(), 1);
        remove(&mut second, kind::STREAMING);
        assert!(second.is_empty());
    }

    #[test]
    fn news_is_another_status_or_reason() {
        let mut all = vec![];
        let finding = Finding::no(kind::READY, reason::PROGRESSING, "a");
        assert!(finding.is_news(&all));
        set(&mut all, finding.clone(), None, at(1));
        assert!(!Finding { message: "b".into(), ..finding.clone() }.is_news(&all));
        assert!(Finding { reason: reason::SECRET_NOT_FOUND, ..finding.clone() }.is_news(&all));
        assert!(Finding { status: None, ..finding }.is_news(&all));
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        let long = cut("é".repeat(800), MESSAGE_LIMIT);
        assert!(long.len() <= MESSAGE_LIMIT && long.ends_with("é…"));
        assert_eq!(cut("short".into(), MESSAGE_LIMIT), "short");
    }

    #[test]
    fn every_reason_is_documented() {
        let page = include_str!("../../docs/src/reference/reasons.md");
        let missing: Vec<_> =
            reason::ALL.iter().chain(crate::engine::error::reason::ALL).filter(|reason| !page.contains(&format!("`{reason}`"))).collect();
        assert!(missing.is_empty(), "not in docs/src/reference/reasons.md: {missing:?}");
    }
}
