//! What tables use that is not built in: types, functions, operators, collations and the extensions that bring them, each
//! with the statement that makes it. The server keeps these uses as dependencies, except for what every server has.

use crate::connectors::postgres::catalog::facts::query;
use crate::connectors::postgres::connect::Session;
use crate::connectors::postgres::sql::quote_ident;
use crate::engine::error::Result;
use crate::engine::structure::Need;
use tokio_postgres::Row;

/// Which part of a table uses something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UsedBy {
    /// A column, its default or its generation, by number.
    Column(i32),
    /// A check or an index, by OID.
    Object(u32),
}

/// The table's OID, what of it uses something, and what that is; what other needs are built on comes first.
pub(super) async fn read(session: &Session, ids: &[u32]) -> Result<Vec<(u32, UsedBy, Need)>> {
    let rows = query(session, "read what tables use", NEEDS, &[&ids]).await?;
    Ok(rows.iter().map(|row| (row.get("id"), used_by(row), need(row))).collect())
}

fn used_by(row: &Row) -> UsedBy {
    match row.get("number") {
        0 => UsedBy::Object(row.get("object")),
        number => UsedBy::Column(number),
    }
}

fn need(row: &Row) -> Need {
    let (kind, identity): (String, &str) = (row.get("kind"), row.get("identity"));
    let extension: Option<String> = row.get("extension");
    let cure = match (&extension, row.get::<_, Option<&str>>("extension_schema"), row.get::<_, Option<String>>("cure")) {
        (Some(extension), Some(schema), _) => format!("CREATE EXTENSION {} SCHEMA {}", quote_ident(extension), quote_ident(schema)),
        (_, _, Some(cure)) => cure,
        _ => format!("CREATE {} {identity} …, as on the source", kind.to_uppercase()),
    };
    Need { kind, names: row.get("names"), arguments: row.get("arguments"), schema: row.get("schema"), extension, cure }
}

