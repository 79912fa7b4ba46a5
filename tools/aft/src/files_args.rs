//! The command line of `aft files`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// Single files of a disk as it was.
#[derive(Subcommand, Clone, Debug)]
pub enum FilesCommand {
    /// List a directory, or describe a file
    Ls {
        /// The state, as <machine>/<disk>@<when>
        #[arg(value_name = "REF")]
        reference: String,
        /// The directory or file, from the root of the file system
        #[arg(default_value = "/")]
        path: PathBuf,
        /// Show kind, mode, owner, size and time
        #[arg(long, short)]
        long: bool,
        /// List directories within directories
        #[arg(long, short = 'R')]
        recursive: bool,
        /// Where
        #[command(flatten)]
        place: FilesPlace,
    },
    /// Bring a file or a directory back, with owners, modes, times, extended attributes and holes
    ///
    /// Set-user-id programs and device nodes come back as what they were.
    Get {
        /// The state, as <machine>/<disk>@<when>
        #[arg(value_name = "REF")]
        reference: String,
        /// The directory or file, from the root of the file system
        path: PathBuf,
        /// An existing directory, or a name that is not there yet; - writes a file as it is, and a
        /// directory as a tar archive, to standard output
        target: PathBuf,
        /// Where
        #[command(flatten)]
        place: FilesPlace,
    },
    /// Show which files were added, removed and changed between two states
    Diff {
        /// The earlier state, as <machine>/<disk>@<when>
        #[arg(value_name = "REF")]
        before: String,
        /// The later state; @<when> means the same disk
        #[arg(value_name = "REF")]
        after: String,
        /// Only below this directory, from the root of the file system
        #[arg(default_value = "/")]
        path: PathBuf,
        /// Compare the bytes of files whose times and numbers say that they are the same, too
        #[arg(long)]
        content: bool,
        /// Where
        #[command(flatten)]
        place: FilesPlace,
    },
}

/// Where files are looked for.
#[derive(Args, Clone, Copy, Debug)]
pub struct FilesPlace {
    /// In this partition of the disk
    #[arg(long, value_name = "NUMBER")]
    pub partition: Option<u32>,
    /// Also in a point inside an unfinished copy, which is no state of the source
    #[arg(long)]
    pub allow_incomplete: bool,
}
