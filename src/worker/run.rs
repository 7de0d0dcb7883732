//! The event loop: what happens goes into [`decide`], what it answers is carried out here.

use super::board::{Board, LastFailure};
use super::config::{ConfigError, Copy, Mounted, Verdict, judge, session_differs};
use super::contract::Desired;
use super::credentials::Credentials;
use super::http::{self, Push, Pushed};
use super::plan::request;
use super::registry::{Job, Sessions};
use super::supervise::{Action, Exit, Health, Input, State, Urgency, Wanted, decide};
use crate::engine::error::{Class, Error};
use crate::engine::flow::Stop;
use crate::engine::retention::LOOK_EVERY;
use crate::engine::retry::Backoff;
use std::future::pending;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::{Mutex, mpsc};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::{Interval, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Bound for a session to commit what is under way before it begins again with other settings.
const RESTART_LIMIT: Duration = Duration::from_secs(10);
/// Bound for a session to roll back; `suspend` acts within a second.
const CANCEL_LIMIT: Duration = Duration::from_millis(700);
/// Bound for a dropped task to be gone.
const ABORT_LIMIT: Duration = Duration::from_secs(5);
/// Bound for running HTTP requests at the end.
const HTTP_LIMIT: Duration = Duration::from_secs(2);
/// Pushed documents that wait for the event loop.
const PUSHES: usize = 16;

/// What the event loop is told at start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Folder of the mounted ConfigMap.
    pub config_folder: PathBuf,
    /// Folder of the copy of the desired document.
    pub state_folder: PathBuf,
    /// Name of the pod.
    pub pod: String,
    /// How long a session may commit what is under way when the process is told to end.
    pub time_to_commit: Duration,
    /// How often mounted files are looked at.
    pub look_every: Duration,
}

/// Runs a worker until it is told to end or must.
pub async fn run<S: Sessions>(settings: Settings, listener: TcpListener, sessions: S, terminate: CancellationToken) -> Exit {
    let board = Arc::new(Board::new(settings.pod.clone()));
    let (pushes, pushed) = mpsc::channel(PUSHES);
    let end = CancellationToken::new();
    let server = tokio::spawn(http::serve(listener, Arc::clone(&board), pushes, end.clone()));
    let exit = Worker::new(&settings, sessions, board, pushed, terminate).run().await;
    end.cancel();
    if timeout(HTTP_LIMIT, server).await.is_err() {
        tracing::warn!("HTTP requests were cut off");
    }
    exit
}

/// One running session.
struct Session {
    task: JoinHandle<Result<(), Error>>,
    stop: Stop,
}

/// What the last session was begun with.
struct Started {
    desired: Arc<Desired>,
    credentials: Option<Credentials>,
}

enum Event {
    Look,
    Push(Box<Push>),
    Ended(Result<Result<(), Error>, JoinError>),
    Elapsed,
    Terminate,
}

struct Worker<S> {
    sessions: S,
    board: Arc<Board>,
    time_to_commit: Duration,
    mounted: Arc<std::sync::Mutex<Mounted>>,
    copy: Arc<Copy>,
    /// Why the document in effect is not in the copy.
    unstored: Option<String>,
    look: Interval,
    pushed: mpsc::Receiver<Push>,
    terminate: CancellationToken,
    terminating: bool,
    state: State,
    session: Option<Session>,
    started: Option<Started>,
    /// What the last session failed of, until a pause is made of it.
    failure: Option<Error>,
    deadline: Option<Instant>,
    backoff: Backoff,
    health: Health,
    held: Arc<Mutex<Option<i64>>>,
    /// When the source was looked at last while no session ran.
    looked: Option<Instant>,
    /// A look that may be under way.
    watch: Option<AbortOnDropHandle<()>>,
}

