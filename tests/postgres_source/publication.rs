use super::support::eventually;
use super::{Database, alone, mapped, on_each_version, on_one_version};
use sluice::engine::error::{Class, reason};
use sluice::engine::roles::Source as _;
use sluice::engine::table::QualifiedName;

on_each_version!(
    holds_exactly_the_mapped_tables,
    changes_behind_the_catalog_are_caught_under_the_lock,
    a_users_publication_is_used_or_refused,
    who_is_taken_out_twice_is_looked_at_again,
);
on_one_version!(users_writes_go_on, long_locks_are_waited_for_in_turns, rights_of_the_owner_are_needed);

/// Tables, columns and options as the server shows them.
async fn shown(database: &Database) -> String {
    let columns =
        "(SELECT string_agg(attnames::text, '') FROM pg_publication_tables t WHERE t.pubname = p.pubname AND t.tablename = c.relname)";
    let columns = if database.server.major < 15 { "''" } else { columns };
    let rows = database
        .admin
        .query(
            &format!(
                "SELECT c.relname || {columns} FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid JOIN pg_class c ON c.oid = r.prrelid
                 WHERE p.pubname = $1 ORDER BY 1"
            ),
            &[&database.publication()],
        )
        .await
        .unwrap();
    rows.iter().map(|row| row.get::<_, String>(0)).collect::<Vec<_>>().join(" ")
}

async fn holds_exactly_the_mapped_tables(major: u32) {
    let long = "x".repeat(62) + "Y";
    let database = Database::new(
        major,
        "holds",
        &format!(
            r#"CREATE TABLE a(id int PRIMARY KEY, "secret Column" text); CREATE TABLE "User"("order" int PRIMARY KEY); CREATE TABLE "{long}"(id int PRIMARY KEY);
               CREATE TABLE parent(id int PRIMARY KEY); CREATE TABLE child(PRIMARY KEY (id)) INHERITS (parent);
               CREATE TABLE root(id int PRIMARY KEY) PARTITION BY RANGE (id); CREATE TABLE leaf PARTITION OF root FOR VALUES FROM (0) TO (9)"#
        ),
    )
    .await;
    let source = database.source();
    assert_eq!(source.published().await.unwrap_err().reason, reason::PUBLICATION_MISSING);
    let excluded: &[&str] = if major < 15 { &[] } else { &["secret Column"] };
    let tables = mapped(&source, &[("a", excluded), ("User", &[]), (&long, &[]), ("parent", &[]), ("root", &[])]).await;
    alone(&source).await.publish(&tables, &[]).await.unwrap();
    let names: Vec<QualifiedName> = tables.iter().map(|table| table.source().clone()).collect();
    let mut published = source.published().await.unwrap();
    published.sort();
    assert_eq!(published, names, "no child of a parent, no partition of a root");
    if major >= 15 {
        assert_eq!(shown(&database).await, format!("User{{order}} a{{id}} parent{{id}} root{{id}} {long}{{id}}"));
    }
    let options =
        "SELECT concat(pubinsert, pubupdate, pubdelete, pubtruncate, pubviaroot, puballtables, obj_description(oid)) FROM pg_publication";
    assert_eq!(database.text(options).await.as_deref(), Some("tttttfsluice:sluice_holds"));

    // Nothing to do: nothing is done.
    let version = "SELECT string_agg(xmin::text, ' ' ORDER BY oid) FROM pg_publication_rel";
    let before = database.text(version).await;
    alone(&source).await.publish(&tables, &[]).await.unwrap();
    assert_eq!(database.text(version).await, before);

    // A table leaves, one loses its list of columns; the others are not touched.
    let tables = mapped(&source, &[("a", &[]), ("User", &[]), ("root", &[])]).await;
    alone(&source).await.publish(&tables, &[]).await.unwrap();
    let expected = if major < 15 { "User a root" } else { "User{order} a{id,\"secret Column\"} root{id}" };
    assert_eq!(shown(&database).await, expected);
    // One that somebody has taken out since the publication was looked at does not come back as if nothing had been.
    let present = source.published().await.unwrap();
    database.run(&format!("ALTER PUBLICATION \"{}\" DROP TABLE a", database.publication())).await;
    let error = alone(&source).await.publish(&tables, &present).await.unwrap_err();
    assert_eq!((error.class, error.reason), (Class::Retry, reason::LEFT_PUBLICATION), "{error}");
    assert_eq!(source.published().await.unwrap().len(), present.len() - 1);
    alone(&source).await.publish(&tables, &source.published().await.unwrap()).await.unwrap();
    assert_eq!(shown(&database).await, expected);
    alone(&source).await.publish(&[], &[]).await.unwrap();
    assert_eq!(source.published().await.unwrap(), []);
    database
        .run(&format!("ALTER PUBLICATION \"{}\" SET (publish = 'insert', publish_via_partition_root = false)", database.publication()))
        .await;
    alone(&source).await.publish(&tables[..1], &[]).await.unwrap();
    assert_eq!(database.text(options).await.as_deref(), Some("tttttfsluice:sluice_holds"));
}

