//! What the catalog says of relations: four statements in two round trips, whatever their number.

use crate::connectors::postgres::connect::{Parameters, Session, Side};
use crate::connectors::postgres::source::answer;
use crate::engine::error::Result;
use crate::engine::table::{Column, QualifiedName};
use std::collections::{HashMap, HashSet};
use tokio_postgres::Row;

/// Rows of one block when nothing is known of a table: what rows of about 130 bytes make.
const ROWS_PER_BLOCK: f64 = 60.0;

/// Which relations are read.
#[derive(Clone, Copy, Debug)]
pub enum Filter<'a> {
    /// By schema and name, of any kind.
    Names(&'a [QualifiedName]),
    /// All of schemas, of any kind.
    Schemas(&'a [&'a str]),
    /// By OID.
    Ids(&'a [u32]),
}

/// A relation with all that decides whether and how it is followed.
#[derive(Clone, Debug)]
pub struct Relation {
    /// OID.
    pub id: u32,
    /// Name.
    pub name: QualifiedName,
    /// `pg_class.relkind`.
    pub kind: char,
    /// `pg_class.relpersistence`.
    pub persistence: char,
    /// Replica identity.
    pub identity: DeclaredIdentity,
    /// Columns in the table's order.
    pub columns: Vec<RelationColumn>,
    /// The primary key.
    pub primary_key: Option<PrimaryKey>,
    /// OIDs of the partitioned tables above it.
    pub ancestors: Vec<u32>,
    /// Partitions that hold rows, for a partitioned table.
    pub leaves: Vec<Leaf>,
    /// Rows by statistics, scaled to the present size.
    pub estimated_rows: u64,
    /// Size of the heap; 0 for a partitioned table and for other table access methods, which know no blocks.
    pub blocks: u64,
    /// The role may use the schema.
    pub may_use_schema: bool,
    /// A row security policy would hide rows from the role.
    pub row_security: bool,
    /// Names the files that the rows are in, those of partitions too.
    pub storage: String,
    /// Columns that it has ever had.
    pub columns_ever: i32,
}

/// One column, with what is not in [`Column`].
#[derive(Clone, Debug)]
pub struct RelationColumn {
    /// As mapped; `key` is not set yet.
    pub column: Column,
    /// The role may read it.
    pub may_select: bool,
    /// Columns that its expression uses.
    pub uses: Vec<String>,
}

/// A primary key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrimaryKey {
    /// Name of the constraint.
    pub name: Option<String>,
    /// Columns in key order.
    pub columns: Vec<String>,
    /// A deferrable key can't be a replica identity.
    pub deferrable: bool,
    /// OID of the constraint, which a `REINDEX CONCURRENTLY` leaves alone.
    pub id: Option<u32>,
}

/// A partition that holds rows: the server checks *its* identity on each write, not the root's.
#[derive(Clone, Debug)]
pub struct Leaf {
    /// Name.
    pub name: QualifiedName,
    /// `pg_class.relkind`.
    pub kind: char,
    /// `pg_class.relpersistence`.
    pub persistence: char,
    /// Replica identity.
    pub identity: DeclaredIdentity,
}

/// What `REPLICA IDENTITY` amounts to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeclaredIdentity {
    /// These columns, in the order of the index.
    Columns(Vec<String>),
    /// FULL.
    Full,
    /// None, and why.
    Missing(&'static str),
}

impl Relation {
    /// An ordinary or partitioned table.
    #[must_use]
    pub fn is_table(&self) -> bool {
        matches!(self.kind, 'r' | 'p')
    }
}

