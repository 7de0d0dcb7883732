//! Bounds on the connections to the worker's port: how many there are and how long one may keep its place.

use axum::serve::Listener;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep};

/// Connections at a time: operator, API, Prometheus and probes need a few. On each, one request runs at a time.
const CONNECTIONS: usize = 64;
/// A connection on which nothing has been answered for so long is closed, whatever arrives on it. So it bounds the time
/// for a request's head and body, for reading an answer, and for an idle connection; longer than the usual minute between
/// two scrapes.
const WITHOUT_ANSWER: Duration = Duration::from_secs(75);

/// Accepts a bounded number of connections.
pub struct Connections {
    listener: TcpListener,
    places: Arc<Semaphore>,
    without_answer: Duration,
}

impl Connections {
    /// On a listening socket.
    #[must_use]
    pub fn new(listener: TcpListener) -> Self {
        Self { listener, places: Arc::new(Semaphore::new(CONNECTIONS)), without_answer: WITHOUT_ANSWER }
    }
}

impl Listener for Connections {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        let place = loop {
            match Arc::clone(&self.places).acquire_owned().await {
                Ok(place) => break place,
                // The semaphore is never closed.
                Err(_) => tokio::task::yield_now().await,
            }
        };
        let (stream, address) = Listener::accept(&mut self.listener).await;
        let connection =
            Connection { stream, deadline: Box::pin(sleep(self.without_answer)), without_answer: self.without_answer, _place: place };
        (connection, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that holds its place until it is dropped.
pub struct Connection {
    stream: TcpStream,
    deadline: Pin<Box<Sleep>>,
    without_answer: Duration,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    fn check_deadline(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.deadline.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check_deadline(context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check_deadline(context)?;
        let written = ready!(Pin::new(&mut self.stream).poll_write(context, bytes))?;
        let deadline = Instant::now() + self.without_answer;
        self.deadline.as_mut().reset(deadline);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    async fn server(connections: usize, without_answer: Duration) -> SocketAddr {
        let mut limited = Connections::new(TcpListener::bind("127.0.0.1:0").await.unwrap());
        limited.places = Arc::new(Semaphore::new(connections));
        limited.without_answer = without_answer;
        let address = limited.local_addr().unwrap();
        let router = axum::Router::new().route("/", axum::routing::get(|| async { "hello" }));
        tokio::spawn(axum::serve(limited, router).into_future());
        address
    }

    #[tokio::test]
    async fn a_client_that_trickles_is_cut_off() {
        let mut client = TcpStream::connect(server(8, Duration::from_millis(300)).await).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        let trickle = async {
            while client.write_all(b"a: b\r\n").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), trickle).await.expect("the connection is closed");
    }

    #[tokio::test]
    async fn further_connections_wait_for_a_place() {
        let address = server(1, Duration::from_millis(300)).await;
        let _idle = TcpStream::connect(address).await.unwrap();
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        let read = client.read_to_string(&mut answer);
        tokio::time::timeout(Duration::from_secs(10), read).await.expect("the idle one gives up its place").unwrap();
        assert!(answer.ends_with("hello"), "{answer}");
    }
}
