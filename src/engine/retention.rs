//! What a source keeps of its log for a stream. Nobody needs to read for that to grow, and it ends badly: with a full disk or with a
//! slot that is lost. A budget ends it before, on purpose.

use super::error::{Error, reason};
use super::progress::Progress;
use super::request::WAY_OUT;
use super::roles::{Notice, Source};
use std::time::Duration;
use tokio::time::sleep;

/// How often the source is asked.
pub const LOOK_EVERY: Duration = Duration::from_secs(10);
/// A slot is in danger when less than one part in so many of its bound is left.
const DANGER: i64 = 5;

/// A slot and the log behind it, as the source sees them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// The slot is there.
    pub exists: bool,
    /// Bytes of log that are kept for it.
    pub retained: Option<u64>,
    /// Bytes of log behind the position that was confirmed last.
    pub unconfirmed: Option<u64>,
    /// PostgreSQL: `wal_status` (manual: "pg_replication_slots").
    pub wal_status: Option<String>,
    /// PostgreSQL: `safe_wal_size`, the bytes that may still be written before the slot may be lost. Absent without a bound.
    pub safe: Option<i64>,
    /// The source has given the slot up.
    pub lost: Option<Lost>,
    /// [`give_up`] has dropped it, and nothing has begun since.
    pub given_up: bool,
}

/// Why a source has given a slot up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// One of [`reason::LOST_SLOTS`].
    pub reason: &'static str,
    /// What happened, and how it is kept from happening again; for people.
    pub cause: String,
}

/// How much of the log a source may keep for a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// Bytes from which people are told.
    pub warn: Option<u64>,
    /// Bytes from which something is done.
    pub max: Option<u64>,
    /// What.
    pub action: Action,
}

/// What is done when a budget is exceeded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Action {
    /// People are told.
    #[default]
    Warn,
    /// The slot is dropped, and a human decides how to go on.
    DropSlot,
    /// The slot is dropped, and all tables are copied anew.
    DropSlotAndResync,
}

impl Budget {
    fn is_exceeded(&self, seen: &Retention) -> bool {
        self.max.zip(seen.retained).is_some_and(|(max, retained)| retained >= max)
    }

    /// The slot is to be dropped.
    #[must_use]
    pub fn gives_up(&self, seen: &Retention) -> bool {
        self.action != Action::Warn && seen.exists && self.is_exceeded(seen)
    }

    fn notice(&self, seen: &Retention, slot: &str) -> Option<Notice> {
        if self.is_exceeded(seen) {
            let message = format!("the source keeps more log for slot {slot} than walBudget.maxBytes");
            return Some(Notice { reason: reason::WAL_BUDGET_EXCEEDED, message });
        }
        self.warn.zip(seen.retained).is_some_and(|(warn, retained)| retained >= warn).then(|| Notice {
            reason: reason::WAL_BUDGET_WARNING,
            message: format!("the source keeps more log for slot {slot} than walBudget.warnBytes; let the Mirror go on"),
        })
    }
}

impl Retention {
    /// What people should know before it is too late, or that it is. It holds no figures: they change at each look.
    #[must_use]
    pub fn notice(&self, slot: &str, budget: &Budget) -> Option<Notice> {
        if let Some(Lost { reason, cause }) = &self.lost {
            let message =
                format!("the source has invalidated slot {slot} ({cause}): changes are gone, the tables need a new copy: {WAY_OUT}");
            return Some(Notice { reason, message });
        }
        if self.given_up && !self.exists {
            return Some(match budget.action {
                Action::DropSlotAndResync => Notice {
                    reason: reason::WAL_BUDGET_EXCEEDED,
                    message: format!(
                        "slot {slot} was dropped at walBudget.maxBytes: all tables are copied anew as soon as the Mirror runs"
                    ),
                },
                Action::Warn | Action::DropSlot => Notice { reason: reason::SLOT_GIVEN_UP, message: given_up(slot) },
            });
        }
        let retained = i64::try_from(self.retained.unwrap_or_default()).unwrap_or(i64::MAX);
        let is_short = self.safe.is_some_and(|safe| safe < retained.saturating_add(safe) / DANGER);
        if is_short || self.wal_status.as_deref() == Some("unreserved") {
            let message = format!(
                "slot {slot} is in danger: less than a fifth of max_slot_wal_keep_size is left for it, then the source gives it up; let the Mirror go on, or raise that bound"
            );
            return Some(Notice { reason: reason::SLOT_AT_RISK, message });
        }
        budget.notice(self, slot)
    }
}

/// The slot is gone by the user's own word, and nothing says to go on.
pub(super) fn given_up(slot: &str) -> String {
    format!(
        "slot {slot} was dropped at walBudget.maxBytes, and with it changes: the tables need a new copy; set walBudget.action to DropSlotAndResync, or {WAY_OUT}"
    )
}

