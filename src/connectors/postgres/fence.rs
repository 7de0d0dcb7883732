//! Who may change the source for a stream: publication and slot.
//!
//! A claim on the target fences what is written there, not what an old worker still does on the source: a statement that it has
//! sent may be waiting for a lock, the making of a slot for old transactions. So everything that changes the source runs on
//! sessions that hold a session-level advisory lock of the stream. Whoever has claimed the stream on the target takes the locks
//! next; the sessions that hold them are ended, since their claim is over. Only then does it look at the source.
//!
//! Why this is enough:
//! * a lock goes when its session ends, and the server ends a session's transaction before it lets go of its locks: what the old
//!   session had begun is then committed or rolled back, and what it has not sent can't run any more;
//! * a claim is looked at after its locks were taken: whoever claims later finds them held, and waits until they are gone;
//! * a holder is ended only if the claim still stands *after* the holder was seen. A successor claims before it locks, so that a
//!   worker which has lost its claim never ends its successor's session.
//!
//! A temporary slot, for a copy beside the stream, is made on a session without a lock: nothing of it outlives its session, and nothing
//! that was read under it is written when the claim is lost. One that still waits for old transactions when its worker is gone is
//! found by its name, which begins with a hash of the lasting slot's, and ended after the locks were taken and the claim was looked at.
//!
//! There are two locks, since statements and the making of slots need sessions of different kinds. The key is the slot's name
//! (advisory locks belong to a database): the first eight bytes of the SHA-256 of `sluice statements SLOT` and `sluice slots
//! SLOT`. The locks are of no use through a pooler; neither is replication.

use super::connect::{Session, Side};
use super::replication::ReplicationClient;
use super::source::answer;
use crate::engine::error::{Error, Result, reason};
use crate::engine::roles::Proof;
use sha2::{Digest as _, Sha256};
use std::time::Duration;
use tokio::time::Instant;

/// How long ended sessions may take to be gone.
const RELEASE_LIMIT: Duration = Duration::from_secs(15);
/// Pause between two tries to get the locks.
const PAUSE: Duration = Duration::from_millis(20);

/// The locks of one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Keys {
    statements: i64,
    slots: i64,
}

impl Keys {
    fn of(slot: &str) -> Self {
        let key = |what: &str| {
            let hash = Sha256::digest(format!("sluice {what} {slot}"));
            hash.iter().take(8).fold(0, |key: u64, byte| key << 8 | u64::from(*byte)).cast_signed()
        };
        Self { statements: key("statements"), slots: key("slots") }
    }
}

/// A session that holds a lock.
struct Holder {
    pid: i32,
    /// With the pid, names one session for ever. Hidden from roles that may not end it either.
    started: Option<String>,
    who: String,
}

/// Takes both locks, each for the session that will change the source: `statements` with SQL, `slots` by making slots. The
/// locks last as long as the sessions. When this returns, nobody else changes the source for this slot, and whoever does so
/// later has claimed the stream later.
///
/// # Errors
/// Class `Fenced` when the claim is lost; [`reason::SLOT_IN_USE`], class `Retry`, when a holder can't be ended.
pub(super) async fn take(statements: &Session, slots: &mut ReplicationClient, slot: &str, claim: &mut impl Proof) -> Result<()> {
    let keys = Keys::of(slot);
    let deadline = Instant::now() + RELEASE_LIMIT;
    loop {
        // A session that has the lock already is given it once more.
        let (first, second, left) =
            futures::future::try_join3(try_lock(statements, keys.statements), try_lock_slots(slots, keys.slots), orphans(statements, slot))
                .await?;
        let taken: Vec<i64> =
            [(keys.statements, first), (keys.slots, second)].iter().filter(|(_, got)| !got).map(|(key, _)| *key).collect();
        if taken.is_empty() {
            claim.prove().await?;
            return end_orphans(statements, &left).await;
        }
        end_holders(statements, slot, &taken, claim, deadline).await?;
    }
}

/// Takes both locks for one session, whoever holds them: the stream itself is to end.
///
/// # Errors
/// As [`take`].
pub(super) async fn take_for_good(session: &Session, slot: &str) -> Result<()> {
    /// Nobody claims a stream that is being removed.
    struct Unopposed;
    impl Proof for Unopposed {
        async fn prove(&mut self) -> Result<()> {
            Ok(())
        }
    }

    let keys = Keys::of(slot);
    let deadline = Instant::now() + RELEASE_LIMIT;
    for key in [keys.statements, keys.slots] {
        while !try_lock(session, key).await? {
            end_holders(session, slot, &[key], &mut Unopposed, deadline).await?;
        }
    }
    Ok(())
}

