//! What `tools/bench` cannot do with fio: a load generator that speaks the data port's protocol,
//! the timing of many recovery points, and churn of which it is known later what a policy needs.
//! Everything else of the benchmark lies in `tools/bench.d`.

mod churn;
mod error;
mod fill;
mod http;
mod load;
mod points;
mod writers;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use error::BenchError;

/// Drives parts of the benchmark; `tools/bench` calls it
#[derive(Parser, Debug)]
#[command(name = "afterimage-bench", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Sends prepared frames to an appliance, as commands on standard input say
    Load(load::LoadArgs),
    /// Writes histories that are each a fork of the one before
    Failovers(load::failovers::FailoverArgs),
    /// Writes to a device and makes recovery points, and times them
    Points(points::PointArgs),
    /// Fills a disk's file with data that `needed` knows
    Fill(churn::FillArgs),
    /// Writes to a device as an ordinary server does, and keeps a log of it
    Churn(churn::ChurnArgs),
    /// Says what of a log's versions some points and a window need
    Needed(churn::NeededArgs),
}

fn run(command: &Command) -> Result<(), BenchError> {
    match command {
        Command::Load(args) => load::run(args),
        Command::Failovers(args) => load::failovers::run(args),
        Command::Points(args) => points::run(args),
        Command::Fill(args) => churn::fill(args),
        Command::Churn(args) => churn::run(args),
        Command::Needed(args) => churn::needed(args),
    }
}

fn main() -> ExitCode {
    match run(&Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("afterimage-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
