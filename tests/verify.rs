//! Verification beside a running stream: what is equal is found equal however it is written meanwhile, and what was spoilt is found,
//! all of it and nothing else.

mod support;
#[path = "support/worker.rs"]
mod worker;

use sluice::connectors::postgres::compare::PostgresCompare;
use sluice::connectors::postgres::connect::Side;
use sluice::connectors::postgres::source::PostgresSource;
use sluice::engine::error::Result;
use sluice::engine::roles::{Selection, Source as _, TableSelection};
use sluice::engine::table::{MappedTable, QualifiedName};
use sluice::engine::verify::{Difference, Found, Passes, verify};
use sluice::worker::contract::{DifferentRow, RequestReport, RequestSpec, Status, Verification};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use support::Postgres;
use tokio_postgres::Client;
use worker::Worker;

/// A mirror of some tables, streaming.
struct Stage {
    source: Postgres,
    target: Postgres,
    left: Client,
    right: Client,
    worker: Worker,
}

impl Stage {
    /// `there`: what is on the target before.
    async fn new(majors: (u32, u32), tables: &[&str], here: &str, there: &str) -> Self {
        let (source, target) = (Postgres::start(majors.0), Postgres::start(majors.1));
        let (left, right) = (source.create_database("shop").await, target.create_database("dw").await);
        left.batch_execute(here).await.expect("tables");
        right.batch_execute(there).await.expect("tables");
        let worker = Worker::start((&source, "shop"), (&target, "dw"), tables);
        worker.wait_streaming().await;
        Self { source, target, left, right, worker }
    }

    async fn mapped(&self, name: &str) -> MappedTable {
        let source = PostgresSource::new(self.source.endpoint("shop"), "sluice_test", "sluice_test");
        source.identity().await.expect("a server");
        let table = TableSelection {
            source: QualifiedName::new("public", name),
            target: QualifiedName::new("public", name),
            exclude_columns: Vec::new(),
            accept_narrower_types: false,
        };
        source.tables(&Selection::Tables(vec![table])).await.expect("a table").remove(0)
    }

    async fn verify(&self, name: &str) -> Found {
        let table = self.mapped(name).await;
        let source = PostgresCompare::new(self.source.endpoint("shop"), Side::Source);
        let target = PostgresCompare::new(self.target.endpoint("dw"), Side::Target);
        verify(&source, &target, &table, self).await.expect("a verdict")
    }

    /// Something that only the target gets.
    async fn spoil(&self, sql: &str) {
        self.right.batch_execute(sql).await.expect("the target takes it");
    }
}

impl Passes for Stage {
    async fn passed(&self) -> Result<()> {
        self.worker.wait_level(&self.left).await;
        Ok(())
    }
}

