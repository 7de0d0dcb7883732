//! Changes as rows of the target: strict, of every type, under the versions that were prepared.

use super::*;

/// The error of one part, from rows 1 to 9 that are there.
async fn failure(endpoint: &Endpoint, admin: &Client, items: &MappedTable, changes: Changes) -> sluice::engine::error::Error {
    admin
        .batch_execute("TRUNCATE shop.items; INSERT INTO shop.items SELECT n, 'secret ' || n FROM generate_series(1, 9) n")
        .await
        .expect("rows");
    let (claimed, mut applier) = target(endpoint.clone()).claim(&key("s"), &owner("a"), None).await.expect("a claim");
    let at = claimed.checkpoint.expect("a checkpoint").position.0;
    applier.prepare(std::slice::from_ref(items)).await.expect("prepared");
    let error = apply(&mut applier, changes.committed(at + 8)).await.expect_err("an error");
    assert_eq!(rows(admin, "shop.items").await.len(), 9, "rolled back");
    assert!(!error.message.contains("secret"), "{error}");
    error
}

#[tokio::test]
async fn steady_state_is_strict_and_names_the_first_key() {
    let server = server();
    let (admin, _) = database(&server, "strict").await;
    let items = items();
    let endpoint = server.endpoint("strict");
    let (_, applier) = stream(endpoint.clone(), "s", std::slice::from_ref(&items)).await;
    drop(applier);
    type Make = fn(&MappedTable, &mut Changes);
    let missing: [(&str, Make); 6] = [
        ("update of a set", |items, c| [1, 20, 3, 30].map(|id| c.update(items, &[], &[int(id), text("x")])).into_iter().collect()),
        ("one update", |items, c| c.update(items, &[], &[int(20), text("x")])),
        ("delete of a set", |items, c| [1, 2, 20, 30].map(|id| c.delete(items, &[int(id), Value::Null])).into_iter().collect()),
        ("one delete", |items, c| c.delete(items, &[int(20), Value::Null])),
        ("moved keys of a set", |items, c| {
            for (from, to) in [(1, 101), (20, 102), (30, 103)] {
                c.update(items, &[int(from), Value::Null], &[int(to), text("x")]);
            }
        }),
        ("one moved key", |items, c| c.update(items, &[int(20), Value::Null], &[int(1), text("x")])),
    ];
    for (what, make) in missing {
        let mut changes = Changes::default();
        make(&items, &mut changes);
        let error = failure(&endpoint, &admin, &items, changes).await;
        assert_eq!((error.class, error.reason), (Class::Stop, reason::ROW_MISSING), "{what}: {error}");
        assert!(error.message.contains("shop.items") && error.message.contains("id = 20 "), "{what}: {error}");
    }
    for count in [1, 2, 300] {
        let changes = inserts(&items, 9..9 + count);
        let error = failure(&endpoint, &admin, &items, changes).await;
        assert_eq!((error.class, error.reason), (Class::Stop, reason::ROW_CONFLICT), "{error}");
        assert!(error.message.contains("(id)=(9)"), "{error}");
    }
    admin.batch_execute("ALTER TABLE shop.items ADD CONSTRAINT short CHECK (v NOT LIKE 'row 1_')").await.expect("a constraint");
    let error = failure(&endpoint, &admin, &items, inserts(&items, 10..15)).await;
    assert_eq!((error.class, error.reason), (Class::Stop, reason::WRITE_REFUSED), "{error}");
    assert!(error.message.contains("short") && !error.message.contains("row 1"), "{error}");
}

#[tokio::test]
async fn a_key_that_names_several_rows_is_told() {
    let server = server();
    let (admin, _) = database(&server, "doubles").await;
    let items = items();
    let (_, mut applier) = stream(server.endpoint("doubles"), "s", std::slice::from_ref(&items)).await;
    admin.batch_execute("ALTER TABLE shop.items DROP CONSTRAINT items_pkey").await.expect("no key");
    admin.batch_execute("INSERT INTO shop.items VALUES (1, 'a'), (2, 'b'), (2, 'b'), (3, 'c')").await.expect("rows");
    let mut changes = Changes::default();
    for id in 1..4 {
        changes.update(&items, &[], &[int(id), text("x")]);
    }
    let error = apply(&mut applier, changes.committed(10)).await.expect_err("refused");
    assert_eq!((error.class, error.reason), (Class::Stop, reason::ROW_CONFLICT));
    assert!(error.message.contains("several rows with id = 2"), "{error}");
}

