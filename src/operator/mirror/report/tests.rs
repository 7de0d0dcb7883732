//! Every situation in `docs/src/operations/status.md`.

use super::*;
use crate::operator::mirror::validate::tests::slim;
use serde_json::{Value, json};
use std::sync::Arc;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).expect("a time")
}

fn mirror(suspend: bool) -> SlimMirror {
    slim(json!({"tables": [{"name": "users"}], "suspend": suspend}))
}

fn said(phase: &str, more: Value) -> Status {
    let mut status = json!({"contract": 1, "version": "1", "generation": 3, "pod": "p", "phase": phase, "epoch": 2, "slot": "s", "publication": "pub",
        "tables": {"Ready": 2}, "rowsCopied": 10, "rowsToCopy": 20, "rowsStreamed": 5, "snapshotCompleted": phase == "Streaming",
        "streaming": phase == "Streaming"});
    status.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    serde_json::from_value(status).expect("a status")
}

fn observed(worker: Worker) -> Observed {
    Observed { exists: true, worker, pod: Some("p".into()), address: Some("10.0.0.1:8080".into()), image: Some("sluice:1".into()) }
}

fn cannot_start(lasts: bool) -> Worker {
    Worker::CannotStart { why: "w".into(), lasts }
}

fn keeps_ending(lasts: bool) -> Worker {
    Worker::KeepsEnding { why: "w".into(), lasts }
}

fn answers(phase: &str, more: Value) -> Observed {
    observed(Worker::Answers(Arc::new(said(phase, more))))
}

fn absent() -> Observed {
    Observed { exists: false, worker: Worker::Starting("there is no worker".into()), pod: None, address: None, image: None }
}

/// Status and reason of `Ready`, then status of `Reconciling`, `Stalled`, `Streaming`; and the phase.
fn summary(status: &MirrorStatus) -> String {
    let of = |kind: &str| conditions::get(&status.conditions, kind).expect("the condition");
    assert!(status.conditions.len() <= 7);
    format!(
        "{} {} {} {} {} {}",
        of("Ready").status,
        of("Ready").reason,
        of("Reconciling").status,
        of("Stalled").status,
        of("Streaming").status,
        status.phase.as_deref().unwrap_or_default()
    )
}

fn reported(mirror: &SlimMirror, problem: Option<&Problem>, observed: &Observed) -> MirrorStatus {
    report(&Facts { mirror, problem, observed, told: Some(3) }, at(100))
}

fn short(suspend: bool, problem: Option<&Problem>, observed: &Observed) -> String {
    summary(&reported(&mirror(suspend), problem, observed))
}

fn failure(class: &str, reason: &str) -> Value {
    json!({"error": {"class": class, "reason": reason, "message": "what happened", "count": 1}})
}

fn asked(request: Value) -> SlimMirror {
    slim(json!({"tables": [{"name": "users"}], "request": request}))
}

fn done(id: &str, state: &str, is_full_resync: bool) -> Value {
    json!({"id": id, "action": "Resync", "state": state, "isFullResync": is_full_resync, "startedAt": "2026-01-01T00:00:00Z",
        "finishedAt": (state != "Running").then_some("2026-01-01T00:01:00Z"), "message": "m"})
}

/// States of the request and of those before it.
fn states(status: &MirrorStatus) -> Vec<String> {
    let all = status.request.iter().chain(&status.request_history);
    all.map(|known| format!("{} {}", known.id, known.state)).collect()
}

#[test]
fn a_request_waits_is_taken_and_becomes_history() {
    let mut mirror = asked(json!({"id": "b", "action": "Retry"}));
    let before = reported(&mirror, None, &answers("Streaming", json!({})));
    assert_eq!(states(&before), ["b Pending"]);
    mirror.status = Some(before);
    let running = reported(&mirror, None, &answers("Streaming", json!({"requests": [done("a", "Running", false)]})));
    assert_eq!(states(&running), ["b Pending", "a Running"]);
    assert!(
        running.request.as_ref().and_then(|known| known.message.as_deref()).is_some_and(|message| message.contains("request a is over"))
    );
    let many: Vec<Value> = (0..12).map(|n| done(&format!("old{n}"), "Failed", false)).collect();
    let requests: Vec<Value> = [done("b", "Succeeded", false)].into_iter().chain(many).collect();
    let status = reported(&mirror, None, &answers("Streaming", json!({"requests": requests})));
    assert_eq!((states(&status).len(), states(&status)[0].as_str()), (11, "b Succeeded"));
    mirror.status = Some(status.clone());
    // Nobody knows better for a while, or nobody asks any more.
    assert_eq!(states(&reported(&mirror, None, &answers("Starting", json!({})))), states(&status));
    mirror.spec.request = None;
    assert_eq!(
        states(&reported(&mirror, None, &answers("Streaming", json!({"requests": [done("b", "Succeeded", false)]})))),
        ["b Succeeded"]
    );
}

