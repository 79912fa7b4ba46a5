//! Keeps writes that fill whole blocks apart from writes that change parts of blocks.
//!
//! A write that changes part of a block reads the block, changes it and writes it back. Any
//! other write to the block in between would be lost, so that such a write runs alone. Whole
//! writes, which is all that a loop device sends, run side by side and pay one short lock.
//!
//! Invariants:
//! * while one that needs to be alone runs, no other runs;
//! * they start in the order of their arrival, so that none waits for ever;
//! * only one thread at a time starts what waits, so that the stack stays flat.
//!
//! What waits is bounded by what the kernel has in flight: `max_background` and one per thread
//! that writes.

use std::collections::VecDeque;

use parking_lot::Mutex;

type Start = Box<dyn FnOnce() + Send>;

enum Waiting {
    Shared(Start),
    Alone(Start),
}

#[derive(Default)]
struct State {
    shared_count: usize,
    is_alone: bool,
    is_starting: bool,
    waiting: VecDeque<Waiting>,
}

/// The gate of one device; everything that changes it passes here.
#[derive(Default)]
pub(super) struct WriteGate {
    state: Mutex<State>,
}

impl WriteGate {
    /// Runs `start` now, or when those before are through. [`Self::leave_shared`] must follow.
    pub(super) fn enter_shared(&self, start: impl FnOnce() + Send + 'static) {
        {
            let mut state = self.state.lock();
            if state.is_alone || !state.waiting.is_empty() {
                state.waiting.push_back(Waiting::Shared(Box::new(start)));
                return;
            }
            state.shared_count += 1;
        }
        start();
    }

    /// Ends what [`Self::enter_shared`] began.
    pub(super) fn leave_shared(&self) {
        let is_awaited = {
            let mut state = self.state.lock();
            assert!(state.shared_count > 0, "a write left the gate twice");
            state.shared_count -= 1;
            state.shared_count == 0 && !state.waiting.is_empty()
        };
        if is_awaited {
            self.start_waiting();
        }
    }

    /// Runs `start` alone, as soon as those before are through. [`Self::leave_alone`] must follow.
    pub(super) fn enter_alone(&self, start: impl FnOnce() + Send + 'static) {
        self.state
            .lock()
            .waiting
            .push_back(Waiting::Alone(Box::new(start)));
        self.start_waiting();
    }

    /// Ends what [`Self::enter_alone`] began.
    pub(super) fn leave_alone(&self) {
        {
            let mut state = self.state.lock();
            assert!(state.is_alone, "a write that was not alone left the gate");
            state.is_alone = false;
        }
        self.start_waiting();
    }

    /// Starts all that may run now. Whoever finds another thread at it leaves the work to that
    /// one, which looks again after each start.
    fn start_waiting(&self) {
        let mut state = self.state.lock();
        if state.is_starting {
            return;
        }
        state.is_starting = true;
        while let Some(start) = Self::next(&mut state) {
            drop(state);
            start();
            state = self.state.lock();
        }
        state.is_starting = false;
    }

    fn next(state: &mut State) -> Option<Start> {
        let may_start = match state.waiting.front()? {
            Waiting::Shared(_) => !state.is_alone,
            Waiting::Alone(_) => !state.is_alone && state.shared_count == 0,
        };
        if !may_start {
            return None;
        }
        match state.waiting.pop_front()? {
            Waiting::Shared(start) => {
                state.shared_count += 1;
                Some(start)
            }
            Waiting::Alone(start) => {
                state.is_alone = true;
                Some(start)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn note(log: &Arc<Mutex<Vec<&'static str>>>, what: &'static str) -> impl FnOnce() + use<> {
        let log = Arc::clone(log);
        move || log.lock().push(what)
    }

    #[test]
    fn one_that_is_alone_waits_for_those_before_and_holds_those_after() {
        let gate = WriteGate::default();
        let log = Arc::new(Mutex::new(Vec::new()));
        gate.enter_shared(note(&log, "a"));
        gate.enter_shared(note(&log, "b"));
        gate.enter_alone(note(&log, "alone"));
        gate.enter_shared(note(&log, "c"));
        assert_eq!(*log.lock(), ["a", "b"]);
        gate.leave_shared();
        assert_eq!(*log.lock(), ["a", "b"]);
        gate.leave_shared();
        assert_eq!(*log.lock(), ["a", "b", "alone"]);
        gate.leave_alone();
        assert_eq!(*log.lock(), ["a", "b", "alone", "c"]);
        gate.leave_shared();
        gate.enter_shared(note(&log, "d"));
        assert_eq!(log.lock().len(), 5);
    }

    #[test]
    fn many_that_end_at_once_need_no_stack() {
        let gate = Arc::new(WriteGate::default());
        let count = Arc::new(AtomicUsize::new(0));
        gate.enter_shared(|| {});
        for _ in 0..100_000 {
            let (inner, count) = (Arc::clone(&gate), Arc::clone(&count));
            gate.enter_alone(move || {
                count.fetch_add(1, Ordering::Relaxed);
                inner.leave_alone();
            });
        }
        assert_eq!(count.load(Ordering::Relaxed), 0);
        gate.leave_shared();
        assert_eq!(count.load(Ordering::Relaxed), 100_000);
    }

    #[test]
    fn threads_never_meet_inside_when_one_is_alone() {
        let gate = Arc::new(WriteGate::default());
        let inside = Arc::new(AtomicUsize::new(0));
        let done = Arc::new(AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (gate, inside, done) =
                    (Arc::clone(&gate), Arc::clone(&inside), Arc::clone(&done));
                scope.spawn(move || {
                    for turn in 0..2000 {
                        let (gate2, inside, done) =
                            (Arc::clone(&gate), Arc::clone(&inside), Arc::clone(&done));
                        if (turn + thread) % 3 == 0 {
                            gate.enter_alone(move || {
                                assert_eq!(inside.fetch_add(1000, Ordering::SeqCst), 0);
                                inside.fetch_sub(1000, Ordering::SeqCst);
                                done.fetch_add(1, Ordering::SeqCst);
                                gate2.leave_alone();
                            });
                        } else {
                            gate.enter_shared(move || {
                                assert!(inside.fetch_add(1, Ordering::SeqCst) < 1000);
                                inside.fetch_sub(1, Ordering::SeqCst);
                                done.fetch_add(1, Ordering::SeqCst);
                                gate2.leave_shared();
                            });
                        }
                    }
                });
            }
        });
        assert_eq!(done.load(Ordering::SeqCst), 8000);
    }
}
