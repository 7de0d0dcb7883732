//! PostgreSQL as a target: claims and fences, checkpoints that move with the data, copies, applied changes, refusals.

mod changes;
mod support;

use bytes::Bytes;
use changes::{Changes, Value, all, claim, column, int, key, mapped, owner, rows, text};
use futures::StreamExt as _;
use sluice::connectors::postgres::applier::PostgresApplier;
use sluice::connectors::postgres::{Endpoint, Lsn, endpoint::Secret, target::PostgresTarget};
use sluice::engine::batch::Part;
use sluice::engine::error::{Class, reason};
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
    let target = target(endpoint);
    let (claimed, mut applier) = target.claim(&key(slot), &owner("a"), None).await.expect("a claim");
    applier.initialize(&Lsn(1), 1).await.expect("a checkpoint");
    for table in tables {
        applier.begin_copy(table, false).await.expect("a copy");
        target.finish(&claimed.claim, table).await.expect("keys");
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

#[tokio::test]
async fn a_claim_raises_the_epoch_ends_the_old_one_and_reads_the_checkpoint() {
    let server = server();
    let (admin, _) = database(&server, "claims").await;
    let target = target(server.endpoint("claims"));
    let items = items();

    let (claimed, mut first) = target.claim(&key("s"), &owner("a"), None).await.expect("a claim");
    assert_eq!((claimed.claim.epoch, claimed.checkpoint.is_none(), claimed.log_intended), (1, true, false));
    first.intend_log().await.expect("an intention");
    drop(first);
    let (claimed, mut first) = target.claim(&key("s"), &owner("a"), Some(1)).await.expect("a claim of the same process");
    assert_eq!((claimed.claim.epoch, claimed.checkpoint.is_none(), claimed.log_intended), (2, true, true));
    first.initialize(&Lsn(5), 3).await.expect("a checkpoint");
    assert_eq!(first.initialize(&Lsn(6), 3).await.expect_err("once").class, Class::Bug);
    first.begin_copy(&items, false).await.expect("a copy");
    first.set_state(&items, TableState::CatchingUp, Some(&Lsn(7))).await.expect("a state");
    first.set_timeline(4).await.expect("a timeline");

    let restored = sluice::engine::roles::Owner { uid: "another".into(), ..owner("a") };
    let (claimed, _second) = target.claim(&key("s"), &restored, None).await.expect("a second claim");
    let checkpoint = claimed.checkpoint.expect("a checkpoint");
    assert_eq!((claimed.claim.epoch, checkpoint.position, checkpoint.timeline), (3, Lsn(5), 4));
    assert!(!claimed.log_intended);
    let table = &checkpoint.tables[items.source()];
    assert_eq!(
        (table.state, table.generation, table.position, &table.target, &table.columns),
        (TableState::CatchingUp, 1, Some(Lsn(7)), &items.target, &items.signature())
    );
    let uid: String = admin.query_one("SELECT mirror_uid FROM _sluice.streams", &[]).await.expect("a row").get(0);
    assert_eq!(uid, "another");

    // The old one's backend is gone; it learns why when it claims again.
    let backends = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'sluice apply'";
    assert_eq!(admin.query_one(backends, &[]).await.expect("a count").get::<_, i64>(0), 1);
    assert_eq!(first.advance(&Lsn(9), &[]).await.expect_err("ended").class, Class::Retry);
    let error = target.claim(&key("s"), &owner("a"), Some(2)).await.err().expect("fenced");
    assert_eq!((error.class, error.reason), (Class::Fenced, reason::FENCED));
    assert_eq!(position(&admin, "s").await.as_deref(), Some("0/5"));

    let error = target.claim(&key("s"), &owner("b"), None).await.err().expect("refused");
    assert_eq!((error.class, error.reason), (Class::Stop, reason::CHECKPOINT_OF_ANOTHER_MIRROR));
    assert!(error.message.contains("team/a"), "{error}");
}

#[tokio::test]
async fn the_epoch_fences_where_backends_may_not_be_ended() {
    let server = server();
    let (admin, writer) = database(&server, "fences").await;
    let items = items();
    let (old_target, mut old) = stream(server.endpoint("fences"), "s", std::slice::from_ref(&items)).await;
    admin
        .batch_execute(
            "GRANT ALL ON SCHEMA _sluice, shop TO writer_fences; GRANT ALL ON ALL TABLES IN SCHEMA _sluice TO writer_fences;
             GRANT ALL ON ALL TABLES IN SCHEMA shop TO writer_fences",
        )
        .await
        .expect("grants");
    // A transaction of the old one is open when the new one claims.
    let part = inserts(&items, 0..3).part(false, None, 10);
    assert!(!old.apply(&part, &all, &[]).await.expect("a piece").committed);
    let (claimed, mut new) = target(writer).claim(&key("s"), &owner("a"), None).await.expect("a claim");
    assert_eq!((claimed.claim.epoch, new.mode()), (2, ApplyMode::Ordered));

    let error = old.apply(&inserts(&items, 3..5).part(true, Some(20), 20), &all, &[]).await.expect_err("fenced");
    assert_eq!((error.class, error.reason), (Class::Fenced, reason::FENCED));
    assert_eq!(old.apply(&inserts(&items, 5..6).committed(30), &all, &[]).await.expect_err("used up").class, Class::Bug);
    let rows_of_range = futures::stream::iter([Ok(Bytes::from_static(b"9\tx\n"))]).boxed();
    let error = old_target
        .load(&claim("s", 1), &items, 1, &Range { number: 0, blocks: None }, BulkFormat::PostgresText, rows_of_range)
        .await
        .expect_err("fenced");
    assert_eq!(error.class, Class::Fenced);
    assert_eq!(old_target.finish(&claim("s", 1), &items).await.expect_err("fenced").class, Class::Fenced);

    new.prepare(std::slice::from_ref(&items)).await.expect("prepared");
    new.apply(&inserts(&items, 0..2).committed(40), &all, &[]).await.expect("applied");
    assert_eq!(rows(&admin, "shop.items").await.len(), 2);
    assert_eq!(position(&admin, "s").await.as_deref(), Some("0/28"));
}

#[tokio::test]
async fn of_concurrent_first_claims_one_writes() {
    let server = server();
    let (admin, _) = database(&server, "race").await;
    let claims = (0..6).map(|_| {
        let target = target(server.endpoint("race"));
        tokio::spawn(async move { target.claim(&key("s"), &owner("a"), None).await })
    });
    let mut appliers = Vec::new();
    for claim in futures::future::join_all(claims).await {
        // Another claimer may have ended this one's backend in the middle.
        match claim.expect("no panic") {
            Ok((claimed, applier)) => appliers.push((claimed.claim.epoch, applier)),
            Err(error) => assert_eq!(error.class, Class::Retry, "{error}"),
        }
    }
    let epoch: i64 = admin.query_one("SELECT epoch FROM _sluice.streams", &[]).await.expect("a row").get(0);
    let mut wrote = Vec::new();
    for (epoch, applier) in &mut appliers {
        if applier.initialize(&Lsn(1), 1).await.is_ok() {
            wrote.push(*epoch);
        }
    }
    assert_eq!(wrote, [epoch]);
}

#[tokio::test]
async fn a_claim_ends_a_range_that_is_being_copied() {
    let server = server();
    let (admin, _) = database(&server, "ranges").await;
    let items = items();
    let (target, mut applier) = stream(server.endpoint("ranges"), "s", &[]).await;
    let generation = applier.begin_copy(&items, false).await.expect("a copy");
    let endless: BulkStream = futures::stream::once(async { Ok(Bytes::from_static(b"1\tx\n")) }).chain(futures::stream::pending()).boxed();
    let (old, table) = (target.clone(), items.clone());
    let range = Range { number: 0, blocks: None };
    let load = tokio::spawn(async move { old.load(&claim("s", 1), &table, generation, &range, BulkFormat::PostgresText, endless).await });
    eventually(10, "the range is being copied", || async {
        let copying = admin
            .query_one(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'COPY%' AND state = 'active'",
                &[],
            )
            .await;
        copying.expect("a count").get::<_, i64>(0) == 1
    })
    .await;
    let began = Instant::now();
    let (claimed, mut applier) = target.claim(&key("s"), &owner("a"), Some(1)).await.expect("a claim");
    assert!(began.elapsed() < Duration::from_secs(5), "took {:?}", began.elapsed());
    assert_eq!(claimed.checkpoint.expect("a checkpoint").tables[items.source()].state, TableState::Copying);
    // The table is free for the next copy at once.
    assert_eq!(applier.begin_copy(&items, false).await.expect("a copy"), 2);
    assert!(rows(&admin, "shop.items").await.is_empty());
    load.abort();
}

#[tokio::test]
async fn checkpoint_and_rows_move_together_whenever_the_backend_is_killed() {
    let server = server();
    let (admin, _) = database(&server, "kills").await;
    let items = items();
    let (target, mut applier) = stream(server.endpoint("kills"), "s", std::slice::from_ref(&items)).await;
    // Part n inserts rows 10 n … 10 n + 9 in two pieces and moves one row on; it ends at 8 n.
    let first = |n: u64| {
        let at = n as i32 * 10;
        let mut changes = inserts(&items, at..at + 5);
        if n == 1 {
            changes.insert(&items, &[int(-1), text("mark")]);
        } else {
            changes.update(&items, &[int(1 - n as i32), Value::Null], &[int(-(n as i32)), text("mark")]);
        }
        changes.part(false, None, n * 8)
    };
    let second = |n: u64| inserts(&items, n as i32 * 10 + 5..n as i32 * 10 + 10).part(true, Some(n * 8), n * 8);
    // Mostly between a claim and the next failure; now and then in a claim too.
    let applying = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let killer = tokio::spawn({
        let (admin, applying) = (server.connect("kills").await, applying.clone());
        async move {
            let mut random = 1u64;
            loop {
                random = random * 48_271 % 2_147_483_647;
                tokio::time::sleep(Duration::from_micros(500 + random % 60_000)).await;
                if applying.load(Relaxed) || random.is_multiple_of(8) {
                    let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'sluice apply'";
                    admin.execute(sql, &[]).await.expect("killed");
                }
            }
        }
    });
    let (mut done, mut kills, mut held) = (0u64, 0, None);
    while kills < 20 {
        let n = done + 1;
        let result = async {
            applier.apply(&first(n), &all, &[]).await?;
            applier.apply(&second(n), &all, &[]).await
        };
        let Err(error) = result.await else {
            done = n;
            continue;
        };
        assert_eq!(error.class, Class::Retry, "{error}");
        kills += 1;
        applying.store(false, Relaxed);
        let (checkpoint, next) = loop {
            let (claimed, mut next) = match target.claim(&key("s"), &owner("a"), held).await {
                Ok(claimed) => claimed,
                Err(error) => {
                    // A claim whose answer was lost looks like somebody else's: the process ends, and its successor claims.
                    held = held.filter(|_| error.class != Class::Fenced);
                    continue;
                }
            };
            held = Some(claimed.claim.epoch);
            if next.prepare(std::slice::from_ref(&items)).await.is_ok() {
                break (claimed.checkpoint.expect("a checkpoint"), next);
            }
        };
        applying.store(true, Relaxed);
        applier = next;
        let committed = checkpoint.position.0 / 8;
        // The answer to the last commit may have been lost.
        assert!(committed == done || committed == n, "{committed} after {done}");
        done = committed;
        let expected = if done == 0 { 0 } else { done as usize * 10 + 1 };
        assert_eq!(rows(&admin, "shop.items").await.len(), expected, "rows at part {done}");
        if done > 0 {
            let mark: i32 = admin.query_one("SELECT id FROM shop.items WHERE v = 'mark'", &[]).await.expect("one mark").get(0);
            assert_eq!(mark, -(done as i32));
        }
    }
    killer.abort();
    assert!(done > 5, "only {done} parts between {kills} kills");
}

#[tokio::test]
async fn what_is_durable_survives_an_immediate_crash() {
    let mut server = Postgres::start_with(15, &["wal_writer_delay=10s", "wal_writer_flush_after=1GB", "bgwriter_delay=10s"]);
    let (_, _) = database(&server, "crash").await;
    let items = items();
    let (target, mut applier) = stream(server.endpoint("crash"), "s", std::slice::from_ref(&items)).await;
    assert_eq!(applier.durable().await.expect("a position"), Some(Lsn(1)));
    for n in 1..=200u64 {
        let part = inserts(&items, n as i32..n as i32 + 1).committed(n * 8);
        applier.apply(&part, &all, &[]).await.expect("applied");
        if n == 100 {
            // Something else flushes the log: positions become durable in the middle.
            let other = server.connect("crash").await;
            other.batch_execute("CREATE TABLE flushed ()").await.expect("a commit that waits for the disk");
        }
    }
    let durable = applier.durable().await.expect("a position").expect("a position");
    assert!(durable >= Lsn(800) && durable < Lsn(1600), "{durable}");
    server.crash_and_restart();
    let (claimed, _applier) = target.claim(&key("s"), &owner("a"), None).await.expect("a claim");
    let position = claimed.checkpoint.expect("a checkpoint").position;
    assert!(position >= durable, "{durable} was called durable, {position} has survived");
    assert!(position < Lsn(1600), "nothing was lost, so this shows nothing");
    let admin = server.connect("crash").await;
    assert_eq!(rows(&admin, "shop.items").await.len() as u64, position.0 / 8);
}

#[tokio::test]
async fn positions_become_durable_by_themselves() {
    let server = server();
    let (admin, _) = database(&server, "idle").await;
    let items = items();
    let (_, mut applier) = stream(server.endpoint("idle"), "s", std::slice::from_ref(&items)).await;
    applier.set_state(&items, TableState::CatchingUp, Some(&Lsn(30))).await.expect("a state");
    applier.apply(&inserts(&items, 0..1).committed(20), &all, &[]).await.expect("applied");
    applier.advance(&Lsn(40), &[items.source().clone()]).await.expect("advanced");
    let row = admin.query_one("SELECT state, position FROM _sluice.tables", &[]).await.expect("a table");
    assert_eq!((row.get::<_, &str>(0), row.get::<_, Option<&str>>(1)), ("Ready", None));
    // Nothing moves: nothing is written.
    let version = "SELECT xmin::text, ctid::text FROM _sluice.streams";
    let written = |row: tokio_postgres::Row| (row.get::<_, String>(0), row.get::<_, String>(1));
    let before = written(admin.query_one(version, &[]).await.expect("a row"));
    applier.advance(&Lsn(40), &[]).await.expect("nothing");
    applier.apply(&Changes::default().committed(40), &all, &[]).await.expect("nothing");
    applier.apply(&inserts(&items, 0..1).committed(40), &|_, _| false, &[]).await.expect("nothing");
    assert_eq!(written(admin.query_one(version, &[]).await.expect("a row")), before);
    let deadline = Instant::now() + Duration::from_secs(10);
    while applier.durable().await.expect("a position") != Some(Lsn(40)) {
        assert!(Instant::now() < deadline, "not durable");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_stopped_writer_leaves_nothing_behind() {
    let server = server();
    let (admin, _) = database(&server, "stops").await;
    let items = items();
    let (target, mut applier) = stream(server.endpoint("stops"), "s", std::slice::from_ref(&items)).await;
    applier.apply(&inserts(&items, 0..3).part(false, None, 10), &all, &[]).await.expect("a piece");
    admin.batch_execute("BEGIN; LOCK TABLE shop.items IN SHARE MODE NOWAIT").await.expect_err("rows are being written");
    admin.batch_execute("ROLLBACK").await.expect("rolled back");
    // A statement that waits for somebody else's lock is cancelled.
    let other = server.connect("stops").await;
    other.batch_execute("BEGIN; INSERT INTO shop.items VALUES (7, 'theirs')").await.expect("a lock");
    let waiting = inserts(&items, 7..8).part(true, Some(20), 20);
    let cut = tokio::time::timeout(Duration::from_millis(300), applier.apply(&waiting, &all, &[])).await;
    assert!(cut.is_err(), "it waits");
    let began = Instant::now();
    applier.abort().await;
    assert!(began.elapsed() < Duration::from_secs(1), "took {:?}", began.elapsed());
    eventually(5, "the writer's backend is gone", || async {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'sluice apply'";
        admin.query_one(sql, &[]).await.expect("a count").get::<_, i64>(0) == 0
    })
    .await;
    other.batch_execute("ROLLBACK").await.expect("rolled back");
    let (claimed, _) = target.claim(&key("s"), &owner("a"), Some(1)).await.expect("a claim");
    assert_eq!(claimed.checkpoint.expect("a checkpoint").position, Lsn(1));
    assert!(rows(&admin, "shop.items").await.is_empty());
}

/// The error of one part, from rows 1 to 9 that are there.
async fn failure(endpoint: &Endpoint, admin: &Client, items: &MappedTable, changes: Changes) -> sluice::engine::error::Error {
    admin
        .batch_execute("TRUNCATE shop.items; INSERT INTO shop.items SELECT n, 'secret ' || n FROM generate_series(1, 9) n")
        .await
        .expect("rows");
    let (claimed, mut applier) = target(endpoint.clone()).claim(&key("s"), &owner("a"), None).await.expect("a claim");
    let at = claimed.checkpoint.expect("a checkpoint").position.0;
    applier.prepare(std::slice::from_ref(items)).await.expect("prepared");
    let error = applier.apply(&changes.committed(at + 8), &all, &[]).await.expect_err("an error");
    assert_eq!(rows(admin, "shop.items").await.len(), 9, "rolled back");
    assert!(!error.message.contains("secret"), "{error}");
    error
}

#[tokio::test]
async fn steady_state_is_strict_and_names_the_first_key() {
    let server = server();
    let (admin, _) = database(&server, "strict").await;
    let items = items();
    let endpoint = server.endpoint("strict");
    let (_, applier) = stream(endpoint.clone(), "s", std::slice::from_ref(&items)).await;
    drop(applier);
    type Make = fn(&MappedTable, &mut Changes);
    let missing: [(&str, Make); 6] = [
        ("update of a set", |items, c| [1, 20, 3, 30].map(|id| c.update(items, &[], &[int(id), text("x")])).into_iter().collect()),
        ("one update", |items, c| c.update(items, &[], &[int(20), text("x")])),
        ("delete of a set", |items, c| [1, 2, 20, 30].map(|id| c.delete(items, &[int(id), Value::Null])).into_iter().collect()),
        ("one delete", |items, c| c.delete(items, &[int(20), Value::Null])),
        ("moved keys of a set", |items, c| {
            for (from, to) in [(1, 101), (20, 102), (30, 103)] {
                c.update(items, &[int(from), Value::Null], &[int(to), text("x")]);
            }
        }),
        ("one moved key", |items, c| c.update(items, &[int(20), Value::Null], &[int(1), text("x")])),
    ];
    for (what, make) in missing {
        let mut changes = Changes::default();
        make(&items, &mut changes);
        let error = failure(&endpoint, &admin, &items, changes).await;
        assert_eq!((error.class, error.reason), (Class::Stop, reason::ROW_MISSING), "{what}: {error}");
        assert!(error.message.contains("shop.items") && error.message.contains("id = 20 "), "{what}: {error}");
    }
    for count in [1, 2, 300] {
        let changes = inserts(&items, 9..9 + count);
        let error = failure(&endpoint, &admin, &items, changes).await;
        assert_eq!((error.class, error.reason), (Class::Stop, reason::ROW_CONFLICT), "{error}");
        assert!(error.message.contains("(id)=(9)"), "{error}");
    }
    admin.batch_execute("ALTER TABLE shop.items ADD CONSTRAINT short CHECK (v NOT LIKE 'row 1_')").await.expect("a constraint");
    let error = failure(&endpoint, &admin, &items, inserts(&items, 10..15)).await;
    assert_eq!((error.class, error.reason), (Class::Stop, reason::WRITE_REFUSED), "{error}");
    assert!(error.message.contains("short") && !error.message.contains("row 1"), "{error}");
}

#[tokio::test]
async fn a_key_that_names_several_rows_is_told() {
    let server = server();
    let (admin, _) = database(&server, "doubles").await;
    let items = items();
    let (_, mut applier) = stream(server.endpoint("doubles"), "s", std::slice::from_ref(&items)).await;
    admin.batch_execute("ALTER TABLE shop.items DROP CONSTRAINT items_pkey").await.expect("no key");
    admin.batch_execute("INSERT INTO shop.items VALUES (1, 'a'), (2, 'b'), (2, 'b'), (3, 'c')").await.expect("rows");
    let mut changes = Changes::default();
    for id in 1..4 {
        changes.update(&items, &[], &[int(id), text("x")]);
    }
    let error = applier.apply(&changes.committed(10), &all, &[]).await.expect_err("refused");
    assert_eq!((error.class, error.reason), (Class::Stop, reason::ROW_CONFLICT));
    assert!(error.message.contains("several rows with id = 2"), "{error}");
}

#[tokio::test]
async fn rows_of_partitions_are_found_in_their_own() {
    let server = server();
    let (admin, _) = database(&server, "partitions").await;
    admin
        .batch_execute(
            "CREATE SCHEMA shop; CREATE TABLE shop.log (p int4, v text) PARTITION BY LIST (p);
             CREATE TABLE shop.log1 PARTITION OF shop.log FOR VALUES IN (1);
             CREATE TABLE shop.log2 (v text, p int4); ALTER TABLE shop.log ATTACH PARTITION shop.log2 FOR VALUES IN (2)",
        )
        .await
        .expect("partitions");
    let table = mapped(5, "log", "shop", &["p int4", "v text"]);
    let (_, mut applier) = stream(server.endpoint("partitions"), "s", std::slice::from_ref(&table)).await;
    let mut changes = Changes::default();
    for (p, v) in [(1, "a"), (1, "b"), (2, "a"), (2, "b"), (2, "c")] {
        changes.insert(&table, &[int(p), text(v)]);
    }
    // The first rows of both partitions have the same ctid.
    changes.delete(&table, &[int(2), text("a")]);
    changes.update(&table, &[int(2), text("b")], &[int(1), text("moved")]);
    applier.apply(&changes.committed(10), &all, &[]).await.expect("applied");
    assert_eq!(rows(&admin, "shop.log").await, ["(1,a)", "(1,b)", "(1,moved)", "(2,c)"]);
}

#[tokio::test]
async fn rows_without_a_key_are_found_one_by_one() {
    let server = server();
    let (admin, _) = database(&server, "keyless").await;
    let columns = ["n numeric", "p point", "j json", "f float8", "c char(3)"];
    let table = mapped(5, "log", "shop", &columns);
    let (_, mut applier) = stream(server.endpoint("keyless"), "s", std::slice::from_ref(&table)).await;
    let row = |n: &str, f: &str| [text(n), text("(1,2)"), text("{\"a\": 1}"), text(f), text("x")];
    let with_null = [text("1.0"), Value::Null, text("[]"), Value::Null, Value::Null];
    let mut changes = Changes::default();
    for new in [row("1.0", "0"), row("1.00", "-0"), row("1.00", "-0"), row("1.00", "0"), with_null.clone()] {
        changes.insert(&table, &new);
    }
    // Equal to all of the first four; the identical one goes.
    changes.delete(&table, &row("1.00", "-0"));
    changes.update(&table, &row("1.00", "0"), &[text("9"), Value::Unchanged, Value::Unchanged, text("9"), text("y")]);
    changes.update(&table, &with_null, &[Value::Null, text("(3,4)"), text("1"), text("1"), text("z")]);
    let applied = applier.apply(&changes.committed(10), &all, &[]).await.expect("applied");
    assert_eq!((applied.inserts, applied.updates, applied.deletes), (5, 2, 1));
    let expected = [
        r#"(,"(3,4)",1,1,"z  ")"#,
        r#"(1.0,"(1,2)","{""a"": 1}",0,"x  ")"#,
        r#"(1.00,"(1,2)","{""a"": 1}",-0,"x  ")"#,
        r#"(9,"(1,2)","{""a"": 1}",9,"y  ")"#,
    ];
    assert_eq!(rows(&admin, "shop.log").await, expected);
    let mut changes = Changes::default();
    changes.delete(&table, &row("7", "7"));
    let error = applier.apply(&changes.committed(20), &all, &[]).await.expect_err("missing");
    assert_eq!(error.reason, reason::ROW_MISSING);
    assert!(!error.message.contains('7'), "no values of rows without a key: {error}");
}

#[tokio::test]
async fn values_of_any_type_arrive_unchanged_or_are_refused() {
    let server = server();
    let (admin, _) = database(&server, "types").await;
    admin.batch_execute("CREATE TYPE mood AS ENUM ('ok', 'so so'); CREATE EXTENSION IF NOT EXISTS plpgsql").await.expect("a type");
    let columns = ["!id int4", "m public.mood", "v varchar(3)", "c char(4)", "l int4[]", "r regclass"];
    let table = mapped(6, "all types", "Odd \"schema\"", &columns);
    let (_, mut applier) = stream(server.endpoint("types"), "s", std::slice::from_ref(&table)).await;
    let row = |id: i32, v: &str| [int(id), text("so so"), text(v), text("ab"), text("{1,NULL}"), text("pg_class")];
    let mut changes = Changes::default();
    changes.insert(&table, &row(1, "abc"));
    for id in 2..5 {
        changes.insert(&table, &row(id, "a"));
    }
    // Binary and text of one column in one set.
    changes.insert(&table, &[int(5), Value::Binary(b"ok".to_vec()), Value::Binary(b"b".to_vec()), Value::Null, Value::Null, Value::Null]);
    changes.insert(&table, &[int(6), text("ok"), text("b"), Value::Null, Value::Null, Value::Null]);
    for id in 1..5 {
        changes.update(&table, &[], &[int(id), text("ok"), Value::Unchanged, Value::Unchanged, text("{}"), Value::Null]);
    }
    applier.apply(&changes.committed(10), &all, &[]).await.expect("applied");
    let got = rows(&admin, "\"Odd \"\"schema\"\"\".\"all types\"").await;
    assert_eq!(got[0], "(1,ok,abc,\"ab  \",{},)");
    assert_eq!((&got[4][..], &got[5][..]), ("(5,ok,b,,,)", "(6,ok,b,,,)"));
    // Too long: an error, never cut.
    for count in [1, 2, 250] {
        let (claimed, mut applier) = target(server.endpoint("types")).claim(&key("s"), &owner("a"), None).await.expect("a claim");
        assert_eq!(claimed.checkpoint.expect("a checkpoint").position, Lsn(10));
        applier.prepare(std::slice::from_ref(&table)).await.expect("prepared");
        let mut changes = Changes::default();
        for id in 0..count {
            changes.insert(&table, &row(100 + id, "abcd"));
        }
        let error = applier.apply(&changes.committed(20), &all, &[]).await.expect_err("too long");
        assert_eq!((error.class, error.reason), (Class::Stop, reason::WRITE_REFUSED), "{error}");
    }
    // An OID of the source means something else here.
    let (_, mut applier) = target(server.endpoint("types")).claim(&key("s"), &owner("a"), None).await.expect("a claim");
    applier.prepare(std::slice::from_ref(&table)).await.expect("prepared");
    let mut changes = Changes::default();
    changes.insert(&table, &[int(200), Value::Null, Value::Null, Value::Null, Value::Null, int(1259)]);
    assert_eq!(applier.apply(&changes.committed(20), &all, &[]).await.expect_err("refused").class, Class::Bug);
}

#[tokio::test]
async fn columns_of_rows_must_be_those_that_were_prepared() {
    let server = server();
    let (admin, _) = database(&server, "versions").await;
    let items = items();
    let (target, mut applier) = stream(server.endpoint("versions"), "s", std::slice::from_ref(&items)).await;
    // The same columns, read again.
    applier.apply(&inserts(&self::items(), 0..2).committed(10), &all, &[]).await.expect("applied");
    let wider = mapped(1, "items", "shop", &["!id int4", "v text", "w text"]);
    let mut changes = Changes::default();
    changes.insert(&wider, &[int(9), text("x"), text("y")]);
    let error = applier.apply(&changes.committed(20), &all, &[]).await.expect_err("refused");
    assert_eq!((error.class, error.reason), (Class::Stop, reason::SCHEMA_CHANGED));

    let (_, mut applier) = target.claim(&key("s"), &owner("a"), None).await.expect("a claim");
    let error = applier.prepare(std::slice::from_ref(&wider)).await.expect_err("refused");
    assert_eq!(error.reason, reason::TARGET_TABLE_INCOMPATIBLE);
    admin.batch_execute("ALTER TABLE shop.items ADD w text").await.expect("a column");
    applier.prepare(std::slice::from_ref(&wider)).await.expect("prepared");
    let mut changes = Changes::default();
    changes.insert(&wider, &[int(9), text("x"), text("y")]);
    applier.apply(&changes.committed(20), &all, &[]).await.expect("applied");
    assert_eq!(rows(&admin, "shop.items").await.last().map(String::as_str), Some("(9,x,y)"));
}

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

    let generation = applier.begin_copy(&items, false).await.expect("a copy");
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
        target.finish(&claimed.claim, &items).await.expect("finished");
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
    let again = applier.begin_copy(&items, false).await.expect("another copy");
    assert_eq!(again, 2);
    assert!(applier.done_ranges(&items, 2).await.expect("ranges").is_empty());
    assert!(rows(&admin, "shop.items").await.is_empty());
    let stale = load(4, BulkFormat::PostgresBinary, pieces(binary_rows(0..5), 100)).await.expect_err("of the first generation");
    assert_eq!(stale.class, Class::Bug);
    assert!(rows(&admin, "shop.items").await.is_empty());

    // Ready: only by the user's word.
    applier.set_state(&items, TableState::Ready, None).await.expect("a state");
    admin.batch_execute("INSERT INTO shop.items VALUES (1, 'x')").await.expect("a row");
    let error = applier.begin_copy(&items, false).await.expect_err("not empty");
    assert_eq!((error.class, error.reason), (Class::Stop, reason::TARGET_TABLE_NOT_EMPTY));
    assert_eq!(applier.begin_copy(&items, true).await.expect("emptied"), 3);
    applier.forget(&[items.source().clone()]).await.expect("forgotten");
    admin.batch_execute("INSERT INTO shop.items VALUES (1, 'x')").await.expect("a row");
    assert_eq!(applier.begin_copy(&items, false).await.expect_err("not its own").reason, reason::TARGET_TABLE_NOT_EMPTY);
    let left: i64 = admin.query_one("SELECT count(*) FROM _sluice.tables", &[]).await.expect("a count").get(0);
    assert_eq!(left, 0);
}

#[tokio::test]
async fn what_can_not_work_is_refused_with_its_cure() {
    let server = server();
    let (admin, writer) = database(&server, "checks").await;
    let elsewhere = SourceIdentity { system_identifier: "1".into(), database: "shop".into(), timeline: 1 };
    let here = SourceIdentity {
        system_identifier: admin
            .query_one("SELECT system_identifier::text FROM pg_control_system()", &[])
            .await
            .expect("an identity")
            .get(0),
        database: "checks".into(),
        timeline: 1,
    };
    let items = items();
    let (_, _applier) = stream(server.endpoint("checks"), "s", std::slice::from_ref(&items)).await;
    let as_a = target(server.endpoint("checks"));
    let as_b = PostgresTarget::new(server.endpoint("checks"), owner("b"));
    let as_writer = target(writer.clone());
    as_a.check(&elsewhere, std::slice::from_ref(&items), &[]).await.expect("its own table");
    as_a.check(&here, std::slice::from_ref(&items), &[]).await.expect("another name in the same database");

    let refused = |result: sluice::engine::error::Result<()>, reason: &str, says: &str| {
        let error = result.expect_err("refused");
        assert_eq!(error.reason, reason, "{error}");
        assert!(error.message.contains(says), "{error}");
    };
    refused(as_a.check(&here, &[mapped(2, "x", "public", &["!id int4"])], &[]).await, reason::SAME_TABLE, "public.x");
    refused(as_b.check(&elsewhere, std::slice::from_ref(&items), &[]).await, reason::DUPLICATE_TARGET, "team/a");
    let mut two = mapped(2, "other", "shop", &["!id int4", "v text"]);
    two.target.name = "items".into();
    refused(as_a.check(&elsewhere, &[items.clone(), two], &[]).await, reason::DUPLICATE_TARGET, "public.items and public.other");
    let mut looped = mapped(2, "items", "third", &["!id int4", "v text"]);
    Arc::make_mut(&mut looped.version).name.schema = "shop".into();
    let fed = |system_identifier: &str| Fed {
        table: looped.source().clone(),
        system_identifier: system_identifier.into(),
        database: "checks".into(),
        origin: looped.target.clone(),
        owner: "team/a".into(),
    };
    let looped = std::slice::from_ref(&looped);
    refused(as_b.check(&elsewhere, looped, &[fed(&here.system_identifier)]).await, reason::TARGET_IS_MIRRORED, "team/a");
    as_b.check(&elsewhere, looped, &[fed("another")]).await.expect("fed by another server's table of that name");
    refused(
        as_a.check(&elsewhere, &[mapped(2, "x", "n", &["!id int4", "m public.mood"])], &[]).await,
        reason::TYPE_MISSING,
        "CREATE TYPE \"public\".\"mood\"",
    );

    admin
        .batch_execute("CREATE SCHEMA own; CREATE TABLE own.t (id int4 PRIMARY KEY, v varchar(5)); CREATE VIEW own.view AS SELECT 1 AS id")
        .await
        .expect("tables");
    let narrow = mapped(2, "t", "own", &["!id int4", "v varchar(9)"]);
    refused(
        as_a.check(&elsewhere, &[narrow], &[]).await,
        reason::TARGET_TABLE_INCOMPATIBLE,
        "ALTER COLUMN \"v\" TYPE character varying(9)",
    );
    refused(
        as_a.check(&elsewhere, &[mapped(2, "view", "own", &["!id int4"])], &[]).await,
        reason::TARGET_TABLE_INCOMPATIBLE,
        "not a table",
    );

    let fits = mapped(2, "t", "own", &["!id int4", "v varchar(3)"]);
    refused(
        as_writer.check(&elsewhere, std::slice::from_ref(&fits), &[]).await,
        reason::PRIVILEGE_MISSING,
        "permission denied for schema _sluice",
    );
    admin
        .batch_execute("GRANT USAGE ON SCHEMA _sluice, own TO writer_checks; GRANT ALL ON ALL TABLES IN SCHEMA _sluice TO writer_checks")
        .await
        .expect("grants");
    refused(
        as_writer.check(&elsewhere, std::slice::from_ref(&fits), &[]).await,
        reason::PRIVILEGE_MISSING,
        "GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON \"own\".\"t\"",
    );
    refused(
        as_writer.check(&elsewhere, &[mapped(2, "new", "own", &["!id int4"])], &[]).await,
        reason::PRIVILEGE_MISSING,
        "GRANT CREATE, USAGE ON SCHEMA \"own\"",
    );
    as_writer.check(&elsewhere, &[mapped(2, "new", "fresh", &["!id int4"])], &[]).await.expect("a schema of its own");
    admin
        .batch_execute(
            "GRANT ALL ON own.t TO writer_checks; CREATE FUNCTION own.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
             CREATE TRIGGER swallow BEFORE INSERT ON own.t FOR EACH ROW EXECUTE FUNCTION own.f()",
        )
        .await
        .expect("a trigger");
    refused(
        as_writer.check(&elsewhere, std::slice::from_ref(&fits), &[]).await,
        reason::TARGET_TABLE_INCOMPATIBLE,
        "GRANT SET ON PARAMETER session_replication_role TO \"writer_checks\"",
    );
    as_a.check(&elsewhere, std::slice::from_ref(&fits), &[]).await.expect("with replica role");
    admin
        .batch_execute("DROP TRIGGER swallow ON own.t; CREATE TABLE own.child (t int4 REFERENCES own.t ON DELETE CASCADE)")
        .await
        .expect("a child");
    refused(as_writer.check(&elsewhere, std::slice::from_ref(&fits), &[]).await, reason::TARGET_TABLE_INCOMPATIBLE, "child_t_fkey");
    admin.batch_execute("GRANT SET ON PARAMETER session_replication_role TO writer_checks").await.expect("a grant");
    as_writer.check(&elsewhere, std::slice::from_ref(&fits), &[]).await.expect("with replica role");

    admin.batch_execute("ALTER DATABASE checks SET default_transaction_read_only = on").await.expect("read only");
    refused(as_a.check(&elsewhere, std::slice::from_ref(&items), &[]).await, reason::TARGET_READ_ONLY, "default_transaction_read_only");
    let error = as_a.claim(&key("s"), &owner("a"), None).await.err().expect("refused");
    assert_eq!((error.class, error.reason), (Class::Retry, reason::TARGET_READ_ONLY));
}

#[tokio::test]
async fn two_streams_never_write_one_table() {
    let server = server();
    let (admin, _) = database(&server, "owners").await;
    let items = items();
    let (_, mut ours) = stream(server.endpoint("owners"), "s", std::slice::from_ref(&items)).await;
    let other = PostgresTarget::new(server.endpoint("owners"), owner("b"));
    let (_, mut theirs) = other.claim(&key("t"), &owner("b"), None).await.expect("a claim of another slot");
    let error = theirs.begin_copy(&items, true).await.expect_err("refused");
    assert_eq!((error.class, error.reason), (Class::Stop, reason::DUPLICATE_TARGET));
    assert!(error.message.contains("team/a"), "{error}");
    assert_eq!(theirs.set_state(&items, TableState::Ready, None).await.expect_err("refused").reason, reason::DUPLICATE_TARGET);
    // The same Mirror with another slot takes its tables along.
    let (_, mut moved) = target(server.endpoint("owners")).claim(&key("u"), &owner("a"), None).await.expect("a claim");
    moved.begin_copy(&items, false).await.expect("an empty table");
    let slots: Vec<String> =
        admin.query("SELECT slot FROM _sluice.tables", &[]).await.expect("rows").iter().map(|row| row.get(0)).collect();
    assert_eq!(slots, ["u"]);
    ours.apply(&Changes::default().committed(10), &all, &[]).await.expect("its checkpoint is its own");
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
    let applied = applier.apply(&changes.committed(10), &all, &[]).await.expect("applied");
    assert_eq!((applied.inserts, applied.updates, applied.deletes), (501, 101, 51));
    assert_eq!(rows(&admin, "shop.items").await.len(), 450);
    let mut changes = Changes::default();
    changes.truncate(&[&items, &log]);
    let part: Part<Lsn> = changes.committed(20);
    applier.apply(&part, &all, &[]).await.expect("applied");
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
