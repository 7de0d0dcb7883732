//! The command line, nothing else.

use clap::{Parser, Subcommand};
use sluice::operator;
use sluice::resources::crds;
use sluice::worker::{self, registry::Connectors};
use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Change data capture, declared in Kubernetes.
#[derive(Debug, Parser)]
#[command(name = "sluice", version, propagate_version = true)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Turn resources into workers, and what workers say into status.
    ///
    /// Needs a cluster around it, or a kubeconfig. Exit codes: 0 told to end, 1 anything else, loss of the leadership included.
    Operator(Box<operator::Options>),
    /// Work that runs in a pod; the operator starts these.
    #[command(subcommand)]
    Worker(WorkerCommand),
    /// Print the CustomResourceDefinitions, or write them to folders.
    Crds {
        /// Folder to write one file per kind to, instead of printing; may be given several times.
        #[arg(long, value_name = "FOLDER")]
        write: Vec<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
enum WorkerCommand {
    /// Keep the tables of a target identical to those of a source.
    ///
    /// What to mirror is read from desired.json in the configuration folder and may be replaced by PUT /v1/desired at
    /// any time. Exit codes: 0 told to end, 1 an internal failure, 3 another worker has claimed the stream.
    Mirror(worker::Options),
}

fn main() -> ExitCode {
    let CommandLine { command } = CommandLine::parse();
    let ended = match command {
        Command::Operator(options) => operate(*options),
        Command::Worker(WorkerCommand::Mirror(options)) => mirror(&options),
        Command::Crds { write } => crds(&write),
    };
    ended.unwrap_or_else(|error| {
        eprintln!("sluice: {error}");
        ExitCode::FAILURE
    })
}

fn operate(options: operator::Options) -> Result<ExitCode, Box<dyn Error>> {
    sluice::telemetry::init(options.log_format, &options.log_filter())?;
    block_on(async {
        let terminate = on_signals()?;
        operator::run(options, terminate).await?;
        Ok(ExitCode::SUCCESS)
    })
}

fn mirror(options: &worker::Options) -> Result<ExitCode, Box<dyn Error>> {
    sluice::telemetry::init(options.log_format, &options.log_level)?;
    let exit = block_on(async {
        let terminate = on_signals()?;
        let listener = TcpListener::bind(options.listen).await.map_err(|error| format!("{}: {error}", options.listen))?;
        tracing::info!(version = env!("CARGO_PKG_VERSION"), listen = %listener.local_addr()?, "worker starts");
        Ok(worker::run::run(options.settings(), listener, Connectors::new(options.room()), terminate).await)
    })?;
    Ok(ExitCode::from(exit.code()))
}

fn crds(folders: &[PathBuf]) -> Result<ExitCode, Box<dyn Error>> {
    if folders.is_empty() {
        print!("{}", crds::to_yaml()?);
    }
    for folder in folders {
        crds::write(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs on all cores, and does not wait for threads that are stuck in a system call at the end.
fn block_on<T>(work: impl Future<Output = Result<T, Box<dyn Error>>>) -> Result<T, Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(work);
    runtime.shutdown_timeout(Duration::from_secs(1));
    done
}

/// SIGTERM and SIGINT. The first process of a container ignores signals that it does not handle.
fn on_signals() -> std::io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let told = CancellationToken::new();
    let tell = told.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tell.cancel();
    });
    Ok(told)
}
