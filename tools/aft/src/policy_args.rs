//! The command line of `aft policy`, and of the commands for many points.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::args::parse_seconds;

/// How long points and writes are kept.
#[derive(Subcommand, Clone, Debug)]
pub enum PolicyCommand {
    /// Show the policy of a machine
    Show {
        /// Name or identity of the machine; may be left out when there is only one
        machine: Option<String>,
    },
    /// Take the policy of a machine from a file
    Apply {
        /// Name or identity of the machine
        machine: String,
        /// File with what `aft --json policy show` prints; - for standard input
        file: PathBuf,
    },
    /// Change parts of the policy of a machine
    Set(PolicyChange),
    /// Say that the clock of the appliance is right, after it jumped
    ConfirmClock,
}

/// Parts of a policy to change.
#[derive(Args, Clone, Debug)]
pub struct PolicyChange {
    /// Name or identity of the machine
    pub machine: String,
    /// How far back every single write stays addressable
    #[arg(long, value_name = "TIME", value_parser = parse_span)]
    pub window: Option<u64>,
    /// Keep a point of each INTERVAL for TIME; all tiers, from the finest, replace those before
    #[arg(long, value_name = "INTERVAL:TIME", value_parser = parse_tier)]
    pub tier: Vec<(u64, u64)>,
    /// Keep application-consistent points at least so long
    #[arg(long, value_name = "TIME", value_parser = parse_span)]
    pub keep_application: Option<u64>,
    /// Keep named points so long before the tiers hold for them, or `forever`
    #[arg(long, value_name = "TIME", value_parser = parse_or_forever)]
    pub keep_named: Option<Keep>,
    /// Lock each new point for so long, or `none`
    #[arg(long, value_name = "TIME", value_parser = parse_or_none)]
    pub lock: Option<Keep>,
    /// Lock only points of this kind: crash, application, bookmark [default: all three]
    #[arg(long, value_name = "KIND", requires = "lock")]
    pub lock_kind: Vec<String>,
}

/// A span, or its absence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Keep(pub Option<u64>);

/// Points of one machine.
#[derive(Args, Clone, Debug)]
pub struct PointSelection {
    /// Name or identity of the machine
    pub machine: String,
    /// Names of the points
    #[arg(value_name = "NAME", required_unless_present = "all_before")]
    pub names: Vec<String>,
    /// All points older than this instead: a time, or an age such as -7d
    #[arg(
        long,
        value_name = "WHEN",
        allow_hyphen_values = true,
        conflicts_with = "names"
    )]
    pub all_before: Option<String>,
    /// With --all-before: leave locked points out
    #[arg(long, requires = "all_before")]
    pub skip_locked: bool,
}

/// Until when points are locked.
#[derive(Args, Clone, Debug)]
#[group(required = true, multiple = false)]
pub struct LockEnd {
    /// A time such as 2026-07-31T12:00:00Z
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
    /// For how long from now on: 90s, 15m, 2h, 7d
    #[arg(long = "for", value_name = "TIME", value_parser = parse_seconds)]
    pub duration: Option<u64>,
}

/// Reads a time span that may be nothing, as seconds.
fn parse_span(text: &str) -> Result<u64, String> {
    if text == "0s" {
        return Ok(0);
    }
    parse_seconds(text)
}

fn parse_tier(text: &str) -> Result<(u64, u64), String> {
    let (interval, keep_for) = text
        .split_once(':')
        .ok_or_else(|| "write it like 5m:24h".to_owned())?;
    Ok((parse_seconds(interval)?, parse_seconds(keep_for)?))
}

fn parse_or_forever(text: &str) -> Result<Keep, String> {
    match text {
        "forever" => Ok(Keep(None)),
        text => parse_span(text).map(|span| Keep(Some(span))),
    }
}

fn parse_or_none(text: &str) -> Result<Keep, String> {
    match text {
        "none" => Ok(Keep(None)),
        text => parse_seconds(text).map(|span| Keep(Some(span))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiers_and_spans_are_read() {
        assert_eq!(parse_tier("5m:24h"), Ok((300, 86_400)));
        assert_eq!(parse_span("0s"), Ok(0));
        assert_eq!(parse_or_forever("forever"), Ok(Keep(None)));
        assert_eq!(parse_or_none("7d"), Ok(Keep(Some(604_800))));
        for wrong in ["5m", "5m:", ":24h", "0s:5m", "5:6"] {
            assert!(parse_tier(wrong).is_err(), "{wrong}");
        }
        assert!(parse_or_none("0s").is_err());
    }
}
