//! Random histories of which rows go ahead of their transaction's end, against a consumer that answers late, refuses, and keeps what it
//! has written as a target would.

use super::history::{Record, Server, history};
use super::tests::{LIMITS, parts, rows_only, transaction, transactions};
use super::*;
use crate::connectors::postgres::log::desk::Desk;
use crate::connectors::postgres::log::early::{AHEAD, Pace};
use crate::connectors::postgres::pgoutput::streamed::tests as streamed;
use crate::connectors::postgres::pgoutput::tests::{COLUMNS, relation, row, show, table};
use crate::engine::batch::Early as Mark;
use crate::engine::spill::{Disk, Spill};
use crate::engine::table::{Identity, TableVersion};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

const PACE: Pace = Pace { begins_at: 1, rows_behind: 1, share: 1, idle: Duration::from_secs(5) };

fn feed(spill: Spill, pace: Pace) -> (Feed, Arc<Desk>) {
    let mapped = table(Identity::Key);
    let desk = Arc::new(Desk::default());
    desk.want([mapped.version.id].into());
    let assembler = Assembler::new(Decoder::new(&[mapped]), LIMITS, Lsn(1));
    (Feed::new(assembler, Streams::new(spill), Early::new(Arc::clone(&desk), pace)), desk)
}

/// How often what is tested has happened.
#[derive(Debug, Default)]
struct Seen {
    pieces: usize,
    refused: usize,
    dropped: usize,
    rests: usize,
    aborted: usize,
    reconnects: usize,
}

/// What the history says of rows, by the text of their key.
struct Facts {
    /// The transaction, and the place in the history.
    rows: HashMap<String, (u32, usize)>,
    /// Ends of transactions that have rows, with their places in the history.
    ends: Vec<(u64, usize)>,
}

impl Facts {
    fn of(history: &[Record], expected: &[String]) -> Self {
        let insert = |(place, record): (usize, &Record)| match record {
            Record::Insert { xid, id, .. } => Some((id.to_string(), (*xid, place))),
            _ => None,
        };
        let has_rows = |end: u64| expected.iter().any(|line| line.starts_with(&format!("{}: ", Lsn(end))));
        let end = |(place, record): (usize, &Record)| match record {
            Record::Commit { end, .. } if has_rows(*end) => Some((*end, place)),
            _ => None,
        };
        Self { rows: history.iter().enumerate().filter_map(insert).collect(), ends: history.iter().enumerate().filter_map(end).collect() }
    }
}

/// A target with transactions.
struct Consumer<'a> {
    facts: &'a Facts,
    desk: &'a Desk,
    queue: VecDeque<Part<Lsn>>,
    committed: Vec<String>,
    /// Ends of those.
    ends: Vec<Lsn>,
    open: Option<Vec<String>>,
    /// The transaction whose pieces are written.
    early: Option<(u64, u32, Vec<String>)>,
    /// How likely a piece is refused.
    refusing: f64,
    /// Versions in the last piece, when it was not full.
    cut_short: Option<Vec<Arc<TableVersion>>>,
}

