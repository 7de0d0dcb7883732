//! What is seen of a worker: its Deployment, its pod, and what it says itself. Pure.

use crate::operator::poller::Polled;
use crate::operator::slim::{SlimContainerStatus, SlimDeployment, SlimPod, Why};
use crate::operator::worker_client::{WorkerError, address};
use crate::worker::contract::{PORT, Phase, Status};
use k8s_openapi::api::core::v1::PodCondition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use std::sync::Arc;
use std::time::Duration;

/// Name of the port in the pod's container.
const PORT_NAME: &str = "http";
/// How long a worker whose pod is not ready may be silent before that is worth a word of its own.
const COMING_UP: Duration = Duration::from_secs(60);
/// How long a container may fail to start, before only a human can help: registries have bad minutes.
const PATIENCE: Duration = Duration::from_secs(180);
/// The same for a pod without a node, or without what it mounts: autoscalers and volumes take minutes.
const LONG_PATIENCE: Duration = Duration::from_secs(600);
/// Restarts after which a worker that ends again is not expected to do better by itself. By the kubelet's back-off the fifth comes
/// after about five minutes.
const RESTARTS: i32 = 5;
/// A run that lasts longer is no part of a crash loop: the kubelet forgets its back-off then, too.
const GOOD_RUN: Duration = Duration::from_secs(600);
/// What to do about an image.
const PULL: &str = "correct the image (spec.worker.image, or image and worker.image of the chart), or let the node pull it";
/// Why a container does not start, by the kubelet's reasons, and what to do.
const CANNOT_START: [(&str, &str); 8] = [
    ("ImagePullBackOff", PULL),
    ("ErrImagePull", PULL),
    ("ImageInspectError", PULL),
    ("InvalidImageName", PULL),
    ("ErrImageNeverPull", "load the image onto the node, or let the node pull it (worker.imagePullPolicy of the chart)"),
    ("CreateContainerConfigError", "make what it names"),
    ("CreateContainerError", DESCRIBE),
    ("RunContainerError", DESCRIBE),
];
/// Where more is said.
const DESCRIBE: &str = "see `kubectl describe pod`";
/// The same of a worker that has run.
const LOOK: &str = "see `kubectl logs --previous` of its pod";

/// What is known of a Mirror's worker.
#[derive(Clone, Debug)]
pub struct Observed {
    /// Whether there is a Deployment.
    pub exists: bool,
    /// What it does.
    pub worker: Worker,
    /// Name of its pod.
    pub pod: Option<String>,
    /// Where it listens.
    pub address: Option<String>,
    /// Image it runs.
    pub image: Option<String>,
}

/// What a worker does.
#[derive(Clone, Debug)]
pub enum Worker {
    /// Nothing runs yet, for this reason.
    Starting(String),
    /// Its pod does not start, for this reason.
    CannotStart {
        /// For people, with what to do.
        why: String,
        /// For so long that it will not by itself.
        lasts: bool,
    },
    /// Its pod starts and ends again and again.
    KeepsEnding {
        /// For people, with what to look at.
        why: String,
        /// So often that it will not end by itself.
        lasts: bool,
    },
    /// It runs and does not answer.
    Unreachable(String),
    /// It speaks a contract that is no longer spoken here.
    Outdated(String),
    /// It answers.
    Answers(Arc<Status>),
}

impl Worker {
    /// Whether it is in a trouble that will not pass by itself.
    fn lasts(&self) -> bool {
        matches!(self, Self::CannotStart { lasts: true, .. } | Self::KeepsEnding { lasts: true, .. })
    }

    /// What it says, when it answers.
    pub fn status(&self) -> Option<&Status> {
        match self {
            Self::Answers(status) => Some(status),
            _ => None,
        }
    }
}

