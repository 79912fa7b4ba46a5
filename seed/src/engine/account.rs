//! Who needs how much of the store: worked out by the sweep, which meets every version with all its
//! roots at hand.
//!
//! Invariants
//! * Every needed slot is in exactly one sum of its disk: current, of one use alone, or shared.
//! * A slot is kept whole while one of its blocks is needed, so that is how it counts.
//! * Memory is a few numbers for each point, disk and segment, whatever the store holds.
//!
//! Bytes of a slot are not in the map. A slot counts what blocks of its disk take on average, bulk
//! and writes apart, and all is scaled to what the segments' numbers of needed slots say; so
//! numbers of blocks are exact, and bytes add up.

use std::collections::{BTreeMap, BTreeSet};

use afterimage_blockdev::{DiskId, HistoryId, Lsn, MachineId, PointId, SegmentId, Timestamp};

use super::Engine;
use super::join::Life;
use super::live::LiveMap;
use super::points::is_generated_name;
use crate::entry::{Entry, EntryKind};
use crate::manifest::{PointKind, PointRecord};
use crate::retention::{ChurnRecord, Policy, Stored, TIERS_MAX, scaled};

/// Uses that are told apart.
const USES: usize = 7 + TIERS_MAX;

/// What a version that was written over is kept for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Use {
    /// The journal window.
    Window,
    /// Points that a lock holds.
    Locked,
    /// Points that a person named.
    Named,
    /// Forks: what a branch began with.
    Fork,
    /// Views that are open.
    View,
    /// Points that no tier covers by their age.
    Other,
    /// Application-consistent points that the policy keeps by themselves.
    Application,
    /// Points whose age this tier of the policy is the finest for.
    Tier(usize),
}

impl Use {
    fn place(self) -> usize {
        match self {
            Self::Window => 0,
            Self::Locked => 1,
            Self::Named => 2,
            Self::Fork => 3,
            Self::View => 4,
            Self::Other => 5,
            Self::Application => 6,
            Self::Tier(tier) => 7 + tier.min(TIERS_MAX - 1),
        }
    }

    fn bit(self) -> u32 {
        1 << self.place()
    }

    /// All of them, in order of their places.
    fn all() -> impl Iterator<Item = Self> {
        let first = [
            Self::Window,
            Self::Locked,
            Self::Named,
            Self::Fork,
            Self::View,
            Self::Other,
            Self::Application,
        ];
        first.into_iter().chain((0..TIERS_MAX).map(Self::Tier))
    }
}

/// What a disk needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DiskAccount {
    /// The newest state.
    pub current: Stored,
    /// Written over, and kept for several uses.
    pub shared: Stored,
    /// Written over, and kept for one use only.
    alone: [Stored; USES],
}

impl DiskAccount {
    /// What would come back if a use were given up, for all that keep something alone.
    pub fn alone(&self) -> impl Iterator<Item = (Use, Stored)> {
        let found = Use::all().zip(self.alone);
        found.filter(|(_, stored)| stored.blocks > 0)
    }

    /// What would come back if this use were given up.
    #[must_use]
    pub fn alone_for(&self, used: Use) -> Stored {
        self.alone.get(used.place()).copied().unwrap_or_default()
    }

    /// Everything.
    #[must_use]
    pub fn needed(&self) -> Stored {
        let alone = self.alone.iter().copied();
        alone.fold(sum(self.current, self.shared), sum)
    }
}

/// What a point needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PointAccount {
    /// Needed by nothing else: what would come back if it were deleted.
    pub unique: Stored,
    /// All that it shows, but for what newer branches hold.
    pub shown: Stored,
}

