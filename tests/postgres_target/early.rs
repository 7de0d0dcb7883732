//! A transaction that is written before it has ended on the source.

use super::*;
use sluice::engine::register::Reached;
use sluice::engine::roles::Outcome;
use std::collections::HashSet;

/// A stream on two connections.
async fn two(server: &Postgres, name: &str) -> (Client, PostgresTarget, PostgresApplier, MappedTable) {
    let (admin, _) = database(server, name).await;
    let items = items();
    let target = target(server.endpoint(name)).with_apply_connections(2);
    let (target, applier) = stream_of(target, "s", std::slice::from_ref(&items)).await;
    assert_eq!(applier.early_tables(), HashSet::from([items.version.id]));
    (admin, target, applier, items)
}

/// A piece with these rows.
fn piece(items: &MappedTable, ids: std::ops::Range<i32>, continues: bool) -> Arc<Part<Lsn>> {
    Arc::new(inserts(items, ids).part(continues, None, 8))
}

/// Writes a piece and waits for it.
async fn write(applier: &mut PostgresApplier, piece: Arc<Part<Lsn>>) {
    assert!(applier.apply_early(piece).await.expect("no part has failed"), "it is begun");
    let Outcome::Early(Some(applied)) = applier.outcome().await.expect("an outcome") else { panic!("it is not written") };
    assert!(applied.inserts > 0 && !applied.committed);
}

async fn count(client: &Client) -> i64 {
    client.query_one("SELECT count(*) FROM shop.items", &[]).await.expect("a count").get(0)
}

#[tokio::test]
async fn pieces_are_committed_with_the_rest_and_the_checkpoint() {
    let server = server();
    let (admin, _, mut applier, items) = two(&server, "early_rest").await;
    for round in 0..2 {
        let (from, end) = (round * 10_000, 100 * (round as u64 + 1));
        write(&mut applier, piece(&items, from..from + 1000, false)).await;
        // One is written while the next one waits.
        for first in [from + 1000, from + 2000] {
            assert!(applier.apply_early(piece(&items, first..first + 1000, true)).await.expect("no part has failed"));
        }
        for _ in 0..2 {
            assert!(matches!(applier.outcome().await.expect("an outcome"), Outcome::Early(Some(_))));
        }
        let before = i64::from(round) * 4001;
        assert_eq!(count(&admin).await, before, "nothing is seen before the end");
        // Another transaction is written beside it.
        apply(&mut applier, inserts(&items, from + 9000..from + 9001).committed(end)).await.expect("applied");
        assert_eq!(count(&admin).await, before + 1);
        apply(&mut applier, inserts(&items, from + 3000..from + 3500).part(true, None, end + 5)).await.expect("applied");
        assert_eq!(count(&admin).await, before + 1);
        let last = inserts(&items, from + 3500..from + 4000).part(true, Some(end + 10), end + 10);
        assert!(apply(&mut applier, last).await.expect("applied").committed);
        assert_eq!(count(&admin).await, before + 4001);
        assert_eq!(position(&admin, "s").await, Some(Lsn(end + 10).to_string()));
    }
    let transactions = "SELECT count(DISTINCT xmin::text) FROM shop.items WHERE id < 9000";
    assert_eq!(admin.query_one(transactions, &[]).await.expect("a count").get::<_, i64>(0), 1, "all of it is one transaction");
    let rows = admin.query_one("SELECT rows_streamed FROM _sluice.streams", &[]).await.expect("a checkpoint");
    assert_eq!(rows.get::<_, i64>(0), 2 * 4001);
}

