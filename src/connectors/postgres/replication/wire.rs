//! Messages of a walsender session: login, simple queries, the switch to streaming.
//! (Manual: "Message Flow" and "Message Formats".)

use super::cursor::Cursor;
use super::{CopyBoth, encode, query_message};
use crate::connectors::postgres::connect::{Side, Transport};
use crate::connectors::postgres::endpoint::Endpoint;
use crate::connectors::postgres::errors::{self, ServerError, violation};
use crate::engine::error::{Error, Result, reason};
use bytes::{Buf, BytesMut};
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256};
use postgres_protocol::message::frontend;
use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Longest message in command mode. Longer ones are a sign that something else than a PostgreSQL server answers.
const LONGEST_MESSAGE: usize = 16 * 1024 * 1024;
/// Bytes of tag and length before each message.
const HEADER: usize = 5;

/// The rows of an answer, as text.
pub(super) type Rows = Vec<Vec<Option<String>>>;

/// A message: its tag and what follows the length.
pub(super) struct Message {
    pub tag: u8,
    pub body: BytesMut,
}

/// The messages of one session.
pub(super) struct Wire {
    transport: Transport,
    received: BytesMut,
    /// What is done now, for messages of errors.
    doing: String,
    /// A command was sent whose answer has not been read to its end.
    busy: bool,
    backend: Backend,
    server_version: String,
}

/// Names a backend in a cancel request.
#[derive(Clone, Copy, Default)]
pub(super) struct Backend {
    process: i32,
    secret: i32,
}

impl Wire {
    /// Sends the startup message and logs in. The caller bounds the time.
    pub(super) async fn login(transport: Transport, endpoint: &Endpoint, startup: &[(&str, &str)]) -> Result<Self> {
        let mut wire = Self {
            transport,
            received: BytesMut::with_capacity(8 * 1024),
            doing: errors::login(endpoint),
            busy: false,
            backend: Backend::default(),
            server_version: String::new(),
        };
        wire.send(encode(|message| frontend::startup_message(startup.iter().copied(), message))?).await?;
        wire.authenticate(endpoint).await?;
        wire.settle().await?;
        Ok(wire)
    }

    pub(super) fn backend(&self) -> Backend {
        self.backend
    }

