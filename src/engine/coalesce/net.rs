//! The net effect of a run of changes of one table, per row.

use super::images::Images;
use super::places::{Found, Places, same_key};
use super::{Action, Order, Row, TableRule, is_unchanged};
use crate::engine::batch::{CellKind, Change, Image, Op};

/// Bytes of the images in one run: a [`Action::Rewrite`] is one statement, whatever it holds.
const RUN_BYTES: usize = 24 << 20;

/// What became of one row.
#[derive(Clone, Copy)]
struct NetRow {
    /// An image with the key under which the row was there before the run; absent for a new one.
    old: Image,
    /// Its values; absent when it is gone. Cells that are still left out are as they were before the run.
    new: Image,
    /// Its key was another one at some time.
    moved: bool,
}

/// How a change is written, seen from a run.
#[derive(Default)]
pub(super) struct Facts {
    /// Its own images encode a column in two ways: it can be in a run of its own only.
    pub mixed: bool,
    /// It encodes a column in another way than the run.
    differs: bool,
    /// It has a value in a column whose encoding the run does not know yet.
    tells_encoding: bool,
    leaves_out: bool,
    bytes: usize,
}

/// A run. It may end anywhere: what it leaves behind is what the table holds after its last change.
pub(super) struct Net {
    places: Places,
    rows: Vec<NetRow>,
    /// How each column is encoded; `Null` while no value has come. Equal keys have equal bytes within one encoding only, and
    /// a statement takes one.
    encodings: Vec<CellKind>,
    leaves_out: bool,
    bytes: usize,
}

/// The statements of a run, to be done in this order.
pub(super) struct Phases {
    pub writes: [(Action, Vec<Row>); 4],
    /// Some images leave columns out.
    pub leaves_out: bool,
}

impl Net {
    pub fn new() -> Self {
        Self { places: Places::new(), rows: Vec::new(), encodings: Vec::new(), leaves_out: false, bytes: 0 }
    }

    /// Looks at all cells of a change.
    fn facts(&self, images: &Images<'_>, change: &Change) -> Facts {
        let mut facts = Facts::default();
        let (old, new) = (images.cells(change.old), images.cells(change.new));
        for (column, cell) in old.iter().enumerate().chain(new.iter().enumerate()) {
            facts.bytes += size_of_val(cell) + cell.length as usize;
            match (cell.kind, self.encodings.get(column)) {
                (CellKind::Unchanged, _) => facts.leaves_out = true,
                (CellKind::Null, _) => {}
                (_, None | Some(CellKind::Null)) => facts.tells_encoding = true,
                (kind, Some(known)) => facts.differs |= kind != *known,
            }
        }
        let values = |kind| matches!(kind, CellKind::Text | CellKind::Binary);
        facts.mixed = old.iter().zip(new).any(|(old, new)| values(old.kind) && values(new.kind) && old.kind != new.kind);
        facts
    }

    /// Whether the run must end before such a change.
    fn must_end_before(&self, facts: &Facts) -> bool {
        !self.rows.is_empty() && (facts.mixed || facts.differs || self.bytes + facts.bytes > RUN_BYTES)
    }

    /// Takes a change. `None`, with nothing done, when the run must end before it: it is encoded in another way, or it does
    /// not go with what is known of its keys (then the target says what is wrong, if anything is). An empty run takes any.
    pub fn add(&mut self, images: &mut Images<'_>, change: &Change, key: &[usize], moves: bool) -> Option<Facts> {
        let facts = self.facts(images, change);
        if self.must_end_before(&facts) {
            return None;
        }
        let taken = match change.op {
            Op::Insert => self.insert(images, change.new, key),
            Op::Update if moves => self.move_row(images, change, key),
            Op::Update => self.update(images, change, key),
            Op::Delete => self.delete(images, change.old, key),
            Op::Truncate => false,
        };
        if !taken {
            return None;
        }
        self.leaves_out |= facts.leaves_out;
        self.bytes += facts.bytes;
        if facts.tells_encoding {
            self.note_encodings(images, change);
        }
        Some(facts)
    }

    fn note_encodings(&mut self, images: &Images<'_>, change: &Change) {
        for image in [change.old, change.new] {
            let cells = images.cells(image);
            if self.encodings.len() < cells.len() {
                self.encodings.resize(cells.len(), CellKind::Null);
            }
            for (known, cell) in self.encodings.iter_mut().zip(cells) {
                if *known == CellKind::Null && !is_unchanged(*cell) {
                    *known = cell.kind;
                }
            }
        }
    }

