//! A namespace of its own for each test, with both controllers at work in it.

use crate::chart;
use crate::support::apiserver::ApiServer;
use crate::support::eventually;
use crate::support::operator::{options, options_with};
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, put};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Secret};
use k8s_openapi::api::events::v1::Event;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sluice::connectors::postgres::Endpoint;
use sluice::connectors::postgres::connect::Side;
use sluice::engine::error::{Error, Result, reason};
use sluice::operator::client::client as bounded_client;
use sluice::operator::databases::{CleanedUp, Databases, Inspection, Leftovers, WatchedSlot};
use sluice::operator::health::Health;
use sluice::operator::metrics::Metrics;
use sluice::operator::run::spawn_controllers;
use sluice::operator::shutdown::Shutdown;
use sluice::operator::signing::{self, SigningKeys};
use sluice::operator::{Context, Options, poller};
use sluice::resources::conditions::{self, kind};
use sluice::resources::names::worker_labels;
use sluice::resources::{Mirror, MirrorStatus, Source, Target, crds};
use sluice::worker::contract::{Desired, MirrorId, Status};
use sluice::worker::token;
use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// A kind that tests create and read.
pub trait Kind: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned {}
impl<K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned> Kind for K {}

/// Kinds that say who may do what.
const ACCESS: [&str; 5] = ["ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"];
/// Secret at home with the key that signs calls to workers.
const SIGNING_KEY: &str = "sluice-signing-key";

/// One server behind every host but `down`; nothing can be dropped while `broken`.
#[derive(Default)]
pub struct FakeDatabases {
    pub broken: AtomicBool,
    pub dropped: Mutex<Vec<(Endpoint, Leftovers)>>,
    pub forgotten: Mutex<Vec<(String, String)>>,
    /// Slots that were looked at in place of their workers.
    pub watched: Mutex<Vec<WatchedSlot>>,
}

impl FakeDatabases {
    /// Slots that were dropped.
    pub fn slots(&self) -> Vec<String> {
        self.dropped.lock().expect("no panic").iter().map(|(_, leftovers)| leftovers.slot.clone()).collect()
    }
}

impl Databases for FakeDatabases {
    fn inspect<'a>(&'a self, endpoint: &'a Endpoint, _: Side) -> BoxFuture<'a, Result<Inspection>> {
        let found = match endpoint.host.as_str() {
            "down" => Err(Error::retry(reason::HOST_UNREACHABLE, "down:5432: connection refused")),
            _ => Ok(Inspection { server_version: "17.2".into(), system_identifier: "7001".into(), ..Inspection::default() }),
        };
        std::future::ready(found).boxed()
    }

    fn clean_up<'a>(&'a self, endpoint: &'a Endpoint, leftovers: &'a Leftovers) -> BoxFuture<'a, Result<CleanedUp>> {
        let done = if self.broken.load(Ordering::SeqCst) {
            Err(Error::retry(reason::HOST_UNREACHABLE, "source-db:5432: no route to host"))
        } else {
            self.dropped.lock().expect("no panic").push((endpoint.clone(), leftovers.clone()));
            Ok(CleanedUp { slot_dropped: leftovers.drop_slot, publication_dropped: leftovers.publication.is_some() })
        };
        std::future::ready(done).boxed()
    }

    fn keep_budget<'a>(&'a self, _: &'a Endpoint, slot: &'a WatchedSlot) -> BoxFuture<'a, Result<bool>> {
        self.watched.lock().expect("no panic").push(slot.clone());
        std::future::ready(Ok(true)).boxed()
    }

    fn forget_stream<'a>(&'a self, target: &'a Endpoint, slot: &'a str, _: &'a MirrorId) -> BoxFuture<'a, Result<()>> {
        self.forgotten.lock().expect("no panic").push((target.host.clone(), slot.to_owned()));
        std::future::ready(Ok(())).boxed()
    }
}

/// The operator's tasks.
struct Operator {
    metrics: Metrics,
    shutdown: Shutdown,
    tasks: JoinSet<()>,
}

/// What the chart gives to an operator.
struct Chart {
    /// Its service account at home.
    account: String,
    /// Its arguments.
    arguments: Vec<String>,
}

