//! Messages made by hand; the tests of the log use them too.

use super::*;
use crate::engine::error::reason;
use crate::engine::table::{Column, Identity, QualifiedName};
use crate::engine::testing;
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

fn column(name: &str, type_id: u32, key: bool) -> Column {
    Column {
        name: name.into(),
        type_id,
        type_name: QualifiedName::new("pg_catalog", "int4"),
        declared: "integer".into(),
        key,
        not_null: key,
        generated: None,
        collation: None,
        number: 0,
        modifier: -1,
    }
}

pub fn table(identity: Identity) -> MappedTable {
    let version = TableVersion {
        id: 7,
        name: QualifiedName::new("public", "t"),
        columns: vec![column("id", 23, true), column("v", 25, false)],
        identity,
        differs: None,
    };
    MappedTable { primary_key: vec!["id".into()], ..testing::table(version) }
}

pub fn relation(id: u32, name: &str, identity: u8, columns: &[(u8, &str, u32)]) -> Vec<u8> {
    let mut message = vec![b'R'];
    message.extend(id.to_be_bytes());
    message.extend(b"public\0");
    message.extend(name.as_bytes());
    message.extend([0, identity]);
    message.extend((columns.len() as u16).to_be_bytes());
    for (flags, name, type_id) in columns {
        message.push(*flags);
        message.extend(name.as_bytes());
        message.push(0);
        message.extend(type_id.to_be_bytes());
        message.extend((-1i32).to_be_bytes());
    }
    message
}

pub const COLUMNS: [(u8, &str, u32); 2] = [(1, "id", 23), (0, "v", 25)];

fn tuple_bytes(cells: &[Option<&str>]) -> Vec<u8> {
    let mut bytes = (cells.len() as u16).to_be_bytes().to_vec();
    for cell in cells {
        match cell {
            None => bytes.push(b'n'),
            Some("\u{1}") => bytes.push(b'u'),
            Some(text) => {
                bytes.push(b't');
                bytes.extend((text.len() as u32).to_be_bytes());
                bytes.extend(text.as_bytes());
            }
        }
    }
    bytes
}

pub fn row(tag: u8, id: u32, tuples: &[(u8, &[Option<&str>])]) -> Vec<u8> {
    let mut message = vec![tag];
    message.extend(id.to_be_bytes());
    for (kind, cells) in tuples {
        message.push(*kind);
        message.extend(tuple_bytes(cells));
    }
    message
}

pub fn begin(commit_start: u64) -> Vec<u8> {
    [b"B".as_slice(), &commit_start.to_be_bytes(), &[0; 12]].concat()
}

pub fn commit(end: u64) -> Vec<u8> {
    [b"C\0".as_slice(), &[0; 8], &end.to_be_bytes(), &[0; 8]].concat()
}

pub fn logical(transactional: bool, prefix: &str, content: &str) -> Vec<u8> {
    let mut message = vec![b'M', u8::from(transactional)];
    message.extend([0; 8]);
    message.extend(prefix.as_bytes());
    message.push(0);
    message.extend((content.len() as u32).to_be_bytes());
    message.extend(content.as_bytes());
    message
}

/// Cells of an image as text: `-` for NULL, `~` for unchanged.
pub fn show(batch: &Batch, image: Image) -> String {
    let cell = |cell: &crate::engine::batch::Cell| match cell.kind {
        CellKind::Null => "-".to_owned(),
        CellKind::Unchanged => "~".to_owned(),
        CellKind::Text | CellKind::Binary => String::from_utf8_lossy(batch.bytes(*cell)).into_owned(),
    };
    batch.cells(image).iter().map(cell).collect::<Vec<_>>().join(",")
}

