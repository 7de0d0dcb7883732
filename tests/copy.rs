//! The initial copy when connections break under it: what is done again, and what is not.

mod support;
#[path = "support/worker.rs"]
mod worker;

use support::{Postgres, eventually};
use tokio_postgres::Client;
use worker::{Worker, assert_equal, wait_sql};

/// Makes COPY into these tables of the target wait for as long as `gate` holds the lock, replica role or not.
async fn close_gate(target: &Client, gate: &Client, tables: &[&str]) {
    gate.batch_execute("SELECT pg_advisory_lock(42)").await.unwrap();
    target
        .batch_execute(
            "CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_advisory_xact_lock_shared(42); RETURN NULL; END $$",
        )
        .await
        .unwrap();
    for table in tables {
        let sql = format!(
            "CREATE TABLE {table} (id int PRIMARY KEY, v text);
             CREATE TRIGGER gate BEFORE INSERT ON {table} FOR EACH STATEMENT EXECUTE FUNCTION wait_at_gate();
             ALTER TABLE {table} ENABLE ALWAYS TRIGGER gate"
        );
        target.batch_execute(&sql).await.unwrap();
    }
}

async fn open_gate(gate: &Client) {
    gate.batch_execute("SELECT pg_advisory_unlock(42)").await.unwrap();
}

const AT_GATE: &str = "SELECT count(*) >= 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";

/// Limits that would end every session that waits.
async fn limit_sessions(client: &Client, database: &str) {
    for setting in ["idle_in_transaction_session_timeout", "idle_session_timeout", "statement_timeout", "lock_timeout"] {
        client.batch_execute(&format!("ALTER DATABASE {database} SET {setting} = '400ms'")).await.unwrap();
    }
    client
        .batch_execute(&format!(
            "DO $$ BEGIN IF current_setting('server_version_num')::int >= 170000 THEN ALTER DATABASE {database} SET transaction_timeout = '400ms'; END IF; END $$"
        ))
        .await
        .unwrap();
}

async fn seed(client: &Client, tables: &[&str]) {
    for table in tables {
        let sql = format!(
            "CREATE TABLE {table} (id int PRIMARY KEY, v text); INSERT INTO {table} SELECT g, repeat('v' || g, 20) FROM generate_series(1, 10000) g; ANALYZE {table}"
        );
        client.batch_execute(&sql).await.unwrap();
    }
}

async fn generation(target: &Client, table: &str) -> i64 {
    let sql = "SELECT generation FROM _sluice.tables WHERE source_table = $1";
    target.query_one(sql, &[&table]).await.unwrap().get(0)
}

struct Pair {
    source: Postgres,
    target: Postgres,
    left: Client,
    right: Client,
    gate: Client,
}

async fn pair(major: u32) -> Pair {
    let (source, target) = (Postgres::start(major), Postgres::start(major));
    let (left, right) = (source.create_database("shop").await, target.create_database("dw").await);
    let gate = target.connect("dw").await;
    limit_sessions(&left, "shop").await;
    limit_sessions(&right, "dw").await;
    Pair { source, target, left, right, gate }
}

/// Longer than every limit of [`limit_sessions`], by the server's clock.
async fn outlast_limits(gate: &Client) {
    gate.batch_execute("SELECT pg_sleep(1)").await.unwrap();
}

async fn a_lost_connection_costs_one_range(major: u32) {
    let Pair { source, target, left, right, gate } = pair(major).await;
    seed(&left, &["t"]).await;
    close_gate(&right, &gate, &["t"]).await;
    let worker = Worker::start((&source, "shop"), (&target, "dw"), &["t"]);
    wait_sql(&right, 60, AT_GATE).await;
    outlast_limits(&gate).await;
    let killed = "SELECT count(pg_terminate_backend(pid)) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    assert!(right.query_one(killed, &[]).await.unwrap().get::<_, i64>(0) >= 1);
    eventually(60, "a range is copied again", || async { worker.log().contains("a range is copied again") }).await;
    // On the other side as well: what reads a range, not what holds the snapshot.
    wait_sql(&right, 60, AT_GATE).await;
    wait_sql(&left, 60, "SELECT count(pg_terminate_backend(pid)) >= 1 FROM pg_stat_activity WHERE datname = 'shop' AND query LIKE 'COPY%'")
        .await;
    open_gate(&gate).await;
    worker.wait_streaming().await;
    assert_equal(&left, &right, &["t"]).await;
    assert_eq!(generation(&right, "t").await, 1, "the table was begun once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_connection_costs_one_range_on_postgres_14() {
    a_lost_connection_costs_one_range(14).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_connection_costs_one_range_on_postgres_17() {
    a_lost_connection_costs_one_range(17).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_snapshot_costs_the_unfinished_tables() {
    let Pair { source, target, left, right, gate } = pair(15).await;
    seed(&left, &["done", "slow"]).await;
    close_gate(&right, &gate, &["slow"]).await;
    let worker = Worker::start((&source, "shop"), (&target, "dw"), &["done", "slow"]);
    wait_sql(&right, 60, "SELECT state = 'CatchingUp' FROM _sluice.tables WHERE source_table = 'done'").await;
    wait_sql(&right, 60, AT_GATE).await;
    outlast_limits(&gate).await;
    let holder = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = 'shop' AND state = 'idle in transaction'";
    assert_eq!(left.query_one(holder, &[]).await.unwrap().get::<_, i64>(0), 1);
    left.batch_execute("UPDATE done SET v = 'later' WHERE id % 3 = 0; DELETE FROM slow WHERE id % 7 = 0").await.unwrap();
    open_gate(&gate).await;
    worker.wait_streaming().await;
    worker.wait_level(&left).await;
    assert_equal(&left, &right, &["done", "slow"]).await;
    assert_eq!((generation(&right, "done").await, generation(&right, "slow").await), (1, 2));
    assert!(worker.log().contains("SnapshotLost"), "{}", worker.log());
}
