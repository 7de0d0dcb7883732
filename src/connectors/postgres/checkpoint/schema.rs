//! Makes schema `_sluice` on a target.

use super::super::connect::Session;
use super::super::target::failed;
use crate::engine::error::{Error, Result, reason};

/// Version of the schema that this build makes and understands.
const VERSION: i32 = 1;

/// Serializes creation among workers that begin at the same time ("sluice" in ASCII).
const CREATION_LOCK: i64 = 0x736c_7569_6365;

const CREATE: &str = "
    CREATE SCHEMA IF NOT EXISTS _sluice;
    COMMENT ON SCHEMA _sluice IS 'Checkpoints of Sluice mirrors: where each stream stands. Do not edit.';
    CREATE TABLE IF NOT EXISTS _sluice.version (version integer NOT NULL);
    CREATE TABLE IF NOT EXISTS _sluice.streams (
        system_identifier text NOT NULL,
        database text NOT NULL,
        slot text NOT NULL,
        position text,
        timeline bigint NOT NULL DEFAULT 0,
        epoch bigint NOT NULL DEFAULT 0,
        claim jsonb NOT NULL DEFAULT '[]',
        log_intended boolean NOT NULL DEFAULT false,
        rows_streamed bigint NOT NULL DEFAULT 0,
        mirror_namespace text NOT NULL,
        mirror_name text NOT NULL,
        mirror_uid text NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(),
        updated_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (system_identifier, database, slot)
    ) WITH (fillfactor = 10);
    CREATE TABLE IF NOT EXISTS _sluice.tables (
        system_identifier text NOT NULL,
        database text NOT NULL,
        slot text NOT NULL,
        source_schema text NOT NULL,
        source_table text NOT NULL,
        target_schema text NOT NULL,
        target_table text NOT NULL,
        state text NOT NULL,
        generation bigint NOT NULL DEFAULT 0,
        position text,
        rows_copied bigint NOT NULL DEFAULT 0,
        columns text NOT NULL,
        updated_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (system_identifier, database, slot, source_schema, source_table)
    ) WITH (fillfactor = 50);
    CREATE UNIQUE INDEX IF NOT EXISTS tables_one_writer ON _sluice.tables (target_schema, target_table);
    CREATE TABLE IF NOT EXISTS _sluice.ranges (
        system_identifier text NOT NULL,
        database text NOT NULL,
        slot text NOT NULL,
        source_schema text NOT NULL,
        source_table text NOT NULL,
        generation bigint NOT NULL,
        number integer NOT NULL,
        rows bigint NOT NULL,
        PRIMARY KEY (system_identifier, database, slot, source_schema, source_table, generation, number)
    );
    INSERT INTO _sluice.version SELECT 1 WHERE NOT EXISTS (SELECT FROM _sluice.version);";

/// What has come since the schema was first made. Older builds do not mind it, so that its version stays.
const ADDITIONS: &str = "
    ALTER TABLE _sluice.tables ADD COLUMN IF NOT EXISTS made oid, ADD COLUMN IF NOT EXISTS error text;
    CREATE TABLE IF NOT EXISTS _sluice.requests (
        system_identifier text NOT NULL,
        database text NOT NULL,
        slot text NOT NULL,
        id text NOT NULL,
        number bigint NOT NULL,
        action text NOT NULL,
        tables text[] NOT NULL,
        state text NOT NULL,
        message text NOT NULL,
        started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        finished_at timestamptz,
        PRIMARY KEY (system_identifier, database, slot, id)
    );";

/// Makes the schema when it is missing.
///
/// # Errors
/// `ServerUnsupported` when a newer build has made it.
pub(in super::super) async fn ensure(client: &Session) -> Result<()> {
    if is_there(client).await? {
        let (version, is_whole) = futures::future::try_join(version(client), is_whole(client)).await?;
        check(version)?;
        if !is_whole {
            client.batch_execute(ADDITIONS).await.map_err(failed("add to schema _sluice"))?;
        }
        return Ok(());
    }
    let sql = format!("BEGIN; SELECT pg_advisory_xact_lock({CREATION_LOCK}); {CREATE} {ADDITIONS} COMMIT;");
    let (created, version) = futures::future::join(client.batch_execute(&sql), version(client)).await;
    if let Err(error) = created {
        let _ = client.batch_execute("ROLLBACK").await;
        return Err(failed("create schema _sluice on the target (needs CREATE on the database)")(error));
    }
    check(version?)
}

/// Whether it has what has come since.
async fn is_whole(client: &Session) -> Result<bool> {
    let sql = "SELECT count(*) = 2 AND to_regclass('_sluice.requests') IS NOT NULL FROM pg_attribute
        WHERE attrelid = '_sluice.tables'::regclass AND attname IN ('made', 'error')";
    Ok(client.query_one(sql, &[]).await.map_err(failed("look at schema _sluice"))?.get(0))
}

/// Whether the schema is there.
pub(in super::super) async fn is_there(client: &Session) -> Result<bool> {
    let there = client.query_one("SELECT to_regclass('_sluice.version') IS NOT NULL", &[]).await;
    Ok(there.map_err(failed("look for schema _sluice"))?.get(0))
}

/// The version of the schema, which is there.
async fn version(client: &Session) -> Result<i32> {
    let version = client.query_one("SELECT max(version) FROM _sluice.version", &[]).await;
    let version = version.map_err(failed("read the version of schema _sluice"))?;
    version.get::<_, Option<i32>>(0).ok_or_else(|| Error::bug("schema _sluice has no version"))
}

fn check(version: i32) -> Result<()> {
    if version > VERSION {
        return Err(Error::stop(
            reason::SERVER_UNSUPPORTED,
            format!("schema _sluice on the target has version {version}, made by a newer Sluice; this one understands {VERSION}"),
        ));
    }
    Ok(())
}