/// A new name for a temporary slot of a stream.
pub(super) fn temporary_slot(slot: &str) -> String {
    format!("{}{:016x}", temporary_slots(slot), rand::random::<u64>())
}

/// How the names of a stream's temporary slots begin. Letters of slot names are lower case (manual: "Replication Slots").
fn temporary_slots(slot: &str) -> String {
    let hash: String = Sha256::digest(slot).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("sluice_tmp_{hash}_")
}

/// Temporary slots of a stream.
async fn orphans(session: &Session, slot: &str) -> Result<Vec<String>> {
    const ORPHANS: &str = "SELECT slot_name::text FROM pg_replication_slots WHERE temporary AND starts_with(slot_name, $1)";
    let rows = answer(Side::Source, "look for temporary slots", session.query(ORPHANS, &[&temporary_slots(slot)])).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Ends whoever makes them, and they go with it. They were seen before the claim was looked at, so that none is a successor's. A
/// session that may not be ended ends by itself when what it waits for is over.
async fn end_orphans(session: &Session, orphans: &[String]) -> Result<()> {
    const END: &str =
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = ANY($1) AND active_pid IS NOT NULL";
    if orphans.is_empty() {
        return Ok(());
    }
    match answer(Side::Source, "end an old worker's sessions", session.query(END, &[&orphans])).await {
        Err(error) if error.reason != reason::PRIVILEGE_MISSING => Err(error),
        Ok(_) | Err(_) => Ok(()),
    }
}

async fn try_lock(session: &Session, key: i64) -> Result<bool> {
    const LOCK: &str = "SELECT pg_try_advisory_lock($1)";
    Ok(answer(Side::Source, "take the source's set-up", session.query_one(LOCK, &[&key])).await?.get(0))
}

async fn try_lock_slots(client: &mut ReplicationClient, key: i64) -> Result<bool> {
    let rows = client.simple_query(&format!("SELECT pg_catalog.pg_try_advisory_lock({key})")).await?;
    Ok(rows.into_iter().flatten().next().flatten().as_deref() == Some("t"))
}

/// Ends the sessions that hold these locks, and gives them a moment to go.
async fn end_holders(session: &Session, slot: &str, keys: &[i64], claim: &mut impl Proof, deadline: Instant) -> Result<()> {
    let seen = holders(session, keys).await?;
    // After they were seen: none of them is a successor's.
    claim.prove().await?;
    for Holder { pid, started, who } in seen {
        let in_the_way = |why: &str| {
            let message =
                format!("process {pid} ({who}) still sets up slot {slot} for another worker and {why}: SELECT pg_terminate_backend({pid})");
            Err(Error::retry(reason::SLOT_IN_USE, message))
        };
        if Instant::now() > deadline {
            return in_the_way("does not end");
        }
        let Some(started) = started else { return in_the_way("may not be ended by this role") };
        let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = $1 AND backend_start::text = $2";
        if let Err(error) = answer(Side::Source, "end an old worker's session", session.query(end, &[&pid, &started])).await {
            return if error.reason == reason::PRIVILEGE_MISSING { in_the_way("may not be ended by this role") } else { Err(error) };
        }
    }
    tokio::time::sleep(PAUSE).await;
    Ok(())
}

async fn holders(session: &Session, keys: &[i64]) -> Result<Vec<Holder>> {
    // A key of 64 bits is shown in two halves (manual: "pg_locks").
    const HOLDERS: &str = "SELECT l.pid, a.backend_start::text, concat_ws(', ', a.application_name, a.usename)
        FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
        WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
          AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
          AND (l.classid::int8 << 32 | l.objid::int8) = ANY($1) ORDER BY l.pid";
    let rows = answer(Side::Source, "look who sets up the slot", session.query(HOLDERS, &[&keys])).await?;
    Ok(rows.iter().map(|row| Holder { pid: row.get(0), started: row.get(1), who: row.get(2) }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_slot_has_keys_of_its_own() {
        let (keys, other) = (Keys::of("s"), Keys::of("t"));
        assert_eq!(keys, Keys::of("s"));
        assert!(keys.statements != keys.slots && keys.statements != other.statements && keys.slots != other.slots);
        // `printf 'sluice statements s' | sha256sum`: workers of all builds must agree.
        assert_eq!(keys.statements as u64, u64::from_str_radix(STATEMENTS_OF_S, 16).unwrap());
    }

    #[test]
    fn names_of_temporary_slots_fit() {
        let [name, other] = ["s".repeat(63), "t".into()].map(|slot: String| temporary_slot(&slot));
        assert!(name.len() <= 63 && name.starts_with(&temporary_slots(&"s".repeat(63))) && !other.starts_with(&temporary_slots("s")));
    }

    const STATEMENTS_OF_S: &str = "c14fb064203c5779";
}
