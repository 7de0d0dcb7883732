//! Events beside resources, on transitions.
//!
//! kube's recorder keeps the first note of a repeated failure, fails on notes above 1 kB and on series that the server has
//! forgotten, and its names can collide. Here a new note is a new event, notes are cut, a forgotten series is begun again, names
//! are random, and a failure to write never fails the caller.

use super::metrics::Metrics;
use super::options::Options;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::{Event, EventSeries};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use rand::RngExt as _;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tracing::warn;

/// Name under which the operator reports.
pub const REPORTER: &str = "sluice.dev/operator";
/// The API server refuses longer notes (bytes).
pub const NOTE_LIMIT: usize = 1024;
/// A repetition within this time raises the count of the event instead of making one; the API's own rule for series.
const SERIES: Duration = Duration::from_secs(360);
/// Longest wait for one write.
const DEADLINE: Duration = Duration::from_secs(5);
/// Series remembered at most; beyond it all are begun anew.
const REMEMBERED: usize = 4096;

/// Severity of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// Nothing to worry about.
    Normal,
    /// Somebody should look.
    Warning,
}

/// Writes events. Cheap to clone.
#[derive(Clone)]
pub struct Events {
    client: Client,
    metrics: Metrics,
    /// The operator's own pod.
    pod: ObjectReference,
    series: Arc<Mutex<HashMap<Key, Series>>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    regarding: String,
    reason: &'static str,
    action: &'static str,
}

#[derive(Clone, Debug)]
struct Series {
    name: String,
    note: String,
    count: i32,
    last: Instant,
}

struct Draft<'a> {
    regarding: &'a ObjectReference,
    related: Option<&'a ObjectReference>,
    kind: EventKind,
    reason: &'static str,
    action: &'static str,
    note: String,
}

impl Events {
    /// Events are reported by the pod that `options` names.
    pub fn new(client: Client, metrics: Metrics, options: &Options) -> Self {
        let pod = ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            name: Some(options.pod_name.clone()),
            namespace: Some(options.namespace.clone()),
            uid: Some(options.pod_uid.clone()).filter(|uid| !uid.is_empty()),
            ..ObjectReference::default()
        };
        Self { client, metrics, pod, series: Arc::default() }
    }

    /// Tells of `object`, in its namespace. `reason` and `action` are CamelCase; `note` is for people, without secrets, cut at
    /// [`NOTE_LIMIT`]. Failures are counted and logged.
    pub async fn publish(&self, object: &ObjectReference, kind: EventKind, reason: &'static str, action: &'static str, note: &str) {
        self.write(Draft { regarding: object, related: None, kind, reason, action, note: cut(note) }).await;
    }

    /// Tells of `related` outside its namespace: in the operator's own, beside the operator's pod. For what must outlive the
    /// namespace of a user.
    pub async fn publish_in_operator_namespace(
        &self,
        related: &ObjectReference,
        kind: EventKind,
        reason: &'static str,
        action: &'static str,
        note: &str,
    ) {
        let pod = self.pod.clone();
        self.write(Draft { regarding: &pod, related: Some(related), kind, reason, action, note: cut(note) }).await;
    }

    /// Forgets the series of an object: after a success, the next failure is a new event.
    pub fn forget(&self, object: &ObjectReference) {
        let regarding = identity(object, None);
        self.series.lock().unwrap_or_else(PoisonError::into_inner).retain(|key, _| key.regarding != regarding);
    }

    async fn write(&self, draft: Draft<'_>) {
        let key = Key { regarding: identity(draft.regarding, draft.related), reason: draft.reason, action: draft.action };
        let result = match self.repetition(&key, &draft.note) {
            Some(series) => match self.repeat(&draft, &series).await {
                // The server keeps events for an hour only, and somebody may have deleted it.
                Err(kube::Error::Api(status)) if status.is_not_found() => self.create(&draft).await.map(|name| (name, 1)),
                other => other.map(|()| (series.name, series.count + 1)),
            },
            None => self.create(&draft).await.map(|name| (name, 1)),
        };
        match result {
            Ok((name, count)) => {
                self.metrics.event(if count == 1 { "created" } else { "repeated" });
                self.remember(key, Series { name, note: draft.note, count, last: Instant::now() });
            }
            Err(error) => {
                self.metrics.event("failed");
                warn!(%error, reason = draft.reason, object = key.regarding, "an event could not be written");
            }
        }
    }

    fn repetition(&self, key: &Key, note: &str) -> Option<Series> {
        let series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        series.get(key).filter(|series| series.note == note && series.last.elapsed() < SERIES).cloned()
    }

    fn remember(&self, key: Key, series: Series) {
        let mut all = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= REMEMBERED {
            all.retain(|_, series| series.last.elapsed() < SERIES);
        }
        if all.len() >= REMEMBERED {
            all.clear();
        }
        all.insert(key, series);
    }

    async fn create(&self, draft: &Draft<'_>) -> kube::Result<String> {
        let name = event_name(draft.regarding.name.as_deref().unwrap_or("sluice"), rand::rng().random());
        let namespace = draft.regarding.namespace.clone().unwrap_or_else(|| "default".into());
        let event = Event {
            metadata: ObjectMeta { name: Some(name.clone()), namespace: Some(namespace.clone()), ..ObjectMeta::default() },
            event_time: Some(MicroTime(Timestamp::now())),
            type_: Some(if draft.kind == EventKind::Normal { "Normal" } else { "Warning" }.into()),
            reason: Some(draft.reason.into()),
            action: Some(draft.action.into()),
            note: Some(draft.note.clone()),
            regarding: Some(draft.regarding.clone()),
            related: draft.related.cloned(),
            reporting_controller: Some(REPORTER.into()),
            reporting_instance: self.pod.name.clone(),
            ..Event::default()
        };
        let api = Api::<Event>::namespaced(self.client.clone(), &namespace);
        in_time(api.create(&PostParams::default(), &event)).await?;
        Ok(name)
    }

    async fn repeat(&self, draft: &Draft<'_>, series: &Series) -> kube::Result<()> {
        let namespace = draft.regarding.namespace.as_deref().unwrap_or("default");
        let api = Api::<Event>::namespaced(self.client.clone(), namespace);
        let patch = serde_json::json!({
            "series": EventSeries { count: series.count + 1, last_observed_time: MicroTime(Timestamp::now()) },
        });
        in_time(api.patch(&series.name, &PatchParams::default(), &Patch::Merge(patch))).await?;
        Ok(())
    }
}

