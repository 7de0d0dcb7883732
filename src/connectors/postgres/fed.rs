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
    const READABLE: &str = "SELECT FROM pg_namespace n JOIN pg_class t ON t.relnamespace = n.oid AND t.relname = 'tables'
        JOIN pg_class s ON s.relnamespace = n.oid AND s.relname = 'streams'
        WHERE n.nspname = '_sluice' AND has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(t.oid, 'SELECT')
          AND has_table_privilege(s.oid, 'SELECT')";
    if answer(Side::Source, WHAT, session.query_opt(READABLE, &[])).await?.is_none() {
        return Ok(Vec::new());
    }
    let schemas: Vec<&str> = tables.iter().map(|table| table.source().schema.as_str()).collect();
    let names: Vec<&str> = tables.iter().map(|table| table.source().name.as_str()).collect();
    const FED: &str =
        "SELECT target_schema, target_table, system_identifier, database, source_schema, source_table, mirror_namespace || '/' || mirror_name
         FROM _sluice.tables JOIN _sluice.streams USING (system_identifier, database, slot)
         JOIN unnest($1::text[], $2::text[]) AS mapped(schema, name) ON (target_schema, target_table) = (mapped.schema, mapped.name)";
    let rows = answer(Side::Source, WHAT, session.query(FED, &[&schemas, &names])).await?;
    let fed = rows.iter().map(|row| Fed {
        table: QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1)),
        system_identifier: row.get(2),
        database: row.get(3),
        origin: QualifiedName::new(row.get::<_, String>(4), row.get::<_, String>(5)),
        owner: row.get(6),
    });
    Ok(fed.collect())
}
