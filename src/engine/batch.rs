//! The unit that moves: changes that point into one arena of bytes. No allocation per row or per cell.

use super::budget::Permit;
use super::table::TableVersion;
use std::sync::Arc;
use std::time::SystemTime;

/// What a change does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// A row comes: `new`.
    Insert,
    /// A row changes: `old` (the key when it changed, or the full row; else absent) and `new`.
    Update,
    /// A row goes: `old`.
    Delete,
    /// All rows of a table go. Tables truncated by one statement carry the same `group`.
    Truncate,
}

/// How the bytes of a cell are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CellKind {
    /// NULL.
    Null,
    /// The source did not send the value since it did not change (PostgreSQL: unchanged TOAST).
    Unchanged,
    /// The source's text format.
    Text,
    /// The source's binary format.
    Binary,
}

/// One value: its kind and where its bytes lie in the arena.
#[derive(Clone, Copy, Debug)]
pub struct Cell {
    /// How to read it.
    pub kind: CellKind,
    offset: u32,
    pub(super) length: u32,
}

/// A row image: a run of cells, one per column of the table version; absent when `count` is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Image {
    pub(super) first: u32,
    pub(super) count: u32,
}

impl Image {
    /// No image.
    pub const ABSENT: Self = Self { first: 0, count: 0 };

    /// Whether there is one.
    #[must_use]
    pub fn is_present(self) -> bool {
        self.count > 0
    }
}

/// One change of one row, or one truncate.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    /// What it does.
    pub op: Op,
    /// Index into [`Batch::tables`].
    pub table: u32,
    /// Key or full old row. Columns that are not part of a key image are [`CellKind::Null`].
    pub old: Image,
    /// `old` holds all columns and not only the key.
    pub old_is_full: bool,
    /// New row.
    pub new: Image,
    /// Truncates with the same number came from one statement.
    pub group: u32,
}

/// Changes in the order of the log, with their table versions and bytes.
#[derive(Debug, Default)]
pub struct Batch {
    arena: Vec<u8>,
    cells: Vec<Cell>,
    changes: Vec<Change>,
    tables: Vec<Arc<TableVersion>>,
}

impl Batch {
    /// The changes in order.
    #[must_use]
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }

    /// The table version that a change was written under.
    #[must_use]
    pub fn table(&self, change: &Change) -> &Arc<TableVersion> {
        &self.tables[change.table as usize]
    }

    /// All table versions used, by [`Change::table`].
    #[must_use]
    pub fn tables(&self) -> &[Arc<TableVersion>] {
        &self.tables
    }

    /// The cells of an image, one per column.
    #[must_use]
    pub fn cells(&self, image: Image) -> &[Cell] {
        &self.cells[image.first as usize..(image.first + image.count) as usize]
    }

    /// The bytes of a cell; empty for NULL and unchanged.
    #[must_use]
    pub fn bytes(&self, cell: Cell) -> &[u8] {
        &self.arena[cell.offset as usize..(cell.offset + cell.length) as usize]
    }

    /// Cells of all images.
    pub(super) fn all_cells(&self) -> &[Cell] {
        &self.cells
    }

    /// Memory that the batch takes, in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.arena.len() + self.cells.len() * size_of::<Cell>() + self.changes.len() * size_of::<Change>()
    }

    /// Bytes of values that still fit: offsets are 32 bits wide.
    #[must_use]
    pub fn room(&self) -> usize {
        u32::MAX as usize - self.arena.len()
    }

    /// Whether there is no change in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Number of a table version in this batch; added when it is new.
    pub fn intern_table(&mut self, version: &Arc<TableVersion>) -> u32 {
        // A batch sees few tables and runs of the same one: the last is looked at first.
        let found = self.tables.iter().rposition(|known| Arc::ptr_eq(known, version));
        let index = found.unwrap_or_else(|| {
            self.tables.push(Arc::clone(version));
            self.tables.len() - 1
        });
        u32::try_from(index).unwrap_or(u32::MAX)
    }

    /// Starts an image; cells follow by [`Self::push_cell`] and [`Self::end_image`] closes it.
    #[must_use]
    pub fn begin_image(&self) -> Image {
        Image { first: self.cells.len() as u32, count: 0 }
    }

    /// Adds one cell; `bytes` are copied into the arena, once.
    pub fn push_cell(&mut self, kind: CellKind, bytes: &[u8]) {
        let offset = self.arena.len() as u32;
        self.arena.extend_from_slice(bytes);
        self.cells.push(Cell { kind, offset, length: bytes.len() as u32 });
    }

    /// Ends an image.
    #[must_use]
    pub fn end_image(&self, image: Image) -> Image {
        Image { first: image.first, count: self.cells.len() as u32 - image.first }
    }

    /// Adds a change.
    pub fn push(&mut self, change: Change) {
        self.changes.push(change);
    }

    /// Drops all but the first changes: those of a transaction whose end will not come.
    pub fn truncate(&mut self, changes: usize) {
        self.changes.truncate(changes);
    }
}

