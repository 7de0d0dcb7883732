//! Why transactions are received at their end only, and until when. It is known for longer than one session: the next one would run
//! into the same again.

use super::guard;
use crate::connectors::postgres::lsn::Lsn;
use crate::connectors::postgres::replication::SystemIdentity;
use crate::engine::roles::Notice;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tokio::time::Instant;

/// What the logs of one stream know of this, one after the other. Nothing is paused at first.
#[derive(Clone, Debug, Default)]
pub struct StreamingPause(Arc<Mutex<Option<Paused>>>);

/// One reason not to stream.
#[derive(Clone, Debug)]
pub(super) struct Paused {
    notice: Notice,
    /// The server that it was found on.
    server: SystemIdentity,
    until: Until,
    /// A position behind what is waited for, as soon as that is known.
    behind: Arc<AtomicU64>,
}

/// What is waited for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Until {
    /// The end of a transaction.
    EndOf(u32),
    /// A time.
    Time(Instant),
}

impl StreamingPause {
    pub(super) fn begin(&self, paused: Paused) {
        *guard(&self.0) = Some(paused);
    }

    pub(super) fn end(&self) {
        *guard(&self.0) = None;
    }

    /// What is paused on a server. What was found on another one, or before a failover, says nothing there and is forgotten.
    pub(super) fn on(&self, server: &SystemIdentity) -> Option<Paused> {
        let mut paused = guard(&self.0);
        paused.take_if(|paused| !paused.server.is_same(server));
        paused.clone()
    }

    /// What people should know.
    pub(super) fn notice(&self) -> Option<Notice> {
        guard(&self.0).as_ref().map(|paused| paused.notice.clone())
    }
}

impl Paused {
    pub(super) fn new(notice: Notice, server: &SystemIdentity, until: Until) -> Self {
        Self { notice, server: server.clone(), until, behind: Arc::new(AtomicU64::new(u64::MAX)) }
    }

    pub(super) fn until(&self) -> Until {
        self.until
    }

    /// What was waited for has come, and lies before this position.
    pub(super) fn came(&self, behind: Lsn) {
        self.behind.store(behind.0, Ordering::Release);
    }

    pub(super) fn has_come(&self) -> bool {
        self.behind.load(Ordering::Acquire) != u64::MAX
    }

    /// Whether what is waited for lies before this position.
    pub(super) fn was_before(&self, position: Lsn) -> bool {
        position.0 >= self.behind.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::error::reason;

    #[test]
    fn a_pause_is_that_of_one_server_and_ends_behind_a_position() {
        let server = |timeline| SystemIdentity { system_identifier: "7".into(), timeline, flushed: Lsn(timeline.cast_unsigned()) };
        let notice = Notice { reason: reason::SPILL_FULL, message: "full".into() };
        let pause = StreamingPause::default();
        assert!(pause.on(&server(1)).is_none());
        pause.begin(Paused::new(notice.clone(), &server(1), Until::EndOf(5)));
        let first = pause.on(&SystemIdentity { flushed: Lsn(99), ..server(1) }).expect("a pause");
        assert!(!first.has_come() && !first.was_before(Lsn(1 << 60)));
        first.came(Lsn(20));
        let later = pause.clone().on(&server(1)).expect("the same pause");
        assert!(later.has_come() && later.was_before(Lsn(20)) && !later.was_before(Lsn(19)));
        assert_eq!(pause.notice(), Some(notice.clone()));
        pause.end();
        assert_eq!((pause.notice(), pause.on(&server(1)).is_some()), (None, false));
        pause.begin(Paused::new(notice, &server(1), Until::EndOf(5)));
        assert!(pause.on(&server(2)).is_none() && pause.notice().is_none(), "after a failover nothing of it is open");
    }
}
