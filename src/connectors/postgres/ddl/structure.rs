//! Gives a target table that Sluice has made what the source's has besides columns and rows. Every step looks at what is
//! there first, so that it can be done again after a crash.

use super::super::connect::Session;
use super::super::sql::{qualified, quote_ident};
use super::super::target::failed;
use super::build;
use crate::engine::error::{Error, Result, reason};
use crate::engine::structure::{Index, IndexRole, Sequence, SequenceRole, SequenceValue};
use crate::engine::table::{MappedTable, QualifiedName};
use std::collections::HashMap;
use tokio_postgres::Client;
use tokio_postgres::error::{DbError, SqlState};

/// What is there of a table's indexes and constraints.
pub(in super::super) struct Present {
    /// Indexes of the table: name and whether it is valid.
    indexes: HashMap<String, bool>,
    constraints: Vec<String>,
    has_primary_key: bool,
    /// Names of other relations in the target schema, as far as they matter.
    taken: Vec<String>,
}

/// An index that is to be built.
pub(in super::super) struct Build<'a> {
    pub index: &'a Index,
    pub name: String,
    /// An interrupted build has left an index that is of no use.
    pub leftover: bool,
}

impl Present {
    /// Looks.
    pub async fn read(client: &Client, table: &MappedTable) -> Result<Self> {
        let name = qualified(&table.target);
        let indexes = client
            .query(
                "SELECT c.relname::text, i.indisvalid, i.indisprimary FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
                 WHERE i.indrelid = to_regclass($1)",
                &[&name],
            )
            .await
            .map_err(failed("read indexes of the target table"))?;
        let constraints = client
            .query("SELECT conname::text FROM pg_constraint WHERE conrelid = to_regclass($1)", &[&name])
            .await
            .map_err(failed("read constraints of the target table"))?;
        let wanted: Vec<&str> = table.structure.indexes.iter().map(|index| index.name.as_str()).collect();
        let taken = client
            .query(
                "SELECT c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                 WHERE n.nspname = $2 AND c.relname = ANY($3)
                   AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indexrelid = c.oid AND i.indrelid = to_regclass($1))",
                &[&name, &table.target.schema, &wanted],
            )
            .await
            .map_err(failed("look for names on the target"))?;
        Ok(Self {
            has_primary_key: indexes.iter().any(|row| row.get(2)),
            indexes: indexes.iter().map(|row| (row.get(0), row.get(1))).collect(),
            constraints: constraints.iter().map(|row| row.get(0)).collect(),
            taken: taken.iter().map(|row| row.get(0)).collect(),
        })
    }

    /// The name of an index on the target.
    fn name(&self, table: &MappedTable, index: &Index) -> String {
        if self.taken.contains(&index.name) { build::derived_name(&index.name, &table.target) } else { index.name.clone() }
    }

    /// Indexes that are missing and can be built by themselves.
    pub fn missing<'a>(&self, table: &'a MappedTable) -> Vec<Build<'a>> {
        let by_itself = |index: &&Index| match index.role {
            IndexRole::Plain => true,
            IndexRole::Key { primary, .. } => !primary || !self.has_primary_key,
            IndexRole::Constraint(_) => false,
        };
        let builds = table.structure.indexes.iter().filter(by_itself).map(|index| {
            let name = self.name(table, index);
            let valid = self.indexes.get(&name).copied();
            (valid != Some(true)).then_some(Build { index, name, leftover: valid == Some(false) })
        });
        builds.flatten().collect()
    }
}

/// Builds one index in the caller's transaction.
pub(in super::super) async fn build_index(client: &Client, table: &MappedTable, wanted: &Build<'_>) -> Result<()> {
    if wanted.leftover {
        let name = QualifiedName::new(&table.target.schema, &wanted.name);
        run(client, &format!("DROP INDEX {}", qualified(&name))).await?;
    }
    run(client, &build::create_index(table, wanted.index, &wanted.name)).await
}

/// All but indexes and foreign keys, in the caller's transaction: constraints, sequences with their values, defaults and
/// comments. The indexes are there.
pub(in super::super) async fn settle(client: &Client, table: &MappedTable, values: &[SequenceValue]) -> Result<()> {
    let present = Present::read(client, table).await?;
    for index in &table.structure.indexes {
        constrain(client, table, index, &present).await?;
    }
    for check in &table.structure.checks {
        if !present.constraints.contains(&check.name) {
            run(client, &build::add_check(table, check)).await?;
        }
        if let Some(text) = &check.comment {
            run(client, &build::comment_constraint(table, &check.name, text)).await?;
        }
    }
    let mut sequences = Vec::new();
    for sequence in &table.structure.sequences {
        sequences.push((sequence, settle_sequence(client, table, sequence, values).await?));
    }
    if let Some(sql) = build::set_defaults(table, &sequences) {
        run(client, &sql).await?;
    }
    for sql in build::comments(table) {
        run(client, &sql).await?;
    }
    Ok(())
}

async fn constrain(client: &Client, table: &MappedTable, index: &Index, present: &Present) -> Result<()> {
    let name = present.name(table, index);
    let is_second_key = matches!(index.role, IndexRole::Key { primary: true, .. }) && present.has_primary_key;
    if !present.constraints.contains(&name)
        && !is_second_key
        && let Some(sql) = build::add_constraint(table, index, &name)
    {
        run(client, &sql).await?;
    }
    if is_second_key {
        return Ok(());
    }
    if let Some(text) = &index.comment {
        let name = QualifiedName::new(&table.target.schema, &name);
        run(client, &build::comment(&format!("INDEX {}", qualified(&name)), text)).await?;
    }
    if let Some(text) = &index.constraint_comment {
        run(client, &build::comment_constraint(table, &name, text)).await?;
    }
    Ok(())
}

