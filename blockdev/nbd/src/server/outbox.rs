//! Replies on their way out, and what a connection has in flight.
//!
//! Invariants
//! * Replies leave whole and in the order of the queue; only one thread writes at a time.
//! * Nobody but the connection's own task waits for the socket.
//! * A request counts as in flight until the last byte of its reply was taken by the socket.
//! * Once the link is broken the queue stays empty, and what still completes is let go.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::Arc;

use afterimage_blockdev::IoBuffer;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::link::Link;
use crate::wire::Head;

/// Replies written with one call at most; each has up to two parts.
const BATCH_FRAMES: usize = 64;
/// Buffers kept for the next requests: of short ones, and of long ones up to a length.
const SHORT_BYTES: usize = 64 << 10;
const SHORT_SPARE_MAX: usize = 64;
const LONG_BYTES: usize = 1 << 20;
const LONG_SPARE_MAX: usize = 8;
/// Bytes from which on the reader sends what is queued before it goes on.
const PILE_BYTES: usize = 256 << 10;

/// What follows a head.
pub(super) enum Body {
    Empty,
    Buffer(IoBuffer),
    Bytes(Vec<u8>),
}

impl Body {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Empty => &[],
            Self::Buffer(buffer) => buffer,
            Self::Bytes(bytes) => bytes,
        }
    }
}

/// A reply, or one chunk of one.
pub(super) struct Frame {
    pub(super) head: Head,
    pub(super) body: Body,
    /// The request is over with it: bytes to give back.
    pub(super) releases: Option<usize>,
}

impl Frame {
    fn len(&self) -> usize {
        self.head.as_slice().len() + self.body.as_slice().len()
    }
}

#[derive(Default)]
struct State {
    queue: VecDeque<Frame>,
    queued_bytes: usize,
    /// Bytes of the first frame that are gone already.
    sent: usize,
    is_writing: bool,
    /// The socket is full; the task waits for it.
    is_blocked: bool,
    is_broken: bool,
    /// The reader is submitting, and will send what piles up.
    is_batching: bool,
    requests: usize,
    bytes: usize,
    /// Requests that a device or a task works on.
    working: usize,
    short_spare: Vec<IoBuffer>,
    long_spare: Vec<IoBuffer>,
}

pub(super) struct Outbox {
    link: Arc<Link>,
    state: Mutex<State>,
    /// Something is to be sent.
    wake: Notify,
    /// Something went out, or the link broke.
    room: Notify,
    requests_max: usize,
    bytes_max: usize,
}

impl Outbox {
    pub(super) fn new(link: Arc<Link>, requests_max: usize, bytes_max: usize) -> Self {
        Self {
            link,
            state: Mutex::default(),
            wake: Notify::new(),
            room: Notify::new(),
            requests_max,
            bytes_max,
        }
    }

    /// Takes room for a request of `bytes`, if there is some.
    pub(super) fn try_admit(&self, bytes: usize) -> bool {
        let mut state = self.state.lock();
        let fits = state.requests == 0
            || (state.requests < self.requests_max && state.bytes + bytes <= self.bytes_max);
        if fits {
            state.requests += 1;
            state.bytes += bytes;
            state.working += 1;
        }
        fits
    }

    /// Takes room for a request, and waits for it; `false` when the link is broken.
    pub(super) async fn admit(&self, bytes: usize) -> bool {
        loop {
            let room = self.room.notified();
            if self.try_admit(bytes) {
                return true;
            }
            if self.state.lock().is_broken {
                return false;
            }
            room.await;
        }
    }

    /// A buffer of `len` bytes, whatever they are.
    pub(super) fn buffer(&self, len: usize) -> IoBuffer {
        let spare = {
            let mut state = self.state.lock();
            if len <= SHORT_BYTES {
                state.short_spare.pop()
            } else {
                state.long_spare.pop()
            }
        };
        match spare {
            Some(mut buffer) if buffer.capacity() >= len => {
                buffer.set_len(len);
                buffer
            }
            _ => IoBuffer::zeroed(len),
        }
    }

    /// Takes a buffer back.
    pub(super) fn give_back(&self, buffer: IoBuffer) {
        self.state.lock().keep(buffer);
    }

    /// From now on completions only queue, until [`Outbox::end_batch`].
    pub(super) fn begin_batch(&self) {
        self.state.lock().is_batching = true;
    }

    pub(super) fn end_batch(&self) {
        self.state.lock().is_batching = false;
        self.flush();
    }

    /// Queues a frame. With the last frame of a request, sends when nothing more is to come soon;
    /// otherwise leaves it to the task, which takes all that come meanwhile.
    pub(super) fn push(&self, frame: Frame) {
        let mut state = self.state.lock();
        let is_last = frame.releases.is_some();
        if is_last {
            state.working -= 1;
        }
        if state.is_broken {
            state.release(frame);
            drop(state);
            self.room.notify_waiters();
            return;
        }
        state.queued_bytes += frame.len();
        state.queue.push_back(frame);
        if state.is_writing || state.is_blocked {
            return;
        }
        let is_piled = state.queued_bytes >= PILE_BYTES;
        if state.is_batching && !is_piled {
            return;
        }
        let sends = is_piled || (is_last && state.working == 0);
        let is_first = state.queue.len() == 1;
        drop(state);
        if sends {
            self.flush();
        } else if is_first {
            self.wake.notify_one();
        }
    }

