//! What is done about requests when a stream is set up. Pure.

use super::{Action, Effect, Request, RequestChange, RequestRecord, RequestState, StateChange, named, next};
use crate::engine::error::{Class, Error};
use crate::engine::position::Position;
use crate::engine::roles::{Checkpoint, Claimed, TableCheckpoint};
use crate::engine::startup::Start;
use crate::engine::table::{MappedTable, TableState};

/// What a decision rests on.
pub(super) struct Facts<'a, 'f, P> {
    pub wanted: Option<&'a Request>,
    pub tables: &'a [MappedTable],
    /// Existing rows are copied.
    pub may_copy: bool,
    pub claimed: &'f Claimed<P>,
    /// How the stream begins, or why it can't.
    pub start: Result<&'f Start<P>, &'f Error>,
}

/// Why a table is in state `Error` after its copy was cancelled, and what leads out.
const CUT_OFF: &str = "its copy was cancelled before its end, so its rows are not those of the source: set spec.request to a Resync of it";

/// Of a request that was in the object when the stream was set up for the first time.
const FIRST: &str = "it was there before the first copy: nothing to do";

/// What becomes of a request, what is told about it, and what goes with it.
type Outcome<'a, P> = (RequestState, String, Effect<'a, P>);
/// A request that is over: id, state, message.
type Ended = (String, RequestState, String);

fn over<'a, P>(state: RequestState, message: impl Into<String>) -> Outcome<'a, P> {
    (state, message.into(), Effect::Nothing)
}

/// Decides what is written, in one transaction.
pub(super) fn plan<'a, P: Position>(facts: &Facts<'a, '_, P>) -> RequestChange<'a, P> {
    let mut ended: Vec<Ended> = facts.claimed.requests.iter().filter_map(|record| left(record, facts)).collect();
    let settled = |record: &RequestRecord| match ended.iter().find(|(id, ..)| *id == record.id) {
        Some((_, state, _)) => RequestRecord { state: *state, ..record.clone() },
        None => record.clone(),
    };
    let records: Vec<RequestRecord> = facts.claimed.requests.iter().map(settled).collect();
    let open = records.iter().find(|record| record.is_running());
    let mut change = RequestChange { ended: Vec::new(), taken: None, effect: Effect::Nothing };
    match next(facts.wanted, &records) {
        Some(request) => {
            let outcome = match request.action {
                Action::Cancel => {
                    let (outcome, cancelled) = cancel(facts, open);
                    ended.extend(cancelled);
                    Some(outcome)
                }
                _ => outcome(request, facts),
            };
            if let Some((state, message, effect)) = outcome {
                change.taken = Some((request, state, message));
                change.effect = effect;
            }
        }
        // What it needs was lost while all tables were being copied again.
        None if matches!(facts.start, Ok(Start::Anew { .. })) => change.effect = Effect::Anew,
        None => {}
    }
    RequestChange { ended, ..change }
}

/// What becomes of a request that an earlier session has left under way.
fn left<P: Position>(record: &RequestRecord, facts: &Facts<'_, '_, P>) -> Option<Ended> {
    let end = |state, message: String| Some((record.id.clone(), state, message));
    match Action::parse(&record.action).filter(|_| record.is_running())? {
        Action::Retry => match facts.start {
            Err(error) if error.class == Class::Stop => end(RequestState::Failed, error.to_string()),
            _ => next(facts.wanted, &facts.claimed.requests)
                .and_then(|_| end(RequestState::Failed, "another one was taken before every table followed the stream".to_owned())),
        },
        // What they do was done when they were recorded.
        Action::ResetSequences | Action::Cancel => end(RequestState::Succeeded, record.message.clone()),
        Action::Resync | Action::Verify => match facts.start {
            Err(error) if error.class == Class::Stop => end(RequestState::Failed, error.to_string()),
            Ok(Start::Anew { .. }) if !record.is_full_resync() => end(RequestState::Failed, "all tables are copied again".to_owned()),
            _ => None,
        },
    }
}

