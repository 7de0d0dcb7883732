//! What follows from what a server says: pure.

use super::FailedPrerequisite;
use crate::connectors::postgres::source::OLDEST_VERSION;
use crate::connectors::postgres::sql::{qualified, quote_ident};
use crate::engine::error::reason;
use crate::engine::table::QualifiedName;

/// Tables that are named in one message.
const NAMED: usize = 5;

/// First version whose standbys can keep a primary's logical slots.
const FAILOVER_SLOTS: i32 = 170_000;

/// What a server says of itself and of the role.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub backend: Backend,
    pub server_version: String,
    pub version_num: i32,
    pub in_recovery: bool,
    pub read_only: bool,
    pub timeline: Option<i64>,
    pub wal_level: String,
    pub unlimited_wal: bool,
    pub max_slots: i64,
    pub slots: i64,
    pub max_senders: i64,
    pub senders: i64,
    pub role: String,
    pub may_replicate: bool,
    pub standbys: Standbys,
    pub database: String,
    pub may_create: bool,
}

/// What a primary sees of its physical standbys. Lists of slots are for people.
#[derive(Clone, Debug, Default)]
pub(super) struct Standbys {
    /// Physical slots that are in use.
    pub slots: Option<String>,
    /// One of them holds back what a standby still reads (`hot_standby_feedback`).
    pub feedback: bool,
    /// A standby is connected to synchronize slots.
    pub syncing: bool,
    /// The role may see whose sessions there are.
    pub sees_sessions: bool,
    /// `synchronized_standby_slots`.
    pub awaited: Option<String>,
    /// Those of them that nobody uses now.
    pub away: Option<String>,
}

/// Who answered a statement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Backend {
    pub pid: i32,
    /// Start of the server.
    pub started: String,
    pub system_identifier: String,
}

/// Whether something stands between us and one server: `first` and `again` answered on one connection, `second` on another.
pub(super) fn is_pooled([first, second, again]: &[Backend; 3]) -> bool {
    let same_server = |a: &Backend, b: &Backend| a.started == b.started && a.system_identifier == b.system_identifier;
    first != again || !same_server(first, second) || first.pid == second.pid
}

pub(super) fn source(facts: &Facts, is_pooled: bool, unreadable: &[QualifiedName]) -> Vec<FailedPrerequisite> {
    let role = quote_ident(&facts.role);
    let mut failed = common(facts, is_pooled);
    if facts.in_recovery {
        failed.push(missing(reason::SERVER_UNSUPPORTED, "the server is a standby", "name the primary server"));
    }
    if facts.wal_level != "logical" {
        let message = format!("wal_level is {}", facts.wal_level);
        failed.push(missing(reason::WAL_LEVEL_NOT_LOGICAL, message, "ALTER SYSTEM SET wal_level = 'logical', then restart the server"));
    }
    if !facts.may_replicate {
        let message = format!("role {role} may not replicate");
        failed.push(missing(reason::ROLE_LACKS_REPLICATION, message, format!("ALTER ROLE {role} REPLICATION")));
    }
    failed.extend(may_create(facts, "publications"));
    failed.extend(exhausted(reason::NO_FREE_REPLICATION_SLOT, "replication slots", "max_replication_slots", facts.slots, facts.max_slots));
    failed.extend(exhausted(reason::NO_FREE_WAL_SENDER, "WAL senders", "max_wal_senders", facts.senders, facts.max_senders));
    if !unreadable.is_empty() {
        let list = |name: &dyn Fn(&QualifiedName) -> String| unreadable.iter().take(NAMED).map(name).collect::<Vec<_>>().join(", ");
        let more = if unreadable.len() > NAMED { format!(" and {} more tables", unreadable.len() - NAMED) } else { String::new() };
        let message = format!("role {role} may not read {}{more}", list(&ToString::to_string));
        let cure = format!("GRANT SELECT ON {} TO {role}, and USAGE on their schemas", list(&qualified));
        failed.push(missing(reason::PRIVILEGE_MISSING, message, cure));
    }
    if facts.unlimited_wal {
        failed.push(FailedPrerequisite {
            warning: true,
            ..missing(
                reason::SLOT_WAL_UNLIMITED,
                "max_slot_wal_keep_size is unlimited: a slot that nobody reads can fill the disk",
                "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB' (as much as the disk can spare), then SELECT pg_reload_conf()",
            )
        });
    }
    if facts.version_num >= FAILOVER_SLOTS && !facts.in_recovery {
        failed.extend(failover(&facts.standbys));
    }
    failed
}

