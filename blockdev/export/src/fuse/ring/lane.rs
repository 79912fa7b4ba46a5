//! What one ring thread shares with those who answer: its entries, and the list of answers that
//! are to be handed to the kernel.
//!
//! Invariants:
//! * only the ring thread submits; others list what they answered, and wake it if it sleeps;
//! * an entry is listed at most once between two requests, so that the list never outgrows the
//!   entries;
//! * an entry in the hands of the kernel has no [`Entry`].

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use afterimage_blockdev::IoBuffer;
use parking_lot::Mutex;

use super::memory::{HEADER_BYTES, Memory};
use crate::fuse::request::IoDone;
use crate::fuse::wire::OUT_HEADER_BYTES;
use crate::sys;

/// What an entry keeps from one request to the next.
struct Slot {
    /// The kernel's queue that it belongs to.
    queue: u16,
    completer: Arc<IoDone>,
    spare: Mutex<Option<IoBuffer>>,
}

/// The entries of one ring thread.
pub(super) struct Lane {
    memory: Memory,
    slots: Vec<Slot>,
    answered: Mutex<Vec<u16>>,
    is_sleeping: AtomicBool,
    is_closed: AtomicBool,
    wake: File,
}

impl Lane {
    /// Makes entries; `queues` names the kernel's queue of each.
    pub(super) fn new(queues: &[u16], payload_bytes: usize) -> io::Result<Arc<Self>> {
        let slot = |queue: &u16| Slot {
            queue: *queue,
            completer: Arc::default(),
            spare: Mutex::default(),
        };
        Ok(Arc::new(Self {
            memory: Memory::map(queues.len(), payload_bytes)?,
            slots: queues.iter().map(slot).collect(),
            answered: Mutex::new(Vec::with_capacity(queues.len())),
            is_sleeping: AtomicBool::new(false),
            is_closed: AtomicBool::new(false),
            wake: sys::event()?,
        }))
    }

    /// The entries by number, and the queue of each.
    pub(super) fn entries(&self) -> impl Iterator<Item = (u16, u16)> + '_ {
        (0..).zip(self.slots.iter().map(|slot| slot.queue))
    }

    pub(super) fn queue_of(&self, index: u16) -> u16 {
        self.slot(index).queue
    }

    fn slot(&self, index: u16) -> &Slot {
        &self.slots[usize::from(index)]
    }

    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Readable after each wake-up.
    pub(super) fn wake_event(&self) -> &File {
        &self.wake
    }

    fn wake(&self) {
        // It is full after 2^64 wake-ups only.
        if let Err(error) = (&self.wake).write(&1_u64.to_le_bytes()) {
            tracing::error!(%error, "a ring thread cannot be woken");
        }
    }

    /// Moves what was answered to the end of `to`.
    pub(super) fn take_answered(&self, to: &mut Vec<u16>) {
        to.append(&mut self.answered.lock());
    }

    /// Announces that the ring thread is about to sleep; false when there is something to do.
    pub(super) fn may_sleep(&self) -> bool {
        self.is_sleeping.store(true, Ordering::SeqCst);
        if self.answered.lock().is_empty() {
            return true;
        }
        self.awake();
        false
    }

    /// Announces that the ring thread is awake.
    pub(super) fn awake(&self) {
        self.is_sleeping.store(false, Ordering::SeqCst);
    }

    /// The connection has ended: answers are of no use any more.
    pub(super) fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
        // Asleep or not: it may have looked just before.
        self.wake();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst)
    }
}

/// An entry that holds a request which was not answered yet.
pub(in crate::fuse) struct Entry {
    lane: Arc<Lane>,
    index: u16,
}

#[allow(unsafe_code)]
impl Entry {
    /// Takes an entry over from the kernel.
    ///
    /// # Safety
    /// The kernel has completed the entry's last command, and nobody else has taken it since.
    pub(super) unsafe fn take(lane: &Arc<Lane>, index: u16) -> Self {
        Self {
            lane: Arc::clone(lane),
            index,
        }
    }

    /// The header of the request.
    pub(super) fn header(&self) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        // SAFETY: this is the owner of the entry, by `take`.
        unsafe { self.lane.memory.read_header(self.index, &mut header) };
        header
    }

    /// Copies the first bytes of the request's payload.
    pub(super) fn read_payload(&self, bytes: &mut [u8]) {
        // SAFETY: this is the owner of the entry, by `take`.
        unsafe { self.lane.memory.read_payload(self.index, bytes) };
    }

    fn slot(&self) -> &Slot {
        self.lane.slot(self.index)
    }

    /// A buffer of `bytes` bytes with any content.
    pub(in crate::fuse) fn buffer(&self, bytes: usize) -> IoBuffer {
        match self.slot().spare.lock().take() {
            Some(mut spare) if spare.capacity() >= bytes => {
                spare.set_len(bytes);
                spare
            }
            _ => IoBuffer::zeroed(bytes),
        }
    }

    /// Keeps a buffer for the next request.
    pub(in crate::fuse) fn give_back(&self, buffer: IoBuffer) {
        if buffer.capacity() <= self.lane.memory.payload_bytes() {
            *self.slot().spare.lock() = Some(buffer);
        }
    }

    pub(in crate::fuse) fn completer(&self) -> Arc<IoDone> {
        Arc::clone(&self.slot().completer)
    }

    /// Answers the request; `error` is 0 or a negative error number.
    pub(in crate::fuse) fn answer(self, unique: u64, error: i32, body: &[u8]) {
        self.write(unique, error, body);
        self.finish();
    }

    /// Answers the request with a part of a buffer, and keeps that for the next one.
    pub(in crate::fuse) fn answer_from(self, unique: u64, buffer: IoBuffer, part: Range<usize>) {
        self.write(unique, 0, buffer.get(part).unwrap_or_default());
        self.give_back(buffer);
        self.finish();
    }

    fn write(&self, unique: u64, error: i32, body: &[u8]) {
        let fits = body.len() <= self.lane.memory.payload_bytes();
        let (error, body) = if fits {
            (error, body)
        } else {
            (-libc::EIO, &[][..])
        };
        let length = u32::try_from(body.len()).unwrap_or(0);
        let mut header = [0; OUT_HEADER_BYTES];
        let header_bytes = 16;
        header[..4].copy_from_slice(&(length.saturating_add(header_bytes)).to_le_bytes());
        header[4..8].copy_from_slice(&error.to_le_bytes());
        header[8..].copy_from_slice(&unique.to_le_bytes());
        // SAFETY: this is the owner of the entry, by `take`.
        unsafe {
            self.lane
                .memory
                .write_answer(self.index, &header, length, body);
        }
    }

    fn finish(self) {
        self.lane.answered.lock().push(self.index);
        if self.lane.is_sleeping.swap(false, Ordering::SeqCst) {
            self.lane.wake();
        }
    }
}
