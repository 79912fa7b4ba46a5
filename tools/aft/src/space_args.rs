//! The command line of `aft space` and `aft quota`.

use clap::Subcommand;

use crate::branch_args::parse_size;

/// What takes room, and how long it lasts.
#[derive(Subcommand, Clone, Debug)]
pub enum SpaceCommand {
    /// Show what takes room, and how long it lasts
    Show {
        /// Only what this machine takes
        machine: Option<String>,
    },
    /// List the points of a machine with what would come back if one of them went
    Points {
        /// Name or identity of the machine; may be left out when there is only one
        machine: Option<String>,
        /// At most so many
        #[arg(long, value_name = "COUNT")]
        limit: Option<usize>,
    },
}

/// What machines, disks and the store may take.
#[derive(Subcommand, Clone, Debug)]
pub enum QuotaCommand {
    /// List the quotas
    List,
    /// Set how much a machine, a disk or the whole store may take
    Set {
        /// A machine, a disk as <machine>/<disk>, or `store` for the whole store
        of: String,
        /// Most bytes: 500M, 50GiB or 2T
        #[arg(value_parser = parse_size)]
        bytes: u64,
    },
    /// Take a quota away
    Clear {
        /// A machine, a disk as <machine>/<disk>, or `store` for the whole store
        of: String,
    },
}
