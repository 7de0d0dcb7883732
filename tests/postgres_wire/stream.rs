//! The log: contents, order, flow, stalls, failures.

use crate::follow::{Follower, LIMITS, Value, config, create_slot, head, mapped, open, open_with, publish};
use crate::support::{Postgres, eventually};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use sluice::connectors::postgres::log::{LogConfig, PostgresLog};
use sluice::connectors::postgres::pgoutput::{Decoder, binary_allowed};
use sluice::connectors::postgres::{Endpoint, Lsn};
use sluice::engine::batch::{Batch, Op};
use sluice::engine::error::{Class, reason};
use sluice::engine::roles::{BatchLimits, ChangeLog as _};
use sluice::engine::spill::Room;
use sluice::engine::table::MappedTable;
use std::time::{Duration, Instant};

const TYPES: &str = "id bigint PRIMARY KEY, i int, n numeric(20,4), t text, b bytea, ts timestamptz, d date, iv interval, f float8,
                     bo bool, u uuid, j jsonb, a int[], c char(5), gen int GENERATED ALWAYS AS (i + 1) STORED";
const VALUES: &str = "i, i % 1000, i / 7.0, CASE WHEN i % 5 = 0 THEN NULL ELSE 'text ''\u{e4}' || i END, decode(md5(i::text), 'hex'),
                      '2024-02-29 23:59:59.123456+05'::timestamptz + i * '1 hour'::interval, '0044-03-15 BC'::date + i::int,
                      i * '1 mon -3 days 04:05:06.7'::interval, i / 3.0::float8, i % 2 = 0, md5(i::text)::uuid,
                      jsonb_build_object('a', i, 'b', ARRAY['x', NULL]), ARRAY[i::int, NULL, -1], 'c' || i % 10";

pub async fn stream(major: u32) {
    let mut server = Postgres::start_with(major, &["wal_sender_timeout=2s"]);
    contents(&server).await;
    flow(&server).await;
    stalls(&server).await;
    failures(&mut server).await;
}

/// Everything that happens to rows, in text and in binary, against the tables themselves.
async fn contents(server: &Postgres) {
    let client = server.create_database("contents").await;
    let endpoint = server.endpoint("contents");
    client
        .batch_execute(&format!(
            "CREATE TABLE keyed ({TYPES});
             CREATE TABLE toasted (id int PRIMARY KEY, big text, small int);
             ALTER TABLE toasted ALTER big SET STORAGE EXTERNAL;
             CREATE TABLE full_rows (a int, big text, b int);
             ALTER TABLE full_rows ALTER big SET STORAGE EXTERNAL, REPLICA IDENTITY FULL;
             CREATE TABLE unmapped (id int PRIMARY KEY)"
        ))
        .await
        .unwrap();
    publish(&client, &["keyed", "toasted", "full_rows", "unmapped"]).await;
    let names = ["keyed", "toasted", "full_rows"];
    let mut tables = Vec::new();
    for name in names {
        tables.push(mapped(&client, name).await);
    }
    assert!(binary_allowed(&tables));
    let from = create_slot(&endpoint, "s").await;
    client.batch_execute("SELECT pg_create_logical_replication_slot('recorded', 'pgoutput')").await.unwrap();
    for sql in [
        format!("INSERT INTO keyed SELECT {VALUES} FROM generate_series(1::bigint, 500) i"),
        "UPDATE keyed SET i = i + 1, t = NULL WHERE id % 3 = 0".into(),
        "UPDATE keyed SET id = -id WHERE id % 10 = 0".into(),
        "DELETE FROM keyed WHERE id % 7 = 0".into(),
        "INSERT INTO toasted SELECT i, repeat(md5(i::text), 200), 0 FROM generate_series(1, 20) i".into(),
        "UPDATE toasted SET small = 1 WHERE id < 10; UPDATE toasted SET id = id + 100 WHERE id > 15; UPDATE toasted SET big = 'short' WHERE id = 3".into(),
        "INSERT INTO full_rows SELECT i / 2, CASE WHEN i % 3 > 0 THEN repeat(md5((i / 2)::text), 200) END, NULL FROM generate_series(1, 20) i".into(),
        "UPDATE full_rows SET b = 5 WHERE a = 3; DELETE FROM full_rows WHERE a = 4; INSERT INTO unmapped VALUES (1)".into(),
        "BEGIN; INSERT INTO toasted VALUES (500); SAVEPOINT a; INSERT INTO toasted VALUES (501); ROLLBACK TO a; COMMIT".into(),
        "BEGIN; INSERT INTO toasted VALUES (502); ROLLBACK; SELECT pg_logical_emit_message(true, 'x', 'y'), pg_logical_emit_message(false, 'x', 'y')".into(),
    ] {
        client.batch_execute(&sql).await.unwrap();
    }
    for binary in [false, true] {
        let mut follower = Follower::new(open(&endpoint, from, &tables, binary, LIMITS).await, LIMITS);
        follower.follow_to_head(&client).await;
        for name in names {
            follower.assert_contents(&endpoint, name, binary).await;
        }
        images(&follower);
        drop(follower);
    }
    // Truncates of one statement belong together; what was not mapped is not there.
    let mut follower = Follower::new(open(&endpoint, from, &tables, true, LIMITS).await, LIMITS);
    client.batch_execute("TRUNCATE keyed, toasted, unmapped; TRUNCATE full_rows; INSERT INTO toasted VALUES (1, 'x', 1)").await.unwrap();
    follower.follow_to_head(&client).await;
    for name in names {
        follower.assert_contents(&endpoint, name, true).await;
    }
    damaged_records(&client, &tables).await;
    drop(follower);
    drop_slot(&client, "s").await;
    drop_slot(&client, "recorded").await;
}

