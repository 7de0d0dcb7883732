//! Random histories and what a server sends of them, streamed or not; after its sources (reorderbuffer.c, pgoutput.c).

use crate::connectors::postgres::pgoutput::streamed::tests as streamed;
use crate::connectors::postgres::pgoutput::tests::{begin, commit, logical, relation, row};
use rand::RngExt as _;
use rand::rngs::SmallRng;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Tables: one that is mapped, one that is not.
const TABLES: [u32; 2] = [7, 8];
const EXTRA: [&str; 4] = ["a", "b", "c", "d"];

/// One record of the log.
#[derive(Clone, Debug)]
pub enum Record {
    Insert { xid: u32, subxid: u32, table: u32, id: u32, version: usize },
    Alter { xid: u32, subxid: u32, table: u32 },
    Message { xid: u32, subxid: u32, content: String },
    AbortSub { xid: u32, subxids: Vec<u32> },
    Commit { xid: u32, end: u64 },
    Abort { xid: u32 },
}

/// A transaction that is being made.
struct Open {
    xid: u32,
    /// Subtransactions that are open, the innermost last; each with those inside it that have ended well.
    subs: Vec<(u32, Vec<u32>)>,
    /// Tables that it has altered, with the number of open subtransactions at that time and the version before.
    altered: Vec<(u32, usize, usize)>,
}

/// A random history: up to five transactions at a time.
pub fn history(random: &mut SmallRng, length: usize) -> Vec<Record> {
    let (mut records, mut open): (Vec<Record>, Vec<Open>) = (Vec::new(), Vec::new());
    let mut versions: HashMap<u32, usize> = TABLES.iter().map(|table| (*table, 0)).collect();
    let (mut next, mut end, mut id) = (100, 0x1000, 0);
    while records.len() < length || !open.is_empty() {
        if records.len() < length && (open.is_empty() || (open.len() < 5 && random.random_bool(0.1))) {
            open.push(Open { xid: next, subs: Vec::new(), altered: Vec::new() });
            next += 1;
        }
        let at = random.random_range(0..open.len());
        let locked: Vec<u32> = open
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != at)
            .flat_map(|(_, open)| open.altered.iter().map(|(table, ..)| *table))
            .collect();
        let others = open.len() > 1;
        let transaction = &mut open[at];
        let xid = transaction.xid;
        let subxid = transaction.subs.last().map_or(xid, |(subxid, _)| *subxid);
        let table = TABLES[random.random_range(0..TABLES.len())];
        match random.random_range(0..100) {
            0..60 if !locked.contains(&table) => {
                id += 1;
                records.push(Record::Insert { xid, subxid, table, id, version: versions[&table] });
            }
            // Nobody else may touch the table until the end: easiest when there is nobody else.
            60..64 if !others && !locked.contains(&table) => {
                let version = versions.get_mut(&table).unwrap();
                transaction.altered.push((table, transaction.subs.len(), *version));
                *version = (*version + 1) % (EXTRA.len() + 1);
                records.push(Record::Alter { xid, subxid, table });
            }
            64..68 => records.push(Record::Message { xid, subxid, content: id.to_string() }),
            68..78 if transaction.subs.len() < 4 => {
                transaction.subs.push((next, Vec::new()));
                next += 1;
            }
            78..83 => {
                if let Some((subxid, inside)) = transaction.subs.pop() {
                    let depth = transaction.subs.len();
                    transaction.altered.iter_mut().for_each(|(_, at, _)| *at = (*at).min(depth));
                    if let Some((_, outer)) = transaction.subs.last_mut() {
                        outer.extend(inside);
                        outer.push(subxid);
                    }
                }
            }
            83..88 => {
                if let Some((subxid, mut subxids)) = transaction.subs.pop() {
                    let depth = transaction.subs.len();
                    while let Some((table, _, before)) = transaction.altered.pop_if(|(_, at, _)| *at > depth) {
                        versions.insert(table, before);
                    }
                    subxids.push(subxid);
                    records.push(Record::AbortSub { xid, subxids });
                }
            }
            88..93 => {
                end += random.random_range(6..100);
                records.push(Record::Commit { xid, end });
                open.remove(at);
            }
            93..95 => {
                for (table, _, before) in transaction.altered.iter().rev() {
                    versions.insert(*table, *before);
                }
                records.push(Record::Abort { xid });
                open.remove(at);
            }
            _ => {}
        }
    }
    records
}

/// What a server knows of a transaction.
#[derive(Default)]
struct Queue {
    /// What is not sent yet.
    changes: Vec<Record>,
    was_streamed: bool,
    /// Subtransactions of which something was sent.
    sent: BTreeSet<u32>,
    altered: BTreeSet<u32>,
}

/// What a server has said of a table.
#[derive(Default)]
struct Said {
    to_all: bool,
    in_streamed: BTreeSet<u32>,
}

/// Sends a history.
pub struct Server<'a> {
    queues: BTreeMap<u32, Queue>,
    said: HashMap<u32, Said>,
    random: &'a mut SmallRng,
    /// How likely a transaction is streamed after a record of it.
    streaming: f64,
    pub sent: Vec<Vec<u8>>,
}

