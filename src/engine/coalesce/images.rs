//! Row images of a plan: those of the batch, and merged ones, whose cells point into the same arena.

use crate::engine::batch::{Batch, Cell, CellKind, Image};

/// The images that a plan's rows refer to. No value is ever copied.
#[derive(Debug)]
pub struct Images<'a> {
    batch: &'a Batch,
    /// Cells of merged images; they are numbered behind the batch's.
    merged: Vec<Cell>,
}

impl<'a> Images<'a> {
    pub(super) fn new(batch: &'a Batch) -> Self {
        Self { batch, merged: Vec::new() }
    }

    /// The batch below.
    #[must_use]
    pub fn batch(&self) -> &'a Batch {
        self.batch
    }

    /// The cells of an image, one per column.
    #[must_use]
    pub fn cells(&self, image: Image) -> &[Cell] {
        match self.merged_place(image) {
            Some(first) => &self.merged[first..first + image.count as usize],
            None => self.batch.cells(image),
        }
    }

    /// The bytes of a cell; empty for NULL and unchanged.
    #[must_use]
    pub fn bytes(&self, cell: Cell) -> &'a [u8] {
        self.batch.bytes(cell)
    }

    /// Cells of merged images.
    #[must_use]
    pub fn merged(&self) -> usize {
        self.merged.len()
    }

    /// Where a merged image begins; `None` for one of the batch.
    pub(super) fn merged_place(&self, image: Image) -> Option<usize> {
        (image.first as usize).checked_sub(self.batch.all_cells().len()).filter(|_| image.is_present())
    }

    /// The new image; what it leaves out in one of `columns` is taken from the one before.
    pub(super) fn merge(&mut self, before: Image, new: Image, columns: impl Iterator<Item = usize>) -> Image {
        let first = self.batch.all_cells().len() + self.merged.len();
        self.merged.extend_from_slice(self.batch.cells(new));
        let merged = Image { first: first as u32, count: new.count };
        for column in columns {
            if self.cells(merged)[column].kind == CellKind::Unchanged {
                let cell = self.cells(before)[column];
                self.merged[first - self.batch.all_cells().len() + column] = cell;
            }
        }
        merged
    }

    /// Writes what the new image holds over a merged one. False, with nothing done, for an image of the batch.
    pub(super) fn overwrite(&mut self, before: Image, new: Image) -> bool {
        let Some(first) = self.merged_place(before) else { return false };
        for (old, new) in self.merged[first..].iter_mut().zip(self.batch.cells(new)) {
            if new.kind != CellKind::Unchanged {
                *old = *new;
            }
        }
        true
    }
}
