//! Requests through `io_uring`.
//!
//! Callers submit inline: they note the request in a slot, write the submission entry and enter
//! the kernel. A reaper thread waits for completions and delivers them. Where deliveries do much
//! work there are several rings, each with its reaper, that take turns at long requests.
//!
//! Always true, of each ring:
//! * The submission queue is touched only under the lock, the completion queue only by the reaper.
//! * A request sits in its slot from before its entry is written until its completion is taken,
//!   and each entry has exactly one completion; its number is the slot's.
//! * Entries on their way never outnumber the slots plus one wake-up, and the queue has room for
//!   that many; so neither queue overflows.
//! * A slot is free only when nothing waits in the overflow queue, so requests start in order.
//! * The system call and all deliveries happen without the lock.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use io_uring::{IoUring, Probe, opcode, squeue, types};
use parking_lot::Mutex;

use super::engine::{Action, Delivery, Limits, Request, Step};

/// Number of the entry that only wakes the reaper.
const WAKE: u64 = u64::MAX;
/// `IORING_ENTER_GETEVENTS`.
const ENTER_GETEVENTS: u32 = 1;
/// Most bytes asked of the kernel at once; the rest follows.
const TRANSFER_BYTES_MAX: u32 = 1 << 30;

struct Queues<D> {
    slots: Vec<Option<Request<D>>>,
    free: Vec<u32>,
    overflow: VecDeque<Request<D>>,
    is_closing: bool,
}

struct Core<D> {
    ring: IoUring,
    queues: Mutex<Queues<D>>,
    overflow_max: usize,
}

/// The submitters' side. Dropping it waits until everything in flight was delivered.
pub(super) struct RingEngine<D: Delivery> {
    rings: Vec<Ring<D>>,
    turn: AtomicUsize,
}

/// One ring.
struct Ring<D: Delivery> {
    core: Arc<Core<D>>,
    reaper: Option<JoinHandle<()>>,
}

/// Requests from this size on take turns. What follows a short one costs less than another thread
/// that wakes for it: they share the first ring, whose reaper takes many at once.
const LONG_BYTES: usize = 128 << 10;
/// Requests at once from which on another ring is worth while.
const RING_DEPTH_MIN: u32 = 64;

impl<D: Delivery> RingEngine<D> {
    /// Makes the rings and starts their reapers.
    ///
    /// # Errors
    /// When the kernel has no `io_uring`, forbids it, or lacks an operation.
    pub(super) fn start(limits: Limits) -> io::Result<Self> {
        let depth = limits.queue_depth.clamp(1, 16 * 1024);
        let reapers = u32::try_from(limits.reapers).unwrap_or(u32::MAX);
        let count = (depth / RING_DEPTH_MIN).clamp(1, reapers.max(1));
        let overflow_max = limits.overflow_max / count as usize;
        let rings = (0..count).map(|_| Ring::start(depth / count, overflow_max));
        Ok(Self {
            rings: rings.collect::<io::Result<_>>()?,
            turn: AtomicUsize::new(0),
        })
    }

    /// Starts a request, or queues it; hands it back when the queue is full.
    pub(super) fn submit(&self, request: Request<D>) -> Result<(), Request<D>> {
        let bytes = request.buffer.as_ref().map_or(0, |buffer| buffer.len());
        let turn = if bytes < LONG_BYTES {
            0
        } else {
            self.turn.fetch_add(1, Ordering::Relaxed) % self.rings.len()
        };
        self.rings[turn].core.submit(request)
    }
}

impl<D: Delivery> Ring<D> {
    fn start(depth: u32, overflow_max: usize) -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().build(depth + 1)?;
        check_operations(&ring)?;
        let queues = Queues {
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            overflow: VecDeque::new(),
            is_closing: false,
        };
        let core = Arc::new(Core {
            ring,
            queues: Mutex::new(queues),
            overflow_max,
        });
        let reaper = thread::Builder::new()
            .name("ring-reaper".to_owned())
            .spawn({
                let core = Arc::clone(&core);
                move || core.reap()
            })?;
        Ok(Self {
            core,
            reaper: Some(reaper),
        })
    }
}

impl<D: Delivery> Drop for Ring<D> {
    fn drop(&mut self) {
        {
            let mut queues = self.core.queues.lock();
            queues.is_closing = true;
            self.core
                .push(&mut queues, &opcode::Nop::new().build().user_data(WAKE));
        }
        self.core.enter(1);
        // The last owner may be a completer on the reaper itself, which then ends on its own.
        if let Some(reaper) = self.reaper.take()
            && reaper.thread().id() != thread::current().id()
        {
            assert!(reaper.join().is_ok(), "a completer panicked on the reaper");
        }
    }
}

