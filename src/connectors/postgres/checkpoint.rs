//! What a target holds durably for a stream: schema `_sluice`.
//!
//! `streams` has one row per stream (position, epoch, claim, owner), `tables` one per table of a stream, `ranges` one per
//! copied range. Invariants:
//! * a transaction that writes for a stream ends with a statement that proves the epoch: [`prepare_move`] or
//!   [`Claim::check`]. A claim raises the epoch under a row lock that both of them conflict with, so no such
//!   transaction commits after a claim that did not see it;
//! * the proof locks the row only from the last statement to the commit, so a claimer never waits long; should an old
//!   worker be frozen in between, the claimer ends its backends (`claim`);
//! * two streams never write one target table (a unique index on `tables`).

pub(super) mod claim;
pub(super) mod requests;
pub(super) mod schema;

use super::connect::{Parameter, Parameters, Session};
use super::lsn::Lsn;
use super::sql::qualified;
use super::target::failed;
use crate::engine::error::{Class, Error, Result, reason};
use crate::engine::register::Reached;
pub(super) use crate::engine::roles::Claim;
use crate::engine::table::{MappedTable, QualifiedName, TableState};
use tokio_postgres::Statement;

/// What the checkpoint says of one table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KnownTable {
    pub state: TableState,
    pub generation: i64,
    /// The version that the target holds, as [`MappedTable::signature`] says it.
    pub columns: String,
}

/// Prepared once per connection, since each writing transaction ends with it.
pub(super) async fn prepare_move(client: &Session) -> Result<Statement> {
    client
        .prepare(
            "UPDATE _sluice.streams SET position = $5, rows_streamed = rows_streamed + $7, updated_at = now()
             WHERE system_identifier = $1 AND database = $2 AND slot = $3 AND epoch = $4 AND position IS NOT DISTINCT FROM $6",
        )
        .await
        .map_err(failed("prepare the checkpoint"))
}

impl Claim {
    /// Proves, as a transaction's last statement, that the claim still holds. Copied ranges may do so at the same time
    /// as the stream moves its position: `KEY SHARE` conflicts with a claim's `FOR UPDATE` only.
    pub(super) async fn check(&self, client: &Session) -> Result<()> {
        let key = &self.key;
        let found = client
            .query_opt(
                "SELECT 1 FROM _sluice.streams
                 WHERE system_identifier = $1 AND database = $2 AND slot = $3 AND epoch = $4 FOR KEY SHARE",
                &[&key.system_identifier, &key.database, &key.slot, &self.epoch],
            )
            .await
            .map_err(failed("check the claim"))?;
        match found {
            Some(_) => Ok(()),
            None => Err(self.lost(client, "the claim").await),
        }
    }

    /// Why a statement that is bound to the claim found no row.
    pub(super) async fn lost(&self, client: &Session, what: &str) -> Error {
        let key = &self.key;
        let row = client
            .query_opt(
                "SELECT epoch FROM _sluice.streams WHERE system_identifier = $1 AND database = $2 AND slot = $3",
                &[&key.system_identifier, &key.database, &key.slot],
            )
            .await;
        match row {
            Err(error) => failed("read the epoch")(error),
            Ok(None) => fenced(format!("the checkpoint of slot {} was removed from the target", key.slot)),
            Ok(Some(row)) if row.get::<_, i64>(0) > self.epoch => {
                let theirs: i64 = row.get(0);
                fenced(format!("another worker has claimed slot {}: epoch {theirs}, ours is {}", key.slot, self.epoch))
            }
            Ok(Some(_)) => Error::bug(format!("{what} of slot {} is not what it was read as, in our own epoch", key.slot)),
        }
    }

    /// Writes that the slot is about to be made.
    pub(super) async fn intend_log(&self, client: &Session) -> Result<()> {
        self.update_stream(client, "log_intended = true", "position IS NULL", &[]).await
    }

