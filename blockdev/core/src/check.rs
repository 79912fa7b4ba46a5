//! Rules that every storage holds its callers to, in one place.

use std::io;

use crate::storage::{FileId, FileName, StorageError, StorageErrorKind, StorageOp};

/// Smallest unit of a read, in bytes.
const READ_UNIT: u64 = 512;
/// Smallest unit of a write, in bytes.
const WRITE_UNIT: u64 = 4096;

impl StorageOp {
    /// The operation's name, lower case.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Create { .. } => "create",
            Self::Open { .. } => "open",
            Self::Close { .. } => "close",
            Self::Read { .. } => "read",
            Self::Write { .. } => "write",
            Self::Sync { .. } => "sync",
            Self::SetLength { .. } => "set-length",
            Self::Rename { .. } => "rename",
            Self::Remove { .. } => "remove",
            Self::List { .. } => "list",
            Self::SyncDirectory { .. } => "sync-directory",
            Self::Capacity { .. } => "capacity",
        }
    }

    /// The open file that it is about, if any.
    #[must_use]
    pub fn file(&self) -> Option<FileId> {
        match self {
            Self::Close { file }
            | Self::Read { file, .. }
            | Self::Write { file, .. }
            | Self::Sync { file }
            | Self::SetLength { file, .. } => Some(*file),
            _ => None,
        }
    }

    /// The byte offset that it is about, 0 where there is none.
    #[must_use]
    pub fn offset(&self) -> u64 {
        match self {
            Self::Read { offset, .. } | Self::Write { offset, .. } => *offset,
            Self::SetLength { length, .. } => *length,
            _ => 0,
        }
    }

    /// The file or directory that it names, empty where it names none.
    #[must_use]
    pub fn subject(&self) -> &str {
        match self {
            Self::Create { name } | Self::Open { name } | Self::Remove { name } => name.as_str(),
            Self::Rename { from, .. } => from.as_str(),
            Self::List { directory }
            | Self::SyncDirectory { directory }
            | Self::Capacity { directory } => directory,
            _ => "",
        }
    }

    /// Makes this operation's error; `file` is the name of the open file, where there is one.
    #[must_use]
    pub fn error(&self, file: &str, kind: StorageErrorKind) -> StorageError {
        let file = if file.is_empty() {
            self.subject()
        } else {
            file
        };
        StorageError {
            operation: self.name(),
            file: file.to_owned(),
            offset: self.offset(),
            kind,
        }
    }

    /// Checks alignment and names before anything is touched.
    ///
    /// # Errors
    /// `Io` of kind invalid input: the caller broke the contract.
    pub fn validate(&self) -> Result<(), StorageErrorKind> {
        let fault = match self {
            Self::Read { offset, buffer, .. } => (!is_range(*offset, buffer.len(), READ_UNIT))
                .then_some("read is not aligned to 512"),
            Self::Write { offset, buffer, .. } => (!is_range(*offset, buffer.len(), WRITE_UNIT))
                .then_some("write is not aligned to 4096"),
            Self::SetLength { length, .. } => {
                (!is_range(*length, 0, WRITE_UNIT)).then_some("length is not aligned to 4096")
            }
            Self::Rename { from, to } => {
                (from.directory() != to.directory()).then_some("rename leaves its directory")
            }
            Self::List { directory } | Self::SyncDirectory { directory } => (!directory.is_empty()
                && FileName::parse(directory).is_none())
            .then_some("not a directory name"),
            _ => None,
        };
        match fault {
            None => Ok(()),
            Some(text) => Err(StorageErrorKind::Io(io::Error::new(
                io::ErrorKind::InvalidInput,
                text,
            ))),
        }
    }
}

fn is_range(offset: u64, length: usize, unit: u64) -> bool {
    let length = length as u64;
    offset.is_multiple_of(unit)
        && length.is_multiple_of(unit)
        && offset
            .checked_add(length)
            .is_some_and(|end| i64::try_from(end).is_ok())
}
