//! Target tables: made from what the source has, or looked at when they are there already.
//!
//! A table that Sluice makes has the source's columns with their types, NOT NULL, collations, generated columns and storage.
//! What else the source's has comes after the data ([`structure`]). A table that is there is never altered, but for its
//! key ([`finish`]), and when the source's is ([`alter()`]).

mod alter;
pub(super) mod build;
mod compatible;
mod describe;
mod empty;
mod needs;
pub(super) mod structure;

pub(super) use alter::alter;
pub(super) use compatible::{check_compatible, narrower};
pub(super) use describe::{Equality, TargetTable, describe};
pub(super) use empty::related;
pub(super) use needs::check_needs;

use super::connect::Session;
use super::lsn::Lsn;
use super::sql::{qualified, quote_ident};
use super::target::failed;
use crate::engine::error::{Error, Result, reason};
use crate::engine::roles::ApplyMode;
use crate::engine::table::{Column, Identity, MappedTable, QualifiedName};

/// How many tables are looked at together. The statements of all at once would take memory.
pub(super) const LOOKS: usize = 50;

/// How long a statement waits for a lock on a target table before it gives way and is tried again.
pub(super) const LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '30s'";

/// What is there where a table is mapped to.
pub(super) struct Place {
    pub present: Option<TargetTable>,
    pub has_schema: bool,
}

/// Looks where a table is mapped to.
pub(super) async fn look(client: &Session, table: &MappedTable) -> Result<Place> {
    let (present, has_schema) =
        futures::future::try_join(describe(client, &table.target), structure::has_schema(client, &table.target.schema)).await?;
    Ok(Place { present, has_schema })
}

/// Makes a table, and its schema when there is none. Its statements are sent together.
pub(super) async fn create(client: &Session, table: &MappedTable, has_schema: bool) -> Result<()> {
    let schema = async { if has_schema { Ok(()) } else { structure::create_schema(client, &table.target.schema).await } };
    let create = async {
        let created = client.batch_execute(&create_table(table)).await;
        created.map_err(failed(format!("create target table {}", table.target)))
    };
    let storage = async {
        match build::storage(table) {
            Some(sql) => client.batch_execute(&sql).await.map_err(failed(&sql)),
            None => Ok(()),
        }
    };
    let (schema, created, stored) = futures::future::join3(schema, create, storage).await;
    schema.and(created).and(stored)
}

/// The statement that makes a target table.
fn create_table(table: &MappedTable) -> String {
    let columns = table.version.columns.iter().chain(&table.generated).map(define_column);
    format!("CREATE TABLE {} ({})", qualified(&table.target), columns.collect::<Vec<_>>().join(", "))
}

fn define_column(column: &Column) -> String {
    let mut text = format!("{} {}", quote_ident(&column.name), column.declared);
    if let Some(collation) = &column.collation {
        text += &format!(" COLLATE {}", qualified(collation));
    }
    if let Some(expression) = &column.generated {
        text += &format!(" GENERATED ALWAYS AS ({expression}) STORED");
    }
    if column.not_null {
        text += " NOT NULL";
    }
    text
}

/// Whether a table holds a row.
pub(super) async fn has_rows(client: &Session, table: &QualifiedName) -> Result<bool> {
    let sql = format!("SELECT EXISTS (SELECT FROM {})", qualified(table));
    let row = client.query_one(&sql, &[]).await.map_err(failed(format!("look for rows in {table}")))?;
    Ok(row.get(0))
}

/// Builds the key and statistics of a loaded table, in the caller's transaction. Safe to repeat.
///
/// A table without a primary key whose rows are named by a unique index gets one on those columns: without it every
/// update would read the whole table.
pub(super) async fn finish(client: &Session, table: &MappedTable) -> Result<()> {
    let Some(present) = describe(client, &table.target).await? else {
        return Err(Error::stop(reason::TARGET_TABLE_INCOMPATIBLE, format!("target table {} is gone", table.target)));
    };
    if let Some(sql) = missing_key(table, &present, free_name(client, table).await?) {
        client.batch_execute(&sql).await.map_err(failed(format!("build the key of {}", table.target)))?;
    }
    client.batch_execute(&format!("ANALYZE {}", qualified(&table.target))).await.map_err(failed(format!("analyze {}", table.target)))
}

