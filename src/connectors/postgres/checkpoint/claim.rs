//! Claims a stream.

use super::super::connect::{Parameter, Session};
use super::super::lsn::Lsn;
use super::super::target::failed;
use super::{Claim, fenced, parse_state, requests};
use crate::engine::error::{Error, Result, reason};
use crate::engine::roles::{Checkpoint, Claimed, Owner, StreamKey, TableCheckpoint};
use crate::engine::table::QualifiedName;
use futures::future::{join4, join5};
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use tokio_postgres::Row;

/// How often another claimer may come between before this one gives way for a while.
const TRIES: usize = 5;

/// A stream's row, as far as a claim decides by it.
struct StreamRow {
    epoch: i64,
    owner: Owner,
    position: Option<String>,
    timeline: i64,
    log_intended: bool,
    rows_streamed: i64,
}

impl StreamRow {
    const COLUMNS: &str = "epoch, mirror_namespace, mirror_name, mirror_uid, position, timeline, log_intended, rows_streamed";

    fn read(row: &Row) -> Self {
        Self {
            epoch: row.get(0),
            owner: Owner { namespace: row.get(1), name: row.get(2), uid: row.get(3) },
            position: row.get(4),
            timeline: row.get(5),
            log_intended: row.get(6),
            rows_streamed: row.get(7),
        }
    }

    fn may_be_claimed(&self, key: &StreamKey, owner: &Owner, held: Option<i64>) -> Result<()> {
        if (&self.owner.namespace, &self.owner.name) != (&owner.namespace, &owner.name) {
            return Err(Error::stop(
                reason::CHECKPOINT_OF_ANOTHER_MIRROR,
                format!(
                    "the checkpoint of slot {} on the target belongs to Mirror {}/{}: choose another slotName, or remove that Mirror first",
                    key.slot, self.owner.namespace, self.owner.name
                ),
            ));
        }
        match held {
            Some(held) if self.epoch > held => {
                Err(fenced(format!("another worker has claimed slot {}: epoch {}, ours was {held}", key.slot, self.epoch)))
            }
            _ => Ok(()),
        }
    }
}

/// Application name of the sessions that copy ranges for a stream; a claim ends them. At most 63 bytes.
pub(in super::super) fn loader_name(key: &StreamKey) -> String {
    let text = format!("{}\0{}\0{}", key.system_identifier, key.database, key.slot);
    let hash: String = Sha256::digest(text).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("sluice load {hash}")
}

/// A claim that is being made.
pub(in super::super) struct Claiming<'a> {
    pub client: &'a Session,
    /// Backends that will write under it, `client`'s among them: the next claim ends them all.
    pub pids: &'a [i32],
    pub key: &'a StreamKey,
    pub owner: &'a Owner,
    /// Epoch of an earlier claim of this very process.
    pub held: Option<i64>,
}

impl Claiming<'_> {
    /// Ends the old claim's backends, then raises the epoch and reads the checkpoint in one transaction, which is durable
    /// when this returns (and with it all that it has read, since the log is flushed in order).
    pub async fn run(&self) -> Result<Claimed<Lsn>> {
        // A new stream has nobody to end.
        let mut seen: Option<StreamRow> = None;
        for _ in 0..=TRIES {
            if let Some(seen) = &seen {
                // Before anything is ended: nobody ends another Mirror's backends, nor its successor's.
                seen.may_be_claimed(self.key, self.owner, self.held)?;
                end_backends(self.client, self.key).await;
            }
            match self.raise_epoch(seen.as_ref()).await? {
                Raised::Claimed(claimed) => return Ok(claimed),
                Raised::Found(found) => seen = found,
            }
        }
        Err(Error::retry(reason::FENCED, format!("other workers claim slot {} again and again", self.key.slot)))
    }

    /// Raises the epoch if the stream is as it was seen; a stream that was not seen must be new. One round trip.
    async fn raise_epoch(&self, seen: Option<&StreamRow>) -> Result<Raised> {
        const STREAM: &str = "system_identifier = $1 AND database = $2 AND slot = $3";
        const AS_SEEN: &str = "epoch = $4 AND mirror_namespace = $5 AND mirror_name = $6";
        let &Self { client, pids, key, owner, .. } = self;
        let find = format!("SELECT {} FROM _sluice.streams WHERE {STREAM}", StreamRow::COLUMNS);
        // `FOR UPDATE`, since an update of the epoch alone would not wait for a proof. A row that is not as it was seen is not
        // locked: somebody may hold it for long.
        let lock = format!("{find} AND {AS_SEEN} FOR UPDATE");
        let raise = format!(
            "UPDATE _sluice.streams SET epoch = epoch + 1, mirror_uid = $7, updated_at = now(), claim =
               (SELECT jsonb_agg(jsonb_build_object('pid', pid, 'backend_start', backend_start))
                FROM pg_stat_activity WHERE pid = ANY ($8))
             WHERE {STREAM} AND {AS_SEEN}"
        );
        let seen_epoch = seen.map_or(0, |seen| seen.epoch);
        let values: [&(dyn Parameter + Sync); 8] =
            [&key.system_identifier, &key.database, &key.slot, &seen_epoch, &owner.namespace, &owner.name, &owner.uid, &pids];
        // Sent together. When a piece fails, those behind it fail too, and COMMIT rolls back. Should BEGIN itself fail, a claim
        // may have been made that nobody has: it fences, and writes nothing.
        let (begun, found, made, locked, (raised, tables, requests, ended)) = join5(
            client.batch_execute(
                "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; SET LOCAL synchronous_commit = on; SET LOCAL lock_timeout = '15s'",
            ),
            client.query_opt(&find, &values[..3]),
            client.execute(
                "INSERT INTO _sluice.streams (system_identifier, database, slot, mirror_namespace, mirror_name, mirror_uid)
                 VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING",
                &[&key.system_identifier, &key.database, &key.slot, &owner.namespace, &owner.name, &owner.uid],
            ),
            client.query_opt(&lock, &values[..6]),
            join4(client.execute(&raise, &values), read_tables(client, key), requests::read(client, key), client.batch_execute("COMMIT")),
        )
        .await;
        begun.map_err(failed("begin the claim"))?;
        let found = found.map_err(failed("read the checkpoint"))?;
        made.map_err(failed("claim the stream"))?;
        let locked = locked.map_err(failed("claim the stream"))?;
        raised.map_err(failed("claim the stream"))?;
        let (tables, requests) = (tables?, requests?);
        ended.map_err(failed("end the claim"))?;
        let Some(stream) = locked.as_ref().map(StreamRow::read) else {
            return Ok(Raised::Found(found.as_ref().map(StreamRow::read)));
        };
        let checkpoint = match &stream.position {
            None => None,
            Some(position) => Some(Checkpoint {
                position: parse_position(position)?,
                timeline: stream.timeline,
                owner: stream.owner,
                rows_streamed: stream.rows_streamed.unsigned_abs(),
                tables,
            }),
        };
        let claim = Claim { key: key.clone(), epoch: stream.epoch + 1 };
        Ok(Raised::Claimed(Claimed { claim, checkpoint, log_intended: stream.log_intended, requests }))
    }
}

