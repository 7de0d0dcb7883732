//! Which tables of a database are written by streams, as their checkpoints there say.

use super::connect::{Session, Side};
use super::source::answer;
use crate::engine::error::Result;
use crate::engine::roles::Fed;
use crate::engine::table::{MappedTable, QualifiedName};

/// The mapped tables that streams write into this database.
pub(super) async fn fed(session: &Session, tables: &[MappedTable]) -> Result<Vec<Fed>> {
    const WHAT: &str = "look which tables are mirrored";
    // A role that may not look into the schema reads no checkpoint: the circle is then not seen.
    const READABLE: &str = "SELECT to_regclass('_sluice.tables') IS NOT NULL AND has_schema_privilege('_sluice', 'USAGE')
        AND has_table_privilege('_sluice.tables', 'SELECT') AND has_table_privilege('_sluice.streams', 'SELECT')";
    let readable = session.query_opt("SELECT FROM pg_namespace WHERE nspname = '_sluice'", &[]);
    if answer(Side::Source, WHAT, readable).await?.is_none() {
        return Ok(Vec::new());
    }
    if !answer(Side::Source, WHAT, session.query_one(READABLE, &[])).await?.get::<_, bool>(0) {
        return Ok(Vec::new());
    }
    let schemas: Vec<&str> = tables.iter().map(|table| table.source().schema.as_str()).collect();
    let names: Vec<&str> = tables.iter().map(|table| table.source().name.as_str()).collect();
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 2] = [&schemas, &names];
    let rows = session.query(
        "SELECT target_schema, target_table, system_identifier, database, source_schema, source_table, mirror_namespace || '/' || mirror_name
         FROM _sluice.tables JOIN _sluice.streams USING (system_identifier, database, slot)
         JOIN unnest($1::text[], $2::text[]) AS mapped(schema, name) ON (target_schema, target_table) = (mapped.schema, mapped.name)",
        &parameters,
    );
    let rows = answer(Side::Source, WHAT, rows).await?;
    let fed = rows.iter().map(|row| Fed {
        table: QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1)),
        system_identifier: row.get(2),
        database: row.get(3),
        origin: QualifiedName::new(row.get::<_, String>(4), row.get::<_, String>(5)),
        owner: row.get(6),
    });
    Ok(fed.collect())
}
