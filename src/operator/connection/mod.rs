//! Source and Target.
