//! The simulated source: slot, snapshots, publication, log.

use crate::faults::{Moment, Point};
use crate::history::{Kind, Oracle, RowChange, TABLES, Tables};
use crate::mutants::Mutant;
use crate::world::{Reach, World};
use sluice::connectors::postgres::Lsn;
use sluice::engine::batch::{Batch, Boundary, CellKind, Change, Image, Op, Part};
use sluice::engine::error::{Error, Result, reason};
use sluice::engine::roles::{
    BatchLimits, BulkFormat, BulkStream, ChangeLog, Fed, LogState, Proof, Range, Selection, Snapshot, Source, SourceIdentity,
};
use sluice::engine::structure::SequenceValue;
use sluice::engine::table::{Column, Identity, MappedTable, QualifiedName, TableVersion};
use std::fmt::Write as _;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// Ranges of each table.
const RANGES: usize = 2;

static MAPPED: LazyLock<[MappedTable; TABLES]> = LazyLock::new(|| std::array::from_fn(mapped));
static NUMBERS: LazyLock<Vec<String>> = LazyLock::new(|| (0..5000).map(|number| number.to_string()).collect());

pub fn number(table: &MappedTable) -> usize {
    table.version.id as usize
}

/// The number of a table of that name.
pub fn by_name(name: &QualifiedName) -> usize {
    MAPPED.iter().position(|table| table.source() == name).expect("a table of the simulation")
}

pub fn table(number: usize) -> &'static MappedTable {
    &MAPPED[number]
}

fn mapped(table: usize) -> MappedTable {
    let column = |name: &str, key| Column {
        name: name.into(),
        type_id: 25,
        type_name: QualifiedName::new("pg_catalog", "text"),
        declared: "text".into(),
        key,
        not_null: key,
        generated: None,
        collation: None,
    };
    let name = QualifiedName::new("public", format!("t{table}"));
    let columns = vec![column("k", true), column("u", false), column("v", false), column("t", false)];
    let version = TableVersion { id: table as u32, name: name.clone(), columns, identity: Identity::Key, differs: None };
    MappedTable {
        version: Arc::new(version),
        target: name,
        generated: Vec::new(),
        excluded: Vec::new(),
        primary_key: vec!["k".into()],
        primary_key_name: None,
        estimated_rows: 8,
        blocks: 4,
        structure: Arc::default(),
    }
}

#[derive(Clone)]
pub struct SimSource(pub Reach);

impl SimSource {
    /// A slot's snapshot: creation waits for the writers that are open, and reads what is committed from the log.
    async fn consistent_point(&self) -> SimSnapshot {
        let writers = self.0.world().history.open_writers();
        let ordinary = self.0.world().breaks(Mutant::OrdinarySnapshot);
        while !ordinary && self.0.world().history.any_open(&writers) {
            self.0.world().seen.waited_for_writers += 1;
            self.0.step().await;
            let mut world = self.0.world();
            let World { history, dice, .. } = &mut *world;
            history.step(dice);
        }
        let mut world = self.0.world();
        // Making a slot writes a record of its own; another source's may not.
        let record = world.dice.chance(600);
        world.history.end += if record { 16 } else { 0 };
        let end = world.history.end;
        world.seen.stalled_at_snapshot += u64::from(world.history.has_stalled());
        let tables =
            if ordinary { world.history.visible() } else { std::array::from_fn(|table| *Oracle::default().at(&world.history, table, end)) };
        SimSnapshot { reach: self.0.clone(), position: Lsn(end), tables }
    }

    async fn publish_now(&self, tables: [bool; TABLES]) -> Result<()> {
        self.0.world().history.published = tables;
        self.0.strike(Point::Publish, Moment::After).await
    }
}

impl Source for SimSource {
    type Position = Lsn;
    type Snapshot = SimSnapshot;
    type Log = SimLog;

    async fn identity(&self) -> Result<SourceIdentity> {
        self.0.io(Point::Identity).await?;
        Ok(SourceIdentity { system_identifier: "1".into(), database: "d".into(), timeline: 1 })
    }

    async fn tables(&self, selection: &Selection) -> Result<Vec<MappedTable>> {
        self.0.io(Point::Tables).await?;
        let Selection::Tables(tables) = selection else { panic!("the simulation selects tables") };
        Ok(tables.iter().map(|selected| table(by_name(&selected.source)).clone()).collect())
    }

    async fn fed(&self, _: &[MappedTable]) -> Result<Vec<Fed>> {
        Ok(Vec::new())
    }

    async fn take<P: Proof>(&self, claim: &mut P) -> Result<()> {
        claim.prove().await
    }