async fn changes_behind_the_catalog_are_caught_under_the_lock(major: u32) {
    let database = Database::new(
        major,
        "behind",
        "CREATE TABLE t(id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 1); CREATE TABLE safe(id int PRIMARY KEY);
         CREATE TABLE root(id int PRIMARY KEY) PARTITION BY RANGE (id); CREATE TABLE leaf PARTITION OF root FOR VALUES FROM (0) TO (9)",
    )
    .await;
    let source = database.source();
    for (change, undo, expected, class) in [
        ("ALTER TABLE t DROP CONSTRAINT t_pkey", "ALTER TABLE t ADD PRIMARY KEY (id)", reason::TABLE_WITHOUT_IDENTITY, Class::Stop),
        ("ALTER TABLE t REPLICA IDENTITY NOTHING", "ALTER TABLE t REPLICA IDENTITY DEFAULT", reason::TABLE_WITHOUT_IDENTITY, Class::Stop),
        ("ALTER TABLE t REPLICA IDENTITY FULL", "ALTER TABLE t REPLICA IDENTITY DEFAULT", reason::SCHEMA_CHANGED, Class::Retry),
        ("ALTER TABLE t ADD COLUMN n int", "ALTER TABLE t DROP COLUMN n", reason::SCHEMA_CHANGED, Class::Retry),
        ("ALTER TABLE t SET UNLOGGED", "ALTER TABLE t SET LOGGED", reason::TABLE_NOT_SUPPORTED, Class::Stop),
        (
            "ALTER TABLE leaf REPLICA IDENTITY NOTHING",
            "ALTER TABLE leaf REPLICA IDENTITY DEFAULT",
            reason::TABLE_WITHOUT_IDENTITY,
            Class::Stop,
        ),
        (
            "ALTER TABLE t RENAME TO u; CREATE TABLE t(id int)",
            "DROP TABLE t; ALTER TABLE u RENAME TO t",
            reason::SCHEMA_CHANGED,
            Class::Retry,
        ),
    ] {
        let tables = mapped(&source, &[("t", &[]), ("safe", &[]), ("root", &[])]).await;
        // The other session changes the table while the publication waits for its lock.
        let other = database.server.connect(&database.name).await;
        other.batch_execute(&format!("BEGIN; {change}")).await.unwrap();
        let commit = async {
            let waits = "SELECT FROM pg_locks WHERE NOT granted AND mode = 'ShareUpdateExclusiveLock'";
            eventually(10, "the publication waits", async || !database.admin.query(waits, &[]).await.unwrap().is_empty()).await;
            other.batch_execute("COMMIT").await.unwrap();
        };
        let (published, ()) = tokio::join!(alone(&source).await.publish(&tables, &[]), commit);
        let error = published.expect_err(change);
        assert_eq!((error.reason, error.class), (expected, class), "{change}: {error}");
        // The refusal published nothing, so users go on.
        assert_eq!(source.published().await.unwrap_err().reason, reason::PUBLICATION_MISSING);
        if !change.contains("RENAME") {
            database.run("UPDATE t SET v = v + 1").await;
        }
        database.run(undo).await;
    }
    let tables = mapped(&source, &[("t", &[]), ("safe", &[]), ("root", &[])]).await;
    alone(&source).await.publish(&tables, &[]).await.unwrap();
    database.run("UPDATE t SET v = v + 1").await;
}

