//! Bounds the bytes between the taps and the sealers. Who finds no room waits, without a thread,
//! until sealers have made some. Sealing never waits for the link, so nobody waits for it here.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::ranges::Resume;

/// See the module's text.
pub struct Admission {
    used: AtomicUsize,
    bytes_max: usize,
    waiting: Mutex<VecDeque<(usize, Arc<dyn Resume>)>>,
    waiting_count: AtomicUsize,
}

impl Admission {
    /// Lets up to `bytes_max` bytes in; more than that for a single request that is larger.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        Self {
            used: AtomicUsize::new(0),
            bytes_max,
            waiting: Mutex::new(VecDeque::new()),
            waiting_count: AtomicUsize::new(0),
        }
    }

    /// Bytes that were let in.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    fn try_take(&self, bytes: usize) -> bool {
        let take =
            |used: usize| (used == 0 || used + bytes <= self.bytes_max).then(|| used + bytes);
        self.used
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, take)
            .is_ok()
    }

    /// Lets `bytes` in. When there is no room, `who` resumes as soon as there is. Returns whether
    /// they are in now.
    pub fn enter<R: Resume + 'static>(&self, bytes: usize, who: &Arc<R>) -> bool {
        if self.waiting_count.load(Ordering::Acquire) == 0 && self.try_take(bytes) {
            return true;
        }
        let mut waiting = self.waiting.lock();
        self.waiting_count.fetch_add(1, Ordering::AcqRel);
        // Between the first try and the lock everybody may have left.
        if waiting.is_empty() && self.try_take(bytes) {
            self.waiting_count.fetch_sub(1, Ordering::AcqRel);
            return true;
        }
        let who: Arc<dyn Resume> = Arc::<R>::clone(who);
        waiting.push_back((bytes, who));
        false
    }

    /// Whoever came in with `entered` bytes leaves `kept` behind for somebody else to let out.
    pub fn settle(&self, entered: usize, kept: usize) {
        if kept <= entered {
            self.leave(entered - kept);
        } else {
            self.used.fetch_add(kept - entered, Ordering::AcqRel);
        }
    }

    /// Lets bytes out, and those in who waited for the room.
    pub fn leave(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::AcqRel);
        if self.waiting_count.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut ready = Vec::new();
        {
            let mut waiting = self.waiting.lock();
            while let Some((bytes, _)) = waiting.front() {
                if !self.try_take(*bytes) {
                    break;
                }
                ready.extend(waiting.pop_front().map(|(_, who)| who));
                self.waiting_count.fetch_sub(1, Ordering::AcqRel);
            }
        }
        for who in ready {
            who.resume();
        }
    }
}