async fn in_time<T>(call: impl Future<Output = kube::Result<T>>) -> kube::Result<T> {
    tokio::time::timeout(DEADLINE, call).await.unwrap_or_else(|_| Err(kube::Error::Service("the API server did not answer in time".into())))
}

/// Objects are told apart by uid; a name may come back.
fn identity(regarding: &ObjectReference, related: Option<&ObjectReference>) -> String {
    let one = |object: &ObjectReference| {
        let part = |text: &Option<String>| text.clone().unwrap_or_default();
        format!("{}/{}/{}/{}", part(&object.kind), part(&object.namespace), part(&object.name), part(&object.uid))
    };
    related.map_or_else(|| one(regarding), |related| format!("{} {}", one(regarding), one(related)))
}

/// At most 253 characters, as of any object, and unlike those of other events.
fn event_name(object: &str, random: u64) -> String {
    let kept: String = object.chars().take(230).collect();
    format!("{}.{random:016x}", kept.trim_end_matches(['-', '.']))
}

/// At most [`NOTE_LIMIT`] bytes, at a character's end.
fn cut(note: &str) -> String {
    const MARK: &str = "…";
    if note.len() <= NOTE_LIMIT {
        return note.to_owned();
    }
    let end = (0..=NOTE_LIMIT - MARK.len()).rev().find(|end| note.is_char_boundary(*end)).unwrap_or(0);
    format!("{}{MARK}", &note[..end])
}

#[cfg(test)]
mod tests {
    use super::{NOTE_LIMIT, cut, event_name};

    #[test]
    fn long_notes_are_cut_at_a_character() {
        assert_eq!(cut("short"), "short");
        let exact = "x".repeat(NOTE_LIMIT);
        assert_eq!(cut(&exact), exact);
        for prefix in 0..4 {
            let long = format!("{}{}", "x".repeat(prefix), "é√😀".repeat(300));
            let short = cut(&long);
            assert!(short.len() <= NOTE_LIMIT && short.len() > NOTE_LIMIT - 8 && short.ends_with('…'), "{}", short.len());
        }
    }

    #[test]
    fn names_are_valid_for_the_longest_object() {
        let name = event_name(&format!("{}.{}", "a".repeat(229), "b".repeat(23)), u64::MAX);
        assert!(name.len() <= 253 && !name.contains(".."), "{name}");
    }
}
