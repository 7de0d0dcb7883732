//! What a run of changes knows of each key, found by the key's bytes.

use super::images::Images;
use crate::engine::batch::{Cell, Image};
use std::collections::HashMap;
use std::hash::{BuildHasher as _, BuildHasherDefault, Hasher, RandomState};

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
    by_hash: HashMap<u64, Place, BuildHasherDefault<AlreadyHashed>>,
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
        // Users choose keys: with a secret start they can't choose such whose hashes are equal.
        Self { by_hash: HashMap::default(), seed: RandomState::new().hash_one(0) }
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

/// Multiplies two words to 128 bits and folds the halves: each bit of the result depends on all bits of both.
fn fold(one: u64, other: u64) -> u64 {
    let product = u128::from(one) * u128::from(other);
    (product as u64) ^ ((product >> 64) as u64)
}

/// A hash for tables in memory, eight bytes a step. Keys are short, so that a general hash would cost more than the rest of
/// planning a row. The constants are odd and have as many ones as zeros (digits of π).
fn hash(state: u64, bytes: &[u8]) -> u64 {
    const STEP: u64 = 0x243f_6a88_85a3_08d3;
    const LAST: u64 = 0x1319_8a2e_0370_7345;
    let mut state = state ^ bytes.len() as u64;
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        state = fold(state ^ u64::from_le_bytes(*word), STEP);
    }
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    fold(state ^ u64::from_le_bytes(last), LAST)
}

#[derive(Default)]
struct AlreadyHashed(u64);

impl Hasher for AlreadyHashed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("keys of this map are u64");
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::batch::{Batch, CellKind};
    use std::collections::HashSet;

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

    #[test]
    fn hashes_of_like_keys_differ_in_their_high_and_low_bits() {
        let numbers = (0..100_000u64).map(|number| hash(1, &number.to_be_bytes()));
        let texts = (0..100_000u64).map(|number| hash(1, format!("customer-{number:09}").as_bytes()));
        let lengths = (9..64).map(|length| hash(1, &[0; 64][..length]));
        let all: Vec<u64> = numbers.chain(texts).chain(lengths).collect();
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
        // About 200,000 balls in 65,536 boxes: of a fair hash some 3,100 boxes stay empty (65,536 · e^-3.05).
        for shift in [0, 24, 48] {
            let boxes: HashSet<u64> = all.iter().map(|hash| hash >> shift & 0xffff).collect();
            assert!((61_800..63_000).contains(&boxes.len()), "{} boxes at {shift}", boxes.len());
        }
    }
}
