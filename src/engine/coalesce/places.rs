//! What a run of changes knows of each key, found by the key's bytes.

use super::images::Images;
use crate::engine::batch::{Cell, Image};
use crate::engine::hash::{AlreadyHashed, hash, seed};
use std::collections::HashMap;

/// What is at a key.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// An image with this key.
    pub key: Image,
    /// Number of the row that is there now; `None`: there is none, that much is known.
    pub row: Option<u32>,
}

/// Keys that were seen. They are kept as images only, by a hash of their bytes.
pub(super) struct Places {
    by_hash: HashMap<u64, Place, AlreadyHashed>,
    seed: u64,
}

/// What was found of a key.
pub(super) enum Found {
    /// It was not seen yet.
    Nothing,
    /// It was.
    Place(Place),
    /// Another key has the same hash: the two can't be told apart here.
    Another,
}

impl Places {
    pub fn new() -> Self {
        Self { by_hash: HashMap::default(), seed: seed() }
    }

    pub fn clear(&mut self) {
        self.by_hash.clear();
    }

    /// The hash of an image's key.
    pub fn hash(&self, images: &Images<'_>, image: Image, key: &[usize]) -> u64 {
        let cells = images.cells(image);
        key.iter().fold(self.seed, |state, &column| hash(state, images.bytes(cells[column])))
    }

    /// Looks for an image's key.
    pub fn find(&self, images: &Images<'_>, hash: u64, image: Image, key: &[usize]) -> Found {
        match self.by_hash.get(&hash) {
            None => Found::Nothing,
            Some(place) if same_key(images, place.key, image, key) => Found::Place(*place),
            Some(_) => Found::Another,
        }
    }

    /// Notes what is at a key.
    pub fn set(&mut self, hash: u64, key: Image, row: Option<u32>) {
        self.by_hash.insert(hash, Place { key, row });
    }
}

/// Whether two images have the same key, byte for byte.
pub(super) fn same_key(images: &Images<'_>, one: Image, other: Image, key: &[usize]) -> bool {
    let (one, other) = (images.cells(one), images.cells(other));
    key.iter().all(|&column| same(images, one[column], other[column]))
}

fn same(images: &Images<'_>, one: Cell, other: Cell) -> bool {
    one.kind == other.kind && images.bytes(one) == images.bytes(other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::batch::{Batch, CellKind};

    #[test]
    fn keys_with_one_hash_are_told_apart() {
        let mut batch = Batch::default();
        let image = |batch: &mut Batch, kind, text: &str| {
            let image = batch.begin_image();
            batch.push_cell(kind, text.as_bytes());
            batch.end_image(image)
        };
        let [a, same, other] = ["a", "a", "b"].map(|text| image(&mut batch, CellKind::Text, text));
        let binary = image(&mut batch, CellKind::Binary, "a");
        let images = Images::new(&batch);
        let mut places = Places::new();
        places.set(7, a, Some(1));
        assert!(matches!(places.find(&images, 7, same, &[0]), Found::Place(Place { row: Some(1), .. })));
        assert!(matches!(places.find(&images, 7, other, &[0]), Found::Another));
        assert!(matches!(places.find(&images, 7, binary, &[0]), Found::Another));
        assert!(matches!(places.find(&images, 8, a, &[0]), Found::Nothing));
        assert_eq!(places.hash(&images, a, &[0]), places.hash(&images, same, &[0]));
    }
}