#[tokio::test]
async fn rows_of_partitions_are_found_in_their_own() {
    let server = server();
    let (admin, _) = database(&server, "partitions").await;
    admin
        .batch_execute(
            "CREATE SCHEMA shop; CREATE TABLE shop.log (p int4, v text) PARTITION BY LIST (p);
             CREATE TABLE shop.log1 PARTITION OF shop.log FOR VALUES IN (1);
             CREATE TABLE shop.log2 (v text, p int4); ALTER TABLE shop.log ATTACH PARTITION shop.log2 FOR VALUES IN (2)",
        )
        .await
        .expect("partitions");
    let table = mapped(5, "log", "shop", &["p int4", "v text"]);
    let (_, mut applier) = stream(server.endpoint("partitions"), "s", std::slice::from_ref(&table)).await;
    let mut changes = Changes::default();
    for (p, v) in [(1, "a"), (1, "b"), (2, "a"), (2, "b"), (2, "c")] {
        changes.insert(&table, &[int(p), text(v)]);
    }
    // The first rows of both partitions have the same ctid.
    changes.delete(&table, &[int(2), text("a")]);
    changes.update(&table, &[int(2), text("b")], &[int(1), text("moved")]);
    apply(&mut applier, changes.committed(10)).await.expect("applied");
    assert_eq!(rows(&admin, "shop.log").await, ["(1,a)", "(1,b)", "(1,moved)", "(2,c)"]);
}

#[tokio::test]
async fn rows_without_a_key_are_found_one_by_one() {
    let server = server();
    let (admin, _) = database(&server, "keyless").await;
    let columns = ["n numeric", "p point", "j json", "f float8", "c char(3)"];
    let table = mapped(5, "log", "shop", &columns);
    let (_, mut applier) = stream(server.endpoint("keyless"), "s", std::slice::from_ref(&table)).await;
    let row = |n: &str, f: &str| [text(n), text("(1,2)"), text("{\"a\": 1}"), text(f), text("x")];
    let with_null = [text("1.0"), Value::Null, text("[]"), Value::Null, Value::Null];
    let mut changes = Changes::default();
    for new in [row("1.0", "0"), row("1.00", "-0"), row("1.00", "-0"), row("1.00", "0"), with_null.clone()] {
        changes.insert(&table, &new);
    }
    // Equal to all of the first four; the identical one goes.
    changes.delete(&table, &row("1.00", "-0"));
    changes.update(&table, &row("1.00", "0"), &[text("9"), Value::Unchanged, Value::Unchanged, text("9"), text("y")]);
    changes.update(&table, &with_null, &[Value::Null, text("(3,4)"), text("1"), text("1"), text("z")]);
    let applied = apply(&mut applier, changes.committed(10)).await.expect("applied");
    assert_eq!((applied.inserts, applied.updates, applied.deletes), (5, 2, 1));
    let expected = [
        r#"(,"(3,4)",1,1,"z  ")"#,
        r#"(1.0,"(1,2)","{""a"": 1}",0,"x  ")"#,
        r#"(1.00,"(1,2)","{""a"": 1}",-0,"x  ")"#,
        r#"(9,"(1,2)","{""a"": 1}",9,"y  ")"#,
    ];
    assert_eq!(rows(&admin, "shop.log").await, expected);
    let mut changes = Changes::default();
    changes.delete(&table, &row("7", "7"));
    let error = apply(&mut applier, changes.committed(20)).await.expect_err("missing");
    assert_eq!(error.reason, reason::ROW_MISSING);
    assert!(!error.message.contains('7'), "no values of rows without a key: {error}");
}

