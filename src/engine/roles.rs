//! What a connector offers: small roles, each implemented by the systems that can.

mod checkpoint;

use super::batch::Part;
use super::error::{Error, Result, reason};
use super::position::Position;
use super::register::{Reached, Register};
use super::request::{RequestChange, RequestRecord, RequestState};
use super::retention::{Lost, Retention};
use super::structure::SequenceValue;
use super::table::{Altered, MappedTable, QualifiedName, TableVersion};
use super::verify::{Compare, Incomparable};
use bytes::Bytes;
pub use checkpoint::{ApplyMode, Checkpoint, Claim, Claimed, TableCheckpoint};
use futures::Stream;
use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

/// Which server a source is, so that positions of one are never used on another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceIdentity {
    /// PostgreSQL: `system_identifier`.
    pub system_identifier: String,
    /// Database that is read.
    pub database: String,
    /// PostgreSQL: timeline.
    pub timeline: i64,
}

/// A table of a source that a stream writes, and from where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fed {
    /// The table of this source.
    pub table: QualifiedName,
    /// System identifier of the server that it is copied from.
    pub system_identifier: String,
    /// Database there.
    pub database: String,
    /// Table there.
    pub origin: QualifiedName,
    /// The stream's owner, as `namespace/name`.
    pub owner: String,
}

/// Names a stream's checkpoint on the target.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StreamKey {
    /// Of the source.
    pub system_identifier: String,
    /// Of the source.
    pub database: String,
    /// Replication slot.
    pub slot: String,
}

/// To whom a checkpoint belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Namespace of the Mirror.
    pub namespace: String,
    /// Name of the Mirror.
    pub name: String,
    /// Uid of the Mirror; a restored object has another.
    pub uid: String,
}

/// Which tables are mapped.
#[derive(Clone, Debug, PartialEq)]
pub enum Selection {
    /// By name.
    Tables(Vec<TableSelection>),
    /// All tables of schemas.
    Schemas(Vec<SchemaSelection>),
}

/// One table by name.
#[derive(Clone, Debug, PartialEq)]
pub struct TableSelection {
    /// In the source.
    pub source: QualifiedName,
    /// In the target.
    pub target: QualifiedName,
    /// Columns that never leave the source.
    pub exclude_columns: Vec<String>,
    /// Target columns may have narrower type modifiers.
    pub accept_narrower_types: bool,
}

/// All tables of one schema.
#[derive(Clone, Debug, PartialEq)]
pub struct SchemaSelection {
    /// In the source.
    pub source: String,
    /// In the target.
    pub target: String,
    /// Tables that are left out.
    pub exclude_tables: Vec<String>,
    /// Target columns may have narrower type modifiers.
    pub accept_narrower_types: bool,
}

/// The slot as the source sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct LogState<P> {
    /// Position that was confirmed last: nothing up to it is sent again.
    pub confirmed: P,
    /// The source has given it up; why.
    pub lost: Option<Lost>,
    /// Process that reads from it now.
    pub active: Option<i32>,
}

/// Limits of one part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Changes.
    pub rows: usize,
    /// Bytes in memory.
    pub bytes: usize,
    /// How long changes may wait for more.
    pub delay: std::time::Duration,
}

/// How the bytes of a bulk stream are written; both ends must agree on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BulkFormat {
    /// PostgreSQL `COPY … (FORMAT binary)`.
    PostgresBinary,
    /// PostgreSQL `COPY … (FORMAT text)`.
    PostgresText,
}

/// Bytes of a range, undecoded, in pieces of any size.
pub type BulkStream = Pin<Box<dyn Stream<Item = Result<Bytes>> + Send>>;

/// One part of a table that is copied by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    /// Number inside the table, from 0.
    pub number: i32,
    /// First block and the block after the last; `None`: the whole table.
    pub blocks: Option<(u64, u64)>,
}

