//! What is planned, compared with files that people read in review.

use super::*;
use crate::operator::mirror::peer::{self, Peer};
use crate::operator::mirror::validate;
use crate::operator::mirror::validate::tests::{mirror, slim, slimmed};
use crate::resources::{Mirror, Source, Target};
use crate::worker::contract::Desired;
use k8s_openapi::api::apps::v1::Deployment;
use serde::Serialize;
use serde_json::{Value, json};

fn image(name: &str) -> Image {
    Image { name: name.to_owned(), pull_policy: "IfNotPresent".to_owned() }
}

fn peers() -> (Peer, Peer) {
    (Peer::from(&peer::tests::source()), Peer::from(&peer::tests::target()))
}

fn planned(mirror: &Mirror) -> (Desired, Deployment) {
    let (source, target) = peers();
    let valid = validate::validate(&mirror.spec, source.endpoint.clone(), target.endpoint.clone()).expect("valid");
    let slim = slimmed(mirror);
    let desired = numbered(document(&slim, &mirror.spec, valid, vec!["key".to_owned()]), &slim, &Live::default());
    (desired, deployment(&slim, &source, &target, &image("sluice:1"), "1.0.0"))
}

/// Compares with `snapshots/<name>.json`. On purpose nothing rewrites these files: copy what is shown.
fn assert_snapshot(name: &str, expected: &str, made: &impl Serialize) {
    let expected: Value = serde_json::from_str(expected).expect("the snapshot is JSON");
    let made = serde_json::to_value(made).expect("JSON");
    let text = serde_json::to_string_pretty(&made).expect("JSON");
    assert!(made == expected, "snapshots/{name}.json differs; what is planned now:\n{text}");
}

#[test]
fn a_small_mirror() {
    let mirror = mirror(json!({"tables": [{"name": "users"}]}));
    let (desired, deployment) = planned(&mirror);
    assert_snapshot("desired", include_str!("snapshots/desired.json"), &desired);
    assert_snapshot("deployment", include_str!("snapshots/deployment.json"), &deployment);
    let map = config_map(&slimmed(&mirror), &desired).expect("a ConfigMap");
    assert_eq!(map.metadata, child_meta(&slimmed(&mirror)));
    let carried: Desired = serde_json::from_str(&map.data.expect("data")["desired.json"]).expect("the document");
    assert_eq!(carried, desired);
}

#[test]
fn a_mirror_with_everything() {
    let mirror = mirror(json!({
        "tables": [{"name": "users"}, {"schema": "sales", "name": "orders", "target": {"schema": "dw", "name": "o"}, "excludeColumns": ["ssn"]}],
        "snapshot": {"existingRows": "Truncate", "rowsPerPartition": 1000, "tablesInParallel": 2, "workersPerTable": 3, "indexes": false, "foreignKeys": false},
        "stream": {"maxBatchRows": 10, "maxBatchBytes": 65536, "maxDelayMilliseconds": 100, "applyConnections": 3},
        "slotName": "shop_slot", "publicationName": "shop_publication", "suspend": true,
        "worker": {
            "image": "registry/sluice:pinned",
            "resources": {"requests": {"cpu": 1, "ephemeral-storage": "10Gi"}, "limits": {"memory": "1Gi"}},
            "nodeSelector": {"disk": "ssd"}, "tolerations": [{"key": "db", "operator": "Exists"}], "priorityClassName": "high",
        },
    }));
    let (desired, deployment) = planned(&mirror);
    assert_snapshot("desired-full", include_str!("snapshots/desired-full.json"), &desired);
    assert_snapshot("deployment-full", include_str!("snapshots/deployment-full.json"), &deployment);
}

#[test]
fn the_policy_of_a_namespace() {
    assert_snapshot("network-policy", include_str!("snapshots/network-policy.json"), &network_policy("shop"));
}

