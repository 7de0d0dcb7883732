//! Asks every registered worker how it is, and wakes its Mirror when that matters.
//!
//! One task, on the leader only. A *transition* wakes the Mirror at once; progress wakes it at a pace that keeps all status writes of
//! a large installation together below [`PROGRESS_PER_SECOND`]. Numbers in between live in metrics and in [`PollerHandle::latest`].

use super::metrics::Metrics;
use super::slim::SlimMirror;
use super::worker_client::{WorkerClient, WorkerError};
use crate::worker::contract::{Phase, Retention, Status};
use futures::Stream;
use futures::stream::unfold;
use kube::runtime::reflector::ObjectRef;
use rand::RngExt as _;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Pace for a worker that streams or rests.
const STEADY: Duration = Duration::from_secs(10);
/// Pace for a worker on its way: people watch it.
const MOVING: Duration = Duration::from_secs(2);
/// Above [`MANY`] workers the steady pace stretches towards this.
const STRETCHED: Duration = Duration::from_secs(30);
/// Number of workers from which the steady pace stretches.
const MANY: usize = 3_000;
/// Polls at the same time.
const IN_FLIGHT: usize = 256;
/// Failures in a row that make a transition: one lost answer is none.
const FAILURES: u32 = 2;
/// A poll that has not been settled by then is repeated; far above the deadline of a call.
const LOST: Duration = Duration::from_secs(30);
/// Wake-ups for progress, all Mirrors together.
const PROGRESS_PER_SECOND: f64 = 20.0;
/// Wake-ups that wait to be taken; what does not fit is sent at the next poll.
const QUEUE: usize = 1_024;

/// What is known of a worker.
#[derive(Clone, Debug)]
pub struct Polled {
    /// Last status it gave, and when.
    pub status: Option<(Arc<Status>, Instant)>,
    /// Failure of the last poll; `None` when it answered.
    pub failure: Option<PollFailure>,
}

/// Polls that failed in a row.
#[derive(Clone, Debug, PartialEq)]
pub struct PollFailure {
    /// The last of them.
    pub error: WorkerError,
    /// How many.
    pub count: u32,
    /// Since when.
    pub since: Instant,
}

impl Polled {
    /// The status, unless the worker has failed to answer several times in a row.
    pub fn current(&self) -> Option<&Status> {
        let fails = self.failure.as_ref().is_some_and(|failure| failure.count >= FAILURES);
        self.status.as_ref().filter(|_| !fails).map(|(status, _)| status.as_ref())
    }
}

/// What wakes a Mirror at once when it changes.
#[derive(Clone, Debug, PartialEq)]
enum Key {
    Answers {
        phase: Phase,
        error: Option<(String, String)>,
        notice: Option<String>,
        epoch: i64,
        generation: i64,
        copied: bool,
        streaming: bool,
        tables: BTreeMap<String, u32>,
        /// Id and state of each request.
        requests: Vec<(String, String)>,
    },
    Fails(&'static str),
}

/// What may wake a Mirror when it has moved.
#[derive(Clone, Debug, Default, PartialEq)]
struct Numbers {
    applied: Option<String>,
    rows_copied: u64,
    rows_streamed: u64,
    lag_bytes: Option<u64>,
    retention: Option<Retention>,
    waiting: Option<String>,
}

/// Whether a Mirror is to be woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wake {
    Transition,
    Progress,
    No,
}

struct Worker {
    mirror: ObjectRef<SlimMirror>,
    address: String,
    due: Instant,
    /// When the last poll that was settled had begun.
    settled: Option<Instant>,
    polled: Polled,
    /// What the Mirror was woken with last, and when.
    told: Option<(Key, Numbers, Instant)>,
}

struct State {
    workers: Mutex<HashMap<String, Worker>>,
    changed: Notify,
    wake: mpsc::Sender<ObjectRef<SlimMirror>>,
    woken: Mutex<Option<mpsc::Receiver<ObjectRef<SlimMirror>>>>,
}

/// Registers workers and reads what was polled. Cheap to clone.
#[derive(Clone)]
pub struct PollerHandle {
    state: Arc<State>,
}

impl Default for PollerHandle {
    fn default() -> Self {
        let (wake, woken) = mpsc::channel(QUEUE);
        Self { state: Arc::new(State { workers: Mutex::default(), changed: Notify::new(), wake, woken: Mutex::new(Some(woken)) }) }
    }
}

