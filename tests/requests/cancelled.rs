//! What `Cancel` leaves.

use super::{Stage, ask, wait_state};

/// Table `b` waits for its turn while the 200 ranges of `a` are copied.
async fn copying(name: &str) -> Stage {
    let mut stage = Stage::with(200_000, |desired| {
        desired.snapshot.tables_in_parallel = 1;
        desired.snapshot.workers_per_table = 1;
        desired.snapshot.rows_per_partition = 1000;
    })
    .await;
    ask(&mut stage.worker, name, "Resync", &[]).await;
    stage.worker.wait_for(60, "Copying", |status| status.tables.contains_key("Copying")).await;
    stage
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_not_begun_goes_on_as_it_was_and_what_is_cut_off_stops() {
    let mut stage = copying("all").await;
    let of_b = stage.generation("b").await;
    ask(&mut stage.worker, "stop", "Cancel", &[]).await;
    wait_state(&stage.worker, "all", "Cancelled").await;
    let done = wait_state(&stage.worker, "stop", "Succeeded").await;
    assert!(done.message.contains("stopped, until a Resync of them: public.a"), "{done:?}");
    let status = stage.worker.status().await.expect("a status");
    assert!(status.table_errors["public.a"].contains("cancelled") && status.table_errors["public.a"].contains("Resync"), "{status:?}");
    assert_eq!((status.tables.get("Ready"), stage.generation("b").await), (Some(&1), of_b));
    stage.left.batch_execute("UPDATE b SET note = 'later'; UPDATE a SET note = 'later' WHERE id < 1000").await.expect("changes");
    stage.worker.wait_level(&stage.left).await;
    crate::worker::assert_equal(&stage.left, &stage.right, &["b"]).await;
    ask(&mut stage.worker, "again", "Resync", &["a"]).await;
    wait_state(&stage.worker, "again", "Succeeded").await;
    stage.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn there_may_be_nothing_to_cancel() {
    let mut stage = Stage::streaming(100).await;
    ask(&mut stage.worker, "stop", "Cancel", &[]).await;
    let done = wait_state(&stage.worker, "stop", "Succeeded").await;
    assert!(done.message.contains("nothing to cancel"), "{done:?}");
    stage.assert_equal().await;
}
