//! A thin client for the replication protocol: a walsender session with typed commands, and the stream that it turns into.
//! (Manual: "Streaming Replication Protocol".) The driver for SQL has no such mode.
//!
//! Invariant: a session on which a command was given up half-way is never used again.

mod bulk;
pub mod cursor;
mod wire;

use super::connect::{self, Side, Transport};
use super::endpoint::Endpoint;
use super::lsn::Lsn;
use super::sql::quote_ident;
use super::{errors, session};
use crate::engine::error::{Error, Result, reason};
use crate::engine::roles::SourceIdentity;
pub(super) use bulk::BulkSession;
use bytes::BytesMut;
use postgres_protocol::message::frontend;
use std::time::Duration;
pub(super) use wire::server_error;
use wire::{CancelOnDrop, Wire};

/// Bound for a command that has nothing to wait for.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);

/// A walsender session in command mode.
pub struct ReplicationClient {
    wire: Wire,
    endpoint: Endpoint,
}

/// Answer of `IDENTIFY_SYSTEM`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemIdentity {
    /// Identifies the cluster, replicas included.
    pub system_identifier: String,
    /// Timeline that the server is on.
    pub timeline: i64,
    /// Where the log is flushed to.
    pub flushed: Lsn,
}

impl SystemIdentity {
    /// Whether both are the same cluster on the same timeline.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        (&self.system_identifier, self.timeline) == (&other.system_identifier, other.timeline)
    }
}

/// A slot that was just made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreatedSlot {
    /// The slot sends exactly the transactions that end after this.
    pub consistent_point: Lsn,
    /// Names the exported snapshot; valid as long as the session that made the slot stays open and idle.
    pub snapshot_name: String,
}

/// How the stream is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamFormat {
    /// Values in binary where their type can.
    pub binary: bool,
    /// Transactions that are too large for the server's memory are sent before they have ended.
    pub streaming: bool,
}

/// A session that streams: copy data flows both ways.
pub struct CopyBoth {
    pub(super) transport: Transport,
    /// What was received beyond the answer to the command.
    pub(super) received: BytesMut,
}

/// Opens a walsender session on the endpoint's database, bounded by its `connect_timeout`.
pub async fn connect_replication(endpoint: &Endpoint, application_name: &str) -> Result<ReplicationClient> {
    let options = session::options(endpoint)?;
    let application_name = session::application_name(endpoint, application_name);
    let startup = [
        ("user", endpoint.username.as_str()),
        ("database", &endpoint.database),
        ("replication", "database"),
        ("application_name", application_name),
        ("options", &options),
    ];
    let wire = connect::within(endpoint.connect_timeout, endpoint, async {
        let transport = Transport::open(endpoint).await?;
        Wire::login(transport, endpoint, &startup).await
    })
    .await?;
    Ok(ReplicationClient { wire, endpoint: endpoint.clone() })
}

impl ReplicationClient {
    /// The server's major version.
    #[must_use]
    pub fn major(&self) -> u32 {
        self.wire.major()
    }

