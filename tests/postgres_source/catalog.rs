use super::{Database, mapped, on_each_version, on_one_version, refused, selection};
use sluice::engine::error::reason;
use sluice::engine::roles::{SchemaSelection, Selection, Source as _, TableSelection};
use sluice::engine::table::{Column, Identity, MappedTable, QualifiedName};

on_each_version!(
    tables_are_mapped,
    identities_are_read,
    schemas_are_mapped_through_roots,
    what_can_not_be_followed_is_refused,
    what_can_not_be_read_is_refused,
);
on_one_version!(sizes_come_from_the_file);

fn names(columns: &[Column]) -> Vec<&str> {
    columns.iter().map(|column| column.name.as_str()).collect()
}

fn keys(table: &MappedTable) -> Vec<&str> {
    table.version.columns.iter().filter(|column| column.key).map(|column| column.name.as_str()).collect()
}

async fn tables_are_mapped(major: u32) {
    let database = Database::new(
        major,
        "mapped",
        r#"CREATE SCHEMA other; CREATE TYPE other."Mood" AS ENUM ('ok'); CREATE DOMAIN other.short AS text CHECK (length(value) < 9);
           CREATE COLLATION other.german FROM "C";
           CREATE TABLE "Order"("select" int, "Name" varchar(20) COLLATE other.german, mood other."Mood"[], d other.short, gone int,
               price numeric(12,2) NOT NULL, twice numeric GENERATED ALWAYS AS (price * 2) STORED, at timestamptz(3), "x""y" text,
               CONSTRAINT "Order key" PRIMARY KEY ("Name", "select"));
           ALTER TABLE "Order" DROP COLUMN gone"#,
    )
    .await;
    let table = mapped(&database.source(), &[("Order", &[])]).await.remove(0);
    assert_eq!(names(&table.version.columns), ["select", "Name", "mood", "d", "price", "at", "x\"y"]);
    let declared: Vec<_> = table.version.columns.iter().map(|column| column.declared.as_str()).collect();
    let expected =
        ["integer", "character varying(20)", "other.\"Mood\"[]", "other.short", "numeric(12,2)", "timestamp(3) with time zone", "text"];
    assert_eq!(declared, expected);
    assert_eq!(keys(&table), ["select", "Name"]);
    assert_eq!((table.primary_key, table.primary_key_name.as_deref()), (vec!["Name".into(), "select".into()], Some("Order key")));
    assert_eq!(table.version.identity, Identity::Key);
    let columns = &table.version.columns;
    assert_eq!(columns[1].collation, Some(QualifiedName::new("other", "german")));
    assert_eq!(columns.iter().filter(|column| column.collation.is_some()).count(), 1);
    assert_eq!(columns[2].type_name, QualifiedName::new("other", "_Mood"));
    assert_eq!(columns[0].type_name, QualifiedName::new("pg_catalog", "int4"));
    assert_eq!(columns.iter().map(|column| column.not_null).collect::<Vec<_>>(), [true, true, false, false, true, false, false]);
    assert_eq!(names(&table.generated), ["twice"]);
    assert_eq!(table.generated[0].generated.as_deref(), Some("(price * (2)::numeric)"));
}

async fn identities_are_read(major: u32) {
    let database = Database::new(
        major,
        "identities",
        "CREATE TABLE by_index(a int PRIMARY KEY, b int NOT NULL, c text NOT NULL);
         CREATE UNIQUE INDEX by_index_cb ON by_index(c, b) INCLUDE (a); ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_cb;
         CREATE TABLE by_row(a int, b json); ALTER TABLE by_row REPLICA IDENTITY FULL;
         CREATE TABLE none(a int, b int NOT NULL);
         CREATE TABLE nothing(a int PRIMARY KEY); ALTER TABLE nothing REPLICA IDENTITY NOTHING;
         CREATE TABLE deferred(a int PRIMARY KEY DEFERRABLE);
         CREATE TABLE lost(a int NOT NULL); CREATE UNIQUE INDEX lost_a ON lost(a); ALTER TABLE lost REPLICA IDENTITY USING INDEX lost_a;
         DROP INDEX lost_a;
         CREATE TABLE computed(a int, b int GENERATED ALWAYS AS (a * 2) STORED PRIMARY KEY)",
    )
    .await;
    let source = database.source();
    let tables = mapped(&source, &[("by_index", &[]), ("by_row", &[])]).await;
    assert_eq!((keys(&tables[0]), tables[0].version.identity), (vec!["b", "c"], Identity::Key));
    assert_eq!(tables[0].primary_key, ["a"]);
    assert_eq!((keys(&tables[1]), tables[1].version.identity), (vec![], Identity::Full));
    for (table, words) in [
        ("none", "ADD PRIMARY KEY"),
        ("nothing", "REPLICA IDENTITY DEFAULT"),
        ("deferred", "DEFERRABLE"),
        ("lost", "is gone"),
        ("computed", "generated"),
    ] {
        let error = refused(&source, &[(table, &[])]).await;
        assert_eq!(error.reason, reason::TABLE_WITHOUT_IDENTITY, "{error}");
        assert!(error.message.contains(words) && error.message.contains(&format!("public.{table}")), "{error}");
    }
}

