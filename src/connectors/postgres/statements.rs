//! SQL texts that write mirrored rows, and what they need to know of a target table. Pure.
//!
//! Two shapes: a *row* statement has one parameter per value, a *set* statement one array per column. In a set, columns
//! that the source sends as text come as `text[]` and are cast, without a type modifier, so that a value that is too long
//! fails and is never cut; binary ones come as arrays of the column's type. Arrays of arrays would be flattened: all binary
//! columns that are arrays come together in one array of the table's row type, which the server knows for every table.
//! Updates and deletes of sets say which of their rows they have hit, so that a missing row can be named. A column that only
//! some rows of a set have a value for has a second array that says which rows keep what is there.

use super::ddl::{Equality, TargetTable, narrower};
use super::sql::{qualified, quote_ident};
use crate::engine::batch::Cell;
use crate::engine::coalesce::{Action, ColumnSet, Images, Order, Row, TableRule};
use crate::engine::error::{Error, Result, reason};
use crate::engine::roles::ApplyMode;
use crate::engine::table::{MappedTable, QualifiedName, TableVersion};
use std::sync::Arc;

/// Which image a parameter's values come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// The old row.
    Old,
    /// The new row.
    New,
    /// The new row where it has a value, else NULL.
    NewOrKept,
    /// Whether the new row has no value, as a boolean.
    Kept,
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
    /// Its cell in a row.
    pub fn cell(self, images: &Images<'_>, row: Row) -> Cell {
        let image = match self.side {
            Side::New | Side::NewOrKept | Side::Kept => row.new,
            Side::Key if !row.old.is_present() => row.new,
            Side::Old | Side::Key => row.old,
        };
        images.cells(image)[self.column]
    }

    /// Bytes that its value takes.
    pub fn size(self, images: &Images<'_>, row: Row) -> usize {
        const LENGTH: usize = 4;
        LENGTH + if self.side == Side::Kept { 1 } else { images.bytes(self.cell(images, row)).len() }
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
    /// Place in the table's row type.
    place: usize,
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
    /// A row may be deleted and inserted anew.
    rewrites: bool,
    /// Positions of the columns that other unique indexes and exclusion constraints look at.
    guarded: Vec<usize>,
    /// Quoted names of the target's columns that are not mirrored and can be written.
    others: Vec<String>,
    /// The unique index on the key.
    pub key_index: Option<String>,
    /// Foreign key actions that fire may have taken rows before the source's own deletes of them come.
    pub loses_rows: bool,
    /// Columns that do not take every value, for people.
    pub narrower: Vec<String>,
    /// Quoted.
    name: String,
    columns: Vec<WriterColumn>,
    partitioned: bool,
    /// Columns of the table's row type.
    row_columns: usize,
    /// Rows with only some columns can be sent as the table's row type.
    sends_rows: bool,
}

impl TableWriter {
    /// From what the source has and the target is.
    ///
    /// # Errors
    /// `TargetTableIncompatible` when the target lacks a column.
    pub fn new(table: &MappedTable, present: &TargetTable, mode: ApplyMode, triggers_accepted: bool) -> Result<Self> {
        let version = &table.version;
        let key = table.key_columns();
        let mut columns = Vec::with_capacity(version.columns.len());
        for column in &version.columns {
            let Some(place) = present.columns.iter().position(|target| target.name == column.name) else {
                return Err(Error::stop(
                    reason::TARGET_TABLE_INCOMPATIBLE,
                    format!("target table {} has no column {}", table.target, column.name),
                ));
            };
            let target = &present.columns[place];
            columns.push(WriterColumn {
                name: column.name.clone(),
                ident: quote_ident(&column.name),
                cast: qualified(&target.type_name),
                is_array: target.is_array,
                place,
                is_reg: is_reg(&target.type_name),
                equality: target.equality,
                operator: target.operator.clone(),
            });
        }
        let key_names = key_names(table);
        let fires = match mode {
            ApplyMode::Replica => !present.always_triggers.is_empty(),
            ApplyMode::Ordered => present.has_foreign_keys || !present.triggers.is_empty(),
        };
        let by_bytes = key.iter().all(|&column| columns[column].equality == Equality::Bytes);
        let sends_rows = sends_rows(present, columns.len());
        // Without replica role a row is never deleted to be inserted anew.
        let rewrites = mode == ApplyMode::Replica && (sends_rows || !columns.iter().any(|column| column.is_array));
        let restricted = present.restricts_more_than(&key_names);
        let order = if fires {
            Order::All
        } else if key.is_empty() || !by_bytes || (restricted && !rewrites) {
            Order::Table
        } else if restricted {
            Order::Guarded
        } else {
            Order::Key
        };
        let guarded = present.guarded_besides(&key_names);
        let mirrored = |name: &str| version.columns.iter().any(|column| column.name == name);
        let others = present.columns.iter().filter(|column| !column.generated && !mirrored(&column.name));
        Ok(Self {
            version: Arc::clone(version),
            target: table.target.clone(),
            order,
            rewrites,
            guarded: (0..columns.len()).filter(|&column| guarded.contains(&version.columns[column].name.as_str())).collect(),
            others: others.map(|column| quote_ident(&column.name)).collect(),
            key_index: present.key_index(&key_names).map(|index| index.name.clone()),
            loses_rows: mode == ApplyMode::Ordered && triggers_accepted && present.loses_rows,
            narrower: narrower(table, present),
            name: qualified(&table.target),
            columns,
            partitioned: present.partitioned,
            row_columns: present.columns.len(),
            sends_rows,
            key,
        })
    }

