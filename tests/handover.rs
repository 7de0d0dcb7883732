//! Hand-over from table to stream, and from worker to worker.
//!
//! A table joins a running Mirror at the moments at which real servers have lost rows: an idle source, a commit that waits
//! for a standby, a writer older than the publication. Contents are compared row by row.

mod support;
#[path = "support/worker.rs"]
mod worker;

use support::{Postgres, eventually};
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use worker::{Worker, assert_equal, table, wait_sql};

/// Exit code of a worker whose stream another one has claimed.
const FENCED: i32 = 3;

/// A Mirror that streams table `a`; table `b` has rows and is not part of it.
async fn streaming() -> (Postgres, Postgres, Client, Client, Worker) {
    let (source, target) = (Postgres::start(15), Postgres::start(15));
    let (left, right) = (source.create_database("shop").await, target.create_database("dw").await);
    left.batch_execute(
        "CREATE TABLE a (id int PRIMARY KEY, note text);
         CREATE TABLE b (id int PRIMARY KEY, note text);
         INSERT INTO a SELECT g, 'first' FROM generate_series(1, 100) g;
         INSERT INTO b SELECT g, 'first' FROM generate_series(1, 100) g",
    )
    .await
    .expect("the seed");
    let worker = Worker::start((&source, "shop"), (&target, "dw"), &["a"]);
    worker.wait_streaming().await;
    worker.wait_level(&left).await;
    (source, target, left, right, worker)
}

async fn add_b(worker: &mut Worker) {
    worker.change(|desired| desired.tables = Some(vec![table("a"), table("b")])).await;
}

async fn wait_joined(worker: &Worker) {
    worker.wait_for(90, "both tables ready", |status| status.streaming && status.tables.get("Ready") == Some(&2)).await;
}

/// Begins a transaction; its id, as locks show it.
async fn begin(client: &Client, sql: &str) -> String {
    client.batch_execute(&format!("BEGIN; {sql}")).await.expect("a transaction begins");
    client.query_one("SELECT (pg_current_xact_id()::text::bigint % 4294967296)::text", &[]).await.expect("an id").get(0)
}

/// Waits until the making of a slot waits for a transaction.
async fn wait_slot_waits_for(client: &Client, id: &str) {
    let waits = format!(
        "SELECT EXISTS (SELECT FROM pg_locks JOIN pg_stat_activity USING (pid)
         WHERE locktype = 'transactionid' AND NOT granted AND transactionid::text = '{id}' AND backend_type = 'walsender')"
    );
    wait_sql(client, 60, &waits).await;
}

