//! Tokens on the calls to a worker: short-lived EdDSA JWTs that hold for one worker and one request body.
//!
//! The audience is the Mirror's uid, so that a token for one worker opens no other. The body's digest is a claim: a pod
//! that has taken over a worker's former address and thereby received a token can't send the worker a document of its own.

use super::contract::Desired;
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, get_current_timestamp};
use k8s_openapi::ByteString;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::fmt::Write as _;

/// How long a token holds, in seconds.
pub const LIFETIME_SECONDS: u64 = 60;
/// How far the clocks of operator and worker may be apart, in seconds.
pub const LEEWAY_SECONDS: u64 = 30;
/// Length of an Ed25519 public key (RFC 8032), in bytes.
const PUBLIC_KEY_LENGTH: usize = 32;

/// Why a key or a token is refused. Says nothing about keys.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The private key can't be made or read.
    #[error("the signing key is not an Ed25519 key in PKCS#8 form")]
    SigningKey,
    /// A public key of the desired document is unusable.
    #[error("a public key is not 32 bytes in standard base64")]
    PublicKey,
    /// The token can't be made.
    #[error("the token can't be signed")]
    Sign,
    /// No known key made this token, or a claim does not hold.
    #[error("the token does not hold: {0}")]
    Refused(String),
}

/// The private key of the operator.
pub struct SigningKey {
    pkcs8: Vec<u8>,
    public_key: Vec<u8>,
    encoding: EncodingKey,
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningKey").field("public_key", &self.public_key_base64()).finish_non_exhaustive()
    }
}

