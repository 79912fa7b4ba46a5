//! [`BlockDevice`] over an image file or a block device.
//!
//! Always true:
//! * The size only grows, and is a multiple of the logical block; bytes of an image file behind
//!   the last whole block are not part of the device.
//! * After a failed flush or durable write nothing more reaches the kernel: what it had in memory
//!   may be marked clean and lost.
//! * Reads, writes and flushes go through the engine; all else, which may block for long, goes to
//!   one worker.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::engine::{Action, Backend, Delivery, Engine, Limits, Request};
use super::file::{block_device_unit, is_block_device_read_only, settle_direct};
use super::work::Workers;
use super::zeroes;
use crate::buffer::IoBuffer;
use crate::convert::block_kind;
use crate::device::{
    BlockCompleter, BlockCompletion, BlockDevice, BlockError, BlockErrorKind, BlockOp,
    BlockOutcome, Extent, ExtentKind, Geometry,
};
use crate::id::Token;

/// How a [`RealDevice`] is opened.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// Refuses writes.
    pub is_read_only: bool,
    /// Refuses a block device that is mounted or otherwise in use, when writes are allowed.
    pub is_exclusive: bool,
    /// Goes around the page cache where the file system can.
    pub is_direct: bool,
    /// The logical block of an image file, 512 or 4096, instead of the smallest that its file
    /// system can do directly.
    pub logical_block_bytes: Option<u32>,
    /// Which way requests reach the kernel.
    pub backend: Backend,
    /// Requests given to the kernel at once.
    pub queue_depth: u32,
    /// Requests that wait behind those; what comes on top fails with `EAGAIN`.
    pub overflow_max: usize,
    /// Threads of the backend without `io_uring`.
    pub threads: usize,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            is_read_only: false,
            is_exclusive: true,
            is_direct: true,
            logical_block_bytes: None,
            backend: Backend::Auto,
            queue_depth: 256,
            overflow_max: 64 * 1024,
            threads: 8,
        }
    }
}

struct Shared {
    file: File,
    is_block_device: bool,
    is_read_only: bool,
    is_direct: bool,
    logical_block_bytes: u32,
    alignment: u32,
    size_bytes: AtomicU64,
    is_poisoned: AtomicBool,
}

/// An image file or block device. Dropping it waits until all requests were completed.
pub struct RealDevice {
    engine: Engine<DeviceDelivery>,
    worker: Workers<Job>,
    shared: Arc<Shared>,
}

impl RealDevice {
    /// Opens an image file or block device that exists.
    ///
    /// # Errors
    /// When it cannot be opened, is neither of the two, or cannot do the logical block asked for.
    pub fn open(path: &Path, options: DeviceOptions) -> io::Result<Arc<Self>> {
        let shared = Arc::new(Shared::open(path, &options)?);
        let limits = Limits {
            queue_depth: options.queue_depth,
            overflow_max: options.overflow_max,
            threads: options.threads,
            reapers: 1,
        };
        let worker = Workers::start("device-worker", 1, options.overflow_max.max(1), {
            let shared = Arc::clone(&shared);
            move |job: Job| {
                let result = shared.perform(&job.op);
                job.to.complete(BlockCompletion {
                    token: job.token,
                    result,
                });
            }
        })?;
        let engine = Engine::start(options.backend, limits)?;
        Ok(Arc::new(Self {
            engine,
            worker,
            shared,
        }))
    }

    /// The backend that runs: `IoUring` or `Threads`.
    #[must_use]
    pub fn backend(&self) -> Backend {
        self.engine.backend()
    }