async fn schemas_are_mapped_through_roots(major: u32) {
    let database = Database::new(
        major,
        "roots",
        r#"CREATE SCHEMA "A"; CREATE SCHEMA b;
           CREATE TABLE "A".plain(a int PRIMARY KEY); CREATE TABLE "A".child() INHERITS ("A".plain); ALTER TABLE "A".child ADD PRIMARY KEY (a);
           CREATE TABLE "A".left_out(a int); CREATE VIEW "A".view AS SELECT 1 AS a; CREATE SEQUENCE "A".sequence;
           CREATE TABLE "A".root(a int, b int, PRIMARY KEY (a, b)) PARTITION BY RANGE (a);
           CREATE TABLE "A".part PARTITION OF "A".root FOR VALUES FROM (0) TO (10) PARTITION BY RANGE (b);
           CREATE TABLE "A".leaf PARTITION OF "A".part FOR VALUES FROM (0) TO (10);
           CREATE TABLE b.elsewhere PARTITION OF "A".root FOR VALUES FROM (10) TO (20);
           INSERT INTO "A".root SELECT i / 10, i % 10 FROM generate_series(0, 99) i; ANALYZE "A".root; ANALYZE "A".leaf"#,
    )
    .await;
    let source = database.source();
    let schema = |source: &str, target: &str| SchemaSelection {
        source: source.into(),
        target: target.into(),
        exclude_tables: vec!["left_out".into(), "not there".into()],
        accept_narrower_types: false,
    };
    let tables = source.tables(&Selection::Schemas(vec![schema("b", "b"), schema("A", "dw")])).await.unwrap();
    let targets: Vec<String> = tables.iter().map(|table| format!("{} → {}", table.source(), table.target)).collect();
    assert_eq!(targets, ["A.child → dw.child", "A.plain → dw.plain", "A.root → dw.root"]);
    assert_eq!((tables[2].blocks, tables[2].estimated_rows), (0, 100), "rows of a root are those of its partitions");
    // Without its root a partition is a table of its own.
    let tables = source.tables(&Selection::Schemas(vec![schema("b", "b")])).await.unwrap();
    assert_eq!(tables.iter().map(|table| table.source().to_string()).collect::<Vec<_>>(), ["b.elsewhere"]);
    for (schema, expected) in [(schema("none", "x"), reason::TABLE_MISSING), (schema("pg_catalog", "x"), reason::TABLE_NOT_SUPPORTED)] {
        assert_eq!(source.tables(&Selection::Schemas(vec![schema])).await.unwrap_err().reason, expected);
    }
    // A new table without identity is reported.
    database.run(r#"CREATE TABLE "A".keyless(a int)"#).await;
    let error = source.tables(&Selection::Schemas(vec![schema("A", "dw")])).await.unwrap_err();
    assert_eq!(error.reason, reason::TABLE_WITHOUT_IDENTITY, "{error}");
}

async fn what_can_not_be_followed_is_refused(major: u32) {
    let database = Database::new(
        major,
        "refusals",
        "CREATE TABLE t(a int PRIMARY KEY, b int, c int GENERATED ALWAYS AS (b + 1) STORED); CREATE TABLE wide(a int, b int);
         ALTER TABLE wide REPLICA IDENTITY FULL;
         CREATE VIEW v AS SELECT 1 AS a; CREATE MATERIALIZED VIEW m AS SELECT 1 AS a; CREATE UNLOGGED TABLE u(a int PRIMARY KEY);
         CREATE SEQUENCE s; CREATE EXTENSION postgres_fdw; CREATE SERVER f FOREIGN DATA WRAPPER postgres_fdw; CREATE FOREIGN TABLE f(a int) SERVER f;
         CREATE TABLE root(a int PRIMARY KEY) PARTITION BY RANGE (a); CREATE TABLE part PARTITION OF root FOR VALUES FROM (0) TO (9);
         CREATE TABLE root_full(a int PRIMARY KEY) PARTITION BY RANGE (a); CREATE TABLE part_full PARTITION OF root_full FOR VALUES FROM (0) TO (9);
         ALTER TABLE part_full REPLICA IDENTITY FULL;
         CREATE TABLE root_unlogged(a int PRIMARY KEY) PARTITION BY RANGE (a);
         CREATE UNLOGGED TABLE part_unlogged PARTITION OF root_unlogged FOR VALUES FROM (0) TO (9);
         CREATE SCHEMA _sluice; CREATE TABLE _sluice.streams(a int PRIMARY KEY); CREATE TEMP TABLE temporary(a int PRIMARY KEY)",
    )
    .await;
    let source = database.source();
    let b: &[&str] = &["b"];
    let old = major < 15;
    for (tables, expected, words) in [
        (vec![("missing", &[][..])], reason::TABLE_MISSING, "public.missing"),
        (vec![("T", &[])], reason::TABLE_MISSING, "public.T"),
        (vec![("v", &[])], reason::TABLE_NOT_SUPPORTED, "a view"),
        (vec![("m", &[])], reason::TABLE_NOT_SUPPORTED, "a materialized view"),
        (vec![("u", &[])], reason::TABLE_NOT_SUPPORTED, "unlogged"),
        (vec![("s", &[])], reason::TABLE_NOT_SUPPORTED, "a sequence"),
        (vec![("f", &[])], reason::TABLE_NOT_SUPPORTED, "foreign"),
        (vec![("t", &["nothing"])], reason::COLUMN_MISSING, "nothing"),
        (vec![("t", &["a"])], if old { reason::NEEDS_POSTGRESQL_15 } else { reason::EXCLUDED_COLUMN_IN_IDENTITY }, ""),
        (vec![("wide", b)], if old { reason::NEEDS_POSTGRESQL_15 } else { reason::EXCLUDED_COLUMN_IN_IDENTITY }, ""),
        (vec![("t", b)], if old { reason::NEEDS_POSTGRESQL_15 } else { reason::INVALID_SPEC }, ""),
        (vec![("t", &[]), ("t", &[])], reason::INVALID_SPEC, "twice"),
        (vec![("root", &[]), ("part", &[])], reason::INVALID_SPEC, "public.part is a partition of public.root"),
        (vec![("root_full", &[])], reason::TABLE_WITHOUT_IDENTITY, "part_full"),
        (vec![("root_unlogged", &[])], reason::TABLE_NOT_SUPPORTED, "part_unlogged"),
    ] {
        let error = refused(&source, &tables).await;
        assert_eq!(error.reason, expected, "{tables:?}: {error}");
        assert!(error.message.contains(words), "{error}");
    }
    let temporary = database.text("SELECT nspname::text FROM pg_namespace WHERE oid = pg_my_temp_schema()").await.unwrap();
    for (schema, name) in [("_sluice", "streams"), (temporary.as_str(), "temporary"), ("pg_catalog", "pg_class")] {
        let name = QualifiedName::new(schema, name);
        let table = TableSelection { source: name.clone(), target: name, exclude_columns: Vec::new(), accept_narrower_types: false };
        let error = source.tables(&Selection::Tables(vec![table])).await.unwrap_err();
        assert_eq!(error.reason, reason::TABLE_NOT_SUPPORTED, "{error}");
    }
    assert_eq!(mapped(&source, &[("part", &[])]).await.len(), 1, "a partition alone is a table");
}

async fn what_can_not_be_read_is_refused(major: u32) {
    let database = Database::new(
        major,
        "rights",
        "CREATE TABLE t(a int PRIMARY KEY, b int); CREATE SCHEMA closed; CREATE TABLE closed.t(a int PRIMARY KEY);
         CREATE TABLE ruled(a int PRIMARY KEY); ALTER TABLE ruled ENABLE ROW LEVEL SECURITY; GRANT SELECT ON ruled TO PUBLIC",
    )
    .await;
    let source = database.source_as("reader", "").await;
    let error = refused(&source, &[("t", &[])]).await;
    assert_eq!(error.reason, reason::PRIVILEGE_MISSING, "{error}");
    assert!(error.message.contains(r#"GRANT SELECT ON "public"."t" TO "reader""#), "{error}");
    database.run("GRANT SELECT (a) ON t TO reader").await;
    assert!(refused(&source, &[("t", &[])]).await.message.contains("\"b\""));
    if major >= 15 {
        mapped(&source, &[("t", &["b"])]).await;
    }
    let error = refused(&source, &[("ruled", &[])]).await;
    assert!(error.reason == reason::PRIVILEGE_MISSING && error.message.contains("BYPASSRLS"), "{error}");
    let closed = QualifiedName::new("closed", "t");
    let table = TableSelection { source: closed.clone(), target: closed, exclude_columns: Vec::new(), accept_narrower_types: false };
    let error = source.tables(&Selection::Tables(vec![table])).await.unwrap_err();
    assert!(error.reason == reason::PRIVILEGE_MISSING && error.message.contains("GRANT USAGE ON SCHEMA \"closed\""), "{error}");
    database.run("DROP OWNED BY reader; DROP ROLE reader").await;
}

async fn sizes_come_from_the_file(major: u32) {
    let database = Database::new(
        major,
        "sizes",
        "CREATE TABLE t(a int PRIMARY KEY, b text) WITH (autovacuum_enabled = off); INSERT INTO t SELECT i, repeat('x', 100) FROM generate_series(1, 1000) i",
    )
    .await;
    let source = database.source();
    let selection = selection(&[("t", &[])]);
    let read = async || source.tables(&selection).await.unwrap().remove(0);
    let size = "SELECT (pg_relation_size('t') / 8192)::text";
    let unknown = read().await;
    assert_eq!(Some(unknown.blocks.to_string()), database.text(size).await);
    assert!(unknown.estimated_rows >= 500, "a guess by size: {}", unknown.estimated_rows);
    database.run("ANALYZE t; INSERT INTO t SELECT i, repeat('x', 100) FROM generate_series(1001, 3000) i").await;
    let grown = read().await;
    assert_eq!(Some(grown.blocks.to_string()), database.text(size).await);
    assert!((2700..3300).contains(&grown.estimated_rows), "scaled: {}", grown.estimated_rows);
}
