//! Native logical replication.

use crate::Result;
use crate::scenario::Commits;
use crate::servers::{Servers, conninfo};
use crate::visible::until;
use tokio_postgres::Client;

/// How a subscription is made.
pub struct Subscription<'a> {
    /// Database of the source.
    pub source: &'a str,
    /// `streaming`: on or parallel.
    pub streaming: &'a str,
    /// `synchronous_commit` of the apply worker; off is the server's default.
    pub commits: Commits,
    /// Rows that are there are copied.
    pub copy: bool,
    /// It begins at once.
    pub enabled: bool,
}

/// Name of publication, subscription and slot.
pub const NAME: &str = "native";

/// Publishes all tables of schema `public`.
pub async fn publish(source: &Client) -> Result<()> {
    Ok(source.batch_execute(&format!("CREATE PUBLICATION {NAME} FOR TABLES IN SCHEMA public")).await?)
}

impl Subscription<'_> {
    /// Makes slot and subscription.
    pub async fn create(&self, servers: &Servers, target: &Client) -> Result<()> {
        let Self { source, streaming, commits, copy, enabled } = *self;
        let connection = conninfo(&servers.source, source);
        let synchronous = if commits == Commits::OnDisk { "on" } else { "off" };
        let sql = format!(
            "CREATE SUBSCRIPTION {NAME} CONNECTION '{connection}' PUBLICATION {NAME}
             WITH (binary = true, streaming = {streaming}, synchronous_commit = {synchronous}, copy_data = {copy}, enabled = {enabled})"
        );
        Ok(target.batch_execute(&sql).await?)
    }
}

/// Begins a subscription that was made disabled.
pub async fn enable(target: &Client) -> Result<()> {
    Ok(target.batch_execute(&format!("ALTER SUBSCRIPTION {NAME} ENABLE")).await?)
}

/// Waits until the source sends what it has at once.
pub async fn streaming(source: &Client) -> Result<()> {
    until(60, "the subscription streams", async || {
        let sql = "SELECT EXISTS (SELECT FROM pg_stat_replication WHERE application_name = $1 AND state = 'streaming')";
        Ok(source.query_one(sql, &[&NAME]).await?.get(0))
    })
    .await?;
    Ok(())
}

/// Waits until the copied tables follow the stream, so that nothing is left of their copy.
pub async fn ready(target: &Client) -> Result<()> {
    until(60, "the subscription's tables are ready", async || {
        Ok(target.query_one("SELECT NOT EXISTS (SELECT FROM pg_subscription_rel WHERE srsubstate <> 'r')", &[]).await?.get(0))
    })
    .await?;
    Ok(())
}

/// Drops the subscription, and its slot with it.
pub async fn drop(target: &Client) -> Result<()> {
    Ok(target.batch_execute(&format!("DROP SUBSCRIPTION {NAME}")).await?)
}
