//! Whether and how a relation is followed: pure.

use super::facts::{DeclaredIdentity, Leaf, Relation};
use crate::connectors::postgres::sql::{qualified, quote_ident};
use crate::engine::error::{Error, Result, reason};
use crate::engine::table::{Column, Identity, Lineage, MappedTable, QualifiedName, TableVersion};
use std::sync::Arc;

/// Schema of our own tables in a target; never mapped.
const OWN_SCHEMA: &str = "_sluice";

/// What the rules must know of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// `server_version_num`, for example 150019.
    pub version: i32,
    /// The role we are.
    pub role: String,
}

/// What the user wants of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Name in the target.
    pub target: QualifiedName,
    /// Columns that never leave the source.
    pub excluded: Vec<String>,
    /// Target columns may have narrower type modifiers.
    pub accept_narrower_types: bool,
}

/// The table as mapped, or why it can't be followed.
pub fn map(relation: &Relation, wish: &Wish, server: &Server) -> Result<MappedTable> {
    refuse_reserved(&relation.name)?;
    refuse_kind(relation)?;
    refuse_unknown_columns(relation, wish, server)?;
    let key = identity(relation)?;
    refuse_excluded_identity(relation, wish, &key)?;
    refuse_generated_identity(relation, &key)?;
    refuse_other_leaves(relation, &key)?;
    refuse_unreadable(relation, wish, server)?;
    refuse_generated_from_excluded(relation, wish)?;
    Ok(mapped(relation, wish, &key))
}

/// The first relation that is a partition of another one in the list, and that other one.
pub fn part_of_chosen(relations: &[Relation]) -> Option<(&QualifiedName, &QualifiedName)> {
    relations.iter().find_map(|part| {
        let root = relations.iter().find(|root| part.ancestors.contains(&root.id))?;
        Some((&part.name, &root.name))
    })
}

/// Refuses tables of the system and our own.
pub fn refuse_reserved(name: &QualifiedName) -> Result<()> {
    refuse_reserved_schema(&name.schema).map_err(|error| error.context(name))
}

/// Refuses schemas of the system and our own.
pub fn refuse_reserved_schema(schema: &str) -> Result<()> {
    // Names that begin with pg_ are the system's (manual: "CREATE SCHEMA"); those of temporary tables are among them.
    if schema.starts_with("pg_") || schema == "information_schema" || schema == OWN_SCHEMA {
        return Err(Error::stop(reason::TABLE_NOT_SUPPORTED, format!("schema {schema} is reserved and can't be mirrored")));
    }
    Ok(())
}

fn not_supported(name: &QualifiedName, what: &str) -> Error {
    Error::stop(reason::TABLE_NOT_SUPPORTED, format!("{name} is {what}: its changes are not in the log, leave it out"))
}

fn refuse_kind(relation: &Relation) -> Result<()> {
    refuse_storage(&relation.name, relation.kind, relation.persistence)
}

fn refuse_storage(name: &QualifiedName, kind: char, persistence: char) -> Result<()> {
    let what = match (kind, persistence) {
        ('r' | 'p', 'p') => return Ok(()),
        ('r' | 'p', 'u') => "an unlogged table",
        ('r' | 'p', _) => "a temporary table",
        ('v', _) => "a view",
        ('m', _) => "a materialized view",
        ('f', _) => "a foreign table",
        ('S', _) => "a sequence",
        _ => "no table",
    };
    Err(not_supported(name, what))
}

fn refuse_unknown_columns(relation: &Relation, wish: &Wish, server: &Server) -> Result<()> {
    let known = |name: &String| relation.columns.iter().any(|column| column.column.name == *name);
    if let Some(missing) = wish.excluded.iter().find(|name| !known(name)) {
        let message = format!("{} has no column {} to exclude", relation.name, quote_ident(missing));
        return Err(Error::stop(reason::COLUMN_MISSING, message));
    }
    if !wish.excluded.is_empty() && server.version < 150_000 {
        let message =
            format!("excluding columns of {} needs PostgreSQL 15 on the source, which is {}", relation.name, server.version / 10_000);
        return Err(Error::stop(reason::NEEDS_POSTGRESQL_15, message));
    }
    Ok(())
}

