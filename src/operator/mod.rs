//! The operator: turns resources into workers, and what workers say into status.
//!
//! One folder per controller; beside them what they share. Invariants: only the leader writes; every call has a deadline; a pass that
//! has nothing to change writes nothing; a failure of one object never holds up another.

pub mod apply;
pub mod backoff;
pub mod binding;
pub mod cache;
pub mod client;
pub mod connection;
pub mod context;
pub mod databases;
pub mod error;
pub mod events;
pub mod health;
pub mod join;
pub mod leader;
pub mod metrics;
pub mod mirror;
pub mod options;
pub mod permissions;
pub mod poller;
pub mod reconcile;
pub mod run;
pub mod shutdown;
pub mod signing;
pub mod slim;
pub mod watch;
pub mod worker_client;

pub use context::Context;
pub use error::{ErrorClass, OperatorError, Result};
pub use options::Options;
pub use run::{RunError, run};
