//! The schema of the resources: what is installed is what the types say, bounded and described, and its rules hold.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sluice::resources::{Mirror, Source, Target, crds};
use std::fs;
use std::path::{Path, PathBuf};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Path and schema of every node below the version's schema, the root included.
fn nodes(crd: &CustomResourceDefinition) -> Vec<(String, Value)> {
    fn walk(path: &str, schema: &Value, found: &mut Vec<(String, Value)>) {
        found.push((path.to_owned(), schema.clone()));
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            walk(&format!("{path}.{name}"), property, found);
        }
        for (key, mark) in [("items", "[]"), ("additionalProperties", "{}")] {
            if schema[key].is_object() {
                walk(&format!("{path}{mark}"), &schema[key], found);
            }
        }
    }
    let mut found = vec![];
    let schema = serde_json::to_value(&crd.spec.versions[0].schema).expect("JSON");
    walk("", &schema["openAPIV3Schema"], &mut found);
    found
}

fn all_nodes() -> Vec<(String, Value)> {
    let named = |crd: CustomResourceDefinition| {
        let kind = crd.spec.names.kind.clone();
        nodes(&crd).into_iter().map(move |(path, node)| (format!("{kind}{path}"), node)).collect::<Vec<_>>()
    };
    crds::all().into_iter().flat_map(named).collect()
}

#[test]
fn the_files_are_what_the_types_say() {
    let mut expected = crds::documents().expect("YAML");
    expected.sort();
    for folder in ["crds", "charts/sluice/crd-files"] {
        let mut found: Vec<_> = fs::read_dir(repository().join(folder))
            .expect(folder)
            .map(|entry| entry.expect("an entry").path())
            .map(|path| {
                let name = path.file_name().expect("a name").to_string_lossy().into_owned();
                (name, fs::read_to_string(&path).expect("text"))
            })
            .collect();
        found.sort();
        let names = |files: &[(String, String)]| files.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&found), names(&expected), "{folder}");
        for (found, expected) in found.iter().zip(&expected) {
            assert!(found.1 == expected.1, "{folder}/{} is out of date: run make crds", found.0);
        }
    }
}

#[test]
fn written_files_are_the_printed_documents() {
    let folder = tempfile::tempdir().expect("a folder");
    crds::write(&folder.path().join("new")).expect("written");
    let printed = crds::to_yaml().expect("YAML");
    let parts: Vec<_> = printed.split("---\n").filter(|part| !part.is_empty()).collect();
    assert_eq!(parts.len(), 3);
    for (name, text) in crds::documents().expect("YAML") {
        assert_eq!(fs::read_to_string(folder.path().join("new").join(&name)).expect(&name), text);
        assert!(parts.contains(&text.as_str()), "{name}");
        assert!(text.contains(&format!("\n  name: {}\n", name.trim_end_matches(".yaml"))));
    }
}

#[test]
fn every_field_is_described() {
    let bare: Vec<_> = all_nodes()
        .into_iter()
        .filter(|(path, _)| !path.ends_with("[]") && !path.ends_with("{}"))
        .filter(|(_, node)| node["description"].as_str().is_none_or(|text| text.len() < 4))
        .map(|(path, _)| path)
        .collect();
    assert!(bare.is_empty(), "without description: {bare:?}");
}

#[test]
fn everything_in_a_spec_is_bounded() {
    // Kubernetes' own: quantities have a pattern, and any number of seconds is right.
    const EXEMPT: &[&str] = &[
        "Mirror.spec.worker.resources.limits{}",
        "Mirror.spec.worker.resources.requests{}",
        "Mirror.spec.worker.tolerations[].tolerationSeconds",
    ];
    let mut loose = vec![];
    for (path, node) in all_nodes() {
        if !path.contains(".spec") || EXEMPT.contains(&path.as_str()) {
            continue;
        }
        let has = |key: &str| !node[key].is_null();
        let bounded = match node["type"].as_str() {
            Some("string") => has("maxLength") || has("enum"),
            Some("array") => has("maxItems"),
            Some("object") => !has("additionalProperties") || has("maxProperties"),
            Some("integer") => has("minimum") && has("maximum"),
            Some("boolean") => true,
            _ => false,
        };
        if !bounded {
            loose.push(path);
        }
    }
    assert!(loose.is_empty(), "unbounded: {loose:?}");
}

