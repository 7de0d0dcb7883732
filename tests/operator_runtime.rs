//! What the controllers share, against a real API server: election, apply, status, finalizers, events, watches under faults, permissions,
//! keys, and the run of the operator from start to drain.

mod support;

use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::api::rbac::v1::{ClusterRoleBinding, RoleRef, Subject};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::controller::Action;
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher;
use kube::{Api, Client, CustomResourceExt as _, Resource, ResourceExt as _};
use serde_json::{Value, json};
use sluice::operator::cache::{Caches, Wake, any_change};
use sluice::operator::client::client as bounded_client;
use sluice::operator::events::EventKind;
use sluice::operator::health::Health;
use sluice::operator::leader::{Candidate, Times};
use sluice::operator::metrics::Metrics;
use sluice::operator::run::{RunError, Runtime};
use sluice::operator::shutdown::Shutdown;
use sluice::operator::signing::{SigningKeys, load_or_create};
use sluice::operator::watch::Watches;
use sluice::operator::{Context, ErrorClass, Options, apply, permissions, reconcile};
use sluice::resources::{Mirror, MirrorStatus, Source, Target};
use sluice::worker::token::SigningKey;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::apiserver::{ApiServer, Link};
use support::eventually;
use support::operator;
use tokio::task::JoinSet;

fn options(namespace: &str, pod: &str) -> Options {
    operator::options_with(namespace, ["--watch-namespaces", namespace, "--leader-election=true", "--pod-name", pod])
}

fn keys() -> SigningKeys {
    SigningKeys::new(SigningKey::generate().expect("a key"), None)
}

async fn context(server: &ApiServer, namespace: &str) -> Arc<Context> {
    let metrics = Metrics::default();
    let client = bounded_client(server.config().await, &metrics).expect("a client");
    Context::new(client, options(namespace, "operator"), metrics, Health::default(), keys()).expect("a context")
}

fn config_map(namespace: &str, name: &str, value: &str) -> ConfigMap {
    ConfigMap {
        metadata: ObjectMeta { namespace: Some(namespace.into()), name: Some(name.into()), ..ObjectMeta::default() },
        data: Some([("key".to_owned(), value.to_owned())].into()),
        ..ConfigMap::default()
    }
}

fn mirror(namespace: &str, name: &str) -> Mirror {
    let spec = json!({"sourceRef": {"name": "s"}, "targetRef": {"name": "t"}, "tables": [{"name": "users"}]});
    let mut mirror = Mirror::new(name, serde_json::from_value(spec).expect("a spec"));
    mirror.metadata.namespace = Some(namespace.into());
    mirror
}

fn definitions() -> Vec<k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition> {
    vec![Source::crd(), Target::crd(), Mirror::crd()]
}

// ---------------------------------------------------------------- writes

