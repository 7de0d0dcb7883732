//! The log with transactions that are sent before they have ended: every one is larger than the server's memory for decoding.

use crate::follow::{Follower, LIMITS, config, create_slot, head, mapped, open_with, publish};
use crate::support::{Postgres, eventually};
use sluice::connectors::postgres::log::{LogConfig, PostgresLog, StreamingPause};
use sluice::connectors::postgres::{Endpoint, Lsn};
use sluice::engine::error::reason;
use sluice::engine::roles::ChangeLog as _;
use sluice::engine::spill::{Disk, Room};
use sluice::engine::table::MappedTable;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio_postgres::Client;

const TABLES: [&str; 3] = ["keyed", "toasted", "full_rows"];

pub async fn streamed(major: u32) {
    let settings =
        ["logical_decoding_work_mem=64kB", "wal_sender_timeout=2s", "max_prepared_transactions=2", "log_replication_commands=on"];
    let server = Postgres::start_with(major, &settings);
    contents(&server).await;
    rolled_back(&server).await;
    altered(&server).await;
    stalls(&server).await;
    overflow(&server).await;
}

/// How often the server was asked to send transactions before their end; it logs the commands.
pub fn streamed_starts(server: &Postgres) -> usize {
    let log = server.log();
    log.lines().filter(|line| line.contains("received replication command: START_REPLICATION") && line.contains("streaming 'on'")).count()
}

/// Runs statements one after the other.
async fn run<S: AsRef<str>>(client: &Client, statements: impl IntoIterator<Item = S>) {
    for statement in statements {
        client.batch_execute(statement.as_ref()).await.unwrap();
    }
}

/// A database with three tables, its publication and its slot.
struct Stage {
    client: Client,
    endpoint: Endpoint,
    tables: Vec<MappedTable>,
    from: Lsn,
    folder: tempfile::TempDir,
    /// What its logs know of each other.
    pause: StreamingPause,
}

impl Stage {
    async fn make(server: &Postgres, database: &str) -> Self {
        let client = server.create_database(database).await;
        client
            .batch_execute(
                "CREATE TABLE keyed (id bigint PRIMARY KEY, v text, n numeric);
                 CREATE TABLE toasted (id int PRIMARY KEY, big text, small int);
                 ALTER TABLE toasted ALTER big SET STORAGE EXTERNAL;
                 CREATE TABLE full_rows (a int, b text);
                 ALTER TABLE full_rows REPLICA IDENTITY FULL",
            )
            .await
            .unwrap();
        publish(&client, &TABLES).await;
        let mut tables = Vec::new();
        for name in TABLES {
            tables.push(mapped(&client, name).await);
        }
        let endpoint = server.endpoint(database);
        let from = create_slot(&endpoint, "s").await;
        Self { client, endpoint, tables, from, folder: tempfile::tempdir().unwrap(), pause: StreamingPause::default() }
    }

    fn config(&self, binary: bool, memory: usize, limit: u64) -> LogConfig {
        let disk = Disk { folder: self.folder.path().join("spill"), limit };
        let room = Room { memory, disk: Some(disk) };
        LogConfig { room, pause: self.pause.clone(), ..config(&self.endpoint, &self.tables, binary, LIMITS) }
    }

    async fn follower(&self, binary: bool, memory: usize, limit: u64) -> Follower {
        Follower::new(open_with(self.config(binary, memory, limit), self.from).await, LIMITS)
    }

    async fn assert_contents(&self, follower: &Follower, binary: bool) {
        for name in TABLES {
            follower.assert_contents(&self.endpoint, name, binary).await;
        }
    }

    /// Runs statements as one transaction, then another one; how many of their rows came as mapped, and how many with the column `extra`.
    async fn rows_by_version(&self, follower: &mut Follower, statements: &[String], after: &str) -> (usize, usize) {
        let seen = follower.transactions.len();
        run(&self.client, ["BEGIN"]).await;
        run(&self.client, statements).await;
        run(&self.client, ["COMMIT", after]).await;
        follower.follow_to_head(&self.client).await;
        let count = |differs: Option<&str>| {
            let changes = follower.transactions[seen..].iter().flat_map(|transaction| &transaction.changes);
            changes.filter(|change| change.differs.as_deref() == differs).count()
        };
        (count(None), count(Some("column `extra` is new")))
    }

