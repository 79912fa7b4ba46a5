//! What a policy needs of a churn: every version that a point shows, that the begin of the window
//! shows, or that was written within the window; each zstd-compressed for itself.

use std::collections::HashMap;
use std::io::Read;
use std::path::PathBuf;

use afterimage_blockdev::BLOCK_BYTES;
use serde_json::json;

use super::block_bytes;
use super::content::Version;
use super::log::{Record, read};
use crate::error::BenchError;

/// The level at which the needed versions are compressed: zstd's own default.
const ZSTD_LEVEL: i32 = 3;

/// Arguments of `needed`. The times of the points come on standard input, a JSON list in ns.
#[derive(clap::Args, Debug)]
pub(crate) struct NeededArgs {
    /// The log
    #[arg(long)]
    log: PathBuf,
    /// Bytes that were filled before
    #[arg(long)]
    filled_bytes: u64,
    /// Begin of the journal window, in ns
    #[arg(long)]
    window_ns: u64,
    /// Only the first records of the log
    #[arg(long, default_value_t = usize::MAX)]
    records: usize,
    /// Compresses one version of so many, and scales
    #[arg(long, default_value_t = 1)]
    one_of: u64,
}

/// Prints the number of versions and their bytes, compressed.
pub(crate) fn needed(args: &NeededArgs) -> Result<(), BenchError> {
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .map_err(BenchError::io("read the times of the points"))?;
    let mut points: Vec<u64> =
        serde_json::from_str(&text).map_err(|error| BenchError::usage(error.to_string()))?;
    points.sort_unstable();
    let records = read(&args.log, args.records)?;
    let filled = args.filled_bytes / block_bytes();
    let versions = needed_versions(&records, filled, &points, args.window_ns);
    let (sampled, bytes) = compressed(&versions, args.one_of.max(1))?;
    let count = u64::try_from(versions.len()).unwrap_or(u64::MAX);
    let all = u128::from(bytes) * u128::from(count) / u128::from(sampled.max(1));
    println!(
        "{}",
        json!({
            "records": records.len(),
            "versions": count,
            "compressed_bytes": u64::try_from(all).unwrap_or(u64::MAX),
        })
    );
    Ok(())
}

fn needed_versions(records: &[Record], filled: u64, points: &[u64], window: u64) -> Vec<Version> {
    // The newest version of each block so far, and since when.
    let mut newest: HashMap<u64, (Version, u64)> = HashMap::new();
    let mut versions = Vec::new();
    // A version lives from its birth until before its death.
    let is_needed = |birth: u64, death: u64| {
        let next_point = points.partition_point(|time| *time < birth);
        death > window || points.get(next_point).is_some_and(|time| *time < death)
    };
    for (number, record) in (0..).zip(records) {
        let (version, birth) = newest
            .insert(record.block, (Version::Written(number), record.time_ns))
            .unwrap_or((Version::Filled(record.block), 0));
        let is_there = version != Version::Filled(record.block) || record.block < filled;
        if is_there && is_needed(birth, record.time_ns) {
            versions.push(version);
        }
    }
    versions.extend(newest.values().map(|(version, _)| *version));
    let untouched = (0..filled).filter(|block| !newest.contains_key(block));
    versions.extend(untouched.map(Version::Filled));
    versions
}

/// How many were compressed, and to how many bytes.
fn compressed(versions: &[Version], one_of: u64) -> Result<(u64, u64), BenchError> {
    let failed = BenchError::io("compress with zstd");
    let mut compressor = match zstd::bulk::Compressor::new(ZSTD_LEVEL) {
        Ok(compressor) => compressor,
        Err(error) => return Err(failed(error)),
    };
    let step = usize::try_from(one_of).unwrap_or(usize::MAX);
    let mut plain = vec![0; BLOCK_BYTES];
    let (mut count, mut bytes) = (0, 0);
    for version in versions.iter().step_by(step) {
        version.write_to(&mut plain);
        let packed = compressor
            .compress(&plain)
            .map_err(BenchError::io("compress with zstd"))?;
        count += 1;
        bytes += u64::try_from(packed.len()).unwrap_or(u64::MAX);
    }
    Ok((count, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(time_ns: u64, block: u64) -> Record {
        Record { time_ns, block }
    }

    #[test]
    fn a_version_is_needed_by_points_windows_and_the_newest_state_only() {
        let records = [
            record(10, 0),
            record(20, 0),
            record(30, 0),
            record(40, 0),
            record(50, 5),
        ];
        let needed = |points: &[u64], window| {
            let mut found = needed_versions(&records, 2, points, window);
            found.sort_unstable_by_key(|version| format!("{version:?}"));
            found
        };
        let newest = [Version::Filled(1), Version::Written(3), Version::Written(4)];
        assert_eq!(needed(&[], 45), newest);
        // A point shows what was written at its time, and not what came after.
        let with = |more: &[Version]| {
            let mut all: Vec<Version> = newest.iter().chain(more).copied().collect();
            all.sort_unstable_by_key(|version| format!("{version:?}"));
            all
        };
        assert_eq!(needed(&[20, 25], 45), with(&[Version::Written(1)]));
        assert_eq!(needed(&[5], 45), with(&[Version::Filled(0)]));
        // The begin of the window shows what was written before it.
        assert_eq!(needed(&[], 35), with(&[Version::Written(2)]));
        assert_eq!(
            needed(&[], 0),
            with(&[
                Version::Filled(0),
                Version::Written(0),
                Version::Written(1),
                Version::Written(2)
            ])
        );
    }
}
