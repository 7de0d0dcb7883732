//! Tables that are altered on the source while a whole worker mirrors them: contents and columns of both sides are compared.

#[path = "../support/mod.rs"]
mod support;
#[path = "../support/worker.rs"]
mod worker;

mod crashes;
mod kinds;
mod refused;

use support::Postgres;
use tokio_postgres::Client;
use worker::Worker;

/// Two servers with a session on each.
struct Pair {
    source: Postgres,
    target: Postgres,
    left: Client,
    right: Client,
}

impl Pair {
    async fn start(major: u32) -> Self {
        // Transactions of more than a few rows are sent before their end.
        let (source, target) = (Postgres::start_with(major, &["logical_decoding_work_mem=64kB"]), Postgres::start(15));
        let (left, right) = (source.create_database("shop").await, target.create_database("dw").await);
        Self { source, target, left, right }
    }

    fn worker(&self, tables: &[&str]) -> Worker {
        Worker::start((&self.source, "shop"), (&self.target, "dw"), tables)
    }

    async fn left(&self, sql: &str) {
        self.left.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    async fn right(&self, sql: &str) {
        self.right.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// Fails when a table has other columns or other rows.
    async fn assert_equal(&self, table: &str) {
        let (left, right) = (columns(&self.left, table).await, columns(&self.right, table).await);
        assert_eq!(left, right, "columns of {table}");
        let names: Vec<&str> = left.iter().map(|(name, _)| name.as_str()).collect();
        let (left, right) = (rows(&self.left, table, &names).await, rows(&self.right, table, &names).await);
        assert_eq!(left, right, "rows of {table}");
    }
}

/// Names and types, by name.
async fn columns(client: &Client, table: &str) -> Vec<(String, String)> {
    let sql = "SELECT attname::text, format_type(atttypid, atttypmod) FROM pg_attribute
               WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attname";
    let rows = client.query(sql, &[&table]).await.expect("columns");
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

async fn rows(client: &Client, table: &str, names: &[&str]) -> Vec<String> {
    let names: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
    let row = format!("ROW({})::text", names.join(", "));
    let rows = client.query(&format!("SELECT {row} FROM {table} ORDER BY {row} COLLATE \"C\""), &[]).await.expect("rows");
    rows.iter().map(|row| row.get(0)).collect()
}
