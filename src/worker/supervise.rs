//! What is done about a session: a plain state machine without clock, tasks or I/O.
//!
//! The loop in [`super::run`] feeds it with what has happened and carries out what it answers.

use crate::engine::error::Class;
use crate::engine::progress::Phase;
use std::time::{Duration, Instant};

/// What is wanted now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// No desired document is known.
    Nothing,
    /// A session.
    Run,
    /// None, by `suspend`.
    Suspend,
    /// The process shall end.
    Exit,
}

/// Where the worker stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing to do yet.
    Idle,
    /// A session runs.
    Running,
    /// A session was told to end.
    Stopping(Urgency),
    /// Between two tries, after a failure of this class.
    Waiting(Class),
    /// Stopped by `suspend`.
    Suspended,
}

/// How a session is told to end; each step follows when the one before takes too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// Commit what is under way.
    Finish,
    /// Cancel what is running and roll back.
    Cancel,
    /// Drop the task with its connections.
    Abort,
}

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Something else may be wanted. `changed`: a session would run with other settings or credentials than before.
    Wish {
        /// See there.
        changed: bool,
    },
    /// The session has ended; the class of its failure, if it is one.
    Ended(Option<Class>),
    /// The time that the last action gave has run out.
    Elapsed,
}

/// What is to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing; a running timer goes on.
    Keep,
    /// Begin a session.
    Start,
    /// Tell the session to end, and give it a bounded time.
    Stop(Urgency),
    /// Try again after a pause.
    Pause(Class),
    /// Nothing runs and nothing is waited for.
    Rest,
    /// End the process.
    Exit(Exit),
}

/// Why the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It was told to.
    Stopped,
    /// Another worker has claimed the stream.
    Fenced,
    /// A session could not even be dropped: only the end of the process ends it.
    Stuck,
}

impl Exit {
    /// The process's exit code.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Stopped => 0,
            Self::Stuck => 1,
            Self::Fenced => 3,
        }
    }
}

/// What follows from where the worker stands, what is wanted and what has happened.
#[must_use]
pub fn decide(state: State, wanted: Wanted, input: Input) -> (State, Action) {
    use State::{Idle, Running, Stopping, Suspended, Waiting};
    match (state, input) {
        (Running | Stopping(_), Input::Ended(Some(Class::Fenced))) => (Idle, Action::Exit(Exit::Fenced)),

        (Running, Input::Wish { changed: false }) if wanted == Wanted::Run => (state, Action::Keep),
        (Running, Input::Wish { .. }) if wanted == Wanted::Suspend => stop(Urgency::Cancel),
        (Running, Input::Wish { .. }) => stop(Urgency::Finish),
        // Nobody told it to end: without a reason it is a defect.
        (Running, Input::Ended(failure)) => pause(failure.unwrap_or(Class::Bug)),

        (Stopping(Urgency::Finish), Input::Wish { .. }) if wanted == Wanted::Suspend => stop(Urgency::Cancel),
        (Stopping(Urgency::Finish), Input::Elapsed) => stop(Urgency::Cancel),
        (Stopping(Urgency::Cancel), Input::Elapsed) => stop(Urgency::Abort),
        (Stopping(Urgency::Abort), Input::Elapsed) => (Idle, Action::Exit(Exit::Stuck)),
        (Stopping(_), Input::Ended(_)) => settle(wanted),

        (Waiting(_), Input::Wish { changed: false }) if wanted == Wanted::Run => (state, Action::Keep),
        (Idle | Suspended | Waiting(_), Input::Wish { .. }) | (Waiting(_), Input::Elapsed) => settle(wanted),

        (Running | Idle | Suspended, Input::Elapsed)
        | (Idle | Suspended | Waiting(_), Input::Ended(_))
        | (Stopping(_), Input::Wish { .. }) => (state, Action::Keep),
    }
}

fn stop(urgency: Urgency) -> (State, Action) {
    (State::Stopping(urgency), Action::Stop(urgency))
}

fn pause(class: Class) -> (State, Action) {
    (State::Waiting(class), Action::Pause(class))
}

/// Where nothing runs.
fn settle(wanted: Wanted) -> (State, Action) {
    match wanted {
        Wanted::Nothing => (State::Idle, Action::Rest),
        Wanted::Run => (State::Running, Action::Start),
        Wanted::Suspend => (State::Suspended, Action::Rest),
        Wanted::Exit => (State::Idle, Action::Exit(Exit::Stopped)),
    }
}

/// A session that has copied or streamed for so long has got over the last failure.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);

/// How long a session has been at work without a break.
#[derive(Clone, Copy, Debug, Default)]
pub struct Health {
    working_since: Option<Instant>,
}

