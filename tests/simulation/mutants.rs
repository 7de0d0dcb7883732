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
    /// A change of a row without a key touches all rows that are equal to it.
    AllEqualRowsTouched,
    /// A row without a key is looked for with `=`, by which nothing equals NULL.
    NullEqualsNothing,
    /// Changes of rows without a key are taken for changes of one key.
    KeylessNetEffects,
    /// Rows of another definition of a table are written as if they were of the mapped one.
    DefinitionNotCompared,
    /// A row of another definition ends the stream although it is not due.
    DefinitionJudgedTooEarly,
    /// A table in the checkpoint is taken for one of today's definition.
    CopiedDefinitionForgotten,
    /// The publication is taken for what it was asked to be.
    LeavingNotNoticed,
    /// A log is opened on whatever timeline the server is on.
    TimelineNotCompared,
    /// Any position of an earlier timeline is taken for one before the switch.
    SwitchPointLeftOut,
    /// The source is taken when its locks are, whatever has become of the claim.
    NoProofAfterLock,
    /// Whoever holds the source's locks is ended by a worker that does not know whether its own claim stands.
    HoldersEndedWithoutProof,
    /// The claim is proven before it is seen who holds the source's locks.
    HoldersSeenAfterProof,
    /// Whoever holds the source's locks is left alone.
    HoldersNotEnded,
    /// The source is changed without its locks.
    SourceNotTaken,
    /// The slot is looked at before the source is taken, and not after.
    LookedOnlyBeforeTake,
    /// A table that was copied as of a position beyond the switch follows as if its copy were good.
    CopyBeyondSwitchKept,
    /// Nobody hears that a transaction is rolled back of which rows are written.
    RollBackNotHeard,
    /// Nobody hears that a part of it is.
    SavepointNotHeard,
    /// Nobody hears that the log's connection has ended, on which the transaction began.
    ReconnectNotHeard,
    /// A row is written early when nobody knows yet whether its key is free.
    RowsBehindLeftOut,
    /// Rows are written before transactions that had ended when they came.
    PieceOvertakes,
    /// Rows are written beside parts that touch the same keys.
    EarlyBesideItsForerunners,
    /// Rows that come to nothing stay written, and are committed with the next ones.
    EarlyNotRolledBack,
    /// The rest of a transaction is written though its first rows are lost.
    LostPiecesNotMissed,
    /// A transaction that was begun with early is committed without its checkpoint.
    EarlyCheckpointApart,
    /// A claim leaves the connection alone that writes a transaction early.
    EarlyLaneLeftAlone,
    /// What is durable is confirmed, whatever tables that are not ready still need.
    HoldNotKept,
    /// A change is not due that lies before the checkpoint, wherever its table is.
    DueByCheckpoint,
    /// The own position of a table that catches up does not move with its rows.
    OwnPositionApart,
    /// The checkpoint goes back to where the log is read again.
    CheckpointGoesBack,
    /// The commit with which a table joins is not on disk when what it needed may be thrown away.
    JoinNotOnDisk,
    /// A table that needs a new copy stays what it was until the copy begins.
    OldCopyTakenForGood,
}

impl Mutant {
    pub const ALL: [Self; 46] = [
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
        Self::AllEqualRowsTouched,
        Self::NullEqualsNothing,
        Self::KeylessNetEffects,
        Self::DefinitionNotCompared,
        Self::DefinitionJudgedTooEarly,
        Self::CopiedDefinitionForgotten,
        Self::LeavingNotNoticed,
        Self::TimelineNotCompared,
        Self::SwitchPointLeftOut,
        Self::NoProofAfterLock,
        Self::HoldersEndedWithoutProof,
        Self::HoldersSeenAfterProof,
        Self::HoldersNotEnded,
        Self::SourceNotTaken,
        Self::LookedOnlyBeforeTake,
        Self::CopyBeyondSwitchKept,
        Self::RollBackNotHeard,
        Self::SavepointNotHeard,
        Self::ReconnectNotHeard,
        Self::RowsBehindLeftOut,
        Self::PieceOvertakes,
        Self::EarlyBesideItsForerunners,
        Self::EarlyNotRolledBack,
        Self::LostPiecesNotMissed,
        Self::EarlyCheckpointApart,
        Self::EarlyLaneLeftAlone,
        Self::HoldNotKept,
        Self::DueByCheckpoint,
        Self::OwnPositionApart,
        Self::CheckpointGoesBack,
        Self::JoinNotOnDisk,
        Self::OldCopyTakenForGood,
    ];
}
