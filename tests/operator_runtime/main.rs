//! What the controllers share, against a real API server: election, apply, status, finalizers, events, watches under faults, permissions,
//! keys, and the run of the operator from start to drain.

#[path = "../support/mod.rs"]
mod support;

mod election;
mod run;
mod watches;
mod writes;

use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::CustomResourceExt as _;
use serde_json::json;
use sluice::operator::client::client as bounded_client;
use sluice::operator::health::Health;
use sluice::operator::metrics::Metrics;
use sluice::operator::signing::SigningKeys;
use sluice::operator::{Context, Options};
use sluice::resources::{Mirror, Source, Target};
use sluice::worker::token::SigningKey;
use std::sync::Arc;
use support::apiserver::ApiServer;
use support::operator;

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

fn definitions() -> Vec<CustomResourceDefinition> {
    vec![Source::crd(), Target::crd(), Mirror::crd()]
}
