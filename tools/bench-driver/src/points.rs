//! Many recovery points, with writes between them: how long each takes, seen by who asks.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::Instant;

use afterimage_blockdev::{BLOCK_BYTES, IoBuffer, Random};
use serde_json::json;

use crate::error::BenchError;
use crate::fill::half_compressible;
use crate::http::LocalClient;

/// Arguments of `points`.
#[derive(clap::Args, Debug)]
pub(crate) struct PointArgs {
    /// The tapped device
    #[arg(long)]
    device: PathBuf,
    /// Its size in bytes
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
}

/// Prints the time of each point, in microseconds, as one JSON object.
pub(crate) fn run(args: &PointArgs) -> Result<(), BenchError> {
    let device = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(&args.device)
        .map_err(BenchError::io(format!("open {}", args.device.display())))?;
    let mut client = LocalClient::connect(&args.socket)?;
    let path = format!("/v1/machines/{}/points", args.machine);
    let mut random = Random::new(args.first.wrapping_add(1));
    let mut block = IoBuffer::zeroed(BLOCK_BYTES);
    let mut create_us = Vec::new();
    for number in args.first..args.first.saturating_add(args.count) {
        for _ in 0..args.writes {
            write(&device, args.size_bytes, &mut random, &mut block)?;
        }
        let body = json!({ "name": format!("bench-{number}"), "at": null });
        let began = Instant::now();
        client.post(&path, &body)?;
        create_us.push(u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX));
    }
    println!("{}", json!({ "create_us": create_us }));
    Ok(())
}

fn write(
    device: &File,
    size_bytes: u64,
    random: &mut Random,
    block: &mut IoBuffer,
) -> Result<(), BenchError> {
    let block_bytes = u64::try_from(BLOCK_BYTES).unwrap_or(u64::MAX);
    let offset = random.below(size_bytes / block_bytes) * block_bytes;
    half_compressible(random, block);
    device
        .write_all_at(block, offset)
        .map_err(BenchError::io(format!("write at {offset}")))
}
