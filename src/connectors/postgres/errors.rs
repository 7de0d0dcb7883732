//! From what a server or a socket says to a class and a reason.

use super::connect::Side;
use super::endpoint::Endpoint;
use crate::engine::error::{Class, Error, reason};
use crate::engine::table::QualifiedName;
use std::fmt::Write as _;
use std::io;

/// Longest message that is kept, in bytes: what a status condition takes.
const LONGEST: usize = 1024;

/// What a server says about a failure (manual: "Error and Notice Message Fields").
#[derive(Clone, Debug, Default)]
pub struct ServerError {
    /// SQLSTATE.
    pub code: String,
    /// Primary message.
    pub message: String,
    /// Secondary message.
    pub detail: Option<String>,
    /// What to do.
    pub hint: Option<String>,
}

impl From<&tokio_postgres::error::DbError> for ServerError {
    fn from(error: &tokio_postgres::error::DbError) -> Self {
        Self {
            code: error.code().code().to_owned(),
            message: error.message().to_owned(),
            detail: error.detail().map(str::to_owned),
            hint: error.hint().map(str::to_owned),
        }
    }
}

/// Class and reason of a failed statement; `what` says what was being done.
#[must_use]
pub fn classify(side: Side, what: &str, error: &tokio_postgres::Error) -> Error {
    if let Some(server) = error.as_db_error() {
        return classify_server(side, what, &server.into());
    }
    let cause = std::error::Error::source(error);
    let text = cause.map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"));
    if error.is_closed() {
        return lost(side, what, &text);
    }
    match cause.and_then(|cause| cause.downcast_ref::<io::Error>()) {
        Some(io) if matches!(io.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData) => {
            Error::new(Class::Bug, reason::PROTOCOL_VIOLATION, cut(format!("{what}: {text}")))
        }
        Some(_) => lost(side, what, &text),
        // What is left is made on our side: a wrong parameter type, a column that is not there.
        None => Error::bug(cut(format!("{what}: {text}"))),
    }
}

/// Class and reason of an error that a server has sent.
#[must_use]
pub fn classify_server(side: Side, what: &str, error: &ServerError) -> Error {
    let (class, reason) = by_state(side, &error.code, &error.message);
    let cure = cure(reason).map(|cure| format!(": {cure}")).unwrap_or_default();
    Error::new(class, reason, cut(describe(what, error) + &cure))
}

/// A value that one of the narrower columns of a target table does not take.
#[must_use]
pub(super) fn does_not_fit(table: &QualifiedName, narrower: &[String], error: &ServerError) -> Option<Error> {
    // string_data_right_truncation, numeric_value_out_of_range, string_data_length_mismatch.
    let misfit = matches!(error.code.as_str(), "22001" | "22003" | "22026") && !narrower.is_empty();
    let message = || {
        let narrower = narrower.join("; ");
        format!("a value of the source does not fit into target table {table}, where column {narrower}: alter it to the source's type")
    };
    misfit.then(|| Error::stop(reason::VALUE_DOES_NOT_FIT, cut(format!("{}; the server says: {}", message(), error.message))))
}

/// What to do about a failure whose words do not say it.
fn cure(reason: &str) -> Option<&'static str> {
    match reason {
        reason::WAL_LEVEL_NOT_LOGICAL => Some("run ALTER SYSTEM SET wal_level = 'logical' on the source and restart it"),
        reason::NO_FREE_REPLICATION_SLOT => Some("drop a slot that nobody needs, or raise max_replication_slots and restart the source"),
        reason::NO_FREE_WAL_SENDER => Some("raise max_wal_senders and restart the source"),
        reason::ROLE_LACKS_REPLICATION => Some("run ALTER ROLE … REPLICATION on the source"),
        _ => None,
    }
}

/// The connection is gone.
#[must_use]
pub fn lost(side: Side, what: &str, why: &str) -> Error {
    Error::retry(unreachable(side), cut(format!("{what}: {why}")))
}

/// Something that the protocol does not allow. The connection is not used further.
#[must_use]
pub fn violation(what: impl Into<String>) -> Error {
    Error::stop(reason::PROTOCOL_VIOLATION, cut(what.into()))
}

/// A failed login: names host, port and user, never the password.
#[must_use]
pub fn classify_login(side: Side, endpoint: &Endpoint, error: &tokio_postgres::Error) -> Error {
    let what = login(endpoint);
    let is_io = matches!(std::error::Error::source(error), Some(cause) if cause.is::<io::Error>());
    if error.as_db_error().is_some() || error.is_closed() || is_io {
        return classify(side, &what, error);
    }
    // A method that is not supported, or a server that can't prove that it knows the password.
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    Error::stop(reason::AUTHENTICATION_FAILED, cut(format!("{what}: {error}{cause}")))
}

/// Says where a login goes: `user@host:port/database`.
#[must_use]
pub fn login(endpoint: &Endpoint) -> String {
    format!("login as {} on {}:{}/{}", endpoint.username, endpoint.host, endpoint.port, endpoint.database)
}