/// Puts together what is seen `now`. `pods` are those of this Mirror.
pub fn observe(deployment: Option<&SlimDeployment>, pods: &[Arc<SlimPod>], polled: Option<&Polled>, now: Timestamp) -> Observed {
    let pod = current(pods);
    Observed {
        exists: deployment.is_some(),
        worker: match pod {
            Some(pod) => judged(pod, polled, now),
            None => refused(deployment, now).unwrap_or_else(|| Worker::Starting(without_pod(deployment, pods))),
        },
        pod: pod.and_then(|pod| pod.metadata.name.clone()),
        address: pod.and_then(address_of),
        image: pod.and_then(|pod| Some(pod.status.container_statuses.first()?.image.clone())).filter(|image| !image.is_empty()),
    }
}

/// The pod that counts: not ending, ready before others, the youngest of equals.
pub fn current(pods: &[Arc<SlimPod>]) -> Option<&SlimPod> {
    let alive = pods.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none() && !is_over(pod));
    let age = |pod: &SlimPod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
    alive.max_by_key(|pod| (pod.is_ready(), age(pod), pod.metadata.name.clone())).map(AsRef::as_ref)
}

/// Whether the pod that counts can't start as it is, or ends whenever it does, so that nothing is lost when another template takes its
/// place.
pub fn is_stuck(pods: &[Arc<SlimPod>], now: Timestamp) -> bool {
    let is_hopeless =
        |container: &SlimContainerStatus| obstacle(container).is_some() || trouble(container, now).is_some_and(|trouble| trouble.lasts());
    current(pods).is_some_and(|pod| pod.status.container_statuses.iter().any(is_hopeless))
}

fn is_over(pod: &SlimPod) -> bool {
    matches!(pod.status.phase.as_deref(), Some("Failed" | "Succeeded"))
}

/// Where the worker in `pod` listens: on the port that its container names, once it has an address.
pub fn address_of(pod: &SlimPod) -> Option<String> {
    let ports = pod.spec.containers.iter().flat_map(|container| &container.ports);
    let port = ports.into_iter().find(|port| port.name == PORT_NAME).map_or(PORT, |port| port.container_port);
    pod.status.pod_ip.as_deref().filter(|ip| !ip.is_empty()).map(|ip| address(ip, port))
}

fn without_pod(deployment: Option<&SlimDeployment>, pods: &[Arc<SlimPod>]) -> String {
    let Some(_) = deployment else {
        return "there is no worker".to_owned();
    };
    if let Some(over) = pods.iter().find(|pod| is_over(pod)) {
        let status = &over.status;
        let (reason, message) = (status.reason.as_deref().unwrap_or("it ended"), status.message.as_deref().unwrap_or_default());
        return format!(
            "the worker's last pod is over ({reason}{}{message}); another is awaited",
            if message.is_empty() { "" } else { ": " }
        );
    }
    if pods.is_empty() { "the worker's pod is awaited" } else { "the worker's last pod is ending" }.to_owned()
}

/// Quota, admission and the like refuse pods of the Deployment.
fn refused(deployment: Option<&SlimDeployment>, now: Timestamp) -> Option<Worker> {
    let mut conditions = deployment?.status.conditions.iter();
    let failure = conditions.find(|condition| condition.type_ == "ReplicaFailure" && condition.status == "True")?;
    let message = failure.message.as_deref().unwrap_or("no reason");
    let why = format!("the worker's pod is refused: {message}; raise the quota, or change what refuses it");
    Some(Worker::CannotStart { why, lasts: is_longer(failure.last_transition_time.as_ref(), PATIENCE, now) })
}

/// Whether more than `patience` has passed since then; not, when nobody knows.
fn is_longer(since: Option<&Time>, patience: Duration, now: Timestamp) -> bool {
    since.is_some_and(|since| now.duration_since(since.0).unsigned_abs() > patience && now > since.0)
}