    /// From `15.6 (Debian 15.6-1)`, `17beta2`; 0 when the server does not say.
    pub(super) fn major(&self) -> u32 {
        let digits = self.server_version.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.server_version.len());
        self.server_version[..digits].parse().unwrap_or(0)
    }

    /// Runs one simple query and reads its answer to the end.
    pub(super) async fn query(&mut self, sql: &str) -> Result<Rows> {
        self.run(sql).await?.map_err(|error| errors::classify_server(Side::Source, sql, &error))
    }

    /// The same; the server's refusal as it was sent.
    pub(super) async fn run(&mut self, sql: &str) -> Result<Result<Rows, ServerError>> {
        self.begin_command(sql, sql).await?;
        let mut rows = Vec::new();
        let mut failure = None;
        loop {
            let message = self.message().await?;
            match message.tag {
                b'D' => rows.push(data_row(&message.body)?),
                b'E' => failure = Some(server_error(&message.body)),
                // Row description, command complete, empty query.
                b'T' | b'C' | b'I' => {}
                b'Z' => break,
                tag => return Err(self.unexpected(tag)),
            }
        }
        self.end_command();
        Ok(failure.map_or(Ok(rows), Err))
    }

    /// Runs a command that turns the session into a stream.
    pub(super) async fn start_copy(&mut self, command: &str) -> Result<()> {
        self.begin_command(command, command).await?;
        let message = self.message().await?;
        match message.tag {
            // CopyBothResponse
            b'W' => Ok(()),
            b'E' => Err(self.server_error(&message.body)),
            tag => Err(self.unexpected(tag)),
        }
    }

    pub(super) fn into_copy(self) -> CopyBoth {
        CopyBoth { transport: self.transport, received: self.received }
    }

    /// Sends a command; `what` names it in messages of errors.
    pub(super) async fn begin_command(&mut self, what: &str, sql: &str) -> Result<()> {
        if std::mem::replace(&mut self.busy, true) {
            return Err(errors::lost(Side::Source, what, "an earlier command on this session was given up"));
        }
        what.clone_into(&mut self.doing);
        self.send(query_message(sql)?).await
    }

    async fn authenticate(&mut self, endpoint: &Endpoint) -> Result<()> {
        let refused = |why: &str| Error::stop(reason::AUTHENTICATION_FAILED, format!("{}: {why}", errors::login(endpoint)));
        let password = endpoint.password.0.as_bytes();
        loop {
            let body = self.authentication_message().await?;
            let mut body = Cursor::new(&body);
            match body.i32()? {
                0 => return Ok(()),
                3 if self.transport.is_encrypted() => self.send_password(password).await?,
                3 => return Err(refused("the server wants the password in clear over a connection without TLS")),
                5 => {
                    let salt = body.take(4)?.try_into().map_err(|_| violation("a salt of 4 bytes"))?;
                    let hash = md5_hash(endpoint.username.as_bytes(), password, salt);
                    self.send_password(hash.as_bytes()).await?;
                }
                10 => self.scram(password, body, &refused).await?,
                method => return Err(refused(&format!("the server wants authentication method {method}, which is not supported"))),
            }
        }
    }

    async fn send_password(&mut self, password: &[u8]) -> Result<()> {
        self.send(encode(|message| frontend::password_message(password, message))?).await
    }

    /// SCRAM-SHA-256, with channel binding when both ends can (RFC 5802, RFC 7677).
    async fn scram(&mut self, password: &[u8], mut offered: Cursor<'_>, refused: &(dyn Fn(&str) -> Error + Sync)) -> Result<()> {
        let (mut plain, mut bound) = (false, false);
        while offered.len() > 1 {
            match offered.text()? {
                SCRAM_SHA_256 => plain = true,
                SCRAM_SHA_256_PLUS => bound = true,
                _ => {}
            }
        }
        let (mechanism, binding) = match self.transport.end_point() {
            Some(end_point) if bound => (SCRAM_SHA_256_PLUS, ChannelBinding::tls_server_end_point(end_point)),
            // Tells the server that we could: when it could too, somebody between has cut its offer.
            Some(_) if plain => (SCRAM_SHA_256, ChannelBinding::unrequested()),
            None if plain => (SCRAM_SHA_256, ChannelBinding::unsupported()),
            _ => return Err(refused("the server offers no SASL mechanism that is supported (SCRAM-SHA-256)")),
        };
        let mut scram = ScramSha256::new(password, binding);
        self.send(encode(|message| frontend::sasl_initial_response(mechanism, scram.message(), message))?).await?;
        let challenge = self.sasl_message(11).await?;
        scram.update(&challenge).map_err(|error| refused(&error.to_string()))?;
        self.send(encode(|message| frontend::sasl_response(scram.message(), message))?).await?;
        let outcome = self.sasl_message(12).await?;
        // The server proves that it knows the password.
        scram.finish(&outcome).map_err(|error| refused(&error.to_string()))
    }

    async fn sasl_message(&mut self, expected: i32) -> Result<Vec<u8>> {
        let body = self.authentication_message().await?;
        let mut body = Cursor::new(&body);
        match body.i32()? {
            code if code == expected => Ok(body.rest().to_vec()),
            code => Err(violation(format!("{}: authentication message {code} instead of {expected}", self.doing))),
        }
    }

    async fn authentication_message(&mut self) -> Result<BytesMut> {
        let message = self.message().await?;
        match message.tag {
            b'R' => Ok(message.body),
            b'E' => Err(self.server_error(&message.body)),
            tag => Err(self.unexpected(tag)),
        }
    }

    /// Reads what follows a login until the server is ready.
    async fn settle(&mut self) -> Result<()> {
        loop {
            let message = self.message().await?;
            match message.tag {
                b'K' => {
                    let mut body = Cursor::new(&message.body);
                    self.backend = Backend { process: body.i32()?, secret: body.i32()? };
                }
                b'Z' => return Ok(()),
                b'E' => return Err(self.server_error(&message.body)),
                tag => return Err(self.unexpected(tag)),
            }
        }
    }

    /// The next message that is not a notice, a notification or a parameter's new value.
    pub(super) async fn message(&mut self) -> Result<Message> {
        loop {
            let message = self.any_message().await?;
            match message.tag {
                b'N' | b'A' => {}
                b'S' => self.note_parameter(&message.body)?,
                _ => return Ok(message),
            }
        }
    }

    /// The next message, whatever it is.
    pub(super) async fn any_message(&mut self) -> Result<Message> {
        self.fill(HEADER).await?;
        let length = Cursor::new(&self.received[1..HEADER]).u32()? as usize;
        if !(4..=LONGEST_MESSAGE).contains(&length) {
            return Err(violation(format!("{}: a message of {length} bytes", self.doing)));
        }
        self.fill(1 + length).await?;
        let mut body = self.received.split_to(1 + length);
        let tag = body[0];
        body.advance(HEADER);
        Ok(Message { tag, body })
    }

    /// Receives until at least `length` bytes are there.
    async fn fill(&mut self, length: usize) -> Result<()> {
        while self.received.len() < length {
            match self.transport.read_buf(&mut self.received).await {
                Ok(0) => return Err(self.lost(&io::ErrorKind::UnexpectedEof.into())),
                Ok(_) => {}
                Err(error) => return Err(self.lost(&error)),
            }
        }
        Ok(())
    }

    /// The answer to the running command has been read to its end.
    pub(super) fn end_command(&mut self) {
        self.busy = false;
    }

    /// What was received and not read yet.
    pub(super) fn received(&mut self) -> &mut BytesMut {
        &mut self.received
    }

    /// Receives at least one more byte, with room for `room` at a time.
    pub(super) async fn receive(&mut self, room: usize) -> Result<()> {
        self.received.reserve(room);
        self.fill(self.received.len() + 1).await
    }

    async fn send(&mut self, message: BytesMut) -> Result<()> {
        let sent = async {
            self.transport.write_all(&message).await?;
            self.transport.flush().await
        };
        sent.await.map_err(|error| self.lost(&error))
    }

    fn note_parameter(&mut self, body: &[u8]) -> Result<()> {
        let mut body = Cursor::new(body);
        if body.text()? == "server_version" {
            body.text()?.clone_into(&mut self.server_version);
        }
        Ok(())
    }

    fn lost(&self, error: &io::Error) -> Error {
        errors::lost(Side::Source, &self.doing, &format!("connection lost: {error}"))
    }

    pub(super) fn server_error(&self, body: &[u8]) -> Error {
        errors::classify_server(Side::Source, &self.doing, &server_error(body))
    }

    pub(super) fn unexpected(&self, tag: u8) -> Error {
        violation(format!("{}: message {:?} is not expected here", self.doing, char::from(tag)))
    }
}

