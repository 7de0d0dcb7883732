//! The relation message: what a table looks like from here on, compared with what it looked like at set-up.

use super::Cursor;
use crate::engine::error::Result;
use crate::engine::table::{Column, Identity, QualifiedName, TableVersion};
use std::collections::HashMap;
use std::sync::Arc;

/// The flag of a column that belongs to the replica identity.
const KEY_FLAG: u8 = 1;

/// A relation message.
pub(super) struct Announced<'a> {
    pub(super) id: u32,
    schema: &'a str,
    name: &'a str,
    identity: u8,
    columns: Vec<AnnouncedColumn<'a>>,
}

struct AnnouncedColumn<'a> {
    name: &'a str,
    type_id: u32,
    modifier: i32,
    key: bool,
}

impl<'a> Announced<'a> {
    pub(super) fn read(body: &mut Cursor<'a>) -> Result<Self> {
        let id = body.u32()?;
        let (schema, name) = (body.text()?, body.text()?);
        let identity = body.u8()?;
        let count = body.u16()?;
        let columns = (0..count).map(|_| {
            let key = body.u8()? & KEY_FLAG != 0;
            let (name, type_id) = (body.text()?, body.u32()?);
            let modifier = body.i32()?;
            Ok(AnnouncedColumn { name, type_id, modifier, key })
        });
        let columns = columns.collect::<Result<Vec<_>>>()?;
        super::finish(body)?;
        // The catalog's schema is sent as an empty name.
        let schema = if schema.is_empty() { "pg_catalog" } else { schema };
        Ok(Self { id, schema, name, identity, columns })
    }

    /// The version that rows are written under from here on: one of its own for each message, since even a message that is like the one
    /// before may be there because the table was altered. Where it is not like the mapped one it says how it differs; it is judged
    /// only when a row of it is due. A table that has taken the name of a mapped one stands for that one: its rows must not be
    /// passed over. `None`: not mapped.
    pub(super) fn version(&self, mapped: &HashMap<u32, Arc<TableVersion>>) -> Option<Arc<TableVersion>> {
        let (version, difference) = match mapped.get(&self.id) {
            Some(version) => (version, self.difference(version)),
            None => (mapped.values().find(|version| self.is_named_like(version))?, Some("another table has its name now".into())),
        };
        Some(Arc::new(match difference {
            None => TableVersion::clone(version),
            Some(difference) => self.differing(version, difference),
        }))
    }

    fn differing(&self, version: &TableVersion, difference: String) -> TableVersion {
        let column = |column: &AnnouncedColumn<'_>| Column {
            name: column.name.to_owned(),
            type_id: column.type_id,
            // The message does not name types.
            type_name: QualifiedName::new("", ""),
            declared: format!("type {}", column.type_id),
            key: column.key,
            not_null: false,
            generated: None,
            collation: None,
            number: 0,
            modifier: column.modifier,
        };
        TableVersion {
            id: version.id,
            name: version.name.clone(),
            columns: self.columns.iter().map(column).collect(),
            identity: if self.identity == b'f' { Identity::Full } else { Identity::Key },
            differs: Some(difference),
        }
    }

    fn is_named_like(&self, version: &TableVersion) -> bool {
        version.name.schema == self.schema && version.name.name == self.name
    }

    fn difference(&self, version: &TableVersion) -> Option<String> {
        if !self.is_named_like(version) {
            return Some(format!("it was renamed to {}.{}", self.schema, self.name));
        }
        let full = self.identity == b'f';
        if full != (version.identity == Identity::Full) {
            return Some("its replica identity changed".into());
        }
        for column in &version.columns {
            let Some(now) = self.columns.iter().find(|now| now.name == column.name) else {
                return Some(format!("column `{}` is gone", column.name));
            };
            if (now.type_id, now.modifier) != (column.type_id, column.modifier) {
                return Some(format!("column `{}` was {} and has another type now", column.name, column.declared));
            }
            // With a full identity every column is marked.
            if !full && now.key != column.key {
                let verb = if now.key { "joined" } else { "left" };
                return Some(format!("column `{}` {verb} the replica identity", column.name));
            }
        }
        if let Some(new) = self.columns.iter().find(|now| !version.columns.iter().any(|column| column.name == now.name)) {
            return Some(format!("column `{}` is new", new.name));
        }
        let same_order = self.columns.iter().map(|now| now.name).eq(version.columns.iter().map(|column| column.name.as_str()));
        (!same_order).then(|| "its columns are in another order".into())
    }
}