/// What a try to raise the epoch has come to.
enum Raised {
    Claimed(Claimed<Lsn>),
    /// The stream was not as it was seen; as it was before, if it was there.
    Found(Option<StreamRow>),
}

/// Ends the backends of the claim and of its range copies, and waits until they are gone (each at most 5 s). Without the
/// right to do so (another role's, no `pg_signal_backend`) the epoch alone fences them.
async fn end_backends(client: &Session, key: &StreamKey) {
    let result = client
        .execute(
            "SELECT pg_terminate_backend(old.pid, 5000) FROM pg_stat_activity AS old
             WHERE old.pid <> pg_backend_pid() AND old.datname = current_database()
               AND (old.application_name = $4
                    OR EXISTS (SELECT FROM _sluice.streams, jsonb_to_recordset(claim) AS claimed(pid integer, backend_start timestamptz)
                               WHERE system_identifier = $1 AND database = $2 AND slot = $3
                                 AND claimed.pid = old.pid AND claimed.backend_start = old.backend_start))",
            &[&key.system_identifier, &key.database, &key.slot, &loader_name(key)],
        )
        .await;
    if let Err(error) = result {
        tracing::warn!(slot = key.slot, error = %failed("end the old claim's backends")(error), "the epoch alone fences the old claim");
    }
}

async fn read_tables(client: &Session, key: &StreamKey) -> Result<HashMap<QualifiedName, TableCheckpoint<Lsn>>> {
    let rows = client
        .query(
            "SELECT source_schema, source_table, target_schema, target_table, state, generation, position, rows_copied, columns, error
             FROM _sluice.tables WHERE system_identifier = $1 AND database = $2 AND slot = $3",
            &[&key.system_identifier, &key.database, &key.slot],
        )
        .await
        .map_err(failed("read the checkpoint"))?;
    rows.iter()
        .map(|row| {
            let source = QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1));
            let table = TableCheckpoint {
                source: source.clone(),
                target: QualifiedName::new(row.get::<_, String>(2), row.get::<_, String>(3)),
                state: parse_state(row.get(4))?,
                generation: row.get(5),
                position: row.get::<_, Option<&str>>(6).map(parse_position).transpose()?,
                rows_copied: row.get(7),
                columns: row.get(8),
                error: row.get(9),
            };
            Ok((source, table))
        })
        .collect()
}

fn parse_position(text: &str) -> Result<Lsn> {
    text.parse().map_err(|error| Error::bug("the checkpoint on the target can't be read").caused_by(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loaders_of_a_stream_have_a_name_of_their_own_that_fits() {
        let key = |slot: &str| StreamKey { system_identifier: "7".into(), database: "shop".into(), slot: slot.into() };
        let name = loader_name(&key(&"s".repeat(63)));
        assert!(name.len() <= 63, "{name}");
        assert_ne!(loader_name(&key("a")), loader_name(&key("b")));
    }
}
