//! What is refused unless the Mirror accepts it, and what becomes of it then.

use super::{Pair, pair, run, texts};
use crate::worker::{Worker, assert_equal};
use sluice::worker::contract::{Desired, Phase};

/// A worker whose role on the target may not take replica role.
async fn ordered(servers: &Pair, change: impl FnOnce(&mut Desired)) -> Worker {
    run(&servers.right, "CREATE ROLE plain LOGIN PASSWORD 'pw'; GRANT CREATE ON DATABASE dw TO plain; GRANT ALL ON ALL TABLES IN SCHEMA public TO plain; GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO plain").await;
    let mut worker = Worker::start_with((&servers.source, "shop"), (&servers.target, "dw"), &[], |desired| {
        desired.suspend = true;
        change(desired);
    });
    worker.write_credentials("target", "plain", "pw");
    worker.wait_for(30, "suspended", |status| status.phase == Phase::Suspended).await;
    worker.change(|desired| desired.suspend = false).await;
    worker
}

#[tokio::test(flavor = "multi_thread")]
async fn triggers_and_foreign_key_actions_fire_in_commit_order() {
    let servers = pair(15).await;
    let (left, right) = (&servers.left, &servers.right);
    let tables = "CREATE TABLE public.parent (id int PRIMARY KEY, v text);
        CREATE TABLE public.child (id int PRIMARY KEY, parent int REFERENCES public.parent ON DELETE CASCADE ON UPDATE CASCADE);
        CREATE TABLE public.grandchild (id int PRIMARY KEY, child int REFERENCES public.child ON DELETE CASCADE, kept int REFERENCES public.parent ON DELETE SET NULL)";
    run(left, tables).await;
    run(left, "INSERT INTO public.parent SELECT g, 'v' FROM generate_series(1, 9) g; INSERT INTO public.child VALUES (10, 1), (11, 1); INSERT INTO public.grandchild VALUES (100, 10, 2)").await;
    run(right, tables).await;
    run(
        right,
        "CREATE TABLE public.seen (n serial, what text); CREATE TABLE public.note (id int PRIMARY KEY, parent int REFERENCES public.parent ON DELETE CASCADE);
         CREATE FUNCTION public.see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             INSERT INTO public.seen (what) VALUES (TG_TABLE_NAME || ' ' || TG_OP || ' ' || coalesce(NEW.id, OLD.id)); RETURN NULL; END $$;
         CREATE TRIGGER see AFTER INSERT OR UPDATE OR DELETE ON public.parent FOR EACH ROW EXECUTE FUNCTION public.see();
         CREATE TRIGGER see_too AFTER INSERT OR UPDATE OR DELETE ON public.child FOR EACH ROW EXECUTE FUNCTION public.see()",
    )
    .await;
    let names = ["parent", "child", "grandchild"];
    let mut worker = ordered(&servers, |desired| desired.tables = Some(names.map(crate::worker::table).into())).await;
    let message = worker.wait_reason("TargetTableIncompatible").await.error.expect("an error").message;
    assert!(message.contains("child_parent_fkey") || message.contains("see"), "{message}");
    assert!(message.contains("set stream.targetTriggers to Accept"), "{message}");
    assert_eq!(texts(left, "SELECT count(*)::text FROM pg_replication_slots").await, ["0"], "nothing was begun");

    worker.change(|desired| desired.stream.accept_target_triggers = true).await;
    worker.wait_streaming().await;
    let status = worker.status().await.expect("a status");
    assert_eq!(status.apply_mode.as_deref(), Some("Ordered"));
    let note = status.waiting.expect("a note");
    assert!(note.contains("fire on mirrored changes") && note.contains("of public.child: see_too, grandchild_child_fkey"), "{note}");
    assert_equal(left, right, &["public.parent", "public.child", "public.grandchild"]).await;
    assert_eq!(texts(right, "SELECT count(*)::text FROM public.seen").await, ["11"], "of copied rows");

    run(right, "INSERT INTO public.note VALUES (1, 1), (2, 2); TRUNCATE public.seen").await;
    // On the source the same actions make changes of their own, which come too.
    run(
        left,
        "BEGIN; INSERT INTO public.child VALUES (12, 2); INSERT INTO public.parent VALUES (20, 'x'); INSERT INTO public.child VALUES (21, 20); COMMIT;
         UPDATE public.parent SET v = 'y' WHERE id = 20; DELETE FROM public.parent WHERE id = 1; DELETE FROM public.parent WHERE id = 2;
         UPDATE public.parent SET id = 30 WHERE id = 20; INSERT INTO public.child SELECT g, 3 FROM generate_series(1000, 1300) g; DELETE FROM public.parent WHERE id IN (3, 4)",
    )
    .await;
    worker.wait_level(left).await;
    assert_equal(left, right, &["public.parent", "public.child", "public.grandchild"]).await;
    assert_eq!(texts(right, "SELECT count(*)::text FROM public.note").await, ["0"], "rows of others go with what they refer to");
    let order = texts(right, "SELECT what FROM public.seen WHERE what !~ ' 1[0-3]\\d\\d$' ORDER BY n").await;
    let expected = [
        "child INSERT 12",
        "parent INSERT 20",
        "child INSERT 21",
        "parent UPDATE 20",
        // What the target's action does, and then the source's own change of the same row, if it finds one.
        "parent DELETE 1",
        "child DELETE 10",
        "child DELETE 11",
        "parent DELETE 2",
        "child DELETE 12",
        "parent UPDATE 30",
        "child UPDATE 21",
        "child UPDATE 21",
        "parent DELETE 3",
        "parent DELETE 4",
    ];
    let (mut order, mut expected) = (order, expected.map(str::to_owned).to_vec());
    // The server fires a row's triggers in the order of their names: the action may come before the one that sees.
    for pair in [&mut order, &mut expected] {
        let first = pair.iter().position(|what| what == "parent DELETE 1").expect("a delete");
        pair[first..].sort();
    }
    assert_eq!(order, expected);

    // Without an action that may have taken it, a missing row is missing.
    run(right, "DELETE FROM public.parent WHERE id = 5").await;
    run(left, "DELETE FROM public.parent WHERE id = 5").await;
    let message = worker.wait_reason("RowMissing").await.error.expect("an error").message;
    assert!(message.contains("public.parent") && message.contains("id = 5"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn narrower_columns_that_are_asked_for_take_what_fits() {
    let servers = pair(15).await;
    let (left, right) = (&servers.left, &servers.right);
    run(left, "CREATE TABLE public.t (id int PRIMARY KEY, a varchar(50), b numeric(10,2), c numeric(10,2), d timestamp, e varbit(20))")
        .await;
    run(right, "CREATE TABLE public.t (id int PRIMARY KEY, a varchar(4), b numeric(5,2), c numeric(10,1), d timestamp(0), e varbit(3))")
        .await;
    // Each way of writing: copy, one row, a set, many rows; in text and in binary.
    let fits = |first: i32, count: i32| {
        format!(
            "INSERT INTO public.t SELECT g, CASE g % 3 WHEN 0 THEN 'äbcd' WHEN 1 THEN 'ab     ' END, 999.99, 1.25, '2026-01-02 03:04:05.6', B'101'
             FROM generate_series({first}, {}) g",
            first + count - 1
        )
    };
    run(left, &fits(1, 10)).await;
    let mut worker = Worker::start_with((&servers.source, "shop"), (&servers.target, "dw"), &["t"], |desired| {
        desired.tables.as_mut().expect("tables")[0].accept_narrower_types = true;
    });
    worker.wait_streaming().await;
    for (first, count) in [(100, 1), (200, 20), (300, 400)] {
        run(left, &fits(first, count)).await;
    }
    run(left, "UPDATE public.t SET c = 2.35 WHERE id % 2 = 0; UPDATE public.t SET id = id + 10000 WHERE id % 5 = 0").await;
    worker.wait_level(left).await;
    // Half is rounded away from zero; of trailing spaces as many stay as there is room for.
    let as_narrower = "SELECT ROW(id, a::varchar(4), b, c::numeric(10,1), d::timestamp(0), e)::text FROM public.t ORDER BY id";
    let expected = texts(left, as_narrower).await;
    assert!(expected[0].starts_with("(1,\"ab  \",999.99,1.3,\"2026-01-02 03:04:06\",101)"), "{}", expected[0]);
    assert_eq!(texts(right, "SELECT t::text FROM public.t t ORDER BY id").await, expected);

    // Each kind of value that does not fit stops the stream, and none of it arrives.
    for (id, column, value, cure) in
        [(20_000, "a", "'abcde'", "varchar(50)"), (20_001, "b", "12345.6", "numeric(10,2)"), (20_002, "e", "B'1010'", "varbit(20)")]
    {
        run(left, &format!("INSERT INTO public.t (id, {column}) VALUES ({id}, {value})")).await;
        let message = worker.wait_reason("ValueDoesNotFit").await.error.expect("an error").message;
        assert!(message.contains(&format!("{column} is ")) && !message.contains(value.trim_matches('\'')), "{message}");
        assert_eq!(texts(right, &format!("SELECT count(*)::text FROM public.t WHERE id = {id}")).await, ["0"]);
        run(right, &format!("ALTER TABLE public.t ALTER {column} TYPE {cure}")).await;
        worker.change(|desired| desired.stream.max_batch_rows += 1).await;
        worker.wait_streaming().await;
        worker.wait_level(left).await;
        worker.wait_for(60, "the failure has passed", |status| status.error.is_none()).await;
        let row = format!("SELECT {column}::text FROM public.t WHERE id = {id}");
        assert_eq!(texts(right, &row).await, texts(left, &row).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copied_value_that_does_not_fit_stops_the_copy() {
    let servers = pair(15).await;
    let (left, right) = (&servers.left, &servers.right);
    run(left, "CREATE TABLE public.t (id int PRIMARY KEY, a varchar(50)); INSERT INTO public.t VALUES (1, 'abcd'), (2, 'too long')").await;
    run(right, "CREATE TABLE public.t (id int PRIMARY KEY, a varchar(4))").await;
    let mut worker = Worker::start_with((&servers.source, "shop"), (&servers.target, "dw"), &[], |desired| {
        (desired.tables, desired.schemas) = (None, Some(vec![schema()]));
    });
    let message = worker.wait_reason("ValueDoesNotFit").await.error.expect("an error").message;
    assert!(message.contains("column a is character varying(4), the source's character varying(50)") && !message.contains("too long'"));
    assert_eq!(texts(right, "SELECT count(*)::text FROM public.t").await, ["0"]);
    run(right, "ALTER TABLE public.t ALTER a TYPE varchar(50)").await;
    worker.change(|desired| desired.stream.max_batch_rows += 1).await;
    worker.wait_streaming().await;
    assert_equal(left, right, &["public.t"]).await;
}

/// All tables of schema public, with narrower types accepted.
fn schema() -> sluice::worker::contract::SchemaSpec {
    sluice::worker::contract::SchemaSpec {
        name: "public".into(),
        target: "public".into(),
        exclude_tables: Vec::new(),
        accept_narrower_types: true,
    }
}
