//! The whole run, from the first second to the hand-over.

use crate::election::SHORT;
use crate::support::apiserver::{ApiServer, Link};
use crate::support::{self, eventually, operator};
use crate::{definitions, mirror, options};
use kube::api::PostParams;
use kube::runtime::controller::Action;
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher;
use kube::{Api, ResourceExt as _};
use sluice::operator::cache::{Wake, any_change};
use sluice::operator::run::{RunError, Runtime};
use sluice::operator::shutdown::Shutdown;
use sluice::operator::{Context, Options, reconcile};
use sluice::resources::Mirror;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

static RECONCILED: Mutex<Vec<String>> = Mutex::new(Vec::new());
static HOLD: AtomicBool = AtomicBool::new(false);
static FINISHED: AtomicBool = AtomicBool::new(false);

/// A controller that notes what it sees, panics at one object and takes its time with another.
fn test_controllers(ctx: &Arc<Context>, shutdown: &Shutdown) -> JoinSet<()> {
    let mut mirrors = ctx.watch::<Mirror>(&watcher::Config::default());
    let (store, wake) = (mirrors.store.clone(), Wake::default());
    mirrors.wake(&wake, any_change(), |mirror| [ObjectRef::from_obj(mirror)]);
    let mut tasks = JoinSet::new();
    mirrors.spawn(&mut tasks, shutdown);
    let controller = reconcile::controller(store, &wake);
    tasks.spawn(reconcile::run("mirror", controller, ctx.clone(), shutdown.clone(), |mirror: Arc<Mirror>, _| async move {
        let name = mirror.name_any();
        assert!(name != "panics", "a defect of ours");
        RECONCILED.lock().expect("no panic while noting").push(name.clone());
        if name == "slow" {
            while HOLD.load(Ordering::Relaxed) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            FINISHED.store(true, Ordering::Relaxed);
        }
        Ok(Action::await_change())
    }));
    tasks
}

struct Replica {
    address: String,
    shutdown: Shutdown,
    run: tokio::task::JoinHandle<Result<(), RunError>>,
}

impl Replica {
    async fn start(config: kube::Config, namespace: &str, pod: &str) -> Self {
        Self::start_with(config, options(namespace, pod)).await
    }

    async fn start_with(config: kube::Config, options: Options) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let shutdown = Shutdown::new();
        let runtime = Runtime { options, times: SHORT, listener, shutdown: shutdown.clone(), controllers: test_controllers };
        Self { address, shutdown, run: tokio::spawn(runtime.run(async || Ok(config))) }
    }

    async fn get(&self, path: &str) -> (u16, String) {
        let answer = reqwest::get(format!("http://{}{path}", self.address)).await.expect("an answer");
        (answer.status().as_u16(), answer.text().await.expect("a body"))
    }

    async fn leads(&self) -> bool {
        self.get("/metrics").await.1.contains("sluice_operator_leader 1")
    }
}