/// The end of one source transaction inside a [`Part`].
#[derive(Clone, Debug)]
pub struct Boundary<P> {
    /// Number of changes of the batch that lie before it.
    pub changes: usize,
    /// End of the commit.
    pub end: P,
    /// When the source committed.
    pub committed_at: SystemTime,
}

/// A message that Sluice itself has written into the source's log, inside a transaction: it comes round with the changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heartbeat<P> {
    /// What was written.
    pub content: String,
    /// End of the transaction that it was written in.
    pub end: P,
}

/// What a part has to do with a transaction that has not ended on the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Early {
    /// All its changes belong to it, and nobody knows yet whether it will be committed. Its pieces follow one another, the first
    /// continues nothing; other parts lie between them.
    Piece {
        /// Numbers what is tried: one transaction at a time, and none twice on one connection.
        attempt: u64,
    },
    /// It comes to nothing, or whole when it has ended: what was written of it must be rolled back. Holds no changes.
    Dropped,
}

/// What a change log hands out: whole transactions, or a piece of one that is larger than a batch.
///
/// Changes after the last boundary belong to a transaction whose end follows in a later part. A part that continues such
/// a transaction and holds its end holds nothing behind that end, so that a target transaction can always be committed
/// at the end of a part that is not `open`.
///
/// A log may hand over pieces of one transaction before its end is known, when it was told that they are wanted
/// ([`super::roles::ChangeLog::want_early`]). A part that continues a transaction while none is open continues theirs: it has
/// ended, and the rest follows like that of any other.
#[derive(Debug)]
pub struct Part<P> {
    /// The changes.
    pub batch: Batch,
    /// Ends of transactions, in order.
    pub boundaries: Vec<Boundary<P>>,
    /// The first changes continue the transaction that the part before left open.
    pub continues: bool,
    /// The last changes belong to a transaction that has not ended.
    pub open: bool,
    /// For the transaction that is open: a position at or after which its end lies, and strictly after every earlier
    /// transaction's end (PostgreSQL: the start of its commit record, from Begin). `None` when not open.
    pub open_from: Option<P>,
    /// Everything up to here has been received, the part included; where the stream stands when nothing happens.
    pub received: P,
    /// The last message of our own among the transactions that end in the part.
    pub heartbeat: Option<Heartbeat<P>>,
    /// The part is about a transaction that has not ended on the source.
    pub early: Option<Early>,
    /// Counts its memory for as long as anybody holds it.
    pub permit: Permit,
}

impl<P> Part<P> {
    /// A part that only moves the position.
    pub fn idle(received: P) -> Self {
        Self {
            batch: Batch::default(),
            boundaries: Vec::new(),
            continues: false,
            open: false,
            open_from: None,
            received,
            heartbeat: None,
            early: None,
            permit: Permit::default(),
        }
    }

    /// A part that ends the pieces of a transaction that has not ended.
    pub fn dropped(received: P) -> Self {
        Self { early: Some(Early::Dropped), ..Self::idle(received) }
    }

    /// Where the checkpoint stands when the part is applied: the end of its last transaction, or what was received.
    pub fn end(&self) -> &P {
        self.boundaries.last().map_or(&self.received, |boundary| &boundary.end)
    }

    /// Nothing happened: only the position moved.
    pub fn is_idle(&self) -> bool {
        self.batch.is_empty() && self.boundaries.is_empty() && !self.open && self.early.is_none()
    }
}
