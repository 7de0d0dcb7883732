//! What a session reports while it runs; read by whoever shows it.

use super::latency::Latency;
use super::position::Position;
use super::request::verified::Verification;
use super::request::{Request, RequestRecord, next};
use super::retention::Retention;
use super::roles::{Applied, ApplyMode, Checkpoint, LogLoad};
use super::table::{QualifiedName, TableState};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};
use tokio::sync::watch;

/// What a session does, in one word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Connecting, claiming, checking.
    #[default]
    Starting,
    /// Publication, slot and tables are being made.
    SettingUp,
    /// Tables are being copied.
    Copying,
    /// Copied tables follow the stream up to its position.
    CatchingUp,
    /// Every table follows the stream.
    Streaming,
}

/// A look at a session.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// What it does.
    pub phase: Phase,
    /// Epoch of its claim; 0 before.
    pub epoch: i64,
    /// Last position received.
    pub received: Option<String>,
    /// Last position committed on the target.
    pub applied: Option<String>,
    /// Last position on the target's disk, as confirmed to the source.
    pub confirmed: Option<String>,
    /// Bytes of log that are not applied.
    pub lag_bytes: Option<u64>,
    /// Seconds since the commit of the last transaction applied, while more is waiting; else 0.
    pub lag_seconds: Option<u64>,
    /// From the source's commit to the target's, by transaction.
    pub latency: Latency,
    /// Number of tables per state.
    pub tables: BTreeMap<&'static str, u32>,
    /// Tables in state `Error`, with the reason.
    pub table_errors: BTreeMap<String, String>,
    /// Rows copied by all copies that count.
    pub rows_copied: u64,
    /// Rows to copy, by statistics.
    pub rows_to_copy: u64,
    /// Rows written from the stream since its first checkpoint.
    pub rows_streamed: u64,
    /// Rows inserted by this process.
    pub inserts: u64,
    /// Rows updated by this process.
    pub updates: u64,
    /// Rows deleted by this process.
    pub deletes: u64,
    /// Parts applied.
    pub batches: u64,
    /// Bytes of the parts applied.
    pub bytes_applied: u64,
    /// Bytes of changes that are written of a transaction which has not ended on the source.
    pub early_bytes: u64,
    /// All tables have been copied.
    pub snapshot_completed: bool,
    /// Every table follows the stream.
    pub streaming: bool,
    /// How changes are written.
    pub apply_mode: Option<&'static str>,
    /// What is waited for, for people.
    pub waiting: Option<String>,
    /// What the log takes of the machine.
    pub load: LogLoad,
    /// What the source keeps for the stream, as it was seen last.
    pub retention: Option<Retention>,
    /// What is recorded of requests, the newest first; `None` before a claim has read it.
    pub requests: Option<Vec<RequestRecord>>,
    /// What the last comparison has found.
    pub verification: Option<Verification>,
}

#[derive(Debug, Default)]
struct State {
    view: View,
    tables: BTreeMap<QualifiedName, TableState>,
    /// What is done to tables whose rows are there.
    steps: BTreeMap<QualifiedName, String>,
    /// What stays as it is until somebody changes something.
    notes: Vec<String>,
    last_commit: Option<SystemTime>,
    /// The session has taken what it could of requests.
    has_taken_requests: bool,
    rolled_back: Option<RolledBack>,
}

impl State {
    fn step(&self) -> Option<String> {
        let first = self.steps.values().next()?;
        let more = self.steps.len() - 1;
        Some(if more > 0 { format!("{first}; and {more} more") } else { first.clone() })
    }
}

/// A transaction larger than a batch that was rolled back on the target before its end, and begins again each time.
#[derive(Debug)]
struct RolledBack {
    commit_start: Option<String>,
    times: u32,
    bytes: usize,
}

/// Roll-backs of one transaction from which it is told: whoever suspends again and again should know.
const TELL_ROLL_BACKS: u32 = 3;

impl RolledBack {
    fn told(&self) -> Option<String> {
        let Self { commit_start, times, bytes } = self;
        (*times >= TELL_ROLL_BACKS).then(|| {
            let place = commit_start.as_deref().unwrap_or("an unknown position");
            format!("a transaction at {place} was rolled back {times} times before its end and begins anew each time; {} MiB of it had been applied", bytes >> 20)
        })
    }
}

/// Shared by a session and its watchers.
#[derive(Debug, Default)]
pub struct Progress {
    state: Mutex<State>,
    phase: watch::Sender<Phase>,
}

