//! How much a disk writes, measured: stored bytes by time, and how much of that was written over
//! within a span. All in whole numbers, so that it can be recorded and goes on after a restart.
//!
//! Invariants
//! * Only time in which the store ran counts, from the disk's first write on.
//! * What is older than twice [`HORIZON`] weighs less and less: all weights are halved together.
//! * A sketch holds at most [`SAMPLE_MAX`] cells, whatever is written.

use std::collections::BTreeSet;
use std::time::Duration;

use afterimage_blockdev::Monotonic;
use afterimage_blockdev::clock::nanoseconds;

/// Spans over which it is measured how much is written over.
pub const SPANS: [Duration; 3] = [
    Duration::from_secs(300),
    Duration::from_secs(3600),
    Duration::from_secs(86_400),
];
/// Time after which what was measured weighs less.
pub const HORIZON: Duration = Duration::from_secs(6 * 3600);
/// Cells that a sketch samples at most.
const SAMPLE_MAX: usize = 1024;
/// A span that is not over yet counts from this on.
const PARTIAL_MIN: Duration = Duration::from_secs(5);

/// `a * b / c` without overflow; 0 when `c` is.
#[must_use]
pub fn scaled(a: u64, b: u64, c: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product
        .checked_div(u128::from(c))
        .map_or(0, |result| u64::try_from(result).unwrap_or(u64::MAX))
}

/// Stored bytes, and the blocks that they stand for.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Stored {
    /// Bytes, with all that a slot needs.
    pub bytes: u64,
    /// Blocks of 4096 bytes.
    pub blocks: u64,
}

impl Stored {
    fn add(&mut self, bytes: u64, blocks: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.blocks = self.blocks.saturating_add(blocks);
    }
}

/// What was measured of a disk, as it is recorded.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct ChurnRecord {
    /// Weighted time of measuring, in nanoseconds.
    pub measured_ns: u64,
    /// Weighted stored bytes of that time.
    pub bytes: u64,
    /// Weighted slots of that time.
    pub slots: u64,
    /// All that was ever written.
    pub data: Stored,
    /// All that ever came as bulk.
    pub bulk: Stored,
    /// Bytes of the cells that are written at least once in each of [`SPANS`]; 0 before it was
    /// measured.
    pub distinct: [u64; SPANS.len()],
}

impl ChurnRecord {
    /// Stored bytes written in a span at this churn.
    #[must_use]
    pub fn written_in(&self, span: Duration) -> u64 {
        scaled(self.bytes, nanoseconds(span), self.measured_ns)
    }

    /// Stored bytes of blocks, as it was on average; as much as the blocks before the first.
    #[must_use]
    pub fn stored_bytes(&self, blocks: u64, is_bulk: bool) -> u64 {
        let (first, second) = if is_bulk {
            (self.bulk, self.data)
        } else {
            (self.data, self.bulk)
        };
        let known = if first.blocks > 0 { first } else { second };
        if known.blocks == 0 {
            return blocks.saturating_mul(4096);
        }
        scaled(known.bytes, blocks, known.blocks)
    }
}

/// Counts cells, each once: it samples those whose hash is low enough for all to fit.
#[derive(Clone, Debug)]
struct Sketch {
    began: Monotonic,
    sample: BTreeSet<u64>,
    /// Each cell of the sample stands for 2 to this power.
    level: u32,
}

impl Sketch {
    fn new(began: Monotonic) -> Self {
        Self {
            began,
            sample: BTreeSet::new(),
            level: 0,
        }
    }

    fn note(&mut self, cell: u64) {
        let hash = mix(cell);
        if hash.trailing_zeros() < self.level {
            return;
        }
        self.sample.insert(hash);
        while self.sample.len() > SAMPLE_MAX && self.level < 63 {
            self.level += 1;
            let level = self.level;
            self.sample.retain(|hash| hash.trailing_zeros() >= level);
        }
    }

    fn count(&self) -> u64 {
        (self.sample.len() as u64) << self.level.min(48)
    }
}

