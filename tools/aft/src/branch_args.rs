//! The command line of `aft branch`, and the options of a mount.

use std::path::PathBuf;

use afterimage_protocol::rest::server::MountOptions;
use clap::{Args, Subcommand, ValueEnum};

/// Branches: writable disks that begin as a state of another one.
#[derive(Subcommand, Clone, Debug)]
pub enum BranchCommand {
    /// Fork a branch; `aft mount` shows it
    Create {
        /// The state that it begins with, as <machine>/<disk>@<when>
        #[arg(value_name = "REF")]
        reference: String,
        /// Its name; the appliance chooses one otherwise
        name: Option<String>,
        /// The most that it may hold of its own, such as 512M or 20G
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        quota: Option<u64>,
        /// Begin with a point inside an unfinished copy, which is no state of the source
        #[arg(long)]
        allow_incomplete: bool,
    },
    /// List the branches, what they hold of their own, and their promotions
    List {
        /// Only those of this machine, or of this <machine>/<disk>
        place: Option<String>,
    },
    /// Set or take away what a branch may hold of its own
    Quota {
        /// The branch, as <machine>/<disk>@branch:<name>
        branch: String,
        /// Such as 512M or 20G, or none
        #[arg(value_parser = parse_limit)]
        size: Limit,
    },
    /// Write a branch to a raw image, in the background; the branch stays usable
    ///
    /// The image shows the branch as it was when this began. It has its name once all of it was
    /// read back and compared. The same command goes on with one that was stopped.
    Promote {
        /// The branch, as <machine>/<disk>@branch:<name>
        branch: String,
        /// The image, on the appliance's machine
        target: PathBuf,
        /// Overwrite what is there, and begin anew
        #[arg(long)]
        force: bool,
        /// Wait until the image is whole, and show how far it is
        #[arg(long)]
        wait: bool,
    },
    /// Stop the promotion of a branch; it can go on later
    Stop {
        /// The branch, as <machine>/<disk>@branch:<name>
        branch: String,
    },
    /// Drop a branch and all that was written to it
    Drop {
        /// The branch, as <machine>/<disk>@branch:<name>, or its history
        branch: String,
    },
}

/// A limit, or none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limit(pub Option<u64>);

/// What a mount lets through.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Allowed {
    /// Programs that take the rights of their owners
    Suid,
    /// Device nodes
    Dev,
    /// Programs
    Exec,
}

/// What a mount does otherwise than usual.
#[derive(Args, Clone, Debug, Default)]
pub struct MountHow {
    /// Mount this partition, or with --device give it as the device
    #[arg(long, value_name = "NUMBER")]
    pub partition: Option<u32>,
    /// Refuse writes
    #[arg(long, conflicts_with_all = ["device", "rw"])]
    pub read_only: bool,
    /// Let through what is held back, since the data of another machine is not to be trusted
    #[arg(long, value_enum, value_delimiter = ',', value_name = "WHAT")]
    pub allow: Vec<Allowed>,
    /// Name of the branch that --rw forks
    #[arg(long, requires = "rw")]
    pub name: Option<String>,
    /// The most that the branch may hold of its own, such as 512M or 20G
    #[arg(long, requires = "rw", value_name = "SIZE", value_parser = parse_size)]
    pub quota: Option<u64>,
}

impl MountHow {
    /// As the appliance is told.
    #[must_use]
    pub fn options(self) -> MountOptions {
        let allows = |what| self.allow.contains(&what);
        MountOptions {
            partition: self.partition,
            is_read_only: self.read_only,
            allow_suid: allows(Allowed::Suid),
            allow_dev: allows(Allowed::Dev),
            allow_exec: allows(Allowed::Exec),
            branch_name: self.name,
            quota_bytes: self.quota,
        }
    }
}

fn parse_limit(text: &str) -> Result<Limit, String> {
    if text == "none" {
        return Ok(Limit(None));
    }
    parse_size(text).map(|size| Limit(Some(size)))
}

/// Reads a size such as `4096`, `512K`, `100M`, `20G` or `2T`; units are powers of 1024.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || "write it like 512M, 20G or 2T".to_owned();
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let shift = match unit.trim_end_matches("iB") {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number
        .checked_mul(1 << shift)
        .filter(|size| *size > 0)
        .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_of_1024() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("20GiB"), Ok(20 << 30));
        assert_eq!(parse_limit("none"), Ok(Limit(None)));
        for wrong in ["", "M", "0", "-1", "1X", "18446744073709551615T", "1.5G"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
