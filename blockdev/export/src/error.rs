//! What can go wrong between a device and its user.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use afterimage_blockdev::{BlockError, ErrorClass};

use crate::probe::FsKind;

/// A failed export, attachment or mount.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The caller lacks the right.
    #[error("{operation} needs root")]
    NotRoot {
        /// What was tried.
        operation: &'static str,
    },
    /// The kernel has no FUSE, or it is not loaded.
    #[error("/dev/fuse cannot be opened: {source}")]
    NoFuse {
        /// What the system says.
        source: io::Error,
    },
    /// The kernel has no loop devices, or they are not loaded.
    #[error("/dev/loop-control cannot be used: {source}")]
    NoLoop {
        /// What the system says.
        source: io::Error,
    },
    /// The mount directory does not exist, or is not a directory.
    #[error("{} is not a directory: {source}", path.display())]
    NotADirectory {
        /// The directory that was given.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The mount directory holds files that a mount would hide.
    #[error("mount directory {} is not empty", path.display())]
    NotEmpty {
        /// The directory that was given.
        path: PathBuf,
    },
    /// Something is mounted there already.
    #[error("{} is busy: it is already a mount point", path.display())]
    AlreadyMounted {
        /// The directory that was given.
        path: PathBuf,
    },
    /// Nothing is mounted there.
    #[error("nothing is mounted at {}", path.display())]
    NotMounted {
        /// The directory that was given.
        path: PathBuf,
    },
    /// Somebody still uses it.
    #[error("{} is busy: {user}", path.display())]
    Busy {
        /// The device or directory.
        path: PathBuf,
        /// Who uses it, as far as known.
        user: String,
    },
    /// The kernel dropped direct I/O, so that data would go through two page caches.
    #[error("{} cannot do direct I/O over {}", device.display(), backing.display())]
    DirectIoRefused {
        /// The loop device, already detached again.
        device: PathBuf,
        /// The backing file.
        backing: PathBuf,
    },
    /// The kernel took another logical block than the device has.
    #[error("{} took a logical block of {got} bytes, not {wanted}", device.display())]
    BlockSizeRefused {
        /// The loop device, already detached again.
        device: PathBuf,
        /// The wanted size in bytes.
        wanted: u32,
        /// The size in bytes that it took.
        got: u64,
    },
    /// All attempts met another user of loop devices.
    #[error("no free loop device after {attempts} attempts")]
    NoFreeLoop {
        /// Number of attempts.
        attempts: u32,
    },
    /// It did not happen in time.
    #[error("{operation} of {} did not end within {waited:?}", path.display())]
    TimedOut {
        /// What was waited for.
        operation: &'static str,
        /// The device, file or directory.
        path: PathBuf,
        /// How long.
        waited: Duration,
    },
    /// The device holds something that cannot be mounted as it is.
    #[error("{} holds {kind}, which cannot be mounted directly", device.display())]
    NotAFilesystem {
        /// The device.
        device: PathBuf,
        /// What is on it.
        kind: FsKind,
    },
    /// The file system's identity is in use by another mount.
    #[error("{} has the same file system UUID as one that is mounted", device.display())]
    SameFilesystemMounted {
        /// The device.
        device: PathBuf,
    },
    /// The kernel refused the mount.
    #[error("{kind} on {} cannot be mounted at {}: {source}", device.display(), path.display())]
    MountRefused {
        /// The device.
        device: PathBuf,
        /// The mount directory.
        path: PathBuf,
        /// What is on the device.
        kind: FsKind,
        /// What the system says.
        source: io::Error,
    },
    /// A partition table is damaged or makes no sense.
    #[error("partition table is damaged: {reason}")]
    BadPartitionTable {
        /// What is wrong.
        reason: &'static str,
    },
    /// The device refused a request.
    #[error(transparent)]
    Device(#[from] BlockError),
    /// A system call failed.
    #[error("{operation} of {}: {source}", path.display())]
    System {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

impl ExportError {
    /// Makes an error of a failed system call.
    pub(crate) fn system(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::System {
            operation,
            path: path.to_owned(),
            source,
        }
    }

    /// How to go on.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::NotADirectory { .. }
            | Self::NotEmpty { .. }
            | Self::AlreadyMounted { .. }
            | Self::NotMounted { .. }
            | Self::NotAFilesystem { .. }
            | Self::SameFilesystemMounted { .. } => ErrorClass::Refused,
            Self::Busy { .. } | Self::NoFreeLoop { .. } | Self::TimedOut { .. } => {
                ErrorClass::Retry
            }
            Self::BadPartitionTable { .. } => ErrorClass::Corrupt,
            Self::Device(error) => error.class(),
            _ => ErrorClass::Operator,
        }
    }

    /// What a person can do about it; empty when the message says all.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotRoot { .. } => "run it as root, for instance with sudo",
            Self::NoFuse { .. } => "load the kernel module with `modprobe fuse`",
            Self::NoLoop { .. } => "load the kernel module with `modprobe loop`",
            Self::NotADirectory { .. } => "make the directory first, or name another",
            Self::NotEmpty { .. } => "name an empty directory",
            Self::AlreadyMounted { .. } => "unmount it first, or name another directory",
            Self::Busy { .. } => "stop what uses it; `fuser -vm` shows processes",
            Self::DirectIoRefused { .. } => "without direct I/O the kernel could deadlock",
            Self::NoFreeLoop { .. } => "detach loop devices that are no longer needed",
            Self::SameFilesystemMounted { .. } => {
                "unmount the original first, or give the copy another identity with \
                 `btrfstune -u` on a writable branch"
            }
            Self::NotAFilesystem { kind, .. } => kind.advice(),
            _ => "",
        }
    }
}