async fn users_writes_go_on(major: u32) {
    let database = Database::new(major, "writes", "CREATE TABLE t(id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 1)").await;
    let source = database.source();
    let tables = mapped(&source, &[("t", &[])]).await;
    // A user's open transaction that wrote is not waited for, and what it writes next does not wait for us.
    let user = database.server.connect(&database.name).await;
    user.batch_execute("BEGIN; UPDATE t SET v = 2").await.unwrap();
    alone(&source).await.publish(&tables, &[]).await.unwrap();
    user.batch_execute("UPDATE t SET v = 3; COMMIT").await.unwrap();
    // What VACUUM or CREATE INDEX CONCURRENTLY holds is waited for; writers do not queue up behind our wait.
    alone(&source).await.publish(&[], &[]).await.unwrap();
    user.batch_execute("BEGIN; LOCK TABLE t IN SHARE UPDATE EXCLUSIVE MODE").await.unwrap();
    let others = async {
        let waits = "SELECT FROM pg_locks WHERE NOT granted AND mode = 'ShareUpdateExclusiveLock'";
        eventually(10, "the publication waits", async || !database.admin.query(waits, &[]).await.unwrap().is_empty()).await;
        database.run("SET lock_timeout = '1s'; UPDATE t SET v = 4").await;
        user.batch_execute("COMMIT").await.unwrap();
    };
    let (published, ()) = tokio::join!(alone(&source).await.publish(&tables, &[]), others);
    published.unwrap();
}

/// A lock that is held for long makes us give way and come again.
async fn long_locks_are_waited_for_in_turns(major: u32) {
    let database = Database::new(major, "long_locks", "CREATE TABLE t(id int PRIMARY KEY)").await;
    let source = database.source();
    let tables = mapped(&source, &[("t", &[])]).await;
    let user = database.server.connect(&database.name).await;
    user.batch_execute("BEGIN; LOCK TABLE t").await.unwrap();
    let count = "SELECT count(*)::text FROM pg_locks WHERE NOT granted AND mode = 'ShareUpdateExclusiveLock'";
    let waiting = async |number: &str| database.text(count).await.as_deref() == Some(number);
    let turns = async {
        for number in ["1", "0", "1"] {
            eventually(10, "we wait, give way, wait again", async || waiting(number).await).await;
        }
        user.batch_execute("COMMIT").await.unwrap();
    };
    let (published, ()) = tokio::join!(alone(&source).await.publish(&tables, &[]), turns);
    published.unwrap();
}