#[test]
fn messages_of_our_own_are_told_from_others() {
    let mut decoder = Decoder::new(&[]);
    let mut decode = |message: &[u8]| format!("{:?}", decoder.decode(message, &mut Batch::default()).unwrap());
    assert_eq!(decode(&logical(true, MESSAGE_PREFIX, "now")), "Own { content: \"now\" }");
    assert_eq!(decode(&logical(true, MESSAGE_PREFIX, "")), "Own { content: \"\" }");
    for (transactional, prefix, content) in
        [(false, MESSAGE_PREFIX, "now"), (true, "sluice2", "now"), (true, "", ""), (true, MESSAGE_PREFIX, &"x".repeat(LONGEST_CONTENT + 1))]
    {
        assert_eq!(decode(&logical(transactional, prefix, content)), "Other", "{prefix}");
    }
    let mut binary = logical(true, MESSAGE_PREFIX, "now");
    *binary.last_mut().unwrap() = 0xFF;
    assert_eq!(decode(&binary), "Other");
    binary.push(0);
    assert!(Decoder::new(&[]).decode(&binary, &mut Batch::default()).is_err());
}

#[test]
fn rows_of_all_kinds() {
    let mut decoder = Decoder::new(&[table(Identity::Key)]);
    let mut batch = Batch::default();
    decoder.decode(&relation(7, "t", b'd', &COLUMNS), &mut batch).unwrap();
    decoder.decode(&relation(8, "other", b'd', &[]), &mut batch).unwrap();
    let mut truncate = vec![b'T', 0, 0, 0, 2, 1];
    truncate.extend(8u32.to_be_bytes());
    truncate.extend(7u32.to_be_bytes());
    for message in [
        row(b'I', 7, &[(b'N', &[Some("1"), None])]),
        row(b'I', 8, &[(b'N', &[])]),
        row(b'U', 7, &[(b'N', &[Some("1"), Some("\u{1}")])]),
        row(b'U', 7, &[(b'K', &[Some("1"), None]), (b'N', &[Some("2"), Some("x")])]),
        row(b'U', 7, &[(b'O', &[Some("1"), Some("y")]), (b'N', &[Some("1"), Some("x")])]),
        row(b'D', 7, &[(b'K', &[Some("2"), None])]),
        truncate,
    ] {
        assert_eq!(decoder.decode(&message, &mut batch).unwrap(), Message::Changes);
    }
    let shown: Vec<_> = batch
        .changes()
        .iter()
        .map(|change| format!("{:?} {} {} {}", change.op, show(&batch, change.old), change.old_is_full, show(&batch, change.new)))
        .collect();
    let expected =
        ["Insert  false 1,-", "Update  false 1,~", "Update 1,- false 2,x", "Update 1,y true 1,x", "Delete 2,- false ", "Truncate  false "];
    assert_eq!(shown, expected);
    assert_eq!(batch.tables().len(), 1);
}

#[test]
fn rows_of_a_changed_table_carry_the_difference() {
    for (identity, message, words) in [
        (Identity::Key, relation(7, "t", b'd', &[(1, "id", 23)]), "column `v` is gone"),
        (Identity::Key, relation(7, "t", b'd', &[(1, "id", 20), (0, "v", 25)]), "another type"),
        (Identity::Key, relation(7, "t", b'd', &[(1, "id", 23), (1, "v", 25)]), "joined the replica identity"),
        (Identity::Key, relation(7, "t", b'd', &[(1, "id", 23), (0, "v", 25), (0, "w", 25)]), "column `w` is new"),
        (Identity::Key, relation(7, "t", b'd', &[(0, "v", 25), (1, "id", 23)]), "another order"),
        (Identity::Key, relation(7, "t2", b'd', &COLUMNS), "renamed to public.t2"),
        (Identity::Key, relation(7, "t", b'f', &COLUMNS), "replica identity changed"),
        (Identity::Full, relation(7, "t", b'd', &COLUMNS), "replica identity changed"),
        (Identity::Key, relation(9, "t", b'd', &COLUMNS), "another table has its name"),
    ] {
        let mut decoder = Decoder::new(&[table(identity)]);
        let mut batch = Batch::default();
        decoder.decode(&message, &mut batch).unwrap();
        let id = u32::from_be_bytes(message[1..5].try_into().unwrap());
        decoder.decode(&[b"T\0\0\0\x01\0".as_slice(), &id.to_be_bytes()].concat(), &mut batch).unwrap();
        let version = batch.table(&batch.changes()[0]);
        assert_eq!((version.id, version.name.to_string().as_str()), (7, "public.t"), "it stands for the mapped table");
        assert!(version.differs.as_deref().is_some_and(|difference| difference.contains(words)), "{version:?}");
    }
    // A full identity marks every column as key.
    let marked = relation(7, "t", b'f', &[(1, "id", 23), (1, "v", 25)]);
    Decoder::new(&[table(Identity::Full)]).decode(&marked, &mut Batch::default()).unwrap();
}

