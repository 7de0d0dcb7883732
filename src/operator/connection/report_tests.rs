use super::*;
use crate::operator::connection::fake::inspection;
use crate::resources::conditions::{get, is_true};

const NOW: i64 = 1_700_000_000;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(NOW + second).expect("a time")
}

/// The report on `outcome` after `old`, with generation 2.
fn after(old: &ConnectionStatus, outcome: &Outcome) -> Report {
    report(Observation { generation: Some(2), old, outcome, protection: None, users: &[], protected: &BTreeSet::new() }, at(0))
}

fn first(outcome: &Outcome) -> Report {
    after(&ConnectionStatus { observed_generation: Some(-1), ..ConnectionStatus::default() }, outcome)
}

fn fine() -> Outcome {
    Outcome::Inspected(inspection())
}

fn lacking(warning: bool) -> Outcome {
    let failed = FailedPrerequisite {
        name: "WalLevelNotLogical".into(),
        message: "wal_level is replica".into(),
        cure: Some("ALTER SYSTEM SET wal_level = logical".into()),
        warning,
    };
    Outcome::Inspected(Inspection { failed: vec![failed], ..inspection() })
}

fn failing(may_pass: bool, reason: &'static str) -> Outcome {
    Outcome::Failed(Failure { may_pass, reason, message: "it failed".into() })
}

/// `Type=Status/Reason`, sorted.
fn words(report: &Report) -> Vec<String> {
    let mut words: Vec<_> = report.status.conditions.iter().map(|c| format!("{}={}/{}", c.type_, c.status, c.reason)).collect();
    words.sort();
    words
}

fn told(report: &Report) -> Vec<(EventKind, &'static str)> {
    report.news.iter().map(|news| (news.kind, news.reason)).collect()
}

#[test]
fn a_fine_database_is_ready_and_settled() {
    let report = first(&fine());
    let expected = [
        "ConnectionVerified=True/Available",
        "PrerequisitesMet=True/PrerequisitesMet",
        "Ready=True/Available",
        "Reconciling=False/Reconciled",
        "Stalled=False/Reconciled",
    ];
    assert_eq!(words(&report), expected);
    assert_eq!(told(&report), [(EventKind::Normal, "Available")]);
    let ConnectionStatus {
        observed_generation,
        conditions,
        server_version,
        system_identifier,
        orphaned_slots,
        failed_prerequisites,
        protected_secrets,
    } = report.status;
    assert!(protected_secrets.is_empty() && orphaned_slots.is_empty());
    assert_eq!((observed_generation, server_version.as_deref(), system_identifier.as_deref()), (Some(2), Some("17.2"), Some("7001")));
    assert!(failed_prerequisites.is_empty());
    assert!(conditions.iter().all(|condition| condition.observed_generation == Some(2)));
}

#[test]
fn missing_prerequisites_show_only_in_their_condition() {
    let report = first(&lacking(false));
    let expected = [
        "ConnectionVerified=True/Available",
        "PrerequisitesMet=False/PrerequisitesMissing",
        "Ready=True/Available",
        "Reconciling=False/Reconciled",
        "Stalled=False/Reconciled",
    ];
    assert_eq!(words(&report), expected);
    assert_eq!(told(&report), [(EventKind::Normal, "Available"), (EventKind::Warning, "PrerequisitesMissing")]);
    assert_eq!(report.status.failed_prerequisites[0].cure.as_deref(), Some("ALTER SYSTEM SET wal_level = logical"));
    let met = get(&report.status.conditions, kind::PREREQUISITES_MET).expect("the condition");
    assert_eq!(met.message, "WalLevelNotLogical: wal_level is replica");
    assert!(!lacking(false).is_settled());
}

#[test]
fn warnings_are_listed_and_stop_nothing() {
    let report = first(&lacking(true));
    assert!(is_true(&report.status.conditions, kind::PREREQUISITES_MET));
    assert_eq!(report.status.failed_prerequisites.len(), 1);
    assert!(lacking(true).is_settled());
}

#[test]
fn what_may_pass_reconciles_and_what_needs_a_human_is_stalled() {
    for (may_pass, reason) in [(true, "HostUnreachable"), (false, "AuthenticationFailed"), (false, "SecretNotFound")] {
        let report = after(&first(&lacking(false)).status, &failing(may_pass, reason));
        let conditions = &report.status.conditions;
        assert_eq!(is_true(conditions, kind::RECONCILING), may_pass, "{reason}");
        assert_eq!(is_true(conditions, kind::STALLED), !may_pass, "{reason}");
        for kind in [kind::READY, kind::CONNECTION_VERIFIED] {
            let condition = get(conditions, kind).expect(kind);
            assert_eq!((condition.status.as_str(), condition.reason.as_str(), condition.message.as_str()), ("False", reason, "it failed"));
        }
        assert_eq!(get(conditions, kind::PREREQUISITES_MET).expect("prerequisites").status, "Unknown");
        assert!(report.status.failed_prerequisites.is_empty());
        assert_eq!(report.status.server_version.as_deref(), Some("17.2"), "what was seen is kept");
        assert_eq!(told(&report), [(EventKind::Warning, reason)]);
    }
}

#[test]
fn another_server_under_the_same_name_is_refused() {
    let known = first(&fine()).status;
    let other = Outcome::Inspected(Inspection { system_identifier: "7002".into(), server_version: "16.9".into(), ..inspection() });
    let report = after(&known, &other);
    let ready = get(&report.status.conditions, kind::READY).expect("the condition");
    assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("False", "SystemIdentifierChanged"));
    assert!(ready.message.contains("7001") && ready.message.contains("7002"), "{}", ready.message);
    assert!(is_true(&report.status.conditions, kind::STALLED));
    assert_eq!((report.status.system_identifier.as_deref(), report.status.server_version.as_deref()), (Some("7001"), Some("17.2")));
    // Back on the right server all is well again.
    assert!(is_true(&after(&report.status, &fine()).status.conditions, kind::READY));
}

