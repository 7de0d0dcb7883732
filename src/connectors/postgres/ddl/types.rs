//! Types and collations that the target must have before its tables can be made.

use super::super::sql::{qualified, quote_ident};
use super::super::target::failed;
use crate::engine::error::{Error, Result, reason};
use crate::engine::table::{Column, MappedTable, QualifiedName};
use std::collections::BTreeSet;
use tokio_postgres::Client;

/// Types of well-known extensions.
const EXTENSIONS: [(&str, &str); 13] = [
    ("citext", "citext"),
    ("hstore", "hstore"),
    ("ltree", "ltree"),
    ("lquery", "ltree"),
    ("cube", "cube"),
    ("seg", "seg"),
    ("isbn", "isn"),
    ("geometry", "postgis"),
    ("geography", "postgis"),
    ("raster", "postgis_raster"),
    ("vector", "vector"),
    ("halfvec", "vector"),
    ("sparsevec", "vector"),
];

/// Looks for all types and collations of tables that are to be made.
///
/// # Errors
/// `TypeMissing`, with the statement that cures it, for the first that is not there.
pub(in super::super) async fn check_types(client: &Client, tables: &[&MappedTable]) -> Result<()> {
    let columns = || tables.iter().flat_map(|table| table.version.columns.iter().chain(&table.generated));
    let types: BTreeSet<&QualifiedName> = columns().map(|column: &Column| &column.type_name).collect();
    let collations: BTreeSet<&QualifiedName> = columns().filter_map(|column| column.collation.as_ref()).collect();
    let missing_type = first_missing(
        client,
        "SELECT wanted.schema, wanted.name FROM unnest($1::text[], $2::text[]) AS wanted(schema, name)
         WHERE NOT EXISTS (SELECT FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
                           WHERE n.nspname = wanted.schema AND t.typname = wanted.name)",
        &types,
    )
    .await?;
    if let Some(name) = missing_type {
        return Err(missing("type", &name, &type_cure(&name)));
    }
    let missing_collation = first_missing(
        client,
        "SELECT wanted.schema, wanted.name FROM unnest($1::text[], $2::text[]) AS wanted(schema, name)
         WHERE NOT EXISTS (SELECT FROM pg_collation c JOIN pg_namespace n ON n.oid = c.collnamespace
                           WHERE n.nspname = wanted.schema AND c.collname = wanted.name
                             AND c.collencoding IN (-1, (SELECT encoding FROM pg_database WHERE datname = current_database())))",
        &collations,
    )
    .await?;
    if let Some(name) = missing_collation {
        let cure = format!("CREATE COLLATION {} (…), as on the source", qualified(&name));
        return Err(missing("collation", &name, &cure));
    }
    Ok(())
}

async fn first_missing(client: &Client, sql: &str, wanted: &BTreeSet<&QualifiedName>) -> Result<Option<QualifiedName>> {
    let (schemas, names): (Vec<&str>, Vec<&str>) = wanted.iter().map(|name| (name.schema.as_str(), name.name.as_str())).unzip();
    let rows = client.query(sql, &[&schemas, &names]).await.map_err(failed("look for types on the target"))?;
    Ok(rows.first().map(|row| QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1))))
}

fn type_cure(name: &QualifiedName) -> String {
    // An array's type is its element's name behind an underscore.
    let element = QualifiedName::new(&name.schema, name.name.trim_start_matches('_'));
    if name.schema == "pg_catalog" {
        return "the target's PostgreSQL is too old for it; upgrade the target or leave the column out".into();
    }
    match EXTENSIONS.iter().find(|(type_name, _)| *type_name == element.name) {
        Some((_, extension)) => format!("CREATE EXTENSION {} SCHEMA {}", quote_ident(extension), quote_ident(&name.schema)),
        None => format!("CREATE TYPE {} (or DOMAIN, or EXTENSION), as on the source", qualified(&element)),
    }
}

fn missing(what: &str, name: &QualifiedName, cure: &str) -> Error {
    Error::stop(reason::TYPE_MISSING, format!("the target has no {what} {name}: {cure}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_type_has_a_cure() {
        for (schema, name, cure) in [
            ("public", "_citext", r#"CREATE EXTENSION "citext" SCHEMA "public""#),
            ("app", "mood", r#"CREATE TYPE "app"."mood" (or DOMAIN, or EXTENSION), as on the source"#),
        ] {
            assert_eq!(type_cure(&QualifiedName::new(schema, name)), cure);
        }
    }
}