#[test]
fn a_request_keeps_ready_as_it_is_but_the_copy_of_everything() {
    let mut mirror = asked(json!({"id": "r", "action": "Resync", "tables": ["users"]}));
    let begins = |requests: Value| answers("SettingUp", json!({"requests": requests}));
    assert_eq!(summary(&reported(&mirror, None, &begins(json!([])))).split(' ').next(), Some("False"), "it was not ready before");
    mirror.status = Some(reported(&mirror, None, &answers("Streaming", json!({}))));
    let ready = |requests: Value| summary(&reported(&mirror, None, &begins(requests))).starts_with("True Streaming");
    assert!(ready(json!([])) && ready(json!([done("r", "Running", false)])));
    assert!(!ready(json!([done("r", "Running", true)])));
    assert!(!ready(json!([done("r", "Succeeded", false)])), "something else is under way");
    let failure = answers("Retrying", failure("Retry", "SourceUnreachable"));
    assert!(summary(&reported(&mirror, None, &failure)).starts_with("False SourceUnreachable"));
}

/// The API server refuses a status with a longer message, and with it all else that the status says.
#[test]
fn a_long_message_of_a_request_is_cut_to_what_the_schema_takes() {
    let mirror = asked(json!({"id": "r", "action": "Resync"}));
    let mut long = done("r", "Failed", false);
    long["message"] = json!("é".repeat(2000));
    let status = reported(&mirror, None, &answers("Streaming", json!({"requests": [long]})));
    let message = status.request.and_then(|known| known.message).expect("a message");
    assert!(message.len() <= 1024 && message.ends_with('…'), "{} bytes", message.len());
}

#[test]
fn what_a_comparison_has_found_stays_until_another_one_says_more() {
    let mut mirror = asked(json!({"id": "v", "action": "Verify"}));
    let found = json!({"request": "v", "tables": 1, "of": 2, "rows": 10, "differences": 1,
        "examples": [{"table": "public.a", "key": vec!["7"; 40], "difference": "Missing"}]});
    let status = reported(&mirror, None, &answers("Streaming", json!({"verification": found})));
    let seen = status.verification.clone().expect("a result");
    assert_eq!((seen.tables.as_str(), seen.rows, seen.differences, seen.examples[0].key.len()), ("1/2", 10, 1, 32));
    mirror.status = Some(status);
    assert_eq!(reported(&mirror, None, &answers("Starting", json!({}))).verification, Some(seen));
}

#[test]
fn people_hear_once_of_what_becomes_of_requests() {
    let mut mirror = asked(json!({"id": "r", "action": "Resync"}));
    let mut tell = |requests: Value| {
        let old = mirror.status.clone().unwrap_or_default();
        let status = reported(&mirror, None, &answers("Streaming", json!({"requests": requests})));
        let told = news(&old, &status)
            .iter()
            .map(|news| (news.calm, news.reason))
            .filter(|(_, reason)| reason.starts_with("Request"))
            .collect::<Vec<_>>();
        mirror.status = Some(status);
        told
    };
    assert_eq!(tell(json!([])), []);
    assert_eq!(tell(json!([done("r", "Running", false), done("far", "Failed", false)])), [(true, "RequestTaken")]);
    assert_eq!(tell(json!([done("r", "Running", false), done("far", "Failed", false)])), []);
    assert_eq!(tell(json!([done("r", "Failed", false), done("far", "Failed", false)])), [(false, "RequestFailed")]);
}

