use super::history::{Record, Server, history};
use super::*;
use crate::connectors::postgres::log::early::Pace;
use crate::connectors::postgres::pgoutput::streamed::{Framing, tests as streamed};
use crate::connectors::postgres::pgoutput::tests::{COLUMNS, begin, commit, relation, row, show, table};
use crate::engine::roles::BatchLimits;
use crate::engine::spill::{Disk, Spill};
use crate::engine::table::Identity;
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use std::sync::Arc;
use std::time::Duration;

pub(super) const LIMITS: BatchLimits = BatchLimits { rows: 3, bytes: 1 << 20, delay: Duration::from_secs(1) };

fn feed(spill: Spill) -> Feed {
    let assembler = Assembler::new(Decoder::new(&[table(Identity::Key)]), LIMITS, Lsn(1));
    Feed::new(assembler, Streams::new(spill), Early::new(Arc::default(), Pace::default()))
}

/// Gives a message and replays what it ends.
fn give(feed: &mut Feed, message: &[u8], out: &mut Vec<Part<Lsn>>) -> Result<(), Trouble> {
    let now = Instant::now();
    feed.message(message, now, out)?;
    while feed.is_replaying() {
        feed.replay(now, out)?;
    }
    Ok(())
}

/// What parts hold, one line per transaction; and the promises of parts are kept.
pub(super) fn transactions(parts: &[Part<Lsn>]) -> Vec<String> {
    let (mut all, mut rows, mut open_from) = (Vec::new(), Vec::new(), None);
    let mut last = Lsn(0);
    for part in parts {
        assert_eq!(part.continues, open_from.is_some());
        assert!(part.batch.changes().len() <= LIMITS.rows);
        assert!(!part.continues || part.boundaries.len() <= 1);
        let mut boundaries = part.boundaries.iter().peekable();
        for (index, change) in part.batch.changes().iter().enumerate() {
            while let Some(boundary) = boundaries.next_if(|boundary| boundary.changes <= index) {
                all.extend(transaction(&mut rows, boundary.end));
            }
            let version = part.batch.table(change);
            rows.push(format!("{}({})", version.differs.as_deref().unwrap_or_default(), show(&part.batch, change.new)));
        }
        for boundary in boundaries {
            all.extend(transaction(&mut rows, boundary.end));
        }
        for boundary in &part.boundaries {
            assert!(boundary.end > last && open_from.is_none_or(|from| from < boundary.end));
            last = boundary.end;
        }
        assert!(part.open_from.is_none_or(|from| from >= last));
        if let Some(heartbeat) = &part.heartbeat {
            all.push(format!("{} at {}", heartbeat.content, heartbeat.end));
        }
        open_from = part.open_from;
    }
    assert!(open_from.is_none() && rows.is_empty());
    all
}

/// Runs of transactions without rows keep only their last end: they are left out.
pub(super) fn transaction(rows: &mut Vec<String>, end: Lsn) -> Option<String> {
    (!rows.is_empty()).then(|| format!("{end}: {}", std::mem::take(rows).join(" ")))
}

/// The parts of all messages, the last one included.
pub(super) fn parts(messages: &[Vec<u8>], spill: Spill) -> Result<(Vec<Part<Lsn>>, Feed), Trouble> {
    let (mut feed, mut out) = (feed(spill), Vec::new());
    messages.iter().try_for_each(|message| give(&mut feed, message, &mut out))?;
    out.extend(feed.assembler.take_whole());
    Ok((out, feed))
}

/// The transactions of a history as a server sends them that streams none.
fn unstreamed(history: &[Record], random: &mut SmallRng) -> Vec<String> {
    let messages = Server::send(history, 0, 0.0, random);
    rows_only(transactions(&parts(&messages, Spill::open(0, None)).unwrap().0))
}

/// How what becomes of messages differs from what is expected, or what of them stays behind.
fn difference(messages: &[Vec<u8>], spill: Spill, expected: &[String]) -> Option<String> {
    let (parts, feed) = match parts(messages, spill) {
        Ok(taken) => taken,
        Err(trouble) => return Some(format!("{trouble:?}")),
    };
    let (found, left) = (rows_only(transactions(&parts)), feed.streams.taken_bytes());
    (found != expected || left > 0).then(|| format!("{left} bytes are left; {found:#?} and not {expected:#?}"))
}

/// Messages of our own come once per part: which part depends on its cut.
pub(super) fn rows_only(transactions: Vec<String>) -> Vec<String> {
    transactions.into_iter().filter(|line| line.contains(':')).collect()
}

/// How often what is tested has happened.
#[derive(Default)]
struct Seen {
    aborts: usize,
    slices: usize,
    alterations: usize,
    overflows: usize,
    on_disk: usize,
}

