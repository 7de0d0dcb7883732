//! The operator's own way to databases: endpoints from specs and Secrets, and what it does there by itself.
//!
//! The operator looks at a database and cleans up in it; it never carries data. Which connector does so hides behind
//! [`Databases`].

use super::apply;
use super::context::Context;
use super::error::{ErrorClass, OperatorError, Result};
use crate::connectors::postgres::connect::Side;
use crate::connectors::postgres::endpoint::{Endpoint, Secret as Hidden, TlsMode};
use crate::connectors::postgres::source::PostgresSource;
use crate::connectors::postgres::{cleanup, forget, inspect};
use crate::engine;
use crate::engine::retention::Budget;
use crate::engine::roles::Source as _;
use crate::resources::common;
use crate::resources::conditions::reason;
use crate::resources::{ConnectionSpec, KeyRef, LocalRef};
use crate::worker::contract::MirrorId;
use crate::worker::credentials::without_newline;
use futures::FutureExt as _;
use futures::future::{BoxFuture, try_join_all};
use k8s_openapi::api::core::v1::Secret;
use std::collections::BTreeMap;
use std::time::Duration;

/// Key of a user name.
pub const USERNAME: &str = "username";
/// Key of a password.
pub const PASSWORD: &str = "password";
/// Key of a client certificate, as in Secrets of type `kubernetes.io/tls`.
pub const CLIENT_CERTIFICATE: &str = "tls.crt";
/// Key of its private key.
pub const CLIENT_KEY: &str = "tls.key";

/// What the operator does in databases. Every call is bounded in time by the endpoint's connect timeout and the statement
/// timeouts of the connector; safe to repeat.
pub trait Databases: Send + Sync + 'static {
    /// Signs in and looks whether a Mirror could start from or to this database.
    fn inspect<'a>(&'a self, endpoint: &'a Endpoint, side: Side) -> BoxFuture<'a, engine::error::Result<Inspection>>;

    /// Drops a Mirror's slot and publication on its source.
    fn clean_up<'a>(&'a self, endpoint: &'a Endpoint, leftovers: &'a Leftovers) -> BoxFuture<'a, engine::error::Result<CleanedUp>>;

    /// Drops a Mirror's slot when the source keeps more for it than its budget allows. Returns whether it did.
    fn keep_budget<'a>(&'a self, source: &'a Endpoint, slot: &'a WatchedSlot) -> BoxFuture<'a, engine::error::Result<bool>>;

    /// Removes the checkpoint of a Mirror whose slot is gone from its target, so that another Mirror may write the same tables.
    fn forget_stream<'a>(&'a self, target: &'a Endpoint, slot: &'a str, mirror: &'a MirrorId) -> BoxFuture<'a, engine::error::Result<()>>;
}

/// What was found on a server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inspection {
    /// Version for people, for example `17.2`.
    pub server_version: String,
    /// PostgreSQL's system identifier: tells one server from another whatever its name.
    pub system_identifier: String,
    /// Prerequisites that fail.
    pub failed: Vec<FailedPrerequisite>,
    /// Of a source: slots that were made for Mirrors, and once compared with the Mirrors that there are, those of none. `None`: not known.
    pub slots: Option<Vec<MirrorSlot>>,
}

/// A slot that was made for a Mirror.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorSlot {
    /// Name.
    pub name: String,
    /// Somebody reads from it now.
    pub active: bool,
    /// Bytes of log that are kept for it.
    pub retained: Option<u64>,
    /// The statement that drops it.
    pub cure: String,
}

/// A prerequisite that fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedPrerequisite {
    /// Reason of the engine, for example `WalLevelNotLogical`.
    pub name: String,
    /// What is wrong.
    pub message: String,
    /// Statement or action that cures it.
    pub cure: Option<String>,
    /// It stops nothing.
    pub warning: bool,
}

/// A slot with its budget.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchedSlot {
    /// Its name.
    pub slot: String,
    /// Its publication, whose comment says that the slot was dropped on purpose.
    pub publication: String,
    /// How much may be kept for it, and what is done then.
    pub budget: Budget,
}

/// What a Mirror leaves on its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftovers {
    /// Name of the slot, named in any case: a publication goes only when it was made for this slot.
    pub slot: String,
    /// Drop the slot.
    pub drop_slot: bool,
    /// Drop this publication, unless the user has made it.
    pub publication: Option<String>,
}

/// What was there and is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CleanedUp {
    /// The slot.
    pub slot_dropped: bool,
    /// The publication.
    pub publication_dropped: bool,
}

/// PostgreSQL's connector: the one place where the operator calls it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Postgres;

