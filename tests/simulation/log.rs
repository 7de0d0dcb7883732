//! The simulated log.

use crate::ahead::{Ahead, Place, Replay};
use crate::faults::Point;
use crate::fence::unreachable;
use crate::history::{KEYLESS_TABLE, Kind, NULL, Row, RowChange, TABLES};
use crate::mutants::Mutant;
use crate::seen::Rare;
use crate::tables::{DIFFERING, definition, number, table};
use crate::world::{Reach, World};
use sluice::connectors::postgres::Lsn;
use sluice::engine::batch::{Batch, Boundary, CellKind, Change, Image, Op, Part};
use sluice::engine::error::Result;
use sluice::engine::roles::ChangeLog;
use sluice::engine::table::{MappedTable, TableVersion};
use std::collections::HashSet;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

static NUMBERS: LazyLock<Vec<String>> = LazyLock::new(|| (0..5000).map(|number| number.to_string()).collect());

/// Hands out a few transactions, or a piece of one.
pub struct SimLog {
    reach: Reach,
    session: usize,
    timeline: i64,
    /// Under which the tables are mapped.
    definitions: [Option<usize>; TABLES],
    next: usize,
    inside: usize,
    limit: usize,
    received: u64,
    /// What it takes until the first row is there.
    begins: Instant,
    quiet_until: Option<Instant>,
    /// The definitions as the log has told them last, and how often it has told one.
    described: [Option<usize>; TABLES],
    announced: u64,
    ahead: Ahead,
}

impl ChangeLog for SimLog {
    type Position = Lsn;

    async fn next(&mut self) -> Result<Part<Lsn>> {
        tokio::time::sleep_until(self.begins).await;
        self.reach.io(Point::Next).await?;
        let reach = self.reach.clone();
        loop {
            let (over, pause) = {
                let mut world = reach.world();
                if world.history.timeline() != self.timeline || !world.source.serves(self.session) {
                    return Err(unreachable());
                }
                let place = Place { next: self.next, received: self.received, definitions: &self.definitions };
                if self.inside == 0
                    && let Some(part) = self.ahead.step(&mut world, &place)
                {
                    return Ok(part);
                }
                let more = self.next < world.history.transactions.len();
                // The link is slow: what is in the log is not here yet.
                if more && world.dice.chance(700) && self.goes_on(&mut world) {
                    break;
                }
                // A keepalive tells the end of the log when everything was received.
                let keepalive = !more && world.dice.chance(500);
                if keepalive || world.breaks(Mutant::JoinOnSilence) && self.inside == 0 && world.dice.chance(100) {
                    self.received = world.history.end;
                    return Ok(Part::idle(Lsn(self.received)));
                }
                world.wear_out(20);
                let World { history, dice, .. } = &mut *world;
                history.step(dice);
                (history.is_over(), if dice.chance(50) { 250 } else { 10 })
            };
            // Kept over calls: a call that is cancelled must not begin to wait anew.
            let pause = Duration::from_millis(if over { 2000 } else { pause });
            let until = *self.quiet_until.get_or_insert_with(|| Instant::now() + pause);
            tokio::time::sleep_until(until).await;
            self.quiet_until = None;
            self.reach.step().await;
        }
        let world = reach.world();
        Ok(self.take(&world))
    }

    fn confirm(&self, durable: &Lsn) {
        let mut world = self.reach.world();
        let flushed = world.server.flushed.position;
        world.require(flushed.is_some_and(|flushed| durable.0 <= flushed), || format!("{durable} was confirmed, {flushed:?} is durable"));
        let is_there = world.history.timeline() == self.timeline && world.source.serves(self.session);
        let confirmed = if world.breaks(Mutant::HoldNotKept) { flushed.unwrap_or(durable.0) } else { durable.0 };
        if let Some(slot) = world.history.slot.as_mut().filter(|_| is_there) {
            slot.confirmed = slot.confirmed.max(confirmed);
        }
    }

    fn want_early(&self, tables: HashSet<u32>) {
        self.ahead.want(tables);
    }

    fn early(&self, attempt: u64, written: bool) -> Result<()> {
        self.ahead.answer(attempt, written)
    }

    fn announced(&self) -> u64 {
        self.announced
    }

    fn received(&self) -> (Lsn, Lsn) {
        (Lsn(self.received), Lsn(self.reach.world().history.end))
    }
}

impl Drop for SimLog {
    fn drop(&mut self) {
        self.reach.leave_source(self.session);
    }
}

