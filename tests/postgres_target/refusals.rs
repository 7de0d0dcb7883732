//! What is refused before anything is written.

use super::*;
use sluice::engine::structure::{Need, Structure};

#[tokio::test]
async fn what_can_not_work_is_refused_with_its_cure() {
    let server = server();
    let (admin, writer) = database(&server, "checks").await;
    let elsewhere = SourceIdentity { system_identifier: "1".into(), database: "shop".into(), timeline: 1 };
    let here = SourceIdentity {
        system_identifier: admin
            .query_one("SELECT system_identifier::text FROM pg_control_system()", &[])
            .await
            .expect("an identity")
            .get(0),
        database: "checks".into(),
        timeline: 1,
    };
    let items = items();
    let (_, _applier) = stream(server.endpoint("checks"), "s", std::slice::from_ref(&items)).await;
    let as_a = target(server.endpoint("checks"));
    let as_b = PostgresTarget::new(server.endpoint("checks"), owner("b"));
    let as_writer = target(writer.clone());
    as_a.check(&elsewhere, std::slice::from_ref(&items), &[]).await.expect("its own table");
    as_a.check(&here, std::slice::from_ref(&items), &[]).await.expect("another name in the same database");

    let refused = |result: sluice::engine::error::Result<Vec<String>>, reason: &str, says: &str| {
        let error = result.expect_err("refused");
        assert_eq!(error.reason, reason, "{error}");
        assert!(error.message.contains(says), "{error}");
    };
    refused(as_a.check(&here, &[mapped(2, "x", "public", &["!id int4"])], &[]).await, reason::SAME_TABLE, "public.x");
    refused(as_b.check(&elsewhere, std::slice::from_ref(&items), &[]).await, reason::DUPLICATE_TARGET, "team/a");
    let mut two = mapped(2, "other", "shop", &["!id int4", "v text"]);
    two.target.name = "items".into();
    refused(as_a.check(&elsewhere, &[items.clone(), two], &[]).await, reason::DUPLICATE_TARGET, "public.items and public.other");
    let mut looped = mapped(2, "items", "third", &["!id int4", "v text"]);
    Arc::make_mut(&mut looped.version).name.schema = "shop".into();
    let fed = |system_identifier: &str| Fed {
        table: looped.source().clone(),
        system_identifier: system_identifier.into(),
        database: "checks".into(),
        origin: looped.target.clone(),
        owner: "team/a".into(),
    };
    let looped = std::slice::from_ref(&looped);
    refused(as_b.check(&elsewhere, looped, &[fed(&here.system_identifier)]).await, reason::TARGET_IS_MIRRORED, "team/a");
    as_b.check(&elsewhere, looped, &[fed("another")]).await.expect("fed by another server's table of that name");
    let mut moods = mapped(2, "x", "n", &["!id int4", "m public.mood"]);
    refused(as_a.check(&elsewhere, std::slice::from_ref(&moods), &[]).await, reason::TYPE_MISSING, "can't make table n.x");
    let mood = Need {
        kind: "type".into(),
        names: vec!["public.mood".into()],
        arguments: Vec::new(),
        schema: Some("public".into()),
        extension: None,
        cure: "CREATE TYPE public.mood AS ENUM ('ok')".into(),
    };
    moods.structure = Arc::new(Structure { needs: vec![mood], ..Structure::default() });
    refused(as_a.check(&elsewhere, &[moods], &[]).await, reason::TYPE_MISSING, "run there: CREATE TYPE public.mood AS ENUM ('ok')");

    admin
        .batch_execute("CREATE SCHEMA own; CREATE TABLE own.t (id int4 PRIMARY KEY, v varchar(5)); CREATE VIEW own.view AS SELECT 1 AS id")
        .await
        .expect("tables");
    let narrow = mapped(2, "t", "own", &["!id int4", "v varchar(9)"]);
    refused(
        as_a.check(&elsewhere, &[narrow], &[]).await,
        reason::TARGET_TABLE_INCOMPATIBLE,
        "ALTER COLUMN \"v\" TYPE character varying(9)",
    );
    refused(
        as_a.check(&elsewhere, &[mapped(2, "view", "own", &["!id int4"])], &[]).await,
        reason::TARGET_TABLE_INCOMPATIBLE,
        "not a table",
    );

    let fits = mapped(2, "t", "own", &["!id int4", "v varchar(3)"]);
    refused(
        as_writer.check(&elsewhere, std::slice::from_ref(&fits), &[]).await,
        reason::PRIVILEGE_MISSING,
        "permission denied for schema _sluice",
    );
    admin
        .batch_execute("GRANT USAGE ON SCHEMA _sluice, own TO writer_checks; GRANT ALL ON ALL TABLES IN SCHEMA _sluice TO writer_checks")
        .await
        .expect("grants");
    refused(
        as_writer.check(&elsewhere, std::slice::from_ref(&fits), &[]).await,
        reason::PRIVILEGE_MISSING,
        "GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON \"own\".\"t\"",
    );
    refused(
        as_writer.check(&elsewhere, &[mapped(2, "new", "own", &["!id int4"])], &[]).await,
        reason::PRIVILEGE_MISSING,
        "GRANT CREATE, USAGE ON SCHEMA \"own\"",
    );
    as_writer.check(&elsewhere, &[mapped(2, "new", "fresh", &["!id int4"])], &[]).await.expect("a schema of its own");
    admin
        .batch_execute(
            "GRANT ALL ON own.t TO writer_checks; CREATE FUNCTION own.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
             CREATE TRIGGER swallow BEFORE INSERT ON own.t FOR EACH ROW EXECUTE FUNCTION own.f()",
        )
        .await
        .expect("a trigger");
    refused(
        as_writer.check(&elsewhere, std::slice::from_ref(&fits), &[]).await,
        reason::TARGET_TABLE_INCOMPATIBLE,
        "GRANT SET ON PARAMETER session_replication_role TO \"writer_checks\"",
    );
    let accepts = as_writer.clone().with_triggers_accepted(true);
    let notes = accepts.check(&elsewhere, std::slice::from_ref(&fits), &[]).await.expect("accepted");
    assert_eq!(notes, ["triggers or foreign key actions of target tables fire on mirrored changes (of own.t: swallow)"]);
    let notes = as_a.check(&elsewhere, std::slice::from_ref(&fits), &[]).await.expect("with replica role");
    assert!(notes.is_empty(), "{notes:?}");
    admin
        .batch_execute("DROP TRIGGER swallow ON own.t; CREATE TABLE own.child (t int4 REFERENCES own.t ON DELETE CASCADE)")
        .await
        .expect("a child");
    refused(as_writer.check(&elsewhere, std::slice::from_ref(&fits), &[]).await, reason::TARGET_TABLE_INCOMPATIBLE, "child_t_fkey");
    // What only a partition has fires too.
    admin
        .batch_execute(
            "DROP TABLE own.child; ALTER TABLE own.t RENAME TO old; CREATE TABLE own.t (LIKE own.old) PARTITION BY RANGE (id);
             CREATE TABLE own.low PARTITION OF own.t FOR VALUES FROM (0) TO (9); GRANT ALL ON own.t TO writer_checks",
        )
        .await
        .expect("a partition");
    as_writer.check(&elsewhere, std::slice::from_ref(&fits), &[]).await.expect("nothing that fires");
    admin
        .batch_execute("CREATE TRIGGER swallow_low BEFORE INSERT ON own.low FOR EACH ROW EXECUTE FUNCTION own.f()")
        .await
        .expect("a trigger");
    refused(as_writer.check(&elsewhere, std::slice::from_ref(&fits), &[]).await, reason::TARGET_TABLE_INCOMPATIBLE, "swallow_low");
    admin.batch_execute("GRANT SET ON PARAMETER session_replication_role TO writer_checks").await.expect("a grant");
    as_writer.check(&elsewhere, std::slice::from_ref(&fits), &[]).await.expect("with replica role");

    admin.batch_execute("ALTER DATABASE checks SET default_transaction_read_only = on").await.expect("read only");
    refused(as_a.check(&elsewhere, std::slice::from_ref(&items), &[]).await, reason::TARGET_READ_ONLY, "default_transaction_read_only");
    let error = as_a.claim(&key("s"), &owner("a"), None).await.err().expect("refused");
    assert_eq!((error.class, error.reason), (Class::Retry, reason::TARGET_READ_ONLY));
}
