//! SQL texts that write mirrored rows, and what they need to know of a target table. Pure.
//!
//! Two shapes: a *row* statement has one parameter per value, a *set* statement one array per column. In a set, columns
//! that the source sends as text come as `text[]` and are cast, without a type modifier, so that a value that is too long
//! fails and is never cut; binary ones come as arrays of the column's type. Updates and deletes of sets say which of their
//! rows they have hit, so that a missing row can be named.

use super::ddl::{Equality, TargetTable};
use super::sql::{qualified, quote_ident};
use crate::engine::batch::{Batch, Cell, Change};
use crate::engine::coalesce::{Action, MissingColumns, Order};
use crate::engine::error::{Error, Result, reason};
use crate::engine::roles::ApplyMode;
use crate::engine::table::{Identity, MappedTable, QualifiedName, TableVersion};
use std::sync::Arc;

/// Which image a parameter's values come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// The old row.
    Old,
    /// The new row.
    New,
    /// The old row where it was sent, else the new one: the values that name the row in the target.
    Key,
}

/// One parameter of a statement: a column of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Parameter {
    pub column: usize,
    pub side: Side,
}

impl Parameter {
    /// Its value in a change.
    pub fn cell(self, batch: &Batch, change: &Change) -> Cell {
        let image = match self.side {
            Side::New => change.new,
            Side::Key if !change.old.is_present() => change.new,
            Side::Old | Side::Key => change.old,
        };
        batch.cells(image)[self.column]
    }
}

/// How a set statement gets its columns: for each parameter, whether it is binary.
pub(super) type Encodings = Vec<bool>;

/// One column of a target table, as statements need it.
#[derive(Clone, Debug)]
struct WriterColumn {
    name: String,
    /// Quoted.
    ident: String,
    /// Quoted name of the type, without modifier.
    cast: String,
    is_array: bool,
    /// Binary forms of these hold OIDs, which differ between servers.
    is_reg: bool,
    equality: Equality,
    operator: String,
}

/// How to write one table's rows.
#[derive(Clone, Debug)]
pub(super) struct TableWriter {
    pub version: Arc<TableVersion>,
    pub target: QualifiedName,
    /// Positions of the columns that name a row; empty: the whole old row does.
    pub key: Vec<usize>,
    pub order: Order,
    /// The unique index on the key.
    pub key_index: Option<String>,
    /// Quoted.
    name: String,
    columns: Vec<WriterColumn>,
    partitioned: bool,
}

impl TableWriter {
    /// From what the source has and the target is.
    ///
    /// # Errors
    /// `TargetTableIncompatible` when the target lacks a column.
    pub fn new(table: &MappedTable, present: &TargetTable, mode: ApplyMode) -> Result<Self> {
        let version = &table.version;
        let key = key_columns(table);
        let mut columns = Vec::with_capacity(version.columns.len());
        for column in &version.columns {
            let Some(target) = present.column(&column.name) else {
                return Err(Error::stop(
                    reason::TARGET_TABLE_INCOMPATIBLE,
                    format!("target table {} has no column {}", table.target, column.name),
                ));
            };
            columns.push(WriterColumn {
                name: column.name.clone(),
                ident: quote_ident(&column.name),
                cast: qualified(&target.type_name),
                is_array: target.is_array,
                is_reg: is_reg(&target.type_name),
                equality: target.equality,
                operator: target.operator.clone(),
            });
        }
        let key_names: Vec<&str> = key.iter().map(|&column| version.columns[column].name.as_str()).collect();
        let fires = match mode {
            ApplyMode::Replica => !present.always_triggers.is_empty(),
            ApplyMode::Ordered => present.has_foreign_keys || !present.triggers.is_empty(),
        };
        let by_bytes = key.iter().all(|&column| columns[column].equality == Equality::Bytes);
        let order = if fires {
            Order::All
        } else if key.is_empty() || !by_bytes || present.restricts_more_than(&key_names) {
            Order::Table
        } else {
            Order::Key
        };
        Ok(Self {
            version: Arc::clone(version),
            target: table.target.clone(),
            order,
            key_index: present.key_index(&key_names).map(|index| index.name.clone()),
            name: qualified(&table.target),
            columns,
            partitioned: present.partitioned,
            key,
        })
    }

    /// Quoted name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Names of the key columns, for people.
    pub fn key_names(&self) -> impl Iterator<Item = &str> {
        self.key.iter().map(|&column| self.columns[column].name.as_str())
    }

