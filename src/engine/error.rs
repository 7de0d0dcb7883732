//! Failures of the engine and its connectors: each has a class that decides what happens next and a reason that is shown.

use std::fmt;

/// What is done about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// May pass by itself (connection lost, server restarting, disk full): repeated with a growing pause.
    Retry,
    /// Needs a human (wrong password, table missing): shown as stalled and looked at again at a slow pace.
    Stop,
    /// Another worker holds the claim: this process ends and does not claim again.
    Fenced,
    /// Should not happen: a defect of ours. Handled like `Stop`.
    Bug,
}

impl Class {
    /// The word in the worker's status document.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Retry => "Retry",
            Self::Stop => "Stop",
            Self::Fenced => "Fenced",
            Self::Bug => "Bug",
        }
    }
}

/// A failure with its class, its reason (a CamelCase constant of [`reason`], shown in conditions) and a message that says
/// what to do. Messages never hold a secret.
#[derive(Debug)]
pub struct Error {
    /// Decides what happens next.
    pub class: Class,
    /// CamelCase constant for conditions.
    pub reason: &'static str,
    /// For people.
    pub message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Result of the engine.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A failure that may pass by itself.
    pub fn retry(reason: &'static str, message: impl Into<String>) -> Self {
        Self::new(Class::Retry, reason, message)
    }

    /// A failure that needs a human.
    pub fn stop(reason: &'static str, message: impl Into<String>) -> Self {
        Self::new(Class::Stop, reason, message)
    }

    /// A defect of ours.
    pub fn bug(message: impl Into<String>) -> Self {
        Self::new(Class::Bug, reason::INTERNAL_ERROR, message)
    }

    /// Any failure.
    pub fn new(class: Class, reason: &'static str, message: impl Into<String>) -> Self {
        Self { class, reason, message: message.into(), source: None }
    }

    /// The same with its cause.
    #[must_use]
    pub fn caused_by(mut self, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(cause.into());
        self
    }

    /// The same with words before its message, for example the table it happened on.
    #[must_use]
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|cause| cause as _)
    }
}