/// How rows are named.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Key {
    Columns(Vec<String>),
    Full,
}

fn identity(relation: &Relation) -> Result<Key> {
    match &relation.identity {
        DeclaredIdentity::Columns(columns) => Ok(Key::Columns(columns.clone())),
        DeclaredIdentity::Full if relation.columns.is_empty() => Err(without_identity(&relation.name, "it has no columns", "")),
        DeclaredIdentity::Full => Ok(Key::Full),
        DeclaredIdentity::Missing(why) => Err(without_identity(&relation.name, why, &identity_cure(relation))),
    }
}

fn without_identity(name: &QualifiedName, why: &str, cure: &str) -> Error {
    let message = format!("published, {name} would refuse its users' updates and deletes: {why}{cure}");
    Error::stop(reason::TABLE_WITHOUT_IDENTITY, message)
}

fn identity_cure(relation: &Relation) -> String {
    let table = qualified(&relation.name);
    let full = format!("ALTER TABLE {table} REPLICA IDENTITY FULL");
    match &relation.primary_key {
        Some(key) if !key.deferrable => format!("; cure: ALTER TABLE {table} REPLICA IDENTITY DEFAULT"),
        Some(_) => format!("; cure: make the key NOT DEFERRABLE, or {full}"),
        None => format!("; cure: ALTER TABLE {table} ADD PRIMARY KEY (…), or {full}"),
    }
}

fn refuse_excluded_identity(relation: &Relation, wish: &Wish, key: &Key) -> Result<()> {
    let refuse = |why: String| Err(Error::stop(reason::EXCLUDED_COLUMN_IN_IDENTITY, format!("{}: {why}", relation.name)));
    match key {
        Key::Full if !wish.excluded.is_empty() => refuse("no column can be excluded from a table with REPLICA IDENTITY FULL".into()),
        Key::Columns(columns) => match wish.excluded.iter().find(|name| columns.contains(name)) {
            Some(name) => refuse(format!("column {} belongs to the replica identity and can't be excluded", quote_ident(name))),
            None => Ok(()),
        },
        Key::Full => Ok(()),
    }
}

/// Before PostgreSQL 18 the server publishes no generated columns and does not refuse such a key either: its updates would not
/// say which row they mean.
fn refuse_generated_identity(relation: &Relation, key: &Key) -> Result<()> {
    let Key::Columns(columns) = key else { return Ok(()) };
    let generated = relation.columns.iter().find(|column| column.column.generated.is_some() && columns.contains(&column.column.name));
    match generated {
        Some(column) => {
            let why = format!("column {} of its replica identity is generated and not in the log", quote_ident(&column.column.name));
            let cure = format!("; cure: choose another index, or ALTER TABLE {} REPLICA IDENTITY FULL", qualified(&relation.name));
            Err(Error::stop(reason::TABLE_WITHOUT_IDENTITY, format!("{}: {why}{cure}", relation.name)))
        }
        None => Ok(()),
    }
}

/// Users write into partitions, and the server looks at the identity of the partition; what it logs is sent under the root's
/// name and must name rows by the root's identity.
fn refuse_other_leaves(relation: &Relation, key: &Key) -> Result<()> {
    relation.leaves.iter().try_for_each(|leaf| {
        refuse_storage(&leaf.name, leaf.kind, leaf.persistence)
            .map_err(|error| error.context(format!("partition of {}", relation.name)))?;
        refuse_other_identity(relation, leaf, key)
    })
}

fn refuse_other_identity(relation: &Relation, leaf: &Leaf, key: &Key) -> Result<()> {
    let sorted = |columns: &[String]| {
        let mut columns = columns.to_vec();
        columns.sort();
        columns
    };
    let same = match (key, &leaf.identity) {
        (Key::Columns(root), DeclaredIdentity::Columns(leaf)) => sorted(root) == sorted(leaf),
        (Key::Full, DeclaredIdentity::Full) => true,
        _ => false,
    };
    if same {
        return Ok(());
    }
    let declaration = match key {
        Key::Full => "REPLICA IDENTITY FULL",
        Key::Columns(_) => "REPLICA IDENTITY DEFAULT (or USING INDEX, as its root)",
    };
    let why = format!("its replica identity is not that of its root {}", relation.name);
    Err(without_identity(&leaf.name, &why, &format!("; cure: ALTER TABLE {} {declaration}", qualified(&leaf.name))))
}