/// What the worker says goes before what its pod looks like: the kubelet is slower. But one that has ended so often is believed when it
/// has come up.
fn judged(pod: &SlimPod, polled: Option<&Polled>, now: Timestamp) -> Worker {
    let trouble = pod.status.container_statuses.iter().find_map(|container| trouble(container, now));
    if let Some(status) = polled.filter(|polled| polled.current().is_some()).and_then(|polled| polled.status.as_ref()) {
        return match trouble {
            Some(trouble) if trouble.lasts() && is_coming_up(&status.0) => trouble,
            _ => Worker::Answers(Arc::clone(&status.0)),
        };
    }
    if let Some(trouble) = trouble {
        return trouble;
    }
    if let Some(why) = pod.status.container_statuses.iter().find_map(obstacle) {
        return Worker::CannotStart { why, lasts: is_longer(since(pod, "Ready"), PATIENCE, now) };
    }
    if let Some(failure) = polled.and_then(|polled| polled.failure.as_ref()) {
        return match &failure.error {
            error @ WorkerError::Contract(_) => Worker::Outdated(format!("{error}; it streams on, restart it when it suits you")),
            // A server that is coming up refuses for a moment.
            error if pod.is_ready() || failure.since.elapsed() > COMING_UP => Worker::Unreachable(error.to_string()),
            _ => Worker::Starting("the worker is starting".to_owned()),
        };
    }
    pending(pod, now)
}

fn condition<'a>(pod: &'a SlimPod, kind: &str) -> Option<&'a PodCondition> {
    pod.status.conditions.iter().find(|condition| condition.type_ == kind)
}

/// Since when a condition of the pod is what it is; before the kubelet has said so, since the pod was made.
fn since<'a>(pod: &'a SlimPod, kind: &str) -> Option<&'a Time> {
    condition(pod, kind).and_then(|condition| condition.last_transition_time.as_ref()).or(pod.metadata.creation_timestamp.as_ref())
}

/// A pod of which nothing bad is known but that it does not run.
fn pending(pod: &SlimPod, now: Timestamp) -> Worker {
    let unscheduled = condition(pod, "PodScheduled").filter(|condition| condition.status == "False");
    let waiting = pod.status.container_statuses.iter().find_map(|container| container.state.waiting.as_ref());
    let (why, cure) = match (unscheduled, waiting.and_then(|waiting| waiting.reason.as_deref())) {
        (Some(unscheduled), _) => {
            let (reason, why) = (unscheduled.reason.as_deref(), unscheduled.message.as_deref());
            let (reason, why) = (reason.unwrap_or("Unschedulable"), why.unwrap_or("no node is free"));
            let cure = "make room, or change spec.worker.resources, nodeSelector or tolerations";
            (format!("the worker's pod waits for a node ({reason}): {why}"), cure)
        }
        (None, Some(reason)) => (format!("the worker is starting ({reason})"), DESCRIBE),
        (None, None) => ("the worker is starting".to_owned(), DESCRIBE),
    };
    let is_pending = pod.status.phase.as_deref() == Some("Pending");
    if is_pending && is_longer(since(pod, "PodScheduled"), LONG_PATIENCE, now) {
        return Worker::CannotStart { why: format!("{why}, for more than {} minutes; {cure}", LONG_PATIENCE.as_secs() / 60), lasts: true };
    }
    Worker::Starting(why)
}

fn is_coming_up(status: &Status) -> bool {
    matches!(status.phase, Phase::Starting | Phase::SettingUp) && status.error.is_none()
}

/// What is wrong with a container that has run.
fn trouble(container: &SlimContainerStatus, now: Timestamp) -> Option<Worker> {
    let (state, last) = (&container.state, container.last_state.terminated.as_ref());
    let loops = |ended: Option<&Why>| container.restart_count >= RESTARTS && ended.is_none_or(was_short);
    if let Some(ended) = &state.terminated {
        let why = format!("the worker has ended: {}; {LOOK}", explained(ended));
        return Some(Worker::KeepsEnding { why, lasts: loops(Some(ended)) });
    }
    let lasts = loops(last);
    let applies = match &state.waiting {
        Some(waiting) => waiting.reason.as_deref() == Some("CrashLoopBackOff"),
        // It runs once more, as it did before.
        None => lasts && !container.ready && last.is_some_and(|last| !is_longer(last.finished_at.as_ref(), GOOD_RUN, now)),
    };
    let last = last.map_or_else(|| "for an unknown reason".to_owned(), explained);
    let why = format!("the worker was restarted {} times and ended again: {last}; {LOOK}", container.restart_count);
    applies.then_some(Worker::KeepsEnding { why, lasts })
}