impl Databases for Postgres {
    fn inspect<'a>(&'a self, endpoint: &'a Endpoint, side: Side) -> BoxFuture<'a, engine::error::Result<Inspection>> {
        async move {
            let found = inspect::inspect(endpoint, side, inspect::Checks::default()).await?;
            let failed = found.failed.into_iter().map(|failed| FailedPrerequisite {
                name: failed.name.to_owned(),
                message: failed.message,
                cure: failed.cure,
                warning: failed.warning,
            });
            let slots = found.own_slots.into_iter().map(|slot| MirrorSlot {
                cure: cleanup::drop_statement(&slot.name),
                name: slot.name,
                active: slot.active,
                retained: slot.retained,
            });
            Ok(Inspection {
                failed: failed.collect(),
                server_version: found.server_version,
                system_identifier: found.system_identifier,
                slots: Some(slots.collect()),
            })
        }
        .boxed()
    }

    fn clean_up<'a>(&'a self, endpoint: &'a Endpoint, leftovers: &'a Leftovers) -> BoxFuture<'a, engine::error::Result<CleanedUp>> {
        async move {
            let Leftovers { slot, drop_slot, publication } = leftovers;
            let doomed = cleanup::Doomed { slot, drop_slot: *drop_slot, publication: publication.as_deref() };
            let cleanup::CleanUp { slot_dropped, publication_dropped } = cleanup::drop_slot_and_publication(endpoint, doomed).await?;
            Ok(CleanedUp { slot_dropped, publication_dropped })
        }
        .boxed()
    }

    fn keep_budget<'a>(&'a self, source: &'a Endpoint, slot: &'a WatchedSlot) -> BoxFuture<'a, engine::error::Result<bool>> {
        async move {
            let source = PostgresSource::new(source.clone(), &slot.slot, &slot.publication);
            let seen = source.retention().await?;
            let is_too_much = seen.is_some_and(|seen| slot.budget.gives_up(&seen));
            if is_too_much {
                source.give_up().await?;
            }
            Ok(is_too_much)
        }
        .boxed()
    }

    fn forget_stream<'a>(&'a self, target: &'a Endpoint, slot: &'a str, mirror: &'a MirrorId) -> BoxFuture<'a, engine::error::Result<()>> {
        forget::forget_stream(target, slot, &mirror.namespace, &mirror.name).boxed()
    }
}

/// Reads the Secrets that `spec` names in `namespace`, live and in parallel, and builds the way to the database.
///
/// # Errors
/// Class `Missing` with reason `SecretNotFound` or `SecretKeyMissing`, naming Secret and key; class `Invalid` when the spec can't
/// be right; otherwise as the API server answers. No value of a Secret is in a message.
pub async fn resolve(ctx: &Context, namespace: &str, spec: &ConnectionSpec<'_>) -> Result<Endpoint> {
    let names = spec.secret_names();
    let reads = names.iter().map(|name| apply::get::<Secret>(ctx, namespace, name));
    let found = try_join_all(reads).await?;
    let secrets = names.into_iter().zip(found).filter_map(|(name, secret)| Some((name, secret?)));
    endpoint(namespace, spec, &secrets.collect())
}

/// The way to the database. `secrets` by name; a missing one was not found.
///
/// # Errors
/// As [`resolve`].
pub fn endpoint(namespace: &str, spec: &ConnectionSpec<'_>, secrets: &BTreeMap<&str, Secret>) -> Result<Endpoint> {
    let text = |name: &str, key: &str| text(secrets, name, key);
    let login = |key| text(&spec.credentials_ref.name, key).map(|text| without_newline(&text).to_owned());
    let ca = |KeyRef { name, key }: &KeyRef| text(name, key);
    let client = |LocalRef { name }: &LocalRef| -> Result<_> { Ok((text(name, CLIENT_CERTIFICATE)?, Hidden(text(name, CLIENT_KEY)?))) };
    let port = u16::try_from(spec.port).map_err(|_| invalid(format!("spec.port {} is no TCP port", spec.port)))?;
    let seconds = u64::try_from(spec.connect_timeout_seconds).unwrap_or_default().max(1);
    Ok(Endpoint {
        host: spec.host.to_owned(),
        domain: Some(format!("{namespace}.svc")),
        port,
        database: spec.database.to_owned(),
        username: login(USERNAME)?,
        password: Hidden(login(PASSWORD)?),
        tls: tls_mode(spec.tls.mode),
        ca: spec.tls.ca_ref.as_ref().map(ca).transpose()?,
        client_certificate: spec.tls.client_certificate_ref.as_ref().map(client).transpose()?,
        parameters: spec.parameters.iter().map(|(name, value)| (name.clone(), value.0.clone())).collect(),
        connect_timeout: Duration::from_secs(seconds),
    })
}

