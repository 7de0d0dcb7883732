//! The hand-over of tables from copy to stream: which changes are due, and when a table joins. Pure.
//!
//! All positions are ends of commits. P is the stream's checkpoint. A table that is not ready has its own A, the position
//! up to which its copy is right; for a ready table A = P. **A change of table T in a transaction that ends at c is due if
//! and only if c > A(T).** Nothing else decides: not at the first copy, not for an added table, not after a crash.

use super::batch::Part;
use super::position::Position;
use super::register::Reached;
use super::table::{QualifiedName, TableState};
use std::collections::HashMap;

/// One table in the stream.
#[derive(Clone, Debug, PartialEq)]
struct Following<P> {
    name: QualifiedName,
    /// `Some` while it is catching up.
    own: Option<Own<P>>,
    /// Not followed: it has left the publication.
    error: bool,
}

/// The own position of a table that is catching up.
#[derive(Clone, Debug, PartialEq)]
struct Own<P> {
    /// A: up to where it is right.
    right_up_to: P,
    /// Where that was on the target's disk for sure: the log must not be thrown away behind it.
    hold: P,
}

/// Which tables follow the stream, and from where.
#[derive(Clone, Debug)]
pub struct Handover<P> {
    checkpoint: P,
    tables: HashMap<u32, Following<P>>,
    /// From where on tables that do not follow yet will need the log.
    hold: Option<P>,
}

/// The earlier one of two positions of one log.
pub(super) fn earlier<P: Position>(one: P, other: P) -> P {
    if other < one { other } else { one }
}

impl<P: Position> Handover<P> {
    /// A stream at its checkpoint, with no tables.
    pub fn new(checkpoint: P) -> Self {
        Self { checkpoint, tables: HashMap::new(), hold: None }
    }

    /// P: the position up to which everything due has been applied.
    pub fn checkpoint(&self) -> &P {
        &self.checkpoint
    }

    /// A table that equals the source at `right_up_to`, durably; `None`: at the checkpoint.
    pub fn follow(&mut self, id: u32, name: QualifiedName, right_up_to: Option<P>) {
        let own = right_up_to.map(|right_up_to| Own { hold: right_up_to.clone(), right_up_to });
        self.tables.insert(id, Following { name, own, error: false });
    }

    /// Tables that do not follow yet will need the log from here on.
    pub fn hold(&mut self, position: P) {
        self.hold = Some(position);
    }

    /// A table whose changes no longer come: none is applied any more. Says whether that is new.
    pub fn leave(&mut self, name: &QualifiedName) -> bool {
        let followed = self.tables.values_mut().find(|table| table.name == *name && !table.error);
        followed.map(|table| table.error = true).is_some()
    }

    /// State of each followed table.
    pub fn states(&self) -> impl Iterator<Item = (&QualifiedName, TableState)> {
        self.tables.values().map(|table| {
            let state = match (table.error, &table.own) {
                (true, _) => TableState::Error,
                (false, Some(_)) => TableState::CatchingUp,
                (false, None) => TableState::Ready,
            };
            (&table.name, state)
        })
    }

    /// Ids of the tables that follow the stream at its checkpoint.
    pub fn joined(&self) -> impl Iterator<Item = u32> {
        let joined = |table: &Following<P>| !table.error && table.own.is_none();
        self.tables.iter().filter(move |(_, table)| joined(table)).map(|(id, _)| *id)
    }

    fn catching_up(&self) -> impl Iterator<Item = (&QualifiedName, &Own<P>)> {
        self.tables.values().filter(|table| !table.error).filter_map(|table| table.own.as_ref().map(|own| (&table.name, own)))
    }

    /// How many tables wait to join.
    pub fn waiting(&self) -> usize {
        self.catching_up().count()
    }

    /// Tables for which the log is read again: right up to a place before the checkpoint.
    pub fn behind(&self) -> impl Iterator<Item = &QualifiedName> {
        self.catching_up().filter(|(_, own)| own.right_up_to < self.checkpoint).map(|(name, _)| name)
    }

    /// From where the log must be read.
    pub fn start(&self) -> P {
        self.catching_up().fold(self.checkpoint.clone(), |start, (_, own)| earlier(start, own.right_up_to.clone()))
    }

    /// What may be confirmed when the checkpoint `durable` is on disk: nothing that a table still needs.
    pub fn confirmable(&self, durable: P) -> P {
        self.catching_up().map(|(_, own)| &own.hold).chain(&self.hold).cloned().fold(durable, earlier)
    }

    /// Whether the change at `index` of a part is due.
    ///
    /// The end of a transaction that is still open is not known, only the start b of its commit record. Records do not
    /// overlap and A is the end of one, so A never lies inside the commit record: b ≥ A says the same as c > A.
    pub fn is_due(&self, part: &Part<P>, table: u32, index: usize) -> bool {
        let Some(table) = self.tables.get(&table).filter(|table| !table.error) else {
            return false;
        };
        let right_up_to = table.own.as_ref().map_or(&self.checkpoint, |own| &own.right_up_to);
        let ended_by = part.boundaries.partition_point(|boundary| boundary.changes <= index);
        match (part.boundaries.get(ended_by), &part.open_from) {
            (Some(boundary), _) => boundary.end > *right_up_to,
            (None, Some(commit_start)) => commit_start >= right_up_to,
            (None, None) => false,
        }
    }