impl<S: Sessions> Worker<S> {
    fn new(settings: &Settings, sessions: S, board: Arc<Board>, pushed: mpsc::Receiver<Push>, terminate: CancellationToken) -> Self {
        let mut look = interval(settings.look_every);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            sessions,
            board,
            time_to_commit: settings.time_to_commit,
            mounted: Arc::new(std::sync::Mutex::new(Mounted::new(&settings.config_folder))),
            copy: Arc::new(Copy::new(&settings.state_folder)),
            unstored: None,
            look,
            pushed,
            terminate,
            terminating: false,
            state: State::Idle,
            session: None,
            started: None,
            failure: None,
            deadline: None,
            backoff: Backoff::new(rand::random()),
            health: Health::default(),
            held: Arc::default(),
            looked: None,
            watch: None,
        }
    }

    async fn run(mut self) -> Exit {
        let mut exit = self.begin().await;
        loop {
            if let Some(exit) = exit {
                tracing::info!(?exit, "the worker ends");
                return exit;
            }
            exit = match self.next().await {
                Event::Look => self.look().await,
                Event::Push(push) => self.push(*push).await,
                Event::Ended(result) => self.ended(result).await,
                Event::Elapsed => {
                    self.deadline = None;
                    self.handle(Input::Elapsed).await
                }
                Event::Terminate => {
                    tracing::info!("told to end");
                    self.terminating = true;
                    self.handle(Input::Wish { changed: false }).await
                }
            };
        }
    }

    async fn next(&mut self) -> Event {
        let ended = async {
            match &mut self.session {
                Some(session) => (&mut session.task).await,
                None => pending().await,
            }
        };
        let elapsed = async {
            match self.deadline {
                Some(deadline) => sleep_until(deadline.into()).await,
                None => pending().await,
            }
        };
        tokio::select! {
            () = self.terminate.cancelled(), if !self.terminating => Event::Terminate,
            result = ended => Event::Ended(result),
            Some(push) = self.pushed.recv() => Event::Push(Box::new(push)),
            () = elapsed => Event::Elapsed,
            _ = self.look.tick() => Event::Look,
        }
    }

    /// The first document: the higher generation of mounted file and copy. A copy of another Mirror is no copy of ours.
    async fn begin(&mut self) -> Option<Exit> {
        let mounted = self.read_mounted().await;
        let mounted = mounted.and_then(|document| self.note_config_error(document));
        let copy = Arc::clone(&self.copy);
        let copied = blocking(move || copy.load()).await;
        let copied = copied.unwrap_or_else(|error| {
            tracing::warn!(%error, "the copy of the desired document is of no use");
            None
        });
        let from_copy = copied.filter(|copied| judge(mounted.as_ref(), copied) == Verdict::Take);
        match from_copy.or(mounted) {
            Some(desired) => self.take(desired).await,
            None => self.handle(Input::Wish { changed: false }).await,
        }
    }

    /// Looks at everything that changes without telling.
    async fn look(&mut self) -> Option<Exit> {
        self.board.beat();
        self.note_health();
        if self.unstored.is_some() {
            self.store().await;
        }
        self.watch_source().await;
        if let Some(document) = self.read_mounted().await
            && let Some(desired) = self.note_config_error(document)
            && let Some(exit) = self.consider_mounted(desired).await
        {
            return Some(exit);
        }
        if self.state == State::Running && self.could_take(true) {
            tracing::info!("a request has waited for another one");
            return self.handle(Input::Wish { changed: true }).await;
        }
        if self.credentials_changed().await {
            tracing::info!("credentials have changed");
            return self.handle(Input::Wish { changed: true }).await;
        }
        None
    }

    /// While no session runs the source keeps its log all the same: somebody must look.
    async fn watch_source(&mut self) {
        if !matches!(self.state, State::Suspended | State::Waiting(_)) {
            self.watch = None;
            return;
        }
        let rested = self.looked.is_none_or(|looked| looked.elapsed() >= LOOK_EVERY);
        let is_due = rested && self.watch.as_ref().is_none_or(AbortOnDropHandle::is_finished);
        let desired = self.board.facts().desired.clone();
        let Some(desired) = desired.filter(|_| is_due) else {
            return;
        };
        self.looked = Some(Instant::now());
        let for_reading = Arc::clone(&desired);
        let credentials = blocking(move || Credentials::read(&for_reading)).await;
        let look = credentials.map(|credentials| {
            self.board.facts().redactor.learn(&credentials);
            self.sessions.look(desired, credentials)
        });
        let board = Arc::clone(&self.board);
        let task = tokio::spawn(async move {
            let seen = match look {
                Ok(look) => look.await,
                Err(error) => Err(error),
            };
            let seen = seen.unwrap_or_else(|error| {
                let message = board.facts().redactor.clean(&error.message);
                tracing::debug!("the source can't be asked what it keeps: {message}");
                None
            });
            board.progress().set_retention(seen);
        });
        self.watch = Some(AbortOnDropHandle::new(task));
    }

    async fn read_mounted(&self) -> Option<Result<Desired, ConfigError>> {
        let mounted = Arc::clone(&self.mounted);
        // What was seen is noted whole or not at all.
        blocking(move || mounted.lock().unwrap_or_else(PoisonError::into_inner).look()).await
    }

    fn note_config_error(&self, document: Result<Desired, ConfigError>) -> Option<Desired> {
        match document {
            Ok(desired) => {
                self.board.set_config_error(None);
                Some(desired)
            }
            Err(error) => {
                self.show_config_error(error.to_string());
                None
            }
        }
    }

    fn show_config_error(&self, message: String) {
        if self.board.facts().config_error.as_ref() != Some(&message) {
            tracing::warn!("the mounted document is not taken: {message}");
            self.board.set_config_error(Some(message));
        }
    }

    async fn consider_mounted(&mut self, desired: Desired) -> Option<Exit> {
        let generation = desired.generation;
        match self.judge(&desired) {
            Verdict::Take => return self.take(desired).await,
            Verdict::Same | Verdict::Older => {}
            Verdict::Conflict => self.show_config_error(format!("another document of generation {generation} is in effect")),
            Verdict::OtherMirror => self.show_config_error(format!("it belongs to another Mirror, {}", desired.mirror.uid)),
        }
        None
    }

    fn judge(&self, offered: &Desired) -> Verdict {
        judge(self.board.facts().desired.as_deref(), offered)
    }

    async fn push(&mut self, push: Push) -> Option<Exit> {
        let verdict = self.judge(&push.desired);
        let exit = if verdict == Verdict::Take { self.take(push.desired).await } else { None };
        let answer = match (&self.unstored, verdict) {
            (Some(why), Verdict::Take | Verdict::Same) => Pushed::NotStored(why.clone()),
            _ => Pushed::Judged(verdict),
        };
        // Nobody waits any more when the request was given up.
        let _ = push.answer.send(answer);
        exit
    }

    /// Puts a document into effect, then keeps it.
    async fn take(&mut self, desired: Desired) -> Option<Exit> {
        tracing::info!(generation = desired.generation, suspend = desired.suspend, "desired document in effect");
        let differs = self.started.as_ref().is_none_or(|started| session_differs(&started.desired, &desired));
        let asked = |desired: &Desired| desired.request.as_ref().map(|request| request.id.clone());
        let before = self.board.facts().desired.replace(Arc::new(desired)).and_then(|before| asked(&before));
        let now = self.board.facts().desired.as_deref().and_then(asked);
        // One that was removed changes nothing; what can't be taken yet ends no session.
        let changed = differs || (now.is_some() && now != before && self.could_take(false));
        let exit = self.handle(Input::Wish { changed }).await;
        self.store().await;
        exit
    }

    /// Whether the request of the document in effect could be taken if a session began.
    fn could_take(&self, in_session: bool) -> bool {
        let desired = self.board.facts().desired.clone();
        let wanted = desired.as_ref().and_then(|desired| request(desired.request.as_ref()?));
        self.board.progress().could_take(wanted.as_ref(), in_session)
    }

    async fn store(&mut self) {
        let Some(desired) = self.board.facts().desired.clone() else {
            return;
        };
        let copy = Arc::clone(&self.copy);
        let stored = blocking(move || copy.store(&desired)).await;
        if let (None, Err(error)) = (&self.unstored, &stored) {
            tracing::warn!(%error, "the desired document can't be stored; it is tried again");
        }
        self.unstored = stored.err().map(|error| error.to_string());
    }

    /// Whether the files hold other credentials than the last session was begun with. Files that can't be read change
    /// nothing: a running session has what it needs.
    async fn credentials_changed(&self) -> bool {
        let desired = self.board.facts().desired.clone();
        let (Some(started), Some(desired)) = (&self.started, desired) else {
            return false;
        };
        let read = blocking(move || Credentials::read(&desired)).await;
        read.is_ok_and(|read| started.credentials.as_ref() != Some(&read))
    }

    async fn handle(&mut self, input: Input) -> Option<Exit> {
        let (state, action) = decide(self.state, self.wanted(), input);
        if input == (Input::Wish { changed: true }) {
            self.backoff.reset();
        }
        self.state = state;
        self.board.facts().state = state;
        match action {
            Action::Keep => {}
            Action::Start => self.start().await,
            Action::Stop(urgency) => self.stop(urgency),
            Action::Pause(class) => self.pause(class),
            Action::Rest => self.rest(),
            Action::Exit(exit) => return Some(exit),
        }
        None
    }

    fn wanted(&self) -> Wanted {
        if self.terminating {
            return Wanted::Exit;
        }
        match self.board.facts().desired.as_deref() {
            None => Wanted::Nothing,
            Some(desired) if desired.suspend => Wanted::Suspend,
            Some(_) => Wanted::Run,
        }
    }

    async fn start(&mut self) {
        self.deadline = None;
        self.watch = None;
        let Some(desired) = self.board.facts().desired.clone() else {
            return;
        };
        let for_reading = Arc::clone(&desired);
        let credentials = blocking(move || Credentials::read(&for_reading)).await;
        let stop = Stop::default();
        self.board.progress().begin_session();
        let task = match &credentials {
            Ok(credentials) => {
                self.board.facts().redactor.learn(credentials);
                tracing::info!(generation = desired.generation, "a session begins");
                self.sessions.start(Job {
                    desired: Arc::clone(&desired),
                    credentials: credentials.clone(),
                    progress: Arc::clone(self.board.progress()),
                    stop: stop.clone(),
                    held: Arc::clone(&self.held),
                })
            }
            Err(error) => {
                let error = Error::new(error.class, error.reason, error.message.clone());
                tokio::spawn(async { Err(error) })
            }
        };
        self.session = Some(Session { task, stop });
        self.started = Some(Started { desired, credentials: credentials.ok() });
        let mut facts = self.board.facts();
        facts.sessions += 1;
        if let Some(failure) = &mut facts.failure {
            failure.next_try = None;
        }
    }

    fn stop(&mut self, urgency: Urgency) {
        let Some(session) = &self.session else {
            return;
        };
        let limit = match urgency {
            Urgency::Finish => {
                session.stop.finish.cancel();
                if self.terminating { self.time_to_commit } else { RESTART_LIMIT }
            }
            Urgency::Cancel => {
                session.stop.now.cancel();
                CANCEL_LIMIT
            }
            Urgency::Abort => {
                tracing::warn!("the session did not end in time and is dropped");
                session.task.abort();
                ABORT_LIMIT
            }
        };
        self.deadline = Some(Instant::now() + limit);
    }

    async fn ended(&mut self, result: Result<Result<(), Error>, JoinError>) -> Option<Exit> {
        self.session = None;
        self.failure = failure(result);
        let class = self.failure.as_ref().map(|error| error.class);
        if let Some(error) = &self.failure {
            let mut facts = self.board.facts();
            *facts.failures.entry(error.class.as_str()).or_default() += 1;
            let causes = facts.redactor.clean(&causes(error));
            let message = facts.redactor.clean(&error.message);
            drop(facts);
            tracing::warn!(class = error.class.as_str(), reason = error.reason, causes, "the session failed: {message}");
        }
        if class == Some(Class::Fenced) {
            tracing::error!("another worker has claimed this stream: this one must not write any more and ends");
        }
        self.handle(Input::Ended(class)).await
    }

    fn pause(&mut self, class: Class) {
        let pause = self.backoff.next(class);
        let next_try = Instant::now() + pause;
        self.deadline = Some(next_try);
        let error = self.failure.take().unwrap_or_else(|| Error::bug("the session ended without being told to"));
        let mut facts = self.board.facts();
        let failure = LastFailure::of(&error, &facts.redactor, self.backoff.failures(), Some(next_try));
        facts.failure = Some(failure);
        drop(facts);
        tracing::info!(seconds = pause.as_secs_f32(), "the next session begins after a pause");
    }

    fn rest(&mut self) {
        self.deadline = None;
        self.started = None;
        self.backoff.reset();
        self.board.facts().failure = None;
    }

    fn note_health(&mut self) {
        let phase = self.board.progress().view().phase;
        if self.health.look(self.state, phase, Instant::now()) {
            self.backoff.reset();
            self.board.facts().failure = None;
        }
    }
}

/// Runs file access where it holds up nothing else.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // Only when the runtime ends, and this task with it.
        Err(_) => pending().await,
    }
}

/// A panic is a failure like others; a session that was dropped is none.
fn failure(result: Result<Result<(), Error>, JoinError>) -> Option<Error> {
    match result {
        Ok(ended) => ended.err(),
        Err(error) if error.is_panic() => {
            let panic = error.into_panic();
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no words");
            Some(Error::bug(format!("the session panicked: {text}")))
        }
        Err(_) => None,
    }
}

fn causes(error: &Error) -> String {
    let first = std::error::Error::source(error);
    let chain = std::iter::successors(first, |cause| cause.source());
    chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
