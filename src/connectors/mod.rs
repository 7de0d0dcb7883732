//! One folder per system, each offering the engine's roles that it can.

pub mod postgres;
