//! What tables have besides columns and rows: indexes, constraints, defaults, sequences, storage, comments.
//!
//! Definitions are the server's own deparsed texts. The session's search_path is pg_catalog alone, so every name in them is
//! qualified; the table's own name stands only in their known beginnings, which are cut off here.

mod needs;

use super::facts::query;
use crate::connectors::postgres::connect::Session;
use crate::connectors::postgres::sql::{qualified, quote_ident, quote_literal};
use crate::engine::error::{Error, Result};
use crate::engine::structure::{
    Check, ColumnDefault, ForeignKey, Index, IndexRole, Need, Sequence, SequenceRole, SequenceValue, Structure,
};
use crate::engine::table::{MappedTable, QualifiedName};
use needs::UsedBy;
use std::collections::HashMap;
use std::sync::Arc;
use tokio_postgres::Row;

/// Takes a row of the catalog in.
type Take = fn(&mut Reading, &Row) -> Result<()>;

/// What the catalog says of relations besides [`super::facts`].
pub struct Structures {
    /// The rows of each statement, with what takes them in.
    rows: [(Vec<Row>, Take); 5],
    needs: Vec<(u32, UsedBy, Need)>,
}

impl Structures {
    /// Reads everything in one round trip.
    pub async fn read(session: &Session, ids: &[u32]) -> Result<Self> {
        let read = |what, sql| async move { query(session, what, sql, &[&ids]).await };
        let ((tables, columns, sequences), (indexes, constraints, needs)) = futures::future::try_join(
            futures::future::try_join3(
                read("read storage parameters", TABLES),
                read("read storage of columns", COLUMNS),
                read("read sequences", SEQUENCES),
            ),
            futures::future::try_join3(read("read indexes", INDEXES), read("read constraints", CONSTRAINTS), needs::read(session, ids)),
        )
        .await?;
        let rows = [
            (tables, Reading::table as Take),
            (columns, Reading::column),
            (sequences, Reading::sequence),
            (indexes, Reading::index),
            (constraints, Reading::constraint),
        ];
        Ok(Self { rows, needs })
    }

    /// Gives tables their structure, without whatever uses a column that is left out.
    pub fn fill(self, tables: &mut [MappedTable]) -> Result<()> {
        let mut structures: HashMap<u32, Reading> = tables.iter().map(|table| (table.version.id, Reading::new(table))).collect();
        for (rows, take) in &self.rows {
            for row in rows {
                if let Some(reading) = structures.get_mut(&row.get::<_, u32>("id")) {
                    take(reading, row)?;
                }
            }
        }
        for (id, used_by, need) in self.needs {
            if let Some(reading) = structures.get_mut(&id) {
                reading.need(used_by, need);
            }
        }
        for table in tables {
            if let Some(reading) = structures.remove(&table.version.id) {
                table.structure = Arc::new(reading.structure);
            }
        }
        Ok(())
    }
}

/// Reads how far the sequences of a table are.
pub async fn sequence_values(session: &Session, table: &MappedTable) -> Result<Vec<SequenceValue>> {
    let sequences = &table.structure.sequences;
    let ids: Vec<u32> = sequences.iter().map(|sequence| sequence.id).collect();
    // The privilege of something that is no sequence is an error, and conditions are looked at in any order.
    let readable = "SELECT c.oid FROM pg_class c WHERE c.oid = ANY($1) AND CASE c.relkind
        WHEN 'S' THEN has_schema_privilege(c.relnamespace, 'USAGE') AND has_sequence_privilege(c.oid, 'SELECT') END";
    let readable: Vec<u32> = query(session, "look for sequences", readable, &[&ids]).await?.iter().map(|row| row.get(0)).collect();
    let mut values = Vec::with_capacity(sequences.len());
    for sequence in sequences {
        let mut last = None;
        if readable.contains(&sequence.id) {
            let sql = format!("SELECT last_value, is_called FROM {}", qualified(&sequence.name));
            let rows = query(session, "read a sequence", &sql, &[]).await?;
            last = rows.first().map(|row| (row.get(0), row.get(1)));
        }
        values.push(SequenceValue { id: sequence.id, last });
    }
    Ok(values)
}