/// Reasons, as they appear in conditions. `docs/src/reference/reasons.md` says what each means and what to do.
pub mod reason {
    macro_rules! reasons {
        ($($constant:ident = $text:literal, $doc:literal;)*) => {
            $(#[doc = $doc] pub const $constant: &str = $text;)*
            /// All reasons of engine and connectors; the documentation must name each.
            pub const ALL: &[&str] = &[$($text),*];
        };
    }
    reasons! {
        AUTHENTICATION_FAILED = "AuthenticationFailed", "The server refused user name, password or certificate.";
        HOST_UNREACHABLE = "HostUnreachable", "No connection to host and port.";
        DATABASE_MISSING = "DatabaseMissing", "The server has no such database.";
        TLS_FAILED = "TlsFailed", "No TLS session of the demanded kind.";
        SOURCE_UNREACHABLE = "SourceUnreachable", "The connection to the source was lost or can't be made.";
        TARGET_UNREACHABLE = "TargetUnreachable", "The connection to the target was lost or can't be made.";
        WAL_LEVEL_NOT_LOGICAL = "WalLevelNotLogical", "The source's wal_level is not logical.";
        NO_FREE_REPLICATION_SLOT = "NoFreeReplicationSlot", "All replication slots of the source are in use.";
        NO_FREE_WAL_SENDER = "NoFreeWalSender", "All WAL senders of the source are in use.";
        ROLE_LACKS_REPLICATION = "RoleLacksReplication", "The role may not replicate.";
        PRIVILEGE_MISSING = "PrivilegeMissing", "The role lacks a privilege on a table, schema or database.";
        POOLER_DETECTED = "PoolerDetected", "Different backends answer on one connection or address.";
        SLOT_WAL_UNLIMITED = "SlotWalUnlimited", "max_slot_wal_keep_size is unlimited: a stopped slot can fill the source's disk.";
        FAILOVER_SLOTS_NOT_AWAITED = "FailoverSlotsNotAwaited", "The source does not wait for its standbys: after a failover they may lack what targets have.";
        FAILOVER_SLOTS_NOT_SYNCED = "FailoverSlotsNotSynced", "Standbys of the source do not keep its slots: a failover loses them.";
        FAILOVER_STANDBY_AWAY = "FailoverStandbyAway", "The source waits for a standby that is not there: nothing is streamed.";
        TABLE_MISSING = "TableMissing", "A table of the spec is not in the source.";
        TABLE_WITHOUT_IDENTITY = "TableWithoutIdentity", "A table has neither primary key nor replica identity.";
        TABLE_NOT_SUPPORTED = "TableNotSupported", "A view, foreign, unlogged or temporary table can't be followed.";
        COLUMN_MISSING = "ColumnMissing", "An excluded column is not in the source's table.";
        NEEDS_POSTGRESQL_15 = "NeedsPostgreSQL15", "Excluded columns need PostgreSQL 15 on the source.";
        EXCLUDED_COLUMN_IN_IDENTITY = "ExcludedColumnInIdentity", "An excluded column belongs to the table's replica identity.";
        LEFT_PUBLICATION = "LeftPublication", "A table was taken out of the publication behind our back.";
        PUBLICATION_MISSING = "PublicationMissing", "The publication is gone or was not there at the position read.";
        TARGET_TABLE_NOT_EMPTY = "TargetTableNotEmpty", "A target table holds rows and existingRows is Refuse.";
        TARGET_TABLE_INCOMPATIBLE = "TargetTableIncompatible", "An existing target table lacks a column or has another type.";
        TARGET_TABLE_REFERENCED = "TargetTableReferenced", "A target table can't be emptied for a copy: foreign keys of tables that are not copied refer to it.";
        TYPE_MISSING = "TypeMissing", "The target lacks a type, function, collation or extension that tables of the source use.";
        TARGET_READ_ONLY = "TargetReadOnly", "The target accepts no writes.";
        TARGET_DISK_FULL = "TargetDiskFull", "The target has no room left.";
        SOURCE_DISK_FULL = "SourceDiskFull", "The source has no room left.";
        SAME_TABLE = "SameTable", "Source and target are the same table.";
        TARGET_IS_MIRRORED = "TargetIsMirrored", "A source table is itself written by a Mirror with this Mirror's table as its source.";
        DUPLICATE_TARGET = "DuplicateTarget", "Two source tables go to one target table.";
        CHECKPOINT_OF_ANOTHER_MIRROR = "CheckpointOfAnotherMirror", "The checkpoint for this source and slot belongs to another Mirror.";
        SLOT_WITHOUT_CHECKPOINT = "SlotWithoutCheckpoint", "The slot exists but the target has no checkpoint for it.";
        CHECKPOINT_WITHOUT_SLOT = "CheckpointWithoutSlot", "The target has a checkpoint but the slot is gone.";
        CHECKPOINT_BEHIND_SLOT = "CheckpointBehindSlot", "The slot was confirmed beyond the checkpoint: changes are gone.";
        TIMELINE_DIVERGED = "TimelineDiverged", "The source is on a timeline that left before the checkpoint.";
        SYSTEM_IDENTIFIER_CHANGED = "SystemIdentifierChanged", "The source is another server than the one first seen.";
        SLOT_LOST = "SlotLost", "The source has thrown away log that the slot needs.";
        SLOT_ROWS_REMOVED = "SlotRowsRemoved", "The slot was invalidated on a standby: rows of the catalog that it needs were removed.";
        SLOT_WAL_LEVEL_INSUFFICIENT = "SlotWalLevelInsufficient", "The slot was invalidated on a standby: wal_level of the primary was not logical.";
        SLOT_IDLE_TOO_LONG = "SlotIdleTooLong", "The source has invalidated the slot since nobody read from it for idle_replication_slot_timeout.";
        SLOT_MISSING = "SlotMissing", "The slot is not on the source any more.";
        SLOT_GIVEN_UP = "SlotGivenUp", "The slot was dropped since more log was kept for it than the budget allows.";
        WAL_BUDGET_WARNING = "WalBudgetWarning", "The source keeps more log for the slot than walBudget.warnBytes.";
        WAL_BUDGET_EXCEEDED = "WalBudgetExceeded", "The source keeps, or kept, more log for the slot than walBudget.maxBytes.";
        SLOT_AT_RISK = "SlotAtRisk", "Little is left of what the source may keep for the slot: it is going to be lost.";
        SLOT_IN_USE = "SlotInUse", "Another process reads from the slot.";
        START_POSITION_REQUIRED = "StartPositionRequired", "snapshot.enabled is false and nothing says where to start.";
        SNAPSHOT_LOST = "SnapshotLost", "The source's snapshot ended before a table was copied.";
        FENCED = "Fenced", "Another worker has claimed this stream.";
        ROW_MISSING = "RowMissing", "A row to update or delete is not in the target.";
        ROW_CONFLICT = "RowConflict", "A row to insert is already in the target.";
        WRITE_REFUSED = "WriteRefused", "The target refused a change.";
        VALUE_DOES_NOT_FIT = "ValueDoesNotFit", "A value of the source does not fit into a narrower column of the target.";
        SCHEMA_CHANGED = "SchemaChanged", "The source's table changed in a way that can't be followed.";
        SPILL_FULL = "SpillFull", "Transactions that had not ended took more room than there is: they are received at their end meanwhile.";
        STREAMING_FAILED = "StreamingFailed", "The source fails to send a transaction before its end: large ones are received at their end meanwhile.";
        SPILL_FAILED = "SpillFailed", "A file of the worker's spill can't be read.";
        WAITING_FOR_OLD_TRANSACTIONS = "WaitingForOldTransactions", "The slot waits for transactions that began before it.";
        PROTOCOL_VIOLATION = "ProtocolViolation", "A server sent something that its protocol does not allow.";
        SERVER_UNSUPPORTED = "ServerUnsupported", "The server is too old or a standby.";
        INVALID_SPEC = "InvalidSpec", "The specification can't be carried out.";
        INTERNAL_ERROR = "InternalError", "A defect of Sluice; please report it.";
    }

    /// Why a source gives a slot up.
    pub const LOST_SLOTS: &[&str] = &[SLOT_LOST, SLOT_ROWS_REMOVED, SLOT_WAL_LEVEL_INSUFFICIENT, SLOT_IDLE_TOO_LONG];
}
