//! Files behind tokio-uring, and their twin of blocking calls on threads where io_uring is
//! forbidden. The same futures run on both.

use std::fs::{File, OpenOptions};
use std::future::Future;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_uring::buf::BoundedBuf;

use crate::buffer::{ALIGNMENT, Buffer};
use crate::error::BulkError;

/// Which way requests reach the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum IoChoice {
    /// io_uring where the kernel lets us, threads otherwise.
    #[default]
    Auto,
    /// io_uring, or an error.
    Uring,
    /// Blocking calls on threads.
    Threads,
}

/// The way that was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Way {
    Uring,
    Threads,
}

/// Threads of the twin, and of what compresses.
const THREADS_MAX: usize = 16;

/// Runs work to its end on a thread of its own.
pub(crate) fn run<F, T>(
    choice: IoChoice,
    make: impl FnOnce(Way) -> F + Send,
) -> Result<T, BulkError>
where
    F: Future<Output = Result<T, BulkError>>,
    T: Send,
{
    let body = || match choice {
        IoChoice::Threads => on_threads(make),
        IoChoice::Uring | IoChoice::Auto => {
            match tokio_uring::Runtime::new(&tokio_uring::builder()) {
                Ok(runtime) => runtime.block_on(make(Way::Uring)),
                Err(_) if choice == IoChoice::Auto => on_threads(make),
                Err(source) => Err(BulkError::Thread { source }),
            }
        }
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("bulk".to_owned())
            .spawn_scoped(scope, body)
            .map_err(|source| BulkError::Thread { source })?;
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn on_threads<F, T>(make: impl FnOnce(Way) -> F) -> Result<T, BulkError>
where
    F: Future<Output = Result<T, BulkError>>,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(THREADS_MAX)
        .build()
        .map_err(|source| BulkError::Thread { source })?;
    let local = tokio::task::LocalSet::new();
    runtime.block_on(local.run_until(make(Way::Threads)))
}

/// Work that waits or computes, away from the thread of the ring.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

enum Handle {
    Uring(tokio_uring::fs::File),
    Threads(Arc<File>),
}

impl Handle {
    fn new(way: Way, file: File) -> Self {
        match way {
            Way::Uring => Self::Uring(tokio_uring::fs::File::from_std(file)),
            Way::Threads => Self::Threads(Arc::new(file)),
        }
    }

    async fn read_some(
        &self,
        buffer: Buffer,
        at: Range<usize>,
        offset: u64,
    ) -> (io::Result<usize>, Buffer) {
        let (mut bytes, start, len) = buffer.into_parts();
        let place = start + at.start..start + at.end;
        match self {
            Self::Uring(file) => {
                let (result, slice) = file.read_at(bytes.slice(place), offset).await;
                (result, Buffer::from_parts((slice.into_inner(), start, len)))
            }
            Self::Threads(file) => {
                let file = Arc::clone(file);
                let work = move || (file.read_at(&mut bytes[place], offset), bytes);
                let (result, bytes) = blocking(work).await;
                (result, Buffer::from_parts((bytes, start, len)))
            }
        }
    }

    async fn write_some(
        &self,
        buffer: Buffer,
        at: Range<usize>,
        offset: u64,
    ) -> (io::Result<usize>, Buffer) {
        let (bytes, start, len) = buffer.into_parts();
        let place = start + at.start..start + at.end;
        match self {
            Self::Uring(file) => {
                let (result, slice) = file.write_at(bytes.slice(place), offset).submit().await;
                (result, Buffer::from_parts((slice.into_inner(), start, len)))
            }
            Self::Threads(file) => {
                let file = Arc::clone(file);
                let work = move || (file.write_at(&bytes[place], offset), bytes);
                let (result, bytes) = blocking(work).await;
                (result, Buffer::from_parts((bytes, start, len)))
            }
        }
    }

    async fn sync(&self) -> io::Result<()> {
        match self {
            Self::Uring(file) => file.sync_all().await,
            Self::Threads(file) => {
                let file = Arc::clone(file);
                blocking(move || file.sync_all()).await
            }
        }
    }

    async fn close(self) {
        if let Self::Uring(file) = self {
            // What was written was synced before; nothing else can be lost here.
            let _closed = file.close().await;
        }
    }
}

/// A file that goes around the page cache wherever a request is aligned.
pub(crate) struct BulkFile {
    path: PathBuf,
    buffered: Handle,
    direct: Option<Handle>,
}

fn is_aligned(at: &Range<usize>, offset: u64) -> bool {
    at.start.is_multiple_of(ALIGNMENT)
        && at.end.is_multiple_of(ALIGNMENT)
        && offset.is_multiple_of(ALIGNMENT as u64)
}

impl BulkFile {
    /// Takes a file over that is open, and opens it once more for direct I/O if it can be.
    pub(crate) fn new(way: Way, path: &Path, file: File, is_written: bool) -> Self {
        let mut options = OpenOptions::new();
        options.read(!is_written).write(is_written);
        // A file system that refuses this serves the other handle.
        let direct = options.custom_flags(libc::O_DIRECT).open(path).ok();
        Self {
            path: path.to_owned(),
            buffered: Handle::new(way, file),
            direct: direct.map(|file| Handle::new(way, file)),
        }
    }

    fn handle(&self, at: &Range<usize>, offset: u64) -> &Handle {
        match &self.direct {
            Some(direct) if is_aligned(at, offset) => direct,
            _ => &self.buffered,
        }
    }

    /// Fills the buffer, but for what lies behind the end of the file; says how much came.
    pub(crate) async fn read(
        &self,
        mut buffer: Buffer,
        offset: u64,
    ) -> (Result<usize, BulkError>, Buffer) {
        let mut filled = 0;
        while filled < buffer.len() {
            let at = filled..buffer.len();
            let from = offset + filled as u64;
            let (result, back) = self.handle(&at, from).read_some(buffer, at, from).await;
            buffer = back;
            match result {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (Err(BulkError::io("read", &self.path)(error)), buffer),
            }
        }
        (Ok(filled), buffer)
    }

    /// Writes a part of the buffer.
    pub(crate) async fn write(
        &self,
        mut buffer: Buffer,
        part: Range<usize>,
        offset: u64,
    ) -> (Result<(), BulkError>, Buffer) {
        let mut at = part.start;
        while at < part.end {
            let to = offset + (at - part.start) as u64;
            // The aligned part goes directly, the tail through the page cache.
            let whole = at + (part.end - at) / ALIGNMENT * ALIGNMENT;
            let end = if whole > at { whole } else { part.end };
            let handle = self.handle(&(at..end), to);
            let (result, back) = handle.write_some(buffer, at..end, to).await;
            buffer = back;
            match result {
                Ok(0) => {
                    let error = io::Error::from(io::ErrorKind::WriteZero);
                    return (Err(BulkError::io("write", &self.path)(error)), buffer);
                }
                Ok(count) => at += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (Err(BulkError::io("write", &self.path)(error)), buffer),
            }
        }
        (Ok(()), buffer)
    }

    /// Makes all durable that was written.
    pub(crate) async fn sync(&self) -> Result<(), BulkError> {
        let synced = self.buffered.sync().await;
        synced.map_err(BulkError::io("sync", &self.path))
    }

    /// Gives the file back to the kernel.
    pub(crate) async fn close(self) {
        self.buffered.close().await;
        if let Some(direct) = self.direct {
            direct.close().await;
        }
    }
}
