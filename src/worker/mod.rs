//! What runs in a pod: configuration, HTTP, metrics, signals, supervision; one file per job.
//!
//! Invariants: a worker holds no Kubernetes permission; it knows the cluster only through mounted files and signed calls.
//! At most one session runs at a time, and everything in the desired document takes effect by another session, never by
//! another process.

pub mod board;
pub mod config;
pub mod connections;
pub mod contract;
pub mod credentials;
pub mod http;
pub mod metrics;
pub mod options;
pub mod plan;
pub mod registry;
pub mod run;
pub mod supervise;
pub mod token;

pub use options::Options;
