//! The change data capture engine: words, roles and flow. It knows no Kubernetes and no database.
//!
//! Invariants kept here:
//! * a change of table T in a transaction with end position `c` is applied if and only if `c` lies after the position up
//!   to which T's copy is right (see [`handover`]);
//! * what is confirmed to a source is what is durable on the target, and nothing that a table still needs;
//! * nothing that was learned from a target outlives the connection it was learned on.
//!
//! The pure parts ([`batch`], [`coalesce`], [`handover`], [`startup`], [`retry`]) do no I/O; connectors implement the
//! [`roles`]; [`flow`] puts them together.

mod altered;
pub mod batch;
pub mod budget;
pub mod coalesce;
mod copy;
mod early;
pub mod error;
pub mod flow;
pub mod handover;
pub mod hash;
mod heartbeat;
pub mod latency;
mod pending;
pub mod position;
pub mod progress;
pub mod recorded;
pub mod register;
pub mod request;
mod resume;
pub mod retention;
pub mod retry;
pub mod roles;
pub mod spill;
pub mod startup;
mod stream;
pub mod structure;
pub mod table;
pub mod verify;

#[cfg(test)]
pub(crate) mod testing;