impl Consumer<'_> {
    fn take(&mut self, random: &mut SmallRng, seen: &mut Seen) {
        let Some(part) = self.queue.pop_front() else { return };
        match part.early {
            Some(Mark::Dropped) => {
                assert!(part.batch.is_empty());
                seen.dropped += 1;
                self.early = None;
                self.cut_short = None;
            }
            Some(Mark::Piece { attempt }) => self.piece(&part, attempt, random, seen),
            None => self.part(&part, seen),
        }
    }

    fn piece(&mut self, part: &Part<Lsn>, attempt: u64, random: &mut SmallRng, seen: &mut Seen) {
        seen.pieces += 1;
        assert!(part.open && part.boundaries.is_empty() && part.heartbeat.is_none());
        self.goes_on(part);
        let rows = part.batch.changes().len();
        assert!((1..=LIMITS.rows).contains(&rows), "{rows} rows");
        self.cut_short = (rows < LIMITS.rows).then(|| part.batch.tables().to_vec());
        let keys = || part.batch.changes().iter().map(|change| key(&part.batch, change.new));
        let facts: Vec<(u32, usize)> = keys().map(|key| self.facts.rows[&key]).collect();
        let (xid, last) = *facts.last().unwrap();
        assert!(facts.iter().all(|(other, _)| *other == xid), "of one transaction");
        for (end, place) in &self.facts.ends {
            assert!(*place > last || self.ends.contains(&Lsn(*end)), "what ended before its rows were written goes before a piece");
        }
        if !part.continues {
            assert!(self.early.is_none(), "one at a time");
            self.early = Some((attempt, xid, Vec::new()));
        }
        if let Some((present, _, rows)) = self.early.as_mut().filter(|(present, ..)| *present == attempt) {
            if !random.random_bool(self.refusing) {
                rows.extend(shown(part, 0..part.batch.changes().len()));
                return self.desk.answer(*present, true).unwrap();
            }
            self.early = None;
        }
        seen.refused += 1;
        self.cut_short = None;
        self.desk.answer(attempt, false).unwrap();
    }

    /// A piece that is not full ends where a table of which it holds rows is described anew: what follows holds rows under that.
    fn goes_on(&mut self, next: &Part<Lsn>) {
        let Some(before) = self.cut_short.take() else { return };
        let is_anew = |version: &Arc<TableVersion>| before.iter().any(|old| old.id == version.id && !Arc::ptr_eq(old, version));
        assert!(next.batch.tables().iter().any(is_anew), "pieces are full");
    }

    fn part(&mut self, part: &Part<Lsn>, seen: &mut Seen) {
        if part.continues && self.open.is_none() {
            seen.rests += 1;
            self.goes_on(part);
            self.open = Some(self.early.take().expect("what went ahead is written").2);
        }
        assert_eq!(part.continues, self.open.is_some());
        let mut rows = self.open.take().unwrap_or_default();
        let mut from = 0;
        for boundary in &part.boundaries {
            rows.extend(shown(part, from..boundary.changes));
            from = boundary.changes;
            self.committed.extend(transaction(&mut rows, boundary.end));
            self.ends.push(boundary.end);
        }
        rows.extend(shown(part, from..part.batch.changes().len()));
        assert!(part.open || rows.is_empty());
        self.open = part.open.then_some(rows);
    }

    /// The transaction whose pieces will be written when all that waits is taken.
    fn early_at_end(&self) -> Option<u32> {
        let mut early = self.early.as_ref().map(|(_, xid, _)| *xid);
        let mut open = self.open.is_some();
        for part in &self.queue {
            match part.early {
                Some(Mark::Dropped) => early = None,
                // Of what was refused nothing is written.
                Some(Mark::Piece { .. }) if part.continues => {}
                Some(Mark::Piece { .. }) => early = Some(self.facts.rows[&key(&part.batch, part.batch.changes()[0].new)].0),
                None => {
                    // The rest of it comes.
                    early.take_if(|_| part.continues && !open);
                    open = part.open;
                }
            }
        }
        early
    }
}

fn key(batch: &crate::engine::batch::Batch, image: crate::engine::batch::Image) -> String {
    String::from_utf8(batch.bytes(batch.cells(image)[0]).to_vec()).unwrap()
}

fn shown(part: &Part<Lsn>, changes: std::ops::Range<usize>) -> impl Iterator<Item = String> {
    part.batch.changes()[changes].iter().map(|change| {
        let version = part.batch.table(change);
        format!("{}({})", version.differs.as_deref().unwrap_or_default(), show(&part.batch, change.new))
    })
}

#[test]
fn rows_that_go_ahead_change_nothing() {
    let first: u64 = std::env::var("SLUICE_SEED").map_or_else(|_| rand::random::<u32>().into(), |seed| seed.parse().unwrap());
    println!("seeds from {first}");
    let mut seen = Seen::default();
    for seed in first..first + 1500 {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| compare(seed, &mut seen)));
        assert!(outcome.is_ok(), "SLUICE_SEED={seed} shows it");
    }
    println!("{seen:?}");
    let enough = seen.pieces > 1000 && seen.refused > 100 && seen.dropped > 200 && seen.rests > 200 && seen.aborted > 100;
    assert!(enough && seen.reconnects > 100);
}

