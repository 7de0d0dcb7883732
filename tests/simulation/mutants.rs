//! The test of the test: each of these breaks one rule of a connector's contract or of the engine's, from outside.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// The checkpoint is committed by itself before the data.
    CheckpointBeforeData,
    /// A boundary is where the commit record begins.
    BeginInsteadOfEnd,
    /// A change is due at A, too.
    DueByGreaterOrEqual,
    /// The log says that it has received what it has not, since nothing comes.
    JoinOnSilence,
    /// A copied table is ready at once.
    JoinAtOnce,
    /// What is committed is confirmed.
    ConfirmBeforeDurable,
    /// A table is published after its snapshot was taken.
    PublishAfterSnapshot,
    /// A transaction whose end is not known is due when its commit record starts after A, not at it.
    OpenTransactionByGreater,
    /// Neither the epoch nor the last position is looked at, and nobody is ended.
    FenceLeftOut,
    /// A claim leaves the old claim's backends alone.
    OldBackendsNotEnded,
    /// A range and its done-row are two transactions.
    DoneRowApart,
    /// Changes of keys that depend on each other overtake.
    BarrierLeftOut,
    /// A snapshot is what an ordinary transaction sees, at the place where the log ends.
    OrdinarySnapshot,
    /// Of two parts in flight the later one commits first.
    LaterPartCommitsFirst,
}

impl Mutant {
    pub const ALL: [Self; 14] = [
        Self::CheckpointBeforeData,
        Self::BeginInsteadOfEnd,
        Self::DueByGreaterOrEqual,
        Self::JoinOnSilence,
        Self::JoinAtOnce,
        Self::ConfirmBeforeDurable,
        Self::PublishAfterSnapshot,
        Self::OpenTransactionByGreater,
        Self::FenceLeftOut,
        Self::OldBackendsNotEnded,
        Self::DoneRowApart,
        Self::BarrierLeftOut,
        Self::OrdinarySnapshot,
        Self::LaterPartCommitsFirst,
    ];
}