    /// Sends what the socket takes.
    fn flush(&self) {
        let mut state = self.state.lock();
        // TLS may hold bytes of frames that are gone from the queue.
        let is_empty = state.queue.is_empty() && !self.link.is_secure();
        if state.is_writing || state.is_blocked || state.is_broken || is_empty {
            return;
        }
        state.is_writing = true;
        let mut batch = core::mem::take(&mut state.queue);
        let mut sent = state.sent;
        drop(state);
        let mut gone = Vec::with_capacity(batch.len().min(BATCH_FRAMES));
        let result = write(&self.link, &mut batch, &mut sent, &mut gone);
        let mut state = self.state.lock();
        let has_released = gone.iter().any(|frame| frame.releases.is_some());
        for frame in gone {
            state.queued_bytes -= frame.len();
            state.release(frame);
        }
        batch.append(&mut state.queue);
        state.queue = batch;
        state.sent = sent;
        state.is_writing = false;
        let wakes = match result {
            _ if state.is_broken => {
                state.fail();
                true
            }
            Ok(()) => !state.queue.is_empty(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                state.is_blocked = true;
                true
            }
            Err(error) => {
                tracing::debug!(%error, "a client went away");
                state.fail();
                true
            }
        };
        drop(state);
        if has_released || wakes {
            self.room.notify_waiters();
        }
        if wakes {
            self.wake.notify_one();
        }
    }

    /// Writes what others could not; ends when the link is broken.
    pub(super) async fn run(&self) {
        loop {
            self.wake.notified().await;
            let (is_blocked, is_broken) = {
                let state = self.state.lock();
                (state.is_blocked, state.is_broken)
            };
            if is_broken {
                return;
            }
            if is_blocked {
                let waited = self.link.writable().await;
                let mut state = self.state.lock();
                state.is_blocked = false;
                if waited.is_err() {
                    state.fail();
                }
            }
            self.flush();
        }
    }

    /// Lets go of everything, now and later.
    pub(super) fn break_off(&self) {
        self.state.lock().fail();
        self.room.notify_waiters();
        self.wake.notify_one();
    }

    /// Waits until everything in flight was answered and sent, or the link is broken.
    pub(super) async fn drained(&self) {
        loop {
            let room = self.room.notified();
            {
                let state = self.state.lock();
                if state.is_broken || state.requests == 0 {
                    return;
                }
            }
            room.await;
        }
    }
}

impl State {
    fn keep(&mut self, buffer: IoBuffer) {
        if buffer.capacity() <= SHORT_BYTES {
            if self.short_spare.len() < SHORT_SPARE_MAX {
                self.short_spare.push(buffer);
            }
        } else if buffer.capacity() <= LONG_BYTES && self.long_spare.len() < LONG_SPARE_MAX {
            self.long_spare.push(buffer);
        }
    }

    fn release(&mut self, frame: Frame) {
        if let Some(bytes) = frame.releases {
            self.requests -= 1;
            self.bytes -= bytes;
        }
        if let Body::Buffer(buffer) = frame.body {
            self.keep(buffer);
        }
    }

    fn fail(&mut self) {
        self.is_broken = true;
        self.is_blocked = false;
        if self.is_writing {
            // Whoever writes will fail as well, and comes back here.
            return;
        }
        self.queued_bytes = 0;
        for frame in core::mem::take(&mut self.queue) {
            self.release(frame);
        }
    }
}

/// Writes frames from the front of `batch` until it is empty or the socket is full. Whole ones go
/// over to `gone`; `sent` counts the bytes of the first one that is left.
fn write(
    link: &Link,
    batch: &mut VecDeque<Frame>,
    sent: &mut usize,
    gone: &mut Vec<Frame>,
) -> io::Result<()> {
    while !batch.is_empty() {
        let mut parts = [IoSlice::new(&[]); 2 * BATCH_FRAMES];
        let mut count = 0;
        let mut skipped = *sent;
        for frame in batch.iter().take(BATCH_FRAMES) {
            for part in [frame.head.as_slice(), frame.body.as_slice()] {
                let skip = skipped.min(part.len());
                skipped -= skip;
                if skip < part.len() {
                    parts[count] = IoSlice::new(&part[skip..]);
                    count += 1;
                }
            }
        }
        let written = match link.try_write(&parts[..count]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        *sent += written;
        while let Some(first) = batch.front()
            && *sent >= first.len()
        {
            *sent -= first.len();
            gone.extend(batch.pop_front());
        }
    }
    link.try_flush()
}
