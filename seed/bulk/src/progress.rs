//! How far work is, and the order to stop.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Shared between a bulk thread and whoever watches it.
#[derive(Debug, Default)]
pub struct Progress {
    total: AtomicU64,
    position: AtomicU64,
    moved: AtomicU64,
    is_stopping: AtomicBool,
}

impl Progress {
    /// Bytes of the whole disk; 0 before that is known.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Everything below this byte of the disk is done.
    #[must_use]
    pub fn position_bytes(&self) -> u64 {
        self.position.load(Ordering::Relaxed)
    }

    /// Bytes that were read.
    #[must_use]
    pub fn moved_bytes(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }

    /// Asks the work to stop: what is under way is waited for, and made durable.
    pub fn stop(&self) {
        self.is_stopping.store(true, Ordering::Relaxed);
    }

    /// Says whether somebody asked to stop.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Relaxed)
    }

    pub(crate) fn begin(&self, total: u64, position: u64) {
        self.total.store(total, Ordering::Relaxed);
        self.position.store(position, Ordering::Relaxed);
        self.moved.store(0, Ordering::Relaxed);
    }

    pub(crate) fn reached(&self, position: u64) {
        self.position.fetch_max(position, Ordering::Relaxed);
    }

    pub(crate) fn moved(&self, bytes: u64) {
        self.moved.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// What was done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// Bytes of the disk.
    pub size_bytes: u64,
    /// Bytes read from the source, in this run.
    pub read_bytes: u64,
    /// Bytes written to the target, in this run.
    pub written_bytes: u64,
    /// Where an earlier run had stopped; 0 when there was none.
    pub resumed_at: u64,
}
