//! A position for tests of the pure parts.

use super::position::Position;
use std::fmt;
use std::str::FromStr;

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