#[test]
fn nothing_that_api_servers_warn_about() {
    for (path, node) in all_nodes() {
        assert!(node["nullable"].is_null(), "{path} is nullable");
        let format = node["format"].as_str();
        assert!(format.is_none_or(|format| ["int32", "int64", "date-time"].contains(&format)), "{path}: {format:?}");
    }
}

#[test]
fn a_new_object_is_not_settled() {
    for (path, node) in all_nodes().into_iter().filter(|(path, _)| path.matches('.').count() == 1 && path.ends_with(".status")) {
        assert_eq!(node["default"], json!({"observedGeneration": -1}), "{path}");
    }
}

#[test]
fn what_git_leaves_out_has_no_default() {
    let all = all_nodes();
    for path in ["Mirror.spec.suspend", "Mirror.spec.request", "Mirror.spec.deletionProtection", "Source.spec.deletionProtection"] {
        let (_, node) = all.iter().find(|(found, _)| found == path).expect(path);
        assert!(node["default"].is_null(), "{path}: a default would make whoever creates the object its owner");
    }
    let (_, tables) = all.iter().find(|(path, _)| path == "Mirror.spec.tables").expect("tables");
    assert_eq!(tables["x-kubernetes-list-type"], "atomic");
}

/// Names of fields that `given` has and the schema lacks; the API server would refuse them (strict) or drop them.
fn unknown(given: &Value, schema: &Value, path: &str, found: &mut Vec<String>) {
    match given {
        Value::Object(fields) => {
            for (name, value) in fields {
                let property = &schema["properties"][name];
                match (property.is_null(), schema["additionalProperties"].is_object()) {
                    (false, _) => unknown(value, property, &format!("{path}.{name}"), found),
                    (true, true) => unknown(value, &schema["additionalProperties"], &format!("{path}.{name}"), found),
                    (true, false) => found.push(format!("{path}.{name}")),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| unknown(item, &schema["items"], &format!("{path}[]"), found)),
        _ => {}
    }
}

fn yaml_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()) {
        if entry.is_dir() {
            yaml_files(&entry, found);
        } else if entry.extension().is_some_and(|extension| extension == "yaml") {
            found.push(entry);
        }
    }
}

fn documents(text: &str) -> Vec<Value> {
    text.split("\n---")
        .map(|document| serde_yaml::from_str::<Value>(document).expect("YAML"))
        .filter(|document| !document.is_null())
        .collect()
}

#[test]
fn samples_are_valid() {
    let mut files = vec![];
    yaml_files(&repository().join("config/samples"), &mut files);
    let mut kinds = vec![];
    for file in files {
        for document in documents(&fs::read_to_string(&file).expect("text")) {
            let kind = document["kind"].as_str().expect("a kind").to_owned();
            let refused = match kind.as_str() {
                "Source" => source_rules(&document),
                "Target" => read::<Target>(&document).validate_cel().map_err(|errors| errors.to_string()),
                "Mirror" => mirror_rules(&document),
                _ => continue,
            };
            assert_eq!(refused, Ok(()), "{}: {kind}", file.display());
            let crd = crds::all().into_iter().find(|crd| crd.spec.names.kind == kind).expect("our kind");
            let mut strange = vec![];
            unknown(&document["spec"], &nodes(&crd)[0].1["properties"]["spec"], "spec", &mut strange);
            assert!(strange.is_empty(), "{}: {strange:?}", file.display());
            kinds.push(kind);
        }
    }
    kinds.sort();
    kinds.dedup();
    assert_eq!(kinds, ["Mirror", "Source", "Target"]);
}

fn read<K: DeserializeOwned>(document: &Value) -> K {
    serde_json::from_value(document.clone()).expect("a resource")
}

fn source_rules(document: &Value) -> Result<(), String> {
    read::<Source>(document).validate_cel().map_err(|errors| errors.to_string())
}

fn mirror_rules(document: &Value) -> Result<(), String> {
    read::<Mirror>(document).validate_cel().map_err(|errors| errors.to_string())
}

fn mirror_update(old: &Value, new: &Value) -> Result<(), String> {
    read::<Mirror>(new).validate_cel_update(&read(old)).map_err(|errors| errors.to_string())
}

