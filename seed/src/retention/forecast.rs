//! What history will take: from measured churn and a policy to bytes, and to the time that is left.
//!
//! Every single write is kept for the journal window; of the time before it, in which only points
//! are kept, what is written at least once between two of them. A disk that grows, and named
//! points, come on top.

use std::time::Duration;

use afterimage_blockdev::Timestamp;
use afterimage_blockdev::clock::nanoseconds;

use super::Policy;
use super::churn::{Churn, scaled};

/// A disk with what is asked for it.
#[derive(Clone, Copy, Debug)]
pub struct Keeping<'a> {
    /// The machine's policy.
    pub policy: &'a Policy,
    /// The disk's churn.
    pub churn: &'a Churn,
    /// How far back its history goes now.
    pub held: Duration,
}

impl Keeping<'_> {
    /// Bytes of all that is no longer the newest state, when history goes back so far.
    #[must_use]
    pub fn history_bytes(&self, age: Duration) -> u64 {
        let window = self.policy.journal_window;
        let written = |span: Duration| self.churn.record().written_in(span);
        let mut bytes = written(age.min(window));
        let mut covered = window;
        for tier in &self.policy.tiers {
            if tier.keep_for <= covered {
                continue;
            }
            let span = age.min(tier.keep_for).saturating_sub(covered);
            let between = self.churn.distinct_in(tier.interval);
            let of_tier = scaled(between, nanoseconds(span), nanoseconds(tier.interval));
            // Points never keep more than every write.
            bytes = bytes.saturating_add(of_tier.min(written(span)));
            covered = tier.keep_for;
        }
        bytes
    }

    /// The same with a history that takes no more than it does: what was thinned is not held.
    #[must_use]
    pub fn no_older_than(self, history_bytes: u64) -> Self {
        let (mut low, mut high) = (0, self.held.as_secs());
        while low < high {
            let middle = low + (high - low) / 2;
            if self.history_bytes(Duration::from_secs(middle)) < history_bytes {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let held = Duration::from_secs(low).min(self.held);
        Self { held, ..self }
    }

    /// Bytes of history once the policy is filled.
    #[must_use]
    pub fn full_bytes(&self) -> u64 {
        self.history_bytes(reach(self.policy))
    }

    fn more_bytes(&self, after: Duration) -> u64 {
        let later = self.history_bytes(self.held.saturating_add(after));
        later.saturating_sub(self.history_bytes(self.held))
    }
}

/// How far back a policy reaches.
#[must_use]
pub fn reach(policy: &Policy) -> Duration {
    let tiers = policy.tiers.iter().map(|tier| tier.keep_for);
    tiers.fold(policy.journal_window, Duration::max)
}

/// After how long history takes more than the bytes that are left; `None` when it never does.
#[must_use]
pub fn lasts(disks: &[Keeping<'_>], left_bytes: u64) -> Option<Duration> {
    let fits = |after: Duration| {
        let more = disks.iter().map(|disk| disk.more_bytes(after));
        more.fold(0, u64::saturating_add) <= left_bytes
    };
    let longest = disks.iter().map(|disk| reach(disk.policy)).max()?;
    if fits(longest) {
        return None;
    }
    let (mut low, mut high) = (0, longest.as_secs().saturating_add(1));
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(Duration::from_secs(middle)) {
            low = middle;
        } else {
            high = middle;
        }
    }
    Some(Duration::from_secs(low))
}

/// Bytes that locked points of a disk hold at the end, whatever else is thinned: what is written at
/// least once between one point and the next, and from the last one to the end; each never more
/// than the whole disk.
#[must_use]
pub fn locked_bytes(churn: &Churn, disk_bytes: u64, points: &[Timestamp], until: Timestamp) -> u64 {
    let mut times = points.to_vec();
    times.sort_unstable();
    times.push(until);
    let gaps = times.windows(2).map(|pair| match pair {
        [from, to] => Duration::from_nanos(to.0.saturating_sub(from.0)),
        _ => Duration::ZERO,
    });
    let held = gaps.map(|gap| churn.distinct_in(gap).min(disk_bytes));
    held.fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use afterimage_blockdev::Monotonic;

    use super::super::Tier;
    use super::super::churn::Stored;
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const DAY: Duration = Duration::from_secs(86_400);

    /// A mebibyte each second, always of the same 64 cells.
    fn churn() -> Churn {
        let mut churn = Churn::default();
        let stored = Stored {
            bytes: 1 << 20,
            blocks: 256,
        };
        for second in 0..3600 {
            let at = Monotonic(second * 1_000_000_000);
            churn.written(at, stored, core::iter::once(second % 64));
        }
        churn.advance(Monotonic(3_600_000_000_000));
        churn
    }

    fn policy() -> Policy {
        Policy {
            journal_window: HOUR,
            tiers: vec![Tier {
                interval: HOUR,
                keep_for: DAY,
            }],
            ..Policy::default()
        }
    }

    #[test]
    fn the_window_keeps_every_write_and_a_tier_what_differs() {
        let (churn, policy) = (churn(), policy());
        let keeping = Keeping {
            policy: &policy,
            churn: &churn,
            held: Duration::ZERO,
        };
        assert_eq!(keeping.history_bytes(HOUR / 2), 1800 << 20);
        assert_eq!(keeping.full_bytes(), (3600 + 23 * 64) << 20);
        // With room for half the window it lasts half an hour.
        assert_eq!(lasts(&[keeping], 1800 << 20), Some(HOUR / 2));
        assert_eq!(lasts(&[keeping], (3600 + 23 * 64) << 20), None);
        let held = Keeping {
            held: HOUR,
            ..keeping
        };
        assert_eq!(lasts(&[held], 64 << 20), Some(HOUR));
        // What was thinned meanwhile must come again.
        assert_eq!(held.no_older_than(1800 << 20).held, HOUR / 2);
        assert_eq!(held.no_older_than(u64::MAX).held, HOUR);
        // Two of them need the room twice as fast.
        assert_eq!(lasts(&[keeping, keeping], 1800 << 20), Some(HOUR / 4));
        assert_eq!(lasts(&[], 0), None);
    }

    #[test]
    fn locks_hold_what_differs_between_points_and_never_more_than_the_disk() {
        let churn = churn();
        let at = |hours: u64| Timestamp(hours * 3_600_000_000_000);
        let one = locked_bytes(&churn, 1 << 40, &[at(0)], at(1));
        assert_eq!(one, 64 << 20);
        let three = locked_bytes(&churn, 1 << 40, &[at(2), at(0), at(1)], at(3));
        assert_eq!(three, (3 * 64) << 20);
        assert_eq!(locked_bytes(&churn, 10 << 20, &[at(0)], at(1000)), 10 << 20);
        assert_eq!(locked_bytes(&churn, 1 << 40, &[], at(5)), 0);
    }
}