    /// Writes the first position.
    pub(super) async fn initialize(&self, client: &Session, position: Lsn, timeline: i64) -> Result<()> {
        let set = "position = $5, timeline = $6, log_intended = false";
        self.update_stream(client, set, "position IS NULL", &[&position.to_string(), &timeline]).await
    }

    /// Forgets the position and every copy, as the first statements of a transaction.
    pub(super) async fn start_over(&self, client: &Session) -> Result<()> {
        self.update_stream(client, "position = NULL, log_intended = true", "position IS NOT NULL", &[]).await?;
        let key = &self.key;
        let values: [&(dyn Parameter + Sync); 4] = [&key.system_identifier, &key.database, &key.slot, &TableState::Init.as_str()];
        let of_stream = "WHERE system_identifier = $1 AND database = $2 AND slot = $3";
        let forget = format!(
            "UPDATE _sluice.tables SET state = $4, generation = generation + 1, position = NULL, error = NULL, rows_copied = 0, updated_at = now() {of_stream}"
        );
        client.execute(&forget, &values).await.map_err(failed("forget the copies"))?;
        let forget = format!("DELETE FROM _sluice.ranges {of_stream}");
        client.execute(&forget, &values[..3]).await.map(drop).map_err(failed("forget the copies"))
    }

    /// Writes another timeline.
    pub(super) async fn set_timeline(&self, client: &Session, timeline: i64) -> Result<()> {
        self.update_stream(client, "timeline = $5", "position IS NOT NULL", &[&timeline]).await
    }

    async fn update_stream(&self, client: &Session, set: &str, only_if: &str, values: Parameters<'_>) -> Result<()> {
        let sql = format!(
            "UPDATE _sluice.streams SET {set}, updated_at = now()
             WHERE system_identifier = $1 AND database = $2 AND slot = $3 AND epoch = $4 AND {only_if}"
        );
        let key = &self.key;
        let mut parameters: Vec<&(dyn Parameter + Sync)> = vec![&key.system_identifier, &key.database, &key.slot, &self.epoch];
        parameters.extend_from_slice(values);
        let rows = client.execute(&sql, &parameters).await.map_err(failed("write the checkpoint"))?;
        if rows == 0 {
            return Err(self.lost(client, "the checkpoint").await);
        }
        Ok(())
    }

    /// The table's row, locked; `None` when it is unknown or was written into another target table.
    pub(super) async fn known_table(&self, client: &Session, table: &MappedTable) -> Result<Option<KnownTable>> {
        let (key, source, target) = (&self.key, table.source(), &table.target);
        let row = client
            .query_opt(
                "SELECT state, generation, columns FROM _sluice.tables
                 WHERE system_identifier = $1 AND database = $2 AND slot = $3 AND source_schema = $4 AND source_table = $5
                   AND target_schema = $6 AND target_table = $7 FOR UPDATE",
                &[&key.system_identifier, &key.database, &key.slot, &source.schema, &source.name, &target.schema, &target.name],
            )
            .await
            .map_err(failed("read the checkpoint"))?;
        row.map(|row| Ok(KnownTable { state: parse_state(row.get(0))?, generation: row.get(1), columns: row.get(2) })).transpose()
    }

