//! Time and chance that a test sets.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::clock::{Clock, Entropy, Monotonic, Timestamp, nanoseconds};
use crate::random::Random;

/// A clock that moves only when it is told to.
#[derive(Debug, Default)]
pub struct SimulatedClock {
    monotonic: AtomicU64,
    wall: AtomicU64,
}

impl SimulatedClock {
    /// Starts at a wall time; the clock that never steps starts at zero.
    #[must_use]
    pub fn new(wall: Timestamp) -> Self {
        Self {
            monotonic: AtomicU64::new(0),
            wall: AtomicU64::new(wall.0),
        }
    }

    /// Lets time pass on both clocks.
    pub fn advance(&self, time: Duration) {
        let time = nanoseconds(time);
        self.monotonic.fetch_add(time, Ordering::Relaxed);
        self.wall.fetch_add(time, Ordering::Relaxed);
    }

    /// Steps the wall clock, forwards or back.
    pub fn set_wall(&self, wall: Timestamp) {
        self.wall.store(wall.0, Ordering::Relaxed);
    }

    /// Sets the clock that never steps; a test that sets it back stands for a restart.
    pub fn set_monotonic(&self, monotonic: Monotonic) {
        self.monotonic.store(monotonic.0, Ordering::Relaxed);
    }
}

impl Clock for SimulatedClock {
    fn monotonic(&self) -> Monotonic {
        Monotonic(self.monotonic.load(Ordering::Relaxed))
    }

    fn wall(&self) -> Timestamp {
        Timestamp(self.wall.load(Ordering::Relaxed))
    }
}

/// Randomness that repeats.
#[derive(Debug)]
pub struct SeededEntropy {
    random: Mutex<Random>,
}

impl SeededEntropy {
    /// Starts the sequence of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            random: Mutex::new(Random::new(seed)),
        }
    }
}

impl Entropy for SeededEntropy {
    fn fill(&self, bytes: &mut [u8]) {
        self.random.lock().fill(bytes);
    }
}
