//! Bad input gets a clear answer: a reason, a message that says what to do, and no crash loop.

mod support;
#[path = "support/worker.rs"]
mod worker;

use sluice::worker::contract::{Desired, Status};
use std::process::Command;
use support::Postgres;
use tokio_postgres::Client;
use worker::{Worker, assert_equal, table};

struct Servers {
    source: Postgres,
    target: Postgres,
    left: Client,
    right: Client,
}

async fn servers_with(source_settings: &[&str]) -> Servers {
    let (source, target) = (Postgres::start_with(15, source_settings), Postgres::start(15));
    let (left, right) = (source.create_database("shop").await, target.create_database("dw").await);
    left.batch_execute(
        "CREATE TABLE items (id int PRIMARY KEY, name text); INSERT INTO items SELECT g, 'item ' || g FROM generate_series(1, 100) g",
    )
    .await
    .expect("a table");
    Servers { source, target, left, right }
}

/// Anything that makes the worker begin again at once instead of after its pause.
fn again(desired: &mut Desired) {
    desired.stream.max_batch_rows += 1;
}

async fn servers() -> Servers {
    servers_with(&[]).await
}

impl Servers {
    fn worker(&self, tables: &[&str], change: impl FnOnce(&mut Desired)) -> Worker {
        Worker::start_with((&self.source, "shop"), (&self.target, "dw"), tables, change)
    }

    /// The worker shows the reason with all these words, and is still running.
    async fn refused(&self, worker: &mut Worker, reason: &str, words: &[&str]) {
        let told = |status: &Status| {
            let error = status.error.as_ref().filter(|error| error.reason == reason);
            !status.streaming && error.is_some_and(|error| words.iter().all(|word| error.message.contains(word)))
        };
        worker.wait_for(60, &format!("{reason} with {words:?}"), told).await;
        assert_eq!(worker.exit_code(), None, "no crash");
    }