/// The text under `key` in the Secret `name`.
fn text(secrets: &BTreeMap<&str, Secret>, name: &str, key: &str) -> Result<String> {
    let secret = secrets
        .get(name)
        .ok_or_else(|| OperatorError::new(ErrorClass::Missing, reason::SECRET_NOT_FOUND, format!("Secret {name} does not exist")))?;
    let unusable = |why: &str| OperatorError::new(ErrorClass::Missing, reason::SECRET_KEY_MISSING, format!("Secret {name} {why} {key}"));
    let value = secret.data.as_ref().and_then(|data| data.get(key)).ok_or_else(|| unusable("has no key"))?;
    String::from_utf8(value.0.clone()).map_err(|_| unusable("holds no UTF-8 text under the key"))
}

fn tls_mode(mode: common::TlsMode) -> TlsMode {
    match mode {
        common::TlsMode::Disable => TlsMode::Disable,
        common::TlsMode::Prefer => TlsMode::Prefer,
        common::TlsMode::Require => TlsMode::Require,
        common::TlsMode::VerifyCA => TlsMode::VerifyCA,
        common::TlsMode::VerifyFull => TlsMode::VerifyFull,
    }
}

fn invalid(message: String) -> OperatorError {
    OperatorError::new(ErrorClass::Invalid, reason::INVALID_SPEC, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::{Connection as _, Source};
    use k8s_openapi::ByteString;
    use serde_json::json;

    fn source() -> Source {
        serde_json::from_value(json!({
            "apiVersion": "sluice.dev/v1alpha1", "kind": "Source", "metadata": {"name": "shop", "namespace": "n"},
            "spec": {
                "engine": "PostgreSQL", "host": "db", "database": "shop", "credentialsRef": {"name": "login"},
                "tls": {"mode": "VerifyFull", "caRef": {"name": "ca"}, "clientCertificateRef": {"name": "client"}},
                "parameters": {"application_name": "x"}, "connectTimeoutSeconds": 7,
            },
        }))
        .expect("a Source")
    }

    fn secrets() -> BTreeMap<&'static str, Secret> {
        let secret = |pairs: &[(&str, &[u8])]| Secret {
            data: Some(pairs.iter().map(|(key, value)| ((*key).to_owned(), ByteString(value.to_vec()))).collect()),
            ..Secret::default()
        };
        [
            ("login", secret(&[("username", b"u"), ("password", b"hush\n")])),
            ("ca", secret(&[("ca.crt", b"CA\n")])),
            ("client", secret(&[("tls.crt", b"CERT"), ("tls.key", b"KEY")])),
        ]
        .into()
    }

    #[test]
    fn an_endpoint_is_spec_and_secrets() {
        let endpoint = endpoint("n", &source().connection(), &secrets()).expect("an endpoint");
        assert_eq!((endpoint.host.as_str(), endpoint.port, endpoint.database.as_str()), ("db", 5432, "shop"));
        assert_eq!((endpoint.username.as_str(), endpoint.password.0.as_str()), ("u", "hush"));
        assert_eq!((endpoint.tls, endpoint.ca.as_deref()), (TlsMode::VerifyFull, Some("CA\n")));
        assert_eq!(endpoint.client_certificate, Some(("CERT".to_owned(), Hidden("KEY".to_owned()))));
        assert_eq!(endpoint.connect_timeout, Duration::from_secs(7));
        assert_eq!(endpoint.parameters["application_name"], "x");
        assert_eq!(source().connection().secret_names().into_iter().collect::<Vec<_>>(), ["ca", "client", "login"]);
    }

    #[test]
    fn what_is_missing_is_named() {
        for (secret, key, reason, message) in [
            ("login", None, "SecretNotFound", "Secret login does not exist"),
            ("ca", None, "SecretNotFound", "Secret ca does not exist"),
            ("login", Some("password"), "SecretKeyMissing", "Secret login has no key password"),
            ("client", Some("tls.key"), "SecretKeyMissing", "Secret client has no key tls.key"),
            ("ca", Some("ca.crt"), "SecretKeyMissing", "Secret ca has no key ca.crt"),
        ] {
            let mut secrets = secrets();
            match key {
                None => drop(secrets.remove(secret)),
                Some(key) => {
                    let data = secrets.get_mut(secret).and_then(|secret| secret.data.as_mut());
                    data.expect("data").remove(key).expect(key);
                }
            }
            let error = endpoint("n", &source().connection(), &secrets).expect_err(message);
            assert_eq!((error.class, error.reason, error.message.as_str()), (ErrorClass::Missing, reason, message));
        }
    }

    #[test]
    fn no_value_of_a_secret_is_shown() {
        let mut secrets = secrets();
        let data = secrets.get_mut("login").and_then(|secret| secret.data.as_mut()).expect("data");
        data.insert("password".into(), ByteString(b"hush\xff".to_vec()));
        let error = endpoint("n", &source().connection(), &secrets).expect_err("no text");
        assert_eq!(error.reason, "SecretKeyMissing");
        assert!(!format!("{error:?}").contains("hush"));
        let endpoint = endpoint("n", &source().connection(), &self::secrets()).expect("an endpoint");
        assert!(!format!("{endpoint:?}").contains("hush"));
    }
}
