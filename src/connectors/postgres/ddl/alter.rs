//! Alters a target table as the source's was altered.
//!
//! Each step looks at what is there: what somebody has done by hand is not done again.

use super::super::connect::Session;
use super::super::sql::{qualified, quote_ident, quote_literal};
use super::super::statements::key_names;
use super::super::target::failed;
use super::compatible::check_compatible;
use super::describe::{TargetTable, describe};
use super::{define_column, missing_key};
use crate::engine::error::{Class, Error, Result, reason};
use crate::engine::table::{Altered, Column, MappedTable};

/// Makes the target of a table what the altered one takes, in the caller's transaction; returns what it is then. Without `follow`
/// nothing is altered, and what would have to be is an error.
///
/// # Errors
/// [`reason::SCHEMA_CHANGED`], class `Stop`, with the statement that is needed.
pub(in super::super) async fn alter(client: &Session, known: &MappedTable, altered: &Altered, follow: bool) -> Result<TargetTable> {
    let table = &altered.table;
    let columns = columns(known, altered, &present(client, table).await?);
    run(client, table, &columns, follow).await?;
    let altered_columns = present(client, table).await?;
    let keys = keys(known, altered, &altered_columns);
    run(client, table, &keys, follow).await?;
    let altered_table = if keys.is_empty() { altered_columns } else { present(client, table).await? };
    check_compatible(table, &altered_table)?;
    Ok(altered_table)
}

async fn present(client: &Session, table: &MappedTable) -> Result<TargetTable> {
    let gone = || Error::stop(reason::TARGET_TABLE_INCOMPATIBLE, format!("target table {} is gone", table.target));
    describe(client, &table.target).await?.ok_or_else(gone)
}

async fn run(client: &Session, table: &MappedTable, statements: &[String], follow: bool) -> Result<()> {
    let source = table.source();
    if !follow && !statements.is_empty() {
        let message = format!("{source} was altered on the source; the target needs: {}", statements.join("; "));
        return Err(Error::stop(reason::SCHEMA_CHANGED, message));
    }
    for (number, statement) in statements.iter().enumerate() {
        tracing::info!(table = %source, statement, "the target is altered as the source was");
        let altered = client.batch_execute(statement).await.map_err(failed(format!("{source} was altered on the source")));
        altered.map_err(|error| match error.class {
            Class::Retry => error,
            _ => Error::stop(
                reason::SCHEMA_CHANGED,
                format!("{}; do by hand on the target what has the effect of: {}", error.message, statements[number..].join("; ")),
            ),
        })?;
    }
    Ok(())
}

/// What the columns need, in order: what goes, names, what changes, what comes.
fn columns(known: &MappedTable, altered: &Altered, present: &TargetTable) -> Vec<String> {
    let table = &altered.table;
    let name = qualified(&table.target);
    let alter = |action: String| format!("ALTER TABLE {name} {action}");
    let all = |table: &MappedTable| table.version.columns.iter().chain(&table.generated).cloned().collect::<Vec<Column>>();
    let (before, after) = (all(known), all(table));
    let find = |columns: &[Column], number: i32| columns.iter().find(|column| column.number == number).cloned();
    let is_there = |name: &str| present.column(name).is_some();
    let mut statements = Vec::new();
    // A generated column first: it may hang on another.
    let stays =
        |column: &Column| find(&after, column.number).is_some_and(|now| now.generated.is_none() || now.generated == column.generated);
    for column in before.iter().rev().filter(|column| !stays(column) && is_there(&column.name)) {
        statements.push(alter(format!("DROP COLUMN {}", quote_ident(&column.name))));
    }
    let kept: Vec<(&Column, Column)> =
        before.iter().filter(|column| stays(column)).filter_map(|column| Some((column, find(&after, column.number)?))).collect();
    statements.extend(renames(&kept, &is_there).into_iter().map(&alter));
    for (column, now) in &kept {
        // Under the old name, or under the new one if somebody has been here.
        let Some(target) = present.column(&column.name).or_else(|| present.column(&now.name)) else { continue };
        let ident = quote_ident(&now.name);
        if column.generated.is_some() && now.generated.is_none() && target.generated {
            statements.push(alter(format!("ALTER COLUMN {ident} DROP EXPRESSION")));
        }
        let changed = (column.type_id, &column.declared) != (now.type_id, &now.declared);
        let is_ours = target.declared == column.declared && target.type_name == column.type_name;
        if changed && is_ours {
            statements.push(alter(format!("ALTER COLUMN {ident} TYPE {}", typed(now))));
        }
        if target.not_null && !now.not_null && !now.key {
            statements.push(alter(format!("ALTER COLUMN {ident} DROP NOT NULL")));
        }
    }
    let comes = |column: &&Column| !kept.iter().any(|(_, now)| now.number == column.number);
    for column in after.iter().filter(comes) {
        let replaced = before.iter().any(|old| old.name == column.name && !stays(old));
        if is_there(&column.name) && !replaced && !kept.iter().any(|(old, now)| old.name == column.name && now.name != column.name) {
            continue;
        }
        // What takes no NULL now may have taken one where the log is.
        let define = define_column(&Column { not_null: false, ..column.clone() });
        match altered.initial.get(&column.number) {
            Some(value) => {
                statements.push(alter(format!("ADD COLUMN {define} DEFAULT {}::{}", quote_literal(value), column.declared)));
                statements.push(alter(format!("ALTER COLUMN {} DROP DEFAULT", quote_ident(&column.name))));
            }
            None => statements.push(alter(format!("ADD COLUMN {define}"))),
        }
    }
    statements
}

