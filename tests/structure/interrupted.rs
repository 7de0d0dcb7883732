//! A worker that is killed while indexes are built goes on with those that are missing.

use super::{pair, run, texts};
use crate::worker::{Worker, assert_equal, wait_sql};

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_goes_on_with_the_missing_indexes() {
    let mut servers = pair(15).await;
    let (left, right) = (&servers.left, &servers.right);
    // An index of this expression is built when the test lets it.
    let gate = "CREATE FUNCTION public.gate(i int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN PERFORM pg_advisory_xact_lock_shared(42); RETURN i; END $$";
    run(left, gate).await;
    run(right, gate).await;
    run(
        left,
        "CREATE TABLE public.t (id int PRIMARY KEY, v int DEFAULT 5); INSERT INTO public.t SELECT g, g FROM generate_series(1, 10000) g; ANALYZE public.t;
         CREATE INDEX a_first ON public.t (v); CREATE INDEX b_gated ON public.t (public.gate(v)); CREATE INDEX c_last ON public.t (v, id)",
    )
    .await;
    let holder = servers.target.connect("dw").await;
    // The rehearsal on the empty table calls nothing.
    run(&holder, "SELECT pg_advisory_lock(42)").await;
    let mut worker = Worker::start((&servers.source, "shop"), (&servers.target, "dw"), &["t"]);
    let waits = "SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    wait_sql(right, 60, waits).await;
    // Two are built at a time: the others are done while this one waits.
    let built = "SELECT string_agg(indexname, ' ' ORDER BY indexname) = 'a_first c_last t_pkey' FROM pg_indexes WHERE tablename = 't' AND schemaname = 'public'";
    wait_sql(right, 60, built).await;
    worker
        .wait_for(30, "the step", |status| {
            status.tables.get("Copied") == Some(&1)
                && status.waiting.as_deref().is_some_and(|step| step == "indexes of public.t are being built: b_gated; 3 of 4 are done")
        })
        .await;
    let oids = "SELECT string_agg(oid::text, ' ' ORDER BY relname) FROM pg_class WHERE relname IN ('a_first', 'c_last')";
    let before = texts(right, oids).await;
    worker.kill9();
    run(left, "UPDATE public.t SET v = v + 1 WHERE id % 3 = 0; INSERT INTO public.t (id) VALUES (20000)").await;
    wait_sql(right, 60, "SELECT count(*) = 0 FROM pg_stat_activity WHERE wait_event_type = 'Client' AND query LIKE 'CREATE INDEX%'").await;
    worker.spawn();
    wait_sql(right, 60, waits).await;
    run(&holder, "SELECT pg_advisory_unlock(42)").await;
    worker.wait_streaming().await;
    worker.wait_level(left).await;
    assert_equal(left, right, &["public.t"]).await;
    assert_eq!(texts(right, oids).await, before, "what was built is not built again");
    assert_eq!(
        texts(right, "SELECT indexname::text FROM pg_indexes WHERE tablename = 't' AND schemaname = 'public' ORDER BY 1").await,
        ["a_first", "b_gated", "c_last", "t_pkey"]
    );
    assert_eq!(texts(right, "SELECT generation::text FROM _sluice.tables").await, ["1"], "the rows were copied once");
    servers.target.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_interrupted_build_has_left_is_built_again() {
    let mut servers = pair(17).await;
    let (left, right) = (&servers.left, &servers.right);
    let gate = "CREATE FUNCTION public.gate(i int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN PERFORM pg_advisory_xact_lock_shared(42); RETURN i; END $$";
    run(left, gate).await;
    run(right, gate).await;
    run(
        left,
        "CREATE TABLE public.t (id int PRIMARY KEY, v int, w int, CONSTRAINT w_key UNIQUE (w));
         INSERT INTO public.t SELECT g, g % 10, g FROM generate_series(1, 5000) g; ANALYZE public.t;
         CREATE INDEX gated ON public.t (public.gate(id)); CREATE INDEX plain ON public.t (v)",
    )
    .await;
    let holder = servers.target.connect("dw").await;
    run(&holder, "SELECT pg_advisory_lock(42)").await;
    let mut worker = Worker::start((&servers.source, "shop"), (&servers.target, "dw"), &["t"]);
    wait_sql(right, 60, "SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted").await;
    let built = "SELECT coalesce(string_agg(indexname, ' ' ORDER BY indexname), '') = 'plain t_pkey w_key' FROM pg_indexes WHERE tablename = 't' AND schemaname = 'public'";
    wait_sql(right, 60, built).await;
    worker.kill9();
    // They wait at the gate and would not notice.
    run(right, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'CREATE INDEX%'").await;
    wait_sql(right, 60, "SELECT count(*) = 0 FROM pg_stat_activity WHERE query LIKE 'CREATE INDEX%'").await;

    // Builds that fail at the end leave an index that is there and of no use (manual: "Building Indexes Concurrently").
    run(right, "DROP INDEX public.plain; DROP INDEX public.w_key").await;
    for (name, column) in [("plain", "v"), ("w_key", "v"), ("gated", "v")] {
        let failed = right.batch_execute(&format!("CREATE UNIQUE INDEX CONCURRENTLY {name} ON public.t ({column})")).await.unwrap_err();
        assert_eq!(failed.code().map(tokio_postgres::error::SqlState::code), Some("23505"));
    }
    let invalid = "SELECT string_agg(c.relname, ' ' ORDER BY c.relname) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE NOT i.indisvalid";
    assert_eq!(texts(right, invalid).await, ["gated plain w_key"]);
    run(&holder, "SELECT pg_advisory_unlock(42)").await;
    worker.spawn();
    worker.wait_streaming().await;
    assert_eq!(texts(right, invalid).await, ["NULL"]);
    let definitions = "SELECT indexdef FROM pg_indexes WHERE tablename = 't' AND schemaname = 'public' ORDER BY 1";
    assert_eq!(texts(right, definitions).await, texts(left, definitions).await);
    let constraints = "SELECT conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = 'public.t'::regclass AND contype <> 'n' ORDER BY 1";
    assert_eq!(texts(right, constraints).await, texts(left, constraints).await);
    run(left, "UPDATE public.t SET w = -w, v = v + 1").await;
    worker.wait_level(left).await;
    assert_equal(left, right, &["public.t"]).await;
    servers.target.stop();
}
