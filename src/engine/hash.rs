//! Hashes of keys, for tables in memory.

use std::hash::{BuildHasher as _, BuildHasherDefault, Hasher, RandomState};

/// A secret start. Users choose keys: so they can't choose such whose hashes are equal.
#[must_use]
pub fn seed() -> u64 {
    RandomState::new().hash_one(0)
}

/// Multiplies two words to 128 bits and folds the halves: each bit of the result depends on all bits of both.
fn fold(one: u64, other: u64) -> u64 {
    let product = u128::from(one) * u128::from(other);
    (product as u64) ^ ((product >> 64) as u64)
}

/// A hash for tables in memory, eight bytes a step; `state` is a [`seed`] or the hash of what comes before. Keys are
/// short, so that a general hash would cost more than the rest of planning a row. The constants are digits of π.
#[must_use]
pub fn hash(state: u64, bytes: &[u8]) -> u64 {
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

/// Builds hashers of tables whose keys are hashes.
pub type AlreadyHashed = BuildHasherDefault<Taken>;

/// Takes a `u64` as it is.
#[derive(Debug, Default)]
pub struct Taken(u64);

impl Hasher for Taken {
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
    use std::collections::HashSet;

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
