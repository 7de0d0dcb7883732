//! Records of requests, and what they do to a stream's checkpoint.

use super::super::connect::{Parameter, Session};
use super::super::ddl::structure::reset_sequence;
use super::super::lsn::Lsn;
use super::super::target::failed;
use super::{Claim, columns_of};
use crate::engine::error::{Error, Result};
use crate::engine::request::{Effect, Request, RequestChange, RequestRecord, RequestState, StateChange};
use crate::engine::roles::StreamKey;
use crate::engine::table::{QualifiedName, TableState};

/// Records kept of a stream. An older request would be done again, should somebody ask for it with the same id.
const KEPT: i64 = 100;

const STREAM: &str = "system_identifier = $1 AND database = $2 AND slot = $3";

impl Claim {
    /// Writes what is decided, in the caller's transaction. Returns all records, the newest first.
    pub(in super::super) async fn record(&self, client: &Session, change: &RequestChange<'_, Lsn>) -> Result<Vec<RequestRecord>> {
        for (id, state, message) in &change.ended {
            self.end(client, id, *state, message).await?;
        }
        if let Some((request, state, message)) = &change.taken {
            self.take(client, request, *state, message).await?;
        }
        match &change.effect {
            Effect::Nothing => {}
            Effect::States(changes) => self.change_states(client, changes).await?,
            Effect::Anew => self.start_over(client).await?,
            Effect::Sequences(tables) => {
                for (table, values) in tables {
                    for sequence in &table.structure.sequences {
                        reset_sequence(client, table, sequence, values).await?;
                    }
                }
            }
        }
        read(client, &self.key).await
    }

    /// Writes that a request is over, if it is not yet.
    pub(in super::super) async fn end(&self, client: &Session, id: &str, state: RequestState, message: &str) -> Result<()> {
        let key = &self.key;
        let sql = format!(
            "UPDATE _sluice.requests SET state = $5, message = $6, finished_at = clock_timestamp()
             WHERE {STREAM} AND id = $4 AND state = '{}'",
            RequestState::Running.as_str()
        );
        let values: [&(dyn Parameter + Sync); 6] = [&key.system_identifier, &key.database, &key.slot, &id, &state.as_str(), &message];
        client.execute(&sql, &values).await.map(drop).map_err(failed("end a request"))
    }

    async fn take(&self, client: &Session, request: &Request, state: RequestState, message: &str) -> Result<()> {
        let key = &self.key;
        let (action, is_over) = (request.action.as_str(), state != RequestState::Running);
        let values: [&(dyn Parameter + Sync); 9] =
            [&key.system_identifier, &key.database, &key.slot, &request.id, &action, &request.tables, &state.as_str(), &message, &is_over];
        let sql = format!(
            "INSERT INTO _sluice.requests (system_identifier, database, slot, number, id, action, tables, state, message, finished_at)
             SELECT $1, $2, $3, coalesce(max(number), 0) + 1, $4, $5, $6, $7, $8, CASE WHEN $9 THEN clock_timestamp() END
             FROM _sluice.requests WHERE {STREAM}"
        );
        client.execute(&sql, &values).await.map_err(failed("record a request"))?;
        let sql = format!(
            "DELETE FROM _sluice.requests WHERE {STREAM}
             AND number <= (SELECT max(number) FROM _sluice.requests WHERE {STREAM}) - {KEPT}"
        );
        client.execute(&sql, &values[..3]).await.map(drop).map_err(failed("forget old requests"))
    }

    async fn change_states(&self, client: &Session, changes: &[StateChange<'_, Lsn>]) -> Result<()> {
        let key = &self.key;
        let sources: Vec<QualifiedName> = changes.iter().map(|change| change.table.source().clone()).collect();
        let (schemas, names) = columns_of(&sources);
        let states: Vec<&str> = changes.iter().map(|change| change.state.as_str()).collect();
        // Empty for none.
        let positions: Vec<String> =
            changes.iter().map(|change| change.position.map(|position| position.to_string()).unwrap_or_default()).collect();
        let errors: Vec<&str> = changes.iter().map(|change| change.error.as_deref().unwrap_or_default()).collect();
        let init = TableState::Init.as_str();
        let values: [&(dyn Parameter + Sync); 9] =
            [&key.system_identifier, &key.database, &key.slot, &schemas, &names, &states, &positions, &errors, &init];
        let rows = client
            .execute(
                "UPDATE _sluice.tables AS known SET state = new.state, position = nullif(new.position, ''), error = nullif(new.error, ''),
                   generation = generation + CASE WHEN new.state = $9 THEN 1 ELSE 0 END, updated_at = now()
                 FROM unnest($4::text[], $5::text[], $6::text[], $7::text[], $8::text[])
                   AS new(source_schema, source_table, state, position, error)
                 WHERE system_identifier = $1 AND database = $2 AND slot = $3
                   AND known.source_schema = new.source_schema AND known.source_table = new.source_table",
                &values,
            )
            .await
            .map_err(failed("write states of tables"))?;
        if rows != changes.len() as u64 {
            return Err(Error::bug("a table that a request is about is not in the checkpoint"));
        }
        Ok(())
    }
}

/// All records of a stream, the newest first.
pub(in super::super) async fn read(client: &Session, key: &StreamKey) -> Result<Vec<RequestRecord>> {
    let sql = format!(
        "SELECT id, action, tables, state, message, started_at, finished_at FROM _sluice.requests WHERE {STREAM} ORDER BY number DESC"
    );
    let rows = client.query(&sql, &[&key.system_identifier, &key.database, &key.slot]).await.map_err(failed("read the requests"))?;
    let record = |row: &tokio_postgres::Row| {
        let state: &str = row.get(3);
        Ok(RequestRecord {
            id: row.get(0),
            action: row.get(1),
            tables: row.get(2),
            state: RequestState::parse(state).ok_or_else(|| Error::bug(format!("a request is recorded in the unknown state {state}")))?,
            message: row.get(4),
            started_at: row.get(5),
            finished_at: row.get(6),
        })
    };
    rows.iter().map(record).collect()
}
