//! What a target table is: columns, unique indexes, foreign keys, triggers.

use super::super::connect::Session;
use super::super::sql::quote_ident;
use super::super::target::failed;
use crate::engine::error::{Error, Result, reason};
use crate::engine::table::QualifiedName;
use tokio_postgres::Row;

/// How two values of a type are found equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Equality {
    /// Equal if and only if their bytes are.
    Bytes,
    /// The type's own equality takes different values for equal (numeric `1.0` and `1.00`, float `0` and `-0`).
    Loose,
    /// No equality that can be relied on; the text form is compared.
    Text,
}

/// One column of a target table.
#[derive(Clone, Debug)]
pub(in super::super) struct TargetColumn {
    pub name: String,
    pub type_name: QualifiedName,
    /// As declared, with its modifier.
    pub declared: String,
    pub not_null: bool,
    pub has_default: bool,
    pub generated: bool,
    /// `GENERATED ALWAYS AS IDENTITY`: an update may not name it.
    pub always_identity: bool,
    /// The type belongs to an extension, whose schema may differ between servers.
    pub from_extension: bool,
    pub is_array: bool,
    /// The type is a domain.
    pub is_domain: bool,
    pub equality: Equality,
    /// The equality operator, for types whose operators are not in `pg_catalog`.
    pub operator: String,
}

/// A unique index or exclusion constraint.
#[derive(Clone, Debug)]
pub(in super::super) struct UniqueIndex {
    pub name: String,
    /// Key columns, in order; expressions are not among them.
    pub columns: Vec<String>,
    /// All columns that it looks at, those of its expressions, its predicate and of generated columns included.
    pub reads: Vec<String>,
    pub primary: bool,
    /// Over plain columns of all rows, and usable.
    pub plain: bool,
    /// Rows that differ in one of `columns` are never in each other's way.
    pub by_bytes: bool,
}

/// A table that is there.
#[derive(Clone, Debug)]
pub(in super::super) struct TargetTable {
    pub partitioned: bool,
    pub columns: Vec<TargetColumn>,
    pub unique: Vec<UniqueIndex>,
    /// User triggers that fire without replica role.
    pub triggers: Vec<String>,
    /// User triggers that fire with replica role too.
    pub always_triggers: Vec<String>,
    /// Foreign keys of other tables whose actions change those.
    pub cascades: Vec<String>,
    /// A foreign key of the table deletes its rows with those that they refer to.
    pub loses_rows: bool,
    /// A foreign key points from or to the table.
    pub has_foreign_keys: bool,
}

impl TargetTable {
    /// A column by name.
    pub fn column(&self, name: &str) -> Option<&TargetColumn> {
        self.columns.iter().find(|column| column.name == name)
    }

    /// Whether a unique index has exactly these columns, in any order.
    pub fn has_unique_index_on(&self, key: &[&str]) -> bool {
        self.key_index(key).is_some()
    }

    /// The unique index with exactly these columns, in any order.
    pub fn key_index(&self, key: &[&str]) -> Option<&UniqueIndex> {
        self.unique.iter().find(|index| {
            index.plain && index.columns.len() == key.len() && key.iter().all(|column| index.columns.iter().any(|c| c == column))
        })
    }

    /// Whether there is a primary key.
    pub fn has_primary_key(&self) -> bool {
        self.unique.iter().any(|index| index.primary)
    }

    /// Whether rows with different keys can still be in each other's way.
    pub fn restricts_more_than(&self, key: &[&str]) -> bool {
        self.restricting(key).next().is_some()
    }

    /// Columns besides the key that decide whether rows with different keys are in each other's way.
    pub fn guarded_besides(&self, key: &[&str]) -> Vec<&str> {
        let read = self.restricting(key).flat_map(|index| &index.reads).map(String::as_str);
        read.filter(|column| !key.contains(column)).collect()
    }

    fn restricting(&self, key: &[&str]) -> impl Iterator<Item = &UniqueIndex> {
        // Where the whole key is in the index, two rows are equal there only if they have the same key.
        let implied = |index: &&UniqueIndex| index.by_bytes && key.iter().all(|column| index.columns.iter().any(|c| c == column));
        self.unique.iter().filter(move |index| key.is_empty() || !implied(index))
    }
}

/// Built-in types whose output is the same if and only if they are equal.
const EQUAL_BY_BYTES: [&str; 24] = [
    "bool",
    "int2",
    "int4",
    "int8",
    "oid",
    "xid8",
    "text",
    "varchar",
    "name",
    "char",
    "bytea",
    "uuid",
    "date",
    "time",
    "timestamp",
    "timestamptz",
    "inet",
    "cidr",
    "macaddr",
    "macaddr8",
    "bit",
    "varbit",
    "pg_lsn",
    "money",
];
/// Built-in types with an equality wider than that of bytes.
const EQUAL_LOOSELY: [&str; 6] = ["numeric", "float4", "float8", "bpchar", "interval", "timetz"];