/// What becomes of a request that can be taken, other than `Cancel`. `None`: it waits.
fn outcome<'a, P: Position>(request: &Request, facts: &Facts<'a, '_, P>) -> Option<Outcome<'a, P>> {
    // Who asks for another try of a first set-up gets one.
    let is_first = facts.claimed.checkpoint.is_none() && (facts.claimed.claim.epoch <= 1 || request.action != Action::Retry);
    let start = match facts.start {
        _ if is_first => return Some(over(RequestState::Skipped, FIRST)),
        // It may pass by itself, and the request is taken then.
        Err(error) if error.class != Class::Stop => return None,
        Err(error) => return Some(over(RequestState::Failed, format!("{error}; nothing was done"))),
        Ok(start) => start,
    };
    Some(match request.action {
        Action::Resync => resync(request, facts, start),
        Action::ResetSequences => reset_sequences(request, facts),
        Action::Verify => match named(&request.tables, facts.tables) {
            Ok(tables) => (RequestState::Running, format!("{} tables are to be compared", tables.len()), Effect::Nothing),
            Err(unknown) => over(RequestState::Failed, unknown_tables(&unknown)),
        },
        Action::Retry | Action::Cancel => over(RequestState::Running, "a session begins at once; slot and position are kept"),
    })
}

fn resync<'a, P: Position>(request: &Request, facts: &Facts<'a, '_, P>, start: &Start<P>) -> Outcome<'a, P> {
    if !facts.may_copy {
        return over(RequestState::Failed, "snapshot.enabled is false: set it to true and ask again; nothing was done");
    }
    let tables = match named(&request.tables, facts.tables) {
        Ok(tables) => tables,
        Err(unknown) => return over(RequestState::Failed, unknown_tables(&unknown)),
    };
    if let Start::Anew { why, .. } = start {
        return (RequestState::Running, format!("{why}. The slot is made anew, and all tables are copied again"), Effect::Anew);
    }
    let checkpoint = facts.claimed.checkpoint.as_ref();
    let again = |table: &'a MappedTable| {
        let known = known(checkpoint?, table)?;
        Some(StateChange { table, state: TableState::Init, position: right_up_to(checkpoint?, known), error: None })
    };
    let changes: Vec<_> = tables.into_iter().filter_map(again).collect();
    let message = format!("{} tables are emptied and copied again; slot and position are kept", changes.len());
    (RequestState::Running, message, Effect::States(changes))
}

fn unknown_tables(names: &[String]) -> String {
    format!("not among the tables of this Mirror: {}; nothing was done", names.join(", "))
}

fn known<'c, P>(checkpoint: &'c Checkpoint<P>, table: &MappedTable) -> Option<&'c TableCheckpoint<P>> {
    checkpoint.tables.get(table.source()).filter(|known| known.target == table.target)
}

/// Up to where the rows of a table are right, when nothing has been done to them yet.
fn right_up_to<P: Position>(checkpoint: &Checkpoint<P>, known: &TableCheckpoint<P>) -> Option<P> {
    match known.state {
        TableState::Ready => Some(checkpoint.position.clone()),
        // Beyond the checkpoint a failover may undo what is in it.
        TableState::CatchingUp | TableState::Init => known.position.clone().filter(|own| *own <= checkpoint.position),
        TableState::Copying | TableState::Copied | TableState::Error => None,
    }
}

fn reset_sequences<'a, P>(request: &Request, facts: &Facts<'a, '_, P>) -> Outcome<'a, P> {
    let tables = match named(&request.tables, facts.tables) {
        Ok(tables) => tables,
        Err(unknown) => return over(RequestState::Failed, unknown_tables(&unknown)),
    };
    let with: Vec<_> = tables.into_iter().filter(|table| !table.structure.sequences.is_empty()).map(|table| (table, Vec::new())).collect();
    let message = format!("sequences of {} tables have got the values of the source", with.len());
    (RequestState::Running, message, Effect::Sequences(with))
}