/// Who needs how much.
#[derive(Clone, Debug, Default)]
pub struct Account {
    /// When it was worked out.
    pub at: Timestamp,
    /// By disk.
    pub disks: BTreeMap<DiskId, DiskAccount>,
    /// By point.
    pub points: BTreeMap<PointId, PointAccount>,
    /// Needed bytes of log segments.
    pub log_bytes: u64,
    /// Needed bytes of seed segments.
    pub seed_bytes: u64,
    /// Bytes of the segments that it is about.
    pub(super) judged_bytes: u64,
    /// What each disk had stored in this run before.
    pub(super) stored_before: BTreeMap<DiskId, u64>,
}

impl Account {
    /// What disks need, in bytes.
    #[must_use]
    pub fn needed_bytes(&self, disks: &[DiskId]) -> u64 {
        let found = disks.iter().filter_map(|disk| self.disks.get(disk));
        found.map(|disk| disk.needed().bytes).sum()
    }
}

fn sum(one: Stored, other: Stored) -> Stored {
    Stored {
        bytes: one.bytes.saturating_add(other.bytes),
        blocks: one.blocks.saturating_add(other.blocks),
    }
}

/// An LSN at which something shows a history.
#[derive(Clone, Copy, Debug)]
struct Cut {
    lsn: Lsn,
    uses: u32,
    /// The one point that shows it, if nothing else does.
    point: Option<PointId>,
    unique: Stored,
    /// Of versions that this is the first cut to show.
    appears: Stored,
    /// Of versions that this is the first cut not to show any more.
    goes: Stored,
}

#[derive(Debug, Default)]
struct Cuts {
    /// Sorted by LSN, each once.
    cuts: Vec<Cut>,
    /// The place behind the last cut that has the same uses as the one at a place and follows it.
    runs: Vec<usize>,
    /// Every LSN from here on is shown.
    window: Lsn,
}

impl Cuts {
    fn new(mut found: Vec<(Lsn, u32, Option<PointId>)>, window: Lsn) -> Self {
        found.sort_unstable_by_key(|(lsn, _, point)| (*lsn, *point));
        let mut cuts: Vec<Cut> = Vec::with_capacity(found.len());
        for (lsn, uses, point) in found {
            match cuts.last_mut().filter(|last| last.lsn == lsn) {
                Some(last) => {
                    last.uses |= uses;
                    last.point = None;
                }
                None => cuts.push(Cut {
                    lsn,
                    uses,
                    point,
                    unique: Stored::default(),
                    appears: Stored::default(),
                    goes: Stored::default(),
                }),
            }
        }
        let mut runs = vec![0; cuts.len()];
        for place in (0..cuts.len()).rev() {
            let next = cuts.get(place + 1).map(|cut| cut.uses);
            runs[place] = match next {
                Some(uses) if uses == cuts[place].uses => runs[place + 1],
                _ => place + 1,
            };
        }
        Self { cuts, runs, window }
    }

    /// The uses of a version, in part only when there is more than one.
    fn uses_of(&self, (from, to): (usize, usize), life: Life) -> u32 {
        let is_in_window = life.died.is_none_or(|died| died > self.window);
        let mut uses = if is_in_window { Use::Window.bit() } else { 0 };
        let mut place = from;
        while place < to && uses.count_ones() < 2 {
            uses |= self.cuts[place].uses;
            place = self.runs[place];
        }
        uses
    }
}

/// An account that is being worked out.
#[derive(Debug, Default)]
pub(super) struct Draft {
    histories: BTreeMap<HistoryId, Cuts>,
    sizes: BTreeMap<DiskId, ChurnRecord>,
    disks: BTreeMap<DiskId, DiskAccount>,
    segments: BTreeMap<SegmentId, u64>,
    stored_before: BTreeMap<DiskId, u64>,
}

