//! Foreign keys between mirrored tables. They come when every table follows the stream: from then on each commit on the target
//! is one of the source, and leaves them fulfilled. First they hold for new rows only, which takes a moment's lock; the
//! rows that are there are looked at while the stream goes on.
//!
//! In replica role the server does not check them and their actions do not fire, so they are never in the stream's way.
//! Without that right they would be, so none is made.

use super::checkpoint::Claim;
use super::connect::Session;
use super::ddl::build::{add_foreign_key, comment_constraint};
use super::load::set_up;
use super::sql::{qualified, quote_ident};
use super::target::failed;
use crate::engine::error::{Class, Result};
use crate::engine::roles::{ApplyMode, Tell};
use crate::engine::structure::ForeignKey;
use crate::engine::table::MappedTable;

/// Shorter than the server's `deadlock_timeout`: when the stream and this wait for each other, this gives way.
const LOCK_LIMIT: &str = "500ms";

/// Makes what is missing on tables that Sluice has made. What is not carried is returned, for people. Safe to repeat.
pub(super) async fn relate(session: &Session, claim: &Claim, tables: &[MappedTable], role: &str, tell: Tell<'_>) -> Result<Vec<String>> {
    let mode = set_up(session, claim).await?;
    let ready = claim.ready_tables(session).await?;
    let mut notes = Vec::new();
    for table in tables.iter().filter(|table| !table.structure.foreign_keys.is_empty()) {
        if !ready.contains(table.source()) || !claim.has_made(session, table).await? {
            continue;
        }
        if mode == ApplyMode::Ordered {
            notes.push(format!(
                "foreign keys are not carried, since role {role} may not keep them out of the stream's way: \
                 GRANT SET ON PARAMETER session_replication_role TO {} (PostgreSQL 15 and later), or make it superuser",
                quote_ident(role)
            ));
            break;
        }
        for key in &table.structure.foreign_keys {
            let referred = tables.iter().find(|other| *other.source() == key.references);
            let not_carried = |why: &str| format!("foreign key {} of {} is not carried: {why}", key.name, table.source());
            match referred {
                None => notes.push(not_carried(&format!("it refers to {}, which is not mirrored", key.references))),
                Some(other) if !ready.contains(other.source()) => {
                    notes.push(not_carried(&format!("it refers to {}, which does not follow the stream", key.references)));
                }
                Some(other) => match carry(session, claim, table, key, other, tell).await {
                    Ok(()) => {}
                    // What needs a human is not worth stopping a stream that goes well.
                    Err(error) if error.class == Class::Stop => {
                        let _ = session.batch_execute("ROLLBACK").await;
                        notes.push(not_carried(&error.message));
                    }
                    Err(error) => return Err(error),
                },
            }
        }
    }
    Ok(notes)
}

/// Makes one foreign key and has it checked, as far as that has not been done.
async fn carry(
    session: &Session,
    claim: &Claim,
    table: &MappedTable,
    key: &ForeignKey,
    referred: &MappedTable,
    tell: Tell<'_>,
) -> Result<()> {
    let name = qualified(&table.target);
    let present = session
        .query_opt("SELECT convalidated FROM pg_constraint WHERE conrelid = to_regclass($1) AND conname = $2", &[&name, &key.name])
        .await
        .map_err(failed("look for foreign keys"))?
        .map(|row| row.get::<_, bool>(0));
    if present.is_none() {
        let mut sql = add_foreign_key(table, key, &referred.target);
        if let Some(text) = &key.comment {
            sql += &format!("; {}", comment_constraint(table, &key.name, text));
        }
        alter(session, claim, &sql).await?;
    }
    if key.valid && present != Some(true) {
        tell(format!("foreign key {} of {} is being checked", key.name, table.target));
        alter(session, claim, &format!("ALTER TABLE {name} VALIDATE CONSTRAINT {}", quote_ident(&key.name))).await?;
    }
    Ok(())
}

async fn alter(session: &Session, claim: &Claim, sql: &str) -> Result<()> {
    let begin = format!("BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL synchronous_commit = on; SET LOCAL lock_timeout = '{LOCK_LIMIT}'");
    session.batch_execute(&begin).await.map_err(failed("begin a transaction"))?;
    session.batch_execute(sql).await.map_err(failed(sql))?;
    claim.check(session).await?;
    session.batch_execute("COMMIT").await.map_err(failed("commit a foreign key"))
}
