//! What runs in a pod: configuration, HTTP, metrics, signals, supervision; one file per job.
//!
//! Invariant: a worker holds no Kubernetes permission; it knows the cluster only through mounted files and signed calls.

pub mod contract;
pub mod token;
