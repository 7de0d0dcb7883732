//! Bulk loading: bytes of a range go into the target as they came, undecoded.
//!
//! A range, its done-row and the count of its table are one transaction that ends with the proof of the claim. It does not
//! wait for the disk: the change of the table's state to `Copied` does, and the log is flushed in order, so that with it
//! all ranges are on disk.

use super::checkpoint::{Claim, claim::loader_name};
use super::connect::Session;
use super::sql::{qualified, quote_ident, quote_literal};
use super::statements::copy_in;
use super::target::{choose_mode, failed};
use crate::engine::error::{Error, Result, reason};
use crate::engine::roles::{ApplyMode, BulkFormat, BulkStream, Range};
use crate::engine::table::MappedTable;
use bytes::{Bytes, BytesMut};
use futures::{SinkExt as _, StreamExt as _};
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio_postgres::error::SqlState;

/// What a role needs on a target table.
pub(super) const PRIVILEGES: [&str; 5] = ["SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE"];

/// Smallest piece that is sent by itself: the server sends one message per row, which would cost a system call each.
const PIECE: usize = 64 << 10;

/// Loads ranges, one after the other, on a session of its own. A load that failed or was given up ends it.
pub(super) struct Loader {
    session: Session,
    mode: ApplyMode,
}

impl Loader {
    /// A loader on a fresh session.
    pub async fn new(session: Session, claim: &Claim) -> Result<Self> {
        let mode = set_up(&session, claim).await?;
        Ok(Self { session, mode })
    }

    /// Loads one range: all of it, or nothing.
    pub async fn load(
        &self,
        claim: &Claim,
        table: &MappedTable,
        generation: i64,
        range: &Range,
        format: BulkFormat,
        rows: BulkStream,
    ) -> Result<u64> {
        let session = &self.session;
        // An old worker's range ends here, and not only after it has loaded everything.
        claim.check(session).await?;
        session
            .batch_execute("BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL synchronous_commit = off")
            .await
            .map_err(failed("begin a range"))?;
        let loaded = copy(session, table, format, rows, self.mode).await?;
        let done = claim.range_done(session, table.source(), generation, range.number, loaded as i64).await;
        done.map_err(|error| match error.reason {
            // An earlier try whose connection was lost has come through after all; this one leaves nothing behind.
            reason::ROW_CONFLICT => Error::retry(reason::WRITE_REFUSED, error.message),
            _ => error,
        })?;
        claim.check(session).await?;
        session.batch_execute("COMMIT").await.map_err(failed("commit a range"))?;
        Ok(loaded)
    }
}

/// Loaders between two ranges: a new session for each costs the server a login and cold caches.
#[derive(Default)]
pub(super) struct Loaders(Mutex<Vec<Loader>>);

impl Loaders {
    /// One whose session still stands.
    pub fn take(&self) -> Option<Loader> {
        let mut idle = self.idle();
        std::iter::from_fn(|| idle.pop()).find(|loader| !loader.session.is_closed())
    }

    /// Keeps one for the next range.
    pub fn give_back(&self, loader: Loader) {
        self.idle().push(loader);
    }

    /// Ends their sessions.
    pub fn clear(&self) {
        self.idle().clear();
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Loader>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives the session the name by which a later claim finds and ends it.
pub(super) async fn set_up(session: &Session, claim: &Claim) -> Result<ApplyMode> {
    let sql = format!("SET application_name = {}", quote_literal(&loader_name(&claim.key)));
    session.batch_execute(&sql).await.map_err(failed("set up the session"))?;
    choose_mode(session).await
}

async fn copy(session: &Session, table: &MappedTable, format: BulkFormat, mut rows: BulkStream, mode: ApplyMode) -> Result<u64> {
    let idents: Vec<String> = table.version.columns.iter().map(|column| quote_ident(&column.name)).collect();
    let sql = copy_in(&qualified(&table.target), idents.iter().map(String::as_str), format == BulkFormat::PostgresBinary);
    let refused = |error| refused(table, mode, error);
    let sink = session.copy_in::<_, Bytes>(&sql).await.map_err(refused)?;
    let mut sink = pin!(sink);
    let mut gathered = BytesMut::new();
    while let Some(piece) = rows.next().await {
        // Leaving here drops the sink, which tells the server that the copy has failed.
        let piece = piece?;
        if gathered.is_empty() && piece.len() >= PIECE {
            sink.send(piece).await.map_err(refused)?;
            continue;
        }
        gathered.extend_from_slice(&piece);
        if gathered.len() >= PIECE {
            sink.send(gathered.split().freeze()).await.map_err(refused)?;
        }
    }
    if !gathered.is_empty() {
        sink.send(gathered.freeze()).await.map_err(refused)?;
    }
    sink.finish().await.map_err(refused)
}

/// Without replica role foreign keys are checked while tables are copied side by side: a row may come before the one that
/// it refers to, and is tried again.
fn refused(table: &MappedTable, mode: ApplyMode, error: tokio_postgres::Error) -> Error {
    let awaits_other_table = mode == ApplyMode::Ordered && error.code() == Some(&SqlState::FOREIGN_KEY_VIOLATION);
    let failure = failed(format!("copy into {}", table.target))(error);
    if awaits_other_table {
        return Error::retry(reason::WRITE_REFUSED, failure.message);
    }
    failure
}
