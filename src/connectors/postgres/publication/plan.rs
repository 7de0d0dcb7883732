//! What must be done to a publication: pure.

use crate::engine::error::{Error, Result, reason};
use crate::engine::table::{MappedTable, QualifiedName};
use std::collections::HashSet;

/// A publication as it is.
#[derive(Clone, Debug)]
pub struct Published {
    pub comment: Option<String>,
    /// FOR ALL TABLES, or whole schemas among its tables.
    pub everything: bool,
    pub all_operations: bool,
    pub via_root: bool,
    pub tables: Vec<PublishedTable>,
}

/// One table in it.
#[derive(Clone, Debug)]
pub struct PublishedTable {
    pub id: u32,
    pub name: QualifiedName,
    /// The list of columns, if there is one.
    pub columns: Option<Vec<String>>,
    /// It has a row filter.
    pub filtered: bool,
}

/// What must be done.
#[derive(Debug, Default)]
pub struct Plan<'a> {
    pub create: bool,
    /// It still says that the slot was given up.
    pub set_comment: bool,
    pub set_options: bool,
    pub incoming: Vec<&'a MappedTable>,
    pub outgoing: Vec<QualifiedName>,
}

impl Plan<'_> {
    /// The publication is as it should be.
    pub fn is_nothing(&self) -> bool {
        !self.create && !self.set_comment && !self.set_options && self.incoming.is_empty() && self.outgoing.is_empty()
    }
}

/// Comments of our own publication.
#[derive(Clone, Copy, Debug)]
pub struct Marks<'a> {
    pub own: &'a str,
    /// Its slot was given up.
    pub given_up: &'a str,
}

/// Compares what is with what should be. `partitioned` are the OIDs of partitioned tables.
pub fn plan<'a>(found: Option<&Published>, tables: &'a [MappedTable], partitioned: &HashSet<u32>, marks: Marks<'_>) -> Result<Plan<'a>> {
    let Some(found) = found else { return Ok(Plan { create: true, incoming: tables.iter().collect(), ..Plan::default() }) };
    let published = |table: &MappedTable| found.tables.iter().find(|published| published.id == table.version.id);
    // A table whose columns changed leaves and comes in again, in one transaction.
    let changed = |table: &&MappedTable| !published(table).is_some_and(|published| fits(published, table));
    let stays = |published: &&PublishedTable| tables.iter().any(|table| table.version.id == published.id && fits(published, table));
    let comment = found.comment.as_deref();
    let plan = Plan {
        create: false,
        set_comment: comment == Some(marks.given_up),
        set_options: !found.all_operations || !found.via_root,
        incoming: tables.iter().filter(changed).collect(),
        outgoing: found.tables.iter().filter(|published| !stays(published)).map(|published| published.name.clone()).collect(),
    };
    if (comment == Some(marks.own) || plan.set_comment) && !found.everything {
        return Ok(plan);
    }
    let needs_root = tables.iter().any(|table| partitioned.contains(&table.version.id));
    use_foreign(found, &plan, needs_root).map(|()| Plan::default())
}

/// A table that was seen in the publication and has left must not come in as if nothing had been: its changes meanwhile are gone.
pub fn check_present(found: Option<&Published>, plan: &Plan<'_>, present: &[QualifiedName]) -> Result<()> {
    let is_there = |name: &QualifiedName| found.is_some_and(|found| found.tables.iter().any(|published| published.name == *name));
    let left = plan.incoming.iter().map(|table| table.source()).find(|name| present.contains(name) && !is_there(name));
    left.map_or(Ok(()), |name| Err(Error::retry(reason::LEFT_PUBLICATION, format!("{name} was taken out of the publication just now"))))
}

/// Somebody else's publication is used as it is, or not at all.
fn use_foreign(found: &Published, plan: &Plan<'_>, needs_root: bool) -> Result<()> {
    let names = |names: &mut dyn Iterator<Item = &QualifiedName>| names.map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let why = if let Some(owner) = found.comment.as_deref().filter(|comment| comment.starts_with("sluice:")) {
        format!("it belongs to another stream ({owner})")
    } else if found.everything {
        "it publishes all tables of the database or of schemas".to_owned()
    } else if !found.all_operations {
        "it does not publish insert, update, delete and truncate".to_owned()
    } else if !found.via_root && needs_root {
        "publish_via_partition_root is false".to_owned()
    } else if !plan.incoming.is_empty() {
        format!("{} not in it with the mapped columns and without filter", names(&mut plan.incoming.iter().map(|table| table.source())))
    } else if !plan.outgoing.is_empty() {
        format!("{} in it but not mapped", names(&mut plan.outgoing.iter()))
    } else {
        return Ok(());
    };
    Err(Error::stop(
        reason::INVALID_SPEC,
        format!("it was not made for this stream and does not fit: {why}; choose another publicationName"),
    ))
}

