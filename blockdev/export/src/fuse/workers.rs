//! A few threads for what may take some milliseconds, away from the threads that carry data.
//!
//! Invariants:
//! * at most `capacity` jobs wait; one more runs in the thread that brings it;
//! * all jobs have run when the pool is gone.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

type Work = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Work>,
    is_closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    capacity: usize,
}

/// The pool.
pub(super) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts `threads` threads.
    pub(super) fn start(threads: usize, capacity: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            changed: Condvar::new(),
            capacity,
        });
        let mut workers = Self {
            shared,
            threads: Vec::with_capacity(threads),
        };
        for index in 0..threads {
            let shared = Arc::clone(&workers.shared);
            let thread = std::thread::Builder::new()
                .name(format!("tree-{index}"))
                .spawn(move || shared.work())?;
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    /// Hands a job over.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        {
            let mut queue = self.shared.queue.lock();
            if queue.waiting.len() < self.shared.capacity && !queue.is_closed {
                queue.waiting.push_back(Box::new(job));
                drop(queue);
                self.shared.changed.notify_one();
                return;
            }
        }
        job();
    }
}

impl Shared {
    fn work(&self) {
        while let Some(job) = self.next() {
            job();
        }
    }

    fn next(&self) -> Option<Work> {
        let mut queue = self.queue.lock();
        loop {
            if let Some(job) = queue.waiting.pop_front() {
                return Some(job);
            }
            if queue.is_closed {
                return None;
            }
            self.changed.wait(&mut queue);
        }
    }
}

impl Workers {
    /// Ends the threads, after what waits has run. Later jobs run in the thread that brings them.
    pub(super) fn stop(&mut self) {
        self.shared.queue.lock().is_closed = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the tree panicked");
            }
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_full_pool_runs_the_job_in_place_and_loses_none() {
        let workers = Workers::start(1, 1).expect("threads");
        let (release, gate) = channel::<()>();
        let (began, begun) = channel::<()>();
        let count = Arc::new(AtomicUsize::new(0));
        workers.run(move || {
            began.send(()).expect("the test waits");
            gate.recv().expect("the test releases");
        });
        begun.recv().expect("the worker has begun");
        for expected in [0, 1, 2] {
            let count2 = Arc::clone(&count);
            workers.run(move || {
                count2.fetch_add(1, Ordering::SeqCst);
            });
            assert_eq!(count.load(Ordering::SeqCst), expected);
        }
        release.send(()).expect("the worker waits");
        drop(workers);
        assert_eq!(count.load(Ordering::SeqCst), 3);
    }
}
