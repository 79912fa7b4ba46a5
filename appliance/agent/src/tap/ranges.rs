//! Serialises overlapping writes without making anybody wait on a thread.
//!
//! Invariants
//! * No two holders overlap.
//! * A range that waits is passed by no later one that overlaps it, so nobody starves.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

/// Goes on when what it waited for has happened. Called without any lock.
pub trait Resume: Send + Sync {
    /// Goes on.
    fn resume(self: Arc<Self>);
}

struct Waiter {
    range: Range<u64>,
    who: Arc<dyn Resume>,
}

#[derive(Default)]
struct State {
    held: Vec<Range<u64>>,
    waiting: VecDeque<Waiter>,
}

/// Locks over byte ranges of one disk.
#[derive(Default)]
pub struct RangeLock {
    state: Mutex<State>,
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl RangeLock {
    /// Takes a range. When that is not possible now, `who` resumes as soon as it holds it.
    /// Returns whether it is held now.
    pub fn lock<R: Resume + 'static>(&self, range: Range<u64>, who: &Arc<R>) -> bool {
        let mut state = self.state.lock();
        let is_free = !state.held.iter().any(|held| overlap(held, &range))
            && !state
                .waiting
                .iter()
                .any(|waiter| overlap(&waiter.range, &range));
        if is_free {
            state.held.push(range);
        } else {
            let who: Arc<dyn Resume> = Arc::<R>::clone(who);
            state.waiting.push_back(Waiter { range, who });
        }
        is_free
    }

    /// Gives a range back. Returns those who hold theirs now; the caller resumes them.
    ///
    /// # Panics
    /// When the range is not held.
    #[must_use]
    pub fn unlock(&self, range: &Range<u64>) -> Vec<Arc<dyn Resume>> {
        let mut state = self.state.lock();
        let place = state.held.iter().position(|held| held == range);
        state
            .held
            .swap_remove(place.expect("an unlocked range was held"));
        if state.waiting.is_empty() {
            Vec::new()
        } else {
            state.promote()
        }
    }
}

impl State {
    fn promote(&mut self) -> Vec<Arc<dyn Resume>> {
        let mut ready = Vec::new();
        let mut still = VecDeque::with_capacity(self.waiting.len());
        for waiter in self.waiting.drain(..) {
            let range = &waiter.range;
            let is_free = !self.held.iter().any(|held| overlap(held, range))
                && !still
                    .iter()
                    .any(|earlier: &Waiter| overlap(&earlier.range, range));
            if is_free {
                self.held.push(waiter.range);
                ready.push(waiter.who);
            } else {
                still.push_back(waiter);
            }
        }
        self.waiting = still;
        ready
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    struct Count(AtomicUsize);

    impl Resume for Count {
        fn resume(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn who() -> Arc<Count> {
        Arc::new(Count(AtomicUsize::new(0)))
    }

    #[test]
    fn disjoint_ranges_do_not_wait() {
        let lock = RangeLock::default();
        assert!(lock.lock(0..4096, &who()));
        assert!(lock.lock(4096..8192, &who()));
    }

    #[test]
    fn a_later_range_does_not_pass_a_waiting_one() {
        let lock = RangeLock::default();
        assert!(lock.lock(0..8192, &who()));
        let wide = who();
        assert!(!lock.lock(4096..16384, &wide));
        let narrow = who();
        assert!(
            !lock.lock(12288..16384, &narrow),
            "it overlaps one that waits"
        );
        for ready in lock.unlock(&(0..8192)) {
            ready.resume();
        }
        assert_eq!(wide.0.load(Ordering::Relaxed), 1);
        assert_eq!(narrow.0.load(Ordering::Relaxed), 0);
        for ready in lock.unlock(&(4096..16384)) {
            ready.resume();
        }
        assert_eq!(narrow.0.load(Ordering::Relaxed), 1);
    }
}
