//! The thread that writes the activity logs of all disks, and flushes their sources.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use afterimage_blockdev::{BlockCompleter, BlockCompletion, BlockDevice, BlockOp, Token};
use parking_lot::{Condvar, Mutex};

use super::{Activity, UnmarkPlan};
use crate::config::{ActivityConfig, ms};

/// Wakes the worker.
#[derive(Default)]
pub struct Bell {
    is_rung: Mutex<bool>,
    rung: Condvar,
}

impl Bell {
    /// Wakes the worker, now or as soon as it looks.
    pub fn ring(&self) {
        let mut is_rung = self.is_rung.lock();
        if !core::mem::replace(&mut *is_rung, true) {
            self.rung.notify_one();
        }
    }

    /// Waits until it is rung or the time has come.
    pub(crate) fn wait_until(&self, until: Instant) {
        let mut is_rung = self.is_rung.lock();
        while !*is_rung {
            if self.rung.wait_until(&mut is_rung, until).timed_out() {
                break;
            }
        }
        *is_rung = false;
    }
}

struct Entry {
    activity: Arc<Activity>,
    source: Arc<dyn BlockDevice>,
    is_flushing: Arc<AtomicBool>,
}

struct Shared {
    bell: Arc<Bell>,
    entries: Mutex<Vec<Entry>>,
    is_stopping: AtomicBool,
    config: ActivityConfig,
}

/// See the module's text. Dropping it ends the thread after one last round.
pub struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(config: ActivityConfig) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            bell: Arc::default(),
            entries: Mutex::new(Vec::new()),
            is_stopping: AtomicBool::new(false),
            config,
        });
        let thread = std::thread::Builder::new()
            .name("activity".to_owned())
            .spawn({
                let shared = Arc::clone(&shared);
                move || shared.run()
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// What wakes it.
    #[must_use]
    pub fn bell(&self) -> Arc<Bell> {
        Arc::clone(&self.shared.bell)
    }

    /// Takes care of one more log.
    pub fn add(&self, activity: Arc<Activity>, source: Arc<dyn BlockDevice>) {
        let entry = Entry {
            activity,
            source,
            is_flushing: Arc::default(),
        };
        self.shared.entries.lock().push(entry);
        self.shared.bell.ring();
    }

    /// Forgets a log.
    pub fn remove(&self, activity: &Arc<Activity>) {
        self.shared
            .entries
            .lock()
            .retain(|entry| !Arc::ptr_eq(&entry.activity, activity));
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.is_stopping.store(true, Ordering::Release);
        self.shared.bell.ring();
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

impl Shared {
    fn run(&self) {
        let interval = ms(self.config.flush_interval_ms);
        let mut next = Instant::now() + interval;
        loop {
            self.bell.wait_until(next);
            let is_stopping = self.is_stopping.load(Ordering::Acquire);
            let is_tick = Instant::now() >= next;
            if is_tick {
                next = Instant::now() + interval;
            }
            let entries: Vec<_> = {
                let entries = self.entries.lock();
                let parts = |entry: &Entry| {
                    let (activity, source) = (&entry.activity, &entry.source);
                    let is_flushing = Arc::clone(&entry.is_flushing);
                    (Arc::clone(activity), Arc::clone(source), is_flushing)
                };
                entries.iter().map(parts).collect()
            };
            for (activity, source, is_flushing) in entries {
                activity.commit();
                if is_tick {
                    self.tick(&activity, source.as_ref(), is_flushing);
                }
            }
            if is_stopping {
                return;
            }
        }
    }

    fn tick(
        &self,
        activity: &Arc<Activity>,
        source: &dyn BlockDevice,
        is_flushing: Arc<AtomicBool>,
    ) {
        activity.advance();
        let idle_ticks = self.config.idle_ms.div_ceil(self.config.flush_interval_ms);
        let plan = activity.plan_unmark(idle_ticks, self.config.marked_bytes_max);
        if plan.is_empty() || is_flushing.swap(true, Ordering::AcqRel) {
            return;
        }
        let flushed = Flushed {
            activity: Arc::clone(activity),
            plan,
            is_flushing,
            bell: Arc::clone(&self.bell),
        };
        source.submit(Token(0), BlockOp::Flush, Arc::new(flushed));
    }
}

struct Flushed {
    activity: Arc<Activity>,
    plan: UnmarkPlan,
    is_flushing: Arc<AtomicBool>,
    bell: Arc<Bell>,
}

impl BlockCompleter for Flushed {
    fn complete(&self, completion: BlockCompletion) {
        match completion.result {
            Ok(_) => {
                self.activity.unmark(&self.plan);
                self.bell.ring();
            }
            Err(error) => tracing::warn!(%error, "the source cannot be flushed; marks stay"),
        }
        self.is_flushing.store(false, Ordering::Release);
    }
}

/// Flushes a source now and unmarks everything that may be, whatever its age. For an orderly stop.
///
/// # Errors
/// What the source says to the flush.
pub fn settle(
    activity: &Activity,
    source: &dyn BlockDevice,
) -> Result<(), afterimage_blockdev::BlockError> {
    let plan = activity.plan_unmark(0, u64::MAX);
    if !plan.is_empty() {
        afterimage_blockdev::wait::device(source, BlockOp::Flush)?;
        activity.unmark(&plan);
    }
    activity.commit();
    Ok(())
}