    async fn publish(&self, tables: &[MappedTable]) -> Result<()> {
        self.0.io(Point::Publish).await?;
        let wanted = std::array::from_fn(|number| tables.iter().any(|table| table.version.id as usize == number));
        if self.0.world().breaks(Mutant::PublishAfterSnapshot) {
            self.0.world().late_publication = Some(wanted);
            return Ok(());
        }
        self.publish_now(wanted).await
    }

    async fn published(&self) -> Result<Vec<QualifiedName>> {
        self.0.io(Point::Published).await?;
        let world = self.0.world();
        let published = world.late_publication.unwrap_or(world.history.published);
        Ok(MAPPED.iter().zip(published).filter(|(_, published)| *published).map(|(table, _)| table.source().clone()).collect())
    }

    async fn log_state(&self) -> Result<Option<LogState<Lsn>>> {
        self.0.io(Point::LogState).await?;
        Ok(self.0.world().history.slot.map(|confirmed| LogState { confirmed: Lsn(confirmed), lost: None, active: None }))
    }

    async fn create_log(&self) -> Result<SimSnapshot> {
        self.0.io(Point::CreateLog).await?;
        let snapshot = self.consistent_point().await;
        let before = self.0.world().history.slot.replace(snapshot.position.0);
        self.0.world().require(before.is_none(), || "a slot was made over another".into());
        self.0.strike(Point::CreateLog, Moment::After).await?;
        self.publish_late().await?;
        Ok(snapshot)
    }

    async fn drop_log(&self) -> Result<()> {
        self.0.io(Point::DropLog).await?;
        self.0.world().history.slot = None;
        self.0.strike(Point::DropLog, Moment::After).await
    }

    async fn snapshot(&self) -> Result<SimSnapshot> {
        self.0.io(Point::Snapshot).await?;
        let snapshot = self.consistent_point().await;
        self.publish_late().await?;
        Ok(snapshot)
    }

    async fn open(&self, from: &Lsn, _: &[MappedTable], limits: BatchLimits) -> Result<SimLog> {
        self.0.io(Point::Open).await?;
        self.publish_late().await?;
        let world = self.0.world();
        if world.history.slot.is_none_or(|confirmed| confirmed > from.0) {
            let slot = world.history.slot;
            return Err(Error::stop(reason::CHECKPOINT_BEHIND_SLOT, format!("{from} can't be read, the slot is at {slot:?}")));
        }
        let next = world.history.transactions.partition_point(|transaction| transaction.commit_start < from.0);
        Ok(SimLog { reach: self.0.clone(), next, inside: 0, limit: limits.rows, received: from.0, quiet_until: None })
    }

    async fn left_timeline_at(&self, _: i64) -> Result<Option<Lsn>> {
        Ok(None)
    }

    async fn head(&self) -> Result<Lsn> {
        Ok(Lsn(self.0.world().history.end))
    }

    async fn mark(&self) -> Result<()> {
        self.0.io(Point::Mark).await?;
        {
            let mut world = self.0.world();
            let World { history, dice, .. } = &mut *world;
            history.mark(dice);
        }
        self.0.strike(Point::Mark, Moment::After).await
    }

    async fn sequence_values(&self, _: &MappedTable) -> Result<Vec<SequenceValue>> {
        Ok(Vec::new())
    }

    fn waiting(&self) -> Option<String> {
        None
    }
}

impl SimSource {
    async fn publish_late(&self) -> Result<()> {
        let late = self.0.world().late_publication.take();
        match late {
            Some(tables) => self.publish_now(tables).await,
            None => Ok(()),
        }
    }
}

pub struct SimSnapshot {
    reach: Reach,
    position: Lsn,
    tables: Tables,
}

impl Snapshot for SimSnapshot {
    type Position = Lsn;

    fn position(&self) -> &Lsn {
        &self.position
    }

    fn ranges(&self, _: &MappedTable, _: u64) -> Vec<Range> {
        (0..RANGES).map(|number| Range { number: number as i32, blocks: Some((number as u64, number as u64 + 1)) }).collect()
    }

    /// A range is every second key; its bytes are lines of numbers.
    async fn read(&self, table: &MappedTable, range: &Range, _: BulkFormat) -> Result<BulkStream> {
        self.reach.io(Point::Read).await?;
        let rows = &self.tables[number(table)];
        let mut text = String::new();
        for (key, row) in rows.iter().enumerate().skip(range.number as usize).step_by(RANGES) {
            if let Some(row) = row {
                writeln!(text, "{key} {} {} {}", row.unique, row.value, row.toast).expect("text");
            }
        }
        Ok(Box::pin(futures::stream::iter([Ok(text.into_bytes().into())])))
    }