async fn changed_later(left: &Client, right: &Client, worker: &Worker) {
    left.batch_execute("UPDATE b SET note = 'later' WHERE id % 7 = 0; DELETE FROM b WHERE id % 11 = 0").await.expect("changes");
    worker.wait_level(left).await;
    assert_equal(left, right, &["a", "b"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_joins_while_the_source_is_idle() {
    let (_source, _target, left, right, mut worker) = streaming().await;
    add_b(&mut worker).await;
    wait_joined(&worker).await;
    assert_equal(&left, &right, &["a", "b"]).await;
    changed_later(&left, &right, &worker).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_writer_older_than_the_publication_arrive() {
    let (source, _target, left, right, mut worker) = streaming().await;
    let writer = source.connect("shop").await;
    let id = begin(&writer, "INSERT INTO b VALUES (1001, 'before it is published'); UPDATE b SET note = 'before' WHERE id = 1").await;
    add_b(&mut worker).await;
    wait_sql(&left, 60, "SELECT EXISTS (SELECT FROM pg_publication_tables WHERE tablename = 'b')").await;
    wait_slot_waits_for(&left, &id).await;
    writer
        .batch_execute("INSERT INTO b VALUES (1002, 'after it'); UPDATE b SET note = 'after' WHERE id = 2; COMMIT")
        .await
        .expect("a commit");
    wait_joined(&worker).await;
    assert_equal(&left, &right, &["a", "b"]).await;
    changed_later(&left, &right, &worker).await;
}

/// The commit record lies before the slot's point and no ordinary snapshot sees its rows: they must be in the copy.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_waits_for_a_standby_is_in_the_copy() {
    let (source, _target, left, right, mut worker) = streaming().await;
    let sessions = [source.connect("shop").await, source.connect("shop").await, source.connect("shop").await];
    let [first, second, stalled] = sessions;
    // Only the one writer waits for the standby that never comes.
    left.batch_execute("SET synchronous_commit = local").await.expect("a setting");
    for session in [&first, &second] {
        session.batch_execute("SET synchronous_commit = local").await.expect("a setting");
    }
    stalled.batch_execute("SET synchronous_commit = on").await.expect("a setting");
    left.batch_execute("ALTER SYSTEM SET synchronous_standby_names = 'absent'").await.expect("a setting");
    left.batch_execute("SELECT pg_reload_conf()").await.expect("a reload");
    wait_sql(&stalled, 30, "SELECT current_setting('synchronous_standby_names') = 'absent'").await;

    // The making of the slot waits twice: for the writers that it finds, and for those that it finds then.
    let id = begin(&first, "INSERT INTO a VALUES (1001, 'open when the slot is begun')").await;
    add_b(&mut worker).await;
    wait_slot_waits_for(&left, &id).await;
    let second_id = begin(&second, "INSERT INTO a VALUES (1002, 'open when the first has ended')").await;
    first.batch_execute("COMMIT").await.expect("a commit");
    wait_slot_waits_for(&left, &second_id).await;
    let commit: JoinHandle<Client> = tokio::spawn(async move {
        stalled
            .batch_execute("INSERT INTO b VALUES (1003, 'waits for a standby'); UPDATE b SET note = 'waits' WHERE id = 3")
            .await
            .expect("a commit");
        stalled
    });
    wait_sql(&left, 60, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep')").await;
    second.batch_execute("COMMIT").await.expect("a commit");

    // The copy is made while nobody sees the rows.
    wait_sql(&right, 90, "SELECT EXISTS (SELECT FROM pg_class WHERE relname = 'b')").await;
    wait_joined(&worker).await;
    let seen: i64 = left.query_one("SELECT count(*) FROM b WHERE id = 1003", &[]).await.expect("a count").get(0);
    assert_eq!(seen, 0, "the commit still waits");
    let copied: i64 = right.query_one("SELECT count(*) FROM b WHERE id = 1003", &[]).await.expect("a count").get(0);
    assert_eq!(copied, 1, "it is in the copy");
    left.batch_execute("ALTER SYSTEM RESET synchronous_standby_names").await.expect("a setting");
    left.batch_execute("SELECT pg_reload_conf()").await.expect("a reload");
    commit.await.expect("the commit ends");
    changed_later(&left, &right, &worker).await;
}

/// Source and target with tables `a` and `b`, each with rows.
async fn two_tables() -> (Postgres, Postgres, Client, Client) {
    let (source, target) = (Postgres::start(15), Postgres::start(15));
    let (left, right) = (source.create_database("shop").await, target.create_database("dw").await);
    for name in ["a", "b"] {
        let seed = format!(
            "CREATE TABLE {name} (id int PRIMARY KEY, note text); INSERT INTO {name} SELECT g, 'first' FROM generate_series(1, 100) g"
        );
        left.batch_execute(&seed).await.expect("the seed");
    }
    (source, target, left, right)
}

/// The older worker ends for good, and the newer one has the source for itself: it publishes `b` alone and follows it.
async fn assert_only_the_new_one_is_left(left: &Client, right: &Client, mut old: Worker, new: &Worker) {
    eventually(60, "the old worker ends", || std::future::ready(old.exit_code().is_some())).await;
    assert_eq!(old.exit_code(), Some(FENCED), "{}", old.log());
    let published = "SELECT string_agg(tablename, ',') FROM pg_publication_tables";
    assert_eq!(left.query_one(published, &[]).await.expect("a list").get::<_, Option<String>>(0).as_deref(), Some("b"));
    let slots = "SELECT string_agg(concat_ws(' ', slot_name, active), ',') FROM pg_replication_slots";
    assert_eq!(left.query_one(slots, &[]).await.expect("a list").get::<_, Option<String>>(0).as_deref(), Some("sluice_test t"));
    left.batch_execute("UPDATE b SET note = 'later' WHERE id % 7 = 0; DELETE FROM b WHERE id % 11 = 0").await.expect("changes");
    new.wait_level(left).await;
    assert_equal(left, right, &["b"]).await;
    assert!(!new.log().contains("the session failed"), "the new worker was interrupted: {}", new.log());
}

/// The older worker's statement waits for a lock while the newer one claims; then the lock is let go.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_stuck_in_publishing_changes_nothing_later() {
    let (source, target, left, right) = two_tables().await;
    let user = source.connect("shop").await;
    user.batch_execute("BEGIN; LOCK TABLE a IN SHARE UPDATE EXCLUSIVE MODE").await.expect("a lock");
    let old = Worker::start((&source, "shop"), (&target, "dw"), &["a", "b"]);
    wait_sql(&left, 60, "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND mode = 'ShareUpdateExclusiveLock')").await;
    let new = Worker::start((&source, "shop"), (&target, "dw"), &["b"]);
    new.wait_streaming().await;
    user.batch_execute("COMMIT").await.expect("a commit");
    assert_only_the_new_one_is_left(&left, &right, old, &new).await;
}

/// The older worker's slot is in the making, waiting for an old transaction, while the newer one claims.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_stuck_in_making_its_slot_leaves_none() {
    let (source, target, left, right) = two_tables().await;
    let writer = source.connect("shop").await;
    let id = begin(&writer, "INSERT INTO b VALUES (1001, 'open')").await;
    let old = Worker::start((&source, "shop"), (&target, "dw"), &["a", "b"]);
    wait_slot_waits_for(&left, &id).await;
    let maker = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = 'sluice_test'";
    let first: i32 = left.query_one(maker, &[]).await.expect("a slot in the making").get(0);
    let new = Worker::start((&source, "shop"), (&target, "dw"), &["b"]);
    wait_sql(
        &left,
        60,
        &format!("SELECT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = 'sluice_test' AND active_pid <> {first})"),
    )
    .await;
    writer.batch_execute("COMMIT").await.expect("a commit");
    new.wait_streaming().await;
    assert_only_the_new_one_is_left(&left, &right, old, &new).await;
}
