//! The CustomResourceDefinitions of our kinds, as they are installed.
//!
//! kube derives them from the types; what the derive can't express is put right here, so that API servers install them without a
//! warning and refuse what can't work.

use super::{Mirror, Source, Target};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSON, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::CustomResourceExt as _;
use std::path::Path;
use std::{fs, io};

/// Longest text that Kubernetes itself takes as the key of a label, taint or claim: 253 characters, a slash and 63 more.
const QUALIFIED_NAME: i64 = 317;
/// Most resources (cpu, memory, …) that a container may name.
const RESOURCES: i64 = 16;
/// A quantity, as Kubernetes' own generator of CRDs describes it.
const QUANTITY: &str = r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$";

/// The definitions of all kinds.
pub fn all() -> Vec<CustomResourceDefinition> {
    [Source::crd(), Target::crd(), Mirror::crd()].into_iter().map(polished).collect()
}

/// All definitions as one YAML stream, each after a line `---`.
///
/// # Errors
/// When a definition can't be written as YAML, which is a defect of ours.
pub fn to_yaml() -> io::Result<String> {
    documents()?.into_iter().map(|(_, text)| Ok(format!("---\n{text}"))).collect()
}

/// Writes each definition into `folder`, which is made when missing, as `<plural>.sluice.dev.yaml`.
///
/// # Errors
/// When a file can't be written.
pub fn write(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    documents()?.into_iter().try_for_each(|(name, text)| fs::write(folder.join(name), text))
}

/// File name and text of each definition.
///
/// # Errors
/// As [`to_yaml`].
pub fn documents() -> io::Result<Vec<(String, String)>> {
    let document = |crd: CustomResourceDefinition| {
        let text = serde_yaml::to_string(&crd).map_err(io::Error::other)?;
        Ok((format!("{}.{}.yaml", crd.spec.names.plural, crd.spec.group), text))
    };
    all().into_iter().map(document).collect()
}

fn polished(mut crd: CustomResourceDefinition) -> CustomResourceDefinition {
    for version in &mut crd.spec.versions {
        let Some(root) = version.schema.as_mut().and_then(|schema| schema.open_api_v3_schema.as_mut()) else { continue };
        root.title = None;
        each(root, &mut without_null);
        if let Some(worker) = at(root, &["spec", "worker"]) {
            each(worker, &mut with_kubernetes_bounds);
        }
        if let Some(resources) = at(root, &["spec", "worker", "resources"]) {
            only_quantities(resources);
        }
        if let Some(status) = at(root, &["status"]) {
            // A new object is not settled before it was seen: kstatus compares this with metadata.generation.
            status.default = Some(JSON(serde_json::json!({"observedGeneration": -1})));
        }
    }
    crd
}

/// An absent field is absent: nobody may store `null`. Formats that API servers don't know go too.
fn without_null(schema: &mut JSONSchemaProps) {
    schema.nullable = None;
    if !matches!(schema.format.as_deref(), Some("date-time" | "int32" | "int64")) {
        schema.format = None;
    }
}

/// Bounds for the types of Kubernetes itself, which come without.
fn with_kubernetes_bounds(schema: &mut JSONSchemaProps) {
    if schema.type_.as_deref() == Some("string") && schema.enum_.is_none() && schema.max_length.is_none() {
        schema.max_length = Some(QUALIFIED_NAME);
    }
    if schema.x_kubernetes_int_or_string == Some(true) {
        let of = |kind: &str| JSONSchemaProps { type_: Some(kind.into()), ..JSONSchemaProps::default() };
        schema.any_of = Some(vec![of("integer"), of("string")]);
        schema.pattern = Some(QUANTITY.into());
    }
}

/// `claims` of ResourceRequirements name things that a worker's pod does not have.
fn only_quantities(resources: &mut JSONSchemaProps) {
    let Some(properties) = &mut resources.properties else { return };
    properties.remove("claims");
    for quantities in properties.values_mut() {
        quantities.max_properties = Some(RESOURCES);
    }
}

/// The schema under `path` of properties.
fn at<'a>(root: &'a mut JSONSchemaProps, path: &[&str]) -> Option<&'a mut JSONSchemaProps> {
    path.iter().try_fold(root, |schema, name| schema.properties.as_mut()?.get_mut(*name))
}

/// Calls `change` for `schema` and all below it.
fn each(schema: &mut JSONSchemaProps, change: &mut impl FnMut(&mut JSONSchemaProps)) {
    change(schema);
    for property in schema.properties.iter_mut().flat_map(|properties| properties.values_mut()) {
        each(property, change);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(item)) = &mut schema.items {
        each(item, change);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(value)) = &mut schema.additional_properties {
        each(value, change);
    }
}