impl Draft {
    /// Takes a needed entry.
    pub(super) fn add(&mut self, history: HistoryId, disk: DiskId, entry: &Entry, life: Life) {
        if !entry.kind.has_slot() {
            return;
        }
        let Some(cuts) = self.histories.get_mut(&history) else {
            return;
        };
        let blocks = u64::from(entry.mask.count_ones());
        let is_bulk = entry.kind == EntryKind::Bulk;
        let sizes = self.sizes.get(&disk).copied().unwrap_or_default();
        let bytes = sizes.stored_bytes(blocks, is_bulk);
        let stored = Stored { bytes, blocks };
        let reckoned = self.segments.entry(entry.segment).or_default();
        *reckoned = reckoned.saturating_add(bytes);
        let from = cuts.cuts.partition_point(|cut| cut.lsn < life.born);
        let to = life.died.map_or(cuts.cuts.len(), |died| {
            cuts.cuts.partition_point(|cut| cut.lsn < died)
        });
        if let Some(cut) = cuts.cuts.get_mut(from).filter(|_| from < to) {
            cut.appears = sum(cut.appears, stored);
        }
        if let Some(cut) = cuts.cuts.get_mut(to).filter(|_| from < to) {
            cut.goes = sum(cut.goes, stored);
        }
        let account = self.disks.entry(disk).or_default();
        if life.died.is_none() {
            account.current = sum(account.current, stored);
            return;
        }
        let uses = cuts.uses_of((from, to), life);
        if uses.count_ones() != 1 {
            account.shared = sum(account.shared, stored);
            return;
        }
        let place = usize::try_from(uses.trailing_zeros()).unwrap_or(0);
        account.alone[place] = sum(account.alone[place], stored);
        let is_of_one = to == from + 1 && uses != Use::Window.bit();
        if let Some(cut) = cuts.cuts.get_mut(from).filter(|_| is_of_one) {
            cut.unique = sum(cut.unique, stored);
        }
    }

    /// Scales bytes by what is needed in truth over what was reckoned.
    fn finish(self, at: Timestamp, needed: (u64, u64), judged_bytes: u64) -> Account {
        let reckoned = self.segments.values().copied();
        let reckoned = reckoned.fold(0, u64::saturating_add);
        let all = needed.0 + needed.1;
        let scale = |stored: Stored| Stored {
            bytes: scaled(stored.bytes, all, reckoned),
            ..stored
        };
        let mut points: BTreeMap<PointId, PointAccount> = BTreeMap::new();
        for cuts in self.histories.into_values() {
            let mut shown = Stored::default();
            for cut in cuts.cuts {
                shown = sum(shown, cut.appears);
                shown.bytes = shown.bytes.saturating_sub(cut.goes.bytes);
                shown.blocks = shown.blocks.saturating_sub(cut.goes.blocks);
                let Some(point) = cut.point else { continue };
                let known = points.entry(point).or_default();
                known.unique = sum(known.unique, scale(cut.unique));
                known.shown = sum(known.shown, scale(shown));
            }
        }
        let scale_disk = |disk: DiskAccount| DiskAccount {
            current: scale(disk.current),
            shared: scale(disk.shared),
            alone: disk.alone.map(scale),
        };
        let disks = self.disks.into_iter();
        Account {
            at,
            disks: disks.map(|(id, disk)| (id, scale_disk(disk))).collect(),
            points,
            log_bytes: needed.0,
            seed_bytes: needed.1,
            judged_bytes,
            stored_before: self.stored_before,
        }
    }
}

