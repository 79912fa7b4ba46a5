//! What all rings of one connection share.
//!
//! Invariant: nothing outlives [`Gone`]. A completion of the device may hold a session a little
//! longer than its answer; the last owner of a device may have to wait for it, and so must never
//! be one of the device's own threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use afterimage_blockdev::{BlockDevice, IoBuffer};
use parking_lot::Mutex;
use vhost_user_backend::ShutdownHandle;

use crate::SharedMemory;
use crate::budget::Budget;
use crate::chain::Broken;

/// Buffers up to this size are used again.
const SPARE_BYTES_MAX: usize = 128 << 10;
/// So many of them are kept.
const SPARES_MAX: usize = 64;

/// One connection.
pub(crate) struct Session {
    pub(crate) device: Arc<dyn BlockDevice>,
    pub(crate) memory: SharedMemory,
    pub(crate) budget: Budget,
    /// The guest does not flush: every write is durable when it is answered.
    is_write_through: AtomicBool,
    pub(crate) life: Arc<Life>,
    spares: Mutex<Vec<IoBuffer>>,
    // The last field, so that it goes after the device.
    _alive: Sender<()>,
}

/// Whether a connection goes on, and why not.
#[derive(Default)]
pub(crate) struct Life {
    is_over: AtomicBool,
    is_closed: AtomicBool,
    end: Mutex<End>,
}

/// Waits until nobody has a session any more.
pub(crate) struct Gone(Receiver<()>);

impl Gone {
    pub(crate) fn wait(self) {
        // Nothing is ever sent: it ends with the sender.
        let _ended = self.0.recv();
    }
}

#[derive(Default)]
struct End {
    reason: Option<Broken>,
    handle: Option<ShutdownHandle>,
}

impl Session {
    pub(crate) fn new(
        device: Arc<dyn BlockDevice>,
        memory: SharedMemory,
        budget: Budget,
    ) -> (Arc<Self>, Gone) {
        let (alive, gone) = channel();
        let session = Arc::new(Self {
            device,
            memory,
            budget,
            is_write_through: AtomicBool::new(false),
            life: Arc::default(),
            spares: Mutex::default(),
            _alive: alive,
        });
        (session, Gone(gone))
    }

    /// Ends the threads. The connection has ended before.
    pub(crate) fn close(&self) {
        self.life.is_over.store(true, Ordering::Release);
        self.life.is_closed.store(true, Ordering::Release);
        self.budget.wake();
    }

    pub(crate) fn set_write_through(&self, is_write_through: bool) {
        self.is_write_through
            .store(is_write_through, Ordering::Release);
    }

    pub(crate) fn is_write_through(&self) -> bool {
        self.is_write_through.load(Ordering::Acquire)
    }

    /// A buffer of `bytes` bytes, whatever they are.
    pub(crate) fn buffer(&self, bytes: usize) -> IoBuffer {
        let spare = self.spares.lock().pop();
        match spare {
            Some(mut buffer) if buffer.capacity() >= bytes => {
                buffer.set_len(bytes);
                buffer
            }
            _ => IoBuffer::zeroed(bytes),
        }
    }

    /// Takes a buffer back.
    pub(crate) fn give_back(&self, buffer: IoBuffer) {
        if buffer.capacity() > SPARE_BYTES_MAX {
            return;
        }
        let mut spares = self.spares.lock();
        if spares.len() < SPARES_MAX {
            spares.push(buffer);
        }
    }
}

impl Life {
    /// Nothing is taken from a ring any more.
    pub(crate) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire)
    }

    /// Ends the connection, because the guest broke a ring.
    pub(crate) fn fail(&self, reason: Broken) {
        let mut end = self.end.lock();
        if end.reason.is_none() {
            tracing::warn!(%reason, "a guest's disk is taken away");
            end.reason = Some(reason);
        }
        self.is_over.store(true, Ordering::Release);
        if let Some(handle) = &end.handle {
            handle.shutdown();
        }
    }

    /// Says how the connection can be ended; done at once when it should have been already.
    pub(crate) fn can_be_ended_by(&self, handle: Option<ShutdownHandle>) {
        let mut end = self.end.lock();
        end.handle = handle;
        if let (true, Some(handle)) = (self.is_over(), &end.handle) {
            handle.shutdown();
        }
    }

    /// Ends the connection, for no fault of the guest.
    pub(crate) fn end(&self) {
        let end = self.end.lock();
        self.is_over.store(true, Ordering::Release);
        if let Some(handle) = &end.handle {
            handle.shutdown();
        }
    }

    /// The threads shall end.
    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }

    /// Why it was ended, if the guest is to blame.
    pub(crate) fn reason(&self) -> Option<Broken> {
        self.end.lock().reason
    }
}