/// A source of tables and changes.
pub trait Source: Send + Sync + 'static {
    /// Its positions.
    type Position: Position;
    /// Its snapshots.
    type Snapshot: Snapshot<Position = Self::Position>;
    /// Its log.
    type Log: ChangeLog<Position = Self::Position>;

    /// Connects and says which server this is.
    fn identity(&self) -> impl Future<Output = Result<SourceIdentity>> + Send;

    /// Reads the mapped tables from the catalog. Fails with the reason for the first table that can't be followed.
    fn tables(&self, selection: &Selection) -> impl Future<Output = Result<Vec<MappedTable>>> + Send;

    /// Which of these tables are themselves written by streams: copied back to where they come from, each change would
    /// come round again.
    fn fed(&self, tables: &[MappedTable]) -> impl Future<Output = Result<Vec<Fed>>> + Send;

    /// Becomes the only worker that may change the source for this stream, until somebody claims it and takes it in turn. Whoever
    /// did so before is ended, if the claim stands. [`Self::publish`], [`Self::create_log`], [`Self::drop_log`]
    /// and [`Self::open`] come after it and fail, class `Retry`, when it is over; what they rest on
    /// ([`Self::published`], [`Self::log_state`]) must be read after it too.
    fn take<P: Proof>(&self, claim: &mut P) -> impl Future<Output = Result<()>> + Send;

    /// Makes the publication hold exactly these tables and columns. Identity, column list and filter of each table that
    /// comes in are checked in the same source transaction under a lock, so that no table whose users' writes the source
    /// would refuse is ever published. One of `present`, which [`Self::published`] has told, must not have left since: once it
    /// is back, nothing tells that changes are gone. Then this fails, class `Retry`.
    fn publish(&self, tables: &[MappedTable], present: &[QualifiedName]) -> impl Future<Output = Result<()>> + Send;

    /// Tables that are in the publication now; compared with what should be there.
    fn published(&self) -> impl Future<Output = Result<Vec<QualifiedName>>> + Send;

    /// The lasting slot, if it exists.
    fn log_state(&self) -> impl Future<Output = Result<Option<LogState<Self::Position>>>> + Send;

    /// Makes the lasting slot and gives the snapshot that goes with it.
    fn create_log(&self) -> impl Future<Output = Result<Self::Snapshot>> + Send;

    /// Drops the lasting slot that was made a moment ago and has no checkpoint yet.
    fn drop_log(&self) -> impl Future<Output = Result<()>> + Send;

    /// Takes another snapshot that is a prefix of the log (PostgreSQL: of a temporary slot), also while the log is open. Nothing of it
    /// stays on the source.
    fn snapshot(&self) -> impl Future<Output = Result<Self::Snapshot>> + Send;

    /// Opens the log after a position. A row carries the table version that it was written under: the given one where
    /// the log describes the table like it, else another. The log may well hold rows of an older version that are not
    /// due; whether one that is due can be written is for the applier to say.
    fn open(&self, from: &Self::Position, tables: &[MappedTable], limits: BatchLimits) -> impl Future<Output = Result<Self::Log>> + Send;

    /// Where the server's present history left an earlier timeline; `None` when that timeline is not part of it. A
    /// position on that timeline is valid up to there.
    fn left_timeline_at(&self, timeline: i64) -> impl Future<Output = Result<Option<Self::Position>>> + Send;

    /// Where the log ends now. What was committed before the call ends before.
    fn head(&self) -> impl Future<Output = Result<Self::Position>> + Send;

    /// Writes a marker into the log, so that an idle source moves on.
    fn mark(&self) -> impl Future<Output = Result<()>> + Send;

    /// How far the sequences of a table are now. Read after its rows, so that no value in them comes again.
    fn sequence_values(&self, table: &MappedTable) -> impl Future<Output = Result<Vec<SequenceValue>>> + Send;

    /// Whether [`Self::look`] can tell what has become of an altered table. Otherwise such a table needs a new copy.
    fn follows_schema(&self) -> bool {
        false
    }

    /// What has become of a table that the target holds as `known` and the log now describes as `described`; `None`: it has not been
    /// altered. Asked after a transaction that has written rows under that description was received. `applied`: everything up to
    /// there is on the target.
    ///
    /// # Errors
    /// Class `Stop`, [`super::error::reason::SCHEMA_CHANGED`]: it can't be told from log and catalog.
    fn look(
        &self,
        _known: &MappedTable,
        _described: &TableVersion,
        _applied: &Self::Position,
    ) -> impl Future<Output = Result<Option<Altered>>> + Send {
        std::future::ready(Ok(None))
    }

    /// The rows of its tables, for a comparison; `None` where they can't be compared.
    fn compare(&self) -> Option<impl Compare + 'static> {
        None::<Incomparable>
    }

    /// What is kept of the log for this stream; `None` when the source can't tell.
    fn retention(&self) -> impl Future<Output = Result<Option<Retention>>> + Send {
        async { Ok(None) }
    }

    /// Drops the lasting slot, so that the source keeps no more log for it, and notes before that it was on purpose. Ends whatever
    /// of ours still uses it. Needs no claim: the stream ends.
    fn give_up(&self) -> impl Future<Output = Result<()>> + Send {
        async { Err(Error::bug("this source keeps no log that could be given up")) }
    }

    /// Whether [`Self::give_up`] has dropped the slot. [`Self::publish`] forgets it.
    fn given_up(&self) -> impl Future<Output = Result<bool>> + Send {
        async { Ok(false) }
    }

    /// What a slow set-up waits for, for people: for example old transactions with their pids and age.
    fn waiting(&self) -> Option<String>;
}