#[test]
fn the_generation_moves_only_with_the_content() {
    let mirror = mirror(json!({"tables": [{"name": "users"}]}));
    let (first, _) = planned(&mirror);
    let mirror = slimmed(&mirror);
    assert_eq!(first.generation, 3, "that of the Mirror at first");
    let live = |document: &Desired, in_effect| Live { document: Some(document.clone()), in_effect };
    assert_eq!(numbered(first.clone(), &mirror, &live(&first, 3)).generation, 3, "nothing has changed");
    let suspended = Desired { suspend: true, ..first.clone() };
    assert_eq!(numbered(suspended.clone(), &mirror, &live(&first, 3)).generation, 4);
    let mut edited = mirror.clone();
    edited.metadata.generation = Some(9);
    assert_eq!(numbered(suspended.clone(), &edited, &live(&first, 3)).generation, 9);
    // Somebody has put back or deleted the ConfigMap: the worker has seen more.
    assert_eq!(numbered(first.clone(), &mirror, &live(&first, 7)).generation, 8);
    assert_eq!(numbered(first, &mirror, &Live { document: None, in_effect: 7 }).generation, 8);
}

#[test]
fn a_wrong_spec_still_suspends() {
    let good = mirror(json!({"tables": [{"name": "users"}]}));
    let (live, _) = planned(&good);
    let wrong = mirror(json!({"tables": [{"name": "users"}, {"name": "users"}], "suspend": true}));
    let kept = last_good(&wrong.spec, &live, vec!["key".to_owned()]);
    assert_eq!(kept, Desired { suspend: true, ..live });
}

#[test]
fn names_of_slot_and_publication() {
    let own = slim(json!({"tables": [{"name": "users"}], "slotName": "s", "publicationName": "p"}));
    assert_eq!((slot(&own).as_str(), publication(&own).as_str()), ("s", "p"));
    let default = slim(json!({"tables": [{"name": "users"}]}));
    assert_eq!(slot(&default), "sluice_6f9619ff_8b86_d011_b42d_00c04fc964ff");
    assert_eq!(publication(&default), slot(&default));
}

#[test]
fn only_inputs_that_need_a_restart_move_the_hash() {
    let (source, target) = peers();
    let base = slim(json!({"tables": [{"name": "users"}]}));
    let before = restart_hash(&base, &source, &target);
    let of = |spec: Value| restart_hash(&slim(spec), &source, &target);
    let tables = json!([{"name": "users"}]);
    for hot in [
        json!({"tables": [{"name": "others"}]}),
        json!({"tables": tables, "suspend": true}),
        json!({"tables": tables, "stream": {"maxBatchRows": 7}}),
        json!({"tables": tables, "worker": {"updatePolicy": "Immediate"}}),
        json!({"tables": tables, "deletionPolicy": {"slot": "Retain"}}),
    ] {
        assert_eq!(of(hot.clone()), before, "{hot}");
    }
    for cold in [
        json!({"tables": tables, "worker": {"image": "other"}}),
        json!({"tables": tables, "worker": {"resources": {"limits": {"memory": "1Gi"}}}}),
        json!({"tables": tables, "worker": {"nodeSelector": {"a": "b"}}}),
        json!({"tables": tables, "worker": {"tolerations": [{"operator": "Exists"}]}}),
        json!({"tables": tables, "worker": {"priorityClassName": "high"}}),
    ] {
        assert_ne!(of(cold.clone()), before, "{cold}");
    }
    let edit = |change: fn(&mut Source)| {
        let mut source = peer::tests::source();
        change(&mut source);
        restart_hash(&base, &Peer::from(&source), &target)
    };
    assert_eq!(edit(|source| source.spec.host = "elsewhere".into()), before, "a failover needs no restart");
    assert_ne!(edit(|source| source.spec.credentials_ref.name = "other".into()), before);
    let mut other_key: Target = peer::tests::target();
    other_key.spec.tls.ca_ref.as_mut().expect("a CA").key = "other".into();
    assert_ne!(restart_hash(&base, &source, &Peer::from(&other_key)), before);
}

#[test]
fn the_image_is_the_mirrors_or_the_operators() {
    let mut options = crate::operator::options::tests::parse(&[]);
    options.worker_image = "operator:2".into();
    assert_eq!(Image::of(&slim(json!({"tables": [{"name": "a"}]})), &options).name, "operator:2");
    assert_eq!(Image::of(&slim(json!({"tables": [{"name": "a"}], "worker": {"image": "own"}})), &options).name, "own");
}