#[test]
fn a_repeated_report_is_equal_and_tells_nothing() {
    for outcome in [fine(), lacking(false), failing(true, "HostUnreachable"), failing(false, "TlsFailed")] {
        let once = first(&outcome).status;
        let observation =
            Observation { generation: Some(2), old: &once, outcome: &outcome, protection: None, users: &[], protected: &BTreeSet::new() };
        let twice = report(observation, at(3600));
        assert_eq!(twice.status, once);
        assert!(twice.news.is_empty(), "{:?}", twice.news);
    }
}

#[test]
fn protection_that_nothing_enforces_is_told() {
    let old = ConnectionStatus::default();
    let with = |protection| {
        report(Observation { generation: Some(1), old: &old, outcome: &fine(), protection, users: &[], protected: &BTreeSet::new() }, at(0))
    };
    for (enforced, status, reason) in
        [(Some(true), "True", "PolicyInForce"), (Some(false), "False", "PolicyMissing"), (None, "Unknown", "PolicyMissing")]
    {
        let report = with(Some(enforced));
        let condition = get(&report.status.conditions, kind::DELETION_PROTECTED).expect("the condition");
        assert_eq!((condition.status.as_str(), condition.reason.as_str()), (status, reason));
        assert_eq!(told(&report).contains(&(EventKind::Warning, "PolicyMissing")), enforced == Some(false));
        assert!(is_true(&report.status.conditions, kind::READY));
    }
    // Without the field there is no condition.
    let unprotected = after(&with(Some(Some(true))).status, &fine());
    assert!(get(&unprotected.status.conditions, kind::DELETION_PROTECTED).is_none());
}

#[test]
fn a_deletion_that_waits_names_the_mirrors_once() {
    let users = ["a".to_owned(), "b".to_owned()];
    let old = first(&fine()).status;
    let observe = |old| {
        report(
            Observation { generation: Some(2), old, outcome: &fine(), protection: None, users: &users, protected: &BTreeSet::new() },
            at(9),
        )
    };
    let waiting = observe(&old);
    let reconciling = get(&waiting.status.conditions, kind::RECONCILING).expect("the condition");
    assert_eq!((reconciling.status.as_str(), reconciling.reason.as_str()), ("True", "Deleting"));
    assert!(reconciling.message.ends_with("a, b"), "{}", reconciling.message);
    assert!(is_true(&waiting.status.conditions, kind::READY), "Mirrors still need it");
    assert_eq!(told(&waiting), [(EventKind::Normal, "Deleting")]);
    assert!(observe(&waiting.status).news.is_empty());
}

#[test]
fn a_pause_is_shown_until_it_ends() {
    let old = first(&fine()).status;
    let paused = paused(&old, Some(3), at(1));
    assert!(is_true(&paused.conditions, kind::RECONCILIATION_PAUSED) && is_true(&paused.conditions, kind::READY));
    assert_eq!(paused.observed_generation, Some(2), "the new spec was not looked at");
    assert!(get(&after(&paused, &fine()).status.conditions, kind::RECONCILIATION_PAUSED).is_none());
}

#[test]
fn what_a_server_says_fits_into_the_schema() {
    let long = FailedPrerequisite { name: "N".repeat(99), message: "m".repeat(5000), cure: Some("c".repeat(5000)), warning: false };
    let many = Outcome::Inspected(Inspection { failed: vec![long; 100], ..inspection() });
    let status = first(&many).status;
    assert_eq!(status.failed_prerequisites.len(), 64);
    let one = &status.failed_prerequisites[0];
    assert!(one.name.len() <= 63 && one.message.len() <= 1024 && one.cure.as_ref().is_some_and(|cure| cure.len() <= 1024));
    assert!(status.conditions.iter().all(|condition| condition.message.len() <= 1024));
}

#[test]
fn slots_without_a_mirror_are_listed_and_told_once() {
    let slot = |name: &str, active| MirrorSlot { name: name.into(), active, retained: Some(7), cure: format!("drop {name}") };
    let with = |slots| Outcome::Inspected(Inspection { slots, ..inspection() });
    let slots: Vec<_> = (0..40).map(|n| slot(&format!("s{n:02}"), n == 1)).collect();
    let report = after(&first(&fine()).status, &with(Some(slots.clone())));
    let listed: Vec<_> = report.status.orphaned_slots.iter().map(|slot| (slot.name.as_str(), slot.active)).collect();
    assert_eq!((listed.len(), &listed[..3]), (32, &[("s00", false), ("s01", true), ("s02", false)][..]));
    assert_eq!((report.status.orphaned_slots[0].retained_bytes, report.status.orphaned_slots[0].cure.as_str()), (Some(7), "drop s00"));
    assert_eq!(told(&report), [(EventKind::Warning, "SlotOrphaned")]);
    let note = &report.news[0].note;
    assert!(
        note.starts_with("s00, s02, s03, s04, s05 and 26 more: ") && note.ends_with("drop s00; drop s02; drop s03; drop s04; drop s05"),
        "{note}"
    );
    assert!(after(&report.status, &with(Some(slots))).news.is_empty());
    // What is not known now keeps the last word.
    for outcome in [with(None), failing(true, "HostUnreachable")] {
        assert_eq!(after(&report.status, &outcome).status.orphaned_slots.len(), 32);
    }
    let gone = after(&report.status, &with(Some(vec![])));
    assert!(gone.status.orphaned_slots.is_empty() && gone.news.is_empty());
}