impl SimLog {
    /// After a position, on a session that has taken the source.
    pub fn open(reach: Reach, session: usize, timeline: i64, from: u64, tables: &[MappedTable], limit: usize) -> Self {
        let mut definitions = [None; TABLES];
        tables.iter().for_each(|table| definitions[number(table)] = Some(definition(table)));
        let next = reach.world().history.transactions.partition_point(|transaction| transaction.commit_start < from);
        Self {
            reach,
            session,
            timeline,
            definitions,
            next,
            inside: 0,
            limit,
            received: from,
            begins: Instant::now() + Duration::from_millis(250),
            quiet_until: None,
            described: [None; TABLES],
            announced: 0,
            ahead: Ahead::default(),
        }
    }

    /// Whether the next transaction can be handed over; of some a beginning is written already.
    fn goes_on(&mut self, world: &mut World) -> bool {
        let Some(transaction) = world.history.transactions.get(self.next).filter(|_| self.inside == 0) else { return true };
        match self.ahead.replay(transaction.number) {
            Replay::Waits => return false,
            Replay::Whole => {}
            Replay::Rest(handed) => {
                self.inside = handed;
                world.seen.note(Rare::RestBehindPieces);
            }
        }
        true
    }

    fn take(&mut self, world: &World) -> Part<Lsn> {
        let mut part = Part { continues: self.inside > 0, ..Part::idle(Lsn(self.received)) };
        while let Some(transaction) = world.history.transactions.get(self.next) {
            if !part.boundaries.is_empty() && self.ahead.concerns(&world.history, transaction) {
                break;
            }
            while let Some(change) = transaction.changes.get(self.inside) {
                if part.batch.changes().len() >= self.limit {
                    part.open = true;
                    let early = u64::from(world.breaks(Mutant::OpenTransactionByGreater));
                    part.open_from = Some(Lsn(transaction.commit_start - early));
                    return part;
                }
                self.inside += 1;
                if change.published && !matches!(change.kind, Kind::Alter) {
                    let described = self.described[change.table].replace(change.definition);
                    self.announced += u64::from(described != Some(change.definition));
                    let is_mapped = self.definitions[change.table].is_none_or(|mapped| mapped == change.definition);
                    let version = if is_mapped {
                        &table(change.table, change.definition).version
                    } else {
                        &DIFFERING[change.table][change.definition]
                    };
                    push(&mut part.batch, version, change, world.history.full_images);
                }
            }
            let end = if world.breaks(Mutant::BeginInsteadOfEnd) { transaction.commit_start } else { transaction.end };
            part.boundaries.push(Boundary { changes: part.batch.changes().len(), end: Lsn(end), committed_at: SystemTime::UNIX_EPOCH });
            part.received = Lsn(end);
            self.received = transaction.end;
            self.next += 1;
            self.inside = 0;
            if part.continues || part.batch.changes().len() + 2 > self.limit {
                break;
            }
        }
        part
    }
}

/// As pgoutput sends it: the old key where it has changed or else the whole old row, no value for what is large and unchanged.
pub fn push(batch: &mut Batch, version: &Arc<TableVersion>, change: &RowChange, full_images: bool) {
    let has_key = change.table != KEYLESS_TABLE;
    let number = |batch: &mut Batch, number: u32| match NUMBERS.get(number as usize) {
        Some(text) => batch.push_cell(CellKind::Text, text.as_bytes()),
        None if number == NULL => batch.push_cell(CellKind::Null, b""),
        None => batch.push_cell(CellKind::Text, number.to_string().as_bytes()),
    };
    let image = |batch: &mut Batch, key: usize, values: [Option<u32>; 3]| {
        let image = batch.begin_image();
        number(batch, if has_key { key as u32 } else { NULL });
        for value in values {
            match value {
                Some(value) => number(batch, value),
                None => batch.push_cell(CellKind::Unchanged, b""),
            }
        }
        batch.end_image(image)
    };
    let whole = |batch: &mut Batch, key: usize, row: Row| image(batch, key, [row.unique, row.value, row.toast].map(Some));
    let full = change.before.filter(|_| full_images || !has_key);
    let old_image = |batch: &mut Batch, key: usize| match full {
        Some(row) => whole(batch, key, row),
        None => image(batch, key, [Some(NULL); 3]),
    };
    let mut group = 0;
    let (op, old, new) = match change.kind {
        Kind::Insert { key, row } => (Op::Insert, Image::ABSENT, whole(batch, key, row)),
        Kind::Update { old, key, row, toast_sent } => {
            let before = if old == key && full.is_none() { Image::ABSENT } else { old_image(batch, old) };
            let toast = toast_sent.then_some(row.toast);
            (Op::Update, before, image(batch, key, [Some(row.unique), Some(row.value), toast]))
        }
        Kind::Delete { key } => (Op::Delete, old_image(batch, key), Image::ABSENT),
        Kind::Truncate { group: of } => {
            group = of;
            (Op::Truncate, Image::ABSENT, Image::ABSENT)
        }
        Kind::Alter => return,
    };
    let table = batch.intern_table(version);
    batch.push(Change { op, table, old, old_is_full: full.is_some() && old.is_present(), new, group });
}
