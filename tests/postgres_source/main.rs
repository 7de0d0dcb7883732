//! PostgreSQL as a source, on real servers of each version.

#[path = "../support/mod.rs"]
mod support;

mod catalog;
mod cleanup;
mod fence;
mod inspect;
mod publication;
mod slot;
mod snapshot;

use futures::TryStreamExt as _;
use sluice::connectors::postgres::source::PostgresSource;
use sluice::engine::error::Error;
use sluice::engine::roles::{BulkFormat, Proof, Range, Selection, Snapshot as _, Source as _, TableSelection};
use sluice::engine::table::{MappedTable, QualifiedName};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use support::Postgres;
use tokio_postgres::Client;

/// The server of a version that the tests running now share.
fn server(major: u32) -> Arc<Postgres> {
    static SERVERS: Mutex<Vec<(u32, Weak<Postgres>)>> = Mutex::new(Vec::new());
    let mut servers = SERVERS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(server) = servers.iter().filter(|(of, _)| *of == major).find_map(|(_, server)| server.upgrade()) {
        return server;
    }
    let server = Arc::new(Postgres::start(major));
    servers.push((major, Arc::downgrade(&server)));
    server
}

/// A database of its own on a shared server.
struct Database {
    server: Arc<Postgres>,
    name: String,
    admin: Client,
}

impl Database {
    async fn new(major: u32, name: &str, setup: &str) -> Self {
        let server = server(major);
        let admin = server.create_database(name).await;
        admin.batch_execute(setup).await.expect("the tables of the test");
        Self { server, name: name.to_owned(), admin }
    }

    async fn run(&self, sql: &str) {
        self.admin.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    fn slot(&self) -> String {
        format!("sluice_{}", self.name)
    }

    fn source(&self) -> PostgresSource {
        PostgresSource::new(self.server.endpoint(&self.name), self.slot(), self.publication())
    }

    fn publication(&self) -> String {
        format!("Publication of {}", self.name)
    }

    /// A source whose role is this one, without password rules of its own.
    async fn source_as(&self, role: &str, attributes: &str) -> PostgresSource {
        self.run(&format!("CREATE ROLE {role} LOGIN PASSWORD 'pw' {attributes}")).await;
        PostgresSource::new(self.endpoint_as(role), self.slot(), self.publication())
    }

    fn endpoint_as(&self, role: &str) -> sluice::connectors::postgres::Endpoint {
        let mut endpoint = self.server.endpoint(&self.name);
        endpoint.username = role.to_owned();
        endpoint
    }

    async fn text(&self, sql: &str) -> Option<String> {
        self.admin.query_one(sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
    }
}

/// A claim that nobody contends with.
struct Unopposed;

impl Proof for Unopposed {
    async fn prove(&mut self) -> Result<(), Error> {
        Ok(())
    }
}

/// The source after it was taken: it may be changed until the next error.
async fn alone(source: &PostgresSource) -> &PostgresSource {
    source.take(&mut Unopposed).await.expect("the source is taken");
    source
}

/// Tables of the schema `public`, each to the same name, with the excluded columns.
fn selection(tables: &[(&str, &[&str])]) -> Selection {
    let table = |(name, excluded): &(&str, &[&str])| TableSelection {
        source: QualifiedName::new("public", *name),
        target: QualifiedName::new("public", *name),
        exclude_columns: excluded.iter().map(|column| (*column).to_owned()).collect(),
    };
    Selection::Tables(tables.iter().map(table).collect())
}

async fn mapped(source: &PostgresSource, tables: &[(&str, &[&str])]) -> Vec<MappedTable> {
    source.tables(&selection(tables)).await.expect("the tables can be followed")
}

async fn refused(source: &PostgresSource, tables: &[(&str, &[&str])]) -> Error {
    source.tables(&selection(tables)).await.expect_err("must be refused")
}

/// Reads ranges as text; the lines in order.
async fn lines(snapshot: &sluice::connectors::postgres::snapshot::PostgresSnapshot, table: &MappedTable, ranges: &[Range]) -> Vec<String> {
    let mut lines = Vec::new();
    for range in ranges {
        let bytes = read(snapshot, table, range, BulkFormat::PostgresText).await.expect("a range");
        lines.extend(String::from_utf8(bytes).expect("UTF-8").lines().map(str::to_owned));
    }
    lines.sort();
    lines
}

async fn read(
    snapshot: &sluice::connectors::postgres::snapshot::PostgresSnapshot,
    table: &MappedTable,
    range: &Range,
    format: BulkFormat,
) -> Result<Vec<u8>, Error> {
    let pieces: Vec<bytes::Bytes> = snapshot.read(table, range, format).await?.try_collect().await?;
    Ok(pieces.concat())
}

/// The same test on every version.
macro_rules! on_each_version {
    ($($test:ident),* $(,)?) => {
        mod postgres_14 { $(#[tokio::test] async fn $test() { super::$test(14).await; })* }
        mod postgres_15 { $(#[tokio::test] async fn $test() { super::$test(15).await; })* }
        mod postgres_17 { $(#[tokio::test] async fn $test() { super::$test(17).await; })* }
    };
}
use on_each_version;

/// A test of what does not depend on the version.
macro_rules! on_one_version {
    ($($test:ident),* $(,)?) => {
        mod postgres { $(#[tokio::test] async fn $test() { super::$test(15).await; })* }
    };
}
use on_one_version;