/// The stream goes on, and people hear of it.
#[test]
fn a_notice_is_the_reason_of_ready() {
    let notice = json!({"notice": {"reason": "SpillFull", "message": "no room"}});
    let status = reported(&mirror(false), None, &answers("Streaming", notice.clone()));
    assert_eq!(summary(&status), "True SpillFull False False True Streaming");
    let ready = conditions::get(&status.conditions, "Ready").expect("the condition");
    assert_eq!(ready.message, "no room");
    let told = news(&reported(&mirror(false), None, &answers("Streaming", json!({}))), &status).len();
    assert_eq!(told, 1);
    assert_eq!(short(false, None, &answers("Copying", notice)), "False Copying True False False Copying");
    let danger = json!({"notice": {"reason": "SlotAtRisk", "message": "little is left"}});
    assert_eq!(short(true, None, &answers("Suspended", danger)), "True SlotAtRisk False False False Suspended");
}

/// Nobody should learn only on resuming, or when another trouble has passed, that it can't go on.
#[test]
fn a_lost_slot_stalls_whatever_the_worker_does() {
    let lost = || json!({"notice": {"reason": "SlotLost", "message": "make it anew"}});
    let status = reported(&mirror(true), None, &answers("Suspended", lost()));
    assert_eq!(summary(&status), "False SlotLost False True False Suspended");
    let stalled = conditions::get(&status.conditions, "Stalled").expect("the condition");
    assert_eq!((stalled.reason.as_str(), stalled.message.as_str()), ("SlotLost", "make it anew"));
    assert!(conditions::is_true(&status.conditions, "Suspended"));
    assert_eq!(status.last_error.as_deref(), Some("SlotLost: make it anew"));
    let resting = reported(&mirror(true), None, &answers("Suspended", json!({})));
    assert_eq!(news(&resting, &status), [News { calm: false, reason: "SlotLost", message: "make it anew".into() }]);
    let mut away = failure("Retry", "TargetUnreachable");
    away["notice"] = lost()["notice"].clone();
    assert_eq!(short(false, None, &answers("Retrying", away)), "False SlotLost False True False Retrying");
}

#[test]
fn a_slot_that_is_gone_is_told_of_a_mirror_that_can_not_see_it_itself() {
    let gone = || json!({"retention": {"slotExists": false}});
    let mut mirror = mirror(true);
    assert_eq!(
        summary(&reported(&mirror, None, &answers("Suspended", gone()))),
        "True Suspended False False False Suspended",
        "never made"
    );
    mirror.status = Some(reported(&mirror, None, &answers("Streaming", json!({"snapshotCompleted": true}))));
    let status = reported(&mirror, None, &answers("Suspended", gone()));
    assert_eq!(summary(&status), "False SlotMissing False True False Suspended");
    mirror.status = Some(status);
    assert_eq!(
        summary(&reported(&mirror, None, &answers("Suspended", gone()))),
        "False SlotMissing False True False Suspended",
        "it stays"
    );
    let mut dropped = gone();
    dropped["notice"] = json!({"reason": "WalBudgetExceeded", "message": "copied anew"});
    let status = reported(&mirror, None, &answers("Suspended", dropped.clone()));
    assert_eq!(summary(&status), "True WalBudgetExceeded False False False Suspended");
    let told = news(mirror.status.as_ref().expect("a status"), &status);
    assert_eq!(told, [News { calm: false, reason: "WalBudgetExceeded", message: "copied anew".into() }]);
    dropped["notice"]["reason"] = "SlotGivenUp".into();
    assert_eq!(summary(&reported(&mirror, None, &answers("Suspended", dropped))), "False SlotGivenUp False True False Suspended");
    // Behind a target that is down.
    mirror.spec.suspend = false;
    let mut away = failure("Retry", "TargetUnreachable");
    away["retention"] = gone()["retention"].clone();
    let beginning_again = reported(&mirror, None, &answers("Retrying", away.clone()));
    assert_eq!(summary(&beginning_again), "False TargetUnreachable True False False Retrying");
    away["snapshotCompleted"] = true.into();
    assert_eq!(summary(&reported(&mirror, None, &answers("Retrying", away))), "False SlotMissing False True False Retrying");
}

