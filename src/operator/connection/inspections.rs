//! When a database is looked at again, and what was found last.
//!
//! Invariant: a pass costs the database a connection only when the way to it changed or its time has come.

use super::report::{Failure, Outcome};
use crate::connectors::postgres::connect::Side;
use crate::connectors::postgres::endpoint::Endpoint;
use crate::engine::error::{Error, reason};
use crate::operator::databases::{Databases, Inspection, MirrorSlot};
use rand::RngExt as _;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// Longest pace while something fails or is missing.
pub const FAILING: Duration = Duration::from_secs(60);
/// First pace after something has failed: what is applied together comes up together.
const FIRST: Duration = Duration::from_secs(2);
/// Pace while nothing is missing.
pub const FINE: Duration = Duration::from_secs(300);
/// Longest time of one inspection; below the limit of a pass.
const DEADLINE: Duration = Duration::from_secs(40);
/// Entries that were due for this long belong to deleted objects.
const FORGET_AFTER: Duration = Duration::from_secs(900);

/// What was found, per object.
pub struct Inspections {
    databases: Arc<dyn Databases>,
    known: Mutex<HashMap<String, Known>>,
}

#[derive(Clone)]
struct Known {
    /// The way that was taken, password included: another one is another question.
    endpoint: Endpoint,
    outcome: Outcome,
    due: Instant,
    /// In a row, by this way.
    failures: u32,
}

impl Inspections {
    /// Nothing is known yet.
    pub fn new(databases: Arc<dyn Databases>) -> Self {
        Self { databases, known: Mutex::default() }
    }

    /// What is known of the object `uid` by this way, and when to ask again. Looks at the database when the way is new or the time
    /// has come.
    /// `living` gives the slots of all Mirrors; `None` while they are not known.
    pub async fn outcome(
        &self,
        uid: &str,
        side: Side,
        endpoint: Endpoint,
        living: &(dyn Fn() -> Option<BTreeSet<String>> + Sync),
    ) -> (Outcome, Duration) {
        if let Some(known) = self.remembered(uid, &endpoint) {
            return (known.outcome, known.due.saturating_duration_since(Instant::now()));
        }
        let outcome = self.look(&endpoint, side, living).await;
        let failures = if outcome.is_settled() { 0 } else { self.failures(uid, &endpoint).saturating_add(1) };
        let again = jittered(pace(failures));
        self.remember(uid, Known { endpoint, outcome: outcome.clone(), due: Instant::now() + again, failures });
        (outcome, again)
    }

    fn failures(&self, uid: &str, endpoint: &Endpoint) -> u32 {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(uid).filter(|known| known.endpoint == *endpoint).map_or(0, |known| known.failures)
    }

    async fn look(&self, endpoint: &Endpoint, side: Side, living: &(dyn Fn() -> Option<BTreeSet<String>> + Sync)) -> Outcome {
        let too_late = || {
            let place = format!("{}:{}", endpoint.host, endpoint.port);
            Error::retry(reason::HOST_UNREACHABLE, format!("{place} did not answer within {} seconds", DEADLINE.as_secs()))
        };
        let before = living();
        let result = timeout(DEADLINE, self.databases.inspect(endpoint, side)).await.unwrap_or_else(|_| Err(too_late()));
        match result {
            Ok(found) => Outcome::Inspected(Inspection { slots: orphans(found.slots, before, living()), ..found }),
            Err(error) => Outcome::Failed(Failure::from(&error)),
        }
    }

    fn remembered(&self, uid: &str, endpoint: &Endpoint) -> Option<Known> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(uid).filter(|known| known.endpoint == *endpoint && known.due > Instant::now()).cloned()
    }

    fn remember(&self, uid: &str, new: Known) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, known| known.due.elapsed() < FORGET_AFTER);
        known.insert(uid.to_owned(), new);
    }
}

/// The slots that no Mirror has. A Mirror that is being deleted takes its slot along, and a new one is known before its slot is made: so
/// those that were there before or after the look count.
fn orphans(slots: Option<Vec<MirrorSlot>>, before: Option<BTreeSet<String>>, after: Option<BTreeSet<String>>) -> Option<Vec<MirrorSlot>> {
    let (mut slots, before, after) = (slots?, before?, after?);
    slots.retain(|slot| !before.contains(&slot.name) && !after.contains(&slot.name));
    Some(slots)
}

fn pace(failures: u32) -> Duration {
    if failures == 0 { FINE } else { (FIRST * 2u32.pow((failures - 1).min(8))).min(FAILING) }
}

/// Pace while a Secret is missing, by the age of what names it: it may be on its way.
pub fn pace_of_missing(age: Duration) -> Duration {
    jittered((age / 2).clamp(FIRST, FAILING))
}

