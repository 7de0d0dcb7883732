//! A real kube-apiserver with etcd, and the controllers that deletion needs, on loopback. Gone when the last handle is dropped.
//!
//! No kubelet and no scheduler: pods stay Pending, Deployments are never rolled out. Namespaces, garbage and service accounts work.

use super::{cache, eventually, free_port};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config, ResourceExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

const ADMIN_TOKEN: &str = "admin-of-the-tests";
const CONTROLLERS: &str = "namespace-controller,garbage-collector-controller,serviceaccount-controller";

/// A running API server.
pub struct ApiServer {
    port: u16,
    ca: Vec<u8>,
    // In the order of their end.
    _controllers: Process,
    _apiserver: Process,
    _etcd: Process,
    folder: tempfile::TempDir,
}

/// One server for all tests of a binary that run at the same time.
static SHARED: Mutex<Weak<ApiServer>> = Mutex::new(Weak::new());

impl ApiServer {
    /// The server of this test binary; started when no other test uses it now. Tests keep apart by namespaces.
    pub async fn shared() -> Arc<Self> {
        let server = {
            let mut shared = SHARED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            shared.upgrade().unwrap_or_else(|| {
                let server = Arc::new(Self::spawn());
                *shared = Arc::downgrade(&server);
                server
            })
        };
        server.wait_ready().await;
        server
    }

    /// A server of the test's own.
    pub async fn start() -> Self {
        let server = Self::spawn();
        server.wait_ready().await;
        server
    }

