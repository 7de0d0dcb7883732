//! Parts on several connections: the same rows as one after the other, committed in order, whatever fails.

use super::*;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use sluice::engine::batch::Op;
use sluice::engine::register::Reached;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64};

const CONNECTIONS: usize = 3;

/// A stream whose parts may be written side by side.
async fn parallel(endpoint: Endpoint, slot: &str, tables: &[MappedTable]) -> (PostgresTarget, PostgresApplier) {
    stream_of(target(endpoint).with_apply_connections(CONNECTIONS), slot, tables).await
}

/// Transactions of a source with what its tables hold after each. Part n ends at 8 n.
struct History {
    random: StdRng,
    tables: [MappedTable; 4],
    items: BTreeMap<i32, String>,
    /// With a unique index on the target besides the key.
    names: BTreeMap<i32, String>,
    /// Without a key.
    log: Vec<(i32, String)>,
    /// Pieces of each transaction, and the rows of all tables after it; the first is the empty beginning.
    parts: Vec<(Vec<Piece>, [Vec<String>; 4])>,
}

/// Changes: number of the table, what is done, old and new row.
type Piece = Vec<(usize, Op, Vec<Value>, Vec<Value>)>;

impl History {
    fn new(seed: u64, parts: u64) -> Self {
        let tables = [
            items(),
            mapped(2, "names", "shop", &["!id int4", "v text"]),
            mapped(3, "log", "shop", &["id int4", "v text"]),
            mapped(4, "marks", "shop", &["!id int4", "v text"]),
        ];
        let (items, names, log) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        let mut history = Self { random: StdRng::seed_from_u64(seed), tables, items, names, log, parts: Vec::new() };
        history.parts.push((Vec::new(), history.rows(0)));
        for n in 1..=parts {
            let pieces = if history.chance(8) { 2 } else { 1 };
            let pieces = (0..pieces).map(|piece| history.piece((piece == 0).then_some(n as i32))).collect();
            let rows = history.rows(n);
            history.parts.push((pieces, rows));
        }
        history
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.random.random_range(0..100) < percent
    }

    fn piece(&mut self, mark: Option<i32>) -> Piece {
        let mut changes = Piece::new();
        if let Some(mark) = mark {
            changes.push((3, Op::Insert, vec![], vec![int(mark), text("x")]));
        }
        // Most transactions stay in one corner, so that some neighbours have rows in common and some have not.
        let corner = self.random.random_range(0..10) * 40;
        for _ in 0..self.random.random_range(1..25) {
            match self.random.random_range(0..1000) {
                0..960 => self.change_item(&mut changes, corner),
                960..980 => self.change_name(&mut changes),
                980..997 => self.change_log(&mut changes),
                _ => {
                    changes.push((0, Op::Truncate, vec![], vec![]));
                    self.items.clear();
                }
            }
        }
        changes
    }

    fn change_item(&mut self, changes: &mut Piece, corner: i32) {
        let (id, other) = (corner + self.random.random_range(0..40), corner + self.random.random_range(0..80));
        let value = format!("v{}", self.random.random_range(0..1_000_000));
        if !self.items.contains_key(&id) {
            changes.push((0, Op::Insert, vec![], vec![int(id), text(&value)]));
            self.items.insert(id, value);
        } else if self.random.random_bool(0.2) {
            changes.push((0, Op::Delete, vec![int(id), Value::Null], vec![]));
            self.items.remove(&id);
        } else if self.random.random_bool(0.2) && !self.items.contains_key(&other) {
            changes.push((0, Op::Update, vec![int(id), Value::Null], vec![int(other), text(&value)]));
            self.items.remove(&id);
            self.items.insert(other, value);
        } else {
            changes.push((0, Op::Update, vec![], vec![int(id), text(&value)]));
            self.items.insert(id, value);
        }
    }

    /// Values wander from row to row.
    fn change_name(&mut self, changes: &mut Piece) {
        let free: BTreeSet<String> = (0..6).map(|n| format!("n{n}")).filter(|name| !self.names.values().any(|held| held == name)).collect();
        let id = self.random.random_range(0..5);
        match (self.names.contains_key(&id), free.first().cloned()) {
            (false, Some(name)) => {
                changes.push((1, Op::Insert, vec![], vec![int(id), text(&name)]));
                self.names.insert(id, name);
            }
            (true, Some(name)) if self.random.random_bool(0.5) => {
                changes.push((1, Op::Update, vec![], vec![int(id), text(&name)]));
                self.names.insert(id, name);
            }
            (true, _) => {
                changes.push((1, Op::Delete, vec![int(id), Value::Null], vec![]));
                self.names.remove(&id);
            }
            (false, None) => {}
        }
    }

