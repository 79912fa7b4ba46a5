//! [`Storage`] over a directory.
//!
//! Always true:
//! * Reads, writes and syncs go through the engine; all that may block otherwise goes to one
//!   worker. The submitter never waits for the medium, unless it said that it may
//!   ([`crate::patience`]).
//! * A file stays open, whatever its `FileId` became, until its last operation was delivered.
//! * After a failed sync, no operation but `Close` of that open file reaches the kernel.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use parking_lot::RwLock;

use super::engine::{Action, Backend, Delivery, Engine, Limits, Request};
use super::root::{Opened, Root};
use super::work::Workers;
use crate::buffer::IoBuffer;
use crate::convert::{storage_kind, to_usize};
use crate::id::Token;
use crate::storage::{
    FileId, FileName, Storage, StorageCompleter, StorageCompletion, StorageError, StorageErrorKind,
    StorageOp, StorageOutcome,
};

/// Threads that take completions, at most.
const REAPERS_MAX: usize = 4;

/// How a [`RealStorage`] works.
#[derive(Clone, Debug)]
pub struct RealOptions {
    /// Which way requests reach the kernel.
    pub backend: Backend,
    /// Requests given to the kernel at once.
    pub queue_depth: u32,
    /// Requests that wait behind those; what comes on top fails with `EAGAIN`.
    pub overflow_max: usize,
    /// Threads of the backend without `io_uring`.
    pub threads: usize,
    /// Goes around the page cache where the file system can.
    pub is_direct: bool,
}

impl Default for RealOptions {
    fn default() -> Self {
        Self {
            backend: Backend::Auto,
            queue_depth: 1024,
            overflow_max: 64 * 1024,
            threads: 8,
            is_direct: true,
        }
    }
}

/// An open file.
struct OpenFile {
    file: File,
    name: FileName,
    alignment: u32,
    is_poisoned: AtomicBool,
}

impl OpenFile {
    fn is_poisoned(&self) -> bool {
        self.is_poisoned.load(Ordering::Acquire)
    }
}

struct Shared {
    root: Root,
    files: RwLock<HashMap<u64, Arc<OpenFile>>>,
    next_file: AtomicU64,
}

/// The files below a directory. Dropping it waits until all operations were completed.
pub struct RealStorage {
    engine: Engine<FileDelivery>,
    worker: Workers<Job>,
    shared: Arc<Shared>,
}

