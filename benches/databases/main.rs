//! Figures: how fast Sluice is beside what else one would use, between two real PostgreSQL servers on this machine.
//!
//! `make bench` runs it. In each round every competitor does the same work, in an order that changes from round to round;
//! the figures are medians. Clocks stop when the rows can be seen in the target. After each measured run the contents of
//! source and target are compared: a wrong result fails the whole program.
//!
//! | variable | what | without it |
//! |---|---|---|
//! | `PRESET` | `full`, `short`, `quick` or `smoke`: rounds and scale | `full` |
//! | `ROUNDS` | rounds | 5, 5, 3, 1 |
//! | `SCALE` | part of the full number of rows | 1, 0.4, 0.2, 0.01 |
//! | `ONLY` | scenarios, separated by commas | all |
//! | `NAME` | results go to `<date>-<name>.json` and `.md` | the preset |
//! | `RESULTS` | in this folder | `benches/results` |
//! | `SLUICE_BIN` | another worker program, for example of an earlier release | the one built with this |
//!
//! A results file that is there already keeps the scenarios that are not measured now, so a long run can be done in pieces.

mod copy;
mod drain;
mod latency;
mod machine;
mod native;
mod options;
mod process;
mod report;
mod run;
mod scenario;
mod servers;
#[path = "../../tests/support/mod.rs"]
mod support;
mod transaction;
mod visible;
#[path = "../../tests/support/worker.rs"]
mod worker;

use futures::FutureExt as _;
use options::Options;
use report::Report;
use scenario::{Kind, Scenario};
use servers::Servers;
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};

/// Any failure, for people.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
/// The result of a step.
pub type Result<T> = std::result::Result<T, Error>;

/// Part of the processors that should be free before a scenario begins.
const QUIET: f64 = 0.85;

fn main() -> ExitCode {
    let runtime = tokio::runtime::Runtime::new().expect("an async runtime");
    let outcome = runtime.block_on(async {
        // Servers and workers end when their handles are dropped, so an interrupt must not end the process at once.
        tokio::select! {
            outcome = measure() => outcome,
            () = told_to_end() => Err("interrupted; what was measured before is kept".into()),
        }
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Waits for SIGINT or SIGTERM.
async fn told_to_end() {
    let signals = signal(SignalKind::interrupt()).and_then(|interrupt| Ok((interrupt, signal(SignalKind::terminate())?)));
    match signals {
        Ok((mut interrupt, mut terminate)) => tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        },
        Err(_) => std::future::pending().await,
    }
}

async fn measure() -> Result<()> {
    let options = Options::from_environment()?;
    let scenarios = scenario::chosen(&options.only)?;
    let mut report = Report::open(&options, &machine::facts(&Servers::start()?).await?)?;
    eprintln!("{}", report.heading());
    let mut failures = Vec::new();
    for scenario in scenarios {
        let idle = machine::idle().await;
        if idle < QUIET {
            eprintln!("the machine is not quiet: only {:.0} % idle, figures will be of little use", idle * 100.0);
        }
        // Helpers that the tests share panic; one broken scenario must not take the others with it.
        let outcome = AssertUnwindSafe(play(scenario, &options)).catch_unwind().await;
        match outcome.unwrap_or_else(|_| Err("a step panicked, see above".into())) {
            Ok(samples) => {
                report.add(scenario, &options, idle, &samples)?;
                eprintln!("{}", report.table(scenario));
            }
            Err(error) => {
                eprintln!("{}: FAILED: {error}", scenario.name);
                failures.push(scenario.name);
            }
        }
    }
    eprintln!("results: {}", report.path().display());
    if failures.is_empty() { Ok(()) } else { Err(format!("failed: {}", failures.join(", ")).into()) }
}

/// Each scenario has servers of its own: what a failed one leaves behind disturbs no other.
async fn play(scenario: &Scenario, options: &Options) -> Result<run::Samples> {
    eprintln!("== {}: {}", scenario.name, scenario.title);
    let servers = &Servers::start()?;
    let outcome = match scenario.kind {
        Kind::Copy(copy) => copy::play(scenario, copy, servers, options).await,
        Kind::Drain(drain) => drain::play(scenario, drain, servers, options).await,
        Kind::Transaction(commits) => transaction::play(scenario, commits, servers, options).await,
        Kind::Latency(commits) => latency::play(scenario, commits, servers, options).await,
    };
    outcome.map_err(|error| format!("{error}\n{}", servers.last_words()).into())
}
