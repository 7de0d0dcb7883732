//! The two servers, tuned alike, and what is compared between them.

use crate::Result;
use crate::process::cpu_of_tree;
use crate::support::Postgres;
use tokio_postgres::Client;

/// Major version of both servers.
const MAJOR: u32 = 17;

/// Settings of both servers. Commits reach the disk (`fsync`), checkpoints happen between measured runs and not in them,
/// and nothing runs in the background that one competitor could meet and another not.
const SETTINGS: &[&str] = &[
    "fsync=on",
    "shared_buffers=1GB",
    "maintenance_work_mem=1GB",
    "max_wal_size=16GB",
    "min_wal_size=4GB",
    "checkpoint_timeout=1h",
    "autovacuum=off",
    "jit=off",
    "max_connections=100",
    "max_worker_processes=16",
    "max_logical_replication_workers=8",
    "max_sync_workers_per_subscription=2",
    "max_parallel_apply_workers_per_subscription=2",
];

/// Source and target.
pub struct Servers {
    /// Where rows come from.
    pub source: Postgres,
    /// Where they go.
    pub target: Postgres,
}

impl Servers {
    /// Starts both.
    pub fn start() -> Result<Self> {
        let (source, target) = std::thread::scope(|scope| {
            let source = scope.spawn(|| Postgres::start_with(MAJOR, SETTINGS));
            let target = scope.spawn(|| Postgres::start_with(MAJOR, SETTINGS));
            (source.join(), target.join())
        });
        match (source, target) {
            (Ok(source), Ok(target)) => Ok(Self { source, target }),
            _ => Err("the servers did not start".into()),
        }
    }

    /// Writes out what earlier runs have left, so that no measured run pays for it.
    pub async fn settle(&self) -> Result<()> {
        for server in [&self.source, &self.target] {
            server.connect("postgres").await.batch_execute("CHECKPOINT").await?;
        }
        Ok(())
    }

    /// The ends of both logs, for failures.
    pub fn last_words(&self) -> String {
        let end = |server: &Postgres| {
            let log = server.log();
            let skipped = log.lines().count().saturating_sub(10);
            log.lines().skip(skipped).collect::<Vec<_>>().join("\n")
        };
        format!("log of the source:\n{}\nlog of the target:\n{}", end(&self.source), end(&self.target))
    }

    /// CPU seconds that source and target have used so far.
    pub fn cpu(&self) -> (f64, f64) {
        let used = |server: &Postgres| postmaster(server).map_or(0.0, cpu_of_tree);
        (used(&self.source), used(&self.target))
    }
}

fn postmaster(server: &Postgres) -> Option<u32> {
    std::fs::read_to_string(server.data().join("postmaster.pid")).ok()?.lines().next()?.parse().ok()
}

/// An empty database, whatever was there under its name. Subscriptions and slots in it must be gone.
pub async fn fresh_database(server: &Postgres, name: &str) -> Result<Client> {
    drop_database(server, name).await?;
    Ok(server.create_database(name).await)
}

/// Drops a database and ends who is connected.
pub async fn drop_database(server: &Postgres, name: &str) -> Result<()> {
    let admin = server.connect("postgres").await;
    Ok(admin.batch_execute(&format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await?)
}

/// Drops a slot when nobody reads it any more.
pub async fn drop_slot(source: &Client, slot: &str) -> Result<()> {
    crate::visible::until(60, &format!("slot {slot} is free"), async || {
        let sql = "SELECT NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = $1 AND active)";
        Ok(source.query_one(sql, &[&slot]).await?.get(0))
    })
    .await?;
    source.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1", &[&slot]).await?;
    Ok(())
}

/// How libpq reaches a database.
pub fn conninfo(server: &Postgres, database: &str) -> String {
    format!("host=127.0.0.1 port={} user=postgres password=pw dbname={database}", server.port)
}

/// Rows that were written into the table `data`, as its statistics say when their writers have gone: with a set of changes
/// per key that is less than the number of changes.
pub async fn rows_written(client: &Client) -> Result<i64> {
    let sql = "SELECT n_tup_ins + n_tup_upd + n_tup_del FROM pg_stat_user_tables WHERE schemaname = 'public' AND relname = 'data'";
    Ok(client.query_one(sql, &[]).await?.get(0))
}

/// What a table holds: the number of rows and the sum of their 64-bit hashes, whatever their order.
pub async fn contents(client: &Client, table: &str) -> Result<(i64, String)> {
    let sql = format!("SELECT count(*), coalesce(sum(hash_record_extended(t, 0)), 0)::text FROM {table} AS t");
    let row = client.query_one(&sql, &[]).await?;
    Ok((row.get(0), row.get(1)))
}

/// Fails unless the target's table holds what it should.
pub async fn expect_contents(client: &Client, table: &str, expected: &(i64, String), who: &str) -> Result<()> {
    let found = contents(client, table).await?;
    if found == *expected {
        return Ok(());
    }
    Err(format!("{who} has brought a WRONG RESULT: {table} holds {found:?} and not {expected:?}").into())
}
