//! Bulk loading: bytes of a range go into the target as they came, undecoded.
//!
//! A range, its done-row and the count of its table are one transaction that ends with the proof of the claim. It does not
//! wait for the disk: the change of the table's state to `Copied` does, and the log is flushed in order, so that with it
//! all ranges are on disk.

use super::checkpoint::{Claim, claim::loader_name};
use super::connect::Session;
use super::ddl;
use super::errors::{ServerError, does_not_fit};
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

    /// Begins the transaction of a range, in one round trip. An old worker's range ends here, and not only after it has loaded
    /// everything.
    pub async fn begin(&self, claim: &Claim) -> Result<()> {
        let begin = self.session.batch_execute("BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL synchronous_commit = off");
        let (standing, begun) = futures::future::join(claim.check(&self.session), begin).await;
        standing?;
        begun.map_err(failed("begin a range"))
    }

    /// Loads one range in the transaction that was begun: all of it, or nothing.
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
        let loaded = match copy(session, table, format, rows).await {
            Ok(loaded) => loaded,
            Err(Stopped::Read(error)) => return Err(error),
            Err(Stopped::Write(error)) => return Err(refused(session, table, self.mode, error).await),
        };
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
    let (named, mode) = futures::future::join(session.batch_execute(&sql), choose_mode(session)).await;
    named.map_err(failed("set up the session"))?;
    mode
}

/// Which side has ended a copy.
enum Stopped {
    Read(Error),
    Write(tokio_postgres::Error),
}

impl From<tokio_postgres::Error> for Stopped {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Write(error)
    }
}

async fn copy(session: &Session, table: &MappedTable, format: BulkFormat, mut rows: BulkStream) -> Result<u64, Stopped> {
    let idents: Vec<String> = table.version.columns.iter().map(|column| quote_ident(&column.name)).collect();
    let sql = copy_in(&qualified(&table.target), idents.iter().map(String::as_str), format == BulkFormat::PostgresBinary);
    let sink = session.copy_in::<_, Bytes>(&sql).await?;
    let mut sink = pin!(sink);
    let mut gathered = BytesMut::new();
    while let Some(piece) = rows.next().await {
        // Leaving here drops the sink, which tells the server that the copy has failed.
        let piece = piece.map_err(Stopped::Read)?;
        if gathered.is_empty() && piece.len() >= PIECE {
            sink.send(piece).await?;
            continue;
        }
        gathered.extend_from_slice(&piece);
        if gathered.len() >= PIECE {
            sink.send(gathered.split().freeze()).await?;
        }
    }
    if !gathered.is_empty() {
        sink.send(gathered.freeze()).await?;
    }
    Ok(sink.finish().await?)
}

/// Without replica role foreign keys are checked while tables are copied side by side: a row may come before the one that
/// it refers to, and is tried again.
async fn refused(session: &Session, table: &MappedTable, mode: ApplyMode, error: tokio_postgres::Error) -> Error {
    let awaits_other_table = mode == ApplyMode::Ordered && error.code() == Some(&SqlState::FOREIGN_KEY_VIOLATION);
    let misfit = match error.as_db_error() {
        Some(said) if table.accept_narrower_types => misfit(session, table, &said.into()).await,
        _ => None,
    };
    let failure = misfit.unwrap_or_else(|| failed(format!("copy into {}", table.target))(error));
    if awaits_other_table {
        return Error::retry(reason::WRITE_REFUSED, failure.message);
    }
    failure
}

/// A value that did not fit. Looks at the table once more, to name the columns that are too narrow.
async fn misfit(session: &Session, table: &MappedTable, said: &ServerError) -> Option<Error> {
    session.batch_execute("ROLLBACK").await.ok()?;
    let present = ddl::describe(session, &table.target).await.ok()??;
    does_not_fit(&table.target, &ddl::narrower(table, &present), said)
}
