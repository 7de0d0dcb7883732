//! The stream of changes: a thread reads and decodes, one bounded buffer hands parts over, confirmations go back.
//!
//! The reader is a thread with a blocking socket and not a task, since a walsender sends row by row and a reader that is
//! woken for each makes it slow (see reader.rs). The thread also sends the standby status updates, whatever the consumer
//! does, so that a slow target never runs into `wal_sender_timeout`.
//!
//! Invariants: parts hold what [`crate::engine::batch::Part`] promises; only what was confirmed is reported to the server.

mod assembler;
mod buffer;
mod input;
mod reader;

use super::endpoint::Endpoint;
use super::lsn::Lsn;
use super::pgoutput::Decoder;
use super::replication::{ReplicationClient, connect_replication};
use crate::engine::batch::Part;
use crate::engine::error::{Error, Result};
use crate::engine::roles::{BatchLimits, ChangeLog};
use crate::engine::table::MappedTable;
use assembler::Assembler;
use buffer::Buffer;
use reader::Reader;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Parts that may lie in the buffer, counted in bytes of the largest.
const BUFFERED_PARTS: usize = 4;
/// Longest pause between two status updates.
const LONGEST_FEEDBACK_INTERVAL: Duration = Duration::from_secs(10);

/// A replication slot that is being read. When it is dropped, the last confirmed position is sent and the session ends.
pub struct PostgresLog {
    buffer: Arc<Buffer>,
    positions: Arc<Positions>,
    socket: TcpStream,
}

/// Positions that reader and consumer share.
struct Positions {
    received: AtomicU64,
    server_end: AtomicU64,
    confirmed: AtomicU64,
    /// Relation messages so far.
    announced: AtomicU64,
}

impl Positions {
    fn new(from: Lsn) -> Self {
        Self {
            received: AtomicU64::new(from.0),
            server_end: AtomicU64::new(from.0),
            confirmed: AtomicU64::new(from.0),
            announced: AtomicU64::new(0),
        }
    }

    fn confirmed(&self) -> Lsn {
        Lsn(self.confirmed.load(Ordering::Acquire))
    }
}

impl PostgresLog {
    /// Connects and reads from the slot after `from`, the durable position: what was confirmed earlier is confirmed again,
    /// but nothing before it is sent. The caller has compared `from` with the slot's confirmed position; the server would
    /// silently start at the later one. `binary` only if [`super::pgoutput::binary_allowed`] for these tables.
    pub async fn open(
        endpoint: &Endpoint,
        slot: &str,
        publication: &str,
        from: Lsn,
        tables: &[MappedTable],
        binary: bool,
        limits: BatchLimits,
    ) -> Result<Self> {
        let client = connect_replication(endpoint, "").await?;
        Self::start(client, slot, publication, from, tables, binary, limits).await
    }

    /// The same on a session on which the caller has looked at the server, for example with
    /// [`ReplicationClient::expect_system`].
    pub async fn start(
        mut client: ReplicationClient,
        slot: &str,
        publication: &str,
        from: Lsn,
        tables: &[MappedTable],
        binary: bool,
        limits: BatchLimits,
    ) -> Result<Self> {
        let feedback_interval = feedback_interval(&mut client).await?;
        let copy = client.start(slot, from, publication, binary).await?;
        let buffer = Arc::new(Buffer::new(limits.bytes.saturating_mul(BUFFERED_PARTS)));
        let positions = Arc::new(Positions::new(from));
        let assembler = Assembler::new(Decoder::new(tables), limits, from);
        let reader = Reader::new(copy, assembler, Arc::clone(&buffer), Arc::clone(&positions), feedback_interval);
        let (reader, socket) = reader.map_err(|error| Error::bug(format!("the replication socket: {error}")))?;
        let thread = std::thread::Builder::new().name("postgres-log".into()).spawn(move || reader.run());
        thread.map_err(|error| Error::bug(format!("no thread for the log: {error}")))?;
        Ok(Self { buffer, positions, socket })
    }

    /// Memory taken by parts that wait to be handed over, in bytes.
    #[must_use]
    pub fn buffered(&self) -> usize {
        self.buffer.bytes()
    }
}

/// A third of the server's `wal_sender_timeout`, so that one update may be late; at most 10 s.
async fn feedback_interval(client: &mut ReplicationClient) -> Result<Duration> {
    let sql = "SELECT setting FROM pg_catalog.pg_settings WHERE name = 'wal_sender_timeout'";
    let rows = client.simple_query(sql).await?;
    let setting = rows.into_iter().flatten().next().flatten();
    let milliseconds = setting.and_then(|setting| setting.parse().ok()).unwrap_or(0);
    // 0: the server does not look.
    let third = if milliseconds == 0 { LONGEST_FEEDBACK_INTERVAL } else { Duration::from_millis(milliseconds) / 3 };
    Ok(third.min(LONGEST_FEEDBACK_INTERVAL))
}

impl ChangeLog for PostgresLog {
    type Position = Lsn;

    async fn next(&mut self) -> Result<Part<Lsn>> {
        self.buffer.next().await
    }

    async fn next_grown(&mut self) -> Result<Part<Lsn>> {
        self.buffer.next_grown().await
    }

    fn confirm(&self, durable: &Lsn) {
        // Never backwards: the server would not take it either.
        self.positions.confirmed.fetch_max(durable.0, Ordering::AcqRel);
    }

    fn announced(&self) -> u64 {
        self.positions.announced.load(Ordering::Acquire)
    }

    fn received(&self) -> (Lsn, Lsn) {
        let received = self.positions.received.load(Ordering::Acquire);
        let server_end = self.positions.server_end.load(Ordering::Acquire);
        (Lsn(received), Lsn(server_end.max(received)))
    }
}

impl Drop for PostgresLog {
    fn drop(&mut self) {
        self.buffer.close();
        // Wakes the reader, which then says goodbye on the half that is still open.
        let _ = self.socket.shutdown(Shutdown::Read);
    }
}
