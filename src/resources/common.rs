//! Types that several kinds share: references, TLS, session parameters, failed prerequisites.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Database engine.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, JsonSchema)]
pub enum Engine {
    /// PostgreSQL 14 or newer.
    PostgreSQL,
}

/// How TLS is used: as libpq's sslmode.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, JsonSchema, Default)]
pub enum TlsMode {
    /// Never.
    Disable,
    /// When the server offers it; the certificate is not checked.
    #[default]
    Prefer,
    /// Always; the certificate is not checked.
    Require,
    /// Always; the certificate must come from `caRef`.
    VerifyCA,
    /// Always; the certificate must come from `caRef` and name the host.
    VerifyFull,
}

/// What happens to something outside the cluster when the resource is deleted.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, JsonSchema, Default)]
pub enum Reclaim {
    /// It is removed.
    #[default]
    Delete,
    /// It stays.
    Retain,
}

/// Name of an object in the same namespace.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LocalRef {
    /// Name of the object.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// One key of a Secret in the same namespace.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeyRef {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Key in the Secret.
    #[schemars(length(min = 1, max = 253))]
    #[serde(default = "ca_key")]
    pub key: String,
}
fn ca_key() -> String {
    "ca.crt".into()
}

/// TLS of the connection.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, KubeSchema, Default)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!(self.mode in ['VerifyCA','VerifyFull']) || has(self.caRef)").message("tls.caRef is required with mode VerifyCA or VerifyFull").field_path(".caRef"))]
pub struct Tls {
    /// Disable, Prefer, Require, VerifyCA or VerifyFull.
    #[serde(default)]
    pub mode: TlsMode,
    /// CA bundle to check the server's certificate with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_ref: Option<KeyRef>,
    /// Secret of type kubernetes.io/tls with the client's certificate and key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_certificate_ref: Option<LocalRef>,
}

/// Bounded text.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, JsonSchema)]
#[serde(transparent)]
pub struct ParamValue(#[schemars(length(max = 1024))] pub String);
/// One failed prerequisite.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Prerequisite {
    /// Stable name, for example WalLevel.
    #[schemars(length(max = 63))]
    pub name: String,
    /// What is wrong.
    #[schemars(length(max = 1024))]
    pub message: String,
    /// Statement or action that cures it.
    #[schemars(length(max = 1024))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cure: Option<String>,
}
