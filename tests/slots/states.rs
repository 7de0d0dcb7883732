//! What becomes of a slot, told apart: each with a reason of its own, and nothing is continued by guessing.

use crate::worker::wait_sql;
use crate::{Pair, Postgres, told, write};
use sluice::connectors::postgres::Lsn;
use sluice::connectors::postgres::replication::{StreamFormat, connect_replication};

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_somebody_else_reads_is_waited_for_and_never_taken() {
    let mut pair = Pair::streaming(17, |_| {}).await;
    pair.suspend().await;
    wait_sql(&pair.left, 10, "SELECT NOT active FROM pg_replication_slots WHERE slot_name = 'sluice_test'").await;
    let reader = connect_replication(&pair.source.endpoint("shop"), "somebody").await.unwrap();
    let format = StreamFormat { binary: false, streaming: false };
    let stream = reader.start("sluice_test", Lsn(0), "sluice_test", format).await.unwrap();
    let theirs: i32 =
        pair.left.query_one("SELECT active_pid FROM pg_replication_slots WHERE slot_name = 'sluice_test'", &[]).await.unwrap().get(0);
    pair.change_rows().await;
    pair.resume().await;
    let error = pair.worker.wait_reason("SlotInUse").await.error.expect("an error");
    assert_eq!(error.class, "Retry");
    for part in [&format!("process {theirs} (somebody, user postgres, from 127.0.0.1"), ", since "] {
        assert!(error.message.contains(part), "{part}: {}", error.message);
    }
    pair.worker.wait_for(60, "it was tried again", |status| status.error.as_ref().is_some_and(|error| error.count > 1)).await;
    let sql = format!("SELECT active_pid = {theirs} FROM pg_replication_slots WHERE slot_name = 'sluice_test'");
    assert!(pair.left.query_one(&sql, &[]).await.unwrap().get::<_, bool>(0), "the other reader was not ended");
    drop(stream);
    pair.assert_level().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_whose_log_was_removed_is_lost_with_its_cause() {
    let source = Postgres::start_with(17, &["max_slot_wal_keep_size=32MB", "min_wal_size=32MB", "max_wal_size=64MB"]);
    let mut pair = Pair::start(source, |_| {}).await;
    pair.worker.wait_streaming().await;
    pair.suspend().await;
    write(&pair.left, 100).await;
    pair.left.batch_execute("CHECKPOINT").await.unwrap();
    wait_sql(
        &pair.left,
        10,
        "SELECT invalidation_reason IS NOT DISTINCT FROM 'wal_removed' FROM pg_replication_slots WHERE slot_name = 'sluice_test'",
    )
    .await;
    pair.worker.wait_for(40, "it is told", |status| told(status) == Some("SlotLost")).await;
    pair.resume().await;
    let error = pair.worker.wait_reason("SlotLost").await.error.expect("an error");
    assert!(
        error.class == "Stop" && error.message.contains("wal_removed") && error.message.contains("max_slot_wal_keep_size"),
        "{error:?}"
    );
}