/// Tables whose copy has not begun go on from where they were, since the log is held for them; what is copied goes on to follow the
/// stream; what lies between stops.
fn cancel<'a, P: Position>(facts: &Facts<'a, '_, P>, open: Option<&RequestRecord>) -> (Outcome<'a, P>, Option<Ended>) {
    let Some(record) = open else {
        let nothing = match facts.claimed.checkpoint {
            Some(_) => over(RequestState::Running, "there was nothing to cancel"),
            None => over(RequestState::Skipped, FIRST),
        };
        return (nothing, None);
    };
    let Some(checkpoint) = &facts.claimed.checkpoint else {
        let message = format!("request {} has begun the stream anew: there is nothing to go back to", record.id);
        return (over(RequestState::Failed, message), None);
    };
    // A comparison has changed nothing.
    let changes_tables = record.action == Action::Resync.as_str();
    let is_its = |table: &&MappedTable| changes_tables && record.is_about(table.source());
    let changes: Vec<_> =
        facts.tables.iter().filter(is_its).filter_map(|table| put_back(checkpoint, table, known(checkpoint, table)?)).collect();
    let cut_off: Vec<_> =
        changes.iter().filter(|change| change.state == TableState::Error).map(|change| change.table.source().to_string()).collect();
    let stopped = if cut_off.is_empty() { String::new() } else { format!("; stopped, until a Resync of them: {}", cut_off.join(", ")) };
    let back = changes.len() - cut_off.len();
    let gone_on = if changes_tables { format!("; {back} tables go on as they were") } else { String::new() };
    let message = format!("request {} was cancelled{gone_on}{stopped}", record.id);
    let ended = (record.id.clone(), RequestState::Cancelled, message.clone());
    ((RequestState::Running, message, Effect::States(changes)), Some(ended))
}