impl SigningKey {
    /// Makes a new key.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn generate() -> Result<Self, TokenError> {
        let pair = Ed25519KeyPair::generate().map_err(|_| TokenError::SigningKey)?;
        let pkcs8 = pair.to_pkcs8().map_err(|_| TokenError::SigningKey)?;
        Self::from_pkcs8(pkcs8.as_ref())
    }

    /// Reads a key as [`Self::to_pkcs8`] wrote it (DER).
    ///
    /// # Errors
    /// The bytes are no such key.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, TokenError> {
        let pair = Ed25519KeyPair::from_pkcs8(der).map_err(|_| TokenError::SigningKey)?;
        Ok(Self { pkcs8: der.to_vec(), public_key: pair.public_key().as_ref().to_vec(), encoding: EncodingKey::from_ed_der(der) })
    }

    /// The key as PKCS#8 (DER), to be kept in a Secret.
    #[must_use]
    pub fn to_pkcs8(&self) -> &[u8] {
        &self.pkcs8
    }

    /// The public half as [`Desired::public_keys`] carries it: 32 bytes in standard base64.
    #[must_use]
    pub fn public_key_base64(&self) -> String {
        // The JSON form of Kubernetes' byte strings is standard base64.
        match serde_json::to_value(ByteString(self.public_key.clone())) {
            Ok(serde_json::Value::String(text)) => text,
            _ => String::new(),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    /// Uid of the Mirror.
    aud: String,
    iat: u64,
    nbf: u64,
    exp: u64,
    /// SHA-256 of the request's body in lower-case hexadecimal.
    body: String,
}

/// A token for one call to the worker of the Mirror with this uid. `body` is the request's body, empty for a GET.
///
/// # Errors
/// The crypto library refuses to sign.
pub fn sign(key: &SigningKey, audience_uid: &str, body: &[u8]) -> Result<String, TokenError> {
    let now = get_current_timestamp();
    let claims = Claims { aud: audience_uid.to_owned(), iat: now, nbf: now, exp: now + LIFETIME_SECONDS, body: digest(body) };
    jsonwebtoken::encode(&Header::new(Algorithm::EdDSA), &claims, &key.encoding).map_err(|_| TokenError::Sign)
}

/// A token that holds, for a body that is still to be read.
#[derive(Debug)]
pub struct Grant {
    body: String,
}

impl Grant {
    /// Whether the token was made for this body.
    ///
    /// # Errors
    /// [`TokenError::Refused`].
    pub fn check_body(&self, body: &[u8]) -> Result<(), TokenError> {
        if self.body == digest(body) { Ok(()) } else { Err(TokenError::Refused("it was made for another body".to_owned())) }
    }
}

/// Whether a token was made by one of the desired document's keys, for this worker and this moment. The body is looked
/// at afterwards, so that nobody without a key makes a worker read one.
///
/// # Errors
/// [`TokenError::Refused`] with the rule that the token breaks.
pub fn verify(desired: &Desired, token: &str) -> Result<Grant, TokenError> {
    let refused = |why: &str| Err(TokenError::Refused(why.to_owned()));
    let mut failure = TokenError::Refused("no public key is known".to_owned());
    for key in &desired.public_keys {
        match decode(key, &desired.mirror.uid, token) {
            Ok(claims) if claims.iat > get_current_timestamp() + LEEWAY_SECONDS => return refused("it was issued in the future"),
            Ok(claims) if claims.exp > claims.iat.saturating_add(LIFETIME_SECONDS) => return refused("it lives for too long"),
            Ok(claims) => return Ok(Grant { body: claims.body }),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// Reads a public key as [`SigningKey::public_key_base64`] writes it.
fn public_key(text: &str) -> Result<DecodingKey, TokenError> {
    let bytes: ByteString = serde_json::from_value(serde_json::Value::String(text.to_owned())).map_err(|_| TokenError::PublicKey)?;
    if bytes.0.len() == PUBLIC_KEY_LENGTH { Ok(DecodingKey::from_ed_der(&bytes.0)) } else { Err(TokenError::PublicKey) }
}

fn decode(key: &str, audience: &str, token: &str) -> Result<Claims, TokenError> {
    let mut rules = Validation::new(Algorithm::EdDSA);
    rules.set_required_spec_claims(&["exp", "nbf", "aud"]);
    rules.set_audience(&[audience]);
    rules.validate_nbf = true;
    rules.leeway = LEEWAY_SECONDS;
    jsonwebtoken::decode::<Claims>(token, &public_key(key)?, &rules)
        .map(|data| data.claims)
        .map_err(|error| TokenError::Refused(error.to_string()))
}

fn digest(body: &[u8]) -> String {
    Sha256::digest(body).iter().fold(String::with_capacity(64), |mut hex, byte| {
        // Writing to a string can't fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::contract::tests::desired;

    fn desired_with(keys: &[&SigningKey]) -> Desired {
        Desired { public_keys: keys.iter().map(|key| key.public_key_base64()).collect(), ..desired(1) }
    }

    fn claims() -> Claims {
        let now = get_current_timestamp();
        Claims { aud: desired(1).mirror.uid, iat: now, nbf: now, exp: now + LIFETIME_SECONDS, body: digest(b"") }
    }

    fn check(desired: &Desired, token: &str, body: &[u8]) -> Result<(), TokenError> {
        verify(desired, token)?.check_body(body)
    }

    fn encode(key: &SigningKey, claims: &Claims) -> String {
        jsonwebtoken::encode(&Header::new(Algorithm::EdDSA), claims, &key.encoding).unwrap()
    }

    #[test]
    fn a_key_survives_its_secret() {
        let key = SigningKey::generate().unwrap();
        let read = SigningKey::from_pkcs8(key.to_pkcs8()).unwrap();
        assert_eq!(read.public_key_base64(), key.public_key_base64());
        assert_eq!(key.public_key_base64().len(), 44);
        let token = sign(&read, &desired(1).mirror.uid, b"x").unwrap();
        check(&desired_with(&[&key]), &token, b"x").unwrap();
        assert!(SigningKey::from_pkcs8(b"nonsense").is_err());
        let private: String = key.to_pkcs8().iter().map(|byte| format!("{byte}, ")).collect();
        assert!(!format!("{key:?}").contains(&private));
    }

    #[test]
    fn either_key_signs_while_keys_are_rotated() {
        let (old, new, other) = (SigningKey::generate().unwrap(), SigningKey::generate().unwrap(), SigningKey::generate().unwrap());
        let desired = desired_with(&[&old, &new]);
        for key in [&old, &new] {
            check(&desired, &sign(key, &desired.mirror.uid, b"").unwrap(), b"").unwrap();
        }
        assert!(check(&desired, &sign(&other, &desired.mirror.uid, b"").unwrap(), b"").is_err());
        let none = Desired { public_keys: Vec::new(), ..desired };
        assert!(check(&none, &sign(&old, &none.mirror.uid, b"").unwrap(), b"").is_err());
    }

    #[test]
    fn a_token_holds_for_one_worker_one_body_and_a_minute() {
        let key = SigningKey::generate().unwrap();
        let desired = desired_with(&[&key]);
        let now = get_current_timestamp();
        let verdict = |change: &dyn Fn(&mut Claims)| {
            let mut claims = claims();
            change(&mut claims);
            check(&desired, &encode(&key, &claims), b"").map_err(|error| error.to_string())
        };
        verdict(&|_| {}).unwrap();
        verdict(&|claims| claims.iat = now + 20).unwrap();
        verdict(&|claims| claims.aud = "another".to_owned()).unwrap_err();
        verdict(&|claims| claims.body = digest(b"another")).unwrap_err();
        verdict(&|claims| (claims.iat, claims.nbf, claims.exp) = (now - 100, now - 100, now - 40)).unwrap_err();
        verdict(&|claims| (claims.iat, claims.nbf, claims.exp) = (now + 100, now + 100, now + 160)).unwrap_err();
        verdict(&|claims| (claims.iat, claims.nbf, claims.exp) = (now + 100, now, now + 160)).unwrap_err();
        verdict(&|claims| claims.exp = now + 3600).unwrap_err();
    }

    #[test]
    fn only_eddsa_is_taken() {
        let key = SigningKey::generate().unwrap();
        let desired = desired_with(&[&key]);
        // The classic confusion: an HMAC keyed with the public key.
        let hmac = EncodingKey::from_secret(&key.public_key);
        let token = jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims(), &hmac).unwrap();
        check(&desired, &token, b"").unwrap_err();
        let good = sign(&key, &desired.mirror.uid, b"").unwrap();
        let (_, rest) = good.split_once('.').unwrap();
        let payload = rest.split_once('.').unwrap().0;
        // {"alg":"none","typ":"JWT"}
        check(&desired, &format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{payload}."), b"").unwrap_err();
        for nonsense in ["", ".", "..", "a.b.c"] {
            check(&desired, nonsense, b"").unwrap_err();
        }
    }
}
