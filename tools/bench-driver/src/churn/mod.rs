//! Churn of which it is known later what a policy needs: a log says when which block was written,
//! and the content of each version follows from its number.
//!
//! Invariants
//! * One write is in flight, so the log's order is the order of the LSNs.
//! * A record is in the log only if its write has completed; its time is that of the completion.

mod content;
mod locality;
mod log;
mod needed;

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use afterimage_blockdev::{BLOCK_BYTES, Clock, IoBuffer, SystemClock};
use serde_json::json;

use crate::error::BenchError;
use crate::writers::open_direct;
use content::Version;
use locality::{Locality, Pattern, Run};
use log::{Log, Record};
pub(crate) use needed::{NeededArgs, needed};

/// Longest write, in blocks.
const RUN_BLOCKS_MAX: usize = 64;
/// How far behind its rate the churn may fall before it is given up as too slow.
const BEHIND_MAX: f64 = 0.5;

/// Arguments of `fill`.
#[derive(clap::Args, Debug)]
pub(crate) struct FillArgs {
    /// The disk's file; it exists and has its size
    #[arg(long)]
    file: PathBuf,
    /// Bytes to fill, from the begin
    #[arg(long)]
    bytes: u64,
}

/// Arguments of `churn`.
#[derive(clap::Args, Debug)]
pub(crate) struct ChurnArgs {
    /// The tapped device; without it nothing is written and the time of the log is made up
    #[arg(long)]
    device: Option<PathBuf>,
    /// Bytes that hold files; all writes go there
    #[arg(long)]
    filled_bytes: u64,
    /// Where the writes go
    #[arg(long)]
    pattern: Pattern,
    /// Blocks of 4 KiB per second
    #[arg(long)]
    rate: u64,
    /// For how long
    #[arg(long)]
    seconds: u64,
    /// The log, appended to
    #[arg(long)]
    log: PathBuf,
}

/// Writes what versions without a record hold.
pub(crate) fn fill(args: &FillArgs) -> Result<(), BenchError> {
    let file = open_direct(&args.file)?;
    let mut buffer = IoBuffer::zeroed(RUN_BLOCKS_MAX * BLOCK_BYTES);
    let blocks = args.bytes / block_bytes();
    let mut first = 0;
    while first < blocks {
        let mut count = 0;
        for block in buffer.chunks_exact_mut(BLOCK_BYTES) {
            Version::Filled(first + count).write_to(block);
            count += 1;
        }
        let count = count.min(blocks - first);
        write_run(&file, &mut buffer, first, count)?;
        first += count;
    }
    Ok(())
}

/// Writes at a rate; prints how many blocks it were and how long it took.
pub(crate) fn run(args: &ChurnArgs) -> Result<(), BenchError> {
    let device = args.device.as_deref().map(open_direct).transpose()?;
    let (mut log, records) = Log::append(&args.log)?;
    let mut locality = Locality::new(args.pattern, args.filled_bytes / block_bytes(), records);
    let mut buffer = IoBuffer::zeroed(RUN_BLOCKS_MAX * BLOCK_BYTES);
    let total = args.rate.saturating_mul(args.seconds);
    let clock = SystemClock::default();
    let (began, first_ns) = (Instant::now(), log.last_time().max(clock.wall().0));
    let mut written = 0;
    while written < total {
        let due = per_rate(written, args.rate);
        if device.is_some() {
            wait_until(began + due);
        }
        let Run { first, count } = locality.next();
        let time_ns = match &device {
            Some(device) => {
                for (number, block) in (0..count).zip(buffer.chunks_exact_mut(BLOCK_BYTES)) {
                    Version::Written(records + written + number).write_to(block);
                }
                write_run(device, &mut buffer, first, count)?;
                clock.wall().0
            }
            None => first_ns + u64::try_from(due.as_nanos()).unwrap_or(u64::MAX),
        };
        for block in first..first + count {
            log.push(Record { time_ns, block })?;
        }
        written += count;
        if device.is_some() {
            check_pace(began, due)?;
        }
    }
    log.flush()?;
    println!(
        "{}",
        json!({
            "blocks": written,
            "elapsed_s": began.elapsed().as_secs_f64(),
            "first_ns": first_ns,
        })
    );
    Ok(())
}

fn write_run(
    file: &std::fs::File,
    buffer: &mut IoBuffer,
    first: u64,
    count: u64,
) -> Result<(), BenchError> {
    let bytes = usize::try_from(count * block_bytes()).unwrap_or(usize::MAX);
    let offset = first * block_bytes();
    let run = buffer
        .get(..bytes)
        .ok_or_else(|| BenchError::usage("a run is longer than its buffer"))?;
    file.write_all_at(run, offset)
        .map_err(BenchError::io(format!("write at {offset}")))
}

fn per_rate(blocks: u64, rate: u64) -> Duration {
    Duration::from_nanos(blocks.saturating_mul(1_000_000_000) / rate.max(1))
}

fn wait_until(when: Instant) {
    let wait = when.saturating_duration_since(Instant::now());
    if wait > Duration::from_millis(1) {
        std::thread::sleep(wait);
    }
}

/// A device that is far too slow makes another churn than the one asked for.
fn check_pace(began: Instant, due: Duration) -> Result<(), BenchError> {
    let elapsed = began.elapsed();
    let is_behind =
        elapsed > Duration::from_secs(10) && due.as_secs_f64() < elapsed.as_secs_f64() * BEHIND_MAX;
    if is_behind {
        return Err(BenchError::usage(format!(
            "the device takes less than half of the rate: after {:.0} s it is {:.0} s behind",
            elapsed.as_secs_f64(),
            elapsed.saturating_sub(due).as_secs_f64()
        )));
    }
    Ok(())
}

/// Bytes of a block, as offsets are counted.
fn block_bytes() -> u64 {
    u64::try_from(BLOCK_BYTES).unwrap_or(u64::MAX)
}
