//! What the stream knows of the transaction that is applied before it has ended on the source. Pure.
//!
//! One at a time. Its pieces are numbered by attempts: what belongs to another attempt than the present one is of no use, since it was
//! rolled back or will be.

use super::batch::{Batch, Early as Mark, Part};
use super::roles::Applied;
use std::collections::HashSet;

/// The transaction of which pieces are written.
#[derive(Debug, Default)]
pub(super) struct Early {
    /// Tables of which pieces are taken.
    tables: HashSet<u32>,
    attempt: Option<Attempt>,
}

#[derive(Clone, Copy, Debug)]
struct Attempt {
    number: u64,
    written: Written,
}

/// What was written of a transaction before it had ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Written {
    pub applied: Applied,
    pub bytes: usize,
}

/// What is to be done with a part about a transaction that has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Write it.
    Write(u64),
    /// Say no to it.
    Refuse(u64),
    /// Roll back.
    RollBack,
}

impl Early {
    /// Takes pieces of these tables only; says whether they are others than before.
    pub fn set_tables(&mut self, tables: HashSet<u32>) -> bool {
        let changed = self.tables != tables;
        self.tables = tables;
        changed
    }

    pub fn tables(&self) -> &HashSet<u32> {
        &self.tables
    }

    /// Whether something is, or is being, written.
    pub fn is_open(&self) -> bool {
        self.attempt.is_some()
    }

    /// Bytes of changes that are written.
    pub fn bytes(&self) -> usize {
        self.attempt.map_or(0, |attempt| attempt.written.bytes)
    }

    /// Decides about a part.
    pub fn step<P>(&mut self, part: &Part<P>, mark: Mark) -> Step {
        let Mark::Piece { attempt } = mark else {
            self.attempt = None;
            return Step::RollBack;
        };
        if !part.continues {
            self.attempt = Some(Attempt { number: attempt, written: Written::default() });
        }
        let is_present = self.attempt.is_some_and(|present| present.number == attempt);
        if is_present && self.takes(&part.batch) { Step::Write(attempt) } else { Step::Refuse(attempt) }
    }

    fn takes(&self, batch: &Batch) -> bool {
        batch.tables().iter().all(|version| self.tables.contains(&version.id))
    }

    /// A piece is written. Returns the attempt.
    pub fn written(&mut self, applied: Applied, bytes: usize) -> Option<u64> {
        let attempt = self.attempt.as_mut()?;
        let sum = &mut attempt.written;
        sum.applied.inserts += applied.inserts;
        sum.applied.updates += applied.updates;
        sum.applied.deletes += applied.deletes;
        sum.bytes += bytes;
        Some(attempt.number)
    }

    /// Nothing is written any more, or it counts as part of a transaction that has ended. Returns the attempt and what was written.
    pub fn end(&mut self) -> Option<(u64, Written)> {
        self.attempt.take().map(|attempt| (attempt.number, attempt.written))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::table::{Identity, QualifiedName, TableVersion};
    use std::sync::Arc;

    fn piece(attempt: u64, continues: bool, table: u32) -> Part<u64> {
        let mut part = Part { continues, open: true, early: Some(Mark::Piece { attempt }), ..Part::idle(0) };
        let name = QualifiedName::new("public", "t");
        part.batch.intern_table(&Arc::new(TableVersion { id: table, name, columns: Vec::new(), identity: Identity::Key, differs: None }));
        part
    }

    fn step(early: &mut Early, part: &Part<u64>) -> Step {
        early.step(part, part.early.unwrap())
    }

    #[test]
    fn pieces_of_an_attempt_that_came_to_nothing_are_refused() {
        let mut early = Early::default();
        assert!(early.set_tables([7].into()) && !early.set_tables([7].into()));
        assert_eq!(step(&mut early, &piece(1, false, 7)), Step::Write(1));
        assert_eq!(step(&mut early, &piece(1, true, 7)), Step::Write(1));
        assert_eq!(early.end().map(|(attempt, _)| attempt), Some(1));
        assert_eq!(step(&mut early, &piece(1, true, 7)), Step::Refuse(1));
        assert!(!early.is_open());
        assert_eq!(step(&mut early, &piece(2, false, 7)), Step::Write(2));
        assert_eq!(step(&mut early, &Part::dropped(0)), Step::RollBack);
        assert!(!early.is_open());
        assert_eq!(step(&mut early, &piece(3, false, 8)), Step::Refuse(3), "a table that is not taken");
    }

    #[test]
    fn what_was_written_is_summed_up() {
        let mut early = Early::default();
        early.set_tables([7].into());
        assert_eq!(early.written(Applied::default(), 1), None);
        step(&mut early, &piece(1, false, 7));
        let applied = Applied { inserts: 3, ..Applied::default() };
        assert_eq!((early.written(applied, 10), early.written(applied, 5)), (Some(1), Some(1)));
        assert_eq!(early.bytes(), 15);
        let written = Written { applied: Applied { inserts: 6, ..Applied::default() }, bytes: 15 };
        assert_eq!(early.end(), Some((1, written)));
    }
}
