//! One session of a mirror: claim, set up, copy, stream.
//!
//! A session ends with an error or because it is told to; whoever runs it begins another one. Nothing learned from the
//! target in one session is used in the next: each begins with a claim and reads the checkpoint.

use super::copy::{CopyJob, copy_tables, finish_tables};
use super::error::{Class, Error, Result, reason};
use super::handover::Handover;
use super::progress::{Phase, Progress};
use super::retention::{self, Action, Budget};
use super::retry::Backoff;
use super::roles::{Apply, BatchLimits, Checkpoint, Claim, Owner, Selection, Snapshot as _, Source, StreamKey, TableCheckpoint, Target};
use super::startup::{Facts, Start, check_mapping, decide};
use super::stream::follow;
use super::structure::{IndexRole, Structure};
use super::table::{MappedTable, QualifiedName, TableState};
use futures::future;
use std::cmp::Ordering::{Equal, Less};
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio_util::sync::CancellationToken;

/// What a stream shall do.
#[derive(Clone, Debug, PartialEq)]
pub struct StreamConfig {
    /// Which tables.
    pub selection: Selection,
    /// Whose stream this is.
    pub owner: Owner,
    /// Replication slot.
    pub slot: String,
    /// Initial copy.
    pub snapshot: SnapshotConfig,
    /// Limits of one batch.
    pub limits: BatchLimits,
    /// How much log the source may keep for the stream.
    pub budget: Budget,
}

/// How tables are copied.
#[derive(Clone, Debug, PartialEq)]
pub struct SnapshotConfig {
    /// Existing rows are copied.
    pub enabled: bool,
    /// A target table that holds rows is emptied before its first copy.
    pub truncate: bool,
    /// Without a copy: where the target stands.
    pub start_position: Option<String>,
    /// Rows of one range.
    pub rows_per_range: u64,
    /// Tables at a time.
    pub tables_in_parallel: usize,
    /// Ranges of one table at a time.
    pub workers_per_table: usize,
    /// Tables that are made get the source's indexes and what stands on them.
    pub indexes: bool,
    /// Tables that are made get the source's foreign keys.
    pub foreign_keys: bool,
}

impl SnapshotConfig {
    /// Takes out what the target shall not get. The primary key stays: rows are found by it.
    fn leave_out(&self, structure: &mut Structure) {
        if !self.indexes {
            structure.indexes.retain(|index| matches!(index.role, IndexRole::Key { primary: true, .. }));
        }
        if !self.foreign_keys {
            structure.foreign_keys.clear();
        }
    }
}

/// How a session is told to end.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    /// Commit what is under way, then end.
    pub finish: CancellationToken,
    /// Cancel what is running, roll back, end.
    pub now: CancellationToken,
}

/// Runs one session. `held` is the epoch of this process's last claim and is set by each new one.
///
/// # Errors
/// Whatever ends the session; its class says what to do. `Ok` when it was told to end.
pub async fn run<S, T>(
    source: Arc<S>,
    target: Arc<T>,
    config: &StreamConfig,
    progress: &Progress,
    stop: &Stop,
    held: &mut Option<i64>,
) -> Result<()>
where
    S: Source,
    T: Target<Position = S::Position>,
{
    progress.begin_session();
    tokio::select! {
        biased;
        ended = session(&source, &target, config, progress, stop, held) => return ended,
        () = retention::watch(&*source, &config.budget, progress) => {}
    }
    Err(retention::give_up(&*source, &config.slot).await)
}

async fn session<S, T>(
    source: &Arc<S>,
    target: &Arc<T>,
    config: &StreamConfig,
    progress: &Progress,
    stop: &Stop,
    held: &mut Option<i64>,
) -> Result<()>
where
    S: Source,
    T: Target<Position = S::Position>,
{
    let set_up = set_up(source, target, config, progress, held);
    let ready = tokio::select! {
        biased;
        () = stop.now.cancelled() => return Ok(()),
        () = stop.finish.cancelled() => return Ok(()),
        ready = set_up => ready?,
    };
    let (ready, claim) = ready;
    let tables = ready.tables.clone();
    let related = AtomicBool::new(false);
    tokio::select! {
        biased;
        ended = follow(&**source, ready, config.limits, progress, stop, &related) => ended,
        never = relate(&**target, &claim, &tables, progress, &related) => match never {},
    }
}