/// Old images are there exactly where they should be.
fn images(follower: &Follower) {
    let changes: Vec<_> = follower.transactions.iter().flat_map(|transaction| &transaction.changes).collect();
    let of = |table: &str, op: Op| changes.iter().filter(|change| change.table == table && change.op == op).copied().collect::<Vec<_>>();
    let unchanged = |row: &Option<Vec<Value>>| row.iter().flatten().any(|value| *value == Value::Unchanged);
    assert!(of("toasted", Op::Update).iter().any(|change| unchanged(&change.new)), "unchanged TOAST is not sent");
    assert!(of("toasted", Op::Update).iter().any(|change| change.old.is_some() && !change.old_is_full), "a changed key is sent");
    assert!(of("keyed", Op::Update).iter().any(|change| change.old.is_none()));
    for change in of("full_rows", Op::Update).iter().chain(&of("full_rows", Op::Delete)) {
        assert!(change.old_is_full && !unchanged(&change.old), "{change:?}");
    }
    for change in of("keyed", Op::Delete) {
        let old = change.old.as_ref().unwrap();
        assert!(!change.old_is_full && old[0] != Value::Null && old[1..].iter().all(|value| *value == Value::Null), "{change:?}");
    }
    assert!(changes.iter().all(|change| change.table != "unmapped"));
}

/// Real messages, damaged at random, never make the decoder panic.
async fn damaged_records(client: &tokio_postgres::Client, tables: &[MappedTable]) {
    let sql =
        "SELECT data FROM pg_logical_slot_peek_binary_changes('recorded', NULL, 2000, 'proto_version', '1', 'publication_names', 'p')";
    let records: Vec<Vec<u8>> = client.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
    assert!(records.len() > 600, "{} records", records.len());
    let seed = rand::random();
    println!("seed {seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    for _ in 0..20 {
        let (mut decoder, mut batch) = (Decoder::new(tables), Batch::default());
        for record in &records {
            decoder.decode(record, &mut batch).unwrap();
            let mut damaged = record.clone();
            for _ in 0..random.random_range(1..4) {
                let at = random.random_range(0..damaged.len());
                damaged[at] = random.random();
            }
            damaged.truncate(random.random_range(0..=record.len()));
            // The relation of a damaged one may be another: a decoder of its own.
            if matches!(record[0], b'R') || batch.changes().len() > 500 {
                batch = Batch::default();
                let _ = Decoder::new(tables).decode(&damaged, &mut batch);
            } else {
                let _ = decoder.decode(&damaged, &mut batch);
            }
        }
    }
}

/// A database with one table, its publication and its slot.
struct Simple {
    client: tokio_postgres::Client,
    endpoint: Endpoint,
    tables: Vec<MappedTable>,
    from: Lsn,
}

impl Simple {
    async fn make(server: &Postgres, database: &str) -> Self {
        let client = server.create_database(database).await;
        client.batch_execute("CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE unpublished (id int)").await.unwrap();
        publish(&client, &["t"]).await;
        let endpoint = server.endpoint(database);
        let tables = vec![mapped(&client, "t").await];
        let from = create_slot(&endpoint, "s").await;
        Self { client, endpoint, tables, from }
    }

    async fn open(&self, from: Lsn, limits: BatchLimits) -> Follower {
        Follower::new(open(&self.endpoint, from, &self.tables, true, limits).await, limits)
    }
}

/// Drops a slot as soon as nobody reads from it.
pub async fn drop_slot(client: &tokio_postgres::Client, slot: &str) {
    eventually(10, "the slot is dropped", || async { client.execute("SELECT pg_drop_replication_slot($1)", &[&slot]).await.is_ok() }).await;
}

