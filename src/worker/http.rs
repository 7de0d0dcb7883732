//! The worker's HTTP server.
//!
//! `/v1/…` is signed and answers `{"code", "message"}` when it refuses; probes and metrics are open and hold no names of
//! tables or hosts.

use super::board::Board;
use super::config::{Verdict, parse};
use super::connections::Connections;
use super::contract::{BODY_LIMIT, Desired, Phase, Status};
use super::metrics::{CONTENT_TYPE, Metrics};
use super::token::{self, Grant};
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequest as _, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use axum::{Json, Router};
use serde::Serialize;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

/// Bound for one request, its body included.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// A pushed document on its way to the event loop.
#[derive(Debug)]
pub struct Push {
    /// The document.
    pub desired: Desired,
    /// What has become of it.
    pub answer: oneshot::Sender<Pushed>,
}

/// What has become of a pushed document.
#[derive(Debug)]
pub enum Pushed {
    /// It was judged; `Take` and `Same`: it is in effect and stored.
    Judged(Verdict),
    /// It is in effect, but a crash would forget it.
    NotStored(String),
}

/// A refusal as it is sent.
#[derive(Debug, Serialize)]
struct Refusal {
    #[serde(skip)]
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl Refusal {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into() }
    }

    fn not_ready(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "NotReady", message)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, Json(self)).into_response()
    }
}

#[derive(Clone)]
struct Api {
    board: Arc<Board>,
    metrics: Arc<Metrics>,
    pushes: mpsc::Sender<Push>,
}

/// Serves until told to end, and then until running requests have been answered.
pub async fn serve(listener: TcpListener, board: Arc<Board>, pushes: mpsc::Sender<Push>, end: CancellationToken) {
    let metrics = Arc::new(Metrics::new(Arc::clone(&board)));
    let router = router(Api { board, metrics, pushes });
    let server = axum::serve(Connections::new(listener), router).with_graceful_shutdown(end.cancelled_owned());
    if let Err(error) = server.await {
        tracing::error!(%error, "the HTTP server ended");
    }
}

fn router(api: Api) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/desired", put(put_desired))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .fallback(async || Refusal::new(StatusCode::NOT_FOUND, "NotFound", "no such path"))
        .method_not_allowed_fallback(async || Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", "another method is needed"))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(from_fn(bounded))
        .with_state(api)
}

async fn bounded(request: Request, next: Next) -> Response {
    match tokio::time::timeout(REQUEST_LIMIT, next.run(request)).await {
        Ok(response) => response,
        Err(_) => Refusal::new(StatusCode::REQUEST_TIMEOUT, "Timeout", "the request took too long").into_response(),
    }
}

/// Checks the signature against the document in effect; until there is one nobody can be recognised.
fn authorize(api: &Api, headers: &HeaderMap) -> Result<Grant, Refusal> {
    let desired = api.board.desired().map_err(Refusal::not_ready)?;
    let unauthorized = |message: String| Refusal::new(StatusCode::UNAUTHORIZED, "Unauthorized", message);
    let token = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "))
        .ok_or_else(|| unauthorized("a bearer token is needed".to_owned()))?;
    token::verify(&desired, token).map_err(|error| unauthorized(error.to_string()))
}

fn check_body(grant: &Grant, body: &[u8]) -> Result<(), Refusal> {
    let refused = |error: token::TokenError| Refusal::new(StatusCode::UNAUTHORIZED, "Unauthorized", error.to_string());
    grant.check_body(body).map_err(refused)
}

/// The body's limit also holds while it is read; what is announced need not be read at all.
fn check_announced_size(headers: &HeaderMap) -> Result<(), Refusal> {
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    let announced: Option<usize> = announced.and_then(|text| text.parse().ok());
    match announced {
        Some(size) if size > BODY_LIMIT => {
            Err(Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "UnreadableBody", format!("the body is larger than {BODY_LIMIT} bytes")))
        }
        _ => Ok(()),
    }
}

async fn status(State(api): State<Api>, headers: HeaderMap) -> Result<Json<Status>, Refusal> {
    check_body(&authorize(&api, &headers)?, b"")?;
    let status = api.board.status().ok_or_else(|| Refusal::not_ready("no desired document is in effect"))?;
    Ok(Json(status))
}

async fn put_desired(State(api): State<Api>, request: Request) -> Result<StatusCode, Refusal> {
    let grant = authorize(&api, request.headers())?;
    check_announced_size(request.headers())?;
    let body =
        Bytes::from_request(request, &()).await.map_err(|error| Refusal::new(error.status(), "UnreadableBody", error.body_text()))?;
    check_body(&grant, &body)?;
    let desired = parse(&body).map_err(|error| Refusal::new(StatusCode::BAD_REQUEST, "InvalidDocument", error.to_string()))?;
    let ending = || Refusal::not_ready("the worker is ending");
    let (answer, pushed) = oneshot::channel();
    api.pushes.send(Push { desired, answer }).await.map_err(|_| ending())?;
    let conflict = |code, message: &str| Err(Refusal::new(StatusCode::CONFLICT, code, message));
    match pushed.await.map_err(|_| ending())? {
        Pushed::Judged(Verdict::Take | Verdict::Same) => Ok(StatusCode::NO_CONTENT),
        Pushed::Judged(Verdict::Older) => conflict("OlderGeneration", "a document of a higher generation is in effect"),
        Pushed::Judged(Verdict::Conflict) => conflict("SameGeneration", "another document of this generation is in effect"),
        Pushed::Judged(Verdict::OtherMirror) => conflict("OtherMirror", "this worker belongs to another Mirror"),
        Pushed::NotStored(why) => {
            Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "NotStored", format!("the document is in effect but not stored: {why}")))
        }
    }
}

/// The event loop turns. Databases have no say in it: an outage of theirs must restart no worker.
async fn livez(State(api): State<Api>) -> Result<&'static str, Refusal> {
    if api.board.is_alive() { Ok("ok") } else { Err(Refusal::not_ready("the event loop stands still")) }
}

/// A desired document is in effect and the worker does what it says: copy, stream, or rest when suspended. Not ready
/// while it starts or waits to try again; that takes no traffic away, since nothing is routed to a worker.
async fn readyz(State(api): State<Api>) -> Result<&'static str, Refusal> {
    match api.board.phase() {
        Some(Phase::Copying | Phase::CatchingUp | Phase::Streaming | Phase::Suspended) => Ok("ok"),
        Some(phase) => Err(Refusal::not_ready(format!("{phase:?}"))),
        None => Err(Refusal::not_ready("no desired document is in effect")),
    }
}

async fn metrics(State(api): State<Api>) -> Result<Response, Refusal> {
    let failed = |_| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "Metrics", "the metrics can't be written");
    let text = api.metrics.encode().map_err(failed)?;
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response())
}