/// One consistent state of a source, tied to a position of its log.
pub trait Snapshot: Send + Sync + 'static {
    /// Positions of the source.
    type Position: Position;

    /// Holds exactly the transactions whose end is not after this.
    fn position(&self) -> &Self::Position;

    /// Splits a table into ranges of about `rows` rows, by statistics.
    fn ranges(&self, table: &MappedTable, rows: u64) -> Vec<Range>;

    /// Reads a range. Each call uses a connection of its own that has imported the snapshot.
    fn read(&self, table: &MappedTable, range: &Range, format: BulkFormat) -> impl Future<Output = Result<BulkStream>> + Send;

    /// Ends the snapshot.
    fn close(self) -> impl Future<Output = ()> + Send;
}

/// The changes of a source after a position.
pub trait ChangeLog: Send + 'static {
    /// Positions of the source.
    type Position: Position;

    /// The next part; waits for one. Safe to cancel: nothing is lost when the future is dropped.
    fn next(&mut self) -> impl Future<Output = Result<Part<Self::Position>>> + Send;

    /// The next part, once it will not grow any more, since more has come than fits into one. Safe to cancel. A log whose
    /// parts do not grow hands over what [`Self::next`] does.
    fn next_grown(&mut self) -> impl Future<Output = Result<Part<Self::Position>>> + Send {
        self.next()
    }

    /// Confirms what is durable on the target. Feedback itself runs in a task of its own.
    fn confirm(&self, durable: &Self::Position);

    /// Of which tables (by id) rows are wanted before it is known what becomes of their transaction ([`super::batch::Early::Piece`]); of none
    /// before the first call. Each piece is answered by [`Self::early`].
    fn want_early(&self, _tables: HashSet<u32>) {}

    /// What became of a piece: it is written, or all of its transaction that was is rolled back; then no more of it comes before its
    /// end, and then all of it.
    ///
    /// # Errors
    /// Class `Retry`: it is too late to roll back, since the rest is on its way.
    fn early(&self, _attempt: u64, _written: bool) -> Result<()> {
        Ok(())
    }

    /// How often the log has described a table so far. A new description is a sign that something about tables has changed.
    fn announced(&self) -> u64;

    /// Last position that was received, and the source's end of log as it last said.
    fn received(&self) -> (Self::Position, Self::Position);

    /// What it takes of the machine. Nothing to speak of, unless it says so.
    fn load(&self) -> LogLoad {
        LogLoad::default()
    }
}