fn refuse_unreadable(relation: &Relation, wish: &Wish, server: &Server) -> Result<()> {
    let role = quote_ident(&server.role);
    let refuse = |what: String, cure: String| Err(Error::stop(reason::PRIVILEGE_MISSING, format!("role {role} {what}; cure: {cure}")));
    if !relation.may_use_schema {
        let schema = quote_ident(&relation.name.schema);
        return refuse(format!("may not use schema {schema}"), format!("GRANT USAGE ON SCHEMA {schema} TO {role}"));
    }
    let copied = |name: &String| !wish.excluded.contains(name);
    let unreadable = relation.columns.iter().find(|column| is_copied(&column.column) && copied(&column.column.name) && !column.may_select);
    if let Some(column) = unreadable {
        let table = qualified(&relation.name);
        return refuse(
            format!("may not read column {} of {}", quote_ident(&column.column.name), relation.name),
            format!("GRANT SELECT ON {table} TO {role}"),
        );
    }
    if relation.row_security {
        let what = format!("would not see all rows of {}, which has row security policies", relation.name);
        return refuse(what, format!("ALTER ROLE {role} BYPASSRLS"));
    }
    Ok(())
}

/// The target could not compute it.
fn refuse_generated_from_excluded(relation: &Relation, wish: &Wish) -> Result<()> {
    let kept = relation.columns.iter().filter(|column| !wish.excluded.contains(&column.column.name));
    for column in kept {
        if let Some(used) = column.uses.iter().find(|used| wish.excluded.contains(used)) {
            let (generated, used) = (quote_ident(&column.column.name), quote_ident(used));
            let message =
                format!("{}: generated column {generated} uses the excluded column {used}; exclude {generated} too", relation.name);
            return Err(Error::stop(reason::INVALID_SPEC, message));
        }
    }
    Ok(())
}

fn is_copied(column: &Column) -> bool {
    column.generated.is_none()
}

fn mapped(relation: &Relation, wish: &Wish, key: &Key) -> MappedTable {
    let is_key = |name: &String| matches!(key, Key::Columns(columns) if columns.contains(name));
    let kept = relation.columns.iter().map(|column| &column.column).filter(|column| !wish.excluded.contains(&column.name));
    let (copied, generated): (Vec<Column>, Vec<Column>) =
        kept.map(|column| Column { key: is_key(&column.name), ..column.clone() }).partition(is_copied);
    let primary_key = relation.primary_key.as_ref();
    // A key that holds a column which does not go along can't be made on the target.
    let primary_key = primary_key.filter(|key| !key.columns.iter().any(|name| wish.excluded.contains(name)));
    // Rows may share a deferrable key until the end of a statement or transaction: it names none of them.
    let primary_key = primary_key.filter(|key| !key.deferrable);
    MappedTable {
        version: Arc::new(TableVersion {
            id: relation.id,
            name: relation.name.clone(),
            columns: copied,
            identity: if *key == Key::Full { Identity::Full } else { Identity::Key },
            differs: None,
        }),
        target: wish.target.clone(),
        generated,
        excluded: wish.excluded.clone(),
        accept_narrower_types: wish.accept_narrower_types,
        primary_key: primary_key.map(|key| key.columns.clone()).unwrap_or_default(),
        primary_key_name: primary_key.and_then(|key| key.name.clone()),
        estimated_rows: relation.estimated_rows,
        blocks: relation.blocks,
        structure: Arc::default(),
        lineage: Lineage { key: primary_key.and_then(|key| key.id), storage: relation.storage.clone(), behind: false },
    }
}

#[cfg(test)]
mod tests;