#[tokio::test]
async fn values_of_any_type_arrive_unchanged_or_are_refused() {
    let server = server();
    let (admin, _) = database(&server, "types").await;
    admin.batch_execute("CREATE TYPE mood AS ENUM ('ok', 'so so'); CREATE EXTENSION IF NOT EXISTS plpgsql").await.expect("a type");
    let columns = ["!id int4", "m public.mood", "v varchar(3)", "c char(4)", "l int4[]", "r regclass"];
    let table = mapped(6, "all types", "Odd \"schema\"", &columns);
    let (_, mut applier) = stream(server.endpoint("types"), "s", std::slice::from_ref(&table)).await;
    let row = |id: i32, v: &str| [int(id), text("so so"), text(v), text("ab"), text("{1,NULL}"), text("pg_class")];
    let mut changes = Changes::default();
    changes.insert(&table, &row(1, "abc"));
    for id in 2..5 {
        changes.insert(&table, &row(id, "a"));
    }
    // Binary and text of one column in one set.
    changes.insert(&table, &[int(5), Value::Binary(b"ok".to_vec()), Value::Binary(b"b".to_vec()), Value::Null, Value::Null, Value::Null]);
    changes.insert(&table, &[int(6), text("ok"), text("b"), Value::Null, Value::Null, Value::Null]);
    for id in 1..5 {
        changes.update(&table, &[], &[int(id), text("ok"), Value::Unchanged, Value::Unchanged, text("{}"), Value::Null]);
    }
    apply(&mut applier, changes.committed(10)).await.expect("applied");
    let got = rows(&admin, "\"Odd \"\"schema\"\"\".\"all types\"").await;
    assert_eq!(got[0], "(1,ok,abc,\"ab  \",{},)");
    assert_eq!((&got[4][..], &got[5][..]), ("(5,ok,b,,,)", "(6,ok,b,,,)"));
    // Too long: an error, never cut.
    for count in [1, 2, 250] {
        let (claimed, mut applier) = target(server.endpoint("types")).claim(&key("s"), &owner("a"), None).await.expect("a claim");
        assert_eq!(claimed.checkpoint.expect("a checkpoint").position, Lsn(10));
        applier.prepare(std::slice::from_ref(&table)).await.expect("prepared");
        let mut changes = Changes::default();
        for id in 0..count {
            changes.insert(&table, &row(100 + id, "abcd"));
        }
        let error = apply(&mut applier, changes.committed(20)).await.expect_err("too long");
        assert_eq!((error.class, error.reason), (Class::Stop, reason::WRITE_REFUSED), "{error}");
    }
    // An OID of the source means something else here.
    let (_, mut applier) = target(server.endpoint("types")).claim(&key("s"), &owner("a"), None).await.expect("a claim");
    applier.prepare(std::slice::from_ref(&table)).await.expect("prepared");
    let mut changes = Changes::default();
    changes.insert(&table, &[int(200), Value::Null, Value::Null, Value::Null, Value::Null, int(1259)]);
    assert_eq!(apply(&mut applier, changes.committed(20)).await.expect_err("refused").class, Class::Bug);
}

#[tokio::test]
async fn columns_of_rows_must_be_those_that_were_prepared() {
    let server = server();
    let (admin, _) = database(&server, "versions").await;
    let items = items();
    let (target, mut applier) = stream(server.endpoint("versions"), "s", std::slice::from_ref(&items)).await;
    // The same columns, read again.
    apply(&mut applier, inserts(&self::items(), 0..2).committed(10)).await.expect("applied");
    let wider = mapped(1, "items", "shop", &["!id int4", "v text", "w text"]);
    let mut changes = Changes::default();
    changes.insert(&wider, &[int(9), text("x"), text("y")]);
    let error = apply(&mut applier, changes.committed(20)).await.expect_err("refused");
    assert_eq!((error.class, error.reason), (Class::Stop, reason::SCHEMA_CHANGED));

    let (_, mut applier) = target.claim(&key("s"), &owner("a"), None).await.expect("a claim");
    let error = applier.prepare(std::slice::from_ref(&wider)).await.expect_err("refused");
    assert_eq!(error.reason, reason::TARGET_TABLE_INCOMPATIBLE);
    admin.batch_execute("ALTER TABLE shop.items ADD w text").await.expect("a column");
    applier.prepare(std::slice::from_ref(&wider)).await.expect("prepared");
    let mut changes = Changes::default();
    changes.insert(&wider, &[int(9), text("x"), text("y")]);
    apply(&mut applier, changes.committed(20)).await.expect("applied");
    assert_eq!(rows(&admin, "shop.items").await.last().map(String::as_str), Some("(9,x,y)"));
}

/// Rows that were inserted, updated and deleted, as the server counts them.
async fn written(admin: &Client, table: &str, expected: [i64; 3]) {
    let sql = "SELECT ARRAY[n_tup_ins, n_tup_upd, n_tup_del] FROM pg_stat_user_tables WHERE relid = to_regclass($1)";
    eventually(20, &format!("{expected:?} rows of {table} written"), || async {
        admin.query_one(sql, &[&table]).await.expect("counts").get::<_, Vec<i64>>(0) == expected
    })
    .await;
}

