//! Where a stream begins, decided from what the target holds and what the source still has. Pure.
//!
//! Every unequal case has a reason of its own, and none is continued by guessing: a wrong guess loses changes silently.

use super::error::{Error, Result, reason};
use super::position::Position;
use super::request::WAY_OUT;
use super::retention;
use super::roles::{Checkpoint, LogState, Selection, TableCheckpoint};
use std::collections::HashMap;

/// How a stream begins.
#[derive(Clone, Debug, PartialEq)]
pub enum Start<P> {
    /// Nothing is there: publication, slot, copy.
    Fresh {
        /// A slot of ours that never got a checkpoint is dropped first.
        drop_unfinished: bool,
    },
    /// The slot was given up on purpose: what the target holds is forgotten, then as [`Self::Fresh`].
    Again,
    /// The target equals the source at this position, by the user's word: no copy.
    From(P),
    /// All tables are to be copied again, and what the target holds is of no use for it: as if nothing were there.
    Anew {
        /// What is gone, for people.
        why: String,
        /// The old slot is still there, and is dropped.
        slot_exists: bool,
    },
    /// Go on after the checkpoint.
    Resume {
        /// The checkpoint's position.
        position: P,
        /// The source has changed its timeline since: where it left that of the checkpoint. The position does not lie beyond.
        left_at: Option<P>,
    },
}

/// What is known when a stream begins.
#[derive(Debug)]
pub struct Facts<'a, P> {
    /// From the target.
    pub checkpoint: Option<&'a Checkpoint<P>>,
    /// From the target: this stream was about to make its slot.
    pub log_intended: bool,
    /// From the source: the slot.
    pub log: Option<&'a LogState<P>>,
    /// From the source: the slot is missing since it was given up on purpose.
    pub given_up: bool,
    /// Tables of a stream whose slot was given up are copied anew.
    pub copies_again: bool,
    /// The source's timeline now.
    pub timeline: i64,
    /// Where the source's history left the checkpoint's timeline.
    pub left_at: Option<&'a P>,
    /// Existing rows are copied.
    pub snapshot: bool,
    /// Without a copy: where the target stands.
    pub start_position: Option<&'a P>,
    /// All tables are to be copied again, by request.
    pub wants_all: bool,
}

/// Decides how a stream begins.
///
/// # Errors
/// Class `Stop` with a reason for every case that may not be continued.
pub fn decide<P: Position>(slot: &str, facts: &Facts<'_, P>) -> Result<Start<P>> {
    match judge(slot, facts) {
        Err(error) if facts.wants_all && facts.snapshot && facts.checkpoint.is_some() && is_gone(error.reason) => {
            Ok(Start::Anew { why: error.to_string(), slot_exists: facts.log.is_some() })
        }
        Ok(Start::Again) if facts.wants_all => Ok(Start::Anew { why: retention::given_up(slot), slot_exists: false }),
        other => other,
    }
}

/// Nothing that the target holds can be continued.
fn is_gone(why: &str) -> bool {
    const CHANGES_GONE: [&str; 4] =
        [reason::CHECKPOINT_WITHOUT_SLOT, reason::CHECKPOINT_BEHIND_SLOT, reason::TIMELINE_DIVERGED, reason::SLOT_GIVEN_UP];
    CHANGES_GONE.contains(&why) || reason::LOST_SLOTS.contains(&why)
}