#[test]
fn the_table_of_the_book() {
    let stop = Problem::stop(reason::SOURCE_NOT_FOUND, "m");
    let retry = Problem::retry(reason::SOURCE_NOT_READY, "m");
    let invalid = Problem::stop(reason::INVALID_SPEC, "m");
    let none = json!({});
    for (expected, got) in [
        ("False SourceNotFound False True False Pending", short(false, Some(&stop), &absent())),
        ("False SourceNotReady True False False Pending", short(false, Some(&retry), &absent())),
        ("False WorkerStarting True False False Pending", short(false, None, &absent())),
        ("False WorkerStarting True False False Pending", short(false, None, &observed(Worker::Starting("w".into())))),
        ("False WorkerFailed True False False Pending", short(false, None, &observed(cannot_start(false)))),
        ("False WorkerCannotStart False True False Pending", short(false, None, &observed(cannot_start(true)))),
        ("False WorkerFailed True False False Retrying", short(false, None, &observed(keeps_ending(false)))),
        ("False WorkerCrashLooping False True False Retrying", short(false, None, &observed(keeps_ending(true)))),
        ("False WorkerUnreachable True False Unknown Pending", short(false, None, &observed(Worker::Unreachable("w".into())))),
        ("Unknown WorkerOutdated False False Unknown Pending", short(false, None, &observed(Worker::Outdated("w".into())))),
        ("False Starting True False False Starting", short(false, None, &answers("Starting", none.clone()))),
        ("False SettingUp True False False SettingUp", short(false, None, &answers("SettingUp", none.clone()))),
        ("False Copying True False False Copying", short(false, None, &answers("Copying", none.clone()))),
        ("False CatchingUp True False False CatchingUp", short(false, None, &answers("CatchingUp", none.clone()))),
        ("True Streaming False False True Streaming", short(false, None, &answers("Streaming", none.clone()))),
        ("True Suspended False False False Suspended", short(true, None, &answers("Suspended", none.clone()))),
        (
            "False SourceUnreachable True False False Retrying",
            short(false, None, &answers("Retrying", failure("Retry", "SourceUnreachable"))),
        ),
        ("False PrivilegeMissing False True False Stopped", short(false, None, &answers("Stopped", failure("Stop", "PrivilegeMissing")))),
        ("False InternalError False True False Stopped", short(false, None, &answers("Stopped", failure("Bug", "InternalError")))),
        ("False InternalError False True False Stopped", short(false, None, &answers("Stopped", none.clone()))),
        ("True Streaming False True True Streaming", short(false, Some(&invalid), &answers("Streaming", none.clone()))),
        ("True Streaming False False True Streaming", short(false, Some(&retry), &answers("Streaming", none.clone()))),
        // On the way into and out of suspension.
        ("True Streaming True False True Streaming", short(true, None, &answers("Streaming", none.clone()))),
        ("False Starting True False False Starting", short(false, None, &answers("Suspended", none.clone()))),
        ("True Suspended False False False Suspended", short(true, None, &absent())),
        ("True Suspended False True False Suspended", short(true, Some(&stop), &absent())),
        ("False WorkerUnreachable True False Unknown Pending", short(true, None, &observed(Worker::Unreachable("w".into())))),
    ] {
        assert_eq!(expected, got);
    }
}

#[test]
fn a_new_document_reconciles_until_the_worker_has_it() {
    let observed = answers("Streaming", json!({"generation": 2}));
    let status = report(&Facts { mirror: &mirror(false), problem: None, observed: &observed, told: Some(3) }, at(1));
    assert_eq!(summary(&status), "True Streaming True False True Streaming");
    let stopped =
        answers("Stopped", json!({"generation": 2, "error": {"class": "Stop", "reason": "TableMissing", "message": "m", "count": 9}}));
    let status = report(&Facts { mirror: &mirror(false), problem: None, observed: &stopped, told: Some(3) }, at(1));
    assert_eq!(summary(&status), "False TableMissing True True False Stopped");
}

#[test]
fn failed_tables_stop_being_ready_and_are_named() {
    let errors: BTreeMap<_, _> = (0..5).map(|n| (format!("public.t{n}"), "LeftPublication: gone".to_owned())).collect();
    let status = reported(&mirror(false), None, &answers("Streaming", json!({"tableErrors": errors, "tables": {"Ready": 1, "Error": 5}})));
    assert_eq!(summary(&status), "False LeftPublication False True False Streaming");
    let ready = conditions::get(&status.conditions, "Ready").expect("Ready");
    assert_eq!(
        ready.message,
        "table public.t0: LeftPublication: gone; table public.t1: LeftPublication: gone; table public.t2: LeftPublication: gone; and 2 more"
    );
    assert_eq!(status.tables.expect("tables").summary.as_deref(), Some("1/6"));
}

