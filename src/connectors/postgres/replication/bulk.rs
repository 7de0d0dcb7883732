//! A plain SQL session on the thin client, for `COPY … TO STDOUT`. The server sends each row as a message of its own; here
//! their contents are put together into large pieces, without anything made or woken per row.

use super::wire::{Rows, Wire};
use crate::connectors::postgres::connect::{self, Transport};
use crate::connectors::postgres::endpoint::Endpoint;
use crate::connectors::postgres::errors::{ServerError, violation};
use crate::connectors::postgres::session;
use crate::engine::error::Result;
use bytes::{Buf, Bytes, BytesMut};

/// Size of the pieces, in bytes. A piece holds any part of a row: rows may be larger.
const PIECE: usize = 64 * 1024;
/// Tag and length of a message.
const HEADER: usize = 5;

/// A session that reads in bulk. A command that was given up half-way ends it.
pub(in crate::connectors::postgres) struct BulkSession {
    wire: Wire,
    /// Bytes that are still to come of the message that is being read.
    rest: usize,
}

impl BulkSession {
    /// Connects, logs in and fixes the session's settings, bounded by the endpoint's `connect_timeout`.
    pub async fn connect(endpoint: &Endpoint, application_name: &str) -> Result<Self> {
        let options = session::options(endpoint)?;
        let startup = [
            ("user", endpoint.username.as_str()),
            ("database", &endpoint.database),
            ("application_name", session::application_name(endpoint, application_name)),
            ("options", &options),
        ];
        let wire = connect::within(endpoint.connect_timeout, endpoint, async {
            let transport = Transport::open(endpoint).await?;
            Wire::login(transport, endpoint, &startup).await
        })
        .await?;
        Ok(Self { wire, rest: 0 })
    }

    /// Runs statements, without a bound of its own. The inner error is the server's refusal.
    pub async fn run(&mut self, sql: &str) -> Result<Result<Rows, ServerError>> {
        self.wire.run(sql).await
    }

    /// Begins a `COPY … TO STDOUT`; [`Self::piece`] gives what it sends. `what` names it in messages of errors.
    pub async fn copy_out(&mut self, what: &str, sql: &str) -> Result<()> {
        self.wire.begin_command(what, sql).await?;
        let message = self.wire.message().await?;
        match message.tag {
            // CopyOutResponse
            b'H' => Ok(()),
            b'E' => Err(self.wire.server_error(&message.body)),
            tag => Err(self.wire.unexpected(tag)),
        }
    }

    /// The next piece of the copy; `None` at its end. Waiting has no limit of its own: the server may search long for the
    /// next row, and a peer that is gone is noticed by the socket's keepalive.
    pub async fn piece(&mut self) -> Result<Option<Bytes>> {
        let mut piece = BytesMut::with_capacity(PIECE);
        while piece.len() < PIECE && (self.rest > 0 || self.next_row().await?) {
            if self.wire.received().is_empty() {
                self.wire.receive(PIECE).await?;
            }
            let received = self.wire.received();
            let length = self.rest.min(received.len()).min(PIECE - piece.len());
            piece.extend_from_slice(&received[..length]);
            received.advance(length);
            self.rest -= length;
        }
        if piece.is_empty() {
            return self.finish().await.map(|()| None);
        }
        Ok(Some(piece.freeze()))
    }

    /// Reads up to the contents of the next message with data; `false` when another one comes first.
    async fn next_row(&mut self) -> Result<bool> {
        loop {
            while self.wire.received().len() < HEADER {
                self.wire.receive(PIECE).await?;
            }
            let received = self.wire.received();
            match received[0] {
                b'd' => {
                    received.advance(1);
                    // The length counts itself.
                    self.rest = (received.get_u32() as usize).checked_sub(4).ok_or_else(|| violation("a message of less than 4 bytes"))?;
                    if self.rest > 0 {
                        return Ok(true);
                    }
                }
                // A notice, a notification or a parameter's new value may come at any time.
                b'N' | b'A' | b'S' => drop(self.wire.any_message().await?),
                _ => return Ok(false),
            }
        }
    }

    /// Reads what follows the data until the server is ready.
    async fn finish(&mut self) -> Result<()> {
        let mut failure = None;
        loop {
            let message = self.wire.message().await?;
            match message.tag {
                // CopyDone, CommandComplete.
                b'c' | b'C' => {}
                b'E' => failure = Some(self.wire.server_error(&message.body)),
                b'Z' => break,
                tag => return Err(self.wire.unexpected(tag)),
            }
        }
        self.wire.end_command();
        failure.map_or(Ok(()), Err)
    }
}
