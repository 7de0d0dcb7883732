//! What can't work is refused before anything is written.

use super::super::checkpoint::{duplicate_target, schema};
use super::super::connect::Session;
use super::super::endpoint::Endpoint;
use super::super::sql::{qualified, quote_ident};
use super::super::{ddl, load};
use super::failed;
use crate::engine::error::{Error, Result, reason};
use crate::engine::roles::{ApplyMode, Fed, Owner, SourceIdentity};
use crate::engine::table::{MappedTable, QualifiedName};
use futures::future::{join, join_all, join3};
use std::collections::{BTreeSet, HashMap};

/// What is mapped, from where.
pub(super) struct Mapping<'a> {
    pub source: &'a SourceIdentity,
    pub tables: &'a [MappedTable],
    pub fed: &'a [Fed],
}

/// What has passed.
pub(super) struct Checked<'a> {
    /// Tables that are to be made.
    pub missing: Vec<&'a MappedTable>,
    /// What people should know.
    pub notes: Vec<String>,
}

/// Tables that a note names.
const NAMED_TABLES: usize = 5;

/// All checks, in an order in which the first failure is the most telling. What they rest on is read together.
pub(super) async fn check<'a>(
    session: &Session,
    endpoint: &Endpoint,
    owner: &Owner,
    mapping: &Mapping<'a>,
    mode: ApplyMode,
    triggers_accepted: bool,
) -> Result<Checked<'a>> {
    let &Mapping { source, tables, fed } = mapping;
    let (identity, has_schema, looks) = join3(identity(session), schema::is_there(session), look_at_all(session, endpoint, tables)).await;
    let (system_identifier, database) = identity?;
    let same_database = system_identifier == source.system_identifier && database == source.database;
    check_mapping(tables, same_database)?;
    let local = fed.iter().filter(|fed| fed.system_identifier == system_identifier && fed.database == database);
    check_no_circle(tables, local)?;
    if has_schema? {
        check_written_by_others(session, owner, tables).await?;
    }
    let (mut missing, mut fires) = (Vec::new(), Vec::new());
    for (table, looked) in tables.iter().zip(looks) {
        match looked? {
            None => missing.push(table),
            Some((present, privileges)) => {
                // One that is behind may have been altered by hand to what its next rows take.
                ddl::check_compatible(table, &present).or_else(|error| if table.lineage.behind { Ok(()) } else { Err(error) })?;
                fires.extend(ddl::check_fires(table, &present, mode, triggers_accepted, &endpoint.username)?);
                privileges?;
            }
        }
    }
    check_may_create(session, &missing, endpoint).await?;
    ddl::check_needs(session, &missing).await?;
    Ok(Checked { missing, notes: note_fires(&fires).into_iter().collect() })
}

/// What was accepted, in one sentence.
fn note_fires(fires: &[String]) -> Option<String> {
    let (first, more) = fires.split_at(fires.len().min(NAMED_TABLES));
    let more = if more.is_empty() { String::new() } else { format!("; and of {} more tables", more.len()) };
    (!first.is_empty())
        .then(|| format!("triggers or foreign key actions of target tables fire on mirrored changes ({}{more})", first.join("; ")))
}

/// What a target table is, if it is there, and whether it may be written.
type Look = Option<(ddl::TargetTable, Result<()>)>;

async fn look_at_all(session: &Session, endpoint: &Endpoint, tables: &[MappedTable]) -> Vec<Result<Look>> {
    let mut looks = Vec::with_capacity(tables.len());
    for some in tables.chunks(ddl::LOOKS) {
        looks.extend(join_all(some.iter().map(|table| look(session, endpoint, table))).await);
    }
    looks
}

async fn look(session: &Session, endpoint: &Endpoint, table: &MappedTable) -> Result<Look> {
    let privileges = check_privileges(session, &table.target, &endpoint.username);
    let (present, privileges) = join(ddl::describe(session, &table.target), privileges).await;
    Ok(present?.map(|present| (present, privileges)))
}

/// System identifier and database of the target.
async fn identity(session: &Session) -> Result<(String, String)> {
    let row = session
        .query_one("SELECT system_identifier::text, current_database()::text FROM pg_control_system()", &[])
        .await
        .map_err(failed("read the target's identity"))?;
    Ok((row.get(0), row.get(1)))
}