fn fits(published: &PublishedTable, table: &MappedTable) -> bool {
    let sorted = |names: &mut dyn Iterator<Item = &String>| {
        let mut names: Vec<String> = names.cloned().collect();
        names.sort();
        names
    };
    !published.filtered
        && match &published.columns {
            None => table.excluded.is_empty(),
            Some(columns) => sorted(&mut columns.iter()) == sorted(&mut table.version.columns.iter().map(|column| &column.name)),
        }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::table::{Column, Identity, TableVersion};
    use crate::engine::testing;

    fn table(id: u32, excluded: &[&str]) -> MappedTable {
        let column = |name: &str| Column {
            name: name.into(),
            type_id: 23,
            type_name: QualifiedName::new("pg_catalog", "int4"),
            declared: "integer".into(),
            key: name == "id",
            not_null: true,
            generated: None,
            collation: None,
            number: 0,
            modifier: -1,
        };
        let columns = ["id", "a", "b"].into_iter().filter(|name| !excluded.contains(name)).map(column).collect();
        let name = QualifiedName::new("public", format!("t{id}"));
        MappedTable {
            excluded: excluded.iter().map(|name| (*name).to_owned()).collect(),
            primary_key: vec!["id".into()],
            ..testing::table(TableVersion { id, name, columns, identity: Identity::Key, differs: None })
        }
    }

    fn published(id: u32, columns: Option<&[&str]>) -> PublishedTable {
        let columns = columns.map(|columns| columns.iter().map(|name| (*name).to_owned()).collect());
        PublishedTable { id, name: QualifiedName::new("public", format!("t{id}")), columns, filtered: false }
    }

    fn publication(comment: Option<&str>, tables: Vec<PublishedTable>) -> Published {
        Published { comment: comment.map(str::to_owned), everything: false, all_operations: true, via_root: true, tables }
    }

    const MARKS: Marks<'_> = Marks { own: "m", given_up: "g" };

    fn ids(plan: &Plan<'_>) -> (Vec<u32>, Vec<String>) {
        (plan.incoming.iter().map(|table| table.version.id).collect(), plan.outgoing.iter().map(|name| name.name.clone()).collect())
    }

    #[test]
    fn a_missing_one_is_made() {
        let tables = [table(1, &[])];
        let plan = plan(None, &tables, &HashSet::new(), MARKS).unwrap();
        assert!(plan.create);
        assert_eq!(ids(&plan), (vec![1], vec![]));
    }

    #[test]
    fn ours_is_changed_where_it_differs() {
        let tables = [table(1, &[]), table(2, &["b"]), table(3, &["b"]), table(4, &[])];
        let found = publication(
            Some("m"),
            vec![published(1, None), published(2, Some(&["a", "id"])), published(3, Some(&["a", "b", "id"])), published(5, None)],
        );
        let changes = plan(Some(&found), &tables, &HashSet::new(), MARKS).unwrap();
        assert!(!changes.create && !changes.set_options);
        assert_eq!(ids(&changes), (vec![3, 4], vec!["t3".into(), "t5".into()]));
        let found = publication(Some("m"), vec![published(1, None)]);
        assert!(plan(Some(&found), &tables[..1], &HashSet::new(), MARKS).unwrap().is_nothing());
        let found = publication(Some("g"), vec![published(1, None)]);
        let changes = plan(Some(&found), &tables[..1], &HashSet::new(), MARKS).unwrap();
        assert!(changes.set_comment && !changes.is_nothing(), "it begins again");
        assert_eq!(ids(&changes), (vec![], vec![]));
    }

    #[test]
    fn a_filter_or_missing_operations_are_set_right_in_ours() {
        let tables = [table(1, &[])];
        let mut found = publication(Some("m"), vec![PublishedTable { filtered: true, ..published(1, None) }]);
        found.all_operations = false;
        let plan = plan(Some(&found), &tables, &HashSet::new(), MARKS).unwrap();
        assert!(plan.set_options);
        assert_eq!(ids(&plan), (vec![1], vec!["t1".into()]));
    }

    #[test]
    fn a_users_publication_is_used_as_it_is_or_refused() {
        let tables = [table(1, &[]), table(2, &["b"])];
        let fitting = || publication(None, vec![published(1, Some(&["id", "a", "b"])), published(2, Some(&["id", "a"]))]);
        assert!(plan(Some(&fitting()), &tables, &HashSet::new(), MARKS).unwrap().is_nothing());
        let refused = |change: &dyn Fn(&mut Published)| {
            let mut found = fitting();
            change(&mut found);
            plan(Some(&found), &tables, &HashSet::new(), MARKS).unwrap_err().message
        };
        assert!(refused(&|found| found.comment = Some("sluice:other".into())).contains("another stream (sluice:other)"));
        assert!(refused(&|found| found.everything = true).contains("all tables"));
        assert!(refused(&|found| found.all_operations = false).contains("truncate"));
        assert!(refused(&|found| found.tables.truncate(1)).contains("public.t2 not in it"));
        assert!(refused(&|found| found.tables[1].columns = None).contains("public.t2"));
        assert!(refused(&|found| found.tables.push(published(3, None))).contains("public.t3 in it"));
        // Without partitioned tables it does not matter under whose name rows of partitions come.
        let mut found = fitting();
        found.via_root = false;
        assert!(plan(Some(&found), &tables, &HashSet::new(), MARKS).unwrap().is_nothing());
        let error = plan(Some(&found), &tables, &HashSet::from([1]), MARKS).unwrap_err();
        assert!(error.message.contains("publish_via_partition_root"), "{error}");
    }
}
