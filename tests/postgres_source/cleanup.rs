use super::support::eventually;
use super::{Database, alone, mapped, on_each_version, on_one_version};
use sluice::connectors::postgres::cleanup::{CleanUp, Doomed, drop_slot_and_publication, drop_statement};
use sluice::connectors::postgres::replication::connect_replication;
use sluice::engine::error::reason;
use sluice::engine::roles::{BatchLimits, ChangeLog as _, Snapshot as _, Source as _};
use std::time::Duration;

on_each_version!(a_worker_that_still_reads_is_ended, a_slot_in_the_making_goes);
on_one_version!(somebody_elses_reader_and_publication_stay);

async fn a_worker_that_still_reads_is_ended(major: u32) {
    let database = Database::new(major, "ending", "CREATE TABLE t(id int PRIMARY KEY)").await;
    let source = database.source();
    let tables = mapped(&source, &[("t", &[])]).await;
    alone(&source).await.publish(&tables, &[]).await.unwrap();
    let position = *alone(&source).await.create_log().await.unwrap().position();
    let limits = BatchLimits { rows: 1000, bytes: 1 << 20, delay: Duration::from_millis(5) };
    let mut log = alone(&source).await.open(&position, &tables, limits).await.unwrap();
    let (slot, publication) = (database.slot(), database.publication());
    let endpoint = database.server.endpoint(&database.name);
    let doomed = Doomed { slot: &slot, drop_slot: true, publication: Some(&publication) };
    let done = drop_slot_and_publication(&endpoint, doomed).await.unwrap();
    assert_eq!(done, CleanUp { slot_dropped: true, publication_dropped: true });
    while log.next().await.is_ok() {}
    assert_eq!(database.text("SELECT count(*)::text FROM pg_publication").await.as_deref(), Some("0"));
    assert_eq!(database.source().log_state().await.unwrap(), None);
    // Again, and there is nothing left.
    assert_eq!(drop_slot_and_publication(&endpoint, doomed).await.unwrap(), CleanUp::default());
}

async fn somebody_elses_reader_and_publication_stay(major: u32) {
    let database = Database::new(major, "staying", "").await;
    let (slot, publication) = (database.slot(), database.publication());
    database.run(&format!("CREATE PUBLICATION \"{publication}\"")).await;
    database.run(&format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')")).await;
    let mut endpoint = database.server.endpoint(&database.name);
    let reader = connect_replication(&endpoint, "somebody").await.unwrap();
    let format = sluice::connectors::postgres::replication::StreamFormat { binary: false, streaming: false };
    let stream = reader.start(&slot, sluice::connectors::postgres::Lsn(0), &publication, format).await.unwrap();
    let doomed = Doomed { slot: &slot, drop_slot: true, publication: Some(&publication) };
    let error = drop_slot_and_publication(&endpoint, doomed).await.unwrap_err();
    assert!(error.reason == reason::SLOT_IN_USE && error.message.contains("(somebody, user postgres, "), "{error}");
    // Retained as told.
    let retained = drop_slot_and_publication(&endpoint, Doomed { drop_slot: false, ..doomed }).await.unwrap();
    assert_eq!(retained, CleanUp::default());
    // The user may have chosen the name of our sessions.
    endpoint.parameters.insert("application_name".into(), "somebody".into());
    let done = drop_slot_and_publication(&endpoint, doomed).await.unwrap();
    assert_eq!(done, CleanUp { slot_dropped: true, publication_dropped: false });
    drop(stream);
    assert_eq!(database.text("SELECT count(*)::text FROM pg_publication").await.as_deref(), Some("1"));
    assert_eq!(drop_statement("it's"), "SELECT pg_drop_replication_slot('it''s')");
}

async fn a_slot_in_the_making_goes(major: u32) {
    let database = Database::new(major, "making", "CREATE TABLE t(id int PRIMARY KEY)").await;
    let old = database.server.connect(&database.name).await;
    old.batch_execute("BEGIN; INSERT INTO t VALUES (1)").await.unwrap();
    let source = database.source();
    let slot = database.slot();
    let endpoint = database.server.endpoint(&database.name);
    let clean_up = async {
        let exists = "SELECT FROM pg_replication_slots WHERE slot_name = 'sluice_making' AND active";
        eventually(10, "the slot is being made", async || !database.admin.query(exists, &[]).await.unwrap().is_empty()).await;
        let state = database.source().log_state().await.unwrap().unwrap();
        assert_eq!(state.confirmed.0, u64::MAX, "no position is taken from it");
        drop_slot_and_publication(&endpoint, Doomed { slot: &slot, drop_slot: true, publication: None }).await.unwrap();
        assert_eq!(source.log_state().await.unwrap(), None);
    };
    let (created, ()) = tokio::join!(alone(&source).await.create_log(), clean_up);
    assert!(created.is_err());
    old.batch_execute("ROLLBACK").await.unwrap();
}
