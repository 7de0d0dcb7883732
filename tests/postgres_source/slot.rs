use super::support::{Postgres, eventually};
use super::{Database, Unopposed, alone, mapped, on_each_version, on_one_version};
use sluice::connectors::postgres::Lsn;
use sluice::connectors::postgres::connect::Side;
use sluice::connectors::postgres::inspect::{Checks, inspect};
use sluice::connectors::postgres::source::PostgresSource;
use sluice::engine::error::{Class, reason};
use sluice::engine::roles::{BatchLimits, ChangeLog as _, Snapshot as _, Source as _};
use std::time::Duration;

on_each_version!(
    the_lasting_slot_lives_and_goes,
    temporary_slots_go_at_once,
    old_transactions_are_shown_and_waited_for,
    creation_gives_up_and_leaves_nothing,
    foreign_slots_are_refused,
    the_log_opens_where_it_is_told,
    limits_of_the_server_are_named,
);
on_one_version!(a_failover_is_followed);

const LIMITS: BatchLimits = BatchLimits { rows: 1000, bytes: 1 << 20, delay: Duration::from_millis(5) };

/// Slots of this database.
async fn slots(database: &Database) -> String {
    let slots = "SELECT coalesce(string_agg(concat_ws(' ', slot_name, plugin, temporary, active), ';'), '') FROM pg_replication_slots WHERE database = current_database()";
    database.text(slots).await.unwrap()
}

async fn the_lasting_slot_lives_and_goes(major: u32) {
    let database = Database::new(major, "lasting", "").await;
    let source = database.source();
    let identity = source.identity().await.unwrap();
    assert_eq!((identity.database.as_str(), identity.timeline), ("lasting", 1));
    assert_eq!(Some(identity.system_identifier), database.text("SELECT system_identifier::text FROM pg_control_system()").await);
    assert_eq!(source.log_state().await.unwrap(), None);
    let before = source.head().await.unwrap();
    let snapshot = alone(&source).await.create_log().await.unwrap();
    let position = *snapshot.position();
    assert!(position >= before, "{position} ≥ {before}");
    let state = source.log_state().await.unwrap().unwrap();
    assert_eq!((state.confirmed, state.lost), (position, None));
    eventually(5, "the walsender is gone", async || slots(&database).await == "sluice_lasting pgoutput f f").await;
    if major >= 17 {
        assert_eq!(
            database.text("SELECT failover::text FROM pg_replication_slots WHERE slot_name = 'sluice_lasting'").await.as_deref(),
            Some("true")
        );
    }
    alone(&source).await.drop_log().await.unwrap();
    assert_eq!(source.log_state().await.unwrap(), None);
    alone(&source).await.drop_log().await.unwrap();
    assert_eq!(source.left_timeline_at(1).await.unwrap(), None);
}

