//! Places in a source's log.

use std::fmt::{Debug, Display};
use std::str::FromStr;

/// A place in a source's log: an LSN, a GTID set, a binlog file with its offset.
///
/// The engine only compares two (before, equal, after, or neither) and writes them as text into the checkpoint, from where
/// they are read back. A position that names a transaction is the *end* of its commit, never its start.
pub trait Position: Clone + Debug + Display + FromStr + PartialEq + PartialOrd + Send + Sync + 'static {
    /// Bytes of log between an earlier position and this one, where the source's log is counted in bytes.
    fn bytes_since(&self, earlier: &Self) -> Option<u64>;
}
