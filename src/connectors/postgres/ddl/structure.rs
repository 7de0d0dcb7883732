//! Gives a target table that Sluice has made what the source's has besides columns and rows. Every step looks at what is
//! there first, so that it can be done again after a crash.

use super::super::connect::{Parameter, Session, in_order};
use super::super::sql::{qualified, quote_ident};
use super::super::target::failed;
use super::build;
use crate::engine::error::{Error, Result, reason};
use crate::engine::structure::{Index, IndexRole, Sequence, SequenceRole, SequenceValue};
use crate::engine::table::{MappedTable, QualifiedName};
use std::collections::HashMap;
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
    pub async fn read(client: &Session, table: &MappedTable) -> Result<Self> {
        let name = qualified(&table.target);
        let wanted: Vec<&str> = table.structure.indexes.iter().map(|index| index.name.as_str()).collect();
        let parameters: [&(dyn Parameter + Sync); 3] = [&name, &table.target.schema, &wanted];
        // Polled together: one round trip for all.
        let (indexes, constraints, taken) = futures::future::join3(
            client.query(
                "SELECT c.relname::text, i.indisvalid, i.indisprimary FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
                 WHERE i.indrelid = to_regclass($1)",
                &parameters[..1],
            ),
            client.query("SELECT conname::text FROM pg_constraint WHERE conrelid = to_regclass($1)", &parameters[..1]),
            client.query(
                "SELECT c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                 WHERE n.nspname = $2 AND c.relname = ANY($3)
                   AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indexrelid = c.oid AND i.indrelid = to_regclass($1))",
                &parameters,
            ),
        )
        .await;
        let indexes = indexes.map_err(failed("read indexes of the target table"))?;
        let constraints = constraints.map_err(failed("read constraints of the target table"))?;
        let taken = taken.map_err(failed("look for names on the target"))?;
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