    fn change_log(&mut self, changes: &mut Piece) {
        if self.log.len() > 3 {
            let (id, value) = self.log.swap_remove(0);
            changes.push((2, Op::Delete, vec![int(id), text(&value)], vec![]));
        } else {
            let row = (self.random.random_range(0..2), "same".to_owned());
            changes.push((2, Op::Insert, vec![], vec![int(row.0), text(&row.1)]));
            self.log.push(row);
        }
    }

    /// As [`rows`] reads them.
    fn rows(&self, parts: u64) -> [Vec<String>; 4] {
        let sorted = |rows: &mut dyn Iterator<Item = String>| {
            let mut rows: Vec<String> = rows.collect();
            rows.sort_unstable();
            rows
        };
        let keyed = |rows: &BTreeMap<i32, String>| sorted(&mut rows.iter().map(|(id, value)| format!("({id},{value})")));
        [
            keyed(&self.items),
            keyed(&self.names),
            sorted(&mut self.log.iter().map(|(id, value)| format!("({id},{value})"))),
            sorted(&mut (1..=parts).map(|mark| format!("({mark},x)"))),
        ]
    }

    /// The parts of the log that carry transaction `n`.
    fn transaction(&self, n: u64) -> Vec<Part<Lsn>> {
        let pieces = &self.parts[n as usize].0;
        let last = pieces.len() - 1;
        let part = |(place, piece): (usize, &Piece)| {
            let mut changes = Changes::default();
            for (table, op, old, new) in piece {
                changes.push(&self.tables[*table], *op, old, new);
            }
            changes.part(place > 0, (place == last).then_some(n * 8), n * 8)
        };
        pieces.iter().enumerate().map(part).collect()
    }

    async fn assert_equal(&self, client: &Client, n: u64, when: &str) {
        for (table, expected) in self.tables.iter().zip(&self.parts[n as usize].1) {
            let found = rows(client, &format!("shop.\"{}\"", table.target.name)).await;
            assert_eq!(&found, expected, "{when}: table {} after transaction {n}", table.target);
        }
    }
}

async fn begin(admin: &Client, target: &PostgresTarget, slot: &str, tables: &[MappedTable]) -> PostgresApplier {
    let (_, mut applier) = stream_of(target.clone(), slot, tables).await;
    admin.batch_execute("CREATE UNIQUE INDEX ON shop.names (v)").await.expect("an index");
    applier.prepare(tables).await.expect("prepared");
    applier
}

fn seeds(default: std::ops::Range<u64>) -> Vec<u64> {
    match std::env::var("SLUICE_SEED") {
        Ok(seed) => vec![seed.parse().expect("SLUICE_SEED is a number")],
        Err(_) => default.collect(),
    }
}

