//! Threads that take jobs from a bounded queue.
//!
//! Always true: a job that was accepted is performed, also when the owner goes; a job that does
//! not fit is handed back.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use parking_lot::{Condvar, Mutex};

struct Queue<T> {
    state: Mutex<State<T>>,
    arrived: Condvar,
    jobs_max: usize,
}

struct State<T> {
    jobs: VecDeque<T>,
    is_closing: bool,
}

impl<T> Queue<T> {
    /// Waits for a job; `None` when the owner is gone and all is done.
    fn pop(&self) -> Option<T> {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            if state.is_closing {
                return None;
            }
            self.arrived.wait(&mut state);
        }
    }
}

/// The threads and their queue. Dropping it waits until all jobs are done.
pub(super) struct Workers<T: Send + 'static> {
    queue: Arc<Queue<T>>,
    threads: Vec<JoinHandle<()>>,
}

impl<T: Send + 'static> Workers<T> {
    /// Starts `count` threads that call `perform` for each job.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub(super) fn start(
        name: &str,
        count: usize,
        jobs_max: usize,
        perform: impl Fn(T) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let state = State {
            jobs: VecDeque::new(),
            is_closing: false,
        };
        let queue = Arc::new(Queue {
            state: Mutex::new(state),
            arrived: Condvar::new(),
            jobs_max,
        });
        let perform = Arc::new(perform);
        let mut workers = Self {
            queue,
            threads: Vec::new(),
        };
        for _ in 0..count.max(1) {
            let queue = Arc::clone(&workers.queue);
            let perform = Arc::clone(&perform);
            let thread = thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || {
                    while let Some(job) = queue.pop() {
                        perform(job);
                    }
                })?;
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    /// Queues a job, or hands it back when the queue is full.
    pub(super) fn submit(&self, job: T) -> Result<(), T> {
        let mut state = self.queue.state.lock();
        if state.jobs.len() >= self.queue.jobs_max {
            return Err(job);
        }
        state.jobs.push_back(job);
        drop(state);
        self.queue.arrived.notify_one();
        Ok(())
    }
}

impl<T: Send + 'static> Drop for Workers<T> {
    fn drop(&mut self) {
        self.queue.state.lock().is_closing = true;
        self.queue.arrived.notify_all();
        let current = thread::current().id();
        for thread in self.threads.drain(..) {
            // The last owner may be a completer on one of the threads.
            if thread.thread().id() != current {
                assert!(thread.join().is_ok(), "a completer panicked on a worker");
            }
        }
    }
}