#[tokio::test(flavor = "multi_thread")]
async fn repeating_an_apply_writes_nothing() {
    let server = ApiServer::shared().await;
    let namespace = server.namespace("apply").await;
    let ctx = context(&server, &namespace).await;
    let first = apply::apply(&ctx, &config_map(&namespace, "c", "1")).await.expect("applied");
    let again = apply::apply(&ctx, &config_map(&namespace, "c", "1")).await.expect("applied");
    assert_eq!(first.resource_version(), again.resource_version());
    let unchanged = apply::apply_if_changed(&ctx, &config_map(&namespace, "c", "1"), Some(&again)).await;
    assert!(unchanged.expect("nothing to send").is_none());
    let other = apply::apply_if_changed(&ctx, &config_map(&namespace, "c", "2"), Some(&again)).await.expect("sent");
    assert_ne!(other.expect("it is another one").resource_version(), again.resource_version());

    // What somebody else added stays, what they changed of ours comes back.
    let api = Api::<ConfigMap>::namespaced(ctx.client.clone(), &namespace);
    let patch = async |data: Value| api.patch("c", &PatchParams::default(), &Patch::Merge(json!({"data": data}))).await.expect("a patch");
    let added = patch(json!({"other": "stays"})).await;
    assert!(apply::apply_if_changed(&ctx, &config_map(&namespace, "c", "2"), Some(&added)).await.expect("nothing to send").is_none());
    let changed = patch(json!({"key": "theirs"})).await;
    let again = apply::apply_if_changed(&ctx, &config_map(&namespace, "c", "2"), Some(&changed)).await.expect("sent");
    let data = again.and_then(|again| again.data).expect("data");
    assert_eq!((data["key"].as_str(), data["other"].as_str()), ("2", "stays"));

    assert!(apply::delete_if_exists::<ConfigMap>(&ctx, &namespace, "c", Some("another uid")).await.is_ok_and(|deleted| !deleted));
    assert!(apply::delete_if_exists::<ConfigMap>(&ctx, &namespace, "c", None).await.expect("deleted"));
    assert!(!apply::delete_if_exists::<ConfigMap>(&ctx, &namespace, "c", None).await.expect("gone"));
    assert!(apply::get::<ConfigMap>(&ctx, &namespace, "c").await.expect("an answer").is_none());
    let nowhere = apply::apply(&ctx, &config_map("no-such-namespace", "c", "1")).await.expect_err("no namespace");
    assert_eq!(nowhere.class, ErrorClass::Missing);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_is_written_only_when_it_differs() {
    let server = ApiServer::shared().await;
    server.install(definitions()).await;
    let namespace = server.namespace("status").await;
    let ctx = context(&server, &namespace).await;
    let api = Api::<Mirror>::namespaced(ctx.client.clone(), &namespace);
    let created = api.create(&PostParams::default(), &mirror(&namespace, "m")).await.expect("a mirror");
    let status =
        MirrorStatus { phase: Some("Copying".into()), observed_generation: Some(1), rows_copied: Some(7), ..MirrorStatus::default() };
    assert!(apply::patch_status(&ctx, &created, None, &status).await.expect("written"));
    let reported = api.get("m").await.expect("the mirror");
    assert_eq!(reported.status.as_ref(), Some(&status));
    assert!(!apply::patch_status(&ctx, &reported, reported.status.as_ref(), &status).await.expect("the same"));
    // A field that is no longer reported goes away.
    let less = MirrorStatus { rows_copied: None, ..status };
    assert!(apply::patch_status(&ctx, &reported, reported.status.as_ref(), &less).await.expect("written"));
    assert_eq!(api.get("m").await.expect("the mirror").status, Some(less.clone()));

    api.delete("m", &DeleteParams::default()).await.expect("deleted");
    assert!(!apply::patch_status(&ctx, &reported, reported.status.as_ref(), &MirrorStatus::default()).await.expect("nothing to report to"));
}

#[tokio::test(flavor = "multi_thread")]
async fn finalizers_survive_writers_and_repetition() {
    let server = ApiServer::shared().await;
    let namespace = server.namespace("finalizers").await;
    let ctx = context(&server, &namespace).await;
    let api = Api::<ConfigMap>::namespaced(ctx.client.clone(), &namespace);
    let stale = api.create(&PostParams::default(), &config_map(&namespace, "c", "1")).await.expect("an object");
    // Ten writers with the same old view: all come through, none drops another's.
    let names: Vec<_> = (0..4).map(|number| format!("sluice.dev/f{number}")).collect();
    futures::future::join_all(names.iter().map(|name| apply::ensure_finalizer(&ctx, &stale, name)))
        .await
        .into_iter()
        .collect::<Result<Vec<_>, _>>()
        .expect("all added");
    let mut present = api.get("c").await.expect("the object").finalizers().to_vec();
    present.sort();
    assert_eq!(present, names);
    assert!(!apply::ensure_finalizer(&ctx, &api.get("c").await.expect("the object"), &names[0]).await.expect("there already"));

    api.delete("c", &DeleteParams::default()).await.expect("deletion begins");
    let late = apply::ensure_finalizer(&ctx, &stale, "sluice.dev/late").await.expect_err("too late");
    assert_eq!(late.reason, "BeingDeleted");
    for name in &names {
        let seen = api.get("c").await.expect("the object");
        assert!(apply::remove_finalizer(&ctx, &seen, name).await.expect("removed"));
    }
    assert!(api.get_opt("c").await.expect("an answer").is_none(), "the last one lets it go");
    let gone = ConfigMap { metadata: ObjectMeta { finalizers: Some(names.clone()), ..stale.metadata }, ..stale };
    assert!(!apply::remove_finalizer(&ctx, &gone, &names[0]).await.expect("nothing left to do"));
}

#[tokio::test(flavor = "multi_thread")]
async fn events_show_each_new_note_and_count_repetitions() {
    let server = ApiServer::shared().await;
    let namespace = server.namespace("events").await;
    let ctx = context(&server, &namespace).await;
    let object = Api::<ConfigMap>::namespaced(ctx.client.clone(), &namespace)
        .create(&PostParams::default(), &config_map(&namespace, "c", "1"))
        .await
        .expect("an object")
        .object_ref(&());
    let api = Api::<Event>::namespaced(ctx.client.clone(), &namespace);
    let all = async || {
        let mut events = api.list(&ListParams::default()).await.expect("events").items;
        events.sort_by_key(|event| event.event_time.clone().map(|time| time.0));
        events
    };
    let publish = async |note: &str| ctx.events.publish(&object, EventKind::Warning, "SourceUnreachable", "Connecting", note).await;

    publish("host a is unknown").await;
    publish("host a is unknown").await;
    publish("host b is unknown").await;
    let events = all().await;
    assert_eq!(events.len(), 2, "a new note is a new event");
    assert_eq!(events[0].series.as_ref().map(|series| series.count), Some(2));
    assert_eq!(events[1].note.as_deref(), Some("host b is unknown"));

    // Forgotten by the server, then by us.
    api.delete(&events[1].name_any(), &DeleteParams::default()).await.expect("deleted");
    publish("host b is unknown").await;
    ctx.events.forget(&object);
    publish("host b is unknown").await;
    assert_eq!(all().await.len(), 3);

    publish(&"é".repeat(2_000)).await;
    let long = all().await.pop().and_then(|event| event.note).expect("a note");
    assert!(long.len() <= 1024 && long.ends_with('…'));

    ctx.events.publish_in_operator_namespace(&object, EventKind::Warning, "SlotLeftBehind", "CleaningUp", "drop it by hand").await;
    let outside = all().await.pop().expect("an event");
    assert_eq!(outside.regarding.and_then(|object| object.kind).as_deref(), Some("Pod"));
    assert_eq!(outside.related.and_then(|object| object.name).as_deref(), Some("c"));

    // A namespace that is gone is counted, not an error.
    let nowhere = k8s_openapi::api::core::v1::ObjectReference { namespace: Some("no-such-namespace".into()), ..object.clone() };
    ctx.events.publish(&nowhere, EventKind::Normal, "Nothing", "Nothing", "nothing").await;
    assert!(ctx.metrics.encode().expect("text").contains("sluice_operator_events_total{result=\"failed\"} 1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_start_at_once_share_one_key() {
    let server = ApiServer::shared().await;
    let namespace = server.namespace("keys").await;
    let client = server.client().await;
    let loads = (0..6).map(|_| load_or_create(&client, &namespace, "sluice-signing-key"));
    let keys: Vec<_> = futures::future::join_all(loads).await.into_iter().map(|keys| keys.expect("keys").public_keys()).collect();
    assert!(keys.iter().all(|other| *other == keys[0]), "{keys:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_permissions_are_named_as_rules() {
    let server = ApiServer::shared().await;
    let namespace = server.namespace("rights").await;
    let admin = server.client().await;
    let account =
        ServiceAccount { metadata: ObjectMeta { name: Some("operator".into()), ..ObjectMeta::default() }, ..ServiceAccount::default() };
    Api::<ServiceAccount>::namespaced(admin.clone(), &namespace).create(&PostParams::default(), &account).await.expect("an account");
    let client = server.client_as_service_account(&namespace, "operator").await;
    let missing = permissions::missing(&client, &options(&namespace, "operator")).await.expect("answers");
    let rule = format!(
        r#"{{apiGroups: ["apps"], resources: ["deployments"], verbs: ["get", "list", "watch", "create", "patch", "delete"]}} in namespace {namespace}"#
    );
    assert!(missing.contains(&rule), "{missing:#?}");
    let refused = Api::<ConfigMap>::namespaced(client.clone(), &namespace).list(&ListParams::default()).await.expect_err("no right");
    let error = sluice::operator::OperatorError::from(refused);
    assert_eq!((error.class, error.reason), (ErrorClass::Bug, "Forbidden"));
    assert!(error.message.contains("list") && error.message.contains("configmaps"), "{error}");

    let binding = ClusterRoleBinding {
        metadata: ObjectMeta { name: Some(namespace.clone()), ..ObjectMeta::default() },
        role_ref: RoleRef { api_group: "rbac.authorization.k8s.io".into(), kind: "ClusterRole".into(), name: "cluster-admin".into() },
        subjects: Some(vec![Subject {
            kind: "ServiceAccount".into(),
            name: "operator".into(),
            namespace: Some(namespace.clone()),
            ..Subject::default()
        }]),
    };
    Api::all(admin).create(&PostParams::default(), &binding).await.expect("a binding");
    eventually(10, "all rights are there", || async {
        permissions::missing(&client, &options(&namespace, "operator")).await.is_ok_and(|missing| missing.is_empty())
    })
    .await;
}

// ---------------------------------------------------------------- watches

/// A ConfigMap that must have a certain key: others cannot be decoded.
#[derive(Resource, Clone, Debug, serde::Deserialize)]
#[resource(inherit = "ConfigMap")]
struct Strict {
    metadata: ObjectMeta,
    #[allow(dead_code)] // decoding it is the point
    data: StrictData,
}
#[derive(Clone, Debug, serde::Deserialize)]
struct StrictData {
    #[allow(dead_code)] // decoding it is the point
    key: String,
}

fn labelled(namespace: &str, name: &str, data: &serde_json::Value) -> ConfigMap {
    let metadata = json!({"namespace": namespace, "name": name, "labels": {"tests": "watch"}});
    serde_json::from_value(json!({"metadata": metadata, "data": data})).expect("an object")
}

fn selected() -> watcher::Config {
    watcher::Config::default().labels("tests=watch")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_cannot_be_decoded_is_left_out_and_namespaces_are_joined() {
    let server = ApiServer::shared().await;
    let (a, b, unserved) = (server.namespace("a").await, server.namespace("b").await, server.namespace("c").await);
    let admin = server.client().await;
    for (namespace, name, data) in
        [(&a, "good", json!({"key": "v"})), (&a, "bad", json!({"other": "v"})), (&unserved, "no", json!({"key": "v"}))]
    {
        Api::namespaced(admin.clone(), namespace)
            .create(&PostParams::default(), &labelled(namespace, name, &data))
            .await
            .expect("an object");
    }
    let (metrics, health) = (Metrics::default(), Health::default());
    let watches = Watches::new(admin.clone(), metrics.clone(), health.clone(), vec![Some(a.clone()), Some(b.clone())]);
    let watched = watches.watch::<Strict>(&selected());
    assert_eq!(health.not_ready(), ["waiting for the cache of configmaps"]);
    let store = watched.store.clone();
    let task = tokio::spawn(watched.run());
    let names = || {
        let mut names: Vec<_> = store.state().iter().map(|object| object.name_any()).collect();
        names.sort();
        names
    };
    eventually(10, "the good one is seen", || async { names() == ["good"] }).await;
    assert!(health.not_ready().is_empty());
    assert!(metrics.encode().expect("text").contains("sluice_operator_undecodable_objects_total{kind=\"ConfigMap\"} 1"));
    let late = labelled(&b, "late", &json!({"key": "v"}));
    Api::namespaced(admin.clone(), &b).create(&PostParams::default(), &late).await.expect("an object");
    eventually(10, "the other namespace is seen too", || async { names() == ["good", "late"] }).await;
    Api::<ConfigMap>::namespaced(admin, &a).delete("good", &DeleteParams::default()).await.expect("deleted");
    eventually(10, "the deletion is seen", || async { names() == ["late"] }).await;
    task.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_cache_keeps_of_mirrors_does_not_grow_with_their_tables() {
    let server = ApiServer::shared().await;
    server.install(definitions()).await;
    let namespace = server.namespace("many").await;
    let admin = server.client().await;
    let api = Api::<Mirror>::namespaced(admin.clone(), &namespace);
    // Names of one length; more of them than fit on a page of the list.
    let count = 120;
    for number in 0..count {
        let tables: Vec<_> = (0..if number == 0 { 1 } else { 1_000 }).map(|table| json!({"name": format!("table_{table:04}")})).collect();
        let mut mirror = mirror(&namespace, &format!("m-{number:03}"));
        mirror.spec.tables = serde_json::from_value(json!(tables)).expect("tables");
        // As `kubectl apply` leaves it.
        let copy = serde_json::to_string(&mirror.spec).expect("JSON");
        mirror.metadata.annotations = Some([("kubectl.kubernetes.io/last-applied-configuration".to_owned(), copy)].into());
        api.create(&PostParams::default(), &mirror).await.expect("a mirror");
    }
    let ctx = context(&server, &namespace).await;
    let caches = Caches::new(&ctx);
    let store = caches.mirrors.store.clone();
    let (mut tasks, shutdown) = (JoinSet::new(), Shutdown::new());
    caches.spawn(&mut tasks, &shutdown);
    eventually(30, "the cache is filled", || async { store.state().len() == count }).await;
    let kept: std::collections::BTreeMap<_, _> =
        store.state().iter().map(|mirror| (mirror.name_any(), format!("{mirror:?}").len())).collect();
    // Text of resource versions may be a digit longer.
    let (small, large) = (kept["m-000"], kept.values().max().copied().expect("mirrors"));
    assert!(large <= small + 8 && large < 2_048, "{small} and {large} characters");
    shutdown.cancel();
    while tasks.join_next().await.is_some() {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_recovers_from_faults_and_its_silence_is_noticed() {
    let server = ApiServer::shared().await;
    let namespace = server.namespace("faults").await;
    let proxy = server.proxy().await;
    let (metrics, health) = (Metrics::default(), Health::default());
    let client = bounded_client(server.config_through(&proxy).await, &metrics).expect("a client");
    let watches = Watches::new(client, metrics.clone(), health.clone(), vec![Some(namespace.clone())])
        .with_times(Duration::from_secs(1), Duration::from_secs(2));
    let watched = watches.watch::<ConfigMap>(&selected());
    let store = watched.store.clone();
    let task = tokio::spawn(watched.run());
    let admin = Api::<ConfigMap>::namespaced(server.client().await, &namespace);
    let add = async |name: &str| {
        admin.create(&PostParams::default(), &labelled(&namespace, name, &json!({}))).await.expect("an object");
    };
    let sees = |name: &'static str| store.get(&ObjectRef::new(name).within(&namespace)).is_some();

    add("before").await;
    eventually(10, "the watch works", || async { sees("before") }).await;
    // Nothing changes, and yet the server is heard: the watch is opened anew at its timeout.
    let begin = Instant::now();
    eventually(10, "a quiet watch outlives its allowed silence", || async {
        assert_eq!(health.not_alive(), Vec::<String>::new());
        begin.elapsed() > Duration::from_secs(4)
    })
    .await;

    proxy.set(Link::Cut);
    add("while-cut").await;
    eventually(15, "errors are counted", || async {
        metrics.encode().expect("text").contains("sluice_operator_watch_errors_total{kind=\"ConfigMap\"}")
    })
    .await;
    eventually(15, "a dead watch is not alive", || async { health.not_alive().iter().any(|complaint| complaint.contains("ConfigMap")) })
        .await;
    proxy.set(Link::Up);
    eventually(30, "the watch recovers", || async { sees("while-cut") && health.not_alive().is_empty() }).await;

    proxy.set(Link::Frozen);
    add("while-frozen").await;
    eventually(15, "a silent watch is not alive", || async { !health.not_alive().is_empty() }).await;
    proxy.set(Link::Up);
    eventually(30, "it recovers too", || async { sees("while-frozen") && health.not_alive().is_empty() }).await;
    task.abort();
    eventually(5, "a watch that is no longer wanted is not missed", || async { health.not_alive().is_empty() }).await;
}

// ---------------------------------------------------------------- election

const SHORT: Times = Times { duration: Duration::from_secs(3), renew_deadline: Duration::from_secs(2), retry: Duration::from_millis(500) };

fn candidate(client: &Client, namespace: &str, pod: &str, times: Times) -> Candidate {
    Candidate::new(client.clone(), &options(namespace, pod), Metrics::default(), times)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_is_handed_back_is_taken_within_three_seconds() {
    let server = ApiServer::shared().await;
    let namespace = server.namespace("release").await;
    let client = server.client().await;
    let mut first = candidate(&client, &namespace, "a", Times::default());
    let mut second = candidate(&client, &namespace, "b", Times::default());
    first.acquire().await;
    let waiting = tokio::spawn(async move {
        second.acquire().await;
        Instant::now()
    });
    let leases = Api::<k8s_openapi::api::coordination::v1::Lease>::namespaced(client, &namespace);
    let holder =
        async || leases.get("sluice-operator").await.expect("the lease").spec.and_then(|spec| spec.holder_identity).unwrap_or_default();
    assert!(holder().await.starts_with("a_"));
    first.release().await;
    let released = Instant::now();
    let taken = waiting.await.expect("taken");
    assert!(taken.duration_since(released) <= Duration::from_secs(3), "{:?}", taken.duration_since(released));
    assert!(holder().await.starts_with("b_"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lease_of_a_dead_holder_is_taken_after_its_time() {
    let server = ApiServer::shared().await;
    let namespace = server.namespace("dead").await;
    let client = server.client().await;
    let mut first = candidate(&client, &namespace, "a", SHORT);
    first.acquire().await;
    let died = Instant::now();
    drop(first);
    let mut second = candidate(&client, &namespace, "b", SHORT);
    second.acquire().await;
    let took = died.elapsed();
    assert!(took >= SHORT.duration && took <= SHORT.duration + SHORT.retry * 2 + Duration::from_secs(1), "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_that_is_cut_off_gives_up_before_another_begins() {
    let server = ApiServer::shared().await;
    let namespace = server.namespace("cut").await;
    let proxy = server.proxy().await;
    let cut_off = Client::try_from(server.config_through(&proxy).await).expect("a client");
    let mut first = candidate(&cut_off, &namespace, "a", SHORT);
    let mut second = candidate(&server.client().await, &namespace, "b", SHORT);
    first.acquire().await;
    proxy.set(Link::Frozen);
    let taking = tokio::spawn(async move {
        second.acquire().await;
        Instant::now()
    });
    let reason = first.keep().await;
    let gave_up = Instant::now();
    assert!(reason.contains("could not be renewed"), "{reason}");
    assert!(taking.await.expect("taken") > gave_up);
}

// ---------------------------------------------------------------- the whole run

static RECONCILED: Mutex<Vec<String>> = Mutex::new(Vec::new());
static HOLD: AtomicBool = AtomicBool::new(false);
static FINISHED: AtomicBool = AtomicBool::new(false);

/// A controller that notes what it sees, panics at one object and takes its time with another.
fn test_controllers(ctx: &Arc<Context>, shutdown: &Shutdown) -> JoinSet<()> {
    let mut mirrors = ctx.watch::<Mirror>(&watcher::Config::default());
    let (store, wake) = (mirrors.store.clone(), Wake::default());
    mirrors.wake(&wake, any_change(), |mirror| [ObjectRef::from_obj(mirror)]);
    let mut tasks = JoinSet::new();
    mirrors.spawn(&mut tasks, shutdown);
    let controller = reconcile::controller(store, &wake);
    tasks.spawn(reconcile::run("mirror", controller, ctx.clone(), shutdown.clone(), |mirror: Arc<Mirror>, _| async move {
        let name = mirror.name_any();
        assert!(name != "panics", "a defect of ours");
        RECONCILED.lock().expect("no panic while noting").push(name.clone());
        if name == "slow" {
            while HOLD.load(Ordering::Relaxed) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            FINISHED.store(true, Ordering::Relaxed);
        }
        Ok(Action::await_change())
    }));
    tasks
}

struct Replica {
    address: String,
    shutdown: Shutdown,
    run: tokio::task::JoinHandle<Result<(), RunError>>,
}

impl Replica {
    async fn start(config: kube::Config, namespace: &str, pod: &str) -> Self {
        Self::start_with(config, options(namespace, pod)).await
    }

    async fn start_with(config: kube::Config, options: Options) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let shutdown = Shutdown::new();
        let runtime = Runtime { options, times: SHORT, listener, shutdown: shutdown.clone(), controllers: test_controllers };
        Self { address, shutdown, run: tokio::spawn(runtime.run(async || Ok(config))) }
    }

    async fn get(&self, path: &str) -> (u16, String) {
        let answer = reqwest::get(format!("http://{}{path}", self.address)).await.expect("an answer");
        (answer.status().as_u16(), answer.text().await.expect("a body"))
    }

    async fn leads(&self) -> bool {
        self.get("/metrics").await.1.contains("sluice_operator_leader 1")
    }
}

fn reconciled(name: &str) -> bool {
    RECONCILED.lock().expect("no panic while noting").iter().any(|other| other == name)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_waits_leads_works_drains_and_hands_over() {
    let server = ApiServer::start().await;
    let namespace = server.namespace("run").await;
    let proxy = server.proxy().await;
    let first = Replica::start(server.config().await, &namespace, "a").await;
    eventually(10, "it says what it waits for", || async { first.get("/readyz").await.1.contains("CustomResourceDefinitions") }).await;
    assert_eq!(first.get("/livez").await.0, 200, "no crash loop without definitions");

    server.install(definitions()).await;
    eventually(20, "it leads and is ready", || async { first.leads().await && first.get("/readyz").await.0 == 200 }).await;
    let second = Replica::start(server.config_through(&proxy).await, &namespace, "b").await;
    eventually(20, "the standby is ready", || async { second.get("/readyz").await.0 == 200 }).await;
    assert!(!second.leads().await);

    HOLD.store(true, Ordering::Relaxed);
    let mirrors = Api::<Mirror>::namespaced(server.client().await, &namespace);
    for name in ["panics", "fine", "slow"] {
        mirrors.create(&PostParams::default(), &mirror(&namespace, name)).await.expect("a mirror");
    }
    eventually(10, "a panic holds up nobody", || async { reconciled("fine") && reconciled("slow") }).await;
    eventually(10, "the panic is counted", || async {
        first.get("/metrics").await.1.contains(r#"reconcile_total{controller="mirror",outcome="panic",class="bug"}"#)
    })
    .await;

    // A clean stop: the running pass ends, then the lease is handed over.
    first.shutdown.cancel();
    assert!(!second.leads().await, "not before the drain has ended");
    HOLD.store(false, Ordering::Relaxed);
    let stopped = first.run.await.expect("no panic");
    assert!(stopped.is_ok() && FINISHED.load(Ordering::Relaxed), "{stopped:?}");
    let released = Instant::now();
    eventually(3, "the standby leads", || async { second.leads().await }).await;
    assert!(released.elapsed() <= Duration::from_secs(3));

    // Cut off from the API server, the leader ends with an error; another replica takes over.
    let third = Replica::start(server.config().await, &namespace, "c").await;
    proxy.set(Link::Frozen);
    let lost = second.run.await.expect("no panic");
    assert!(matches!(lost, Err(RunError::LostLeadership(_))), "{lost:?}");
    assert!(!third.leads().await, "the lease outlives its holder's deadline");
    eventually(10, "the third leads", || async { third.leads().await }).await;
    third.shutdown.cancel();
    third.run.await.expect("no panic").expect("a clean end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_needs_no_lease_shows_that_it_leads() {
    let server = ApiServer::shared().await;
    server.install(definitions()).await;
    let namespace = server.namespace("alone").await;
    let alone = Replica::start_with(server.config().await, operator::options(&namespace, &namespace)).await;
    eventually(20, "it leads", || alone.leads()).await;
    alone.shutdown.cancel();
    alone.run.await.expect("no panic").expect("a clean end");
}

/// A process of its own, ended with the test.
struct Operator {
    process: std::process::Child,
    address: String,
}

impl Operator {
    fn start(server: &ApiServer, namespace: &str, pod: &str) -> Self {
        let address = format!("127.0.0.1:{}", support::free_port());
        let process = std::process::Command::new(env!("CARGO_BIN_EXE_sluice"))
            .args([
                "operator",
                "--listen",
                &address,
                "--namespace",
                namespace,
                "--watch-namespaces",
                namespace,
                "--pod-name",
                pod,
                "--log-level=warn",
            ])
            .env("KUBECONFIG", server.kubeconfig())
            .spawn()
            .expect("the operator starts");
        Self { process, address }
    }

    async fn says(&self, path: &str, text: &str) -> bool {
        let Ok(answer) = reqwest::get(format!("http://{}{path}", self.address)).await else { return false };
        answer.text().await.is_ok_and(|body| body.contains(text))
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_told_to_end_hands_over_and_exits_with_success() {
    let server = ApiServer::shared().await;
    server.install(definitions()).await;
    let namespace = server.namespace("processes").await;
    let mut first = Operator::start(&server, &namespace, "a");
    eventually(20, "the first leads", || first.says("/metrics", "sluice_operator_leader 1")).await;
    let second = Operator::start(&server, &namespace, "b");
    eventually(20, "the second stands by", || second.says("/readyz", "ok")).await;
    let told = std::process::Command::new("kill").args(["-TERM", &first.process.id().to_string()]).status();
    assert!(told.expect("kill runs").success());
    let ended = tokio::task::spawn_blocking(move || first.process.wait()).await.expect("no panic").expect("an end");
    assert!(ended.success(), "{ended}");
    eventually(3, "the second leads", || second.says("/metrics", "sluice_operator_leader 1")).await;
}
