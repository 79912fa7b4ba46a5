//! What can be wrong with bytes that claim to be ours.

use afterimage_blockdev::{DiskId, ErrorClass, Lsn, SegmentId, StorageError};

/// Why bytes were not accepted. Each names the structure and the field, so that a person with a
/// hex dump finds the place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// Fewer bytes than the structure needs.
    #[error("{structure} is cut short")]
    Short {
        /// Which structure.
        structure: &'static str,
    },
    /// The magic bytes are not there.
    #[error("{structure} does not begin with its magic")]
    Magic {
        /// Which structure.
        structure: &'static str,
    },
    /// Written by a newer version.
    #[error("{structure} has format version {found}; this program reads up to {supported}")]
    Version {
        /// Which structure.
        structure: &'static str,
        /// The version found.
        found: u16,
        /// The newest version that is understood.
        supported: u16,
    },
    /// A field holds what it must not.
    #[error("{structure} has an impossible {field}")]
    Field {
        /// Which structure.
        structure: &'static str,
        /// Which field.
        field: &'static str,
    },
    /// The medium answers with an error.
    #[error("{structure} cannot be read")]
    Unreadable {
        /// Which structure.
        structure: &'static str,
    },
    /// It is named, and not there.
    #[error("{structure} is missing")]
    Missing {
        /// Which structure.
        structure: &'static str,
    },
    /// The content is not what was written.
    #[error("{structure} does not match its hash")]
    Hash {
        /// Which structure.
        structure: &'static str,
    },
    /// The authentication tag of the cipher does not match.
    #[error("slot cannot be decrypted with its key")]
    Cipher,
    /// The bytes do not decompress to what the header says.
    #[error("slot does not decompress to {expected} bytes")]
    Decompress {
        /// What the header says.
        expected: usize,
    },
    /// The key is not known here.
    #[error("key {key} of disk {disk} is not known")]
    KeyMissing {
        /// Whose key.
        disk: DiskId,
        /// Which generation.
        key: u32,
    },
}

/// What went wrong in the log.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// The medium failed.
    #[error("log: {0}")]
    Storage(#[from] StorageError),
    /// Bytes at a place are bad.
    #[error("log segment {segment} at {offset}: {damage}")]
    Damaged {
        /// Which segment.
        segment: SegmentId,
        /// Byte offset in its file.
        offset: u64,
        /// What is wrong.
        #[source]
        damage: Damage,
    },
    /// A frame is not acceptable.
    #[error("frame refused: {0}")]
    Frame(#[from] Damage),
    /// A frame does not follow what is there.
    #[error("frame begins at LSN {found}, expected {expected}")]
    Order {
        /// What was expected.
        expected: Lsn,
        /// What came.
        found: Lsn,
    },
}

impl CacheError {
    /// How to go on.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Storage(error) => error.class(),
            Self::Damaged {
                damage: Damage::Version { .. },
                ..
            } => ErrorClass::Operator,
            Self::Damaged { .. } => ErrorClass::Corrupt,
            Self::Frame(_) | Self::Order { .. } => ErrorClass::Refused,
        }
    }
}
