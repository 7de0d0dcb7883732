//! One-off actions in the status: the one that is asked for, and those before it.

use super::News;
use crate::operator::slim::SlimMirror;
use crate::resources::conditions::{cut, reason};
use crate::resources::{MirrorStatus, RequestStatus};
use crate::worker::contract::RequestReport;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

/// Earlier requests in the status.
const HISTORY: usize = 10;
/// Bytes of a message, by the schema.
const MESSAGE_LIMIT: usize = 1024;
/// Of a request that no worker has taken yet.
const PENDING: &str = "Pending";
const RUNNING: &str = "Running";
/// The action that ends another one.
const CANCEL: &str = "Cancel";

/// Puts what the worker says of requests into the status; what was known stays as long as it says nothing.
pub(super) fn requests(status: MirrorStatus, mirror: &SlimMirror, said: Option<&[RequestReport]>) -> MirrorStatus {
    let mut known: Vec<RequestStatus> = match said {
        Some(said) => said.iter().map(of_report).collect(),
        None => status.request.iter().chain(&status.request_history).filter(|known| known.state != PENDING).cloned().collect(),
    };
    let asked = mirror.spec.request.as_ref();
    let place = asked.and_then(|asked| known.iter().position(|known| known.id == asked.id));
    let request = match (asked, place) {
        (_, Some(place)) => Some(known.remove(place)),
        (Some(asked), None) => {
            let running = known.iter().find(|known| known.state == RUNNING && asked.action != CANCEL);
            let message = match running {
                _ if mirror.spec.suspend => "taken when the Mirror is resumed".to_owned(),
                Some(running) => format!("taken when request {} is over", running.id),
                None => "taken by the worker's next session".to_owned(),
            };
            Some(RequestStatus {
                id: asked.id.clone(),
                action: asked.action.clone(),
                state: PENDING.to_owned(),
                message: Some(message),
                ..RequestStatus::default()
            })
        }
        (None, None) if known.is_empty() => None,
        (None, None) => Some(known.remove(0)),
    };
    known.truncate(HISTORY);
    MirrorStatus { request, request_history: known, ..status }
}

fn of_report(report: &RequestReport) -> RequestStatus {
    let time = |text: &String| text.parse().ok().map(Time);
    RequestStatus {
        id: report.id.clone(),
        action: report.action.clone(),
        state: report.state.clone(),
        started_at: time(&report.started_at),
        finished_at: report.finished_at.as_ref().and_then(time),
        message: Some(cut(report.message.clone(), MESSAGE_LIMIT)).filter(|message| !message.is_empty()),
    }
}

/// Whether a request is on its way that leaves a Mirror as ready as it was: every one but the copy of all tables.
pub(super) fn keeps_ready(mirror: &SlimMirror, old: &MirrorStatus, said: Option<&[RequestReport]>) -> bool {
    let said = said.unwrap_or_default();
    let is_full = said.iter().any(|report| report.state == RUNNING && report.is_full_resync);
    let is_open = said.iter().any(|report| report.state == RUNNING);
    let waits = mirror.spec.request.as_ref().is_some_and(|asked| {
        let was_over = old.request.iter().chain(&old.request_history).any(|known| known.id == asked.id && known.finished_at.is_some());
        !was_over && said.iter().all(|report| report.id != asked.id)
    });
    !is_full && (is_open || waits)
}

/// What has become of requests since `old`.
pub(super) fn news<'a>(old: &MirrorStatus, status: &'a MirrorStatus) -> Vec<News<'a>> {
    let before = |id: &str| old.request.iter().chain(&old.request_history).find(|known| known.id == id);
    // A status that was lost tells nothing new of what lies far back.
    let told = status.request.iter().chain(status.request_history.iter().filter(|known| before(&known.id).is_some()));
    told.filter(|now| before(&now.id).is_none_or(|before| before.state != now.state))
        .filter_map(|now| {
            let (reason, calm) = match now.state.as_str() {
                RUNNING => (reason::REQUEST_TAKEN, true),
                "Succeeded" => (reason::REQUEST_SUCCEEDED, true),
                "Cancelled" => (reason::REQUEST_CANCELLED, true),
                "Skipped" => (reason::REQUEST_SKIPPED, true),
                "Failed" => (reason::REQUEST_FAILED, false),
                _ => return None,
            };
            Some(News { calm, reason, message: format!("{} {}: {}", now.action, now.id, now.message.as_deref().unwrap_or("done")).into() })
        })
        .collect()
}
