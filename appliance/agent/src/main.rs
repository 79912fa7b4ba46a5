//! `afterimage-agent`: see the library.

use std::process::ExitCode;

use afterimage_agent::AgentError;
use afterimage_agent::cli::{Cli, Command};
use afterimage_agent::run::{run_agent, run_enrol};
use clap::Parser;
use tracing_subscriber::EnvFilter;

/// Exit status 1 is a failure, 2 a command line that cannot be understood.
fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter =
        EnvFilter::try_from_env("AFTERIMAGE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let result = match cli.command {
        Command::Enrol(args) => run_enrol(&args).map(|text| println!("{text}")),
        Command::Run(args) => run_agent(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::FAILURE
        }
    }
}

fn report(error: &AgentError) {
    let hint = error.hint();
    if hint.is_empty() {
        eprintln!("afterimage-agent: {error}");
    } else {
        eprintln!("afterimage-agent: {error}; {hint}");
    }
}