impl PollerHandle {
    /// Polls the worker of `mirror` at `address` (`host:port`) from now on. Repeating it changes nothing; another address forgets what
    /// was polled and asks at once.
    pub fn register(&self, mirror: ObjectRef<SlimMirror>, uid: &str, address: &str) {
        let mut workers = self.workers();
        if workers.get(uid).is_some_and(|worker| worker.address == address) {
            return;
        }
        let told = workers.remove(uid).and_then(|worker| worker.told);
        let polled = Polled { status: None, failure: None };
        workers.insert(uid.to_owned(), Worker { mirror, address: address.to_owned(), due: Instant::now(), settled: None, polled, told });
        drop(workers);
        self.state.changed.notify_one();
    }

    /// Ends the polling of the Mirror with this uid.
    pub fn unregister(&self, uid: &str) {
        self.workers().remove(uid);
    }

    /// Asks at once, for example after a push.
    pub fn poll_soon(&self, uid: &str) {
        if let Some(worker) = self.workers().get_mut(uid) {
            worker.due = Instant::now();
        }
        self.state.changed.notify_one();
    }

    /// What is known of the worker; `None` before its first poll has ended.
    pub fn latest(&self, uid: &str) -> Option<Polled> {
        self.workers().get(uid).map(|worker| worker.polled.clone()).filter(|polled| polled.status.is_some() || polled.failure.is_some())
    }

    /// Mirrors to wake, for `Controller::reconcile_on`. One taker; a second gets a stream that stays empty.
    pub fn changes(&self) -> impl Stream<Item = ObjectRef<SlimMirror>> + Send + 'static + use<> {
        let taken = self.state.woken.lock().unwrap_or_else(PoisonError::into_inner).take();
        unfold(taken, |receiver| async move {
            let Some(mut receiver) = receiver else {
                return std::future::pending().await;
            };
            let mirror = receiver.recv().await?;
            Some((mirror, Some(receiver)))
        })
    }

    fn workers(&self) -> std::sync::MutexGuard<'_, HashMap<String, Worker>> {
        self.state.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes those that are due, at most `room`, and says when the next one will be.
    fn take_due(&self, room: usize) -> (Vec<(String, String)>, Option<Instant>) {
        let now = Instant::now();
        let mut taken = Vec::new();
        let mut next: Option<Instant> = None;
        for (uid, worker) in self.workers().iter_mut() {
            if worker.due <= now && taken.len() < room {
                worker.due = now + LOST;
                taken.push((uid.clone(), worker.address.clone()));
            }
            next = Some(next.map_or(worker.due, |next| next.min(worker.due)));
        }
        (taken, next)
    }

    /// Notes the answer to a poll that began at `begun`, wakes the Mirror if need be, and sets the time of the next poll.
    fn settle(&self, uid: &str, address: &str, begun: Instant, answer: Result<Status, WorkerError>) {
        let now = Instant::now();
        let mut workers = self.workers();
        let count = workers.len();
        // The worker may have been taken out or moved meanwhile, or a later poll may have been answered first.
        let Some(worker) = workers.get_mut(uid).filter(|worker| worker.address == address && worker.settled < Some(begun)) else {
            return;
        };
        worker.settled = Some(begun);
        match answer {
            Ok(status) => worker.polled = Polled { status: Some((Arc::new(status), now)), failure: None },
            Err(error) => {
                let (before, since) = worker.polled.failure.as_ref().map_or((0, now), |failure| (failure.count, failure.since));
                worker.polled.failure = Some(PollFailure { error, count: before.saturating_add(1), since });
            }
        }
        worker.due = now + interval(&worker.polled, count, rand::rng().random());
        let (key, numbers) = digest(&worker.polled);
        let Some(key) = key else { return };
        let told = worker.told.as_ref().map(|(key, numbers, at)| (key, numbers, now.duration_since(*at)));
        if decide(told, &key, &numbers, count) == Wake::No {
            return;
        }
        // A full queue loses nothing: what was not told is told after the next poll.
        if self.state.wake.try_send(worker.mirror.clone()).is_ok() {
            worker.told = Some((key, numbers, now));
        }
    }

    fn phases(&self) -> Vec<(String, usize)> {
        let mut counts = BTreeMap::<String, usize>::new();
        for worker in self.workers().values() {
            let phase = worker.polled.current().map_or_else(|| "Unreachable".to_owned(), |status| format!("{:?}", status.phase));
            *counts.entry(phase).or_default() += 1;
        }
        counts.into_iter().collect()
    }
}

