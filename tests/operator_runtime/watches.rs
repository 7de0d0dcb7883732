//! Watches and caches, under faults too.

use crate::support::apiserver::{ApiServer, Link};
use crate::support::eventually;
use crate::{context, definitions, mirror};
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, PostParams};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher;
use kube::{Api, Resource, ResourceExt as _};
use serde_json::json;
use sluice::operator::cache::Caches;
use sluice::operator::client::client as bounded_client;
use sluice::operator::health::Health;
use sluice::operator::metrics::Metrics;
use sluice::operator::shutdown::Shutdown;
use sluice::operator::watch::Watches;
use sluice::resources::Mirror;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

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
