//! What a source keeps of its log for a stream. Nobody needs to read for that to grow, and it ends badly: with a full disk or with a
//! slot that is lost.

use super::error::reason;
use super::progress::Progress;
use super::roles::{Notice, Source};
use std::convert::Infallible;
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
}

impl Retention {
    /// What people should know before it is too late, or that it is. It holds no figures: they change at each look.
    #[must_use]
    pub fn notice(&self, slot: &str) -> Option<Notice> {
        if self.wal_status.as_deref() == Some("lost") {
            let message = format!(
                "the source has invalidated slot {slot}: changes are gone, the tables need a new copy; delete the Mirror and create it again, with snapshot.existingRows: Truncate"
            );
            return Some(Notice { reason: reason::SLOT_LOST, message });
        }
        let retained = i64::try_from(self.retained.unwrap_or_default()).unwrap_or(i64::MAX);
        let is_short = self.safe.is_some_and(|safe| safe < retained.saturating_add(safe) / DANGER);
        (is_short || self.wal_status.as_deref() == Some("unreserved")).then(|| {
            let message = format!(
                "slot {slot} is in danger: less than a fifth of max_slot_wal_keep_size is left for it, then the source gives it up; let the Mirror go on, or raise that bound"
            );
            Notice { reason: reason::SLOT_AT_RISK, message }
        })
    }
}

/// Shows what a source keeps for the session that runs. Never ends; a source that can't tell is not asked again.
pub(super) async fn watch<S: Source>(source: &S, progress: &Progress) -> Infallible {
    loop {
        sleep(LOOK_EVERY).await;
        match source.retention().await {
            Ok(None) => std::future::pending().await,
            Ok(seen) => progress.set_retention(seen),
            // What the session itself needs of the source says more.
            Err(_) => progress.set_retention(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn danger_is_told_before_the_loss() {
        let seen = |wal_status: &str, retained, safe| Retention {
            exists: true,
            retained: Some(retained),
            unconfirmed: None,
            wal_status: Some(wal_status.into()),
            safe,
        };
        let told = |seen: Retention| seen.notice("s").map(|notice| notice.reason);
        assert_eq!(told(Retention::default()), None);
        assert_eq!(told(seen("reserved", 1 << 40, None)), None, "there is no bound");
        assert_eq!(told(seen("extended", 80, Some(20))), None);
        assert_eq!(told(seen("extended", 81, Some(19))), Some(reason::SLOT_AT_RISK));
        assert_eq!(told(seen("unreserved", 101, Some(-1))), Some(reason::SLOT_AT_RISK));
        assert_eq!(told(Retention { retained: None, ..seen("lost", 0, None) }), Some(reason::SLOT_LOST));
    }
}