#[test]
fn an_unknown_reason_of_a_newer_worker_stays_readable() {
    let status = reported(&mirror(false), None, &answers("Stopped", failure("Stop", "NewReason")));
    assert_eq!(status.last_error.as_deref(), Some("InternalError: NewReason: what happened"));
}

#[test]
fn numbers_are_those_of_the_worker() {
    let more = json!({"received": "0/20", "applied": "0/18", "confirmed": "0/10", "lagBytes": 1_258_291, "lagSeconds": 3, "tables": {"Ready": 1, "Copying": 2}, "applyMode": "Ordered"});
    let status = reported(&mirror(false), None, &answers("Copying", more));
    assert_eq!(status.position, Some(Position { received: Some("0/20".into()), applied: Some("0/10".into()) }));
    assert_eq!((status.lag.as_deref(), status.lag_bytes, status.lag_seconds), (Some("1.2 MiB, 3s"), Some(1_258_291), Some(3)));
    let tables = status.tables.expect("tables");
    assert_eq!((tables.summary.as_deref(), tables.by_state["Copying"]), (Some("1/3"), 2));
    assert_eq!((status.rows_copied, status.rows_streamed), (Some(10), Some(5)));
    assert_eq!(status.apply_mode.as_deref(), Some("Ordered"));
    let worker = status.worker.expect("a worker");
    assert_eq!((worker.pod.as_deref(), worker.address.as_deref(), worker.epoch), (Some("p"), Some("10.0.0.1:8080"), Some(2)));
    assert_eq!((status.slot.as_deref(), status.publication.as_deref()), (Some("s"), Some("pub")));
    assert_eq!((status.observed_generation, status.last_error), (Some(3), None));
}

#[test]
fn counts_do_not_go_back_while_a_worker_starts() {
    let mut mirror = mirror(false);
    mirror.status = Some(reported(&mirror, None, &answers("Streaming", json!({}))));
    let status = reported(&mirror, None, &answers("Starting", json!({"epoch": 0, "rowsCopied": 0, "rowsStreamed": 0})));
    assert_eq!((status.rows_copied, status.rows_streamed), (Some(10), Some(5)));
}

#[test]
fn what_the_source_keeps_is_shown_as_long_as_it_is_known() {
    let kept = json!({"retention": {"slotExists": true, "retainedBytes": 1_258_291, "walStatus": "extended", "safeWalSize": -7}});
    let mut mirror = mirror(true);
    mirror.status = Some(reported(&mirror, None, &answers("Suspended", kept)));
    let seen = mirror.status.as_ref().and_then(|status| status.retention.clone()).expect("what is kept");
    assert_eq!((seen.summary.as_deref(), seen.retained_bytes), (Some("1.2 MiB"), Some(1_258_291)));
    assert_eq!((seen.wal_status.as_deref(), seen.safe_wal_bytes), (Some("extended"), Some(-7)));
    let of = |observed: &Observed| reported(&mirror, None, observed).retention;
    assert_eq!(of(&observed(Worker::Unreachable("no answer".into()))), Some(seen), "the last word stays");
    assert_eq!(of(&answers("Suspended", json!({}))), None, "the source can't be asked");
    assert_eq!(of(&answers("Suspended", json!({"retention": {"slotExists": false}}))), None);
}

#[test]
fn what_was_reached_is_not_forgotten() {
    let mut mirror = mirror(false);
    let streaming = answers("Streaming", json!({"confirmed": "0/10", "received": "0/10"}));
    mirror.status = Some(reported(&mirror, None, &streaming));
    let lost = reported(&mirror, None, &observed(Worker::Unreachable("no answer".into())));
    assert_eq!(summary(&lost), "False WorkerUnreachable True False Unknown Streaming");
    assert!(conditions::is_true(&lost.conditions, "SnapshotCompleted"));
    let outdated = reported(&mirror, None, &observed(Worker::Outdated("old".into())));
    assert_eq!(summary(&outdated), "True Streaming False False Unknown Streaming");
    mirror.spec.suspend = true;
    let resting = reported(&mirror, None, &answers("Suspended", json!({})));
    assert!(conditions::is_true(&resting.conditions, "SnapshotCompleted"));
    assert_eq!(resting.position.expect("a position").applied.as_deref(), Some("0/10"));
    // A copy that begins again is not completed.
    let again = reported(&mirror, None, &answers("Copying", json!({})));
    assert!(!conditions::is_true(&again.conditions, "SnapshotCompleted"));
}

