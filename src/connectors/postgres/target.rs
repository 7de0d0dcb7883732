//! PostgreSQL as a target.

use super::connect::Side;
use super::errors::classify;
use crate::engine::error::Error;

/// For `map_err`: the error of a statement on the target; `what` says what was being done.
pub(super) fn failed(what: &str) -> impl Fn(tokio_postgres::Error) -> Error + '_ {
    move |error| classify(Side::Target, what, &error)
}