#[test]
fn damaged_messages_are_errors() {
    let good = [
        relation(7, "t", b'd', &COLUMNS),
        row(b'I', 7, &[(b'N', &[Some("1"), Some("text")])]),
        row(b'U', 7, &[(b'K', &[Some("1"), None]), (b'N', &[Some("2"), Some("x")])]),
        row(b'D', 7, &[(b'O', &[Some("2"), Some("y")])]),
        [b"T\0\0\0\x01\0".as_slice(), &7u32.to_be_bytes()].concat(),
        [b"B".as_slice(), &[0; 20]].concat(),
        [b"C".as_slice(), &[0; 25]].concat(),
    ];
    let fresh = || {
        let mut decoder = Decoder::new(&[table(Identity::Key)]);
        decoder.decode(&good[0], &mut Batch::default()).unwrap();
        decoder
    };
    for message in &good {
        fresh().decode(message, &mut Batch::default()).unwrap();
        for length in 0..message.len() {
            let error = fresh().decode(&message[..length], &mut Batch::default()).unwrap_err();
            assert_eq!(error.reason, reason::PROTOCOL_VIOLATION, "{message:?} cut to {length}");
        }
        let longer = [message.as_slice(), &[0]].concat();
        assert!(fresh().decode(&longer, &mut Batch::default()).is_err());
    }
    // Random damage: any answer will do, but there must be one.
    let seed = rand::random();
    let mut random = SmallRng::seed_from_u64(seed);
    println!("seed {seed}");
    for _ in 0..200_000 {
        let mut message = good[random.random_range(0..good.len())].clone();
        for _ in 0..random.random_range(1..4) {
            let at = random.random_range(0..message.len());
            message[at] = random.random();
        }
        message.truncate(random.random_range(0..=message.len()));
        let _ = fresh().decode(&message, &mut Batch::default());
    }
}

#[test]
fn a_row_before_its_relation_is_a_violation() {
    let error = Decoder::new(&[table(Identity::Key)]).decode(&row(b'I', 7, &[]), &mut Batch::default()).unwrap_err();
    assert_eq!(error.reason, reason::PROTOCOL_VIOLATION);
}

#[test]
fn timestamps_are_bounded() {
    assert_eq!(timestamp(0), SystemTime::UNIX_EPOCH + Duration::from_secs(946_684_800));
    assert!(timestamp(i64::MIN) <= timestamp(-1) && timestamp(-1) < timestamp(0) && timestamp(0) < timestamp(i64::MAX));
}

#[test]
fn binary_only_with_built_in_types() {
    let with = |type_id, schema: &str| {
        let mut table = table(Identity::Key);
        let mut version = (*table.version).clone();
        version.columns[1].type_id = type_id;
        version.columns[1].type_name.schema = schema.into();
        table.version = Arc::new(version);
        binary_allowed(&[table])
    };
    assert!(with(3802, "pg_catalog") && with(1231, "pg_catalog"));
    assert!(!with(2205, "pg_catalog") && !with(16400, "public") && !with(790, "pg_catalog"));
}
