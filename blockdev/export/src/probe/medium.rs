//! Where the bytes come from.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use afterimage_blockdev::{
    BlockDevice, BlockError, BlockErrorKind, BlockOp, BlockOutcome, IoBuffer, wait,
};

use crate::error::ExportError;

/// Bytes that a probe reads at once, at most.
const READ_BYTES_MAX: u64 = 1 << 20;

/// Bytes to look at.
pub trait Medium {
    /// Size in bytes.
    fn size_bytes(&self) -> u64;

    /// The logical block in bytes; partition tables count in it.
    fn logical_block_bytes(&self) -> u64;

    /// Reads a range within the size, at most 1 MiB.
    ///
    /// # Errors
    /// What the medium says, class refused when the range is wrong.
    fn read(&mut self, offset: u64, length: u64) -> Result<Vec<u8>, ExportError>;
}

fn range_error(offset: u64, length: u64) -> BlockError {
    BlockError {
        operation: "read",
        offset,
        length,
        kind: BlockErrorKind::Range,
    }
}

/// Checks a range, and gives its length as a count of memory.
fn checked(size_bytes: u64, offset: u64, length: u64) -> Result<usize, BlockError> {
    let is_within = offset
        .checked_add(length)
        .is_some_and(|end| end <= size_bytes);
    match usize::try_from(length) {
        Ok(count) if is_within && length <= READ_BYTES_MAX => Ok(count),
        _ => Err(range_error(offset, length)),
    }
}

/// The bytes of a block device.
pub struct DeviceMedium<'a> {
    device: &'a dyn BlockDevice,
}

impl<'a> DeviceMedium<'a> {
    /// Of `device`.
    #[must_use]
    pub fn new(device: &'a dyn BlockDevice) -> Self {
        Self { device }
    }
}

impl Medium for DeviceMedium<'_> {
    fn size_bytes(&self) -> u64 {
        self.device.geometry().size_bytes
    }

    fn logical_block_bytes(&self) -> u64 {
        u64::from(self.device.geometry().logical_block_bytes)
    }

    fn read(&mut self, offset: u64, length: u64) -> Result<Vec<u8>, ExportError> {
        let count = checked(self.size_bytes(), offset, length)?;
        let block = self.logical_block_bytes().max(1);
        let start = offset - offset % block;
        let end = (offset + length).next_multiple_of(block);
        let wrong = || range_error(offset, length);
        let bytes = usize::try_from(end - start).map_err(|_| wrong())?;
        let skip = usize::try_from(offset - start).map_err(|_| wrong())?;
        let op = BlockOp::Read {
            offset: start,
            buffer: IoBuffer::zeroed(bytes),
        };
        match wait::device(self.device, op)? {
            BlockOutcome::Data(buffer) => {
                Ok(buffer.get(skip..skip + count).ok_or_else(wrong)?.to_vec())
            }
            _ => Err(wrong().into()),
        }
    }
}

/// The bytes of a file or device node.
pub struct FileMedium {
    file: File,
    path: PathBuf,
    size_bytes: u64,
    logical_block_bytes: u64,
}

impl FileMedium {
    /// Of the file at `path`, whose device has this logical block.
    ///
    /// # Errors
    /// What the system says.
    pub fn open(path: &Path, logical_block_bytes: u32) -> Result<Self, ExportError> {
        let system = |source| ExportError::system("open", path, source);
        let mut file = File::open(path).map_err(system)?;
        let size_bytes =
            std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).map_err(system)?;
        let logical_block_bytes = u64::from(logical_block_bytes);
        Ok(Self {
            file,
            path: path.to_owned(),
            size_bytes,
            logical_block_bytes,
        })
    }
}

impl Medium for FileMedium {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn logical_block_bytes(&self) -> u64 {
        self.logical_block_bytes
    }

    fn read(&mut self, offset: u64, length: u64) -> Result<Vec<u8>, ExportError> {
        let mut bytes = vec![0; checked(self.size_bytes, offset, length)?];
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(|source| ExportError::system("read", &self.path, source))?;
        Ok(bytes)
    }
}

/// A part of a medium, a partition for instance.
pub struct Slice<'a> {
    whole: &'a mut dyn Medium,
    offset: u64,
    size_bytes: u64,
}

impl<'a> Slice<'a> {
    /// The part of `size_bytes` at `offset`; cut off where the whole ends.
    pub fn new(whole: &'a mut dyn Medium, offset: u64, size_bytes: u64) -> Self {
        let rest = whole.size_bytes().saturating_sub(offset);
        Self {
            whole,
            offset,
            size_bytes: size_bytes.min(rest),
        }
    }
}

impl Medium for Slice<'_> {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn logical_block_bytes(&self) -> u64 {
        self.whole.logical_block_bytes()
    }

    fn read(&mut self, offset: u64, length: u64) -> Result<Vec<u8>, ExportError> {
        checked(self.size_bytes, offset, length)?;
        self.whole.read(self.offset + offset, length)
    }
}
