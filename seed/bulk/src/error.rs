//! What goes wrong with bulk work, why, and what to do.

use std::io;
use std::path::{Path, PathBuf};

use afterimage_blockdev::ErrorClass;

/// A failed import or export.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BulkError {
    /// The system refused an operation on a file.
    #[error("cannot {operation} {}: {source}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// There is something already.
    #[error("{} is there already, and is not an unfinished export of this state", path.display())]
    Exists {
        /// The target.
        path: PathBuf,
    },
    /// The target cannot hold the disk.
    #[error("{} holds {found_bytes} bytes, and the disk has {needed_bytes}", path.display())]
    TooSmall {
        /// The target.
        path: PathBuf,
        /// Its size.
        found_bytes: u64,
        /// The disk's size.
        needed_bytes: u64,
    },
    /// A target lost its end between two runs, or under way.
    #[error("{} has {found_bytes} bytes; {expected_bytes} were there before", path.display())]
    Shrunk {
        /// The target.
        path: PathBuf,
        /// Its size.
        found_bytes: u64,
        /// What it was.
        expected_bytes: u64,
    },
    /// A source ends too early.
    #[error("{} ends at byte {at}, within what it should hold", path.display())]
    Short {
        /// The source.
        path: PathBuf,
        /// Where it ends.
        at: u64,
    },
    /// Neither a file nor a block device.
    #[error("{} is neither a file nor a block device", path.display())]
    Kind {
        /// The path.
        path: PathBuf,
    },
    /// Another process works on the target.
    #[error("another process writes to {}", path.display())]
    Busy {
        /// The target.
        path: PathBuf,
    },
    /// Somebody asked to stop.
    #[error("interrupted; what was written stays")]
    Interrupted,
    /// Bytes do not verify.
    #[error("{} is damaged at byte {at}: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        at: u64,
        /// What does not fit.
        what: &'static str,
    },
    /// The key is another one.
    #[error("the key does not open {}", path.display())]
    WrongKey {
        /// The archive.
        path: PathBuf,
    },
    /// There is no key, or one too many.
    #[error("{} is {}encrypted", path.display(), if *is_encrypted { "" } else { "not " })]
    KeyMismatch {
        /// The archive.
        path: PathBuf,
        /// Whether it needs one.
        is_encrypted: bool,
    },
    /// A file that should hold a secret does not.
    #[error("the secret is too short: {found_bytes} bytes, and at least {needed_bytes} are needed")]
    WeakSecret {
        /// Its length.
        found_bytes: usize,
        /// The least.
        needed_bytes: usize,
    },
    /// An archive whose end was never written.
    #[error("{} is not finished: it holds the disk up to byte {at}", path.display())]
    Unfinished {
        /// The archive.
        path: PathBuf,
        /// What is there.
        at: u64,
    },
    /// A newer format.
    #[error("{} has format version {found}; this program reads version 1", path.display())]
    Version {
        /// The archive.
        path: PathBuf,
        /// Its version.
        found: u16,
    },
    /// qemu-img is not installed.
    #[error("qemu-img was not found")]
    NoQemu,
    /// qemu-img failed.
    #[error("qemu-img failed: {message}")]
    Qemu {
        /// What it said.
        message: String,
    },
    /// No thread, or no ring.
    #[error("cannot start the bulk thread: {source}")]
    Thread {
        /// Why not.
        source: io::Error,
    },
}

impl BulkError {
    /// Explains a failed operation on a file.
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            operation,
            path,
            source,
        }
    }

    /// How to go on.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Busy { .. } | Self::Interrupted => ErrorClass::Retry,
            Self::Io { .. }
            | Self::Shrunk { .. }
            | Self::Short { .. }
            | Self::NoQemu
            | Self::Qemu { .. }
            | Self::Thread { .. } => ErrorClass::Operator,
            Self::Exists { .. }
            | Self::TooSmall { .. }
            | Self::Kind { .. }
            | Self::WrongKey { .. }
            | Self::KeyMismatch { .. }
            | Self::WeakSecret { .. }
            | Self::Unfinished { .. }
            | Self::Version { .. } => ErrorClass::Refused,
            Self::Damaged { .. } => ErrorClass::Corrupt,
        }
    }

    /// What a person should do.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                "make room, and run the same command again: it goes on where it stopped"
            }
            Self::Io { .. } => "",
            Self::Exists { .. } => "choose another target, or overwrite it with --force",
            Self::TooSmall { .. } => "choose a larger target",
            Self::Shrunk { .. } => "somebody cut it; begin anew with --force",
            Self::Short { .. } => "the file was cut; look for another copy",
            Self::Kind { .. } => "name a regular file or a block device",
            Self::Busy { .. } => "wait until it is done",
            Self::Interrupted => "run the same command again: it goes on where it stopped",
            Self::Damaged { .. } => "what it holds is not trusted; look for another copy",
            Self::WrongKey { .. } => "name the file with the passphrase or key it was made with",
            Self::KeyMismatch { is_encrypted, .. } if *is_encrypted => {
                "give --passphrase-file or --key-file"
            }
            Self::KeyMismatch { .. } => "leave --passphrase-file and --key-file out",
            Self::WeakSecret { .. } => "use a longer one; `head -c 32 /dev/urandom` makes a key",
            Self::Unfinished { .. } => "run the same export again: it goes on where it stopped",
            Self::Version { .. } => "use a newer release",
            Self::NoQemu => "install it (package qemu-utils), or use another format",
            Self::Qemu { .. } => "look whether the image is whole, with `qemu-img check`",
            Self::Thread { .. } => "look at the limits of processes and locked memory",
        }
    }
}