/// Which of these schemas exist.
pub async fn schemas(session: &Session, names: &[&str]) -> Result<Vec<String>> {
    let rows = query(session, "look for schemas", "SELECT nspname::text FROM pg_namespace WHERE nspname = ANY($1)", &[&names]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// OIDs of all partitioned tables of the database.
pub async fn partitioned(session: &Session) -> Result<HashSet<u32>> {
    let rows = query(session, "read partitioned tables", "SELECT oid FROM pg_class WHERE relkind = 'p'", &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Relations that were found, in order of their names.
pub struct Found {
    rows: Vec<Row>,
    /// Their OIDs.
    pub ids: Vec<u32>,
}

/// Looks for relations. Those that do not exist are left out.
pub async fn find(session: &Session, filter: Filter<'_>) -> Result<Found> {
    let rows = relations(session, filter).await?;
    let ids = rows.iter().map(|row| row.get("id")).collect();
    Ok(Found { rows, ids })
}

/// What is not in the rows of [`Found`].
pub struct Details {
    leaves: Vec<Row>,
    indexes: Vec<Row>,
    columns: Vec<Row>,
}

impl Details {
    /// Reads them in one round trip.
    pub async fn read(session: &Session, ids: &[u32]) -> Result<Self> {
        let (leaves, indexes, columns) = futures::future::try_join3(
            leaves(session, ids),
            query(session, "read keys", INDEXES, &[&ids]),
            query(session, "read columns", COLUMNS, &[&ids]),
        )
        .await?;
        Ok(Self { leaves, indexes, columns })
    }
}

/// Reads relations of which the OIDs are known in one round trip. Those that do not exist are left out.
pub async fn read(session: &Session, ids: &[u32]) -> Result<Vec<Relation>> {
    let (found, details) = futures::future::try_join(find(session, Filter::Ids(ids)), Details::read(session, ids)).await?;
    Ok(relations_of(found, details))
}

/// Puts together what was read.
pub fn relations_of(found: Found, details: Details) -> Vec<Relation> {
    let Details { leaves, indexes, columns } = details;
    let (indexes, mut columns) = (grouped(indexes), grouped(columns));
    let mut leaves_of: HashMap<u32, Vec<Row>> = HashMap::new();
    for leaf in leaves {
        leaves_of.entry(leaf.get("root")).or_default().push(leaf);
    }
    let mut read = Vec::with_capacity(found.rows.len());
    for row in found.rows {
        let id = row.get("id");
        let leaf_rows = leaves_of.remove(&id).unwrap_or_default();
        let keys = indexes.get(&id).map(Vec::as_slice).unwrap_or_default();
        let (rows, blocks) = size(&row);
        read.push(Relation {
            id,
            name: name(&row),
            kind: letter(&row, "kind"),
            persistence: letter(&row, "persistence"),
            identity: identity(letter(&row, "identity"), keys),
            columns: columns.remove(&id).unwrap_or_default().iter().map(column).collect(),
            primary_key: keys.iter().find(|key| key.get("is_primary")).map(primary_key),
            ancestors: row.get("ancestors"),
            estimated_rows: rows + leaf_rows.iter().map(|leaf| size(leaf).0).sum::<u64>(),
            leaves: leaf_rows.iter().map(|leaf| self::leaf(leaf, &indexes)).collect(),
            blocks,
            may_use_schema: row.get("may_use_schema"),
            row_security: row.get("row_security"),
            storage: row.get("storage"),
            columns_ever: row.get("columns_ever"),
        });
    }
    read
}

/// Columns that relations and leaves have in common. The size comes from the file: statistics may be old, and a plan made from
/// them must never cut rows off. Only heaps are made of blocks that a TID range can name.
const SIZES: &str = "c.oid AS id, n.nspname::text AS schema, c.relname::text AS name, c.relkind::text AS kind,
    c.relpersistence::text AS persistence, c.relreplident::text AS identity, c.reltuples::float8 AS reltuples, c.relpages::int8 AS relpages,
    CASE WHEN c.relkind = 'r' AND c.relam = (SELECT oid FROM pg_am WHERE amname = 'heap')
         THEN coalesce(pg_relation_size(c.oid), 0) / current_setting('block_size')::int8 ELSE 0 END AS blocks";

async fn relations(session: &Session, filter: Filter<'_>) -> Result<Vec<Row>> {
    let statement = |condition: &str| {
        format!(
            "SELECT {SIZES}, coalesce(has_schema_privilege(n.oid, 'USAGE'), false) AS may_use_schema, row_security_active(c.oid) AS row_security,
                 concat_ws(' ', c.relfilenode, (SELECT md5(string_agg(concat(l.oid, ' ', l.relfilenode), ' ' ORDER BY l.oid))
                     FROM pg_partition_tree(c.oid) t JOIN pg_class l ON l.oid = t.relid WHERE t.isleaf)) AS storage, c.relnatts::int4 AS columns_ever,
                 ARRAY(SELECT a.relid::oid FROM pg_partition_ancestors(c.oid) a WHERE a.relid <> c.oid) AS ancestors
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE {condition} ORDER BY n.nspname, c.relname"
        )
    };
    let what = "read tables";
    match filter {
        Filter::Names(names) => {
            let (schemas, names): (Vec<&str>, Vec<&str>) = names.iter().map(|name| (name.schema.as_str(), name.name.as_str())).unzip();
            let condition = "(n.nspname::text, c.relname::text) IN (SELECT * FROM unnest($1::text[], $2::text[]))";
            query(session, what, &statement(condition), &[&schemas, &names]).await
        }
        Filter::Schemas(schemas) => query(session, what, &statement("n.nspname = ANY($1) AND c.relkind IN ('r', 'p')"), &[&schemas]).await,
        Filter::Ids(ids) => query(session, what, &statement("c.oid = ANY($1)"), &[&ids]).await,
    }
}

async fn leaves(session: &Session, roots: &[u32]) -> Result<Vec<Row>> {
    let statement = format!(
        "SELECT r.oid AS root, {SIZES}
         FROM pg_class r CROSS JOIN LATERAL pg_partition_tree(r.oid) t JOIN pg_class c ON c.oid = t.relid JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE r.oid = ANY($1) AND r.relkind = 'p' AND t.isleaf ORDER BY n.nspname, c.relname"
    );
    query(session, "read partitions", &statement, &[&roots]).await
}

/// Indexes of the relations and of the partitions that hold their rows. The server takes an index as identity only when it is
/// valid, unique, not deferrable and not partial (`RelationGetIndexList` in its source).
const INDEXES: &str =
    "SELECT i.indrelid AS id, i.indisprimary AS is_primary, i.indisreplident AS is_identity, con.conname::text AS constraint_name, con.oid AS constraint_id,
    NOT i.indimmediate AS deferrable, i.indisvalid AND i.indisunique AND i.indimmediate AND i.indpred IS NULL AS usable,
    ARRAY(SELECT a.attname::text FROM unnest(i.indkey) WITH ORDINALITY AS k (number, place)
          JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number
          WHERE k.place <= i.indnkeyatts ORDER BY k.place) AS columns
    FROM pg_index i LEFT JOIN pg_constraint con ON con.conindid = i.indexrelid AND con.contype = 'p'
    WHERE (i.indisprimary OR i.indisreplident) AND i.indrelid IN (SELECT unnest($1) UNION SELECT t.relid::oid
        FROM pg_class r CROSS JOIN LATERAL pg_partition_tree(r.oid) t WHERE r.oid = ANY($1) AND r.relkind = 'p' AND t.isleaf)";

/// A privilege is NULL for a column that was dropped just now. `format_type` qualifies types by the session's search_path, which is pg_catalog alone. What a generated column uses is kept
/// as a dependency of the column (14) or of its expression (later).
const COLUMNS: &str = "SELECT a.attrelid AS id, a.attname::text AS name, a.attnum::int4 AS number, a.atttypid AS type_id, a.atttypmod AS modifier, tn.nspname::text AS type_schema, t.typname::text AS type_name,
    format_type(a.atttypid, a.atttypmod) AS declared, a.attnotnull AS not_null, pg_get_expr(d.adbin, d.adrelid) AS expression,
    cn.nspname::text AS collation_schema, co.collname::text AS collation_name,
    coalesce(has_column_privilege(a.attrelid, a.attnum, 'SELECT'), true) AS may_select,
    CASE WHEN a.attgenerated <> '' THEN ARRAY(
        SELECT u.attname::text FROM pg_depend p JOIN pg_attribute u ON u.attrelid = p.refobjid AND u.attnum = p.refobjsubid
        WHERE p.refclassid = 'pg_class'::regclass AND p.refobjid = a.attrelid AND p.refobjsubid > 0 AND p.refobjsubid <> a.attnum
          AND ((p.classid = 'pg_class'::regclass AND p.objid = a.attrelid AND p.objsubid = a.attnum)
            OR (p.classid = 'pg_attrdef'::regclass AND p.objid = d.oid))) ELSE '{}' END AS uses
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid JOIN pg_namespace tn ON tn.oid = t.typnamespace
    LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum AND a.attgenerated <> ''
    LEFT JOIN pg_collation co ON co.oid = a.attcollation AND a.attcollation <> t.typcollation
    LEFT JOIN pg_namespace cn ON cn.oid = co.collnamespace
    WHERE a.attrelid = ANY($1) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attrelid, a.attnum";

pub(super) async fn query(session: &Session, what: &str, statement: &str, parameters: Parameters<'_>) -> Result<Vec<Row>> {
    answer(Side::Source, what, session.query(statement, parameters)).await
}

fn grouped(rows: Vec<Row>) -> HashMap<u32, Vec<Row>> {
    let mut groups: HashMap<u32, Vec<Row>> = HashMap::new();
    for row in rows {
        groups.entry(row.get("id")).or_default().push(row);
    }
    groups
}

fn name(row: &Row) -> QualifiedName {
    QualifiedName::new(row.get::<_, String>("schema"), row.get::<_, String>("name"))
}

fn letter(row: &Row, column: &str) -> char {
    row.get::<_, &str>(column).chars().next().unwrap_or(' ')
}

/// Rows and blocks. Rows are scaled as the planner does it: density by statistics × present size.
fn size(row: &Row) -> (u64, u64) {
    let blocks = row.get::<_, i64>("blocks").unsigned_abs();
    (estimate(row.get("reltuples"), row.get("relpages"), blocks), blocks)
}

fn estimate(tuples: f64, pages: i64, blocks: u64) -> u64 {
    let density = if tuples >= 0.0 && pages > 0 { tuples / pages as f64 } else { ROWS_PER_BLOCK };
    // Far below 2^53.
    (density * blocks as f64).round() as u64
}

fn identity(declared: char, keys: &[Row]) -> DeclaredIdentity {
    let index = |flag: &str| keys.iter().find(|key| key.get(flag));
    let columns = |key: &Row| DeclaredIdentity::Columns(key.get("columns"));
    let usable = |key: &&Row| key.get("usable");
    match declared {
        'f' => DeclaredIdentity::Full,
        'd' => match index("is_primary") {
            Some(key) if key.get("usable") => columns(key),
            Some(_) => DeclaredIdentity::Missing("its primary key is DEFERRABLE"),
            None => DeclaredIdentity::Missing("it has no primary key"),
        },
        'i' => index("is_identity").filter(usable).map_or(DeclaredIdentity::Missing("the index of its replica identity is gone"), columns),
        _ => DeclaredIdentity::Missing("its replica identity is NOTHING"),
    }
}

fn primary_key(key: &Row) -> PrimaryKey {
    PrimaryKey {
        name: key.get("constraint_name"),
        columns: key.get("columns"),
        deferrable: key.get("deferrable"),
        id: key.get("constraint_id"),
    }
}

fn leaf(row: &Row, indexes: &HashMap<u32, Vec<Row>>) -> Leaf {
    let keys = indexes.get(&row.get("id")).map(Vec::as_slice).unwrap_or_default();
    Leaf {
        name: name(row),
        kind: letter(row, "kind"),
        persistence: letter(row, "persistence"),
        identity: identity(letter(row, "identity"), keys),
    }
}

fn column(row: &Row) -> RelationColumn {
    let pair =
        |schema: &str, name: &str| Some(QualifiedName::new(row.get::<_, Option<String>>(schema)?, row.get::<_, Option<String>>(name)?));
    RelationColumn {
        column: Column {
            name: row.get("name"),
            number: row.get("number"),
            type_id: row.get("type_id"),
            modifier: row.get("modifier"),
            type_name: QualifiedName::new(row.get::<_, String>("type_schema"), row.get::<_, String>("type_name")),
            declared: row.get("declared"),
            key: false,
            not_null: row.get("not_null"),
            generated: row.get("expression"),
            collation: pair("collation_schema", "collation_name"),
        },
        may_select: row.get("may_select"),
        uses: row.get("uses"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_estimated_from_the_present_size() {
        assert_eq!(estimate(1000.0, 10, 10), 1000);
        assert_eq!(estimate(1000.0, 10, 30), 3000, "grown since ANALYZE");
        assert_eq!(estimate(-1.0, 0, 100), 6000, "never analyzed");
        assert_eq!(estimate(0.0, 0, 100), 6000, "analyzed while it was empty");
        assert_eq!(estimate(0.0, 100, 100), 0, "all rows deleted");
        assert_eq!(estimate(0.0, 0, 0), 0);
    }
}
