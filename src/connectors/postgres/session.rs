//! What every session on both ends has in common, so that a value's text never depends on where it was read.

use super::endpoint::Endpoint;
use crate::engine::error::{Error, Result, reason};

/// Settings of every session, walsenders included. The first six fix how values look as text (manual: "Client Connection
/// Defaults"); `search_path` keeps users' objects from shadowing the catalog; `row_security` makes a policy that would hide
/// rows an error; the time limits of role and database must not end a long copy or an idle replication session.
const FIXED: [(&str, &str); 11] = [
    ("DateStyle", "ISO"),
    ("IntervalStyle", "postgres"),
    ("extra_float_digits", "3"),
    ("bytea_output", "hex"),
    ("TimeZone", "UTC"),
    ("client_encoding", "UTF8"),
    ("search_path", "pg_catalog"),
    ("row_security", "off"),
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
];

/// Lifts limits of role or database that would end a long copy, the wait for a slot, or a session that waits for either.
/// Not every version has them, and a startup parameter that the server does not know is an error.
pub const UNLIMITED: &str = "SELECT pg_catalog.set_config(name, '0', false) FROM pg_catalog.pg_settings
    WHERE name IN ('transaction_timeout', 'idle_session_timeout')";

/// Shown in `pg_stat_activity` when neither user nor caller says otherwise.
const APPLICATION_NAME: &str = "sluice";

/// The startup parameter `options`: the user's parameters, then the fixed ones. The user may not set a fixed one.
pub fn options(endpoint: &Endpoint) -> Result<String> {
    let mut options = Vec::new();
    for (name, value) in &endpoint.parameters {
        validate(name, value)?;
        if !name.eq_ignore_ascii_case("application_name") {
            options.push(switch(name, value));
        }
    }
    options.extend(FIXED.iter().map(|(name, value)| switch(name, value)));
    Ok(options.join(" "))
}

/// The session's `application_name`: the user's parameter, else the caller's, else `sluice`.
#[must_use]
pub fn application_name<'a>(endpoint: &'a Endpoint, caller: &'a str) -> &'a str {
    let parameter = endpoint.parameters.iter().find(|(name, _)| name.eq_ignore_ascii_case("application_name"));
    match parameter {
        Some((_, value)) if !value.is_empty() => value,
        _ if !caller.is_empty() => caller,
        _ => APPLICATION_NAME,
    }
}

fn validate(name: &str, value: &str) -> Result<()> {
    let invalid = |why: &str| Err(Error::stop(reason::INVALID_SPEC, format!("session parameter `{name}` {why}")));
    if !is_parameter_name(name) {
        return invalid("is not a parameter name: letters, digits and underscores, with dots between");
    }
    if FIXED.iter().any(|(fixed, _)| name.eq_ignore_ascii_case(fixed)) {
        return invalid("is set by Sluice and can't be changed; remove it");
    }
    if value.contains('\0') {
        return invalid("holds a zero byte");
    }
    Ok(())
}

/// Names as the server takes them: words with dots between (custom parameters), each starting with a letter or underscore.
fn is_parameter_name(name: &str) -> bool {
    name.split('.').all(|word| {
        word.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') && word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    })
}

/// `-c name=value`; white space and backslashes are escaped by a backslash (manual: startup message, `options`).
fn switch(name: &str, value: &str) -> String {
    let mut text = format!("-c {name}=");
    for c in value.chars() {
        if c == '\\' || c.is_ascii_whitespace() || c == '\x0B' {
            text.push('\\');
        }
        text.push(c);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connectors::postgres::endpoint::{Secret, TlsMode};
    use std::time::Duration;

    /// An endpoint with these parameters and nothing behind it.
    fn endpoint(parameters: &[(&str, &str)]) -> Endpoint {
        Endpoint {
            host: "localhost".into(),
            domain: None,
            port: 5432,
            database: "d".into(),
            username: "u".into(),
            password: Secret("p".into()),
            tls: TlsMode::Disable,
            ca: None,
            client_certificate: None,
            parameters: parameters.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
            connect_timeout: Duration::from_secs(1),
        }
    }

    #[test]
    fn options_end_with_the_fixed_settings() {
        let options = options(&endpoint(&[("work_mem", "64 MB"), ("my.x", r"a\b"), ("application_name", "x")])).unwrap();
        assert!(options.starts_with(r"-c my.x=a\\b -c work_mem=64\ MB -c DateStyle=ISO "), "{options}");
        assert!(!options.contains("application_name"), "{options}");
    }

    #[test]
    fn fixed_and_malformed_parameters_are_refused() {
        for name in ["datestyle", "TIMEZONE", "", "a b", "a=b", "1a", "a.", "a-b"] {
            let error = options(&endpoint(&[(name, "x")])).unwrap_err();
            assert_eq!(error.reason, reason::INVALID_SPEC, "{name}");
        }
        assert!(options(&endpoint(&[("a", "\0")])).is_err());
    }

    #[test]
    fn application_name_has_an_order() {
        assert_eq!(application_name(&endpoint(&[("Application_Name", "mine")]), "ours"), "mine");
        assert_eq!(application_name(&endpoint(&[]), "ours"), "ours");
        assert_eq!(application_name(&endpoint(&[]), ""), "sluice");
    }
}
