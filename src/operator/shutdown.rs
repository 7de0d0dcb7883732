//! One token for all tasks: stop taking work, finish what runs.

pub use tokio_util::sync::CancellationToken as Shutdown;

/// How long running reconciles may take to finish; the pod's grace period is 30 s.
pub const DRAIN: std::time::Duration = std::time::Duration::from_secs(20);
