//! A disk as its user sees it.
//!
//! # What is durable when
//! Every [`BlockDevice`] is a disk with a volatile cache: a completed write is *ordered* (later
//! reads see it, on every connection), and may be lost by a power cut. A completed flush makes
//! durable every write that had *completed* before the flush was submitted. A write with `fua`
//! is durable itself when it completes, and says nothing of others.

use std::sync::Arc;

use crate::buffer::IoBuffer;
use crate::id::Token;
use crate::storage::ErrorClass;

/// Size and manners of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Size in bytes; a multiple of the logical block.
    pub size_bytes: u64,
    /// Smallest unit of a request, in bytes: 512 or 4096.
    pub logical_block_bytes: u32,
    /// Says whether writes are refused.
    pub is_read_only: bool,
}

/// One request. Offsets and lengths are multiples of the logical block and within the size.
#[derive(Debug)]
pub enum BlockOp {
    /// Reads `buffer.len()` bytes.
    Read {
        /// First byte.
        offset: u64,
        /// Where the bytes go.
        buffer: IoBuffer,
    },
    /// Writes `buffer.len()` bytes.
    Write {
        /// First byte.
        offset: u64,
        /// What is written.
        buffer: IoBuffer,
        /// Durable when completed.
        fua: bool,
    },
    /// Makes all completed writes durable.
    Flush,
    /// Gives the range up; it reads as zero afterwards.
    Discard {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
    },
    /// Makes the range read as zero.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
        /// The room may be given up.
        may_unmap: bool,
    },
    /// Enlarges the device.
    Grow {
        /// New size; not below the old one.
        size_bytes: u64,
    },
    /// Asks which parts hold data. The answer may call a hole data, never data a hole.
    Extents {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
    },
}

/// What is known of a range without reading it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExtentKind {
    /// May hold anything.
    Data,
    /// Reads as zero.
    Zero,
}

/// A range of one kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
    /// What it holds.
    pub kind: ExtentKind,
}

/// What a successful request gives back.
#[derive(Debug)]
pub enum BlockOutcome {
    /// Of `Read`: the buffer, full.
    Data(IoBuffer),
    /// Of `Extents`: adjoining ranges that cover what was asked, in order.
    Extents(Vec<Extent>),
    /// Of `Write`, by a device that gives buffers back: the buffer, unchanged.
    Written(IoBuffer),
    /// Of all others.
    Done,
}

/// Why a request failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum BlockErrorKind {
    /// Offset, length or alignment is wrong.
    #[error("range is outside the device or not aligned")]
    Range,
    /// The device cannot be written.
    #[error("device is read-only")]
    ReadOnly,
    /// The device cannot do this.
    #[error("not supported")]
    NotSupported,
    /// There is no room.
    #[error("no space left")]
    NoSpace,
    /// The stored data is bad.
    #[error("data is damaged: {0}")]
    Corrupt(String),
    /// The medium failed.
    #[error("{message}")]
    Io {
        /// The operating system's error number, 0 when there is none.
        errno: i32,
        /// What it says.
        message: String,
    },
    /// The device was shut down.
    #[error("device is closed")]
    Closed,
}

/// A failed request.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{operation} of {length} bytes at {offset}: {kind}")]
pub struct BlockError {
    /// The request's name, lower case.
    pub operation: &'static str,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
    /// What went wrong.
    #[source]
    pub kind: BlockErrorKind,
}

impl BlockError {
    /// How to go on.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self.kind {
            BlockErrorKind::Range | BlockErrorKind::ReadOnly | BlockErrorKind::NotSupported => {
                ErrorClass::Refused
            }
            BlockErrorKind::NoSpace => ErrorClass::Retry,
            BlockErrorKind::Corrupt(_) => ErrorClass::Corrupt,
            BlockErrorKind::Io { .. } | BlockErrorKind::Closed => ErrorClass::Operator,
        }
    }

    /// The error number that a kernel client is told.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self.kind {
            BlockErrorKind::Range => libc::EINVAL,
            BlockErrorKind::ReadOnly => libc::EROFS,
            BlockErrorKind::NotSupported => libc::EOPNOTSUPP,
            BlockErrorKind::NoSpace => libc::ENOSPC,
            BlockErrorKind::Io { errno, .. } if errno != 0 => errno,
            _ => libc::EIO,
        }
    }
}

/// A finished request.
#[derive(Debug)]
pub struct BlockCompletion {
    /// The token of the submission.
    pub token: Token,
    /// What came of it.
    pub result: Result<BlockOutcome, BlockError>,
}

/// Receives completions; the same rules as for
/// [`StorageCompleter`](crate::storage::StorageCompleter).
pub trait BlockCompleter: Send + Sync {
    /// Takes one completion.
    fn complete(&self, completion: BlockCompletion);
}

/// A disk.
pub trait BlockDevice: Send + Sync {
    /// The present size and manners.
    fn geometry(&self) -> Geometry;

    /// Says whether a successful `Write` gives its buffer back, as [`BlockOutcome::Written`].
    fn gives_buffers_back(&self) -> bool {
        false
    }

    /// Starts a request. Its completion goes to `to`, exactly once, in any order with others.
    fn submit(&self, token: Token, op: BlockOp, to: Arc<dyn BlockCompleter>);
}

impl BlockOp {
    /// Name, first byte and number of bytes, for messages and checks.
    #[must_use]
    pub fn describe(&self) -> (&'static str, u64, u64) {
        match self {
            Self::Read { offset, buffer } => ("read", *offset, buffer.len() as u64),
            Self::Write { offset, buffer, .. } => ("write", *offset, buffer.len() as u64),
            Self::Flush => ("flush", 0, 0),
            Self::Discard { offset, length } => ("discard", *offset, *length),
            Self::WriteZeroes { offset, length, .. } => ("write-zeroes", *offset, *length),
            Self::Grow { size_bytes } => ("grow", 0, *size_bytes),
            Self::Extents { offset, length } => ("extents", *offset, *length),
        }
    }

    /// Makes this request's error.
    #[must_use]
    pub fn error(&self, kind: BlockErrorKind) -> BlockError {
        let (operation, offset, length) = self.describe();
        BlockError {
            operation,
            offset,
            length,
            kind,
        }
    }

    /// Checks range, alignment and permission against a device, before anything is touched.
    ///
    /// # Errors
    /// `Range` or `ReadOnly`, class refused.
    pub fn validate(&self, geometry: &Geometry) -> Result<(), BlockError> {
        let block = u64::from(geometry.logical_block_bytes);
        let (_, offset, length) = self.describe();
        let writes = !matches!(self, Self::Read { .. } | Self::Flush | Self::Extents { .. });
        if writes && geometry.is_read_only {
            return Err(self.error(BlockErrorKind::ReadOnly));
        }
        let is_legal = match self {
            Self::Flush => true,
            Self::Grow { size_bytes } => {
                *size_bytes >= geometry.size_bytes && size_bytes.is_multiple_of(block)
            }
            _ => {
                offset.is_multiple_of(block)
                    && length.is_multiple_of(block)
                    && offset
                        .checked_add(length)
                        .is_some_and(|end| end <= geometry.size_bytes)
            }
        };
        if is_legal {
            Ok(())
        } else {
            Err(self.error(BlockErrorKind::Range))
        }
    }
}
