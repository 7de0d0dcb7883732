//! The initial copy when connections break under it: what is done again, and what is not.

mod support;
#[path = "support/worker.rs"]
mod worker;

use sluice::worker::contract::{RequestSpec, Status};
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

#[tokio::test(flavor = "multi_thread")]
async fn tables_that_others_refer_to_are_copied_again() {
    let Pair { source, target, left, right, gate: _ } = pair(15).await;
    left.batch_execute(
        "CREATE TABLE p (id int PRIMARY KEY, v varchar(90)); CREATE TABLE c (id int PRIMARY KEY, p int REFERENCES p ON DELETE CASCADE, v varchar(90));
         INSERT INTO p SELECT g, 'p' || g FROM generate_series(1, 5000) g; INSERT INTO c SELECT g, 1 + g % 5000, 'c' || g FROM generate_series(1, 5000) g;
         ANALYZE p; ANALYZE c",
    )
    .await
    .unwrap();
    let mut worker = Worker::start_with((&source, "shop"), (&target, "dw"), &["p", "c"], |desired| desired.snapshot.truncate = true);
    worker.wait_streaming().await;
    let carried = "SELECT count(*) = 1 FROM pg_constraint WHERE contype = 'f' AND convalidated AND conrelid = 'c'::regclass";
    wait_sql(&right, 60, carried).await;
    // First only the table that is referred to, then both.
    for (round, tables) in [vec!["p"], vec!["p", "c"]].into_iter().enumerate() {
        worker.kill9();
        let first = 10_000 * (round + 1);
        left.batch_execute(&format!(
            "DELETE FROM p WHERE id % 7 = {round}; INSERT INTO p SELECT g, 'new' FROM generate_series({first}, {first} + 500) g;
             INSERT INTO c SELECT g, g, 'new' FROM generate_series({first}, {first} + 500) g; UPDATE c SET v = v || '!' WHERE id % 3 = 0"
        ))
        .await
        .unwrap();
        let copies_before = (generation(&right, "p").await, generation(&right, "c").await);
        worker.spawn();
        worker.wait_streaming().await;
        let id = format!("again-{round}");
        let tables_of = tables.iter().map(|table| format!("public.{table}")).collect();
        let request = RequestSpec { id: id.clone(), action: "Resync".into(), tables: tables_of };
        worker.change(|desired| desired.request = Some(request)).await;
        let is_done = |status: &Status| status.requests.iter().flatten().any(|request| request.id == id && request.state == "Succeeded");
        worker.wait_for(90, "the tables are copied again", is_done).await;
        worker.wait_streaming().await;
        left.batch_execute("UPDATE p SET v = v || '?' WHERE id % 5 = 0; DELETE FROM p WHERE id % 11 = 0").await.unwrap();
        worker.wait_level(&left).await;
        assert_equal(&left, &right, &["p", "c"]).await;
        let copies = (generation(&right, "p").await, generation(&right, "c").await);
        assert!(copies.0 > copies_before.0, "{copies:?}");
        assert_eq!(copies.1 > copies_before.1, tables.contains(&"c"), "{copies:?}");
        wait_sql(&right, 60, carried).await;
    }
    let lost = right.query_one("SELECT count(*) FROM c WHERE NOT EXISTS (SELECT FROM p WHERE p.id = c.p)", &[]).await.unwrap();
    assert_eq!(lost.get::<_, i64>(0), 0);
    let refused = right.batch_execute("INSERT INTO c VALUES (-1, -1, 'x')").await.unwrap_err();
    assert_eq!(refused.code().map(tokio_postgres::error::SqlState::code), Some("23503"));
}
