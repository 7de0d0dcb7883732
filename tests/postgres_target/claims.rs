//! Claims and fences; checkpoints that move with the data; what is durable.

use super::*;
use sluice::engine::register::{Reached, Register as _};

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
    first.begin_copy(&items, &[], false).await.expect("a copy");
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
    assert!(!apply(&mut old, part).await.expect("a piece").committed);
    let (claimed, mut new) = target(writer).claim(&key("s"), &owner("a"), None).await.expect("a claim");
    assert_eq!((claimed.claim.epoch, new.mode()), (2, ApplyMode::Ordered));

    let error = apply(&mut old, inserts(&items, 3..5).part(true, Some(20), 20)).await.expect_err("fenced");
    assert_eq!((error.class, error.reason), (Class::Fenced, reason::FENCED));
    assert_eq!(apply(&mut old, inserts(&items, 5..6).committed(30)).await.expect_err("used up").class, Class::Bug);
    let rows_of_range = futures::stream::iter([Ok(Bytes::from_static(b"9\tx\n"))]).boxed();
    let error = old_target
        .load(&claim("s", 1), &items, 1, &Range { number: 0, blocks: None }, BulkFormat::PostgresText, rows_of_range)
        .await
        .expect_err("fenced");
    assert_eq!(error.class, Class::Fenced);
    assert_eq!(old_target.finish(&claim("s", 1), &items, &[], BUILDERS, &|_| ()).await.expect_err("fenced").class, Class::Fenced);

    new.prepare(std::slice::from_ref(&items)).await.expect("prepared");
    apply(&mut new, inserts(&items, 0..2).committed(40)).await.expect("applied");
    assert_eq!(rows(&admin, "shop.items").await.len(), 2);
    assert_eq!(position(&admin, "s").await.as_deref(), Some("0/28"));
}