#[test]
fn a_streamed_history_gives_what_the_unstreamed_gives() {
    let first: u64 = std::env::var("SLUICE_SEED").map_or_else(|_| rand::random::<u32>().into(), |seed| seed.parse().unwrap());
    println!("seeds from {first}");
    let mut seen = Seen::default();
    for seed in first..first + 2500 {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| compare(seed, &mut seen)));
        assert!(outcome.is_ok(), "SLUICE_SEED={seed} shows it");
    }
    let Seen { aborts, slices, alterations, overflows, on_disk } = seen;
    assert!(
        aborts > 600 && slices > 6000 && alterations > 300 && overflows > 200 && on_disk > 60,
        "{aborts} {slices} {alterations} {overflows} {on_disk}"
    );
}

fn compare(seed: u64, seen: &mut Seen) {
    let mut random = SmallRng::seed_from_u64(seed);
    let length = random.random_range(1..120);
    let history = history(&mut random, length);
    let expected = unstreamed(&history, &mut random);

    let likely = *[0.05, 0.3, 1.0].get(random.random_range(0..3usize)).unwrap();
    let messages = Server::send(&history, 0, likely, &mut random);
    seen.alterations += history.iter().filter(|record| matches!(record, Record::Alter { .. })).count();
    seen.aborts += messages.iter().filter(|message| message[0] == b'A').count();
    seen.slices += messages.iter().filter(|message| message[0] == b'S').count();

    let in_memory = Spill::open(1 << 20, None);
    assert_eq!(difference(&messages, in_memory, &expected), None);

    if random.random_bool(0.1) {
        let folder = tempfile::tempdir().unwrap();
        let disk = Disk { folder: folder.path().join("spill"), limit: 1 << 20 };
        assert_eq!(difference(&messages, Spill::open(0, Some(&disk)), &expected), None);
        seen.on_disk += 1;
    }
    if likely > 0.05 && random.random_bool(0.5) {
        seen.overflows += usize::from(overflow(&history, &messages, &expected, &mut random));
    }
}

/// There is room for some open transactions only, then for none: another connection goes on without streaming, later one with it.
fn overflow(history: &[Record], messages: &[Vec<u8>], expected: &[String], random: &mut SmallRng) -> bool {
    let chunks = random.random_range(0..3);
    let (mut feed, mut out) = (feed(Spill::open(chunks * 64 * 1024, None)), Vec::new());
    for message in messages {
        match give(&mut feed, message, &mut out) {
            Ok(()) => {}
            Err(Trouble::Stream(error)) => panic!("{error}"),
            Err(Trouble::NoRoom(no_room)) => {
                assert!(no_room.bytes > 0);
                out.extend(feed.assembler.take_whole());
                feed.reconnect(Decoder::new(&[table(Identity::Key)]), &mut out);
                assert_eq!(feed.streams.taken_bytes(), 0);
                let again = Server::send(history, feed.assembler.received().0, 0.0, random);
                let (now, later) = again.split_at(random.random_range(0..=again.len()));
                now.iter().for_each(|message| give(&mut feed, message, &mut out).unwrap());
                if feed.assembler.is_inside() {
                    later.iter().for_each(|message| give(&mut feed, message, &mut out).unwrap());
                } else {
                    feed.reconnect(Decoder::new(&[table(Identity::Key)]), &mut out);
                    let rest = Server::send(history, feed.assembler.received().0, 0.0, random);
                    rest.iter().for_each(|message| give(&mut feed, message, &mut out).unwrap());
                }
                out.extend(feed.assembler.take_whole());
                assert_eq!(rows_only(transactions(&out)), expected);
                return true;
            }
        }
    }
    false
}

/// A test of the test: with either rule broken (a roll-back of a subtransaction is ignored, or one of a whole transaction), the comparison
/// shows it. Ignoring a message is the same as never hearing it.
#[test]
fn an_ignored_roll_back_is_noticed() {
    for whole in [false, true] {
        let is_ignored = |message: &Vec<u8>| match Framing::read(message).unwrap() {
            Some(Framing::Abort { xid, subxid }) => (xid == subxid) == whole,
            _ => false,
        };
        let (mut ignored, mut noticed) = (0, 0);
        for seed in 0..300 {
            let mut random = SmallRng::seed_from_u64(seed);
            let history = history(&mut random, 100);
            let expected = unstreamed(&history, &mut random);
            let messages = Server::send(&history, 0, 0.5, &mut random);
            assert_eq!(difference(&messages, Spill::open(1 << 20, None), &expected), None);
            let heard: Vec<Vec<u8>> = messages.iter().filter(|message| !is_ignored(message)).cloned().collect();
            ignored += usize::from(heard.len() < messages.len());
            noticed += usize::from(difference(&heard, Spill::open(1 << 20, None), &expected).is_some());
        }
        // Some roll back nothing but rows of other tables.
        assert!(ignored > 100 && noticed * 10 > ignored * 7, "whole {whole}: {noticed} of {ignored} were noticed");
    }
}

