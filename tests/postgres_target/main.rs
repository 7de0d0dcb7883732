//! PostgreSQL as a target: claims and fences, checkpoints that move with the data, copies, applied changes, refusals.

#[path = "../changes/mod.rs"]
mod changes;
#[path = "../support/mod.rs"]
mod support;

mod claims;
mod copies;
mod early;
mod parallel;
mod refusals;
mod writes;

use bytes::Bytes;
use changes::{Changes, Value, apply, claim, column, int, key, mapped, owner, rows, text};
use futures::StreamExt as _;
use sluice::connectors::postgres::applier::PostgresApplier;
use sluice::connectors::postgres::{Endpoint, Lsn, endpoint::Secret, target::PostgresTarget};
use sluice::engine::batch::Part;
use sluice::engine::error::{Class, reason};
use sluice::engine::register::Register as _;
use sluice::engine::roles::{Apply as _, ApplyMode, BulkFormat, BulkStream, Fed, Range, SourceIdentity, Target as _};
use sluice::engine::table::{MappedTable, TableState};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};
use support::{Postgres, eventually};
use tokio_postgres::Client;

fn target(endpoint: Endpoint) -> PostgresTarget {
    PostgresTarget::new(endpoint, owner("a"))
}

/// What follows the rows is made by one session.
const BUILDERS: sluice::engine::roles::Builders = sluice::engine::roles::Builders { per_table: 1, tables: 1 };

/// The server that most tests share, each with a database of its own; the last one to end stops it.
fn server() -> Arc<Postgres> {
    static SHARED: Mutex<Weak<Postgres>> = Mutex::new(Weak::new());
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    shared.upgrade().unwrap_or_else(|| {
        let server = Arc::new(Postgres::start(15));
        *shared = Arc::downgrade(&server);
        server
    })
}

/// A database with role `writer_<name>`, which owns nothing, may end nobody's backends and has no replica role.
async fn database(server: &Postgres, name: &str) -> (Client, Endpoint) {
    let admin = server.create_database(name).await;
    let sql = format!("CREATE ROLE writer_{name} LOGIN PASSWORD 'pw'; GRANT CREATE ON DATABASE {name} TO writer_{name}");
    admin.batch_execute(&sql).await.expect("a role");
    let mut writer = server.endpoint(name);
    writer.username = format!("writer_{name}");
    writer.password = Secret("pw".into());
    (admin, writer)
}

/// A claimed stream with a checkpoint and prepared tables, which are made here.
async fn stream(endpoint: Endpoint, slot: &str, tables: &[MappedTable]) -> (PostgresTarget, PostgresApplier) {
    stream_of(target(endpoint), slot, tables).await
}

async fn stream_of(target: PostgresTarget, slot: &str, tables: &[MappedTable]) -> (PostgresTarget, PostgresApplier) {
    let (claimed, mut applier) = target.claim(&key(slot), &owner("a"), None).await.expect("a claim");
    applier.initialize(&Lsn(1), 1).await.expect("a checkpoint");
    for table in tables {
        applier.begin_copy(table, &[], false).await.expect("a copy");
        target.finish(&claimed.claim, table, &[], BUILDERS, &|_| ()).await.expect("keys");
        applier.set_state(table, TableState::Ready, None).await.expect("a state");
    }
    applier.prepare(tables).await.expect("prepared");
    (target, applier)
}

async fn position(client: &Client, slot: &str) -> Option<String> {
    let sql = "SELECT position FROM _sluice.streams WHERE slot = $1";
    client.query_one(sql, &[&slot]).await.expect("a checkpoint").get(0)
}

fn inserts(table: &MappedTable, ids: impl Iterator<Item = i32>) -> Changes {
    let mut changes = Changes::default();
    for id in ids {
        changes.insert(table, &[int(id), text(format!("row {id}"))]);
    }
    changes
}

fn items() -> MappedTable {
    mapped(1, "items", "shop", &["!id int4", "v text"])
}

/// A short life of a stream.
async fn smoke(major: u32) {
    let server = Postgres::start(major);
    let (admin, _) = database(&server, "smoke").await;
    let (items, log) = (items(), mapped(2, "log", "shop", &["n int4", "t text"]));
    let (target, mut applier) = stream(server.endpoint("smoke"), "s", &[items.clone(), log.clone()]).await;
    assert_eq!(applier.mode(), ApplyMode::Replica);
    let mut changes = inserts(&items, 0..500);
    changes.insert(&log, &[int(1), text("a")]);
    for id in 0..100 {
        changes.update(&items, &[], &[int(id), text("new")]);
    }
    changes.update(&items, &[int(499), Value::Null], &[int(1000), Value::Unchanged]);
    changes.delete(&log, &[int(1), text("a")]);
    for id in 0..50 {
        changes.delete(&items, &[int(id), Value::Null]);
    }
    let applied = apply(&mut applier, changes.committed(10)).await.expect("applied");
    assert_eq!((applied.inserts, applied.updates, applied.deletes), (501, 101, 51));
    assert_eq!(rows(&admin, "shop.items").await.len(), 450);
    let mut changes = Changes::default();
    changes.truncate(&[&items, &log]);
    let part: Part<Lsn> = changes.committed(20);
    apply(&mut applier, part).await.expect("applied");
    assert!(rows(&admin, "shop.items").await.is_empty());
    let (claimed, _) = target.claim(&key("s"), &owner("a"), Some(1)).await.expect("a claim");
    assert_eq!(claimed.checkpoint.expect("a checkpoint").position, Lsn(20));
}

#[tokio::test]
async fn an_older_major_works() {
    smoke(14).await;
}

#[tokio::test]
async fn a_newer_major_works() {
    smoke(17).await;
}
