//! Takes a request when a stream is set up, under its claim.

use super::plan::{Facts, plan};
use super::{Effect, Request};
use crate::engine::error::{Error, Result};
use crate::engine::roles::{Apply, Claimed, Source};
use crate::engine::startup::Start;
use crate::engine::table::{MappedTable, TableState};

/// What is at hand when a stream is set up.
pub(in crate::engine) struct Stage<'a, S> {
    pub source: &'a S,
    pub tables: &'a [MappedTable],
    pub wanted: Option<&'a Request>,
    /// Existing rows are copied.
    pub may_copy: bool,
}

/// Writes what is to be written about requests, and changes what was read with the claim likewise. Returns how the stream begins
/// now.
///
/// # Errors
/// That of `start`; whatever keeps the target from being written.
pub(in crate::engine) async fn take<S, A>(
    stage: Stage<'_, S>,
    applier: &mut A,
    claimed: &mut Claimed<S::Position>,
    start: Result<Start<S::Position>>,
) -> Result<Start<S::Position>>
where
    S: Source,
    A: Apply<Position = S::Position>,
{
    let Stage { source, tables, wanted, may_copy } = stage;
    let mut change = plan(&Facts { wanted, tables, may_copy, claimed, start: start.as_ref() });
    if let Effect::Sequences(tables) = &mut change.effect {
        for (table, values) in tables {
            *values = source.sequence_values(table).await?;
        }
    }
    if !change.is_empty() {
        claimed.requests = applier.record(&change).await?;
    }
    if let (Effect::States(changes), Some(checkpoint)) = (&change.effect, &mut claimed.checkpoint) {
        for changed in changes {
            let Some(known) = checkpoint.tables.get_mut(changed.table.source()) else { continue };
            known.state = changed.state;
            known.position.clone_from(&changed.position);
            known.error.clone_from(&changed.error);
            known.generation += i64::from(changed.state == TableState::Init);
        }
    }
    match start? {
        Start::Anew { slot_exists, .. } if matches!(change.effect, Effect::Anew) => {
            claimed.checkpoint = None;
            Ok(Start::Fresh { drop_unfinished: slot_exists })
        }
        Start::Anew { .. } => Err(Error::bug("a stream was to begin anew and nobody has asked for it")),
        start => Ok(start),
    }
}
