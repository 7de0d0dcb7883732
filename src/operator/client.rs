//! The client of the API server. Two layers around kube's own: every request has a deadline and is counted, and a
//! watch can note when it last heard from the server.
//!
//! kube 5 has no read timeout of its own, and its watcher swallows bookmarks; both can only be seen here.

use super::metrics::Metrics;
use axum::body::{Body as AnyBody, Bytes, HttpBody};
use axum::http::{Request, Response};
use futures::future::BoxFuture;
use futures::{Stream, StreamExt as _, stream};
use kube::client::{Body, ClientBuilder};
use kube::{Client, Config};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, timeout_at};
use tower::{BoxError, Layer, Service};

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Longest time for a request, retries on overload and the body of the answer included.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// The same for a list, which may hold ten thousand objects.
const LIST_DEADLINE: Duration = Duration::from_secs(60);

/// A client whose every request has a deadline and is counted.
///
/// # Errors
/// When TLS or the credentials of `config` cannot be used.
pub fn client(mut config: Config, metrics: &Metrics) -> kube::Result<Client> {
    config.connect_timeout = Some(CONNECT);
    Ok(ClientBuilder::try_from(config)?.with_layer(&Deadlines { metrics: metrics.clone() }).build())
}

/// A client whose answers call `heard` for each head and each piece of a body: for one watch.
pub fn listening(client: &Client, heard: Arc<dyn Fn() + Send + Sync>) -> Client {
    Client::new(Listening { client: client.clone(), heard }, client.default_namespace())
}

/// Bounds and counts requests.
struct Deadlines {
    metrics: Metrics,
}

struct WithDeadline<S> {
    inner: S,
    metrics: Metrics,
}

impl<S> Layer<S> for Deadlines {
    type Service = WithDeadline<S>;
    fn layer(&self, inner: S) -> Self::Service {
        WithDeadline { inner, metrics: self.metrics.clone() }
    }
}

impl<S, B> Service<Request<Body>> for WithDeadline<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<AnyBody>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let metrics = self.metrics.clone();
        // kube's Api names what it does in an extension of the request.
        let verb = request.extensions().get::<&'static str>().copied().unwrap_or("other");
        let resource = resource_of(request.uri().path()).to_owned();
        let watches = verb.starts_with("watch");
        let deadline = Instant::now() + if verb.starts_with("list") { LIST_DEADLINE } else { DEADLINE };
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = match timeout_at(deadline, answer).await {
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
            let (head, body) = answer.into_parts();
            // A watch's body ends with the watch; kube bounds its silence itself.
            let body =
                if watches { AnyBody::new(body) } else { AnyBody::from_stream(until(deadline, AnyBody::new(body).into_data_stream())) };
            Ok(Response::from_parts(head, body))
        })
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
    use super::{resource_of, until};
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
}
