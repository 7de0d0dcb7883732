//! The byte stream under a session: TCP with bounds on silence, and TLS on top where it is wanted.

use super::blocking::BlockingTransport;
use super::tls;
use crate::connectors::postgres::endpoint::{Endpoint, TlsMode};
use crate::engine::error::{Error, Result, reason};
use bytes::BytesMut;
use postgres_protocol::message::frontend;
use rustls::pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use std::future::{Ready, ready};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};

/// A peer that is gone without a word is noticed within this time, whether we are waiting for it (keepalive) or it owes us
/// an acknowledgement (user timeout).
const SILENCE: Duration = Duration::from_secs(30);
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_RETRIES: u32 = 4;

/// A connected socket after TLS negotiation.
pub enum Transport {
    /// No TLS: not wanted, or not offered in mode Prefer.
    Plain(TcpStream),
    /// TLS.
    Tls(Box<tokio_rustls::client::TlsStream<TcpStream>>),
}

impl Transport {
    /// Connects and negotiates TLS. The caller bounds the time.
    pub async fn open(endpoint: &Endpoint) -> Result<Self> {
        // Bad certificates are found before anything is sent.
        let config = tls::client_config(endpoint)?;
        let mut socket = dial(endpoint).await?;
        let Some(config) = config else {
            return Ok(Self::Plain(socket));
        };
        let offered = ask_for_tls(&mut socket).await.map_err(|error| unreachable(endpoint, error))?;
        match offered {
            true => {
                let failed = |error: &dyn std::fmt::Display| failed(endpoint, error);
                let name = ServerName::try_from(endpoint.host.clone()).map_err(|error| failed(&error))?;
                let handshake = tokio_rustls::TlsConnector::from(config).connect(name, socket).await;
                handshake.map(|stream| Self::Tls(Box::new(stream))).map_err(|error| handshake_failed(endpoint, &error))
            }
            false if endpoint.tls == TlsMode::Prefer => Ok(Self::Plain(socket)),
            false => Err(failed(endpoint, &"the server does not offer TLS")),
        }
    }

    /// Whether what is sent is encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    /// `tls-server-end-point` (RFC 5929) for SCRAM-SHA-256-PLUS; `None` without TLS or for a signature without a hash.
    #[must_use]
    pub fn end_point(&self) -> Option<Vec<u8>> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(stream) => tls::end_point(stream.get_ref().1.peer_certificates()?.first()?),
        }
    }

    /// Takes the socket out of the runtime, for a thread that reads and writes with these bounds.
    pub fn into_blocking(self, read_timeout: Duration, write_timeout: Duration) -> io::Result<BlockingTransport> {
        let blocking = |socket: TcpStream| {
            let socket = socket.into_std()?;
            socket.set_nonblocking(false)?;
            socket.set_read_timeout(Some(read_timeout))?;
            socket.set_write_timeout(Some(write_timeout))?;
            Ok::<_, io::Error>(socket)
        };
        match self {
            Self::Plain(socket) => blocking(socket).map(BlockingTransport::plain),
            Self::Tls(stream) => {
                let (socket, session) = stream.into_inner();
                blocking(socket).map(|socket| BlockingTransport::tls(session, socket))
            }
        }
    }
}

impl AsyncRead for Transport {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Transport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

impl TlsStream for Transport {
    fn channel_binding(&self) -> ChannelBinding {
        self.end_point().map_or_else(ChannelBinding::none, ChannelBinding::tls_server_end_point)
    }
}

/// Tells the driver that the transport has negotiated TLS already.
pub(super) struct Negotiated;

impl TlsConnect<Transport> for Negotiated {
    type Stream = Transport;
    type Error = io::Error;
    type Future = Ready<io::Result<Transport>>;

    fn connect(self, stream: Transport) -> Self::Future {
        ready(Ok(stream))
    }
}

/// Host or port can't be reached now.
pub(super) fn unreachable(endpoint: &Endpoint, why: impl std::fmt::Display) -> Error {
    Error::retry(reason::HOST_UNREACHABLE, format!("{}:{}: {why}", endpoint.host, endpoint.port))
}

fn failed(endpoint: &Endpoint, why: &dyn std::fmt::Display) -> Error {
    Error::stop(reason::TLS_FAILED, format!("{}:{}: {why}", endpoint.host, endpoint.port))
}

/// A handshake that ends because the network does may pass; one that ends because the sides don't agree does not.
fn handshake_failed(endpoint: &Endpoint, error: &io::Error) -> Error {
    let disagreed = matches!(error.get_ref(), Some(cause) if cause.is::<rustls::Error>());
    if disagreed { failed(endpoint, error) } else { unreachable(endpoint, format!("TLS handshake: {error}")) }
}

/// The first address of the host that answers, in the resolver's order; each gets its share of the time.
async fn dial(endpoint: &Endpoint) -> Result<TcpStream> {
    let addresses = look_up(endpoint).await.map_err(|error| unreachable(endpoint, error))?;
    let share = endpoint.connect_timeout / u32::try_from(addresses.len().max(1)).unwrap_or(u32::MAX);
    let mut last = unreachable(endpoint, "the name has no address");
    for address in addresses {
        match tokio::time::timeout(share, TcpStream::connect(address)).await {
            Ok(Ok(socket)) => {
                bound_silence(&socket).map_err(|error| unreachable(endpoint, error))?;
                return Ok(socket);
            }
            Ok(Err(error)) => last = unreachable(endpoint, format!("{address}: {error}")),
            Err(_) => last = unreachable(endpoint, format!("{address}: no answer within {share:?}")),
        }
    }
    Err(last)
}

async fn look_up(endpoint: &Endpoint) -> io::Result<Vec<SocketAddr>> {
    let Endpoint { host, port, domain, .. } = endpoint;
    if let Some(domain) = domain.as_ref().filter(|_| !host.contains(['.', ':']))
        && let Ok(addresses) = tokio::net::lookup_host((format!("{host}.{domain}").as_str(), *port)).await
    {
        return Ok(addresses.collect());
    }
    Ok(tokio::net::lookup_host((host.as_str(), *port)).await?.collect())
}

fn bound_silence(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL).with_retries(KEEPALIVE_RETRIES);
    let socket = SockRef::from(socket);
    socket.set_tcp_keepalive(&keepalive)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(SILENCE))?;
    Ok(())
}

/// Sends an SSLRequest; `true` when the server goes on with TLS. Exactly one byte is read, so that nothing sent in clear
/// can be taken for a part of the encrypted stream.
async fn ask_for_tls(socket: &mut TcpStream) -> io::Result<bool> {
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    socket.write_all(&request).await?;
    match socket.read_u8().await? {
        b'S' => Ok(true),
        b'N' => Ok(false),
        other => Err(io::Error::new(io::ErrorKind::InvalidData, format!("not a PostgreSQL server: it answers {other:#04x}"))),
    }
}
