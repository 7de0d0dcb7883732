//! Once per id.

use super::{Stage, Writer, ask, found, wait_state};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use std::time::Duration;

/// Counts what requests do to the checkpoint. The triggers fire in replica role too.
async fn count(stage: &Stage) {
    stage
        .right
        .batch_execute(
            "CREATE TABLE counted (what text);
             CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
               INSERT INTO public.counted VALUES (TG_NAME || ' ' || coalesce(to_jsonb(NEW)->>'source_table', to_jsonb(NEW)->>'id'));
               RETURN NULL; END $$;
             CREATE TRIGGER taken AFTER INSERT ON _sluice.requests FOR EACH ROW EXECUTE FUNCTION note();
             CREATE TRIGGER ordered AFTER UPDATE ON _sluice.tables FOR EACH ROW WHEN (NEW.state = 'Init') EXECUTE FUNCTION note();
             ALTER TABLE _sluice.requests ENABLE ALWAYS TRIGGER taken;
             ALTER TABLE _sluice.tables ENABLE ALWAYS TRIGGER ordered",
        )
        .await
        .expect("triggers");
}

async fn counted(stage: &Stage) -> Vec<String> {
    let rows = stage.right.query("SELECT what || ' ' || count(*) FROM counted GROUP BY what ORDER BY what", &[]).await.expect("counts");
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resync_is_done_once_though_the_worker_is_killed_at_any_moment() {
    let seed = std::env::var("SLUICE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random::<u64>);
    println!("SLUICE_SEED={seed}");
    let mut dice = SmallRng::seed_from_u64(seed);
    let mut stage = Stage::streaming(20_000).await;
    count(&stage).await;
    let writer = Writer::start(&stage).await;
    stage.spoil("b").await;
    stage.right.batch_execute("DELETE FROM a WHERE id > 1000").await.expect("wrong rows");
    ask(&mut stage.worker, "r1", "Resync", &[]).await;
    for _ in 0..6 {
        tokio::time::sleep(Duration::from_millis(dice.random_range(0..1500))).await;
        stage.worker.kill9();
        stage.worker.spawn();
    }
    wait_state(&stage.worker, "r1", "Succeeded").await;
    for _ in 0..2 {
        stage.worker.kill9();
        stage.worker.spawn();
        stage.worker.wait_streaming().await;
    }
    writer.stop().await;
    stage.assert_equal().await;
    assert_eq!(counted(&stage).await, ["ordered a 1", "ordered b 1", "taken r1 1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_there_before_the_first_copy_is_skipped() {
    let asked = super::RequestSpec { id: "restored".into(), action: "Resync".into(), tables: Vec::new() };
    let stage = Stage::with(100, |desired| desired.request = Some(asked)).await;
    let skipped = wait_state(&stage.worker, "restored", "Skipped").await;
    assert!(skipped.finished_at.is_some(), "{skipped:?}");
    assert_eq!(stage.generation("a").await, 1);
    stage.assert_equal().await;
}

/// It comes back with its request, an empty status and another uid; its worker has a new folder.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_object_repeats_nothing() {
    let mut stage = Stage::streaming(100).await;
    count(&stage).await;
    ask(&mut stage.worker, "r1", "Resync", &["b"]).await;
    wait_state(&stage.worker, "r1", "Succeeded").await;
    let asked = stage.worker.desired.request.clone();
    stage.worker.kill9();
    stage.worker = crate::worker::Worker::start_with((&stage.source, "shop"), (&stage.target, "dw"), &["a", "b"], |desired| {
        desired.mirror.uid = "0e1f5c1e-0000-4000-8000-000000000001".into();
        desired.request = asked;
    });
    stage.worker.wait_streaming().await;
    assert_eq!(wait_state(&stage.worker, "r1", "Succeeded").await.state, "Succeeded");
    assert_eq!(counted(&stage).await, ["ordered b 1", "taken r1 1"]);
    stage.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_request_waits_for_the_one_that_runs() {
    let mut stage = Stage::with(200_000, |desired| desired.snapshot.workers_per_table = 1).await;
    count(&stage).await;
    ask(&mut stage.worker, "first", "Resync", &["a"]).await;
    wait_state(&stage.worker, "first", "Running").await;
    ask(&mut stage.worker, "second", "Resync", &["b"]).await;
    wait_state(&stage.worker, "first", "Succeeded").await;
    wait_state(&stage.worker, "second", "Succeeded").await;
    let status = stage.worker.status().await.expect("a status");
    let (first, second) = (found(&status, "first").expect("the first"), found(&status, "second").expect("the second"));
    assert!(first.finished_at.as_ref() <= Some(&second.started_at), "{first:?} {second:?}");
    assert_eq!(stage.generation("a").await, 3, "ordered and begun once: the second does not disturb the first");
    assert_eq!(counted(&stage).await, ["ordered a 1", "ordered b 1", "taken first 1", "taken second 1"]);
    stage.assert_equal().await;
}
