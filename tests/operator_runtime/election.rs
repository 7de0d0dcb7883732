//! Leader election.

use crate::options;
use crate::support::apiserver::{ApiServer, Link};
use kube::{Api, Client};
use sluice::operator::leader::{Candidate, Times};
use sluice::operator::metrics::Metrics;
use std::time::{Duration, Instant};

pub const SHORT: Times =
    Times { duration: Duration::from_secs(3), renew_deadline: Duration::from_secs(2), retry: Duration::from_millis(500) };

fn candidate(client: &Client, namespace: &str, pod: &str, times: Times) -> Candidate {
    Candidate::new(client.clone(), &options(namespace, pod), Metrics::default(), times)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_is_handed_back_is_taken_within_three_seconds() {
    let server = ApiServer::shared().await;
    let namespace = server.namespace("release").await;
    let client = server.client().await;
    let mut first = candidate(&client, &namespace, "a", Times::default());
    let mut second = candidate(&client, &namespace, "b", Times::default());
    first.acquire().await;
    let waiting = tokio::spawn(async move {
        second.acquire().await;
        Instant::now()
    });
    let leases = Api::<k8s_openapi::api::coordination::v1::Lease>::namespaced(client, &namespace);
    let holder =
        async || leases.get("sluice-operator").await.expect("the lease").spec.and_then(|spec| spec.holder_identity).unwrap_or_default();
    assert!(holder().await.starts_with("a_"));
    first.release().await;
    let released = Instant::now();
    let taken = waiting.await.expect("taken");
    assert!(taken.duration_since(released) <= Duration::from_secs(3), "{:?}", taken.duration_since(released));
    assert!(holder().await.starts_with("b_"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lease_of_a_dead_holder_is_taken_after_its_time() {
    let server = ApiServer::shared().await;
    let namespace = server.namespace("dead").await;
    let client = server.client().await;
    let mut first = candidate(&client, &namespace, "a", SHORT);
    first.acquire().await;
    let died = Instant::now();
    drop(first);
    let mut second = candidate(&client, &namespace, "b", SHORT);
    second.acquire().await;
    let took = died.elapsed();
    assert!(took >= SHORT.duration && took <= SHORT.duration + SHORT.retry * 2 + Duration::from_secs(1), "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_that_is_cut_off_gives_up_before_another_begins() {
    let server = ApiServer::shared().await;
    let namespace = server.namespace("cut").await;
    let proxy = server.proxy().await;
    let cut_off = Client::try_from(server.config_through(&proxy).await).expect("a client");
    let mut first = candidate(&cut_off, &namespace, "a", SHORT);
    let mut second = candidate(&server.client().await, &namespace, "b", SHORT);
    first.acquire().await;
    proxy.set(Link::Frozen);
    let taking = tokio::spawn(async move {
        second.acquire().await;
        Instant::now()
    });
    let reason = first.keep().await;
    let gave_up = Instant::now();
    assert!(reason.contains("could not be renewed"), "{reason}");
    assert!(taking.await.expect("taken") > gave_up);
}