/// Pieces of a large transaction, idle positions, confirmations, restarts.
async fn flow(server: &Postgres) {
    let simple = Simple::make(server, "flow").await;
    let client = &simple.client;
    let limits = BatchLimits { rows: 100, ..LIMITS };
    let mut follower = simple.open(simple.from, limits).await;

    // A transaction that is larger than a part, between two small ones.
    client.batch_execute("INSERT INTO t VALUES (1, 'first')").await.unwrap();
    client.batch_execute("INSERT INTO t SELECT i, 'x' FROM generate_series(2, 1001) i").await.unwrap();
    client.batch_execute("INSERT INTO t VALUES (1002, 'last')").await.unwrap();
    follower.follow_to_head(client).await;
    let sizes: Vec<_> = follower.transactions.iter().map(|transaction| transaction.changes.len()).filter(|size| *size > 0).collect();
    assert_eq!(sizes, [1, 1000, 1]);
    assert!(follower.parts >= 10, "{} parts", follower.parts);

    idle(server, client, &mut follower).await;
    let (received, server_end) = follower.log.received();
    assert!(received >= follower.received && server_end >= received);

    restarts(&simple, follower, limits).await;
    assert!(!server.log().contains("EOF on standby connection"), "{}", server.log());
    drop_slot(client, "s").await;
}

/// Work that is not for us moves the position: of tables that are not published, and of another database.
async fn idle(server: &Postgres, client: &tokio_postgres::Client, follower: &mut Follower) {
    let transactions = follower.transactions.len();
    for _ in 0..50 {
        client.batch_execute("INSERT INTO unpublished VALUES (1)").await.unwrap();
    }
    let head = current_position(client).await;
    client.batch_execute("INSERT INTO unpublished VALUES (1)").await.unwrap();
    follower.follow_to(head).await;
    assert!(follower.transactions[transactions..].iter().all(|transaction| transaction.changes.is_empty()));

    let (start, idle_parts, started) = (current_position(client).await, follower.idle_parts, Instant::now());
    let other = server.connect("postgres").await;
    other.batch_execute("CREATE TABLE busy (id int)").await.unwrap();
    for _ in 0..50 {
        other.batch_execute("INSERT INTO busy VALUES (1)").await.unwrap();
    }
    let head = current_position(client).await;
    other.batch_execute("INSERT INTO busy VALUES (1)").await.unwrap();
    follower.follow_to(head).await;
    assert!(follower.transactions.iter().all(|transaction| transaction.end <= start), "another database's transactions are not sent");
    let seconds = started.elapsed().as_secs() as usize;
    assert!((1..=seconds + 2).contains(&(follower.idle_parts - idle_parts)), "not more than one a second");
}

async fn current_position(client: &tokio_postgres::Client) -> Lsn {
    let position: String = client.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await.unwrap().get(0);
    position.parse().unwrap()
}

/// After a restart from a confirmed position exactly the later transactions come.
async fn restarts(simple: &Simple, mut follower: Follower, limits: BatchLimits) {
    let client = &simple.client;
    let confirmed = || async {
        client
            .query_one("SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = 's'", &[])
            .await
            .unwrap()
            .get::<_, String>(0)
    };
    for i in 0..50 {
        client.batch_execute(&format!("INSERT INTO t VALUES ({}, 'restart')", 2000 + i)).await.unwrap();
    }
    follower.follow_to_head(client).await;
    let rows: Vec<_> = follower.transactions.iter().filter(|transaction| !transaction.changes.is_empty()).cloned().collect();
    let rows = &rows[rows.len() - 50..];
    for (at, transaction) in rows.iter().enumerate().step_by(17) {
        // While it runs, and as the last word of a log that is dropped at once.
        follower.log.confirm(&transaction.end);
        if at == 0 {
            eventually(10, "the confirmation arrives", || async { confirmed().await == transaction.end.to_string() }).await;
        }
        drop(follower);
        eventually(10, "the last word arrives", || async { confirmed().await == transaction.end.to_string() }).await;
        follower = simple.open(transaction.end, limits).await;
        follower.follow_to_head(client).await;
        let again: Vec<_> =
            follower.transactions.iter().filter(|transaction| !transaction.changes.is_empty()).map(|transaction| transaction.end).collect();
        let expected: Vec<_> = rows[at + 1..].iter().map(|transaction| transaction.end).collect();
        assert_eq!(again, expected, "after {}", transaction.end);
    }
    // Only one can read.
    let again = config(&simple.endpoint, &simple.tables, true, limits);
    let error = PostgresLog::open(again, follower.received).await.err().expect("a failure");
    assert_eq!((error.class, error.reason), (Class::Retry, reason::SLOT_IN_USE), "{error}");
    drop(follower);
    eventually(10, "the walsender ends with the log", || async {
        client.query_one("SELECT count(*) = 0 FROM pg_stat_replication", &[]).await.unwrap().get(0)
    })
    .await;
}

