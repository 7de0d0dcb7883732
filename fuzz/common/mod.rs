//! What the runs under cargo-fuzz and under stable Rust share: the targets, and the messages that they start from.

pub mod messages;
pub mod targets;
