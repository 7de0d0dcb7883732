//! The worker as the operator sees it: real HTTP on loopback, real files, real signals; sessions are fakes, but in suspended.rs.

#[path = "../support/mod.rs"]
mod support;

mod calls;
mod documents;
mod pod;
mod program;
mod sessions;
mod suspended;
#[path = "../support/worker.rs"]
mod worker;
