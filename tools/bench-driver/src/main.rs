//! What `tools/bench` cannot do with fio: a load generator that speaks the data port's protocol,
//! and the timing of many recovery points. Everything else of the benchmark lies in
//! `tools/bench.d`.

mod error;
mod fill;
mod http;
mod load;
mod points;

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
    /// Writes to a device and makes recovery points, and times them
    Points(points::PointArgs),
}

fn run(command: &Command) -> Result<(), BenchError> {
    match command {
        Command::Load(args) => load::run(args),
        Command::Points(args) => points::run(args),
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
