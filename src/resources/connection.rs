//! The kinds `Source` and `Target`: how a database is reached, and what was found there.

use super::common::{Engine, LocalRef, ParamValue, Prerequisite, Tls};
use super::conditions::{is_true, kind};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// What Source and Target have in common: how a database is reached.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionSpec<'a> {
    /// Database engine.
    pub engine: Engine,
    /// Host name or address.
    pub host: &'a str,
    /// TCP port.
    pub port: i32,
    /// Database name.
    pub database: &'a str,
    /// Secret with the keys `username` and `password`.
    pub credentials_ref: &'a LocalRef,
    /// TLS of the connection.
    pub tls: &'a Tls,
    /// Session parameters sent at connect.
    pub parameters: &'a BTreeMap<String, ParamValue>,
    /// Seconds to wait for a connection.
    pub connect_timeout_seconds: i32,
    /// Refuse deletion.
    pub deletion_protection: bool,
}

impl<'a> ConnectionSpec<'a> {
    /// Names of the Secrets that the spec refers to, each once.
    pub fn secret_names(&self) -> BTreeSet<&'a str> {
        let tls = self.tls;
        std::iter::once(self.credentials_ref.name.as_str())
            .chain(tls.ca_ref.iter().map(|key| key.name.as_str()))
            .chain(tls.client_certificate_ref.iter().map(|secret| secret.name.as_str()))
            .collect()
    }
}

/// A Source or a Target.
pub trait Connection {
    /// How its database is reached.
    fn connection(&self) -> ConnectionSpec<'_>;
    /// What was observed of it.
    fn connection_status(&self) -> Option<&ConnectionStatus>;
}

macro_rules! connection_kind {
    ($kind_type:ident, $kind:literal, $spec:ident, $plural:literal, $short:literal, $doc:literal) => {
        #[doc = $doc]
        #[derive(CustomResource, Serialize, Deserialize, Clone, Debug, PartialEq, KubeSchema)]
        #[serde(rename_all = "camelCase")]
        #[kube(group = "sluice.dev", version = "v1alpha1", kind = $kind, namespaced, cel, status = "ConnectionStatus",
            plural = $plural, shortname = $short, category = "cdc", doc = $doc,
            printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
            printcolumn(name = "Status", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
            printcolumn(name = "Engine", type_ = "string", json_path = ".spec.engine"),
            printcolumn(name = "Host", type_ = "string", json_path = ".spec.host"),
            printcolumn(name = "Database", type_ = "string", json_path = ".spec.database"),
            printcolumn(name = "Version", type_ = "string", json_path = ".status.serverVersion", priority = 1),
            printcolumn(name = "Message", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].message", priority = 1),
            printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
            selectable = ".spec.host",
            validation = Rule::new("size(self.metadata.name) <= 63 && !self.metadata.name.contains('.')").message("metadata.name must be a DNS label of at most 63 characters"),
        )]
        #[x_kube(validation = Rule::new("self.engine == oldSelf.engine").message("engine cannot be changed").field_path(".engine"))]
        pub struct $spec {
            /// Database engine.
            pub engine: Engine,
            /// Host name or address.
            #[schemars(length(min = 1, max = 253))]
            pub host: String,
            /// TCP port.
            #[schemars(range(min = 1, max = 65535))]
            #[serde(default = "pg_port")]
            pub port: i32,
            /// Database name.
            #[schemars(length(min = 1, max = 63))]
            pub database: String,
            /// Secret with the keys `username` and `password`.
            pub credentials_ref: LocalRef,
            /// TLS of the connection.
            #[serde(default)]
            pub tls: Tls,
            /// Session parameters sent at connect.
            #[schemars(extend("maxProperties" = 32))]
            #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
            pub parameters: BTreeMap<String, ParamValue>,
            /// Seconds to wait for a connection.
            #[schemars(range(min = 1, max = 300))]
            #[serde(default = "ten")]
            pub connect_timeout_seconds: i32,
            /// Refuse deletion (enforced by a ValidatingAdmissionPolicy).
            #[serde(default, skip_serializing_if = "std::ops::Not::not")]
            pub deletion_protection: bool,
        }

        impl Connection for $kind_type {
            fn connection(&self) -> ConnectionSpec<'_> {
                ConnectionSpec {
                    engine: self.spec.engine,
                    host: &self.spec.host,
                    port: self.spec.port,
                    database: &self.spec.database,
                    credentials_ref: &self.spec.credentials_ref,
                    tls: &self.spec.tls,
                    parameters: &self.spec.parameters,
                    connect_timeout_seconds: self.spec.connect_timeout_seconds,
                    deletion_protection: self.spec.deletion_protection,
                }
            }

            fn connection_status(&self) -> Option<&ConnectionStatus> {
                self.status.as_ref()
            }
        }
    };
}
fn pg_port() -> i32 {
    5432
}
fn ten() -> i32 {
    10
}

connection_kind!(Source, "Source", SourceSpec, "sources", "src", "A database to read changes from.");
connection_kind!(Target, "Target", TargetSpec, "targets", "tgt", "A database to write to.");

/// A slot that was made for a Mirror and belongs to none.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OrphanedSlot {
    /// Name of the slot.
    #[schemars(length(max = 63))]
    pub name: String,
    /// Somebody reads from it: a Mirror of another cluster perhaps.
    pub active: bool,
    /// Bytes of log that the source keeps for it; absent when the slot is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retained_bytes: Option<i64>,
    /// Statement that drops it, when nobody needs it.
    #[schemars(length(max = 1024))]
    pub cure: String,
}

/// Observed state of a connection.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, KubeSchema, Default)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionStatus {
    /// Generation of the spec that this status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready, Reconciling, Stalled, ConnectionVerified, PrerequisitesMet, DeletionProtected.
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    #[schemars(length(max = 16))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// Version the server reports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_version: Option<String>,
    /// System identifier of the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_identifier: Option<String>,
    /// Slots on the source that were made for Mirrors and belong to none that this operator serves: those that keep most first.
    #[schemars(length(max = 32))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub orphaned_slots: Vec<OrphanedSlot>,
    /// Prerequisites that fail.
    #[schemars(length(max = 64))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed_prerequisites: Vec<Prerequisite>,
    /// Secrets that are kept by a finalizer while a Mirror uses this resource.
    #[schemars(length(max = 16), inner(length(max = 253)), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub protected_secrets: Vec<String>,
}

impl ConnectionStatus {
    /// Whether the database was reached and inspected, and what was found is of this `generation` of the spec.
    pub fn is_ready(&self, generation: Option<i64>) -> bool {
        self.observed_generation == generation && is_true(&self.conditions, kind::READY)
    }
}