/// A namespace, and an operator that serves it.
pub struct Stage {
    server: Arc<ApiServer>,
    client: Client,
    pub namespace: String,
    /// Where the operator lives.
    pub home: String,
    pub databases: Arc<FakeDatabases>,
    keys: SigningKeys,
    /// What the chart makes for it; without, it is the admin.
    chart: Option<Chart>,
    operator: Option<Operator>,
}

impl Stage {
    /// A namespace with Secrets, and the operator at work.
    pub async fn set() -> Self {
        Self::set_with(|_| {}).await
    }

    /// The same with other settings.
    pub async fn set_with(change: impl FnOnce(&mut Options)) -> Self {
        let mut stage = Self::prepare().await;
        stage.start_operator(change).await;
        stage
    }

    /// The same with the operator under the service account and the rights that the chart gives it.
    pub async fn set_under_the_chart() -> Self {
        let mut stage = Self::prepare().await;
        let mut chart = stage.apply_rights_of_the_chart(&[]).await;
        // Tests share a server: it leaves the others' namespaces alone.
        chart.arguments.push(format!("--watch-namespaces={}", stage.namespace));
        stage.chart = Some(chart);
        stage.start_operator(|_| {}).await;
        stage
    }

    /// The same with rights in the stage's namespace only, although it is to serve `others`, too.
    pub async fn set_under_the_scoped_chart(others: &[&str]) -> Self {
        let mut stage = Self::prepare().await;
        let mut chart = stage.apply_rights_of_the_chart(&[&stage.namespace]).await;
        for argument in chart.arguments.iter_mut().filter(|argument| argument.starts_with("--watch-namespaces=")) {
            *argument = [argument.as_str()].iter().chain(others).copied().collect::<Vec<_>>().join(",");
        }
        stage.chart = Some(chart);
        stage.start_operator(|_| {}).await;
        stage
    }

    async fn prepare() -> Self {
        let server = ApiServer::shared().await;
        server.install(crds::all()).await;
        let (namespace, home) = (server.namespace("mirror").await, server.namespace("operator").await);
        let client = server.client().await;
        let keys = signing::load_or_create(&client, &home, SIGNING_KEY).await.expect("a key");
        let stage = Self { server, client, namespace, home, databases: Arc::default(), keys, chart: None, operator: None };
        for name in ["source-login", "target-login"] {
            stage
                .create::<Secret>(json!({"metadata": {"name": name}, "stringData": {"username": "u", "password": format!("of {name}")}}))
                .await;
        }
        stage
    }

    /// Starts an operator, as a new process would.
    pub async fn start_operator(&mut self, change: impl FnOnce(&mut Options)) {
        assert!(self.operator.is_none(), "one at a time");
        let mut options = match &self.chart {
            Some(chart) => options_with(&self.home, chart.arguments.iter().map(String::as_str)),
            None => options(&self.home, &self.namespace),
        };
        change(&mut options);
        let metrics = Metrics::default();
        let config = match &self.chart {
            Some(chart) => self.server.config_as_service_account(&self.home, &chart.account).await,
            None => self.server.config().await,
        };
        let client = bounded_client(config, &metrics).expect("a client");
        let ctx = Context::new(client, options, metrics.clone(), Health::default(), self.keys.clone()).expect("a context");
        let (shutdown, mut tasks) = (Shutdown::new(), JoinSet::new());
        spawn_controllers(&mut tasks, &ctx, &shutdown, self.databases.clone());
        tasks.spawn(poller::run(ctx.poller.clone(), ctx.workers.clone(), ctx.metrics.clone(), shutdown.clone()));
        let follow =
            signing::follow(self.client.clone(), self.home.clone(), SIGNING_KEY.into(), self.keys.clone(), Duration::from_millis(200));
        let ends = shutdown.clone();
        tasks.spawn(async move {
            ends.run_until_cancelled(follow).await;
        });
        self.operator = Some(Operator { metrics, shutdown, tasks });
    }

    /// Changes the Secret of the key that signs calls to workers.
    pub async fn patch_signing_key(&self, data: Value) {
        let secrets = Api::<Secret>::namespaced(self.client.clone(), &self.home);
        secrets.patch(SIGNING_KEY, &PatchParams::default(), &Patch::Merge(json!({"data": data}))).await.expect("patched");
    }