#[tokio::test]
async fn a_claim_waits_for_a_transaction_that_has_proven_the_old_one() {
    let server = server();
    let (admin, _) = database(&server, "proofs").await;
    let (target, _old) = stream(server.endpoint("proofs"), "s", &[]).await;
    // As an old worker's range between its proof and its commit, on a backend that may not be ended.
    admin.batch_execute("BEGIN; SELECT FROM _sluice.streams WHERE epoch = 1 FOR KEY SHARE").await.expect("a proof");
    let claim = tokio::spawn(async move { target.claim(&key("s"), &owner("a"), None).await });
    eventually(10, "the claim waits", || async {
        let waiting = admin.query_one("SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'", &[]).await;
        waiting.expect("a count").get::<_, i64>(0) == 1
    })
    .await;
    assert!(!claim.is_finished());
    admin.batch_execute("COMMIT").await.expect("a commit");
    assert_eq!(claim.await.expect("no panic").expect("a claim").0.claim.epoch, 2);
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
    let generation = applier.begin_copy(&items, &[], false).await.expect("a copy");
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
    assert_eq!(applier.begin_copy(&items, &[], false).await.expect("a copy"), 2);
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
            apply(&mut applier, first(n)).await?;
            apply(&mut applier, second(n)).await
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
        apply(&mut applier, part).await.expect("applied");
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
    apply(&mut applier, inserts(&items, 0..1).committed(20)).await.expect("applied");
    applier.advance(&Lsn(40), &[items.source().clone()]).await.expect("advanced");
    let row = admin.query_one("SELECT state, position FROM _sluice.tables", &[]).await.expect("a table");
    assert_eq!((row.get::<_, &str>(0), row.get::<_, Option<&str>>(1)), ("Ready", None));
    // Nothing moves: nothing is written.
    let version = "SELECT xmin::text, ctid::text FROM _sluice.streams";
    let written = |row: tokio_postgres::Row| (row.get::<_, String>(0), row.get::<_, String>(1));
    let before = written(admin.query_one(version, &[]).await.expect("a row"));
    applier.advance(&Lsn(40), &[]).await.expect("nothing");
    apply(&mut applier, Changes::default().committed(40)).await.expect("nothing");
    applier.apply(inserts(&items, 0..1).committed(40).into(), &|_, _| false, &Reached::default()).await.expect("nothing");
    applier.applied().await.expect("nothing").expect("its outcome");
    assert_eq!(written(admin.query_one(version, &[]).await.expect("a row")), before);
    let deadline = Instant::now() + Duration::from_secs(10);
    while applier.durable().await.expect("a position") != Some(Lsn(40)) {
        assert!(Instant::now() < deadline, "not durable");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The log is read again for one table: its rows and its own position move together, and the checkpoint stays.
#[tokio::test]
async fn a_table_behind_the_checkpoint_catches_up_by_itself() {
    let server = server();
    let (admin, _) = database(&server, "behind").await;
    let items = items();
    let (target, mut applier) = stream(server.endpoint("behind"), "s", std::slice::from_ref(&items)).await;
    applier.advance(&Lsn(40), &[]).await.expect("advanced");
    applier.set_state(&items, TableState::CatchingUp, Some(&Lsn(8))).await.expect("a state");
    let behind = Reached { joined: Vec::new(), own: vec![items.source().clone()] };
    applier.apply(inserts(&items, 0..1).committed(16).into(), &changes::all, &behind).await.expect("accepted");
    applier.applied().await.expect("committed").expect("its outcome");
    let sql = "SELECT state, tables.position, streams.position, (SELECT count(*) FROM shop.items)
               FROM _sluice.tables JOIN _sluice.streams USING (slot)";
    let held = async || {
        let row = admin.query_one(sql, &[]).await.expect("a table");
        (row.get::<_, String>(0), row.get::<_, Option<String>>(1), row.get::<_, String>(2), row.get::<_, i64>(3))
    };
    let [own, checkpoint] = [Lsn(16), Lsn(40)].map(|position| position.to_string());
    assert_eq!(held().await, ("CatchingUp".into(), Some(own), checkpoint.clone(), 1));
    // Rows from before the checkpoint that belong to no such table are a defect.
    applier.apply(inserts(&items, 1..2).committed(24).into(), &changes::all, &Reached::default()).await.expect("accepted");
    assert_eq!(applier.applied().await.expect_err("refused").class, Class::Bug);
    let (claimed, mut applier) = target.claim(&key("s"), &owner("a"), None).await.expect("a claim");
    assert_eq!(claimed.checkpoint.expect("a checkpoint").tables[items.source()].position, Some(Lsn(16)));
    applier.prepare(std::slice::from_ref(&items)).await.expect("prepared");
    let joined = Reached { joined: vec![items.source().clone()], own: Vec::new() };
    applier.apply(inserts(&items, 1..2).committed(40).into(), &changes::all, &joined).await.expect("accepted");
    applier.applied().await.expect("committed").expect("its outcome");
    assert_eq!(held().await, ("Ready".into(), None, checkpoint, 2));
}

#[tokio::test]
async fn a_stopped_writer_leaves_nothing_behind() {
    let server = server();
    let (admin, _) = database(&server, "stops").await;
    let items = items();
    let (target, mut applier) = stream(server.endpoint("stops"), "s", std::slice::from_ref(&items)).await;
    apply(&mut applier, inserts(&items, 0..3).part(false, None, 10)).await.expect("a piece");
    admin.batch_execute("BEGIN; LOCK TABLE shop.items IN SHARE MODE NOWAIT").await.expect_err("rows are being written");
    admin.batch_execute("ROLLBACK").await.expect("rolled back");
    // A statement that waits for somebody else's lock is cancelled.
    let other = server.connect("stops").await;
    other.batch_execute("BEGIN; INSERT INTO shop.items VALUES (7, 'theirs')").await.expect("a lock");
    let waiting = inserts(&items, 7..8).part(true, Some(20), 20);
    let cut = tokio::time::timeout(Duration::from_millis(300), apply(&mut applier, waiting)).await;
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

#[tokio::test]
async fn two_streams_never_write_one_table() {
    let server = server();
    let (admin, _) = database(&server, "owners").await;
    let items = items();
    let (_, mut ours) = stream(server.endpoint("owners"), "s", std::slice::from_ref(&items)).await;
    let other = PostgresTarget::new(server.endpoint("owners"), owner("b"));
    let (_, mut theirs) = other.claim(&key("t"), &owner("b"), None).await.expect("a claim of another slot");
    let error = theirs.begin_copy(&items, &[], true).await.expect_err("refused");
    assert_eq!((error.class, error.reason), (Class::Stop, reason::DUPLICATE_TARGET));
    assert!(error.message.contains("team/a"), "{error}");
    assert_eq!(theirs.set_state(&items, TableState::Ready, None).await.expect_err("refused").reason, reason::DUPLICATE_TARGET);
    // The same Mirror with another slot takes its tables along.
    let (_, mut moved) = target(server.endpoint("owners")).claim(&key("u"), &owner("a"), None).await.expect("a claim");
    moved.begin_copy(&items, &[], false).await.expect("an empty table");
    let slots: Vec<String> =
        admin.query("SELECT slot FROM _sluice.tables", &[]).await.expect("rows").iter().map(|row| row.get(0)).collect();
    assert_eq!(slots, ["u"]);
    apply(&mut ours, Changes::default().committed(10)).await.expect("its checkpoint is its own");
}