/// The structure of one table while it is read.
struct Reading {
    structure: Structure,
    name: QualifiedName,
    kept: Vec<String>,
    /// Kept columns by number.
    numbers: HashMap<i32, String>,
    /// Kept indexes and checks by OID.
    indexes: HashMap<u32, usize>,
    checks: Vec<u32>,
}

impl Reading {
    fn new(table: &MappedTable) -> Self {
        Self {
            structure: Structure::default(),
            name: table.source().clone(),
            kept: table.version.columns.iter().chain(&table.generated).map(|column| column.name.clone()).collect(),
            numbers: HashMap::new(),
            indexes: HashMap::new(),
            checks: Vec::new(),
        }
    }

    fn keeps(&self, columns: &[String]) -> bool {
        columns.iter().all(|column| self.kept.contains(column))
    }

    fn table(&mut self, row: &Row) -> Result<()> {
        let options = |column: &str, prefix: &str| options(row.get(column), prefix);
        let set: Vec<String> = options("options", "").into_iter().chain(options("toast", "toast.")).collect();
        if !set.is_empty() {
            self.structure.storage.push(format!("SET ({})", set.join(", ")));
        }
        self.structure.comments.extend(row.get::<_, Option<String>>("comment").map(|comment| (None, comment)));
        Ok(())
    }

    fn column(&mut self, row: &Row) -> Result<()> {
        let name: String = row.get("name");
        if !self.kept.contains(&name) {
            return Ok(());
        }
        let structure = &mut self.structure;
        let mut alter = |action: String| structure.storage.push(format!("ALTER COLUMN {} SET {action}", quote_ident(&name)));
        if let Some(storage) = row.get::<_, Option<&str>>("storage") {
            alter(format!("STORAGE {storage}"));
        }
        if let Some(compression) = row.get::<_, Option<&str>>("compression") {
            alter(format!("COMPRESSION {compression}"));
        }
        if let Some(statistics) = row.get::<_, Option<i32>>("statistics") {
            alter(format!("STATISTICS {statistics}"));
        }
        let options = options(row.get("options"), "");
        if !options.is_empty() {
            alter(format!("({})", options.join(", ")));
        }
        structure.comments.extend(row.get::<_, Option<String>>("comment").map(|comment| (Some(name.clone()), comment)));
        structure
            .defaults
            .extend(row.get::<_, Option<String>>("expression").map(|expression| ColumnDefault { column: name.clone(), expression }));
        self.numbers.insert(row.get("number"), name);
        Ok(())
    }

    fn sequence(&mut self, row: &Row) -> Result<()> {
        let column: String = row.get("column");
        if !self.kept.contains(&column) {
            return Ok(());
        }
        self.structure.sequences.push(Sequence {
            id: row.get("sequence"),
            name: QualifiedName::new(row.get::<_, String>("sequence_schema"), row.get::<_, String>("sequence_name")),
            column,
            role: match row.get("role") {
                "i" => SequenceRole::Identity,
                "o" => SequenceRole::Owned,
                _ => SequenceRole::Free,
            },
            reference: row.get("reference"),
            type_name: row.get("type_name"),
            options: row.get("options"),
            ascending: row.get("ascending"),
            comment: row.get("comment"),
        });
        Ok(())
    }

    fn index(&mut self, row: &Row) -> Result<()> {
        if !self.keeps(&row.get::<_, Vec<String>>("uses")) {
            return Ok(());
        }
        let name: String = row.get("name");
        let role = match (row.get::<_, Option<&str>>("kind"), row.get::<_, Option<String>>("constraint_definition")) {
            (Some(kind @ ("p" | "u")), Some(_)) if !row.get::<_, bool>("is_exclusion") => {
                IndexRole::Key { primary: kind == "p", deferral: row.get("deferral") }
            }
            (Some(_), Some(definition)) => IndexRole::Constraint(definition),
            _ => IndexRole::Plain,
        };
        let definition = without_prefix(row.get("definition"), row.get("prefix")).map_err(|error| error.context(&self.name))?;
        self.indexes.insert(row.get("index"), self.structure.indexes.len());
        self.structure.indexes.push(Index {
            name,
            unique: row.get("is_unique"),
            definition,
            role,
            comment: row.get("comment"),
            constraint_comment: row.get("constraint_comment"),
            needs: Vec::new(),
        });
        Ok(())
    }

