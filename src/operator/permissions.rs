//! Names every permission that is missing, at start, instead of failing at its first use.
//!
//! The table is the same as the rules of `charts/sluice/templates/_helpers.tpl` and `rbac.yaml`.

use super::options::Options;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use kube::api::PostParams;
use kube::{Api, Client};
use std::collections::BTreeMap;

/// Questions at the same time.
const PARALLEL: usize = 8;

/// One right.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Right {
    /// `None`: cluster-wide.
    pub namespace: Option<String>,
    /// Of the API.
    pub group: &'static str,
    /// Plural.
    pub resource: &'static str,
    /// Part of the resource.
    pub subresource: Option<&'static str>,
    /// Only the object of this name.
    pub name: Option<String>,
    /// What is done.
    pub verb: &'static str,
}

/// What the operator needs with these options. That the chart grants it, and no more, is tested.
pub fn needed(options: &Options) -> Vec<Right> {
    let mut rights = Vec::new();
    let mut add = |namespace: Option<&str>, group, resource: &'static str, name: Option<&str>, verbs: &[&'static str]| {
        let (resource, subresource) = resource.split_once('/').map_or((resource, None), |(resource, sub)| (resource, Some(sub)));
        rights.extend(verbs.iter().map(|verb| Right {
            namespace: namespace.map(str::to_owned),
            group,
            resource,
            subresource,
            name: name.map(str::to_owned),
            verb,
        }));
    };
    for scope in options.scopes() {
        let scope = scope.as_deref();
        for kind in ["sources", "targets", "mirrors"] {
            add(scope, "sluice.dev", kind, None, &["get", "list", "watch", "patch"]);
        }
        for status in ["sources/status", "targets/status", "mirrors/status"] {
            add(scope, "sluice.dev", status, None, &["patch"]);
        }
        add(scope, "", "secrets", None, if options.protect_secrets { &["get", "patch"] } else { &["get"] });
        add(scope, "sluice.dev", "mirrors/finalizers", None, &["update"]);
        add(scope, "", "configmaps", None, &["get", "list", "watch", "create", "patch", "delete"]);
        add(scope, "apps", "deployments", None, &["get", "list", "watch", "create", "patch", "delete"]);
        add(scope, "", "pods", None, &["list", "watch", "patch", "delete"]);
        if options.worker_network_policies {
            add(scope, "networking.k8s.io", "networkpolicies", None, &["get", "list", "watch", "create", "patch", "delete"]);
        }
        add(scope, "events.k8s.io", "events", None, &["create", "patch"]);
        if scope.is_some() && !options.role_binding.is_empty() {
            add(scope, "rbac.authorization.k8s.io", "rolebindings", Some(&options.role_binding), &["get", "patch"]);
        }
    }
    let own = Some(options.namespace.as_str());
    if options.leader_election {
        add(own, "coordination.k8s.io", "leases", None, &["create"]);
        add(own, "coordination.k8s.io", "leases", Some(&options.lease_name), &["get", "update"]);
    }
    add(own, "", "secrets", None, &["create"]);
    add(own, "", "secrets", Some(&options.signing_key_secret), &["get"]);
    add(own, "events.k8s.io", "events", None, &["create", "patch"]);
    for kind in ["validatingadmissionpolicies", "validatingadmissionpolicybindings"] {
        add(None, "admissionregistration.k8s.io", kind, Some(&options.deletion_policy_name), &["get"]);
    }
    rights
}

/// Asks the API server for each right, and returns those that are missing as rules, one a line.
///
/// # Errors
/// When the API server does not answer.
pub async fn missing(client: &Client, options: &Options) -> kube::Result<Vec<String>> {
    let api = Api::<SelfSubjectAccessReview>::all(client.clone());
    let answers: Vec<(Right, bool)> = stream::iter(needed(options))
        .map(|right| {
            let api = api.clone();
            async move {
                let review = api.create(&PostParams::default(), &question(&right)).await?;
                Ok::<_, kube::Error>((right, review.status.is_some_and(|status| status.allowed)))
            }
        })
        .buffered(PARALLEL)
        .try_collect()
        .await?;
    Ok(rules(answers.into_iter().filter(|(_, allowed)| !allowed).map(|(right, _)| right)))
}

fn question(right: &Right) -> SelfSubjectAccessReview {
    SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec {
            resource_attributes: Some(ResourceAttributes {
                group: Some(right.group.into()),
                resource: Some(right.resource.into()),
                subresource: right.subresource.map(Into::into),
                namespace: right.namespace.clone(),
                name: right.name.clone(),
                verb: Some(right.verb.into()),
                ..ResourceAttributes::default()
            }),
            ..SelfSubjectAccessReviewSpec::default()
        },
        ..SelfSubjectAccessReview::default()
    }
}

/// As one would write them into a Role.
fn rules(missing: impl Iterator<Item = Right>) -> Vec<String> {
    let mut verbs = BTreeMap::<Right, Vec<&str>>::new();
    for right in missing {
        let verb = right.verb;
        verbs.entry(Right { verb: "", ..right }).or_default().push(verb);
    }
    verbs
        .into_iter()
        .map(|(right, verbs)| {
            let place = right.namespace.map_or_else(|| "cluster-wide".to_owned(), |namespace| format!("in namespace {namespace}"));
            let resource = right.subresource.map_or_else(|| right.resource.to_owned(), |sub| format!("{}/{sub}", right.resource));
            let name = right.name.map_or_else(String::new, |name| format!(", resourceNames: [\"{name}\"]"));
            format!(
                "{{apiGroups: [\"{}\"], resources: [\"{resource}\"]{name}, verbs: [\"{}\"]}} {place}",
                right.group,
                verbs.join("\", \"")
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{Right, rules};

    #[test]
    fn what_is_missing_reads_like_a_rule() {
        let right = |verb, name: Option<&str>| Right {
            namespace: Some("shop".into()),
            group: "apps",
            resource: "deployments",
            subresource: None,
            name: name.map(Into::into),
            verb,
        };
        assert_eq!(
            rules([right("patch", None), right("get", None), right("get", Some("d"))].into_iter()),
            [
                r#"{apiGroups: ["apps"], resources: ["deployments"], verbs: ["patch", "get"]} in namespace shop"#,
                r#"{apiGroups: ["apps"], resources: ["deployments"], resourceNames: ["d"], verbs: ["get"]} in namespace shop"#,
            ]
        );
    }
}