fn put_back<'a, P: Position>(checkpoint: &Checkpoint<P>, table: &'a MappedTable, known: &TableCheckpoint<P>) -> Option<StateChange<'a, P>> {
    let change = |state, position, error: Option<&str>| StateChange { table, state, position, error: error.map(str::to_owned) };
    match (known.state, known.position.as_ref()) {
        (TableState::Init, Some(own)) if *own == checkpoint.position => Some(change(TableState::Ready, None, None)),
        (TableState::Init, Some(own)) => Some(change(TableState::CatchingUp, Some(own.clone()), None)),
        (TableState::Init | TableState::Copying, _) => Some(change(TableState::Error, None, Some(CUT_OFF))),
        (TableState::Copied | TableState::CatchingUp | TableState::Ready | TableState::Error, _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{record, request};
    use super::*;
    use crate::engine::error::reason;
    use crate::engine::roles::{Claim, Owner, StreamKey};
    use crate::engine::table::{Identity, QualifiedName, TableVersion};
    use crate::engine::testing::{self, Pos};
    use std::collections::HashMap;

    fn table(name: &str) -> MappedTable {
        let name = QualifiedName::new("public", name);
        testing::table(TableVersion { id: 1, name, columns: Vec::new(), identity: Identity::Key, differs: None })
    }

    /// A stream at position 10 with tables in these states.
    fn claimed(epoch: i64, tables: &[(&MappedTable, TableState, Option<u64>)], requests: Vec<RequestRecord>) -> Claimed<Pos> {
        let known = tables.iter().map(|(table, state, position)| {
            let known = TableCheckpoint {
                source: table.source().clone(),
                target: table.target.clone(),
                state: *state,
                generation: 1,
                position: position.map(Pos),
                rows_copied: 0,
                columns: String::new(),
                error: None,
            };
            (table.source().clone(), known)
        });
        let owner = Owner { namespace: "n".into(), name: "m".into(), uid: "u".into() };
        let checkpoint = Checkpoint { position: Pos(10), timeline: 1, owner, rows_streamed: 0, tables: known.collect::<HashMap<_, _>>() };
        let key = StreamKey { system_identifier: "7".into(), database: "d".into(), slot: "s".into() };
        let checkpoint = (!tables.is_empty()).then_some(checkpoint);
        Claimed { claim: Claim { key, epoch }, checkpoint, log_intended: false, requests }
    }

    const RESUME: Start<Pos> = Start::Resume { position: Pos(10), left_at: None };

    struct Case<'a> {
        wanted: Option<&'a Request>,
        tables: &'a [MappedTable],
        claimed: Claimed<Pos>,
        start: Result<Start<Pos>, Error>,
    }

    impl<'a> Case<'a> {
        fn plan(&self) -> RequestChange<'a, Pos> {
            let Self { wanted, tables, claimed, start } = self;
            plan(&Facts { wanted: *wanted, tables, may_copy: true, claimed, start: start.as_ref() })
        }

        fn state(&self) -> Option<RequestState> {
            self.plan().taken.map(|(_, state, _)| state)
        }
    }

    fn states(change: &RequestChange<'_, Pos>) -> Vec<(String, TableState, Option<u64>)> {
        let Effect::States(changes) = &change.effect else { return Vec::new() };
        changes.iter().map(|change| (change.table.source().name.clone(), change.state, change.position.map(|Pos(n)| n))).collect()
    }

    #[test]
    fn tables_that_are_to_be_copied_again_keep_up_to_where_they_were_right() {
        let tables = [table("a"), table("b"), table("c"), table("new")];
        let known =
            [(&tables[0], TableState::Ready, None), (&tables[1], TableState::CatchingUp, Some(12)), (&tables[2], TableState::Error, None)];
        let all = request("r", Action::Resync, &[]);
        let case = Case { wanted: Some(&all), tables: &tables, claimed: claimed(5, &known, vec![]), start: Ok(RESUME) };
        let change = case.plan();
        let init = |name: &str, own| (name.to_owned(), TableState::Init, own);
        assert_eq!(states(&change), [init("a", Some(10)), init("b", None), init("c", None)]);
        assert!(matches!(change.taken, Some((_, RequestState::Running, _))));
    }

    #[test]
    fn cancelled_tables_go_back_only_where_nothing_is_missing() {
        let tables = [table("a"), table("b"), table("c"), table("d"), table("e"), table("other")];
        let known = [
            (&tables[0], TableState::Init, Some(10)),
            (&tables[1], TableState::Init, Some(9)),
            (&tables[2], TableState::Init, None),
            (&tables[3], TableState::Copying, None),
            (&tables[4], TableState::CatchingUp, Some(11)),
            (&tables[5], TableState::Copying, None),
        ];
        let running = record("r", Action::Resync, &["a", "b", "c", "public.d", "e"], RequestState::Running);
        let cancel = request("stop", Action::Cancel, &[]);
        let case = Case { wanted: Some(&cancel), tables: &tables, claimed: claimed(5, &known, vec![running]), start: Ok(RESUME) };
        let change = case.plan();
        let to = |name: &str, state, own| (name.to_owned(), state, own);
        assert_eq!(
            states(&change),
            [
                to("a", TableState::Ready, None),
                to("b", TableState::CatchingUp, Some(9)),
                to("c", TableState::Error, None),
                to("d", TableState::Error, None)
            ]
        );
        assert_eq!(change.ended.iter().map(|(id, state, _)| (id.as_str(), *state)).collect::<Vec<_>>(), [("r", RequestState::Cancelled)]);
    }

    #[test]
    fn a_comparison_goes_on_in_the_next_session_and_is_cancelled_without_a_trace() {
        let tables = [table("a"), table("b")];
        let known = [(&tables[0], TableState::Ready, None), (&tables[1], TableState::Copying, None)];
        let running = record("v", Action::Verify, &[], RequestState::Running);
        let case = Case { wanted: None, tables: &tables, claimed: claimed(5, &known, vec![running.clone()]), start: Ok(RESUME) };
        assert!(case.plan().is_empty());
        let cancel = request("stop", Action::Cancel, &[]);
        let case = Case { wanted: Some(&cancel), tables: &tables, claimed: claimed(5, &known, vec![running]), start: Ok(RESUME) };
        let change = case.plan();
        assert_eq!(states(&change), []);
        assert_eq!(change.ended, [("v".to_owned(), RequestState::Cancelled, "request v was cancelled".to_owned())]);
        let unknown = request("r", Action::Verify, &["nowhere"]);
        let case = Case { wanted: Some(&unknown), tables: &tables, claimed: claimed(5, &known, vec![]), start: Ok(RESUME) };
        assert_eq!(case.state(), Some(RequestState::Failed));
    }

    #[test]
    fn before_the_first_copy_there_is_nothing_to_do() {
        let fresh = || Ok(Start::Fresh { drop_unfinished: false });
        let tables = [table("a")];
        for action in Action::ALL {
            let asked = request("r", action, &[]);
            let state =
                |epoch| Case { wanted: Some(&asked), tables: &tables, claimed: claimed(epoch, &[], vec![]), start: fresh() }.state();
            assert_eq!(state(1), Some(RequestState::Skipped), "{action:?}");
            let later = if action == Action::Retry { RequestState::Running } else { RequestState::Skipped };
            assert_eq!(state(2), Some(later), "{action:?}");
        }
    }

    #[test]
    fn what_is_gone_fails_all_but_the_copy_of_everything() {
        let tables = [table("a")];
        let known = [(&tables[0], TableState::Ready, None)];
        let lost = || Err(Error::stop(reason::SLOT_LOST, "gone"));
        let part = record("part", Action::Resync, &["a"], RequestState::Running);
        let asked = request("r", Action::Retry, &[]);
        let case = Case { wanted: Some(&asked), tables: &tables, claimed: claimed(5, &known, vec![part.clone()]), start: lost() };
        let change = case.plan();
        assert_eq!(change.ended.iter().map(|(id, state, _)| (id.as_str(), *state)).collect::<Vec<_>>(), [("part", RequestState::Failed)]);
        assert_eq!(case.state(), Some(RequestState::Failed));
        let passing = Err(Error::retry(reason::SOURCE_UNREACHABLE, "down"));
        let case = Case { wanted: Some(&asked), tables: &tables, claimed: claimed(5, &known, vec![]), start: passing };
        assert_eq!(case.state(), None, "it waits");

        let anew = || Ok(Start::Anew { why: "gone".into(), slot_exists: true });
        let all = request("all", Action::Resync, &[]);
        let case = Case { wanted: Some(&all), tables: &tables, claimed: claimed(5, &known, vec![part]), start: anew() };
        assert!(matches!(case.plan().effect, Effect::Anew));
        let running = record("all", Action::Resync, &[], RequestState::Running);
        let case = Case { wanted: None, tables: &tables, claimed: claimed(5, &known, vec![running]), start: anew() };
        assert!(matches!(case.plan(), RequestChange { taken: None, effect: Effect::Anew, .. }), "lost while it ran");
    }

    #[test]
    fn what_was_done_when_it_was_taken_is_over_and_a_try_goes_on_until_another_one_comes() {
        let tables = [table("a")];
        let known = [(&tables[0], TableState::Ready, None)];
        for (action, expected) in [
            (Action::Retry, None),
            (Action::ResetSequences, Some(RequestState::Succeeded)),
            (Action::Cancel, Some(RequestState::Succeeded)),
            (Action::Resync, None),
        ] {
            let running = record("r", action, &[], RequestState::Running);
            let case = Case { wanted: None, tables: &tables, claimed: claimed(5, &known, vec![running]), start: Ok(RESUME) };
            assert_eq!(case.plan().ended.first().map(|(_, state, _)| *state), expected, "{action:?}");
        }
        let asked = request("next", Action::ResetSequences, &[]);
        let running = record("r", Action::Retry, &[], RequestState::Running);
        let case = Case { wanted: Some(&asked), tables: &tables, claimed: claimed(5, &known, vec![running]), start: Ok(RESUME) };
        let change = case.plan();
        assert_eq!(change.ended.first().map(|(_, state, _)| *state), Some(RequestState::Failed));
        assert!(matches!(change.taken, Some((_, RequestState::Running, _))));
    }
}
