//! Leader election over a Lease, with the rules of client-go. kube has none.
//!
//! * A record is expired when it has not *changed* for its duration, by the local monotonic clock; no other clock is trusted.
//! * The holder counts its time from *before* the request that renewed it, and gives up [`Times::renew_deadline`] later. As that is
//!   shorter than the duration, it has stopped before anybody else may begin.
//! * Writes carry the resourceVersion they rest on; a conflict is a lost round.
//! * Loss ends the process; a clean stop hands the lease back, so that another replica begins within one retry.

use super::backoff::spread;
use super::metrics::Metrics;
use super::options::Options;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use rand::RngExt as _;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{debug, info, warn};

/// Times of the election.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// How long a record holds after its last change; whole seconds.
    pub duration: Duration,
    /// How long the holder goes on without a renewal; shorter than `duration`.
    pub renew_deadline: Duration,
    /// Time between tries.
    pub retry: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self { duration: Duration::from_secs(15), renew_deadline: Duration::from_secs(10), retry: Duration::from_secs(2) }
    }
}

/// What a Lease says.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Who holds it; empty: nobody.
    pub holder: String,
    /// How long it holds after its last change.
    pub duration: Duration,
    /// How often the holder has changed.
    pub transitions: i32,
    /// When the holder took it.
    pub acquired: Option<Timestamp>,
    /// When the holder renewed it; compared for change only.
    pub renewed: Option<Timestamp>,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Write this record; `None` as its base means: create it.
    Write(Record),
    /// Somebody else holds it.
    Wait,
}

/// What one replica knows; no I/O.
#[derive(Clone, Debug)]
pub struct Elector {
    me: String,
    times: Times,
    seen: Option<Record>,
    changed: Instant,
    held_until: Option<Instant>,
}

impl Elector {
    /// `me` is unique among all replicas, dead ones included.
    pub fn new(me: String, times: Times) -> Self {
        Self { me, times, seen: None, changed: Instant::now(), held_until: None }
    }

    /// The record was read.
    pub fn observe(&mut self, record: Option<Record>, now: Instant) {
        if self.seen != record {
            self.changed = now;
            self.seen = record;
        }
        if !self.is_mine() {
            self.held_until = None;
        }
    }

    /// Our record was written by a request that began at `begun`.
    pub fn wrote(&mut self, record: Record, begun: Instant, now: Instant) {
        let until = begun + self.times.renew_deadline;
        self.observe(Some(record), now);
        self.held_until = self.is_mine().then_some(until);
    }

    /// Until when this replica may act; `None`: not now.
    pub fn held_until(&self) -> Option<Instant> {
        self.held_until
    }

    fn is_mine(&self) -> bool {
        self.seen.as_ref().is_some_and(|record| record.holder == self.me)
    }

    /// What to do at `now`; `wall` only goes into the record.
    pub fn next(&self, now: Instant, wall: Timestamp) -> Step {
        let mine = |acquired, transitions| {
            Step::Write(Record { holder: self.me.clone(), duration: self.times.duration, transitions, acquired, renewed: Some(wall) })
        };
        match &self.seen {
            None => mine(Some(wall), 0),
            Some(record) if record.holder == self.me => mine(record.acquired, record.transitions),
            Some(record) if record.holder.is_empty() || now.duration_since(self.changed) >= record.duration => {
                mine(Some(wall), record.transitions.saturating_add(1))
            }
            Some(_) => Step::Wait,
        }
    }

    /// The record that hands the lease back, if it is ours.
    pub fn release(&self, wall: Timestamp) -> Option<Record> {
        let record = self.seen.as_ref().filter(|_| self.is_mine())?;
        Some(Record { holder: String::new(), duration: Duration::from_secs(1), renewed: Some(wall), ..record.clone() })
    }
}

/// Takes part in the election of the Lease that `options` name.
pub struct Candidate {
    api: Api<Lease>,
    name: String,
    metrics: Metrics,
    elector: Elector,
    /// What the last record was read or written as, with its resourceVersion.
    base: Option<Lease>,
}

impl Candidate {
    /// The identity is the pod's name and uid; without a uid (outside a cluster) a random text takes its place.
    pub fn new(client: Client, options: &Options, metrics: Metrics, times: Times) -> Self {
        let unique = if options.pod_uid.is_empty() { format!("{:016x}", rand::rng().random::<u64>()) } else { options.pod_uid.clone() };
        let me = format!("{}_{unique}", options.pod_name);
        Self {
            api: Api::namespaced(client, &options.namespace),
            name: options.lease_name.clone(),
            metrics,
            elector: Elector::new(me, times),
            base: None,
        }
    }

    /// Waits until this replica leads.
    pub async fn acquire(&mut self) {
        info!(lease = self.name, identity = self.elector.me, "waiting for the lease");
        loop {
            let deadline = Instant::now() + self.elector.times.renew_deadline;
            self.round(deadline).await;
            if self.elector.held_until().is_some() {
                info!(lease = self.name, "leading");
                self.metrics.set_leader(true);
                return;
            }
            // Replicas that wait for the same record come at different times.
            sleep(spread(self.elector.times.retry)).await;
        }
    }

