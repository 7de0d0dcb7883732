//! Tables as of a position.

use super::structure::Structure;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

/// Schema and name, unquoted.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QualifiedName {
    /// Schema.
    pub schema: String,
    /// Name in the schema.
    pub name: String,
}

impl QualifiedName {
    /// Both parts.
    pub fn new(schema: impl Into<String>, name: impl Into<String>) -> Self {
        Self { schema: schema.into(), name: name.into() }
    }
}

impl fmt::Display for QualifiedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

/// How a source names the row that an update or delete is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// By the columns marked as key (a primary key or a chosen unique index).
    Key,
    /// By all columns of the old row.
    Full,
}

/// One column of a table version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Name.
    pub name: String,
    /// The source's number for the column in its table, the same for all its life and never given again (PostgreSQL: `attnum`); 0
    /// when it is not known.
    pub number: i32,
    /// The source's number for the type (PostgreSQL: OID).
    pub type_id: u32,
    /// Length, precision and the like of the type in the source's words (PostgreSQL: `atttypmod`, −1 for none).
    pub modifier: i32,
    /// The type's schema and name in the source's catalog, for example `pg_catalog.int4`.
    pub type_name: QualifiedName,
    /// The type as declared, with its modifier, for example `numeric(12,2)`; schema-qualified where needed.
    pub declared: String,
    /// Part of the replica identity.
    pub key: bool,
    /// May hold no NULL.
    pub not_null: bool,
    /// Computed by the database: neither copied nor streamed; the expression in the source's words.
    pub generated: Option<String>,
    /// Collation, when it is not the type's default.
    pub collation: Option<QualifiedName>,
}

/// One table's columns as of a position. Immutable and shared; a schema change makes a new one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableVersion {
    /// The source's number for the table (PostgreSQL: OID), as rows of the stream carry it.
    pub id: u32,
    /// Name in the source.
    pub name: QualifiedName,
    /// Columns that are copied and streamed, in the source's order, without the excluded and generated ones.
    pub columns: Vec<Column>,
    /// How rows are named.
    pub identity: Identity,
    /// How it differs from the version that is mapped; rows under such a version can be skipped but not written.
    pub differs: Option<String>,
}

/// What tells one state of a source's table from another besides its columns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lineage {
    /// The source's number for the primary key that names rows at any moment (PostgreSQL: the constraint's OID): one that was dropped
    /// and made again has another.
    pub key: Option<u32>,
    /// The files that the rows are in: others when the table was rewritten.
    pub storage: String,
    /// This is what the target holds, and the source's table has been altered since: what comes first in the log decides.
    pub behind: bool,
}

/// One mapped table: what the source has, where it goes, what it takes to make it there.
#[derive(Clone, Debug)]
pub struct MappedTable {
    /// As read from the catalog at set-up.
    pub version: Arc<TableVersion>,
    /// Name in the target.
    pub target: QualifiedName,
    /// Columns that the database computes, not in `version`.
    pub generated: Vec<Column>,
    /// Columns that never leave the source.
    pub excluded: Vec<String>,
    /// Columns of the target may have narrower type modifiers.
    pub accept_narrower_types: bool,
    /// Columns of the primary key, in key order; empty without one that names rows at any moment.
    pub primary_key: Vec<String>,
    /// Name of the primary key's constraint.
    pub primary_key_name: Option<String>,
    /// Rows by the planner's statistics, for planning and progress.
    pub estimated_rows: u64,
    /// Size of the heap in the source's blocks, from the file and not from statistics; 0 for a partitioned table's root.
    pub blocks: u64,
    /// What a table that is made on the target gets besides its columns.
    pub structure: Arc<Structure>,
    /// Which state of the source's table this is.
    pub lineage: Lineage,
}

/// A table that was altered on the source: what the target must be made to be, and hold.
#[derive(Clone, Debug)]
pub struct Altered {
    /// As its rows come from now on.
    pub table: MappedTable,
    /// What the rows that are there hold in columns that have come, by number, in the source's text format; NULL when absent.
    pub initial: HashMap<i32, String>,
    /// Whether rows are named by the primary key is not known yet: the target keeps the one that it has.
    pub key_in_doubt: bool,
}

impl MappedTable {
    /// Places of the columns that name a row: the identity's, or with the whole old row at hand the primary key's. Empty: nothing less
    /// than the row does.
    #[must_use]
    pub fn key_columns(&self) -> Vec<usize> {
        let columns = &self.version.columns;
        match self.version.identity {
            Identity::Key => (0..columns.len()).filter(|&column| columns[column].key).collect(),
            Identity::Full => {
                let position = |name: &String| columns.iter().position(|column| column.name == *name);
                let key: Option<Vec<usize>> = self.primary_key.iter().map(position).collect();
                key.unwrap_or_default()
            }
        }
    }

    /// Name in the source.
    #[must_use]
    pub fn source(&self) -> &QualifiedName {
        &self.version.name
    }
}

/// How far one table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TableState {
    /// Known, nothing done.
    Init,
    /// Its ranges are being copied.
    Copying,
    /// All ranges are there, keys are being built.
    Copied,
    /// Right up to its own position; the stream has not reached it yet.
    CatchingUp,
    /// Right up to the stream's checkpoint.
    Ready,
    /// Stopped; the reason is beside it.
    Error,
}

impl TableState {
    /// All, in the order of a table's life.
    pub const ALL: [Self; 6] = [Self::Init, Self::Copying, Self::Copied, Self::CatchingUp, Self::Ready, Self::Error];

    /// The word in status, checkpoint and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Init => "Init",
            Self::Copying => "Copying",
            Self::Copied => "Copied",
            Self::CatchingUp => "CatchingUp",
            Self::Ready => "Ready",
            Self::Error => "Error",
        }
    }

    /// The state of that word.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == word)
    }
}
