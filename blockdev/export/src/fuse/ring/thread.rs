//! One ring thread: takes requests from its entries and hands answers to the kernel.
//!
//! Invariants:
//! * every entry is in one of three hands: the kernel's (counted in `in_kernel`), an
//!   [`Entry`]'s, or in the lane's list of answers;
//! * the ring is closed only when no entry is in the kernel's hands, so that the kernel writes to
//!   no memory of a lane that is gone;
//! * the queues have room for all entries, so that nothing overflows.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use fuser::Errno;
use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, types};

use super::command;
use super::lane::{Entry, Lane};
use super::memory::{COMMIT_AT, FIXED_AT, HEADER_BYTES, LENGTH_AT};
use crate::fuse::parse::{Header, Request};
use crate::fuse::reply::{Reply, Way};
use crate::fuse::server::{REQUEST_BYTES_MAX, Server};
use crate::fuse::wire::{opcode::WRITE, u32_at, u64_at};

/// Number of the command that only wakes the thread.
const WAKE: u64 = u64::MAX;
/// The connection, among the ring's files.
const FUSE: types::Fixed = types::Fixed(0);
/// Data from which on an answer does not wait for the rest of its batch.
const LONG_BYTES: usize = 64 << 10;

type Uring = IoUring<Entry128, cqueue::Entry>;

/// The thread's own state.
pub(super) struct Runner {
    ring: Uring,
    lane: Arc<Lane>,
    server: Arc<Server>,
    /// What to commit for the request that an entry holds.
    commit_ids: Vec<u64>,
    in_kernel: usize,
    /// The kernel has said that the connection is gone.
    is_over: bool,
    arrived: Vec<(u64, i32, u32)>,
    answered: Vec<u16>,
    arguments: Vec<u8>,
}

impl Runner {
    /// Makes the ring, on the thread that will use it.
    pub(super) fn new(lane: Arc<Lane>, server: Arc<Server>) -> io::Result<Self> {
        let count = lane.entries().count();
        let room = u32::try_from(count + 1).map_err(|_| io::ErrorKind::InvalidInput)?;
        let room = room.next_power_of_two();
        let ring = Uring::builder()
            .dontfork()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_cqsize(room * 2)
            .build(room)?;
        Ok(Self {
            ring,
            commit_ids: vec![0; count],
            in_kernel: 0,
            is_over: false,
            arrived: Vec::with_capacity(room as usize * 2),
            answered: Vec::with_capacity(count),
            arguments: Vec::new(),
            lane,
            server,
        })
    }

    /// Registers all entries; gives how many the kernel took, or why it took none.
    pub(super) fn register(&mut self, fuse: &impl AsRawFd) -> io::Result<usize> {
        self.ring.submitter().register_files(&[fuse.as_raw_fd()])?;
        self.watch_wake_event();
        let lane = Arc::clone(&self.lane);
        // The kernel reads the places while it takes the entry, so that they need not stay.
        for (index, queue) in lane.entries() {
            let places = lane.memory().places(index);
            let entry = command::register(FUSE, queue, &places).user_data(u64::from(index));
            self.push(&entry);
            self.in_kernel += 1;
            self.ring.submit()?;
        }
        self.collect();
        let mut refused = None;
        for at in (0..self.arrived.len()).rev() {
            let (number, result, _) = self.arrived[at];
            if number != WAKE && result < 0 {
                self.arrived.swap_remove(at);
                self.in_kernel -= 1;
                refused = Some(io::Error::from_raw_os_error(-result));
            }
        }
        match refused {
            Some(error) if self.in_kernel == 0 => Err(error),
            _ => Ok(self.in_kernel),
        }
    }

    /// Serves requests until the connection ends.
    pub(super) fn run(&mut self) -> io::Result<()> {
        loop {
            self.serve_arrived();
            self.commit_answered();
            if self.in_kernel == 0 && (self.is_over || self.lane.is_closed()) {
                return Ok(());
            }
            let wanted = usize::from(self.lane.may_sleep());
            let entered = self.ring.submit_and_wait(wanted);
            self.lane.awake();
            match entered {
                Err(error) if !is_passing(&error) => return Err(error),
                _ => self.collect(),
            }
        }
    }

    fn collect(&mut self) {
        let completions = self.ring.completion();
        self.arrived
            .extend(completions.map(|one| (one.user_data(), one.result(), one.flags())));
    }

    #[allow(unsafe_code)]
    fn push(&mut self, entry: &Entry128) {
        // SAFETY: the entry names the shared memory of a slot that is handed to the kernel here,
        // and that stays mapped until its command is completed; or it names no memory.
        let pushed = unsafe { self.ring.submission().push(entry) };
        assert!(pushed.is_ok(), "the queue has room for every entry");
    }

