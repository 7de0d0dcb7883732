//! What a table has besides its columns and rows, in the words of the source's catalog. A target of the same kind makes it
//! after the rows; another kind takes what it understands.

use super::table::QualifiedName;

/// All of one table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Structure {
    /// Actions of `ALTER TABLE` that say how rows are stored: they come before the rows.
    pub storage: Vec<String>,
    /// Sequences that fill columns.
    pub sequences: Vec<Sequence>,
    /// Defaults of columns.
    pub defaults: Vec<ColumnDefault>,
    /// Indexes, those of constraints included.
    pub indexes: Vec<Index>,
    /// CHECK constraints.
    pub checks: Vec<Check>,
    /// Foreign keys of the table.
    pub foreign_keys: Vec<ForeignKey>,
    /// Comments on the table (`None`) and its columns.
    pub comments: Vec<(Option<String>, String)>,
    /// What columns, defaults and checks use and the target must have.
    pub needs: Vec<Need>,
}

/// How a sequence belongs to its column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SequenceRole {
    /// `GENERATED … AS IDENTITY`.
    Identity,
    /// Owned by the column, as `serial` does.
    Owned,
    /// Used by the column's default; other tables may use it too.
    Free,
}

/// A sequence that fills a column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// The source's number for it.
    pub id: u32,
    /// Name in the source.
    pub name: QualifiedName,
    /// The column.
    pub column: String,
    /// How it belongs to it.
    pub role: SequenceRole,
    /// How defaults refer to it: a literal.
    pub reference: String,
    /// Type, without which identity columns are declared.
    pub type_name: String,
    /// `INCREMENT BY … START WITH …` and so on.
    pub options: String,
    /// It counts up.
    pub ascending: bool,
    /// Comment.
    pub comment: Option<String>,
}

/// How far a sequence is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceValue {
    /// [`Sequence::id`].
    pub id: u32,
    /// Last value and whether it was given out; `None` where the role may not look.
    pub last: Option<(i64, bool)>,
}

/// The default of a column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ColumnDefault {
    /// Column.
    pub column: String,
    /// Expression.
    pub expression: String,
}

/// What an index is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IndexRole {
    /// Nothing but itself.
    Plain,
    /// A primary key or unique constraint: the index is built first and then made one; with words on deferral.
    Key {
        /// A primary key.
        primary: bool,
        /// `DEFERRABLE INITIALLY DEFERRED` and the like; empty for none.
        deferral: String,
    },
    /// A constraint that can only be made with its index: the constraint's definition.
    Constraint(String),
}

/// An index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    /// Name, and that of its constraint.
    pub name: String,
    /// Unique.
    pub unique: bool,
    /// What follows `CREATE INDEX … ON …`.
    pub definition: String,
    /// What it is for.
    pub role: IndexRole,
    /// Comment on it.
    pub comment: Option<String>,
    /// Comment on its constraint.
    pub constraint_comment: Option<String>,
    /// What it uses and the target must have.
    pub needs: Vec<Need>,
}

/// A CHECK constraint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// Name.
    pub name: String,
    /// `CHECK (…)`.
    pub definition: String,
    /// Comment.
    pub comment: Option<String>,
}

/// A foreign key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignKey {
    /// Name.
    pub name: String,
    /// Table that it refers to, in the source.
    pub references: QualifiedName,
    /// What comes before that table: `FOREIGN KEY (…) REFERENCES`.
    pub before: String,
    /// What comes after it: columns, actions, deferral.
    pub after: String,
    /// It was checked for the rows that were there.
    pub valid: bool,
    /// Comment.
    pub comment: Option<String>,
}

/// Something that definitions use.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Need {
    /// Kind of object, in the words of the catalog.
    pub kind: String,
    /// Its name, part by part.
    pub names: Vec<String>,
    /// Types of its arguments, where they belong to its name.
    pub arguments: Vec<String>,
    /// Its schema, where it has one.
    pub schema: Option<String>,
    /// Extension that it comes with.
    pub extension: Option<String>,
    /// The statement that makes it, or its extension.
    pub cure: String,
}