/// ± 20 %, so that databases on one server are not asked together.
pub fn jittered(duration: Duration) -> Duration {
    duration.mul_f64(0.8 + 0.4 * rand::rng().random::<f64>())
}

#[cfg(test)]
mod tests {
    use super::super::fake::{FakeDatabases, endpoint, inspection};
    use super::*;

    fn nobody() -> Option<BTreeSet<String>> {
        None
    }

    #[test]
    fn slots_of_mirrors_that_come_or_go_during_the_look_are_no_orphans() {
        let slot = |name: &str| MirrorSlot { name: name.into(), active: false, retained: None, cure: String::new() };
        let set = |name: &str| Some(BTreeSet::from([name.to_owned()]));
        let slots = || Some(vec![slot("going"), slot("coming"), slot("left")]);
        assert_eq!(orphans(slots(), set("going"), set("coming")), Some(vec![slot("left")]));
        assert_eq!(orphans(slots(), None, set("coming")), None, "not all Mirrors were known");
    }

    #[tokio::test(start_paused = true)]
    async fn a_fine_database_is_left_alone_for_minutes() {
        let fake = FakeDatabases::answering(Ok(inspection()));
        let inspections = Inspections::new(fake.clone());
        let (outcome, again) = inspections.outcome("u", Side::Source, endpoint("a"), &nobody).await;
        assert_eq!(outcome, Outcome::Inspected(inspection()));
        assert!((FINE.mul_f64(0.8)..=FINE.mul_f64(1.2)).contains(&again));
        tokio::time::advance(Duration::from_secs(200)).await;
        let (_, left) = inspections.outcome("u", Side::Source, endpoint("a"), &nobody).await;
        assert_eq!((fake.asked(), again.checked_sub(left)), (1, Some(Duration::from_secs(200))));
        tokio::time::advance(Duration::from_secs(200)).await;
        inspections.outcome("u", Side::Source, endpoint("a"), &nobody).await;
        assert_eq!(fake.asked(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn another_way_or_another_object_is_another_question() {
        let fake = FakeDatabases::answering(Ok(inspection()));
        let inspections = Inspections::new(fake.clone());
        inspections.outcome("u", Side::Source, endpoint("old password"), &nobody).await;
        inspections.outcome("u", Side::Source, endpoint("new password"), &nobody).await;
        inspections.outcome("v", Side::Target, endpoint("new password"), &nobody).await;
        assert_eq!(fake.asked(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_looked_at_again_soon_and_then_every_minute() {
        let fake = FakeDatabases::answering(Err((true, reason::HOST_UNREACHABLE)));
        let inspections = Inspections::new(fake.clone());
        let (outcome, again) = inspections.outcome("u", Side::Source, endpoint("a"), &nobody).await;
        assert!(matches!(outcome, Outcome::Failed(Failure { may_pass: true, reason: "HostUnreachable", .. })), "{outcome:?}");
        assert!((FIRST.mul_f64(0.8)..=FIRST.mul_f64(1.2)).contains(&again));
        let mut again = again;
        for _ in 0..5 {
            tokio::time::advance(again).await;
            again = inspections.outcome("u", Side::Source, endpoint("a"), &nobody).await.1;
        }
        assert!((FAILING.mul_f64(0.8)..=FAILING.mul_f64(1.2)).contains(&again));
        assert_eq!([0, 1, 2, 6, u32::MAX].map(|failures| pace(failures).as_secs()), [300, 2, 4, 60, 60]);
        fake.answer(Ok(inspection()));
        tokio::time::advance(again).await;
        let (outcome, _) = inspections.outcome("u", Side::Source, endpoint("a"), &nobody).await;
        assert!(outcome.is_settled());
    }

    #[test]
    fn what_is_new_is_looked_at_more_often() {
        let bounds = |pace: Duration| pace.mul_f64(0.8)..=pace.mul_f64(1.2);
        for (age, pace) in [(0, FIRST), (20, Duration::from_secs(10)), (3600, FAILING)] {
            assert!(bounds(pace).contains(&pace_of_missing(Duration::from_secs(age))), "{age} s");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_never_answers_is_unreachable() {
        let fake = FakeDatabases::silent();
        let (outcome, _) = Inspections::new(fake).outcome("u", Side::Source, endpoint("a"), &nobody).await;
        assert!(matches!(outcome, Outcome::Failed(Failure { may_pass: true, reason: "HostUnreachable", .. })), "{outcome:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn deleted_objects_are_forgotten() {
        let inspections = Inspections::new(FakeDatabases::answering(Ok(inspection())));
        inspections.outcome("gone", Side::Source, endpoint("a"), &nobody).await;
        tokio::time::advance(FINE * 2 + FORGET_AFTER).await;
        inspections.outcome("new", Side::Source, endpoint("a"), &nobody).await;
        assert_eq!(inspections.known.lock().expect("known").keys().collect::<Vec<_>>(), ["new"]);
    }
}