    fn spawn() -> Self {
        let folder = tempfile::Builder::new().prefix("sluice-api").tempdir().expect("a temporary folder");
        let node = node_folder();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let (etcd_port, peer_port, port) = (free_port(), free_port(), free_port());
        let etcd = Process::start(
            &node.join("etcd"),
            &folder.path().join("etcd.log"),
            &[
                format!("--data-dir={}", path("etcd")),
                format!("--listen-client-urls=http://127.0.0.1:{etcd_port}"),
                format!("--advertise-client-urls=http://127.0.0.1:{etcd_port}"),
                format!("--listen-peer-urls=http://127.0.0.1:{peer_port}"),
                format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer_port}"),
                format!("--initial-cluster=default=http://127.0.0.1:{peer_port}"),
                "--unsafe-no-fsync".into(),
                "--log-level=error".into(),
            ],
        );
        std::fs::write(path("tokens.csv"), format!("{ADMIN_TOKEN},admin,admin,\"system:masters\"\n")).expect("a token file");
        let made = Command::new("openssl").args(["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", &path("sa.key")]).output();
        assert!(made.expect("openssl runs").status.success(), "openssl makes a key");
        let apiserver = Process::start(
            &node.join("kube-apiserver"),
            &folder.path().join("apiserver.log"),
            &[
                format!("--etcd-servers=http://127.0.0.1:{etcd_port}"),
                "--bind-address=127.0.0.1".into(),
                "--advertise-address=127.0.0.1".into(),
                format!("--secure-port={port}"),
                format!("--cert-dir={}", path("certificates")),
                format!("--token-auth-file={}", path("tokens.csv")),
                "--authorization-mode=RBAC".into(),
                // As on OpenShift: who sets an owner needs a right to.
                "--enable-admission-plugins=OwnerReferencesPermissionEnforcement".into(),
                "--service-account-issuer=https://kubernetes.default.svc".into(),
                format!("--service-account-signing-key-file={}", path("sa.key")),
                format!("--service-account-key-file={}", path("sa.key")),
                "--service-cluster-ip-range=10.200.0.0/24".into(),
                "--endpoint-reconciler-type=none".into(),
                // Tests wait for each other's end, not for a drain.
                "--shutdown-delay-duration=0s".into(),
            ],
        );
        let certificate = folder.path().join("certificates/apiserver.crt");
        let ca = wait_for_file(&certificate, &folder.path().join("apiserver.log"));
        let kubeconfig = serde_json::to_string(&kubeconfig(port, &ca, ADMIN_TOKEN)).expect("a kubeconfig");
        std::fs::write(path("kubeconfig"), kubeconfig).expect("a kubeconfig");
        let controllers = Process::start(
            &node.join("kube-controller-manager"),
            &folder.path().join("controllers.log"),
            &[
                format!("--kubeconfig={}", path("kubeconfig")),
                format!("--controllers={CONTROLLERS}"),
                "--leader-elect=false".into(),
                "--bind-address=127.0.0.1".into(),
                format!("--secure-port={}", free_port()),
                format!("--cert-dir={}", path("controllers")),
            ],
        );
        Self { port, ca, _controllers: controllers, _apiserver: apiserver, _etcd: etcd, folder }
    }

    async fn wait_ready(&self) {
        let client = self.client().await;
        eventually(60, "the API server is ready", || async {
            let ready = axum::http::Request::get("/readyz").body(Vec::new()).expect("a request");
            client.request_text(ready).await.is_ok_and(|answer| answer == "ok")
                // The first namespace is made after /readyz says yes.
                && Api::<Namespace>::all(client.clone()).get("default").await.is_ok()
        })
        .await;
    }

    /// How the admin reaches it.
    pub async fn config(&self) -> Config {
        self.config_of(self.port, ADMIN_TOKEN).await
    }

    async fn config_of(&self, port: u16, token: &str) -> Config {
        Config::from_custom_kubeconfig(kubeconfig(port, &self.ca, token), &KubeConfigOptions::default()).await.expect("a valid kubeconfig")
    }

    /// File with the admin's kubeconfig, for other programs.
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubeconfig")
    }

    /// How the admin reaches it through `proxy`.
    pub async fn config_through(&self, proxy: &Proxy) -> Config {
        self.config_of(proxy.port, ADMIN_TOKEN).await
    }

    /// A proxy in front of it that can fail.
    pub async fn proxy(&self) -> Proxy {
        Proxy::start(self.port).await
    }

    /// The admin's client; belongs to the calling test's runtime.
    pub async fn client(&self) -> Client {
        Client::try_from(self.config().await).expect("a client")
    }

    /// How a service account reaches it, with a token of its own.
    pub async fn config_as_service_account(&self, namespace: &str, name: &str) -> Config {
        let api = Api::<ServiceAccount>::namespaced(self.client().await, namespace);
        let request = TokenRequest {
            spec: TokenRequestSpec { expiration_seconds: Some(3600), ..TokenRequestSpec::default() },
            ..TokenRequest::default()
        };
        let token = api.create_token_request(name, &PostParams::default(), &request).await.expect("a token");
        self.config_of(self.port, &token.status.expect("a token").token).await
    }

    /// The client of a service account.
    pub async fn client_as_service_account(&self, namespace: &str, name: &str) -> Client {
        Client::try_from(self.config_as_service_account(namespace, name).await).expect("a client")
    }

    /// A new namespace with a name of its own, which begins with `prefix`.
    pub async fn namespace(&self, prefix: &str) -> String {
        let api = Api::<Namespace>::all(self.client().await);
        let metadata = ObjectMeta { generate_name: Some(format!("{prefix}-")), ..ObjectMeta::default() };
        api.create(&PostParams::default(), &Namespace { metadata, ..Namespace::default() }).await.expect("a namespace").name_any()
    }

    /// Installs definitions and waits until the server serves them.
    pub async fn install(&self, definitions: Vec<CustomResourceDefinition>) {
        let api = Api::<CustomResourceDefinition>::all(self.client().await);
        for definition in &definitions {
            let params = PatchParams::apply("tests").force();
            api.patch(&definition.name_any(), &params, &Patch::Apply(definition)).await.expect("a definition that the server takes");
        }
        for definition in definitions {
            let established = kube::runtime::conditions::is_crd_established();
            let name = definition.name_any();
            let wait = kube::runtime::wait::await_condition(api.clone(), &name, established);
            tokio::time::timeout(Duration::from_secs(20), wait).await.expect("established in time").expect("a watch");
        }
    }
}

