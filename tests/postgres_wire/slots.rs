//! Slots: made with their snapshot, given up half-way, dropped.

use crate::support::{Postgres, eventually};
use sluice::connectors::postgres::connect::{Side, connect};
use sluice::connectors::postgres::replication::connect_replication;
use sluice::engine::error::{Class, reason};

/// On a server with room for two slots.
pub async fn slots(server: &Postgres) {
    let major = server.major;
    let client = server.create_database("d").await;
    client.batch_execute("CREATE TABLE t (id int); INSERT INTO t VALUES (1)").await.unwrap();
    let endpoint = server.endpoint("d");
    let count = || async { client.query_one("SELECT count(*) FROM pg_replication_slots", &[]).await.unwrap().get::<_, i64>(0) };

    // The snapshot holds what was there when the slot was made.
    let mut lasting = connect_replication(&endpoint, "").await.unwrap();
    let made = lasting.create_slot("lasting", false, true).await.unwrap();
    client.batch_execute("INSERT INTO t VALUES (2)").await.unwrap();
    let reader = connect(&endpoint, Side::Source, "").await.unwrap();
    reader
        .batch_execute(&format!("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT '{}'", made.snapshot_name))
        .await
        .unwrap();
    let rows: i64 = reader.query_one("SELECT count(*) FROM public.t", &[]).await.unwrap().get(0);
    assert_eq!(rows, 1);
    let slot = client
        .query_one("SELECT confirmed_flush_lsn::text, to_jsonb(s) ->> 'failover', temporary FROM pg_replication_slots s", &[])
        .await
        .unwrap();
    assert_eq!(slot.get::<_, String>(0), made.consistent_point.to_string());
    assert_eq!(slot.get::<_, Option<String>>(1).as_deref(), (major >= 17).then_some("true"));
    assert!(!slot.get::<_, bool>(2));

    // A snapshot that is gone says so.
    drop(lasting);
    let gone = connect(&endpoint, Side::Source, "").await.unwrap();
    gone.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await.unwrap();
    let error = gone.batch_execute("SET TRANSACTION SNAPSHOT '00000003-00000FFF-1'").await.unwrap_err();
    let error = sluice::connectors::postgres::errors::classify(Side::Source, "snapshot", &error);
    assert_eq!((error.class, error.reason), (Class::Retry, reason::SNAPSHOT_LOST), "{error}");

    // A temporary slot goes with its session; there is room for one.
    let mut temporary = connect_replication(&endpoint, "").await.unwrap();
    temporary.create_slot("temporary", true, true).await.unwrap();
    let mut third = connect_replication(&endpoint, "").await.unwrap();
    let error = third.create_slot("third", true, false).await.unwrap_err();
    assert_eq!((error.class, error.reason), (Class::Retry, reason::NO_FREE_REPLICATION_SLOT), "{error}");
    drop(temporary);
    eventually(10, "the temporary slot is gone", || async { count().await == 1 }).await;

    // Given up while it waits for an older transaction: no slot is left and no backend waits on.
    client.batch_execute("BEGIN; INSERT INTO t VALUES (3)").await.unwrap();
    let waiting = async {
        let watcher = server.connect("d").await;
        eventually(10, "the slot is being made", || async {
            watcher
                .query_one("SELECT count(*) = 1 FROM pg_replication_slots WHERE slot_name = 'waiting' AND active", &[])
                .await
                .unwrap()
                .get(0)
        })
        .await;
    };
    tokio::select! {
        made = third.create_slot("waiting", false, false) => panic!("made in spite of an older transaction: {made:?}"),
        () = waiting => {}
    }
    let watcher = server.connect("d").await;
    eventually(10, "the slot is given up", || async {
        watcher.query_one("SELECT count(*) = 0 FROM pg_replication_slots WHERE slot_name = 'waiting'", &[]).await.unwrap().get(0)
    })
    .await;
    // Its session is not used again.
    assert!(third.simple_query("SELECT 1").await.is_err());
    client.batch_execute("COMMIT").await.unwrap();

    let mut dropper = connect_replication(&endpoint, "").await.unwrap();
    dropper.drop_slot("lasting").await.unwrap();
    assert_eq!(count().await, 0);
    let error = dropper.drop_slot("lasting").await.unwrap_err();
    assert_eq!((error.class, error.reason), (Class::Stop, reason::SLOT_LOST), "{error}");
}
