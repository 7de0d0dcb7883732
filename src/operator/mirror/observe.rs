//! What is seen of a worker: its Deployment, its pod, and what it says itself. Pure.

use crate::operator::poller::Polled;
use crate::operator::watch::{SlimContainerStatus, SlimDeployment, SlimPod, Why};
use crate::operator::worker_client::{WorkerError, address};
use crate::worker::contract::{PORT, Status};
use std::sync::Arc;

/// Name of the port in the pod's container.
const PORT_NAME: &str = "http";
/// Why a container does not start, and only a change of something helps.
const CANNOT_START: [&str; 8] = [
    "ImagePullBackOff",
    "ErrImagePull",
    "ErrImageNeverPull",
    "InvalidImageName",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
    "CrashLoopBackOff",
];

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
    CannotStart(String),
    /// Its pod starts and ends again and again, for this reason.
    KeepsEnding(String),
    /// It runs and does not answer.
    Unreachable(String),
    /// It speaks a contract that is no longer spoken here.
    Outdated(String),
    /// It answers.
    Answers(Arc<Status>),
}

impl Worker {
    /// What it says, when it answers.
    pub fn status(&self) -> Option<&Status> {
        match self {
            Self::Answers(status) => Some(status),
            _ => None,
        }
    }
}

/// Puts together what is seen. `pods` are those of this Mirror.
pub fn observe(deployment: Option<&SlimDeployment>, pods: &[Arc<SlimPod>], polled: Option<&Polled>) -> Observed {
    let pod = current(pods);
    Observed {
        exists: deployment.is_some(),
        worker: pod.map_or_else(|| Worker::Starting(without_pod(deployment, pods)).refused(deployment), |pod| judged(pod, polled)),
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

impl Worker {
    /// Quota, admission and the like refuse pods of the Deployment.
    fn refused(self, deployment: Option<&SlimDeployment>) -> Self {
        let conditions = deployment.map_or(&[][..], |deployment| &deployment.status.conditions);
        match conditions.iter().find(|condition| condition.type_ == "ReplicaFailure" && condition.status == "True") {
            Some(failure) => {
                Self::CannotStart(format!("the worker's pod is refused: {}", failure.message.as_deref().unwrap_or("no reason")))
            }
            None => self,
        }
    }
}

/// What the worker says goes before what its pod looks like: the kubelet is slower.
fn judged(pod: &SlimPod, polled: Option<&Polled>) -> Worker {
    if let Some(status) = polled.filter(|polled| polled.current().is_some()).and_then(|polled| polled.status.as_ref()) {
        return Worker::Answers(Arc::clone(&status.0));
    }
    if let Some(trouble) = pod.status.container_statuses.iter().find_map(trouble) {
        return trouble;
    }
    if let Some(failure) = polled.and_then(|polled| polled.failure.as_ref()) {
        return match &failure.error {
            error @ WorkerError::Contract(_) => Worker::Outdated(format!("{error}; it streams on, restart it when it suits you")),
            // A server that has just come up refuses for a moment.
            error if pod.is_ready() => Worker::Unreachable(error.to_string()),
            _ => Worker::Starting("the worker is starting".to_owned()),
        };
    }
    Worker::Starting(pending(pod))
}

fn pending(pod: &SlimPod) -> String {
    let scheduled = pod.status.conditions.iter().find(|condition| condition.type_ == "PodScheduled");
    if let Some(unscheduled) = scheduled.filter(|condition| condition.status == "False") {
        let why = unscheduled.message.as_deref().unwrap_or("no node is free");
        return format!("the worker's pod waits for a node ({}): {why}", unscheduled.reason.as_deref().unwrap_or("Unschedulable"));
    }
    let waiting = pod.status.container_statuses.iter().find_map(|container| container.state.waiting.as_ref());
    match waiting.and_then(|waiting| waiting.reason.as_deref()) {
        Some(reason) => format!("the worker is starting ({reason})"),
        None => "the worker is starting".to_owned(),
    }
}

/// What is wrong with a container that does not run.
fn trouble(container: &SlimContainerStatus) -> Option<Worker> {
    if let Some(ended) = &container.state.terminated {
        return Some(Worker::KeepsEnding(format!("the worker has ended: {}", explained(ended))));
    }
    let waiting = container.state.waiting.as_ref()?;
    let reason = waiting.reason.as_deref().filter(|reason| CANNOT_START.contains(reason))?;
    if reason == "CrashLoopBackOff" {
        let last = container.last_state.terminated.as_ref().map_or_else(|| "for an unknown reason".to_owned(), explained);
        return Some(Worker::KeepsEnding(format!("the worker was restarted {} times and ended again: {last}", container.restart_count)));
    }
    let message = waiting.message.as_deref().unwrap_or("see `kubectl describe pod`");
    Some(Worker::CannotStart(format!("the worker cannot start ({reason}): {message}")))
}

/// Why a container ended, in words. Exit codes as in the worker's `--help`; beyond 128 they name a signal.
fn explained(ended: &Why) -> String {
    let meaning = match (ended.reason.as_deref(), ended.exit_code) {
        (Some("OOMKilled"), _) => "it needed more memory than its limit (OOMKilled)".to_owned(),
        (_, Some(0)) => "it was told to".to_owned(),
        (_, Some(3)) => "another worker has claimed the stream (exit code 3)".to_owned(),
        (_, Some(137)) => "it was killed (exit code 137)".to_owned(),
        (_, Some(143)) => "it was told to end and took too long (exit code 143)".to_owned(),
        (_, Some(code)) => format!("it failed (exit code {code}); see its log"),
        (Some(reason), None) => reason.to_owned(),
        (None, None) => "for an unknown reason".to_owned(),
    };
    match ended.message.as_deref().filter(|message| !message.is_empty()) {
        Some(message) => format!("{meaning}: {message}"),
        None => meaning,
    }
}

#[cfg(test)]
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
        words(observe(Some(&deployment()), &[pod], None).worker)
    }

    fn words(worker: Worker) -> (&'static str, String) {
        match worker {
            Worker::Starting(why) => ("starting", why),
            Worker::CannotStart(why) => ("cannot start", why),
            Worker::KeepsEnding(why) => ("keeps ending", why),
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
    fn without_a_pod_the_deployment_says_why() {
        assert_eq!(words(observe(None, &[], None).worker).1, "there is no worker");
        assert_eq!(words(observe(Some(&deployment()), &[], None).worker).1, "the worker's pod is awaited");
        let evicted = pod(json!({"phase": "Failed", "reason": "Evicted", "message": "too much storage"}));
        assert!(words(observe(Some(&deployment()), &[evicted], None).worker).1.contains("Evicted: too much storage"));
        let quota: SlimDeployment = serde_json::from_value(
            json!({"metadata": {}, "status": {"conditions": [{"type": "ReplicaFailure", "status": "True", "message": "exceeded quota"}]}}),
        )
        .expect("a deployment");
        assert_eq!(words(observe(Some(&quota), &[], None).worker), ("cannot start", "the worker's pod is refused: exceeded quota".into()));
    }

    #[test]
    fn what_the_worker_says_goes_before_its_pod() {
        let crashed = container(json!({"waiting": {"reason": "CrashLoopBackOff"}}), json!({}));
        let observed = observe(Some(&deployment()), &[crashed], Some(&answered()));
        assert_eq!(words(observed.worker).0, "answers");
        assert_eq!((observed.address.as_deref(), observed.image.as_deref()), (Some("10.0.0.1:8080"), Some("sluice:1")));
    }

    #[test]
    fn silence_is_judged_by_the_pods_readiness() {
        let silent = WorkerError::Unreachable { address: "a".into(), why: "timeout".into() };
        let ready = pod(json!({"phase": "Running", "podIP": "::1", "conditions": [{"type": "Ready", "status": "True"}]}));
        let judge = |pod, error| words(observe(Some(&deployment()), &[pod], Some(&failed(error, 2))).worker).0;
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