    /// Transactions that the server has streamed, or spilled, so far.
    async fn counted(&self, what: &str) -> i64 {
        let sql = format!("SELECT {what} FROM pg_stat_replication_slots WHERE slot_name = 's'");
        self.client.query_opt(&sql, &[]).await.unwrap().map_or(0, |row| row.get(0))
    }

    async fn drop_slot(&self) {
        crate::stream::drop_slot(&self.client, "s").await;
        assert_eq!(bytes_below(self.folder.path()), 0, "nothing is left of the spill");
    }
}

fn bytes_below(folder: &Path) -> u64 {
    // Files come and go while one looks.
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| if entry.path().is_dir() { bytes_below(&entry.path()) } else { entry.metadata().map_or(0, |meta| meta.len()) })
        .sum()
}

/// The statements of one large transaction; its rows are those of `n`.
fn large(n: i32) -> Vec<String> {
    let (from, to) = (n * 100_000, n * 100_000 + 3000);
    vec![
        "BEGIN".into(),
        format!("INSERT INTO keyed SELECT i, md5(i::text), i / 7.0 FROM generate_series({from}, {to}) i"),
        "SAVEPOINT a".into(),
        format!("UPDATE keyed SET v = 'rolled back' WHERE id BETWEEN {from} AND {to}"),
        "SAVEPOINT b".into(),
        format!("INSERT INTO full_rows SELECT i % 5, repeat(md5(i::text), 5) FROM generate_series(1, 2000) i"),
        "RELEASE b".into(),
        "ROLLBACK TO a".into(),
        "SAVEPOINT c".into(),
        format!("UPDATE keyed SET v = NULL, id = -id WHERE id BETWEEN {from} AND {to} AND id % 3 = 0"),
        "SAVEPOINT d".into(),
        format!("DELETE FROM keyed WHERE id BETWEEN {from} AND {to} AND id % 2 = 0"),
        format!("INSERT INTO toasted SELECT i, repeat(md5(i::text), 200), 0 FROM generate_series({from} + 1, {from} + 200) i"),
        "ROLLBACK TO d".into(),
        format!("INSERT INTO toasted SELECT i, repeat(md5(i::text), 200), 1 FROM generate_series({from} + 1, {from} + 100) i"),
        format!("UPDATE toasted SET small = 2 WHERE id BETWEEN {from} + 1 AND {from} + 50"),
        "RELEASE c".into(),
        format!(
            "INSERT INTO full_rows SELECT i % 5, 'row' || {n} FROM generate_series(1, 2000) i; DELETE FROM full_rows WHERE a = 4 AND b = 'row{n}'"
        ),
    ]
}

