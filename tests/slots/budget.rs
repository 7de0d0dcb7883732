//! `spec.walBudget`: how much log the source may keep, and what is done then.

use crate::support::eventually;
use crate::worker::wait_sql;
use crate::{MIB, Pair, told, write};
use sluice::engine::retention::{Action, Budget};
use sluice::operator::databases::{Databases as _, Postgres, WatchedSlot};
use sluice::worker::contract::{Desired, Status, WalBudgetSpec};

fn budget(action: &str) -> impl FnOnce(&mut Desired) {
    let spec = WalBudgetSpec { warn_bytes: Some(24 * MIB), max_bytes: Some(64 * MIB), action: action.into() };
    move |desired| desired.wal_budget = Some(spec)
}

fn tells(reason: &'static str) -> impl Fn(&Status) -> bool {
    move |status| told(status) == Some(reason)
}

async fn until_dropped(pair: &Pair) {
    eventually(40, "the slot is dropped", || async { pair.slots().await == 0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_slot_of_a_suspended_mirror_is_dropped_at_the_bound_and_all_is_copied_anew_when_it_goes_on() {
    let mut pair = Pair::streaming(15, budget("DropSlotAndResync")).await;
    pair.suspend().await;
    write(&pair.left, 30).await;
    pair.worker.wait_for(40, "a warning", tells("WalBudgetWarning")).await;
    assert_eq!(pair.slots().await, 1);
    pair.change_rows().await;
    write(&pair.left, 40).await;
    until_dropped(&pair).await;
    pair.worker.wait_for(40, "the drop is told", tells("WalBudgetExceeded")).await;
    let metrics = reqwest::get(format!("http://127.0.0.1:{}/metrics", pair.worker.port)).await.unwrap().text().await.unwrap();
    for line in ["slot_given_up 1".into(), "slot_exists 0".into(), format!("wal_budget_max_bytes {}", 64 * MIB)] {
        assert!(metrics.lines().any(|found| found == format!("sluice_worker_{line}")), "{line}\n{metrics}");
    }
    // It is not forgotten with the process.
    pair.worker.kill9();
    pair.worker.spawn();
    pair.worker.wait_for(40, "it is still told", tells("WalBudgetExceeded")).await;
    pair.change_rows().await;
    pair.resume().await;
    pair.assert_level().await;
    assert_eq!(pair.comment().await.as_deref(), Some("sluice:sluice_test"));
    // Dropped by somebody else it is another case.
    pair.suspend().await;
    wait_sql(&pair.left, 10, "SELECT NOT active FROM pg_replication_slots WHERE slot_name = 'sluice_test'").await;
    pair.left.batch_execute("SELECT pg_drop_replication_slot('sluice_test')").await.unwrap();
    pair.resume().await;
    pair.worker.wait_reason("CheckpointWithoutSlot").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_slot_is_dropped_at_the_bound_while_the_target_is_down() {
    let mut pair = Pair::streaming(17, budget("DropSlotAndResync")).await;
    pair.target.stop();
    pair.worker.wait_reason("TargetUnreachable").await;
    pair.change_rows().await;
    write(&pair.left, 70).await;
    until_dropped(&pair).await;
    pair.target.start_again();
    pair.right = pair.target.connect("dw").await;
    pair.assert_level().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_slot_is_dropped_at_the_bound_under_a_session_that_does_not_get_on() {
    let pair = Pair::streaming(15, budget("DropSlotAndResync")).await;
    let holder = pair.target.connect("dw").await;
    holder.batch_execute("BEGIN; LOCK TABLE t IN ACCESS EXCLUSIVE MODE").await.unwrap();
    pair.change_rows().await;
    wait_sql(&pair.right, 20, "SELECT count(*) > 0 FROM pg_locks WHERE relation = 't'::regclass AND NOT granted").await;
    write(&pair.left, 70).await;
    until_dropped(&pair).await;
    holder.batch_execute("COMMIT").await.unwrap();
    pair.assert_level().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_drops_the_slot_of_a_worker_that_is_gone() {
    let mut pair = Pair::streaming(15, budget("DropSlotAndResync")).await;
    pair.worker.kill9();
    let endpoint = pair.source.endpoint("shop");
    let limits = Budget { warn: None, max: Some(64 * MIB), action: Action::DropSlotAndResync };
    let slot = WatchedSlot { slot: "sluice_test".into(), publication: "sluice_test".into(), budget: limits };
    assert!(!Postgres.keep_budget(&endpoint, &slot).await.unwrap(), "it is within its budget");
    pair.change_rows().await;
    write(&pair.left, 70).await;
    assert!(Postgres.keep_budget(&endpoint, &slot).await.unwrap());
    assert_eq!((pair.slots().await, pair.comment().await.as_deref()), (0, Some("sluice:sluice_test given up")));
    assert!(!Postgres.keep_budget(&endpoint, &slot).await.unwrap(), "it is gone");
    pair.worker.spawn();
    pair.assert_level().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_resync_a_human_decides_and_may_choose_it_later() {
    let mut pair = Pair::streaming(15, budget("DropSlot")).await;
    pair.suspend().await;
    pair.change_rows().await;
    write(&pair.left, 70).await;
    until_dropped(&pair).await;
    pair.worker.wait_for(40, "the drop is told", tells("SlotGivenUp")).await;
    pair.resume().await;
    let status = pair.worker.wait_reason("SlotGivenUp").await;
    assert_eq!(status.error.expect("an error").class, "Stop");
    pair.worker.change(budget("DropSlotAndResync")).await;
    pair.assert_level().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_copy_that_takes_more_log_than_the_bound_is_not_begun_again() {
    let source = crate::Postgres::start(15);
    let pair = Pair::start(source, |desired| {
        budget("DropSlotAndResync")(desired);
        desired.suspend = true;
    })
    .await;
    pair.right.batch_execute("CREATE TABLE t (id int PRIMARY KEY, note text)").await.unwrap();
    let holder = pair.target.connect("dw").await;
    holder.batch_execute("BEGIN; LOCK TABLE t IN SHARE MODE").await.unwrap();
    let mut pair = pair;
    pair.resume().await;
    eventually(30, "the slot is made", || async { pair.slots().await == 1 }).await;
    write(&pair.left, 70).await;
    until_dropped(&pair).await;
    holder.batch_execute("COMMIT").await.unwrap();
    let status = pair.worker.wait_reason("SlotGivenUp").await;
    assert!(status.error.expect("an error").message.contains("before all tables were copied"));
}

#[tokio::test(flavor = "multi_thread")]
async fn warn_drops_nothing() {
    let mut pair = Pair::streaming(15, budget("Warn")).await;
    pair.suspend().await;
    pair.change_rows().await;
    write(&pair.left, 70).await;
    pair.worker.wait_for(40, "it is told", tells("WalBudgetExceeded")).await;
    assert_eq!(pair.slots().await, 1);
    pair.resume().await;
    pair.assert_level().await;
    pair.worker.wait_for(40, "it has passed", |status| status.notice.is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mark_that_a_crash_has_left_beside_the_slot_is_taken_back() {
    let mut pair = Pair::streaming(15, budget("DropSlotAndResync")).await;
    let copied = pair.worker.status().await.expect("a status").rows_copied;
    pair.suspend().await;
    pair.left.batch_execute("COMMENT ON PUBLICATION sluice_test IS 'sluice:sluice_test given up'").await.unwrap();
    pair.change_rows().await;
    pair.resume().await;
    pair.assert_level().await;
    assert_eq!(pair.comment().await.as_deref(), Some("sluice:sluice_test"));
    assert_eq!(pair.worker.status().await.expect("a status").rows_copied, copied, "nothing was copied again");
}