fn equality(base: &QualifiedName, kind: &str, deterministic: bool) -> Equality {
    let built_in = base.schema == "pg_catalog";
    match kind {
        "e" => Equality::Bytes,
        "b" if built_in && EQUAL_BY_BYTES.contains(&base.name.as_str()) && deterministic => Equality::Bytes,
        "b" if built_in && EQUAL_BY_BYTES.contains(&base.name.as_str()) => Equality::Loose,
        "b" if built_in && EQUAL_LOOSELY.contains(&base.name.as_str()) => Equality::Loose,
        _ => Equality::Text,
    }
}

/// The table that the parameters name.
const TABLE: &str = "(SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2)";

/// It and all its partitions: what only a partition has restricts and fires too.
fn partitions() -> String {
    format!("(SELECT {TABLE} UNION SELECT relid::oid FROM pg_partition_tree({TABLE}::regclass))")
}

/// Reads what a table is; `None` when there is none of that name.
///
/// # Errors
/// `TargetTableIncompatible` when the name stands for something that is no table.
pub(in super::super) async fn describe(client: &Session, name: &QualifiedName) -> Result<Option<TargetTable>> {
    let found = async {
        let found = client
            .query_opt(
                "SELECT c.relkind::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2",
                &[&name.schema, &name.name],
            )
            .await;
        found.map_err(failed("look for the target table"))
    };
    // Polled together: one round trip for all.
    let (found, columns, unique, (triggers, always_triggers), foreign_keys) = futures::future::try_join5(
        found,
        columns(client, name),
        unique_indexes(client, name),
        triggers(client, name),
        foreign_keys(client, name),
    )
    .await?;
    let Some(row) = found else { return Ok(None) };
    let kind: &str = row.get(0);
    if !matches!(kind, "r" | "p") {
        return Err(Error::stop(
            reason::TARGET_TABLE_INCOMPATIBLE,
            format!("{name} on the target is not a table; rename it, or map to another name"),
        ));
    }
    Ok(Some(TargetTable {
        partitioned: kind == "p",
        columns,
        unique,
        triggers,
        always_triggers,
        has_foreign_keys: !foreign_keys.is_empty(),
        cascades: foreign_keys.iter().filter(|row| row.get(1)).map(|row| row.get(0)).collect(),
        loses_rows: foreign_keys.iter().any(|row| row.get(2)),
    }))
}

async fn columns(client: &Session, name: &QualifiedName) -> Result<Vec<TargetColumn>> {
    let sql = format!(
        "WITH RECURSIVE bases(oid, base) AS (
               SELECT t.oid, t.oid FROM pg_type t JOIN pg_attribute a ON a.atttypid = t.oid WHERE a.attrelid = {TABLE}
               UNION SELECT b.oid, t.typbasetype FROM bases b JOIN pg_type t ON t.oid = b.base WHERE t.typtype = 'd')
             SELECT a.attname, tn.nspname, t.typname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.atthasdef OR a.attidentity <> '',
                    a.attgenerated <> '', a.attidentity = 'a', bn.nspname, b.typname, b.typtype::text,
                    coalesce(co.collisdeterministic, true),
                    EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_type'::regclass AND d.objid = t.oid AND d.deptype = 'e'),
                    b.typcategory = 'A', b.oid <> t.oid,
                    (SELECT opn.nspname FROM pg_opclass oc JOIN pg_am am ON am.oid = oc.opcmethod AND am.amname = 'btree'
                       JOIN pg_amop ao ON ao.amopfamily = oc.opcfamily AND ao.amopstrategy = 3
                         AND ao.amoplefttype = oc.opcintype AND ao.amoprighttype = oc.opcintype
                       JOIN pg_operator o ON o.oid = ao.amopopr JOIN pg_namespace opn ON opn.oid = o.oprnamespace
                     WHERE oc.opcdefault AND oc.opcintype = b.oid)
             FROM pg_attribute a
             JOIN pg_type t ON t.oid = a.atttypid JOIN pg_namespace tn ON tn.oid = t.typnamespace
             JOIN bases ON bases.oid = t.oid JOIN pg_type b ON b.oid = bases.base AND b.typtype <> 'd' JOIN pg_namespace bn ON bn.oid = b.typnamespace
             LEFT JOIN pg_collation co ON co.oid = a.attcollation
             WHERE a.attrelid = {TABLE} AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum"
    );
    let rows = client.query(&sql, &[&name.schema, &name.name]).await.map_err(failed("read the target table"))?;
    Ok(rows
        .iter()
        .map(|row| {
            let base = QualifiedName::new(row.get::<_, String>(8), row.get::<_, String>(9));
            let operator = match row.get::<_, Option<&str>>(15) {
                Some(schema) if schema != "pg_catalog" => format!("OPERATOR({}.=)", quote_ident(schema)),
                _ => "=".to_owned(),
            };
            TargetColumn {
                name: row.get(0),
                type_name: QualifiedName::new(row.get::<_, String>(1), row.get::<_, String>(2)),
                declared: row.get(3),
                not_null: row.get(4),
                has_default: row.get(5),
                generated: row.get(6),
                always_identity: row.get(7),
                from_extension: row.get(12),
                is_array: row.get(13),
                is_domain: row.get(14),
                equality: equality(&base, row.get(10), row.get(11)),
                operator,
            }
        })
        .collect())
}

