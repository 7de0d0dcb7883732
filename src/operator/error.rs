//! Why a reconcile failed, in the few classes that decide when it is tried again.

use std::error::Error as StdError;
use std::fmt;

/// What kind of failure it is; decides requeue (see [`super::backoff`]) and event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorClass {
    /// The spec cannot work; only a change helps.
    Invalid,
    /// Something it refers to is not there; it may come.
    Missing,
    /// May pass by itself: timeouts, overload, connections.
    Transient,
    /// Somebody else wrote at the same time.
    Conflict,
    /// A defect of the operator or of its installation (missing permission).
    Bug,
}

impl ErrorClass {
    /// Label of metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::Missing => "missing",
            Self::Transient => "transient",
            Self::Conflict => "conflict",
            Self::Bug => "bug",
        }
    }
}

/// A failure with its class, a CamelCase reason for conditions and events, and a message for people. Never holds a secret.
#[derive(Debug)]
pub struct OperatorError {
    /// Decides requeue and event.
    pub class: ErrorClass,
    /// Constant for conditions and events.
    pub reason: &'static str,
    /// For people: what happened and what to do.
    pub message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// Result of the operator's own functions.
pub type Result<T, E = OperatorError> = std::result::Result<T, E>;

impl OperatorError {
    /// A failure without a cause of its own.
    pub fn new(class: ErrorClass, reason: &'static str, message: impl Into<String>) -> Self {
        Self { class, reason, message: message.into(), source: None }
    }

    /// Adds the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// Puts what was tried before the message.
    #[must_use]
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }

    /// A call that did not end in time.
    pub fn deadline(what: impl fmt::Display) -> Self {
        Self::new(ErrorClass::Transient, "DeadlineExceeded", format!("{what} did not answer in time"))
    }
}

impl fmt::Display for OperatorError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.reason, self.message)
    }
}

impl StdError for OperatorError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

impl From<kube::Error> for OperatorError {
    fn from(error: kube::Error) -> Self {
        let (class, reason) = classify(&error);
        // The API server's message names verb, resource and namespace of what it forbids.
        let message = match &error {
            kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
            other => chain(other),
        };
        Self::new(class, reason, message).with_source(error)
    }
}

/// Class and reason of an answer of the API server, or of its absence.
pub fn classify(error: &kube::Error) -> (ErrorClass, &'static str) {
    let status = match error {
        kube::Error::Api(status) => status,
        kube::Error::HyperError(_) | kube::Error::Service(_) | kube::Error::ReadEvents(_) | kube::Error::HttpError(_) => {
            return (ErrorClass::Transient, "ApiServerUnreachable");
        }
        kube::Error::Auth(_) => return (ErrorClass::Transient, "Unauthorized"),
        kube::Error::SerdeError(_) => return (ErrorClass::Bug, "UndecodableAnswer"),
        _ => return (ErrorClass::Bug, "InternalError"),
    };
    match status.code {
        403 if has_cause(status, "NamespaceTerminating") => (ErrorClass::Missing, "NamespaceTerminating"),
        403 => (ErrorClass::Bug, "Forbidden"),
        404 => (ErrorClass::Missing, "NotFound"),
        409 => (ErrorClass::Conflict, if status.reason == "AlreadyExists" { "AlreadyExists" } else { "Conflict" }),
        413 => (ErrorClass::Invalid, "TooLarge"),
        422 => (ErrorClass::Invalid, "RefusedByApiServer"),
        401 => (ErrorClass::Transient, "Unauthorized"),
        408 | 410 | 429 | 500..=599 => (ErrorClass::Transient, "ApiServerUnavailable"),
        _ => (ErrorClass::Bug, "InternalError"),
    }
}

fn has_cause(status: &kube::core::Status, reason: &str) -> bool {
    status.details.as_ref().is_some_and(|details| details.causes.iter().any(|cause| cause.reason == reason))
}

/// The message with those of its causes that say more.
pub fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let part = cause.to_string();
        if !text.contains(&part) {
            text = format!("{text}: {part}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{ErrorClass, OperatorError};
    use kube::core::Status;

    fn api(code: u16, reason: &str) -> OperatorError {
        kube::Error::Api(Status { code, reason: reason.into(), message: format!("message {code}"), ..Status::default() }.boxed()).into()
    }

    #[test]
    fn answers_are_classified() {
        for (code, reason, class, ours) in [
            (404, "NotFound", ErrorClass::Missing, "NotFound"),
            (409, "Conflict", ErrorClass::Conflict, "Conflict"),
            (409, "AlreadyExists", ErrorClass::Conflict, "AlreadyExists"),
            (422, "Invalid", ErrorClass::Invalid, "RefusedByApiServer"),
            (403, "Forbidden", ErrorClass::Bug, "Forbidden"),
            (429, "TooManyRequests", ErrorClass::Transient, "ApiServerUnavailable"),
            (500, "InternalError", ErrorClass::Transient, "ApiServerUnavailable"),
            (504, "Timeout", ErrorClass::Transient, "ApiServerUnavailable"),
            (400, "BadRequest", ErrorClass::Bug, "InternalError"),
        ] {
            let error = api(code, reason);
            assert_eq!((error.class, error.reason), (class, ours), "{code} {reason}");
            assert_eq!(error.message, format!("message {code}"));
        }
    }

    #[test]
    fn a_namespace_in_deletion_is_no_missing_permission() {
        let status: Status = serde_json::from_value(serde_json::json!({
            "code": 403, "reason": "Forbidden", "message": "being terminated",
            "details": {"causes": [{"reason": "NamespaceTerminating", "message": "", "field": "metadata.namespace"}]},
        }))
        .expect("a status");
        let error = OperatorError::from(kube::Error::Api(status.boxed()));
        assert_eq!((error.class, error.reason), (ErrorClass::Missing, "NamespaceTerminating"));
    }

    #[test]
    fn a_broken_connection_is_transient() {
        let error = OperatorError::from(kube::Error::Service("connection refused".into()));
        assert_eq!(error.class, ErrorClass::Transient);
        assert!(error.message.contains("connection refused"));
    }
}