/// What is compared; `None` while nothing is certain.
fn digest(polled: &Polled) -> (Option<Key>, Numbers) {
    let numbers = polled.status.as_ref().map(|(status, _)| Numbers {
        applied: status.applied.clone(),
        rows_copied: status.rows_copied,
        rows_streamed: status.rows_streamed,
        lag_bytes: status.lag_bytes,
        retention: status.retention.clone(),
        waiting: status.waiting.clone(),
    });
    let key = match (&polled.failure, &polled.status) {
        (Some(failure), _) if failure.count >= FAILURES => Some(Key::Fails(failure.error.reason())),
        (Some(_), _) | (None, None) => None,
        (None, Some((status, _))) => Some(Key::Answers {
            phase: status.phase,
            error: status.error.as_ref().map(|error| (error.class.clone(), error.reason.clone())),
            notice: status.notice.as_ref().map(|notice| notice.reason.clone()),
            epoch: status.epoch,
            generation: status.generation,
            copied: status.snapshot_completed,
            streaming: status.streaming,
            tables: status.tables.clone(),
            requests: status.requests.iter().flatten().map(|request| (request.id.clone(), request.state.clone())).collect(),
        }),
    };
    (key, numbers.unwrap_or_default())
}

/// Whether what was polled is worth waking the Mirror. `told`: what it was woken with last and how long ago; `count`: all workers.
fn decide(told: Option<(&Key, &Numbers, Duration)>, key: &Key, numbers: &Numbers, count: usize) -> Wake {
    let Some((last_key, last_numbers, ago)) = told else {
        return Wake::Transition;
    };
    if last_key != key {
        return Wake::Transition;
    }
    let copying = matches!(key, Key::Answers { phase: Phase::Copying | Phase::CatchingUp, .. });
    let pace = if copying { MOVING } else { STEADY };
    #[allow(clippy::cast_precision_loss)] // far below 2^52 workers
    let fair = Duration::from_secs_f64(count as f64 / PROGRESS_PER_SECOND);
    if last_numbers != numbers && ago >= pace.max(fair) { Wake::Progress } else { Wake::No }
}

/// Time to the next poll, ± 20 % so that workers spread; `random` lies in `0.0..1.0`.
fn interval(polled: &Polled, count: usize, random: f64) -> Duration {
    let moving = match (&polled.failure, &polled.status) {
        // An unreachable worker is asked often at first; its pod's events wake the Mirror anyway.
        (Some(failure), _) => failure.count <= 10,
        (None, Some((status, _))) => {
            let is_asked = status.requests.iter().flatten().any(|request| request.finished_at.is_none());
            is_asked || matches!(status.phase, Phase::Starting | Phase::SettingUp | Phase::Copying | Phase::CatchingUp | Phase::Retrying)
        }
        (None, None) => true,
    };
    let steady = if count > MANY {
        #[allow(clippy::cast_precision_loss)] // far below 2^52 workers
        STEADY.mul_f64(count as f64 / MANY as f64).min(STRETCHED)
    } else {
        STEADY
    };
    (if moving { MOVING } else { steady }).mul_f64(0.8 + 0.4 * random.clamp(0.0, 1.0))
}