    /// Parameters of a statement, in order: first what finds the row, then what is written.
    pub fn parameters(&self, action: Action, missing: &MissingColumns) -> Vec<Parameter> {
        let finds = |columns: &mut dyn Iterator<Item = usize>, side| columns.map(|column| Parameter { column, side }).collect::<Vec<_>>();
        let mut parameters = match action {
            Action::Insert | Action::Truncate => Vec::new(),
            Action::Update | Action::UpdateKey | Action::Delete if self.key.is_empty() => finds(&mut (0..self.columns.len()), Side::Old),
            Action::Update | Action::UpdateKey | Action::Delete => finds(&mut self.key.iter().copied(), Side::Key),
        };
        parameters.extend(self.written(action, missing).map(|column| Parameter { column, side: Side::New }));
        parameters
    }

    /// Columns that a statement writes. A key that does not move is not written.
    fn written(&self, action: Action, missing: &MissingColumns) -> impl Iterator<Item = usize> {
        let keeps_key = action == Action::Update;
        let writes = matches!(action, Action::Insert | Action::Update | Action::UpdateKey);
        (0..if writes { self.columns.len() } else { 0 })
            .filter(move |column| !(keeps_key && self.key.contains(column)) && missing.binary_search(&(*column as u32)).is_err())
    }

    /// Whether a set statement can carry these parameters: rows without a key are found one by one, and there are no
    /// arrays of arrays.
    pub fn has_set_form(&self, action: Action, parameters: &[Parameter], encodings: &Encodings) -> bool {
        let found_by_key = action == Action::Insert || !self.key.is_empty();
        found_by_key && parameters.iter().zip(encodings).all(|(parameter, binary)| !(*binary && self.columns[parameter.column].is_array))
    }

    /// Whether binary values of a column mean the same on both servers.
    pub fn takes_binary(&self, column: usize) -> bool {
        !self.columns[column].is_reg
    }

    /// `COPY` into the table.
    pub fn copy(&self, binary: bool) -> String {
        copy_in(&self.name, self.columns.iter().map(|column| column.ident.as_str()), binary)
    }

    /// One row per execution, one parameter per value.
    pub fn row_statement(&self, action: Action, missing: &MissingColumns) -> String {
        let parameters = self.parameters(action, missing);
        let value = |number: usize| format!("${}::{}", number + 1, self.columns[parameters[number].column].cast);
        let name = &self.name;
        if action == Action::Insert {
            let values: Vec<String> = (0..parameters.len()).map(value).collect();
            return format!("INSERT INTO {name} ({}) OVERRIDING SYSTEM VALUE VALUES ({})", self.idents(&parameters), values.join(", "));
        }
        let finders = if self.key.is_empty() { self.columns.len() } else { self.key.len() };
        let condition = if self.key.is_empty() {
            self.one_row_like(&parameters[..finders], value)
        } else {
            let equal = (0..finders).map(|number| {
                let column = &self.columns[parameters[number].column];
                format!("t.{} {} {}", column.ident, column.operator, value(number))
            });
            equal.collect::<Vec<_>>().join(" AND ")
        };
        if action == Action::Delete {
            return format!("DELETE FROM {name} AS t WHERE {condition}");
        }
        let set = (finders..parameters.len()).map(|number| (parameters[number].column, value(number)));
        format!("UPDATE {name} AS t SET {} WHERE {condition}", self.assignments(set))
    }

    /// Many rows per execution, one array per column. Updates and deletes return an array with the numbers, from 1, of the
    /// rows that they have hit.
    pub fn set_statement(&self, action: Action, missing: &MissingColumns, encodings: &Encodings) -> String {
        let parameters = self.parameters(action, missing);
        let cast = |number: usize| &self.columns[parameters[number].column].cast;
        let value = |number: usize| match encodings[number] {
            true => format!("s.c{number}"),
            false => format!("s.c{number}::{}", cast(number)),
        };
        let arrays = (0..parameters.len()).map(|number| match encodings[number] {
            true => format!("${}::{}[]", number + 1, cast(number)),
            false => format!("${}::text[]", number + 1),
        });
        let arrays = arrays.collect::<Vec<_>>().join(", ");
        let aliases = (0..parameters.len()).map(|number| format!("c{number}")).collect::<Vec<_>>().join(", ");
        let name = &self.name;
        if action == Action::Insert {
            let values: Vec<String> = (0..parameters.len()).map(value).collect();
            return format!(
                "INSERT INTO {name} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM unnest({arrays}) AS s({aliases})",
                self.idents(&parameters),
                values.join(", ")
            );
        }
        let finders = self.key.len();
        let equal = (0..finders).map(|number| {
            let column = &self.columns[parameters[number].column];
            format!("t.{} {} {}", column.ident, column.operator, value(number))
        });
        let condition = equal.collect::<Vec<_>>().join(" AND ");
        let rows = format!("unnest({arrays}) WITH ORDINALITY AS s({aliases}, n)");
        let change = if action == Action::Delete {
            format!("DELETE FROM {name} AS t USING {rows} WHERE {condition}")
        } else {
            let set = (finders..parameters.len()).map(|number| (parameters[number].column, value(number)));
            format!("UPDATE {name} AS t SET {} FROM {rows} WHERE {condition}", self.assignments(set))
        };
        format!("WITH hit AS ({change} RETURNING s.n::int4 AS n) SELECT array_agg(n) FROM hit")
    }

