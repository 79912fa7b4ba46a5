use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::thread;

use parking_lot::Mutex;

use super::*;
use crate::random::Random;

/// Notes who got a guard, and keeps the guards.
#[derive(Clone, Default)]
struct Desk(Arc<Mutex<Vec<(u32, RangeGuard)>>>);

impl Desk {
    fn take(&self, lock: &RangeLock, who: u32, range: Range<u64>) {
        let desk = self.clone();
        lock.lock(
            range,
            Box::new(move |guard| desk.0.lock().push((who, guard))),
        );
    }

    fn holders(&self) -> Vec<u32> {
        self.0.lock().iter().map(|(who, _)| *who).collect()
    }

    fn give_back(&self, who: u32) {
        let guard = {
            let mut held = self.0.lock();
            let index = held.iter().position(|(holder, _)| *holder == who).unwrap();
            held.remove(index)
        };
        drop(guard);
    }
}

#[test]
fn overlapping_ranges_take_turns_in_order_and_others_pass() {
    let (lock, desk) = (RangeLock::new(), Desk::default());
    desk.take(&lock, 1, 0..10);
    desk.take(&lock, 2, 5..15);
    desk.take(&lock, 3, 12..20);
    desk.take(&lock, 4, 30..40);
    desk.take(&lock, 5, 7..7);
    assert_eq!(
        desk.holders(),
        [1, 4, 5],
        "3 waits behind 2, though its bytes are free"
    );
    assert_eq!(lock.depth(), (3, 2));
    assert!(lock.try_lock(12..13).is_none() && lock.try_lock(40..50).is_some());
    desk.give_back(1);
    assert_eq!(desk.holders(), [4, 5, 2]);
    desk.give_back(2);
    assert_eq!(desk.holders(), [4, 5, 3]);
    desk.0.lock().drain(..).for_each(drop);
    assert_eq!(lock.depth(), (0, 0));
}

#[test]
fn a_long_chain_needs_no_stack() {
    let lock = RangeLock::new();
    let count = Arc::new(AtomicU64::new(0));
    let first = lock.try_lock(0..1);
    for _ in 0..2000 {
        let count = Arc::clone(&count);
        let waiter = move |_guard| {
            count.fetch_add(1, Ordering::Relaxed);
        };
        lock.lock(0..1, Box::new(waiter));
    }
    drop(first);
    assert_eq!(count.load(Ordering::Relaxed), 2000);
    let again = {
        fn next(lock: RangeLock, left: u64, done: std::sync::mpsc::Sender<()>) {
            lock.clone().lock(
                0..1,
                Box::new(move |guard| {
                    if left == 0 {
                        return done.send(()).unwrap();
                    }
                    // The next one waits for this guard, and is called when it is dropped.
                    next(lock, left - 1, done);
                    drop(guard);
                }),
            );
        }
        let (sender, receiver) = channel();
        next(lock.clone(), 100_000, sender);
        receiver
    };
    again.recv().unwrap();
    assert_eq!(lock.depth(), (0, 0));
}

#[test]
fn threads_never_hold_the_same_byte() {
    const CELLS: usize = 32;
    let lock = RangeLock::new();
    let cells: Arc<Vec<AtomicU64>> = Arc::new((0..CELLS).map(|_| AtomicU64::new(0)).collect());
    let threads: Vec<_> = (0..4)
        .map(|seed| {
            let (lock, cells) = (lock.clone(), Arc::clone(&cells));
            thread::spawn(move || {
                let mut random = Random::new(seed);
                let (sender, receiver) = channel();
                for _ in 0..3000 {
                    let start = random.index(CELLS);
                    let end = start + random.index(CELLS - start) + 1;
                    let (cells, sender) = (Arc::clone(&cells), sender.clone());
                    lock.lock(
                        start as u64..end as u64,
                        Box::new(move |guard| {
                            for cell in &cells[start..end] {
                                assert_eq!(cell.fetch_add(1, Ordering::Relaxed), 0);
                            }
                            for cell in &cells[start..end] {
                                cell.store(0, Ordering::Relaxed);
                            }
                            drop(guard);
                            sender.send(()).unwrap();
                        }),
                    );
                }
                (0..3000).for_each(|_| receiver.recv().unwrap());
            })
        })
        .collect();
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
    assert_eq!(lock.depth(), (0, 0));
}
