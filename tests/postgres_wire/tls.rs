//! All TLS modes, with certificates made by openssl.

use crate::follow::{Follower, LIMITS, mapped, open, publish};
use crate::support::Postgres;
use sluice::connectors::postgres::connect::{Side, connect};
use sluice::connectors::postgres::endpoint::Secret;
use sluice::connectors::postgres::replication::connect_replication;
use sluice::connectors::postgres::{Endpoint, TlsMode};
use sluice::engine::error::{Class, reason};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A CA with a certificate for `localhost` and one for the user `postgres`, a self-signed one, and a CA of somebody else.
struct Certificates(tempfile::TempDir);

impl Certificates {
    fn make() -> Self {
        let folder = tempfile::Builder::new().prefix("sluice-tls").tempdir().expect("a temporary folder");
        let this = Self(folder);
        this.openssl("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout ca.key -out ca.crt -days 2 -subj /CN=ca");
        this.openssl(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout other.key -out other.crt -days 2 -subj /CN=other",
        );
        this.openssl("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -sha384 -nodes -keyout self.key -out self.crt -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost");
        for (name, subject, extension) in
            [("server", "/CN=x", "subjectAltName=DNS:localhost"), ("client", "/CN=postgres", "extendedKeyUsage=clientAuth")]
        {
            std::fs::write(this.path(&format!("{name}.ext")), extension).expect("extensions");
            this.openssl(&format!("req -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.csr -subj {subject}"));
            this.openssl(&format!(
                "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -sha256 -days 2 -extfile {name}.ext -out {name}.crt"
            ));
        }
        this
    }

    fn openssl(&self, arguments: &str) {
        let output = Command::new("openssl").args(arguments.split(' ')).current_dir(self.0.path()).output().expect("openssl runs");
        assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).expect("a certificate")
    }

    /// Puts what a server needs into its data folder, owned by whoever owns that.
    fn install(&self, data: &Path) {
        for name in ["ca.crt", "server.crt", "server.key", "self.crt", "self.key"] {
            let place = data.join(name);
            std::fs::copy(self.path(name), &place).expect("a copy");
            let output = Command::new("chown").arg("--reference").arg(data).arg(&place).output().expect("chown runs");
            assert!(output.status.success(), "{output:?}");
            let output = Command::new("chmod").arg("600").arg(&place).output().expect("chmod runs");
            assert!(output.status.success(), "{output:?}");
        }
    }
}

pub async fn modes(major: u32) {
    let certificates = Certificates::make();
    let server = Postgres::start(major);
    certificates.install(&server.data());
    let admin = server.connect("postgres").await;
    reconfigure(&admin, "server").await;
    let at = |host: &str, tls: TlsMode, ca: Option<&str>| {
        let mut endpoint = server.endpoint("postgres");
        endpoint.host = host.into();
        endpoint.tls = tls;
        endpoint.ca = ca.map(|name| certificates.text(name));
        endpoint
    };
    for (endpoint, encrypted) in [
        (at("127.0.0.1", TlsMode::Disable, None), false),
        (at("127.0.0.1", TlsMode::Prefer, None), true),
        (at("127.0.0.1", TlsMode::Require, None), true),
        (at("127.0.0.1", TlsMode::VerifyCA, Some("ca.crt")), true),
        (at("localhost", TlsMode::VerifyFull, Some("ca.crt")), true),
    ] {
        assert_eq!(is_encrypted(&endpoint).await, encrypted, "{:?}", endpoint.tls);
    }
    for endpoint in [
        at("127.0.0.1", TlsMode::VerifyFull, Some("ca.crt")),
        at("localhost", TlsMode::VerifyFull, Some("other.crt")),
        at("127.0.0.1", TlsMode::VerifyCA, Some("other.crt")),
        at("127.0.0.1", TlsMode::VerifyCA, Some("server.key")),
        at("127.0.0.1", TlsMode::VerifyCA, None),
    ] {
        assert_refused(&endpoint).await;
    }
    client_certificate(&server, &admin, &certificates, &at("localhost", TlsMode::VerifyFull, Some("ca.crt"))).await;
    stream_over_tls(&server, &certificates).await;

    // A self-signed certificate that is given as CA, as libpq takes it.
    reconfigure(&admin, "self").await;
    assert!(is_encrypted(&at("127.0.0.1", TlsMode::VerifyCA, Some("self.crt"))).await);
    assert!(is_encrypted(&at("localhost", TlsMode::VerifyFull, Some("self.crt"))).await);
    assert_refused(&at("127.0.0.1", TlsMode::VerifyFull, Some("self.crt"))).await;
    assert_refused(&at("127.0.0.1", TlsMode::VerifyCA, Some("ca.crt"))).await;
}

