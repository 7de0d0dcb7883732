//! Tables that are copied again.

use super::{Stage, Writer, ask, wait_state};
use crate::support::Postgres;
use crate::worker::{Worker, wait_sql};

/// Since when the slot's statistics count, which a slot that is made anew does not have.
async fn counted_since(stage: &Stage) -> String {
    let sql = "SELECT coalesce(stats_reset::text, 'never') FROM pg_stat_replication_slots WHERE slot_name = 'sluice_test'";
    stage.left.query_one(sql, &[]).await.expect("the slot").get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_is_right_again_under_writers_and_the_others_are_not_touched() {
    let mut stage = Stage::streaming(20_000).await;
    let writer = Writer::start(&stage).await;
    stage.worker.wait_for(30, "changes", |status| status.rows_streamed > 100).await;
    let (of_a, of_b) = (stage.generation("a").await, stage.generation("b").await);
    stage
        .right
        .batch_execute("UPDATE a SET note = 'wrong' WHERE id BETWEEN 200 AND 300; INSERT INTO a VALUES (-1, 'not there')")
        .await
        .unwrap();
    ask(&mut stage.worker, "resync-a", "Resync", &["public.a"]).await;
    let done = wait_state(&stage.worker, "resync-a", "Succeeded").await;
    writer.stop().await;
    stage.assert_equal().await;
    assert!(stage.generation("a").await > of_a, "{done:?}");
    assert_eq!(stage.generation("b").await, of_b);
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_copied_again_without_losing_the_slot() {
    let mut stage = Stage::streaming(5_000).await;
    let writer = Writer::start(&stage).await;
    stage.right.batch_execute("DELETE FROM a WHERE id BETWEEN 1000 AND 2000; INSERT INTO b VALUES (-1, 'not there')").await.unwrap();
    stage.left.batch_execute("SELECT pg_stat_reset_replication_slot('sluice_test')").await.unwrap();
    let since = counted_since(&stage).await;
    assert_ne!(since, "never");
    ask(&mut stage.worker, "all", "Resync", &[]).await;
    let done = wait_state(&stage.worker, "all", "Succeeded").await;
    assert!(done.is_full_resync && done.message.contains("2 tables"), "{done:?}");
    writer.stop().await;
    stage.assert_equal().await;
    assert_eq!(counted_since(&stage).await, since);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_left_the_publication_comes_back() {
    let mut stage = Stage::streaming(100).await;
    stage
        .left
        .batch_execute(
            "ALTER PUBLICATION sluice_test DROP TABLE b; INSERT INTO b VALUES (1001, 'not seen'); INSERT INTO a VALUES (1001, 'seen')",
        )
        .await
        .unwrap();
    let left = |status: &sluice::worker::contract::Status| status.table_errors.get("public.b").is_some_and(|why| why.contains("Resync"));
    stage.worker.wait_for(90, "LeftPublication", left).await;
    ask(&mut stage.worker, "again", "Retry", &[]).await;
    let tried = wait_state(&stage.worker, "again", "Succeeded").await;
    assert!(tried.message.contains("public.b stay in Error"), "{tried:?}");
    ask(&mut stage.worker, "heal", "Resync", &["b"]).await;
    wait_state(&stage.worker, "heal", "Succeeded").await;
    stage.left.batch_execute("UPDATE b SET note = 'later' WHERE id < 50").await.unwrap();
    stage.assert_equal().await;
    assert!(stage.worker.status().await.unwrap().table_errors.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_without_its_slot_begins_anew_by_a_full_resync_only() {
    let mut stage = Stage::streaming(2_000).await;
    stage.worker.kill9();
    // The server notices the end of its reader a moment later.
    wait_sql(&stage.left, 30, "SELECT NOT active FROM pg_replication_slots WHERE slot_name = 'sluice_test'").await;
    stage
        .left
        .batch_execute(
            "SELECT pg_drop_replication_slot('sluice_test'); DELETE FROM a WHERE id % 3 = 0; INSERT INTO b VALUES (500, 'missed')",
        )
        .await
        .unwrap();
    stage.worker.spawn();
    let failure = stage.worker.wait_reason("CheckpointWithoutSlot").await.error.unwrap();
    assert!(failure.message.contains("Resync without tables"), "{failure:?}");
    for (id, action, tables) in [("one", "Resync", &["a"][..]), ("again", "Retry", &[])] {
        ask(&mut stage.worker, id, action, tables).await;
        let refused = wait_state(&stage.worker, id, "Failed").await;
        assert!(refused.message.contains("CheckpointWithoutSlot"), "{refused:?}");
    }
    let there = "SELECT count(*) FROM pg_replication_slots WHERE NOT temporary";
    assert_eq!(stage.left.query_one(there, &[]).await.unwrap().get::<_, i64>(0), 0, "never by itself");
    ask(&mut stage.worker, "all", "Resync", &[]).await;
    let done = wait_state(&stage.worker, "all", "Succeeded").await;
    assert!(done.message.contains("2 tables"), "{done:?}");
    stage.left.batch_execute("UPDATE a SET note = 'later' WHERE id % 7 = 0").await.unwrap();
    stage.assert_equal().await;
    assert_eq!(stage.left.query_one(there, &[]).await.unwrap().get::<_, i64>(0), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_the_source_has_invalidated_is_replaced_by_a_full_resync() {
    let source = Postgres::start_with(15, &["max_slot_wal_keep_size=1MB", "min_wal_size=32MB", "max_wal_size=32MB"]);
    let target = Postgres::start(15);
    let (left, right) = (source.create_database("shop").await, target.create_database("dw").await);
    left.batch_execute("CREATE TABLE a (id int PRIMARY KEY, note text); INSERT INTO a SELECT g, 'first' FROM generate_series(1, 500) g")
        .await
        .unwrap();
    let mut worker = Worker::start((&source, "shop"), (&target, "dw"), &["a"]);
    worker.wait_streaming().await;
    worker.kill9();
    let lost = async || {
        left.query_one("SELECT wal_status = 'lost' FROM pg_replication_slots", &[]).await.unwrap().get::<_, Option<bool>>(0) == Some(true)
    };
    while !lost().await {
        left.batch_execute("UPDATE a SET note = repeat(md5(random()::text), 2000)").await.unwrap();
        left.batch_execute("SELECT pg_switch_wal()").await.unwrap();
        left.batch_execute("CHECKPOINT").await.unwrap();
    }
    worker.spawn();
    worker.wait_reason("SlotLost").await;
    ask(&mut worker, "all", "Resync", &[]).await;
    // What is told says that the slot is another one.
    wait_state(&worker, "all", "Succeeded").await;
    left.batch_execute("UPDATE a SET note = 'later' WHERE id % 7 = 0").await.unwrap();
    worker.wait_level(&left).await;
    crate::worker::assert_equal(&left, &right, &["a"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_may_not_copy_says_so() {
    let mut stage = Stage::streaming(100).await;
    stage.worker.change(|desired| desired.snapshot.enabled = false).await;
    ask(&mut stage.worker, "all", "Resync", &[]).await;
    let refused = wait_state(&stage.worker, "all", "Failed").await;
    assert!(refused.message.contains("snapshot.enabled is false"), "{refused:?}");
    stage.assert_equal().await;
}
