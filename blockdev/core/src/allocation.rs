//! An allocator that counts, for programs that bound how much memory hostile bytes can claim. It
//! counts only where a program makes it the global one.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);
static PEAK_BYTES: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, with a count of the bytes in use.
#[derive(Clone, Copy, Debug, Default)]
pub struct CountingAllocator;

fn grown(bytes: usize) {
    let live = LIVE_BYTES.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK_BYTES.fetch_max(live, Ordering::Relaxed);
}

fn shrunk(bytes: usize) {
    LIVE_BYTES.fetch_sub(bytes, Ordering::Relaxed);
}

#[allow(unsafe_code)]
// SAFETY: every call goes to the system's allocator with the caller's own arguments, and its
// answer goes back unchanged; the counting touches nothing but two atomics.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller promises what `System` asks for.
        let place = unsafe { System.alloc(layout) };
        if !place.is_null() {
            grown(layout.size());
        }
        place
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller promises what `System` asks for.
        let place = unsafe { System.alloc_zeroed(layout) };
        if !place.is_null() {
            grown(layout.size());
        }
        place
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        shrunk(layout.size());
        // SAFETY: `place` came from `System`, with this layout, by the caller's promise.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: `place` came from `System`, with this layout, by the caller's promise.
        let moved = unsafe { System.realloc(place, layout, bytes) };
        if !moved.is_null() {
            grown(bytes);
            shrunk(layout.size());
        }
        moved
    }
}

/// Says whether this program counts.
#[must_use]
pub fn is_counting() -> bool {
    LIVE_BYTES.load(Ordering::Relaxed) > 0
}

/// Does some work; gives back the most bytes, beyond those before, that were in use meanwhile.
/// Other threads are counted as well. 0 where the program does not count.
pub fn measure<R>(work: impl FnOnce() -> R) -> (R, usize) {
    let before = LIVE_BYTES.load(Ordering::Relaxed);
    PEAK_BYTES.store(before, Ordering::Relaxed);
    let result = work();
    let peak = PEAK_BYTES.load(Ordering::Relaxed);
    (result, peak.saturating_sub(before))
}
