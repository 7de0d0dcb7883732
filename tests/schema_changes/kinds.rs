//! Each kind of change, at each time: in the stream, inside a transaction with rows before and after it, while the worker is down,
//! several of them at a time, and during the copy.

use super::Pair;
use crate::worker::Worker;

/// A change of table `t`, and what is written behind it besides what is written anyway.
struct Kind {
    table: &'static str,
    alter: &'static str,
    after: &'static str,
}

const fn kind(table: &'static str, alter: &'static str, after: &'static str) -> Kind {
    Kind { table, alter, after }
}

const KINDS: [Kind; 20] = [
    kind("added", "ADD COLUMN n int", "UPDATE t SET n = id WHERE id < 5"),
    kind("added_with_default", r"ADD COLUMN n text DEFAULT 'it''s \ one'", "UPDATE t SET n = 'other' WHERE id = 3"),
    kind("added_not_null", "ADD COLUMN n timestamptz NOT NULL DEFAULT now()", "UPDATE t SET n = '2000-01-01' WHERE id = 3"),
    kind(
        "added_array",
        "ADD COLUMN n int[] DEFAULT '{1,NULL,3}', ADD COLUMN m text[] DEFAULT ARRAY['a b', 'c\"']",
        "UPDATE t SET n = '{}' WHERE id = 3",
    ),
    kind(
        "default_then_none",
        "ADD COLUMN n int DEFAULT 5; ALTER TABLE t ALTER COLUMN n DROP DEFAULT",
        "UPDATE t SET n = NULL WHERE id = 3",
    ),
    kind("dropped", "DROP COLUMN spare", ""),
    kind(
        "dropped_and_added_with_another_type",
        "DROP COLUMN spare; ALTER TABLE t ADD COLUMN spare int DEFAULT 3",
        "UPDATE t SET spare = 7 WHERE id = 4",
    ),
    kind("renamed", r#"RENAME COLUMN spare TO "New Name""#, r#"UPDATE t SET "New Name" = 'x' WHERE id = 4"#),
    kind(
        "swapped",
        "RENAME COLUMN spare TO x; ALTER TABLE t RENAME COLUMN other TO spare; ALTER TABLE t RENAME COLUMN x TO other",
        "UPDATE t SET other = 'x', spare = 'y' WHERE id = 4",
    ),
    kind("key_renamed", "RENAME COLUMN id TO number; ALTER TABLE t ADD COLUMN id int", ""),
    kind("widened", "ALTER COLUMN small TYPE bigint", "UPDATE t SET small = 5000000000 WHERE id = 4"),
    kind("key_widened", "ALTER COLUMN id TYPE bigint", ""),
    kind("grown", "ALTER COLUMN short TYPE varchar(40)", "UPDATE t SET short = repeat('x', 40) WHERE id = 4"),
    kind("unbounded", "ALTER COLUMN short TYPE text", "UPDATE t SET short = repeat('x', 400) WHERE id = 4"),
    kind("more_digits", "ALTER COLUMN money TYPE numeric(14, 4)", "UPDATE t SET money = 1234567890.1234 WHERE id = 4"),
    kind("number_to_text", "ALTER COLUMN small TYPE text", "UPDATE t SET small = 'many' WHERE id = 4"),
    kind("nullable", "ALTER COLUMN strict DROP NOT NULL", "UPDATE t SET strict = NULL WHERE id < 9"),
    kind("strict", "ALTER COLUMN other SET NOT NULL", "UPDATE t SET other = 'x' WHERE id < 9"),
    kind("computed", "ADD COLUMN twice int GENERATED ALWAYS AS (small * 2) STORED", "UPDATE t SET small = 9 WHERE id = 4"),
    kind("another_key", "DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (strict, id)", "UPDATE t SET strict = strict || '!' WHERE id < 9"),
];

impl Kind {
    /// A statement about the kind's own table.
    fn sql(&self, text: &str) -> String {
        text.replace("TABLE t ", &format!("TABLE {} ", self.table))
            .replace("UPDATE t ", &format!("UPDATE {} ", self.table))
            .replace("t_pkey", &format!("{}_pkey", self.table))
    }

    fn alter(&self) -> String {
        self.sql(&format!("ALTER TABLE t {}", self.alter))
    }

    fn create(&self, rows: u32) -> String {
        let table = self.table;
        format!(
            "CREATE TABLE {table} (id int PRIMARY KEY, small int, short varchar(10), money numeric(6,2), strict text NOT NULL, spare text, other text);
             INSERT INTO {table} SELECT g, g, 's' || g % 1000, g % 1000 / 7.0, 'strict ' || g, 'spare ' || g, 'other ' || g FROM generate_series(1, {rows}) g;"
        )
    }

    /// Rows come, change and go, whatever the table's other columns are. `n` is another one each time.
    fn write(&self, n: u32) -> String {
        let (table, key) = (self.table, if self.table == "key_renamed" && n > 1 { "number" } else { "id" });
        let from = 1_000_000 * n;
        format!(
            "INSERT INTO {table} ({key}, short, strict, other) SELECT g, 'new', 'new ' || g, 'new' FROM generate_series({from}, {from} + 5) g;
             UPDATE {table} SET money = {n} WHERE {key} IN (10, 11, {from});
             DELETE FROM {table} WHERE {key} IN (20 + {n}, {from} + 1);"
        )
    }
}

fn tables() -> Vec<&'static str> {
    KINDS.iter().map(|kind| kind.table).collect()
}

