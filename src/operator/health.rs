//! Probes and metrics on one port, served from the first second, by the leader and by the others.
//!
//! `/livez` fails when the process makes no progress, or when a watch has been silent for longer than bookmarks and its own timeout
//! allow: an operator that no longer sees changes must not look healthy. A standby watches nothing and is alive.
//! `/readyz` fails until the CRDs are there and, on the leader, all caches have been filled.

use super::metrics::{CONTENT_TYPE, Metrics};
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;

/// Longest time between two beats of a living process.
pub const HEARTBEAT: Duration = Duration::from_secs(60);

/// State behind the probes. Cheap to clone.
#[derive(Clone)]
pub struct Health {
    inner: Arc<Inner>,
}

struct Inner {
    begin: Instant,
    beat: AtomicU64,
    watches: Mutex<Vec<Weak<Watch>>>,
    waiting: Mutex<BTreeMap<u64, String>>,
    numbers: AtomicU64,
}

/// Keeps `/readyz` from saying yes while it lives.
pub struct Waiting {
    health: Health,
    number: u64,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.health.waiting().remove(&self.number);
    }
}

/// Freshness of one watch; gone from the probe when dropped.
pub struct Watch {
    kind: String,
    begin: Instant,
    heard: AtomicU64,
    silence: Duration,
}

impl Watch {
    /// The API server was heard now.
    pub fn heard(&self) {
        self.heard.store(millis(self.begin.elapsed()), Ordering::Relaxed);
    }

    fn silent_for(&self) -> Duration {
        self.begin.elapsed().saturating_sub(Duration::from_millis(self.heard.load(Ordering::Relaxed)))
    }
}

impl Default for Health {
    fn default() -> Self {
        Self {
            inner: Arc::new(Inner {
                begin: Instant::now(),
                beat: AtomicU64::new(0),
                watches: Mutex::default(),
                waiting: Mutex::default(),
                numbers: AtomicU64::new(0),
            }),
        }
    }
}

impl Health {
    /// The process makes progress.
    pub fn beat(&self) {
        self.inner.beat.store(millis(self.inner.begin.elapsed()), Ordering::Relaxed);
    }

    /// A watch that must be heard at least every `silence`. Dropping it ends the demand.
    pub fn watch(&self, kind: &str, silence: Duration) -> Arc<Watch> {
        let watch = Arc::new(Watch { kind: kind.into(), begin: Instant::now(), heard: AtomicU64::new(0), silence });
        let mut watches = self.inner.watches.lock().unwrap_or_else(PoisonError::into_inner);
        watches.retain(|other| other.strong_count() > 0);
        watches.push(Arc::downgrade(&watch));
        watch
    }

    /// Not ready until the guard is dropped.
    pub fn wait_for(&self, what: impl Into<String>) -> Waiting {
        let number = self.inner.numbers.fetch_add(1, Ordering::Relaxed);
        self.waiting().insert(number, what.into());
        Waiting { health: self.clone(), number }
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeMap<u64, String>> {
        self.inner.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What speaks against being alive.
    pub fn not_alive(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        let silent = self.inner.begin.elapsed().saturating_sub(Duration::from_millis(self.inner.beat.load(Ordering::Relaxed)));
        if silent > HEARTBEAT {
            complaints.push(format!("no heartbeat for {} s", silent.as_secs()));
        }
        let watches = self.inner.watches.lock().unwrap_or_else(PoisonError::into_inner);
        complaints.extend(watches.iter().filter_map(Weak::upgrade).filter(|watch| watch.silent_for() > watch.silence).map(|watch| {
            format!(
                "watch of {}: nothing heard for {} s, allowed are {}",
                watch.kind,
                watch.silent_for().as_secs(),
                watch.silence.as_secs()
            )
        }));
        complaints
    }

    /// What is waited for before being ready.
    pub fn not_ready(&self) -> Vec<String> {
        self.waiting().values().map(|what| format!("waiting for {what}")).collect()
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Serves `/livez`, `/readyz` and `/metrics` until the process ends.
///
/// # Errors
/// When the listener fails.
pub async fn serve(listener: TcpListener, health: Health, metrics: Metrics) -> std::io::Result<()> {
    let router = axum::Router::new()
        .route("/livez", get(|State((health, _)): State<(Health, Metrics)>| async move { probe(&health.not_alive()) }))
        .route("/readyz", get(|State((health, _)): State<(Health, Metrics)>| async move { probe(&health.not_ready()) }))
        .route("/metrics", get(|State((_, metrics)): State<(Health, Metrics)>| async move { text(&metrics) }))
        .with_state((health, metrics));
    axum::serve(listener, router).await
}

fn probe(complaints: &[String]) -> impl IntoResponse + use<> {
    if complaints.is_empty() { (StatusCode::OK, "ok".to_owned()) } else { (StatusCode::SERVICE_UNAVAILABLE, complaints.join("\n")) }
}

fn text(metrics: &Metrics) -> impl IntoResponse + use<> {
    match metrics.encode() {
        Ok(body) => (StatusCode::OK, [(header::CONTENT_TYPE, CONTENT_TYPE)], body),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, "text/plain")], error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::Health;
    use std::time::Duration;

    #[test]
    fn readiness_names_what_is_waited_for() {
        let health = Health::default();
        assert!(health.not_ready().is_empty());
        let definitions = health.wait_for("CRDs");
        let _caches = health.wait_for("caches");
        drop(definitions);
        assert_eq!(health.not_ready(), ["waiting for caches"]);
    }

    #[test]
    fn a_silent_watch_is_noticed_until_it_is_heard_or_gone() {
        let health = Health::default();
        let watch = health.watch("Pod", Duration::ZERO);
        while health.not_alive().is_empty() {
            std::thread::yield_now();
        }
        assert!(health.not_alive()[0].starts_with("watch of Pod"));
        drop(watch);
        assert!(health.not_alive().is_empty());
        let fresh = health.watch("Pod", Duration::from_secs(290));
        fresh.heard();
        assert!(health.not_alive().is_empty());
    }
}