fn judge<P: Position>(slot: &str, facts: &Facts<'_, P>) -> Result<Start<P>> {
    // One that is to be dropped in any case.
    let is_unfinished = facts.checkpoint.is_none() && facts.snapshot && facts.log_intended;
    if let Some(lost) = facts.log.and_then(|log| log.lost.as_ref()).filter(|_| !is_unfinished) {
        let message =
            format!("the source has invalidated slot {slot} ({}): changes are gone, the tables need a new copy: {WAY_OUT}", lost.cause);
        return Err(Error::stop(lost.reason, message));
    }
    match (facts.checkpoint, facts.log) {
        (Some(checkpoint), Some(log)) => resume(slot, facts, checkpoint, log),
        (Some(checkpoint), None) if facts.given_up => after_giving_up(slot, facts, checkpoint),
        (Some(checkpoint), None) => Err(Error::stop(
            reason::CHECKPOINT_WITHOUT_SLOT,
            format!(
                "the target holds a checkpoint at {} but slot {slot} is not on the source: changes after it may be gone, the tables need a new copy: {WAY_OUT}",
                checkpoint.position
            ),
        )),
        (None, Some(log)) if !facts.snapshot => from_start_position(slot, facts, log),
        (None, Some(_)) if facts.log_intended => Ok(Start::Fresh { drop_unfinished: true }),
        (None, Some(_)) => Err(Error::stop(
            reason::SLOT_WITHOUT_CHECKPOINT,
            format!(
                "slot {slot} exists on the source but the target has no checkpoint for it: name another slot, or drop it when nothing needs it"
            ),
        )),
        (None, None) if facts.snapshot => Ok(Start::Fresh { drop_unfinished: false }),
        (None, None) => Err(Error::stop(
            reason::START_POSITION_REQUIRED,
            format!(
                "snapshot.enabled is false: slot {slot} must exist, and snapshot.startPosition must say up to where the target equals the source"
            ),
        )),
    }
}

fn resume<P: Position>(slot: &str, facts: &Facts<'_, P>, checkpoint: &Checkpoint<P>, log: &LogState<P>) -> Result<Start<P>> {
    let position = &checkpoint.position;
    if !holds(position, &log.confirmed) {
        return Err(Error::stop(
            reason::CHECKPOINT_BEHIND_SLOT,
            format!(
                "slot {slot} was confirmed up to {} but the target only holds {position}: the changes between are gone, the tables need a new copy: {WAY_OUT}",
                log.confirmed
            ),
        ));
    }
    if facts.timeline == checkpoint.timeline {
        return Ok(Start::Resume { position: position.clone(), left_at: None });
    }
    let diverged = || {
        Error::stop(
            reason::TIMELINE_DIVERGED,
            format!(
                "the target holds {position} of timeline {}, which is not in the history of the source's timeline {}: the tables need a new copy: {WAY_OUT}",
                checkpoint.timeline, facts.timeline
            ),
        )
    };
    let left_at = facts.left_at.filter(|switch| position <= *switch).ok_or_else(diverged)?;
    Ok(Start::Resume { position: position.clone(), left_at: Some(left_at.clone()) })
}

/// A copy in whose time the budget does not last would be given up and begun again for ever: only a stream that once followed is copied
/// anew.
fn after_giving_up<P: Position>(slot: &str, facts: &Facts<'_, P>, checkpoint: &Checkpoint<P>) -> Result<Start<P>> {
    let followed = !checkpoint.tables.is_empty() && checkpoint.tables.values().all(TableCheckpoint::is_copied);
    if !facts.copies_again || !facts.snapshot {
        return Err(Error::stop(reason::SLOT_GIVEN_UP, retention::given_up(slot)));
    }
    if !followed {
        let message = format!(
            "slot {slot} was dropped at walBudget.maxBytes before all tables were copied; a new copy would end likewise: raise maxBytes, then {WAY_OUT}"
        );
        return Err(Error::stop(reason::SLOT_GIVEN_UP, message));
    }
    Ok(Start::Again)
}

/// Whether a target at `position` holds everything up to `confirmed`. Positions that can't be compared hold nothing of
/// each other.
fn holds<P: Position>(position: &P, confirmed: &P) -> bool {
    confirmed <= position
}

fn from_start_position<P: Position>(slot: &str, facts: &Facts<'_, P>, log: &LogState<P>) -> Result<Start<P>> {
    let Some(start) = facts.start_position else {
        return Err(Error::stop(
            reason::START_POSITION_REQUIRED,
            "snapshot.enabled is false: snapshot.startPosition must say up to where the target equals the source",
        ));
    };
    if !holds(start, &log.confirmed) {
        return Err(Error::stop(
            reason::CHECKPOINT_BEHIND_SLOT,
            format!("slot {slot} was confirmed up to {}, after startPosition {start}: the changes between are gone", log.confirmed),
        ));
    }
    Ok(Start::From(start.clone()))
}