/// Warnings of what a failover to a standby would lose (manual: "Replication Slot Synchronization"). Without standbys there is nothing to
/// lose.
fn failover(standbys: &Standbys) -> Vec<FailedPrerequisite> {
    let warning = |name, message: String, cure: String| FailedPrerequisite { warning: true, ..missing(name, message, cure) };
    let mut failed = Vec::new();
    if let Some(away) = &standbys.away {
        failed.push(warning(
            reason::FAILOVER_STANDBY_AWAY,
            format!("synchronized_standby_slots names slots that no standby uses now ({away}): nothing is streamed until one does"),
            "bring the standby back, or take its slot out of synchronized_standby_slots, then SELECT pg_reload_conf()".to_owned(),
        ));
    }
    let Some(slots) = &standbys.slots else { return failed };
    if standbys.awaited.is_none() {
        failed.push(warning(
            reason::FAILOVER_SLOTS_NOT_AWAITED,
            "synchronized_standby_slots is empty: a target may have changes that no standby has yet; after a failover its Mirror stops with TimelineDiverged".to_owned(),
            format!("ALTER SYSTEM SET synchronized_standby_slots = '{slots}' (those of standbys that may be promoted), then SELECT pg_reload_conf()"),
        ));
    }
    let is_synced = (standbys.syncing || !standbys.sees_sessions) && standbys.feedback;
    if !is_synced {
        failed.push(warning(
            reason::FAILOVER_SLOTS_NOT_SYNCED,
            "no standby keeps the slots of this server: after a failover Mirrors stop with CheckpointWithoutSlot".to_owned(),
            "on the standby set sync_replication_slots = on, hot_standby_feedback = on, primary_slot_name, and dbname in primary_conninfo"
                .to_owned(),
        ));
    }
    failed
}

pub(super) fn target(facts: &Facts, is_pooled: bool) -> Vec<FailedPrerequisite> {
    let mut failed = common(facts, is_pooled);
    if facts.in_recovery || facts.read_only {
        let (message, cure) = if facts.in_recovery {
            ("the server is a standby", "name the primary server")
        } else {
            ("transactions are read-only", "set default_transaction_read_only to off for the role and the database")
        };
        failed.push(missing(reason::TARGET_READ_ONLY, message, cure));
    }
    failed.extend(may_create(facts, "schemas"));
    failed
}

fn common(facts: &Facts, is_pooled: bool) -> Vec<FailedPrerequisite> {
    let mut failed = Vec::new();
    if facts.version_num < OLDEST_VERSION {
        let message = format!("the server is PostgreSQL {}", facts.server_version);
        failed.push(missing(reason::SERVER_UNSUPPORTED, message, "upgrade it to PostgreSQL 14 or newer"));
    }
    if is_pooled {
        let message = "different backends answer: there is a connection pooler or a load balancer in between";
        failed.push(missing(reason::POOLER_DETECTED, message, "connect to the server itself"));
    }
    failed
}

fn may_create(facts: &Facts, what: &str) -> Option<FailedPrerequisite> {
    let (role, database) = (quote_ident(&facts.role), quote_ident(&facts.database));
    let message = format!("role {role} may not create {what} in database {database}");
    (!facts.may_create).then(|| missing(reason::PRIVILEGE_MISSING, message, format!("GRANT CREATE ON DATABASE {database} TO {role}")))
}

/// All in use stops only what still needs one, and streams that run have theirs: a warning, unless there are none at all.
fn exhausted(name: &'static str, what: &str, setting: &str, used: i64, maximum: i64) -> Option<FailedPrerequisite> {
    let cure = format!("raise {setting} and restart the server, or end what nobody needs");
    let failed = || FailedPrerequisite { warning: maximum > 0, ..missing(name, format!("{used} of {maximum} {what} are in use"), cure) };
    (used >= maximum).then(failed)
}