impl Health {
    /// A look at the worker; whether the last failure has passed. Reaching the stream is not enough: a change that can't
    /// be applied fails a session right after it got there, again and again.
    pub fn look(&mut self, state: State, phase: Phase, now: Instant) -> bool {
        let works = state == State::Running && matches!(phase, Phase::Copying | Phase::CatchingUp | Phase::Streaming);
        self.working_since = works.then(|| self.working_since.unwrap_or(now));
        self.working_since.is_some_and(|since| now.duration_since(since) >= HEALTHY_AFTER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use State::{Idle, Running, Stopping, Suspended, Waiting};
    use Urgency::{Abort, Cancel, Finish};

    const SAME: Input = Input::Wish { changed: false };
    const OTHER: Input = Input::Wish { changed: true };

    #[test]
    fn a_document_starts_a_session_or_not() {
        assert_eq!(decide(Idle, Wanted::Nothing, SAME), (Idle, Action::Rest));
        assert_eq!(decide(Idle, Wanted::Run, OTHER), (Running, Action::Start));
        assert_eq!(decide(Idle, Wanted::Suspend, OTHER), (Suspended, Action::Rest));
        assert_eq!(decide(Suspended, Wanted::Run, SAME), (Running, Action::Start));
        assert_eq!(decide(Suspended, Wanted::Suspend, OTHER), (Suspended, Action::Rest));
    }

    #[test]
    fn suspend_cancels_at_once() {
        assert_eq!(decide(Running, Wanted::Suspend, SAME), (Stopping(Cancel), Action::Stop(Cancel)));
        assert_eq!(decide(Stopping(Finish), Wanted::Suspend, SAME), (Stopping(Cancel), Action::Stop(Cancel)));
        assert_eq!(decide(Stopping(Cancel), Wanted::Suspend, SAME), (Stopping(Cancel), Action::Keep));
        assert_eq!(decide(Stopping(Cancel), Wanted::Suspend, Input::Ended(None)), (Suspended, Action::Rest));
        assert_eq!(decide(Waiting(Class::Retry), Wanted::Suspend, SAME), (Suspended, Action::Rest));
        // Resumed before the session had ended.
        assert_eq!(decide(Stopping(Cancel), Wanted::Run, SAME), (Stopping(Cancel), Action::Keep));
        assert_eq!(decide(Stopping(Cancel), Wanted::Run, Input::Ended(None)), (Running, Action::Start));
    }

    #[test]
    fn another_configuration_begins_another_session() {
        assert_eq!(decide(Running, Wanted::Run, SAME), (Running, Action::Keep));
        assert_eq!(decide(Running, Wanted::Run, OTHER), (Stopping(Finish), Action::Stop(Finish)));
        assert_eq!(decide(Stopping(Finish), Wanted::Run, OTHER), (Stopping(Finish), Action::Keep));
        // What the old session failed of does not matter any more.
        let ended = Input::Ended(Some(Class::Stop));
        assert_eq!(decide(Stopping(Finish), Wanted::Run, ended), (Running, Action::Start));
        assert_eq!(decide(Waiting(Class::Stop), Wanted::Run, OTHER), (Running, Action::Start));
        assert_eq!(decide(Waiting(Class::Stop), Wanted::Run, SAME), (Waiting(Class::Stop), Action::Keep));
    }

    #[test]
    fn failures_wait_and_fencing_ends() {
        for class in [Class::Retry, Class::Stop, Class::Bug] {
            assert_eq!(decide(Running, Wanted::Run, Input::Ended(Some(class))), (Waiting(class), Action::Pause(class)));
            assert_eq!(decide(Waiting(class), Wanted::Run, Input::Elapsed), (Running, Action::Start));
        }
        assert_eq!(decide(Running, Wanted::Run, Input::Ended(None)), (Waiting(Class::Bug), Action::Pause(Class::Bug)));
        for state in [Running, Stopping(Finish), Stopping(Cancel)] {
            let fenced = Input::Ended(Some(Class::Fenced));
            assert_eq!(decide(state, Wanted::Suspend, fenced), (Idle, Action::Exit(Exit::Fenced)));
        }
        assert_eq!((Exit::Stopped.code(), Exit::Stuck.code(), Exit::Fenced.code()), (0, 1, 3));
    }

    #[test]
    fn stopping_becomes_more_urgent() {
        assert_eq!(decide(Running, Wanted::Exit, SAME), (Stopping(Finish), Action::Stop(Finish)));
        assert_eq!(decide(Stopping(Finish), Wanted::Exit, Input::Elapsed), (Stopping(Cancel), Action::Stop(Cancel)));
        assert_eq!(decide(Stopping(Cancel), Wanted::Exit, Input::Elapsed), (Stopping(Abort), Action::Stop(Abort)));
        assert_eq!(decide(Stopping(Abort), Wanted::Exit, Input::Elapsed), (Idle, Action::Exit(Exit::Stuck)));
        for urgency in [Finish, Cancel, Abort] {
            let exit = (Idle, Action::Exit(Exit::Stopped));
            assert_eq!(decide(Stopping(urgency), Wanted::Exit, Input::Ended(None)), exit);
        }
        for state in [Idle, Suspended, Waiting(Class::Retry)] {
            assert_eq!(decide(state, Wanted::Exit, SAME), (Idle, Action::Exit(Exit::Stopped)));
        }
    }

    #[test]
    fn a_failure_passes_when_a_session_has_worked_for_a_while() {
        let begin = Instant::now();
        let mut health = Health::default();
        let mut at = |seconds, state, phase| health.look(state, phase, begin + Duration::from_secs(seconds));
        assert!(!at(0, Running, Phase::Copying));
        assert!(!at(9, Running, Phase::Streaming));
        assert!(at(10, Running, Phase::Streaming));
        // The next session has to show it again.
        assert!(!at(11, Waiting(Class::Retry), Phase::Streaming));
        assert!(!at(12, Running, Phase::Starting));
        assert!(!at(13, Running, Phase::Streaming));
        assert!(!at(22, Running, Phase::Streaming));
        assert!(at(23, Running, Phase::Streaming));
    }
}