/// Refuses a mapping in which two source tables go to one target table. (For `schemas` the catalog decides, later.)
///
/// # Errors
/// Class `Stop`, [`reason::DUPLICATE_TARGET`] or [`reason::INVALID_SPEC`].
pub fn check_mapping(selection: &Selection) -> Result<()> {
    let Selection::Tables(tables) = selection else { return Ok(()) };
    let mut targets = HashMap::new();
    for table in tables {
        if let Some(other) = targets.insert(&table.target, &table.source) {
            return Err(Error::stop(reason::DUPLICATE_TARGET, format!("{other} and {} both go to {}", table.source, table.target)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::roles::Owner;
    use crate::engine::table::{QualifiedName, TableState};
    use crate::engine::testing::Pos;

    fn checkpoint(position: u64, timeline: i64) -> Checkpoint<Pos> {
        let owner = Owner { namespace: "n".into(), name: "m".into(), uid: "u".into() };
        Checkpoint { position: Pos(position), timeline, owner, rows_streamed: 0, tables: HashMap::new() }
    }

    fn slot(confirmed: u64) -> LogState<Pos> {
        LogState { confirmed: Pos(confirmed), lost: None, active: None }
    }

    fn facts<'a>(checkpoint: Option<&'a Checkpoint<Pos>>, log: Option<&'a LogState<Pos>>) -> Facts<'a, Pos> {
        let (given_up, copies_again) = (false, false);
        Facts {
            checkpoint,
            log_intended: false,
            log,
            given_up,
            copies_again,
            timeline: 1,
            left_at: None,
            snapshot: true,
            start_position: None,
            wants_all: false,
        }
    }

    fn refused(facts: &Facts<'_, Pos>) -> &'static str {
        decide("s", facts).expect_err("must be refused").reason
    }

    #[test]
    fn a_new_stream_starts_fresh() {
        assert_eq!(decide("s", &facts(None, None)).unwrap(), Start::Fresh { drop_unfinished: false });
    }

    #[test]
    fn a_slot_of_an_interrupted_set_up_is_made_again_and_a_foreign_one_is_not_touched() {
        let log = slot(5);
        let mut facts = facts(None, Some(&log));
        assert_eq!(refused(&facts), reason::SLOT_WITHOUT_CHECKPOINT);
        facts.log_intended = true;
        assert_eq!(decide("s", &facts).unwrap(), Start::Fresh { drop_unfinished: true });
    }

    #[test]
    fn the_checkpoint_may_be_at_or_after_the_confirmed_position_but_not_before() {
        let (held, log) = (checkpoint(10, 1), slot(10));
        let start = decide("s", &facts(Some(&held), Some(&log))).unwrap();
        assert_eq!(start, Start::Resume { position: Pos(10), left_at: None });
        assert_eq!(refused(&facts(Some(&held), Some(&slot(11)))), reason::CHECKPOINT_BEHIND_SLOT);
        assert_eq!(refused(&facts(Some(&held), None)), reason::CHECKPOINT_WITHOUT_SLOT);
    }

    #[test]
    fn another_timeline_is_valid_up_to_its_switch_point() {
        let (held, log) = (checkpoint(10, 1), slot(5));
        let mut facts = facts(Some(&held), Some(&log));
        facts.timeline = 2;
        assert_eq!(refused(&facts), reason::TIMELINE_DIVERGED);
        facts.left_at = Some(&Pos(9));
        assert_eq!(refused(&facts), reason::TIMELINE_DIVERGED);
        facts.left_at = Some(&Pos(10));
        assert_eq!(decide("s", &facts).unwrap(), Start::Resume { position: Pos(10), left_at: Some(Pos(10)) });
    }

    #[test]
    fn a_lost_slot_is_never_continued() {
        let held = checkpoint(10, 1);
        for reason in reason::LOST_SLOTS {
            let log = LogState { lost: Some(retention::Lost { reason, cause: "c".into() }), ..slot(5) };
            assert_eq!(refused(&facts(Some(&held), Some(&log))), *reason);
        }
    }

    #[test]
    fn a_stream_that_was_given_up_begins_again_only_by_the_users_word_and_after_a_whole_copy() {
        let table = |state| TableCheckpoint {
            source: QualifiedName::new("s", "t"),
            target: QualifiedName::new("s", "t"),
            state,
            generation: 1,
            position: None,
            rows_copied: 0,
            columns: String::new(),
            error: None,
        };
        let mut held = checkpoint(10, 1);
        let decided = |held: &Checkpoint<Pos>, copies_again, snapshot| {
            decide("s", &Facts { given_up: true, copies_again, snapshot, ..facts(Some(held), None) }).map_err(|error| error.reason)
        };
        assert_eq!(decided(&held, true, true), Err(reason::SLOT_GIVEN_UP), "the copy had not begun");
        held.tables.insert(QualifiedName::new("s", "t"), table(TableState::Copying));
        assert_eq!(decided(&held, true, true), Err(reason::SLOT_GIVEN_UP));
        held.tables.insert(QualifiedName::new("s", "t"), table(TableState::Ready));
        assert_eq!(decided(&held, true, true), Ok(Start::Again));
        assert_eq!(decided(&held, false, true), Err(reason::SLOT_GIVEN_UP));
        for copies_again in [false, true] {
            let facts = Facts { given_up: true, copies_again, wants_all: true, ..facts(Some(&held), None) };
            assert!(matches!(decide("s", &facts), Ok(Start::Anew { slot_exists: false, .. })));
        }
        assert_eq!(decided(&held, true, false), Err(reason::SLOT_GIVEN_UP));
        // A slot that is there is gone on with, whatever mark was left.
        let log = slot(5);
        let facts = Facts { given_up: true, copies_again: true, ..facts(Some(&held), Some(&log)) };
        assert_eq!(decide("s", &facts).unwrap(), Start::Resume { position: Pos(10), left_at: None });
    }

    #[test]
    fn what_is_gone_is_made_anew_only_when_all_tables_are_to_be_copied_again() {
        let (held, log) =
            (checkpoint(10, 1), LogState { lost: Some(retention::Lost { reason: reason::SLOT_LOST, cause: "c".into() }), ..slot(5) });
        let (behind, healthy) = (slot(11), slot(5));
        for (log, timeline) in [(Some(&log), 1), (None, 1), (Some(&behind), 1), (Some(&healthy), 2)] {
            let mut facts = Facts { timeline, ..facts(Some(&held), log) };
            refused(&facts);
            facts.wants_all = true;
            let start = decide("s", &facts).unwrap();
            assert!(matches!(start, Start::Anew { slot_exists, .. } if slot_exists == log.is_some()), "{start:?}");
            facts.snapshot = false;
            refused(&facts);
        }
        let wanted = Facts { wants_all: true, ..facts(Some(&held), Some(&healthy)) };
        assert_eq!(decide("s", &wanted).unwrap(), Start::Resume { position: Pos(10), left_at: None }, "a healthy slot is kept");
        let unfinished = Facts { log_intended: true, ..facts(None, Some(&log)) };
        assert_eq!(decide("s", &unfinished).unwrap(), Start::Fresh { drop_unfinished: true }, "it has been decided");
    }

    #[test]
    fn without_a_copy_the_start_must_be_known_and_not_before_the_slot() {
        let log = slot(5);
        let mut facts = facts(None, Some(&log));
        facts.snapshot = false;
        assert_eq!(refused(&facts), reason::START_POSITION_REQUIRED);
        facts.start_position = Some(&Pos(4));
        assert_eq!(refused(&facts), reason::CHECKPOINT_BEHIND_SLOT);
        facts.start_position = Some(&Pos(5));
        assert_eq!(decide("s", &facts).unwrap(), Start::From(Pos(5)));
        facts.log = None;
        assert_eq!(refused(&facts), reason::START_POSITION_REQUIRED);
    }
}
