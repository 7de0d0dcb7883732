//! Sessions with a server: the socket, TLS, login and settings.
//!
//! Invariant: every step towards a session is bounded by the endpoint's `connect_timeout`, and a session's socket never
//! outlives it.

mod blocking;
mod statement;
mod tls;
mod transport;

use super::endpoint::Endpoint;
use super::{errors, session};
use crate::engine::error::{Error, Result};
pub use blocking::BlockingTransport;
pub use statement::{Parameter, Parameters, in_order};
use std::future::Future;
use std::ops::{Deref, DerefMut};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_postgres::config::{SslMode, SslNegotiation};
pub use transport::Transport;

/// Which end of a stream a server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Read from.
    Source,
    /// Written to.
    Target,
}

/// An SQL session. Use it as [`tokio_postgres::Client`]; when it is dropped its socket closes at once, whatever runs on it.
pub struct Session {
    client: tokio_postgres::Client,
    connection: JoinHandle<()>,
    endpoint: Endpoint,
}

impl Session {
    /// Asks the server to cancel the running statement, over a connection of its own. Bounded by the connect timeout. The
    /// statement itself then fails with SQLSTATE 57014.
    pub async fn cancel(&self) -> Result<()> {
        let token = self.client.cancel_token();
        within(self.endpoint.connect_timeout, &self.endpoint, async {
            let transport = Transport::open(&self.endpoint).await?;
            let sent = token.cancel_query_raw(transport, transport::Negotiated).await;
            sent.map_err(|error| transport::unreachable(&self.endpoint, format!("cancel request: {error}")))
        })
        .await
    }
}

impl Deref for Session {
    type Target = tokio_postgres::Client;

    fn deref(&self) -> &Self::Target {
        &self.client
    }
}

impl DerefMut for Session {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.client
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Connects, logs in and fixes the session's settings.
pub async fn connect(endpoint: &Endpoint, side: Side, application_name: &str) -> Result<Session> {
    let mut config = tokio_postgres::Config::new();
    config
        .user(&endpoint.username)
        .password(&endpoint.password.0)
        .dbname(&endpoint.database)
        .options(session::options(endpoint)?)
        .application_name(session::application_name(endpoint, application_name))
        // The transport has dealt with TLS when the driver gets it; this makes the driver ask it for the channel binding.
        .ssl_mode(SslMode::Require)
        .ssl_negotiation(SslNegotiation::Direct);
    within(endpoint.connect_timeout, endpoint, async {
        let transport = Transport::open(endpoint).await?;
        let login = config.connect_raw(transport, transport::Negotiated).await;
        let (client, connection) = login.map_err(|error| errors::classify_login(side, endpoint, &error))?;
        let connection = tokio::spawn(async move {
            // The statement that fails reports the failure; this one only says when it was.
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection ended");
            }
        });
        Ok(Session { client, connection, endpoint: endpoint.clone() })
    })
    .await
}

/// Bounds all steps towards a session together.
pub(super) async fn within<T>(limit: Duration, endpoint: &Endpoint, steps: impl Future<Output = Result<T>>) -> Result<T, Error> {
    match tokio::time::timeout(limit, steps).await {
        Ok(done) => done,
        Err(_) => Err(transport::unreachable(endpoint, format!("no session within {limit:?}"))),
    }
}
