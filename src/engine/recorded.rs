//! What the target's checkpoint says of a table's columns: the version that it holds.
//!
//! The target is altered in the transaction that carries the first rows of a new version, and what is written here with it. So after a
//! crash the stream goes on with the version that its position goes with, whatever the source's table is by then.

use super::table::{Column, Identity, Lineage, MappedTable, QualifiedName, TableVersion};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// As it is written.
#[derive(Serialize, Deserialize)]
struct Recorded {
    id: u32,
    columns: Vec<RecordedColumn>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    generated: Vec<RecordedColumn>,
    full: bool,
    primary_key: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<u32>,
    storage: String,
}

#[derive(Serialize, Deserialize)]
struct RecordedColumn {
    name: String,
    number: i32,
    type_id: u32,
    modifier: i32,
    schema: String,
    r#type: String,
    declared: String,
    #[serde(default, skip_serializing_if = "is_false")]
    key: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    not_null: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    expression: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    collation: Option<(String, String)>,
}

// serde calls it with a reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_false(value: &bool) -> bool {
    !value
}

impl RecordedColumn {
    fn of(column: &Column) -> Self {
        Self {
            name: column.name.clone(),
            number: column.number,
            type_id: column.type_id,
            modifier: column.modifier,
            schema: column.type_name.schema.clone(),
            r#type: column.type_name.name.clone(),
            declared: column.declared.clone(),
            key: column.key,
            not_null: column.not_null,
            expression: column.generated.clone(),
            collation: column.collation.as_ref().map(|name| (name.schema.clone(), name.name.clone())),
        }
    }

    fn column(self) -> Column {
        Column {
            name: self.name,
            number: self.number,
            type_id: self.type_id,
            modifier: self.modifier,
            type_name: QualifiedName::new(self.schema, self.r#type),
            declared: self.declared,
            key: self.key,
            not_null: self.not_null,
            generated: self.expression,
            collation: self.collation.map(|(schema, name)| QualifiedName { schema, name }),
        }
    }
}

impl MappedTable {
    /// The version as text for the checkpoint.
    #[must_use]
    pub fn signature(&self) -> String {
        let columns = |columns: &[Column]| columns.iter().map(RecordedColumn::of).collect();
        let recorded = Recorded {
            id: self.version.id,
            columns: columns(&self.version.columns),
            generated: columns(&self.generated),
            full: self.version.identity == Identity::Full,
            primary_key: self.primary_key.clone(),
            key: self.lineage.key,
            storage: self.lineage.storage.clone(),
        };
        // Strings and numbers only: nothing in it can't be written.
        serde_json::to_string(&recorded).unwrap_or_default()
    }

    /// Whether the target, which holds the version of this text, holds what the table is now.
    #[must_use]
    pub fn is_recorded_as(&self, text: &str) -> bool {
        match self.recorded(text) {
            Some(recorded) => self.is_like(&recorded),
            None => text == self.plain_signature(),
        }
    }

    /// The table in the version of this text. `None`: the text is that of an older build, or of another table of the same name.
    #[must_use]
    pub fn recorded(&self, text: &str) -> Option<Self> {
        let recorded: Recorded = serde_json::from_str(text).ok().filter(|recorded: &Recorded| recorded.id == self.version.id)?;
        let columns = |columns: Vec<RecordedColumn>| columns.into_iter().map(RecordedColumn::column).collect();
        Some(Self {
            version: Arc::new(TableVersion {
                id: recorded.id,
                name: self.version.name.clone(),
                columns: columns(recorded.columns),
                identity: if recorded.full { Identity::Full } else { Identity::Key },
                differs: None,
            }),
            generated: columns(recorded.generated),
            primary_key: recorded.primary_key,
            lineage: Lineage { key: recorded.key, storage: recorded.storage, behind: true },
            ..self.clone()
        })
    }

    /// Whether a target that holds the `known` version needs nothing to hold this one. That a column takes no NULL any more needs nothing.
    #[must_use]
    pub fn is_like(&self, known: &Self) -> bool {
        let alike = |(now, known): (&Column, &Column)| {
            let not_null = now.not_null && known.not_null;
            *now == Column { not_null: now.not_null, ..known.clone() } && not_null == known.not_null
        };
        let (now, then) = (&self.version, &known.version);
        let full = now.identity == Identity::Full;
        let pairs = |now: &[Column], known: &[Column]| now.len() == known.len() && now.iter().zip(known).all(alike);
        (now.id, &now.name, now.identity) == (then.id, &then.name, then.identity)
            && pairs(&now.columns, &then.columns)
            && pairs(&self.generated, &known.generated)
            && (!full || (&self.primary_key, self.lineage.key) == (&known.primary_key, known.lineage.key))
    }

    /// What older builds have written.
    fn plain_signature(&self) -> String {
        let column = |column: &Column| format!("{:?} {}", column.name, column.declared);
        self.version.columns.iter().map(column).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::testing;

    fn column(name: &str, number: i32) -> Column {
        Column {
            name: name.into(),
            number,
            type_id: 23,
            modifier: -1,
            type_name: QualifiedName::new("pg_catalog", "int4"),
            declared: "integer".into(),
            key: name == "id",
            not_null: name == "id",
            generated: None,
            collation: None,
        }
    }

    fn table(columns: Vec<Column>) -> MappedTable {
        let name = QualifiedName::new("public", "t");
        MappedTable {
            generated: vec![Column { generated: Some("(a + 1)".into()), ..column("twice", 3) }],
            primary_key: vec!["id".into()],
            lineage: Lineage { key: Some(5), storage: "file".into(), behind: false },
            ..testing::table(TableVersion { id: 7, name, columns, identity: Identity::Key, differs: None })
        }
    }

    #[test]
    fn a_version_is_read_as_it_was_written() {
        let then = table(vec![column("id", 1), Column { collation: Some(QualifiedName::new("s", "c")), ..column("a", 2) }]);
        let now = table(vec![column("id", 1), column("b", 2)]);
        let read = now.recorded(&then.signature()).unwrap();
        assert_eq!((&read.version, &read.generated, &read.primary_key), (&then.version, &then.generated, &then.primary_key));
        assert_eq!(read.lineage, Lineage { behind: true, ..then.lineage.clone() });
        assert!(then.is_recorded_as(&then.signature()) && !now.is_recorded_as(&then.signature()));
    }

    #[test]
    fn what_needs_nothing_on_the_target_is_no_change() {
        let known = table(vec![column("id", 1), column("a", 2)]);
        let mut now = table(vec![column("id", 1), Column { not_null: true, ..column("a", 2) }]);
        (now.lineage.storage, now.lineage.key) = ("another".into(), Some(6));
        assert!(now.is_like(&known));
        assert!(!known.is_like(&now), "a column that takes NULL now");
        assert!(!table(vec![column("id", 1), column("a", 3)]).is_like(&known), "dropped and added again");
    }

    #[test]
    fn texts_of_older_builds_are_understood() {
        let table = table(vec![column("id", 1), column("a", 2)]);
        assert!(table.is_recorded_as(r#""id" integer, "a" integer"#));
        assert!(!table.is_recorded_as(r#""id" integer"#) && table.recorded(r#""id" integer"#).is_none());
    }
}