    /// Makes what the chart makes of accounts and rights; in all namespaces when `scopes` is empty.
    async fn apply_rights_of_the_chart(&self, scopes: &[&str]) -> Chart {
        let objects = chart::rendered(&self.home, scopes);
        for object in objects.iter().filter(|object| ACCESS.contains(&chart::kind(object))) {
            self.apply(object).await;
        }
        let account = objects.iter().find(|object| chart::kind(object) == "ServiceAccount").expect("the chart makes an account");
        Chart { account: account.name_any(), arguments: chart::arguments(&objects) }
    }

    async fn apply(&self, object: &DynamicObject) {
        let types = object.types.as_ref().expect("a kind");
        let resource = ApiResource::from_gvk(&GroupVersionKind::try_from(types).expect("a group"));
        let api: Api<DynamicObject> = match object.namespace() {
            Some(namespace) => Api::namespaced_with(self.client.clone(), &namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        };
        api.patch(&object.name_any(), &PatchParams::apply("tests").force(), &Patch::Apply(object)).await.expect("applied");
    }

    /// Makes the chart's admission policy, in force in this stage's namespace only; returns its name.
    pub async fn apply_policy_of_the_chart(&self) -> String {
        for mut object in chart::rendered(&self.home, &[]) {
            match chart::kind(&object) {
                "ValidatingAdmissionPolicy" => {}
                "ValidatingAdmissionPolicyBinding" => {
                    let here = json!({"matchLabels": {"kubernetes.io/metadata.name": self.namespace}});
                    object.data["spec"]["matchResources"] = json!({"namespaceSelector": here});
                    object.data["spec"]["policyName"] = json!(self.home);
                }
                _ => continue,
            }
            object.metadata.name = Some(self.home.clone());
            self.apply(&object).await;
        }
        self.home.clone()
    }

    /// Requests to the API server with these labels.
    pub fn requests_with(&self, labels: &str) -> u64 {
        let text = self.operator.as_ref().expect("an operator").metrics.encode().expect("text");
        let lines = text.lines().filter(|line| line.starts_with("sluice_operator_api_requests_total{") && line.contains(labels));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
    }

    /// Ends the operator after its running passes.
    pub async fn stop_operator(&mut self) {
        let mut operator = self.operator.take().expect("an operator");
        operator.shutdown.cancel();
        while let Some(ended) = operator.tasks.join_next().await {
            ended.expect("a task ends in peace");
        }
    }

    pub async fn end(mut self) {
        if self.operator.is_some() {
            self.stop_operator().await;
        }
        drop(self.server);
    }

    pub fn api<K: Kind>(&self) -> Api<K> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub async fn create<K: Kind>(&self, document: Value) -> K {
        let object: K = serde_json::from_value(document).expect("an object");
        self.api().create(&PostParams::default(), &object).await.expect("created")
    }

    pub async fn patch<K: Kind>(&self, name: &str, patch: Value) {
        self.api::<K>().patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.expect("patched");
    }

    pub async fn get<K: Kind>(&self, name: &str) -> Option<K> {
        self.api::<K>().get_opt(name).await.expect("an answer")
    }

    pub async fn delete<K: Kind>(&self, name: &str) {
        self.api::<K>().delete(name, &DeleteParams::default()).await.expect("deleted");
    }

    pub async fn is_gone<K: Kind>(&self, name: &str) -> bool {
        self.get::<K>(name).await.is_none()
    }

    pub async fn delete_namespace(&self) {
        Api::<Namespace>::all(self.client.clone()).delete(&self.namespace, &DeleteParams::default()).await.expect("deleted");
    }

    pub async fn namespace_is_gone(&self) -> bool {
        Api::<Namespace>::all(self.client.clone()).get_opt(&self.namespace).await.expect("an answer").is_none()
    }

    pub async fn source(&self, spec: Value) {
        self.create::<Source>(connection("Source", "shop", "source", &spec)).await;
    }

    pub async fn target(&self) {
        self.create::<Target>(connection("Target", "dw", "target", &json!({}))).await;
    }

    /// A Mirror of `public.users`, with more in its spec.
    pub async fn mirror(&self, name: &str, more: Value) -> Mirror {
        let mut spec = json!({"sourceRef": {"name": "shop"}, "targetRef": {"name": "dw"}, "tables": [{"name": "users"}]});
        spec.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        self.create(json!({"apiVersion": "sluice.dev/v1alpha1", "kind": "Mirror", "metadata": {"name": name}, "spec": spec})).await
    }

    /// Source, Target and Mirror `orders` with its worker's Deployment.
    pub async fn with_worker(&self, more: Value) -> Mirror {
        self.source(json!({})).await;
        self.target().await;
        let mirror = self.mirror("orders", more).await;
        eventually(20, "the Deployment is made", async || self.get::<Deployment>("orders-worker").await.is_some()).await;
        mirror
    }

    /// The same with a worker that streams and is known to.
    pub async fn streaming(&self, more: Value) -> StubWorker {
        let mirror = self.with_worker(more).await;
        let worker = self.run_worker(&mirror, json!({})).await;
        self.until("orders", "True", "Streaming").await;
        worker
    }

    pub async fn status(&self, name: &str) -> MirrorStatus {
        self.get::<Mirror>(name).await.and_then(|mirror| mirror.status).unwrap_or_default()
    }

    /// Waits until `Ready` has this status and reason.
    pub async fn until(&self, name: &str, status: &str, reason: &str) {
        let last = Mutex::new(MirrorStatus::default());
        let wait = eventually(20, reason, async || {
            let now = self.status(name).await;
            let ready = conditions::get(&now.conditions, kind::READY);
            let is_so = ready.is_some_and(|ready| ready.status == status && ready.reason == reason);
            *last.lock().expect("no panic") = now;
            is_so
        });
        if std::panic::AssertUnwindSafe(wait).catch_unwind().await.is_err() {
            panic!("{name} is not {status} {reason} but {}", serde_json::to_string_pretty(&*last.lock().expect("no panic")).expect("JSON"));
        }
    }

    /// The condition's status and reason.
    pub async fn condition(&self, name: &str, kind: &str) -> (String, String) {
        let status = self.status(name).await;
        conditions::get(&status.conditions, kind).map(|found| (found.status.clone(), found.reason.clone())).unwrap_or_default()
    }

    /// The document in the ConfigMap.
    pub async fn document(&self) -> Option<Desired> {
        let map = self.get::<ConfigMap>("orders-worker").await?;
        serde_json::from_str(&map.data?["desired.json"]).ok()
    }

    /// Passes of the controller of Mirrors that have ended.
    pub fn passes(&self) -> u64 {
        self.counted("sluice_operator_reconcile_total{controller=\"mirror\"")
    }

    /// Sum of the metrics that begin so.
    pub fn counted(&self, begin: &str) -> u64 {
        let text = self.operator.as_ref().expect("an operator").metrics.encode().expect("text");
        let lines = text.lines().filter(|line| line.starts_with(begin));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
    }

    /// Makes the controller look at all Mirrors of the Source once more, and waits for the end of that pass.
    pub async fn look_again(&self, mark: usize) {
        let before = self.passes();
        self.patch::<Source>("shop", json!({"metadata": {"annotations": {"test": mark.to_string()}}})).await;
        eventually(10, "another pass", async || self.passes() > before).await;
    }

    /// Notes of events in the operator's own namespace with this reason.
    pub async fn notes_at_home(&self, reason: &str) -> Vec<String> {
        let events = Api::<Event>::namespaced(self.client.clone(), &self.home).list(&ListParams::default()).await.expect("events");
        events.items.into_iter().filter(|event| event.reason.as_deref() == Some(reason)).filter_map(|event| event.note).collect()
    }

    /// A pod of the Mirror's worker, as Deployment controller and kubelet would make it, and what runs in it, with what is
    /// different in its status.
    pub async fn run_worker(&self, mirror: &Mirror, says: Value) -> StubWorker {
        let document = self.document().await.expect("a document");
        let worker = StubWorker::start(document).await;
        worker.says(says);
        let name = format!("{}-worker-0", mirror.name_any());
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": name, "labels": worker_labels(&mirror.name_any(), &mirror.uid().expect("a uid"))},
            "spec": {"automountServiceAccountToken": false, "containers": [
                {"name": "worker", "image": "sluice:test", "ports": [{"name": "http", "containerPort": worker.port}]},
            ]},
        }))
        .expect("a pod");
        // The namespace's service account is made a moment after the namespace.
        let api = self.api::<Pod>();
        eventually(20, "a pod", async || api.create(&PostParams::default(), &pod).await.is_ok()).await;
        let status = json!({"status": {
            "phase": "Running", "podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}],
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [{"name": "worker", "image": "sluice:test", "imageID": "", "ready": true, "restartCount": 0, "state": {"running": {}}}],
        }});
        api.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)).await.expect("a running pod");
        worker
    }
}

