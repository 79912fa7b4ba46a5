//! `afterimage-agent`: see the library.

use std::io::IsTerminal;
use std::process::ExitCode;

use afterimage_agent::cli::{Cli, Command, exit_code};
use afterimage_agent::run::{run_agent, run_enrol};
use clap::Parser;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter =
        EnvFilter::try_from_env("AFTERIMAGE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let result = match cli.command {
        Command::Enrol(args) => run_enrol(&args).map(|text| println!("{text}")),
        Command::Run(args) => run_agent(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("afterimage-agent: {}", error.to_api());
            ExitCode::from(exit_code(&error))
        }
    }
}
