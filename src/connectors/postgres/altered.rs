//! What has become of a table that the log describes anew.
//!
//! The log names columns and their types; which columns these are, and what rows hold in those that have come, is in the catalog, which
//! may be ahead of the log. [`align`] brings the two together. What they leave open is never guessed: the table needs a new copy then.

mod align;

use super::catalog::facts::{self, Relation};
use super::catalog::rules::{self, Server, Wish};
use super::connect::{Session, Side};
use super::lsn::Lsn;
use super::source::answer;
use super::sql::{qualified, quote_ident};
use crate::engine::error::{Error, Result, reason};
use crate::engine::table::{Altered, Column, Identity, Lineage, MappedTable, QualifiedName, TableVersion};
use align::{Candidate, Reading, align};
use std::collections::HashMap;
use std::sync::Arc;
use tokio_postgres::Row;

/// What a look has seen of a table.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// Files of the rows, while its columns were those that are known.
    storage: String,
    /// The primary key that was not the known one,
    key: Option<u32>,
    /// and the end of the log then: what comes later was written under that key, as long as it is still there.
    end: Lsn,
}

/// A table that the log describes.
pub(super) struct Description<'a> {
    /// As the target holds it.
    pub known: &'a MappedTable,
    pub described: &'a TableVersion,
    /// Everything up to here is applied.
    pub applied: Lsn,
    /// The last look.
    pub seen: Option<&'a Seen>,
}