/// The primary key's own name, unless another relation of the target schema bears it.
async fn free_name<'a>(client: &Session, table: &'a MappedTable) -> Result<Option<&'a str>> {
    let Some(name) = table.primary_key_name.as_deref() else {
        return Ok(None);
    };
    let taken = client
        .query_one(
            "SELECT EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2)",
            &[&table.target.schema, &name],
        )
        .await
        .map_err(failed("look for the key's name"))?;
    Ok((!taken.get::<_, bool>(0)).then_some(name))
}

/// The statement that builds the key, when there is none on the same columns. Without a name the server chooses one.
fn missing_key(table: &MappedTable, present: &TargetTable, constraint: Option<&str>) -> Option<String> {
    let name = qualified(&table.target);
    let list = |columns: &[&str]| columns.iter().map(|column| quote_ident(column)).collect::<Vec<_>>().join(", ");
    let primary: Vec<&str> = table.primary_key.iter().map(String::as_str).collect();
    let key = if primary.is_empty() && table.version.identity == Identity::Key {
        table.version.columns.iter().filter(|column| column.key).map(|column| column.name.as_str()).collect()
    } else {
        primary.clone()
    };
    if key.is_empty() || present.has_unique_index_on(&key) {
        return None;
    }
    if primary.is_empty() || present.has_primary_key() {
        return Some(format!("CREATE UNIQUE INDEX ON {name} ({})", list(&key)));
    }
    let constraint = constraint.map_or_else(String::new, |name| format!("CONSTRAINT {} ", quote_ident(name)));
    Some(format!("ALTER TABLE {name} ADD {constraint}PRIMARY KEY ({})", list(&primary)))
}

/// What fires on a target table when triggers can't be switched off.
///
/// # Errors
/// `TargetTableIncompatible` when there is something and it is not `accepted`.
pub(super) fn check_fires(
    table: &MappedTable,
    present: &TargetTable,
    mode: ApplyMode,
    accepted: bool,
    role: &str,
) -> Result<Option<String>> {
    if mode == ApplyMode::Replica || (present.triggers.is_empty() && present.cascades.is_empty()) {
        return Ok(None);
    }
    let target = &table.target;
    let fires: Vec<&str> = present.triggers.iter().chain(&present.cascades).map(String::as_str).collect();
    let fires = fires.join(", ");
    if accepted {
        return Ok(Some(format!("of {target}: {fires}")));
    }
    Err(Error::stop(
        reason::TARGET_TABLE_INCOMPATIBLE,
        format!(
            "triggers or foreign key actions of target table {target} would fire on mirrored changes ({fires}) and role {role} may not switch \
             them off: GRANT SET ON PARAMETER session_replication_role TO {} (PostgreSQL 15 and later), or make it superuser, or drop them, or \
             let them fire: in the Mirror set stream.targetTriggers to Accept",
            quote_ident(role),
        ),
    ))
}

/// Page header of a WAL page that does not begin a segment (`SizeOfXLogShortPHD`).
const SHORT_PAGE_HEADER: u64 = 24;
/// `XLOG_BLCKSZ`, which no distribution changes.
const WAL_PAGE: u64 = 8192;

/// End of the last record before an insert position. Where a record ends with its page, the insert position already lies
/// behind the next page's header, which the flush position reaches only with the next record.
pub(super) fn record_end(insert: Lsn) -> Lsn {
    if insert.0 % WAL_PAGE == SHORT_PAGE_HEADER { Lsn(insert.0 - SHORT_PAGE_HEADER) } else { insert }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_insert_position_behind_a_page_header_is_the_end_of_the_page_before() {
        assert_eq!(record_end(Lsn(8192 + 24)), Lsn(8192));
        assert_eq!(record_end(Lsn(8192 + 32)), Lsn(8192 + 32));
        assert_eq!(record_end(Lsn(8192)), Lsn(8192));
    }
}
