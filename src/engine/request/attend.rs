//! Sees to the end of what is under way while the stream goes on.

use super::verified::compare;
use super::{Action, RequestRecord, RequestState};
use crate::engine::error::Class;
use crate::engine::progress::Progress;
use crate::engine::retry::Backoff;
use crate::engine::roles::{Claim, Source, Target};
use crate::engine::table::{MappedTable, QualifiedName, TableState};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::Duration;

/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// Ends each request that is under way when what it asks for is reached. Never ends itself, so that the stream's end is the
/// session's.
pub(in crate::engine) async fn attend<S, T>(
    source: &S,
    target: &T,
    claim: &Claim,
    tables: &[MappedTable],
    progress: &Progress,
) -> Infallible
where
    S: Source,
    T: Target<Position = S::Position>,
{
    let mut backoff = Backoff::new(claim.epoch.unsigned_abs());
    loop {
        let running: Vec<RequestRecord> = progress.view().requests.into_iter().flatten().filter(RequestRecord::is_running).collect();
        let mut reached = running.iter().find_map(|record| Some((outcome(record, progress)?, record)));
        if let Some(record) = running.iter().find(|record| record.action == Action::Verify.as_str()).filter(|_| progress.view().streaming) {
            // Seldom, and large: it should not make every session's future as large.
            match Box::pin(compare(source, target, record, tables, progress)).await {
                Ok(outcome) => reached = Some((outcome, record)),
                Err(error) if error.class == Class::Retry => {
                    tracing::info!(%error, id = record.id, "the comparison begins anew");
                    tokio::time::sleep(backoff.next(error.class)).await;
                    continue;
                }
                Err(error) => reached = Some(((RequestState::Failed, error.to_string()), record)),
            }
        }
        let Some(((state, message), record)) = reached else {
            tokio::time::sleep(LOOK).await;
            continue;
        };
        match target.end_request(claim, &record.id, state, &message).await {
            Ok(records) => progress.set_requests(records),
            Err(error) => {
                tracing::info!(%error, id = record.id, "the end of a request is written later");
                tokio::time::sleep(backoff.next(error.class)).await;
            }
        }
    }
}

/// What a request has come to; `None` while it is under way.
fn outcome(record: &RequestRecord, progress: &Progress) -> Option<(RequestState, String)> {
    let states = progress.table_states();
    match Action::parse(&record.action)? {
        Action::Resync => resynced(record, &states),
        Action::Verify => None,
        _ if !progress.view().streaming => None,
        Action::Retry => {
            let failed = in_error(states.keys(), &states);
            let left = if failed.is_empty() { String::new() } else { format!("; {failed} stay in Error: a Resync of them leads out") };
            Some((RequestState::Succeeded, format!("the stream goes on from its position{left}")))
        }
        Action::ResetSequences | Action::Cancel => Some((RequestState::Succeeded, record.message.clone())),
    }
}

fn resynced(record: &RequestRecord, states: &BTreeMap<QualifiedName, TableState>) -> Option<(RequestState, String)> {
    let its: Vec<&QualifiedName> = states.keys().filter(|table| record.is_about(table)).collect();
    if !its.iter().all(|table| matches!(states.get(table), Some(TableState::Ready | TableState::Error))) {
        return None;
    }
    let failed = in_error(its.iter().copied(), states);
    Some(match failed.is_empty() {
        true => (RequestState::Succeeded, format!("{} tables were copied again and follow the stream", its.len())),
        false => (RequestState::Failed, format!("not copied again: {failed}")),
    })
}

fn in_error<'a>(tables: impl Iterator<Item = &'a QualifiedName>, states: &BTreeMap<QualifiedName, TableState>) -> String {
    let failed = tables.filter(|table| states.get(table) == Some(&TableState::Error));
    failed.map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