#[tokio::test]
async fn what_was_rolled_back_holds_no_keys() {
    let server = server();
    let (admin, _, mut applier, items) = two(&server, "early_rolled_back").await;
    write(&mut applier, piece(&items, 0..1000, false)).await;
    applier.drop_early();
    apply(&mut applier, inserts(&items, 0..10).committed(16)).await.expect("applied");
    // Again, while a piece is being written.
    assert!(applier.apply_early(piece(&items, 1000..30_000, false)).await.expect("no part has failed"));
    applier.drop_early();
    apply(&mut applier, inserts(&items, 1000..1010).committed(24)).await.expect("applied");
    assert_eq!(count(&admin).await, 20);
    // The rest of what is not there any more is refused.
    let refused = apply(&mut applier, inserts(&items, 2000..2010).part(true, Some(32), 32)).await.expect_err("refused");
    assert_eq!((refused.class, refused.reason), (Class::Retry, reason::WRITE_REFUSED));
    assert_eq!(position(&admin, "s").await, Some(Lsn(24).to_string()));
}

#[tokio::test]
async fn a_piece_that_fails_is_told_and_nothing_else_fails() {
    let server = server();
    let (admin, _, mut applier, items) = two(&server, "early_fails").await;
    apply(&mut applier, inserts(&items, 500..501).committed(16)).await.expect("applied");
    write(&mut applier, piece(&items, 1000..2000, false)).await;
    assert!(applier.apply_early(piece(&items, 0..1000, true)).await.expect("no part has failed"));
    assert!(applier.apply_early(piece(&items, 3000..4000, true)).await.expect("no part has failed"));
    assert_eq!(applier.outcome().await.expect("an outcome"), Outcome::Early(None), "a key is there already");
    apply(&mut applier, inserts(&items, 1000..2000).committed(24)).await.expect("applied");
    // Another one is written on another connection.
    write(&mut applier, piece(&items, 2000..3000, false)).await;
    apply(&mut applier, inserts(&items, 3000..3001).part(true, Some(32), 32)).await.expect("applied");
    assert_eq!(count(&admin).await, 1 + 1000 + 1000 + 1);
}

#[tokio::test]
async fn an_earlier_part_that_waits_for_a_piece_is_given_way() {
    let server = server();
    let (admin, _, mut applier, items) = two(&server, "early_gives_way").await;
    write(&mut applier, piece(&items, 0..1000, false)).await;
    // On the source nobody could hold this key.
    applier.apply(Arc::new(inserts(&items, 7..8).committed(16)), &changes::all, &Reached::default()).await.expect("accepted");
    let mut outcomes = [applier.outcome().await.expect("an outcome"), applier.outcome().await.expect("an outcome")];
    outcomes.sort_by_key(|outcome| matches!(outcome, Outcome::Part(_)));
    assert!(matches!(outcomes, [Outcome::Early(None), Outcome::Part(Some(_))]), "{outcomes:?}");
    assert_eq!(rows(&admin, "shop.items").await, ["(7,\"row 7\")"]);
}

#[tokio::test]
async fn a_piece_waits_for_earlier_parts_with_the_same_keys() {
    let server = server();
    let (admin, _, mut applier, items) = two(&server, "early_waits").await;
    apply(&mut applier, inserts(&items, 0..10).committed(16)).await.expect("applied");
    let foreign = server.connect("early_waits").await;
    foreign.batch_execute("BEGIN; SELECT FROM shop.items WHERE id = 5 FOR UPDATE").await.expect("a lock");
    let mut delete = Changes::default();
    delete.delete(&items, &[int(5), Value::Null]);
    applier.apply(Arc::new(delete.committed(24)), &changes::all, &Reached::default()).await.expect("accepted");
    // A piece without that key is written beside it.
    write(&mut applier, piece(&items, 100..200, false)).await;
    let accepted = async { (applier.apply_early(piece(&items, 5..6, true)).await.expect("no part has failed"), Instant::now()) };
    let free = async {
        let waits = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = 'early_waits' AND wait_event_type = 'Lock')";
        eventually(10, "the delete waits", || async { admin.query_one(waits, &[]).await.expect("a look").get(0) }).await;
        let freed = Instant::now();
        drop(foreign);
        freed
    };
    let ((accepted, at), freed) = tokio::join!(accepted, free);
    assert!(accepted && at > freed, "it is begun when the key is free");
    let mut outcomes = [applier.outcome().await.expect("an outcome"), applier.outcome().await.expect("an outcome")];
    outcomes.sort_by_key(|outcome| matches!(outcome, Outcome::Part(_)));
    assert!(matches!(outcomes, [Outcome::Early(Some(_)), Outcome::Part(Some(_))]), "{outcomes:?}");
    apply(&mut applier, Changes::default().part(true, Some(32), 32)).await.expect("applied");
    assert_eq!(count(&admin).await, 9 + 100 + 1);
}

