use super::*;
use crate::connectors::postgres::catalog::facts::{PrimaryKey, RelationColumn};

const SERVER_VERSION: i32 = 150_019;

fn server() -> Server {
    Server { version: SERVER_VERSION, role: "sluice".into() }
}

fn column(name: &str) -> RelationColumn {
    RelationColumn {
        column: Column {
            name: name.into(),
            type_id: 23,
            type_name: QualifiedName::new("pg_catalog", "int4"),
            declared: "integer".into(),
            key: false,
            not_null: false,
            generated: None,
            collation: None,
            number: 0,
            modifier: -1,
        },
        may_select: true,
        uses: Vec::new(),
    }
}

fn generated(name: &str, uses: &str) -> RelationColumn {
    let plain = column(name);
    RelationColumn { column: Column { generated: Some(format!("({uses} + 1)")), ..plain.column }, uses: vec![uses.into()], ..plain }
}

fn columns(names: &[&str]) -> DeclaredIdentity {
    DeclaredIdentity::Columns(names.iter().map(|name| (*name).to_owned()).collect())
}

/// `sales.orders (id primary key, a, b, twice generated from a)`.
fn orders() -> Relation {
    Relation {
        id: 100,
        name: QualifiedName::new("sales", "orders"),
        kind: 'r',
        persistence: 'p',
        identity: columns(&["id"]),
        columns: vec![column("id"), column("a"), column("b"), generated("twice", "a")],
        primary_key: Some(PrimaryKey { name: Some("orders_pkey".into()), columns: vec!["id".into()], deferrable: false, id: None }),
        ancestors: Vec::new(),
        leaves: Vec::new(),
        estimated_rows: 10,
        blocks: 1,
        may_use_schema: true,
        row_security: false,
        storage: String::new(),
        columns_ever: 4,
    }
}

fn leaf(identity: DeclaredIdentity) -> Leaf {
    Leaf { name: QualifiedName::new("sales", "orders_1"), kind: 'r', persistence: 'p', identity }
}

fn wish(excluded: &[&str]) -> Wish {
    Wish {
        target: QualifiedName::new("dw", "orders"),
        excluded: excluded.iter().map(|name| (*name).to_owned()).collect(),
        accept_narrower_types: false,
    }
}

fn refused(relation: &Relation, excluded: &[&str]) -> (&'static str, String) {
    let error = map(relation, &wish(excluded), &server()).expect_err("must be refused");
    (error.reason, error.message)
}

fn names(columns: &[Column]) -> Vec<&str> {
    columns.iter().map(|column| column.name.as_str()).collect()
}

#[test]
fn a_table_is_mapped_without_excluded_and_generated_columns() {
    let table = map(&orders(), &wish(&["b"]), &server()).unwrap();
    assert_eq!(names(&table.version.columns), ["id", "a"]);
    assert_eq!(names(&table.generated), ["twice"]);
    assert_eq!(table.version.columns.iter().map(|column| column.key).collect::<Vec<_>>(), [true, false]);
    assert_eq!(table.version.identity, Identity::Key);
    assert_eq!((table.primary_key, table.primary_key_name), (vec!["id".to_owned()], Some("orders_pkey".to_owned())));
    assert_eq!(table.target, QualifiedName::new("dw", "orders"));
}

#[test]
fn a_full_identity_has_no_key_columns() {
    let table = map(&Relation { identity: DeclaredIdentity::Full, ..orders() }, &wish(&[]), &server()).unwrap();
    assert_eq!(table.version.identity, Identity::Full);
    assert!(table.version.columns.iter().all(|column| !column.key));
}

#[test]
fn a_deferrable_primary_key_names_no_row() {
    let primary_key = orders().primary_key.map(|key| PrimaryKey { deferrable: true, ..key });
    let table = map(&Relation { identity: DeclaredIdentity::Full, primary_key, ..orders() }, &wish(&[]), &server()).unwrap();
    assert_eq!((table.primary_key, table.primary_key_name), (vec![], None));
}

#[test]
fn a_primary_key_that_loses_a_column_is_not_mapped() {
    let relation = Relation {
        identity: columns(&["a"]),
        primary_key: Some(PrimaryKey { name: Some("k".into()), columns: vec!["id".into(), "b".into()], deferrable: false, id: None }),
        ..orders()
    };
    let table = map(&relation, &wish(&["b"]), &server()).unwrap();
    assert_eq!((table.primary_key, table.primary_key_name), (vec![], None));
}

#[test]
fn only_logged_tables_of_users_are_followed() {
    for (kind, persistence, words) in [
        ('v', 'p', "a view"),
        ('m', 'p', "a materialized view"),
        ('f', 'p', "a foreign table"),
        ('S', 'p', "a sequence"),
        ('i', 'p', "no table"),
        ('r', 'u', "an unlogged table"),
        ('r', 't', "a temporary table"),
    ] {
        let (reason, message) = refused(&Relation { kind, persistence, ..orders() }, &[]);
        assert_eq!(reason, reason::TABLE_NOT_SUPPORTED);
        assert!(message.contains(words), "{message}");
    }
    for schema in ["pg_catalog", "information_schema", "pg_toast", "pg_temp_3", "_sluice"] {
        let relation = Relation { name: QualifiedName::new(schema, "t"), ..orders() };
        assert_eq!(refused(&relation, &[]).0, reason::TABLE_NOT_SUPPORTED, "{schema}");
    }
}

