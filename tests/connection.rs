//! Source and Target against a real API server: definitions, reports, waiting deletions. Databases are what a test says, but for one
//! test with a real one.

mod support;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use k8s_openapi::api::admissionregistration::v1::{ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding};
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::api::events::v1::Event;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use sluice::connectors::postgres::Endpoint;
use sluice::connectors::postgres::connect::Side;
use sluice::engine::error::{Error, Result, reason};
use sluice::operator::cache::Caches;
use sluice::operator::client::client as bounded_client;
use sluice::operator::databases::{CleanedUp, Databases, Inspection, Leftovers, Postgres as Connector, WatchedSlot};
use sluice::operator::health::Health;
use sluice::operator::metrics::Metrics;
use sluice::operator::shutdown::Shutdown;
use sluice::operator::signing::SigningKeys;
use sluice::operator::{Context, connection};
use sluice::resources::conditions::{get, is_true, kind};
use sluice::resources::names::{IN_USE_FINALIZER, PAUSE_RECONCILIATION};
use sluice::resources::{Connection, ConnectionStatus, Mirror, Source, Target, crds};
use sluice::worker::contract::MirrorId;
use sluice::worker::token::SigningKey;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use support::apiserver::ApiServer;
use support::operator::options;
use support::{Postgres, eventually};
use tokio::task::JoinSet;

/// A server behind every host but `down`.
#[derive(Default)]
struct FakeDatabases {
    asked: AtomicUsize,
}

impl Databases for FakeDatabases {
    fn inspect<'a>(&'a self, endpoint: &'a Endpoint, _: Side) -> BoxFuture<'a, Result<Inspection>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let found = match endpoint.host.as_str() {
            "down" => Err(Error::retry(reason::HOST_UNREACHABLE, "down:5432: connection refused")),
            host => Ok(Inspection { server_version: "17.2".into(), system_identifier: format!("id of {host}"), ..Inspection::default() }),
        };
        std::future::ready(found).boxed()
    }

    fn clean_up<'a>(&'a self, _: &'a Endpoint, _: &'a Leftovers) -> BoxFuture<'a, Result<CleanedUp>> {
        std::future::ready(Ok(CleanedUp::default())).boxed()
    }

    fn keep_budget<'a>(&'a self, _: &'a Endpoint, _: &'a WatchedSlot) -> BoxFuture<'a, Result<bool>> {
        std::future::ready(Ok(false)).boxed()
    }

    fn forget_stream<'a>(&'a self, _: &'a Endpoint, _: &'a str, _: &'a MirrorId) -> BoxFuture<'a, Result<()>> {
        std::future::ready(Ok(())).boxed()
    }
}

/// The controllers at work in a namespace of their own.
struct Stage {
    server: Arc<ApiServer>,
    client: Client,
    namespace: String,
    shutdown: Shutdown,
    tasks: JoinSet<()>,
}

impl Stage {
    async fn set(databases: Arc<dyn Databases>) -> Self {
        let server = ApiServer::shared().await;
        server.install(crds::all()).await;
        let namespace = server.namespace("connection").await;
        let metrics = Metrics::default();
        let client = bounded_client(server.config().await, &metrics).expect("a client");
        let keys = SigningKeys::new(SigningKey::generate().expect("a key"), None);
        let ctx = Context::new(client.clone(), options(&namespace, &namespace), metrics, Health::default(), keys).expect("a context");
        let (shutdown, mut tasks) = (Shutdown::new(), JoinSet::new());
        let mut caches = Caches::new(&ctx);
        connection::spawn(&mut tasks, &ctx, &shutdown, &mut caches, databases);
        caches.spawn(&mut tasks, &shutdown);
        Self { server, client, namespace, shutdown, tasks }
    }