/// Several large transactions at once, with small ones between them, pieces of them rolled back and whole ones too.
async fn contents(server: &Postgres) {
    let stage = Stage::make(server, "contents").await;
    // What is kept in memory is little: most goes to disk.
    let mut follower = stage.follower(true, 512 * 1024, 1 << 30).await;
    let mut writers = Vec::new();
    for n in 1..=4 {
        let client = server.connect("contents").await;
        writers.push(tokio::spawn(async move {
            run(&client, large(n)).await;
            client
        }));
    }
    for n in 0..100 {
        stage.client.batch_execute(&format!("INSERT INTO keyed VALUES ({}, 'small', 1)", -n - 1)).await.unwrap();
    }
    let mut clients = Vec::new();
    for writer in writers {
        clients.push(writer.await.unwrap());
    }
    // All are open, and everything they have written has been sent and kept.
    follower.follow_to_head(&stage.client).await;
    eventually(20, "slices are kept on disk", || async { follower.log.load().spilled > 200_000 }).await;
    let load = follower.log.load();
    assert!(load.memory <= 512 * 1024, "{load:?}");
    assert!(load.spilled <= bytes_below(stage.folder.path()));
    let seen = follower.transactions.iter().map(|transaction| transaction.changes.len()).sum::<usize>();
    assert_eq!(seen, 100, "only small transactions have ended");

    for (n, client) in clients.iter().enumerate() {
        // The last is rolled back whole; one is prepared first.
        let end = match n {
            1 => "PREPARE TRANSACTION 'p'; COMMIT PREPARED 'p'",
            3 => "ROLLBACK",
            _ => "COMMIT",
        };
        run(client, end.split("; ")).await;
    }
    follower.follow_to_head(&stage.client).await;
    stage.assert_contents(&follower, true).await;
    assert!(stage.counted("stream_txns").await >= 4, "they were streamed");
    let load = follower.log.load();
    assert_eq!((load.spilled, load.notice), (0, None));

    // Another connection, in text: now they come whole, since they have ended.
    drop(follower);
    let mut again = stage.follower(false, 64 << 20, 0).await;
    again.follow_to_head(&stage.client).await;
    stage.assert_contents(&again, false).await;

    // One that ends in the middle of a slice; the same transaction begins anew on the next.
    let client = server.connect("contents").await;
    run(&client, large(7)).await;
    again.follow_to_head(&stage.client).await;
    eventually(20, "slices are kept", || async { again.log.load().memory > 100_000 }).await;
    drop(again);
    let mut last = stage.follower(true, 512 * 1024, 1 << 30).await;
    client.batch_execute("UPDATE keyed SET n = n + 1 WHERE id < 300000; COMMIT").await.unwrap();
    last.follow_to_head(&stage.client).await;
    stage.assert_contents(&last, true).await;
    drop(last);
    stage.drop_slot().await;
}

/// What is rolled back after slices of it were spilled: subtransactions inside others, then whole transactions. Each slice is there
/// before the roll-back, which the server can only tell then.
async fn rolled_back(server: &Postgres) {
    const ROWS: i32 = 3000;
    let stage = Stage::make(server, "rolled_back").await;
    let mut follower = stage.follower(true, 128 * 1024, 1 << 30).await;
    let rows = |from: i32, value: &str| {
        format!("INSERT INTO keyed SELECT i, '{value}' || repeat('x', 100), 1 FROM generate_series({from}, {from} + {ROWS} - 1) i")
    };
    stage.client.batch_execute(&rows(1, "before")).await.unwrap();
    follower.follow_to_head(&stage.client).await;
    // Writes, and waits until nearly all of it is here: 100 bytes a row and more. Most of it is in files.
    let spill = async |writer: &Client, follower: &Follower, statement: &str| {
        let kept = || follower.log.load().spilled + follower.log.load().memory;
        let enough = kept() + 100 * u64::from(ROWS.unsigned_abs()) - 64 * 1024;
        writer.batch_execute(statement).await.unwrap();
        eventually(20, "slices are kept", || async { kept() >= enough }).await;
    };
    let writer = server.connect("rolled_back").await;
    spill(&writer, &follower, &format!("BEGIN; {}", rows(10_001, "kept"))).await;
    spill(&writer, &follower, &format!("SAVEPOINT a; UPDATE keyed SET v = 'in a' || repeat('y', 100) WHERE id <= {ROWS}")).await;
    spill(&writer, &follower, &format!("SAVEPOINT b; SAVEPOINT c; {}", rows(20_001, "in c"))).await;
    spill(&writer, &follower, &format!("RELEASE c; {}", rows(30_001, "in b"))).await;
    writer.batch_execute("ROLLBACK TO b; RELEASE b").await.unwrap();
    spill(&writer, &follower, &format!("SAVEPOINT d; {}", rows(20_001, "in d"))).await;
    writer.batch_execute("RELEASE d; ROLLBACK TO a").await.unwrap();
    spill(&writer, &follower, &format!("SAVEPOINT e; {}", rows(20_001, "in e"))).await;
    writer.batch_execute("COMMIT").await.unwrap();
    follower.follow_to_head(&stage.client).await;
    stage.assert_contents(&follower, true).await;
    assert_eq!(follower.log.load().spilled, 0);

    let slices = stage.counted("stream_count").await;
    spill(&writer, &follower, &format!("BEGIN; {}", rows(40_001, "whole"))).await;
    writer.batch_execute(&format!("SAVEPOINT f; {}; ROLLBACK", rows(50_001, "whole"))).await.unwrap();
    // Nothing has committed since: only the roll-back can have freed it.
    eventually(20, "what was rolled back is freed", || async { follower.log.load().spilled == 0 }).await;
    // PostgreSQL 14 counts with a delay.
    eventually(20, "slices are counted", || async { stage.counted("stream_count").await > slices }).await;
    stage.client.batch_execute(&rows(40_001, "after")).await.unwrap();
    follower.follow_to_head(&stage.client).await;
    stage.assert_contents(&follower, true).await;
    drop(follower);
    stage.drop_slot().await;
}