/// Builds indexes in the caller's transaction, one after the other.
pub(in super::super) async fn build_indexes(client: &Session, table: &MappedTable, wanted: &[Build<'_>]) -> Result<()> {
    let statements = wanted.iter().flat_map(|wanted| {
        let name = QualifiedName::new(&table.target.schema, &wanted.name);
        let drop = wanted.leftover.then(|| format!("DROP INDEX {}", qualified(&name)));
        drop.into_iter().chain([build::create_index(table, wanted.index, &wanted.name)])
    });
    run_all(client, statements.collect()).await
}

/// All but indexes and foreign keys, in the caller's transaction: constraints, sequences with their values, defaults and
/// comments. The indexes are there.
pub(in super::super) async fn settle(client: &Session, table: &MappedTable, values: &[SequenceValue]) -> Result<()> {
    let present = Present::read(client, table).await?;
    settle_beside(client, table, values, &present).await
}

async fn settle_beside(client: &Session, table: &MappedTable, values: &[SequenceValue], present: &Present) -> Result<()> {
    let mut statements: Vec<String> = table.structure.indexes.iter().flat_map(|index| constrain(table, index, present)).collect();
    for check in &table.structure.checks {
        if !present.constraints.contains(&check.name) {
            statements.push(build::add_check(table, check));
        }
        if let Some(text) = &check.comment {
            statements.push(build::comment_constraint(table, &check.name, text));
        }
    }
    run_all(client, statements).await?;
    let mut sequences = Vec::new();
    for sequence in &table.structure.sequences {
        sequences.push((sequence, settle_sequence(client, table, sequence, values).await?));
    }
    run_all(client, build::set_defaults(table, &sequences).into_iter().chain(build::comments(table)).collect()).await
}

/// The statements that make the constraint of an index, with its comments.
fn constrain(table: &MappedTable, index: &Index, present: &Present) -> Vec<String> {
    let name = present.name(table, index);
    let is_second_key = matches!(index.role, IndexRole::Key { primary: true, .. }) && present.has_primary_key;
    if is_second_key {
        return Vec::new();
    }
    let missing = !present.constraints.contains(&name);
    let constraint = missing.then(|| build::add_constraint(table, index, &name)).flatten();
    let qualified_name = QualifiedName::new(&table.target.schema, &name);
    let comment = index.comment.as_ref().map(|text| build::comment(&format!("INDEX {}", qualified(&qualified_name)), text));
    let constraint_comment = index.constraint_comment.as_ref().map(|text| build::comment_constraint(table, &name, text));
    constraint.into_iter().chain(comment).chain(constraint_comment).collect()
}

/// Makes a sequence when it is missing and sets its value. Returns its quoted name on the target.
async fn settle_sequence(client: &Session, table: &MappedTable, sequence: &Sequence, values: &[SequenceValue]) -> Result<String> {
    let wanted = build::sequence_target(table, sequence);
    let there = find_sequence(client, table, sequence, &wanted).await?;
    let is_new = there.is_none();
    let name = match there {
        Some(name) => name,
        None => {
            let name = match relation_kind(client, &wanted).await? {
                None => wanted,
                Some(_) => QualifiedName::new(&wanted.schema, build::derived_name(&wanted.name, &table.target)),
            };
            if !has_schema(client, &name.schema).await? {
                create_schema(client, &name.schema).await?;
            }
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

/// Sets the sequence of an existing table to the source's value, whatever it has. Does nothing where there is no such sequence.
pub(in super::super) async fn reset_sequence(
    client: &Session,
    table: &MappedTable,
    sequence: &Sequence,
    values: &[SequenceValue],
) -> Result<()> {
    let wanted = build::sequence_target(table, sequence);
    let Some(name) = find_sequence(client, table, sequence, &wanted).await? else { return Ok(()) };
    set_value(client, table, sequence, values, &name, true).await
}

/// The quoted name of a sequence that is there.
async fn find_sequence(client: &Session, table: &MappedTable, sequence: &Sequence, wanted: &QualifiedName) -> Result<Option<String>> {
    let own = client
        .query_one("SELECT pg_get_serial_sequence($1, $2)", &[&qualified(&table.target), &sequence.column])
        .await
        .map_err(failed("look for a sequence"))?;
    Ok(match (sequence.role, own.get::<_, Option<String>>(0)) {
        (SequenceRole::Free, _) => relation_kind(client, wanted).await?.filter(|kind| *kind == "S").map(|_| qualified(wanted)),
        (_, own) => own,
    })
}

/// A new sequence gets the source's value; one that is there never goes back, since others may use it. Where the source's
/// can't be read, what the column holds is the value.
async fn set_value(
    client: &Session,
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
async fn furthest(client: &Session, table: &MappedTable, sequence: &Sequence) -> Result<Option<i64>> {
    let column = table.version.columns.iter().find(|column| column.name == sequence.column);
    if !column.is_some_and(|column| matches!(column.type_name.name.as_str(), "int2" | "int4" | "int8")) {
        return Ok(None);
    }
    let end = if sequence.ascending { "max" } else { "min" };
    let sql = format!("SELECT {end}({})::int8 FROM {}", quote_ident(&sequence.column), qualified(&table.target));
    Ok(client.query_one(&sql, &[]).await.map_err(failed(format!("look for the last value of {}", sequence.column)))?.get(0))
}

async fn relation_kind(client: &Session, name: &QualifiedName) -> Result<Option<String>> {
    let row = client
        .query_opt(
            "SELECT c.relkind::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2",
            &[&name.schema, &name.name],
        )
        .await
        .map_err(failed("look for a name on the target"))?;
    Ok(row.map(|row| row.get(0)))
}

/// Whether a schema is there. `CREATE SCHEMA IF NOT EXISTS` alone would ask for the right to create schemas even where it is.
pub(super) async fn has_schema(client: &Session, schema: &str) -> Result<bool> {
    let there = client.query_one("SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)", &[&schema]).await;
    Ok(there.map_err(failed("look for the target schema"))?.get(0))
}

/// Makes a schema.
pub(super) async fn create_schema(client: &Session, schema: &str) -> Result<()> {
    run(client, &format!("CREATE SCHEMA IF NOT EXISTS {}", quote_ident(schema))).await
}

/// Makes a table with everything but foreign keys and takes it back: what the target can't take is found while there is
/// nothing to lose.
pub(in super::super) async fn rehearse(session: &Session, table: &MappedTable) -> Result<()> {
    let begin = format!("BEGIN ISOLATION LEVEL READ COMMITTED; {}", super::LOCK_TIMEOUT);
    let (begun, place) = futures::future::join(run(session, &begin), super::look(session, table)).await;
    begun?;
    let made = async {
        let place = place?;
        let create = async { if place.present.is_none() { super::create(session, table, place.has_schema).await } else { Ok(()) } };
        let (created, present) = futures::future::join(create, Present::read(session, table)).await;
        created?;
        let missing = present?.missing(table);
        let (built, present) = futures::future::join(build_indexes(session, table, &missing), Present::read(session, table)).await;
        built?;
        settle_beside(session, table, &[], &present?).await
    };
    let made = made.await;
    run(session, "ROLLBACK").await?;
    made.map_err(|error| error.context(format!("the target can't make table {} as the source has it", table.target)))
}

/// Runs statements of the caller's transaction, in this order and in one round trip; the first failure.
async fn run_all(client: &Session, statements: Vec<String>) -> Result<()> {
    let ran = in_order(statements.iter().map(|sql| run(client, sql))).await;
    ran.into_iter().collect()
}

/// A name that another table's index or sequence has got at this very moment is taken when it is tried again.
async fn run(client: &Session, sql: &str) -> Result<()> {
    client.batch_execute(sql).await.map_err(|error| {
        let unique = error.as_db_error().and_then(DbError::constraint) == Some("pg_class_relname_nsp_index");
        match error.code() == Some(&SqlState::DUPLICATE_TABLE) || unique {
            true => Error::retry(reason::WRITE_REFUSED, failed(sql)(error).message),
            false => failed(sql)(error),
        }
    })
}