fn missing(name: &'static str, message: impl Into<String>, cure: impl Into<String>) -> FailedPrerequisite {
    FailedPrerequisite { name, message: message.into(), cure: Some(cure.into()), warning: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(pid: i32) -> Backend {
        Backend { pid, started: "2026-01-01".into(), system_identifier: "7".into() }
    }

    fn good() -> Facts {
        Facts {
            backend: backend(1),
            server_version: "15.19".into(),
            version_num: 150_019,
            in_recovery: false,
            read_only: false,
            timeline: Some(1),
            wal_level: "logical".into(),
            unlimited_wal: false,
            max_slots: 10,
            slots: 9,
            max_senders: 10,
            senders: 0,
            role: "Sluice".into(),
            may_replicate: true,
            standbys: Standbys::default(),
            database: "shop".into(),
            may_create: true,
        }
    }

    fn names(failed: &[FailedPrerequisite]) -> Vec<(&'static str, bool)> {
        failed.iter().map(|failed| (failed.name, failed.warning)).collect()
    }

    #[test]
    fn a_good_server_lacks_nothing() {
        assert_eq!(source(&good(), false, &[]), []);
        assert_eq!(target(&Facts { wal_level: "replica".into(), may_replicate: false, slots: 10, ..good() }, false), []);
    }

    #[test]
    fn each_lack_of_a_source_is_named() {
        let unreadable: Vec<_> = (0..7).map(|number| QualifiedName::new("s", format!("T{number}"))).collect();
        for (facts, name, warning) in [
            (Facts { version_num: 130_000, ..good() }, reason::SERVER_UNSUPPORTED, false),
            (Facts { in_recovery: true, ..good() }, reason::SERVER_UNSUPPORTED, false),
            (Facts { wal_level: "replica".into(), ..good() }, reason::WAL_LEVEL_NOT_LOGICAL, false),
            (Facts { may_replicate: false, ..good() }, reason::ROLE_LACKS_REPLICATION, false),
            (Facts { may_create: false, ..good() }, reason::PRIVILEGE_MISSING, false),
            (Facts { slots: 10, ..good() }, reason::NO_FREE_REPLICATION_SLOT, true),
            (Facts { slots: 0, max_slots: 0, ..good() }, reason::NO_FREE_REPLICATION_SLOT, false),
            (Facts { senders: 10, ..good() }, reason::NO_FREE_WAL_SENDER, true),
            (Facts { unlimited_wal: true, ..good() }, reason::SLOT_WAL_UNLIMITED, true),
        ] {
            assert_eq!(names(&source(&facts, false, &[])), [(name, warning)]);
        }
        let failed = source(&good(), true, &unreadable);
        assert_eq!(names(&failed), [(reason::POOLER_DETECTED, false), (reason::PRIVILEGE_MISSING, false)]);
        assert!(failed[1].message.ends_with("s.T3, s.T4 and 2 more tables"), "{}", failed[1].message);
        assert!(failed[1].cure.as_deref().unwrap_or_default().contains(r#""s"."T0""#));
    }

    #[test]
    fn what_a_failover_would_lose_is_told_where_there_are_standbys() {
        let told = |standbys: Standbys, version_num| names(&source(&Facts { standbys, version_num, ..good() }, false, &[]));
        let slots = || Some("a, b".to_owned());
        let fine = || Standbys { slots: slots(), feedback: true, syncing: true, sees_sessions: true, awaited: slots(), away: None };
        assert_eq!(told(fine(), 170_000), []);
        assert_eq!(told(Standbys { awaited: None, feedback: false, ..fine() }, 160_000), [], "there are no failover slots");
        assert_eq!(told(Standbys { awaited: None, ..fine() }, 170_000), [(reason::FAILOVER_SLOTS_NOT_AWAITED, true)]);
        assert_eq!(told(Standbys { syncing: false, ..fine() }, 170_000), [(reason::FAILOVER_SLOTS_NOT_SYNCED, true)]);
        assert_eq!(told(Standbys { feedback: false, ..fine() }, 170_000), [(reason::FAILOVER_SLOTS_NOT_SYNCED, true)]);
        assert_eq!(told(Standbys { syncing: false, sees_sessions: false, ..fine() }, 170_000), [], "nobody can tell");
        let away = Standbys { away: slots(), awaited: slots(), ..Standbys::default() };
        assert_eq!(told(away, 170_000), [(reason::FAILOVER_STANDBY_AWAY, true)]);
    }

    #[test]
    fn each_lack_of_a_target_is_named() {
        for (facts, name) in [
            (Facts { version_num: 130_000, ..good() }, reason::SERVER_UNSUPPORTED),
            (Facts { in_recovery: true, read_only: true, ..good() }, reason::TARGET_READ_ONLY),
            (Facts { read_only: true, ..good() }, reason::TARGET_READ_ONLY),
            (Facts { may_create: false, ..good() }, reason::PRIVILEGE_MISSING),
        ] {
            assert_eq!(names(&target(&facts, false)), [(name, false)]);
        }
    }

    #[test]
    fn poolers_and_balancers_are_seen() {
        assert!(!is_pooled(&[backend(1), backend(2), backend(1)]));
        assert!(is_pooled(&[backend(1), backend(1), backend(2)]), "the second session got the first one's backend");
        assert!(is_pooled(&[backend(1), backend(2), backend(3)]), "the first session changed its backend");
        let elsewhere = Backend { system_identifier: "8".into(), ..backend(2) };
        assert!(is_pooled(&[backend(1), elsewhere, backend(1)]), "another server");
        let standby = Backend { started: "2026-01-02".into(), ..backend(2) };
        assert!(is_pooled(&[backend(1), standby, backend(1)]), "another server of the same cluster");
    }
}
