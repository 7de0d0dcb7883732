//! Tables made, copied and finished.

use super::*;
use sluice::engine::register::Register as _;

fn binary_rows(ids: std::ops::Range<i32>) -> Vec<u8> {
    let mut bytes = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0".to_vec();
    for id in ids {
        bytes.extend(2i16.to_be_bytes());
        bytes.extend(4i32.to_be_bytes());
        bytes.extend(id.to_be_bytes());
        let value = format!("row {id}");
        bytes.extend((value.len() as i32).to_be_bytes());
        bytes.extend(value.bytes());
    }
    bytes.extend((-1i16).to_be_bytes());
    bytes
}

#[tokio::test]
async fn a_table_is_made_copied_and_finished() {
    let server = server();
    let (admin, _) = database(&server, "copies").await;
    let mut items = items();
    let mut twice = column("twice int4");
    twice.generated = Some("id * 2".into());
    items.generated.push(twice);
    let target = target(server.endpoint("copies"));
    let (claimed, mut applier) = target.claim(&key("s"), &owner("a"), None).await.expect("a claim");
    applier.initialize(&Lsn(1), 1).await.expect("a checkpoint");

    let generation = applier.begin_copy(&items, &[], false).await.expect("a copy");
    assert_eq!(generation, 1);
    assert_eq!(target.bulk_format(&items).await.expect("a format"), BulkFormat::PostgresBinary);
    let pieces = |bytes: Vec<u8>, size: usize| -> BulkStream {
        futures::stream::iter(bytes.chunks(size).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect::<Vec<_>>()).boxed()
    };
    let load = |number, format, stream| {
        let (target, items, claim) = (target.clone(), items.clone(), claimed.claim.clone());
        async move { target.load(&claim, &items, generation, &Range { number, blocks: None }, format, stream).await }
    };
    let text_rows: Vec<u8> = (10_000..12_000).flat_map(|id| format!("{id}\trow {id}\n").into_bytes()).collect();
    let (a, b, c) = tokio::join!(
        load(0, BulkFormat::PostgresBinary, pieces(binary_rows(0..10_000), 37)),
        load(1, BulkFormat::PostgresText, pieces(text_rows, 100_000)),
        load(2, BulkFormat::PostgresBinary, pieces(binary_rows(0..0), 100)),
    );
    assert_eq!((a.expect("rows"), b.expect("rows"), c.expect("rows")), (10_000, 2_000, 0));
    let broken: BulkStream = futures::stream::iter([
        Ok(Bytes::from_static(b"20000\tx\n")),
        Err(sluice::engine::error::Error::retry(reason::SNAPSHOT_LOST, "gone")),
    ])
    .boxed();
    assert_eq!(load(3, BulkFormat::PostgresText, broken).await.expect_err("its error").reason, reason::SNAPSHOT_LOST);
    let mut done = applier.done_ranges(&items, generation).await.expect("ranges");
    done.sort_unstable();
    assert_eq!(done, [0, 1, 2]);
    applier.set_state(&items, TableState::Copied, None).await.expect("a state");
    for _ in 0..2 {
        target.finish(&claimed.claim, &items, &[], BUILDERS, &|_| ()).await.expect("finished");
    }
    let keys =
        admin.query("SELECT conname, contype::text FROM pg_constraint WHERE conrelid = 'shop.items'::regclass", &[]).await.expect("keys");
    assert_eq!(keys.iter().map(|row| (row.get(0), row.get(1))).collect::<Vec<(&str, &str)>>(), [("items_pkey", "p")]);
    let row = admin
        .query_one(
            "SELECT count(*), sum(twice), (SELECT reltuples::int8 FROM pg_class WHERE oid = 'shop.items'::regclass) FROM shop.items",
            &[],
        )
        .await
        .expect("sums");
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1), row.get::<_, i64>(2)), (12_000, 143_988_000, 12_000));

    // Interrupted before it was ready: its rows are its own, and go.
    let again = applier.begin_copy(&items, &[], false).await.expect("another copy");
    assert_eq!(again, 2);
    assert!(applier.done_ranges(&items, 2).await.expect("ranges").is_empty());
    assert!(rows(&admin, "shop.items").await.is_empty());
    let stale = load(4, BulkFormat::PostgresBinary, pieces(binary_rows(0..5), 100)).await.expect_err("of the first generation");
    assert_eq!(stale.class, Class::Bug);
    assert!(rows(&admin, "shop.items").await.is_empty());

    // Ready: only by the user's word.
    applier.set_state(&items, TableState::Ready, None).await.expect("a state");
    admin.batch_execute("INSERT INTO shop.items VALUES (1, 'x')").await.expect("a row");
    let error = applier.begin_copy(&items, &[], false).await.expect_err("not empty");
    assert_eq!((error.class, error.reason), (Class::Stop, reason::TARGET_TABLE_NOT_EMPTY));
    assert_eq!(applier.begin_copy(&items, &[], true).await.expect("emptied"), 3);
    applier.forget(&[items.source().clone()]).await.expect("forgotten");
    admin.batch_execute("INSERT INTO shop.items VALUES (1, 'x')").await.expect("a row");
    assert_eq!(applier.begin_copy(&items, &[], false).await.expect_err("not its own").reason, reason::TARGET_TABLE_NOT_EMPTY);
    let left: i64 = admin.query_one("SELECT count(*) FROM _sluice.tables", &[]).await.expect("a count").get(0);
    assert_eq!(left, 0);
}

