//! What the target must have before its tables can be made.

use super::super::connect::Session;
use super::super::sql::quote_ident;
use super::super::target::failed;
use crate::engine::error::{Error, Result, reason};
use crate::engine::structure::Need;
use crate::engine::table::MappedTable;
use std::collections::HashSet;
use tokio_postgres::error::SqlState;

/// What `pg_get_object_address` says of an object that is not there.
const ABSENT: [SqlState; 4] =
    [SqlState::UNDEFINED_OBJECT, SqlState::UNDEFINED_FUNCTION, SqlState::INVALID_SCHEMA_NAME, SqlState::UNDEFINED_TABLE];

/// Looks for everything that tables which are to be made use.
///
/// # Errors
/// `TypeMissing` with all that is not there, each with the statement that cures it, in the order to run them.
pub(in super::super) async fn check_needs(client: &Session, tables: &[&MappedTable]) -> Result<()> {
    let (mut wanted, mut seen, mut missing) = (Vec::new(), HashSet::new(), Vec::new());
    for table in tables {
        let structure = &table.structure;
        let needs = structure.needs.iter().chain(structure.indexes.iter().flat_map(|index| &index.needs));
        wanted.extend(needs.filter(|need| seen.insert(*need)));
    }
    for need in wanted {
        if !is_there(client, need).await? {
            let cure = cure(client, need).await?;
            if !missing.contains(&cure) {
                missing.push(cure);
            }
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::stop(reason::TYPE_MISSING, format!("the target lacks what its tables need; run there: {}", missing.join("; "))))
}

async fn is_there(client: &Session, need: &Need) -> Result<bool> {
    let found = client.query_one("SELECT pg_get_object_address($1, $2, $3) IS NULL", &[&need.kind, &need.names, &need.arguments]).await;
    match found {
        Ok(_) => Ok(true),
        Err(error) if error.code().is_some_and(|code| ABSENT.contains(code)) => Ok(false),
        Err(error) => Err(failed("look for what tables need")(error)),
    }
}

/// The statements that make it.
async fn cure(client: &Session, need: &Need) -> Result<String> {
    let row = client
        .query_one(
            "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1), (SELECT n.nspname::text FROM pg_extension e
                 JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = $2)",
            &[&need.schema, &need.extension],
        )
        .await
        .map_err(failed("look for extensions on the target"))?;
    let installed_in: Option<String> = row.get(1);
    let cure = match (&need.extension, installed_in, &need.schema) {
        (Some(extension), Some(other), Some(schema)) if other != *schema => {
            format!("ALTER EXTENSION {} SET SCHEMA {}", quote_ident(extension), quote_ident(schema))
        }
        (Some(extension), Some(_), _) => format!("ALTER EXTENSION {} UPDATE", quote_ident(extension)),
        _ => need.cure.clone(),
    };
    Ok(match &need.schema {
        Some(schema) if !row.get::<_, bool>(0) => format!("CREATE SCHEMA IF NOT EXISTS {}; {cure}", quote_ident(schema)),
        _ => cure,
    })
}
