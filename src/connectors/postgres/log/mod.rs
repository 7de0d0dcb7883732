//! The stream of changes: a thread reads and decodes, one bounded buffer hands parts over, confirmations go back.
//!
//! The reader is a thread with a blocking socket and not a task, since a walsender sends row by row and a reader that is
//! woken for each makes it slow (see reader.rs). The thread also sends the standby status updates, whatever the consumer
//! does, so that a slow target never runs into `wal_sender_timeout`.
//!
//! Large transactions arrive in slices before they have ended. Slices are kept apart (streams.rs) and replayed at their commit. Rows of
//! one of them go ahead when the consumer wants them (early.rs).
//! When there is no room for them the thread starts the stream again without streaming, until the transaction that took the
//! most room is over: then large transactions wait on the source's disk. That outlives a log (pause.rs).
//!
//! Invariants: parts hold what [`crate::engine::batch::Part`] promises; only what was confirmed is reported to the server;
//! memory stays in [`Room::memory`], parts that are being applied included, but for one part and one read.

mod assembler;
mod buffer;
mod desk;
mod early;
mod feed;
mod input;
mod opener;
mod pause;
mod reader;
mod streams;

use super::endpoint::Endpoint;
use super::lsn::Lsn;
use super::pgoutput::Decoder;
use super::replication::{ReplicationClient, connect_replication};
use super::source::APPLICATION_NAME;
use crate::engine::batch::Part;
use crate::engine::error::{Error, Result};
use crate::engine::roles::{BatchLimits, ChangeLog, LogLoad};
use crate::engine::spill::{Room, Spill, Taken};
use crate::engine::table::MappedTable;
use assembler::Assembler;
use buffer::Buffer;
use desk::Desk;
use early::{Early, Pace};
use feed::Feed;
use opener::Opener;
pub use pause::StreamingPause;
use reader::Reader;
use std::collections::HashSet;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use streams::Streams;

/// The largest part is this part of the memory: two of them can be applied side by side while others arrive.
const PARTS: usize = 4;
/// Longest pause between two status updates.
const LONGEST_FEEDBACK_INTERVAL: Duration = Duration::from_secs(10);

/// What is read, and with which means.
#[derive(Clone)]
pub struct LogConfig {
    /// The source.
    pub endpoint: Endpoint,
    /// Replication slot.
    pub slot: String,
    /// Publication.
    pub publication: String,
    /// Tables whose rows matter.
    pub tables: Vec<MappedTable>,
    /// Values in binary; only if [`super::pgoutput::binary_allowed`] for these tables.
    pub binary: bool,
    /// Limits of one part.
    pub limits: BatchLimits,
    /// What may be taken of the machine.
    pub room: Room,
    /// What is known of pauses of streaming, of earlier logs too.
    pub pause: StreamingPause,
}

/// A replication slot that is being read. When it is dropped, the last confirmed position is sent and the session ends.
pub struct PostgresLog {
    buffer: Arc<Buffer>,
    shared: Arc<Shared>,
    desk: Arc<Desk>,
    pause: StreamingPause,
    taken: Arc<Taken>,
    spill_limit: u64,
}

/// What reader and consumer share besides the buffer.
struct Shared {
    received: AtomicU64,
    server_end: AtomicU64,
    confirmed: AtomicU64,
    /// Relation messages so far.
    announced: AtomicU64,
    /// A second handle of the socket, with which the reader is woken.
    socket: Mutex<TcpStream>,
}

impl Shared {
    fn new(from: Lsn, socket: TcpStream) -> Self {
        Self {
            received: AtomicU64::new(from.0),
            server_end: AtomicU64::new(from.0),
            confirmed: AtomicU64::new(from.0),
            announced: AtomicU64::new(0),
            socket: Mutex::new(socket),
        }
    }

    fn confirmed(&self) -> Lsn {
        Lsn(self.confirmed.load(Ordering::Acquire))
    }
}

impl PostgresLog {
    /// Connects and reads from the slot after `from`, the durable position: what was confirmed earlier is confirmed again,
    /// but nothing before it is sent. The caller has compared `from` with the slot's confirmed position; the server would
    /// silently start at the later one.
    pub async fn open(config: LogConfig, from: Lsn) -> Result<Self> {
        let client = connect_replication(&config.endpoint, APPLICATION_NAME).await?;
        Self::start(client, config, from).await
    }

    /// The same on a session on which the caller has looked at the server, for example with
    /// [`ReplicationClient::expect_system`].
    pub async fn start(mut client: ReplicationClient, config: LogConfig, from: Lsn) -> Result<Self> {
        let feedback_interval = feedback_interval(&mut client).await?;
        let memory = config.room.memory;
        let limits = BatchLimits { bytes: config.limits.bytes.min(memory / PARTS), ..config.limits };
        let pause = config.pause.clone();
        let config = Arc::new(config);
        let opener = Opener::new(Arc::clone(&config), &mut client).await?;
        let awaited = opener.paused();
        let copy = opener.start(client, from, awaited.is_none()).await?;

        // At most half is for what is kept of transactions that have not ended, the rest for parts.
        let spill = Spill::open(memory / 2, config.room.disk.as_ref());
        let (taken, spill_limit) = (spill.taken(), spill.disk_limit());
        let buffer = Arc::new(Buffer::new(memory));
        let desk = Arc::new(Desk::default());
        let early = Early::new(Arc::clone(&desk), Pace::default());
        let feed = Feed::new(Assembler::new(Decoder::new(&config.tables), limits, from), Streams::new(spill), early);
        let reader = Reader::new(copy, feed, Arc::clone(&buffer), opener, awaited, feedback_interval)?;
        let shared = reader.shared();
        let thread = std::thread::Builder::new().name("postgres-log".into()).spawn(move || reader.run());
        thread.map_err(|error| Error::bug(format!("no thread for the log: {error}")))?;
        Ok(Self { buffer, shared, desk, pause, taken, spill_limit })
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
        self.shared.confirmed.fetch_max(durable.0, Ordering::AcqRel);
    }

    fn want_early(&self, tables: HashSet<u32>) {
        self.desk.want(tables);
    }

    fn early(&self, attempt: u64, written: bool) -> Result<()> {
        self.desk.answer(attempt, written)
    }

    fn announced(&self) -> u64 {
        self.shared.announced.load(Ordering::Acquire)
    }

    fn received(&self) -> (Lsn, Lsn) {
        let received = self.shared.received.load(Ordering::Acquire);
        let server_end = self.shared.server_end.load(Ordering::Acquire);
        (Lsn(received), Lsn(server_end.max(received)))
    }

    fn load(&self) -> LogLoad {
        LogLoad {
            memory: self.buffer.budget().used() as u64,
            memory_limit: self.buffer.budget().limit() as u64,
            spilled: self.taken.disk(),
            spill_limit: self.spill_limit,
            notice: self.pause.notice(),
        }
    }
}

impl Drop for PostgresLog {
    fn drop(&mut self) {
        self.buffer.close();
        // Wakes the reader, which then says goodbye on the half that is still open.
        let _ = guard(&self.shared.socket).shutdown(Shutdown::Read);
    }
}

/// What a panicking holder leaves is whole: each value is set in one step.
fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
