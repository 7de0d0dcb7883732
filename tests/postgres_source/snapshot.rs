use super::support::eventually;
use super::{Database, alone, lines, mapped, on_each_version, on_one_version, read};
use sluice::engine::error::{Class, reason};
use sluice::engine::roles::{BulkFormat, Range, Snapshot as _, Source as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

on_each_version!(
    a_copy_under_load_equals_the_source_at_its_position,
    rows_beyond_the_planned_blocks_are_copied,
    partitioned_tables_are_copied_through_their_root,
    names_are_quoted_and_excluded_columns_stay,
    a_rewritten_table_ends_the_snapshot,
    a_dead_holder_ends_the_snapshot,
);
on_one_version!(pieces_are_large_and_sessions_are_used_again);

/// Rows as text, as an ordinary transaction that has imported the same snapshot sees them.
async fn oracle(database: &Database, snapshot: &str, select: &str) -> Vec<String> {
    let client = database.server.connect(&database.name).await;
    client.batch_execute(&format!("BEGIN ISOLATION LEVEL REPEATABLE READ; SET TRANSACTION SNAPSHOT '{snapshot}'")).await.unwrap();
    let rows = client.query(select, &[]).await.unwrap();
    let mut rows: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    rows.sort();
    rows
}

async fn a_copy_under_load_equals_the_source_at_its_position(major: u32) {
    let database = Database::new(
        major,
        "under_load",
        "CREATE TABLE t(id int PRIMARY KEY, v int, pad text) WITH (fillfactor = 50);
         INSERT INTO t SELECT i, 0, repeat('x', 50) FROM generate_series(1, 5000) i",
    )
    .await;
    let source = database.source();
    let tables = mapped(&source, &[("t", &[])]).await;
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..2)
        .map(|writer| {
            let (server, stop, name) = (Arc::clone(&database.server), Arc::clone(&stop), database.name.clone());
            tokio::spawn(async move {
                let client = server.connect(&name).await;
                let mut round = 0;
                while !stop.load(Ordering::Relaxed) {
                    round += 1;
                    let key = 1 + (round * 37 + writer) % 5000;
                    let new = 10_000 + round * 2 + writer;
                    let work = format!(
                        "BEGIN; UPDATE t SET v = v + 1 WHERE id % 97 = {}; DELETE FROM t WHERE id = {key}; INSERT INTO t VALUES ({new}, 1, 'new'); {}",
                        key % 97,
                        if round % 5 == 0 { "ROLLBACK" } else { "COMMIT" }
                    );
                    // Two writers may meet in a deadlock.
                    if client.batch_execute(&work).await.is_err() {
                        client.batch_execute("ROLLBACK").await.unwrap();
                    }
                }
            })
        })
        .collect();
    for _ in 0..3 {
        let snapshot = alone(&source).await.snapshot().await.unwrap();
        let ranges = snapshot.ranges(&tables[0], 1000);
        assert!(ranges.len() > 3, "{ranges:?}");
        let copied = lines(&snapshot, &tables[0], &ranges).await;
        let expected = oracle(&database, snapshot.name(), "SELECT concat_ws(E'\\t', id, v, pad) FROM t").await;
        assert_eq!(copied.len(), expected.len());
        assert!(copied == expected, "rows differ");
        snapshot.close().await;
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
}

async fn rows_beyond_the_planned_blocks_are_copied(major: u32) {
    let fill = "INSERT INTO t SELECT i, repeat('x', 200) FROM generate_series";
    let database = Database::new(
        major,
        "grown",
        &format!("CREATE TABLE t(id int PRIMARY KEY, v text) WITH (autovacuum_enabled = off); {fill}(1, 500) i"),
    )
    .await;
    let source = database.source();
    // Planned by a size that is out of date when the snapshot is taken.
    let tables = mapped(&source, &[("t", &[])]).await;
    database.run(&format!("{fill}(501, 2000) i")).await;
    let snapshot = alone(&source).await.snapshot().await.unwrap();
    database.run(&format!("{fill}(2001, 3000) i")).await;
    let ranges = snapshot.ranges(&tables[0], 100);
    assert!(ranges.len() >= 3, "never analyzed, and still in ranges: {ranges:?}");
    assert_eq!(lines(&snapshot, &tables[0], &ranges).await.len(), 2000);
    // Statistics of a tiny table.
    database.run("DELETE FROM t WHERE id > 10").await;
    database.run("VACUUM ANALYZE t").await;
    database.run(&format!("{fill}(11, 4000) i")).await;
    let snapshot = alone(&source).await.snapshot().await.unwrap();
    for rows in [1, 10, 1000, 1_000_000] {
        let ranges = snapshot.ranges(&tables[0], rows);
        assert_eq!(lines(&snapshot, &tables[0], &ranges).await.len(), 4000);
    }
    // Planned larger than it is now.
    let tables = mapped(&source, &[("t", &[])]).await;
    database.run("DELETE FROM t WHERE id > 10").await;
    database.run("VACUUM t").await;
    let snapshot = alone(&source).await.snapshot().await.unwrap();
    assert_eq!(lines(&snapshot, &tables[0], &snapshot.ranges(&tables[0], 100)).await.len(), 10);
}

async fn partitioned_tables_are_copied_through_their_root(major: u32) {
    let database = Database::new(
        major,
        "partitioned",
        "CREATE TABLE root(id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
         CREATE TABLE p1 PARTITION OF root FOR VALUES FROM (0) TO (100);
         CREATE TABLE p2(v text, gone int, id int NOT NULL); ALTER TABLE p2 DROP COLUMN gone; ALTER TABLE root ATTACH PARTITION p2 FOR VALUES FROM (100) TO (200);
         INSERT INTO root SELECT i, 'v' || i FROM generate_series(0, 199) i;
         CREATE TABLE parent(id int PRIMARY KEY); CREATE TABLE child(PRIMARY KEY (id)) INHERITS (parent); INSERT INTO parent VALUES (1); INSERT INTO child VALUES (2)",
    )
    .await;
    let source = database.source();
    let tables = mapped(&source, &[("parent", &[]), ("root", &[])]).await;
    let snapshot = alone(&source).await.snapshot().await.unwrap();
    database.run("DELETE FROM root WHERE id % 2 = 0").await;
    let ranges = snapshot.ranges(&tables[1], 10);
    assert_eq!(ranges, [Range { number: 0, blocks: None }]);
    let expected = oracle(&database, snapshot.name(), "SELECT concat_ws(E'\\t', id, v) FROM root").await;
    assert_eq!(lines(&snapshot, &tables[1], &ranges).await, expected);
    assert_eq!(expected.len(), 200);
    assert_eq!(lines(&snapshot, &tables[0], &ranges).await, ["1"], "rows of tables that inherit are their own");
    // Another partition than the snapshot knows.
    database.run("CREATE TABLE p3(id int PRIMARY KEY, v text); INSERT INTO p3 VALUES (300, 'x'); ALTER TABLE root ATTACH PARTITION p3 FOR VALUES FROM (300) TO (400)").await;
    assert_eq!(read(&snapshot, &tables[1], &ranges[0], BulkFormat::PostgresText).await.unwrap_err().reason, reason::SNAPSHOT_LOST);
    let snapshot = alone(&source).await.snapshot().await.unwrap();
    assert_eq!(lines(&snapshot, &tables[1], &ranges).await.len(), 101);
    database.run("TRUNCATE p1").await;
    assert_eq!(read(&snapshot, &tables[1], &ranges[0], BulkFormat::PostgresText).await.unwrap_err().reason, reason::SNAPSHOT_LOST);
}

async fn names_are_quoted_and_excluded_columns_stay(major: u32) {
    let long = "Ü".repeat(31) + "x";
    assert_eq!(long.len(), 63);
    let database = Database::new(
        major,
        "quoted",
        &format!(
            r#"CREATE TABLE "{long}"("select" int PRIMARY KEY, "it's ""quoted""" text, "{long}" text, double int GENERATED ALWAYS AS (1) STORED);
               INSERT INTO "{long}" VALUES (1, 'tab	and \ and ''', 'hidden-secret'), (2, NULL, 'hidden-secret')"#
        ),
    )
    .await;
    let source = database.source();
    let excluded: &[&str] = if major < 15 { &[] } else { &[&long] };
    let table = mapped(&source, &[(&long, excluded)]).await.remove(0);
    alone(&source).await.publish(std::slice::from_ref(&table), &[]).await.unwrap();
    let snapshot = alone(&source).await.snapshot().await.unwrap();
    let open = Range { number: 0, blocks: Some((0, u64::MAX)) };
    for range in [Range { number: 0, blocks: None }, open] {
        let text = lines(&snapshot, &table, std::slice::from_ref(&range)).await;
        let binary = read(&snapshot, &table, &range, BulkFormat::PostgresBinary).await.unwrap();
        assert!(binary.starts_with(b"PGCOPY\n\xff\r\n\0") && binary.ends_with(&[0xff, 0xff]), "a whole file");
        let secret = b"hidden-secret";
        if major < 15 {
            assert_eq!(text, ["1\ttab\\tand \\\\ and '\thidden-secret", "2\t\\N\thidden-secret"]);
        } else {
            assert_eq!(text, ["1\ttab\\tand \\\\ and '", "2\t\\N"]);
            assert!(!binary.windows(secret.len()).any(|window| window == secret));
        }
    }
}

async fn pieces_are_large_and_sessions_are_used_again(major: u32) {
    use futures::TryStreamExt as _;
    let database = Database::new(
        major,
        "pieces",
        "CREATE TABLE t(id int PRIMARY KEY, v text); INSERT INTO t SELECT i, repeat('x', 100) FROM generate_series(1, 5000) i;
         INSERT INTO t VALUES (0, repeat('y', 200000))",
    )
    .await;
    let source = database.source();
    let table = mapped(&source, &[("t", &[])]).await.remove(0);
    let snapshot = alone(&source).await.snapshot().await.unwrap();
    let whole = Range { number: 0, blocks: None };
    let sessions = "SELECT count(*)::text FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'";
    let mut counts = Vec::new();
    for _ in 0..3 {
        let pieces: Vec<bytes::Bytes> =
            snapshot.read(&table, &whole, BulkFormat::PostgresBinary).await.unwrap().try_collect().await.unwrap();
        assert!(pieces[..pieces.len() - 1].iter().all(|piece| piece.len() >= 64 * 1024), "all but the last");
        counts.push(database.text(sessions).await);
    }
    assert!(counts.iter().all(|count| *count == counts[0]), "{counts:?}");
    // Between ranges nothing is locked, so that users may change their tables.
    database.run("BEGIN; SET LOCAL lock_timeout = '1s'; LOCK TABLE t; COMMIT").await;
    // A stream that is dropped half-way ends its session and nothing else.
    let mut stream = snapshot.read(&table, &whole, BulkFormat::PostgresBinary).await.unwrap();
    assert!(stream.try_next().await.unwrap().is_some());
    drop(stream);
    assert_eq!(lines(&snapshot, &table, &[whole]).await.len(), 5001);
    snapshot.close().await;
    let holders = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'";
    eventually(5, "the snapshot is over", async || database.admin.query(holders, &[]).await.unwrap().is_empty()).await;
}

async fn a_rewritten_table_ends_the_snapshot(major: u32) {
    let database = Database::new(
        major,
        "rewritten",
        "CREATE TABLE t(id int PRIMARY KEY, v text); INSERT INTO t SELECT i, 'x' FROM generate_series(1, 1000) i; CREATE TABLE other(id int PRIMARY KEY)",
    )
    .await;
    let source = database.source();
    for change in [
        "VACUUM FULL t",
        "TRUNCATE t",
        "ALTER TABLE t ALTER COLUMN v TYPE varchar(5)",
        "ALTER TABLE t ADD COLUMN n uuid DEFAULT gen_random_uuid()",
        "ALTER TABLE t RENAME TO u; CREATE TABLE t(id int PRIMARY KEY, v text, n uuid)",
    ] {
        let tables = mapped(&source, &[("other", &[]), ("t", &[])]).await;
        let snapshot = alone(&source).await.snapshot().await.unwrap();
        let first = Range { number: 0, blocks: Some((0, 2)) };
        read(&snapshot, &tables[1], &first, BulkFormat::PostgresText).await.unwrap();
        database.run(change).await;
        let second = Range { number: 1, blocks: Some((2, u64::MAX)) };
        let error = read(&snapshot, &tables[1], &second, BulkFormat::PostgresText).await.expect_err(change);
        assert_eq!((error.reason, error.class), (reason::SNAPSHOT_LOST, Class::Retry), "{change}: {error}");
        assert_eq!(lines(&snapshot, &tables[0], &[Range { number: 0, blocks: None }]).await.len(), 0, "other tables go on");
    }
}

async fn a_dead_holder_ends_the_snapshot(major: u32) {
    let database = Database::new(major, "dead", "CREATE TABLE t(id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
    let source = database.source();
    let table = mapped(&source, &[("t", &[])]).await.remove(0);
    let snapshot = alone(&source).await.create_log().await.unwrap();
    let whole = Range { number: 0, blocks: None };
    read(&snapshot, &table, &whole, BulkFormat::PostgresText).await.unwrap();
    let kill =
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'";
    assert_eq!(database.admin.query(kill, &[]).await.unwrap().len(), 1);
    eventually(5, "reads fail", async || match read(&snapshot, &table, &whole, BulkFormat::PostgresText).await {
        Ok(_) => false,
        Err(error) => {
            assert_eq!((error.reason, error.class), (reason::SNAPSHOT_LOST, Class::Retry), "{error}");
            true
        }
    })
    .await;
    alone(&source).await.drop_log().await.unwrap();
}