/// A table that changes inside of a streamed transaction; and inside a subtransaction that is rolled back, before it changes
/// again: that servers can't decode before its end, and it comes whole.
async fn altered(server: &Postgres) {
    let stage = Stage::make(server, "altered").await;
    let mut follower = stage.follower(true, 1 << 20, 1 << 30).await;
    let insert = |from: i32, columns: &str, values: &str| {
        format!("INSERT INTO keyed (id, v{columns}) SELECT i, md5(i::text){values} FROM generate_series({from}, {from} + 1999) i")
    };
    let after = |values: &str| format!("INSERT INTO keyed VALUES (9001, 'after', {values})");
    let statements = [
        insert(1, "", ""),
        "SAVEPOINT a; ALTER TABLE keyed ADD extra int".into(),
        insert(2001, ", extra", ", 1"),
        "RELEASE a; SAVEPOINT b".into(),
        insert(4001, ", extra", ", 1"),
        "ROLLBACK TO b".into(),
        insert(6001, "", ""),
        "ALTER TABLE keyed DROP extra; SAVEPOINT c; INSERT INTO keyed VALUES (9001, 'in', 1); ROLLBACK TO c".into(),
        insert(4001, "", ""),
    ];
    assert_eq!(stage.rows_by_version(&mut follower, &statements, &after("1")).await, (4001, 4000));
    assert!(stage.counted("stream_txns").await >= 1);
    assert_eq!(follower.log.load().notice, None);
    assert!(follower.log.announced() >= 3, "each change is told when it has committed");
    stage.client.batch_execute("TRUNCATE keyed").await.unwrap();
    follower.follow_to_head(&stage.client).await;

    let statements = [
        insert(1, "", ""),
        "SAVEPOINT a; ALTER TABLE keyed ADD gone int".into(),
        insert(2001, ", gone", ", 1"),
        "ROLLBACK TO a".into(),
        insert(4001, "", ""),
        "ALTER TABLE keyed ADD extra int".into(),
        insert(6001, ", extra", ", 2"),
    ];
    assert_eq!(stage.rows_by_version(&mut follower, &statements, &after("1, 3")).await, (4000, 2001));
    // A server without the defect streams on.
    assert!(follower.log.load().notice.is_none_or(|notice| notice.reason == reason::STREAMING_FAILED));
    assert_eq!(
        server.log().matches("could not map file").count(),
        usize::from(follower.log.load().notice.is_some()),
        "not again and again"
    );
    drop(follower);
    stage.drop_slot().await;
}

