//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use clap_complete::Shell;

use crate::branch_args::{BranchCommand, MountHow};
use crate::files_args::FilesCommand;
use crate::nbd_args::NbdCommand;
use crate::offline_args::StoreCommand;
use crate::policy_args::{LockEnd, PointSelection, PolicyCommand};
use crate::seed_args::SeedCommand;
use crate::space_args::{QuotaCommand, SpaceCommand};
use crate::vhost_args::VhostCommand;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  not reachable or busy: the same command may work later
  2  wrong command line
  3  refused: the same command will be refused again
  4  a person must act; the message says how
  5  fenced: another writer holds the history
  6  data is damaged; it was not served

A state of a disk is written as <machine>/<disk>@<when>; <when> is the name of a recovery point, a
time such as 2026-07-31T12:00:00Z, an age such as -90s, lsn:1234, <history>:lsn:1234, or latest.
A branch of it is written as <machine>/<disk>@branch:<name>.";

/// Shows any protected disk as it was after any of its writes.
#[derive(Parser, Clone, Debug)]
#[command(name = "aft", version, after_help = EXIT_CODES)]
pub struct Args {
    /// What every command understands.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What every command understands.
#[derive(clap::Args, Clone, Debug)]
pub struct Global {
    /// Local socket of the appliance
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        env = "AFTERIMAGE_SOCKET",
        hide_env_values = true,
        default_value = "/var/lib/afterimage/control.sock"
    )]
    pub socket: PathBuf,
    /// Local socket of this machine's agent
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        env = "AFTERIMAGE_AGENT_SOCKET",
        hide_env_values = true,
        default_value = "/run/afterimage/agent.sock"
    )]
    pub agent_socket: PathBuf,
    /// Control port of an appliance elsewhere, instead of the local socket
    #[arg(
        long,
        global = true,
        value_name = "HOST:PORT",
        env = "AFTERIMAGE_SERVER",
        hide_env_values = true,
        requires = "identity"
    )]
    pub server: Option<String>,
    /// Certificate and key for --server, as `aft cert issue-admin` wrote them
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "AFTERIMAGE_IDENTITY",
        hide_env_values = true
    )]
    pub identity: Option<PathBuf>,
    /// Answer in JSON
    #[arg(long, global = true)]
    pub json: bool,
}

/// What to do.
#[derive(Subcommand, Clone, Debug)]
pub enum Command {
    /// Show how the appliance and all machines are
    Status,
    /// Protected machines
    #[command(subcommand)]
    Machine(MachineCommand),
    /// Disks of machines
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Agents, and the one of this machine
    #[command(subcommand)]
    Agent(AgentCommand),
    /// Recovery points
    #[command(subcommand)]
    Point(PointCommand),
    /// How long points and writes are kept
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// What takes room, and how long it lasts
    #[command(subcommand)]
    Space(SpaceCommand),
    /// What machines, disks and the store may take
    #[command(subcommand)]
    Quota(QuotaCommand),
    /// Show a disk as it was: as a mounted file system, or as a block device
    Mount(MountArgs),
    /// End a mount
    Umount {
        /// Number, directory or device of the mount
        target: String,
        /// Also drop the branch and its writes
        #[arg(long)]
        drop_branch: bool,
    },
    /// List the mounts
    Mounts,
    /// Single files of a disk as it was
    #[command(subcommand)]
    Files(FilesCommand),
    /// Branches: writable disks that begin as a state of another one
    #[command(subcommand)]
    Branch(BranchCommand),
    /// Disks over the network block device protocol
    #[command(subcommand)]
    Nbd(NbdCommand),
    /// Disks of virtual machines, as vhost-user-blk sockets
    #[command(subcommand)]
    Vhost(VhostCommand),
    /// The log and store of the appliance
    #[command(subcommand)]
    Log(LogCommand),
    /// The store as a whole
    #[command(subcommand)]
    Store(StoreCommand),
    /// Bulk import and export of disks
    #[command(subcommand)]
    Seed(SeedCommand),
    /// Tokens with which agents enrol
    #[command(subcommand)]
    Token(TokenCommand),
    /// Certificates
    #[command(subcommand)]
    Cert(CertCommand),
    /// Show what happened
    Events {
        /// Only those after this number
        #[arg(long, value_name = "NUMBER", default_value_t = 0)]
        after: u64,
        /// At most so many
        #[arg(long, value_name = "COUNT", default_value_t = 1000)]
        limit: usize,
    },
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print the manual page
    Man,
}

/// Protected machines.
#[derive(Subcommand, Clone, Debug)]
pub enum MachineCommand {
    /// List the machines
    List,
    /// Give a machine to another agent; the present one is fenced
    Move {
        /// Name or identity of the machine
        machine: String,
        /// Identity of the agent, as `aft agent list` shows it
        agent: String,
    },
}

