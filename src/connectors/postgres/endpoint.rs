//! How a server is reached.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// How TLS is used: as libpq's `sslmode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsMode {
    /// Never.
    Disable,
    /// When the server offers it; the certificate is not checked.
    #[default]
    Prefer,
    /// Always; the certificate is not checked.
    Require,
    /// Always; the certificate must come from the given CA.
    VerifyCA,
    /// Always; the certificate must come from the given CA and name the host.
    VerifyFull,
}

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Everything that a connection needs. Certificates and keys are PEM texts, not paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Host name or address.
    pub host: String,
    /// Domain that a host name without a dot is looked up in first. A worker runs beside the Service that it names; whoever
    /// connects from another namespace must look there too. The certificate must name `host` all the same.
    pub domain: Option<String>,
    /// TCP port.
    pub port: u16,
    /// Database.
    pub database: String,
    /// User name.
    pub username: String,
    /// Password.
    pub password: Secret,
    /// TLS.
    pub tls: TlsMode,
    /// CA bundle (PEM); required by the Verify modes.
    pub ca: Option<String>,
    /// Client certificate and key (PEM).
    pub client_certificate: Option<(String, Secret)>,
    /// Session parameters from the user. They never override those that Sluice fixes.
    pub parameters: BTreeMap<String, String>,
    /// Bound for each connection attempt, TLS and login included.
    pub connect_timeout: Duration,
}