    /// Whether the target table is one that this stream has made.
    pub(super) async fn has_made(&self, client: &Session, table: &MappedTable) -> Result<bool> {
        let (key, source) = (&self.key, table.source());
        let row = client
            .query_one(
                "SELECT EXISTS (SELECT FROM _sluice.tables WHERE system_identifier = $1 AND database = $2 AND slot = $3
                   AND source_schema = $4 AND source_table = $5 AND made = to_regclass($6)::oid)",
                &[&key.system_identifier, &key.database, &key.slot, &source.schema, &source.name, &qualified(&table.target)],
            )
            .await
            .map_err(failed("look who has made the target table"))?;
        Ok(row.get(0))
    }

    /// Tables that follow the stream.
    pub(super) async fn ready_tables(&self, client: &Session) -> Result<Vec<QualifiedName>> {
        let key = &self.key;
        let rows = client
            .query(
                "SELECT source_schema, source_table FROM _sluice.tables
                 WHERE system_identifier = $1 AND database = $2 AND slot = $3 AND state = $4",
                &[&key.system_identifier, &key.database, &key.slot, &TableState::Ready.as_str()],
            )
            .await
            .map_err(failed("read the checkpoint"))?;
        Ok(rows.iter().map(|row| QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1))).collect())
    }

    /// Writes a table as beginning its next copy; ranges of earlier ones are forgotten. `made`: the target table was made in
    /// this transaction. Returns the generation. Its statements are sent together.
    pub(super) async fn begin_table(&self, client: &Session, table: &MappedTable, made: bool) -> Result<i64> {
        let (key, source, target) = (&self.key, table.source(), &table.target);
        let (state, signature, name) = (TableState::Copying.as_str(), table.signature(), qualified(target));
        let values: [&(dyn Parameter + Sync); 11] = [
            &key.system_identifier,
            &key.database,
            &key.slot,
            &source.schema,
            &source.name,
            &target.schema,
            &target.name,
            &state,
            &signature,
            &made,
            &name,
        ];
        let (owned, begun, forgotten) = futures::future::join3(
            self.own_target(client, table),
            client.query_one(
                "INSERT INTO _sluice.tables AS known (system_identifier, database, slot, source_schema, source_table,
                                                      target_schema, target_table, state, generation, columns, made)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, 1, $9, CASE WHEN $10 THEN to_regclass($11)::oid END)
                 ON CONFLICT (system_identifier, database, slot, source_schema, source_table) DO UPDATE
                 SET target_schema = $6, target_table = $7, state = $8, generation = known.generation + 1,
                     position = NULL, error = NULL, rows_copied = 0, columns = $9, made = coalesce(excluded.made, known.made), updated_at = now()
                 RETURNING generation",
                &values,
            ),
            client.execute(
                "DELETE FROM _sluice.ranges
                 WHERE system_identifier = $1 AND database = $2 AND slot = $3 AND source_schema = $4 AND source_table = $5",
                &values[..5],
            ),
        )
        .await;
        owned?;
        let generation = begun.map_err(failed("begin the copy"))?.get(0);
        forgotten.map_err(failed("begin the copy"))?;
        Ok(generation)
    }

    /// Writes a table's state; a table that was never copied gets its row here. Its statements are sent together.
    pub(super) async fn set_state(&self, client: &Session, table: &MappedTable, state: TableState, position: Option<Lsn>) -> Result<()> {
        let (key, source, target) = (&self.key, table.source(), &table.target);
        let (state, position, signature) = (state.as_str(), position.map(|position| position.to_string()), table.signature());
        let values: [&(dyn Parameter + Sync); 10] = [
            &key.system_identifier,
            &key.database,
            &key.slot,
            &source.schema,
            &source.name,
            &target.schema,
            &target.name,
            &state,
            &position,
            &signature,
        ];
        let (owned, written) = futures::future::join(
            self.own_target(client, table),
            client.execute(
                "INSERT INTO _sluice.tables AS known (system_identifier, database, slot, source_schema, source_table,
                                                      target_schema, target_table, state, position, columns)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
                 ON CONFLICT (system_identifier, database, slot, source_schema, source_table) DO UPDATE
                 SET target_schema = $6, target_table = $7, state = $8, position = $9, updated_at = now(),
                     error = CASE WHEN $8 = 'Error' THEN known.error END",
                &values,
            ),
        )
        .await;
        owned?;
        written.map(drop).map_err(failed("write a table's state"))
    }

    /// Writes which versions of tables the target holds. Those that it knows nothing of are passed over.
    pub(super) async fn set_versions(&self, client: &Session, tables: &[&MappedTable]) -> Result<()> {
        let key = &self.key;
        let schemas: Vec<&str> = tables.iter().map(|table| table.source().schema.as_str()).collect();
        let names: Vec<&str> = tables.iter().map(|table| table.source().name.as_str()).collect();
        let signatures: Vec<String> = tables.iter().map(|table| table.signature()).collect();
        let written = client
            .execute(
                "UPDATE _sluice.tables SET columns = held.columns, updated_at = now()
                 FROM unnest($4::text[], $5::text[], $6::text[]) AS held(source_schema, source_table, columns)
                 WHERE system_identifier = $1 AND database = $2 AND slot = $3 AND tables.columns <> held.columns
                   AND tables.source_schema = held.source_schema AND tables.source_table = held.source_table",
                &[&key.system_identifier, &key.database, &key.slot, &schemas, &names, &signatures],
            )
            .await;
        written.map(drop).map_err(failed("write the columns of a table"))
    }

    /// Writes what a commit of the stream makes of tables, in its transaction.
    pub(super) async fn reached(&self, client: &Session, reached: &Reached, position: Lsn) -> Result<()> {
        let Reached { joined, own } = reached;
        if !joined.is_empty() {
            let on_disk = "SET LOCAL synchronous_commit = on";
            client.batch_execute(on_disk).await.map_err(failed("join tables"))?;
            self.move_tables(client, joined, TableState::Ready, None).await?;
        }
        if !own.is_empty() {
            self.move_tables(client, own, TableState::CatchingUp, Some(position)).await?;
        }
        Ok(())
    }

    async fn move_tables(&self, client: &Session, tables: &[QualifiedName], state: TableState, position: Option<Lsn>) -> Result<()> {
        let key = &self.key;
        let (schemas, names) = columns_of(tables);
        let position = position.map(|position| position.to_string());
        let rows = client
            .execute(
                "UPDATE _sluice.tables SET state = $4, position = $7, updated_at = now()
                 FROM unnest($5::text[], $6::text[]) AS moved(source_schema, source_table)
                 WHERE system_identifier = $1 AND database = $2 AND slot = $3
                   AND tables.source_schema = moved.source_schema AND tables.source_table = moved.source_table",
                &[&key.system_identifier, &key.database, &key.slot, &state.as_str(), &schemas, &names, &position],
            )
            .await
            .map_err(failed("move tables"))?;
        if rows != tables.len() as u64 {
            return Err(Error::bug("a table that follows the stream is not in the checkpoint"));
        }
        Ok(())
    }

    /// Forgets tables and their ranges. Its statements are sent together.
    pub(super) async fn forget(&self, client: &Session, tables: &[QualifiedName]) -> Result<()> {
        let key = &self.key;
        let (schemas, names) = columns_of(tables);
        let values: [&(dyn Parameter + Sync); 5] = [&key.system_identifier, &key.database, &key.slot, &schemas, &names];
        let delete = async |place: &str| {
            let sql = format!(
                "DELETE FROM _sluice.{place} AS known USING unnest($4::text[], $5::text[]) AS gone(source_schema, source_table)
                 WHERE system_identifier = $1 AND database = $2 AND slot = $3
                   AND known.source_schema = gone.source_schema AND known.source_table = gone.source_table"
            );
            client.execute(&sql, &values).await.map(drop).map_err(failed("forget tables"))
        };
        futures::future::try_join(delete("tables"), delete("ranges")).await.map(drop)
    }

    /// Ranges done in a generation.
    pub(super) async fn done_ranges(&self, client: &Session, table: &QualifiedName, generation: i64) -> Result<Vec<i32>> {
        let key = &self.key;
        let rows = client
            .query(
                "SELECT number FROM _sluice.ranges
                 WHERE system_identifier = $1 AND database = $2 AND slot = $3 AND source_schema = $4 AND source_table = $5
                   AND generation = $6 ORDER BY number",
                &[&key.system_identifier, &key.database, &key.slot, &table.schema, &table.name, &generation],
            )
            .await
            .map_err(failed("read the copied ranges"))?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Writes a range as done, in the transaction that carries its rows.
    pub(super) async fn range_done(&self, client: &Session, table: &QualifiedName, generation: i64, number: i32, rows: i64) -> Result<()> {
        let key = &self.key;
        let counted = client
            .execute(
                "WITH done AS (
                   INSERT INTO _sluice.ranges (system_identifier, database, slot, source_schema, source_table, generation, number, rows)
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8))
                 UPDATE _sluice.tables SET rows_copied = rows_copied + $8, updated_at = now()
                 WHERE system_identifier = $1 AND database = $2 AND slot = $3 AND source_schema = $4 AND source_table = $5
                   AND generation = $6",
                &[&key.system_identifier, &key.database, &key.slot, &table.schema, &table.name, &generation, &number, &rows],
            )
            .await
            .map_err(failed("write a copied range"))?;
        if counted == 0 {
            return Err(self.lost(client, "the copy").await);
        }
        Ok(())
    }

    /// Makes sure that nobody else writes the target table. What an earlier slot or mapping of this very Mirror has left
    /// is forgotten.
    async fn own_target(&self, client: &Session, table: &MappedTable) -> Result<()> {
        let (key, source, target) = (&self.key, table.source(), &table.target);
        let values: [&(dyn Parameter + Sync); 7] =
            [&key.system_identifier, &key.database, &key.slot, &target.schema, &target.name, &source.schema, &source.name];
        let (forgotten, other) = futures::future::join(
            client.execute(
                "DELETE FROM _sluice.tables AS old USING _sluice.streams AS theirs, _sluice.streams AS ours
                 WHERE (theirs.system_identifier, theirs.database, theirs.slot) = (old.system_identifier, old.database, old.slot)
                   AND (ours.system_identifier, ours.database, ours.slot) = ($1, $2, $3)
                   AND (theirs.mirror_namespace, theirs.mirror_name) = (ours.mirror_namespace, ours.mirror_name)
                   AND old.target_schema = $4 AND old.target_table = $5
                   AND (old.system_identifier, old.database, old.slot, old.source_schema, old.source_table) <> ($1, $2, $3, $6, $7)",
                &values,
            ),
            client.query_opt(
                "SELECT mirror_namespace, mirror_name, slot FROM _sluice.tables JOIN _sluice.streams USING (system_identifier, database, slot)
                 WHERE target_schema = $4 AND target_table = $5 AND (system_identifier, database, slot) <> ($1, $2, $3)",
                &values[..5],
            ),
        )
        .await;
        forgotten.map_err(failed("look who writes the table"))?;
        match other.map_err(failed("look who writes the table"))? {
            None => Ok(()),
            Some(row) => Err(duplicate_target(target, row.get(0), row.get(1), row.get(2))),
        }
    }
}

/// Another Mirror writes the table.
pub(super) fn duplicate_target(target: &QualifiedName, namespace: &str, name: &str, slot: &str) -> Error {
    Error::stop(
        reason::DUPLICATE_TARGET,
        format!(
            "target table {target} is written by Mirror {namespace}/{name} (slot {slot}); when that Mirror is gone for good, remove its checkpoint \
             on the target: DELETE FROM _sluice.tables WHERE slot = {}",
            super::sql::quote_literal(slot)
        ),
    )
}

fn fenced(message: String) -> Error {
    Error::new(Class::Fenced, reason::FENCED, message)
}

fn parse_state(word: &str) -> Result<TableState> {
    TableState::parse(word).ok_or_else(|| Error::bug(format!("the checkpoint holds the unknown table state {word}")))
}

fn columns_of(tables: &[QualifiedName]) -> (Vec<&str>, Vec<&str>) {
    tables.iter().map(|table| (table.schema.as_str(), table.name.as_str())).unzip()
}
