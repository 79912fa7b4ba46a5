//! How long frames of a stream take inside the appliance: from receipt to durable, and from durable
//! to visible.
//!
//! Invariants
//! * A frame is counted once, when the commit that makes it durable is reported.
//! * Nothing is claimed of a stream that rests: what was measured counts for a moment only.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use afterimage_blockdev::Lsn;
use parking_lot::Mutex;

/// What was measured counts for one to two of these.
const MOMENT: Duration = Duration::from_secs(1);

/// The slowest frames of a moment, in microseconds.
#[derive(Clone, Copy, Default, Debug)]
struct Slowest {
    cache_us: u64,
    apply_us: u64,
}

impl Slowest {
    fn max(self, other: Self) -> Self {
        Self {
            cache_us: self.cache_us.max(other.cache_us),
            apply_us: self.apply_us.max(other.apply_us),
        }
    }
}

#[derive(Debug)]
struct State {
    /// Last LSN and receipt of frames that are not durable. Bounded by the stream's credit.
    waiting: VecDeque<(Lsn, Instant)>,
    began: Instant,
    now: Slowest,
    before: Slowest,
}

/// The delay of one stream by stage, in milliseconds; parts count as whole ones.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct StageDelay {
    /// Received, not yet durable.
    pub cache_ms: u64,
    /// Durable, not yet visible to views.
    pub apply_ms: u64,
}

/// See the module's text.
#[derive(Debug)]
pub struct Delay {
    state: Mutex<State>,
}

fn micros(from: Instant, to: Instant) -> u64 {
    u64::try_from(to.saturating_duration_since(from).as_micros()).unwrap_or(u64::MAX)
}

impl Delay {
    /// Begins with nothing measured.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        let state = State {
            waiting: VecDeque::new(),
            began: now,
            now: Slowest::default(),
            before: Slowest::default(),
        };
        Self {
            state: Mutex::new(state),
        }
    }

    /// A frame up to `last` was received.
    pub(super) fn received(&self, last: Lsn, at: Instant) {
        self.state.lock().waiting.push_back((last, at));
    }

    /// All up to `durable` was on disk at `synced`, and is visible `now`.
    pub(super) fn durable(&self, durable: Lsn, synced: Instant, now: Instant) {
        let mut state = self.state.lock();
        state.turn(now);
        while let Some((_, received)) = state.waiting.pop_front_if(|(last, _)| *last <= durable) {
            let took = Slowest {
                cache_us: micros(received, synced),
                apply_us: micros(synced.max(received), now),
            };
            state.now = state.now.max(took);
        }
    }

    /// The slowest of this moment, what still waits included.
    #[must_use]
    pub fn stages(&self, now: Instant) -> StageDelay {
        let mut state = self.state.lock();
        state.turn(now);
        let slowest = state.now.max(state.before);
        let waits_us = state
            .waiting
            .front()
            .map_or(0, |(_, received)| micros(*received, now));
        StageDelay {
            cache_ms: slowest.cache_us.max(waits_us).div_ceil(1000),
            apply_ms: slowest.apply_us.div_ceil(1000),
        }
    }
}

impl State {
    fn turn(&mut self, now: Instant) {
        let over = now.saturating_duration_since(self.began);
        if over < MOMENT {
            return;
        }
        let is_next = over < 2 * MOMENT;
        let last = core::mem::take(&mut self.now);
        self.before = if is_next { last } else { Slowest::default() };
        self.began = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_of_a_moment_counts_and_then_nothing() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let delay = Delay::new(start);
        assert_eq!(delay.stages(at(5)), StageDelay::default());
        delay.received(Lsn(3), at(10));
        delay.received(Lsn(7), at(20));
        // What waits is as late as it has waited.
        assert_eq!(delay.stages(at(50)).cache_ms, 40);
        delay.durable(Lsn(6), at(60), at(62));
        let expected = StageDelay {
            cache_ms: 50,
            apply_ms: 2,
        };
        assert_eq!(delay.stages(at(62)), expected);
        delay.durable(Lsn(7), at(63), at(63));
        assert_eq!(delay.stages(at(900)), expected);
        // A moment later it still counts; then the stream rests.
        assert_eq!(delay.stages(at(1500)), expected);
        assert_eq!(delay.stages(at(2600)), StageDelay::default());
        assert_eq!(delay.stages(at(9000)), StageDelay::default());
    }
}