impl Progress {
    /// Nothing has happened yet.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every update is complete in itself, so the state behind a panic is still right.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A consistent copy.
    #[must_use]
    pub fn view(&self) -> View {
        let state = self.state();
        let mut view = state.view.clone();
        for table in state.tables.values() {
            *view.tables.entry(table.as_str()).or_default() += 1;
        }
        let streaming = view.streaming;
        let noted = || (streaming && !state.notes.is_empty()).then(|| state.notes.join("; "));
        let rolled_back = || state.rolled_back.as_ref().and_then(RolledBack::told);
        view.waiting = view.waiting.or_else(|| state.step()).or_else(rolled_back).or_else(noted);
        let behind = view.lag_bytes.is_some_and(|bytes| bytes > 0) && view.received != view.applied;
        view.lag_seconds = match state.last_commit {
            _ if !behind && view.lag_bytes.is_some() => Some(0),
            Some(commit) => Some(commit.elapsed().unwrap_or_default().as_secs()),
            None => None,
        };
        view
    }

    /// A new session begins: what it has not found out yet is not known; counts go on.
    pub fn begin_session(&self) {
        let mut state = self.state();
        let old = std::mem::take(&mut *state);
        state.view = View {
            rows_streamed: old.view.rows_streamed,
            inserts: old.view.inserts,
            updates: old.view.updates,
            deletes: old.view.deletes,
            batches: old.view.batches,
            bytes_applied: old.view.bytes_applied,
            latency: old.view.latency,
            rows_copied: old.view.rows_copied,
            rows_to_copy: old.view.rows_to_copy,
            snapshot_completed: old.view.snapshot_completed,
            received: old.view.received,
            applied: old.view.applied,
            confirmed: old.view.confirmed,
            retention: old.view.retention,
            requests: old.view.requests,
            verification: old.view.verification,
            ..View::default()
        };
        state.tables = old.tables;
        state.rolled_back = old.rolled_back;
        self.phase.send_replace(Phase::Starting);
    }

    pub(super) fn rolled_back(&self, commit_start: Option<String>, bytes: usize) {
        let mut state = self.state();
        let earlier = state.rolled_back.take().filter(|earlier| earlier.commit_start == commit_start);
        let times = earlier.map_or(0, |earlier| earlier.times) + 1;
        state.rolled_back = Some(RolledBack { commit_start, times, bytes });
    }

    pub(super) fn large_transaction_ended(&self) {
        self.state().rolled_back = None;
    }

    pub(super) fn set_phase(&self, phase: Phase) {
        let mut state = self.state();
        state.view.phase = phase;
        state.view.streaming = phase == Phase::Streaming;
        if matches!(phase, Phase::CatchingUp | Phase::Streaming) {
            state.view.snapshot_completed = true;
        }
        self.phase.send_replace(phase);
    }

    /// Waits until every table follows the stream.
    pub(super) async fn streaming(&self) {
        // The sender lives as long as `self`.
        let _ = self.phase.subscribe().wait_for(|phase| *phase == Phase::Streaming).await;
    }

    /// Shows what is being done to a table, or that nothing is any more.
    pub(super) fn set_step(&self, table: &QualifiedName, step: Option<String>) {
        let steps = &mut self.state().steps;
        match step {
            Some(step) => drop(steps.insert(table.clone(), step)),
            None => drop(steps.remove(table)),
        }
    }

    /// Shows what people should know for the rest of the session.
    pub(super) fn add_notes(&self, notes: Vec<String>) {
        notes.iter().for_each(|note| tracing::warn!("{note}"));
        self.state().notes.extend(notes);
    }

    pub(super) fn set_claim<P>(&self, epoch: i64, mode: ApplyMode, checkpoint: Option<&Checkpoint<P>>) {
        let mut state = self.state();
        state.view.epoch = epoch;
        state.view.apply_mode = Some(mode.as_str());
        // What a lost session had written and not committed comes again.
        state.view.rows_streamed = checkpoint.map_or(0, |checkpoint| checkpoint.rows_streamed);
        state.view.rows_copied = checkpoint.map_or(0, Checkpoint::rows_copied);
    }

    /// Shows what is recorded of requests.
    pub(super) fn set_requests(&self, records: Vec<RequestRecord>) {
        self.state().view.requests = Some(records);
    }

    /// Shows what a comparison has found so far.
    pub(super) fn set_verification(&self, verification: Verification) {
        self.state().view.verification = Some(verification);
    }

    /// From now on a request waits for the next session.
    pub(super) fn has_taken_requests(&self) {
        self.state().has_taken_requests = true;
    }

    /// Whether a request could be taken if a session began. `in_session`: by the next one only, since the present one has passed the
    /// moment.
    #[must_use]
    pub fn could_take(&self, wanted: Option<&Request>, in_session: bool) -> bool {
        let state = self.state();
        (!in_session || state.has_taken_requests) && next(wanted, state.view.requests.as_deref().unwrap_or_default()).is_some()
    }

    /// State of each table.
    pub(super) fn table_states(&self) -> BTreeMap<QualifiedName, TableState> {
        self.state().tables.clone()
    }

    pub(super) fn set_waiting(&self, waiting: Option<String>) {
        self.state().view.waiting = waiting;
    }