    fn insert(&mut self, images: &Images<'_>, new: Image, key: &[usize]) -> bool {
        let hash = self.places.hash(images, new, key);
        match self.places.find(images, hash, new, key) {
            Found::Place(place) if place.row.is_some() => return false,
            Found::Another => return false,
            Found::Place(_) | Found::Nothing => {}
        }
        let row = self.push(NetRow { old: Image::ABSENT, new, moved: false });
        self.places.set(hash, new, Some(row));
        true
    }

    fn update(&mut self, images: &mut Images<'_>, change: &Change, key: &[usize]) -> bool {
        let new = with_key(images, change, key);
        let hash = self.places.hash(images, new, key);
        match self.places.find(images, hash, new, key) {
            Found::Nothing => {
                let row = self.push(NetRow { old: new, new, moved: false });
                self.places.set(hash, new, Some(row));
                true
            }
            Found::Place(place) => match place.row {
                Some(row) => {
                    let row = &mut self.rows[row as usize];
                    row.new = merged(images, row.new, change.new, false);
                    true
                }
                None => false,
            },
            Found::Another => false,
        }
    }

    fn move_row(&mut self, images: &mut Images<'_>, change: &Change, key: &[usize]) -> bool {
        let new = with_key(images, change, key);
        let (from, to) = (self.places.hash(images, change.old, key), self.places.hash(images, new, key));
        let row = match self.places.find(images, from, change.old, key) {
            Found::Nothing => None,
            Found::Place(place) if place.row.is_some() => place.row,
            Found::Place(_) | Found::Another => return false,
        };
        match self.places.find(images, to, new, key) {
            Found::Place(place) if place.row.is_some() => return false,
            Found::Another => return false,
            Found::Place(_) | Found::Nothing => {}
        }
        let row = match row {
            Some(number) => {
                let row = &mut self.rows[number as usize];
                row.new = merged(images, row.new, change.new, true);
                row.moved = true;
                number
            }
            None => self.push(NetRow { old: change.old, new, moved: true }),
        };
        self.places.set(from, change.old, None);
        self.places.set(to, new, Some(row));
        true
    }

    fn delete(&mut self, images: &Images<'_>, old: Image, key: &[usize]) -> bool {
        let hash = self.places.hash(images, old, key);
        match self.places.find(images, hash, old, key) {
            Found::Nothing => {
                self.push(NetRow { old, new: Image::ABSENT, moved: false });
            }
            Found::Place(place) => match place.row {
                Some(row) => self.rows[row as usize].new = Image::ABSENT,
                None => return false,
            },
            Found::Another => return false,
        }
        self.places.set(hash, old, None);
        true
    }

    fn push(&mut self, row: NetRow) -> u32 {
        self.rows.push(row);
        (self.rows.len() - 1) as u32
    }

    /// Ends the run. Deletes come first, so that whatever they free can be taken; rows that come do so last, when all that
    /// had to go is gone. Updates in between touch nothing that two rows could both want.
    pub fn end(&mut self, images: &Images<'_>, rule: &TableRule<'_>) -> Phases {
        let [mut deletes, mut rewrites, mut updates, mut inserts] = [const { Vec::new() }; 4];
        for net in self.rows.drain(..) {
            let row = Row { old: net.old, new: net.new };
            match (net.old.is_present(), net.new.is_present()) {
                (false, false) => {}
                (false, true) => inserts.push(row),
                (true, false) => deletes.push(row),
                (true, true) if net.moved && !same_key(images, net.old, net.new, rule.key) => rewrites.push(row),
                (true, true) => {
                    let writes = if rule.order == Order::Guarded { &mut rewrites } else { &mut updates };
                    writes.push(Row { old: Image::ABSENT, ..row });
                }
            }
        }
        self.places.clear();
        self.encodings.clear();
        self.bytes = 0;
        let writes = [(Action::Delete, deletes), (Action::Rewrite, rewrites), (Action::Update, updates), (Action::Insert, inserts)];
        Phases { writes, leaves_out: std::mem::take(&mut self.leaves_out) }
    }
}

/// The new image of an update, with its whole key: a key column that it leaves out is the old one's.
fn with_key(images: &mut Images<'_>, change: &Change, key: &[usize]) -> Image {
    let cells = images.cells(change.new);
    if key.iter().any(|&column| is_unchanged(cells[column])) {
        return images.merge(change.old, change.new, key.iter().copied());
    }
    change.new
}

/// A row's image after one more update. A key that moves may be named by the merged image, which then stays as it is.
fn merged(images: &mut Images<'_>, before: Image, new: Image, moves: bool) -> Image {
    let columns = images.cells(new).len();
    if !moves && images.overwrite(before, new) {
        before
    } else if !images.cells(new).iter().copied().any(is_unchanged) {
        new
    } else {
        images.merge(before, new, 0..columns)
    }
}