/// Target tables with foreign keys, in a schema of their own: `child` refers to `parent`, both partitioned ones and itself.
async fn family(admin: &Client) -> [MappedTable; 3] {
    admin
        .batch_execute(
            "CREATE SCHEMA shop; CREATE TABLE shop.parent (id int4 PRIMARY KEY, v text) PARTITION BY RANGE (id);
             CREATE TABLE shop.parent_1 PARTITION OF shop.parent FOR VALUES FROM (MINVALUE) TO (MAXVALUE);
             CREATE TABLE shop.child (id int4 PRIMARY KEY, v text, parent int4 DEFAULT 1 REFERENCES shop.parent, child int4 REFERENCES shop.child);
             CREATE TABLE shop.grandchild (id int4 PRIMARY KEY, v text, child int4 DEFAULT 2 REFERENCES shop.child);
             CREATE TABLE shop.stranger (parent int4 REFERENCES shop.parent_1 ON DELETE CASCADE)",
        )
        .await
        .expect("tables");
    [(1, "parent"), (2, "child"), (3, "grandchild")].map(|(id, name)| mapped(id, name, "shop", &["!id int4", "v text"]))
}

async fn fill(admin: &Client) {
    let sql =
        "INSERT INTO shop.parent VALUES (1, 'p') ON CONFLICT DO NOTHING; INSERT INTO shop.child VALUES (2, 'c') ON CONFLICT DO NOTHING;
        INSERT INTO shop.grandchild VALUES (3, 'g') ON CONFLICT DO NOTHING";
    admin.batch_execute(sql).await.expect("rows");
}

async fn counts(admin: &Client) -> [i64; 3] {
    let sql = "SELECT (SELECT count(*) FROM shop.parent), (SELECT count(*) FROM shop.child), (SELECT count(*) FROM shop.grandchild)";
    let row = admin.query_one(sql, &[]).await.expect("counts");
    [0, 1, 2].map(|column| row.get(column))
}