/// The fields of an ErrorResponse; unknown ones are passed over, damaged ones end the list.
pub(in crate::connectors::postgres) fn server_error(body: &[u8]) -> ServerError {
    let mut error = ServerError::default();
    for field in body.split(|byte| *byte == 0) {
        let Some((kind, text)) = field.split_first() else { break };
        let text = String::from_utf8_lossy(text).into_owned();
        match kind {
            b'C' => error.code = text,
            b'M' => error.message = text,
            b'D' => error.detail = Some(text),
            b'H' => error.hint = Some(text),
            _ => {}
        }
    }
    error
}

fn data_row(body: &[u8]) -> Result<Vec<Option<String>>> {
    let mut body = Cursor::new(body);
    let count = body.u16()?;
    (0..count)
        .map(|_| match usize::try_from(body.i32()?) {
            Ok(length) => Ok(Some(String::from_utf8_lossy(body.take(length)?).into_owned())),
            // -1: NULL.
            Err(_) => Ok(None),
        })
        .collect()
}

/// Tells the server to cancel what a backend does, unless disarmed before it is dropped.
pub(super) struct CancelOnDrop {
    armed: Option<(Endpoint, Backend)>,
}

impl CancelOnDrop {
    pub(super) fn new(endpoint: &Endpoint, backend: Backend) -> Self {
        Self { armed: Some((endpoint.clone(), backend)) }
    }

    pub(super) fn disarm(mut self) {
        self.armed = None;
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        // Without a runtime the process is about to end, and the connection with it.
        if let (Some((endpoint, backend)), Ok(runtime)) = (self.armed.take(), tokio::runtime::Handle::try_current()) {
            runtime.spawn(async move {
                let limit = endpoint.connect_timeout;
                if let Ok(Err(error)) = tokio::time::timeout(limit, cancel(&endpoint, backend)).await {
                    tracing::warn!(%error, "the creation of a slot could not be cancelled");
                }
            });
        }
    }
}

async fn cancel(endpoint: &Endpoint, backend: Backend) -> Result<()> {
    let mut transport = Transport::open(endpoint).await?;
    let mut request = BytesMut::new();
    frontend::cancel_request(backend.process, backend.secret, &mut request);
    let sent = async {
        transport.write_all(&request).await?;
        transport.flush().await?;
        // The server closes when it has passed the signal on.
        transport.read(&mut [0]).await.map(drop)
    };
    sent.await.map_err(|error| errors::lost(Side::Source, "cancel request", &error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_fields_are_found() {
        let error = server_error(b"SERROR\0VERROR\0C42704\0Mno slot\0Hmake one\0\0");
        assert_eq!((error.code.as_str(), error.message.as_str(), error.hint.as_deref()), ("42704", "no slot", Some("make one")));
        assert_eq!(server_error(b"C42").code, "42");
        assert_eq!(server_error(b"").code, "");
    }

    #[test]
    fn rows_are_bounds_checked() {
        assert_eq!(data_row(b"\0\x02\0\0\0\x01a\xFF\xFF\xFF\xFF").unwrap(), [Some("a".to_owned()), None]);
        assert!(data_row(b"\0\x02\0\0\0\x01a").is_err());
        assert!(data_row(b"\0\x01\0\0\0\x05a").is_err());
    }
}
