//! The twin for machines that forbid `io_uring`: the same requests by system calls of their own
//! on a few threads.

use std::io;
use std::os::fd::RawFd;

use super::engine::{Action, Delivery, Limits, Request, Step};
use super::work::Workers;
use crate::convert::to_offset;

/// Requests on threads. Dropping it waits until everything was delivered.
pub(super) struct PoolEngine<D: Delivery> {
    workers: Workers<Request<D>>,
}

impl<D: Delivery> PoolEngine<D> {
    /// Starts the threads.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub(super) fn start(limits: Limits) -> io::Result<Self> {
        let jobs_max = limits
            .overflow_max
            .saturating_add(limits.queue_depth as usize);
        let workers = Workers::start("storage-pool", limits.threads, jobs_max, perform)?;
        Ok(Self { workers })
    }

    /// Queues a request, or hands it back when the queue is full.
    pub(super) fn submit(&self, request: Request<D>) -> Result<(), Request<D>> {
        self.workers.submit(request)
    }
}

/// Performs a request on the calling thread.
pub(super) fn perform<D: Delivery>(mut request: Request<D>) {
    loop {
        let answer =
            call(&mut request).unwrap_or_else(|error| -error.raw_os_error().unwrap_or(libc::EIO));
        if let Step::Finished(result) = request.advance(answer) {
            return request.finish(result);
        }
    }
}

/// Asks the kernel for what is left of a request.
#[allow(unsafe_code)]
fn call<D: Delivery>(request: &mut Request<D>) -> io::Result<i32> {
    let file: RawFd = request.delivery.descriptor();
    let done = request.done;
    let Some(buffer) = request.buffer.as_mut() else {
        // SAFETY: the delivery keeps the file open.
        return answer_of(unsafe { libc::fdatasync(file) } as isize);
    };
    let offset = to_offset(request.offset + done as u64)?;
    let rest = &mut buffer[done..];
    let moved = match request.action {
        Action::Write { is_durable } => {
            let part = libc::iovec {
                iov_base: rest.as_mut_ptr().cast(),
                iov_len: rest.len(),
            };
            let flags = if is_durable { libc::RWF_DSYNC } else { 0 };
            // SAFETY: one vector that describes `rest`; the delivery keeps the file open.
            unsafe { libc::pwritev2(file, &raw const part, 1, offset, flags) }
        }
        Action::Read | Action::Sync => {
            // SAFETY: the pointer and length describe `rest`, which is exclusively borrowed.
            unsafe { libc::pread(file, rest.as_mut_ptr().cast(), rest.len(), offset) }
        }
    };
    answer_of(moved)
}

/// A system call moves at most `0x7fff_f000` bytes, so that its answer fits.
fn answer_of(answer: isize) -> io::Result<i32> {
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(answer).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))
}