fn mix(cell: u64) -> u64 {
    let mut hash = cell.wrapping_add(0x9e37_79b9_7f4a_7c15);
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// The churn of a disk as it is being measured.
#[derive(Clone, Debug)]
pub struct Churn {
    record: ChurnRecord,
    /// Up to when time was counted; `None` before the first write of this run.
    counted: Option<Monotonic>,
    sketches: Option<[Sketch; SPANS.len()]>,
    /// Bytes that were stored in this run, never less than before.
    stored_bytes: u64,
}

impl Churn {
    /// Goes on from what was recorded.
    #[must_use]
    pub fn new(record: ChurnRecord) -> Self {
        Self {
            record,
            counted: None,
            sketches: None,
            stored_bytes: 0,
        }
    }

    /// Counts a write of cells that were stored as so many slots.
    pub fn written(&mut self, now: Monotonic, stored: Stored, cells: impl Iterator<Item = u64>) {
        self.advance(now);
        self.counted.get_or_insert(now);
        let start = || core::array::from_fn(|_| Sketch::new(now));
        let sketches = self.sketches.get_or_insert_with(start);
        for cell in cells {
            self.record.slots = self.record.slots.saturating_add(1);
            for sketch in sketches.iter_mut() {
                sketch.note(cell);
            }
        }
        self.record.bytes = self.record.bytes.saturating_add(stored.bytes);
        self.record.data.add(stored.bytes, stored.blocks);
        self.stored_bytes = self.stored_bytes.saturating_add(stored.bytes);
    }

    /// Counts bulk, which is no churn.
    pub fn copied(&mut self, stored: Stored) {
        self.record.bulk.add(stored.bytes, stored.blocks);
        self.stored_bytes = self.stored_bytes.saturating_add(stored.bytes);
    }

    /// Lets time pass.
    pub fn advance(&mut self, now: Monotonic) {
        let (Some(counted), Some(sketches)) = (self.counted, &mut self.sketches) else {
            return;
        };
        let record = &mut self.record;
        record.measured_ns = record
            .measured_ns
            .saturating_add(nanoseconds(now.since(counted)));
        self.counted = Some(counted.max(now));
        for ((sketch, span), known) in sketches.iter_mut().zip(SPANS).zip(&mut record.distinct) {
            let age = now.since(sketch.began);
            if age < span {
                continue;
            }
            let bytes = scaled(sketch.count(), record.bytes, record.slots);
            // Of a longer time, so much for a span.
            let bytes = scaled(bytes, nanoseconds(span), nanoseconds(age));
            *known = if *known == 0 {
                bytes
            } else {
                (*known / 4).saturating_mul(3).saturating_add(bytes / 4)
            };
            *sketch = Sketch::new(now);
        }
        while record.measured_ns > 2 * nanoseconds(HORIZON) {
            record.measured_ns /= 2;
            record.bytes /= 2;
            record.slots = record.slots.div_ceil(2);
        }
    }

    /// What is known, for the record.
    #[must_use]
    pub fn record(&self) -> &ChurnRecord {
        &self.record
    }

    /// Bytes that were stored in this run.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.stored_bytes
    }

    /// Stored bytes of all that is written at least once in a span: what two points so far apart
    /// keep between them. Never more than all that is written; a span longer than any that was
    /// measured counts as several.
    #[must_use]
    pub fn distinct_in(&self, span: Duration) -> u64 {
        let record = &self.record;
        let mut least = record.written_in(span);
        let asked = nanoseconds(span);
        let mut bound = |length: Duration, bytes: u64| {
            let length = nanoseconds(length);
            least = least.min(bytes.max(scaled(bytes, asked, length)));
        };
        for (span, bytes) in SPANS.into_iter().zip(record.distinct) {
            if bytes > 0 {
                bound(span, bytes);
            }
        }
        if let (Some(sketches), Some(now)) = (&self.sketches, self.counted) {
            for sketch in sketches {
                let age = now.since(sketch.began);
                if age >= PARTIAL_MIN {
                    bound(age, scaled(sketch.count(), record.bytes, record.slots));
                }
            }
        }
        least
    }
}

impl Default for Churn {
    fn default() -> Self {
        Self::new(ChurnRecord::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const STORED: Stored = Stored {
        bytes: 2000,
        blocks: 1,
    };

    /// Writes one cell each second, of `cells` in turn.
    fn churned(seconds: u64, cells: u64) -> Churn {
        let mut churn = Churn::default();
        for second in 0..seconds {
            let at = Monotonic(second * SECOND);
            churn.written(at, STORED, core::iter::once(second % cells));
        }
        churn.advance(Monotonic(seconds * SECOND));
        churn
    }

    #[test]
    fn constant_churn_is_measured_and_repeated_cells_count_once() {
        let churn = churned(7200, 100);
        let day = churn.record().written_in(Duration::from_secs(86_400));
        assert_eq!(day, 86_400 * 2000);
        // In five minutes as in a day, it is always the same hundred.
        assert_eq!(churn.distinct_in(SPANS[0]), 100 * 2000);
        let hours = churn.distinct_in(Duration::from_secs(2 * 3600));
        assert!((100 * 2000..=3 * 100 * 2000).contains(&hours), "{hours}");
        assert_eq!(churn.distinct_in(Duration::from_secs(10)), 10 * 2000);
        assert_eq!(churn.record().stored_bytes(10, false), 20_000);
        assert_eq!(churn.record().stored_bytes(10, true), 20_000);
    }

    #[test]
    fn many_cells_are_counted_to_a_few_percent_within_bounded_memory() {
        let mut sketch = Sketch::new(Monotonic(0));
        for cell in 0..1_000_000 {
            sketch.note(cell % 200_000);
        }
        assert!(sketch.sample.len() <= SAMPLE_MAX);
        let count = sketch.count();
        assert!((170_000..230_000).contains(&count), "{count}");
    }

    #[test]
    fn a_record_goes_on_and_old_churn_fades() {
        let before = churned(40_000, 50);
        assert!(before.record().measured_ns <= 2 * nanoseconds(HORIZON));
        let mut churn = Churn::new(*before.record());
        assert_eq!(churn.distinct_in(SPANS[1]), before.distinct_in(SPANS[1]));
        // A day of rest, after which hardly anything is left of it.
        churn.written(Monotonic(0), STORED, core::iter::once(1));
        for hour in 0..48 {
            churn.advance(Monotonic(hour * 3600 * SECOND));
        }
        let (then, now) = (before.record(), churn.record());
        let day = Duration::from_secs(86_400);
        assert!(now.written_in(day) < then.written_in(day) / 4, "{now:?}");
    }
}