fn source() -> Value {
    json!({
        "apiVersion": "sluice.dev/v1alpha1", "kind": "Source", "metadata": {"name": "shop"},
        "spec": {"engine": "PostgreSQL", "host": "db", "database": "shop", "credentialsRef": {"name": "s"}},
    })
}

fn mirror() -> Value {
    json!({
        "apiVersion": "sluice.dev/v1alpha1", "kind": "Mirror", "metadata": {"name": "shop"},
        "spec": {"sourceRef": {"name": "shop"}, "targetRef": {"name": "dw"}, "tables": [{"name": "users"}]},
    })
}

/// `base` with the value at `pointer` set, or removed when `value` is null.
fn with(mut base: Value, pointer: &str, value: Value) -> Value {
    let (parent, name) = pointer.rsplit_once('/').expect("a pointer");
    let parent = base.pointer_mut(parent).and_then(Value::as_object_mut).expect("the parent");
    if value.is_null() {
        parent.remove(name);
    } else {
        parent.insert(name.to_owned(), value);
    }
    base
}

fn refused(result: Result<(), String>, why: &str) {
    let message = result.expect_err(why);
    assert!(message.contains(why), "expected '{why}', got '{message}'");
}

#[test]
fn exactly_one_of_tables_and_schemas() {
    assert_eq!(mirror_rules(&mirror()), Ok(()));
    let schemas = json!([{"name": "sales"}]);
    let why = "give exactly one of tables and schemas";
    refused(mirror_rules(&with(mirror(), "/spec/schemas", schemas.clone())), why);
    refused(mirror_rules(&with(mirror(), "/spec/tables", Value::Null)), why);
    let by_schema = with(with(mirror(), "/spec/tables", Value::Null), "/spec/schemas", schemas);
    assert_eq!(mirror_rules(&by_schema), Ok(()));
    let twice = with(by_schema.clone(), "/spec/schemas", json!([{"name": "sales"}, {"name": "sales"}]));
    refused(mirror_rules(&twice), "a schema is given twice");
    // From one to the other is a change of tables like any other.
    assert_eq!(mirror_update(&mirror(), &by_schema), Ok(()));
}

#[test]
fn duplicates_among_tables_are_found_later() {
    let twice = with(mirror(), "/spec/tables", json!([{"name": "users"}, {"name": "users"}]));
    assert_eq!(mirror_rules(&twice), Ok(()), "CEL can't afford to compare 5,000 tables; the operator does");
}

#[test]
fn identity_is_immutable() {
    for (pointer, value, why) in [
        ("/spec/sourceRef", json!({"name": "other"}), "sourceRef cannot be changed"),
        ("/spec/targetRef", json!({"name": "other"}), "targetRef cannot be changed"),
        ("/spec/slotName", json!("s"), "slotName cannot be changed"),
        ("/spec/publicationName", json!("p"), "publicationName cannot be changed"),
    ] {
        let changed = with(mirror(), pointer, value.clone());
        refused(mirror_update(&mirror(), &changed), why);
        assert_eq!(mirror_update(&changed, &with(changed.clone(), "/spec/suspend", json!(true))), Ok(()));
        if value.is_string() {
            refused(mirror_update(&changed, &with(mirror(), pointer, json!("other"))), why);
            refused(mirror_update(&changed, &mirror()), why);
        }
    }
    let moved = with(source(), "/spec/host", json!("standby"));
    assert!(read::<Source>(&moved).validate_cel_update(&read(&source())).is_ok(), "a failover changes the host");
}

#[test]
fn a_request_is_another_one_only_under_another_id() {
    let asked = |request: Value| with(mirror(), "/spec/request", request);
    let first = asked(json!({"id": "a", "action": "Resync", "tables": ["public.users"]}));
    assert_eq!(mirror_rules(&first), Ok(()));
    assert_eq!(mirror_update(&mirror(), &first), Ok(()));
    assert_eq!(mirror_update(&first, &mirror()), Ok(()), "taking it out does nothing");
    assert_eq!(mirror_update(&first, &with(first.clone(), "/spec/suspend", json!(true))), Ok(()));
    for changed in [json!({"id": "a", "action": "Resync"}), json!({"id": "a", "action": "Retry"})] {
        refused(mirror_update(&first, &asked(changed)), "a request cannot be changed: give it another id");
    }
    assert_eq!(mirror_update(&first, &asked(json!({"id": "b", "action": "Cancel"}))), Ok(()));
    for action in ["Retry", "Cancel"] {
        refused(
            mirror_rules(&asked(json!({"id": "a", "action": action, "tables": ["users"]}))),
            "tables goes with Resync, ResetSequences and Verify",
        );
    }
    let (_, action) = all_nodes().into_iter().find(|(path, _)| path == "Mirror.spec.request.action").expect("the action");
    assert_eq!(action["enum"], json!(["Retry", "Resync", "ResetSequences", "Verify", "Cancel"]), "only what works");
}