    async fn close(self) {}
}

/// Hands out a few transactions, or a piece of one.
pub struct SimLog {
    reach: Reach,
    next: usize,
    inside: usize,
    limit: usize,
    received: u64,
    quiet_until: Option<Instant>,
}

impl ChangeLog for SimLog {
    type Position = Lsn;

    async fn next(&mut self) -> Result<Part<Lsn>> {
        self.reach.io(Point::Next).await?;
        loop {
            let over = {
                let mut world = self.reach.world();
                let more = self.next < world.history.transactions.len();
                // The link is slow: what is in the log is not here yet.
                if more && world.dice.chance(700) {
                    break;
                }
                // A keepalive tells the end of the log when everything was received.
                let keepalive = !more && world.dice.chance(300);
                if keepalive || world.breaks(Mutant::JoinOnSilence) && self.inside == 0 && world.dice.chance(100) {
                    self.received = world.history.end;
                    return Ok(Part::idle(Lsn(self.received)));
                }
                world.wear_out(20);
                let World { history, dice, .. } = &mut *world;
                history.step(dice);
                history.is_over()
            };
            // Kept over calls: a call that is cancelled must not begin to wait anew.
            let pause = Duration::from_millis(if over { 2000 } else { 10 });
            let until = *self.quiet_until.get_or_insert_with(|| Instant::now() + pause);
            tokio::time::sleep_until(until).await;
            self.quiet_until = None;
            self.reach.step().await;
        }
        let reach = self.reach.clone();
        let world = reach.world();
        Ok(self.take(&world))
    }

    fn confirm(&self, durable: &Lsn) {
        let mut world = self.reach.world();
        let flushed = world.server.flushed.position;
        world.require(flushed.is_some_and(|flushed| durable.0 <= flushed), || format!("{durable} was confirmed, {flushed:?} is durable"));
        world.history.slot = world.history.slot.max(Some(durable.0));
    }

    fn announced(&self) -> u64 {
        0
    }

    fn received(&self) -> (Lsn, Lsn) {
        (Lsn(self.received), Lsn(self.reach.world().history.end))
    }
}

impl SimLog {
    fn take(&mut self, world: &World) -> Part<Lsn> {
        let mut part = Part { continues: self.inside > 0, ..Part::idle(Lsn(self.received)) };
        while let Some(transaction) = world.history.transactions.get(self.next) {
            while let Some(change) = transaction.changes.get(self.inside) {
                if part.batch.changes().len() >= self.limit {
                    part.open = true;
                    let early = u64::from(world.breaks(Mutant::OpenTransactionByGreater));
                    part.open_from = Some(Lsn(transaction.commit_start - early));
                    return part;
                }
                self.inside += 1;
                if change.published {
                    push(&mut part.batch, change);
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

/// As pgoutput sends it: the old key where it has changed, no value for what is large and unchanged.
fn push(batch: &mut Batch, change: &RowChange) {
    let begin = |batch: &mut Batch, key: usize| {
        let image = batch.begin_image();
        batch.push_cell(CellKind::Text, NUMBERS[key].as_bytes());
        image
    };
    let named = |batch: &mut Batch, key: usize| {
        let image = begin(batch, key);
        (0..3).for_each(|_| batch.push_cell(CellKind::Null, b""));
        batch.end_image(image)
    };
    let number = |batch: &mut Batch, number: u32| match NUMBERS.get(number as usize) {
        Some(text) => batch.push_cell(CellKind::Text, text.as_bytes()),
        None => batch.push_cell(CellKind::Text, number.to_string().as_bytes()),
    };
    let mut group = 0;
    let (op, old, new) = match change.kind {
        Kind::Insert { key, row } => {
            let image = begin(batch, key);
            [row.unique, row.value, row.toast].into_iter().for_each(|value| number(batch, value));
            (Op::Insert, Image::ABSENT, batch.end_image(image))
        }
        Kind::Update { old, key, row, toast_sent } => {
            let before = if old == key { Image::ABSENT } else { named(batch, old) };
            let image = begin(batch, key);
            number(batch, row.unique);
            number(batch, row.value);
            if toast_sent {
                number(batch, row.toast);
            } else {
                batch.push_cell(CellKind::Unchanged, b"");
            }
            (Op::Update, before, batch.end_image(image))
        }
        Kind::Delete { key } => (Op::Delete, named(batch, key), Image::ABSENT),
        Kind::Truncate { group: of } => {
            group = of;
            (Op::Truncate, Image::ABSENT, Image::ABSENT)
        }
    };
    let table = batch.intern_table(&table(change.table).version);
    batch.push(Change { op, table, old, old_is_full: false, new, group });
}