#[test]
fn a_repeated_report_is_the_same() {
    let mut mirror = mirror(false);
    for observed in [absent(), answers("Copying", json!({})), answers("Streaming", json!({})), observed(Worker::Unreachable("w".into()))] {
        let facts = |mirror: &SlimMirror, now| report(&Facts { mirror, problem: None, observed: &observed, told: Some(3) }, at(now));
        mirror.status = Some(facts(&mirror, 1));
        assert_eq!(mirror.status, Some(facts(&mirror, 2)));
    }
    mirror.status = Some(paused(&mirror, at(1)));
    assert_eq!(mirror.status, Some(paused(&mirror, at(2))));
    mirror.status = Some(deleting(&mirror, "d", Some("t"), at(1)));
    assert_eq!(mirror.status, Some(deleting(&mirror, "d", Some("t"), at(2))));
}

#[test]
fn hands_off_changes_one_condition() {
    let mut mirror = mirror(false);
    mirror.status = Some(reported(&mirror, None, &answers("Streaming", json!({}))));
    let paused = paused(&mirror, at(200));
    assert_eq!(summary(&paused), "True Streaming False False True Streaming");
    assert_eq!(conditions::get(&paused.conditions, "Reconciling").expect("the condition").reason, "ReconciliationPaused");
}

#[test]
fn deletion_is_shown_with_its_trouble() {
    let fine = deleting(&mirror(false), "waiting for the worker's end", None, at(1));
    assert_eq!(summary(&fine), "False Deleting True False False Deleting");
    let trouble = deleting(&mirror(false), "cleaning up", Some("no route to shop-db"), at(1));
    assert_eq!(summary(&trouble), "False CleanupFailed True False False Deleting");
    assert_eq!(trouble.last_error.as_deref(), Some("no route to shop-db"));
}

#[test]
fn long_errors_are_cut() {
    let error = json!({"error": {"class": "Stop", "reason": "WriteRefused", "message": "é".repeat(2000), "count": 1}});
    let status = reported(&mirror(false), None, &answers("Stopped", error));
    assert!(status.last_error.expect("an error").len() <= 1024);
    assert!(status.conditions.iter().all(|condition| condition.message.len() <= conditions::MESSAGE_LIMIT));
}

#[test]
fn events_tell_of_transitions_once() {
    let mirror = mirror(false);
    let told = |old: &MirrorStatus, new: &MirrorStatus| news(old, new).iter().map(|news| (news.calm, news.reason)).collect::<Vec<_>>();
    let none = MirrorStatus::default();
    let copying = reported(&mirror, None, &answers("Copying", json!({})));
    let further = reported(&mirror, None, &answers("Copying", json!({"rowsCopied": 99})));
    let streaming = reported(&mirror, None, &answers("Streaming", json!({})));
    let retrying = reported(&mirror, None, &answers("Retrying", failure("Retry", "SourceUnreachable")));
    let stopped = reported(&mirror, None, &answers("Stopped", failure("Stop", "TableMissing")));
    let wrong = reported(&mirror, Some(&Problem::stop(reason::INVALID_SPEC, "m")), &answers("Streaming", json!({})));
    assert_eq!(told(&none, &copying), [(true, "Copying")]);
    assert_eq!(told(&copying, &further), []);
    assert_eq!(told(&further, &streaming), [(true, "Streaming")]);
    assert_eq!(told(&streaming, &retrying), [(false, "SourceUnreachable")]);
    assert_eq!(told(&streaming, &stopped), [(false, "TableMissing")]);
    assert_eq!(told(&streaming, &wrong), [(false, "InvalidSpec")], "Ready stays");
    assert_eq!(told(&wrong, &streaming), []);
}
