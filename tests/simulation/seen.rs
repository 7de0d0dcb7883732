//! What has happened in histories, so that a test that proves nothing is noticed.

use std::fmt::{self, Debug, Formatter};

/// What must not be missing among many histories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rare {
    /// A table became ready with a transaction after its copy.
    JoinedByPart,
    /// A table became ready at a position that an idle source has told.
    JoinedIdle,
    OpenPart,
    /// A part was accepted while another one was in flight.
    BehindAnother,
    NotDue,
    TargetCrash,
    CommitLost,
    /// A commit of a worker that is gone.
    OrphanCommitted,
    Fenced,
    /// A snapshot waited for a writer.
    WaitedForWriter,
    /// A snapshot saw a commit before others could.
    StalledAtSnapshot,
    Stopped,
    /// One of several equal rows without a key was changed.
    OneOfEqualRows,
    /// A change was skipped that was written under another definition of its table than is mapped.
    OldDefinitionSkipped,
    /// A due change met another definition of its table than is mapped.
    DefinitionRefused,
    /// A table that was copied is copied anew under its new definition.
    CopiedUnderNewDefinition,
    /// A snapshot ended since a table was rewritten.
    SnapshotLost,
    /// Somebody took a table out of the publication.
    TakenOut,
    /// It was noticed.
    LeftPublication,
    /// It was taken out after the publication was looked at, and before it was set.
    LeftAtTheLastMoment,
    /// A table that had left came back.
    CameBack,
    Failover,
    /// A stream went on over a failover.
    WentOnAfterFailover,
    /// The target held what the new primary server never had.
    Diverged,
    /// A copy from before a failover was dropped, since it lies beyond the switch.
    CopyBeyondSwitch,
    SourceCrash,
    /// A worker did nothing for long.
    Paused,
    /// A worker lived on beside those that came after it.
    LivedOn,
    /// A session on the source was ended since it held a lock.
    HolderEnded,
    /// What such a session had sent was rolled back.
    StatementRolledBack,
    /// The source has done what a worker had sent that is gone, or was told to go.
    OrphanStatement,
    /// The slot came or went between the look at it and the taking of the source.
    SlotChangedBeforeTake,
    /// Rows were handed over before the end of their transaction.
    Piece,
    /// The rest followed them.
    RestBehindPieces,
    PieceRefused,
    /// A transaction was rolled back of which rows were handed over.
    RollBackBehindPieces,
    /// The same for a part of it.
    SavepointBehindPieces,
    /// The log's connection ended behind such rows.
    ReconnectBehindPieces,
    EarlyLaneLost,
    /// A `COPY` waited for a key with its rows in the log.
    CopyWaited,
    /// The key was taken for good.
    CopyFailed,
    /// The stream went on while a table was copied.
    BesideCopy,
    /// The log was read again for a table, and there was something for it.
    ReadAgain,
    /// A table joined that was behind the checkpoint,
    JoinedFromBehind,
    /// with a part that begins before the checkpoint and ends behind it.
    PartOverCheckpoint,
}

impl Rare {
    pub const ALL: [Self; 45] = [
        Self::JoinedByPart,
        Self::JoinedIdle,
        Self::OpenPart,
        Self::BehindAnother,
        Self::NotDue,
        Self::TargetCrash,
        Self::CommitLost,
        Self::OrphanCommitted,
        Self::Fenced,
        Self::WaitedForWriter,
        Self::StalledAtSnapshot,
        Self::Stopped,
        Self::OneOfEqualRows,
        Self::OldDefinitionSkipped,
        Self::DefinitionRefused,
        Self::CopiedUnderNewDefinition,
        Self::SnapshotLost,
        Self::TakenOut,
        Self::LeftPublication,
        Self::LeftAtTheLastMoment,
        Self::CameBack,
        Self::Failover,
        Self::WentOnAfterFailover,
        Self::Diverged,
        Self::CopyBeyondSwitch,
        Self::SourceCrash,
        Self::Paused,
        Self::LivedOn,
        Self::HolderEnded,
        Self::StatementRolledBack,
        Self::OrphanStatement,
        Self::SlotChangedBeforeTake,
        Self::Piece,
        Self::RestBehindPieces,
        Self::PieceRefused,
        Self::RollBackBehindPieces,
        Self::SavepointBehindPieces,
        Self::ReconnectBehindPieces,
        Self::EarlyLaneLost,
        Self::CopyWaited,
        Self::CopyFailed,
        Self::BesideCopy,
        Self::ReadAgain,
        Self::JoinedFromBehind,
        Self::PartOverCheckpoint,
    ];
}

#[derive(Clone, Copy)]
pub struct Seen {
    pub comparisons: u64,
    pub commits: u64,
    pub steps: u64,
    /// Order-dependent summary of all commits: the same for the same seed.
    pub digest: u64,
    rare: [u64; Rare::ALL.len()],
}

impl Default for Seen {
    fn default() -> Self {
        Self { comparisons: 0, commits: 0, steps: 0, digest: 0, rare: [0; Rare::ALL.len()] }
    }
}

impl Seen {
    pub fn note(&mut self, what: Rare) {
        self.note_all(what, 1);
    }

    pub fn note_all(&mut self, what: Rare, times: u64) {
        self.rare[what as usize] += times;
    }

    pub fn times(&self, what: Rare) -> u64 {
        self.rare[what as usize]
    }

    pub fn add(&mut self, other: &Self) {
        self.comparisons += other.comparisons;
        self.commits += other.commits;
        self.steps += other.steps;
        self.rare.iter_mut().zip(other.rare).for_each(|(sum, times)| *sum += times);
    }
}

impl Debug for Seen {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Seen");
        shown.field("comparisons", &self.comparisons).field("commits", &self.commits).field("steps", &self.steps);
        for what in Rare::ALL {
            shown.field(&format!("{what:?}"), &self.times(what));
        }
        shown.finish()
    }
}