/// SQLSTATE to class and reason (manual: appendix "PostgreSQL Error Codes"). Where one code stands for several failures the
/// words decide; they are English in all sessions that matter only when the server's `lc_messages` is, so that a wrong guess
/// may only cost the precise reason, never turn a failure into success.
fn by_state(side: Side, code: &str, message: &str) -> (Class, &'static str) {
    use Class::{Bug, Retry, Stop};
    let source = side == Side::Source;
    let says = |words: &str| message.contains(words);
    let class = code.get(..2).unwrap_or_default();
    match code {
        "28P01" | "28000" => (Stop, reason::AUTHENTICATION_FAILED),
        "3D000" => (Stop, reason::DATABASE_MISSING),
        "53100" if source => (Retry, reason::SOURCE_DISK_FULL),
        "53100" => (Retry, reason::TARGET_DISK_FULL),
        "53300" if says("max_wal_senders") => (Retry, reason::NO_FREE_WAL_SENDER),
        "53400" if says("replication slots") => (Retry, reason::NO_FREE_REPLICATION_SLOT),
        // A failover may be on its way.
        "25006" if source => (Retry, reason::SERVER_UNSUPPORTED),
        "25006" => (Retry, reason::TARGET_READ_ONLY),
        // "must be superuser or replication role to start walsender", from 16 on "permission denied to start WAL sender"; the
        // same with "to use replication slots".
        "42501" if says("walsender") || says("WAL sender") || says("replication slots") => (Stop, reason::ROLE_LACKS_REPLICATION),
        "42501" => (Stop, reason::PRIVILEGE_MISSING),
        "40001" | "40P01" | "55P03" | "57014" if source => (Retry, reason::SOURCE_UNREACHABLE),
        "40001" | "40P01" | "55P03" | "57014" => (Retry, reason::WRITE_REFUSED),
        "55006" if source && says("replication slot") => (Retry, reason::SLOT_IN_USE),
        "55000" if source && says("replication slot") => (Stop, reason::SLOT_LOST),
        "55000" if source && says("wal_level") => (Stop, reason::WAL_LEVEL_NOT_LOGICAL),
        "58P01" if source && says("WAL segment") => (Stop, reason::SLOT_LOST),
        "42704" if source && says("replication slot") => (Stop, reason::SLOT_LOST),
        "42704" if source && says("publication") => (Stop, reason::PUBLICATION_MISSING),
        "42704" | "22023" if source && says("snapshot") => (Retry, reason::SNAPSHOT_LOST),
        "42704" if !source => (Stop, reason::TYPE_MISSING),
        "42P01" if source => (Stop, reason::TABLE_MISSING),
        "42703" | "42804" if source => (Stop, reason::SCHEMA_CHANGED),
        "42P01" | "42703" | "42804" => (Stop, reason::TARGET_TABLE_INCOMPATIBLE),
        "23505" if !source => (Stop, reason::ROW_CONFLICT),
        "42601" => (Bug, reason::INTERNAL_ERROR),
        // 57: shut down, crashed, starting. 08: connection. 53, 54: limits. 58: I/O of the server. XX: its own defects.
        _ if matches!(class, "57" | "08" | "53" | "54" | "58" | "XX") => (Retry, unreachable(side)),
        _ if source => (Stop, reason::INTERNAL_ERROR),
        _ => (Stop, reason::WRITE_REFUSED),
    }
}

fn unreachable(side: Side) -> &'static str {
    match side {
        Side::Source => reason::SOURCE_UNREACHABLE,
        Side::Target => reason::TARGET_UNREACHABLE,
    }
}

fn describe(what: &str, error: &ServerError) -> String {
    let mut text = format!("{what}: {} (SQLSTATE {})", error.message, error.code);
    for (label, part) in [("detail", &error.detail), ("hint", &error.hint)] {
        if let Some(part) = part {
            // Writing to a String does not fail.
            let _ = write!(text, "; {label}: {part}");
        }
    }
    text
}

/// Cuts at a character's border.
fn cut(mut text: String) -> String {
    if text.len() > LONGEST {
        text.truncate(text.floor_char_boundary(LONGEST - '…'.len_utf8()));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_have_class_and_reason() {
        use Class::{Retry, Stop};
        for (side, code, message, class, expected) in [
            (Side::Source, "28P01", "", Stop, reason::AUTHENTICATION_FAILED),
            (Side::Target, "53100", "", Retry, reason::TARGET_DISK_FULL),
            (Side::Target, "25006", "", Retry, reason::TARGET_READ_ONLY),
            (Side::Target, "57P01", "", Retry, reason::TARGET_UNREACHABLE),
            (Side::Source, "08006", "", Retry, reason::SOURCE_UNREACHABLE),
            (Side::Target, "42501", "permission denied for table t", Stop, reason::PRIVILEGE_MISSING),
            (Side::Source, "42501", "must be superuser or replication role to start walsender", Stop, reason::ROLE_LACKS_REPLICATION),
            (Side::Source, "42501", "permission denied to use replication slots", Stop, reason::ROLE_LACKS_REPLICATION),
            (Side::Target, "40P01", "", Retry, reason::WRITE_REFUSED),
            (Side::Target, "23505", "", Stop, reason::ROW_CONFLICT),
            (Side::Target, "23502", "", Stop, reason::WRITE_REFUSED),
            (Side::Source, "53300", "sorry, too many clients already", Retry, reason::SOURCE_UNREACHABLE),
            (
                Side::Source,
                "53300",
                "number of requested standby connections exceeds max_wal_senders (currently 1)",
                Retry,
                reason::NO_FREE_WAL_SENDER,
            ),
            (Side::Source, "", "", Stop, reason::INTERNAL_ERROR),
        ] {
            assert_eq!(by_state(side, code, message), (class, expected), "{code} {message}");
        }
    }

    #[test]
    fn long_messages_are_cut_at_a_character() {
        let error = ServerError { code: "23502".into(), message: "ä".repeat(2000), ..ServerError::default() };
        let error = classify_server(Side::Target, "x", &error);
        assert!(error.message.len() <= LONGEST && error.message.ends_with('…'));
    }
}
