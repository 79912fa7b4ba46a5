//! The command line of `aft seed`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

/// Bulk import and export.
#[derive(Subcommand, Clone, Debug)]
pub enum SeedCommand {
    /// Write a disk as it was to a file, a device or a directory
    Export(ExportArgs),
    /// Keep an image or archive, so that a disk's first copy sends only what differs
    Import(ImportArgs),
    /// Read and check every byte of a seed archive
    Verify {
        /// Directory of the archive
        archive: PathBuf,
        /// What the archive is encrypted with
        #[command(flatten)]
        secret: SecretArgs,
    },
    /// List what was imported and not yet used
    List,
    /// Drop what was imported
    Drop {
        /// The disk, as <machine>/<disk>
        disk: String,
    },
}

/// What a disk is written as.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExportFormat {
    /// The bytes of the disk; holes and zeroes of a file are left out
    Raw,
    /// An image for QEMU, made by qemu-img
    Qcow2,
    /// A directory: compressed, encrypted, every byte under a hash
    Archive,
}

/// Which way requests reach the kernel.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Io {
    /// io_uring where the kernel lets us
    Auto,
    /// io_uring, or an error
    Uring,
    /// Blocking calls on threads
    Threads,
}

/// What an archive is encrypted with.
#[derive(Args, Clone, Debug)]
pub struct SecretArgs {
    /// File whose first line is the passphrase of the archive
    #[arg(long, value_name = "FILE", conflicts_with = "key_file")]
    pub passphrase_file: Option<PathBuf>,
    /// File with the key of the archive, such as 32 random bytes
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
}

/// An export.
#[derive(Args, Clone, Debug)]
pub struct ExportArgs {
    /// The state, as <machine>/<disk>@<when>
    #[arg(value_name = "REF")]
    pub reference: String,
    /// File, block device, or directory of an archive
    pub target: PathBuf,
    /// What to write
    #[arg(long, value_enum, default_value_t = ExportFormat::Raw)]
    pub format: ExportFormat,
    /// Overwrite what is there; a block device always needs it
    #[arg(long)]
    pub force: bool,
    /// Open a point inside an unfinished copy, which is no state of the source
    #[arg(long)]
    pub allow_incomplete: bool,
    /// What the archive is encrypted with
    #[command(flatten)]
    pub secret: SecretArgs,
    /// Do not encrypt the archive: whoever has it can read the disk
    #[arg(long, conflicts_with_all = ["passphrase_file", "key_file"])]
    pub plain: bool,
    /// Which way requests reach the kernel
    #[arg(long, value_enum, default_value_t = Io::Auto)]
    pub io: Io,
}

/// An import.
#[derive(Args, Clone, Debug)]
pub struct ImportArgs {
    /// Raw or qcow2 image, block device, or directory of an archive
    pub source: PathBuf,
    /// The disk, as <machine>/<disk>; neither needs to be known yet
    pub disk: String,
    /// Replace what was imported for this disk before
    #[arg(long)]
    pub force: bool,
    /// What the archive is encrypted with
    #[command(flatten)]
    pub secret: SecretArgs,
    /// Directory in which a qcow2 image is unpacked for a while
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    pub temporary: PathBuf,
    /// Which way requests reach the kernel
    #[arg(long, value_enum, default_value_t = Io::Auto)]
    pub io: Io,
}
