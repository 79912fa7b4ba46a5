//! Requests that change a branch.

use afterimage_blockdev::{BlockError, BlockErrorKind, IoBuffer};
use afterimage_cache::RecordKind;

/// The error of a write.
pub(super) fn write_error(offset: u64, length: u64, kind: BlockErrorKind) -> BlockError {
    BlockError {
        operation: "write",
        offset,
        length,
        kind,
    }
}

/// A request that changes content.
pub(super) enum Change {
    Write {
        offset: u64,
        data: IoBuffer,
        fua: bool,
    },
    Clear {
        kind: RecordKind,
        offset: u64,
        length: u64,
    },
}

impl Change {
    pub(super) fn range(&self) -> (u64, u64) {
        match self {
            Self::Write { offset, data, .. } => (*offset, data.len() as u64),
            Self::Clear { offset, length, .. } => (*offset, *length),
        }
    }

    pub(super) fn error(&self, kind: BlockErrorKind) -> BlockError {
        let (offset, length) = self.range();
        let operation = if matches!(self, Self::Write { .. }) {
            "write"
        } else {
            "write-zeroes"
        };
        BlockError {
            operation,
            offset,
            length,
            kind,
        }
    }

    /// Changes these bytes; gives back whether they must be durable at once.
    pub(super) fn apply(&self, bytes: &mut [u8]) -> bool {
        match self {
            Self::Write { data, fua, .. } => {
                bytes.copy_from_slice(data);
                *fua
            }
            Self::Clear { .. } => {
                bytes.fill(0);
                false
            }
        }
    }
}
