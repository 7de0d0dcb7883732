use super::*;
use crate::connectors::postgres::pgoutput::MESSAGE_PREFIX;
use crate::connectors::postgres::pgoutput::tests::{COLUMNS, begin, commit, logical, relation, row, show, table};
use crate::engine::error::reason;
use crate::engine::table::Identity;
use std::time::Duration;

const LIMITS: BatchLimits = BatchLimits { rows: 3, bytes: 1 << 20, delay: Duration::from_secs(1) };

struct Stream {
    assembler: Assembler,
    out: Vec<Part<Lsn>>,
    now: Instant,
}

impl Stream {
    fn new(limits: BatchLimits) -> Self {
        let assembler = Assembler::new(Decoder::new(&[table(Identity::Key)]), limits, Lsn(1));
        let mut stream = Self { assembler, out: Vec::new(), now: Instant::now() };
        stream.take(&relation(7, "t", b'd', &COLUMNS)).unwrap();
        stream.take(&relation(8, "foreign", b'd', &[])).unwrap();
        stream
    }

    fn take(&mut self, message: &[u8]) -> Result<()> {
        self.assembler.message(message, self.now, &mut self.out)
    }

    /// A transaction with this many rows: its commit record starts 5 before its end.
    fn transaction(&mut self, end: u64, rows: usize) {
        self.take(&begin(end - 5)).unwrap();
        (0..rows).for_each(|row| self.insert(&format!("{end:x}.{row}")));
        self.take(&commit(end)).unwrap();
    }

    fn insert(&mut self, id: &str) {
        self.take(&row(b'I', 7, &[(b'N', &[Some(id), None])])).unwrap();
    }

    /// What was put out: flags, ids and boundaries.
    fn shown(&mut self) -> Vec<String> {
        std::mem::take(&mut self.out).iter().map(describe).collect()
    }
}

fn describe(part: &Part<Lsn>) -> String {
    let ids = part.batch.changes().iter().map(|change| show(&part.batch, change.new).replace(",-", ""));
    let ends = part.boundaries.iter().map(|boundary| format!("{}@{:X}", boundary.changes, boundary.end.0));
    let flags = [(part.continues, "continues "), (part.open, "open ")].into_iter().filter(|(set, _)| *set).map(|(_, flag)| flag);
    let open_from = part.open_from.map(|from| format!(" from {:X}", from.0)).unwrap_or_default();
    format!(
        "{}[{}] [{}] received {:X}{open_from}",
        flags.collect::<String>(),
        ids.collect::<Vec<_>>().join(" "),
        ends.collect::<Vec<_>>().join(" "),
        part.received.0
    )
}

#[test]
fn whole_transactions_gather_up_to_the_limit() {
    let mut stream = Stream::new(LIMITS);
    stream.transaction(0x10, 1);
    stream.transaction(0x20, 1);
    assert!(stream.out.is_empty());
    stream.transaction(0x30, 1);
    assert_eq!(stream.shown(), ["[10.0 20.0 30.0] [1@10 2@20 3@30] received 30"]);
    assert!(stream.assembler.take_whole().is_none());
}

#[test]
fn a_large_transaction_comes_in_pieces_and_ends_a_part() {
    let mut stream = Stream::new(LIMITS);
    stream.transaction(0x10, 1);
    stream.transaction(0x20, 7);
    stream.transaction(0x30, 1);
    let whole = stream.assembler.take_whole().map(|part| describe(&part));
    let expected = [
        "open [10.0 20.0 20.1] [1@10] received 10 from 1B",
        "continues open [20.2 20.3 20.4] [] received 10 from 1B",
        "continues [20.5 20.6] [2@20] received 20",
    ];
    assert_eq!(stream.shown(), expected);
    assert_eq!(whole.as_deref(), Some("[30.0] [1@30] received 30"));
}

#[test]
fn a_transaction_of_exactly_the_limit_is_whole() {
    let mut stream = Stream::new(LIMITS);
    stream.transaction(0x10, 3);
    assert_eq!(stream.shown(), ["[10.0 10.1 10.2] [3@10] received 10"]);
}

#[test]
fn bytes_are_a_limit_too() {
    let mut stream = Stream::new(BatchLimits { bytes: 1, ..LIMITS });
    stream.transaction(0x10, 2);
    assert_eq!(stream.shown(), ["open [10.0] [] received 1 from B", "continues [10.1] [1@10] received 10"]);
}

#[test]
fn whole_transactions_wait_no_longer_than_the_delay() {
    let mut stream = Stream::new(LIMITS);
    stream.transaction(0x10, 1);
    stream.now += LIMITS.delay;
    stream.transaction(0x20, 1);
    assert_eq!(stream.shown(), ["[10.0 20.0] [1@10 2@20] received 20"]);
}

