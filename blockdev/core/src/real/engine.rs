//! What both backends share: the request, how it advances, and who is told.
//!
//! Always true:
//! * A request owns its buffer and, through its delivery, its file from submission to delivery;
//!   nothing that the kernel may still touch belongs to anyone else.
//! * Every accepted request is delivered exactly once; a refused one is handed back.
//! * No lock is held while a delivery runs, so a delivery may submit.

use std::io;
use std::os::fd::RawFd;

use super::pool::{self, PoolEngine};
use super::ring::RingEngine;
use crate::buffer::IoBuffer;
use crate::patience;

/// How often the kernel may put off one request without any progress before that is an error.
const RETRIES_MAX: u16 = 1000;

/// Which way requests reach the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Backend {
    /// `io_uring` where the kernel allows it, else threads.
    #[default]
    Auto,
    /// `io_uring`, or an error.
    IoUring,
    /// Threads that read and write with system calls of their own.
    Threads,
}

/// Bounds of an engine's queues.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Requests given to the kernel at once.
    pub(super) queue_depth: u32,
    /// Requests that wait behind those.
    pub(super) overflow_max: usize,
    /// Threads of the twin.
    pub(super) threads: usize,
    /// Threads that take completions and run what follows them, at most.
    pub(super) reapers: usize,
}

/// What a request asks of the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Action {
    Read,
    Write { is_durable: bool },
    Sync,
}

/// Knows a request's file, and takes its result.
pub(super) trait Delivery: Send + 'static {
    /// The file; open for as long as the delivery lives.
    fn descriptor(&self) -> RawFd;
    /// Unit of direct I/O on that file, in bytes; 1 when it goes through the page cache.
    fn alignment(&self) -> usize;
    /// Takes the result. The buffer of a read is shortened at the end of the file.
    fn deliver(self, buffer: Option<IoBuffer>, result: io::Result<()>);
}

/// One read, write or sync on its way.
pub(super) struct Request<D> {
    pub(super) action: Action,
    pub(super) offset: u64,
    pub(super) buffer: Option<IoBuffer>,
    /// Bytes already moved.
    pub(super) done: usize,
    retries: u16,
    pub(super) delivery: D,
}

/// What comes after an answer of the kernel.
pub(super) enum Step {
    /// The rest must be submitted.
    Again,
    /// The request is over.
    Finished(io::Result<()>),
}

impl<D: Delivery> Request<D> {
    pub(super) fn new(action: Action, offset: u64, buffer: Option<IoBuffer>, delivery: D) -> Self {
        Self {
            action,
            offset,
            buffer,
            done: 0,
            retries: 0,
            delivery,
        }
    }

    /// Takes in one answer of the kernel: a byte count, or an error number below zero.
    pub(super) fn advance(&mut self, answer: i32) -> Step {
        let Ok(moved) = usize::try_from(answer) else {
            return self.put_off(-answer);
        };
        self.retries = 0;
        let Some(buffer) = self.buffer.as_mut() else {
            return Step::Finished(Ok(()));
        };
        self.done += moved;
        assert!(
            self.done <= buffer.len(),
            "the kernel moved more than was asked"
        );
        if self.done == buffer.len() {
            return Step::Finished(Ok(()));
        }
        let alignment = self.delivery.alignment();
        let is_reading = self.action == Action::Read;
        // Direct reads stop between two units only at the end of the file.
        if is_reading && (moved == 0 || !self.done.is_multiple_of(alignment)) {
            buffer.set_len(self.done);
            return Step::Finished(Ok(()));
        }
        if !is_reading {
            if moved == 0 {
                return Step::Finished(Err(io::ErrorKind::WriteZero.into()));
            }
            self.done -= self.done % alignment;
        }
        Step::Again
    }

    /// `ECANCELED` is no wish of ours: should a kernel cancel what a thread that ended had queued,
    /// the request outlives that thread.
    fn put_off(&mut self, errno: i32) -> Step {
        self.retries += 1;
        let is_passing = matches!(errno, libc::EINTR | libc::EAGAIN | libc::ECANCELED);
        if is_passing && self.retries < RETRIES_MAX {
            Step::Again
        } else {
            Step::Finished(Err(io::Error::from_raw_os_error(errno)))
        }
    }

    /// Tells whoever asked.
    pub(super) fn finish(self, result: io::Result<()>) {
        self.delivery.deliver(self.buffer, result);
    }
}

/// One of the two backends.
pub(super) enum Engine<D: Delivery> {
    Ring(RingEngine<D>),
    Pool(PoolEngine<D>),
}

impl<D: Delivery> Engine<D> {
    /// Starts the backend that was asked for.
    ///
    /// # Errors
    /// When `io_uring` was asked for by name and the kernel refuses it, or no thread starts.
    pub(super) fn start(backend: Backend, limits: Limits) -> io::Result<Self> {
        match backend {
            Backend::IoUring => RingEngine::start(limits).map(Self::Ring),
            Backend::Threads => PoolEngine::start(limits).map(Self::Pool),
            Backend::Auto => match RingEngine::start(limits) {
                Ok(ring) => Ok(Self::Ring(ring)),
                Err(error) => {
                    tracing::info!(%error, "io_uring is not available, using threads");
                    PoolEngine::start(limits).map(Self::Pool)
                }
            },
        }
    }

    /// The backend that runs: `IoUring` or `Threads`.
    pub(super) fn backend(&self) -> Backend {
        match self {
            Self::Ring(_) => Backend::IoUring,
            Self::Pool(_) => Backend::Threads,
        }
    }

    /// Starts a request; a short read of a thread that may wait is over on return. When all queues
    /// are full, it is delivered as refused, with `EAGAIN`.
    pub(super) fn submit(&self, request: Request<D>) {
        let is_empty = request
            .buffer
            .as_ref()
            .is_some_and(|buffer| buffer.is_empty());
        if is_empty {
            return request.finish(Ok(()));
        }
        let length = request.buffer.as_ref().map_or(0, |buffer| buffer.len());
        if request.action == Action::Read && patience::spend(length) {
            return pool::perform(request);
        }
        let refused = match self {
            Self::Ring(ring) => ring.submit(request),
            Self::Pool(pool) => pool.submit(request),
        };
        if let Err(request) = refused {
            request.finish(Err(io::Error::from_raw_os_error(libc::EAGAIN)));
        }
    }
}