/// A consumer that takes nothing: the buffer stays in its budget, the server hears from us, and nothing is lost.
async fn stalls(server: &Postgres) {
    let simple = Simple::make(server, "stalls").await;
    let client = &simple.client;
    let limits = BatchLimits { rows: 100_000, bytes: 64 * 1024, ..LIMITS };
    client.batch_execute("INSERT INTO t SELECT i, repeat('x', 1000) FROM generate_series(1, 20000) i").await.unwrap();
    let room = Room::in_memory(8 * limits.bytes);
    let config = LogConfig { room, ..config(&simple.endpoint, &simple.tables, true, limits) };
    let mut follower = Follower::new(open_with(config, simple.from).await, limits);
    let memory = |follower: &Follower| usize::try_from(follower.log.load().memory).unwrap();
    eventually(10, "the buffer is full", || async { memory(&follower) >= 7 * limits.bytes }).await;

    let (mut replies, mut last) = (0, None);
    let stalled = Instant::now();
    while replies < 4 || stalled.elapsed() < Duration::from_millis(2500) {
        assert!(stalled.elapsed() < Duration::from_secs(20), "{replies} replies");
        let row = client
            .query_opt("SELECT reply_time FROM pg_stat_replication WHERE state = 'streaming' OR state = 'catchup'", &[])
            .await
            .unwrap();
        let reply: Option<std::time::SystemTime> = row.expect("the walsender lives").get(0);
        replies += usize::from(reply != last);
        last = reply;
        // One read more than the budget may be in it, and what the bookkeeping of rows takes.
        let most = 8 * limits.bytes + 2 * 256 * 1024;
        assert!(memory(&follower) <= most, "{} bytes", memory(&follower));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    follower.follow_to_head(client).await;
    follower.assert_contents(&simple.endpoint, "t", true).await;
    drop(follower);
    drop_slot(client, "s").await;
}

/// What ends a stream, and what still comes before it.
async fn failures(server: &mut Postgres) {
    let Simple { client, endpoint, tables, from } = Simple::make(server, "failures").await;
    let missing = LogConfig { slot: "missing".into(), ..config(&endpoint, &tables, true, LIMITS) };
    let error = PostgresLog::open(missing, from).await.err().expect("a failure");
    assert_eq!((error.class, error.reason), (Class::Stop, reason::SLOT_LOST), "{error}");

    // A publication that was not there at the position read.
    client.batch_execute("INSERT INTO t VALUES (1, 'x')").await.unwrap();
    let other = LogConfig { publication: "other".into(), ..config(&endpoint, &tables, true, LIMITS) };
    let mut log = PostgresLog::open(other, from).await.unwrap();
    let error = ended(&mut log).await;
    assert_eq!((error.class, error.reason), (Class::Stop, reason::PUBLICATION_MISSING), "{error}");
    drop(log);

    // A table that changes: its rows say so from there on, and the stream goes on.
    client
        .batch_execute("BEGIN; INSERT INTO t VALUES (3, 'x'); ALTER TABLE t ADD extra int; INSERT INTO t VALUES (4, 'x'); COMMIT")
        .await
        .unwrap();
    let mut follower = Follower::new(open(&endpoint, from, &tables, true, LIMITS).await, LIMITS);
    follower.follow_to_head(&client).await;
    let differs: Vec<_> =
        follower.transactions.iter().flat_map(|transaction| &transaction.changes).map(|change| change.differs.as_deref()).collect();
    assert_eq!(differs, [None, None, Some("column `extra` is new")]);
    drop(follower);

    // The server goes away.
    let tables = [mapped(&client, "t").await];
    let position = head(&client).await;
    let mut follower = Follower::new(open(&endpoint, position, &tables, true, LIMITS).await, LIMITS);
    follower.follow_to_head(&client).await;
    server.crash_and_restart();
    let error = ended(&mut follower.log).await;
    assert_eq!((error.class, error.reason), (Class::Retry, reason::SOURCE_UNREACHABLE), "{error}");
    assert!(follower.log.next().await.is_err(), "it has ended");
}

async fn ended(log: &mut PostgresLog) -> sluice::engine::error::Error {
    let end = async {
        loop {
            if let Err(error) = log.next().await {
                return error;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), end).await.expect("an end in time")
}
