//! The hand-over of tables from copy to stream: which changes are due, and when a table joins. Pure.
//!
//! All positions are ends of commits. P is the stream's checkpoint. A table that is not ready has its own A, the position
//! up to which its copy is right; for a ready table A = P. **A change of table T in a transaction that ends at c is due if
//! and only if c > A(T).** Nothing else decides: not at the first copy, not for an added table, not after a crash.

use super::batch::Part;
use super::position::Position;
use super::table::{QualifiedName, TableState};
use std::collections::HashMap;

/// One table in the stream.
#[derive(Clone, Debug, PartialEq)]
struct Following<P> {
    name: QualifiedName,
    /// `Some` while it is catching up.
    right_up_to: Option<P>,
    /// Not followed: it has left the publication.
    error: bool,
}

/// Which tables follow the stream, and from where.
#[derive(Clone, Debug)]
pub struct Handover<P> {
    checkpoint: P,
    tables: HashMap<u32, Following<P>>,
}

impl<P: Position> Handover<P> {
    /// A stream at its checkpoint, with no tables.
    pub fn new(checkpoint: P) -> Self {
        Self { checkpoint, tables: HashMap::new() }
    }

    /// P: the position up to which everything due has been applied.
    pub fn checkpoint(&self) -> &P {
        &self.checkpoint
    }

    /// A table that equals the source at `right_up_to`; `None`: at the checkpoint.
    pub fn follow(&mut self, id: u32, name: QualifiedName, right_up_to: Option<P>) {
        self.tables.insert(id, Following { name, right_up_to, error: false });
    }

    /// A table whose changes no longer come: none is applied any more. Says whether that is new.
    pub fn leave(&mut self, name: &QualifiedName) -> bool {
        let followed = self.tables.values_mut().find(|table| table.name == *name && !table.error);
        followed.map(|table| table.error = true).is_some()
    }

    /// State of each followed table.
    pub fn states(&self) -> impl Iterator<Item = (&QualifiedName, TableState)> {
        self.tables.values().map(|table| {
            let state = match (table.error, &table.right_up_to) {
                (true, _) => TableState::Error,
                (false, Some(_)) => TableState::CatchingUp,
                (false, None) => TableState::Ready,
            };
            (&table.name, state)
        })
    }

    /// Ids of the tables that follow the stream: what is not applied yet is due.
    pub fn joined(&self) -> impl Iterator<Item = u32> {
        let joined = |table: &Following<P>| !table.error && table.right_up_to.is_none();
        self.tables.iter().filter(move |(_, table)| joined(table)).map(|(id, _)| *id)
    }

    /// Whether any table waits to join.
    pub fn is_catching_up(&self) -> bool {
        self.tables.values().any(|table| !table.error && table.right_up_to.is_some())
    }

    /// Whether the change at `index` of a part is due.
    ///
    /// The end of a transaction that is still open is not known, only the start b of its commit record. Records do not
    /// overlap and A is the end of one, so A never lies inside the commit record: b ≥ A says the same as c > A.
    pub fn is_due(&self, part: &Part<P>, table: u32, index: usize) -> bool {
        let Some(table) = self.tables.get(&table).filter(|table| !table.error) else {
            return false;
        };
        let right_up_to = match &table.right_up_to {
            Some(own) if *own > self.checkpoint => own,
            _ => &self.checkpoint,
        };
        let ended_by = part.boundaries.partition_point(|boundary| boundary.changes <= index);
        match (part.boundaries.get(ended_by), &part.open_from) {
            (Some(boundary), _) => boundary.end > *right_up_to,
            (None, Some(commit_start)) => commit_start >= right_up_to,
            (None, None) => false,
        }
    }

    /// Tables that join when the checkpoint moves to `position`: everything up to it has been received and routed, so
    /// replacing A by P changes no decision.
    pub fn joining(&self, position: &P) -> Vec<QualifiedName> {
        let level = |table: &&Following<P>| !table.error && table.right_up_to.as_ref().is_some_and(|own| own <= position);
        self.tables.values().filter(level).map(|table| table.name.clone()).collect()
    }

    /// The checkpoint has moved on the target, and the tables of [`Self::joining`] have joined in the same transaction.
    pub fn moved(&mut self, position: P) {
        for table in self.tables.values_mut() {
            table.right_up_to.take_if(|own| *own <= position);
        }
        self.checkpoint = position;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::batch::Boundary;
    use crate::engine::testing::Pos;
    use std::time::SystemTime;

    fn name(table: &str) -> QualifiedName {
        QualifiedName::new("public", table)
    }

    /// A part whose transactions hold one change each and end at `ends`; then one change of a transaction whose commit
    /// record starts at `open_from`.
    fn part(ends: &[u64], open_from: Option<u64>) -> Part<Pos> {
        let boundaries =
            ends.iter().enumerate().map(|(i, end)| Boundary { changes: i + 1, end: Pos(*end), committed_at: SystemTime::UNIX_EPOCH });
        Part {
            boundaries: boundaries.collect(),
            open: open_from.is_some(),
            open_from: open_from.map(Pos),
            ..Part::idle(Pos(ends.last().copied().unwrap_or(0)))
        }
    }

    #[test]
    fn a_change_is_due_strictly_after_the_position_of_its_table() {
        let mut handover = Handover::new(Pos(10));
        handover.follow(1, name("ready"), None);
        handover.follow(2, name("copied"), Some(Pos(20)));
        let part = part(&[10, 11, 20, 21], None);
        let due = |table| (0..4).map(|index| handover.is_due(&part, table, index)).collect::<Vec<_>>();
        assert_eq!(due(1), [false, true, true, true]);
        assert_eq!(due(2), [false, false, false, true]);
        assert_eq!(due(3), [false; 4], "a table that is not mapped");
    }

    #[test]
    fn an_open_transaction_is_judged_by_the_start_of_its_commit_record() {
        let mut handover = Handover::new(Pos(0));
        handover.follow(1, name("t"), Some(Pos(100)));
        // The commit record begins exactly where the copy's position ends: it comes after it.
        assert!(handover.is_due(&part(&[], Some(100)), 1, 0));
        assert!(!handover.is_due(&part(&[], Some(99)), 1, 0));
        // With its end known, the same transaction gets the same answer.
        assert!(handover.is_due(&part(&[132], None), 1, 0));
        assert!(!handover.is_due(&part(&[100], None), 1, 0));
    }

    #[test]
    fn a_table_joins_when_the_checkpoint_reaches_its_position() {
        let mut handover = Handover::new(Pos(10));
        handover.follow(1, name("t"), Some(Pos(20)));
        assert!(handover.joining(&Pos(19)).is_empty());
        handover.moved(Pos(19));
        assert!(handover.is_catching_up());
        assert_eq!(handover.joining(&Pos(20)), [name("t")]);
        handover.moved(Pos(20));
        assert!(!handover.is_catching_up());
        assert_eq!(handover.states().collect::<Vec<_>>(), [(&name("t"), TableState::Ready)]);
    }

    #[test]
    fn a_table_that_left_gets_no_more_changes_and_does_not_join() {
        let mut handover = Handover::new(Pos(10));
        handover.follow(1, name("t"), Some(Pos(20)));
        assert!(handover.leave(&name("t")));
        assert!(!handover.leave(&name("t")));
        assert!(!handover.is_due(&part(&[30], None), 1, 0));
        assert!(handover.joining(&Pos(40)).is_empty());
        assert!(!handover.is_catching_up());
    }
}