async fn a_users_publication_is_used_or_refused(major: u32) {
    let database = Database::new(
        major,
        "users",
        "CREATE TABLE t(id int PRIMARY KEY, v int); CREATE TABLE u(id int PRIMARY KEY);
         CREATE TABLE root(id int PRIMARY KEY) PARTITION BY RANGE (id)",
    )
    .await;
    let source = database.source();
    let name = database.publication();
    let tables = mapped(&source, &[("t", &[]), ("u", &[])]).await;
    let all = mapped(&source, &[("t", &[]), ("u", &[]), ("root", &[])]).await;
    let fingerprint = "SELECT concat(xmin, obj_description(oid), (SELECT string_agg(r.xmin::text, ' ' ORDER BY r.oid) FROM pg_publication_rel r)) FROM pg_publication";
    database.run(&format!("CREATE PUBLICATION \"{name}\" FOR TABLE t, u; COMMENT ON PUBLICATION \"{name}\" IS 'mine'")).await;
    let before = database.text(fingerprint).await;
    alone(&source).await.publish(&tables, &[]).await.unwrap();
    for wrong in [&tables[..1], &all[..]] {
        let error = alone(&source).await.publish(wrong, &[]).await.unwrap_err();
        assert_eq!((error.reason, error.class), (reason::INVALID_SPEC, Class::Stop), "{error}");
    }
    assert_eq!(database.text(fingerprint).await, before, "never altered");
    for definition in ["FOR ALL TABLES", "FOR TABLE t, u WITH (publish = 'insert')", "FOR TABLE t"] {
        database.run(&format!("DROP PUBLICATION \"{name}\"; CREATE PUBLICATION \"{name}\" {definition}")).await;
        assert_eq!(alone(&source).await.publish(&tables, &[]).await.unwrap_err().reason, reason::INVALID_SPEC, "{definition}");
    }
    if major >= 15 {
        for definition in ["FOR TABLE t (id), u", "FOR TABLE t WHERE (id > 1), u", "FOR TABLES IN SCHEMA public"] {
            database.run(&format!("DROP PUBLICATION \"{name}\"; CREATE PUBLICATION \"{name}\" {definition}")).await;
            assert_eq!(alone(&source).await.publish(&tables, &[]).await.unwrap_err().reason, reason::INVALID_SPEC, "{definition}");
        }
    }
    // One that another stream made is not ours, even if it fits.
    database
        .run(&format!(
            "DROP PUBLICATION \"{name}\"; CREATE PUBLICATION \"{name}\" FOR TABLE t, u; COMMENT ON PUBLICATION \"{name}\" IS 'sluice:other'"
        ))
        .await;
    let error = alone(&source).await.publish(&tables, &[]).await.unwrap_err();
    assert!(error.reason == reason::INVALID_SPEC && error.message.contains("another stream"), "{error}");
}

/// A table is taken out of the publication by somebody else in the very moment in which we do it, or put in.
async fn who_is_taken_out_twice_is_looked_at_again(major: u32) {
    let database = Database::new(major, "twice", "CREATE TABLE t(id int PRIMARY KEY); CREATE TABLE u(id int PRIMARY KEY)").await;
    let source = database.source();
    let both = mapped(&source, &[("t", &[]), ("u", &[])]).await;
    let name = database.publication();
    alone(&source).await.publish(&both, &[]).await.unwrap();
    for (change, wanted) in [("DROP", &both[1..]), ("ADD", &both[..])] {
        let user = database.server.connect(&database.name).await;
        user.batch_execute(&format!("BEGIN; ALTER PUBLICATION \"{name}\" {change} TABLE t")).await.unwrap();
        let commit = async {
            // From 15 on for the publication, before that for the table.
            let waits =
                "SELECT FROM pg_locks WHERE NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
            eventually(10, "the publication waits", async || !database.admin.query(waits, &[]).await.unwrap().is_empty()).await;
            user.batch_execute("COMMIT").await.unwrap();
        };
        let (published, ()) = tokio::join!(alone(&source).await.publish(wanted, &[]), commit);
        let error = published.expect_err(change);
        assert_eq!((error.class, error.reason), (Class::Retry, reason::LEFT_PUBLICATION), "{error}");
        alone(&source).await.publish(wanted, &[]).await.unwrap();
        assert_eq!(source.published().await.unwrap().len(), wanted.len());
    }
}

async fn rights_of_the_owner_are_needed(major: u32) {
    let database = Database::new(major, "owners", "CREATE TABLE t(id int PRIMARY KEY); GRANT SELECT ON t TO PUBLIC").await;
    let source = database.source_as("publisher", "REPLICATION").await;
    let tables = mapped(&source, &[("t", &[])]).await;
    let refused = async |words: &str| {
        let error = alone(&source).await.publish(&tables, &[]).await.unwrap_err();
        assert!(error.reason == reason::PRIVILEGE_MISSING && error.message.contains(words), "{error}");
    };
    refused("GRANT owner TO role").await;
    database.run("CREATE ROLE owner; ALTER TABLE t OWNER TO owner; GRANT owner TO publisher").await;
    refused("permission denied for database").await;
    database.run("GRANT CREATE ON DATABASE owners TO publisher").await;
    alone(&source).await.publish(&tables, &[]).await.unwrap();
    drop(source);
    database.run("DROP PUBLICATION \"Publication of owners\"; DROP OWNED BY publisher, owner; DROP ROLE publisher, owner").await;
}
