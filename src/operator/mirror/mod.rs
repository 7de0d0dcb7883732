//! The controller of Mirrors: resolve → validate → plan → apply → observe → report.

pub mod deletion;
pub mod intent;
pub mod observe;
pub mod peer;
pub mod plan;
pub mod problem;
pub mod report;
pub mod rollout;
pub mod validate;