    async fn end(mut self) {
        self.shutdown.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            ended.expect("a controller ends in peace");
        }
        drop(self.server);
    }

    fn api<K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>>(&self) -> Api<K> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    async fn create<K>(&self, document: Value) -> K
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope> + Clone + std::fmt::Debug,
        K: serde::Serialize + serde::de::DeserializeOwned,
    {
        let object: K = serde_json::from_value(document).expect("an object");
        self.api().create(&PostParams::default(), &object).await.expect("created")
    }

    async fn patch<K>(&self, name: &str, patch: Value)
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
    {
        self.api::<K>().patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.expect("patched");
    }

    async fn secret(&self, name: &str, finalizers: &[&str]) {
        self.create::<Secret>(json!({
            "metadata": {"name": name, "finalizers": finalizers}, "stringData": {"username": "postgres", "password": "pw"},
        }))
        .await;
    }

    async fn source(&self, name: &str, spec: Value) -> Source {
        self.create(connection_document("Source", name, spec)).await
    }

    async fn status<K>(&self, name: &str) -> ConnectionStatus
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope> + Clone + std::fmt::Debug,
        K: Connection + serde::de::DeserializeOwned,
    {
        self.api::<K>().get(name).await.expect(name).connection_status().cloned().unwrap_or_default()
    }

    /// Waits until `Ready` of the Source has this reason.
    async fn reason(&self, name: &str, reason: &str) -> ConnectionStatus {
        eventually(20, reason, || async {
            let status = self.status::<Source>(name).await;
            get(&status.conditions, kind::READY).is_some_and(|ready| ready.reason == reason)
        })
        .await;
        self.status::<Source>(name).await
    }

    /// Reasons of the events about `name`.
    async fn events(&self, name: &str) -> Vec<String> {
        let all = self.api::<Event>().list(&ListParams::default()).await.expect("events").items;
        let about = all.into_iter().filter(|event| event.regarding.as_ref().and_then(|object| object.name.as_deref()) == Some(name));
        let mut reasons: Vec<_> = about.filter_map(|event| event.reason).collect();
        reasons.sort();
        reasons
    }

    async fn is_gone<K>(&self, name: &str) -> bool
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
    {
        self.api::<K>().get_opt(name).await.expect("an answer").is_none()
    }
}

