//! The kinds of `sluice.dev/v1alpha1`: types, validation rules, conditions. No I/O.
//!
//! Invariant: only kinds, fields and values that work are in the schema, each with a description and a bound.

pub mod common;
pub mod conditions;
pub mod connection;
pub mod crds;
pub mod mirror;
pub mod mirror_status;
pub mod names;

pub use common::{Engine, KeyRef, LocalRef, ParamValue, Prerequisite, Reclaim, Tls, TlsMode};
pub use connection::{Connection, ConnectionSpec, ConnectionStatus, OrphanedSlot, Source, SourceSpec, Target, TargetSpec};
pub use mirror::{
    DeletionPolicy, ExistingRows, Mirror, MirrorSpec, NarrowerTypes, Request, RequestAction, Schema, SchemaChanges, Snapshot, Stream,
    Table, TableName, TargetTriggers, UpdatePolicy, WalBudget, WalBudgetAction, Worker,
};
pub use mirror_status::{DifferentRow, MirrorStatus, Position, RequestStatus, Retention, TableCounts, VerificationStatus, WorkerStatus};
