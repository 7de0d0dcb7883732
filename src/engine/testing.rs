//! A position and a table for tests of the pure parts.

use super::position::Position;
use super::table::{Lineage, MappedTable, TableVersion};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// A counted position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pos(pub u64);

impl fmt::Display for Pos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Pos {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

impl Position for Pos {
    fn bytes_since(&self, earlier: &Self) -> Option<u64> {
        Some(self.0.saturating_sub(earlier.0))
    }
}

/// A table of this version that goes to one of its name and has nothing else to it.
pub fn table(version: TableVersion) -> MappedTable {
    MappedTable {
        target: version.name.clone(),
        version: Arc::new(version),
        generated: Vec::new(),
        excluded: Vec::new(),
        accept_narrower_types: false,
        primary_key: Vec::new(),
        primary_key_name: None,
        estimated_rows: 0,
        blocks: 0,
        structure: Arc::default(),
        lineage: Lineage::default(),
    }
}
