//! What the operator undoes on a source when a Mirror is deleted. Needs no worker; safe to repeat.

use super::connect::{Side, connect};
use super::endpoint::Endpoint;
pub use super::slot::drop_statement;
use super::{fence, publication, slot};
use crate::engine::error::Result;

/// Drops a slot for which too much log is kept, and notes before on its publication that it was done on purpose. Whatever of ours still
/// uses it is ended first; somebody else's reader is not.
///
/// # Errors
/// As [`drop_slot_and_publication`].
pub async fn give_up(endpoint: &Endpoint, slot: &str, publication: &str) -> Result<()> {
    let session = connect(endpoint, Side::Source, "sluice cleanup").await?;
    fence::take_for_good(&session, slot).await?;
    if !publication::note_given_up(&session, publication, slot).await? {
        tracing::warn!("publication {publication} was not made for slot {slot}: nothing will tell that the slot was dropped on purpose");
    }
    slot::drop(&session, endpoint, slot).await.map(drop)
}

/// What was found and dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CleanUp {
    /// There was a slot, and it is gone.
    pub slot_dropped: bool,
    /// There was a publication made for this slot, and it is gone.
    pub publication_dropped: bool,
}

/// What shall go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doomed<'a> {
    /// Name of the slot. A publication is dropped only when it was made for this slot, so it is named in any case.
    pub slot: &'a str,
    /// Drop the slot.
    pub drop_slot: bool,
    /// Drop this publication, unless the user has made it.
    pub publication: Option<&'a str>,
}

/// Drops slot and publication. A worker that still sets them up or reads from the slot is ended first; somebody else's reader is
/// not.
///
/// # Errors
/// Class `Retry` with [`crate::engine::error::reason::SLOT_IN_USE`] while somebody else reads from the slot; whatever the
/// connection says.
pub async fn drop_slot_and_publication(endpoint: &Endpoint, doomed: Doomed<'_>) -> Result<CleanUp> {
    let session = connect(endpoint, Side::Source, "sluice cleanup").await?;
    fence::take_for_good(&session, doomed.slot).await?;
    // The slot first: it is what fills the source's disk.
    let slot_dropped = doomed.drop_slot && slot::drop(&session, endpoint, doomed.slot).await?;
    let publication_dropped = match doomed.publication {
        Some(publication) => publication::drop_own(&session, publication, doomed.slot).await?,
        None => false,
    };
    Ok(CleanUp { slot_dropped, publication_dropped })
}