    /// Runs a replication command or SQL; the rows as text. Bounded by 30 s.
    pub async fn simple_query(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>> {
        let query = self.wire.query(sql);
        match tokio::time::timeout(COMMAND_LIMIT, query).await {
            Ok(rows) => rows,
            Err(_) => Err(errors::lost(Side::Source, sql, &format!("no answer within {COMMAND_LIMIT:?}"))),
        }
    }

    /// Which server this is.
    pub async fn identify_system(&mut self) -> Result<SystemIdentity> {
        let row = single_row("IDENTIFY_SYSTEM", self.simple_query("IDENTIFY_SYSTEM").await?)?;
        let mut fields = row.into_iter();
        let mut field = || fields.next().flatten().ok_or_else(|| errors::violation("IDENTIFY_SYSTEM: a field is missing"));
        Ok(SystemIdentity {
            system_identifier: field()?,
            timeline: field()?.parse().map_err(|_| errors::violation("IDENTIFY_SYSTEM: the timeline is not a number"))?,
            flushed: parse_lsn("IDENTIFY_SYSTEM", &field()?)?,
        })
    }

    /// Fails unless this is the server that is expected: positions of one server mean nothing on another. When a standby has taken
    /// over since, class `Retry`: whether the checkpoint lies in its history must be looked at first.
    pub async fn expect_system(&mut self, expected: &SourceIdentity) -> Result<()> {
        let found = self.identify_system().await?;
        if found.system_identifier != expected.system_identifier {
            let (is, was) = (found.system_identifier, &expected.system_identifier);
            let message = format!("the source's system identifier is {is} and was {was}: it is another server");
            return Err(Error::stop(reason::SYSTEM_IDENTIFIER_CHANGED, message));
        }
        if found.timeline != expected.timeline {
            let message = format!("the source went from timeline {} to {}: a standby has taken over", expected.timeline, found.timeline);
            return Err(Error::retry(reason::SOURCE_UNREACHABLE, message));
        }
        Ok(())
    }

    /// Makes a logical slot for pgoutput and exports its snapshot. Waits, without a bound of its own, until all older
    /// transactions have ended; when the future is dropped before that, the server is told to cancel, so that no slot is
    /// left. `failover` (kept in step on standbys) takes effect on lasting slots of PostgreSQL 17 and later.
    pub async fn create_slot(&mut self, name: &str, temporary: bool, failover: bool) -> Result<CreatedSlot> {
        let command = create_slot_command(name, temporary, failover, self.major());
        let cancel = CancelOnDrop::new(&self.endpoint, self.wire.backend());
        let rows = self.wire.query(&command).await;
        cancel.disarm();
        let row = single_row(&command, rows?)?;
        // slot_name, consistent_point, snapshot_name, output_plugin
        let [_, Some(consistent_point), Some(snapshot_name), ..] = row.as_slice() else {
            return Err(errors::violation(format!("{command}: a field is missing")));
        };
        Ok(CreatedSlot { consistent_point: parse_lsn(&command, consistent_point)?, snapshot_name: snapshot_name.clone() })
    }

    /// Drops a slot that nobody reads from.
    pub async fn drop_slot(&mut self, name: &str) -> Result<()> {
        self.simple_query(&format!("DROP_REPLICATION_SLOT {}", quote_ident(name))).await.map(drop)
    }

    /// Starts the stream after `from`: the end of the last transaction that is not wanted again. The server silently starts
    /// at the slot's confirmed position when that is later: the caller has compared.
    pub async fn start(mut self, slot: &str, from: Lsn, publication: &str, format: StreamFormat) -> Result<CopyBoth> {
        let command = start_command(slot, from, publication, format, self.major());
        let started = self.wire.start_copy(&command);
        match tokio::time::timeout(COMMAND_LIMIT, started).await {
            Ok(started) => started?,
            Err(_) => return Err(errors::lost(Side::Source, &command, &format!("no answer within {COMMAND_LIMIT:?}"))),
        }
        Ok(self.wire.into_copy())
    }
}

fn create_slot_command(name: &str, temporary: bool, failover: bool, major: u32) -> String {
    let name = quote_ident(name);
    let lifetime = if temporary { " TEMPORARY" } else { "" };
    let options = match major {
        ..15 => "EXPORT_SNAPSHOT",
        17.. if failover && !temporary => "(SNAPSHOT 'export', FAILOVER true)",
        _ => "(SNAPSHOT 'export')",
    };
    format!("CREATE_REPLICATION_SLOT {name}{lifetime} LOGICAL pgoutput {options}")
}

/// The highest protocol that the server has (manual: "Logical Streaming Replication Parameters"). What 15 and 16 have added,
/// two-phase commit and the positions of aborts for parallel apply, is not asked for.
fn start_command(slot: &str, from: Lsn, publication: &str, format: StreamFormat, major: u32) -> String {
    let StreamFormat { binary, streaming } = format;
    let streaming = if streaming { "on" } else { "off" };
    let (version, origin) = match major {
        ..15 => (2, ""),
        15 => (3, ""),
        // Rows that another subscription has brought are wanted like all others.
        _ => (4, ", origin 'any'"),
    };
    // A literal of the replication grammar knows no escapes but doubled quotes; its value is a list of identifiers.
    let publications = quote_ident(publication).replace('\'', "''");
    let slot = quote_ident(slot);
    format!(
        "START_REPLICATION SLOT {slot} LOGICAL {from} (proto_version '{version}', publication_names '{publications}', binary '{binary}', messages 'true', streaming '{streaming}'{origin})"
    )
}

fn single_row(command: &str, rows: Vec<Vec<Option<String>>>) -> Result<Vec<Option<String>>> {
    let count = rows.len();
    match rows.into_iter().next() {
        Some(row) if count == 1 => Ok(row),
        _ => Err(errors::violation(format!("{command}: {count} rows instead of one"))),
    }
}

fn parse_lsn(command: &str, text: &str) -> Result<Lsn> {
    text.parse().map_err(|error| errors::violation(format!("{command}: {error}")))
}

/// A frontend message that can't hold what is put into it: a zero byte in a name or password.
fn encode(build: impl FnOnce(&mut BytesMut) -> std::io::Result<()>) -> Result<BytesMut> {
    let mut message = BytesMut::new();
    build(&mut message).map_err(|error| Error::stop(reason::INVALID_SPEC, format!("a name or password can't be sent: {error}")))?;
    Ok(message)
}

fn query_message(sql: &str) -> Result<BytesMut> {
    encode(|message| frontend::query(sql, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_fit_the_version() {
        let command = |temporary, failover, major| create_slot_command("s", temporary, failover, major);
        assert_eq!(command(false, true, 14), r#"CREATE_REPLICATION_SLOT "s" LOGICAL pgoutput EXPORT_SNAPSHOT"#);
        assert_eq!(command(true, true, 15), r#"CREATE_REPLICATION_SLOT "s" TEMPORARY LOGICAL pgoutput (SNAPSHOT 'export')"#);
        assert_eq!(command(true, true, 17), r#"CREATE_REPLICATION_SLOT "s" TEMPORARY LOGICAL pgoutput (SNAPSHOT 'export')"#);
        assert_eq!(command(false, true, 18), r#"CREATE_REPLICATION_SLOT "s" LOGICAL pgoutput (SNAPSHOT 'export', FAILOVER true)"#);
        let start = |streaming, major| {
            let format = StreamFormat { binary: true, streaming };
            start_command("s", Lsn(0x1_0000_00A0), "it's \"p\"", format, major)
        };
        for (streaming, major, version, options) in [
            (true, 14, 2, "streaming 'on')"),
            (false, 15, 3, "streaming 'off')"),
            (true, 16, 4, "streaming 'on', origin 'any')"),
            (true, 18, 4, "streaming 'on', origin 'any')"),
        ] {
            let expected = format!(
                r#"LOGICAL 1/A0 (proto_version '{version}', publication_names '"it''s ""p"""', binary 'true', messages 'true', {options}"#
            );
            assert!(start(streaming, major).ends_with(&expected), "{}", start(streaming, major));
        }
    }
}
