//! Counts the writes that pass a tap uncaptured, so that capture can begin behind the last one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use afterimage_blockdev::{BlockCompleter, BlockCompletion};
use parking_lot::Mutex;

const CLOSED: u64 = 1 << 63;

/// The count, and whether it may still rise.
#[derive(Default)]
pub(super) struct Passing {
    count: AtomicU64,
    settled: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Passing {
    /// Counts one in; false once closed.
    pub(super) fn enter(&self) -> bool {
        if self.count.fetch_add(1, Ordering::AcqRel) & CLOSED == 0 {
            return true;
        }
        self.leave();
        false
    }

    fn leave(&self) {
        if self.count.fetch_sub(1, Ordering::AcqRel) == CLOSED | 1 {
            self.settle();
        }
    }

    fn settle(&self) {
        let settled = self.settled.lock().take();
        if let Some(settled) = settled {
            settled();
        }
    }

    /// Lets nobody in any more; calls `settled` when the last one is out.
    pub(super) fn close(&self, settled: Box<dyn FnOnce() + Send>) {
        *self.settled.lock() = Some(settled);
        if self.count.fetch_or(CLOSED, Ordering::AcqRel) == 0 {
            self.settle();
        }
    }
}

/// Counts a write out when it has completed.
pub(super) struct PassingCompleter {
    pub(super) passing: Arc<Passing>,
    pub(super) to: Arc<dyn BlockCompleter>,
}

impl BlockCompleter for PassingCompleter {
    fn complete(&self, completion: BlockCompletion) {
        self.to.complete(completion);
        self.passing.leave();
    }
}