/// What a log takes of the machine, and what it can't do for the lack of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogLoad {
    /// Bytes of memory: of parts from being read until they are applied, and of transactions that have not ended.
    pub memory: u64,
    /// The most that it takes, but for one part, in bytes.
    pub memory_limit: u64,
    /// Bytes in files.
    pub spilled: u64,
    /// The most that may be in files, in bytes.
    pub spill_limit: u64,
    /// What is not as it should be, though the log goes on.
    pub notice: Option<Notice>,
}

/// Something that people should know though the work goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// CamelCase constant of [`super::error::reason`].
    pub reason: &'static str,
    /// For people, without secrets.
    pub message: String,
}

/// How many sessions may work on what follows the rows at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Builders {
    /// On one table.
    pub per_table: usize,
    /// Tables at a time.
    pub tables: usize,
}

/// Takes what is being done, for people.
pub type Tell<'a> = &'a (dyn Fn(String) + Send + Sync);

/// A target that can be loaded and that applies changes.
pub trait Target: Send + Sync + 'static {
    /// Positions of the source whose changes it takes.
    type Position: Position;
    /// Its writer.
    type Applier: Apply<Position = Self::Position>;
    /// Its writer of what becomes of copies.
    type Register: Register<Position = Self::Position>;

    /// Opens what the next calls need, so that they need not wait for it. They do so by themselves otherwise.
    fn connect(&self) -> impl Future<Output = Result<()>> + Send {
        std::future::ready(Ok(()))
    }

    /// Refuses what can't work: source and target the same table, a table that is itself mirrored from here, types that
    /// are missing, an existing table that does not fit. Returns what people should know though it works.
    fn check(&self, source: &SourceIdentity, tables: &[MappedTable], fed: &[Fed]) -> impl Future<Output = Result<Vec<String>>> + Send;

    /// Claims the stream: ends the old claim's backends, raises the epoch, reads the checkpoint, all in one transaction.
    /// `held` is the epoch of an earlier claim of this very process: a higher one on the target means that another worker
    /// has claimed since, and the answer is an error of class `Fenced`.
    fn claim(
        &self,
        key: &StreamKey,
        owner: &Owner,
        held: Option<i64>,
    ) -> impl Future<Output = Result<(Claimed<Self::Position>, Self::Applier)>> + Send;

    /// Opens a writer of what becomes of copies, beside the stream's writer and under the same claim.
    fn register(&self, claim: &Claim) -> impl Future<Output = Result<Self::Register>> + Send;

    /// In which format a table can be copied from the source to here without decoding.
    fn bulk_format(&self, table: &MappedTable) -> impl Future<Output = Result<BulkFormat>> + Send;

    /// Loads one range in one transaction with its done-row. Returns the rows. Runs on a connection of its own; the
    /// epoch is checked as the last statement.
    fn load(
        &self,
        claim: &Claim,
        table: &MappedTable,
        generation: i64,
        range: &Range,
        format: BulkFormat,
        rows: BulkStream,
    ) -> impl Future<Output = Result<u64>> + Send;

    /// Makes what follows the rows: key and statistics, and on a table that [`Apply::begin_copy`] has made all of its
    /// structure but foreign keys. Tells what it does. Safe to repeat.
    fn finish(
        &self,
        claim: &Claim,
        table: &MappedTable,
        values: &[SequenceValue],
        builders: Builders,
        tell: Tell<'_>,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Makes foreign keys between these tables while the stream goes on; each of them is at the stream's checkpoint. Returns
    /// what is not made and why, for people. Safe to repeat.
    fn relate(&self, claim: &Claim, tables: &[MappedTable], tell: Tell<'_>) -> impl Future<Output = Result<Vec<String>>> + Send;

    /// Writes that a request is over, while the stream goes on. Returns all records, the newest first. Safe to repeat.
    fn end_request(
        &self,
        _claim: &Claim,
        _id: &str,
        _state: RequestState,
        _message: &str,
    ) -> impl Future<Output = Result<Vec<RequestRecord>>> + Send {
        std::future::ready(Err(no_requests()))
    }

    /// The rows of its tables, for a comparison; `None` where they can't be compared.
    fn compare(&self) -> Option<impl Compare + 'static> {
        None::<Incomparable>
    }
}

