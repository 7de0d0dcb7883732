//! Actions that copy nothing.

use super::{Stage, ask, found, wait_state};
use crate::support::Postgres;
use crate::worker::Worker;
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread")]
async fn retry_skips_the_pause_after_failures() {
    let (source, target) = (Postgres::start(15), Postgres::start(15));
    let (left, right) = (source.create_database("shop").await, target.create_database("dw").await);
    let mut worker = Worker::start((&source, "shop"), (&target, "dw"), &["a"]);
    worker.wait_reason("TableMissing").await;
    // The next pause is longer than the test may take.
    worker.wait_for(60, "a long pause", |status| status.error.as_ref().is_some_and(|error| error.count >= 2)).await;
    left.batch_execute("CREATE TABLE a (id int PRIMARY KEY); INSERT INTO a VALUES (1)").await.unwrap();
    let before = worker.status().await.unwrap().error.unwrap().retry_in_seconds.expect("a pause");
    let asked = Instant::now();
    ask(&mut worker, "r1", "Retry", &[]).await;
    let done = wait_state(&worker, "r1", "Succeeded").await;
    assert!(asked.elapsed() < Duration::from_secs(before), "{:?} of {before} s", asked.elapsed());
    assert!(done.finished_at.is_some() && done.message.contains("goes on from its position"), "{done:?}");
    crate::worker::assert_equal(&left, &right, &["a"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_keeps_slot_and_position_and_begins_one_session() {
    let mut stage = Stage::streaming(100).await;
    let before = stage.worker.status().await.unwrap();
    let generation = stage.generation("a").await;
    ask(&mut stage.worker, "r1", "Retry", &[]).await;
    wait_state(&stage.worker, "r1", "Succeeded").await;
    let after = stage.worker.status().await.unwrap();
    assert_eq!(after.epoch, before.epoch + 1);
    // Neither taking the field out nor another suspension does anything to it.
    stage.worker.change(|desired| desired.request = None).await;
    stage.left.batch_execute("INSERT INTO b VALUES (101, 'later')").await.unwrap();
    stage.assert_equal().await;
    assert_eq!(stage.worker.status().await.unwrap().epoch, after.epoch);
    assert_eq!(stage.generation("a").await, generation, "nothing is copied again");
}

#[tokio::test(flavor = "multi_thread")]
async fn sequences_get_the_values_of_the_source() {
    let (source, target) = (Postgres::start(15), Postgres::start(15));
    let (left, right) = (source.create_database("shop").await, target.create_database("dw").await);
    left.batch_execute(
        "CREATE TABLE a (id bigserial PRIMARY KEY, note text); INSERT INTO a (note) VALUES ('x');
         CREATE TABLE b (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, note text); INSERT INTO b (note) VALUES ('x')",
    )
    .await
    .unwrap();
    let mut worker = Worker::start((&source, "shop"), (&target, "dw"), &["a", "b"]);
    worker.wait_streaming().await;
    left.batch_execute("SELECT setval('a_id_seq', 700); SELECT setval('b_id_seq', 50, false)").await.unwrap();
    ask(&mut worker, "s1", "ResetSequences", &["public.a"]).await;
    wait_state(&worker, "s1", "Succeeded").await;
    let value = async |name: &str| {
        let row = right.query_one(&format!("SELECT last_value, is_called FROM {name}"), &[]).await.unwrap();
        (row.get::<_, i64>(0), row.get::<_, bool>(1))
    };
    assert_eq!((value("a_id_seq").await, value("b_id_seq").await), ((700, true), (1, true)), "only what was named");
    right.batch_execute("SELECT setval('a_id_seq', 9000)").await.unwrap();
    ask(&mut worker, "s2", "ResetSequences", &[]).await;
    let done = wait_state(&worker, "s2", "Succeeded").await;
    assert_eq!((value("a_id_seq").await, value("b_id_seq").await), ((700, true), (50, false)), "{done:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_table_fails_and_nothing_is_done() {
    let mut stage = Stage::streaming(100).await;
    let generation = stage.generation("a").await;
    for (id, action) in [("x1", "Resync"), ("x2", "ResetSequences")] {
        ask(&mut stage.worker, id, action, &["a", "sales.nowhere"]).await;
        let failed = wait_state(&stage.worker, id, "Failed").await;
        assert!(failed.message.contains("sales.nowhere") && failed.message.contains("nothing was done"), "{failed:?}");
    }
    stage.worker.wait_streaming().await;
    assert_eq!(stage.generation("a").await, generation);
    stage.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_of_a_newer_operator_waits_and_stops_nothing() {
    let mut stage = Stage::streaming(100).await;
    ask(&mut stage.worker, "v1", "Adopt", &[]).await;
    stage.left.batch_execute("INSERT INTO b VALUES (101, 'later')").await.unwrap();
    stage.assert_equal().await;
    assert_eq!(found(&stage.worker.status().await.unwrap(), "v1"), None);
}
