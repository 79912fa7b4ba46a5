//! How much of a guest's requests may be in memory.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use vmm_sys_util::event::EventNotifier;

/// Bytes of requests in flight on one connection, and who waits for fewer.
///
/// Invariant: a thread that stopped taking requests because of the budget is woken when there is
/// room again: it says so in `is_awaited` before it looks at the budget for the last time, and
/// who gives back looks at `is_awaited` afterwards.
pub(crate) struct Budget {
    used: AtomicUsize,
    most: usize,
    is_awaited: AtomicBool,
    wakers: Vec<EventNotifier>,
}

impl Budget {
    pub(crate) fn new(most: usize, wakers: Vec<EventNotifier>) -> Self {
        Self {
            used: AtomicUsize::new(0),
            most,
            is_awaited: AtomicBool::new(false),
            wakers,
        }
    }

    fn is_full(&self) -> bool {
        self.used.load(Ordering::SeqCst) >= self.most
    }

    /// Says whether another request may be taken. After a no the caller is woken.
    pub(crate) fn has_room(&self) -> bool {
        if !self.is_full() {
            return true;
        }
        self.is_awaited.store(true, Ordering::SeqCst);
        !self.is_full()
    }

    pub(crate) fn take(&self, bytes: usize) {
        self.used.fetch_add(bytes, Ordering::SeqCst);
    }

    pub(crate) fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::SeqCst);
        if !self.is_full() && self.is_awaited.swap(false, Ordering::SeqCst) {
            self.wake();
        }
    }

    /// Wakes all threads.
    pub(crate) fn wake(&self) {
        for waker in &self.wakers {
            if let Err(error) = waker.notify() {
                // Only a full counter does this, and then the thread is awake anyway.
                tracing::debug!(%error, "a thread of rings is not woken");
            }
        }
    }
}