/// Makes the server use this certificate, and waits until it does.
async fn reconfigure(admin: &tokio_postgres::Client, name: &str) {
    for (setting, value) in [
        ("ssl", "on".to_owned()),
        ("ssl_ca_file", "ca.crt".to_owned()),
        ("ssl_cert_file", format!("{name}.crt")),
        ("ssl_key_file", format!("{name}.key")),
    ] {
        admin.batch_execute(&format!("ALTER SYSTEM SET {setting} = '{value}'")).await.unwrap();
    }
    reload(admin).await;
}

async fn reload(admin: &tokio_postgres::Client) {
    let loaded = "SELECT pg_conf_load_time()";
    let before: std::time::SystemTime = admin.query_one(loaded, &[]).await.unwrap().get(0);
    admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    crate::support::eventually(10, "the configuration is loaded", || async {
        admin.query_one(loaded, &[]).await.unwrap().get::<_, std::time::SystemTime>(0) > before
    })
    .await;
}

async fn is_encrypted(endpoint: &Endpoint) -> bool {
    let sql = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    let session = connect(endpoint, Side::Target, "").await.unwrap_or_else(|error| panic!("{error} for {endpoint:?}"));
    let encrypted = session.query_one(sql, &[]).await.unwrap().get(0);
    let mut replication = connect_replication(endpoint, "").await.unwrap();
    let shown = if encrypted { "t" } else { "f" };
    assert_eq!(replication.simple_query(sql).await.unwrap(), [[Some(shown.to_owned())]]);
    session.cancel().await.unwrap();
    encrypted
}

async fn assert_refused(endpoint: &Endpoint) {
    let sql = connect(endpoint, Side::Target, "").await.err().expect("a failure");
    let replication = connect_replication(endpoint, "").await.err().expect("a failure");
    for error in [sql, replication] {
        assert_eq!((error.class, error.reason), (Class::Stop, reason::TLS_FAILED), "{error}");
    }
}

async fn client_certificate(server: &Postgres, admin: &tokio_postgres::Client, certificates: &Certificates, endpoint: &Endpoint) {
    let hba = server.data().join("pg_hba.conf");
    let before = std::fs::read_to_string(&hba).unwrap();
    let rules = ["all", "replication"]
        .map(|database| format!("hostssl {database} postgres 127.0.0.1/32 cert\nhostssl {database} postgres ::1/128 cert\n"));
    std::fs::write(&hba, rules.concat() + &before).unwrap();
    reload(admin).await;
    let mut endpoint = endpoint.clone();
    endpoint.password = Secret("wrong".into());
    let refused = connect(&endpoint, Side::Target, "").await.err().expect("a failure");
    assert_eq!((refused.class, refused.reason), (Class::Stop, reason::AUTHENTICATION_FAILED), "{refused}");
    endpoint.client_certificate = Some((certificates.text("client.crt"), Secret(certificates.text("client.key"))));
    assert!(is_encrypted(&endpoint).await);
    std::fs::write(&hba, before).unwrap();
    reload(admin).await;
}

/// The reader's own TLS stream, with more data than any of its buffers.
async fn stream_over_tls(server: &Postgres, certificates: &Certificates) {
    let client = server.create_database("encrypted").await;
    client.batch_execute("CREATE TABLE t (id int PRIMARY KEY, v text)").await.unwrap();
    publish(&client, &["t"]).await;
    let mut endpoint = server.endpoint("encrypted");
    endpoint.host = "localhost".into();
    endpoint.tls = TlsMode::VerifyFull;
    endpoint.ca = Some(certificates.text("ca.crt"));
    let from = crate::follow::create_slot(&endpoint, "s").await;
    let tables = [mapped(&client, "t").await];
    let mut follower = Follower::new(open(&endpoint, from, &tables, true, LIMITS).await, LIMITS);
    client.batch_execute("INSERT INTO t SELECT i, repeat(md5(i::text), 1 + i % 50) FROM generate_series(1, 20000) i").await.unwrap();
    client.batch_execute("INSERT INTO t VALUES (0, 'last')").await.unwrap();
    follower.follow_to_head(&client).await;
    follower.assert_contents(&endpoint, "t", true).await;
}