/// What has become of the table, if it is not as it is known; and what to remember.
///
/// # Errors
/// [`reason::SCHEMA_CHANGED`], class `Stop`, when it can't be told.
pub(super) async fn look(session: &Session, server: &Server, description: &Description<'_>) -> Result<(Option<Altered>, Seen)> {
    let what = "look at an altered table";
    // All of it as of one moment.
    answer(Side::Source, what, session.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")).await?;
    let looked = look_inside(session, server, description).await;
    answer(Side::Source, what, session.batch_execute("COMMIT")).await?;
    let (altered, seen, unproven) = looked?;
    for name in unproven {
        // Not as of that moment: rows that have been written anew since would not be seen.
        let filled =
            format!("SELECT EXISTS (SELECT FROM {} WHERE {} IS NOT NULL)", qualified(description.known.source()), quote_ident(&name));
        if answer(Side::Source, what, session.query_one(&filled, &[])).await?.get(0) {
            return Err(unknown_values(description.known, &name));
        }
    }
    Ok((altered, seen))
}

/// The same, with the names of columns that have come and must hold nothing for it to be right.
async fn look_inside(session: &Session, server: &Server, description: &Description<'_>) -> Result<(Option<Altered>, Seen, Vec<String>)> {
    let &Description { known, described, applied, seen } = description;
    let (relation, now) = read(session, server, known, described).await?;
    let is_now = is_described(&now.version, described);
    let is_known = now.is_like(known);
    // A key that was made since the known one went: rows that came meanwhile may have shared it.
    let other_key = now.lineage.key.is_some() && now.lineage.key != known.lineage.key;
    let same_key = seen.filter(|seen| seen.key == now.lineage.key);
    let key_in_doubt = described.identity == Identity::Full && other_key && same_key.is_none_or(|seen| applied < seen.end);
    let end = match same_key {
        Some(seen) => seen.end,
        None => end_of_log(session).await?,
    };
    let before = seen.map_or(&known.lineage.storage, |seen| &seen.storage);
    let storage = if is_now || is_known { &now.lineage.storage } else { before };
    let remembered = Seen { storage: storage.clone(), key: now.lineage.key, end };
    if is_now && is_known {
        return Ok((None, remembered, Vec::new()));
    }
    refuse_unlisted(known, &now)?;
    let numbers = numbers(known, described, &now, &relation)?;
    let types = Types::read(session, described).await?;
    let column = |(column, number): (&Column, &i32)| types.complete(column, described.identity, *number, known, &now);
    let columns = described.columns.iter().zip(&numbers).map(column).collect::<Result<Vec<_>>>()?;
    let (initial, unproven) = initial(session, known, &now, &columns, now.lineage.storage != *before).await?;
    let name_of = |number: i32| columns.iter().find(|column| column.number == number).map(|column| column.name.clone());
    let number_of = |name: &String| now.version.columns.iter().find(|column| column.name == *name).map(|column| column.number);
    let primary_key: Option<Vec<String>> = now.primary_key.iter().map(|name| name_of(number_of(name)?)).collect();
    let primary_key = primary_key.filter(|_| !key_in_doubt);
    let is_there = |column: &&Column| relation.columns.iter().any(|now| now.column.number == column.number);
    let table = MappedTable {
        version: Arc::new(TableVersion {
            id: known.version.id,
            name: known.source().clone(),
            columns,
            identity: described.identity,
            differs: None,
        }),
        generated: if is_now { now.generated } else { known.generated.iter().filter(is_there).cloned().collect() },
        lineage: Lineage { key: primary_key.as_ref().and(now.lineage.key), storage: remembered.storage.clone(), behind: false },
        primary_key: primary_key.unwrap_or_default(),
        ..now
    };
    let is_news = known.lineage.behind || !table.is_like(known);
    Ok((is_news.then_some(Altered { table, initial, key_in_doubt }), remembered, unproven))
}

/// The table in the catalog.
async fn read(session: &Session, server: &Server, known: &MappedTable, described: &TableVersion) -> Result<(Relation, MappedTable)> {
    let name = known.source();
    let relation = facts::read(session, &[known.version.id]).await?.pop();
    let Some(relation) = relation else {
        let differs = described.differs.as_deref().map(|differs| format!(" ({differs})"));
        return Err(stop(known, format!("{name} was dropped{}", differs.unwrap_or_default())));
    };
    if relation.name != *name {
        let message = format!("{name} was renamed to {}: name it so in the Mirror, or rename it back", relation.name);
        return Err(Error::stop(reason::SCHEMA_CHANGED, message));
    }
    // An excluded column may be gone.
    let is_there = |name: &&String| relation.columns.iter().any(|column| column.column.name == **name);
    let wish = Wish {
        target: known.target.clone(),
        excluded: known.excluded.iter().filter(is_there).cloned().collect(),
        accept_narrower_types: known.accept_narrower_types,
    };
    let now = rules::map(&relation, &wish, server)?;
    Ok((relation, now))
}

async fn end_of_log(session: &Session) -> Result<Lsn> {
    const END: &str = "SELECT pg_current_wal_insert_lsn()::text";
    let row = answer(Side::Source, "ask for the end of the log", session.query_one(END, &[])).await?;
    row.get::<_, &str>(0).parse().map_err(|error| Error::bug(format!("the end of the log: {error}")))
}

/// What only a new copy can bring about.
fn stop(known: &MappedTable, why: impl std::fmt::Display) -> Error {
    let target = qualified(&known.target);
    Error::stop(
        reason::SCHEMA_CHANGED,
        format!("{why}: the table needs a new copy, which begins when its target table is gone: DROP TABLE {target}"),
    )
}

/// Whether a description is that of this version.
fn is_described(version: &TableVersion, described: &TableVersion) -> bool {
    let full = described.identity == Identity::Full;
    let alike = |(column, described): (&Column, &Column)| {
        (&column.name, column.type_id, column.modifier) == (&described.name, described.type_id, described.modifier)
            && (full || column.key == described.key)
    };
    version.identity == described.identity
        && version.columns.len() == described.columns.len()
        && version.columns.iter().zip(&described.columns).all(alike)
}

/// A list of columns in the publication never gains a new one by itself, so the log says nothing of it.
fn refuse_unlisted(known: &MappedTable, now: &MappedTable) -> Result<()> {
    if known.excluded.is_empty() {
        return Ok(());
    }
    let is_known = |number: i32| known.version.columns.iter().chain(&known.generated).any(|column| column.number == number);
    match now.version.columns.iter().find(|column| !is_known(column.number)) {
        None => Ok(()),
        Some(column) => {
            let (name, column) = (known.source(), quote_ident(&column.name));
            Err(stop(known, format!("column {column} is new in {name}, of which only some columns are published: exclude it too; or else")))
        }
    }
}

fn numbers(known: &MappedTable, described: &TableVersion, now: &MappedTable, relation: &Relation) -> Result<Vec<i32>> {
    let name = |columns: &'_ [Column], number: i32| columns.iter().position(|column| column.number == number);
    let candidates: Vec<Candidate<'_>> = (1..=relation.columns_ever)
        .map(|number| Candidate {
            known: name(&known.version.columns, number).map(|place| known.version.columns[place].name.as_str()),
            now: name(&now.version.columns, number).map(|place| now.version.columns[place].name.as_str()),
            type_id: name(&now.version.columns, number).map_or(0, |place| now.version.columns[place].type_id),
            absent: name(&now.version.columns, number).is_none() && relation.columns.iter().any(|column| column.column.number == number),
        })
        .collect();
    match align(&described.columns, &candidates) {
        Reading::One(numbers) => Ok(numbers),
        Reading::Several => Err(stop(
            known,
            format!("a column of {} was dropped and added again, and the log does not tell which is which", known.source()),
        )),
        Reading::None => {
            Err(stop(known, format!("{} was altered several times, and what the log says does not go with it", known.source())))
        }
    }
}

/// Types by OID and modifier, as far as they are not those of columns that are known.
struct Types(HashMap<(u32, i32), (QualifiedName, String)>);

impl Types {
    async fn read(session: &Session, described: &TableVersion) -> Result<Self> {
        const TYPES: &str = "SELECT w.id, w.modifier, n.nspname::text, t.typname::text, format_type(w.id, w.modifier)
            FROM unnest($1::oid[], $2::int4[]) AS w (id, modifier) JOIN pg_type t ON t.oid = w.id JOIN pg_namespace n ON n.oid = t.typnamespace";
        let (ids, modifiers): (Vec<u32>, Vec<i32>) = described.columns.iter().map(|column| (column.type_id, column.modifier)).unzip();
        let rows = answer(Side::Source, "read types", session.query(TYPES, &[&ids, &modifiers])).await?;
        let entry =
            |row: &Row| ((row.get(0), row.get(1)), (QualifiedName::new(row.get::<_, String>(2), row.get::<_, String>(3)), row.get(4)));
        Ok(Self(rows.iter().map(entry).collect()))
    }

    /// A described column with what catalog and target know of it.
    fn complete(&self, described: &Column, identity: Identity, number: i32, known: &MappedTable, now: &MappedTable) -> Result<Column> {
        let find = |table: &MappedTable| table.version.columns.iter().find(|column| column.number == number).cloned();
        let (before, now) = (find(known), find(now));
        let is_of_type = |column: &&Column| (column.type_id, column.modifier) == (described.type_id, described.modifier);
        let like = now.as_ref().filter(is_of_type).or(before.as_ref().filter(is_of_type));
        let (type_name, declared) = match like {
            Some(like) => (like.type_name.clone(), like.declared.clone()),
            None => self.0.get(&(described.type_id, described.modifier)).cloned().ok_or_else(|| {
                stop(known, format!("column {} of {} had a type that is gone", quote_ident(&described.name), known.source()))
            })?,
        };
        // What takes no NULL now may have taken one where the log is.
        let not_null = before.as_ref().is_some_and(|column| column.not_null) && now.as_ref().is_some_and(|column| column.not_null);
        Ok(Column {
            name: described.name.clone(),
            number,
            type_id: described.type_id,
            modifier: described.modifier,
            type_name,
            declared,
            key: described.key && identity == Identity::Key,
            not_null,
            generated: None,
            collation: like.and_then(|like| like.collation.clone()),
        })
    }
}

fn unknown_values(known: &MappedTable, column: &str) -> Error {
    stop(known, format!("column {} of {} has come with values that are not in the log", quote_ident(column), known.source()))
}

/// What rows that were there hold in columns that have come, as far as it is not NULL. Such a column is filled without a word in the
/// log: by a value in the catalog (manual: "ALTER TABLE", notes), or by writing all rows anew. Where rows were `rewritten` since, some
/// columns must be looked at; their names come second.
async fn initial(
    session: &Session,
    known: &MappedTable,
    now: &MappedTable,
    columns: &[Column],
    rewritten: bool,
) -> Result<(HashMap<i32, String>, Vec<String>)> {
    const VALUES: &str = "SELECT a.attnum::int4 AS number, bool_and(p.atthasmissing) AS has, min((p.attmissingval::text::text[])[1]) AS value,
            count(DISTINCT (p.attmissingval::text::text[])[1]) < 2 AND bool_and(p.atthasmissing) = bool_or(p.atthasmissing) AS same
        FROM pg_attribute a CROSS JOIN LATERAL (SELECT $1::oid AS id WHERE NOT EXISTS (SELECT FROM pg_partitioned_table WHERE partrelid = $1)
            UNION ALL SELECT t.relid::oid FROM pg_partition_tree($1) t WHERE t.isleaf AND t.relid::oid <> $1) parts
        JOIN pg_attribute p ON p.attrelid = parts.id AND p.attname = a.attname
        WHERE a.attrelid = $1 AND a.attnum = ANY($2) AND NOT a.attisdropped GROUP BY a.attnum";
    let is_known = |number: i32| known.version.columns.iter().chain(&known.generated).any(|column| column.number == number);
    let new: Vec<i32> = columns.iter().map(|column| column.number).filter(|number| !is_known(*number)).collect();
    let (mut values, mut unproven) = (HashMap::new(), Vec::new());
    if new.is_empty() {
        return Ok((values, unproven));
    }
    let rows = answer(Side::Source, "read what a new column holds", session.query(VALUES, &[&known.version.id, &new])).await?;
    // One that is gone again is not there, nor is what was in it.
    for row in &rows {
        let number: i32 = row.get("number");
        let Some(column) = now.version.columns.iter().find(|column| column.number == number) else { continue };
        match (row.get("same"), row.get("has")) {
            (false, _) => return Err(unknown_values(known, &column.name)),
            (true, true) => drop(values.insert(number, row.get("value"))),
            // Rows that were not written anew have nothing there.
            (true, false) if !rewritten => {}
            (true, false) => unproven.push(column.name.clone()),
        }
    }
    Ok((values, unproven))
}
