//! The client of the API server. Two layers around kube's own: every request has a deadline and is counted, all writes together keep a
//! pace, and a watch can note when it last heard from the server.
//!
//! kube 5 has no read timeout of its own, and its watcher swallows bookmarks; both can only be seen here.

use super::metrics::Metrics;
use axum::body::{Body as AnyBody, Bytes};
use axum::http::{Request, Response};
use futures::future::BoxFuture;
use futures::{Stream, StreamExt as _, stream};
use kube::client::Body;
use kube::{Client, Config};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, timeout_at};
use tower::{BoxError, Service};

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Longest time for a request, retries on overload and the body of the answer included.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// The same for a list, which may hold ten thousand objects.
const LIST_DEADLINE: Duration = Duration::from_secs(60);

/// Writes a second, all controllers together: a restart with ten thousand Mirrors must not push others off the API server.
const WRITES_PER_SECOND: f64 = 100.0;
/// Writes that may come at once after a quiet time.
const BURST: u32 = 400;

/// A client whose every request has a deadline and is counted, and whose writes keep a pace.
///
/// # Errors
/// When TLS or the credentials of `config` cannot be used.
pub fn client(mut config: Config, metrics: &Metrics) -> kube::Result<Client> {
    config.connect_timeout = Some(CONNECT);
    let client = Client::try_from(config)?;
    let namespace = client.default_namespace().to_owned();
    Ok(Client::new(Bounded { client, metrics: metrics.clone(), pace: Arc::default() }, namespace))
}

/// A client whose answers call `heard` for each head and each piece of a body: for one watch.
pub fn listening(client: &Client, heard: Arc<dyn Fn() + Send + Sync>) -> Client {
    Client::new(Listening { client: client.clone(), heard }, client.default_namespace())
}

/// Paces writes, bounds and counts requests.
struct Bounded {
    client: Client,
    metrics: Metrics,
    pace: Arc<Pace>,
}

impl Service<Request<Body>> for Bounded {
    type Response = Response<AnyBody>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (client, metrics, pace) = (self.client.clone(), self.metrics.clone(), self.pace.clone());
        Box::pin(async move {
            // kube's Api names what it does in an extension of the request.
            let verb = request.extensions().get::<&'static str>().copied().unwrap_or("other");
            let resource = resource_of(request.uri().path()).to_owned();
            if is_paced(verb, &resource) {
                tokio::time::sleep_until(pace.next(Instant::now())).await;
            }
            let deadline = Instant::now() + if verb.starts_with("list") { LIST_DEADLINE } else { DEADLINE };
            let answer = match timeout_at(deadline, client.send(request)).await {
                Ok(Ok(answer)) => answer,
                Ok(Err(error)) => {
                    metrics.api_request(verb, &resource, 0);
                    return Err(error.into());
                }
                Err(_) => {
                    metrics.api_request(verb, &resource, 0);
                    return Err(format!("{verb} {resource}: the API server did not answer in time").into());
                }
            };
            metrics.api_request(verb, &resource, answer.status().as_u16());
            // A watch's body ends with the watch; kube bounds its silence itself.
            if verb.starts_with("watch") {
                return Ok(answer.map(AnyBody::new));
            }
            Ok(answer.map(|body| AnyBody::from_stream(until(deadline, AnyBody::new(body).into_data_stream()))))
        })
    }
}

/// Reads are not held back, nor is what the operator itself depends on.
fn is_paced(verb: &str, resource: &str) -> bool {
    let reads = ["get", "list", "watch", "other"].iter().any(|read| verb.starts_with(read));
    !reads && !matches!(resource, "leases" | "selfsubjectaccessreviews")
}

/// Gives each write its time: [`WRITES_PER_SECOND`], after at most [`BURST`] at once (generic cell rate algorithm).
#[derive(Default)]
struct Pace {
    /// When the allowance is full again.
    full: Mutex<Option<Instant>>,
}

impl Pace {
    /// When the write that asks at `now` may go.
    fn next(&self, now: Instant) -> Instant {
        let one = Duration::from_secs_f64(1.0 / WRITES_PER_SECOND);
        let mut full = self.full.lock().unwrap_or_else(PoisonError::into_inner);
        let before = full.unwrap_or(now).max(now);
        *full = Some(before + one);
        now.max(before.checked_sub(one * (BURST - 1)).unwrap_or(now))
    }
}

