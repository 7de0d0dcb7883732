//! Which rows a part writes, so that parts that have nothing in common can be written side by side.
//!
//! Two parts may be written at the same time when neither could see or block a row of the other: then either order of
//! their statements leaves the same rows. That is proven by keys alone, for tables whose rows are told apart by the bytes
//! of their key and by nothing else ([`Order::Key`]). Whatever can't be proven stands alone.

use super::super::statements::TableWriter;
use crate::engine::batch::{Batch, Cell, CellKind, Change, Op};
use crate::engine::coalesce::Order;
use crate::engine::hash::{AlreadyHashed, hash, seed};
use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

/// Hashes of keys, one or two per change: two keys with one hash count as one, which costs time and nothing else.
type Keys = HashSet<u64, AlreadyHashed>;

/// What a part writes.
#[derive(Debug)]
pub(super) enum Footprint {
    /// Nothing may be written beside it.
    Alone,
    /// The rows with these keys.
    Rows {
        keys: Keys,
        /// By table, how its key is encoded: equal keys have equal bytes only within one encoding.
        encodings: HashMap<u32, Vec<CellKind>>,
    },
}

impl Footprint {
    /// Of the changes that are due.
    pub fn of(batch: &Batch, writers: &HashMap<u32, TableWriter>, due: &[bool]) -> Self {
        let mut keys = Keys::with_capacity_and_hasher(batch.changes().len(), AlreadyHashed::default());
        let mut encodings: HashMap<u32, Vec<CellKind>> = HashMap::new();
        for (change, due) in batch.changes().iter().zip(due) {
            if !due {
                continue;
            }
            let table = batch.table(change).id;
            let Some(writer) = writers.get(&table).filter(|writer| writer.order == Order::Key && change.op != Op::Truncate) else {
                return Self::Alone;
            };
            for image in [change.old, change.new] {
                if !image.is_present() {
                    continue;
                }
                let key = key_cells(batch, writer, change, batch.cells(image));
                let encoding = encodings.entry(table).or_insert_with(|| key.clone().map(|cell| cell.kind).collect());
                if !key.clone().map(|cell| cell.kind).eq(encoding.iter().copied()) {
                    return Self::Alone;
                }
                keys.insert(hash_key(batch, table, key));
            }
        }
        Self::Rows { keys, encodings }
    }

    /// Whether both may be written at the same time.
    pub fn is_apart_from(&self, other: &Self) -> bool {
        let (Self::Rows { keys: ours, encodings: our_encodings }, Self::Rows { keys: theirs, encodings: their_encodings }) = (self, other)
        else {
            return false;
        };
        let alike = |(table, encoding): (&u32, &Vec<CellKind>)| their_encodings.get(table).is_none_or(|theirs| theirs == encoding);
        our_encodings.iter().all(alike) && ours.is_disjoint(theirs)
    }
}

/// The key in one image of a change. A key column that the new image leaves out is the old one's.
fn key_cells<'a>(
    batch: &'a Batch,
    writer: &'a TableWriter,
    change: &Change,
    cells: &'a [Cell],
) -> impl Iterator<Item = Cell> + Clone + use<'a> {
    let old = batch.cells(change.old);
    writer.key.iter().map(move |&column| match cells[column].kind {
        CellKind::Unchanged => old.get(column).copied().unwrap_or(cells[column]),
        _ => cells[column],
    })
}

/// Footprints are compared: all hashes have the same start.
fn hash_key(batch: &Batch, table: u32, key: impl Iterator<Item = Cell>) -> u64 {
    static SEED: LazyLock<u64> = LazyLock::new(seed);
    key.fold(*SEED ^ u64::from(table), |state, cell| hash(state, batch.bytes(cell)))
}
