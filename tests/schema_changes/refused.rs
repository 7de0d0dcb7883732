//! What can't be followed, or shall not be: the stream stops with what is needed, and goes on when that was done.

use super::Pair;
use crate::worker::Worker;
use sluice::worker::contract::TableSpec;

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, a int, b text); INSERT INTO t SELECT g, g, 'b' || g FROM generate_series(1, 50) g";

async fn message(worker: &Worker) -> String {
    worker.wait_reason("SchemaChanged").await.error.expect("an error").message
}

#[tokio::test(flavor = "multi_thread")]
async fn with_stop_the_statements_are_named_and_the_stream_goes_on_when_they_were_run() {
    let pair = Pair::start(15).await;
    pair.left(TABLE).await;
    let mut worker =
        Worker::start_with((&pair.source, "shop"), (&pair.target, "dw"), &["t"], |desired| desired.stop_at_schema_changes = true);
    worker.wait_streaming().await;
    for sql in
        ["UPDATE t SET a = 0 WHERE id = 1", "ALTER TABLE t ADD COLUMN c int DEFAULT 4, DROP COLUMN b", "UPDATE t SET c = 5 WHERE id = 2"]
    {
        pair.left(sql).await;
    }
    let message = message(&worker).await;
    let statements = message.split_once("the target needs: ").expect("statements").1;
    assert_eq!(
        statements,
        r#"ALTER TABLE "public"."t" DROP COLUMN "b"; ALTER TABLE "public"."t" ADD COLUMN "c" integer DEFAULT '4'::integer; ALTER TABLE "public"."t" ALTER COLUMN "c" DROP DEFAULT"#
    );
    let before = pair.right.query_one("SELECT a FROM t WHERE id = 1", &[]).await.unwrap();
    assert_eq!(before.get::<_, i32>(0), 0, "what came before is there");
    pair.right(statements).await;
    worker.kill9();
    worker.spawn();
    worker.wait_level(&pair.left).await;
    pair.assert_equal("t").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_target_refuses_is_done_by_hand() {
    let pair = Pair::start(15).await;
    pair.left(TABLE).await;
    let mut worker = pair.worker(&["t"]);
    worker.wait_streaming().await;
    pair.right("CREATE VIEW v AS SELECT b FROM t").await;
    pair.left("ALTER TABLE t DROP COLUMN b; UPDATE t SET a = 0 WHERE id = 2").await;
    let message = message(&worker).await;
    assert!(message.ends_with(r#"ALTER TABLE "public"."t" DROP COLUMN "b""#), "{message}");
    pair.right("ALTER TABLE t DROP COLUMN b CASCADE").await;
    worker.kill9();
    worker.spawn();
    worker.wait_level(&pair.left).await;
    pair.assert_equal("t").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn values_that_are_not_in_the_log_take_a_new_copy() {
    let alters = ["ADD COLUMN c float8 DEFAULT random()", "ADD COLUMN c bigserial", "DROP COLUMN b; ALTER TABLE t ADD COLUMN b text"];
    for alter in alters {
        let pair = Pair::start(15).await;
        pair.left(TABLE).await;
        let mut worker = pair.worker(&["t"]);
        worker.wait_streaming().await;
        pair.left(&format!("UPDATE t SET a = 0 WHERE id = 1; ALTER TABLE t {alter}; UPDATE t SET a = 0 WHERE id = 2")).await;
        let message = message(&worker).await;
        let (_, statement) = message.split_once("is gone: ").expect("a statement");
        assert_eq!(statement, r#"DROP TABLE "public"."t""#);
        pair.right(statement).await;
        worker.kill9();
        worker.spawn();
        worker.wait_level(&pair.left).await;
        pair.assert_equal("t").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cast_that_only_using_can_make_is_not_guessed() {
    let pair = Pair::start(15).await;
    pair.left(TABLE).await;
    let worker = pair.worker(&["t"]);
    worker.wait_streaming().await;
    pair.left("ALTER TABLE t ALTER COLUMN b TYPE int USING length(b); UPDATE t SET a = 0 WHERE id = 2").await;
    let message = message(&worker).await;
    assert!(message.contains(r#"ALTER TABLE "public"."t" ALTER COLUMN "b" TYPE integer"#), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_column_beside_excluded_ones_is_excluded_too_or_copied() {
    let pair = Pair::start(15).await;
    pair.left(TABLE).await;
    let exclude =
        |columns: &[&str]| TableSpec { exclude_columns: columns.iter().map(|name| (*name).into()).collect(), ..crate::worker::table("t") };
    let mut worker =
        Worker::start_with((&pair.source, "shop"), (&pair.target, "dw"), &["t"], |desired| desired.tables = Some(vec![exclude(&["b"])]));
    worker.wait_streaming().await;
    // Others are followed.
    pair.left("ALTER TABLE t RENAME COLUMN a TO alpha; UPDATE t SET alpha = 0 WHERE id = 2").await;
    worker.wait_level(&pair.left).await;
    let names = ["id", "alpha"];
    assert_eq!(super::rows(&pair.left, "t", &names).await, super::rows(&pair.right, "t", &names).await);
    pair.left("ALTER TABLE t ADD COLUMN c int DEFAULT 4; UPDATE t SET c = 5 WHERE id = 2").await;
    let message = message(&worker).await;
    assert!(message.contains("exclude it too"), "{message}");
    worker.change(|desired| desired.tables = Some(vec![exclude(&["b", "c"])])).await;
    worker.wait_level(&pair.left).await;
    // And the other way out.
    pair.left("ALTER TABLE t ADD COLUMN d int DEFAULT 4; UPDATE t SET d = 5 WHERE id = 2").await;
    let message = worker.wait_reason("SchemaChanged").await.error.expect("an error").message;
    pair.right(message.split_once("is gone: ").expect("a statement").1).await;
    worker.kill9();
    worker.spawn();
    worker.wait_level(&pair.left).await;
    let names = ["id", "alpha", "d"];
    assert_eq!(super::rows(&pair.left, "t", &names).await, super::rows(&pair.right, "t", &names).await);
}

/// Rows may exchange keys that are checked later. Where whole rows are logged, nothing but the catalog tells that the key has become such
/// a one.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_replaced_while_rows_stream_never_names_the_wrong_row() {
    for major in crate::support::MAJORS {
        for deferrable in [true, false] {
            let pair = Pair::start(major).await;
            pair.left(TABLE).await;
            pair.left("ALTER TABLE t REPLICA IDENTITY FULL").await;
            let mut worker = pair.worker(&["t"]);
            worker.wait_streaming().await;
            pair.left("UPDATE t SET a = 0 WHERE id = 1").await;
            let exchange = if deferrable {
                "ALTER TABLE t DROP CONSTRAINT t_pkey, ADD CONSTRAINT k PRIMARY KEY (id) DEFERRABLE;
                 UPDATE t SET id = 51 - id WHERE id IN (3, 48); UPDATE t SET id = 51 - id"
            } else {
                // The key is as it was when anybody looks.
                "ALTER TABLE t DROP CONSTRAINT t_pkey; UPDATE t SET id = 51 - id WHERE id IN (3, 48); UPDATE t SET id = 51 - id;
                 ALTER TABLE t ADD PRIMARY KEY (id)"
            };
            for sql in exchange.split(';') {
                pair.left(sql).await;
            }
            // Unless the worker has seen the table without a key the target keeps its own, which may refuse what the source has taken.
            // That is no silent loss.
            let refused = std::cell::Cell::new(false);
            pair.left("INSERT INTO t VALUES (1000, 0, 'arrived')").await;
            crate::support::eventually(60, "all is there, or the target's key is in the way", || async {
                let error = worker.status().await.and_then(|status| status.error);
                refused.set(error.is_some_and(|error| error.reason == "RowConflict"));
                let arrived = pair.right.query_one("SELECT EXISTS (SELECT FROM t WHERE id = 1000)", &[]).await.unwrap().get(0);
                refused.get() || arrived
            })
            .await;
            if refused.get() {
                assert!(!deferrable, "the source has no key that names rows");
                pair.right("ALTER TABLE t DROP CONSTRAINT t_pkey").await;
                worker.kill9();
                worker.spawn();
            }
            worker.wait_level(&pair.left).await;
            pair.assert_equal("t").await;
            pair.left("UPDATE t SET b = 'last' WHERE id < 9; DELETE FROM t WHERE id = 9").await;
            worker.wait_level(&pair.left).await;
            pair.assert_equal("t").await;
        }
    }
}
