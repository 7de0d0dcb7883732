//! One-off actions that people ask for. Pure.
//!
//! Invariants:
//! * a request is done once per id: what has been taken is recorded on the target, in the transaction that makes its first
//!   durable effect, and decisions rest on these records;
//! * one runs at a time: another one is taken when none runs, or when it says `Cancel`.

pub(super) mod attend;
mod plan;
pub(super) mod take;
pub mod verified;

use super::structure::SequenceValue;
use super::table::{MappedTable, QualifiedName, TableState};
use std::time::SystemTime;

/// What leads out when nothing that the target holds can be gone on with.
pub const WAY_OUT: &str = "set spec.request to a Resync without tables";

/// What can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Begin a session at once, whatever pause there is.
    Retry,
    /// Empty tables and copy them again.
    Resync,
    /// Set sequences of the target to the values of the source.
    ResetSequences,
    /// Compare the rows of both sides.
    Verify,
    /// End the request before it.
    Cancel,
}

impl Action {
    const ALL: [Self; 5] = [Self::Retry, Self::Resync, Self::ResetSequences, Self::Verify, Self::Cancel];

    /// The word in spec, record and status.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Retry => "Retry",
            Self::Resync => "Resync",
            Self::ResetSequences => "ResetSequences",
            Self::Verify => "Verify",
            Self::Cancel => "Cancel",
        }
    }

    /// The action of that word.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|action| action.as_str() == word)
    }
}

/// How far a request that was taken is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestState {
    /// Under way.
    Running,
    /// Done.
    Succeeded,
    /// Not done; the message says why.
    Failed,
    /// Ended by `Cancel`.
    Cancelled,
    /// Nothing was done: the request was there before the stream.
    Skipped,
}

impl RequestState {
    const ALL: [Self; 5] = [Self::Running, Self::Succeeded, Self::Failed, Self::Cancelled, Self::Skipped];

    /// The word in record and status.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "Running",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
            Self::Cancelled => "Cancelled",
            Self::Skipped => "Skipped",
        }
    }

    /// The state of that word.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == word)
    }
}

/// What somebody asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Chosen by whoever asks. Another id is another request.
    pub id: String,
    /// What is to be done.
    pub action: Action,
    /// Tables of the source as `schema.name`, or `name` in schema public; all when empty.
    pub tables: Vec<String>,
}

/// What is recorded of a request on the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestRecord {
    /// See [`Request::id`].
    pub id: String,
    /// A word of [`Action`], or of a newer build.
    pub action: String,
    /// See [`Request::tables`].
    pub tables: Vec<String>,
    /// How far it is.
    pub state: RequestState,
    /// For people.
    pub message: String,
    /// When it was taken.
    pub started_at: SystemTime,
    /// When it was over.
    pub finished_at: Option<SystemTime>,
}

impl RequestRecord {
    /// It is about this table.
    fn is_about(&self, table: &QualifiedName) -> bool {
        self.tables.is_empty() || self.tables.iter().any(|name| is_named(table, name))
    }

    /// It is under way.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.state == RequestState::Running
    }

    /// Another one waits for it. What the others do is done when they are taken; they only look on until the stream goes on.
    fn holds_others_up(&self) -> bool {
        self.is_running() && matches!(Action::parse(&self.action), None | Some(Action::Resync))
    }

    /// It copies every table again.
    #[must_use]
    pub fn is_full_resync(&self) -> bool {
        self.action == Action::Resync.as_str() && self.tables.is_empty()
    }
}

/// What happens to a table by a request.
#[derive(Clone, Debug)]
pub struct StateChange<'a, P> {
    /// The table.
    pub table: &'a MappedTable,
    /// Its state from now on.
    pub state: TableState,
    /// Up to where its rows are right.
    pub position: Option<P>,
    /// Why it is in state `Error`.
    pub error: Option<String>,
}

/// What a request does in the transaction that records it.
#[derive(Clone, Debug)]
pub enum Effect<'a, P> {
    /// Nothing that lasts.
    Nothing,
    /// Tables get other states. Those that are `Init` are going to be copied: their generation is raised.
    States(Vec<StateChange<'a, P>>),
    /// The stream begins anew, with a slot that is to be made and copies of all tables.
    Anew,
    /// Sequences of these tables are set.
    Sequences(Vec<(&'a MappedTable, Vec<SequenceValue>)>),
}

/// What is written about requests in one transaction.
#[derive(Clone, Debug)]
pub struct RequestChange<'a, P> {
    /// Earlier ones that are over: id, state, message.
    pub ended: Vec<(String, RequestState, String)>,
    /// The one that is taken, its state and its message.
    pub taken: Option<(&'a Request, RequestState, String)>,
    /// What goes with it.
    pub effect: Effect<'a, P>,
}

impl<P> RequestChange<'_, P> {
    fn is_empty(&self) -> bool {
        self.ended.is_empty() && self.taken.is_none() && matches!(self.effect, Effect::Nothing)
    }
}

/// The request that may be taken now: it was never taken, and nothing else is under way unless it is to be cancelled.
#[must_use]
pub fn next<'a>(wanted: Option<&'a Request>, records: &[RequestRecord]) -> Option<&'a Request> {
    let wanted = wanted.filter(|wanted| records.iter().all(|record| record.id != wanted.id))?;
    let may_begin = wanted.action == Action::Cancel || !records.iter().any(RequestRecord::holds_others_up);
    may_begin.then_some(wanted)
}