fn check_operations(ring: &IoUring) -> io::Result<()> {
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [
        opcode::Nop::CODE,
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::Fsync::CODE,
    ];
    if needed.iter().all(|code| probe.is_supported(*code)) {
        Ok(())
    } else {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl<D: Delivery> Core<D> {
    fn submit(&self, request: Request<D>) -> Result<(), Request<D>> {
        {
            let mut queues = self.queues.lock();
            let Some(slot) = queues.free.pop() else {
                if queues.overflow.len() >= self.overflow_max {
                    return Err(request);
                }
                queues.overflow.push_back(request);
                return Ok(());
            };
            self.start(&mut queues, slot, request);
        }
        self.enter(1);
        Ok(())
    }

    /// Places a request in a slot and writes its entry.
    fn start(&self, queues: &mut Queues<D>, slot: u32, request: Request<D>) {
        let place = &mut queues.slots[slot as usize];
        assert!(place.is_none(), "slot {slot} is in use");
        let entry = entry_of(place.insert(request)).user_data(u64::from(slot));
        self.push(queues, &entry);
    }

    /// Writes one entry to the submission queue. `_queues` shows that the lock is held.
    #[allow(unsafe_code)]
    fn push(&self, _queues: &mut Queues<D>, entry: &squeue::Entry) {
        // SAFETY: `_queues` can only be borrowed from the locked mutex, so this is the only user
        // of the submission queue. The entry's buffer and file belong to a request that stays in
        // its slot until the completion is taken.
        let pushed = unsafe { self.ring.submission_shared().push(entry) };
        assert!(
            pushed.is_ok(),
            "the submission queue has room for every slot and one wake-up"
        );
    }

    /// Lets the kernel take `count` entries. Another thread's call may have taken ours, and ours
    /// may take another's: each entry is followed by a call, so none stays behind.
    #[allow(unsafe_code)]
    fn enter(&self, count: u32) {
        loop {
            // SAFETY: no argument is passed, and entries are complete before the tail moves.
            let answer = unsafe {
                self.ring
                    .submitter()
                    .enter::<libc::sigset_t>(count, 0, 0, None)
            };
            match answer {
                Ok(taken) if taken >= count as usize => return,
                Ok(_) => {
                    if self.is_submission_empty() {
                        return;
                    }
                }
                Err(error) => check_passing(&error),
            }
        }
    }

    #[allow(unsafe_code)]
    fn is_submission_empty(&self) -> bool {
        let _queues = self.queues.lock();
        // SAFETY: the lock is held, so this is the only user of the submission queue.
        unsafe { self.ring.submission_shared() }.is_empty()
    }

    /// Waits for completions and delivers them until the engine closes and all is delivered.
    fn reap(&self) {
        let mut answers = Vec::new();
        let mut finished = Vec::new();
        loop {
            self.wait(&mut answers);
            let mut started = 0;
            let is_over = {
                let mut queues = self.queues.lock();
                for (number, answer) in answers.drain(..) {
                    if number != WAKE {
                        let slot = u32::try_from(number).expect("completion of a slot");
                        started += self.take(&mut queues, slot, answer, &mut finished);
                    }
                }
                queues.is_closing && queues.free.len() == queues.slots.len()
            };
            if started > 0 {
                self.enter(started);
            }
            for (request, result) in finished.drain(..) {
                Request::finish(request, result);
            }
            if is_over {
                return;
            }
        }
    }

    /// Takes one completion in; returns how many entries were written because of it.
    fn take(
        &self,
        queues: &mut Queues<D>,
        slot: u32,
        answer: i32,
        finished: &mut Vec<(Request<D>, io::Result<()>)>,
    ) -> u32 {
        let place = &mut queues.slots[slot as usize];
        let mut request = place.take().expect("completion of a request in flight");
        let next = match request.advance(answer) {
            Step::Again => Some(request),
            Step::Finished(result) => {
                finished.push((request, result));
                queues.overflow.pop_front()
            }
        };
        match next {
            Some(request) => {
                self.start(queues, slot, request);
                1
            }
            None => {
                queues.free.push(slot);
                0
            }
        }
    }

    /// Blocks until at least one completion is there, and takes all.
    #[allow(unsafe_code)]
    fn wait(&self, answers: &mut Vec<(u64, i32)>) {
        while answers.is_empty() {
            // SAFETY: no argument is passed.
            let entered = unsafe {
                self.ring
                    .submitter()
                    .enter::<libc::sigset_t>(0, 1, ENTER_GETEVENTS, None)
            };
            if let Err(error) = entered {
                check_passing(&error);
            }
            // SAFETY: only the reaper calls this, so it is the only user of the completion queue.
            let completions = unsafe { self.ring.completion_shared() };
            answers.extend(completions.map(|one| (one.user_data(), one.result())));
        }
    }
}

/// The kernel asks to come again when a signal came, or while it has no memory or room.
fn check_passing(error: &io::Error) {
    match error.raw_os_error() {
        Some(libc::EINTR) => {}
        Some(libc::EAGAIN | libc::EBUSY) => thread::yield_now(),
        _ => panic!("the kernel refuses a ring that it made: {error}"),
    }
}

/// The submission entry for what is left of a request.
#[allow(unsafe_code)]
fn entry_of<D: Delivery>(request: &mut Request<D>) -> squeue::Entry {
    let file = types::Fd(request.delivery.descriptor());
    let done = request.done;
    let Some(buffer) = request.buffer.as_mut() else {
        return opcode::Fsync::new(file)
            .flags(types::FsyncFlags::DATASYNC)
            .build();
    };
    let offset = request.offset + done as u64;
    let length = u32::try_from(buffer.len() - done)
        .map_or(TRANSFER_BYTES_MAX, |left| left.min(TRANSFER_BYTES_MAX));
    // SAFETY: `done` is below the buffer's length.
    let address = unsafe { buffer.as_mut_ptr().add(done) };
    match request.action {
        Action::Write { is_durable } => {
            let flags = if is_durable { libc::RWF_DSYNC } else { 0 };
            opcode::Write::new(file, address, length)
                .offset(offset)
                .rw_flags(flags)
                .build()
        }
        Action::Read | Action::Sync => opcode::Read::new(file, address, length)
            .offset(offset)
            .build(),
    }
}
