//! What comes with a table besides its rows: the catalogs of source and target are compared after the copy.

#[path = "../support/mod.rs"]
mod support;
#[path = "../support/worker.rs"]
mod worker;

mod accepted;
mod carried;
mod interrupted;
mod refused;

use sluice::worker::contract::TableSpec;
use support::Postgres;
use tokio_postgres::Client;

/// Two servers of a version and a session on each.
struct Pair {
    source: Postgres,
    target: Postgres,
    left: Client,
    right: Client,
}

async fn pair(major: u32) -> Pair {
    let (source, target) = (Postgres::start(major), Postgres::start(major));
    let (left, right) = (source.create_database("shop").await, target.create_database("dw").await);
    // Every name in a definition is qualified.
    for client in [&left, &right] {
        client.batch_execute("SET search_path = pg_catalog").await.unwrap();
    }
    Pair { source, target, left, right }
}

async fn run(client: &Client, sql: &str) {
    client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

/// The first column of all rows.
async fn texts(client: &Client, sql: &str) -> Vec<String> {
    let rows = client.query(sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    rows.iter().map(|row| row.get::<_, Option<String>>(0).unwrap_or_else(|| "NULL".into())).collect()
}

/// A table that gets another name.
fn renamed(source: (&str, &str), target: (&str, &str)) -> TableSpec {
    TableSpec {
        schema: source.0.into(),
        name: source.1.into(),
        target_schema: target.0.into(),
        target_name: target.1.into(),
        exclude_columns: Vec::new(),
        accept_narrower_types: false,
    }
}
