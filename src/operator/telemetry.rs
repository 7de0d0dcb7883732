//! Logs on standard output: lines for people, or one JSON object a line.

use super::options::{LogFormat, Options};
use tracing_subscriber::EnvFilter;

/// Begins to log as `options` say. A program that logs already goes on as it does.
///
/// # Errors
/// When the level or filter cannot be read.
pub fn init(options: &Options) -> Result<(), tracing_subscriber::filter::ParseError> {
    let builder = tracing_subscriber::fmt().with_env_filter(filter(&options.log_level)?).with_target(true);
    // An error only means that somebody else has begun to log.
    let _ = match options.log_format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    Ok(())
}

/// The filter, with kube's client quiet unless it is named: it logs each failed request as an error of its own, and what becomes of it
/// is logged by whoever made it.
fn filter(level: &str) -> Result<EnvFilter, tracing_subscriber::filter::ParseError> {
    if level.contains("kube") { EnvFilter::try_new(level) } else { EnvFilter::try_new(format!("{level},kube_client=off")) }
}
