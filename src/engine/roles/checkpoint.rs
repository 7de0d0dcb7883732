//! What a target holds of a stream, and the right to write there.

use super::{Owner, StreamKey};
use crate::engine::request::RequestRecord;
use crate::engine::table::{QualifiedName, TableState};
use std::collections::HashMap;

/// One table in the checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct TableCheckpoint<P> {
    /// In the source.
    pub source: QualifiedName,
    /// In the target.
    pub target: QualifiedName,
    /// How far it is.
    pub state: TableState,
    /// Counts the copies of this table, so that rows of an older one are never taken for done.
    pub generation: i64,
    /// Up to where its copy is right, for a table that is copied or catching up.
    pub position: Option<P>,
    /// Rows copied in this generation.
    pub rows_copied: i64,
    /// Encoded column names and types, to see that a table has changed while nobody looked.
    pub columns: String,
    /// Why it is in state `Error`, when that is not seen otherwise.
    pub error: Option<String>,
}

impl<P> TableCheckpoint<P> {
    /// The stream's changes of it are applied, or will be.
    #[must_use]
    pub fn follows(&self) -> bool {
        matches!(self.state, TableState::CatchingUp | TableState::Ready)
    }

    /// All rows of its copy are there, as of a known position.
    #[must_use]
    pub fn is_copied(&self) -> bool {
        match self.state {
            TableState::Copied => self.position.is_some(),
            TableState::CatchingUp | TableState::Ready => true,
            TableState::Init | TableState::Copying | TableState::Error => false,
        }
    }
}

/// What a target holds durably for a stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint<P> {
    /// End of the last transaction applied.
    pub position: P,
    /// Timeline that the position lies on.
    pub timeline: i64,
    /// Owner that wrote it last.
    pub owner: Owner,
    /// Rows written from the stream since its first checkpoint.
    pub rows_streamed: u64,
    /// Tables by source name.
    pub tables: HashMap<QualifiedName, TableCheckpoint<P>>,
}

impl<P> Checkpoint<P> {
    /// Rows that finished copies have brought.
    #[must_use]
    pub fn rows_copied(&self) -> u64 {
        self.tables.values().filter(|table| table.is_copied()).map(|table| table.rows_copied.unsigned_abs()).sum()
    }
}

/// The right to write for one stream until somebody else claims it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The stream.
    pub key: StreamKey,
    /// Raised by one with each claim.
    pub epoch: i64,
}

/// What a claim has found.
#[derive(Clone, Debug)]
pub struct Claimed<P> {
    /// The claim.
    pub claim: Claim,
    /// What is durable on the target, read in the claiming transaction; `None` for a new stream.
    pub checkpoint: Option<Checkpoint<P>>,
    /// This stream was about to make its slot when it ended: a slot without a checkpoint is its own and holds nothing.
    pub log_intended: bool,
    /// What is recorded of requests, the newest first.
    pub requests: Vec<RequestRecord>,
}

/// How changes are written, shown in status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApplyMode {
    /// `session_replication_role = replica`: triggers and foreign keys of the target do not fire.
    Replica,
    /// Without that right: row by row in commit order.
    Ordered,
}

impl ApplyMode {
    /// The word in status.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Replica => "Replica",
            Self::Ordered => "Ordered",
        }
    }
}
