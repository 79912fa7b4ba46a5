//! The command line of `aft store`.

use std::path::PathBuf;

use clap::Subcommand;

/// The store as a whole. `check`, `verify`, `dump` and `rebuild` work on the data directory of an
/// appliance that is stopped.
#[derive(Subcommand, Clone, Debug)]
pub enum StoreCommand {
    /// Give back the space of what nobody needs any more
    Collect,
    /// Check every byte of the running store now, and show how far it is
    Scrub {
        /// Only start it
        #[arg(long)]
        no_wait: bool,
    },
    /// Check, while afterimaged is stopped, that all that the manifest names is there
    Check(DataDir),
    /// Check every byte, while afterimaged is stopped
    Verify(DataDir),
    /// Show what files of the store say, while afterimaged is stopped
    Dump {
        /// The store
        #[command(flatten)]
        store: DataDir,
        /// What to show
        #[command(flatten)]
        what: DumpWhat,
    },
    /// Make the manifest anew from an old one and the segments, while afterimaged is stopped
    Rebuild {
        /// The store
        #[command(flatten)]
        store: DataDir,
        /// A copy of one of this store's manifest files, however old; what is left of the newest
        /// one otherwise
        #[arg(long, value_name = "FILE")]
        manifest: Option<PathBuf>,
        /// Rebuild into a new directory
        #[arg(long, value_name = "DIR", conflicts_with = "in_place")]
        to: Option<PathBuf>,
        /// Rebuild in the same directory; the old manifest is kept under another name
        #[arg(long, required_unless_present = "to")]
        in_place: bool,
    },
}

/// A stopped store.
#[derive(clap::Args, Clone, Debug)]
pub struct DataDir {
    /// Data directory of the appliance
    #[arg(long, value_name = "DIR", default_value = "/var/lib/afterimage")]
    pub data_dir: PathBuf,
}

/// What `aft store dump` shows.
#[derive(clap::Args, Clone, Copy, Debug)]
#[group(multiple = false)]
pub struct DumpWhat {
    /// Edits of the manifest, in order; also when nothing is named
    #[arg(long)]
    pub manifest: bool,
    /// Recovery points
    #[arg(long)]
    pub points: bool,
    /// Slots of a seed segment
    #[arg(long, value_name = "NUMBER")]
    pub segment: Option<u32>,
    /// Sections of a run
    #[arg(long, value_name = "NUMBER")]
    pub run: Option<u32>,
    /// Commits of the log
    #[arg(long)]
    pub log: bool,
}