impl RealStorage {
    /// Opens a directory, and makes it when it does not exist.
    ///
    /// # Errors
    /// When the directory cannot be used, or the backend asked for cannot be had.
    pub fn open(root: &Path, options: RealOptions) -> io::Result<Arc<Self>> {
        let limits = Limits {
            queue_depth: options.queue_depth,
            overflow_max: options.overflow_max,
            threads: options.threads,
            // Slots are verified and decompressed where their reads complete.
            reapers: thread::available_parallelism()
                .map_or(1, usize::from)
                .min(REAPERS_MAX),
        };
        let shared = Arc::new(Shared {
            root: Root::open(root, options.is_direct)?,
            files: RwLock::new(HashMap::new()),
            next_file: AtomicU64::new(1),
        });
        let worker = Workers::start("storage-names", 1, options.overflow_max.max(1), {
            let shared = Arc::clone(&shared);
            move |job: Job| {
                let result = shared.perform(&job);
                let Job {
                    token,
                    to,
                    op,
                    file,
                } = job;
                drop((op, file));
                to.complete(StorageCompletion { token, result });
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

    /// Finds the open file of an operation, if it is about one and may be used.
    fn file_of(&self, op: &StorageOp) -> Result<Option<Arc<OpenFile>>, StorageError> {
        let Some(id) = op.file() else { return Ok(None) };
        let found = if matches!(op, StorageOp::Close { .. }) {
            self.shared.files.write().remove(&id.0)
        } else {
            self.shared.files.read().get(&id.0).cloned()
        };
        let file = found.ok_or_else(|| op.error("", StorageErrorKind::NotOpen))?;
        if file.is_poisoned() && !matches!(op, StorageOp::Close { .. }) {
            return Err(op.error(file.name.as_str(), StorageErrorKind::Poisoned));
        }
        Ok(Some(file))
    }

    fn start(
        &self,
        token: Token,
        op: StorageOp,
        to: Arc<dyn StorageCompleter>,
        file: Option<Arc<OpenFile>>,
    ) {
        match (op, file) {
            (StorageOp::Read { offset, buffer, .. }, Some(file)) => {
                self.start_read(token, offset, buffer, to, file);
            }
            (StorageOp::Write { offset, buffer, .. }, Some(file)) => {
                let delivery = FileDelivery {
                    token,
                    to,
                    file,
                    offset,
                    answer: Answer::Written,
                };
                let action = Action::Write { is_durable: false };
                self.engine
                    .submit(Request::new(action, offset, Some(buffer), delivery));
            }
            (StorageOp::Sync { .. }, Some(file)) => {
                let delivery = FileDelivery {
                    token,
                    to,
                    file,
                    offset: 0,
                    answer: Answer::Synced,
                };
                self.engine
                    .submit(Request::new(Action::Sync, 0, None, delivery));
            }
            (op, file) => {
                if let Err(job) = self.worker.submit(Job {
                    token,
                    op,
                    to,
                    file,
                }) {
                    let busy = io::Error::from_raw_os_error(libc::EAGAIN);
                    let error = job.op.error(job.name(), storage_kind(busy));
                    job.to.complete(StorageCompletion {
                        token,
                        result: Err(error),
                    });
                }
            }
        }
    }

    /// Widens a read where direct I/O wants larger units than the caller's.
    fn start_read(
        &self,
        token: Token,
        offset: u64,
        buffer: IoBuffer,
        to: Arc<dyn StorageCompleter>,
        file: Arc<OpenFile>,
    ) {
        let unit = u64::from(file.alignment);
        let end = offset + buffer.len() as u64;
        if offset.is_multiple_of(unit) && end.is_multiple_of(unit) {
            let delivery = FileDelivery {
                token,
                to,
                file,
                offset,
                answer: Answer::Read,
            };
            return self
                .engine
                .submit(Request::new(Action::Read, offset, Some(buffer), delivery));
        }
        let from = offset - offset % unit;
        let wide = IoBuffer::zeroed(to_usize(end.next_multiple_of(unit) - from));
        let answer = Answer::Cut {
            skip: to_usize(offset - from),
            buffer,
        };
        let delivery = FileDelivery {
            token,
            to,
            file,
            offset,
            answer,
        };
        self.engine
            .submit(Request::new(Action::Read, from, Some(wide), delivery));
    }
}

impl Storage for RealStorage {
    fn submit(&self, token: Token, op: StorageOp, to: Arc<dyn StorageCompleter>) {
        let checked = op.validate().map_err(|kind| op.error("", kind));
        match checked.and_then(|()| self.file_of(&op)) {
            Ok(file) => self.start(token, op, to, file),
            Err(error) => to.complete(StorageCompletion {
                token,
                result: Err(error),
            }),
        }
    }
}

/// An operation for the worker.
struct Job {
    token: Token,
    op: StorageOp,
    to: Arc<dyn StorageCompleter>,
    file: Option<Arc<OpenFile>>,
}

impl Job {
    fn name(&self) -> &str {
        self.file.as_ref().map_or("", |file| file.name.as_str())
    }
}

impl Shared {
    fn perform(&self, job: &Job) -> Result<StorageOutcome, StorageError> {
        let root = &self.root;
        let done = match &job.op {
            StorageOp::Create { name } => root
                .create(name)
                .and_then(|opened| self.register(name, opened)),
            StorageOp::Open { name } => root
                .open_file(name)
                .and_then(|opened| self.register(name, opened)),
            StorageOp::SetLength { length, .. } => job
                .file
                .as_ref()
                .map_or(Ok(()), |file| file.file.set_len(*length))
                .map(done),
            StorageOp::Rename { from, to } => root.rename(from, to).map(done),
            StorageOp::Remove { name } => root.remove(name).map(done),
            StorageOp::List { directory } => root.list(directory).map(StorageOutcome::Listed),
            StorageOp::SyncDirectory { directory } => root.sync_directory(directory).map(done),
            StorageOp::Capacity { directory } => {
                root.capacity(directory).map(StorageOutcome::Capacity)
            }
            StorageOp::Close { .. }
            | StorageOp::Read { .. }
            | StorageOp::Write { .. }
            | StorageOp::Sync { .. } => Ok(StorageOutcome::Done),
        };
        done.map_err(|error| job.op.error(job.name(), storage_kind(error)))
    }

    fn register(&self, name: &FileName, opened: Opened) -> io::Result<StorageOutcome> {
        let length = opened.file.metadata()?.len();
        let id = self.next_file.fetch_add(1, Ordering::Relaxed);
        let file = OpenFile {
            file: opened.file,
            name: name.clone(),
            alignment: opened.alignment,
            is_poisoned: AtomicBool::new(false),
        };
        self.files.write().insert(id, Arc::new(file));
        Ok(StorageOutcome::Opened {
            file: FileId(id),
            length,
        })
    }
}

fn done((): ()) -> StorageOutcome {
    StorageOutcome::Done
}

/// How a finished request is told to its caller.
enum Answer {
    Read,
    /// Of a widened read: the caller's bytes lie behind the first `skip`.
    Cut {
        skip: usize,
        buffer: IoBuffer,
    },
    Written,
    Synced,
}

struct FileDelivery {
    token: Token,
    to: Arc<dyn StorageCompleter>,
    file: Arc<OpenFile>,
    offset: u64,
    answer: Answer,
}

impl Delivery for FileDelivery {
    fn descriptor(&self) -> RawFd {
        self.file.file.as_raw_fd()
    }

    fn alignment(&self) -> usize {
        self.file.alignment as usize
    }

    fn deliver(self, buffer: Option<IoBuffer>, result: io::Result<()>) {
        let Self {
            token,
            to,
            file,
            offset,
            answer,
        } = self;
        let operation = match answer {
            Answer::Read | Answer::Cut { .. } => "read",
            Answer::Written => "write",
            Answer::Synced => "sync",
        };
        let result = match result {
            Ok(()) => Ok(outcome(answer, buffer)),
            Err(error) => {
                let is_put_off = error.raw_os_error() == Some(libc::EAGAIN);
                if operation == "sync" && !is_put_off {
                    file.is_poisoned.store(true, Ordering::Release);
                }
                let file = file.name.as_str().to_owned();
                Err(StorageError {
                    operation,
                    file,
                    offset,
                    kind: storage_kind(error),
                })
            }
        };
        drop(file);
        to.complete(StorageCompletion { token, result });
    }
}

fn outcome(answer: Answer, buffer: Option<IoBuffer>) -> StorageOutcome {
    match (answer, buffer) {
        (Answer::Read, Some(buffer)) => StorageOutcome::Read(buffer),
        (Answer::Written, Some(buffer)) => StorageOutcome::Written(buffer),
        (Answer::Cut { skip, mut buffer }, Some(wide)) => {
            let behind = wide.get(skip..).unwrap_or_default();
            let got = behind.len().min(buffer.len());
            buffer[..got].copy_from_slice(&behind[..got]);
            buffer.set_len(got);
            StorageOutcome::Read(buffer)
        }
        (_, _) => StorageOutcome::Done,
    }
}