/// One look while no session runs. A slot for which too much is kept is dropped.
///
/// # Errors
/// The source can't be asked.
pub async fn look<S: Source>(source: &S, slot: &str, budget: &Budget) -> super::error::Result<Option<Retention>> {
    let seen = source.retention().await?;
    if !seen.as_ref().is_some_and(|seen| budget.gives_up(seen)) {
        return Ok(seen);
    }
    match give_up(source, slot).await {
        error if error.reason == reason::WAL_BUDGET_EXCEEDED => source.retention().await,
        error => {
            tracing::warn!(reason = error.reason, "{}", error.message);
            Ok(seen)
        }
    }
}

/// Shows what a source keeps for the session that runs, until that is too much. A source that can't tell is not asked again.
pub(super) async fn watch<S: Source>(source: &S, budget: &Budget, progress: &Progress) {
    loop {
        sleep(LOOK_EVERY).await;
        match source.retention().await {
            Ok(None) => std::future::pending().await,
            Ok(Some(seen)) => {
                let is_too_much = budget.gives_up(&seen);
                progress.set_retention(Some(seen));
                if is_too_much {
                    return;
                }
            }
            // What the session itself needs of the source says more.
            Err(_) => progress.set_retention(None),
        }
    }
}

/// Drops the slot of a stream for which too much is kept. The answer ends the session, or says why the slot could not be dropped.
pub(super) async fn give_up<S: Source>(source: &S, slot: &str) -> Error {
    match source.give_up().await {
        Ok(()) => {
            let message = format!("slot {slot} was dropped: the source kept more log for it than walBudget.maxBytes");
            tracing::warn!("{message}");
            Error::retry(reason::WAL_BUDGET_EXCEEDED, message)
        }
        Err(error) => error.context(format!("slot {slot} is to be dropped, since more log is kept for it than walBudget.maxBytes")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(wal_status: &str, retained: u64, safe: Option<i64>) -> Retention {
        Retention { exists: true, retained: Some(retained), wal_status: Some(wal_status.into()), safe, ..Retention::default() }
    }

    fn told(seen: &Retention, budget: &Budget) -> Option<&'static str> {
        seen.notice("s", budget).map(|notice| notice.reason)
    }

    #[test]
    fn danger_is_told_before_the_loss() {
        let told = |seen: Retention| told(&seen, &Budget::default());
        assert_eq!(told(Retention::default()), None);
        assert_eq!(told(seen("reserved", 1 << 40, None)), None, "there is no bound");
        assert_eq!(told(seen("extended", 80, Some(20))), None);
        assert_eq!(told(seen("extended", 81, Some(19))), Some(reason::SLOT_AT_RISK));
        assert_eq!(told(seen("unreserved", 101, Some(-1))), Some(reason::SLOT_AT_RISK));
        let lost = Lost { reason: reason::SLOT_IDLE_TOO_LONG, cause: "idle".into() };
        assert_eq!(told(Retention { retained: None, lost: Some(lost), ..seen("lost", 0, None) }), Some(reason::SLOT_IDLE_TOO_LONG));
    }

    #[test]
    fn a_budget_warns_and_then_acts() {
        let budget = |action| Budget { warn: Some(10), max: Some(20), action };
        for action in [Action::Warn, Action::DropSlot, Action::DropSlotAndResync] {
            let budget = budget(action);
            assert_eq!(told(&seen("reserved", 9, None), &budget), None);
            assert_eq!(told(&seen("reserved", 10, None), &budget), Some(reason::WAL_BUDGET_WARNING));
            assert_eq!(told(&seen("reserved", 20, None), &budget), Some(reason::WAL_BUDGET_EXCEEDED));
            assert!(!budget.gives_up(&seen("reserved", 19, None)));
            assert_eq!(budget.gives_up(&seen("reserved", 20, None)), action != Action::Warn);
        }
        let gone = Retention { given_up: true, ..Retention::default() };
        assert_eq!(told(&gone, &budget(Action::DropSlot)), Some(reason::SLOT_GIVEN_UP));
        assert_eq!(told(&gone, &budget(Action::DropSlotAndResync)), Some(reason::WAL_BUDGET_EXCEEDED));
        assert!(!budget(Action::DropSlot).gives_up(&gone));
        // A mark that was left behind is not the slot's end.
        assert_eq!(told(&Retention { given_up: true, ..seen("reserved", 1, None) }, &budget(Action::DropSlot)), None);
        assert!(!Budget { action: Action::DropSlot, ..Budget::default() }.gives_up(&seen("reserved", 1 << 60, None)), "no bound");
    }
}