/// Makes a sequence when it is missing and sets its value. Returns its quoted name on the target.
async fn settle_sequence(client: &Client, table: &MappedTable, sequence: &Sequence, values: &[SequenceValue]) -> Result<String> {
    let own = client
        .query_one("SELECT pg_get_serial_sequence($1, $2)", &[&qualified(&table.target), &sequence.column])
        .await
        .map_err(failed("look for a sequence"))?;
    let wanted = build::sequence_target(table, sequence);
    let there = match (sequence.role, own.get::<_, Option<String>>(0)) {
        (SequenceRole::Free, _) => relation_kind(client, &wanted).await?.filter(|kind| *kind == "S").map(|_| qualified(&wanted)),
        (_, own) => own,
    };
    let is_new = there.is_none();
    let name = match there {
        Some(name) => name,
        None => {
            let name = match relation_kind(client, &wanted).await? {
                None => wanted,
                Some(_) => QualifiedName::new(&wanted.schema, build::derived_name(&wanted.name, &table.target)),
            };
            create_schema(client, &name.schema).await?;
            run(client, &build::create_sequence(table, sequence, &name)).await?;
            qualified(&name)
        }
    };
    if let Some(text) = &sequence.comment {
        run(client, &build::comment(&format!("SEQUENCE {name}"), text)).await?;
    }
    set_value(client, table, sequence, values, &name, is_new).await?;
    Ok(name)
}

/// A new sequence gets the source's value; one that is there never goes back, since others may use it. Where the source's
/// can't be read, what the column holds is the value.
async fn set_value(
    client: &Client,
    table: &MappedTable,
    sequence: &Sequence,
    values: &[SequenceValue],
    name: &str,
    is_new: bool,
) -> Result<()> {
    let known = values.iter().find(|value| value.id == sequence.id);
    let last = match known.and_then(|known| known.last) {
        Some(last) => Some(last),
        None => furthest(client, table, sequence).await?.map(|value| (value, true)),
    };
    let Some((value, called)) = last else { return Ok(()) };
    let further = if sequence.ascending { ">" } else { "<" };
    let sql = format!(
        "SELECT setval($1::text::regclass, $2, $3) FROM {name}
         WHERE $4 OR $2 {further} last_value OR ($2 = last_value AND $3 AND NOT is_called)"
    );
    client.query_opt(&sql, &[&name, &value, &called, &is_new]).await.map_err(failed(format!("set sequence {name}")))?;
    Ok(())
}

/// The last value that a column of whole numbers holds.
async fn furthest(client: &Client, table: &MappedTable, sequence: &Sequence) -> Result<Option<i64>> {
    let column = table.version.columns.iter().find(|column| column.name == sequence.column);
    if !column.is_some_and(|column| matches!(column.type_name.name.as_str(), "int2" | "int4" | "int8")) {
        return Ok(None);
    }
    let end = if sequence.ascending { "max" } else { "min" };
    let sql = format!("SELECT {end}({})::int8 FROM {}", quote_ident(&sequence.column), qualified(&table.target));
    Ok(client.query_one(&sql, &[]).await.map_err(failed(format!("look for the last value of {}", sequence.column)))?.get(0))
}

async fn relation_kind(client: &Client, name: &QualifiedName) -> Result<Option<String>> {
    let row = client
        .query_opt(
            "SELECT c.relkind::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2",
            &[&name.schema, &name.name],
        )
        .await
        .map_err(failed("look for a name on the target"))?;
    Ok(row.map(|row| row.get(0)))
}

/// Makes a schema when it is missing. `IF NOT EXISTS` alone would ask for the right to create schemas even where it is there.
pub(super) async fn create_schema(client: &Client, schema: &str) -> Result<()> {
    let there = client
        .query_one("SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)", &[&schema])
        .await
        .map_err(failed("look for the target schema"))?;
    if there.get(0) {
        return Ok(());
    }
    run(client, &format!("CREATE SCHEMA IF NOT EXISTS {}", quote_ident(schema))).await
}

/// Makes a table with everything but foreign keys and takes it back: what the target can't take is found while there is
/// nothing to lose.
pub(in super::super) async fn rehearse(session: &Session, table: &MappedTable) -> Result<()> {
    run(session, &format!("BEGIN ISOLATION LEVEL READ COMMITTED; {}", super::LOCK_TIMEOUT)).await?;
    let made = async {
        super::create_missing(session, table).await?;
        for wanted in Present::read(session, table).await?.missing(table) {
            build_index(session, table, &wanted).await?;
        }
        settle(session, table, &[]).await
    };
    let made = made.await;
    run(session, "ROLLBACK").await?;
    made.map_err(|error| error.context(format!("the target can't make table {} as the source has it", table.target)))
}

/// A name that another table's index or sequence has got at this very moment is taken when it is tried again.
async fn run(client: &Client, sql: &str) -> Result<()> {
    client.batch_execute(sql).await.map_err(|error| {
        let unique = error.as_db_error().and_then(DbError::constraint) == Some("pg_class_relname_nsp_index");
        match error.code() == Some(&SqlState::DUPLICATE_TABLE) || unique {
            true => Error::retry(reason::WRITE_REFUSED, failed(sql)(error).message),
            false => failed(sql)(error),
        }
    })
}
