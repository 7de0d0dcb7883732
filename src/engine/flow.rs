//! Sessions of a mirror: claim, set up, copy, stream.
//!
//! A session ends with an error or because it is told to; whoever runs it begins another one. It ends by itself when tables have been
//! copied beside the stream, and the next one follows them from where their copies stand. Nothing learned from the target in one
//! session is used in the next: each begins with a claim and reads the checkpoint.

use super::altered::{as_held, as_published};
use super::copy::{CopyJob, copy_tables};
use super::error::{Class, Error, Result, reason};
use super::handover::Handover;
use super::pending::{Pending, copy_beside};
use super::progress::{Phase, Progress};
use super::register::Register as _;
use super::request::{Request, attend::attend, take::Stage, take::take, wants_all};
use super::resume::{Mapped, Switch, resume};
use super::retention::{self, Action, Budget};
use super::retry::Backoff;
use super::roles::{Apply, BatchLimits, Claim, Claimed, Owner, Selection, Snapshot as _, Source, StreamKey, Target};
use super::startup::{Facts, Start, check_mapping, decide};
use super::stream::follow;
use super::structure::{IndexRole, Structure};
use super::table::{MappedTable, QualifiedName, TableState};
use futures::future;
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
    /// Target tables are altered as those of the source are; otherwise the stream stops.
    pub follow_schema: bool,
    /// What people ask for.
    pub request: Option<Request>,
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

/// Runs sessions until one fails. `held` is the epoch of this process's last claim and is set by each new one.
///
/// # Errors
/// Whatever ends a session; its class says what to do. `Ok` when it was told to end.
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
    let mut copies = None;
    let sessions = async {
        loop {
            progress.begin_session();
            // On the heap, as are its parts: together they are large.
            Box::pin(session(&source, &target, config, progress, stop, held, &mut copies)).await?;
            if stop.finish.is_cancelled() || stop.now.is_cancelled() {
                return Ok(());
            }
        }
    };
    tokio::select! {
        biased;
        ended = sessions => return ended,
        () = retention::watch(&*source, &config.budget, progress) => {}
    }
    Err(retention::give_up(&*source, &config.slot).await)
}