fn compare(seed: u64, seen: &mut Seen) {
    let mut random = SmallRng::seed_from_u64(seed);
    let random = &mut random;
    let length = random.random_range(20..200);
    let history = history(random, length);
    let unstreamed = Server::send(&history, 0, 0.0, random);
    let expected = rows_only(transactions(&parts(&unstreamed, Spill::open(0, None)).unwrap().0));
    let facts = Facts::of(&history, &expected);
    let messages = Server::send(&history, 0, 0.7, random);

    let folder = random.random_bool(0.1).then(|| tempfile::tempdir().unwrap());
    let disk = folder.as_ref().map(|folder| Disk { folder: folder.path().join("spill"), limit: 1 << 20 });
    let spill = Spill::open(if disk.is_some() { 0 } else { 1 << 20 }, disk.as_ref());
    let (mut feed, desk) = feed(spill, PACE);
    let (queue, committed, ends) = (VecDeque::new(), Vec::new(), Vec::new());
    let refusing = *[0.0, 0.2].get(random.random_range(0..2usize)).unwrap();
    let mut consumer = Consumer { facts: &facts, desk: &desk, queue, committed, ends, open: None, early: None, refusing, cut_short: None };
    let mut clock = Instant::now();

    let end = if random.random_bool(0.2) { random.random_range(0..=messages.len()) } else { messages.len() };
    messages[..end].iter().for_each(|message| give(&mut feed, &mut consumer, message, &mut clock, random, seen));
    if end < messages.len() && !feed.assembler.is_inside() {
        seen.reconnects += 1;
        let mut out: Vec<Part<Lsn>> = feed.assembler.take_whole().into_iter().collect();
        feed.reconnect(Decoder::new(&[table(Identity::Key)]), &mut out);
        consumer.queue.extend(out);
        assert_eq!(consumer.early_at_end(), None);
        let rest = Server::send(&history, feed.assembler.received().0, 0.0, random);
        rest.iter().for_each(|message| give(&mut feed, &mut consumer, message, &mut clock, random, seen));
    } else {
        messages[end..].iter().for_each(|message| give(&mut feed, &mut consumer, message, &mut clock, random, seen));
    }
    consumer.queue.extend(feed.assembler.take_whole());
    while !consumer.queue.is_empty() {
        consumer.take(random, seen);
    }
    assert_eq!(rows_only(consumer.committed), expected);
    assert!(consumer.open.is_none() && consumer.early.is_none());
    assert_eq!(feed.streams.taken_bytes(), 0, "nothing is left");
}

fn give(feed: &mut Feed, consumer: &mut Consumer<'_>, message: &[u8], clock: &mut Instant, random: &mut SmallRng, seen: &mut Seen) {
    let (before, mut out) = (consumer.early_at_end(), Vec::new());
    feed.message(message, *clock, &mut out).unwrap();
    consumer.queue.extend(out.drain(..));
    if message[0] == b'A' {
        let xid = u32::from_be_bytes(message[1..5].try_into().unwrap());
        seen.aborted += usize::from(before == Some(xid));
        assert_ne!(consumer.early_at_end(), Some(xid), "the consumer hears of a roll-back before anything else");
    }
    while feed.is_replaying() {
        if feed.wait_for_answers(Duration::ZERO) {
            assert!(!consumer.queue.is_empty(), "pieces wait for their answers");
            consumer.take(random, seen);
        } else {
            feed.replay(*clock, &mut out).unwrap();
            consumer.queue.extend(out.drain(..));
        }
    }
    if random.random_bool(0.5) {
        *clock += Duration::from_millis(if random.random_bool(0.01) { 6000 } else { 1 });
        if let Some(piece) = feed.early(*clock) {
            consumer.queue.extend(feed.assembler.take_whole());
            consumer.queue.push_back(piece);
        }
    }
    for _ in 0..random.random_range(0..3) {
        consumer.take(random, seen);
    }
}

fn insert(id: u32) -> Vec<u8> {
    streamed::inside(5, &row(b'I', 7, &[(b'N', &[Some(&id.to_string()), None])]))
}

/// An open transaction with some rows, as slices.
fn begun(feed: &mut Feed, rows: u32) {
    let mut messages = vec![streamed::start(5, true), streamed::inside(5, &relation(7, "t", b'd', &COLUMNS))];
    messages.extend((0..rows).map(insert));
    messages.push(streamed::stop());
    messages.iter().for_each(|message| feed.message(message, Instant::now(), &mut Vec::new()).unwrap());
}