#[test]
fn a_table_without_identity_is_refused_with_its_cure() {
    let missing = |primary_key| Relation { identity: DeclaredIdentity::Missing("why"), primary_key, ..orders() };
    let (reason, message) = refused(&missing(None), &[]);
    assert_eq!(reason, reason::TABLE_WITHOUT_IDENTITY);
    assert!(message.contains(r#"ALTER TABLE "sales"."orders" ADD PRIMARY KEY"#), "{message}");
    let (_, message) = refused(&missing(orders().primary_key), &[]);
    assert!(message.contains("REPLICA IDENTITY DEFAULT"), "{message}");
    let deferrable = orders().primary_key.map(|key| PrimaryKey { deferrable: true, ..key });
    assert!(refused(&missing(deferrable), &[]).1.contains("NOT DEFERRABLE"));
    let bare = Relation { identity: DeclaredIdentity::Full, columns: Vec::new(), ..orders() };
    assert_eq!(refused(&bare, &[]).0, reason::TABLE_WITHOUT_IDENTITY);
}

#[test]
fn a_generated_column_in_the_identity_is_refused() {
    let (reason, message) = refused(&Relation { identity: columns(&["id", "twice"]), ..orders() }, &[]);
    assert_eq!(reason, reason::TABLE_WITHOUT_IDENTITY);
    assert!(message.contains("twice"), "{message}");
}

#[test]
fn what_can_not_be_excluded_is_refused() {
    assert_eq!(refused(&orders(), &["nothing"]).0, reason::COLUMN_MISSING);
    assert_eq!(refused(&orders(), &["id"]).0, reason::EXCLUDED_COLUMN_IN_IDENTITY);
    assert_eq!(refused(&Relation { identity: DeclaredIdentity::Full, ..orders() }, &["b"]).0, reason::EXCLUDED_COLUMN_IN_IDENTITY);
    let (reason, message) = refused(&orders(), &["a"]);
    assert_eq!(reason, reason::INVALID_SPEC, "the generated column needs it");
    assert!(message.contains("twice"), "{message}");
    assert!(map(&orders(), &wish(&["a", "twice"]), &server()).is_ok());
    let old = Server { version: 140_011, ..server() };
    assert_eq!(map(&orders(), &wish(&["b"]), &old).unwrap_err().reason, reason::NEEDS_POSTGRESQL_15);
    assert!(map(&orders(), &wish(&[]), &old).is_ok());
}

#[test]
fn what_the_role_may_not_read_is_refused_with_its_cure() {
    let (reason, message) = refused(&Relation { may_use_schema: false, ..orders() }, &[]);
    assert_eq!(reason, reason::PRIVILEGE_MISSING);
    assert!(message.contains("GRANT USAGE ON SCHEMA"), "{message}");
    let mut relation = orders();
    relation.columns[2].may_select = false;
    let (reason, message) = refused(&relation, &[]);
    assert_eq!(reason, reason::PRIVILEGE_MISSING);
    assert!(message.contains(r#"GRANT SELECT ON "sales"."orders" TO "sluice""#), "{message}");
    assert!(map(&relation, &wish(&["b"]), &server()).is_ok(), "an excluded column need not be readable");
    assert!(refused(&Relation { row_security: true, ..orders() }, &[]).1.contains("BYPASSRLS"));
}

#[test]
fn partitions_must_be_logged_and_named_like_their_root() {
    let root = |leaves| Relation { kind: 'p', leaves, ..orders() };
    assert!(map(&root(vec![leaf(columns(&["id"]))]), &wish(&[]), &server()).is_ok());
    for identity in [DeclaredIdentity::Missing("why"), DeclaredIdentity::Full, columns(&["id", "a"])] {
        let (reason, message) = refused(&root(vec![leaf(identity)]), &[]);
        assert_eq!(reason, reason::TABLE_WITHOUT_IDENTITY);
        assert!(message.contains("orders_1"), "{message}");
    }
    let foreign = Leaf { kind: 'f', ..leaf(columns(&["id"])) };
    assert_eq!(refused(&root(vec![foreign]), &[]).0, reason::TABLE_NOT_SUPPORTED);
    let two = Relation { identity: columns(&["id", "a"]), ..root(vec![leaf(columns(&["a", "id"]))]) };
    assert!(map(&two, &wish(&[]), &server()).is_ok(), "the order in the index does not matter");
}

#[test]
fn a_part_and_its_root_are_found() {
    let part = Relation { id: 101, name: QualifiedName::new("sales", "part"), ancestors: vec![100], ..orders() };
    assert_eq!(part_of_chosen(&[orders(), part.clone()]), Some((&part.name, &orders().name)));
    assert_eq!(part_of_chosen(&[part]), None);
}
