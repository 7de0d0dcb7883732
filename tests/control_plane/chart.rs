//! The chart, rendered.

use crate::support::cache;
use kube::core::DynamicObject;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// What the chart makes of a release named after its namespace; with rights in all namespaces when `scopes` is empty.
pub fn rendered(home: &str, scopes: &[&str]) -> Vec<DynamicObject> {
    let chart = format!("{}/charts/sluice", env!("CARGO_MANIFEST_DIR"));
    let helm = std::process::Command::new(cache().join("bin/helm"))
        .args(["template", home, &chart, "--namespace", home, "--kube-version", "1.33.0", "--set", "crds.enabled=false"])
        .args(["--set-json", &format!("watchNamespaces={}", json!(scopes))])
        .output()
        .expect("helm runs: `make deps` fetches it");
    assert!(helm.status.success(), "{}", String::from_utf8_lossy(&helm.stderr));
    let text = String::from_utf8_lossy(&helm.stdout);
    let documents = text.split("\n---\n").map(|document| serde_yaml::from_str::<Option<DynamicObject>>(document).expect("a manifest"));
    documents.flatten().collect()
}

/// The object's kind.
pub fn kind(object: &DynamicObject) -> &str {
    object.types.as_ref().map_or("", |types| &types.kind)
}

/// The flags of the operator.
pub fn arguments(chart: &[DynamicObject]) -> Vec<String> {
    let deployment = chart.iter().find(|object| kind(object) == "Deployment").expect("the chart makes a Deployment");
    texts(&deployment.data["spec"]["template"]["spec"]["containers"][0]["args"]).into_iter().skip(1).collect()
}

/// A right as text: place, group and resource, name, verb.
pub fn right(namespace: Option<&str>, group: &str, resource: &str, name: Option<&str>, verb: &str) -> String {
    format!("{}: {group}/{resource} {} {verb}", namespace.unwrap_or("everywhere"), name.unwrap_or("*"))
}

/// Everything that is granted by what is bound to anybody.
pub fn granted(chart: &[DynamicObject]) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for binding in chart.iter().filter(|object| kind(object).ends_with("RoleBinding")) {
        let role = &binding.data["roleRef"];
        let is_bound = |object: &&DynamicObject| role["kind"] == kind(object) && object.metadata.name.as_deref() == role["name"].as_str();
        let place = binding.metadata.namespace.as_deref();
        for rule in chart.iter().find(is_bound).expect("a role").data["rules"].as_array().expect("rules") {
            let names = texts(&rule["resourceNames"]);
            let names: Vec<_> = if names.is_empty() { vec![None] } else { names.iter().map(|name| Some(name.as_str())).collect() };
            for group in texts(&rule["apiGroups"]) {
                for resource in texts(&rule["resources"]) {
                    for verb in texts(&rule["verbs"]) {
                        all.extend(names.iter().map(|name| right(place, &group, &resource, *name, &verb)));
                    }
                }
            }
        }
    }
    all
}

fn texts(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().filter_map(|text| text.as_str().map(str::to_owned)).collect()
}
