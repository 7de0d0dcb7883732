//! The NetworkPolicy of a namespace with workers. It belongs to no single Mirror, and goes with its namespace.

use crate::resources::names::{COMPONENT_LABEL, MANAGED_BY, MANAGED_BY_LABEL, WORKER};
use crate::worker::contract::PORT;
use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// Its name.
pub const POLICY_NAME: &str = "sluice-workers";
/// Label of every program.
const NAME_LABEL: &str = "app.kubernetes.io/name";

/// Lets the operator and Prometheus, wherever they run, reach the workers' port, and workers everything.
pub fn network_policy(namespace: &str) -> NetworkPolicy {
    let workers = select(&[(MANAGED_BY_LABEL, MANAGED_BY), (COMPONENT_LABEL, WORKER)]);
    NetworkPolicy {
        metadata: ObjectMeta {
            name: Some(POLICY_NAME.to_owned()),
            namespace: Some(namespace.to_owned()),
            labels: select(&[(NAME_LABEL, "sluice"), (MANAGED_BY_LABEL, MANAGED_BY)]).match_labels,
            ..ObjectMeta::default()
        },
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(workers),
            policy_types: Some(vec!["Ingress".to_owned(), "Egress".to_owned()]),
            ingress: Some(vec![NetworkPolicyIngressRule {
                from: Some(vec![
                    anywhere(&[(NAME_LABEL, "sluice"), (COMPONENT_LABEL, "operator")]),
                    anywhere(&[(NAME_LABEL, "prometheus")]),
                ]),
                ports: Some(vec![NetworkPolicyPort {
                    port: Some(IntOrString::Int(i32::from(PORT))),
                    protocol: Some("TCP".to_owned()),
                    ..NetworkPolicyPort::default()
                }]),
            }]),
            egress: Some(vec![NetworkPolicyEgressRule::default()]),
        }),
    }
}

fn anywhere(labels: &[(&str, &str)]) -> NetworkPolicyPeer {
    NetworkPolicyPeer {
        namespace_selector: Some(LabelSelector::default()),
        pod_selector: Some(select(labels)),
        ..NetworkPolicyPeer::default()
    }
}

fn select(labels: &[(&str, &str)]) -> LabelSelector {
    let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    LabelSelector { match_labels: Some(labels), ..LabelSelector::default() }
}