/// A worker that does what it is told at once. It is gone when dropped.
#[derive(Clone)]
pub struct StubWorker {
    pub port: u16,
    state: Arc<Mutex<StubState>>,
    _server: Arc<JoinSet<()>>,
}

struct StubState {
    desired: Desired,
    pushed: Vec<Desired>,
    said: Value,
    down: bool,
}

impl StubWorker {
    async fn start(desired: Desired) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let state = Arc::new(Mutex::new(StubState { desired, pushed: vec![], said: json!({}), down: false }));
        let router = Router::new().route("/v1/status", get(status)).route("/v1/desired", put(put_desired)).with_state(Arc::clone(&state));
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, router).await.expect("served") });
        Self { port, state, _server: Arc::new(server) }
    }

    /// What is different in its status from now on.
    pub fn says(&self, said: Value) {
        self.state.lock().expect("no panic").said = said;
    }

    /// Whether it answers from now on, as when its process has ended.
    pub fn is_down(&self, down: bool) {
        self.state.lock().expect("no panic").down = down;
    }

    /// The documents that were pushed.
    pub fn pushed(&self) -> Vec<Desired> {
        self.state.lock().expect("no panic").pushed.clone()
    }
}

type Shared = State<Arc<Mutex<StubState>>>;

fn is_allowed(desired: &Desired, headers: &HeaderMap, body: &[u8]) -> bool {
    let token = headers.get("authorization").and_then(|value| value.to_str().ok()).and_then(|value| value.strip_prefix("Bearer "));
    token.is_some_and(|token| token::verify(desired, token).is_ok_and(|grant| grant.check_body(body).is_ok()))
}

