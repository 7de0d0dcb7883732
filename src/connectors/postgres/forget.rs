//! Removes what a stream has left on its target besides the rows.

use super::checkpoint::schema;
use super::connect::{Side, connect};
use super::endpoint::Endpoint;
use super::sql::quote_literal;
use super::target::failed;
use crate::engine::error::Result;
use std::fmt::Write as _;

/// Removes the checkpoint of a Mirror's stream, so that another Mirror may write the same tables. Does nothing when there
/// is none.
///
/// # Errors
/// The target can't be reached, or refuses.
pub async fn forget_stream(target: &Endpoint, slot: &str, namespace: &str, name: &str) -> Result<()> {
    let session = connect(target, Side::Target, "sluice clean up").await?;
    if !schema::is_there(&session).await? {
        return Ok(());
    }
    session.batch_execute(&statements(slot, namespace, name)).await.map_err(failed("remove the checkpoint"))
}

/// The statements of [`forget_stream`], for people too.
#[must_use]
pub fn statements(slot: &str, namespace: &str, name: &str) -> String {
    let stream = format!(
        "slot = {} AND mirror_namespace = {} AND mirror_name = {}",
        quote_literal(slot),
        quote_literal(namespace),
        quote_literal(name)
    );
    let mut text = "BEGIN; ".to_owned();
    for table in ["ranges", "requests", "tables"] {
        // Writing to a String does not fail.
        let _ = write!(
            text,
            "DELETE FROM _sluice.{table} WHERE (system_identifier, database, slot) IN (SELECT system_identifier, database, slot FROM _sluice.streams WHERE {stream}); "
        );
    }
    text + &format!("DELETE FROM _sluice.streams WHERE {stream}; COMMIT")
}
