//! Tables as the source's catalog has them, and whether they can be followed.
//!
//! Two steps: [`facts`] reads everything that matters in four statements, [`rules`] decides without I/O. The same two steps run
//! again under a lock when tables come into the publication. [`structure`] reads what else a table has, for targets to make. All of
//! it takes two round trips.

pub(super) mod facts;
pub(super) mod rules;
pub(super) mod structure;

use super::connect::Session;
use super::sql::quote_ident;
use crate::engine::error::{Error, Result, reason};
use crate::engine::roles::{SchemaSelection, Selection, TableSelection};
use crate::engine::table::{MappedTable, QualifiedName};
use facts::{Details, Filter, Relation};
use rules::{Server, Wish};
use std::collections::{HashMap, HashSet};
use structure::Structures;

/// Reads the mapped tables, in order of their names.
///
/// # Errors
/// The reason why the first table that can't be followed can't be; class `Stop`.
pub async fn tables(session: &Session, server: &Server, selection: &Selection) -> Result<Vec<MappedTable>> {
    let (chosen, structures) = match selection {
        Selection::Tables(tables) => by_name(session, tables).await?,
        Selection::Schemas(schemas) => by_schema(session, schemas).await?,
    };
    let mut tables = chosen.iter().map(|(relation, wish)| rules::map(relation, wish, server)).collect::<Result<Vec<_>>>()?;
    structures.fill(&mut tables)?;
    Ok(tables)
}

/// Relations of the filter, and what else they have.
async fn read(session: &Session, filter: Filter<'_>) -> Result<(Vec<Relation>, Structures)> {
    let found = facts::find(session, filter).await?;
    let (details, structures) =
        futures::future::try_join(Details::read(session, &found.ids), Structures::read(session, &found.ids)).await?;
    Ok((facts::relations_of(found, details), structures))
}

async fn by_name(session: &Session, tables: &[TableSelection]) -> Result<(Vec<(Relation, Wish)>, Structures)> {
    let mut wishes = HashMap::new();
    for table in tables {
        rules::refuse_reserved(&table.source)?;
        let wish = Wish {
            target: table.target.clone(),
            excluded: table.exclude_columns.clone(),
            accept_narrower_types: table.accept_narrower_types,
        };
        if wishes.insert(table.source.clone(), wish).is_some() {
            return Err(Error::stop(reason::INVALID_SPEC, format!("table {} is given twice", table.source)));
        }
    }
    let names: Vec<QualifiedName> = tables.iter().map(|table| table.source.clone()).collect();
    let (relations, structures) = read(session, Filter::Names(&names)).await?;
    let found: HashSet<&QualifiedName> = relations.iter().map(|relation| &relation.name).collect();
    if let Some(missing) = names.iter().find(|name| !found.contains(name)) {
        return Err(Error::stop(reason::TABLE_MISSING, format!("table {missing} is not in the source")));
    }
    if let Some((part, root)) = rules::part_of_chosen(&relations) {
        return Err(Error::stop(
            reason::INVALID_SPEC,
            format!("{part} is a partition of {root}, which is mapped too: its rows already come through {root}"),
        ));
    }
    let chosen = relations.into_iter().filter_map(|relation| wishes.remove(&relation.name).map(|wish| (relation, wish)));
    Ok((chosen.collect(), structures))
}

/// Ordinary and partitioned tables; a partition whose root is there too is taken through it.
async fn by_schema(session: &Session, schemas: &[SchemaSelection]) -> Result<(Vec<(Relation, Wish)>, Structures)> {
    let mut chosen = HashMap::new();
    for schema in schemas {
        rules::refuse_reserved_schema(&schema.source)?;
        if chosen.insert(schema.source.as_str(), schema).is_some() {
            return Err(Error::stop(reason::INVALID_SPEC, format!("schema {} is given twice", schema.source)));
        }
    }
    let names: Vec<&str> = chosen.keys().copied().collect();
    let (existing, (mut relations, structures)) =
        futures::future::try_join(facts::schemas(session, &names), read(session, Filter::Schemas(&names))).await?;
    if let Some(missing) = schemas.iter().find(|schema| !existing.contains(&schema.source)) {
        let name = quote_ident(&missing.source);
        return Err(Error::stop(reason::TABLE_MISSING, format!("schema {name} is not in the source")));
    }
    relations.retain(|relation| relation.is_table() && !chosen[relation.name.schema.as_str()].exclude_tables.contains(&relation.name.name));
    let ids: HashSet<u32> = relations.iter().map(|relation| relation.id).collect();
    relations.retain(|relation| !relation.ancestors.iter().any(|ancestor| ids.contains(ancestor)));
    let wish = |relation: &Relation| {
        let schema = chosen[relation.name.schema.as_str()];
        Wish {
            target: QualifiedName::new(&schema.target, &relation.name.name),
            excluded: Vec::new(),
            accept_narrower_types: schema.accept_narrower_types,
        }
    };
    let chosen = relations.into_iter().map(|relation| {
        let wish = wish(&relation);
        (relation, wish)
    });
    Ok((chosen.collect(), structures))
}
