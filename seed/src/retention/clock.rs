//! The time that retention locks trust.
//!
//! A wall clock can be set, and a monotonic clock ends with the program; a lock that believed
//! either alone could be opened by a wrong date or never. So a lock is over when both are: the
//! wall clock has passed its end, and the store has lived through its duration.
//!
//! Invariants
//! * `Elapsed` counts time that has really passed: the monotonic clock while the program runs, and
//!   the wall clock's advance while it was down, when that is at most [`DOWNTIME_MAX`]. Time whose
//!   passing is in doubt is not counted, nor what was not recorded before a crash when the wall
//!   clock was set back meanwhile: a lock may last longer than its date, never shorter.
//! * The *line* is where the wall clock should be: where it was trusted last, and all monotonic
//!   time since. A wall clock behind the line only lets locks end later. One that is ahead of it
//!   by more than [`JUMP_MIN`] and 1 % of that time freezes the clock. So does an advance of more
//!   than [`DOWNTIME_MAX`] over a downtime.
//! * While the clock is frozen no lock ends and nothing is thinned, over restarts too, until an
//!   operator says that the wall clock is right. That adds nothing to `Elapsed`.
//! * The line moves up to the wall clock only at a start, at an operator's word, and once a day
//!   while both agree; never back but by that word. So small steps cannot add up to more than 1 %,
//!   and a jump is measured against a day at most.

use core::time::Duration;

use afterimage_blockdev::clock::nanoseconds;
use afterimage_blockdev::{Monotonic, Timestamp};

/// Least jump of the wall clock that freezes.
pub const JUMP_MIN: Duration = Duration::from_secs(300);
/// Longest downtime that is believed.
pub const DOWNTIME_MAX: Duration = Duration::from_secs(3 * 86_400);
/// How often the line begins anew, at a wall clock that agrees with it.
const AGREE_EVERY: Duration = Duration::from_secs(86_400);

/// Nanoseconds that a store has lived through, as far as is known.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Elapsed(pub u64);

impl Elapsed {
    fn after(self, later: Duration) -> Self {
        Self(self.0.saturating_add(nanoseconds(later)))
    }
}

/// When a point may be deleted again: when both are reached.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Lock {
    /// By the wall clock.
    pub until: Timestamp,
    /// By the time lived through.
    pub elapsed_until: Elapsed,
}

impl Lock {
    /// Both locks at once.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            until: self.until.max(other.until),
            elapsed_until: self.elapsed_until.max(other.elapsed_until),
        }
    }
}

/// What is durable of a clock.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct ClockRecord {
    /// The wall clock, or where it should be while it is not trusted.
    pub wall: Timestamp,
    /// Time lived through by then.
    pub elapsed: Elapsed,
    /// The wall clock is not trusted.
    pub is_frozen: bool,
}

/// The clock of a running store.
#[derive(Clone, Debug)]
pub struct LockClock {
    /// Where the line begins.
    line: (Timestamp, Monotonic),
    /// The last reading.
    wall: Timestamp,
    monotonic: Monotonic,
    elapsed: Elapsed,
    is_frozen: bool,
}

impl LockClock {
    /// Starts, from what was recorded last.
    #[must_use]
    pub fn start(recorded: Option<ClockRecord>, wall: Timestamp, monotonic: Monotonic) -> Self {
        let recorded = recorded.unwrap_or(ClockRecord {
            wall,
            ..ClockRecord::default()
        });
        let downtime = Duration::from_nanos(wall.0.saturating_sub(recorded.wall.0));
        let is_frozen = recorded.is_frozen || downtime > DOWNTIME_MAX;
        let (elapsed, line) = if is_frozen {
            (recorded.elapsed, recorded.wall)
        } else {
            (recorded.elapsed.after(downtime), wall.max(recorded.wall))
        };
        Self {
            line: (line, monotonic),
            wall,
            monotonic,
            elapsed,
            is_frozen,
        }
    }

    /// Takes a reading of both clocks; true when it freezes the clock.
    pub fn observe(&mut self, wall: Timestamp, monotonic: Monotonic) -> bool {
        let monotonic = monotonic.max(self.monotonic);
        let passed = monotonic.since(self.monotonic);
        self.elapsed = self.elapsed.after(passed);
        self.monotonic = monotonic;
        self.wall = wall;
        if self.is_frozen {
            return false;
        }
        let since_line = monotonic.since(self.line.1);
        let tolerance = JUMP_MIN.max(since_line / 100);
        if self.ahead() > tolerance {
            self.is_frozen = true;
        } else if since_line >= AGREE_EVERY {
            self.line = (wall.max(self.expected()), monotonic);
        }
        self.is_frozen
    }

    /// An operator says that the wall clock is right.
    pub fn confirm(&mut self) {
        self.is_frozen = false;
        self.line = (self.wall, self.monotonic);
    }

    /// The wall clock is not trusted.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.is_frozen
    }

    /// Time lived through.
    #[must_use]
    pub fn elapsed(&self) -> Elapsed {
        self.elapsed
    }

    /// Where the wall clock should be.
    #[must_use]
    pub fn expected(&self) -> Timestamp {
        let passed = nanoseconds(self.monotonic.since(self.line.1));
        Timestamp(self.line.0.0.saturating_add(passed))
    }

    /// How far the wall clock is ahead of where it should be.
    #[must_use]
    pub fn ahead(&self) -> Duration {
        Duration::from_nanos(self.wall.0.saturating_sub(self.expected().0))
    }

    /// The time by which things become old; `None` while it is not trusted.
    #[must_use]
    pub fn trusted(&self) -> Option<Timestamp> {
        (!self.is_frozen).then_some(self.wall)
    }

    /// A lock from now on, for a duration.
    #[must_use]
    pub fn lock_for(&self, duration: Duration) -> Lock {
        let until = self.wall.0.saturating_add(nanoseconds(duration));
        Lock {
            until: Timestamp(until),
            elapsed_until: self.elapsed.after(duration),
        }
    }

    /// A lock from now on, until a time; `None` when that is past.
    #[must_use]
    pub fn lock_until(&self, until: Timestamp) -> Option<Lock> {
        // Of two readings in doubt, the one that makes the lock longer.
        let now = if self.is_frozen {
            self.wall.min(self.expected())
        } else {
            self.wall
        };
        let duration = until.0.checked_sub(now.0).filter(|left| *left > 0)?;
        let elapsed_until = self.elapsed.after(Duration::from_nanos(duration));
        Some(Lock {
            until,
            elapsed_until,
        })
    }

    /// Says whether a lock still holds.
    #[must_use]
    pub fn holds(&self, lock: Lock) -> bool {
        self.is_frozen || self.wall < lock.until || self.elapsed < lock.elapsed_until
    }

    /// What must pass before a lock ends, besides an operator's word.
    #[must_use]
    pub fn left(&self, lock: Lock) -> Duration {
        let by_wall = lock.until.0.saturating_sub(self.wall.0);
        let by_elapsed = lock.elapsed_until.0.saturating_sub(self.elapsed.0);
        Duration::from_nanos(by_wall.max(by_elapsed))
    }

    /// What is to be recorded.
    #[must_use]
    pub fn record(&self) -> ClockRecord {
        ClockRecord {
            wall: self.trusted().unwrap_or_else(|| self.expected()),
            elapsed: self.elapsed,
            is_frozen: self.is_frozen,
        }
    }
}
