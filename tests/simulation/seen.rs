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
}

impl Rare {
    pub const ALL: [Self; 25] = [
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
    ];
}

#[derive(Clone, Copy, Default)]
pub struct Seen {
    pub comparisons: u64,
    pub commits: u64,
    pub steps: u64,
    /// Order-dependent summary of all commits: the same for the same seed.
    pub digest: u64,
    rare: [u64; Rare::ALL.len()],
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