    /// Says whether requests go around the page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.shared.is_direct
    }

    fn start(&self, token: Token, op: BlockOp, to: Arc<dyn BlockCompleter>) {
        let (operation, first, length) = op.describe();
        let (action, offset, buffer) = match op {
            BlockOp::Read { offset, buffer } => (Action::Read, offset, Some(buffer)),
            BlockOp::Write {
                offset,
                buffer,
                fua,
            } => (Action::Write { is_durable: fua }, offset, Some(buffer)),
            BlockOp::Flush => (Action::Sync, 0, None),
            op => {
                if let Err(job) = self.worker.submit(Job { token, op, to }) {
                    let busy = io::Error::from_raw_os_error(libc::EAGAIN);
                    let error = job.op.error(block_kind(&busy));
                    job.to.complete(BlockCompletion {
                        token,
                        result: Err(error),
                    });
                }
                return;
            }
        };
        let shared = Arc::clone(&self.shared);
        let asked = (operation, first, length);
        let delivery = DeviceDelivery {
            token,
            to,
            shared,
            action,
            asked,
        };
        self.engine
            .submit(Request::new(action, offset, buffer, delivery));
    }
}

impl BlockDevice for RealDevice {
    fn geometry(&self) -> Geometry {
        self.shared.geometry()
    }

    fn gives_buffers_back(&self) -> bool {
        true
    }

    fn submit(&self, token: Token, op: BlockOp, to: Arc<dyn BlockCompleter>) {
        let checked = op.validate(&self.shared.geometry()).and_then(|()| {
            if self.shared.is_poisoned.load(Ordering::Acquire) {
                return Err(op.error(poisoned()));
            }
            Ok(())
        });
        match checked {
            Ok(()) => self.start(token, op, to),
            Err(error) => to.complete(BlockCompletion {
                token,
                result: Err(error),
            }),
        }
    }
}

fn poisoned() -> BlockErrorKind {
    let message = "an earlier flush failed; the device must be reopened".to_owned();
    BlockErrorKind::Io {
        errno: libc::EIO,
        message,
    }
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

/// A request for the worker.
struct Job {
    token: Token,
    op: BlockOp,
    to: Arc<dyn BlockCompleter>,
}

impl Shared {
    fn open(path: &Path, options: &DeviceOptions) -> io::Result<Self> {
        let kind = std::fs::metadata(path)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(invalid("neither an image file nor a block device"));
        }
        let is_exclusive = kind.is_block_device() && options.is_exclusive && !options.is_read_only;
        let (file, is_direct) = open_with(path, options, is_exclusive)?;
        let alignment = if is_direct { settle_direct(&file)? } else { 1 };
        let logical_block_bytes = if kind.is_block_device() {
            block_device_unit(&file)?
        } else {
            options.logical_block_bytes.unwrap_or(alignment.max(512))
        };
        if !matches!(logical_block_bytes, 512 | 4096) || logical_block_bytes < alignment {
            return Err(invalid("the logical block cannot be used with this file"));
        }
        let is_read_only =
            options.is_read_only || (kind.is_block_device() && is_block_device_read_only(&file)?);
        let shared = Self {
            file,
            is_block_device: kind.is_block_device(),
            is_read_only,
            is_direct: alignment > 1,
            logical_block_bytes,
            alignment,
            size_bytes: AtomicU64::new(0),
            is_poisoned: AtomicBool::new(false),
        };
        shared.read_size()?;
        Ok(shared)
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.size_bytes.load(Ordering::Acquire),
            logical_block_bytes: self.logical_block_bytes,
            is_read_only: self.is_read_only,
        }
    }

    /// Takes over the medium's present size, unless it shrank.
    fn read_size(&self) -> io::Result<u64> {
        let size = (&self.file).seek(SeekFrom::End(0))?;
        let size = size - size % u64::from(self.logical_block_bytes);
        Ok(self.size_bytes.fetch_max(size, Ordering::AcqRel).max(size))
    }

    fn perform(&self, op: &BlockOp) -> Result<BlockOutcome, BlockError> {
        let done = match *op {
            BlockOp::Discard { offset, length } => {
                zeroes::zero(&self.file, offset, length, true).map(|()| BlockOutcome::Done)
            }
            BlockOp::WriteZeroes {
                offset,
                length,
                may_unmap,
            } => zeroes::zero(&self.file, offset, length, may_unmap).map(|()| BlockOutcome::Done),
            BlockOp::Grow { size_bytes } => return self.grow(op, size_bytes),
            BlockOp::Extents { offset, length } => {
                self.extents(offset, length).map(BlockOutcome::Extents)
            }
            BlockOp::Read { .. } | BlockOp::Write { .. } | BlockOp::Flush => Ok(BlockOutcome::Done),
        };
        done.map_err(|error| op.error(block_kind(&error)))
    }

    /// An image file is enlarged; a block device must have been enlarged by other means, and its
    /// whole new size is taken over.
    fn grow(&self, op: &BlockOp, size_bytes: u64) -> Result<BlockOutcome, BlockError> {
        let grown = (|| {
            if !self.is_block_device && (&self.file).seek(SeekFrom::End(0))? < size_bytes {
                self.file.set_len(size_bytes)?;
            }
            self.read_size()
        })();
        match grown {
            Ok(size) if size >= size_bytes => Ok(BlockOutcome::Done),
            Ok(_) => Err(op.error(BlockErrorKind::Range)),
            Err(error) => Err(op.error(block_kind(&error))),
        }
    }

    fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        if self.is_block_device {
            let all = Extent {
                offset,
                length,
                kind: ExtentKind::Data,
            };
            return Ok(if length == 0 { Vec::new() } else { vec![all] });
        }
        let unit = u64::from(self.logical_block_bytes);
        zeroes::extents(&self.file, offset, offset + length, unit)
    }
}