/// A consumer that takes nothing of a transaction that has ended: the server hears from us, memory stays in its bounds.
async fn stalls(server: &Postgres) {
    const MEMORY: usize = 2 << 20;
    let stage = Stage::make(server, "stalls").await;
    let mut follower = stage.follower(true, MEMORY, 1 << 30).await;
    let insert = "INSERT INTO keyed SELECT i, repeat('x', 1000), 1 FROM generate_series(1, 20000) i";
    stage.client.batch_execute(insert).await.unwrap();
    let half_full = || async { follower.log.load().memory as usize > MEMORY / 3 };
    eventually(20, "the buffer is full", half_full).await;
    let stalled = Instant::now();
    while stalled.elapsed() < Duration::from_millis(3500) {
        // The walsender would have ended by now if it had heard nothing.
        let sql = "SELECT count(*) FROM pg_stat_replication WHERE application_name = 'sluice'";
        let count: i64 = stage.client.query_one(sql, &[]).await.unwrap().get(0);
        assert_eq!(count, 1, "{}", server.log());
        let load = follower.log.load();
        assert!(load.memory as usize <= MEMORY + 512 * 1024, "{load:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    follower.follow_to_head(&stage.client).await;
    stage.assert_contents(&follower, true).await;
    assert!(stage.counted("stream_txns").await >= 1);
    drop(follower);
    stage.drop_slot().await;
}

/// Takes parts until the condition holds.
async fn follow_until(follower: &mut Follower, what: &str, check: impl Fn(&PostgresLog) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !check(&follower.log) {
        assert!(Instant::now() < deadline, "still not: {what}");
        if let Ok(part) = tokio::time::timeout(Duration::from_millis(50), follower.log.next()).await {
            follower.take(&part.unwrap());
        }
    }
}

/// The spill is too small: streaming is off until the transaction that took the most is over, whether it commits or not.
async fn overflow(server: &Postgres) {
    const LIMIT: u64 = 1 << 20;
    let stage = Stage::make(server, "overflow").await;
    let mut follower = stage.follower(true, 512 * 1024, LIMIT).await;
    let full = |log: &PostgresLog| log.load().notice.is_some();
    for (n, end) in [(1, "COMMIT"), (2, "ROLLBACK")] {
        let client = server.connect("overflow").await;
        let small = server.connect("overflow").await;
        run(&client, large(n * 10)).await;
        small.batch_execute(&format!("INSERT INTO keyed VALUES (-{n}, 'before', 1)")).await.unwrap();
        let insert = format!("INSERT INTO keyed SELECT i, repeat('y', 100), 1 FROM generate_series({n}0000001, {n}0020000) i");
        client.batch_execute(&insert).await.unwrap();
        follow_until(&mut follower, "the spill is full", full).await;
        let notice = follower.log.load().notice.unwrap();
        assert_eq!(notice.reason, reason::SPILL_FULL);
        assert!(notice.message.contains(&LIMIT.to_string()), "{}", notice.message);
        assert!(bytes_below(stage.folder.path()) <= LIMIT);
        let starts = streamed_starts(server);
        if n == 1 {
            // Another log does not try again what can't be.
            drop(follower);
            follower = stage.follower(true, 512 * 1024, LIMIT).await;
            assert_eq!(follower.log.load().notice.as_ref(), Some(&notice));
        }

        // Others go on meanwhile, large ones too.
        let spilled = stage.counted("spill_txns").await;
        run(&small, large(n * 10 + 1)).await;
        small.batch_execute("COMMIT").await.unwrap();
        follower.follow_to_head(&stage.client).await;
        assert_eq!(follower.log.load().notice, Some(notice));
        assert_eq!(streamed_starts(server), starts);
        client.batch_execute(end).await.unwrap();
        follower.follow_to_head(&stage.client).await;
        eventually(20, "the server has kept it", || async { stage.counted("spill_txns").await > spilled }).await;

        // And then as before.
        follow_until(&mut follower, "it streams again", |log| !full(log)).await;
        assert_eq!(streamed_starts(server), starts + 1);
        let streamed = stage.counted("stream_txns").await;
        small
            .batch_execute(&format!("BEGIN; INSERT INTO keyed SELECT i, 'z', 1 FROM generate_series({n}1000001, {n}1004000) i"))
            .await
            .unwrap();
        let position = head(&stage.client).await;
        follower.follow_to(position).await;
        follow_until(&mut follower, "slices arrive", |log| log.load().spilled + log.load().memory > 100_000).await;
        small.batch_execute("COMMIT").await.unwrap();
        follower.follow_to_head(&stage.client).await;
        eventually(20, "it was streamed", || async { stage.counted("stream_txns").await > streamed }).await;
        stage.assert_contents(&follower, true).await;
    }
    // Nothing was sent twice, nothing was left out: the ends go on, and each row fits (the follower checks it).
    assert!(!server.log().contains("terminating walsender process due to replication timeout"), "{}", server.log());
    drop(follower);
    stage.drop_slot().await;
}