#[test]
fn empty_transactions_leave_their_last_end() {
    let mut stream = Stream::new(LIMITS);
    for end in [0x10, 0x20] {
        stream.transaction(end, 0);
    }
    stream.transaction(0x30, 1);
    for end in [0x40, 0x50] {
        stream.transaction(end, 0);
    }
    stream.take(&begin(0x5B)).unwrap();
    stream.take(&row(b'I', 8, &[(b'N', &[])])).unwrap();
    stream.take(&commit(0x60)).unwrap();
    let part = stream.assembler.take_whole().unwrap();
    assert_eq!(describe(&part), "[30.0] [0@20 1@30 1@60] received 60");
}

#[test]
fn keepalives_count_between_transactions_only() {
    let mut stream = Stream::new(LIMITS);
    stream.assembler.keepalive(Lsn(0x10));
    assert_eq!(stream.assembler.idle(), Some(Lsn(0x10)));
    stream.take(&begin(0x1B)).unwrap();
    stream.assembler.keepalive(Lsn(0x99));
    assert_eq!((stream.assembler.idle(), stream.assembler.received()), (None, Lsn(0x10)));
    stream.take(&commit(0x20)).unwrap();
    assert_eq!(stream.assembler.idle(), None, "a part has to go first");
    stream.assembler.take_whole().unwrap();
    assert_eq!(stream.assembler.idle(), Some(Lsn(0x20)));
}

#[test]
fn a_part_that_was_not_taken_is_extended() {
    let mut stream = Stream::new(LIMITS);
    stream.transaction(0x10, 1);
    let part = stream.assembler.take_whole().unwrap();
    assert!(stream.assembler.can_extend(&part));
    stream.assembler.extend(part, stream.now);
    stream.transaction(0x20, 1);
    let part = stream.assembler.take_whole().unwrap();
    assert_eq!(describe(&part), "[10.0 20.0] [1@10 2@20] received 20");
    // Not the ends of transactions that began in an earlier part, not full ones, and not inside a transaction.
    stream.transaction(0x30, 4);
    stream.transaction(0x40, 3);
    for sealed in &stream.out {
        assert!(!stream.assembler.can_extend(sealed), "{}", describe(sealed));
    }
    stream.take(&begin(0x4B)).unwrap();
    assert!(!stream.assembler.can_extend(&part));
}

#[test]
fn the_last_message_of_our_own_comes_with_the_end_of_its_transaction() {
    let mut stream = Stream::new(LIMITS);
    let said = |part: Option<Part<Lsn>>| part.unwrap().heartbeat.map(|heartbeat| (heartbeat.content, heartbeat.end.0));
    stream.take(&begin(0x1B)).unwrap();
    stream.take(&logical(true, MESSAGE_PREFIX, "a")).unwrap();
    stream.take(&commit(0x20)).unwrap();
    let part = stream.assembler.take_whole().unwrap();
    stream.assembler.extend(part, stream.now);
    stream.transaction(0x30, 1);
    assert_eq!(said(stream.assembler.take_whole()), Some(("a".to_owned(), 0x20)));
    stream.transaction(0x40, 1);
    assert_eq!(said(stream.assembler.take_whole()), None);
    // Not before its transaction has ended.
    stream.take(&begin(0x4B)).unwrap();
    stream.take(&logical(true, MESSAGE_PREFIX, "b")).unwrap();
    (0..4).for_each(|row| stream.insert(&row.to_string()));
    assert_eq!(said(stream.out.pop()), None);
    stream.take(&commit(0x50)).unwrap();
    assert_eq!(said(stream.out.pop()), Some(("b".to_owned(), 0x50)));
}

#[test]
fn what_is_whole_survives_a_failure() {
    let mut stream = Stream::new(LIMITS);
    stream.transaction(0x10, 1);
    stream.take(&begin(0x1B)).unwrap();
    stream.insert("lost");
    let error = stream.take(b"?").unwrap_err();
    assert_eq!(error.reason, reason::PROTOCOL_VIOLATION);
    let part = stream.assembler.finish().unwrap();
    assert_eq!(describe(&part), "[10.0] [1@10] received 10");
    assert!(stream.assembler.finish().is_none());
}

#[test]
fn messages_out_of_order_are_violations() {
    let mut stream = Stream::new(LIMITS);
    for message in [commit(0x10), row(b'I', 7, &[(b'N', &[Some("1"), None])])] {
        assert_eq!(stream.take(&message).unwrap_err().reason, reason::PROTOCOL_VIOLATION);
    }
    stream.take(&begin(0x1B)).unwrap();
    assert_eq!(stream.take(&begin(0x1B)).unwrap_err().reason, reason::PROTOCOL_VIOLATION);
}
