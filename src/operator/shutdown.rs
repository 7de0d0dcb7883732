//! One signal for all tasks: stop taking work, finish what runs.

use tokio::signal::unix::{SignalKind, signal};
pub use tokio_util::sync::CancellationToken as Shutdown;

/// How long running reconciles may take to finish; the pod's grace period is 30 s.
pub const DRAIN: std::time::Duration = std::time::Duration::from_secs(20);

/// Requests shutdown when the process is told to end (SIGTERM, SIGINT).
///
/// # Errors
/// When the handlers cannot be installed.
pub fn on_signals(shutdown: Shutdown) -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
            () = shutdown.cancelled() => return,
        };
        tracing::info!(signal = name, "shutting down");
        shutdown.cancel();
    });
    Ok(())
}