fn connection_document(kind: &str, name: &str, mut spec: Value) -> Value {
    for (field, value) in [
        ("engine", json!("PostgreSQL")),
        ("host", json!("db")),
        ("database", json!("postgres")),
        ("credentialsRef", json!({"name": "login"})),
    ] {
        if spec[field].is_null() {
            spec[field] = value;
        }
    }
    json!({"apiVersion": "sluice.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec})
}

fn mirror_document(name: &str) -> Value {
    json!({
        "apiVersion": "sluice.dev/v1alpha1", "kind": "Mirror", "metadata": {"name": name},
        "spec": {"sourceRef": {"name": "shop"}, "targetRef": {"name": "dw"}, "tables": [{"name": "users"}]},
    })
}

/// Warnings that the API server sends with the answer to a write.
async fn warnings(client: &Client, path: &str, body: &Value) -> Vec<String> {
    let request = http_request(path, body);
    let response = client.send(request).await.expect("an answer");
    let (parts, _) = response.into_parts();
    assert!(parts.status.is_success(), "{}", parts.status);
    parts.headers.get_all("warning").iter().map(|warning| String::from_utf8_lossy(warning.as_bytes()).into_owned()).collect()
}

fn http_request(path: &str, body: &Value) -> axum::http::Request<kube::client::Body> {
    axum::http::Request::builder()
        .method("PATCH")
        .uri(format!("{path}?fieldManager=tests&force=true&fieldValidation=Strict"))
        .header("content-type", "application/apply-patch+yaml")
        .body(kube::client::Body::from(body.to_string().into_bytes()))
        .expect("a request")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_definitions_install_without_a_warning_and_do_what_they_say() {
    let server = ApiServer::shared().await;
    let client = server.client().await;
    for crd in crds::all() {
        let path = format!("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{}", crd.name_any());
        let found = warnings(&client, &path, &serde_json::to_value(&crd).expect("JSON")).await;
        assert!(found.is_empty(), "{}: {found:?}", crd.name_any());
    }
    server.install(crds::all()).await;
    let namespace = server.namespace("schema").await;
    let mirrors = Api::<Mirror>::namespaced(client.clone(), &namespace);
    let create = async |document: Value| {
        let body = serde_json::from_value::<Mirror>(document).expect("a Mirror");
        mirrors.create(&PostParams::default(), &body).await
    };

    // A new object is not settled, numbers are quantities, absent fields stay absent.
    let mut good = mirror_document("good");
    good["spec"]["worker"] = json!({"resources": {"requests": {"cpu": "1"}}});
    let path = format!("/apis/sluice.dev/v1alpha1/namespaces/{namespace}/mirrors/good");
    good["spec"]["worker"]["resources"]["requests"]["cpu"] = json!(1);
    assert_eq!(warnings(&client, &path, &good).await, Vec::<String>::new());
    let made = mirrors.get("good").await.expect("the Mirror");
    assert_eq!(made.status.as_ref().and_then(|status| status.observed_generation), Some(-1));
    let raw: Value = client.request(axum::http::Request::get(&path).body(vec![]).expect("a request")).await.expect("the Mirror");
    assert!(raw["spec"]["suspend"].is_null() && raw["spec"]["deletionProtection"].is_null());

    let mut both = mirror_document("both");
    both["spec"]["schemas"] = json!([{"name": "sales"}]);
    let mut wrong = mirror_document("wrong");
    wrong["spec"]["worker"] = json!({"resources": {"limits": {"memory": "much"}}});
    let dotted = mirror_document("a.b");
    for (document, why) in [(both, "exactly one of tables and schemas"), (wrong, "limits"), (dotted, "DNS label")] {
        let error = create(document).await.expect_err(why).to_string();
        assert!(error.contains(why), "{error}");
    }
    let moved = json!({"spec": {"sourceRef": {"name": "other"}}});
    let error = mirrors.patch("good", &PatchParams::default(), &Patch::Merge(moved)).await.expect_err("immutable").to_string();
    assert!(error.contains("sourceRef cannot be changed"), "{error}");
    let selected = mirrors.list(&ListParams::default().fields("spec.targetRef.name=dw,spec.sourceRef.name=shop")).await;
    assert_eq!(selected.expect("a list").items.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_database_is_inspected_on_both_sides() {
    let postgres = Postgres::start(17);
    let stage = Stage::set(Arc::new(Connector)).await;
    stage.secret("login", &[]).await;
    let spec = json!({"host": "127.0.0.1", "port": postgres.port});
    stage.source("shop", spec.clone()).await;
    stage.create::<Target>(connection_document("Target", "dw", spec)).await;
    let status = stage.reason("shop", "Available").await;
    assert!(status.server_version.as_deref().is_some_and(|version| version.starts_with("17.")), "{status:?}");
    assert!(status.system_identifier.as_deref().is_some_and(|id| id.len() > 10), "{status:?}");
    assert!(is_true(&status.conditions, kind::PREREQUISITES_MET), "{status:?}");
    let listed: Vec<_> = status.failed_prerequisites.iter().map(|failed| failed.name.as_str()).collect();
    assert_eq!(listed, ["SlotWalUnlimited"], "a warning is listed and stops nothing");
    eventually(20, "the Target is ready", || async { is_true(&stage.status::<Target>("dw").await.conditions, kind::READY) }).await;

    stage.patch::<Source>("shop", json!({"spec": {"database": "nowhere"}})).await;
    let status = stage.reason("shop", "DatabaseMissing").await;
    assert!(is_true(&status.conditions, kind::STALLED));
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_of_no_mirror_are_listed_with_what_they_keep() {
    const ORPHAN: &str = "sluice_6f2d0f8e_5d0c_4b8e_9e5c_0d9a3b6f7c11";
    let postgres = Postgres::start(15);
    let shop = postgres.create_database("shop").await;
    for slot in [ORPHAN, "custom", "living", "sluice_of_a_user"] {
        shop.batch_execute(&format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')")).await.expect("a slot");
    }
    for slot in ["custom", "living"] {
        shop.batch_execute(&format!("CREATE PUBLICATION {slot}; COMMENT ON PUBLICATION {slot} IS 'sluice:{slot}'"))
            .await
            .expect("a publication");
    }
    // That of another database is for its own Source to tell.
    let other = postgres.create_database("other").await;
    let elsewhere = ORPHAN.replace("6f2d", "7f2d");
    other.batch_execute(&format!("SELECT pg_create_logical_replication_slot('{elsewhere}', 'pgoutput')")).await.expect("a slot");
    shop.batch_execute("SELECT pg_logical_emit_message(false, 'x', repeat('x', 1048576))").await.expect("log");

    let stage = Stage::set(Arc::new(Connector)).await;
    stage.secret("login", &[]).await;
    let mut mirror = mirror_document("m");
    mirror["spec"]["slotName"] = "living".into();
    stage.create::<Mirror>(mirror).await;
    stage.source("shop", json!({"host": "127.0.0.1", "port": postgres.port, "database": "shop"})).await;
    stage.reason("shop", "Available").await;
    let look = AtomicUsize::new(10);
    let names = async || {
        // Another way is looked at at once.
        let seconds = look.fetch_add(1, Ordering::SeqCst);
        stage.patch::<Source>("shop", json!({"spec": {"connectTimeoutSeconds": seconds}})).await;
        let mut names: Vec<_> = stage.status::<Source>("shop").await.orphaned_slots.into_iter().map(|slot| slot.name).collect();
        names.sort();
        names
    };
    eventually(30, "the orphans are listed", async || names().await == ["custom", ORPHAN]).await;
    let listed = stage.status::<Source>("shop").await.orphaned_slots;
    for slot in &listed {
        assert!(!slot.active && slot.retained_bytes.is_some_and(|bytes| bytes > 1 << 20), "{slot:?}");
    }
    eventually(20, "an event", || async { stage.events("shop").await.iter().any(|event| event.contains("SlotOrphaned")) }).await;
    // The statements are right.
    for slot in &listed {
        shop.batch_execute(&slot.cure).await.expect(&slot.cure);
    }
    eventually(30, "dropped slots are gone from the list", async || names().await.is_empty()).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_is_reported_once_and_looked_at_once() {
    let databases = Arc::new(FakeDatabases::default());
    let stage = Stage::set(databases.clone()).await;
    stage.secret("login", &[]).await;
    stage.source("shop", json!({"deletionProtection": true})).await;
    let status = stage.reason("shop", "Available").await;
    assert_eq!(status.observed_generation, Some(1));
    let protected = get(&status.conditions, kind::DELETION_PROTECTED).expect("the condition");
    assert_eq!((protected.status.as_str(), protected.reason.as_str()), ("False", "PolicyMissing"));
    eventually(10, "both events", || async { stage.events("shop").await == ["Available", "PolicyMissing"] }).await;

    // Another pass, woken by a label and seen by its generation, finds nothing new.
    let before = stage.status::<Source>("shop").await;
    stage.patch::<Source>("shop", json!({"spec": {"deletionProtection": false}})).await;
    eventually(10, "the next generation", || async { stage.status::<Source>("shop").await.observed_generation == Some(2) }).await;
    let after = stage.status::<Source>("shop").await;
    assert!(get(&after.conditions, kind::DELETION_PROTECTED).is_none());
    let since = |status: &ConnectionStatus| get(&status.conditions, kind::READY).map(|ready| ready.last_transition_time.clone());
    assert_eq!(since(&before), since(&after));
    assert_eq!(databases.asked.load(Ordering::SeqCst), 1, "the way to the database is the same");
    assert_eq!(stage.events("shop").await, ["Available", "PolicyMissing"]);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn protection_needs_a_policy_and_a_binding_that_denies() {
    let server = ApiServer::shared().await;
    let name = server.namespace("policy").await;
    let client = server.client().await;
    let mut options = options(&name, &name);
    options.deletion_policy_name.clone_from(&name);
    let keys = SigningKeys::new(SigningKey::generate().expect("a key"), None);
    let ctx = Context::new(client.clone(), options, Metrics::default(), Health::default(), keys).expect("a context");
    // A fresh one each time: an answer is remembered for a while.
    let in_force = async || connection::DeletionPolicy::default().is_in_force(&ctx).await;
    assert_eq!(in_force().await, Some(false));
    let policy: ValidatingAdmissionPolicy = serde_json::from_value(json!({"metadata": {"name": name}, "spec": {
        "matchConstraints": {"resourceRules": [{"apiGroups": ["sluice.dev"], "apiVersions": ["*"], "operations": ["DELETE"], "resources": ["sources"]}]},
        "validations": [{"expression": "true"}],
    }}))
    .expect("a policy");
    Api::all(client.clone()).create(&PostParams::default(), &policy).await.expect("created");
    assert_eq!(in_force().await, Some(false), "without a binding a policy does nothing");
    let bind = async |actions: &[&str]| {
        let binding: ValidatingAdmissionPolicyBinding =
            serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"policyName": name, "validationActions": actions}}))
                .expect("a binding");
        let api = Api::<ValidatingAdmissionPolicyBinding>::all(client.clone());
        let params = PatchParams::apply("tests").force();
        api.patch(&name, &params, &Patch::Apply(&binding)).await.expect("applied");
    };
    bind(&["Audit"]).await;
    assert_eq!(in_force().await, Some(false));
    bind(&["Deny", "Audit"]).await;
    assert_eq!(in_force().await, Some(true));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_said_and_goes_when_it_is_right() {
    let stage = Stage::set(Arc::new(FakeDatabases::default())).await;
    let wake = async |n: u32| stage.patch::<Source>("shop", json!({"metadata": {"annotations": {"wake": n.to_string()}}})).await;
    stage.source("shop", json!({"tls": {"mode": "VerifyFull", "caRef": {"name": "ca"}}})).await;
    let status = stage.reason("shop", "SecretNotFound").await;
    assert!(!is_true(&status.conditions, kind::STALLED) && is_true(&status.conditions, kind::RECONCILING), "it may be on its way");
    stage.secret("login", &[]).await;
    stage.secret("ca", &[]).await;
    wake(1).await;
    let status = stage.reason("shop", "SecretKeyMissing").await;
    assert_eq!(get(&status.conditions, kind::READY).map(|ready| ready.message.as_str()), Some("Secret ca has no key ca.crt"));
    stage.patch::<Secret>("ca", json!({"stringData": {"ca.crt": "CA"}})).await;
    wake(2).await;
    let status = stage.reason("shop", "Available").await;
    assert_eq!(status.system_identifier.as_deref(), Some("id of db"));

    // Out of reach is worked at, not stalled; another server is refused, and the first one is remembered.
    stage.patch::<Source>("shop", json!({"spec": {"host": "down"}})).await;
    let status = stage.reason("shop", "HostUnreachable").await;
    assert!(is_true(&status.conditions, kind::RECONCILING) && !is_true(&status.conditions, kind::STALLED));
    stage.patch::<Source>("shop", json!({"spec": {"host": "stranger"}})).await;
    let status = stage.reason("shop", "SystemIdentifierChanged").await;
    assert_eq!(status.system_identifier.as_deref(), Some("id of db"));
    assert!(is_true(&status.conditions, kind::STALLED));

    // Hands off, until told otherwise.
    stage.patch::<Source>("shop", json!({"metadata": {"annotations": {PAUSE_RECONCILIATION: "true"}}, "spec": {"host": "db"}})).await;
    eventually(10, "the pause shows", || async { is_true(&stage.status::<Source>("shop").await.conditions, kind::RECONCILIATION_PAUSED) })
        .await;
    stage.patch::<Source>("shop", json!({"metadata": {"annotations": {PAUSE_RECONCILIATION: null}}})).await;
    let status = stage.reason("shop", "Available").await;
    assert!(get(&status.conditions, kind::RECONCILIATION_PAUSED).is_none());
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_in_use_waits_for_its_mirrors() {
    let stage = Stage::set(Arc::new(FakeDatabases::default())).await;
    stage.secret("login", &[IN_USE_FINALIZER]).await;
    stage.create::<Mirror>(mirror_document("first")).await;
    stage.create::<Mirror>(mirror_document("second")).await;
    let mut shop = connection_document("Source", "shop", json!({}));
    shop["metadata"]["finalizers"] = json!([IN_USE_FINALIZER]);
    stage.create::<Source>(shop).await;
    // Its Target names the same Secret and is in use as well.
    let mut dw = connection_document("Target", "dw", json!({}));
    dw["metadata"]["finalizers"] = json!([IN_USE_FINALIZER]);
    stage.create::<Target>(dw).await;
    stage.reason("shop", "Available").await;

    stage.api::<Source>().delete("shop", &DeleteParams::default()).await.expect("deleted");
    stage.api::<Secret>().delete("login", &DeleteParams::default()).await.expect("deleted");
    eventually(10, "the deletion says whom it waits for", || async {
        let status = stage.status::<Source>("shop").await;
        get(&status.conditions, kind::RECONCILING).is_some_and(|why| why.reason == "Deleting" && why.message.ends_with("first, second"))
    })
    .await;
    assert!(is_true(&stage.status::<Source>("shop").await.conditions, kind::READY), "its Mirrors still need it");
    eventually(10, "an event", || async { stage.events("shop").await.contains(&"Deleting".to_owned()) }).await;

    stage.api::<Mirror>().delete("first", &DeleteParams::default()).await.expect("deleted");
    eventually(10, "one is left", || async {
        let status = stage.status::<Source>("shop").await;
        get(&status.conditions, kind::RECONCILING).is_some_and(|why| why.message.ends_with(": second"))
    })
    .await;
    stage.api::<Mirror>().delete("second", &DeleteParams::default()).await.expect("deleted");
    eventually(10, "the Source goes", || stage.is_gone::<Source>("shop")).await;

    // The Target is free too, though nobody deletes it; with the last of both goes the Secret.
    stage.patch::<Target>("dw", json!({"metadata": {"annotations": {"sluice.dev/look-again": "1"}}})).await;
    eventually(10, "the Target is free", || async { stage.api::<Target>().get("dw").await.expect("dw").finalizers().is_empty() }).await;
    eventually(10, "the Secret goes", || stage.is_gone::<Secret>("login")).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_that_is_no_longer_named_is_free() {
    let stage = Stage::set(Arc::new(FakeDatabases::default())).await;
    for name in ["login", "newer"] {
        stage.secret(name, &[IN_USE_FINALIZER]).await;
    }
    stage.create::<Mirror>(mirror_document("first")).await;
    let mut shop = connection_document("Source", "shop", json!({}));
    shop["metadata"]["finalizers"] = json!([IN_USE_FINALIZER]);
    stage.create::<Source>(shop).await;
    stage.reason("shop", "Available").await;
    stage.patch::<Source>("shop", json!({"spec": {"credentialsRef": {"name": "newer"}}})).await;
    eventually(10, "the old Secret is free", || async { stage.api::<Secret>().get("login").await.expect("login").finalizers().is_empty() })
        .await;
    assert_eq!(stage.api::<Secret>().get("newer").await.expect("newer").finalizers(), [IN_USE_FINALIZER]);
    stage.end().await;
}