async fn status(State(state): Shared, headers: HeaderMap) -> std::result::Result<axum::Json<Status>, StatusCode> {
    let state = state.lock().expect("no panic");
    if state.down {
        return Err(StatusCode::SERVICE_UNAVAILABLE);
    }
    if !is_allowed(&state.desired, &headers, b"") {
        return Err(StatusCode::UNAUTHORIZED);
    }
    let rests = state.desired.suspend;
    let mut status = json!({
        "contract": 1, "version": "0", "generation": state.desired.generation, "pod": "orders-worker-0", "epoch": 1, "slot": state.desired.slot,
        "publication": state.desired.publication, "phase": if rests { "Suspended" } else { "Streaming" }, "streaming": !rests, "tables": {"Ready": 1},
        "rowsCopied": 7, "rowsToCopy": 7, "rowsStreamed": 3, "snapshotCompleted": true, "lagBytes": 0, "lagSeconds": 0, "confirmed": "0/1000",
    });
    status.as_object_mut().expect("an object").extend(state.said.as_object().expect("an object").clone());
    Ok(axum::Json(serde_json::from_value(status).expect("a status")))
}

async fn put_desired(State(state): Shared, headers: HeaderMap, body: Bytes) -> StatusCode {
    let mut state = state.lock().expect("no panic");
    if state.down {
        return StatusCode::SERVICE_UNAVAILABLE;
    }
    if !is_allowed(&state.desired, &headers, &body) {
        return StatusCode::UNAUTHORIZED;
    }
    let desired: Desired = serde_json::from_slice(&body).expect("a document");
    if desired.generation <= state.desired.generation {
        return StatusCode::CONFLICT;
    }
    state.pushed.push(desired.clone());
    state.desired = desired;
    StatusCode::NO_CONTENT
}

fn connection(kind: &str, name: &str, side: &str, more: &Value) -> Value {
    let mut spec = json!({
        "engine": "PostgreSQL", "host": format!("{side}-db"), "database": "shop", "credentialsRef": {"name": format!("{side}-login")},
    });
    spec.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    json!({"apiVersion": "sluice.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec})
}