fn reconciled(name: &str) -> bool {
    RECONCILED.lock().expect("no panic while noting").iter().any(|other| other == name)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_waits_leads_works_drains_and_hands_over() {
    let server = ApiServer::start().await;
    let namespace = server.namespace("run").await;
    let proxy = server.proxy().await;
    let first = Replica::start(server.config().await, &namespace, "a").await;
    eventually(10, "it says what it waits for", || async { first.get("/readyz").await.1.contains("CustomResourceDefinitions") }).await;
    assert_eq!(first.get("/livez").await.0, 200, "no crash loop without definitions");

    server.install(definitions()).await;
    eventually(20, "it leads and is ready", || async { first.leads().await && first.get("/readyz").await.0 == 200 }).await;
    let second = Replica::start(server.config_through(&proxy).await, &namespace, "b").await;
    eventually(20, "the standby is ready", || async { second.get("/readyz").await.0 == 200 }).await;
    assert!(!second.leads().await);

    HOLD.store(true, Ordering::Relaxed);
    let mirrors = Api::<Mirror>::namespaced(server.client().await, &namespace);
    for name in ["panics", "fine", "slow"] {
        mirrors.create(&PostParams::default(), &mirror(&namespace, name)).await.expect("a mirror");
    }
    eventually(10, "a panic holds up nobody", || async { reconciled("fine") && reconciled("slow") }).await;
    eventually(10, "the panic is counted", || async {
        first.get("/metrics").await.1.contains(r#"reconcile_total{controller="mirror",outcome="panic",class="bug"}"#)
    })
    .await;

    // A clean stop: the running pass ends, then the lease is handed over.
    first.shutdown.cancel();
    assert!(!second.leads().await, "not before the drain has ended");
    HOLD.store(false, Ordering::Relaxed);
    let stopped = first.run.await.expect("no panic");
    assert!(stopped.is_ok() && FINISHED.load(Ordering::Relaxed), "{stopped:?}");
    let released = Instant::now();
    eventually(3, "the standby leads", || async { second.leads().await }).await;
    assert!(released.elapsed() <= Duration::from_secs(3));

    // Cut off from the API server, the leader ends with an error; another replica takes over.
    let third = Replica::start(server.config().await, &namespace, "c").await;
    proxy.set(Link::Frozen);
    let lost = second.run.await.expect("no panic");
    assert!(matches!(lost, Err(RunError::LostLeadership(_))), "{lost:?}");
    assert!(!third.leads().await, "the lease outlives its holder's deadline");
    eventually(10, "the third leads", || async { third.leads().await }).await;
    third.shutdown.cancel();
    third.run.await.expect("no panic").expect("a clean end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_needs_no_lease_shows_that_it_leads() {
    let server = ApiServer::shared().await;
    server.install(definitions()).await;
    let namespace = server.namespace("alone").await;
    let alone = Replica::start_with(server.config().await, operator::options(&namespace, &namespace)).await;
    eventually(20, "it leads", || alone.leads()).await;
    alone.shutdown.cancel();
    alone.run.await.expect("no panic").expect("a clean end");
}

/// A process of its own, ended with the test.
struct Operator {
    process: std::process::Child,
    address: String,
}

impl Operator {
    fn start(server: &ApiServer, namespace: &str, pod: &str) -> Self {
        let address = format!("127.0.0.1:{}", support::free_port());
        let process = std::process::Command::new(env!("CARGO_BIN_EXE_sluice"))
            .args([
                "operator",
                "--listen",
                &address,
                "--namespace",
                namespace,
                "--watch-namespaces",
                namespace,
                "--pod-name",
                pod,
                "--log-level=warn",
            ])
            .env("KUBECONFIG", server.kubeconfig())
            .spawn()
            .expect("the operator starts");
        Self { process, address }
    }

    async fn says(&self, path: &str, text: &str) -> bool {
        let Ok(answer) = reqwest::get(format!("http://{}{path}", self.address)).await else { return false };
        answer.text().await.is_ok_and(|body| body.contains(text))
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_told_to_end_hands_over_and_exits_with_success() {
    let server = ApiServer::shared().await;
    server.install(definitions()).await;
    let namespace = server.namespace("processes").await;
    let mut first = Operator::start(&server, &namespace, "a");
    eventually(20, "the first leads", || first.says("/metrics", "sluice_operator_leader 1")).await;
    let second = Operator::start(&server, &namespace, "b");
    eventually(20, "the second stands by", || second.says("/readyz", "ok")).await;
    let told = std::process::Command::new("kill").args(["-TERM", &first.process.id().to_string()]).status();
    assert!(told.expect("kill runs").success());
    let ended = tokio::task::spawn_blocking(move || first.process.wait()).await.expect("no panic").expect("an end");
    assert!(ended.success(), "{ended}");
    eventually(3, "the second leads", || second.says("/metrics", "sluice_operator_leader 1")).await;
}