/// Disks of machines.
#[derive(Subcommand, Clone, Debug)]
pub enum DiskCommand {
    /// List the disks that the appliance keeps
    List {
        /// Only those of this machine
        machine: Option<String>,
        /// List what the agent of this machine has attached instead
        #[arg(long, conflicts_with = "machine")]
        local: bool,
    },
    /// Show one disk and what of it can be mounted
    Show {
        /// The disk, as <machine>/<disk>
        disk: String,
    },
    /// Put a tap in front of an image file or block device of this machine
    Attach {
        /// Image file or block device
        source: PathBuf,
        /// Name of the disk [default: the last part of the path]
        #[arg(long)]
        name: Option<String>,
    },
    /// Begin to protect an attached disk
    Protect {
        /// Name of the disk
        name: String,
        /// Wait until the first copy is done, and show how far it is
        #[arg(long)]
        wait: bool,
    },
    /// Let a disk follow its source, which has grown, at once
    Grow {
        /// Name of the disk
        name: String,
    },
    /// Take the tap away
    Detach {
        /// Name of the disk
        name: String,
    },
}

/// Agents, and the one of this machine.
#[derive(Subcommand, Clone, Debug)]
pub enum AgentCommand {
    /// Show how the agent of this machine is
    Status,
    /// List the agents that have enrolled
    List,
    /// Make all certificates of an agent worthless
    Revoke {
        /// Identity of the agent
        agent: String,
    },
}

/// Recovery points.
#[derive(Subcommand, Clone, Debug)]
pub enum PointCommand {
    /// Make a point of the present state, or of one that is past
    Create {
        /// Name or identity of the machine; may be left out when there is only one
        machine: Option<String>,
        /// Name of the point; the appliance chooses one otherwise
        #[arg(long)]
        name: Option<String>,
        /// A past state instead of the present: a time, -90s, lsn:1234
        #[arg(long, value_name = "WHEN", allow_hyphen_values = true)]
        at: Option<String>,
    },
    /// List the points of a machine, oldest first
    List {
        /// Name or identity of the machine; may be left out when there is only one
        machine: Option<String>,
        /// Only those after this point's number
        #[arg(long, value_name = "NUMBER", default_value_t = 0)]
        after: u64,
        /// At most so many; all of them otherwise
        #[arg(long, value_name = "COUNT")]
        limit: Option<usize>,
    },
    /// Delete points: all that are named, or none
    Delete(PointSelection),
    /// Lock points, so that nobody can delete them before; locks can only be lengthened
    Lock {
        /// Which
        #[command(flatten)]
        selection: PointSelection,
        /// Until when
        #[command(flatten)]
        end: LockEnd,
    },
}

/// A mount.
#[derive(clap::Args, Clone, Debug)]
pub struct MountArgs {
    /// The state, as <machine>/<disk>@<when>, or a branch, as <machine>/<disk>@branch:<name>
    #[arg(value_name = "REF")]
    pub reference: String,
    /// Where; the appliance chooses a directory otherwise
    #[arg(value_name = "DIR", conflicts_with = "device")]
    pub directory: Option<PathBuf>,
    /// Give a block device only; what is written to it is private and lost with the mount
    #[arg(long)]
    pub device: bool,
    /// Fork a branch: what is written is kept and has history
    #[arg(long)]
    pub rw: bool,
    /// Open a point inside an unfinished copy, which is no state of the source
    #[arg(long)]
    pub allow_incomplete: bool,
    /// What is done otherwise than usual
    #[command(flatten)]
    pub how: MountHow,
}

/// The log and store of the appliance.
#[derive(Subcommand, Clone, Debug)]
pub enum LogCommand {
    /// Read and check every byte
    Verify,
}

/// Tokens with which agents enrol.
#[derive(Subcommand, Clone, Debug)]
pub enum TokenCommand {
    /// Make a token that can be used once
    Create {
        /// How long it lasts: 90s, 15m, 2h, 7d
        #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_seconds)]
        ttl: u64,
    },
}

/// Certificates.
#[derive(Subcommand, Clone, Debug)]
pub enum CertCommand {
    /// Make a certificate with which `aft --server` may do everything
    IssueAdmin {
        /// Who it is for
        name: String,
        /// File to write certificate and key to; standard output otherwise
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
}

/// Reads a time span such as `90s`, `15m`, `2h` or `7d`, as seconds.
pub(crate) fn parse_seconds(text: &str) -> Result<u64, String> {
    let wrong = || "write it like 90s, 15m, 2h or 7d".to_owned();
    let unit_at = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let (number, unit) = text.split_at(unit_at);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let unit = match unit {
        "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    number
        .checked_mul(unit)
        .filter(|seconds| *seconds > 0)
        .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn time_spans_have_units() {
        assert_eq!(parse_seconds("90s"), Ok(90));
        assert_eq!(parse_seconds("2h"), Ok(7200));
        for wrong in ["", "h", "5", "0s", "-1h", "5w", "18446744073709551615d"] {
            assert!(parse_seconds(wrong).is_err(), "{wrong}");
        }
    }
}
