//! What of a machine's history is kept.

use core::time::Duration;

use crate::manifest::PointKind;

/// Most tiers of a policy.
pub const TIERS_MAX: usize = 16;
/// Longest span that a policy may name: a hundred years.
pub const SPAN_MAX: Duration = Duration::from_secs(100 * 365 * 86_400);
/// Longest lock, for a lock cannot be taken back.
pub const LOCK_MAX: Duration = Duration::from_secs(10 * 365 * 86_400);

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

/// One point is kept of each interval, for a while.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tier {
    /// The interval.
    pub interval: Duration,
    /// For how long after its end.
    pub keep_for: Duration,
}

/// New points are locked.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LockRule {
    /// For how long from when they are made.
    pub duration: Duration,
    /// Those of these kinds.
    pub kinds: Vec<PointKind>,
}

/// What of a machine's history is kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Policy {
    /// How far back every LSN stays addressable.
    pub journal_window: Duration,
    /// Which points are kept, from the finest interval to the coarsest.
    pub tiers: Vec<Tier>,
    /// Application-consistent points younger than this stay, whatever the tiers say.
    pub keep_application: Duration,
    /// Points that a person named stay so long before the tiers hold for them too; `None` for
    /// until they are deleted.
    pub keep_named: Option<Duration>,
    /// Whether new points are locked.
    pub lock: Option<LockRule>,
}

impl Default for Policy {
    fn default() -> Self {
        let tier = |interval, keep_for| Tier {
            interval: Duration::from_secs(interval),
            keep_for: Duration::from_secs(keep_for),
        };
        Self {
            journal_window: Duration::from_secs(DAY),
            tiers: vec![tier(300, DAY), tier(HOUR, 7 * DAY), tier(DAY, 30 * DAY)],
            keep_application: Duration::ZERO,
            keep_named: None,
            lock: None,
        }
    }
}

/// Why a policy cannot be taken.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// A span is longer than anything can be kept.
    #[error("{what} is longer than 100 years; choose a shorter one")]
    TooLong {
        /// Which.
        what: &'static str,
    },
    /// Too many tiers.
    #[error("there are {count} tiers; a policy has at most {TIERS_MAX}")]
    TooManyTiers {
        /// How many.
        count: usize,
    },
    /// A tier's interval is too short.
    #[error("the interval of tier {number} is below a second; choose a longer one")]
    ShortInterval {
        /// Which, from 1.
        number: usize,
    },
    /// A tier ends before its first interval does.
    #[error(
        "tier {number} keeps points for less than its own interval; keep them at least that long"
    )]
    ShortTier {
        /// Which, from 1.
        number: usize,
    },
    /// The tiers are in no order.
    #[error(
        "tier {number} does not follow from the one before it; name the tiers from the finest to \
         the coarsest interval, each kept longer than the one before"
    )]
    Order {
        /// Which, from 1.
        number: usize,
    },
    /// A lock that locks nothing.
    #[error("the lock names no kind of point; name some, or leave the lock out")]
    NoKinds,
    /// A kind is named twice.
    #[error("the lock names {kind} points twice; name each kind once")]
    KindTwice {
        /// The kind.
        kind: &'static str,
    },
    /// A lock's duration is out of range.
    #[error("the lock is shorter than a second or longer than 10 years, and cannot be taken back")]
    LockDuration,
}

impl Policy {
    /// Says whether the policy makes sense.
    ///
    /// # Errors
    /// The first thing that does not.
    pub fn validate(&self) -> Result<(), PolicyError> {
        let spans = [
            ("the journal window", self.journal_window),
            (
                "the time that application points are kept",
                self.keep_application,
            ),
            (
                "the time that named points are kept",
                self.keep_named.unwrap_or_default(),
            ),
        ];
        if let Some((what, _)) = spans.into_iter().find(|(_, span)| *span > SPAN_MAX) {
            return Err(PolicyError::TooLong { what });
        }
        self.validate_tiers()?;
        self.lock.as_ref().map_or(Ok(()), LockRule::validate)
    }

    fn validate_tiers(&self) -> Result<(), PolicyError> {
        if self.tiers.len() > TIERS_MAX {
            let count = self.tiers.len();
            return Err(PolicyError::TooManyTiers { count });
        }
        let mut before: Option<Tier> = None;
        for (number, tier) in (1..).zip(&self.tiers) {
            if tier.keep_for > SPAN_MAX {
                let what = "the time that a tier keeps points";
                return Err(PolicyError::TooLong { what });
            }
            if tier.interval < Duration::from_secs(1) {
                return Err(PolicyError::ShortInterval { number });
            }
            if tier.keep_for < tier.interval {
                return Err(PolicyError::ShortTier { number });
            }
            let follows =
                |before: Tier| before.interval < tier.interval && before.keep_for < tier.keep_for;
            if !before.is_none_or(follows) {
                return Err(PolicyError::Order { number });
            }
            before = Some(*tier);
        }
        Ok(())
    }

    /// For how long a new point of a kind is locked.
    #[must_use]
    pub fn lock_of(&self, kind: PointKind) -> Option<Duration> {
        let rule = self.lock.as_ref()?;
        rule.kinds.contains(&kind).then_some(rule.duration)
    }
}

impl LockRule {
    fn validate(&self) -> Result<(), PolicyError> {
        if !(Duration::from_secs(1)..=LOCK_MAX).contains(&self.duration) {
            return Err(PolicyError::LockDuration);
        }
        if self.kinds.is_empty() {
            return Err(PolicyError::NoKinds);
        }
        for (place, kind) in self.kinds.iter().enumerate() {
            if self.kinds.iter().skip(place + 1).any(|other| other == kind) {
                let kind = kind.name();
                return Err(PolicyError::KindTwice { kind });
            }
        }
        Ok(())
    }
}