/// Looks again and again: whoever sees a transaction sees all before it, and the checkpoint with them.
async fn watch(client: Client, ended: Arc<AtomicBool>, looks: Arc<AtomicU64>) {
    let sql = "SELECT count(*), coalesce(max(id), 0)::int8, (SELECT position FROM _sluice.streams) FROM shop.marks";
    while !ended.load(Relaxed) {
        let row = client.query_one(sql, &[]).await.expect("a look");
        let (count, last, position): (i64, i64, String) = (row.get(0), row.get(1), row.get(2));
        assert_eq!(count, last, "a transaction is seen without one before it");
        let position = position.parse::<Lsn>().expect("a position");
        assert_eq!(position.0.max(8) / 8, last.max(1) as u64, "checkpoint {position} beside transaction {last}");
        looks.fetch_add(1, Relaxed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_connections_leave_the_same_rows_as_one() {
    const TRANSACTIONS: u64 = 250;
    let server = server();
    for seed in seeds(0..3) {
        let history = History::new(seed, TRANSACTIONS);
        for connections in [1, CONNECTIONS] {
            let name = format!("same_{seed}_{connections}");
            let (admin, _) = database(&server, &name).await;
            let target = target(server.endpoint(&name)).with_apply_connections(connections);
            let mut applier = begin(&admin, &target, "s", &history.tables).await;
            let (ended, looks) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
            let watcher = tokio::spawn(watch(server.connect(&name).await, Arc::clone(&ended), Arc::clone(&looks)));
            let mut quiet = StdRng::seed_from_u64(seed);
            for n in 1..=TRANSACTIONS {
                for part in history.transaction(n) {
                    applier
                        .apply(part.into(), &changes::all, &Reached::default())
                        .await
                        .unwrap_or_else(|error| panic!("seed {seed}: {n}: {error}"));
                }
                if quiet.random_bool(0.05) || n == TRANSACTIONS {
                    while applier.applied().await.unwrap_or_else(|error| panic!("seed {seed}: {n}: {error}")).is_some() {}
                    history.assert_equal(&admin, n, &format!("seed {seed}, {connections} connections")).await;
                }
            }
            ended.store(true, Relaxed);
            watcher.await.expect("in order");
            assert!(looks.load(Relaxed) > 20);
            applier.abort().await;
        }
    }
}

/// What happens to a stream in the middle.
#[derive(Debug)]
enum Mishap {
    /// The worker is killed: its sockets close, nobody says goodbye.
    Worker,
    /// One of its backends ends.
    Backend,
    /// The target crashes, and with it what was committed and not on disk.
    Target,
    /// Somebody else holds a row for a while.
    Lock,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_are_those_of_the_checkpoint_whatever_is_killed() {
    const TRANSACTIONS: u64 = 1500;
    for seed in seeds(0..1) {
        let mut server = Postgres::start_with(15, &["wal_writer_delay=2s"]);
        let (mut admin, _) = database(&server, "mishaps").await;
        let history = History::new(seed, TRANSACTIONS);
        let target = target(server.endpoint("mishaps")).with_apply_connections(CONNECTIONS);
        drop(begin(&admin, &target, "s", &history.tables).await);
        let mut random = StdRng::seed_from_u64(seed);
        let (mut durable, mut mishaps) = (0, 0);
        loop {
            let (claimed, mut writer) = target.claim(&key("s"), &owner("a"), None).await.expect("a claim");
            let mut n = claimed.checkpoint.expect("a checkpoint").position.0 / 8;
            assert!(n >= durable, "seed {seed}: {durable} was called durable, {n} has survived");
            history.assert_equal(&admin, n, &format!("seed {seed}, mishap {mishaps}")).await;
            if n == TRANSACTIONS {
                break;
            }
            writer.prepare(&history.tables).await.expect("prepared");
            let until = (n + random.random_range(20..120)).min(TRANSACTIONS);
            let mut committed = n;
            let mut mishap = None;
            let result = async {
                while n < until {
                    n += 1;
                    for part in history.transaction(n) {
                        writer.apply(part.into(), &changes::all, &Reached::default()).await?;
                    }
                    while !writer.has_room() {
                        committed += u64::from(writer.applied().await?.expect("its outcome").committed);
                    }
                    durable = writer.durable().await?.expect("a position").0 / 8;
                    if n + 3 == until {
                        mishap = Some(
                            [Mishap::Worker, Mishap::Backend, Mishap::Target, Mishap::Lock].into_iter().nth(mishaps % 4).expect("one"),
                        );
                        match &mishap {
                            Some(Mishap::Backend) => {
                                let sql = "SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity
                                           WHERE datname = current_database() AND application_name = 'sluice apply' ORDER BY random() LIMIT 1) AS one";
                                admin.execute(sql, &[]).await.expect("killed");
                            }
                            Some(Mishap::Target) => server.crash_and_restart(),
                            Some(Mishap::Lock) => {
                                let other = server.connect("mishaps").await;
                                other
                                    .batch_execute("BEGIN; SELECT FROM shop.items ORDER BY random() LIMIT 3 FOR UPDATE")
                                    .await
                                    .expect("locks");
                                tokio::spawn(async move {
                                    tokio::time::sleep(Duration::from_millis(1500)).await;
                                    drop(other);
                                });
                            }
                            Some(Mishap::Worker) | None => {}
                        }
                    }
                }
                while let Some(applied) = writer.applied().await? {
                    committed += u64::from(applied.committed);
                }
                Ok(())
            };
            // A worker is killed with parts in flight, wherever they are.
            let result: sluice::engine::error::Result<()> = match random.random_range(0..3) {
                0 if mishaps % 4 == 0 => {
                    tokio::time::timeout(Duration::from_millis(random.random_range(1..80)), result).await.unwrap_or(Ok(()))
                }
                _ => result.await,
            };
            mishaps += 1;
            if let Err(error) = result {
                assert_eq!(error.class, Class::Retry, "seed {seed}: {error}");
                assert!(!matches!(mishap, None | Some(Mishap::Worker | Mishap::Lock)), "seed {seed}: {mishap:?}: {error}");
            }
            drop(writer);
            if matches!(mishap, Some(Mishap::Target)) {
                admin = server.connect("mishaps").await;
            } else {
                durable = durable.max(committed);
            }
        }
        assert!(mishaps > 12, "only {mishaps} mishaps");
    }
}

/// Backends that wait for a lock, and those that have written and wait for their turn.
async fn apply_backends(admin: &Client) -> (i64, i64) {
    let sql = "SELECT count(*) FILTER (WHERE wait_event_type = 'Lock'), count(*) FILTER (WHERE state = 'idle in transaction' AND backend_xid IS NOT NULL)
               FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'sluice apply'";
    let row = admin.query_one(sql, &[]).await.expect("a look");
    (row.get(0), row.get(1))
}

#[tokio::test]
async fn a_part_gives_way_to_whoever_an_earlier_one_waits_for() {
    let server = server();
    let (admin, _) = database(&server, "gives_way").await;
    let items = items();
    let (_, mut applier) = parallel(server.endpoint("gives_way"), "s", std::slice::from_ref(&items)).await;
    apply(&mut applier, inserts(&items, 1..4).committed(8)).await.expect("rows");
    let foreign = server.connect("gives_way").await;
    foreign.batch_execute("BEGIN; UPDATE shop.items SET v = 'theirs' WHERE id = 1").await.expect("a lock");
    for (id, end) in [(1, 16), (2, 24), (3, 32)] {
        let mut changes = Changes::default();
        changes.update(&items, &[], &[int(id), text("ours")]);
        // Accepted though the first one can't be written.
        applier.apply(changes.committed(end).into(), &changes::all, &Reached::default()).await.expect("accepted");
    }
    assert!(!applier.has_room());
    eventually(10, "later parts are written while the first one waits", || async { apply_backends(&admin).await == (1, 2) }).await;
    assert_eq!(position(&admin, "s").await.as_deref(), Some("0/8"));
    // The circle that no server sees: they wait for a later part, which waits for the first one, which waits for them.
    foreign
        .batch_execute("SET lock_timeout = '30s'; UPDATE shop.items SET v = 'theirs' WHERE id IN (2, 3); COMMIT")
        .await
        .expect("they go on");
    for _ in 0..3 {
        assert!(applier.applied().await.expect("applied").is_some());
    }
    assert_eq!(rows(&admin, "shop.items").await, ["(1,ours)", "(2,ours)", "(3,ours)"]);
    assert_eq!(position(&admin, "s").await.as_deref(), Some("0/20"));
}

#[tokio::test]
async fn a_part_with_a_row_in_common_waits_for_the_earlier_one() {
    let server = server();
    let (admin, _) = database(&server, "in_common").await;
    let items = items();
    let (_, mut applier) = parallel(server.endpoint("in_common"), "s", std::slice::from_ref(&items)).await;
    apply(&mut applier, inserts(&items, 1..3).committed(8)).await.expect("rows");
    let foreign = server.connect("in_common").await;
    foreign.batch_execute("BEGIN; SELECT FROM shop.items WHERE id = 1 FOR UPDATE").await.expect("a lock");
    let mut moved = Changes::default();
    moved.update(&items, &[int(1), Value::Null], &[int(9), text("moved")]);
    applier.apply(moved.committed(16).into(), &changes::all, &Reached::default()).await.expect("accepted");
    let mut again = Changes::default();
    again.delete(&items, &[int(9), Value::Null]);
    let nothing = Reached::default();
    let again = applier.apply(again.committed(24).into(), &changes::all, &nothing);
    let free = async {
        eventually(10, "the first one waits", || async { apply_backends(&admin).await == (1, 0) }).await;
        let state = position(&admin, "s").await;
        drop(foreign);
        state
    };
    // It is accepted when the earlier one is committed, and not before.
    let (accepted, before) = tokio::join!(async { again.await.map(|()| Instant::now()) }, async { (free.await, Instant::now()) });
    assert!(accepted.expect("accepted") > before.1, "accepted beside a part that writes the same row");
    assert_eq!(before.0.as_deref(), Some("0/8"));
    while applier.applied().await.expect("applied").is_some() {}
    assert_eq!(rows(&admin, "shop.items").await, ["(2,\"row 2\")"]);
}

#[tokio::test]
async fn a_claim_ends_all_connections_of_the_old_one() {
    let server = server();
    let (admin, _) = database(&server, "all_end").await;
    let items = items();
    let (target, mut old) = parallel(server.endpoint("all_end"), "s", std::slice::from_ref(&items)).await;
    apply(&mut old, inserts(&items, 1..4).committed(8)).await.expect("rows");
    let pids =
        "SELECT array_agg(pid ORDER BY pid) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'sluice apply'";
    let before: Vec<i32> = admin.query_one(pids, &[]).await.expect("backends").get(0);
    assert_eq!(before.len(), CONNECTIONS);
    // All of them are at work, the first one held up by somebody else.
    let foreign = server.connect("all_end").await;
    foreign.batch_execute("BEGIN; SELECT FROM shop.items WHERE id = 1 FOR UPDATE").await.expect("a lock");
    for (id, end) in [(1, 16), (2, 24), (3, 32)] {
        let mut changes = Changes::default();
        changes.update(&items, &[], &[int(id), text("ours")]);
        old.apply(changes.committed(end).into(), &changes::all, &Reached::default()).await.expect("accepted");
    }
    let (claimed, mut new) = target.claim(&key("s"), &owner("a"), Some(1)).await.expect("a claim");
    assert_eq!(claimed.checkpoint.expect("a checkpoint").position, Lsn(8));
    let after: Vec<i32> = admin.query_one(pids, &[]).await.expect("backends").get(0);
    assert!(after.len() == CONNECTIONS && !after.iter().any(|pid| before.contains(pid)), "{before:?}, then {after:?}");
    assert_eq!(old.applied().await.expect_err("ended").class, Class::Retry);
    assert_eq!(old.applied().await.expect_err("used up").class, Class::Bug);
    new.prepare(std::slice::from_ref(&items)).await.expect("prepared");
    let mut changes = Changes::default();
    changes.update(&items, &[], &[int(3), text("new")]);
    apply(&mut new, changes.committed(16)).await.expect("no lock is left");
    assert_eq!(rows(&admin, "shop.items").await, ["(1,\"row 1\")", "(2,\"row 2\")", "(3,new)"]);
}

#[tokio::test]
async fn a_stopped_writer_rolls_back_on_all_connections() {
    let server = server();
    let (admin, _) = database(&server, "all_stop").await;
    let items = items();
    let (target, mut applier) = parallel(server.endpoint("all_stop"), "s", std::slice::from_ref(&items)).await;
    apply(&mut applier, inserts(&items, 1..4).committed(8)).await.expect("rows");
    let foreign = server.connect("all_stop").await;
    foreign.batch_execute("BEGIN; SELECT FROM shop.items WHERE id = 1 FOR UPDATE").await.expect("a lock");
    for (id, end) in [(1, 16), (2, 24), (3, 32)] {
        let mut changes = Changes::default();
        changes.update(&items, &[], &[int(id), text("ours")]);
        applier.apply(changes.committed(end).into(), &changes::all, &Reached::default()).await.expect("accepted");
    }
    let began = Instant::now();
    applier.abort().await;
    assert!(began.elapsed() < Duration::from_secs(1), "took {:?}", began.elapsed());
    foreign.batch_execute("ROLLBACK").await.expect("the lock goes");
    let (claimed, _) = target.claim(&key("s"), &owner("a"), Some(1)).await.expect("a claim");
    assert_eq!(claimed.checkpoint.expect("a checkpoint").position, Lsn(8));
    assert_eq!(rows(&admin, "shop.items").await, ["(1,\"row 1\")", "(2,\"row 2\")", "(3,\"row 3\")"]);
}