/// The stream, or an error once `deadline` has passed.
fn until<T, E: Into<BoxError>>(
    deadline: Instant,
    stream: impl Stream<Item = Result<T, E>> + Unpin,
) -> impl Stream<Item = Result<T, BoxError>> {
    stream::unfold(Some(stream), move |stream| async move {
        let mut stream = stream?;
        match timeout_at(deadline, stream.next()).await {
            Ok(Some(Ok(item))) => Some((Ok(item), Some(stream))),
            Ok(Some(Err(error))) => Some((Err(error.into()), None)),
            Ok(None) => None,
            Err(_) => Some((Err("the API server's answer did not end in time".into()), None)),
        }
    })
}

/// The plural in a path of the API: `pods` of `/api/v1/namespaces/shop/pods/worker`.
fn resource_of(path: &str) -> &str {
    let mut parts = path.trim_start_matches('/').split('/');
    let versions = match parts.next() {
        Some("api") => 1,
        Some("apis") => 2,
        _ => return "other",
    };
    let rest: Vec<_> = parts.skip(versions).collect();
    match rest.as_slice() {
        ["namespaces", _, resource, ..] | [resource, ..] => resource,
        [] => "other",
    }
}

/// A client that tells when it hears from the server.
struct Listening {
    client: Client,
    heard: Arc<dyn Fn() + Send + Sync>,
}

impl Service<Request<Body>> for Listening {
    type Response = Response<AnyBody>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (client, heard) = (self.client.clone(), self.heard.clone());
        Box::pin(async move {
            let answer = client.send(request).await?;
            if !answer.status().is_success() {
                return Ok(answer.map(AnyBody::new));
            }
            heard();
            let piece_heard = move |piece: &Result<Bytes, _>| {
                if piece.is_ok() {
                    heard();
                }
            };
            Ok(answer.map(|body| AnyBody::from_stream(AnyBody::new(body).into_data_stream().inspect(piece_heard))))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{BURST, Pace, WRITES_PER_SECOND, is_paced, resource_of, until};
    use futures::{StreamExt as _, stream};
    use std::time::Duration;
    use tokio::time::Instant;

    #[test]
    fn the_resource_is_found_in_paths() {
        for (path, resource) in [
            ("/api/v1/namespaces/shop/pods/worker", "pods"),
            ("/api/v1/pods", "pods"),
            ("/apis/sluice.dev/v1alpha1/mirrors", "mirrors"),
            ("/apis/sluice.dev/v1alpha1/namespaces/shop/mirrors/m/status", "mirrors"),
            ("/api/v1/namespaces/shop", "namespaces"),
            ("/version", "other"),
            ("/apis/apps/v1/namespaces/a/deployments", "deployments"),
        ] {
            assert_eq!(resource_of(path), resource, "{path}");
        }
    }

    #[tokio::test]
    async fn a_body_that_stalls_ends_with_an_error() {
        tokio::time::pause();
        let stalls = stream::iter([Ok::<_, std::io::Error>(1)]).chain(stream::pending()).boxed();
        let items: Vec<_> = until(Instant::now() + Duration::from_secs(10), stalls).collect().await;
        assert!(items.len() == 2 && items[0].is_ok() && items[1].is_err());
    }

    #[test]
    fn a_burst_goes_at_once_and_the_rest_at_the_pace() {
        let (pace, now) = (Pace::default(), Instant::now());
        let times: Vec<_> = (0..BURST + 100).map(|_| pace.next(now).duration_since(now).as_secs_f64()).collect();
        assert!(times[..BURST as usize].iter().all(|time| *time < 0.001), "{times:?}");
        let last = times[times.len() - 1];
        assert!((last - 100.0 / WRITES_PER_SECOND).abs() < 0.01, "{last}");
        let later = now + Duration::from_secs(3600);
        assert_eq!(pace.next(later), later, "a quiet time restores the allowance");
    }

    #[test]
    fn reads_and_the_lease_are_not_held_back() {
        for (verb, resource, paced) in [
            ("get", "pods", false),
            ("list", "pods", false),
            ("watch", "pods", false),
            ("patch", "mirrors", true),
            ("patch_status", "mirrors", true),
            ("create", "events", true),
            ("delete", "deployments", true),
            ("replace", "leases", false),
        ] {
            assert_eq!(is_paced(verb, resource), paced, "{verb} {resource}");
        }
    }
}
