//! Two decoders, one log: what real servers write about random histories over all types is decoded by ours and by a published
//! crate that has nothing in common with it, in text and in binary, and compared change by change and cell by cell.
//! `SLUICE_SEED` repeats a history.

mod support;

#[allow(dead_code)] // tables and publications; the rest is for others
#[path = "postgres_wire/follow.rs"]
mod follow;

use follow::{mapped, publish};
use pg_walstream::protocol::{LogicalReplicationMessage as Theirs, LogicalReplicationParser, TupleData};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use sluice::connectors::postgres::Lsn;
use sluice::connectors::postgres::pgoutput::streamed::{Ended, Framing, subxid};
use sluice::connectors::postgres::pgoutput::{Decoder, Message};
use sluice::engine::batch::{Batch, CellKind, Change, Image, Op};
use sluice::engine::table::MappedTable;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};
use support::Postgres;
use tokio_postgres::Client;

/// Microseconds between 1970 and 2000, where the server's clock begins.
const EPOCH: i64 = 946_684_800_000_000;
const TRANSACTIONS: usize = 150;

/// A type and values at its edges.
type Kind = (&'static str, &'static [&'static str]);

/// Each stands alone and as an array.
const TYPES: &[Kind] = &[
    ("bool", &["t", "f"]),
    ("int2", &["-32768", "0", "32767"]),
    ("int4", &["-2147483648", "1", "2147483647"]),
    ("int8", &["-9223372036854775808", "9223372036854775807"]),
    ("oid", &["0", "4294967295"]),
    ("xid", &["3", "4294967295"]),
    ("xid8", &["3", "18446744073709551615"]),
    ("tid", &["(0,1)", "(4294967295,65535)"]),
    ("float4", &["NaN", "Infinity", "-Infinity", "-0", "1e-45", "3.4028235e38"]),
    ("float8", &["NaN", "Infinity", "-Infinity", "-0", "5e-324", "1.7976931348623157e308", "0.1"]),
    ("numeric", &["NaN", "Infinity", "-Infinity", "0.000", "-1e-1000", "123456789012345678901234567890.0987654321", "1e5000"]),
    ("numeric(20,4)", &["NaN", "-1234567890123456.7891", "0"]),
    ("money", &["-92233720368547758.08", "12.34"]),
    ("\"char\"", &["a", "\u{7f}"]),
    ("char(5)", &["", "a", "abcde"]),
    ("varchar(20)", &["", "\u{1F980} crab", "NULL"]),
    ("name", &["x", "\"q\""]),
    ("text", &["", "\\N", "tab\tnew\nline\\back'quote\"double", "\u{1F980}\u{e4}", "{a,b}", "NULL"]),
    ("bytea", &["\\x", "\\x00ff5c", "\\x27"]),
    ("bit(5)", &["00000", "10101"]),
    ("varbit", &["", "1", "101010101"]),
    ("date", &["infinity", "-infinity", "0044-03-15 BC", "5874897-12-31", "2000-02-29"]),
    ("time", &["00:00:00", "24:00:00", "12:34:56.789012"]),
    ("timetz", &["24:00:00+15:59", "00:00:00-12", "12:34:56.789012+05:30"]),
    ("timestamp", &["infinity", "-infinity", "4713-01-01 00:00:00 BC", "294276-12-31 23:59:59.999999"]),
    ("timestamptz", &["infinity", "-infinity", "4713-01-02 00:00:00+00 BC", "294276-12-31 23:59:59.999999+00"]),
    ("interval", &["178000000 years", "-1 mon +2 days -03:04:05.678901", "0"]),
    ("uuid", &["00000000-0000-0000-0000-000000000000", "ffffffff-ffff-4fff-bfff-ffffffffffff"]),
    ("json", &["null", "{\"b\": 1,  \"a\": 2, \"b\": 3}", "[12345678901234567890, \"\\u00e4\"]", "{}"]),
    ("jsonb", &["null", "{\"a\": [1.50, null, true]}", "\"text\"", "[]"]),
    ("jsonpath", &["$.\"a\"[*]?(@ > 1)"]),
    ("inet", &["127.0.0.1", "::1/64", "10.0.0.0/8"]),
    ("cidr", &["10.0.0.0/8", "2001:db8::/32"]),
    ("macaddr", &["08:00:2b:01:02:03"]),
    ("macaddr8", &["08:00:2b:01:02:03:04:05"]),
    ("point", &["(1.5,-0)", "(NaN,Infinity)"]),
    ("line", &["{1,-1,0}"]),
    ("lseg", &["[(0,0),(1,1)]"]),
    ("box", &["(1,1),(0,0)"]),
    ("path", &["[(0,0),(1,1)]", "((0,0),(1,1))"]),
    ("polygon", &["((0,0),(1,1),(1,0))"]),
    ("circle", &["<(0,0),1e300>"]),
    ("tsvector", &["'a':1A 'b':2,3"]),
    ("tsquery", &["'a' & !'b' <-> 'c'"]),
    ("pg_lsn", &["0/0", "FFFFFFFF/FFFFFFFF"]),
    ("txid_snapshot", &["10:20:10,14,15"]),
    ("pg_snapshot", &["10:20:10,14,15"]),
    ("int2vector", &["1 2 3"]),
    ("oidvector", &["1 2 3"]),
    ("regclass", &["pg_class"]),
    ("regtype", &["int4"]),
    ("regproc", &["pg_catalog.now"]),
    ("refcursor", &["c"]),
    ("aclitem", &["postgres=r/postgres"]),
    ("int4range", &["empty", "[1,10)", "(,)", "[1,)"]),
    ("int8range", &["[1,9223372036854775807)"]),
    ("numrange", &["[1.5,NaN]", "(,0]"]),
    ("tsrange", &["[-infinity,infinity]"]),
    ("tstzrange", &["[2000-01-01 00:00+00,)"]),
    ("daterange", &["[2000-01-01,2000-02-01)"]),
    ("int4multirange", &["{}", "{[1,3),[5,7)}"]),
    ("nummultirange", &["{[1.5,2],(3,)}"]),
    ("tsmultirange", &["{[2000-01-01 00:00,2001-01-01 00:00)}"]),
    ("tstzmultirange", &["{(,)}"]),
    ("datemultirange", &["{[2000-01-01,2000-02-01)}"]),
    ("int8multirange", &["{[1,2),[3,4)}"]),
    ("mood", &["sad", "it's \"ok\", {fine}"]),
    ("small", &["1", "9"]),
    ("smaller", &["2"]),
    ("pair", &["(1,\"a,\"\"b\")", "(,)"]),
    ("floats", &["[0.5,1.5)"]),
];

/// Has no binary format before PostgreSQL 16: such a value is sent as text, and an array of them not at all.
const TEXT_ONLY: &str = "aclitem";

const TABLES: [&str; 6] = ["singles", "arrays", "toasted", "whole", "two_keys", "unmapped"];

fn of_arrays() -> impl Iterator<Item = &'static Kind> {
    TYPES.iter().filter(|(name, _)| *name != TEXT_ONLY)
}

/// One value as SQL: NULL, or one of the type's.
fn value(random: &mut SmallRng, (name, values): &Kind, array: bool) -> String {
    let mut one = || format!("'{}'::{name}", values[random.random_range(0..values.len())].replace('\'', "''"));
    if !array {
        let one = one();
        return if random.random_range(0..6) == 0 { "NULL".into() } else { one };
    }
    let (first, second) = (one(), one());
    match random.random_range(0..7) {
        0 => "NULL".into(),
        1 => format!("'{{}}'::{name}[]"),
        2 => format!("ARRAY[{first}, NULL, {second}]"),
        3 => format!("ARRAY[[{first}, {second}], [NULL, {first}]]"),
        // Another lower bound.
        4 => format!("array_fill({first}, ARRAY[2], ARRAY[-3])"),
        _ => format!("ARRAY[{first}]"),
    }
}

async fn create(client: &Client) {
    let columns = |suffix: &str, types: &mut dyn Iterator<Item = &Kind>| {
        types.enumerate().map(|(at, (name, _))| format!(", c{at} {name}{suffix}")).collect::<String>()
    };
    let (singles, arrays) = (columns("", &mut TYPES.iter()), columns("[]", &mut of_arrays()));
    client
        .batch_execute(&format!(
            "CREATE TYPE mood AS ENUM ('sad', 'it''s \"ok\", {{fine}}');
             CREATE DOMAIN small AS int CHECK (VALUE < 10);
             CREATE DOMAIN smaller AS small CHECK (VALUE < 5);
             CREATE TYPE pair AS (a int, b text);
             CREATE TYPE floats AS RANGE (subtype = float8);
             CREATE TABLE singles (id int PRIMARY KEY{singles}, computed int GENERATED ALWAYS AS (id * 2) STORED);
             CREATE TABLE arrays (id int PRIMARY KEY{arrays});
             CREATE TABLE toasted (id int PRIMARY KEY, n int, t text, j json, b bytea, a text[]);
             ALTER TABLE toasted ALTER t SET STORAGE EXTERNAL, ALTER j SET STORAGE EXTERNAL, ALTER b SET STORAGE EXTERNAL, ALTER a SET STORAGE EXTERNAL;
             CREATE TABLE whole (id int, n numeric, t text, m mood);
             ALTER TABLE whole REPLICA IDENTITY FULL, ALTER t SET STORAGE EXTERNAL;
             CREATE TABLE two_keys (b text, n int, a uuid, PRIMARY KEY (a, b));
             CREATE TABLE unmapped (id int PRIMARY KEY, t text)"
        ))
        .await
        .expect("types and tables");
}

/// One random transaction.
fn transaction(random: &mut SmallRng, n: usize) -> String {
    let mut statements = Vec::new();
    for _ in 0..random.random_range(1..6) {
        let id = random.random_range(0..40);
        let singles: String = TYPES.iter().map(|kind| format!(", {}", value(random, kind, false))).collect();
        let arrays: String = of_arrays().map(|kind| format!(", {}", value(random, kind, true))).collect();
        let at = random.random_range(0..of_arrays().count());
        let single = value(random, &TYPES[at], false);
        let array = value(random, of_arrays().nth(at).expect("one of them"), true);
        let long = format!("repeat('{n}-{id} ', 1000)");
        statements.push(match random.random_range(0..22) {
            0..4 => format!("INSERT INTO singles VALUES ({id}{singles}) ON CONFLICT (id) DO UPDATE SET c{at} = {single}"),
            4..8 => format!("INSERT INTO arrays VALUES ({id}{arrays}) ON CONFLICT (id) DO UPDATE SET c{at} = {array}"),
            8 => format!("UPDATE singles SET id = id + 1000 WHERE id = {id} AND NOT EXISTS (SELECT FROM singles WHERE id = {id} + 1000)"),
            9 => format!("DELETE FROM singles WHERE id = {id}; DELETE FROM arrays WHERE id = {id}"),
            10 | 11 => format!(
                "INSERT INTO toasted VALUES ({id}, 0, {long}, to_json({long}), {long}::bytea, ARRAY[{long}, NULL]) ON CONFLICT (id) DO UPDATE SET n = toasted.n + 1"
            ),
            12 => format!("UPDATE toasted SET n = n + 1 WHERE id % 3 = {id} % 3"),
            13 => format!("UPDATE toasted SET t = {long} WHERE id = {id}"),
            14 => format!("UPDATE toasted SET id = id + 1000 WHERE id = {id} AND NOT EXISTS (SELECT FROM toasted WHERE id = {id} + 1000)"),
            15 => format!("INSERT INTO whole VALUES ({id}, 'NaN', {long}, 'sad'), ({id}, NULL, NULL, NULL), ({id}, NULL, NULL, NULL)"),
            16 => format!("UPDATE whole SET n = {n} WHERE id % 5 = {id} % 5; DELETE FROM whole WHERE id = {id} + 1"),
            17 => format!("INSERT INTO two_keys VALUES ('k{id}', {n}, md5('{id}')::uuid) ON CONFLICT (a, b) DO UPDATE SET b = two_keys.b || 'x{n}'"),
            // More than the server keeps before it sends what has not ended.
            18 => format!(
                "SAVEPOINT k; INSERT INTO two_keys SELECT 'kept {n} ' || g, g, gen_random_uuid() FROM generate_series(1, 800) g; RELEASE k;
                 SAVEPOINT s; INSERT INTO two_keys SELECT 'gone {n} ' || g, g, gen_random_uuid() FROM generate_series(1, 800) g; ROLLBACK TO s; RELEASE s"
            ),
            19 => format!("INSERT INTO unmapped VALUES ({id}, 'x') ON CONFLICT (id) DO UPDATE SET t = 'y'"),
            20 => "TRUNCATE whole, unmapped, two_keys RESTART IDENTITY".into(),
            _ => format!("SELECT pg_logical_emit_message(true, 'other', 'message {n}')"),
        });
    }
    let end = if random.random_range(0..15) == 0 { "ROLLBACK" } else { "COMMIT" };
    format!("BEGIN; {}; {end}", statements.join("; "))
}

/// How much was compared.
#[derive(Default, Debug)]
struct Compared {
    messages: BTreeMap<char, usize>,
    kinds: BTreeMap<char, usize>,
    values: BTreeMap<String, usize>,
}

/// The same messages in both decoders.
struct Pair {
    ours: Decoder,
    batch: Batch,
    theirs: LogicalReplicationParser,
    /// The transaction whose slice this is, as long as it has not stopped.
    slice: Option<u32>,
    /// Subtransactions that messages of slices named beside their transaction; the other decoder passes over them.
    subtransactions: BTreeSet<u32>,
    mapped: BTreeMap<u32, MappedTable>,
    compared: Compared,
}

impl Pair {
    fn new(tables: &[MappedTable], protocol: u32) -> Self {
        Self {
            ours: Decoder::new(tables),
            batch: Batch::default(),
            theirs: LogicalReplicationParser::with_protocol_version(protocol),
            slice: None,
            subtransactions: BTreeSet::new(),
            mapped: tables.iter().map(|table| (table.version.id, table.clone())).collect(),
            compared: Compared::default(),
        }
    }

    fn message(&mut self, message: &[u8]) {
        let theirs = self.theirs.parse_wal_message(message).unwrap_or_else(|error| panic!("theirs: {error}: {message:?}"));
        *self.compared.messages.entry(char::from(message[0])).or_default() += 1;
        if let Some(framing) = Framing::read(message).unwrap_or_else(|error| panic!("{error}: {message:?}")) {
            return self.framing(framing, &theirs.message);
        }
        let before = self.batch.changes().len();
        assert_eq!(self.slice, theirs.xid);
        let ours = match self.slice {
            Some(xid) => {
                self.subtransactions.extend(Some(subxid(message).expect("a subtransaction")).filter(|subxid| *subxid != xid));
                self.ours.decode_streamed(message, &mut self.batch)
            }
            None => self.ours.decode(message, &mut self.batch),
        };
        let ours = ours.unwrap_or_else(|error| panic!("{error}: {message:?}"));
        let changes: Vec<Change> = self.batch.changes()[before..].to_vec();
        match theirs.message {
            Theirs::Begin { final_lsn, .. } => assert!(matches!(ours, Message::Begin { commit_start } if commit_start.0 == final_lsn)),
            Theirs::Commit { end_lsn, timestamp, .. } => {
                let Message::Commit { end, committed_at } = ours else { panic!("{ours:?} instead of a commit") };
                assert_eq!((end.0, committed_at), (end_lsn, time(timestamp)));
            }
            Theirs::Relation { relation_id, columns, replica_identity, .. } => {
                let Some(table) = self.mapped.get(&relation_id) else { return };
                let version = &table.version;
                let full = replica_identity == b'f';
                let here: Vec<_> =
                    version.columns.iter().map(|column| (column.name.as_str(), column.type_id, column.key || full)).collect();
                let there: Vec<_> = columns.iter().map(|column| (&*column.name, column.type_id, column.is_key())).collect();
                assert_eq!(here, there, "{}", version.name);
            }
            Theirs::Insert { relation_id, tuple } => self.change(&changes, relation_id, Op::Insert, None, Some(tuple)),
            Theirs::Update { relation_id, old_tuple, new_tuple, key_type } => {
                self.change(&changes, relation_id, Op::Update, old_tuple.zip(key_type), Some(new_tuple));
            }
            Theirs::Delete { relation_id, old_tuple, key_type } => {
                self.change(&changes, relation_id, Op::Delete, Some((old_tuple, key_type)), None);
            }
            Theirs::Truncate { relation_ids, .. } => {
                let there: Vec<u32> = relation_ids.into_iter().filter(|id| self.mapped.contains_key(id)).collect();
                let here: Vec<u32> = changes.iter().map(|change| self.batch.table(change).id).collect();
                assert_eq!(here, there);
                assert!(changes.iter().all(|change| change.op == Op::Truncate && change.group == changes[0].group));
            }
            Theirs::Type { .. } | Theirs::Origin { .. } | Theirs::Message { .. } => assert_eq!(ours, Message::Other),
            other => panic!("not in this protocol version: {other:?}"),
        }
    }

    fn framing(&mut self, ours: Framing, theirs: &Theirs) {
        self.slice = match ours {
            Framing::Start { xid, .. } => Some(xid),
            _ => None,
        };
        let expected = match *theirs {
            Theirs::StreamStart { xid, first_segment } => Framing::Start { xid, is_first: first_segment },
            Theirs::StreamStop => Framing::Stop,
            Theirs::StreamCommit { xid, commit_lsn, end_lsn, timestamp, .. } => {
                Framing::Commit(Ended { xid, commit_start: Lsn(commit_lsn), end: Lsn(end_lsn), committed_at: time(timestamp) })
            }
            Theirs::StreamAbort { xid, subtransaction_xid, .. } => Framing::Abort { xid, subxid: subtransaction_xid },
            ref other => panic!("{ours:?} is theirs {other:?}"),
        };
        assert_eq!(ours, expected);
    }

    fn change(&mut self, changes: &[Change], table: u32, op: Op, old: Option<(TupleData, char)>, new: Option<TupleData>) {
        if !self.mapped.contains_key(&table) {
            assert!(changes.is_empty(), "a change of a table that is not mapped");
            return;
        }
        let [change] = changes else { panic!("{} changes of one message", changes.len()) };
        assert_eq!((change.op, self.batch.table(change).id), (op, table));
        assert_eq!(self.batch.table(change).differs, None);
        assert_eq!(change.old_is_full, old.as_ref().is_some_and(|(_, kind)| *kind == 'O'));
        self.image(change, change.old, old.map(|(tuple, _)| tuple));
        self.image(change, change.new, new);
    }

    fn image(&mut self, change: &Change, ours: Image, theirs: Option<TupleData>) {
        assert_eq!(ours.is_present(), theirs.is_some());
        let Some(theirs) = theirs else { return };
        let version = self.batch.table(change);
        let cells = self.batch.cells(ours);
        assert_eq!((cells.len(), version.columns.len()), (theirs.column_count(), theirs.column_count()));
        for ((cell, there), column) in cells.iter().zip(&theirs.columns).zip(&version.columns) {
            let kind = match cell.kind {
                CellKind::Null => b'n',
                CellKind::Unchanged => b'u',
                CellKind::Text => b't',
                CellKind::Binary => b'b',
            };
            assert_eq!((kind, self.batch.bytes(*cell)), (there.data_type, there.as_bytes()), "{}.{}", version.name, column.name);
            *self.compared.kinds.entry(char::from(kind)).or_default() += 1;
            if matches!(kind, b't' | b'b') {
                *self.compared.values.entry(column.declared.clone()).or_default() += 1;
            }
        }
    }
}

/// From the server's clock.
fn time(microseconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_micros((microseconds + EPOCH).unsigned_abs())
}

/// All messages that the slot holds, in order; large transactions before their end from protocol version 2 on.
async fn messages(client: &Client, protocol: u32, binary: bool) -> Vec<Vec<u8>> {
    let streaming = if protocol > 1 { ", 'streaming', 'on'" } else { "" };
    let sql = format!(
        "SELECT data FROM pg_logical_slot_peek_binary_changes('s', NULL, NULL, 'proto_version', '{protocol}', 'publication_names', 'p', 'binary', '{binary}', 'messages', 'true'{streaming})"
    );
    client.query(&sql, &[]).await.expect("the slot's messages").iter().map(|row| row.get(0)).collect()
}

async fn compare(major: u32) {
    let seed =
        std::env::var("SLUICE_SEED").map_or_else(|_| rand::random::<u32>().into(), |seed| seed.parse().expect("SLUICE_SEED is a number"));
    println!("SLUICE_SEED={seed} on {major}");
    let mut random = SmallRng::seed_from_u64(seed);
    let server = Postgres::start_with(major, &["logical_decoding_work_mem=64kB"]);
    let client = server.create_database("shop").await;
    create(&client).await;
    publish(&client, &TABLES).await;
    client.batch_execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')").await.expect("a slot");
    for n in 0..TRANSACTIONS {
        let sql = transaction(&mut random, n);
        client.batch_execute(&sql).await.unwrap_or_else(|error| panic!("{error:?}: {sql}"));
    }
    let mut tables = Vec::new();
    for table in TABLES.into_iter().filter(|table| *table != "unmapped") {
        tables.push(mapped(&client, table).await);
    }
    // The first version, and the newest that the server has.
    let newest = match major {
        14 => 2,
        15 => 3,
        _ => 4,
    };
    for (protocol, binary) in [(1, false), (1, true), (newest, false), (newest, true)] {
        let mut pair = Pair::new(&tables, protocol);
        for message in messages(&client, protocol, binary).await {
            pair.message(&message);
        }
        assert_eq!(pair.subtransactions.is_empty(), protocol == 1);
        let Compared { messages, kinds, values } = pair.compared;
        println!("protocol {protocol}, binary {binary}: messages {messages:?}, cells {kinds:?}, {} types", values.len());
        for tag in ['B', 'C', 'R', 'Y', 'I', 'U', 'D', 'T', 'M'] {
            assert!(messages.contains_key(&tag), "no message {tag}");
        }
        for tag in ['S', 'E', 'c', 'A'] {
            assert_eq!(messages.contains_key(&tag), protocol > 1, "message {tag}");
        }
        for kind in ['n', 'u', if binary { 'b' } else { 't' }] {
            assert!(kinds.contains_key(&kind), "no cell {kind}");
        }
        let missing: Vec<_> =
            tables.iter().flat_map(|table| &table.version.columns).filter(|column| !values.contains_key(&column.declared)).collect();
        assert!(missing.is_empty(), "no value of {missing:?}");
    }
}

#[tokio::test]
async fn both_decoders_agree_on_postgres_14() {
    compare(14).await;
}

#[tokio::test]
async fn both_decoders_agree_on_postgres_15() {
    compare(15).await;
}

#[tokio::test]
async fn both_decoders_agree_on_postgres_17() {
    compare(17).await;
}