fn key(values: &[&str]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

fn expect(found: &Found, rows: u64, differences: &[(&[&str], Difference)]) {
    let expected: BTreeMap<Vec<String>, Difference> = differences.iter().map(|(name, difference)| (key(name), *difference)).collect();
    assert_eq!(found.differences, expected);
    assert_eq!((found.rows, found.undecided, found.more), (rows, 0, false));
}

const ITEMS: &str = "CREATE TABLE items (id bigint PRIMARY KEY, name text, price numeric, at timestamptz, tags text[], ratio float8);
    INSERT INTO items SELECT g, CASE g % 3 WHEN 0 THEN NULL WHEN 1 THEN '' ELSE md5(g::text) END, g / 100.0, now(), ARRAY['a', g::text], g / 7.0
    FROM generate_series(1, 20000) g";

#[tokio::test(flavor = "multi_thread")]
async fn what_was_spoilt_is_found_and_nothing_else() {
    let stage = Stage::new((14, 17), &["items"], ITEMS, "").await;
    expect(&stage.verify("items").await, 20000, &[]);
    stage.spoil("DELETE FROM items WHERE id = 77").await;
    stage.spoil("UPDATE items SET name = '' WHERE id = 3").await;
    stage.spoil("UPDATE items SET price = 1.0 WHERE id = 100").await;
    stage.spoil("UPDATE items SET tags = ARRAY['a', NULL] WHERE id = 19999").await;
    stage.spoil("INSERT INTO items VALUES (-5, 'only here')").await;
    expect(
        &stage.verify("items").await,
        20000,
        &[
            (&["77"], Difference::Missing),
            (&["3"], Difference::Other),
            (&["100"], Difference::Other),
            (&["19999"], Difference::Other),
            (&["-5"], Difference::Unexpected),
        ],
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn writing_meanwhile_is_no_difference() {
    let stage = Stage::new((15, 15), &["items"], ITEMS, "").await;
    let stop = Arc::new(AtomicBool::new(false));
    // Rows above 1,000 are changed without pause, come and go; those below stand still.
    let mut writers = Vec::new();
    for writer in 0..2 {
        let (client, told) = (stage.source.connect("shop").await, Arc::clone(&stop));
        writers.push(tokio::spawn(async move {
            let mut transactions = 0;
            let mut pace = tokio::time::interval(Duration::from_millis(10));
            for round in (0i64..).take_while(|_| !told.load(Ordering::Relaxed)) {
                pace.tick().await;
                let id = 1001 + (round * 7919 + writer * 31) % 19000;
                let sql = format!(
                    "UPDATE items SET price = price + 1, name = md5(random()::text) WHERE id BETWEEN {id} AND {id} + 20;
                     DELETE FROM items WHERE id = {id}; INSERT INTO items VALUES ({id}, 'again', {round}, now())
                     ON CONFLICT DO NOTHING; INSERT INTO items VALUES ({}, 'new') ON CONFLICT DO NOTHING",
                    100_000 + round * 2 + writer
                );
                // The writers may be in each other's way.
                transactions += i64::from(client.batch_execute(&sql).await.is_ok());
            }
            transactions
        }));
    }
    for spoilt in 0..3 {
        let found = stage.verify("items").await;
        let expected: BTreeMap<_, _> = (0..spoilt).map(|id| (key(&[&(id + 1).to_string()]), Difference::Missing)).collect();
        assert_eq!(found.differences, expected, "{found:?}");
        assert!(!found.more);
        stage.spoil(&format!("DELETE FROM items WHERE id = {}", spoilt + 1)).await;
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        assert!(writer.await.expect("the writer has not failed") > 100);
    }
    stage.worker.wait_level(&stage.left).await;
    let rows: i64 = stage.left.query_one("SELECT count(*) FROM items", &[]).await.expect("a count").get(0);
    let missing = |id| (id, Difference::Missing);
    expect(&stage.verify("items").await, rows.unsigned_abs(), &[missing(&["1"] as &[&str]), missing(&["2"]), missing(&["3"])]);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_without_names_are_counted() {
    let here = "CREATE TABLE log (what text, n int); ALTER TABLE log REPLICA IDENTITY FULL;
        INSERT INTO log SELECT 'line ' || g % 500, g % 7 FROM generate_series(1, 5000) g";
    let stage = Stage::new((17, 14), &["log"], here, "").await;
    expect(&stage.verify("log").await, 5000, &[]);
    stage.spoil("DELETE FROM log WHERE ctid = (SELECT min(ctid) FROM log WHERE what = 'line 5')").await;
    stage.spoil("INSERT INTO log VALUES ('only here', NULL)").await;
    let found = stage.verify("log").await;
    let kinds: Vec<Difference> = found.differences.values().copied().collect();
    assert!(kinds.len() == 2 && kinds.contains(&Difference::Other) && kinds.contains(&Difference::Unexpected), "{found:?}");
    assert_eq!((found.rows, found.undecided, found.more), (5000, 0, false));
}

/// Another order of columns, another collation, partitions on one side, keys of several columns.
#[tokio::test(flavor = "multi_thread")]
async fn sides_may_be_built_otherwise() {
    let here = r#"CREATE TABLE "Orders" (region text, n int, "At" date, note varchar(40), PRIMARY KEY (region, n));
        INSERT INTO "Orders" SELECT chr(65 + g % 50) || '''" ,', g, date '2026-01-01' + g % 90, 'note ' || g FROM generate_series(1, 3000) g"#;
    let there = r#"CREATE TABLE "Orders" (note varchar(40), n int, region text COLLATE "C", "At" date, ours int DEFAULT 4, PRIMARY KEY (n, region))
            PARTITION BY RANGE (n);
        CREATE TABLE low PARTITION OF "Orders" FOR VALUES FROM (MINVALUE) TO (1000);
        CREATE TABLE high PARTITION OF "Orders" FOR VALUES FROM (1000) TO (MAXVALUE)"#;
    let stage = Stage::new((17, 17), &["Orders"], here, there).await;
    expect(&stage.verify("Orders").await, 3000, &[]);
    stage.spoil(r#"UPDATE "Orders" SET note = 'other' WHERE n = 1500; DELETE FROM "Orders" WHERE n = 40"#).await;
    let (other, gone) = (region(1500), region(40));
    expect(
        &stage.verify("Orders").await,
        3000,
        &[(&[other.as_str(), "1500"], Difference::Other), (&[gone.as_str(), "40"], Difference::Missing)],
    );
}

fn region(n: u32) -> String {
    format!("{}'\" ,", char::from(u8::try_from(65 + n % 50).expect("a letter")))
}

/// Far more rows than are fetched at a time, and more differences than are looked at.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_all_other_is_told_in_bounded_steps() {
    let here = "CREATE TABLE big (id int PRIMARY KEY, n int); INSERT INTO big SELECT g, g FROM generate_series(1, 300000) g";
    let stage = Stage::new((17, 17), &["big"], here, "").await;
    stage.spoil("UPDATE big SET n = n + 1 WHERE id % 100 = 0").await;
    let found = stage.verify("big").await;
    assert_eq!((found.rows, found.differences.len(), found.undecided, found.more), (300_000, 3000, 0, false));
    assert!(found.differences.iter().all(|(key, what)| key[0].ends_with("00") && *what == Difference::Other));
    stage.spoil("UPDATE big SET n = -1").await;
    let found = stage.verify("big").await;
    assert!(found.more && found.differences.len() >= 10_000, "{} differences", found.differences.len());
}

/// Asks a worker to verify, and waits for the end.
async fn asked(stage: &mut Stage, id: &str, tables: &[&str]) -> (RequestReport, Option<Verification>) {
    ask(stage, id, tables).await;
    let over = |status: &Status| of(status, id).is_some_and(|request| request.finished_at.is_some());
    stage.worker.wait_for(90, "the comparison is over", over).await;
    let status = stage.worker.status().await.expect("a status");
    (of(&status, id).expect("the request").clone(), status.verification)
}

async fn ask(stage: &mut Stage, id: &str, tables: &[&str]) {
    let request = RequestSpec { id: id.into(), action: "Verify".into(), tables: tables.iter().map(ToString::to_string).collect() };
    stage.worker.change(|desired| desired.request = Some(request)).await;
}

fn of<'a>(status: &'a Status, id: &str) -> Option<&'a RequestReport> {
    status.requests.as_ref()?.iter().find(|request| request.id == id)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_verifies_when_it_is_asked() {
    let here = format!("{ITEMS}; CREATE TABLE notes (id int PRIMARY KEY, note text); INSERT INTO notes VALUES (1, 'one'), (2, 'two')");
    let mut stage = Stage::new((17, 17), &["items", "notes"], &here, "").await;
    let (request, verification) = asked(&mut stage, "first", &[]).await;
    assert_eq!((request.state.as_str(), request.message.as_str()), ("Succeeded", "20002 rows of 2 tables were compared: none differs"));
    let verification = verification.expect("a result");
    assert_eq!((verification.tables, verification.of, verification.rows, verification.differences), (2, 2, 20002, 0));

    stage.spoil("DELETE FROM notes WHERE id = 2; DELETE FROM items WHERE id = 9").await;
    let (request, verification) = asked(&mut stage, "second", &["notes"]).await;
    let told = "2 rows of 1 tables were compared: 1 differ, the first is public.notes (2): Missing";
    assert_eq!((request.state.as_str(), request.message.as_str()), ("Succeeded", told));
    let verification = verification.expect("a result");
    let expected = DifferentRow { table: "public.notes".into(), key: vec!["2".into()], difference: "Missing".into() };
    assert_eq!((verification.request.as_str(), verification.examples.as_slice()), ("second", [expected].as_slice()));

    let (request, _) = asked(&mut stage, "third", &["nowhere"]).await;
    assert_eq!(request.state, "Failed");
    assert!(request.message.contains("nowhere"), "{}", request.message);
}

/// What was asked for is done by whoever is there next.
#[tokio::test(flavor = "multi_thread")]
async fn a_comparison_begins_anew_after_a_crash() {
    let mut stage = Stage::new((15, 17), &["items"], ITEMS, "").await;
    stage.spoil("UPDATE items SET price = 0 WHERE id = 9").await;
    // It waits for the lock, so it is under way when the worker is killed.
    stage.right.batch_execute("BEGIN; LOCK TABLE items IN ACCESS EXCLUSIVE MODE").await.expect("a lock");
    ask(&mut stage, "crash", &[]).await;
    let looks = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'sluice verify' AND wait_event_type = 'Lock')";
    worker::wait_sql(&stage.target.connect("dw").await, 60, looks).await;
    stage.worker.kill9();
    stage.right.batch_execute("COMMIT").await.expect("a commit");
    stage.worker.spawn();
    let over = |status: &Status| of(status, "crash").is_some_and(|request| request.finished_at.is_some());
    stage.worker.wait_for(90, "the comparison is over", over).await;
    let status = stage.worker.status().await.expect("a status");
    assert_eq!(of(&status, "crash").expect("the request").state, "Succeeded");
    let examples = status.verification.expect("a result").examples;
    assert_eq!(examples.iter().map(|row| (row.key.join(","), row.difference.as_str())).collect::<Vec<_>>(), [("9".to_owned(), "Other")]);
}
