//! What keeps a Mirror from being worked on, in the words of conditions.

use crate::engine::error::reason as engine;
use crate::resources::conditions::reason as own;

/// Why the current spec can't be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// For conditions.
    pub reason: &'static str,
    /// For people, without secrets.
    pub message: String,
    /// Only a change by a human helps.
    pub needs_human: bool,
}

impl Problem {
    /// Only a change by a human helps.
    pub fn stop(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), needs_human: true }
    }

    /// It may pass by itself.
    pub fn retry(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), needs_human: false }
    }
}

/// The documented reason with this text. Of a worker that is newer than this operator may come one that is not known yet: it is shown
/// as a defect then, and the message, in which the caller repeats the text, says what it was.
pub fn documented(text: &str) -> &'static str {
    engine::ALL.iter().chain(own::ALL).find(|known| **known == text).copied().unwrap_or(engine::INTERNAL_ERROR)
}