/// Where this checkout's `make deps` has put the node's programs.
fn node_folder() -> PathBuf {
    let script = format!("SLUICE_CACHE='{}'; . '{}/e2e/lib.sh' && node_dir", cache().display(), env!("CARGO_MANIFEST_DIR"));
    let output = Command::new("bash").args(["-c", &script]).output().expect("bash runs");
    let folder = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    assert!(folder.join("kube-apiserver").exists(), "{} is missing: run `make deps`", folder.join("kube-apiserver").display());
    folder
}

fn kubeconfig(port: u16, ca: &[u8], token: &str) -> Kubeconfig {
    let ca = k8s_openapi::ByteString(ca.to_vec());
    serde_json::from_value(serde_json::json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "tests",
        "clusters": [{"name": "tests", "cluster": {"server": format!("https://127.0.0.1:{port}"), "certificate-authority-data": ca}}],
        "users": [{"name": "tests", "user": {"token": token}}],
        "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "tests", "namespace": "default"}}],
    }))
    .expect("a kubeconfig")
}

fn wait_for_file(path: &Path, log: &Path) -> Vec<u8> {
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    loop {
        match std::fs::read(path) {
            Ok(bytes) if bytes.ends_with(b"-----END CERTIFICATE-----\n") => return bytes,
            _ => {}
        }
        let log = || std::fs::read_to_string(log).unwrap_or_default();
        assert!(std::time::Instant::now() < deadline, "no certificate of the API server\n{}", log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A child that dies with this process, however that ends.
struct Process {
    pid: u32,
    ended: Mutex<std::sync::mpsc::Receiver<()>>,
}

impl Process {
    fn start(program: &Path, log: &Path, arguments: &[String]) -> Self {
        let log = std::fs::File::create(log).expect("a log file");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(program).args(arguments);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log file")).stderr(log);
        let (tell, told) = std::sync::mpsc::channel();
        let (tell_end, ended) = std::sync::mpsc::channel();
        // The kernel ends the child with the *thread* that started it: this one lives as long as the child.
        std::thread::spawn(move || {
            let mut child = command.spawn().expect("setpriv starts");
            let _ = tell.send(child.id());
            let _ = child.wait();
            let _ = tell_end.send(());
        });
        Self { pid: told.recv().expect("a process"), ended: Mutex::new(ended) }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-KILL", &self.pid.to_string()]).stderr(Stdio::null()).status();
        if let Ok(ended) = self.ended.lock() {
            let _ = ended.recv_timeout(Duration::from_secs(10));
        }
    }
}

/// What a [`Proxy`] does with bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Passes them.
    Up,
    /// Takes connections and passes nothing, as behind a firewall that drops.
    Frozen,
    /// Closes connections, and new ones at once.
    Cut,
}

/// A TCP proxy that can fail.
pub struct Proxy {
    pub port: u16,
    link: watch::Sender<Link>,
    task: tokio::task::JoinHandle<()>,
}

impl Proxy {
    async fn start(target: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let (link, state) = watch::channel(Link::Up);
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.expect("a connection");
                connections.spawn(serve(stream, target, state.clone()));
                while connections.try_join_next().is_some() {}
            }
        });
        Self { port, link, task }
    }

    /// From now on.
    pub fn set(&self, link: Link) {
        self.link.send_replace(link);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(client: TcpStream, target: u16, link: watch::Receiver<Link>) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", target)).await else { return };
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let mut state = link.clone();
    tokio::select! {
        () = pass(from_client, to_server, link.clone()) => {}
        () = pass(from_server, to_client, link) => {}
        _ = state.wait_for(|link| *link == Link::Cut) => {}
    }
}

async fn pass(mut from: tokio::net::tcp::OwnedReadHalf, mut to: tokio::net::tcp::OwnedWriteHalf, mut link: watch::Receiver<Link>) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(count) = from.read(&mut buffer).await {
        if count == 0 || link.wait_for(|link| *link == Link::Up).await.is_err() || to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
