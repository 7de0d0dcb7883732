//! PostgreSQL as a source and as a target.
//!
//! Invariants: every session has the settings of [`session`]; identifiers and literals reach SQL only through the
//! quoting functions of [`sql`]; positions are ends of commits.

mod altered;
pub mod applier;
pub mod catalog;
pub mod checkpoint;
pub mod cleanup;
pub mod compare;
pub mod connect;
pub mod ddl;
pub mod endpoint;
pub mod errors;
mod fed;
mod fence;
mod finish;
pub mod forget;
pub mod inspect;
pub mod load;
pub mod log;
pub mod lsn;
pub mod pgoutput;
pub mod publication;
mod register;
mod relate;
pub mod replication;
pub mod session;
pub mod slot;
pub mod snapshot;
pub mod source;
pub mod sql;
pub mod statements;
pub mod target;

pub use endpoint::{Endpoint, TlsMode};
pub use lsn::Lsn;
