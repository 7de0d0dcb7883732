//! Sluice: change data capture, declared in Kubernetes.
//!
//! Dependencies point one way: `operator` and `worker` → `resources`; `worker` → `engine`, `connectors`;
//! `connectors` → the roles of `engine`; `engine` → nothing of ours.

pub mod connectors;
pub mod engine;
pub mod operator;
pub mod resources;
pub mod telemetry;
pub mod worker;