async fn start(pair: &Pair) -> Worker {
    for kind in &KINDS {
        pair.left(&kind.create(60)).await;
    }
    let worker = pair.worker(&tables());
    worker.wait_streaming().await;
    worker
}

async fn compare(pair: &Pair, worker: &Worker) {
    worker.wait_level(&pair.left).await;
    for table in tables() {
        pair.assert_equal(table).await;
    }
}

async fn in_the_stream(major: u32) {
    let pair = Pair::start(major).await;
    let worker = start(&pair).await;
    for kind in &KINDS {
        pair.left(&kind.write(1)).await;
        pair.left(&kind.alter()).await;
        pair.left(&kind.write(2)).await;
        pair.left(&kind.sql(kind.after)).await;
    }
    compare(&pair, &worker).await;
    // No table was copied again, and what has been followed is what a new worker begins with.
    let copied = pair.right.query_one("SELECT max(generation), count(DISTINCT state) FROM _sluice.tables", &[]).await.unwrap();
    assert_eq!((copied.get::<_, i64>(0), copied.get::<_, i64>(1)), (1, 1));
    drop(worker);
    let worker = pair.worker(&tables());
    for kind in &KINDS {
        pair.left(&kind.write(3)).await;
    }
    compare(&pair, &worker).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_followed_in_the_stream_from_postgres_14() {
    in_the_stream(14).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_followed_in_the_stream_from_postgres_15() {
    in_the_stream(15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_followed_in_the_stream_from_postgres_17() {
    in_the_stream(17).await;
}

async fn in_a_transaction(major: u32, rows: u32) {
    let pair = Pair::start(major).await;
    let worker = start(&pair).await;
    for kind in &KINDS {
        let (table, key) = (kind.table, if kind.table == "key_renamed" { "number" } else { "id" });
        let many = |key: &str, from: u32| {
            format!(
                "INSERT INTO {table} ({key}, strict, other) SELECT g, repeat('x', 100), 'many' FROM generate_series({from}, {from} + {rows}) g"
            )
        };
        let (before, after) = (many("id", 100_000), many(key, 200_000));
        let inside = [&kind.write(1), &before, &kind.alter(), &after, &kind.write(2), &kind.sql(kind.after)].map(String::as_str).join(";");
        pair.left(&format!("BEGIN; {inside}; COMMIT")).await;
    }
    compare(&pair, &worker).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_inside_a_transaction_are_followed_from_postgres_14() {
    in_a_transaction(14, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_inside_a_transaction_are_followed_from_postgres_17() {
    in_a_transaction(17, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_inside_a_transaction_that_is_sent_before_its_end_are_followed() {
    in_a_transaction(17, 3000).await;
}

async fn while_the_worker_is_down(major: u32) {
    let pair = Pair::start(major).await;
    let mut worker = start(&pair).await;
    worker.kill9();
    for kind in &KINDS {
        pair.left(&kind.write(1)).await;
        pair.left(&kind.alter()).await;
        pair.left(&kind.write(2)).await;
        pair.left(&kind.sql(kind.after)).await;
    }
    worker.spawn();
    compare(&pair, &worker).await;
    let generation: i64 = pair.right.query_one("SELECT max(generation) FROM _sluice.tables", &[]).await.unwrap().get(0);
    assert_eq!(generation, 1, "no table was copied again");
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_while_the_worker_is_down_are_followed_from_postgres_14() {
    while_the_worker_is_down(14).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_while_the_worker_is_down_are_followed_from_postgres_17() {
    while_the_worker_is_down(17).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_that_follow_one_another_are_followed_when_the_catalog_is_far_ahead() {
    let pair = Pair::start(15).await;
    pair.left(
        "CREATE TABLE t (id int PRIMARY KEY, a int, b text); INSERT INTO t SELECT g, g, 'b' || g FROM generate_series(1, 50) g;
         CREATE TABLE quiet (id int PRIMARY KEY, a int); INSERT INTO quiet SELECT g, g FROM generate_series(1, 50) g",
    )
    .await;
    let mut worker = pair.worker(&["t", "quiet"]);
    worker.wait_streaming().await;
    worker.kill9();
    for sql in [
        "UPDATE t SET a = 0 WHERE id = 1",
        "ALTER TABLE t ADD COLUMN c int DEFAULT 7",
        "INSERT INTO t VALUES (101, 1, 'x', 8)",
        "ALTER TABLE t RENAME COLUMN b TO beta",
        "INSERT INTO t VALUES (102, 1, 'x', NULL)",
        "ALTER TABLE t ALTER COLUMN a TYPE bigint",
        "INSERT INTO t VALUES (103, 5000000000, 'x', 9)",
        "ALTER TABLE t DROP COLUMN c",
        "INSERT INTO t VALUES (104, 1, 'x')",
        "ALTER TABLE t ADD COLUMN d text DEFAULT 'd'",
        "UPDATE t SET d = 'e' WHERE id = 101",
        "ALTER TABLE t RENAME COLUMN beta TO b2",
        "UPDATE t SET b2 = 'f' WHERE id = 102",
        "ALTER TABLE t ALTER COLUMN d SET NOT NULL",
        "DELETE FROM t WHERE id = 103",
        // Of this one nothing comes for long.
        "ALTER TABLE quiet ADD COLUMN b int DEFAULT 3",
    ] {
        pair.left(sql).await;
    }
    worker.spawn();
    worker.wait_level(&pair.left).await;
    pair.assert_equal("t").await;
    worker.kill9();
    worker.spawn();
    worker.wait_streaming().await;
    pair.left("UPDATE quiet SET a = 0 WHERE id = 1").await;
    worker.wait_level(&pair.left).await;
    pair.assert_equal("quiet").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_during_the_copy_are_followed() {
    for round in 0..3 {
        let pair = Pair::start(15).await;
        for kind in &KINDS {
            pair.left(&kind.create(3000)).await;
        }
        let worker = pair.worker(&tables());
        // At another stage of the copy each time.
        let begun = format!("SELECT count(*) > {} FROM _sluice.tables", round * 8);
        crate::worker::wait_sql(&pair.right, 60, &begun).await;
        for kind in &KINDS {
            pair.left(&kind.write(1)).await;
            pair.left(&kind.alter()).await;
            pair.left(&kind.write(2)).await;
            pair.left(&kind.sql(kind.after)).await;
        }
        compare(&pair, &worker).await;
    }
}
