//! Mirrors on a real API server: from specs to children, from workers to status, and all the ways out. Databases and workers are what a
//! test says.

#[path = "../support/mod.rs"]
mod support;

mod chart;
mod deletion;
mod edits;
mod protection;
mod references;
mod requests;
mod rights;
mod safety;
mod stage;
mod workers;
