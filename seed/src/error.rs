//! What can go wrong with the store.

use afterimage_blockdev::{ErrorClass, SegmentId, StorageError};
use afterimage_cache::{CacheError, Damage};

/// Why the store cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SeedError {
    /// The medium failed.
    #[error("store: {0}")]
    Storage(#[from] StorageError),
    /// The log failed.
    #[error(transparent)]
    Log(#[from] CacheError),
    /// A file of the store is damaged.
    #[error("{file} at {offset}: {damage}")]
    Damaged {
        /// Its name.
        file: String,
        /// Byte offset.
        offset: u64,
        /// What is wrong.
        #[source]
        damage: Damage,
    },
    /// A segment that is named is not there.
    #[error("segment {segment} is missing")]
    SegmentMissing {
        /// The segment.
        segment: SegmentId,
    },
    /// Written by a newer program.
    #[error("the data directory has format {found}; this program reads up to {supported}")]
    NewerFormat {
        /// The version found.
        found: u16,
        /// The newest version that is understood.
        supported: u16,
    },
    /// The key of the store does not fit its disks.
    #[error("the store key does not open the key of disk {disk}")]
    WrongStoreKey {
        /// The disk.
        disk: String,
    },
    /// The request was wrong.
    #[error("{message}")]
    Refused {
        /// What and why.
        message: String,
        /// What to do; may be empty.
        hint: String,
    },
    /// Another writer holds the history.
    #[error("{message}")]
    Fenced {
        /// What and why.
        message: String,
        /// What to do.
        hint: String,
        /// Another agent holds the machine; otherwise the epoch is stale.
        is_held: bool,
    },
    /// Something is under way that has to end first.
    #[error("{message}")]
    Busy {
        /// What and why.
        message: String,
    },
    /// The state asked for is not whole.
    #[error("{message}")]
    Incomplete {
        /// What and why.
        message: String,
        /// What to do.
        hint: String,
    },
}

impl SeedError {
    /// How to go on.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Storage(error) => error.class(),
            Self::Log(error) => error.class(),
            Self::Damaged { .. } | Self::SegmentMissing { .. } => ErrorClass::Corrupt,
            Self::NewerFormat { .. } | Self::WrongStoreKey { .. } => ErrorClass::Operator,
            Self::Refused { .. } | Self::Incomplete { .. } => ErrorClass::Refused,
            Self::Fenced { .. } => ErrorClass::Fenced,
            Self::Busy { .. } => ErrorClass::Retry,
        }
    }

    /// What a person can do; may be empty.
    #[must_use]
    pub fn hint(&self) -> &str {
        match self {
            Self::Refused { hint, .. }
            | Self::Incomplete { hint, .. }
            | Self::Fenced { hint, .. } => hint,
            Self::NewerFormat { .. } => "start the newer program again, or use another directory",
            Self::Busy { .. } => "try again",
            Self::WrongStoreKey { .. } => "put the store.key back that belongs to this directory",
            Self::Damaged { .. } | Self::SegmentMissing { .. } => {
                "run `aft log verify`, and resync the disks that it names"
            }
            _ => "",
        }
    }

    pub(crate) fn refused(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Refused {
            message: message.into(),
            hint: hint.into(),
        }
    }
}