    /// After a cure, the worker streams without a restart.
    async fn cured(&self, worker: &mut Worker, tables: &[&str]) {
        worker.change(again).await;
        worker.wait_streaming().await;
        worker.wait_level(&self.left).await;
        assert_equal(&self.left, &self.right, tables).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_password_unknown_host_and_missing_database() {
    let servers = servers().await;
    let mut worker = servers.worker(&["items"], |_| {});
    worker.write_credentials("source", "postgres", "wrong");
    servers.refused(&mut worker, "AuthenticationFailed", &["postgres"]).await;
    assert!(!worker.log().contains("wrong\""), "the password is not logged");
    worker.write_credentials("source", "postgres", "pw");
    let port = worker.desired.source.port;
    worker.change(|desired| desired.source.host = "no-such-host.invalid".into()).await;
    servers.refused(&mut worker, "HostUnreachable", &["no-such-host.invalid"]).await;
    worker
        .change(|desired| {
            desired.source.host = "127.0.0.1".into();
            desired.source.port = support::free_port();
        })
        .await;
    servers.refused(&mut worker, "HostUnreachable", &["127.0.0.1"]).await;
    worker
        .change(|desired| {
            desired.source.port = port;
            desired.source.database = "nowhere".into();
        })
        .await;
    servers.refused(&mut worker, "DatabaseMissing", &["nowhere"]).await;
    worker.change(|desired| desired.source.database = "shop".into()).await;
    servers.cured(&mut worker, &["items"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_away_or_read_only() {
    let mut servers = servers().await;
    servers.target.stop();
    let mut worker = servers.worker(&["items"], |_| {});
    servers.refused(&mut worker, "HostUnreachable", &["127.0.0.1"]).await;
    servers.target.start_again();
    servers.right = servers.target.connect("dw").await;
    worker.wait_streaming().await;
    servers.right.batch_execute("ALTER DATABASE dw SET default_transaction_read_only = on").await.unwrap();
    servers
        .right
        .batch_execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'dw' AND pid <> pg_backend_pid()")
        .await
        .unwrap();
    servers.left.batch_execute("INSERT INTO items VALUES (1000, 'x')").await.unwrap();
    servers.refused(&mut worker, "TargetReadOnly", &[]).await;
    servers.right.batch_execute("BEGIN READ WRITE; ALTER DATABASE dw RESET default_transaction_read_only; COMMIT").await.unwrap();
    servers.cured(&mut worker, &["items"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_without_logical_wal() {
    let servers = servers_with(&["wal_level=replica"]).await;
    let mut worker = servers.worker(&["items"], |_| {});
    servers.refused(&mut worker, "WalLevelNotLogical", &["ALTER SYSTEM SET wal_level"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_free_slot() {
    let servers = servers_with(&["max_replication_slots=1"]).await;
    servers.left.batch_execute("SELECT pg_create_physical_replication_slot('taken')").await.unwrap();
    let mut worker = servers.worker(&["items"], |_| {});
    servers.refused(&mut worker, "NoFreeReplicationSlot", &["max_replication_slots"]).await;
    servers.left.batch_execute("SELECT pg_drop_replication_slot('taken')").await.unwrap();
    servers.cured(&mut worker, &["items"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_that_cannot_be_followed() {
    let servers = servers().await;
    servers
        .left
        .batch_execute("CREATE TABLE bare (a int); CREATE VIEW seen AS SELECT 1 AS a; CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY); CREATE TABLE full_identity (a int, b int); ALTER TABLE full_identity REPLICA IDENTITY FULL")
        .await
        .unwrap();
    let mut worker = servers.worker(&["missing"], |_| {});
    servers.refused(&mut worker, "TableMissing", &["public.missing"]).await;
    worker.change(|desired| desired.tables = Some(vec![table("bare")])).await;
    servers.refused(&mut worker, "TableWithoutIdentity", &["public.bare", "PRIMARY KEY"]).await;
    // The source's users were never hindered.
    servers.left.batch_execute("INSERT INTO bare VALUES (1); UPDATE bare SET a = 2; DELETE FROM bare").await.unwrap();
    for other in ["seen", "unlogged"] {
        worker.change(|desired| desired.tables = Some(vec![table(other)])).await;
        servers.refused(&mut worker, "TableNotSupported", &[other]).await;
    }
    let excluding = |name: &str, column: &str| {
        let mut table = table(name);
        table.exclude_columns = vec![column.into()];
        Some(vec![table])
    };
    worker.change(|desired| desired.tables = excluding("items", "id")).await;
    servers.refused(&mut worker, "ExcludedColumnInIdentity", &["id"]).await;
    worker.change(|desired| desired.tables = excluding("full_identity", "a")).await;
    servers.refused(&mut worker, "ExcludedColumnInIdentity", &["full_identity"]).await;
    worker.change(|desired| desired.tables = excluding("items", "nothing")).await;
    servers.refused(&mut worker, "ColumnMissing", &["nothing"]).await;
    worker.change(|desired| desired.tables = Some(vec![table("items")])).await;
    servers.cured(&mut worker, &["items"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn excluded_columns_need_postgres_15() {
    let (source, target) = (Postgres::start(14), Postgres::start(15));
    let (left, right) = (source.create_database("shop").await, target.create_database("dw").await);
    left.batch_execute("CREATE TABLE items (id int PRIMARY KEY, name text)").await.unwrap();
    let servers = Servers { source, target, left, right };
    let mut worker = servers.worker(&["items"], |desired| desired.tables.as_mut().unwrap()[0].exclude_columns = vec!["name".into()]);
    servers.refused(&mut worker, "NeedsPostgreSQL15", &["15"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn target_tables_that_are_not_empty_or_do_not_fit() {
    let servers = servers().await;
    servers.right.batch_execute("CREATE TABLE items (id int PRIMARY KEY, name text); INSERT INTO items VALUES (-1, 'mine')").await.unwrap();
    let mut worker = servers.worker(&["items"], |_| {});
    servers.refused(&mut worker, "TargetTableNotEmpty", &["public.items", "existingRows"]).await;
    let kept: i64 = servers.right.query_one("SELECT count(*) FROM items", &[]).await.unwrap().get(0);
    assert_eq!(kept, 1, "rows that are not ours are not touched");
    servers.right.batch_execute("DROP TABLE items; CREATE TABLE items (id int PRIMARY KEY, name varchar(3))").await.unwrap();
    worker.change(again).await;
    servers.refused(&mut worker, "TargetTableIncompatible", &["name"]).await;
    servers.right.batch_execute("DROP TABLE items; CREATE TABLE items (id int PRIMARY KEY, name text, must text NOT NULL)").await.unwrap();
    worker.change(again).await;
    servers.refused(&mut worker, "TargetTableIncompatible", &["must"]).await;
    servers
        .right
        .batch_execute("DROP TABLE items; CREATE TABLE items (id int PRIMARY KEY, name text); INSERT INTO items VALUES (-1, 'mine')")
        .await
        .unwrap();
    worker.change(|desired| desired.snapshot.truncate = true).await;
    servers.cured(&mut worker, &["items"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_sources_for_one_target_and_a_table_onto_itself() {
    let servers = servers().await;
    servers.left.batch_execute("CREATE TABLE more (id int PRIMARY KEY, name text)").await.unwrap();
    let mut worker = servers.worker(&["items", "more"], |desired| desired.tables.as_mut().unwrap()[1].target_name = "items".into());
    servers.refused(&mut worker, "DuplicateTarget", &["public.items", "public.more"]).await;
    let mut own =
        Worker::start_with((&servers.source, "shop"), (&servers.source, "shop"), &["items"], |desired| desired.slot = "own".into());
    servers.refused(&mut own, "SameTable", &["items"]).await;
    let rows: i64 = servers.left.query_one("SELECT count(*) FROM items", &[]).await.unwrap().get(0);
    assert_eq!(rows, 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_of_a_mirrors_own_target() {
    let servers = servers().await;
    let there = servers.worker(&["items"], |_| {});
    there.wait_streaming().await;
    // Back from the target into the source's own table: each change would come round again.
    let mut back = Worker::start_with((&servers.target, "dw"), (&servers.source, "shop"), &["items"], |desired| {
        desired.slot = "back".into();
        desired.publication = "back".into();
        desired.mirror.name = "back".into();
        desired.snapshot.truncate = true;
    });
    servers.refused(&mut back, "TargetIsMirrored", &["items"]).await;
    let rows: i64 = servers.left.query_one("SELECT count(*) FROM items", &[]).await.unwrap().get(0);
    assert_eq!(rows, 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_type_that_the_target_lacks() {
    let servers = servers().await;
    servers
        .left
        .batch_execute(
            "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE TABLE moods (id int PRIMARY KEY, m mood); INSERT INTO moods VALUES (1, 'ok')",
        )
        .await
        .unwrap();
    let mut worker = servers.worker(&["moods"], |_| {});
    servers.refused(&mut worker, "TypeMissing", &["mood"]).await;
    servers.right.batch_execute("CREATE TYPE mood AS ENUM ('sad', 'ok')").await.unwrap();
    servers.cured(&mut worker, &["moods"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_and_checkpoints_that_do_not_belong_together() {
    let servers = servers().await;
    servers.left.batch_execute("SELECT pg_create_logical_replication_slot('sluice_test', 'pgoutput')").await.unwrap();
    let mut worker = servers.worker(&["items"], |_| {});
    servers.refused(&mut worker, "SlotWithoutCheckpoint", &["sluice_test"]).await;
    servers.left.batch_execute("SELECT pg_drop_replication_slot('sluice_test')").await.unwrap();
    servers.cured(&mut worker, &["items"]).await;

    // Somebody else confirms changes of our slot: they are gone, and that is said.
    worker.change(|desired| desired.suspend = true).await;
    worker.wait_for(10, "suspended", |status| status.phase == sluice::worker::contract::Phase::Suspended).await;
    servers.left.batch_execute("INSERT INTO items VALUES (2000, 'lost')").await.unwrap();
    worker::wait_sql(&servers.left, 10, "SELECT NOT active FROM pg_replication_slots WHERE slot_name = 'sluice_test'").await;
    servers.left.batch_execute("SELECT pg_replication_slot_advance('sluice_test', pg_current_wal_lsn())").await.unwrap();
    worker.change(|desired| desired.suspend = false).await;
    servers.refused(&mut worker, "CheckpointBehindSlot", &["gone"]).await;

    servers.left.batch_execute("SELECT pg_drop_replication_slot('sluice_test')").await.unwrap();
    worker.change(again).await;
    servers.refused(&mut worker, "CheckpointWithoutSlot", &["sluice_test"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_of_another_mirror() {
    let servers = servers().await;
    let first = servers.worker(&["items"], |_| {});
    first.wait_streaming().await;
    let mut other = servers.worker(&["items"], |desired| desired.mirror.name = "other".into());
    servers.refused(&mut other, "CheckpointOfAnotherMirror", &["shop/shop"]).await;
    // Another slot, but the same target table.
    other
        .change(|desired| {
            desired.slot = "second".into();
            desired.publication = "second".into();
        })
        .await;
    servers.refused(&mut other, "DuplicateTarget", &["shop/shop"]).await;
    first.wait_level(&servers.left).await;
    assert_equal(&servers.left, &servers.right, &["items"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_copy_the_start_must_be_known() {
    let servers = servers().await;
    let mut worker = servers.worker(&["items"], |desired| desired.snapshot.enabled = false);
    servers.refused(&mut worker, "StartPositionRequired", &["startPosition"]).await;
    // A target that was filled by other means, level with the slot's start.
    servers
        .right
        .batch_execute(
            "CREATE TABLE items (id int PRIMARY KEY, name text); INSERT INTO items SELECT g, 'item ' || g FROM generate_series(1, 100) g",
        )
        .await
        .unwrap();
    let start: String = servers
        .left
        .query_one("SELECT lsn::text FROM pg_create_logical_replication_slot('sluice_test', 'pgoutput')", &[])
        .await
        .unwrap()
        .get(0);
    servers.left.batch_execute("INSERT INTO items VALUES (500, 'after')").await.unwrap();
    worker.change(again).await;
    servers.refused(&mut worker, "StartPositionRequired", &["startPosition"]).await;
    worker.change(|desired| desired.snapshot.start_position = Some(start)).await;
    worker
        .wait_for(30, "an answer", |status| status.streaming || status.error.as_ref().is_some_and(|e| e.reason != "StartPositionRequired"))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_left_the_publication_is_an_error_of_that_table() {
    let servers = servers().await;
    servers.left.batch_execute("CREATE TABLE other (id int PRIMARY KEY, name text)").await.unwrap();
    let worker = servers.worker(&["items", "other"], |_| {});
    worker.wait_streaming().await;
    servers.left.batch_execute("ALTER PUBLICATION sluice_test DROP TABLE other; INSERT INTO other VALUES (1, 'not seen')").await.unwrap();
    // The next description of a table is the sign: noticed without a new session, before the minute is over.
    servers.left.batch_execute("ALTER TABLE items ALTER name SET STATISTICS 50").await.unwrap();
    servers.left.batch_execute("INSERT INTO items VALUES (2999, 'described')").await.unwrap();
    worker
        .wait_for(20, "the table's error", |status| {
            status.table_errors.get("public.other").is_some_and(|why| why.contains("LeftPublication"))
        })
        .await;
    servers.left.batch_execute("INSERT INTO items VALUES (3000, 'goes on')").await.unwrap();
    worker.wait_level(&servers.left).await;
    assert_equal(&servers.left, &servers.right, &["items"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_target_disk_is_waited_for() {
    let servers = servers().await;
    let disk = SmallDisk::mount();
    servers.right.batch_execute(&format!("CREATE TABLESPACE small LOCATION '{}'", disk.0.path().join("space").display())).await.unwrap();
    servers.right.batch_execute("CREATE TABLE items (id int PRIMARY KEY, name text) TABLESPACE small").await.unwrap();
    let mut worker = servers.worker(&["items"], |_| {});
    worker.wait_streaming().await;
    servers.left.batch_execute("INSERT INTO items SELECT g, repeat('x', 1000) FROM generate_series(10000, 60000) g").await.unwrap();
    servers.refused(&mut worker, "TargetDiskFull", &[]).await;
    assert_eq!(worker.status().await.unwrap().error.unwrap().class, "Retry");
    disk.grow();
    worker.wait_level(&servers.left).await;
    assert_equal(&servers.left, &servers.right, &["items"]).await;
    drop(worker);
    servers.right.batch_execute("DROP TABLE items").await.unwrap();
    servers.right.batch_execute("DROP TABLESPACE small").await.unwrap();
}

/// A file system of 16 MiB that PostgreSQL may write to.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Self {
        let folder = tempfile::Builder::new().prefix("sluice-disk").tempdir().expect("a temporary folder");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=16m,mode=777", "tmpfs"]).arg(folder.path()));
        run(Command::new("chmod").arg("755").arg(folder.path()));
        let space = folder.path().join("space");
        std::fs::create_dir(&space).expect("a folder");
        run(Command::new("chown").arg("nobody").arg(&space));
        Self(folder)
    }

    fn grow(&self) {
        run(Command::new("mount").args(["-o", "remount,size=512m"]).arg(self.0.path()));
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

fn run(command: &mut Command) {
    let status = command.status().expect("the program runs");
    assert!(status.success(), "{command:?}: {status}");
}
