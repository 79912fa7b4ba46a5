//! Many recovery points, with writes between them: how long each takes, seen by who asks.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;

use crate::error::BenchError;
use crate::http::LocalClient;
use crate::writers::Writers;

/// Arguments of `points`.
#[derive(clap::Args, Debug)]
pub(crate) struct PointArgs {
    /// The tapped device
    #[arg(long)]
    device: PathBuf,
    /// Its size in bytes; less keeps the writes to its begin
    #[arg(long)]
    size_bytes: u64,
    /// Local socket of the appliance
    #[arg(long)]
    socket: PathBuf,
    /// Name of the machine
    #[arg(long)]
    machine: String,
    /// Number of the first point, for the names
    #[arg(long)]
    first: u64,
    /// Points to make
    #[arg(long)]
    count: u64,
    /// Random 4 KiB writes before each point
    #[arg(long, default_value_t = 64)]
    writes: u64,
    /// Writes in flight
    #[arg(long, default_value_t = 1)]
    depth: usize,
}

/// Prints the time of each point, in microseconds, as one JSON object.
pub(crate) fn run(args: &PointArgs) -> Result<(), BenchError> {
    let seed = args.first.wrapping_add(1);
    let writers = Writers::start(&args.device, args.size_bytes, args.depth, seed)?;
    let mut client = LocalClient::connect(&args.socket)?;
    let path = format!("/v1/machines/{}/points", args.machine);
    let mut create_us = Vec::new();
    for number in args.first..args.first.saturating_add(args.count) {
        writers.write(args.writes)?;
        let body = json!({ "name": format!("bench-{number}"), "at": null });
        let began = Instant::now();
        client.post(&path, &body)?;
        create_us.push(u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX));
    }
    println!("{}", json!({ "create_us": create_us }));
    Ok(())
}
