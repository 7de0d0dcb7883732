//! Logs of every subcommand: to standard error, as text for people or as one JSON object a line.

use clap::ValueEnum;
use std::io::IsTerminal as _;
use tracing_subscriber::EnvFilter;

/// Form of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Logs can't be written as asked.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter can't be read.
    #[error("`{0}` is not a log level or filter such as info or info,sluice=debug")]
    Filter(String),
    /// Somebody else has set up logs.
    #[error("logs are set up twice: {0}")]
    Twice(#[from] Box<dyn std::error::Error + Send + Sync>),
}

/// Reads a level, or a filter by module such as `info,sluice=debug`.
///
/// # Errors
/// The text is neither.
pub fn filter(text: &str) -> Result<EnvFilter, TelemetryError> {
    EnvFilter::builder().parse(text).map_err(|_| TelemetryError::Filter(text.to_owned()))
}

/// Sets up logs for the process. Called once, before anything is logged.
///
/// # Errors
/// The filter can't be read, or logs have been set up before.
pub fn init(format: LogFormat, level: &str) -> Result<(), TelemetryError> {
    let logs = tracing_subscriber::fmt().with_env_filter(filter(level)?).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => logs.with_ansi(std::io::stderr().is_terminal()).try_init()?,
        LogFormat::Json => logs.json().flatten_event(true).with_current_span(false).try_init()?,
    }
    std::panic::set_hook(Box::new(log_panic));
    Ok(())
}

/// A panic is one log line like others, so that it is found where logs are read by machines.
fn log_panic(panic: &std::panic::PanicHookInfo<'_>) {
    let place = panic.location().map(ToString::to_string).unwrap_or_default();
    let message = panic.payload_as_str().unwrap_or("no words");
    tracing::error!(place, "panic: {message}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_filters_are_read() {
        for text in ["info", "warn,sluice=debug", "off"] {
            assert!(filter(text).is_ok(), "{text}");
        }
        assert!(filter("sluice=loud").is_err());
    }
}