impl<'a> Server<'a> {
    /// All messages of a history after a position.
    pub fn send(history: &[Record], after: u64, streaming: f64, random: &'a mut SmallRng) -> Vec<Vec<u8>> {
        let mut server = Self { queues: BTreeMap::new(), said: HashMap::new(), random, streaming, sent: Vec::new() };
        // Nothing is streamed before the position has come.
        let begins = history.iter().rposition(|record| matches!(record, Record::Commit { end, .. } if *end <= after));
        for (at, record) in history.iter().enumerate() {
            server.decode(record, after, begins.is_none_or(|begins| at > begins));
        }
        server.sent
    }

    fn decode(&mut self, record: &Record, after: u64, may_stream: bool) {
        match record {
            Record::Insert { xid, .. } | Record::Alter { xid, .. } | Record::Message { xid, .. } => {
                self.queues.entry(*xid).or_default().changes.push(record.clone());
                if may_stream && self.random.random_bool(self.streaming) {
                    self.stream(*xid);
                }
            }
            Record::AbortSub { xid, subxids } => self.abort_subs(*xid, subxids),
            Record::Abort { xid } => {
                let queue = self.queues.remove(xid).unwrap_or_default();
                if queue.was_streamed {
                    for subxid in queue.sent.iter().filter(|subxid| *subxid != xid) {
                        self.abort(*xid, *subxid);
                    }
                    self.abort(*xid, *xid);
                }
                self.invalidate(&queue.altered);
            }
            Record::Commit { xid, end } => {
                let was_streamed = self.queues.entry(*xid).or_default().was_streamed;
                if was_streamed {
                    self.stream(*xid);
                    self.sent.push(streamed::commit(*xid, *end));
                    for said in self.said.values_mut() {
                        said.to_all |= said.in_streamed.remove(xid);
                    }
                } else if *end > after {
                    self.sent.push(begin(end - 5));
                    self.changes(*xid, false);
                    self.sent.push(commit(*end));
                }
                let queue = self.queues.remove(xid).unwrap_or_default();
                self.invalidate(&queue.altered);
            }
        }
    }

    fn abort_subs(&mut self, xid: u32, subxids: &[u32]) {
        let Some(queue) = self.queues.get_mut(&xid) else { return };
        queue.changes.retain(|change| !matches!(change, Record::Insert { subxid, .. } | Record::Alter { subxid, .. } | Record::Message { subxid, .. } if subxids.contains(subxid)));
        let altered = queue.altered.clone();
        let sent: Vec<u32> = subxids.iter().copied().filter(|subxid| queue.sent.contains(subxid)).collect();
        for subxid in sent {
            self.abort(xid, subxid);
        }
        self.invalidate(&altered);
    }

    fn abort(&mut self, xid: u32, subxid: u32) {
        self.sent.push(streamed::abort(xid, subxid));
        for said in self.said.values_mut() {
            said.in_streamed.remove(&xid);
        }
    }

    fn invalidate(&mut self, tables: &BTreeSet<u32>) {
        for table in tables {
            self.said.insert(*table, Said::default());
        }
    }

    fn stream(&mut self, xid: u32) {
        let queue = self.queues.entry(xid).or_default();
        let is_first = !std::mem::replace(&mut queue.was_streamed, true);
        self.sent.push(streamed::start(xid, is_first));
        self.changes(xid, true);
        self.sent.push(streamed::stop());
        let altered = self.queues[&xid].altered.clone();
        self.invalidate(&altered);
    }

    fn changes(&mut self, xid: u32, in_slice: bool) {
        let changes = std::mem::take(&mut self.queues.entry(xid).or_default().changes);
        for change in changes {
            let (subxid, message) = match change {
                Record::Insert { subxid, table, id, version, .. } => {
                    self.describe(xid, subxid, table, version, in_slice);
                    let mut cells = vec![id.to_string()];
                    cells.extend(EXTRA[..version].iter().map(|name| format!("{name}{id}")));
                    let cells: Vec<Option<&str>> = cells.iter().map(|cell| Some(cell.as_str())).collect();
                    let mut all = vec![cells[0], None];
                    all.extend(&cells[1..]);
                    (subxid, row(b'I', table, &[(b'N', &all)]))
                }
                Record::Alter { subxid, table, .. } => {
                    let queue = self.queues.entry(xid).or_default();
                    queue.sent.insert(subxid);
                    queue.altered.insert(table);
                    self.invalidate(&[table].into());
                    continue;
                }
                Record::Message { subxid, content, .. } => (subxid, logical(true, "sluice", &content)),
                _ => unreachable!("only changes wait"),
            };
            self.queues.entry(xid).or_default().sent.insert(subxid);
            self.sent.push(if in_slice { streamed::inside(subxid, &message) } else { message });
        }
    }

    fn describe(&mut self, xid: u32, subxid: u32, table: u32, version: usize, in_slice: bool) {
        let said = self.said.entry(table).or_default();
        let is_news = if in_slice { said.in_streamed.insert(xid) } else { !std::mem::replace(&mut said.to_all, true) };
        if is_news {
            let mut columns = vec![(1, "id", 23), (0, "v", 25)];
            columns.extend(EXTRA[..version].iter().map(|name| (0, *name, 25)));
            let name = if table == TABLES[0] { "t" } else { "foreign" };
            let message = relation(table, name, b'd', &columns);
            self.sent.push(if in_slice { streamed::inside(subxid, &message) } else { message });
        }
    }
}
