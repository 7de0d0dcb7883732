//! What a target is told about tables: their states, their copies, and how far each of them is.

use super::error::Result;
use super::position::Position;
use super::table::{MappedTable, QualifiedName, TableState};
use std::future::Future;

/// Writes what becomes of tables and their copies.
pub trait Register: Send {
    /// Positions of the source.
    type Position: Position;

    /// Begins a copy in one transaction: makes the target table when it is missing, deals with rows that are there
    /// (`truncate`, else an error when there are any), raises the generation, state `Copying`. Returns the generation.
    ///
    /// `beside`: tables of the same copy that have not begun. Those that can only be emptied together with this one are, and
    /// begin in the same transaction; they begin again in a call of their own.
    fn begin_copy(&mut self, table: &MappedTable, beside: &[&MappedTable], truncate: bool) -> impl Future<Output = Result<i64>> + Send;

    /// Writes a table's state, with the position up to which it is right where it is copied or catching up.
    fn set_state(
        &mut self,
        table: &MappedTable,
        state: TableState,
        position: Option<&Self::Position>,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Ranges done in a generation.
    fn done_ranges(&mut self, table: &MappedTable, generation: i64) -> impl Future<Output = Result<Vec<i32>>> + Send;
}

/// What a commit of the stream makes of tables that are not at its checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// The checkpoint has come to them: they are ready. A commit that says so is on disk when it is answered, since the source may
    /// throw away then what they needed.
    pub joined: Vec<QualifiedName>,
    /// They lie behind the checkpoint, and the log is read again for them: they are right up to the part's end now. The checkpoint
    /// stays.
    pub own: Vec<QualifiedName>,
}

impl Reached {
    /// Nothing is written of any table.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.joined.is_empty() && self.own.is_empty()
    }
}