#[tokio::test]
async fn one_net_effect_per_key_reaches_the_table() {
    let server = server();
    let (admin, _) = database(&server, "net").await;
    let accounts = mapped(1, "accounts", "shop", &["!id int4", "code int4", "v text"]);
    let (_, mut applier) = stream(server.endpoint("net"), "s", std::slice::from_ref(&accounts)).await;
    admin.batch_execute("CREATE UNIQUE INDEX ON shop.accounts (code) WHERE v <> 'closed'").await.expect("an index");
    applier.prepare(std::slice::from_ref(&accounts)).await.expect("prepared");

    let mut changes = Changes::default();
    for id in 0..300 {
        changes.insert(&accounts, &[int(id), int(id), text("new")]);
        changes.update(&accounts, &[], &[int(id), int(id), text("newer")]);
    }
    for id in 300..400 {
        changes.insert(&accounts, &[int(id), int(id), text("new")]);
        changes.delete(&accounts, &[int(id), Value::Null, Value::Null]);
    }
    let applied = apply(&mut applier, changes.committed(10)).await.expect("applied");
    assert_eq!((applied.inserts, applied.updates, applied.deletes), (400, 300, 100));
    written(&admin, "shop.accounts", [300, 0, 0]).await;

    // 10,000 updates of ten rows, two of which exchange their codes through a third; and one that only names the same.
    let mut changes = Changes::default();
    for number in 0..10_000 {
        changes.update(&accounts, &[], &[int(number % 10), Value::Unchanged, Value::Unchanged]);
    }
    for (id, code) in [(1, 999), (2, 1), (1, 2)] {
        changes.update(&accounts, &[], &[int(id), int(code), text("newer")]);
    }
    changes.update(&accounts, &[], &[int(3), int(3), text("newer")]);
    let applied = apply(&mut applier, changes.committed(20)).await.expect("applied");
    assert_eq!(applied.updates, 10_004);
    // Rows 1 and 2 go and come. Nothing is written of the others: their columns are all looked at, and none has changed.
    written(&admin, "shop.accounts", [302, 0, 2]).await;
    let codes = "SELECT string_agg(id || '=' || code, ' ' ORDER BY id) FROM shop.accounts WHERE id < 5";
    assert_eq!(admin.query_one(codes, &[]).await.expect("codes").get::<_, String>(0), "0=0 1=2 2=1 3=3 4=4");

    // A row whose key moves takes over what another one leaves; columns that were not sent go with it.
    let mut changes = Changes::default();
    changes.update(&accounts, &[int(7), Value::Null, Value::Null], &[int(1007), Value::Unchanged, Value::Unchanged]);
    changes.update(&accounts, &[int(8), Value::Null, Value::Null], &[int(7), Value::Unchanged, text("moved")]);
    apply(&mut applier, changes.committed(30)).await.expect("applied");
    written(&admin, "shop.accounts", [304, 0, 4]).await;
    let moved = "SELECT string_agg(concat_ws(' ', id, code, v), ', ' ORDER BY id) FROM shop.accounts WHERE code IN (7, 8)";
    assert_eq!(admin.query_one(moved, &[]).await.expect("rows").get::<_, String>(0), "7 8 moved, 1007 7 newer");
}