/// Whether it ended soon after it began; so it counts when nobody knows.
fn was_short(ended: &Why) -> bool {
    let end = ended.finished_at.as_ref().map(|end| end.0);
    end.is_none_or(|end| !is_longer(ended.started_at.as_ref(), GOOD_RUN, end))
}

/// Why a container does not start, and what to do about it.
fn obstacle(container: &SlimContainerStatus) -> Option<String> {
    let waiting = container.state.waiting.as_ref()?;
    let (reason, cure) = CANNOT_START.iter().find(|(reason, _)| waiting.reason.as_deref() == Some(reason))?;
    let message = waiting.message.as_deref().unwrap_or("the kubelet does not say more");
    Some(format!("the worker cannot start ({reason}): {message}; {cure}"))
}

/// Why a container ended, in words. Exit codes as in the worker's `--help`; beyond 128 they name a signal.
fn explained(ended: &Why) -> String {
    let meaning = match (ended.reason.as_deref(), ended.exit_code) {
        (Some("OOMKilled"), _) => "it needed more memory than its limit (OOMKilled)".to_owned(),
        (_, Some(0)) => "it was told to".to_owned(),
        (_, Some(3)) => "another worker has claimed the stream (exit code 3)".to_owned(),
        (_, Some(137)) => "it was killed (exit code 137)".to_owned(),
        (_, Some(143)) => "it was told to end and took too long (exit code 143)".to_owned(),
        (_, Some(code)) => format!("it failed (exit code {code})"),
        (Some(reason), None) => reason.to_owned(),
        (None, None) => "for an unknown reason".to_owned(),
    };
    match ended.message.as_deref().filter(|message| !message.is_empty()) {
        Some(message) => format!("{meaning}: {message}"),
        None => meaning,
    }
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value)] // documents are written in place
mod tests {
    use super::*;
    use crate::operator::poller::PollFailure;
    use serde_json::{Value, json};
    use std::time::Instant;

    fn pod(status: Value) -> Arc<SlimPod> {
        let meta = json!({"name": "p", "creationTimestamp": "2026-01-01T00:00:00Z"});
        Arc::new(serde_json::from_value(json!({"metadata": meta, "status": status})).expect("a pod"))
    }

    fn container(state: Value, last: Value) -> Arc<SlimPod> {
        let one = json!({"name": "worker", "image": "sluice:1", "restartCount": 4, "state": state, "lastState": last});
        pod(json!({"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": [one]}))
    }

    fn deployment() -> SlimDeployment {
        SlimDeployment::default()
    }

    fn seen(pod: Arc<SlimPod>) -> (&'static str, String) {
        words(observe(Some(&deployment()), &[pod], None, at("2026-01-01T00:00:10Z")).worker)
    }

    fn at(time: &str) -> Timestamp {
        time.parse().expect("a time")
    }

    fn words(worker: Worker) -> (&'static str, String) {
        match worker {
            Worker::Starting(why) => ("starting", why),
            Worker::CannotStart { why, lasts: false } => ("cannot start", why),
            Worker::CannotStart { why, lasts: true } => ("never starts", why),
            Worker::KeepsEnding { why, lasts: false } => ("keeps ending", why),
            Worker::KeepsEnding { why, lasts: true } => ("crash loops", why),
            Worker::Unreachable(why) => ("unreachable", why),
            Worker::Outdated(why) => ("outdated", why),
            Worker::Answers(status) => ("answers", status.pod.clone()),
        }
    }