    fn constraint(&mut self, row: &Row) -> Result<()> {
        if !self.keeps(&row.get::<_, Vec<String>>("uses")) {
            return Ok(());
        }
        let (name, comment) = (row.get("name"), row.get("comment"));
        let definition: &str = row.get("definition");
        if row.get::<_, &str>("kind") == "c" {
            self.checks.push(row.get("constraint"));
            self.structure.checks.push(Check { name, definition: definition.to_owned(), comment });
            return Ok(());
        }
        let definition = definition.strip_suffix(" NOT VALID").unwrap_or(definition);
        let before: String = row.get("prefix");
        let after = without_prefix(definition, &format!("{before}{}", row.get::<_, &str>("references")))?;
        let references = QualifiedName::new(row.get::<_, String>("references_schema"), row.get::<_, String>("references_name"));
        self.structure.foreign_keys.push(ForeignKey { name, references, before, after, valid: row.get("valid"), comment });
        Ok(())
    }

    fn need(&mut self, used_by: UsedBy, need: Need) {
        let needs = match used_by {
            UsedBy::Column(number) if self.numbers.contains_key(&number) => &mut self.structure.needs,
            UsedBy::Object(object) if self.checks.contains(&object) => &mut self.structure.needs,
            UsedBy::Object(object) => match self.indexes.get(&object) {
                Some(&index) => &mut self.structure.indexes[index].needs,
                None => return,
            },
            UsedBy::Column(_) => return,
        };
        if !needs.contains(&need) {
            needs.push(need);
        }
    }
}

/// `name=value` of the catalog as `"name" = 'value'`.
fn options(stored: Vec<&str>, prefix: &str) -> Vec<String> {
    let option = |option: &str| {
        let (name, value) = option.split_once('=').unwrap_or((option, "true"));
        format!("{prefix}{} = {}", quote_ident(name), quote_literal(value))
    };
    stored.into_iter().map(option).collect()
}

fn without_prefix(definition: &str, prefix: &str) -> Result<String> {
    let rest = definition.strip_prefix(prefix);
    rest.map(str::to_owned).ok_or_else(|| Error::bug(format!("the source says {definition:?}, which does not begin with {prefix:?}")))
}

const TABLES: &str = "SELECT c.oid AS id, coalesce(c.reloptions, '{}')::text[] AS options, coalesce(t.reloptions, '{}')::text[] AS toast,
        obj_description(c.oid, 'pg_class') AS comment
    FROM pg_class c LEFT JOIN pg_class t ON t.oid = c.reltoastrelid WHERE c.oid = ANY($1)";

/// Only what differs from what a new table has.
const COLUMNS: &str = "SELECT a.attrelid AS id, a.attnum::int4 AS number, a.attname::text AS name,
        CASE WHEN a.attstorage <> t.typstorage THEN CASE a.attstorage WHEN 'p' THEN 'PLAIN' WHEN 'e' THEN 'EXTERNAL' WHEN 'm' THEN 'MAIN' ELSE 'EXTENDED' END
            END AS storage,
        CASE a.attcompression WHEN 'p' THEN 'pglz' WHEN 'l' THEN 'lz4' END AS compression,
        nullif(a.attstattarget::int4, -1) AS statistics, coalesce(a.attoptions, '{}')::text[] AS options,
        CASE WHEN a.attgenerated = '' THEN pg_get_expr(d.adbin, d.adrelid) END AS expression,
        col_description(a.attrelid, a.attnum) AS comment
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
    LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE a.attrelid = ANY($1) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attrelid, a.attnum";

