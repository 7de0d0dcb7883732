//! Random histories, applied as sets to one schema and row by row, by plain statements, to another: after every commit both
//! must hold the same rows. A failure prints its seed; `SLUICE_SEED=<n>` runs that one alone, `SLUICE_SEEDS=<n>` so many.

mod arrays;
#[path = "../changes/mod.rs"]
mod changes;
mod history;
#[path = "../support/mod.rs"]
mod support;
mod tables;

use changes::{apply, key, owner};
use history::History;
use rand::RngExt as _;
use sluice::connectors::postgres::{Endpoint, Lsn, endpoint::Secret, target::PostgresTarget};
use sluice::engine::register::Register as _;
use sluice::engine::roles::{Apply as _, ApplyMode, Target as _};
use sluice::engine::table::TableState;
use support::Postgres;
use tables::{BEFORE, GUARDED, KEYS, LINKED, TableSpec};
use tokio_postgres::Client;

/// Runs one history in some parts and compares after each that is committed.
async fn run(endpoint: &Endpoint, admin: &Client, seed: u64, specs: &'static [TableSpec], mode: ApplyMode) {
    let mut history = History::new(seed, specs, admin, mode == ApplyMode::Replica);
    for schema in ["plain", "mirror"] {
        admin.batch_execute(&history.create(schema)).await.unwrap_or_else(|error| panic!("{}: {error:?}", history.create(schema)));
    }
    admin.batch_execute("GRANT ALL ON SCHEMA mirror TO PUBLIC; GRANT ALL ON ALL TABLES IN SCHEMA mirror TO PUBLIC").await.expect("grants");
    let target = PostgresTarget::new(endpoint.clone(), owner("histories"));
    let (_, mut applier) = target.claim(&key(&format!("seed_{seed}")), &owner("histories"), None).await.expect("a claim");
    assert_eq!(applier.mode(), mode);
    applier.initialize(&Lsn(1), 1).await.expect("a checkpoint");
    for table in &history.mapped {
        applier.set_state(table, TableState::Ready, None).await.expect("a state");
    }
    applier.prepare(&history.mapped).await.expect("prepared");

    let (mut end, mut applied, mut continues) = (1, [0; 3], false);
    for _ in 0..6 {
        let count = history.random.random_range(0..80);
        for _ in 0..count {
            history.one_change().await;
        }
        end += 8;
        let open = history.chance(30);
        let part = std::mem::take(&mut history.changes).part(continues, (!open).then_some(end), end);
        let counts = apply(&mut applier, part).await.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        for (applied, count) in applied.iter_mut().zip([counts.inserts, counts.updates, counts.deletes]) {
            *applied += count;
        }
        assert_eq!(applied, history.counts, "seed {seed}: rows counted");
        continues = open;
        assert_eq!(counts.committed, !open, "seed {seed}");
        if open {
            continue;
        }
        for (table, spec) in specs.iter().enumerate() {
            let (plain, mirror) = (history.rows("plain", table).await, history.rows("mirror", table).await);
            assert_eq!(plain, mirror, "seed {seed}: table {} after {end}", spec.name);
            if spec.other_names.contains(&"note") {
                // What others write into columns that are not mirrored stays with its row.
                let written = ["plain", "mirror"].map(|schema| format!("UPDATE {schema}.\"{}\" SET note = 'seen {end}'", spec.name));
                admin.batch_execute(&written.join("; ")).await.expect("notes");
            }
        }
    }
    applier.abort().await;
    admin.batch_execute("DELETE FROM _sluice.tables; DELETE FROM _sluice.streams").await.expect("a clean end");
}

/// Runs histories in a database of their own; without `mode` Replica as a role that has no right to it.
async fn run_all(specs: &'static [TableSpec], mode: ApplyMode, default: u64) {
    let server = Postgres::start(15);
    let admin = server.create_database("histories").await;
    admin.batch_execute(BEFORE).await.expect("types and functions");
    let mut endpoint = server.endpoint("histories");
    if mode == ApplyMode::Ordered {
        admin.batch_execute("CREATE ROLE writer LOGIN PASSWORD 'pw'; GRANT CREATE ON DATABASE histories TO writer").await.expect("a role");
        endpoint.username = "writer".into();
        endpoint.password = Secret("pw".into());
    }
    let number = |name| std::env::var(name).ok().map(|value| value.parse::<u64>().expect("a number"));
    let seeds = match number("SLUICE_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SLUICE_SEEDS").unwrap_or(default),
    };
    for seed in seeds {
        run(&endpoint, &admin, seed, specs, mode).await;
    }
}

#[tokio::test]
async fn sets_equal_rows_one_by_one() {
    run_all(KEYS, ApplyMode::Replica, 20).await;
}

#[tokio::test]
async fn sets_equal_rows_one_by_one_where_other_indexes_are_unique() {
    run_all(GUARDED, ApplyMode::Replica, 30).await;
}

#[tokio::test]
async fn sets_equal_rows_one_by_one_where_foreign_keys_are_off() {
    run_all(LINKED, ApplyMode::Replica, 10).await;
}

#[tokio::test]
async fn order_is_kept_without_replica_role() {
    run_all(KEYS, ApplyMode::Ordered, 15).await;
}

#[tokio::test]
async fn order_is_kept_without_replica_role_where_other_indexes_are_unique() {
    run_all(GUARDED, ApplyMode::Ordered, 15).await;
}

#[tokio::test]
async fn order_is_kept_among_tables_with_foreign_keys() {
    run_all(LINKED, ApplyMode::Ordered, 10).await;
}