/// `Ok`: it was told to end, or tables have been copied. `copies` counts the copies that have failed one after the other.
async fn session<S, T>(
    source: &Arc<S>,
    target: &Arc<T>,
    config: &StreamConfig,
    progress: &Progress,
    stop: &Stop,
    held: &mut Option<i64>,
    copies: &mut Option<Backoff>,
) -> Result<()>
where
    S: Source,
    T: Target<Position = S::Position>,
{
    let set_up = Box::pin(set_up(source, target, config, progress, held));
    let ready = tokio::select! {
        biased;
        () = stop.now.cancelled() => return Ok(()),
        () = stop.finish.cancelled() => return Ok(()),
        ready = set_up => ready?,
    };
    let SetUp { ready, pending, claim } = ready;
    let tables = ready.tables.clone();
    let related = AtomicBool::new(false);
    let job = CopyJob { source, target, claim: &claim, config: &config.snapshot, progress };
    let copies = copies.get_or_insert_with(|| Backoff::new(claim.epoch.unsigned_abs()));
    let end = Stop { finish: stop.finish.child_token(), now: stop.now.clone() };
    tokio::select! {
        biased;
        ended = Box::pin(follow(&**source, ready, config, progress, &end, &related)) => ended,
        error = Box::pin(copy_beside(&job, &pending, copies, &end.finish)) => Err(error),
        never = relate(&**target, &claim, &tables, progress, &related) => match never {},
        never = attend(&**source, &**target, &claim, &tables, progress) => match never {},
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

/// A claimed stream, and the tables that follow it.
pub(super) struct ReadyStream<S: Source, A> {
    pub tables: Vec<MappedTable>,
    pub handover: Handover<S::Position>,
    pub applier: A,
    /// Other tables are copied meanwhile.
    pub beside_copy: bool,
}

/// What a session begins with.
struct SetUp<S: Source, A> {
    ready: ReadyStream<S, A>,
    /// Tables that are copied beside the stream.
    pending: Pending<S::Position>,
    claim: Claim,
}

async fn set_up<S, T>(
    source: &Arc<S>,
    target: &Arc<T>,
    config: &StreamConfig,
    progress: &Progress,
    held: &mut Option<i64>,
) -> Result<SetUp<S, T::Applier>>
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
    let (mut claimed, mut applier) = claimed?;
    progress.set_requests(claimed.requests.clone());
    let (tables, fed) = mapped?;
    let checkpoint = claimed.checkpoint.as_ref();
    let mut held_tables = as_held(&mut applier, &tables, checkpoint.filter(|_| source.follows_schema())).await?;
    progress.set_claim(claimed.claim.epoch, applier.mode(), checkpoint);
    let start = async {
        // Whoever has no business on this source ends nobody there. What an older worker was about to do there may come before
        // the source is taken, so it is looked at once more.
        begin(&**source, &identity.timeline, config, &claimed).await?;
        source.take(&mut applier).await?;
        begin(&**source, &identity.timeline, config, &claimed).await
    };
    let (notes, start) = future::join(target.check(&identity, &held_tables, &fed), start).await;
    progress.add_notes(notes?);
    let stage = Stage { source: &**source, tables: &tables, wanted: config.request.as_ref(), may_copy: config.snapshot.enabled };
    let start = Box::pin(take(stage, &mut applier, &mut claimed, start)).await;
    progress.set_requests(claimed.requests.clone());
    let start = start?;
    progress.has_taken_requests();
    let checkpoint = claimed.checkpoint.as_ref();
    progress.set_phase(Phase::SettingUp);
    let job = CopyJob { source, target, claim: &claimed.claim, config: &config.snapshot, progress };
    let mut pending = Pending::default();
    let handover = match start {
        Start::Fresh { drop_unfinished } => Box::pin(fresh(&job, &mut applier, &tables, identity.timeline, drop_unfinished)).await?,
        Start::Again => {
            progress.begin_copy(0, 0);
            applier.start_over().await?;
            held_tables.clone_from(&tables);
            Box::pin(fresh(&job, &mut applier, &tables, identity.timeline, false)).await?
        }
        Start::From(position) => {
            source.publish(&tables, &[]).await?;
            applier.initialize(&position, identity.timeline).await?;
            for table in &tables {
                applier.set_state(table, TableState::Ready, None).await?;
            }
            following(&position, tables.iter().map(|table| (table, None)))
        }
        Start::Anew { .. } => return Err(Error::bug("a stream that begins anew begins fresh")),
        Start::Resume { position, left_at } => {
            // `begin` resumes only from a checkpoint.
            let checkpoint = checkpoint.ok_or_else(|| Error::bug("a stream without checkpoint was resumed"))?;
            let switch = left_at.map(|left_at| Switch { left_at, timeline: identity.timeline });
            for (held, table) in held_tables.iter_mut().zip(&tables) {
                let known = checkpoint.tables.get(table.source());
                let is_undone = |known| switch.as_ref().is_some_and(|switch| switch.undoes(known));
                if known.is_none_or(|known| !known.follows() || is_undone(known)) {
                    // It is copied anew, as it is now.
                    held.clone_from(table);
                }
            }
            let published: Vec<MappedTable> = tables.iter().zip(&held_tables).map(as_published).collect();
            let mapped = Mapped { tables: &held_tables, as_published: &published };
            let handover;
            (handover, pending) = Box::pin(resume(&job, &mut applier, mapped, checkpoint, position, switch.as_ref())).await?;
            handover
        }
    };
    let beside_copy = !pending.is_empty();
    let followed: Vec<MappedTable> = held_tables.into_iter().filter(|table| !pending.holds(table)).collect();
    applier.prepare(&followed).await?;
    Ok(SetUp { ready: ReadyStream { tables: followed, handover, applier, beside_copy }, pending, claim: claimed.claim })
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

async fn begin<S: Source>(source: &S, timeline: &i64, config: &StreamConfig, claimed: &Claimed<S::Position>) -> Result<Start<S::Position>> {
    let checkpoint = claimed.checkpoint.as_ref();
    let log = source.log_state().await?;
    let given_up = checkpoint.is_some() && log.is_none() && source.given_up().await?;
    let left_at = match checkpoint {
        Some(checkpoint) if checkpoint.timeline != *timeline => source.left_timeline_at(checkpoint.timeline).await?,
        _ => None,
    };
    let start_position = parse_start(config.snapshot.start_position.as_deref())?;
    let facts = Facts {
        checkpoint,
        log_intended: claimed.log_intended,
        log: log.as_ref(),
        given_up,
        copies_again: config.budget.action == Action::DropSlotAndResync,
        timeline: *timeline,
        left_at: left_at.as_ref(),
        snapshot: config.snapshot.enabled,
        start_position: start_position.as_ref(),
        wants_all: wants_all(config.request.as_ref(), &claimed.requests),
    };
    decide(&config.slot, &facts)
}

fn parse_start<P: std::str::FromStr>(text: Option<&str>) -> Result<Option<P>> {
    let invalid = |text: &str| Error::stop(reason::INVALID_SPEC, format!("snapshot.startPosition {text} is not a position of this source"));
    text.map(|text| text.parse().map_err(|_| invalid(text))).transpose()
}

pub(super) fn following<'a, P: super::position::Position>(
    checkpoint: &P,
    tables: impl Iterator<Item = (&'a MappedTable, Option<P>)>,
) -> Handover<P> {
    let mut handover = Handover::new(checkpoint.clone());
    for (table, right_up_to) in tables {
        handover.follow(table.version.id, table.source().clone(), right_up_to);
    }
    handover
}

async fn fresh<S, T>(
    job: &CopyJob<'_, S, T>,
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
    join(applier, tables, &mut handover).await?;
    Ok(handover)
}

/// Tables whose copy is tied to the checkpoint itself join at once: everything up to it is in the copy.
pub(super) async fn join<A: Apply>(applier: &mut A, tables: &[MappedTable], handover: &mut Handover<A::Position>) -> Result<()> {
    let level = handover.take_level();
    for table in tables.iter().filter(|table| level.contains(table.source())) {
        applier.set_state(table, TableState::Ready, None).await?;
    }
    Ok(())
}

/// Shows what a slow step of the source waits for while it runs.
pub(super) async fn watched<S: Source, T, O>(job: &CopyJob<'_, S, T>, step: impl Future<Output = Result<O>>) -> Result<O> {
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