#[tokio::test]
async fn tables_that_refer_to_each_other_are_emptied_together_or_row_by_row() {
    let server = server();
    let (admin, _) = database(&server, "family").await;
    let tables = family(&admin).await;
    let [parent, child, grandchild] = &tables;
    let (_, mut applier) = target(server.endpoint("family")).claim(&key("s"), &owner("a"), None).await.expect("a claim");
    applier.initialize(&Lsn(1), 1).await.expect("a checkpoint");
    let states = "SELECT string_agg(source_table || ' ' || state || ' ' || generation, ', ' ORDER BY source_table) FROM _sluice.tables";

    // A stranger refers to the parent: not by TRUNCATE.
    fill(&admin).await;
    admin.batch_execute("INSERT INTO shop.stranger VALUES (1)").await.expect("a row");
    assert_eq!(applier.begin_copy(parent, &[child, grandchild], true).await.expect("emptied"), 1);
    assert_eq!(counts(&admin).await, [0, 1, 1], "each by itself");
    assert_eq!(rows(&admin, "shop.stranger").await.len(), 1, "no action fires");
    assert_eq!(applier.begin_copy(grandchild, &[child], true).await.expect("emptied"), 1);
    assert_eq!(counts(&admin).await, [0, 0, 0], "these two without the parent");
    admin.batch_execute("TRUNCATE shop.stranger; DROP TABLE shop.stranger").await.expect("gone");

    // All three in one go, whoever begins. Those that go along have begun, so that nobody takes them for what they were.
    for table in &tables {
        applier.set_state(table, TableState::Ready, None).await.expect("a state");
    }
    fill(&admin).await;
    let before = admin.query_one(states, &[]).await.expect("states").get::<_, String>(0);
    assert_eq!(before, "child Ready 1, grandchild Ready 1, parent Ready 1");
    let error = applier.begin_copy(child, &[parent, grandchild], false).await.expect_err("not its own");
    assert_eq!(error.reason, reason::TARGET_TABLE_NOT_EMPTY);
    assert_eq!(counts(&admin).await, [1, 1, 1]);
    assert_eq!(applier.begin_copy(child, &[grandchild, parent], true).await.expect("emptied"), 2);
    assert_eq!(counts(&admin).await, [0, 0, 0]);
    let after = admin.query_one(states, &[]).await.expect("states").get::<_, String>(0);
    assert_eq!(after, "child Copying 2, grandchild Copying 2, parent Copying 2");

    // Its rows were loaded while its parent had not begun: they stay.
    fill(&admin).await;
    assert_eq!(applier.begin_copy(parent, &[], false).await.expect("its own"), 3);
    assert_eq!(counts(&admin).await, [0, 1, 1]);
}

#[tokio::test]
async fn without_replica_role_who_refers_is_named() {
    let server = server();
    let (admin, writer) = database(&server, "relatives").await;
    let tables = family(&admin).await;
    let [parent, child, grandchild] = &tables;
    admin
        .batch_execute("GRANT ALL ON SCHEMA shop TO writer_relatives; GRANT ALL ON ALL TABLES IN SCHEMA shop TO writer_relatives")
        .await
        .expect("grants");
    let (_, mut applier) = target(writer).claim(&key("s"), &owner("a"), None).await.expect("a claim");
    assert_eq!(applier.mode(), ApplyMode::Ordered);
    applier.initialize(&Lsn(1), 1).await.expect("a checkpoint");
    fill(&admin).await;
    let error = applier.begin_copy(parent, &[child, grandchild], true).await.expect_err("refused");
    assert_eq!((error.class, error.reason), (Class::Stop, "TargetTableReferenced"), "{error}");
    assert!(error.message.contains("shop.stranger") && error.message.contains("GRANT SET ON PARAMETER"), "{error}");
    let (_, statement) = error.message.split_once("empty all of them: ").expect("a statement");
    admin.batch_execute(statement).await.expect("what people would run");
    applier.begin_copy(parent, &[child, grandchild], true).await.expect("empty already");
    // Without the stranger all three go together.
    admin.batch_execute("DROP TABLE shop.stranger").await.expect("gone");
    fill(&admin).await;
    applier.begin_copy(grandchild, &[child, parent], true).await.expect("emptied");
    assert_eq!(counts(&admin).await, [0, 0, 0]);
}
