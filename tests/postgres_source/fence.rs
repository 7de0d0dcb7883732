//! Two workers of one stream: what the older one was about to do on the source never happens once the newer one has taken it.

use super::support::eventually;
use super::{Database, Unopposed, alone, mapped, on_each_version, on_one_version};
use sluice::engine::error::{Class, Error, reason};
use sluice::engine::roles::{BatchLimits, Proof, Snapshot as _, Source as _};
use std::time::Duration;

on_each_version!(a_statement_that_waits_is_rolled_back, a_slot_in_the_making_goes_with_its_worker);
on_one_version!(who_has_lost_the_claim_ends_nobody, who_can_not_be_ended_is_named);

const LIMITS: BatchLimits = BatchLimits { rows: 1000, bytes: 1 << 20, delay: Duration::from_millis(5) };

/// The first of the sessions that have taken the source.
const FIRST_HOLDER: &str = "SELECT min(pid)::text FROM pg_locks WHERE locktype = 'advisory'
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";

/// A claim that another worker has taken.
struct Lost;

impl Proof for Lost {
    async fn prove(&mut self) -> Result<(), Error> {
        Err(Error::new(Class::Fenced, reason::FENCED, "another worker"))
    }
}

/// Tables that are published, and the slot with where it was made.
async fn shown(database: &Database) -> Option<String> {
    let shown =
        "SELECT concat_ws(' ', (SELECT string_agg(tablename, ',' ORDER BY tablename) FROM pg_publication_tables WHERE pubname = $1),
        (SELECT concat(confirmed_flush_lsn, active) FROM pg_replication_slots WHERE slot_name = $2))";
    database.admin.query_one(shown, &[&database.publication(), &database.slot()]).await.unwrap().get(0)
}

async fn a_statement_that_waits_is_rolled_back(major: u32) {
    let database = Database::new(major, "waits", "CREATE TABLE t(id int PRIMARY KEY); CREATE TABLE u(id int PRIMARY KEY)").await;
    let (old, new) = (database.source(), database.source());
    let both = mapped(&old, &[("t", &[]), ("u", &[])]).await;
    alone(&old).await;
    let user = database.server.connect(&database.name).await;
    user.batch_execute("BEGIN; LOCK TABLE t IN SHARE UPDATE EXCLUSIVE MODE").await.unwrap();
    let successor = async {
        let waits = "SELECT FROM pg_locks WHERE NOT granted AND mode = 'ShareUpdateExclusiveLock' AND relation = 't'::regclass";
        eventually(10, "the publication waits", async || !database.admin.query(waits, &[]).await.unwrap().is_empty()).await;
        alone(&new).await.publish(&both[1..], &[]).await.unwrap();
        new.create_log().await.unwrap();
    };
    // The lock is still held when the old worker's statement has ended.
    let (published, ()) = tokio::join!(old.publish(&both, &[]), successor);
    assert_eq!(published.unwrap_err().class, Class::Retry);
    user.batch_execute("COMMIT").await.unwrap();
    let before = shown(&database).await;
    assert!(before.as_deref().unwrap().starts_with("u "), "{before:?}");

    // Nor does it change anything from now on: its sessions are gone and no others take their place.
    let position = old.head().await.unwrap();
    for error in [
        old.publish(&both, &[]).await.unwrap_err(),
        old.drop_log().await.unwrap_err(),
        old.create_log().await.err().expect("another slot"),
        old.open(&position, &both, LIMITS).await.err().expect("the log"),
    ] {
        assert_eq!((error.class, error.reason), (Class::Retry, reason::SOURCE_UNREACHABLE), "{error}");
    }
    assert_eq!(shown(&database).await, before);
    new.drop_log().await.unwrap();
}

async fn a_slot_in_the_making_goes_with_its_worker(major: u32) {
    let database = Database::new(major, "hangs", "CREATE TABLE t(id int PRIMARY KEY)").await;
    let (old, new) = (database.source(), database.source());
    let user = database.server.connect(&database.name).await;
    user.batch_execute("BEGIN; INSERT INTO t VALUES (1)").await.unwrap();
    alone(&old).await;
    let successor = async {
        eventually(10, "the slot is being made", async || old.waiting().is_some()).await;
        alone(&new).await.drop_log().await.unwrap();
        assert_eq!(new.log_state().await.unwrap(), None);
    };
    let (created, ()) = tokio::join!(old.create_log(), successor);
    assert_eq!(created.err().expect("ended").class, Class::Retry);
    let user_ends = async {
        eventually(10, "the slot is being made", async || new.waiting().is_some()).await;
        user.batch_execute("COMMIT").await.unwrap();
    };
    let (created, ()) = tokio::join!(new.create_log(), user_ends);
    let position = *created.unwrap().position();
    assert_eq!(new.log_state().await.unwrap().unwrap().confirmed, position);
    new.drop_log().await.unwrap();
}

async fn who_has_lost_the_claim_ends_nobody(major: u32) {
    let database = Database::new(major, "ends_nobody", "CREATE TABLE t(id int PRIMARY KEY)").await;
    let (old, new) = (database.source(), database.source());
    let tables = mapped(&new, &[("t", &[])]).await;
    alone(&new).await;
    assert_eq!(old.take(&mut Lost).await.unwrap_err().class, Class::Fenced);
    new.publish(&tables, &[]).await.unwrap();
    new.create_log().await.unwrap();
    new.drop_log().await.unwrap();
    // It may have got the locks: still it has no say.
    drop(new);
    eventually(10, "the locks are free", async || database.text(FIRST_HOLDER).await.is_none()).await;
    assert_eq!(old.take(&mut Lost).await.unwrap_err().class, Class::Fenced);
    assert_eq!(old.publish(&[], &[]).await.unwrap_err().class, Class::Retry);
}

async fn who_can_not_be_ended_is_named(major: u32) {
    let database = Database::new(major, "strangers", "").await;
    let powerful = database.source();
    alone(&powerful).await;
    let weak = database.source_as("weak", "REPLICATION").await;
    let error = weak.take(&mut Unopposed).await.unwrap_err();
    assert_eq!((error.class, error.reason), (Class::Retry, reason::SLOT_IN_USE), "{error}");
    let pid = database.text(FIRST_HOLDER).await.unwrap();
    assert!(error.message.contains(&format!("process {pid} (sluice, postgres)")), "{error}");
    alone(&powerful).await.publish(&[], &[]).await.unwrap();
    drop(weak);
    database.run("DROP ROLE weak").await;
}
