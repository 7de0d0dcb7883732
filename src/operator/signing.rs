//! The keys that sign calls to workers: Ed25519, in a Secret of the operator's own namespace, made at the first start and when it is
//! missing. It is read again and again, so that a key can be rotated without a restart: put a second one under [`NEXT`], so that workers
//! learn both public keys, then move it to [`CURRENT`]. See `docs/src/security.md`.

use super::backoff::spread;
use super::error::{ErrorClass, OperatorError, Result};
use crate::worker::token::{self, SigningKey, TokenError};
use futures::Stream;
use futures::stream::unfold;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PostParams;
use kube::{Api, Client};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Key of the Secret with the private key that signs, PKCS#8 (DER).
pub const CURRENT: &str = "ed25519.pk8";
/// Key of the Secret with the private key that will sign next; optional.
pub const NEXT: &str = "next.pk8";

/// Pace at which the Secret is read again.
pub const PACE: Duration = Duration::from_secs(60);

/// What signs calls to workers, and what workers check them with. Cheap to clone; clones share what [`follow`] finds.
#[derive(Clone, Debug)]
pub struct SigningKeys {
    keys: Arc<watch::Sender<Arc<Keys>>>,
}

#[derive(Debug)]
struct Keys {
    current: SigningKey,
    next: Option<SigningKey>,
}

impl Keys {
    fn public(&self) -> Vec<String> {
        std::iter::once(&self.current).chain(&self.next).map(SigningKey::public_key_base64).collect()
    }
}

impl SigningKeys {
    /// Keys that live in this process only.
    pub fn new(current: SigningKey, next: Option<SigningKey>) -> Self {
        Self { keys: Arc::new(watch::Sender::new(Arc::new(Keys { current, next }))) }
    }

    /// A token for one call with this body to the worker of the Mirror with this uid.
    ///
    /// # Errors
    /// The crypto library refuses to sign.
    pub fn sign(&self, audience_uid: &str, body: &[u8]) -> Result<String, TokenError> {
        let keys = Arc::clone(&self.keys.borrow());
        token::sign(&keys.current, audience_uid, body)
    }

    /// For the desired document: the current key, and the next while one is being rotated in.
    pub fn public_keys(&self) -> Vec<String> {
        self.keys.borrow().public()
    }

    /// One item per change, for `Controller::reconcile_all_on`: every worker has to learn the new public keys.
    pub fn changes(&self) -> impl Stream<Item = ()> + Send + 'static + use<> {
        unfold(self.keys.subscribe(), |mut keys| async move { keys.changed().await.ok().map(|()| ((), keys)) })
    }

    fn take(&self, newer: &Self) {
        let newer = Arc::clone(&newer.keys.borrow());
        let is_other = newer.public() != self.public_keys();
        if is_other {
            tracing::info!("the key that signs calls to workers has changed");
            self.keys.send_replace(newer);
        }
    }
}

/// Reads the keys; makes them when the Secret is missing. Of several replicas that start at once, one creates, the others read.
///
/// # Errors
/// As the API server answers; `SigningKeyUnusable` when the Secret holds no usable key.
pub async fn load_or_create(client: &Client, namespace: &str, name: &str) -> Result<SigningKeys> {
    let api = Api::<Secret>::namespaced(client.clone(), namespace);
    if let Some(secret) = api.get_opt(name).await? {
        return read(name, &secret);
    }
    match api.create(&PostParams::default(), &new_secret(name)?).await {
        Ok(created) => {
            tracing::info!(secret = name, "made the key that signs calls to workers");
            read(name, &created)
        }
        Err(kube::Error::Api(status)) if status.is_already_exists() => read(name, &api.get(name).await?),
        Err(error) => Err(error.into()),
    }
}

/// Keeps `keys` as the Secret has them, for ever. While it can't be read, the last ones go on.
pub async fn follow(client: Client, namespace: String, name: String, keys: SigningKeys, pace: Duration) {
    loop {
        tokio::time::sleep(spread(pace)).await;
        match load_or_create(&client, &namespace, &name).await {
            Ok(found) => keys.take(&found),
            Err(error) => tracing::warn!(%error, "the signing key can't be read; the last one goes on"),
        }
    }
}

fn new_secret(name: &str) -> Result<Secret> {
    let key = SigningKey::generate().map_err(|error| unusable(name, &error))?;
    Ok(Secret {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            labels: Some([("app.kubernetes.io/managed-by".to_owned(), "sluice".to_owned())].into()),
            ..ObjectMeta::default()
        },
        type_: Some("Opaque".into()),
        data: Some([(CURRENT.to_owned(), ByteString(key.to_pkcs8().to_vec()))].into()),
        ..Secret::default()
    })
}

fn read(name: &str, secret: &Secret) -> Result<SigningKeys> {
    let key = |key: &str| {
        let der = secret.data.as_ref().and_then(|data| data.get(key));
        der.map(|der| SigningKey::from_pkcs8(&der.0)).transpose().map_err(|error| unusable(name, &error))
    };
    let current = key(CURRENT)?.ok_or_else(|| unusable(name, &format!("key {CURRENT} is missing")))?;
    Ok(SigningKeys::new(current, key(NEXT)?))
}

fn unusable(name: &str, why: &dyn std::fmt::Display) -> OperatorError {
    OperatorError::new(ErrorClass::Invalid, "SigningKeyUnusable", format!("Secret {name}: {why}; delete it to have a new key made"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_without_a_usable_key_is_refused_with_the_cure() {
        let error = read("keys", &Secret::default()).expect_err("no key");
        assert!(error.message.contains("Secret keys") && error.message.contains("delete it"), "{error}");
        let nonsense = Secret { data: Some([(CURRENT.to_owned(), ByteString(b"x".to_vec()))].into()), ..Secret::default() };
        assert_eq!(read("keys", &nonsense).expect_err("nonsense").reason, "SigningKeyUnusable");
    }

    #[test]
    fn both_public_keys_are_told_while_rotating() {
        let mut secret = new_secret("keys").expect("a secret");
        assert_eq!(read("keys", &secret).expect("keys").public_keys().len(), 1);
        let next = SigningKey::generate().expect("a key");
        secret.data.get_or_insert_default().insert(NEXT.to_owned(), ByteString(next.to_pkcs8().to_vec()));
        let keys = read("keys", &secret).expect("keys").public_keys();
        assert_eq!(keys.get(1), Some(&next.public_key_base64()));
    }
}