#[test]
fn a_row_goes_ahead_when_enough_others_have_followed_it() {
    let pace = Pace { rows_behind: 4, ..PACE };
    for (rows, expected) in [(6, 0), (7, 1), (9, 1), (10, 2)] {
        let (mut feed, desk) = feed(Spill::open(1 << 20, None), pace);
        begun(&mut feed, rows);
        let pieces = std::iter::from_fn(|| {
            let piece = feed.early(Instant::now())?;
            let Some(Mark::Piece { attempt }) = piece.early else { panic!("{piece:?}") };
            desk.answer(attempt, true).unwrap();
            Some(piece)
        });
        assert_eq!(pieces.count(), expected, "of {rows} rows");
    }
}

#[test]
fn no_more_than_some_pieces_wait_for_their_answers() {
    let (mut feed, desk) = feed(Spill::open(1 << 20, None), PACE);
    begun(&mut feed, 30);
    let now = Instant::now();
    let first = feed.early(now).unwrap();
    assert_eq!(1 + std::iter::from_fn(|| feed.early(now)).count() as u64, AHEAD);
    let Some(Mark::Piece { attempt }) = first.early else { panic!("{first:?}") };
    desk.answer(attempt, true).unwrap();
    assert!(feed.early(now).is_some() && feed.early(now).is_none());
}

#[test]
fn a_transaction_of_which_nothing_more_comes_is_rolled_back_on_the_target() {
    let (mut feed, desk) = feed(Spill::open(1 << 20, None), PACE);
    begun(&mut feed, 7);
    let start = Instant::now();
    let piece = feed.early(start).unwrap();
    let Some(Mark::Piece { attempt }) = piece.early else { panic!("{piece:?}") };
    assert!(feed.early(start).is_some());
    assert!(feed.early(start + 2 * PACE.idle).is_none(), "the target is slow");
    (0..2).for_each(|_| desk.answer(attempt, true).unwrap());
    assert!(feed.early(start + 2 * PACE.idle).is_none(), "it has just answered");
    let end = feed.early(start + 3 * PACE.idle).unwrap();
    assert_eq!(end.early, Some(Mark::Dropped));
    // It comes whole, and is not begun with again.
    let mut out = Vec::new();
    let more: Vec<Vec<u8>> = [vec![streamed::start(5, false)], (7..20).map(insert).collect(), vec![streamed::stop()]].concat();
    more.iter().for_each(|message| feed.message(message, start, &mut out).unwrap());
    assert!(feed.early(start + 3 * PACE.idle).is_none());
    feed.message(&streamed::commit(5, 0x20), start, &mut out).unwrap();
    while feed.is_replaying() {
        feed.replay(start, &mut out).unwrap();
    }
    assert!(!out[0].continues);
    assert_eq!(out.iter().map(|part| part.batch.changes().len()).sum::<usize>(), 20);
}

#[test]
fn what_is_no_wanted_row_ends_the_pieces() {
    let delete = streamed::inside(5, &row(b'D', 7, &[(b'K', &[Some("1"), None])]));
    let (mut feed, desk) = feed(Spill::open(1 << 20, None), PACE);
    begun(&mut feed, 5);
    let mut out = Vec::new();
    let more: Vec<Vec<u8>> = [vec![streamed::start(5, false), delete], (10..20).map(insert).collect(), vec![streamed::stop()]].concat();
    more.iter().for_each(|message| feed.message(message, Instant::now(), &mut out).unwrap());
    let piece = feed.early(Instant::now()).unwrap();
    let Some(Mark::Piece { attempt }) = piece.early else { panic!("{piece:?}") };
    desk.answer(attempt, true).unwrap();
    assert!(feed.early(Instant::now()).is_none());
    feed.message(&streamed::commit(5, 0x20), Instant::now(), &mut out).unwrap();
    while feed.is_replaying() {
        feed.replay(Instant::now(), &mut out).unwrap();
    }
    assert!(out.iter().all(|part| part.continues), "the rest goes on behind the piece");
    assert_eq!(out.iter().map(|part| part.batch.changes().len()).sum::<usize>(), 5 - 3 + 1 + 10);

    // Of tables that are not wanted nothing goes ahead.
    desk.want([].into());
    begun(&mut feed, 30);
    assert!(feed.early(Instant::now()).is_none());
}