/// The answer of a target that has no place for records of requests.
fn no_requests() -> Error {
    Error::bug("this target keeps no records of requests")
}

/// The holder of a claim.
pub trait Proof: Send {
    /// Proves that the claim still stands.
    ///
    /// # Errors
    /// Class `Fenced` when somebody else has claimed the stream.
    fn prove(&mut self) -> impl Future<Output = Result<()>> + Send;
}

/// The one writer of a stream, bound to the connections that it was claimed with: an error ends it, and the next claim makes
/// a new one. It may hold parts that are *in flight*: accepted by [`Self::apply`], their outcome not given yet.
///
/// What it writes as a [`Register`] is written when nothing is in flight.
pub trait Apply: Proof + Register + 'static {
    /// Notes that the slot is about to be made, so that a crash before the first checkpoint is told from a slot that
    /// somebody else has made.
    fn intend_log(&mut self) -> impl Future<Output = Result<()>> + Send;

    /// Writes the first checkpoint of a stream that has none.
    fn initialize(&mut self, position: &Self::Position, timeline: i64) -> impl Future<Output = Result<()>> + Send;

    /// Forgets the position and every copy, so that the stream begins like a new one, and notes that its slot is about to be made:
    /// all in one transaction. Rows stay until their tables are copied.
    fn start_over(&mut self) -> impl Future<Output = Result<()>> + Send;

    /// Writes the timeline that the source is on now, after a failover that kept everything.
    fn set_timeline(&mut self, timeline: i64) -> impl Future<Output = Result<()>> + Send;

    /// Records what is decided about requests and does what goes with it, in one transaction. Returns all records, the newest
    /// first.
    fn record(&mut self, _change: &RequestChange<'_, Self::Position>) -> impl Future<Output = Result<Vec<RequestRecord>>> + Send {
        std::future::ready(Err(no_requests()))
    }

    /// Forgets tables that are no longer mapped; their rows stay.
    fn forget(&mut self, tables: &[QualifiedName]) -> impl Future<Output = Result<()>> + Send;

    /// Reads what is needed to write these tables: target columns, unique indexes, statements. Called before the first
    /// [`Self::apply`] and when the set of tables changes.
    fn prepare(&mut self, tables: &[MappedTable]) -> impl Future<Output = Result<()>> + Send;

    /// Whether the target table is there.
    fn has_target(&mut self, _table: &MappedTable) -> impl Future<Output = Result<bool>> + Send {
        std::future::ready(Ok(true))
    }

    /// Drops the target of a table whose copy was not finished, if the stream has made it: it is no longer what the copy needs.
    fn discard(&mut self, _table: &MappedTable) -> impl Future<Output = Result<()>> + Send {
        std::future::ready(Ok(()))
    }

    /// Makes the target of a table what the altered one takes, in the target transaction of the next part: the one that is open, or a
    /// new one. Called when nothing is in flight. `follow`: it may alter the target; otherwise it only says what is missing.
    ///
    /// # Errors
    /// Class `Stop`, [`super::error::reason::SCHEMA_CHANGED`], with the statement that is needed.
    fn adapt(&mut self, _known: &MappedTable, altered: &Altered, _follow: bool) -> impl Future<Output = Result<()>> + Send {
        let name = altered.table.source();
        std::future::ready(Err(Error::stop(reason::SCHEMA_CHANGED, format!("{name} was altered"))))
    }

    /// Accepts a part: the changes for which `due(table id, index of the change)` says yes are written from now on, and
    /// this may return before they are. A due change under another version than the prepared one is `SchemaChanged`,
    /// naming the table and the columns that differ.
    ///
    /// A target transaction is opened when none is open; when the part is not open, the transaction ends with the
    /// checkpoint (`part`'s last boundary, or `received` without one; never back) and the proof of the epoch as its last statement.
    /// What it makes of tables is committed with it.
    /// Parts may be written side by side, as far as the rows left behind are the same as one after the other; they are
    /// committed strictly in the order in which they were accepted. [`Self::applied`] gives the outcome of each.
    ///
    /// A part that makes something of tables is accepted only when nothing is in flight. A part that continues a transaction while none is
    /// open continues that of the pieces.
    fn apply(
        &mut self,
        part: Arc<Part<Self::Position>>,
        due: &(dyn Fn(u32, usize) -> bool + Send + Sync),
        reached: &Reached,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Tables (by id) of which rows can be written before it is known what becomes of their transaction: rows that come, and
    /// that are in nobody's way until then.
    fn early_tables(&self) -> HashSet<u32> {
        HashSet::new()
    }

    /// Begins to write a piece of a transaction that has not ended ([`super::batch::Early::Piece`]), all of it, beside all parts that are
    /// accepted later. `false`: it is not written.
    fn apply_early(&mut self, _piece: Arc<Part<Self::Position>>) -> impl Future<Output = Result<bool>> + Send {
        std::future::ready(Ok(false))
    }

    /// Rolls back what was written of the transaction that has not ended. No outcomes of its pieces follow.
    fn drop_early(&mut self) {}

    /// Waits for the next outcome, of a part as [`Self::applied`] gives it, or of a piece. Safe to cancel.
    fn outcome(&mut self) -> impl Future<Output = Result<Outcome>> + Send {
        async { self.applied().await.map(Outcome::Part) }
    }

    /// Whether a part could be begun at once. Until then parts are better left in the log, where small ones grow together.
    fn has_room(&self) -> bool;

    /// The outcome of the oldest part in flight, which is over when this returns; `None` when nothing is in flight. Safe
    /// to cancel. A failure ends the writer: nothing of the parts in flight is kept but what is committed, and only
    /// the next claim says what that is.
    ///
    /// All other calls but [`Self::apply`], [`Self::durable`] and [`Self::abort`] are made when nothing is in flight.
    fn applied(&mut self) -> impl Future<Output = Result<Option<Applied>>> + Send;

    /// Moves the checkpoint of an idle stream.
    fn advance(&mut self, position: &Self::Position, joined: &[QualifiedName]) -> impl Future<Output = Result<()>> + Send;

    /// The last checkpoint that is on the target's disk; asks the target only when one is waiting.
    fn durable(&mut self) -> impl Future<Output = Result<Option<Self::Position>>> + Send;

    /// Rolls back what is open and what is in flight. Used on suspend and stop.
    fn abort(self) -> impl Future<Output = ()> + Send;

    /// How changes are written.
    fn mode(&self) -> ApplyMode;
}

/// What one part has brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Rows inserted.
    pub inserts: u64,
    /// Rows updated.
    pub updates: u64,
    /// Rows deleted.
    pub deletes: u64,
    /// The part's transactions are committed.
    pub committed: bool,
}

/// What was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Of the oldest part in flight.
    Part(Option<Applied>),
    /// Of the oldest piece of a transaction that has not ended. `None`: all that was written of it is rolled back, which may happen at
    /// any time until the transaction's next part is accepted.
    Early(Option<Applied>),
}

/// Shared table versions by id.
pub type Versions = HashMap<u32, Arc<TableVersion>>;
