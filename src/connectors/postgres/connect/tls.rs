//! TLS as libpq's `sslmode` has it: what is checked of a server's certificate.

use crate::connectors::postgres::endpoint::{Endpoint, TlsMode};
use crate::engine::error::{Error, Result, reason};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use sha2::{Digest, Sha256, Sha384, Sha512};
use std::fmt::Display;
use std::sync::Arc;

/// The configuration for an endpoint; `None` when TLS is not wanted.
pub(super) fn client_config(endpoint: &Endpoint) -> Result<Option<Arc<ClientConfig>>> {
    let check = match endpoint.tls {
        TlsMode::Disable => return Ok(None),
        TlsMode::Prefer | TlsMode::Require => Check::Nothing,
        TlsMode::VerifyCA => Check::Chain(trusted(endpoint)?),
        TlsMode::VerifyFull => Check::ChainAndName(trusted(endpoint)?),
    };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = Arc::new(Verifier { check, provider: Arc::clone(&provider) });
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::bug(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let config = match &endpoint.client_certificate {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => {
            let chain = certificates(chain).map_err(|error| invalid("client certificate", &error))?;
            let key = PrivateKeyDer::from_pem_slice(key.0.as_bytes()).map_err(|error| invalid("client key", &error))?;
            builder.with_client_auth_cert(chain, key).map_err(|error| invalid("client certificate and key", &error))?
        }
    };
    Ok(Some(Arc::new(config)))
}

fn invalid(what: &str, error: &dyn Display) -> Error {
    Error::stop(reason::TLS_FAILED, format!("{what}: {error}"))
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, rustls::pki_types::pem::Error> {
    let found = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>()?;
    if found.is_empty() { Err(rustls::pki_types::pem::Error::NoItemsFound) } else { Ok(found) }
}

/// What a server's certificate may come from.
#[derive(Debug)]
struct Trusted {
    roots: RootCertStore,
    certificates: Vec<CertificateDer<'static>>,
}

fn trusted(endpoint: &Endpoint) -> Result<Trusted> {
    let missing = || Error::stop(reason::TLS_FAILED, "a CA bundle is required to verify the server's certificate");
    let pem = endpoint.ca.as_deref().ok_or_else(missing)?;
    let certificates = certificates(pem).map_err(|error| invalid("CA bundle", &error))?;
    let mut roots = RootCertStore::empty();
    for certificate in &certificates {
        roots.add(certificate.clone()).map_err(|error| invalid("CA bundle", &error))?;
    }
    Ok(Trusted { roots, certificates })
}

#[derive(Debug)]
enum Check {
    Nothing,
    Chain(Trusted),
    ChainAndName(Trusted),
}

/// In all modes the server must prove that it has the key of its certificate; the mode says what the certificate must be.
#[derive(Debug)]
struct Verifier {
    check: Check,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn check_chain(
        &self,
        trusted: &Trusted,
        end_entity: &CertificateDer<'_>,
        parsed: &ParsedCertificate<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let algorithms = self.provider.signature_verification_algorithms.all;
        match verify_server_cert_signed_by_trust_anchor(parsed, &trusted.roots, intermediates, now, algorithms) {
            // `openssl req -x509`, as in PostgreSQL's manual, makes a self-signed certificate that is marked as a CA, and
            // libpq takes it when it is given as root. webpki refuses such a leaf after it has found it to be in its time;
            // it is trusted here when it is, byte for byte, one of the given certificates.
            Err(error) if is_ca_as_leaf(&error) && trusted.certificates.iter().any(|known| known == end_entity) => Ok(()),
            checked => checked,
        }
    }
}

/// webpki's error has no constant in rustls.
fn is_ca_as_leaf(error: &rustls::Error) -> bool {
    matches!(error, rustls::Error::InvalidCertificate(cause) if format!("{cause:?}").contains("CaUsedAsEndEntity"))
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match &self.check {
            Check::Nothing => {}
            Check::Chain(trusted) => {
                let parsed = ParsedCertificate::try_from(end_entity)?;
                self.check_chain(trusted, end_entity, &parsed, intermediates, now)?;
            }
            Check::ChainAndName(trusted) => {
                let parsed = ParsedCertificate::try_from(end_entity)?;
                self.check_chain(trusted, end_entity, &parsed, intermediates, now)?;
                verify_server_name(&parsed, server_name)?;
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Channel binding `tls-server-end-point` (RFC 5929 §4.1): the hash of the certificate by the hash of its signature, with
/// SHA-256 in place of MD5 and SHA-1. `None` for a signature that names no single hash (Ed25519, RSASSA-PSS).
pub(super) fn end_point(certificate: &CertificateDer<'_>) -> Option<Vec<u8>> {
    let algorithm = signature_algorithm(certificate)?;
    // OIDs by RFC 8017 and RFC 5758, in DER.
    const RSA: &[u8] = &[0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01];
    const ECDSA_SHA1: &[u8] = &[0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x04, 0x01];
    const ECDSA_SHA2: &[u8] = &[0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x04, 0x03];
    let (family, last) = algorithm.split_at_checked(algorithm.len().checked_sub(1)?)?;
    match (family, last[0]) {
        (RSA, 4 | 5 | 11) | (ECDSA_SHA2, 2) => Some(Sha256::digest(certificate).to_vec()),
        (RSA, 12) | (ECDSA_SHA2, 3) => Some(Sha384::digest(certificate).to_vec()),
        (RSA, 13) | (ECDSA_SHA2, 4) => Some(Sha512::digest(certificate).to_vec()),
        _ if algorithm == ECDSA_SHA1 => Some(Sha256::digest(certificate).to_vec()),
        _ => None,
    }
}

/// The OID of a certificate's signature: `SEQUENCE { tbsCertificate, SEQUENCE { OID, … }, … }` (RFC 5280 §4.1).
fn signature_algorithm<'a>(certificate: &'a CertificateDer<'_>) -> Option<&'a [u8]> {
    const SEQUENCE: u8 = 0x30;
    const OID: u8 = 0x06;
    let (outer, _) = element(certificate, SEQUENCE)?;
    let (_, after_tbs) = element(outer, SEQUENCE)?;
    let (algorithm, _) = element(after_tbs, SEQUENCE)?;
    element(algorithm, OID).map(|(oid, _)| oid)
}

/// Splits one DER element of this tag off: its contents and what follows it.
fn element(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (&[found, short], rest) = der.split_first_chunk::<2>()?;
    if found != tag {
        return None;
    }
    if short < 0x80 {
        return rest.split_at_checked(usize::from(short));
    }
    let (length, rest) = rest.split_at_checked(usize::from(short & 0x7F))?;
    if length.len() > 4 {
        return None;
    }
    let length = length.iter().fold(0usize, |length, byte| length << 8 | usize::from(*byte));
    rest.split_at_checked(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_follows_the_signature() {
        // The least that the walk looks at: SEQUENCE { SEQUENCE {}, SEQUENCE { OID } }.
        let certificate = |oid: &[u8]| {
            let mut der = vec![0x30, (6 + oid.len()) as u8, 0x30, 0, 0x30, (2 + oid.len()) as u8, 0x06, oid.len() as u8];
            der.extend_from_slice(oid);
            CertificateDer::from(der)
        };
        let rsa = |last: u8| certificate(&[0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, last]);
        assert_eq!(end_point(&rsa(11)).unwrap(), Sha256::digest(rsa(11)).to_vec());
        assert_eq!(end_point(&rsa(13)).unwrap().len(), 64);
        assert_eq!(end_point(&rsa(10)), None, "RSASSA-PSS names its hash in parameters");
        assert_eq!(end_point(&certificate(&[0x2B, 0x65, 0x70])), None, "Ed25519");
        for garbage in [&[][..], &[0x30], &[0x30, 0x84, 0xFF, 0xFF, 0xFF, 0xFF], &[0x30, 0xFF, 1], &[0x30, 2, 0x30, 9]] {
            assert_eq!(end_point(&CertificateDer::from(garbage)), None);
        }
    }
}