fn typed(column: &Column) -> String {
    let collation = column.collation.as_ref().map(|collation| format!(" COLLATE {}", qualified(collation)));
    format!("{}{}", column.declared, collation.unwrap_or_default())
}

/// Names may be swapped: then they go by way of others.
fn renames(kept: &[(&Column, Column)], is_there: &dyn Fn(&str) -> bool) -> Vec<String> {
    let renamed: Vec<(&str, &str)> = kept
        .iter()
        .map(|(column, now)| (column.name.as_str(), now.name.as_str()))
        .filter(|(old, new)| old != new && is_there(old))
        .collect();
    let rename = |old: &str, new: &str| format!("RENAME COLUMN {} TO {}", quote_ident(old), quote_ident(new));
    let takes_name_of_another = renamed.iter().any(|(_, new)| renamed.iter().any(|(old, _)| old == new));
    if !takes_name_of_another {
        // One that has the new name already was renamed by hand.
        return renamed.iter().filter(|(_, new)| !is_there(new)).map(|(old, new)| rename(old, new)).collect();
    }
    let between: Vec<String> = (0..renamed.len()).map(|number| format!("_sluice_{number}")).collect();
    let away = renamed.iter().zip(&between).map(|((old, _), between)| rename(old, between));
    let back = renamed.iter().zip(&between).map(|((_, new), between)| rename(between, new));
    away.chain(back).collect()
}

/// What the key needs: rows are found by it.
fn keys(known: &MappedTable, altered: &Altered, present: &TargetTable) -> Vec<String> {
    let table = &altered.table;
    let mut statements = Vec::new();
    // Rows may share a key that is gone on the source.
    let numbers = |table: &MappedTable| -> Vec<i32> {
        let number = |name: &String| table.version.columns.iter().find(|column| column.name == *name).map(|column| column.number);
        table.primary_key.iter().filter_map(number).collect()
    };
    let (old, new) = (numbers(known), numbers(table));
    let old_names: Vec<&str> = old
        .iter()
        .filter_map(|number| table.version.columns.iter().find(|column| column.number == *number))
        .map(|column| column.name.as_str())
        .collect();
    let mut present = present.clone();
    if !altered.key_in_doubt && !old.is_empty() && old != new && old_names.len() == old.len() {
        let is_old = |columns: &[String]| {
            columns.len() == old_names.len() && old_names.iter().all(|name| columns.iter().any(|column| column == name))
        };
        if let Some(place) = present.unique.iter().position(|index| index.primary && is_old(&index.columns)) {
            let index = present.unique.remove(place);
            statements.push(format!("ALTER TABLE {} DROP CONSTRAINT {}", qualified(&table.target), quote_ident(&index.name)));
        }
    }
    // In doubt rows are named by all of their columns.
    if !key_names(table).is_empty() {
        statements.extend(missing_key(table, &present, None));
    }
    statements
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(number: i32, name: &str, declared: &str) -> Column {
        Column {
            name: name.into(),
            number,
            type_id: declared.len() as u32,
            modifier: -1,
            type_name: crate::engine::table::QualifiedName::new("pg_catalog", declared),
            declared: declared.into(),
            key: false,
            not_null: false,
            generated: None,
            collation: None,
        }
    }

    fn names(kept: &[(&Column, Column)], there: &[&str]) -> Vec<String> {
        renames(kept, &|name| there.contains(&name))
    }

    #[test]
    fn names_that_are_swapped_go_by_way_of_others() {
        let (a, b) = (column(1, "a", "int"), column(2, "b", "int"));
        let to = |column: &Column, name: &str| Column { name: name.into(), ..column.clone() };
        assert_eq!(names(&[(&a, to(&a, "c")), (&b, to(&b, "b"))], &["a", "b"]), [r#"RENAME COLUMN "a" TO "c""#]);
        assert_eq!(
            names(&[(&a, to(&a, "b")), (&b, to(&b, "a"))], &["a", "b"]),
            [
                r#"RENAME COLUMN "a" TO "_sluice_0""#,
                r#"RENAME COLUMN "b" TO "_sluice_1""#,
                r#"RENAME COLUMN "_sluice_0" TO "b""#,
                r#"RENAME COLUMN "_sluice_1" TO "a""#
            ]
        );
        assert!(names(&[(&a, to(&a, "c"))], &["c"]).is_empty(), "done by hand");
    }
}
