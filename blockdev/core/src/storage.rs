//! The files that the product keeps its data in.
//!
//! Operations are submitted with a token and complete in any order. Nothing here waits.
//!
//! # What is durable when
//! * A completed [`StorageOp::Write`] is readable; a power cut may lose, tear or reorder it.
//! * A completed [`StorageOp::Sync`] makes durable every write and length change *of that file*
//!   that had completed before the sync was submitted.
//! * Names (create, rename, remove) are durable after a completed [`StorageOp::SyncDirectory`] of
//!   their directory.
//! * After a failed sync every further operation on that file fails with
//!   [`StorageErrorKind::Poisoned`] until the file is closed and opened again: the kernel may have
//!   marked pages clean that never reached the disk.

use core::fmt;
use std::sync::Arc;

use crate::buffer::IoBuffer;
use crate::id::Token;

/// An open file of a [`Storage`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FileId(pub u64);

/// Name of a file, relative to the storage's root: parts of `[a-z0-9._-]`, separated by `/`, none
/// of which begins with a dot.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileName(Arc<str>);

impl FileName {
    /// Accepts a name made by this program.
    ///
    /// # Panics
    /// When the name breaks the rules above: names are never made of what a peer or user says.
    #[must_use]
    pub fn new(name: impl AsRef<str>) -> Self {
        let name = name.as_ref();
        Self::parse(name).unwrap_or_else(|| panic!("{name:?} is not a storage file name"))
    }

    /// Accepts a name that was found on a disk; `None` when it breaks the rules.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let is_legal = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
        };
        name.split('/').all(is_legal).then(|| Self(Arc::from(name)))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The directory part; empty for the root.
    #[must_use]
    pub fn directory(&self) -> &str {
        self.0
            .rsplit_once('/')
            .map_or("", |(directory, _)| directory)
    }

    /// The part after the last slash.
    #[must_use]
    pub fn base(&self) -> &str {
        self.0.rsplit_once('/').map_or(&self.0, |(_, base)| base)
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

/// One operation on the files.
#[derive(Debug)]
pub enum StorageOp {
    /// Creates a file that must not exist (and the directories above it) and opens it.
    Create {
        /// Its name.
        name: FileName,
    },
    /// Opens a file that must exist.
    Open {
        /// Its name.
        name: FileName,
    },
    /// Closes a file. What was not synced stays unsynced.
    Close {
        /// The open file.
        file: FileId,
    },
    /// Reads up to `buffer.len()` bytes; the buffer comes back shortened at the end of the file.
    Read {
        /// The open file.
        file: FileId,
        /// First byte; a multiple of 512.
        offset: u64,
        /// Where the bytes go; its length is a multiple of 512.
        buffer: IoBuffer,
    },
    /// Writes the whole buffer, growing the file if need be.
    Write {
        /// The open file.
        file: FileId,
        /// First byte; a multiple of 4096.
        offset: u64,
        /// What is written; its length is a multiple of 4096.
        buffer: IoBuffer,
    },
    /// Makes the completed writes and the length of a file durable.
    Sync {
        /// The open file.
        file: FileId,
    },
    /// Sets the length; grown bytes read as zero.
    SetLength {
        /// The open file.
        file: FileId,
        /// New length in bytes; a multiple of 4096.
        length: u64,
    },
    /// Renames a file over another or to a new name in the same directory.
    Rename {
        /// The name it has.
        from: FileName,
        /// The name it gets.
        to: FileName,
    },
    /// Removes a name. An open file stays readable.
    Remove {
        /// The name.
        name: FileName,
    },
    /// Lists the files of a directory, in no order; a directory that does not exist is empty.
    List {
        /// The directory; empty for the root.
        directory: String,
    },
    /// Makes the names in a directory durable.
    SyncDirectory {
        /// The directory; empty for the root.
        directory: String,
    },
    /// Asks for the room of the file system that holds a directory, or will hold it.
    Capacity {
        /// The directory; empty for the root.
        directory: String,
    },
}

/// Room of a file system, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capacity {
    /// All of it.
    pub total_bytes: u64,
    /// What can still be written.
    pub free_bytes: u64,
}

/// What a successful operation gives back.
#[derive(Debug)]
pub enum StorageOutcome {
    /// Of `Create` and `Open`.
    Opened {
        /// The open file.
        file: FileId,
        /// Its length in bytes.
        length: u64,
    },
    /// Of `Read`: the buffer, shortened to what was read.
    Read(IoBuffer),
    /// Of `Write`: the buffer, for another use.
    Written(IoBuffer),
    /// Of `List`.
    Listed(Vec<FileName>),
    /// Of `Capacity`.
    Capacity(Capacity),
    /// Of all others.
    Done,
}

/// How to go on after an error (design decision D20).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ErrorClass {
    /// Try again, on the ladder of waiting times.
    Retry,
    /// A person must act; the message says how.
    Operator,
    /// The request was wrong; the same request will be refused again.
    Refused,
    /// Another writer holds the history.
    Fenced,
    /// Data is bad; it was not served.
    Corrupt,
}

/// What went wrong with an operation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageErrorKind {
    /// The medium is full.
    #[error("no space left")]
    NoSpace,
    /// No such file.
    #[error("no such file")]
    NotFound,
    /// The name is taken.
    #[error("file exists")]
    Exists,
    /// A sync of this file failed before; it must be reopened.
    #[error("an earlier sync failed; the file must be reopened")]
    Poisoned,
    /// The file is not open.
    #[error("file is not open")]
    NotOpen,
    /// Anything else that the operating system says.
    #[error("{0}")]
    Io(#[source] std::io::Error),
}

/// A failed operation.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {file} at {offset}: {kind}")]
pub struct StorageError {
    /// The operation's name, lower case.
    pub operation: &'static str,
    /// Name of the file or directory, as far as known.
    pub file: String,
    /// Byte offset, 0 where there is none.
    pub offset: u64,
    /// What went wrong.
    #[source]
    pub kind: StorageErrorKind,
}

impl StorageError {
    /// How to go on.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self.kind {
            StorageErrorKind::NoSpace => ErrorClass::Retry,
            _ => ErrorClass::Operator,
        }
    }

    /// Says whether the medium was full.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        matches!(self.kind, StorageErrorKind::NoSpace)
    }
}

/// A finished operation.
#[derive(Debug)]
pub struct StorageCompletion {
    /// The token of the submission.
    pub token: Token,
    /// What came of it.
    pub result: Result<StorageOutcome, StorageError>,
}

/// Receives completions. Called from whatever thread finished the operation, possibly before
/// `submit` returns; it must neither block nor submit while it holds a lock of its own.
pub trait StorageCompleter: Send + Sync {
    /// Takes one completion.
    fn complete(&self, completion: StorageCompletion);
}

/// A medium with files on it.
pub trait Storage: Send + Sync {
    /// Starts an operation. Its completion goes to `to`, exactly once.
    fn submit(&self, token: Token, op: StorageOp, to: Arc<dyn StorageCompleter>);
}
