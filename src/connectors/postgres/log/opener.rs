//! How the log's session is made, and made again with or without streaming.

use super::LogConfig;
use super::pause::{Paused, Until};
use crate::connectors::postgres::connect::{Side, connect};
use crate::connectors::postgres::lsn::Lsn;
use crate::connectors::postgres::replication::{CopyBoth, ReplicationClient, StreamFormat, SystemIdentity, connect_replication};
use crate::connectors::postgres::source::{APPLICATION_NAME, answer};
use crate::connectors::postgres::sql::quote_literal;
use crate::engine::error::{Error, Result, reason};
use crate::engine::roles::Notice;
use crate::engine::table::MappedTable;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};

/// How long the server may take to notice that the session before has ended.
const RELEASE_LIMIT: Duration = Duration::from_secs(30);
/// Pause between two tries meanwhile.
const RELEASE_PAUSE: Duration = Duration::from_millis(100);
/// A server that answers within this time is near.
const NEAR: Duration = Duration::from_millis(5);
/// Pause between two looks at a transaction that is waited for.
const LOOK_PAUSE: Duration = Duration::from_secs(2);

/// Makes sessions on the server that the first was on.
pub(super) struct Opener {
    config: Arc<LogConfig>,
    server: SystemIdentity,
    is_near: bool,
    runtime: Handle,
}

impl Opener {
    /// For the server that `client` is on.
    pub(super) async fn new(config: Arc<LogConfig>, client: &mut ReplicationClient) -> Result<Self> {
        let asked = Instant::now();
        let server = client.identify_system().await?;
        Ok(Self { config, server, is_near: asked.elapsed() < NEAR, runtime: Handle::current() })
    }

    /// Whether the server answers so soon that a small buffer between it and us is never what the stream waits for.
    pub(super) fn is_near(&self) -> bool {
        self.is_near
    }

    /// Tables whose rows matter.
    pub(super) fn tables(&self) -> &[MappedTable] {
        &self.config.tables
    }

    pub(super) async fn start(&self, client: ReplicationClient, from: Lsn, streaming: bool) -> Result<CopyBoth> {
        let format = StreamFormat { binary: self.config.binary, streaming };
        client.start(&self.config.slot, from, &self.config.publication, format).await
    }

    /// Another session from `from`, which the thread waits for. The session before must have been ended.
    ///
    /// # Errors
    /// Class `Retry` when the server is not quite the same any more: a new start of the stream looks closer.
    pub(super) fn reopen(&self, from: Lsn, streaming: bool) -> Result<CopyBoth> {
        self.runtime.block_on(async {
            let deadline = Instant::now() + RELEASE_LIMIT;
            loop {
                let opened = async {
                    let client = self.same_server(from).await?;
                    self.start(client, from, streaming).await
                };
                match opened.await {
                    Err(error) if error.reason == reason::SLOT_IN_USE && Instant::now() < deadline => sleep(RELEASE_PAUSE).await,
                    opened => return opened,
                }
            }
        })
    }

    /// A session on the same server and timeline, whose slot still holds what follows `from`.
    async fn same_server(&self, from: Lsn) -> Result<ReplicationClient> {
        let mut client = connect_replication(&self.config.endpoint, APPLICATION_NAME).await?;
        let found = client.identify_system().await?;
        let slot = &self.config.slot;
        let sql = format!("SELECT confirmed_flush_lsn FROM pg_catalog.pg_replication_slots WHERE slot_name = {}", quote_literal(slot));
        let confirmed = client.simple_query(&sql).await?.into_iter().flatten().next().flatten();
        let confirmed: Option<Lsn> = confirmed.and_then(|confirmed| confirmed.parse().ok());
        if found.is_same(&self.server) && confirmed.is_some_and(|confirmed| confirmed <= from) {
            return Ok(client);
        }
        Err(Error::retry(reason::SOURCE_UNREACHABLE, format!("the source or its slot {slot} is another one now")))
    }

    /// What a session begins with: whether an earlier one has paused streaming.
    pub(super) fn paused(&self) -> Option<Awaited> {
        self.config.pause.on(&self.server).map(|paused| self.wait(paused))
    }

    /// Pauses streaming, for the sessions that follow too.
    pub(super) fn pause(&self, notice: Notice, until: Until) -> Awaited {
        let paused = Paused::new(notice, &self.server, until);
        self.config.pause.begin(paused.clone());
        self.wait(paused)
    }

    /// Streaming goes on.
    pub(super) fn end_pause(&self) {
        self.config.pause.end();
    }

    /// Waits beside everything else.
    fn wait(&self, paused: Paused) -> Awaited {
        let (config, waited) = (Arc::clone(&self.config), paused.clone());
        let task = self.runtime.spawn(async move {
            if waited.has_come() {
                return;
            }
            let xid = match waited.until() {
                Until::EndOf(xid) => Some(xid),
                Until::Time(time) => {
                    sleep_until(time).await;
                    None
                }
            };
            waited.came(position_behind(&config, xid).await);
        });
        Awaited { paused, task }
    }
}

/// Something on the source that is waited for.
pub(super) struct Awaited {
    paused: Paused,
    task: JoinHandle<()>,
}

impl Awaited {
    /// Whether it lies before this position.
    pub(super) fn was_before(&self, position: Lsn) -> bool {
        self.paused.was_before(position)
    }
}

impl Drop for Awaited {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn position_behind(config: &LogConfig, xid: Option<u32>) -> Lsn {
    loop {
        match look(config, xid).await {
            Ok(Some(position)) => return position,
            Ok(None) => {}
            Err(error) => tracing::debug!(%error, ?xid, "the source can't be asked what has ended"),
        }
        sleep(LOOK_PAUSE).await;
    }
}

/// The end of the log, behind the end of a transaction; `None` while that runs.
async fn look(config: &LogConfig, xid: Option<u32>) -> Result<Option<Lsn>> {
    const NEWEST: &str = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text";
    const STATUS: &str = "SELECT pg_xact_status($1::text::xid8)";
    const POSITION: &str = "SELECT pg_current_wal_insert_lsn()::text";
    let what = "look at a transaction";
    let session = connect(&config.endpoint, Side::Source, APPLICATION_NAME).await?;
    let wrong = |error: &dyn std::fmt::Display| Error::bug(format!("{what}: {error}"));
    if let Some(xid) = xid {
        let newest: String = answer(Side::Source, what, session.query_one(NEWEST, &[])).await?.get(0);
        let id = full_id(newest.parse().map_err(|error: std::num::ParseIntError| wrong(&error))?, xid).to_string();
        let status: Option<String> = answer(Side::Source, what, session.query_one(STATUS, &[&id])).await?.get(0);
        // No status: so long ago that the server has forgotten it.
        if status.as_deref() == Some("in progress") {
            return Ok(None);
        }
    }
    // Its commit record was written before its status changed.
    let position: String = answer(Side::Source, what, session.query_one(POSITION, &[])).await?.get(0);
    position.parse().map(Some).map_err(|error| wrong(&error))
}

/// The stream names transactions by the lower half of their ids: the one that is nearest to the newest id is meant.
fn full_id(newest: u64, xid: u32) -> u64 {
    let distance = xid.wrapping_sub(newest as u32).cast_signed();
    newest.saturating_add_signed(distance.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_completed_from_the_newest() {
        for (newest, xid, id) in
            [(1000, 990, 990), (1000, 1001, 1001), ((5 << 32) + 3, u32::MAX - 1, (5 << 32) - 2), ((5 << 32) - 3, 2, (5 << 32) + 2)]
        {
            assert_eq!(full_id(newest, xid), id);
        }
    }
}
