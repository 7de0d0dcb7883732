//! How a stream goes on that has a checkpoint: which tables follow it and which need a copy, now that the mapping, the publication or the
//! source's timeline may be others than before.

use super::copy::CopyJob;
use super::error::{Error, Result, reason};
use super::flow::{following, join};
use super::handover::{Handover, earlier};
use super::pending::{Pending, copy_pending};
use super::position::Position;
use super::progress::Progress;
use super::register::Register as _;
use super::roles::{Apply, ApplyMode, Checkpoint, Source, TableCheckpoint, Target};
use super::table::{MappedTable, QualifiedName, TableState};
use std::cmp::Ordering::{Equal, Less};

/// The source has changed its timeline since the checkpoint.
pub(super) struct Switch<P> {
    /// Where it left the checkpoint's.
    pub left_at: P,
    /// The new one.
    pub timeline: i64,
}

impl<P: Position> Switch<P> {
    /// A table that is catching up lies ahead of the checkpoint: its copy may hold what the new timeline never had.
    pub fn undoes(&self, table: &TableCheckpoint<P>) -> bool {
        table.is_copied() && table.position.as_ref().is_some_and(|own| !matches!(own.partial_cmp(&self.left_at), Some(Less | Equal)))
    }
}

/// Mapped tables in two forms.
#[derive(Clone, Copy)]
pub(super) struct Mapped<'a> {
    /// As the target holds them.
    pub tables: &'a [MappedTable],
    /// As they are to be published.
    pub as_published: &'a [MappedTable],
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

fn sort_tables<'a, P: Position>(
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
            Some(known) if known.is_copied() && table.is_recorded_as(&known.columns) => {
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

/// Sets a stream up that has a checkpoint. Returns which tables follow it, and which are to be copied beside it.
pub(super) async fn resume<S, T>(
    job: &CopyJob<'_, S, T>,
    applier: &mut T::Applier,
    Mapped { tables, as_published }: Mapped<'_>,
    checkpoint: &Checkpoint<S::Position>,
    position: S::Position,
    switch: Option<&Switch<S::Position>>,
) -> Result<(Handover<S::Position>, Pending<S::Position>)>
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
    let is_mapped =
        |known: &&TableCheckpoint<_>| tables.iter().any(|table| (table.source(), &table.target) == (&known.source, &known.target));
    let gone: Vec<QualifiedName> = checkpoint.tables.values().filter(|known| !is_mapped(known)).map(|known| known.source.clone()).collect();
    if !gone.is_empty() {
        applier.forget(&gone).await?;
    }
    // Nobody may take an old copy for a good one: the stream goes on without it. Afterwards nothing tells that it is on another
    // timeline, or that the table had other columns or was out of the publication for a while.
    let is_copied = |table: &&&MappedTable| {
        let known = checkpoint.tables.get(table.source()).filter(|known| known.target == table.target);
        known.is_some_and(TableCheckpoint::is_copied)
    };
    for table in sorted.to_copy.iter().filter(is_copied) {
        applier.set_state(table, TableState::Init, None).await?;
    }
    if let Some(switch) = switch {
        applier.set_timeline(switch.timeline).await?;
    }
    let remaining: Vec<MappedTable> =
        as_published.iter().filter(|table| !sorted.left.iter().any(|left| left.source() == table.source())).cloned().collect();
    job.source.publish(&remaining, &published).await?;
    report_known(job.progress, &sorted);
    for table in &sorted.left {
        applier.set_state(table, TableState::Error, None).await?;
        let told = checkpoint.tables.get(table.source()).and_then(|known| known.error.clone());
        job.progress.table_failed(table.source(), told.unwrap_or_else(left_publication));
    }
    job.progress.set_copied(sorted.rows_copied);
    let mut handover = following(&position, sorted.followed.iter().cloned());
    join(applier, tables, &mut handover).await?;
    let Sorted { to_finish, to_copy, rows_copied, .. } = sorted;
    let to_finish = to_finish.into_iter().map(|(table, own)| (table.clone(), own)).collect();
    let pending = Pending { to_finish, to_copy: to_copy.into_iter().cloned().collect(), rows_copied };
    if pending.is_empty() {
        return Ok((handover, pending));
    }
    // Where foreign keys are checked, a change may have to wait for a row that is not copied yet.
    if applier.mode() == ApplyMode::Ordered || handover.states().next().is_none() {
        for (table, own) in copy_pending(job, applier, &pending).await? {
            handover.follow(table.version.id, table.source().clone(), Some(own));
        }
        join(applier, tables, &mut handover).await?;
        return Ok((handover, Pending::default()));
    }
    // A table whose copy has not begun may be wanted back as it was.
    let untouched = pending.to_copy.iter().filter_map(|table| checkpoint.tables.get(table.source())?.position.clone());
    handover.hold(untouched.fold(pending.hold(position), earlier));
    Ok((handover, pending))
}

pub(super) fn left_publication() -> String {
    format!(
        "{}: the table was taken out of the publication, so changes are gone: set spec.request to a Resync of it",
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