/// Foreign keys come when every table follows, and the stream does not wait for them. `related`: none are to be made any more. Never
/// ends, so that the stream's end is the session's.
async fn relate<T: Target>(target: &T, claim: &Claim, tables: &[MappedTable], progress: &Progress, related: &AtomicBool) -> Infallible {
    let mut backoff = Backoff::new(claim.epoch.unsigned_abs());
    while let Some(first) = tables.iter().find(|table| !table.structure.foreign_keys.is_empty()) {
        progress.streaming().await;
        let related = target.relate(claim, tables, &|step| progress.set_step(first.source(), Some(step))).await;
        progress.set_step(first.source(), None);
        match related {
            Ok(notes) => {
                progress.add_notes(notes);
                break;
            }
            Err(error) => {
                tracing::info!(%error, "foreign keys are tried again");
                tokio::time::sleep(backoff.next(error.class)).await;
            }
        }
    }
    related.store(true, Ordering::Release);
    std::future::pending().await
}

/// A claimed stream whose tables are all copied.
pub(super) struct ReadyStream<S: Source, A> {
    pub tables: Vec<MappedTable>,
    pub handover: Handover<S::Position>,
    pub applier: A,
}

async fn set_up<S, T>(
    source: &Arc<S>,
    target: &Arc<T>,
    config: &StreamConfig,
    progress: &Progress,
    held: &mut Option<i64>,
) -> Result<(ReadyStream<S, T::Applier>, Claim)>
where
    S: Source,
    T: Target<Position = S::Position>,
{
    check_mapping(&config.selection)?;
    // Steps that do not need each other's outcome are taken side by side: on a far server it is the round trips that count.
    // Their errors are told in the order of the steps.
    let (identity, connected) = future::join(source.identity(), target.connect()).await;
    let identity = identity?;
    connected?;
    let key =
        StreamKey { system_identifier: identity.system_identifier.clone(), database: identity.database.clone(), slot: config.slot.clone() };
    let claim = async {
        let claimed = target.claim(&key, &config.owner, *held).await?;
        // At once: it is this process's own, whatever becomes of the rest.
        *held = Some(claimed.0.claim.epoch);
        Ok::<_, Error>(claimed)
    };
    let mapped = async {
        let tables = mapped_tables(&**source, config).await?;
        let fed = source.fed(&tables).await?;
        Ok::<_, Error>((tables, fed))
    };
    // A claim is never dropped halfway.
    let (claimed, mapped) = future::join(claim, mapped).await;
    let (claimed, mut applier) = claimed?;
    let (tables, fed) = mapped?;
    let checkpoint = claimed.checkpoint.as_ref();
    progress.set_claim(claimed.claim.epoch, applier.mode(), checkpoint);
    let start = async {
        // Whoever has no business on this source ends nobody there. What an older worker was about to do there may come before
        // the source is taken, so it is looked at once more.
        begin(&**source, &identity.timeline, config, checkpoint, claimed.log_intended).await?;
        source.take(&mut applier).await?;
        begin(&**source, &identity.timeline, config, checkpoint, claimed.log_intended).await
    };
    let (notes, start) = future::join(target.check(&identity, &tables, &fed), start).await;
    progress.add_notes(notes?);
    let start = start?;
    progress.set_phase(Phase::SettingUp);
    let mut job = CopyJob { source, target, claim: &claimed.claim, config: &config.snapshot, progress };
    let handover = match start {
        Start::Fresh { drop_unfinished } => fresh(&mut job, &mut applier, &tables, identity.timeline, drop_unfinished).await?,
        Start::Again => {
            progress.begin_copy(0, 0);
            applier.start_over().await?;
            fresh(&mut job, &mut applier, &tables, identity.timeline, false).await?
        }
        Start::From(position) => {
            source.publish(&tables, &[]).await?;
            applier.initialize(&position, identity.timeline).await?;
            for table in &tables {
                applier.set_state(table, TableState::Ready, None).await?;
            }
            following(&position, tables.iter().map(|table| (table, None)))
        }
        Start::Resume { position, left_at } => {
            // `begin` resumes only from a checkpoint.
            let checkpoint = checkpoint.ok_or_else(|| Error::bug("a stream without checkpoint was resumed"))?;
            let switch = left_at.map(|left_at| Switch { left_at, timeline: identity.timeline });
            resume(&mut job, &mut applier, &tables, checkpoint, position, switch.as_ref()).await?
        }
    };
    applier.prepare(&tables).await?;
    Ok((ReadyStream { tables, handover, applier }, claimed.claim))
}

