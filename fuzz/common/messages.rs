//! Tables, and random messages about them as a server would send them, damaged on request.

use rand::rngs::SmallRng;
use rand::{Rng as _, RngExt as _};
use sluice::engine::table::{Column, Identity, MappedTable, QualifiedName, TableVersion};
use std::sync::Arc;

/// Tag of the frames that a stream consists of (CopyData).
pub const FRAME: [u8; 1] = *b"d";

/// OIDs of the tables: by key, by the full row, not mapped.
const TABLES: [u32; 3] = [7, 9, 11];
const COLUMNS: [(&str, u32); 4] = [("id", 20), ("v", 25), ("w", 1700), ("x", 3802)];

/// The mapped tables.
pub fn tables() -> Vec<MappedTable> {
    [(TABLES[0], "keyed", Identity::Key), (TABLES[1], "whole", Identity::Full)].map(|(id, name, identity)| table(id, name, identity)).into()
}

fn table(id: u32, name: &str, identity: Identity) -> MappedTable {
    let column = |(name, type_id): &(&str, u32)| Column {
        name: (*name).into(),
        type_id: *type_id,
        type_name: QualifiedName::new("pg_catalog", "t"),
        declared: "t".into(),
        key: identity == Identity::Key && *name == "id",
        not_null: *name == "id",
        generated: None,
        collation: None,
        number: 0,
        modifier: -1,
    };
    let version = TableVersion {
        id,
        name: QualifiedName::new("public", name),
        columns: COLUMNS.iter().map(column).collect(),
        identity,
        differs: None,
    };
    MappedTable {
        version: Arc::new(version),
        target: QualifiedName::new("public", name),
        generated: Vec::new(),
        excluded: Vec::new(),
        accept_narrower_types: false,
        primary_key: Vec::new(),
        primary_key_name: None,
        estimated_rows: 0,
        blocks: 0,
        structure: Default::default(),
        lineage: Default::default(),
    }
}

/// The relation messages of all tables.
pub fn announce() -> Vec<Vec<u8>> {
    [(TABLES[0], "keyed", b'd'), (TABLES[1], "whole", b'f'), (TABLES[2], "other", b'd')]
        .map(|(id, name, identity)| relation(id, name, identity, &COLUMNS))
        .into()
}

fn relation(id: u32, name: &str, identity: u8, columns: &[(&str, u32)]) -> Vec<u8> {
    let mut message = [b"R".as_slice(), &id.to_be_bytes(), b"public\0", name.as_bytes(), &[0, identity]].concat();
    message.extend((columns.len() as u16).to_be_bytes());
    for (name, type_id) in columns {
        message.push(u8::from(identity == b'f' || *name == "id"));
        message.extend([name.as_bytes(), b"\0"].concat());
        message.extend(type_id.to_be_bytes());
        message.extend((-1i32).to_be_bytes());
    }
    message
}

/// Cuts an input into messages: two bytes of length before each; the last one ends with the input.
pub fn split(mut input: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (length, rest) = input.split_first_chunk::<2>()?;
        let (message, rest) = rest.split_at(rest.len().min(usize::from(u16::from_be_bytes(*length))));
        input = rest;
        Some(message)
    })
}

/// The reverse of [`split`].
pub fn join(messages: &[Vec<u8>]) -> Vec<u8> {
    messages.iter().flat_map(|message| [&(message.len() as u16).to_be_bytes(), message.as_slice()].concat()).collect()
}

/// Whole transactions, one message after the other; `at` is the position and goes on.
pub fn transaction(random: &mut SmallRng, at: &mut u64) -> Vec<Vec<u8>> {
    let start = *at + random.random_range(1..100);
    let end = start + random.random_range(1..100);
    *at = end;
    let mut messages = vec![[b"B".as_slice(), &start.to_be_bytes(), &[0; 8], &7u32.to_be_bytes()].concat()];
    for _ in 0..random.random_range(0..20) {
        messages.push(change(random));
    }
    messages.push([b"C\0".as_slice(), &start.to_be_bytes(), &end.to_be_bytes(), &random.random::<[u8; 8]>()].concat());
    messages
}

