//! What can't work is refused before anything is copied, with what cures it.

use super::{pair, run, texts};
use crate::worker::Worker;

/// Refused with these words; after they were done, it streams.
async fn cured(name: &str, source: &str, cures: &[&str]) {
    let servers = pair(15).await;
    let (left, right) = (&servers.left, &servers.right);
    run(left, source).await;
    let worker = Worker::start((&servers.source, "shop"), (&servers.target, "dw"), &["t"]);
    let status = worker.wait_reason("TypeMissing").await;
    let message = status.error.expect("an error").message;
    let mut rest = message.as_str();
    for cure in cures {
        let at = rest.find(cure).unwrap_or_else(|| panic!("{name}: {cure} is not in {message}, or not in this order"));
        rest = &rest[at..];
    }
    assert_eq!(texts(left, "SELECT count(*)::text FROM pg_replication_slots").await, ["0"], "{name}: nothing was begun");
    assert_eq!(texts(right, "SELECT count(*)::text FROM pg_class WHERE relname = 't'").await, ["0"], "{name}: nothing was made");
    // The message is what a user would paste.
    let (_, statements) = message.split_once("run there: ").expect("statements");
    run(right, statements).await;
    worker.wait_for(150, "streaming", |status| status.streaming).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_extension() {
    cured(
        "extension",
        "CREATE SCHEMA ext; CREATE EXTENSION citext SCHEMA ext; CREATE EXTENSION btree_gist SCHEMA public;
         CREATE TABLE public.t (id int PRIMARY KEY, c ext.citext[], EXCLUDE USING gist (id WITH =))",
        &["CREATE SCHEMA IF NOT EXISTS \"ext\"; CREATE EXTENSION \"citext\" SCHEMA \"ext\""],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_types_that_are_built_on_each_other() {
    cured(
        "types",
        "CREATE SCHEMA app; CREATE TYPE app.mood AS ENUM ('sad', 'it''s'); CREATE DOMAIN app.short AS varchar(9) NOT NULL CONSTRAINT full_ CHECK (VALUE <> '');
         CREATE TYPE app.pair AS (a app.mood, \"B b\" app.short); CREATE TYPE app.span AS RANGE (SUBTYPE = float8);
         CREATE TABLE public.t (id int PRIMARY KEY, p app.pair[], s app.span)",
        &["CREATE TYPE app.mood AS ENUM ('sad', 'it''s')", "CREATE TYPE app.pair AS (a app.mood, \"B b\" app.short)"],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_function_and_collation() {
    cured(
        "function",
        "CREATE COLLATION public.ci (PROVIDER = icu, LOCALE = 'und-u-ks-level2', DETERMINISTIC = false);
         CREATE FUNCTION public.slug(t text) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT lower($1) $$;
         CREATE TABLE public.t (id int PRIMARY KEY, v text COLLATE public.ci, w text DEFAULT public.slug('X')); CREATE INDEX ON public.t (public.slug(w))",
        &["CREATE COLLATION public.ci (PROVIDER = icu, LOCALE = 'und-u-ks-level2', DETERMINISTIC = false)"],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_catalog_does_not_say_is_found_by_the_rehearsal() {
    let servers = pair(15).await;
    let (left, right) = (&servers.left, &servers.right);
    // The target has a function of this name, which no index may use.
    run(left, "CREATE FUNCTION public.f(i int) RETURNS int LANGUAGE sql IMMUTABLE AS $$ SELECT i $$; CREATE TABLE public.t (id int PRIMARY KEY); CREATE INDEX bad ON public.t (public.f(id))").await;
    run(right, "CREATE FUNCTION public.f(i int) RETURNS int LANGUAGE plpgsql VOLATILE AS $$ BEGIN RETURN i; END $$").await;
    let worker = Worker::start((&servers.source, "shop"), (&servers.target, "dw"), &["t"]);
    let status = worker.wait_reason("WriteRefused").await;
    let message = status.error.expect("an error").message;
    assert!(message.contains("can't make table public.t as the source has it") && message.contains("IMMUTABLE"), "{message}");
    assert_eq!(texts(left, "SELECT count(*)::text FROM pg_replication_slots").await, ["0"]);
    assert_eq!(texts(right, "SELECT count(*)::text FROM pg_class WHERE relname = 't'").await, ["0"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn narrower_columns_of_existing_tables() {
    let servers = pair(15).await;
    let (left, right) = (&servers.left, &servers.right);
    run(left, "CREATE TABLE public.t (id int PRIMARY KEY, a varchar(50), b numeric(10,2)); INSERT INTO public.t VALUES (1, 'x', 1.25)")
        .await;
    run(right, "CREATE TABLE public.t (id int PRIMARY KEY, a varchar(20), b numeric(8,1))").await;
    let worker = Worker::start((&servers.source, "shop"), (&servers.target, "dw"), &["t"]);
    for (column, cure) in [("a", "character varying(50)"), ("b", "numeric(10,2)")] {
        let statement = format!("ALTER TABLE \"public\".\"t\" ALTER COLUMN \"{column}\" TYPE {cure}");
        worker.wait_for(150, &statement, |status| status.error.as_ref().is_some_and(|error| error.message.contains(&statement))).await;
        assert_eq!(texts(right, "SELECT count(*)::text FROM public.t").await, ["0"]);
        run(right, &statement).await;
    }
    worker.wait_for(150, "streaming", |status| status.streaming).await;
    assert_eq!(texts(right, "SELECT t::text FROM public.t t").await, ["(1,x,1.25)"]);
}