/// The mapped tables with what the target shall get of them, in the order in which they are copied.
async fn mapped_tables<S: Source>(source: &S, config: &StreamConfig) -> Result<Vec<MappedTable>> {
    let mut tables = referenced_first(source.tables(&config.selection).await?);
    for table in &mut tables {
        config.snapshot.leave_out(Arc::make_mut(&mut table.structure));
    }
    check_targets(&tables)?;
    Ok(tables)
}

/// The tables in another order: each after those that it refers to, as far as that is no circle. Where a target checks foreign
/// keys, rows can't be copied before those that they refer to.
fn referenced_first(tables: Vec<MappedTable>) -> Vec<MappedTable> {
    let mapped: HashSet<QualifiedName> = tables.iter().map(|table| table.source().clone()).collect();
    let (mut placed, mut ordered) = (HashSet::new(), Vec::with_capacity(tables.len()));
    let mut rest = VecDeque::from(tables);
    let mut passed_over = 0;
    while let Some(table) = rest.pop_front() {
        let missing = |name: &QualifiedName| name != table.source() && mapped.contains(name) && !placed.contains(name);
        let waits = table.structure.foreign_keys.iter().any(|key| missing(&key.references));
        // When all that are left wait, they wait for each other.
        if waits && passed_over <= rest.len() {
            rest.push_back(table);
            passed_over += 1;
            continue;
        }
        passed_over = 0;
        placed.insert(table.source().clone());
        ordered.push(table);
    }
    ordered
}

/// Two tables of a schema selection may meet in one target table.
fn check_targets(tables: &[MappedTable]) -> Result<()> {
    let mut targets = BTreeMap::new();
    for table in tables {
        if let Some(other) = targets.insert(&table.target, table.source()) {
            return Err(Error::stop(reason::DUPLICATE_TARGET, format!("{other} and {} both go to {}", table.source(), table.target)));
        }
    }
    Ok(())
}

async fn begin<S: Source>(
    source: &S,
    timeline: &i64,
    config: &StreamConfig,
    checkpoint: Option<&Checkpoint<S::Position>>,
    log_intended: bool,
) -> Result<Start<S::Position>> {
    let log = source.log_state().await?;
    let given_up = checkpoint.is_some() && log.is_none() && source.given_up().await?;
    let left_at = match checkpoint {
        Some(checkpoint) if checkpoint.timeline != *timeline => source.left_timeline_at(checkpoint.timeline).await?,
        _ => None,
    };
    let start_position = parse_start(config.snapshot.start_position.as_deref())?;
    let facts = Facts {
        checkpoint,
        log_intended,
        log: log.as_ref(),
        given_up,
        copies_again: config.budget.action == Action::DropSlotAndResync,
        timeline: *timeline,
        left_at: left_at.as_ref(),
        snapshot: config.snapshot.enabled,
        start_position: start_position.as_ref(),
    };
    decide(&config.slot, &facts)
}

fn parse_start<P: std::str::FromStr>(text: Option<&str>) -> Result<Option<P>> {
    let invalid = |text: &str| Error::stop(reason::INVALID_SPEC, format!("snapshot.startPosition {text} is not a position of this source"));
    text.map(|text| text.parse().map_err(|_| invalid(text))).transpose()
}

fn following<'a, P: super::position::Position>(checkpoint: &P, tables: impl Iterator<Item = (&'a MappedTable, Option<P>)>) -> Handover<P> {
    let mut handover = Handover::new(checkpoint.clone());
    for (table, right_up_to) in tables {
        handover.follow(table.version.id, table.source().clone(), right_up_to);
    }
    handover
}