/// Dependencies of dependencies are followed to what an extension brings. An array or a multirange comes with its type.
const NEEDS: &str = "WITH RECURSIVE first(id, number, object, class, used) AS (
        SELECT d.objid, d.objsubid, 0::oid, d.refclassid, d.refobjid FROM pg_depend d
        WHERE d.classid = 'pg_class'::regclass AND d.objid = ANY($1) AND d.objsubid > 0
        UNION ALL
        SELECT a.adrelid, a.adnum::int4, 0::oid, d.refclassid, d.refobjid
        FROM pg_attrdef a JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = a.oid WHERE a.adrelid = ANY($1)
        UNION ALL
        SELECT c.conrelid, 0, CASE c.contype WHEN 'c' THEN c.oid ELSE c.conindid END, d.refclassid, d.refobjid
        FROM pg_constraint c JOIN pg_depend d ON d.classid = 'pg_constraint'::regclass AND d.objid = c.oid
        WHERE c.conrelid = ANY($1) AND c.contype IN ('c', 'p', 'u', 'x')
        UNION ALL
        SELECT i.indrelid, 0, i.indexrelid, d.refclassid, d.refobjid
        FROM pg_index i JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid WHERE i.indrelid = ANY($1)),
    used(id, number, object, class, used, depth) AS (
        SELECT id, number, object, class, used, 1 FROM first WHERE class = ANY(ARRAY['pg_type', 'pg_proc', 'pg_operator', 'pg_opclass',
            'pg_collation', 'pg_ts_config', 'pg_ts_dict', 'pg_language', 'pg_am']::regclass[]::oid[])
        UNION
        SELECT u.id, u.number, u.object, d.refclassid, d.refobjid, u.depth + 1 FROM used u CROSS JOIN LATERAL (
            SELECT d.refclassid, d.refobjid FROM pg_depend d WHERE d.classid = u.class AND d.objid = u.used AND d.deptype IN ('n', 'i', 'a')
            UNION ALL
            SELECT d.refclassid, d.refobjid FROM pg_type t JOIN pg_class c ON c.oid = t.typrelid AND c.relkind = 'c'
            JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.objsubid > 0
            WHERE u.class = 'pg_type'::regclass AND t.oid = u.used) d
        WHERE u.depth < 8 AND d.refclassid = ANY(ARRAY['pg_type', 'pg_proc', 'pg_operator', 'pg_opclass', 'pg_collation',
                'pg_ts_config', 'pg_ts_dict', 'pg_language', 'pg_am']::regclass[]::oid[])
          AND NOT EXISTS (SELECT FROM pg_depend e WHERE e.classid = u.class AND e.objid = u.used AND e.deptype = 'e')),
    deepest AS (SELECT id, number, object, class, used, max(depth) AS depth FROM used GROUP BY 1, 2, 3, 4, 5)
    SELECT u.id, u.number, u.object, address.type AS kind, address.object_names AS names, address.object_args AS arguments,
        identified.schema, identified.identity, e.extname::text AS extension, en.nspname::text AS extension_schema,
        CASE
        WHEN u.class = 'pg_proc'::regclass AND p.prokind <> 'a' THEN pg_get_functiondef(p.oid)
        WHEN c.collnamespace = 'pg_catalog'::regnamespace THEN 'install the locale on the target''s machine, then SELECT pg_import_system_collations(''pg_catalog'')'
        WHEN c.collprovider = 'i' THEN format('CREATE COLLATION %s (PROVIDER = icu, LOCALE = %L, DETERMINISTIC = %s)', identified.identity,
            coalesce(to_jsonb(c) ->> 'colllocale', to_jsonb(c) ->> 'colliculocale', to_jsonb(c) ->> 'collcollate'), c.collisdeterministic::text)
        WHEN c.collprovider = 'c' THEN format('CREATE COLLATION %s (LC_COLLATE = %L, LC_CTYPE = %L)', identified.identity, c.collcollate, c.collctype)
        WHEN t.typtype = 'e' THEN format('CREATE TYPE %s AS ENUM (%s)', identified.identity,
            (SELECT string_agg(quote_literal(l.enumlabel), ', ' ORDER BY l.enumsortorder) FROM pg_enum l WHERE l.enumtypid = t.oid))
        WHEN t.typtype = 'd' THEN concat_ws(' ', 'CREATE DOMAIN', identified.identity, 'AS', format_type(t.typbasetype, t.typtypmod),
            'DEFAULT ' || t.typdefault, CASE WHEN t.typnotnull THEN 'NOT NULL' END,
            (SELECT string_agg(format('CONSTRAINT %I %s', con.conname, pg_get_constraintdef(con.oid)), ' ' ORDER BY con.conname)
             FROM pg_constraint con WHERE con.contypid = t.oid AND con.contype = 'c'))
        WHEN t.typtype = 'c' AND r.relkind = 'c' THEN format('CREATE TYPE %s AS (%s)', identified.identity,
            (SELECT string_agg(format('%I %s', a.attname, format_type(a.atttypid, a.atttypmod)), ', ' ORDER BY a.attnum)
             FROM pg_attribute a WHERE a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped))
        WHEN t.typtype = 'r' THEN (SELECT format('CREATE TYPE %s AS RANGE (SUBTYPE = %s%s)', identified.identity, format_type(g.rngsubtype, NULL),
            CASE WHEN g.rngsubdiff::oid <> 0 THEN ', SUBTYPE_DIFF = ' || g.rngsubdiff::text ELSE '' END) FROM pg_range g WHERE g.rngtypid = t.oid)
        END AS cure
    FROM deepest u
    CROSS JOIN LATERAL pg_identify_object_as_address(u.class, u.used, 0) address
    CROSS JOIN LATERAL pg_identify_object(u.class, u.used, 0) identified
    LEFT JOIN pg_depend x ON x.classid = u.class AND x.objid = u.used AND x.deptype = 'e'
    LEFT JOIN pg_extension e ON e.oid = x.refobjid LEFT JOIN pg_namespace en ON en.oid = e.extnamespace
    LEFT JOIN pg_type t ON u.class = 'pg_type'::regclass AND t.oid = u.used LEFT JOIN pg_class r ON r.oid = t.typrelid
    LEFT JOIN pg_proc p ON u.class = 'pg_proc'::regclass AND p.oid = u.used
    LEFT JOIN pg_collation c ON u.class = 'pg_collation'::regclass AND c.oid = u.used
    WHERE NOT (t.oid IS NOT NULL AND (t.typtype = 'm' OR EXISTS (SELECT FROM pg_type element WHERE element.typarray = t.oid)))
    ORDER BY u.depth DESC, address.type, address.object_names";
