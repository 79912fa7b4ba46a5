//! Which points a policy drops.
//!
//! Invariants
//! * A locked point, the newest good point, and a point that the policy keeps by itself
//!   (`keep_application`, `keep_named`) are never dropped.
//! * Of each slot (history, tier, interval) that ended less than the tier's `keep_for` ago, the
//!   best point stays: a quiesced one before a named one before a crash one, then the earliest.
//!   An unfinished copy counts only where there is nothing better.
//! * A slot's best point depends on what is in the slot and never on the time, so what one thinning
//!   drops, a later one would drop as well: for `earlier <= later` and any points `new`,
//!   `thin(thin(all, earlier) + new, later) == thin(all + new, later)`, as long as the policy is
//!   the same and locks do nothing but expire. Thinning twice at one time is thinning once.

use std::collections::{BTreeMap, BTreeSet};

use afterimage_blockdev::clock::nanoseconds;
use afterimage_blockdev::{HistoryId, PointId, Timestamp};

use super::Policy;
use crate::manifest::PointKind;

/// A point, as far as thinning looks at it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// Identity.
    pub id: PointId,
    /// The history; each has slots of its own.
    pub history: HistoryId,
    /// Time of its cut.
    pub time: Timestamp,
    /// Its kind.
    pub kind: PointKind,
    /// A person gave it a name.
    pub is_named: bool,
    /// It must not go.
    pub is_locked: bool,
}

impl Candidate {
    fn is_good(&self) -> bool {
        self.kind != PointKind::ResyncIncomplete
    }

    /// Better points are greater.
    fn worth(&self) -> (u8, core::cmp::Reverse<(Timestamp, PointId)>) {
        let rank = match self.kind {
            PointKind::Application => 3,
            PointKind::Bookmark => 2,
            PointKind::Crash => 1,
            PointKind::ResyncIncomplete => 0,
        };
        (rank, core::cmp::Reverse((self.time, self.id)))
    }

    /// The policy's own words keep it, whatever the tiers say.
    fn is_kept_by_kind(&self, policy: &Policy, age: u64) -> bool {
        let is_named = self.is_named || self.kind == PointKind::Bookmark;
        let as_named = is_named && policy.keep_named.is_none_or(|keep| age < nanoseconds(keep));
        let as_application =
            self.kind == PointKind::Application && age < nanoseconds(policy.keep_application);
        as_named || as_application
    }

    /// It stands beside the tiers, and leaves their places to others.
    fn is_beside(&self, policy: &Policy, age: u64) -> bool {
        let is_named = self.is_named || self.kind == PointKind::Bookmark;
        is_named && self.is_kept_by_kind(policy, age)
    }
}

/// The points of one machine that a policy drops at a time, in the order given.
#[must_use]
pub fn thin(points: &[Candidate], policy: &Policy, now: Timestamp) -> Vec<PointId> {
    let age = |point: &Candidate| now.0.saturating_sub(point.time.0);
    let mut kept: BTreeSet<PointId> = points
        .iter()
        .filter(|point| point.is_locked || point.is_kept_by_kind(policy, age(point)))
        .map(|point| point.id)
        .collect();
    let good = points.iter().filter(|point| point.is_good());
    kept.extend(
        good.max_by_key(|point| (point.time, point.id))
            .map(|point| point.id),
    );
    for tier in &policy.tiers {
        let interval = nanoseconds(tier.interval).max(1);
        let mut best: BTreeMap<(HistoryId, u64), &Candidate> = BTreeMap::new();
        for point in points {
            if point.is_beside(policy, age(point)) {
                continue;
            }
            let slot = point.time.0 / interval;
            let since_end = now.0.saturating_sub((slot + 1).saturating_mul(interval));
            if since_end >= nanoseconds(tier.keep_for) {
                continue;
            }
            let place = best.entry((point.history, slot)).or_insert(point);
            if point.worth() > place.worth() {
                *place = point;
            }
        }
        kept.extend(best.values().map(|point| point.id));
    }
    let dropped = points.iter().filter(|point| !kept.contains(&point.id));
    dropped.map(|point| point.id).collect()
}