    pub(super) fn set_tables(&self, tables: BTreeMap<QualifiedName, TableState>) {
        let mut state = self.state();
        let errors = tables.iter().filter(|(_, table)| **table == TableState::Error).map(|(name, _)| name.to_string());
        let errors: Vec<String> = errors.collect();
        state.view.table_errors.retain(|name, _| errors.contains(name));
        state.tables = tables;
    }

    pub(super) fn set_table(&self, name: &QualifiedName, table: TableState) {
        self.state().tables.insert(name.clone(), table);
    }

    pub(super) fn table_failed(&self, name: &QualifiedName, why: String) {
        let mut state = self.state();
        state.tables.insert(name.clone(), TableState::Error);
        state.view.table_errors.insert(name.to_string(), why);
    }

    pub(super) fn begin_copy(&self, copied_before: u64, to_copy: u64) {
        let mut state = self.state();
        state.view.snapshot_completed = false;
        state.view.rows_copied = copied_before;
        state.view.rows_to_copy = to_copy;
    }

    pub(super) fn set_copied(&self, rows: u64) {
        self.state().view.rows_copied = rows;
    }

    pub(super) fn add_copied(&self, rows: u64) {
        self.state().view.rows_copied += rows;
    }

    pub(super) fn set_position<P: Position>(&self, received: &P, applied: &P, head: &P) {
        let mut state = self.state();
        state.view.received = Some(received.to_string());
        state.view.applied = Some(applied.to_string());
        state.view.lag_bytes = head.bytes_since(applied);
    }

    pub(super) fn set_load(&self, load: LogLoad) {
        self.state().view.load = load;
    }

    pub(super) fn set_early(&self, bytes: usize) {
        self.state().view.early_bytes = bytes as u64;
    }

    /// Shows what the source keeps; `None` when it can't be asked.
    pub fn set_retention(&self, retention: Option<Retention>) {
        self.state().view.retention = retention;
    }

    pub(super) fn set_confirmed<P: Position>(&self, confirmed: &P) {
        self.state().view.confirmed = Some(confirmed.to_string());
    }

    /// A part is over; `commits`: when the source has committed the transactions that have ended with it.
    pub(super) fn applied(&self, applied: Applied, bytes: usize, commits: impl IntoIterator<Item = SystemTime>) {
        let mut state = self.state();
        let (now, instant) = (SystemTime::now(), Instant::now());
        for commit in commits {
            state.last_commit = Some(commit);
            // Clocks differ: a commit of the future has taken no time.
            state.view.latency.record(now.duration_since(commit).unwrap_or_default(), instant);
        }
        let view = &mut state.view;
        view.inserts += applied.inserts;
        view.updates += applied.updates;
        view.deletes += applied.deletes;
        view.rows_streamed += applied.inserts + applied.updates + applied.deletes;
        view.batches += 1;
        view.bytes_applied += bytes as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::testing::Pos;

    #[test]
    fn lag_in_seconds_counts_only_while_something_waits() {
        let progress = Progress::new();
        assert_eq!(progress.view().lag_seconds, None);
        progress.applied(Applied::default(), 0, Some(SystemTime::UNIX_EPOCH));
        progress.set_position(&Pos(20), &Pos(10), &Pos(30));
        let view = progress.view();
        assert_eq!(view.lag_bytes, Some(20));
        assert!(view.lag_seconds.is_some_and(|seconds| seconds > 1_000_000));
        progress.set_position(&Pos(20), &Pos(20), &Pos(30));
        assert_eq!(progress.view().lag_seconds, Some(0), "what comes next does not concern this stream yet");
    }

    #[test]
    fn a_transaction_that_is_rolled_back_again_and_again_is_told() {
        let progress = Progress::new();
        for times in 1..=3 {
            assert_eq!(progress.view().waiting, None, "after {} times", times - 1);
            progress.rolled_back(Some("0/10".into()), 3 << 20);
            progress.begin_session();
        }
        let told = progress.view().waiting.expect("it is told");
        assert!(told.contains("0/10") && told.contains("3 times") && told.contains("3 MiB"), "{told}");
        progress.large_transaction_ended();
        assert_eq!(progress.view().waiting, None);
        progress.rolled_back(Some("0/20".into()), 1);
        assert_eq!(progress.view().waiting, None, "another transaction is counted from one");
    }

    #[test]
    fn a_new_session_keeps_counts_and_forgets_its_state() {
        let progress = Progress::new();
        progress.applied(Applied { inserts: 2, updates: 1, deletes: 1, committed: true }, 10, None);
        progress.set_phase(Phase::Streaming);
        progress.begin_session();
        let view = progress.view();
        assert_eq!((view.phase, view.rows_streamed, view.streaming), (Phase::Starting, 4, false));
        assert!(view.snapshot_completed);
    }
}