async fn fresh<S, T>(
    job: &mut CopyJob<'_, S, T>,
    applier: &mut T::Applier,
    tables: &[MappedTable],
    timeline: i64,
    drop_unfinished: bool,
) -> Result<Handover<S::Position>>
where
    S: Source,
    T: Target<Position = S::Position>,
{
    // Both before the slot is made: a table must be published before the point that its copy is tied to (engine rule 1), and the
    // intention must be durable before the slot exists.
    future::try_join(job.source.publish(tables, &[]), applier.intend_log()).await?;
    if drop_unfinished {
        job.source.drop_log().await?;
    }
    let snapshot = watched(job, job.source.create_log()).await?;
    let position = snapshot.position().clone();
    applier.initialize(&position, timeline).await?;
    let all: Vec<&MappedTable> = tables.iter().collect();
    job.progress.set_tables(tables.iter().map(|table| (table.source().clone(), TableState::Init)).collect());
    copy_tables(job, applier, snapshot, &all, 0).await?;
    let mut handover = following(&position, tables.iter().map(|table| (table, Some(position.clone()))));
    join(applier, tables, &mut handover, position).await?;
    Ok(handover)
}

/// Tables whose copy is tied to the checkpoint itself join at once: everything up to it is in the copy.
async fn join<A: Apply>(
    applier: &mut A,
    tables: &[MappedTable],
    handover: &mut Handover<A::Position>,
    position: A::Position,
) -> Result<()> {
    let joining = handover.joining(&position);
    for table in tables.iter().filter(|table| joining.contains(table.source())) {
        applier.set_state(table, TableState::Ready, None).await?;
    }
    handover.moved(position);
    Ok(())
}

/// The source has changed its timeline since the checkpoint.
struct Switch<P> {
    /// Where it left the checkpoint's.
    left_at: P,
    /// The new one.
    timeline: i64,
}

impl<P: super::position::Position> Switch<P> {
    /// A table that is catching up lies ahead of the checkpoint: its copy may hold what the new timeline never had.
    fn undoes(&self, table: &TableCheckpoint<P>) -> bool {
        table.is_copied() && table.position.as_ref().is_some_and(|own| !matches!(own.partial_cmp(&self.left_at), Some(Less | Equal)))
    }
}

/// What a checkpoint says of the tables that are mapped now.
struct Sorted<'a, P> {
    /// Follow from their own position, or from the checkpoint.
    followed: Vec<(&'a MappedTable, Option<P>)>,
    /// Have all rows as of a position; what comes after the rows was interrupted.
    to_finish: Vec<(&'a MappedTable, P)>,
    /// Need a copy: new, unfinished, or with other columns than were copied.
    to_copy: Vec<&'a MappedTable>,
    /// Out of the publication while nobody looked: changes are gone.
    left: Vec<&'a MappedTable>,
    /// Rows that earlier copies have brought.
    rows_copied: u64,
}

fn sort_tables<'a, P: super::position::Position>(
    tables: &'a [MappedTable],
    checkpoint: &Checkpoint<P>,
    published: &[QualifiedName],
    switch: Option<&Switch<P>>,
) -> Sorted<'a, P> {
    let mut sorted = Sorted { followed: Vec::new(), to_finish: Vec::new(), to_copy: Vec::new(), left: Vec::new(), rows_copied: 0 };
    for table in tables {
        let known = checkpoint.tables.get(table.source()).filter(|known| known.target == table.target);
        match known {
            Some(known) if known.state == TableState::Error => sorted.left.push(table),
            Some(known) if switch.is_some_and(|switch| switch.undoes(known)) => sorted.to_copy.push(table),
            Some(known) if known.is_copied() && known.columns == table.signature() => {
                if !published.contains(table.source()) {
                    sorted.left.push(table);
                    continue;
                }
                sorted.rows_copied += known.rows_copied.unsigned_abs();
                match (known.state, &known.position) {
                    (TableState::Copied, Some(position)) => sorted.to_finish.push((table, position.clone())),
                    _ => sorted.followed.push((table, known.position.clone())),
                }
            }
            _ => sorted.to_copy.push(table),
        }
    }
    sorted
}