    fn idents(&self, parameters: &[Parameter]) -> String {
        let idents = parameters.iter().map(|parameter| self.columns[parameter.column].ident.as_str());
        idents.collect::<Vec<_>>().join(", ")
    }

    /// `SET` list. Without anything to write the row is still touched, so that it is known to be there.
    fn assignments(&self, written: impl Iterator<Item = (usize, String)>) -> String {
        let list: Vec<String> = written.map(|(column, value)| format!("{} = {value}", self.columns[column].ident)).collect();
        if list.is_empty() {
            let ident = &self.columns[self.key.first().copied().unwrap_or(0)].ident;
            return format!("{ident} = t.{ident}");
        }
        list.join(", ")
    }

    /// One row that is like the old one, the most alike first: equality of some types takes different values for equal.
    fn one_row_like(&self, finders: &[Parameter], value: impl Fn(usize) -> String) -> String {
        let as_text = |number: usize| {
            let ident = &self.columns[finders[number].column].ident;
            format!("x.{ident}::text COLLATE \"C\" IS NOT DISTINCT FROM {}::text COLLATE \"C\"", value(number))
        };
        let alike = (0..finders.len()).map(|number| {
            let column = &self.columns[finders[number].column];
            match column.equality {
                Equality::Bytes | Equality::Loose => format!("x.{} IS NOT DISTINCT FROM {}", column.ident, value(number)),
                Equality::Text => as_text(number),
            }
        });
        let alike = alike.collect::<Vec<_>>().join(" AND ");
        let loose = (0..finders.len()).filter(|number| self.columns[finders[*number].column].equality == Equality::Loose);
        let identical = loose.map(|number| format!("({})", as_text(number))).collect::<Vec<_>>().join(" AND ");
        let order = if identical.is_empty() { String::new() } else { format!(" ORDER BY {identical} DESC") };
        let (ours, theirs) = if self.partitioned { ("(t.tableoid, t.ctid)", "x.tableoid, x.ctid") } else { ("t.ctid", "x.ctid") };
        format!("{ours} = (SELECT {theirs} FROM {} AS x WHERE {alike}{order} LIMIT 1)", self.name)
    }
}

/// Columns that name a row: the identity's, or with the whole old row at hand the primary key's.
fn key_columns(table: &MappedTable) -> Vec<usize> {
    let columns = &table.version.columns;
    match table.version.identity {
        Identity::Key => (0..columns.len()).filter(|&column| columns[column].key).collect(),
        Identity::Full => {
            let position = |name: &String| columns.iter().position(|column| column.name == *name);
            let key: Option<Vec<usize>> = table.primary_key.iter().map(position).collect();
            key.unwrap_or_default()
        }
    }
}

/// Types whose binary form is an OID (manual: "Object Identifier Types"), and their arrays.
fn is_reg(name: &QualifiedName) -> bool {
    name.schema == "pg_catalog" && name.name.trim_start_matches('_').starts_with("reg")
}

/// `COPY` of these quoted columns into a quoted table.
pub(super) fn copy_in<'a>(table: &str, columns: impl Iterator<Item = &'a str>, binary: bool) -> String {
    let format = if binary { "binary" } else { "text" };
    format!("COPY {table} ({}) FROM STDIN (FORMAT {format})", columns.collect::<Vec<_>>().join(", "))
}

/// `TRUNCATE` of several tables at once; never CASCADE.
pub(super) fn truncate<'a>(tables: impl Iterator<Item = &'a str>) -> String {
    format!("TRUNCATE {}", tables.collect::<Vec<_>>().join(", "))
}
