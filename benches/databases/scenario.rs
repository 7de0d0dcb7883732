//! What is measured, beside whom, and what the goals are.

use crate::Result;
use Commits::{AtOnce, OnDisk};

/// One kind of work that several competitors do.
pub struct Scenario {
    /// Short name, for `ONLY`.
    pub name: &'static str,
    /// What is done, at full scale.
    pub title: &'static str,
    /// How it is done.
    pub kind: Kind,
    /// Who does it.
    pub competitors: &'static [Competitor],
    /// What Sluice should reach.
    pub goals: &'static [Goal],
}

/// The shapes of work.
#[derive(Clone, Copy)]
pub enum Kind {
    /// Initial copy of one table.
    Copy(Copy),
    /// Changes that were made before anybody reads them.
    Drain(Drain),
    /// One transaction of a million rows, with everybody connected.
    Transaction(Commits),
    /// From commit to visible at a steady rate.
    Latency(Commits),
}

/// What commits on the target wait for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Commits {
    /// Nothing: `synchronous_commit = off`.
    AtOnce,
    /// The target's disk: `synchronous_commit = on`.
    OnDisk,
}

/// An initial copy.
#[derive(Clone, Copy)]
pub struct Copy {
    /// Rows of 1 KiB instead of small ones.
    pub wide: bool,
    /// The target has the primary key at the end.
    pub keys: bool,
    /// The clock of a worker stops when the rows are on the target's disk; those that are visible may not be yet. All others commit so.
    pub commits: Commits,
}

/// A backlog.
#[derive(Clone, Copy)]
pub struct Drain {
    /// Which changes.
    pub work: Work,
    /// Changes at full scale.
    pub changes: i64,
    /// Changes of one transaction.
    pub per_transaction: i64,
    /// What each commit on the target waits for.
    pub commits: Commits,
}

/// Which changes a backlog is made of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// New rows.
    Inserts,
    /// Each row once, far apart.
    Updates,
    /// The same 1,000 rows of many again and again.
    HotUpdates,
}

/// Who does the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Competitor {
    /// `sluice worker mirror` with its defaults.
    Sluice,
    /// `psql … COPY TO STDOUT | psql … COPY FROM STDIN`, binary.
    Psql,
    /// `pgcopydb` with one job per table.
    Pgcopydb,
    /// A native subscription: binary, streaming = parallel.
    Native,
    /// A native subscription: binary, streaming = on.
    NativeStreamingOn,
    /// `pg_recvlogical` with the same plugin options, into /dev/null: what the source gives at all.
    Nowhere,
}

impl Competitor {
    /// For tables and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sluice => "sluice",
            Self::Psql => "psql",
            Self::Pgcopydb => "pgcopydb",
            Self::Native => "native",
            Self::NativeStreamingOn => "native, streaming=on",
            Self::Nowhere => "read to nowhere",
        }
    }
}

/// What Sluice should reach.
pub struct Goal {
    /// The figure that is compared.
    pub figure: &'static str,
    /// With what.
    pub limit: Limit,
}

