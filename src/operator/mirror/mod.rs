//! The controller of Mirrors: resolve → validate → plan → apply → observe → report.
//!
//! The middle is pure: `peer`, `sharing`, `validate`, `intent`, `plan`, `rollout`, `observe`, `report`, `deletion`. Around it: `controller` (the
//! loop), `children` (writes), `clean_up` (deletion), `guard` (the source
//! of a worker that does not answer), `caches` and `memory`.
//!
//! Invariants: nothing outside the cluster is made before the Mirror has its finalizer; no worker is made before all is well, and a running
//! one is never taken from what works; a pass that changes nothing writes nothing.

mod caches;
mod children;
mod clean_up;
mod controller;
pub mod deletion;
mod guard;
pub mod intent;
mod memory;
pub mod observe;
pub mod peer;
pub mod plan;
pub mod problem;
pub mod report;
pub mod rollout;
pub mod sharing;
pub mod validate;

pub use controller::{CONTROLLER, spawn};