/// Polls until `shutdown`.
pub async fn run(handle: PollerHandle, client: WorkerClient, metrics: Metrics, shutdown: CancellationToken) {
    let mut polls = JoinSet::new();
    let mut counted = Instant::now();
    loop {
        let (due, next) = handle.take_due(IN_FLIGHT - polls.len());
        for (uid, address) in due {
            let client = client.clone();
            polls.spawn(async move {
                let begun = Instant::now();
                let answer = client.status(&address, &uid).await;
                (uid, address, begun, answer)
            });
        }
        if counted.elapsed() >= Duration::from_secs(1) {
            metrics.set_workers(&handle.phases());
            counted = Instant::now();
        }
        let next = next.unwrap_or_else(|| Instant::now() + STEADY);
        let wait = tokio::time::Instant::from_std(next.max(Instant::now() + Duration::from_millis(50)));
        tokio::select! {
            () = shutdown.cancelled() => return,
            Some(Ok((uid, address, begun, answer))) = polls.join_next() => {
                metrics.polled(answer.as_ref().map_or_else(WorkerError::reason, |_| "ok"), begun.elapsed());
                handle.settle(&uid, &address, begun, answer);
            }
            () = handle.state.changed.notified() => {}
            () = tokio::time::sleep_until(wait), if polls.len() < IN_FLIGHT => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::contract::{Failure, Notice, RequestReport};

    fn status(phase: Phase) -> Status {
        serde_json::from_value(serde_json::json!({
            "contract": 1, "version": "0", "generation": 1, "pod": "p", "phase": phase, "epoch": 1, "slot": "s", "publication": "p",
            "tables": {}, "rowsCopied": 0, "rowsToCopy": 0, "rowsStreamed": 0, "snapshotCompleted": false, "streaming": false,
        }))
        .expect("a status")
    }

    fn answered(status: Status) -> Polled {
        Polled { status: Some((Arc::new(status), Instant::now())), failure: None }
    }

    fn key(status: Status) -> Key {
        digest(&answered(status)).0.expect("an answer is certain")
    }

    fn failed(count: u32) -> Polled {
        Polled {
            status: Some((Arc::new(status(Phase::Streaming)), Instant::now())),
            failure: Some(PollFailure { error: WorkerError::Unauthorized, count, since: Instant::now() }),
        }
    }

    #[test]
    fn transitions_wake_at_once() {
        let before = key(status(Phase::Copying));
        let none = Numbers::default();
        let told = Some((&before, &none, Duration::ZERO));
        assert_eq!(decide(None, &before, &none, 1), Wake::Transition, "the first answer");
        assert_eq!(decide(told, &before, &none, 1), Wake::No);
        let changes: [fn(&mut Status); 9] = [
            |status| status.phase = Phase::CatchingUp,
            |status| {
                status.error = Some(Failure {
                    class: "Retry".into(),
                    reason: "SourceUnreachable".into(),
                    message: String::new(),
                    count: 1,
                    retry_in_seconds: None,
                });
            },
            |status| status.notice = Some(Notice { reason: "SlotLost".into(), message: String::new() }),
            |status| status.epoch = 2,
            |status| status.generation = 2,
            |status| status.snapshot_completed = true,
            |status| status.streaming = true,
            |status| status.tables = [("Ready".to_owned(), 1)].into(),
            |status| {
                status.requests = Some(vec![RequestReport {
                    id: "r".into(),
                    action: "Retry".into(),
                    is_full_resync: false,
                    state: "Running".into(),
                    started_at: String::new(),
                    finished_at: None,
                    message: String::new(),
                }]);
            },
        ];
        for (number, change) in changes.iter().enumerate() {
            let mut after = status(Phase::Copying);
            change(&mut after);
            assert_eq!(decide(told, &key(after), &none, 10_000), Wake::Transition, "change {number}");
        }
    }

    #[test]
    fn the_count_of_a_repeated_error_is_no_transition() {
        let with = |count| {
            let failure = Failure {
                class: "Retry".into(),
                reason: "SourceUnreachable".into(),
                message: format!("try {count}"),
                count,
                retry_in_seconds: None,
            };
            key(Status { error: Some(failure), ..status(Phase::Retrying) })
        };
        assert_eq!(with(1), with(9));
    }

    #[test]
    fn progress_is_throttled_by_phase_and_by_number() {
        let (old, new) = (Numbers::default(), Numbers { rows_copied: 7, ..Numbers::default() });
        let at = |phase, seconds, count| {
            let same = key(status(phase));
            decide(Some((&same, &old, Duration::from_secs(seconds))), &same, &new, count)
        };
        assert_eq!(at(Phase::Copying, 1, 1), Wake::No);
        assert_eq!(at(Phase::Copying, 2, 1), Wake::Progress);
        assert_eq!(at(Phase::Streaming, 9, 1), Wake::No);
        assert_eq!(at(Phase::Streaming, 10, 1), Wake::Progress);
        assert_eq!(at(Phase::Streaming, 499, 10_000), Wake::No);
        assert_eq!(at(Phase::Streaming, 500, 10_000), Wake::Progress);
        let same = key(status(Phase::Streaming));
        assert_eq!(decide(Some((&same, &old, Duration::from_secs(9_999))), &same, &old, 1), Wake::No, "nothing moved");
    }

    #[test]
    fn what_the_source_keeps_is_progress() {
        let with = |bytes| {
            let kept = Retention { slot_exists: true, retained_bytes: Some(bytes), wal_status: None, safe_wal_size: None };
            digest(&answered(Status { retention: Some(kept), ..status(Phase::Suspended) }))
        };
        let ((old_key, old), (new_key, new)) = (with(1), with(2));
        assert_eq!(old_key, new_key);
        let key = new_key.expect("an answer is certain");
        assert_eq!(decide(Some((&key, &old, STEADY)), &key, &new, 1), Wake::Progress);
    }

    #[test]
    fn one_lost_answer_is_no_transition() {
        assert_eq!(digest(&failed(1)).0, None);
        assert_eq!(digest(&failed(2)).0, Some(Key::Fails("WorkerUnauthorized")));
        assert!(failed(1).current().is_some() && failed(2).current().is_none());
    }

    #[test]
    fn what_moves_is_asked_often_and_many_are_asked_less() {
        let pace = |phase, count| interval(&answered(status(phase)), count, 0.5).as_secs();
        assert_eq!(pace(Phase::Copying, 1), 2);
        assert_eq!(pace(Phase::Streaming, 1), 10);
        assert_eq!(pace(Phase::Suspended, 1), 10);
        assert_eq!(pace(Phase::Streaming, 6_000), 20);
        assert_eq!(pace(Phase::Streaming, 50_000), 30);
        assert_eq!(interval(&failed(1), 1, 0.5), MOVING);
        assert_eq!(interval(&failed(11), 1, 0.5), STEADY);
        let spread = (interval(&failed(11), 1, 0.0), interval(&failed(11), 1, 1.0));
        assert_eq!(spread, (Duration::from_secs(8), Duration::from_secs(12)));
    }

    #[test]
    fn a_full_queue_loses_no_transition() {
        let handle = PollerHandle::default();
        for number in 0..=QUEUE {
            handle.register(ObjectRef::new(&format!("m{number}")).within("n"), &format!("u{number}"), "1.2.3.4:1");
            handle.settle(&format!("u{number}"), "1.2.3.4:1", Instant::now(), Ok(status(Phase::Copying)));
        }
        let untold = |handle: &PollerHandle| handle.workers().values().filter(|worker| worker.told.is_none()).count();
        assert_eq!(untold(&handle), 1);
        let mut woken = handle.state.woken.lock().expect("no panic").take().expect("not taken yet");
        assert!(woken.try_recv().is_ok());
        handle.settle(&format!("u{QUEUE}"), "1.2.3.4:1", Instant::now(), Ok(status(Phase::Copying)));
        assert_eq!(untold(&handle), 0);
    }

    #[test]
    fn an_answer_from_a_former_address_is_dropped() {
        let handle = PollerHandle::default();
        handle.register(ObjectRef::new("m").within("n"), "u", "1.2.3.4:1");
        handle.register(ObjectRef::new("m").within("n"), "u", "1.2.3.5:1");
        handle.settle("u", "1.2.3.4:1", Instant::now(), Ok(status(Phase::Streaming)));
        assert!(handle.latest("u").is_none());
    }

    #[test]
    fn an_answer_that_was_overtaken_is_dropped() {
        let handle = PollerHandle::default();
        handle.register(ObjectRef::new("m").within("n"), "u", "a");
        let first = Instant::now();
        let second = first + Duration::from_millis(1);
        handle.settle("u", "a", second, Ok(status(Phase::Suspended)));
        handle.settle("u", "a", first, Ok(status(Phase::Streaming)));
        let phase = handle.latest("u").and_then(|polled| polled.current().map(|status| status.phase));
        assert_eq!(phase, Some(Phase::Suspended));
    }

    #[test]
    fn a_poll_under_way_is_not_begun_again_unless_asked_for() {
        let handle = PollerHandle::default();
        handle.register(ObjectRef::new("m").within("n"), "u", "a");
        assert_eq!(handle.take_due(0).0.len(), 0, "no room");
        assert_eq!(handle.take_due(1).0.len(), 1);
        assert_eq!(handle.take_due(1).0.len(), 0, "under way");
        handle.poll_soon("u");
        assert_eq!(handle.take_due(1).0.len(), 1, "what was pushed meanwhile is seen by a poll of its own");
    }
}