/// A sequence depends on the column that owns it; a default depends on the sequences that it names.
const SEQUENCES: &str = "WITH used AS (
        SELECT d.refobjid AS id, d.refobjsubid AS number, d.objid AS sequence, CASE d.deptype WHEN 'i' THEN 'i' ELSE 'o' END AS role
        FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = ANY($1)
          AND d.refobjsubid > 0 AND d.deptype IN ('a', 'i')
        UNION ALL
        SELECT a.adrelid, a.adnum, d.refobjid, 'f' FROM pg_attrdef a
        JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = a.oid AND d.refclassid = 'pg_class'::regclass AND d.deptype = 'n'
        WHERE a.adrelid = ANY($1))
    SELECT DISTINCT ON (u.id, u.number, s.oid) u.id, a.attname::text AS column, u.role, s.oid AS sequence,
        n.nspname::text AS sequence_schema, s.relname::text AS sequence_name, quote_literal(s.oid::regclass::text) || '::regclass' AS reference,
        format_type(q.seqtypid, NULL) AS type_name, q.seqincrement > 0 AS ascending, obj_description(s.oid, 'pg_class') AS comment,
        format('INCREMENT BY %s MINVALUE %s MAXVALUE %s START WITH %s CACHE %s %s', q.seqincrement, q.seqmin, q.seqmax, q.seqstart, q.seqcache,
            CASE WHEN q.seqcycle THEN 'CYCLE' ELSE 'NO CYCLE' END) AS options
    FROM used u JOIN pg_class s ON s.oid = u.sequence AND s.relkind = 'S' JOIN pg_namespace n ON n.oid = s.relnamespace
    JOIN pg_sequence q ON q.seqrelid = s.oid JOIN pg_attribute a ON a.attrelid = u.id AND a.attnum = u.number
    ORDER BY u.id, u.number, s.oid, u.role DESC";

/// Columns of keys are in `indkey`, those of expressions and predicates are dependencies.
const INDEXES: &str = "SELECT i.indrelid AS id, i.indexrelid AS index, c.relname::text AS name, i.indisunique AS is_unique,
        i.indisexclusion AS is_exclusion, pg_get_indexdef(i.indexrelid) AS definition,
        format('CREATE %sINDEX %I ON %s%s USING ', CASE WHEN i.indisunique THEN 'UNIQUE ' ELSE '' END, c.relname,
            CASE WHEN c.relkind = 'I' THEN 'ONLY ' ELSE '' END, i.indrelid::regclass) AS prefix,
        con.contype::text AS kind, pg_get_constraintdef(con.oid) AS constraint_definition,
        CASE WHEN con.condeferred THEN 'DEFERRABLE INITIALLY DEFERRED' WHEN con.condeferrable THEN 'DEFERRABLE' ELSE '' END AS deferral,
        obj_description(i.indexrelid, 'pg_class') AS comment, obj_description(con.oid, 'pg_constraint') AS constraint_comment,
        ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = i.indrelid AND a.attnum > 0 AND (a.attnum = ANY(i.indkey::int2[])
            OR EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid
                       AND d.refclassid = 'pg_class'::regclass AND d.refobjid = i.indrelid AND d.refobjsubid = a.attnum))) AS uses
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
    LEFT JOIN pg_constraint con ON con.conindid = i.indexrelid AND con.conrelid = i.indrelid AND con.contype IN ('p', 'u', 'x')
    WHERE i.indrelid = ANY($1) AND i.indislive AND i.indisvalid ORDER BY i.indrelid, NOT i.indisprimary, c.relname";

/// A foreign key to a partitioned table has one more entry per partition.
const CONSTRAINTS: &str = "SELECT con.conrelid AS id, con.oid AS constraint, con.conname::text AS name, con.contype::text AS kind,
        con.convalidated AS valid, pg_get_constraintdef(con.oid) AS definition, obj_description(con.oid, 'pg_constraint') AS comment,
        ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = con.conrelid AND a.attnum = ANY(con.conkey)) AS uses,
        format('FOREIGN KEY (%s) REFERENCES ', (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY k.place)
            FROM unnest(con.conkey) WITH ORDINALITY AS k(number, place)
            JOIN pg_attribute a ON a.attrelid = con.conrelid AND a.attnum = k.number)) AS prefix,
        con.confrelid::regclass::text AS references, n.nspname::text AS references_schema, r.relname::text AS references_name
    FROM pg_constraint con LEFT JOIN pg_class r ON r.oid = con.confrelid LEFT JOIN pg_namespace n ON n.oid = r.relnamespace
    WHERE con.conrelid = ANY($1) AND con.contype IN ('c', 'f')
      AND NOT EXISTS (SELECT FROM pg_constraint parent WHERE parent.oid = con.conparentid AND parent.conrelid = con.conrelid)
    ORDER BY con.conrelid, con.conname";
