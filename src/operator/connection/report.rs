//! What is said of a Source or Target, from what was observed. Pure.

use crate::engine::error::{Class, Error, reason as engine};
use crate::operator::databases::{FailedPrerequisite, Inspection, MirrorSlot};
use crate::operator::error::OperatorError;
use crate::operator::events::EventKind;
use crate::resources::conditions::{self, Finding, MESSAGE_LIMIT, cut, kind, reason};
use crate::resources::{ConnectionStatus, OrphanedSlot, Prerequisite};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::jiff::Timestamp;
use std::collections::BTreeSet;

/// Prerequisites listed at most, as in the schema.
const LISTED: usize = 64;
/// Orphaned slots listed at most, as in the schema.
const LISTED_SLOTS: usize = 32;
/// Orphaned slots that one event names.
const TOLD_SLOTS: usize = 5;
/// Longest name of a prerequisite, as in the schema.
const NAME_LIMIT: usize = 63;

/// What came of looking at the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was reached.
    Inspected(Inspection),
    /// It was not.
    Failed(Failure),
}

/// Why a database could not be inspected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// It may pass by itself; otherwise a human is needed.
    pub may_pass: bool,
    /// Of the engine, or of the operator.
    pub reason: &'static str,
    /// For people, without secrets.
    pub message: String,
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        Self { may_pass: error.class == Class::Retry, reason: error.reason, message: error.message.clone() }
    }
}

impl From<OperatorError> for Failure {
    fn from(error: OperatorError) -> Self {
        Self { may_pass: false, reason: error.reason, message: error.message }
    }
}

impl Outcome {
    /// Nothing is left to wait for: reached, and nothing is missing.
    pub fn is_settled(&self) -> bool {
        matches!(self, Self::Inspected(found) if found.failed.iter().all(|failed| failed.warning))
    }
}

/// Everything that a report rests on.
#[derive(Clone, Copy, Debug)]
pub struct Observation<'a> {
    /// Generation of the spec.
    pub generation: Option<i64>,
    /// What was reported before.
    pub old: &'a ConnectionStatus,
    /// What came of looking at the database.
    pub outcome: &'a Outcome,
    /// With `spec.deletionProtection`: whether something enforces it; the inner `None` when that can't be told.
    pub protection: Option<Option<bool>>,
    /// Mirrors that hold up the deletion, when it is being deleted.
    pub users: &'a [String],
    /// Secrets that carry our finalizer for it.
    pub protected: &'a BTreeSet<String>,
}

/// What is to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// The new status.
    pub status: ConnectionStatus,
    /// What changed and is worth an event.
    pub news: Vec<News>,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    /// Severity.
    pub kind: EventKind,
    /// Reason.
    pub reason: &'static str,
    /// For people.
    pub note: String,
}

/// Status and news.
pub fn report(seen: Observation<'_>, now: Timestamp) -> Report {
    let mut status = seen.old.clone();
    status.observed_generation = seen.generation;
    status.failed_prerequisites = vec![];
    status.protected_secrets = seen.protected.iter().cloned().collect();
    let mut findings = match seen.outcome {
        Outcome::Inspected(found) => match changed_identity(seen.old, found) {
            Some(failure) => failed(&failure),
            None => {
                status.server_version = Some(found.server_version.clone());
                status.system_identifier = Some(found.system_identifier.clone());
                status.failed_prerequisites = found.failed.iter().take(LISTED).map(prerequisite).collect();
                if let Some(slots) = &found.slots {
                    status.orphaned_slots = slots.iter().take(LISTED_SLOTS).map(orphan).collect();
                }
                inspected(found)
            }
        },
        Outcome::Failed(failure) => failed(failure),
    };
    if !seen.users.is_empty() {
        let message = format!("is being deleted, and waits for Mirrors that use it: {}", seen.users.join(", "));
        findings.retain(|finding| finding.kind != kind::RECONCILING);
        findings.push(Finding::yes(kind::RECONCILING, reason::DELETING, message));
    }
    findings.extend(seen.protection.map(protection));
    let of_slots = news_of_slots(&seen.old.orphaned_slots, &status.orphaned_slots);
    let news = findings.iter().filter_map(|finding| news(&seen.old.conditions, finding)).chain(of_slots).collect();
    conditions::replace(&mut status.conditions, findings, seen.generation, now);
    Report { status, news }
}

/// The status of an object that the operator keeps its hands off: what it was, and that it is so.
pub fn paused(old: &ConnectionStatus, generation: Option<i64>, now: Timestamp) -> ConnectionStatus {
    let mut status = old.clone();
    let finding = Finding::yes(
        kind::RECONCILIATION_PAUSED,
        reason::RECONCILIATION_PAUSED,
        "the pause annotation is set; take it off when you are done",
    );
    conditions::set(&mut status.conditions, finding, generation, now);
    status
}

/// The server is another one than the one first seen under this name.
fn changed_identity(old: &ConnectionStatus, found: &Inspection) -> Option<Failure> {
    let known = old.system_identifier.as_ref().filter(|known| **known != found.system_identifier)?;
    let message = format!(
        "the server's system identifier is {}, but {known} was first seen: correct host, or make this resource and its Mirrors anew",
        found.system_identifier
    );
    Some(Failure { may_pass: false, reason: engine::SYSTEM_IDENTIFIER_CHANGED, message })
}

