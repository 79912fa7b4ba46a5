//! What is exported or imported: a disk that does not change.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use afterimage_blockdev::{
    Backend, BlockOp, BlockOutcome, DeviceOptions, ExtentKind, RealDevice, wait,
};

use crate::error::BulkError;

const SECTOR: u64 = 512;

/// A disk to be read. Ranges lie within its size.
pub trait BlockSource: Send + Sync {
    /// What it is, for messages.
    fn path(&self) -> &Path;

    /// Bytes of the disk.
    fn size_bytes(&self) -> u64;

    /// Which parts of a range may hold anything but zeroes: sorted and disjoint.
    ///
    /// # Errors
    /// When nobody can say.
    fn data(&self, range: Range<u64>) -> Result<Vec<Range<u64>>, BulkError>;

    /// Reads a range as a whole.
    ///
    /// # Errors
    /// When it cannot be read, or does not verify.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BulkError>;

    /// Says whether [`BlockSource::path`] is a file with the bytes of the disk at their places, so
    /// that it can be read in bulk.
    fn is_plain_file(&self) -> bool {
        false
    }
}

/// An image file, a block device, or the file of a view.
pub struct FileSource {
    path: PathBuf,
    file: File,
    size_bytes: u64,
    /// Knows the holes.
    device: Option<Arc<RealDevice>>,
}

impl FileSource {
    /// Opens a source.
    ///
    /// # Errors
    /// `Io` or `Kind`.
    pub fn open(path: &Path) -> Result<Self, BulkError> {
        let mut file = File::open(path).map_err(BulkError::io("open", path))?;
        let metadata = file.metadata().map_err(BulkError::io("look at", path))?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(BulkError::Kind {
                path: path.to_owned(),
            });
        }
        let size_bytes = file
            .seek(SeekFrom::End(0))
            .map_err(BulkError::io("look at", path))?;
        let options = DeviceOptions {
            is_read_only: true,
            is_direct: false,
            logical_block_bytes: Some(512),
            backend: Backend::Threads,
            queue_depth: 4,
            threads: 1,
            ..DeviceOptions::default()
        };
        // A device without holes needs nobody to find them.
        let device = if kind.is_file() {
            let opened = RealDevice::open(path, options);
            Some(opened.map_err(BulkError::io("open", path))?)
        } else {
            None
        };
        Ok(Self {
            path: path.to_owned(),
            file,
            size_bytes,
            device,
        })
    }
}

impl BlockSource for FileSource {
    fn path(&self) -> &Path {
        &self.path
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn data(&self, range: Range<u64>) -> Result<Vec<Range<u64>>, BulkError> {
        let whole = self.size_bytes / SECTOR * SECTOR;
        let start = range.start / SECTOR * SECTOR;
        let end = range.end.next_multiple_of(SECTOR).min(whole);
        let mut data = Vec::new();
        let Some(device) = &self.device else {
            return Ok(vec![range]);
        };
        if start < end {
            let op = BlockOp::Extents {
                offset: start,
                length: end - start,
            };
            match wait::device(device.as_ref(), op) {
                Ok(BlockOutcome::Extents(extents)) => {
                    let parts = extents.iter().filter(|part| part.kind == ExtentKind::Data);
                    data.extend(parts.map(|part| {
                        part.offset.max(range.start)..(part.offset + part.length).min(range.end)
                    }));
                }
                // It is no more than a hint: what nobody knows is read.
                Ok(_) | Err(_) => return Ok(vec![range]),
            }
        }
        if range.end > whole {
            data.push(whole.max(range.start)..range.end);
        }
        data.retain(|part| part.start < part.end);
        Ok(data)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BulkError> {
        self.file
            .read_exact_at(buffer, offset)
            .map_err(BulkError::io("read", &self.path))
    }

    fn is_plain_file(&self) -> bool {
        true
    }
}