    /// Renews until the lease is lost; says why. Whoever calls it ends the process then.
    pub async fn keep(&mut self) -> String {
        loop {
            let Some(until) = self.elector.held_until() else {
                self.metrics.set_leader(false);
                return format!("the lease {} is held by another replica", self.name);
            };
            if timeout_at(until, sleep(self.elector.times.retry)).await.is_ok() {
                self.round(until).await;
            }
            if self.elector.held_until().is_some_and(|until| until <= Instant::now()) {
                self.metrics.set_leader(false);
                return format!("the lease {} could not be renewed for {} s", self.name, self.elector.times.renew_deadline.as_secs());
            }
        }
    }

    /// Hands the lease back, if it is held. A failure only means that others wait for its end.
    pub async fn release(&mut self) {
        self.metrics.set_leader(false);
        let Some(record) = self.elector.release(Timestamp::now()) else {
            return;
        };
        let deadline = Instant::now() + self.elector.times.retry;
        match timeout_at(deadline, self.write(&record)).await {
            Ok(Ok(_)) => info!(lease = self.name, "handed the lease back"),
            Ok(Err(error)) => warn!(lease = self.name, %error, "the lease could not be handed back"),
            Err(_) => warn!(lease = self.name, "the lease could not be handed back in time"),
        }
    }

    /// One try to take or renew, which ends by `deadline`.
    async fn round(&mut self, deadline: Instant) {
        match timeout_at(deadline, self.attempt()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                self.metrics.lease_failed();
                warn!(lease = self.name, %error, "a try to take or renew the lease failed");
            }
            Err(_) => {
                self.metrics.lease_failed();
                warn!(lease = self.name, "a try to take or renew the lease did not end in time");
            }
        }
    }

    async fn attempt(&mut self) -> kube::Result<()> {
        // The holder writes upon what it wrote last; a conflict makes it read again in the next round.
        if self.elector.held_until().is_none() || self.base.is_none() {
            self.base = self.api.get_opt(&self.name).await?;
            self.elector.observe(self.base.as_ref().map(record_of), Instant::now());
        }
        let begun = Instant::now();
        let Step::Write(record) = self.elector.next(begun, Timestamp::now()) else {
            debug!(lease = self.name, holder = ?self.elector.seen.as_ref().map(|record| &record.holder), "held by another replica");
            return Ok(());
        };
        match self.write(&record).await {
            Ok(written) => {
                self.elector.wrote(record_of(&written), begun, Instant::now());
                self.base = Some(written);
                Ok(())
            }
            Err(kube::Error::Api(status)) if status.code == 409 => {
                self.base = self.api.get_opt(&self.name).await?;
                self.elector.observe(self.base.as_ref().map(record_of), Instant::now());
                Ok(())
            }
            Err(error) => {
                // The write may have happened; only a read can tell.
                self.base = None;
                Err(error)
            }
        }
    }

    async fn write(&self, record: &Record) -> kube::Result<Lease> {
        let params = PostParams { field_manager: Some("sluice-operator".into()), ..PostParams::default() };
        let lease = Lease {
            metadata: self.base.as_ref().map_or_else(
                || ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() },
                |base| ObjectMeta { managed_fields: None, ..base.metadata.clone() },
            ),
            spec: Some(LeaseSpec {
                holder_identity: Some(record.holder.clone()),
                lease_duration_seconds: Some(i32::try_from(record.duration.as_secs().max(1)).unwrap_or(i32::MAX)),
                acquire_time: record.acquired.map(MicroTime),
                renew_time: record.renewed.map(MicroTime),
                lease_transitions: Some(record.transitions),
                ..LeaseSpec::default()
            }),
        };
        if self.base.is_some() { self.api.replace(&self.name, &params, &lease).await } else { self.api.create(&params, &lease).await }
    }
}