#[tokio::test]
async fn constraints_that_wait_for_the_commit_let_values_be_exchanged() {
    let server = server();
    let (admin, _) = database(&server, "exchanges").await;
    let accounts = mapped(1, "accounts", "shop", &["!id int4", "code int4", "v text"]);
    let (_, mut applier) = stream(server.endpoint("exchanges"), "s", std::slice::from_ref(&accounts)).await;
    assert_eq!(applier.mode(), ApplyMode::Replica);
    let exchange = |changes: &mut Changes, pairs: &[(i32, i32)]| {
        for (id, code) in pairs {
            changes.update(&accounts, &[], &[int(*id), int(*code), Value::Unchanged]);
        }
    };
    let codes = "SELECT string_agg(id || '=' || code, ' ' ORDER BY id) FROM shop.accounts WHERE id < 5";
    let mut end = 10;
    for constraint in [
        "UNIQUE (code) DEFERRABLE INITIALLY DEFERRED",
        "UNIQUE (code) DEFERRABLE INITIALLY IMMEDIATE",
        "EXCLUDE (code WITH =) DEFERRABLE INITIALLY DEFERRED",
    ] {
        let sql =
            format!("TRUNCATE shop.accounts; ALTER TABLE shop.accounts DROP CONSTRAINT IF EXISTS once, ADD CONSTRAINT once {constraint}");
        admin.batch_execute(&sql).await.expect("a constraint");
        applier.prepare(std::slice::from_ref(&accounts)).await.expect("prepared");
        let mut changes = Changes::default();
        (0..300).for_each(|id| changes.insert(&accounts, &[int(id), int(id), text("new")]));
        apply(&mut applier, changes.committed(end)).await.expect("applied");

        // In one batch: two directly, and three in a ring.
        let mut changes = Changes::default();
        exchange(&mut changes, &[(0, 1), (1, 0), (2, 3), (3, 4), (4, 2)]);
        apply(&mut applier, changes.committed(end + 10)).await.expect(constraint);
        assert_eq!(admin.query_one(codes, &[]).await.expect("codes").get::<_, String>(0), "0=1 1=0 2=3 3=4 4=2", "{constraint}");

        // In parts of one transaction, each of which alone leaves a value twice: one row, and enough for sets.
        for (pairs, closing) in
            [(vec![(0, 0)], vec![(1, 1)]), ((2..200).map(|id| (id, 200)).collect(), (2..200).map(|id| (id, id)).collect())]
        {
            end += 20;
            let mut first = Changes::default();
            exchange(&mut first, &pairs);
            let applied = apply(&mut applier, first.part(false, None, end)).await.expect(constraint);
            assert!(!applied.committed);
            let mut last = Changes::default();
            exchange(&mut last, &closing);
            let applied = apply(&mut applier, last.part(true, Some(end), end)).await.expect(constraint);
            assert!(applied.committed);
        }
        assert_eq!(admin.query_one(codes, &[]).await.expect("codes").get::<_, String>(0), "0=0 1=1 2=2 3=3 4=4", "{constraint}");
        let twice: i64 = admin.query_one("SELECT count(*) - count(DISTINCT code) FROM shop.accounts", &[]).await.expect("a count").get(0);
        assert_eq!(twice, 0, "{constraint}");
        end += 10;
    }
}

#[tokio::test]
async fn arrays_are_written_in_sets_and_a_table_that_was_altered_beneath_them_is_read_again() {
    let server = server();
    let (admin, _) = database(&server, "arrays").await;
    let table = mapped(1, "lists", "shop", &["!id int4", "l int4[]", "v text"]);
    let endpoint = server.endpoint("arrays");
    let (_, mut applier) = stream(endpoint.clone(), "s", std::slice::from_ref(&table)).await;
    let list = |id: i32| Value::Binary([1, 0, 23, 1, 1, 4, id].iter().flat_map(|number: &i32| number.to_be_bytes()).collect());
    let updates = |first: i32| {
        let mut changes = Changes::default();
        (0..50).for_each(|id| changes.update(&table, &[], &[int(id), list(first + id), Value::Unchanged]));
        changes
    };
    let mut changes = Changes::default();
    (0..50).for_each(|id| changes.insert(&table, &[int(id), list(id), text("x")]));
    apply(&mut applier, changes.committed(10)).await.expect("applied");
    // Made after the table was looked at, so that it changes nothing but the count.
    let count = "CREATE TABLE counted (n int);
        CREATE FUNCTION count_one() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO public.counted VALUES (1); RETURN NULL; END';
        CREATE TRIGGER count_one AFTER UPDATE ON shop.lists FOR EACH STATEMENT EXECUTE FUNCTION count_one();
        ALTER TABLE shop.lists ENABLE REPLICA TRIGGER count_one";
    admin.batch_execute(count).await.expect("a trigger");
    apply(&mut applier, updates(100).committed(20)).await.expect("applied");
    assert_eq!(rows(&admin, "counted").await.len(), 1, "one statement");

    admin.batch_execute("DROP TRIGGER count_one ON shop.lists; ALTER TABLE shop.lists ADD more text").await.expect("a column");
    let error = apply(&mut applier, updates(200).committed(30)).await.expect_err("another row type");
    assert_eq!((error.class, error.reason), (Class::Retry, reason::SCHEMA_CHANGED), "{error}");
    let (_, mut applier) = target(endpoint).claim(&key("s"), &owner("a"), None).await.expect("a claim");
    applier.prepare(std::slice::from_ref(&table)).await.expect("prepared");
    apply(&mut applier, updates(200).committed(30)).await.expect("applied");
    assert_eq!(rows(&admin, "shop.lists").await.first().map(String::as_str), Some("(0,{200},x,)"));
}