/// Indexes of the table and of all its partitions.
///
/// Columns of expressions are read from the stored trees, where a reference is `:varattno` with the column's number, or 0 for
/// the whole row. `pg_depend` has no entry for the whole row.
async fn unique_indexes(client: &Session, name: &QualifiedName) -> Result<Vec<UniqueIndex>> {
    let partitions = partitions();
    let indexes = format!(
            "WITH RECURSIVE indexes AS (
               SELECT i.*, c.relname, concat_ws(' ', i.indexprs::text, i.indpred::text) AS trees
               FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
               WHERE i.indrelid IN {partitions}
                 AND i.indislive AND (i.indisunique OR i.indisexclusion)),
             reads(index, relation, number) AS (
               SELECT indexrelid, indrelid, indkey[k]::int FROM indexes, generate_series(0, indnkeyatts - 1) AS k WHERE indkey[k] <> 0
               UNION SELECT indexrelid, indrelid, found[1]::int FROM indexes, regexp_matches(trees, ':varattno (\\d+)', 'g') AS found
               UNION SELECT reads.index, reads.relation, found[1]::int
               FROM reads JOIN pg_attribute a ON a.attrelid = reads.relation AND a.attnum = reads.number AND a.attgenerated <> ''
               JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum,
               regexp_matches(d.adbin::text, ':varattno (\\d+)', 'g') AS found)
             SELECT i.relname, i.indisprimary AND i.indrelid = {TABLE},
                    i.indrelid = {TABLE} AND i.indisvalid AND NOT i.indisexclusion AND i.trees = '',
                    ARRAY(SELECT a.attname::text FROM generate_series(0, i.indnkeyatts - 1) AS k
                          JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[k] ORDER BY k),
                    ARRAY(SELECT a.attname::text FROM pg_attribute a
                          WHERE a.attrelid = i.indrelid AND a.attnum > 0 AND NOT a.attisdropped
                            AND EXISTS (SELECT FROM reads WHERE index = i.indexrelid AND number IN (0, a.attnum))),
                    NOT i.indisexclusion AND NOT EXISTS (SELECT FROM unnest(i.indcollation::oid[]) AS used JOIN pg_collation co ON co.oid = used
                                                         WHERE NOT co.collisdeterministic)
             FROM indexes i"
    );
    let rows = client.query(&indexes, &[&name.schema, &name.name]).await.map_err(failed("read indexes of the target table"))?;
    let index = |row: &Row| UniqueIndex {
        name: row.get(0),
        primary: row.get(1),
        plain: row.get(2),
        columns: row.get(3),
        reads: row.get(4),
        by_bytes: row.get(5),
    };
    Ok(rows.iter().map(index).collect())
}

/// Foreign keys from and to the table: the name, whether an action of it changes the table, and whether it deletes its rows.
async fn foreign_keys(client: &Session, name: &QualifiedName) -> Result<Vec<Row>> {
    let partitions = partitions();
    let sql = format!(
        "SELECT conname, bool_or(confrelid IN {partitions} AND (confdeltype IN ('c', 'n', 'd') OR confupdtype IN ('c', 'n', 'd'))),
                bool_or(conrelid IN {partitions} AND confdeltype = 'c')
         FROM pg_constraint WHERE contype = 'f' AND (conrelid IN {partitions} OR confrelid IN {partitions})
         GROUP BY conname ORDER BY conname"
    );
    client.query(&sql, &[&name.schema, &name.name]).await.map_err(failed("read foreign keys of the target table"))
}

/// User triggers that fire in an ordinary session, and those that fire in a replica session.
async fn triggers(client: &Session, name: &QualifiedName) -> Result<(Vec<String>, Vec<String>)> {
    let partitions = partitions();
    // A trigger of a partitioned table is one of each partition too, by the same name.
    let triggers = format!(
        "SELECT tgname, bool_or(tgenabled IN ('O', 'A')), bool_or(tgenabled IN ('R', 'A'))
         FROM pg_trigger WHERE tgrelid IN {partitions} AND NOT tgisinternal GROUP BY tgname ORDER BY tgname"
    );
    let rows = client.query(&triggers, &[&name.schema, &name.name]).await.map_err(failed("read triggers of the target table"))?;
    let named = |column: usize| rows.iter().filter(|row| row.get(column)).map(|row| row.get(0)).collect();
    Ok((named(1), named(2)))
}