    fn watch_wake_event(&mut self) {
        let event = types::Fd(self.lane.wake_event().as_raw_fd());
        let readable = u32::try_from(libc::POLLIN).unwrap_or(1);
        let entry = opcode::PollAdd::new(event, readable).multi(true).build();
        self.push(&entry.user_data(WAKE).into());
    }

    fn serve_arrived(&mut self) {
        // Alone, a request may wait for a short read: no other waits behind it.
        let is_alone = self.arrived.len() == 1;
        let mut arrived = std::mem::take(&mut self.arrived);
        for (number, result, flags) in arrived.drain(..) {
            if number == WAKE {
                if !cqueue::more(flags) {
                    self.watch_wake_event();
                }
                continue;
            }
            self.in_kernel -= 1;
            match u16::try_from(number) {
                Ok(index) if result >= 0 => self.serve(index, is_alone),
                _ => self.lost(result),
            }
        }
        self.arrived = arrived;
    }

    /// The kernel takes an entry no longer.
    fn lost(&mut self, result: i32) {
        match -result {
            libc::ENOTCONN | libc::ECONNABORTED | libc::ENODEV => self.is_over = true,
            errno if !self.lane.is_closed() => {
                let error = io::Error::from_raw_os_error(errno);
                tracing::error!(%error, left = self.in_kernel, "a ring entry was lost");
            }
            _ => {}
        }
    }

    fn serve(&mut self, index: u16, is_alone: bool) {
        // SAFETY: the entry's command has just completed, and each completion is taken once.
        #[allow(unsafe_code)]
        let entry = unsafe { Entry::take(&self.lane, index) };
        let bytes = entry.header();
        self.commit_ids[usize::from(index)] = u64_at(&bytes, COMMIT_AT).unwrap_or(0);
        let payload = u32_at(&bytes, LENGTH_AT).unwrap_or(0);
        let payload = payload.min(REQUEST_BYTES_MAX) as usize;
        if let Some(header) = Header::parse(&bytes) {
            self.handle(&header, &bytes, entry, payload, is_alone);
        }
        if payload >= LONG_BYTES {
            self.commit_now();
        }
    }

    fn handle(
        &mut self,
        header: &Header,
        bytes: &[u8; HEADER_BYTES],
        entry: Entry,
        payload: usize,
        may_wait: bool,
    ) {
        let fixed = bytes
            .get(FIXED_AT..FIXED_AT + header.fixed_bytes())
            .unwrap_or_default();
        if header.opcode == WRITE {
            let mut buffer = entry.buffer(payload);
            entry.read_payload(&mut buffer);
            let reply = Reply::new(header.unique, Way::Ring(entry));
            return match Request::parse_write(header, fixed, payload) {
                Some((request, length)) => {
                    buffer.set_len(length);
                    let server = &self.server;
                    server.handle(header, request, Some(buffer), reply, may_wait);
                }
                None => no_sense(header, reply),
            };
        }
        self.arguments.resize(payload, 0);
        entry.read_payload(&mut self.arguments);
        let reply = Reply::new(header.unique, Way::Ring(entry));
        match Request::parse(header, fixed, &self.arguments) {
            Some(request) => self.server.handle(header, request, None, reply, may_wait),
            None => no_sense(header, reply),
        }
    }

    /// Writes the commands for what was answered.
    fn commit_answered(&mut self) {
        let mut answered = std::mem::take(&mut self.answered);
        self.lane.take_answered(&mut answered);
        for index in answered.drain(..) {
            // Nobody waits for an answer once the connection has ended.
            if self.is_over || self.lane.is_closed() {
                continue;
            }
            let (queue, id) = (
                self.lane.queue_of(index),
                self.commit_ids[usize::from(index)],
            );
            let entry = command::commit_and_fetch(FUSE, queue, id);
            self.push(&entry.user_data(u64::from(index)));
            self.in_kernel += 1;
        }
        self.answered = answered;
    }

    /// Hands over what was answered, without waiting.
    fn commit_now(&mut self) {
        self.commit_answered();
        if let Err(error) = self.ring.submit()
            && !is_passing(&error)
        {
            // The wait that follows meets it again, and ends the thread.
            tracing::error!(%error, "a ring takes no answers");
        }
    }
}

fn no_sense(header: &Header, reply: Reply) {
    tracing::error!(
        opcode = header.opcode,
        "a request of the kernel makes no sense"
    );
    reply.error(Errno::EINVAL);
}

impl Drop for Runner {
    fn drop(&mut self) {
        if self.in_kernel > 0 {
            // The thread failed. The kernel may write to these entries until it has closed the
            // ring, which it does in its own time: their memory stays for good.
            std::mem::forget(Arc::clone(&self.lane));
        }
    }
}

/// The kernel asks to come again when a signal came, or while it has no memory or room.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
    )
}