fn inspected(found: &Inspection) -> Vec<Finding> {
    let reached = format!("reached, PostgreSQL {}", found.server_version);
    vec![
        Finding::yes(kind::READY, reason::AVAILABLE, reached.clone()),
        Finding::no(kind::RECONCILING, reason::RECONCILED, ""),
        Finding::no(kind::STALLED, reason::RECONCILED, ""),
        Finding::yes(kind::CONNECTION_VERIFIED, reason::AVAILABLE, reached),
        prerequisites(&found.failed),
    ]
}

/// Warnings stop nothing, so they are listed in the status but do not make it False.
fn prerequisites(failed: &[FailedPrerequisite]) -> Finding {
    let missing: Vec<_> = failed.iter().filter(|failed| !failed.warning).collect();
    if missing.is_empty() {
        return Finding::yes(kind::PREREQUISITES_MET, reason::PREREQUISITES_MET, "");
    }
    let messages: Vec<_> = missing.iter().map(|failed| format!("{}: {}", failed.name, failed.message)).collect();
    Finding::no(kind::PREREQUISITES_MET, reason::PREREQUISITES_MISSING, messages.join("; "))
}

fn failed(failure: &Failure) -> Vec<Finding> {
    let Failure { may_pass, reason: why, message } = failure;
    let (working, stalled) = if *may_pass {
        (Finding::yes(kind::RECONCILING, why, message.clone()), Finding::no(kind::STALLED, reason::PROGRESSING, ""))
    } else {
        (Finding::no(kind::RECONCILING, why, message.clone()), Finding::yes(kind::STALLED, why, message.clone()))
    };
    vec![
        Finding::no(kind::READY, why, message.clone()),
        working,
        stalled,
        Finding::no(kind::CONNECTION_VERIFIED, why, message.clone()),
        Finding::unknown(kind::PREREQUISITES_MET, why, "not known while the database can't be inspected"),
    ]
}

fn protection(enforced: Option<bool>) -> Finding {
    const MISSING: &str = "no ValidatingAdmissionPolicy with a binding enforces spec.deletionProtection; install both (deletionProtection.enabled of the chart)";
    match enforced {
        Some(true) => Finding::yes(kind::DELETION_PROTECTED, reason::POLICY_IN_FORCE, ""),
        Some(false) => Finding::no(kind::DELETION_PROTECTED, reason::POLICY_MISSING, MISSING),
        None => Finding::unknown(kind::DELETION_PROTECTED, reason::POLICY_MISSING, "the ValidatingAdmissionPolicy could not be looked for"),
    }
}

fn prerequisite(failed: &FailedPrerequisite) -> Prerequisite {
    Prerequisite {
        name: cut(failed.name.clone(), NAME_LIMIT),
        message: cut(failed.message.clone(), MESSAGE_LIMIT),
        cure: failed.cure.clone().map(|cure| cut(cure, MESSAGE_LIMIT)),
    }
}

fn orphan(slot: &MirrorSlot) -> OrphanedSlot {
    OrphanedSlot {
        name: slot.name.clone(),
        active: slot.active,
        retained_bytes: slot.retained.map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX)),
        cure: slot.cure.clone(),
    }
}

/// An event for slots that nobody reads and that were not listed before.
fn news_of_slots(old: &[OrphanedSlot], new: &[OrphanedSlot]) -> Option<News> {
    let is_known = |slot: &OrphanedSlot| old.iter().any(|old| old.name == slot.name && !old.active);
    let first: Vec<_> = new.iter().filter(|slot| !slot.active && !is_known(slot)).collect();
    let (names, cures): (Vec<_>, Vec<_>) = first.iter().take(TOLD_SLOTS).map(|slot| (slot.name.as_str(), slot.cure.as_str())).unzip();
    let more = if first.len() > TOLD_SLOTS { format!(" and {} more", first.len() - TOLD_SLOTS) } else { String::new() };
    (!first.is_empty()).then(|| News {
        kind: EventKind::Warning,
        reason: reason::SLOT_ORPHANED,
        note: format!(
            "{}{more}: no Mirror that this operator serves has these slots, and the source keeps its log for them; if no Mirror of another cluster or namespace does, run there: {}",
            names.join(", "),
            cures.join("; ")
        ),
    })
}

/// An event for what changed: whether it is ready, what is missing, what does not protect it, that its deletion waits.
fn news(old: &[Condition], finding: &Finding) -> Option<News> {
    let kind = match (finding.kind, finding.status) {
        (kind::READY, Some(true)) => EventKind::Normal,
        (kind::RECONCILING, Some(true)) if finding.reason == reason::DELETING => EventKind::Normal,
        (kind::READY | kind::PREREQUISITES_MET | kind::DELETION_PROTECTED, Some(false)) => EventKind::Warning,
        _ => return None,
    };
    finding.is_news(old).then(|| News { kind, reason: finding.reason, note: finding.message.clone() })
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;
