//! Exclusive byte ranges, first come, first served among those that overlap; nobody blocks.
//!
//! Always true:
//! * No two held ranges overlap; an empty range overlaps nothing.
//! * A waiter's count of blockers is the number of held ranges, and of waiters before it, that
//!   overlap it; it holds its range when the count reaches zero. So those that overlap are served
//!   in the order in which they came.
//! * Waiters run without the lock, and never within one another on one thread: a chain of any
//!   length takes the stack of one.
//!
//! The number of waiters is bounded by the requests that its users let in.

use core::cell::RefCell;
use core::fmt;
use core::ops::Range;
use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

/// Called with the range's guard when it is held.
pub type RangeWaiter = Box<dyn FnOnce(RangeGuard) + Send>;

struct Waiting {
    number: u64,
    range: Range<u64>,
    blockers: usize,
    waiter: RangeWaiter,
}

#[derive(Default)]
struct State {
    held: Vec<(u64, Range<u64>)>,
    waiting: VecDeque<Waiting>,
    next_number: u64,
}

/// The ranges of one disk. Clones share them.
#[derive(Clone, Default)]
pub struct RangeLock {
    state: Arc<Mutex<State>>,
}

/// Holds a range until it is dropped, on any thread; then those who waited for it alone are
/// called, on that thread.
pub struct RangeGuard {
    lock: RangeLock,
    number: u64,
    range: Range<u64>,
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start.max(b.start) < a.end.min(b.end)
}

impl State {
    fn blockers(&self, range: &Range<u64>) -> usize {
        let held = self
            .held
            .iter()
            .filter(|(_, held)| overlap(held, range))
            .count();
        let waiting = self
            .waiting
            .iter()
            .filter(|waiting| overlap(&waiting.range, range))
            .count();
        held + waiting
    }

    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    /// Ends a hold; returns those who hold their ranges now.
    fn release(&mut self, number: u64, range: &Range<u64>) -> Vec<Waiting> {
        let position = self.held.iter().position(|(held, _)| *held == number);
        self.held
            .swap_remove(position.expect("a guard's range is held"));
        let mut ready = Vec::new();
        let mut index = 0;
        while index < self.waiting.len() {
            let waiting = &mut self.waiting[index];
            // Whoever overlaps a held range came after it, so this hold was counted.
            if overlap(&waiting.range, range) {
                waiting.blockers -= 1;
            }
            if waiting.blockers == 0 {
                let waiting = self.waiting.remove(index).expect("index is within");
                self.held.push((waiting.number, waiting.range.clone()));
                ready.push(waiting);
            } else {
                index += 1;
            }
        }
        ready
    }
}

impl RangeLock {
    /// Makes a lock with nothing held.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a range: calls the waiter at once when it is free and nobody waits for a part of it,
    /// else when it is this waiter's turn, from whatever thread drops the last guard before it.
    pub fn lock(&self, range: Range<u64>, waiter: RangeWaiter) {
        let guard = {
            let mut state = self.state.lock();
            let number = state.number();
            let blockers = state.blockers(&range);
            if blockers > 0 {
                state.waiting.push_back(Waiting {
                    number,
                    range,
                    blockers,
                    waiter,
                });
                return;
            }
            state.held.push((number, range.clone()));
            RangeGuard {
                lock: self.clone(),
                number,
                range,
            }
        };
        waiter(guard);
    }

    /// Takes a range if [`Self::lock`] would call its waiter at once.
    #[must_use]
    pub fn try_lock(&self, range: Range<u64>) -> Option<RangeGuard> {
        let mut state = self.state.lock();
        if state.blockers(&range) > 0 {
            return None;
        }
        let number = state.number();
        state.held.push((number, range.clone()));
        Some(RangeGuard {
            lock: self.clone(),
            number,
            range,
        })
    }

    /// Number of ranges held and of those waited for.
    #[must_use]
    pub fn depth(&self) -> (usize, usize) {
        let state = self.state.lock();
        (state.held.len(), state.waiting.len())
    }
}

impl RangeGuard {
    /// The range that is held.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let ready = self.lock.state.lock().release(self.number, &self.range);
        run(ready.into_iter().map(
            |Waiting {
                 number,
                 range,
                 waiter,
                 ..
             }| {
                (
                    waiter,
                    RangeGuard {
                        lock: self.lock.clone(),
                        number,
                        range,
                    },
                )
            },
        ));
    }
}

impl fmt::Debug for RangeGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RangeGuard({:?})", self.range)
    }
}

type Ready = (RangeWaiter, RangeGuard);

thread_local! {
    /// Those to be called by the outermost `run` of this thread, if one is at work.
    static READY: RefCell<Option<VecDeque<Ready>>> = const { RefCell::new(None) };
}

/// Calls waiters one after another; from within a waiter it leaves them to the outer call.
fn run(ready: impl Iterator<Item = Ready>) {
    let ready: VecDeque<Ready> = ready.collect();
    if ready.is_empty() {
        return;
    }
    let is_outermost = READY.with_borrow_mut(|queue| match queue {
        Some(queue) => {
            queue.extend(ready);
            false
        }
        None => {
            *queue = Some(ready);
            true
        }
    });
    if !is_outermost {
        return;
    }
    loop {
        let next = READY.with_borrow_mut(|queue| {
            let next = queue.as_mut().and_then(VecDeque::pop_front);
            if next.is_none() {
                *queue = None;
            }
            next
        });
        let Some((waiter, guard)) = next else { return };
        waiter(guard);
    }
}

#[cfg(test)]
mod tests;