async fn resume<S, T>(
    job: &mut CopyJob<'_, S, T>,
    applier: &mut T::Applier,
    tables: &[MappedTable],
    checkpoint: &Checkpoint<S::Position>,
    position: S::Position,
    switch: Option<&Switch<S::Position>>,
) -> Result<Handover<S::Position>>
where
    S: Source,
    T: Target<Position = S::Position>,
{
    let published = job.source.published().await?;
    let sorted = sort_tables(tables, checkpoint, &published, switch);
    if !sorted.to_copy.is_empty() && !job.config.enabled {
        let names: Vec<String> = sorted.to_copy.iter().map(|table| table.source().to_string()).collect();
        return Err(Error::stop(
            reason::START_POSITION_REQUIRED,
            format!("{} must be copied, but snapshot.enabled is false", names.join(", ")),
        ));
    }
    // Forgotten first: a table that left the publication by our own hand must never look as if somebody had taken it out.
    let gone: Vec<QualifiedName> =
        checkpoint.tables.keys().filter(|name| !tables.iter().any(|table| table.source() == *name)).cloned().collect();
    if !gone.is_empty() {
        applier.forget(&gone).await?;
    }
    if let Some(switch) = switch {
        // Before the timeline is written: afterwards nothing tells such a copy from a good one.
        let is_undone = |table: &&MappedTable| checkpoint.tables.get(table.source()).is_some_and(|known| switch.undoes(known));
        for table in sorted.to_copy.iter().filter(|table| is_undone(table)) {
            applier.set_state(table, TableState::Init, None).await?;
        }
        applier.set_timeline(switch.timeline).await?;
    }
    let remaining: Vec<MappedTable> =
        tables.iter().filter(|table| !sorted.left.iter().any(|left| left.source() == table.source())).cloned().collect();
    job.source.publish(&remaining, &published).await?;
    report_known(job.progress, &sorted);
    for table in &sorted.left {
        applier.set_state(table, TableState::Error, None).await?;
        job.progress.table_failed(table.source(), left_publication());
    }
    job.progress.set_copied(sorted.rows_copied);
    let mut handover = following(&position, sorted.followed.iter().cloned());
    if !sorted.to_finish.is_empty() {
        finish_tables(job, applier, &sorted.to_finish).await?;
        for (table, own) in &sorted.to_finish {
            handover.follow(table.version.id, table.source().clone(), Some(own.clone()));
        }
    }
    if !sorted.to_copy.is_empty() {
        let snapshot = watched(job, job.source.snapshot()).await?;
        let right_up_to = snapshot.position().clone();
        copy_tables(job, applier, snapshot, &sorted.to_copy, sorted.rows_copied).await?;
        for table in &sorted.to_copy {
            handover.follow(table.version.id, table.source().clone(), Some(right_up_to.clone()));
        }
    }
    if !sorted.to_finish.is_empty() || !sorted.to_copy.is_empty() {
        // An idle source would never move past the new tables' positions by itself.
        job.source.mark().await?;
    }
    join(applier, tables, &mut handover, position).await?;
    Ok(handover)
}

pub(super) fn left_publication() -> String {
    format!(
        "{}: the table was taken out of the publication, so changes are gone; take it out of the Mirror and add it again for a new copy",
        reason::LEFT_PUBLICATION
    )
}

fn report_known<P>(progress: &Progress, sorted: &Sorted<'_, P>) {
    let state = |own: &Option<P>| if own.is_some() { TableState::CatchingUp } else { TableState::Ready };
    let followed = sorted.followed.iter().map(|(table, own)| (table.source().clone(), state(own)));
    let followed = followed.chain(sorted.to_finish.iter().map(|(table, _)| (table.source().clone(), TableState::Copied)));
    let others = [(&sorted.to_copy, TableState::Init), (&sorted.left, TableState::Error)];
    let others = others.into_iter().flat_map(|(tables, state)| tables.iter().map(move |table| (table.source().clone(), state)));
    progress.set_tables(followed.chain(others).collect());
}

/// Shows what a slow step of the source waits for while it runs.
async fn watched<S: Source, T, O>(job: &CopyJob<'_, S, T>, step: impl Future<Output = Result<O>>) -> Result<O> {
    let mut step = std::pin::pin!(step);
    let mut look = tokio::time::interval(std::time::Duration::from_secs(1));
    let result = loop {
        tokio::select! {
            biased;
            result = &mut step => break result,
            _ = look.tick() => job.progress.set_waiting(job.source.waiting()),
        }
    };
    job.progress.set_waiting(None);
    result
}

/// The error of a task that ended without an answer.
pub(crate) fn lost_task(error: &tokio::task::JoinError) -> Error {
    Error::new(Class::Bug, reason::INTERNAL_ERROR, format!("a task ended without an answer: {error}"))
}