async fn temporary_slots_go_at_once(major: u32) {
    let database = Database::new(major, "temporary", "CREATE TABLE t(id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
    let source = database.source();
    let tables = mapped(&source, &[("t", &[])]).await;
    if major >= 17 {
        database.run("ALTER DATABASE temporary SET transaction_timeout = '200ms'").await;
    }
    let snapshot = alone(&source).await.snapshot().await.unwrap();
    assert_eq!(slots(&database).await, "", "and the snapshot lives on");
    database.run("SELECT pg_sleep(0.3)").await;
    database.run("INSERT INTO t VALUES (2)").await;
    assert_eq!(super::lines(&snapshot, &tables[0], &snapshot.ranges(&tables[0], 1000)).await, ["1"]);
    source.mark().await.unwrap();
    assert!(source.head().await.unwrap() > *snapshot.position());
}

async fn old_transactions_are_shown_and_waited_for(major: u32) {
    let database = Database::new(major, "waiting", "CREATE TABLE t(id int PRIMARY KEY)").await;
    let source = database.source();
    let tables = mapped(&source, &[("t", &[])]).await;
    let old = database.server.connect(&database.name).await;
    old.batch_execute("BEGIN; INSERT INTO t VALUES (1)").await.unwrap();
    let pid: i32 = old.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    assert_eq!(source.waiting(), None);
    let watch = async {
        eventually(20, "the old transaction is shown", async || source.waiting().is_some()).await;
        let text = source.waiting().unwrap();
        assert!(text.contains(&format!("pid {pid}, user postgres, database waiting, state idle in transaction, open for")), "{text}");
        old.batch_execute("COMMIT").await.unwrap();
    };
    let (snapshot, ()) = tokio::join!(alone(&source).await.create_log(), watch);
    let snapshot = snapshot.unwrap();
    assert_eq!(source.waiting(), None);
    // What it wrote lies before the position.
    assert_eq!(super::lines(&snapshot, &tables[0], &snapshot.ranges(&tables[0], 1000)).await, ["1"]);
    alone(&source).await.drop_log().await.unwrap();
}

async fn creation_gives_up_and_leaves_nothing(major: u32) {
    let database = Database::new(major, "giving_up", "CREATE TABLE t(id int PRIMARY KEY)").await;
    // Another role without rights to see other sessions.
    let source = database.source_as("creator", "REPLICATION").await.with_creation_limit(Duration::from_millis(1200));
    let old = database.server.connect(&database.name).await;
    old.batch_execute("BEGIN; INSERT INTO t VALUES (1)").await.unwrap();
    let pid: i32 = old.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let error = alone(&source).await.create_log().await.err().expect("must give up");
    assert_eq!((error.reason, error.class), (reason::WAITING_FOR_OLD_TRANSACTIONS, Class::Retry), "{error}");
    assert!(error.message.contains(&format!("pid {pid}")), "{error}");
    assert_eq!(source.waiting(), None);
    eventually(10, "no slot is left", async || slots(&database).await.is_empty()).await;

    // Told to end in the middle: the same.
    let patient = PostgresSource::new(database.endpoint_as("creator"), database.slot(), "p");
    let ended = tokio::time::timeout(Duration::from_millis(1200), alone(&patient).await.create_log()).await;
    assert!(ended.is_err());
    eventually(10, "no slot is left", async || slots(&database).await.is_empty()).await;
    old.batch_execute("ROLLBACK").await.unwrap();
    drop((source, patient));
    database.run("DROP ROLE creator").await;
}

async fn foreign_slots_are_refused(major: u32) {
    let database = Database::new(major, "foreign_slots", "").await;
    let source = database.source();
    let slot = database.slot();
    let other = database.server.create_database("foreign_slots_2").await;
    for (client, create, words) in [
        (&database.admin, format!("SELECT pg_create_physical_replication_slot('{slot}')"), "physical"),
        (&database.admin, format!("SELECT pg_create_logical_replication_slot('{slot}', 'test_decoding')"), "test_decoding"),
        (&other, format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')"), "foreign_slots_2"),
    ] {
        client.execute(&create, &[]).await.unwrap();
        for error in [source.log_state().await.unwrap_err(), alone(&source).await.drop_log().await.unwrap_err()] {
            assert!(error.reason == reason::INVALID_SPEC && error.message.contains(words), "{error}");
        }
        client.execute(&format!("SELECT pg_drop_replication_slot('{slot}')"), &[]).await.unwrap();
    }
}

async fn the_log_opens_where_it_is_told(major: u32) {
    let database = Database::new(major, "opening", "CREATE TABLE t(id int PRIMARY KEY)").await;
    let source = database.source();
    let tables = mapped(&source, &[("t", &[])]).await;
    alone(&source).await.publish(&tables, &[]).await.unwrap();
    let position = *alone(&source).await.create_log().await.unwrap().position();
    let missing = PostgresSource::new(database.server.endpoint(&database.name), "sluice_none", database.publication());
    let refused = alone(&missing).await.open(&position, &tables, LIMITS).await.err().expect("no slot");
    assert_eq!(refused.reason, reason::CHECKPOINT_WITHOUT_SLOT);
    let refused = alone(&source).await.open(&Lsn(position.0 - 1), &tables, LIMITS).await.err().expect("before the slot");
    assert_eq!((refused.reason, refused.class), (reason::CHECKPOINT_BEHIND_SLOT, Class::Stop));

    let mut log = alone(&source).await.open(&position, &tables, LIMITS).await.unwrap();
    database.run("INSERT INTO t VALUES (1)").await;
    let part = loop {
        let part = log.next().await.unwrap();
        if !part.is_idle() {
            break part;
        }
    };
    assert_eq!(part.batch.changes().len(), 1);
    assert!(source.log_state().await.unwrap().unwrap().active.is_some());
    // A second worker takes the slot from the first, which may be one that the server has not noticed to be gone.
    let second = alone(&source).await.open(&position, &tables, LIMITS).await.unwrap();
    drop((log, second));
    alone(&source).await.drop_log().await.unwrap();
}

async fn limits_of_the_server_are_named(major: u32) {
    let server = Postgres::start_with(major, &["max_replication_slots=1", "max_wal_senders=2", "max_slot_wal_keep_size=1MB"]);
    let endpoint = server.endpoint("postgres");
    let source = |slot: &str| PostgresSource::new(endpoint.clone(), slot, "p");
    let admin = server.connect("postgres").await;
    let senders_gone = async || {
        let senders = "SELECT FROM pg_stat_replication";
        eventually(5, "the sender is free", async || admin.query(senders, &[]).await.unwrap().is_empty()).await;
    };
    let first = source("sluice_1");
    let snapshot = alone(&first).await.create_log().await.unwrap();
    let error = alone(&first).await.snapshot().await.err().expect("no free slot");
    assert_eq!((error.reason, error.class), (reason::NO_FREE_REPLICATION_SLOT, Class::Retry), "{error}");
    alone(&first).await.publish(&[], &[]).await.unwrap();
    alone(&first).await.drop_log().await.unwrap();
    drop(snapshot);
    let position = alone(&first).await.create_log().await.unwrap().position().to_owned();
    let log = alone(&first).await.open(&position, &[], LIMITS).await.unwrap();
    let second = source("sluice_2");
    alone(&second).await;
    let error = source("sluice_3").take(&mut Unopposed).await.expect_err("no free sender");
    assert_eq!((error.reason, error.class), (reason::NO_FREE_WAL_SENDER, Class::Retry), "{error}");
    drop((log, second));
    // The server throws away what the slot needs.
    for _ in 0..3 {
        admin.batch_execute("SELECT pg_logical_emit_message(false, 'x', 'x'); SELECT pg_switch_wal()").await.unwrap();
    }
    admin.batch_execute("CHECKPOINT").await.unwrap();
    let state = first.log_state().await.unwrap().unwrap();
    assert!(state.lost.is_some(), "{state:?}");
    senders_gone().await;
    let error = alone(&first).await.open(&position, &[], LIMITS).await.err().expect("the slot is lost");
    assert_eq!((error.reason, error.class), (reason::SLOT_LOST, Class::Stop), "{error}");
}

/// A standby is refused until it is promoted; then the old timeline is valid up to where it was left.
async fn a_failover_is_followed(major: u32) {
    let mut server = Postgres::start(major);
    let endpoint = server.endpoint("postgres");
    let source = PostgresSource::new(endpoint.clone(), "sluice_s", "p");
    source.mark().await.unwrap();
    assert_eq!(source.identity().await.unwrap().timeline, 1);
    let before = source.head().await.unwrap();
    server.stop();
    std::fs::write(server.data().join("standby.signal"), "").unwrap();
    server.start_again();
    // The session that was kept may break first.
    eventually(10, "a standby is refused", async || {
        let error = source.identity().await.unwrap_err();
        assert_eq!(error.class, Class::Retry, "{error}");
        error.reason == reason::SERVER_UNSUPPORTED
    })
    .await;
    for (side, expected) in [(Side::Source, reason::SERVER_UNSUPPORTED), (Side::Target, reason::TARGET_READ_ONLY)] {
        let found = inspect(&endpoint, side, Checks::default()).await.unwrap();
        assert!(found.in_recovery && found.timeline.is_none());
        assert_eq!(found.failed[0].name, expected);
    }
    server.connect("postgres").await.batch_execute("SELECT pg_promote()").await.unwrap();
    // What was decided for the old timeline is not carried out on the new one.
    let error = source.take(&mut Unopposed).await.expect_err("another timeline than was seen");
    assert_eq!((error.class, error.reason), (Class::Retry, reason::SOURCE_UNREACHABLE), "{error}");
    assert_eq!(source.identity().await.unwrap().timeline, 2);
    let left = source.left_timeline_at(1).await.unwrap().expect("timeline 1 is in the history");
    assert!(before <= left && left <= source.head().await.unwrap(), "{before} ≤ {left}");
    assert_eq!(source.left_timeline_at(2).await.unwrap(), None);
}