#[test]
fn names_are_dns_labels() {
    let why = "metadata.name must be a DNS label of at most 63 characters";
    for (name, good) in [("a".repeat(63), true), ("a".repeat(64), false), ("a.b".to_owned(), false)] {
        for result in
            [mirror_rules(&with(mirror(), "/metadata/name", json!(name))), source_rules(&with(source(), "/metadata/name", json!(name)))]
        {
            match good {
                true => assert_eq!(result, Ok(())),
                false => refused(result, why),
            }
        }
    }
}

#[test]
fn verifying_needs_a_ca() {
    for mode in ["VerifyCA", "VerifyFull"] {
        let bare = with(source(), "/spec/tls", json!({"mode": mode}));
        refused(source_rules(&bare), "tls.caRef is required");
        let full = with(source(), "/spec/tls", json!({"mode": mode, "caRef": {"name": "ca"}}));
        assert_eq!(source_rules(&full), Ok(()));
    }
    assert_eq!(source_rules(&with(source(), "/spec/tls", json!({"mode": "Require"}))), Ok(()));
}

#[test]
fn a_start_position_goes_without_a_copy() {
    let position = |enabled| with(mirror(), "/spec/snapshot", json!({"enabled": enabled, "startPosition": "0/16B3748"}));
    assert_eq!(mirror_rules(&position(false)), Ok(()));
    refused(mirror_rules(&position(true)), "startPosition goes with enabled: false");
}

#[test]
fn a_budget_says_what_it_allows() {
    const GIB: i64 = 1 << 30;
    let budget = |budget: Value| mirror_rules(&with(mirror(), "/spec/walBudget", budget));
    for good in [
        json!({"warnBytes": GIB}),
        json!({"warnBytes": GIB, "maxBytes": GIB, "action": "DropSlotAndResync"}),
        json!({"maxBytes": GIB, "action": "DropSlot"}),
    ] {
        assert_eq!(budget(good), Ok(()));
    }
    refused(budget(json!({"action": "Warn"})), "give warnBytes, maxBytes or both");
    refused(budget(json!({"warnBytes": 2 * GIB, "maxBytes": GIB})), "warnBytes may not be above maxBytes");
    refused(budget(json!({"warnBytes": GIB, "action": "DropSlot"})), "needs maxBytes");
}

#[test]
fn quantities_may_be_numbers_and_claims_are_not_offered() {
    let document = with(mirror(), "/spec/worker", json!({"resources": {"requests": {"cpu": 1, "memory": "1Gi"}}}));
    let worker = read::<Mirror>(&document).spec.worker.expect("a worker");
    let requests = worker.resources.and_then(|resources| resources.requests).expect("requests");
    assert_eq!(requests["cpu"].0, "1");
    let all = all_nodes();
    let find = |path: &str| all.iter().find(|(found, _)| found == path).map(|(_, node)| node);
    let quantity = find("Mirror.spec.worker.resources.requests{}").expect("requests");
    assert_eq!(quantity["x-kubernetes-int-or-string"], true);
    assert!(find("Mirror.spec.worker.resources.claims").is_none());
}

#[test]
fn fields_can_be_selected_by() {
    // The API server wants the leading dot.
    for (crd, fields) in crds::all().iter().zip([&[".spec.host"][..], &[".spec.host"], &[".spec.sourceRef.name", ".spec.targetRef.name"]]) {
        let selectable = crd.spec.versions[0].selectable_fields.as_ref().expect("selectable fields");
        assert_eq!(selectable.iter().map(|field| field.json_path.as_str()).collect::<Vec<_>>(), fields);
    }
}