/// A transaction that is sent in slices before its end; some of it is rolled back.
pub fn streamed(random: &mut SmallRng, at: &mut u64) -> Vec<Vec<u8>> {
    let whole = transaction(random, at);
    let [begin, changes @ .., commit] = whole.as_slice() else { return whole };
    let xid = (*at as u32).to_be_bytes();
    let subxid = (*at as u32 + 1).to_be_bytes();
    let inside = |message: &Vec<u8>, id: &[u8; 4]| [&message[..1], id, &message[1..]].concat();
    let mut messages = vec![[b"S".as_slice(), &xid, &[1]].concat()];
    messages.extend(announce().iter().map(|message| inside(message, &xid)));
    for change in changes {
        match random.random_range(0..4) {
            0 => messages.extend([b"E".to_vec(), [b"S".as_slice(), &xid, &[0]].concat(), inside(change, &subxid)]),
            1 if change[0] != b'R' => messages.push(inside(change, &subxid)),
            _ => messages.push(inside(change, &xid)),
        }
    }
    messages.push(b"E".to_vec());
    messages.push([b"A".as_slice(), &xid, &subxid].concat());
    messages.push([b"c".as_slice(), &xid, &[0], &begin[1..9], &commit[10..18], &commit[18..26]].concat());
    messages
}

/// A change, or another message that may stand inside a transaction.
fn change(random: &mut SmallRng) -> Vec<u8> {
    let index = random.random_range(0..3);
    let (id, old) = (TABLES[index].to_be_bytes(), if index == 1 { b"O" } else { b"K" });
    let mut row = |tag: &[u8]| {
        let mut bytes = tag.to_vec();
        bytes.extend((COLUMNS.len() as u16).to_be_bytes());
        COLUMNS.iter().for_each(|_| cell(random, &mut bytes));
        bytes
    };
    match row(b"N")[3] % 9 {
        0 => [b"D".as_slice(), &id, &row(old)].concat(),
        1 => [b"U".as_slice(), &id, &row(b"N")].concat(),
        2 => [b"U".as_slice(), &id, &row(old), &row(b"N")].concat(),
        3 => [b"T".as_slice(), &2u32.to_be_bytes(), &[1], &id, &TABLES[0].to_be_bytes()].concat(),
        4 => [b"Y".as_slice(), &90_000u32.to_be_bytes(), b"public\0mood\0"].concat(),
        5 => [b"M\x01".as_slice(), &[0; 8], b"prefix\0", &3u32.to_be_bytes(), b"abc"].concat(),
        6 => announce().swap_remove(index),
        _ => [b"I".as_slice(), &id, &row(b"N")].concat(),
    }
}

fn cell(random: &mut SmallRng, bytes: &mut Vec<u8>) {
    match random.random_range(0..8) {
        0 => bytes.push(b'n'),
        1 => bytes.push(b'u'),
        kind => {
            let length = if random.random_range(0..50) == 0 { 3_000 } else { random.random_range(0..30) };
            bytes.push(if kind == 2 { b'b' } else { b't' });
            bytes.extend((length as u32).to_be_bytes());
            let start = bytes.len();
            bytes.resize(start + length, 0);
            random.fill_bytes(&mut bytes[start..]);
        }
    }
}

/// A message in the envelope of the stream, or a keepalive before it.
pub fn envelope(random: &mut SmallRng, message: &[u8], at: u64) -> Vec<Vec<u8>> {
    let data = [b"w".as_slice(), &at.to_be_bytes(), &at.to_be_bytes(), &[0; 8], message].concat();
    let keepalive = [b"k".as_slice(), &at.to_be_bytes(), &[0; 8], &[random.random_range(0..2)]].concat();
    if random.random_range(0..10) == 0 { vec![keepalive, data] } else { vec![data] }
}

/// Changes bytes, cuts, lengthens, doubles or swaps parts.
pub fn damage(random: &mut SmallRng, message: &mut Vec<u8>) {
    for _ in 0..random.random_range(1..4) {
        if message.is_empty() {
            return;
        }
        let (at, to) = (random.random_range(0..message.len()), random.random_range(0..message.len()));
        match random.random_range(0..8) {
            0 => message.truncate(at),
            1 => message.insert(at, random.random()),
            2 => drop(message.remove(at)),
            3 => message.swap(at, to),
            4 => message.extend_from_within(at.min(to)..at.max(to)),
            // Numbers at the edges are what lengths and counts go wrong with.
            5 => message[at] = [0, 1, 0x7f, 0x80, 0xff][random.random_range(0..5)],
            6 => message[at..].iter_mut().take(4).for_each(|byte| *byte = 0xff),
            _ => message[at] = random.random(),
        }
    }
}