    /// Whether any change of a part is due.
    pub fn has_due(&self, part: &Part<P>) -> bool {
        let batch = &part.batch;
        batch.changes().iter().enumerate().any(|(index, change)| self.is_due(part, batch.table(change).id, index))
    }

    /// What becomes of tables that are catching up when everything up to `position` is applied. They join only when that is not
    /// before the checkpoint: then everything up to it has been received and routed, so replacing A by P changes no decision. Before
    /// it, the log is being read again: their own positions move, and the checkpoint stays.
    pub fn reached(&self, position: &P) -> Reached {
        let passes = *position >= self.checkpoint;
        let mut reached = Reached::default();
        for (name, own) in self.catching_up() {
            if passes && own.right_up_to <= *position {
                reached.joined.push(name.clone());
            } else if own.right_up_to < *position {
                reached.own.push(name.clone());
            }
        }
        reached
    }

    /// Tables that are right up to the checkpoint itself: they are ready.
    pub fn take_level(&mut self) -> Vec<QualifiedName> {
        let checkpoint = &self.checkpoint;
        let taken = |table: &mut Following<P>| table.own.take_if(|own| own.right_up_to == *checkpoint).map(|_| table.name.clone());
        self.tables.values_mut().filter(|table| !table.error).filter_map(taken).collect()
    }

    /// Everything up to `position` is applied, and what [`Self::reached`] says of tables has been committed with it.
    pub fn moved(&mut self, position: P) {
        let passes = position >= self.checkpoint;
        for table in self.tables.values_mut() {
            if passes {
                table.own.take_if(|own| own.right_up_to <= position);
            } else if let Some(own) = table.own.as_mut().filter(|own| own.right_up_to < position) {
                own.right_up_to = position.clone();
            }
        }
        if passes {
            self.checkpoint = position;
        }
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
        assert_eq!(handover.reached(&Pos(19)), Reached::default());
        handover.moved(Pos(19));
        assert_eq!(handover.waiting(), 1);
        assert_eq!(handover.reached(&Pos(20)).joined, [name("t")]);
        handover.moved(Pos(20));
        assert_eq!(handover.waiting(), 0);
        assert_eq!(handover.states().collect::<Vec<_>>(), [(&name("t"), TableState::Ready)]);
    }

    #[test]
    fn a_table_that_left_gets_no_more_changes_and_does_not_join() {
        let mut handover = Handover::new(Pos(10));
        handover.follow(1, name("t"), Some(Pos(20)));
        assert!(handover.leave(&name("t")));
        assert!(!handover.leave(&name("t")));
        assert!(!handover.is_due(&part(&[30], None), 1, 0));
        assert_eq!(handover.reached(&Pos(40)), Reached::default());
        assert_eq!(handover.waiting(), 0);
        assert_eq!(handover.confirmable(Pos(40)), Pos(40), "its changes are gone");
    }

    #[test]
    fn a_table_behind_the_checkpoint_catches_up_by_itself() {
        let mut handover = Handover::new(Pos(30));
        handover.follow(1, name("ready"), None);
        handover.follow(2, name("behind"), Some(Pos(10)));
        assert_eq!((handover.start(), handover.confirmable(Pos(30))), (Pos(10), Pos(10)));
        // A part over the checkpoint is right for both.
        let over = part(&[10, 20, 30, 40], None);
        let due = |handover: &Handover<Pos>, table| (0..4).map(|index| handover.is_due(&over, table, index)).collect::<Vec<_>>();
        assert_eq!(due(&handover, 1), [false, false, false, true]);
        assert_eq!(due(&handover, 2), [false, true, true, true]);
        // Its own position moves, the checkpoint does not, and what was on disk at the start is held.
        assert_eq!(handover.reached(&Pos(20)), Reached { joined: Vec::new(), own: vec![name("behind")] });
        handover.moved(Pos(20));
        assert_eq!((handover.checkpoint(), handover.start(), handover.confirmable(Pos(30))), (&Pos(30), Pos(20), Pos(10)));
        assert_eq!(handover.behind().collect::<Vec<_>>(), [&name("behind")]);
        assert_eq!(due(&handover, 2), [false, false, true, true]);
        // The checkpoint itself is far enough, since everything up to it was received.
        assert_eq!(handover.reached(&Pos(30)), Reached { joined: vec![name("behind")], own: Vec::new() });
        handover.moved(Pos(30));
        assert_eq!((handover.waiting(), handover.confirmable(Pos(30))), (0, Pos(30)));
    }

    #[test]
    fn nothing_is_confirmed_that_a_table_needs_which_is_copied() {
        let mut handover = Handover::new(Pos(10));
        handover.follow(1, name("ready"), None);
        handover.hold(Pos(10));
        handover.moved(Pos(50));
        assert_eq!((handover.confirmable(Pos(50)), handover.confirmable(Pos(5))), (Pos(10), Pos(5)));
    }
}
