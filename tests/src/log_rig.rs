//! A log on a simulated medium, driven from one thread.

use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::simulated::SimulatedStorage;
use afterimage_blockdev::{
    Monotonic, Storage, StorageCompleter, StorageCompletion, StoreId, Token,
};
use afterimage_cache::Frame;
use afterimage_cache::log::{Log, LogInput, LogOptions, LogOutput};
use parking_lot::Mutex;

use crate::report::{count_step, count_turn};

/// The store of every log in these tests.
pub const STORE: StoreId = StoreId([0x51; 16]);

#[derive(Default)]
struct Inbox(Mutex<Vec<StorageCompletion>>);

impl StorageCompleter for Inbox {
    fn complete(&self, completion: StorageCompletion) {
        self.0.lock().push(completion);
    }
}

/// A log, its medium, and what it said that was not yet looked at.
pub struct LogRig {
    /// The medium.
    pub storage: Arc<SimulatedStorage>,
    /// The log.
    pub log: Log,
    /// What the log said, without storage operations and wake-ups.
    pub said: Vec<LogOutput>,
    inbox: Arc<Inbox>,
    now: Monotonic,
    wake_at: Option<Monotonic>,
}

/// Usual values for a small log.
#[must_use]
pub fn small_options(segment_bytes: u64, seals: bool) -> LogOptions {
    LogOptions {
        segment_bytes,
        reserve_bytes: 0,
        commit_bytes_max: segment_bytes / 4,
        seals,
        ..LogOptions::new("log", STORE)
    }
}

impl LogRig {
    /// Puts a new log on a medium.
    #[must_use]
    pub fn new(storage: Arc<SimulatedStorage>, options: LogOptions) -> Self {
        Self {
            storage,
            log: Log::new(options),
            said: Vec::new(),
            inbox: Arc::default(),
            now: Monotonic(1),
            wake_at: None,
        }
    }

    /// Gives the log one input.
    pub fn step(&mut self, input: LogInput) {
        let mut out = Vec::new();
        count_step();
        self.log.step(self.now, input, &mut out);
        for output in out {
            match output {
                LogOutput::Storage(token, op) => {
                    let inbox: Arc<dyn StorageCompleter> = Arc::<Inbox>::clone(&self.inbox);
                    self.storage.submit(token, op, inbox);
                }
                LogOutput::WakeAt(at) => {
                    self.wake_at = Some(self.wake_at.map_or(at, |wake| wake.min(at)));
                }
                other => self.said.push(other),
            }
        }
    }

    /// Appends a frame.
    pub fn append(&mut self, token: u64, frame: Frame) {
        let token = Token(token);
        self.step(LogInput::Append { token, frame });
    }

    /// Performs one storage operation and brings its completion back; false when none can be.
    pub fn run_one(&mut self) -> bool {
        let has_run = count_turn(self.storage.run_one());
        let completions = core::mem::take(&mut *self.inbox.0.lock());
        for completion in completions {
            self.step(LogInput::Storage(completion));
        }
        has_run
    }

    /// Performs storage operations until none is left.
    pub fn run(&mut self) {
        while self.run_one() {}
    }

    /// Lets time pass.
    pub fn pass(&mut self, time: Duration) {
        self.now = self.now.after(time);
        self.wake_at = None;
        self.step(LogInput::Tick);
    }

    /// Lets time pass until the log wants to be woken; false when it does not.
    pub fn wake(&mut self) -> bool {
        let Some(at) = self.wake_at.take() else {
            return false;
        };
        self.now = self.now.max(at);
        self.step(LogInput::Tick);
        true
    }

    /// Takes what the log said.
    pub fn heard(&mut self) -> Vec<LogOutput> {
        core::mem::take(&mut self.said)
    }
}