/// Opens for direct I/O, or through the page cache where the file system refuses that.
fn open_with(path: &Path, options: &DeviceOptions, is_exclusive: bool) -> io::Result<(File, bool)> {
    let exclusive = if is_exclusive { libc::O_EXCL } else { 0 };
    let open = |flags: libc::c_int| {
        OpenOptions::new()
            .read(true)
            .write(!options.is_read_only)
            .custom_flags(flags | exclusive)
            .open(path)
    };
    if options.is_direct {
        match open(libc::O_DIRECT) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            result => return result.map(|file| (file, true)),
        }
    }
    open(0).map(|file| (file, false))
}

struct DeviceDelivery {
    token: Token,
    to: Arc<dyn BlockCompleter>,
    shared: Arc<Shared>,
    action: Action,
    asked: (&'static str, u64, u64),
}

impl Delivery for DeviceDelivery {
    fn descriptor(&self) -> RawFd {
        self.shared.file.as_raw_fd()
    }

    fn alignment(&self) -> usize {
        self.shared.alignment as usize
    }

    fn deliver(self, buffer: Option<IoBuffer>, result: io::Result<()>) {
        let Self {
            token,
            to,
            shared,
            action,
            asked: (operation, offset, length),
        } = self;
        let error = |kind| BlockError {
            operation,
            offset,
            length,
            kind,
        };
        let result = match (result, action, buffer) {
            (Ok(()), Action::Read, Some(buffer)) if buffer.len() as u64 == length => {
                Ok(BlockOutcome::Data(buffer))
            }
            (Ok(()), Action::Read, _) => {
                let message = "the image ends before the device does".to_owned();
                Err(error(BlockErrorKind::Io {
                    errno: libc::EIO,
                    message,
                }))
            }
            (Ok(()), Action::Write { .. }, Some(buffer)) => Ok(BlockOutcome::Written(buffer)),
            (Ok(()), _, _) => Ok(BlockOutcome::Done),
            (Err(cause), action, _) => {
                if loses_data(action, &cause) {
                    shared.is_poisoned.store(true, Ordering::Release);
                }
                Err(error(block_kind(&cause)))
            }
        };
        drop(shared);
        to.complete(BlockCompletion { token, result });
    }
}

/// Says whether a failure took the only report of data that never reached the medium.
fn loses_data(action: Action, cause: &io::Error) -> bool {
    match (action, cause.raw_os_error()) {
        (_, Some(libc::EAGAIN)) => false,
        (Action::Sync, _) => true,
        (Action::Write { is_durable }, errno) => is_durable && errno != Some(libc::ENOSPC),
        (Action::Read, _) => false,
    }
}