#[test]
fn the_last_message_of_our_own_counts_unless_it_was_rolled_back() {
    let message =
        |subxid, content| streamed::inside(subxid, &crate::connectors::postgres::pgoutput::tests::logical(true, "sluice", content));
    let messages = [
        streamed::start(5, true),
        message(5, "first"),
        message(6, "kept"),
        message(7, "rolled back"),
        streamed::stop(),
        streamed::abort(5, 7),
        streamed::commit(5, 0x20),
    ];
    let heartbeat = parts(&messages, Spill::open(1 << 20, None)).unwrap().0[0].heartbeat.clone().unwrap();
    assert_eq!((heartbeat.content.as_str(), heartbeat.end), ("kept", Lsn(0x20)));
}

#[test]
fn a_large_streamed_transaction_comes_in_open_parts() {
    let mut messages = vec![streamed::start(5, true), streamed::inside(5, &relation(7, "t", b'd', &COLUMNS))];
    messages.extend((0..7).map(|id| streamed::inside(5, &row(b'I', 7, &[(b'N', &[Some(&id.to_string()), None])]))));
    messages.extend([streamed::stop(), begin(0xB), commit(0x10), streamed::commit(5, 0x20)]);
    let (parts, _) = parts(&messages, Spill::open(1 << 20, None)).unwrap();
    let shown: Vec<_> = parts.iter().map(|part| (part.batch.changes().len(), part.open_from, part.continues, part.received)).collect();
    let from = Some(Lsn(0x1B));
    assert_eq!(shown, [(3, from, false, Lsn(0x10)), (3, from, true, Lsn(0x10)), (1, None, true, Lsn(0x20))]);
}

#[test]
fn a_keepalive_counts_while_transactions_are_open_but_not_inside_a_slice() {
    let (mut feed, mut out) = (feed(Spill::open(1 << 20, None)), Vec::new());
    give(&mut feed, &streamed::start(5, true), &mut out).unwrap();
    feed.keepalive(Lsn(0x10));
    assert_eq!(feed.assembler.received(), Lsn(1));
    give(&mut feed, &streamed::stop(), &mut out).unwrap();
    feed.keepalive(Lsn(0x10));
    assert_eq!(feed.assembler.idle(), Some(Lsn(0x10)));
    // Nor while a transaction that has ended is not handed over whole.
    feed.message(&streamed::commit(5, 0x20), Instant::now(), &mut out).unwrap();
    feed.keepalive(Lsn(0x30));
    assert_eq!((feed.assembler.idle(), feed.assembler.received()), (None, Lsn(0x10)));
    feed.replay(Instant::now(), &mut out).unwrap();
    assert!(!feed.is_replaying());
    assert_eq!(feed.assembler.received(), Lsn(0x20));
}

#[test]
fn slices_out_of_order_are_violations() {
    let row = || streamed::inside(5, &row(b'I', 7, &[(b'N', &[Some("1"), None])]));
    for messages in [
        vec![streamed::stop()],
        vec![streamed::start(5, false)],
        vec![streamed::commit(5, 0x20)],
        vec![streamed::start(5, true), streamed::start(6, true)],
        vec![streamed::start(5, true), streamed::abort(5, 5)],
        vec![streamed::start(5, true), streamed::stop(), streamed::start(5, true)],
        vec![begin(0xB), streamed::start(5, true)],
        vec![streamed::start(5, true), streamed::stop(), begin(0xB), streamed::commit(5, 0x20)],
        vec![streamed::start(5, true), streamed::inside(5, &begin(0xB)), streamed::stop(), streamed::commit(5, 0x20)],
        // A row before its relation, also when the relation was rolled back.
        vec![streamed::start(5, true), row(), streamed::stop(), streamed::commit(5, 0x20)],
        vec![
            streamed::start(5, true),
            streamed::inside(6, &relation(7, "t", b'd', &COLUMNS)),
            row(),
            streamed::stop(),
            streamed::abort(5, 6),
            streamed::commit(5, 0x20),
        ],
    ] {
        let (mut feed, mut out) = (feed(Spill::open(1 << 20, None)), Vec::new());
        let error = messages.iter().find_map(|message| give(&mut feed, message, &mut out).err());
        assert!(matches!(&error, Some(Trouble::Stream(error)) if error.reason == reason::PROTOCOL_VIOLATION), "{messages:?}: {error:?}");
    }
    // Nothing is known of a transaction of which nothing was sent.
    give(&mut feed(Spill::open(0, None)), &streamed::abort(5, 5), &mut Vec::new()).unwrap();
}
