//! Slots of this database that streams of ours have made.

use crate::connectors::postgres::connect::{Session, Side};
use crate::connectors::postgres::publication::mark;
use crate::connectors::postgres::source::answer;
use crate::engine::error::Result;

/// Slots that are looked at, those that keep most first.
const LIMIT: i64 = 1000;

/// A slot of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnSlot {
    /// Name.
    pub name: String,
    /// Somebody reads from it now.
    pub active: bool,
    /// Bytes of log that are kept for it; none for a lost one.
    pub retained: Option<u64>,
}

/// Lasting slots that are proven to be ours: by a name that is made from the uid of a Mirror, or by a publication whose comment names
/// the slot. A name that merely begins like ours proves nothing.
pub(super) async fn own(session: &Session) -> Result<Vec<OwnSlot>> {
    let own = format!(
        "SELECT s.slot_name::text, s.active, pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn)::int8
         FROM pg_replication_slots s WHERE s.plugin = 'pgoutput' AND NOT s.temporary AND s.database = current_database()
           AND (s.slot_name::text ~ '^sluice_[0-9a-f]{{8}}_[0-9a-f]{{4}}_[0-9a-f]{{4}}_[0-9a-f]{{4}}_[0-9a-f]{{12}}$'
             OR EXISTS (SELECT FROM pg_publication p WHERE obj_description(p.oid, 'pg_publication') = '{}' || s.slot_name::text))
         ORDER BY 3 DESC NULLS LAST, 1 LIMIT {LIMIT}",
        mark("")
    );
    let rows = answer(Side::Source, "look for slots", session.query(&own, &[])).await?;
    let slot = |row: &tokio_postgres::Row| OwnSlot {
        name: row.get(0),
        active: row.get(1),
        retained: row.get::<_, Option<i64>>(2).map(|bytes| u64::try_from(bytes).unwrap_or_default()),
    };
    Ok(rows.iter().map(slot).collect())
}