impl Engine {
    /// Begins an account over all roots.
    pub(super) fn begin_account(&self) -> Draft {
        let mut found: BTreeMap<HistoryId, Vec<(Lsn, u32, Option<PointId>)>> = BTreeMap::new();
        let mut note = |(history, lsn), used: Use, point| {
            for (history, _, cap) in self.lineage(history, lsn) {
                let cuts = found.entry(history).or_default();
                cuts.push((cap, used.bit(), point));
            }
        };
        for (machine, state) in &self.machines {
            let policy = self.policy_of(*machine).policy;
            for point in state.points.values().chain(state.pending.values()) {
                let used = self.use_of(point, &policy);
                note((point.history, point.lsn), used, Some(point.id));
            }
        }
        let forks: BTreeSet<_> = self.histories.values().filter_map(|e| e.parent).collect();
        for fork in forks {
            note(fork, Use::Fork, None);
        }
        let views = self.snapshots.iter().filter_map(std::sync::Weak::upgrade);
        for view in views {
            note((view.history, view.lsn), Use::View, None);
        }
        let histories = self.histories.iter().map(|(history, entry)| {
            let cuts = found.remove(history).unwrap_or_default();
            (*history, Cuts::new(cuts, entry.floor))
        });
        let histories = histories.collect();
        let churn = self.space.churn.iter();
        Draft {
            histories,
            sizes: churn
                .clone()
                .map(|(disk, churn)| (*disk, *churn.record()))
                .collect(),
            stored_before: churn
                .map(|(disk, churn)| (*disk, churn.stored_bytes()))
                .collect(),
            ..Draft::default()
        }
    }

    fn use_of(&self, point: &PointRecord, policy: &Policy) -> Use {
        if self.held_lock(point.id).is_some() {
            return Use::Locked;
        }
        let now = self.trusted_time().unwrap_or(point.time);
        let age = std::time::Duration::from_nanos(now.0.saturating_sub(point.time.0));
        let is_named = !is_generated_name(point) || point.kind == PointKind::Bookmark;
        if is_named && policy.keep_named.is_none_or(|keep| age < keep) {
            return Use::Named;
        }
        let covers = |tier: &crate::retention::Tier| age < tier.keep_for + tier.interval;
        if let Some(tier) = policy.tiers.iter().position(covers) {
            return Use::Tier(tier);
        }
        if point.kind == PointKind::Application && age < policy.keep_application {
            return Use::Application;
        }
        Use::Other
    }

    /// A sweep has seen all: its account holds from now on.
    pub(super) fn end_account(&mut self, draft: Draft, live: &LiveMap) {
        let (mut in_log, mut in_seeds, mut judged) = (0, 0, 0);
        for sealed in self.log.sealed_segments() {
            if self.seed_segments.contains_key(&sealed.segment) {
                continue;
            }
            let reckoned = draft.segments.get(&sealed.segment).copied().unwrap_or(0);
            in_log += reckoned.min(sealed.bytes);
            judged += sealed.bytes;
        }
        let active = self.active_log_segment();
        if let Some((segment, used)) = active {
            let reckoned = draft.segments.get(&segment).copied().unwrap_or(0);
            in_log += reckoned.min(used);
            judged += used;
        }
        for (segment, state) in &self.seed_segments {
            let reckoned = draft.segments.get(segment).copied().unwrap_or(0);
            let needed = live.count_of(*segment).map_or(reckoned, |count| {
                scaled(state.bytes, count.into(), state.slot_count.max(1).into())
            });
            in_seeds += needed.min(state.bytes);
            judged += state.bytes;
        }
        let account = draft.finish(self.clock.wall(), (in_log, in_seeds), judged);
        self.space.accounted(account);
    }

    /// What a machine needs, in bytes: by the last account, and what was stored since.
    pub(super) fn needed_by(&self, machine: MachineId) -> Option<u64> {
        let account = self.space.account.as_ref()?;
        let disks = &self.machines.get(&machine)?.disks;
        let since = disks.iter().map(|disk| self.stored_since(*disk));
        Some(account.needed_bytes(disks).saturating_add(since.sum()))
    }

    /// What was stored of a disk since the last account, in bytes.
    pub(super) fn stored_since(&self, disk: DiskId) -> u64 {
        let account = self.space.account.as_ref();
        let before = account.and_then(|account| account.stored_before.get(&disk));
        let now = self.space.churn.get(&disk);
        let now = now.map_or(0, crate::retention::Churn::stored_bytes);
        now.saturating_sub(before.copied().unwrap_or(0))
    }
}