fn check_mapping(tables: &[MappedTable], same_database: bool) -> Result<()> {
    let mut sources: HashMap<&QualifiedName, &QualifiedName> = HashMap::new();
    for table in tables {
        if same_database && *table.source() == table.target {
            return Err(Error::stop(
                reason::SAME_TABLE,
                format!("{} is source and target at once: map it to another name, schema or database", table.target),
            ));
        }
        if table.target.schema == "_sluice" {
            return Err(Error::stop(
                reason::INVALID_SPEC,
                format!("schema _sluice holds checkpoints: map {} to another schema", table.source()),
            ));
        }
        if let Some(other) = sources.insert(&table.target, table.source()) {
            return Err(Error::stop(reason::DUPLICATE_TARGET, format!("{other} and {} both go to {}", table.source(), table.target)));
        }
    }
    Ok(())
}

/// Refuses target tables that another Mirror writes.
async fn check_written_by_others(session: &Session, owner: &Owner, tables: &[MappedTable]) -> Result<()> {
    let (schemas, names) = names(tables.iter().map(|table| &table.target));
    let row = session
        .query_opt(
            "SELECT target_schema, target_table, mirror_namespace, mirror_name, slot
             FROM _sluice.tables JOIN _sluice.streams USING (system_identifier, database, slot)
             JOIN unnest($3::text[], $4::text[]) AS ours(schema, name) ON (target_schema, target_table) = (ours.schema, ours.name)
             WHERE (mirror_namespace, mirror_name) <> ($1, $2) ORDER BY 1, 2 LIMIT 1",
            &[&owner.namespace, &owner.name, &schemas, &names],
        )
        .await
        .map_err(failed("look who writes the target tables"))?;
    match row {
        None => Ok(()),
        Some(row) => {
            let target = QualifiedName::new(row.get::<_, String>(0), row.get::<_, String>(1));
            Err(duplicate_target(&target, row.get(2), row.get(3), row.get(4)))
        }
    }
}

/// Refuses a table whose rows come from the very table that it would be written to: each change would come round again.
fn check_no_circle<'a>(tables: &[MappedTable], mut fed: impl Iterator<Item = &'a Fed>) -> Result<()> {
    let circle = fed.find(|fed| tables.iter().any(|table| *table.source() == fed.table && table.target == fed.origin));
    circle.map_or(Ok(()), |fed| {
        Err(Error::stop(
            reason::TARGET_IS_MIRRORED,
            format!(
                "{} is written by Mirror {} from {}, to which this Mirror would write it back: each change would come round again",
                fed.table, fed.owner, fed.origin
            ),
        ))
    })
}

async fn check_privileges(session: &Session, table: &QualifiedName, role: &str) -> Result<()> {
    let rows = session
        .query(
            "SELECT wanted FROM unnest($2::text[]) AS wanted WHERE NOT has_table_privilege(to_regclass($1), wanted)",
            &[&qualified(table), &load::PRIVILEGES.as_slice()],
        )
        .await
        .map_err(failed("read privileges on the target table"))?;
    if rows.is_empty() {
        return Ok(());
    }
    let wanted: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
    Err(Error::stop(
        reason::PRIVILEGE_MISSING,
        format!(
            "role {role} may not write target table {table}: GRANT {} ON {} TO {}",
            wanted.join(", "),
            qualified(table),
            quote_ident(role)
        ),
    ))
}

async fn check_may_create(session: &Session, missing: &[&MappedTable], endpoint: &Endpoint) -> Result<()> {
    let schemas: BTreeSet<&str> = missing.iter().map(|table| table.target.schema.as_str()).collect();
    let role = quote_ident(&endpoint.username);
    for schema in schemas {
        let row = session
            .query_one(
                "SELECT to_regnamespace($1) IS NOT NULL, has_schema_privilege(to_regnamespace($1), 'CREATE'), has_database_privilege(current_database(), 'CREATE')",
                &[&quote_ident(schema)],
            )
            .await
            .map_err(failed("read privileges on the target schema"))?;
        let (there, in_schema, in_database): (bool, Option<bool>, bool) = (row.get(0), row.get(1), row.get(2));
        let cure = match (there, in_schema.unwrap_or(false), in_database) {
            (true, false, _) => format!("GRANT CREATE, USAGE ON SCHEMA {} TO {role}", quote_ident(schema)),
            (false, _, false) => format!("GRANT CREATE ON DATABASE {} TO {role}", quote_ident(&endpoint.database)),
            _ => continue,
        };
        return Err(Error::stop(
            reason::PRIVILEGE_MISSING,
            format!("role {} may not make tables in target schema {schema}: {cure}", endpoint.username),
        ));
    }
    Ok(())
}

fn names<'a>(tables: impl Iterator<Item = &'a QualifiedName>) -> (Vec<&'a str>, Vec<&'a str>) {
    tables.map(|table| (table.schema.as_str(), table.name.as_str())).unzip()
}