/// Whether all tables are to be copied again, by what is asked for or under way: it heals a stream whose changes are gone, whatever
/// else is under way.
#[must_use]
pub fn wants_all(wanted: Option<&Request>, records: &[RequestRecord]) -> bool {
    let is_new = |wanted: &Request| records.iter().all(|record| record.id != wanted.id);
    let is_asked = wanted.is_some_and(|wanted| wanted.action == Action::Resync && wanted.tables.is_empty() && is_new(wanted));
    is_asked || records.iter().any(|record| record.is_running() && record.is_full_resync())
}

/// The tables that are named; all when none is.
///
/// # Errors
/// The names that are no tables of the stream.
fn named<'a>(names: &[String], tables: &'a [MappedTable]) -> Result<Vec<&'a MappedTable>, Vec<String>> {
    if names.is_empty() {
        return Ok(tables.iter().collect());
    }
    let find = |name: &String| tables.iter().find(|table| is_named(table.source(), name)).ok_or_else(|| name.clone());
    let (found, unknown): (Vec<_>, Vec<_>) = names.iter().map(find).partition(Result::is_ok);
    if unknown.is_empty() { Ok(found.into_iter().flatten().collect()) } else { Err(unknown.into_iter().filter_map(Result::err).collect()) }
}

fn is_named(table: &QualifiedName, name: &str) -> bool {
    table.to_string() == name || (table.schema == "public" && table.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn request(id: &str, action: Action, tables: &[&str]) -> Request {
        Request { id: id.into(), action, tables: tables.iter().map(|table| (*table).to_owned()).collect() }
    }

    pub(super) fn record(id: &str, action: Action, tables: &[&str], state: RequestState) -> RequestRecord {
        RequestRecord {
            id: id.into(),
            action: action.as_str().into(),
            tables: tables.iter().map(|table| (*table).to_owned()).collect(),
            state,
            message: String::new(),
            started_at: SystemTime::UNIX_EPOCH,
            finished_at: None,
        }
    }

    #[test]
    fn a_request_is_taken_once_and_when_nothing_else_runs() {
        let asked = request("b", Action::Retry, &[]);
        let with = |records: &[RequestRecord]| next(Some(&asked), records).is_some();
        assert!(with(&[]));
        assert!(with(&[record("a", Action::Resync, &[], RequestState::Succeeded)]));
        assert!(!with(&[record("a", Action::Resync, &[], RequestState::Running)]));
        assert!(with(&[record("a", Action::Retry, &[], RequestState::Running)]));
        for state in RequestState::ALL {
            assert!(!with(&[record("b", Action::Retry, &[], state)]), "{state:?}");
        }
        let cancel = request("c", Action::Cancel, &[]);
        assert!(next(Some(&cancel), &[record("a", Action::Resync, &[], RequestState::Running)]).is_some());
        assert!(next(None, &[]).is_none());
    }

    #[test]
    fn only_a_resync_of_everything_begins_anew() {
        let all = request("b", Action::Resync, &[]);
        assert!(wants_all(Some(&all), &[]));
        assert!(!wants_all(Some(&all), &[record("b", Action::Resync, &[], RequestState::Succeeded)]), "it was done");
        assert!(wants_all(Some(&all), &[record("a", Action::Resync, &["t"], RequestState::Running)]), "which is of no use any more");
        assert!(!wants_all(Some(&request("b", Action::Resync, &["t"])), &[]));
        assert!(wants_all(None, &[record("a", Action::Resync, &[], RequestState::Running)]), "also when the field was removed");
        assert!(!wants_all(None, &[record("a", Action::Resync, &["t"], RequestState::Running)]));
    }

    #[test]
    fn words_are_read_back() {
        assert!(Action::ALL.iter().all(|action| Action::parse(action.as_str()) == Some(*action)));
        assert!(RequestState::ALL.iter().all(|state| RequestState::parse(state.as_str()) == Some(*state)));
        assert_eq!((Action::parse("Adopt"), RequestState::parse("Pending")), (None, None));
    }
}
