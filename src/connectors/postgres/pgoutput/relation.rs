//! The relation message: what a table looks like from here on, compared with what it looked like at set-up.

use super::Cursor;
use crate::engine::error::{Error, Result, reason};
use crate::engine::table::{Identity, TableVersion};
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
            let _type_modifier = body.i32()?;
            Ok(AnnouncedColumn { name, type_id, key })
        });
        let columns = columns.collect::<Result<Vec<_>>>()?;
        super::finish(body)?;
        // The catalog's schema is sent as an empty name.
        let schema = if schema.is_empty() { "pg_catalog" } else { schema };
        Ok(Self { id, schema, name, identity, columns })
    }

    /// Fails with the difference unless rows can be read under `version`.
    pub(super) fn compare(&self, version: &TableVersion) -> Result<()> {
        self.difference(version).map_or(Ok(()), |difference| Err(changed(version, &difference)))
    }

    /// Fails when the table has the name of a mapped one: its rows would be passed over.
    pub(super) fn refuse_replacement<'v>(&self, mut mapped: impl Iterator<Item = &'v Arc<TableVersion>>) -> Result<()> {
        match mapped.find(|version| self.is_named_like(version)) {
            Some(version) => Err(changed(version, "another table has its name now")),
            None => Ok(()),
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
            if now.type_id != column.type_id {
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

fn changed(version: &TableVersion, difference: &str) -> Error {
    Error::stop(reason::SCHEMA_CHANGED, format!("table {}: {difference}", version.name))
}
