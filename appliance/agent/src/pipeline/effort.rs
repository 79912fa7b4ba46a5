//! How hard to compress.
//!
//! Invariants
//! * With time to spare, effort falls as more waits to be sealed.
//! * Under pressure (much waits, or the machine is busy) whichever is cheaper for the whole path is
//!   done: no compression, or the fastest. What a byte costs behind the sealer is set; what sealing
//!   costs is measured, anew now and then for the way that is not in use.

use std::time::{Duration, Instant};

use afterimage_cache::Effort;

/// The fastest compression that is tried.
const FAST: Effort = Effort::Zstd(-5);
/// What sending, receiving, checking and keeping a stored byte costs, in picoseconds of a core.
const STORED_BYTE_PS: u64 = 2000;
/// One portion of so many is done the other way, to know what that costs.
const TRIAL_EVERY: u32 = 32;
/// Busy share of the machine above which it has no time to spare, in percent.
const BUSY_PERCENT: u64 = 80;
/// How often the machine is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How hard to compress with so many bytes waiting: less, the more there are.
#[must_use]
pub fn effort_for(waiting: usize, waiting_max: usize, level_max: i32) -> Effort {
    match waiting_max / waiting.max(1) {
        0..4 => Effort::None,
        4..16 => FAST,
        16..64 => Effort::Zstd(-1),
        64..256 => Effort::Zstd(1.min(level_max)),
        _ => Effort::Zstd(level_max),
    }
}

/// The highest zstd level that this machine can spare the time for.
#[must_use]
pub fn level_for_cores(level_max: i32) -> i32 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let level = match cores {
        0..4 => 1,
        4..8 => 2,
        _ => 3,
    };
    level.min(level_max)
}

/// What a way of sealing costs for each plain byte, what follows included.
#[derive(Clone, Copy, Debug, Default)]
struct Price(Option<u64>);

impl Price {
    /// Takes a measurement in. The lowest ones are believed: what is above them was waiting.
    fn learn(&mut self, plain: u64, stored: u64, took: Duration) {
        let sealing = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let sealing = sealing.saturating_mul(1000);
        let whole = sealing.saturating_add(stored.saturating_mul(STORED_BYTE_PS));
        let price = whole / plain.max(1);
        let risen = self.0.map_or(price, |known| known + known / 8);
        self.0 = Some(price.min(risen));
    }
}

/// Decides for one sealing thread.
#[derive(Debug)]
pub struct Governor {
    waiting_max: usize,
    level_max: i32,
    machine: Busy,
    none: Price,
    fast: Price,
    pressed: u32,
}

impl Governor {
    /// Begins without any knowledge.
    #[must_use]
    pub fn new(waiting_max: usize, level_max: i32) -> Self {
        Self {
            waiting_max,
            level_max,
            machine: Busy::default(),
            none: Price::default(),
            fast: Price::default(),
            pressed: 0,
        }
    }

    /// The effort for the next portion.
    pub fn effort(&mut self, waiting: usize) -> Effort {
        let effort = effort_for(waiting, self.waiting_max, self.level_max);
        if effort == Effort::None || self.machine.is_busy() {
            return self.cheapest();
        }
        effort
    }

    fn cheapest(&mut self) -> Effort {
        self.pressed = self.pressed.wrapping_add(1);
        let is_trial = self.pressed.is_multiple_of(TRIAL_EVERY);
        match (self.none.0, self.fast.0) {
            (_, None) => FAST,
            (None, _) => Effort::None,
            (Some(none), Some(fast)) if (fast <= none) != is_trial => FAST,
            _ => Effort::None,
        }
    }

    /// A portion of `plain` bytes became `stored` ones with this effort, and took so long.
    pub fn sealed(&mut self, effort: Effort, plain: usize, stored: usize, took: Duration) {
        let (plain, stored) = (plain as u64, stored as u64);
        match effort {
            Effort::None => self.none.learn(plain, stored, took),
            FAST => self.fast.learn(plain, stored, took),
            Effort::Zstd(_) => {}
        }
    }
}

/// Says whether the machine's cores are in use, whoever it is for.
#[derive(Debug, Default)]
struct Busy {
    looked: Option<Instant>,
    /// Ticks of work and of all, at the last look.
    ticks: (u64, u64),
    is_busy: bool,
}

impl Busy {
    fn is_busy(&mut self) -> bool {
        let now = Instant::now();
        let is_due = self
            .looked
            .is_none_or(|at| now.duration_since(at) >= LOOK_EVERY);
        if is_due {
            self.looked = Some(now);
            let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
            self.look(ticks(&text).unwrap_or_default());
        }
        self.is_busy
    }

    fn look(&mut self, ticks: (u64, u64)) {
        let work = ticks.0.saturating_sub(self.ticks.0);
        let all = ticks.1.saturating_sub(self.ticks.1);
        let is_first = self.ticks.1 == 0;
        self.ticks = ticks;
        self.is_busy = !is_first && all > 0 && work * 100 >= all * BUSY_PERCENT;
    }
}

/// Ticks of work and of all, of all cores together.
fn ticks(stat: &str) -> Option<(u64, u64)> {
    let fields = stat.lines().next()?.strip_prefix("cpu ")?;
    let fields: Vec<u64> = fields
        .split_whitespace()
        .map_while(|field| field.parse().ok())
        .take(8)
        .collect();
    let all: u64 = fields.iter().sum();
    let idle = fields.get(3)? + fields.get(4)?;
    Some((all - idle, all))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn the_cheaper_way_is_taken_under_pressure_and_the_other_tried_now_and_then() {
        let count = |fast_ms: u64, fast_bytes: usize| {
            let mut governor = Governor::new(MIB, 3);
            let mut fast = 0;
            for _ in 0..320 {
                let effort = governor.effort(MIB);
                let (took, stored) = match effort {
                    Effort::None => (1, MIB),
                    _ => (fast_ms, fast_bytes),
                };
                fast += usize::from(effort == FAST);
                governor.sealed(effort, MIB, stored, Duration::from_millis(took));
            }
            fast
        };
        // 1 ms and 2 ms for 1 MiB, against 2 ms and 1 ms: the same, and 2 ms more decides.
        assert_eq!(
            count(1, MIB / 2),
            309,
            "halved for nothing: all but the trials"
        );
        assert_eq!(
            count(4, MIB / 2),
            11,
            "halved for too much: the trials only"
        );
        assert_eq!(count(2, MIB), 11, "time for nothing");
    }

    #[test]
    fn a_busy_machine_is_known_from_what_passed_between_two_looks() {
        let stat = "cpu  100 0 100 800 0 0 0 0 7 7\ncpu0 1\n";
        assert_eq!(ticks(stat), Some((200, 1000)));
        assert_eq!(ticks("intr 1"), None);
        let mut busy = Busy::default();
        let looks = [
            ((900, 1000), false),
            ((980, 1100), true),
            ((990, 1200), false),
            ((990, 1200), false),
        ];
        for (ticks, is_busy) in looks {
            busy.look(ticks);
            assert_eq!(busy.is_busy, is_busy, "{ticks:?}");
        }
    }
}