#[tokio::test]
async fn a_claim_and_a_stop_end_what_was_written_early() {
    let server = server();
    let (admin, target, mut applier, items) = two(&server, "early_ends").await;
    write(&mut applier, piece(&items, 0..1000, false)).await;
    let open = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'early_ends' AND backend_xid IS NOT NULL";
    let open = || async { admin.query_one(open, &[]).await.expect("a look").get::<_, i64>(0) };
    assert_eq!(open().await, 1);
    let (_, mut new) = target.claim(&key("s"), &owner("a"), Some(1)).await.expect("a claim");
    assert_eq!(open().await, 0, "the claim has ended it");
    drop(applier);
    new.prepare(std::slice::from_ref(&items)).await.expect("prepared");
    write(&mut new, piece(&items, 0..1000, false)).await;
    assert!(new.apply_early(piece(&items, 1000..30_000, true)).await.expect("no part has failed"));
    new.abort().await;
    eventually(5, "it is rolled back", || async { open().await == 0 }).await;
    assert_eq!((count(&admin).await, position(&admin, "s").await), (0, Some(Lsn(1).to_string())));
}

/// A server that has crashed may have forgotten commits, and takes new connections.
#[tokio::test]
async fn nothing_is_written_early_behind_connections_that_have_ended() {
    let server = server();
    let (admin, _target, mut applier, items) = two(&server, "early_lost").await;
    let end = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = 'early_lost' AND pid <> pg_backend_pid()";
    admin.batch_execute(end).await.expect("ended");
    let deadline = Instant::now() + Duration::from_secs(5);
    while applier.apply_early(piece(&items, 0..1000, false)).await.expect("no part has failed") {
        assert!(Instant::now() < deadline, "it is still written");
        applier.drop_early();
    }
    assert_eq!(count(&admin).await, 0);
}

#[tokio::test]
async fn only_rows_that_nobody_else_can_want_are_written_early() {
    let server = server();
    let (admin, _) = database(&server, "early_tables").await;
    let tables = [items(), mapped(2, "names", "shop", &["!id int4", "v text"]), mapped(3, "log", "shop", &["n int4", "t text"])];
    let target = super::target(server.endpoint("early_tables")).with_apply_connections(2);
    let (target, mut applier) = stream_of(target, "s", &tables).await;
    admin.batch_execute("CREATE UNIQUE INDEX ON shop.names (v)").await.expect("an index");
    applier.prepare(&tables).await.expect("prepared");
    assert_eq!(applier.early_tables(), HashSet::from([tables[0].version.id]), "no other unique index, and a key");
    drop((target, applier));
    // Not without replica role, and not on one connection.
    let (_admin, writer) = database(&server, "early_ordered").await;
    let ordered = super::target(writer).with_apply_connections(2);
    let one = super::target(server.endpoint("early_tables"));
    for (target, slot, mode) in [(ordered, "s", ApplyMode::Ordered), (one, "one", ApplyMode::Replica)] {
        let items = mapped(1, "items", slot, &["!id int4", "v text"]);
        let (_, applier) = stream_of(target, slot, &[items]).await;
        assert_eq!((applier.mode(), applier.early_tables()), (mode, HashSet::new()));
    }
}
