//! Tables that are altered while they are followed.
//!
//! The log describes a table before its first row and again after anything about it may have changed. Each description is a version of
//! its own; before the first due row under it is applied the source is asked what has become of the table, and the target is altered
//! in the transaction that carries the row. So the target goes through the versions of the log, one after the other, and holds at any
//! moment the one that its checkpoint names.

use super::batch::Part;
use super::error::Result;
use super::roles::{Apply, Checkpoint};
use super::table::{Column, MappedTable, TableState, TableVersion};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// Which versions have been looked at.
#[derive(Debug, Default)]
pub(super) struct Versions {
    seen: HashMap<u32, Arc<TableVersion>>,
    /// Tables that must be looked at again before anything else of them is applied.
    in_doubt: HashSet<u32>,
    /// Versions of a transaction that has not ended on the source, of which rows are written.
    early: Vec<Arc<TableVersion>>,
}

impl Versions {
    /// Versions of due changes in a part that must be looked at.
    pub fn unseen<P>(&self, part: &Part<P>, due: impl Fn(u32, usize) -> bool) -> Vec<Arc<TableVersion>> {
        let batch = &part.batch;
        let is_due = |version: &Arc<TableVersion>| {
            let mut changes = batch.changes().iter().enumerate();
            changes.any(|(index, change)| Arc::ptr_eq(batch.table(change), version) && due(version.id, index))
        };
        batch.tables().iter().filter(|version| self.is_unseen(version) && is_due(version)).cloned().collect()
    }

    fn is_unseen(&self, version: &Arc<TableVersion>) -> bool {
        self.in_doubt.contains(&version.id) || self.seen.get(&version.id).is_none_or(|seen| !Arc::ptr_eq(seen, version))
    }

    /// The table is as it is known under this version. `in_doubt`: for now.
    pub fn looked(&mut self, version: Arc<TableVersion>, in_doubt: bool) {
        if in_doubt {
            self.in_doubt.insert(version.id);
        } else {
            self.in_doubt.remove(&version.id);
        }
        self.seen.insert(version.id, version);
    }

    /// Whether a table is to be looked at again.
    pub fn is_in_doubt(&self, table: u32) -> bool {
        self.in_doubt.contains(&table)
    }

    /// Rows of a transaction that has not ended are written.
    pub fn add_early<P>(&mut self, piece: &Part<P>) {
        for version in piece.batch.tables() {
            if !self.early.iter().any(|known| Arc::ptr_eq(known, version)) {
                self.early.push(Arc::clone(version));
            }
        }
    }

    /// Nothing of it is written any more, or it has ended: its versions that must be looked at.
    pub fn end_early(&mut self) -> Vec<Arc<TableVersion>> {
        let early = std::mem::take(&mut self.early);
        early.into_iter().filter(|version| self.is_unseen(version)).collect()
    }
}

/// Finds out which versions the target holds: the tables as they are there. What was altered since is met in the log. A table whose
/// target is gone is copied as it is now; so is one that was altered while it was copied.
pub(super) async fn as_held<A: Apply>(
    applier: &mut A,
    tables: &[MappedTable],
    checkpoint: Option<&Checkpoint<A::Position>>,
) -> Result<Vec<MappedTable>> {
    let mut held = Vec::with_capacity(tables.len());
    for table in tables {
        let known = checkpoint.and_then(|checkpoint| checkpoint.tables.get(table.source()));
        let known = known.filter(|known| known.target == table.target && !table.is_recorded_as(&known.columns));
        held.push(match known.and_then(|known| Some((known, table.recorded(&known.columns)?))) {
            Some((known, recorded)) if known.follows() && applier.has_target(&recorded).await? => recorded,
            Some((known, _)) if known.state != TableState::Error && !known.follows() => {
                applier.discard(table).await?;
                table.clone()
            }
            _ => table.clone(),
        });
    }
    Ok(held)
}

/// As a table is to be published. A list of columns gains none by itself: what rows that were there hold in it would never come.
pub(super) fn as_published((table, held): (&MappedTable, &MappedTable)) -> MappedTable {
    let mut table = table.clone();
    if held.lineage.behind && !table.excluded.is_empty() {
        let is_held = |column: &Column| held.version.columns.iter().any(|known| known.number == column.number);
        Arc::make_mut(&mut table.version).columns.retain(is_held);
    }
    table
}