fn record_of(lease: &Lease) -> Record {
    let spec = lease.spec.clone().unwrap_or_default();
    Record {
        holder: spec.holder_identity.unwrap_or_default(),
        duration: Duration::from_secs(u64::try_from(spec.lease_duration_seconds.unwrap_or(0)).unwrap_or(0)),
        transitions: spec.lease_transitions.unwrap_or(0),
        acquired: spec.acquire_time.map(|time| time.0),
        renewed: spec.renew_time.map(|time| time.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    const TIMES: Times =
        Times { duration: Duration::from_secs(15), renew_deadline: Duration::from_secs(10), retry: Duration::from_secs(2) };

    fn record(holder: &str) -> Record {
        Record { holder: holder.into(), duration: TIMES.duration, transitions: 3, acquired: Some(Timestamp::UNIX_EPOCH), renewed: None }
    }

    #[test]
    fn the_table_of_steps() {
        let start = Instant::now();
        let after = |record: Option<Record>, seconds: u64| {
            let mut elector = Elector::new("me".into(), TIMES);
            elector.observe(record, start);
            elector.next(start + Duration::from_secs(seconds), Timestamp::UNIX_EPOCH)
        };
        let writes = |step: Step| match step {
            Step::Write(record) => Some((record.holder, record.transitions)),
            Step::Wait => None,
        };
        assert_eq!(writes(after(None, 0)), Some(("me".into(), 0)), "nobody has made it");
        assert_eq!(writes(after(Some(record("me")), 0)), Some(("me".into(), 3)), "ours");
        assert_eq!(writes(after(Some(record("")), 0)), Some(("me".into(), 4)), "handed back");
        assert_eq!(writes(after(Some(record("other")), 14)), None, "held");
        assert_eq!(writes(after(Some(record("other")), 15)), Some(("me".into(), 4)), "expired");
    }

    #[test]
    fn expiry_is_counted_from_the_last_change_that_was_seen() {
        let start = Instant::now();
        let mut elector = Elector::new("me".into(), TIMES);
        elector.observe(Some(record("other")), start);
        let renewed = Record { renewed: Some(Timestamp::UNIX_EPOCH), ..record("other") };
        elector.observe(Some(renewed.clone()), start + Duration::from_secs(14));
        elector.observe(Some(renewed), start + Duration::from_secs(28));
        assert_eq!(elector.next(start + Duration::from_secs(28), Timestamp::UNIX_EPOCH), Step::Wait);
        assert_ne!(elector.next(start + Duration::from_secs(29), Timestamp::UNIX_EPOCH), Step::Wait);
    }

    #[test]
    fn time_is_counted_from_before_the_request_and_ends_when_another_holds() {
        let start = Instant::now();
        let mut elector = Elector::new("me".into(), TIMES);
        elector.wrote(record("me"), start, start + Duration::from_secs(4));
        assert_eq!(elector.held_until(), Some(start + TIMES.renew_deadline));
        assert_eq!(elector.release(Timestamp::UNIX_EPOCH).map(|record| record.holder), Some(String::new()));
        elector.observe(Some(record("other")), start + Duration::from_secs(5));
        assert_eq!(elector.held_until(), None);
        assert_eq!(elector.release(Timestamp::UNIX_EPOCH), None);
    }

    /// A store with versions, and replicas that read, are paused, write late, and lose answers.
    struct World {
        random: StdRng,
        start: Instant,
        now: Duration,
        version: u64,
        stored: Option<Record>,
        replicas: Vec<Replica>,
    }

    struct Replica {
        elector: Elector,
        base: Option<u64>,
        /// A write under way: what, when it was begun, upon which version.
        writing: Option<(Record, Instant, Option<u64>)>,
    }

    impl World {
        fn new(seed: u64) -> Self {
            let replica = |name: &str| Replica { elector: Elector::new(name.into(), TIMES), base: None, writing: None };
            Self {
                random: StdRng::seed_from_u64(seed),
                start: Instant::now(),
                now: Duration::ZERO,
                version: 0,
                stored: None,
                replicas: vec![replica("a"), replica("b"), replica("c")],
            }
        }

        fn stored_version(&self) -> Option<u64> {
            self.stored.as_ref().map(|_| self.version)
        }

        fn step(&mut self) {
            self.now += Duration::from_millis(self.random.random_range(1..3_000));
            let now = self.start + self.now;
            let wall = Timestamp::from_second(1_000_000 + i64::try_from(self.now.as_secs()).expect("small")).expect("a time");
            let wall = wall + k8s_openapi::jiff::SignedDuration::from_secs(self.random.random_range(-500..500));
            let chosen = self.random.random_range(0..self.replicas.len());
            let (lost, paused) = (self.random.random_bool(0.2), self.random.random_bool(0.1));
            if paused {
                return;
            }
            let stored_version = self.stored_version();
            let replica = &mut self.replicas[chosen];
            match replica.writing.take() {
                None => {
                    replica.base = stored_version;
                    replica.elector.observe(self.stored.clone(), now);
                    if let Step::Write(record) = replica.elector.next(now, wall) {
                        replica.writing = Some((record, now, replica.base));
                    }
                }
                Some((record, begun, base)) if base == stored_version => {
                    self.version += 1;
                    self.stored = Some(record.clone());
                    // An answer that is lost, or comes after the deadline of the try, teaches nothing.
                    if !lost && now < begun + TIMES.renew_deadline {
                        replica.elector.wrote(record, begun, now);
                    }
                }
                Some(_) => {}
            }
        }

        fn leaders(&self) -> usize {
            let now = self.start + self.now;
            self.replicas.iter().filter(|replica| replica.elector.held_until().is_some_and(|until| now < until)).count()
        }
    }

    #[test]
    fn two_replicas_never_both_hold_and_somebody_does() {
        let mut led = 0;
        for seed in 0..500 {
            let mut world = World::new(seed);
            for step in 0..400 {
                world.step();
                assert!(world.leaders() <= 1, "seed {seed}, step {step}: two leaders");
                led += world.leaders();
            }
        }
        assert!(led > 50_000, "the simulation must also elect: {led}");
    }
}