/// What a figure is compared with.
pub enum Limit {
    /// At least so many times as fast as the fastest of these.
    TimesAsFast(f64, &'static [Competitor]),
    /// At most this part of the time of the fastest of these.
    PartOfTime(f64, &'static [Competitor]),
    /// Below this value.
    Below(f64),
}

const fn faster(times: f64, than: &'static [Competitor]) -> Goal {
    Goal { figure: "seconds", limit: Limit::TimesAsFast(times, than) }
}

const COPIERS: &[Competitor] = &[Competitor::Sluice, Competitor::Psql, Competitor::Pgcopydb, Competitor::Native];
const READERS: &[Competitor] = &[Competitor::Sluice, Competitor::Native, Competitor::Nowhere];
const APPLIERS: &[Competitor] = &[Competitor::Sluice, Competitor::Native];
const STREAMERS: &[Competitor] = &[Competitor::Sluice, Competitor::Native, Competitor::NativeStreamingOn];
const COPY_GOALS: &[Goal] = &[faster(1.1, &[Competitor::Psql]), faster(2.0, &[Competitor::Pgcopydb])];
const HARD_GOALS: &[Goal] = &[faster(0.85, &[Competitor::Nowhere]), faster(1.0, &[Competitor::Native])];

const fn drain(work: Work, changes: i64, per_transaction: i64, commits: Commits) -> Kind {
    Kind::Drain(Drain { work, changes, per_transaction, commits })
}

const fn copy(wide: bool, keys: bool, commits: Commits) -> Kind {
    Kind::Copy(Copy { wide, keys, commits })
}

/// All scenarios, in the order in which they are played.
pub const ALL: &[Scenario] = &[
    Scenario {
        name: "copy-small",
        title: "initial copy of 5 M small rows, no keys on the target",
        kind: copy(false, false, AtOnce),
        competitors: COPIERS,
        goals: COPY_GOALS,
    },
    Scenario {
        name: "copy-small-keys",
        title: "initial copy of 5 M small rows, primary key and statistics at the end",
        kind: copy(false, true, AtOnce),
        competitors: COPIERS,
        goals: &[],
    },
    Scenario {
        name: "copy-wide",
        title: "initial copy of 1 M rows of 1 KiB, no keys on the target",
        kind: copy(true, false, AtOnce),
        competitors: COPIERS,
        goals: COPY_GOALS,
    },
    Scenario {
        name: "copy-wide-keys",
        title: "initial copy of 1 M rows of 1 KiB, primary key and statistics at the end",
        kind: copy(true, true, AtOnce),
        competitors: COPIERS,
        goals: &[],
    },
    Scenario {
        name: "drain-inserts",
        title: "backlog of 1 M inserts in transactions of 1,000",
        kind: drain(Work::Inserts, 1_000_000, 1000, AtOnce),
        competitors: READERS,
        goals: &[faster(1.0, &[Competitor::Native])],
    },
    Scenario {
        name: "drain-single",
        title: "backlog of 1 M inserts in transactions of one",
        kind: drain(Work::Inserts, 1_000_000, 1, AtOnce),
        competitors: READERS,
        goals: HARD_GOALS,
    },
    Scenario {
        name: "drain-updates",
        title: "backlog of 500 k updates by key, each row once, in transactions of 1,000",
        kind: drain(Work::Updates, 500_000, 1000, AtOnce),
        competitors: READERS,
        goals: &[faster(1.3, &[Competitor::Native])],
    },
    Scenario {
        name: "drain-hot",
        title: "backlog of 500 k updates of 1,000 hot rows among 100,000, in transactions of 1,000",
        kind: drain(Work::HotUpdates, 500_000, 1000, AtOnce),
        competitors: READERS,
        goals: HARD_GOALS,
    },
    Scenario {
        name: "drain-inserts-synchronous",
        title: "backlog of 1 M inserts in transactions of 1,000; synchronous_commit on",
        kind: drain(Work::Inserts, 1_000_000, 1000, OnDisk),
        competitors: APPLIERS,
        goals: &[],
    },
    Scenario {
        name: "drain-single-synchronous",
        title: "backlog of 50 k inserts in transactions of one; synchronous_commit on",
        kind: drain(Work::Inserts, 50_000, 1, OnDisk),
        competitors: APPLIERS,
        goals: &[],
    },
    Scenario {
        name: "drain-updates-synchronous",
        title: "backlog of 500 k updates by key in transactions of 1,000; synchronous_commit on",
        kind: drain(Work::Updates, 500_000, 1000, OnDisk),
        competitors: APPLIERS,
        goals: &[],
    },
    Scenario {
        name: "drain-hot-synchronous",
        title: "backlog of 500 k updates of 1,000 hot rows among 100,000, in transactions of 1,000; synchronous_commit on",
        kind: drain(Work::HotUpdates, 500_000, 1000, OnDisk),
        competitors: APPLIERS,
        goals: &[],
    },
    Scenario {
        name: "transaction",
        title: "one transaction of 1 M inserts, from its commit until it is visible",
        kind: Kind::Transaction(AtOnce),
        competitors: STREAMERS,
        goals: &[Goal { figure: "seconds", limit: Limit::PartOfTime(0.75, &[Competitor::Native, Competitor::NativeStreamingOn]) }],
    },
    Scenario {
        name: "latency",
        title: "from commit to visible at 1,000 transactions of one row per second",
        kind: Kind::Latency(AtOnce),
        competitors: APPLIERS,
        goals: &[Goal { figure: "p50_milliseconds", limit: Limit::Below(10.0) }],
    },
    Scenario {
        name: "transaction-synchronous",
        title: "one transaction of 1 M inserts, from its commit until it is visible; synchronous_commit on",
        kind: Kind::Transaction(OnDisk),
        competitors: STREAMERS,
        goals: &[],
    },
    Scenario {
        name: "latency-synchronous",
        title: "from commit to visible at 1,000 transactions of one row per second; synchronous_commit on",
        kind: Kind::Latency(OnDisk),
        competitors: APPLIERS,
        goals: &[],
    },
    Scenario {
        name: "copy-small-synchronous",
        title: "initial copy of 5 M small rows, no keys on the target; until they are on the target's disk",
        kind: copy(false, false, OnDisk),
        competitors: COPIERS,
        goals: &[],
    },
    Scenario {
        name: "copy-wide-synchronous",
        title: "initial copy of 1 M rows of 1 KiB, no keys on the target; until they are on the target's disk",
        kind: copy(true, false, OnDisk),
        competitors: COPIERS,
        goals: &[],
    },
];

/// The scenarios of these names; all without names.
pub fn chosen(names: &[String]) -> Result<Vec<&'static Scenario>> {
    if let Some(unknown) = names.iter().find(|name| !ALL.iter().any(|scenario| scenario.name == name.as_str())) {
        let known: Vec<&str> = ALL.iter().map(|scenario| scenario.name).collect();
        return Err(format!("ONLY: there is no scenario {unknown}; there are {}", known.join(", ")).into());
    }
    Ok(ALL.iter().filter(|scenario| names.is_empty() || names.iter().any(|name| name == scenario.name)).collect())
}