    /// What a plan must know of the table.
    pub fn rule(&self) -> TableRule<'_> {
        TableRule { key: &self.key, order: self.order, rewrites: self.rewrites }
    }

    /// Quoted name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Names of the key columns, for people.
    pub fn key_names(&self) -> impl Iterator<Item = &str> {
        self.key.iter().map(|&column| self.columns[column].name.as_str())
    }

    /// Parameters of a statement, in order: first what finds the row, then what is written, then what is kept.
    pub fn parameters(&self, action: Action, columns: &ColumnSet) -> Vec<Parameter> {
        let finds = |columns: &mut dyn Iterator<Item = usize>, side| columns.map(|column| Parameter { column, side }).collect::<Vec<_>>();
        let mut parameters = match action {
            Action::Insert => Vec::new(),
            _ if self.key.is_empty() => finds(&mut (0..self.columns.len()), Side::Old),
            Action::Update | Action::UpdateKey | Action::Rewrite | Action::Delete => finds(&mut self.key.iter().copied(), Side::Key),
        };
        let some = |column: usize| columns.some.binary_search(&(column as u32)).is_ok();
        let side = |column| if some(column) { Side::NewOrKept } else { Side::New };
        parameters.extend(self.written(action, columns).map(|column| Parameter { column, side: side(column) }));
        parameters
            .extend(self.written(action, columns).filter(|column| some(*column)).map(|column| Parameter { column, side: Side::Kept }));
        parameters
    }

    /// Columns that a statement writes. A key that does not move is not written.
    fn written(&self, action: Action, columns: &ColumnSet) -> impl Iterator<Item = usize> {
        let keeps_key = action == Action::Update;
        let count = if action == Action::Delete { 0 } else { self.columns.len() };
        (0..count)
            .filter(move |column| !(keeps_key && self.key.contains(column)) && columns.never.binary_search(&(*column as u32)).is_err())
    }

    /// Whether a set statement can carry these parameters: rows without a key are found one by one, and a row has room for
    /// one value of a column.
    pub fn has_set_form(&self, action: Action, parameters: &[Parameter], encodings: &Encodings) -> bool {
        let found_by_key = action == Action::Insert || !self.key.is_empty();
        let mut in_rows: Vec<usize> = self.in_rows(parameters, encodings).map(|number| parameters[number].column).collect();
        in_rows.sort_unstable();
        let twice = in_rows.windows(2).any(|pair| pair[0] == pair[1]);
        found_by_key && (in_rows.is_empty() || (self.sends_rows && !twice))
    }

    /// Numbers of the parameters that come in rows of the table's type.
    pub fn in_rows<'a>(&'a self, parameters: &'a [Parameter], encodings: &'a Encodings) -> impl Iterator<Item = usize> + 'a {
        let in_rows = |number: &usize| encodings[*number] && self.is_array(parameters[*number]);
        (0..parameters.len()).filter(in_rows)
    }

    fn is_array(&self, parameter: Parameter) -> bool {
        self.columns[parameter.column].is_array && parameter.side != Side::Kept
    }

    /// It has columns that are arrays.
    pub fn has_arrays(&self) -> bool {
        self.columns.iter().any(|column| column.is_array)
    }

    /// Place of a column in the table's row type.
    pub fn place(&self, column: usize) -> usize {
        self.columns[column].place
    }

    /// Bytes that a row of the table's type takes besides its values, should these parameters need one.
    pub fn row_overhead(&self, parameters: &[Parameter]) -> usize {
        let needed = self.sends_rows && parameters.iter().any(|parameter| self.is_array(*parameter));
        if needed { ROW_HEADER + self.row_columns * ROW_FIELD } else { 0 }
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
    pub fn row_statement(&self, action: Action, columns: &ColumnSet) -> String {
        let parameters = self.parameters(action, columns);
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

    /// Many rows per execution, one array per column. All but inserts return an array with the numbers, from 1, of the
    /// rows that they have hit.
    pub fn set_statement(&self, action: Action, columns: &ColumnSet, encodings: &Encodings) -> String {
        let set = SetTexts::new(self, action, columns, encodings);
        let (name, arrays, aliases) = (&self.name, set.arrays.join(", "), set.aliases.join(", "));
        if action == Action::Insert {
            let values: Vec<&str> = set.written.iter().map(|(_, value)| value.as_str()).collect();
            return format!(
                "INSERT INTO {name} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM unnest({arrays}) AS s({aliases})",
                self.idents(&set.parameters),
                values.join(", ")
            );
        }
        let rows = format!("unnest({arrays}) WITH ORDINALITY AS s({aliases}, n)");
        let found = &set.found;
        let change = match action {
            Action::Delete => format!("DELETE FROM {name} AS t USING {rows} WHERE {found}"),
            Action::Rewrite => return self.rewrite(&set, &rows),
            _ => format!("UPDATE {name} AS t SET {} FROM {rows} WHERE {found}", self.assignments(set.written.into_iter())),
        };
        format!("WITH hit AS ({change} RETURNING s.n::int4 AS n) SELECT array_agg(n) FROM hit")
    }

    /// One statement in which rows whose key or guarded columns change are deleted and inserted anew, and the others
    /// are updated in place. All parts of a statement see the table as it was before, so that each row is in
    /// exactly one of the two. Parts of a `WITH` run side by side (manual: "Data-Modifying Statements in WITH"); what is
    /// sorted is complete before its first row comes out, so that no row is inserted before the last one is deleted.
    /// Columns that are not mirrored are carried over.
    fn rewrite(&self, set: &SetTexts, rows: &str) -> String {
        let name = &self.name;
        let found = &set.found;
        let ident = |column: usize| &self.columns[column].ident;
        let written =
            |wanted: &dyn Fn(usize) -> bool| set.written.iter().filter(|(column, _)| wanted(*column)).cloned().collect::<Vec<_>>();
        let decides = |column: usize| self.key.contains(&column) || self.guarded.contains(&column);
        let (theirs, ours): (Vec<String>, Vec<String>) =
            written(&decides).into_iter().map(|(column, value)| (format!("t.{}", ident(column)), value)).unzip();
        // Compares bytes, so that nothing that an index could see goes unnoticed.
        let moves = format!("pg_catalog.record_image_ne(ROW({}), ROW({}))", theirs.join(", "), ours.join(", "));

        let value = |column: usize| set.written.iter().find(|(written, _)| *written == column).map(|(_, value)| value.clone());
        let mirrored = (0..self.columns.len()).map(|column| (ident(column), value(column)));
        let all: Vec<(&String, Option<String>)> = mirrored.chain(self.others.iter().map(|ident| (ident, None))).collect();
        let returned = all.iter().zip(0..).map(|((ident, value), number)| match value {
            Some(value) => format!("{value} AS v{number}"),
            None => format!("t.{ident} AS v{number}"),
        });
        let returned = returned.collect::<Vec<_>>().join(", ");
        let idents = all.iter().map(|(ident, _)| ident.as_str()).collect::<Vec<_>>().join(", ");
        let values = (0..all.len()).map(|number| format!("v{number}")).collect::<Vec<_>>().join(", ");
        let staying = written(&|column| !decides(column));
        let stays = if staying.is_empty() {
            format!("SELECT s.n::int4 AS n FROM {name} AS t, s WHERE {found} AND NOT {moves}")
        } else {
            let set = self.assignments(staying.into_iter());
            format!("UPDATE {name} AS t SET {set} FROM s WHERE {found} AND NOT {moves} RETURNING s.n::int4 AS n")
        };
        format!(
            "WITH s AS MATERIALIZED (SELECT * FROM {rows}), \
             stays AS ({stays}), \
             goes AS (DELETE FROM {name} AS t USING s WHERE {found} AND {moves} RETURNING s.n::int4 AS n, {returned}), \
             comes AS (INSERT INTO {name} ({idents}) OVERRIDING SYSTEM VALUE SELECT {values} FROM goes ORDER BY n) \
             SELECT array_agg(n) FROM (SELECT n FROM stays UNION ALL SELECT n FROM goes) AS hit"
        )
    }

    fn idents(&self, parameters: &[Parameter]) -> String {
        let idents = parameters.iter().map(|parameter| self.columns[parameter.column].ident.as_str());
        idents.collect::<Vec<_>>().join(", ")
    }

    /// `SET` list. Without anything to write the row is still touched, so that it is known to be there.
    fn assignments(&self, written: impl Iterator<Item = (usize, String)>) -> String {
        let list: Vec<String> = written.map(|(column, value)| format!("{} = {value}", self.columns[column].ident)).collect();
        if list.is_empty() {
            // Rather not the key's, which may be an identity column.
            let column = (0..self.columns.len()).find(|column| !self.key.contains(column)).unwrap_or(0);
            let ident = &self.columns[column].ident;
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

/// Pieces of a set statement; its rows are called `s`, the target's `t`.
struct SetTexts {
    parameters: Vec<Parameter>,
    /// The arrays, as arguments of `unnest`; that of rows is the last.
    arrays: Vec<String>,
    /// Their columns' names; rows come as all of their columns.
    aliases: Vec<String>,
    /// The condition that finds a row by its key.
    found: String,
    /// What is written: column and value.
    written: Vec<(usize, String)>,
}

impl SetTexts {
    fn new(writer: &TableWriter, action: Action, columns: &ColumnSet, encodings: &Encodings) -> Self {
        let parameters = writer.parameters(action, columns);
        let column = |number: usize| &writer.columns[parameters[number].column];
        let in_rows: Vec<usize> = writer.in_rows(&parameters, encodings).collect();
        let value = |number: usize| match encodings[number] {
            true if in_rows.contains(&number) => format!("s.r{}", column(number).place),
            true => format!("s.c{number}"),
            false => format!("s.c{number}::{}", column(number).cast),
        };
        let (mut arrays, mut aliases) = (Vec::new(), Vec::new());
        for number in (0..parameters.len()).filter(|number| !in_rows.contains(number)) {
            let element = match (parameters[number].side, encodings[number]) {
                (Side::Kept, _) => "bool",
                (_, true) => column(number).cast.as_str(),
                (_, false) => "text",
            };
            arrays.push(format!("${}::{element}[]", arrays.len() + 1));
            aliases.push(format!("c{number}"));
        }
        if !in_rows.is_empty() {
            arrays.push(format!("${}::{}[]", arrays.len() + 1, writer.name));
            aliases.extend((0..writer.row_columns).map(|place| format!("r{place}")));
        }
        let finders = if action == Action::Insert { 0 } else { writer.key.len() };
        let equal = (0..finders).map(|number| format!("t.{} {} {}", column(number).ident, column(number).operator, value(number)));
        let found = equal.collect::<Vec<_>>().join(" AND ");
        let kept_by = |wanted: usize| parameters.iter().position(|kept| kept.side == Side::Kept && kept.column == wanted);
        let written = (finders..parameters.len()).filter(|&number| parameters[number].side != Side::Kept).map(|number| {
            let place = parameters[number].column;
            let written = match kept_by(place) {
                Some(kept) => format!("CASE WHEN s.c{kept} THEN t.{} ELSE {} END", column(number).ident, value(number)),
                None => value(number),
            };
            (place, written)
        });
        Self { arrays, aliases, found, written: written.collect(), parameters }
    }
}

/// Bytes of a binary row before its fields: its own length and the number of fields (PostgreSQL: `record_recv`).
const ROW_HEADER: usize = 8;
/// Bytes of each field before its value: type and length.
const ROW_FIELD: usize = 8;
/// Columns that a `FROM` may have (PostgreSQL: `MaxTupleAttributeNumber` is 1664); those of sets are the row type's, an array per
/// column and twice as many at most, and a number.
const MOST_COLUMNS: usize = 1600;

/// Whether rows of the table's type can stand for some of its columns. A domain may refuse the NULLs of the others. Where most
/// columns of the table are not mirrored, rows would be mostly of those.
fn sends_rows(present: &TargetTable, mirrored: usize) -> bool {
    let columns = present.columns.len();
    !present.columns.iter().any(|column| column.is_domain) && columns <= 2 * mirrored && columns + 3 * mirrored < MOST_COLUMNS
}

/// Names of the columns that name a row; empty: the whole old row does.
pub(super) fn key_names(table: &MappedTable) -> Vec<&str> {
    table.key_columns().into_iter().map(|column| table.version.columns[column].name.as_str()).collect()
}

/// Whether a column is one of those that name a row.
pub(super) fn names_rows(table: &MappedTable, column: usize) -> bool {
    let key = table.key_columns();
    key.is_empty() || key.contains(&column)
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