    fn failed(error: WorkerError, count: u32) -> Polled {
        Polled { status: None, failure: Some(PollFailure { error, count, since: Instant::now() }) }
    }

    fn answered() -> Polled {
        let status = json!({"contract": 1, "version": "1", "generation": 1, "pod": "p", "phase": "Streaming", "epoch": 1, "slot": "s",
            "publication": "p", "tables": {}, "rowsCopied": 0, "rowsToCopy": 0, "rowsStreamed": 0, "snapshotCompleted": true, "streaming": true});
        Polled { status: Some((Arc::new(serde_json::from_value(status).expect("a status")), Instant::now())), failure: None }
    }

    #[test]
    fn pods_that_do_not_start_are_explained() {
        for (state, last, kind, part) in [
            (json!({"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}), json!({}), "cannot start", "no such image"),
            (
                json!({"waiting": {"reason": "CreateContainerConfigError", "message": "secret \"x\" not found"}}),
                json!({}),
                "cannot start",
                "secret",
            ),
            (
                json!({"waiting": {"reason": "CrashLoopBackOff"}}),
                json!({"terminated": {"reason": "OOMKilled", "exitCode": 137}}),
                "keeps ending",
                "memory",
            ),
            (
                json!({"waiting": {"reason": "CrashLoopBackOff"}}),
                json!({"terminated": {"reason": "Error", "exitCode": 3}}),
                "keeps ending",
                "claimed",
            ),
            (
                json!({"waiting": {"reason": "CrashLoopBackOff"}}),
                json!({"terminated": {"reason": "Error", "exitCode": 1}}),
                "keeps ending",
                "exit code 1",
            ),
            (json!({"terminated": {"reason": "Error", "exitCode": 137}}), json!({}), "keeps ending", "killed"),
            (json!({"waiting": {"reason": "ContainerCreating"}}), json!({}), "starting", "ContainerCreating"),
            (json!({"running": {}}), json!({}), "starting", "starting"),
        ] {
            let (got, why) = seen(container(state.clone(), last));
            assert!(got == kind && why.contains(part), "{state}: {got}, {why}");
        }
        let unscheduled = json!([{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes"}]);
        assert!(seen(pod(json!({"phase": "Pending", "conditions": unscheduled}))).1.contains("0/1 nodes"));
    }

    #[test]
    fn what_does_not_start_for_long_needs_a_human() {
        let seen = |pod: &Arc<SlimPod>, time| words(observe(Some(&deployment()), std::slice::from_ref(pod), None, at(time)).worker);
        let with = |conditions: Value, state: Value| {
            let one = json!({"name": "worker", "image": "sluice:1", "state": state});
            pod(json!({"phase": "Pending", "conditions": conditions, "containerStatuses": [one]}))
        };
        for reason in ["ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError"] {
            let state = json!({"waiting": {"reason": reason, "message": "what the kubelet says"}});
            let new = with(json!([]), state.clone());
            assert!(is_stuck(std::slice::from_ref(&new), at("2026-01-01T00:00:10Z")));
            assert_eq!(seen(&new, "2026-01-01T00:03:00Z").0, "cannot start", "{reason}");
            let (kind, why) = seen(&new, "2026-01-01T00:03:01Z");
            assert!(kind == "never starts" && why.contains("what the kubelet says; ") && why.contains(reason), "{kind}: {why}");
            // A pod that has run counts from its end.
            let ran = json!([{"type": "Ready", "status": "False", "lastTransitionTime": "2026-01-05T00:00:00Z"}]);
            assert_eq!(seen(&with(ran, state), "2026-01-05T00:02:00Z").0, "cannot start", "{reason}");
        }
        let full = json!([{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes", "lastTransitionTime": "2026-01-01T00:00:01Z"}]);
        let homeless = pod(json!({"phase": "Pending", "conditions": full}));
        assert_eq!(seen(&homeless, "2026-01-01T00:10:00Z").0, "starting", "a node may be on its way");
        let (kind, why) = seen(&homeless, "2026-01-01T00:10:02Z");
        assert!(kind == "never starts" && why.contains("0/3 nodes") && why.contains("spec.worker.resources"), "{kind}: {why}");
        let unmounted = with(json!([]), json!({"waiting": {"reason": "ContainerCreating"}}));
        assert_eq!(seen(&unmounted, "2026-01-01T00:10:00Z").0, "starting");
        assert_eq!(seen(&unmounted, "2026-01-01T00:10:01Z").0, "never starts");
        let now = at("2026-01-01T00:30:00Z");
        assert!(!is_stuck(&[homeless], now) && !is_stuck(&[unmounted], now));
    }

    /// A container that has been restarted so often, and whose last run began and ended at these seconds.
    fn restarted(times: i32, state: Value, run: [&str; 2]) -> Arc<SlimPod> {
        let last = json!({"terminated": {"reason": "Error", "exitCode": 1, "startedAt": run[0], "finishedAt": run[1]}});
        let one = json!({"name": "worker", "image": "sluice:1", "restartCount": times, "state": state, "lastState": last});
        pod(json!({"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": [one]}))
    }

    #[test]
    fn a_worker_that_ends_soon_after_each_start_needs_a_human() {
        let waiting = || json!({"waiting": {"reason": "CrashLoopBackOff"}});
        let seen = |pod: &Arc<SlimPod>, time| words(observe(Some(&deployment()), std::slice::from_ref(pod), None, at(time)).worker);
        let short = ["2026-01-01T01:00:00Z", "2026-01-01T01:00:20Z"];
        let soon = "2026-01-01T01:02:00Z";
        assert_eq!(seen(&restarted(4, waiting(), short), soon).0, "keeps ending", "it may be a bad moment");
        let (kind, why) = seen(&restarted(5, waiting(), short), soon);
        assert!(kind == "crash loops" && why.contains("5 times") && why.contains("kubectl logs --previous"), "{kind}: {why}");
        assert!(is_stuck(&[restarted(5, waiting(), short)], at(soon)) && !is_stuck(&[restarted(4, waiting(), short)], at(soon)));
        let long = ["2026-01-01T00:00:00Z", "2026-01-01T01:00:20Z"];
        assert_eq!(seen(&restarted(50, waiting(), long), soon).0, "keeps ending", "it has worked for an hour");
        let ended = json!({"terminated": {"exitCode": 1, "startedAt": short[0], "finishedAt": short[1]}});
        assert_eq!(seen(&restarted(5, ended, short), soon).0, "crash loops");

        // It runs again, which says nothing before it has come up or stayed.
        let again = restarted(5, json!({"running": {}}), short);
        assert_eq!(seen(&again, soon).0, "crash loops");
        assert_eq!(seen(&again, "2026-01-01T01:10:21Z").0, "starting");
        assert_eq!(seen(&restarted(4, json!({"running": {}}), short), soon).0, "starting");
        let says = |phase: &str, error: Value| {
            let mut polled = answered();
            let (status, _) = polled.status.as_mut().expect("a status");
            let mut said = serde_json::to_value(status.as_ref()).expect("JSON");
            said["phase"] = json!(phase);
            said["error"] = error;
            *status = Arc::new(serde_json::from_value(said).expect("a status"));
            words(observe(Some(&deployment()), std::slice::from_ref(&again), Some(&polled), at(soon)).worker).0
        };
        assert_eq!(says("Starting", Value::Null), "crash loops");
        assert_eq!(says("Streaming", Value::Null), "answers");
        let error = json!({"class": "Retry", "reason": "SourceUnreachable", "message": "m", "count": 1});
        assert_eq!(says("Starting", error), "answers", "it knows better");
    }

    #[test]
    fn without_a_pod_the_deployment_says_why() {
        assert_eq!(words(observe(None, &[], None, Timestamp::UNIX_EPOCH).worker).1, "there is no worker");
        assert_eq!(words(observe(Some(&deployment()), &[], None, Timestamp::UNIX_EPOCH).worker).1, "the worker's pod is awaited");
        let evicted = pod(json!({"phase": "Failed", "reason": "Evicted", "message": "too much storage"}));
        assert!(
            words(observe(Some(&deployment()), &[evicted], None, Timestamp::UNIX_EPOCH).worker).1.contains("Evicted: too much storage")
        );
        let failure =
            json!({"type": "ReplicaFailure", "status": "True", "message": "exceeded quota", "lastTransitionTime": "2026-01-01T00:00:00Z"});
        let quota: SlimDeployment =
            serde_json::from_value(json!({"metadata": {}, "status": {"conditions": [failure]}})).expect("a deployment");
        let at = |time| words(observe(Some(&quota), &[], None, at(time)).worker);
        let (kind, why) = at("2026-01-01T00:02:59Z");
        assert!(kind == "cannot start" && why.starts_with("the worker's pod is refused: exceeded quota; "), "{kind}: {why}");
        assert_eq!(at("2026-01-01T00:03:01Z").0, "never starts");
    }

    #[test]
    fn what_the_worker_says_goes_before_its_pod() {
        let crashed = container(json!({"waiting": {"reason": "CrashLoopBackOff"}}), json!({}));
        let observed = observe(Some(&deployment()), &[crashed], Some(&answered()), Timestamp::UNIX_EPOCH);
        assert_eq!(words(observed.worker).0, "answers");
        assert_eq!((observed.address.as_deref(), observed.image.as_deref()), (Some("10.0.0.1:8080"), Some("sluice:1")));
    }

    #[test]
    fn silence_is_judged_by_the_pods_readiness() {
        let silent = WorkerError::Unreachable { address: "a".into(), why: "timeout".into() };
        let ready = pod(json!({"phase": "Running", "podIP": "::1", "conditions": [{"type": "Ready", "status": "True"}]}));
        let judge = |pod, error| words(observe(Some(&deployment()), &[pod], Some(&failed(error, 2)), Timestamp::UNIX_EPOCH).worker).0;
        assert_eq!(judge(Arc::clone(&ready), silent.clone()), "unreachable");
        assert_eq!(judge(container(json!({"running": {}}), json!({})), silent), "starting");
        assert_eq!(judge(ready, WorkerError::Contract(0)), "outdated");
    }

    #[test]
    fn the_current_pod_is_neither_ending_nor_over() {
        let named = |name: &str, deleting: bool, phase: &str, created: &str| {
            let mut meta = json!({"name": name, "creationTimestamp": created});
            if deleting {
                meta["deletionTimestamp"] = json!("2026-01-02T00:00:00Z");
            }
            Arc::new(serde_json::from_value::<SlimPod>(json!({"metadata": meta, "status": {"phase": phase}})).expect("a pod"))
        };
        let pods = [
            named("ending", true, "Running", "2026-01-09T00:00:00Z"),
            named("evicted", false, "Failed", "2026-01-08T00:00:00Z"),
            named("old", false, "Running", "2026-01-01T00:00:00Z"),
            named("new", false, "Pending", "2026-01-07T00:00:00Z"),
        ];
        assert_eq!(current(&pods).and_then(|pod| pod.metadata.name.as_deref()), Some("new"));
        assert!(current(&pods[..2]).is_none());
    }

    #[test]
    fn the_port_is_the_containers() {
        let own: SlimPod = serde_json::from_value(json!({
            "metadata": {}, "spec": {"containers": [{"name": "worker", "ports": [{"name": "other", "containerPort": 1}, {"name": "http", "containerPort": 4000}]}]},
            "status": {"podIP": "fd00::1"},
        }))
        .expect("a pod");
        assert_eq!(address_of(&own).as_deref(), Some("[fd00::1]:4000"));
        assert_eq!(address_of(&SlimPod::default()), None);
    }
}
