//! Joining the sections of one disk of one history into one, without what nobody needs.
//!
//! Invariants
//! * Entries come out sorted: by cell, then newest first.
//! * An entry is left out only if each of its blocks has a newer version among those joined, and no
//!   root lies between the two. What is not joined could only end it earlier.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;

use afterimage_blockdev::{CELL_BLOCKS, CellIndex, Lsn};

use super::roots::Roots;
use crate::entry::{Entry, RangeEntry};

/// Ranges up to this number are compared with each other.
const COMPARED_MAX: usize = 2048;

/// The ranges over the cell in hand.
#[derive(Debug)]
struct RangeSweep {
    /// By first cell.
    coming: VecDeque<RangeEntry>,
    active: BTreeMap<Lsn, u64>,
    ends: BTreeSet<(u64, Lsn)>,
}

impl RangeSweep {
    fn new(ranges: &[RangeEntry]) -> Self {
        let mut coming = ranges.to_vec();
        coming.sort_unstable_by_key(|range| range.first);
        Self {
            coming: coming.into(),
            active: BTreeMap::new(),
            ends: BTreeSet::new(),
        }
    }

    /// Goes on to a cell. Cells only rise.
    fn move_to(&mut self, cell: CellIndex) {
        while let Some(range) = self.coming.front().copied().filter(|r| r.first <= cell) {
            self.coming.pop_front();
            let end = range.first.0.saturating_add(range.count);
            if let Some(before) = self.active.insert(range.lsn, end) {
                self.ends.remove(&(before, range.lsn));
            }
            self.ends.insert((end, range.lsn));
        }
        while let Some((end, lsn)) = self.ends.first().copied().filter(|(end, _)| *end <= cell.0) {
            self.ends.remove(&(end, lsn));
            self.active.remove(&lsn);
        }
    }

    /// The next range over the cell behind an LSN.
    fn next(&self, lsn: Lsn) -> Option<Lsn> {
        let later = (Bound::Excluded(lsn), Bound::Unbounded);
        self.active.range(later).next().map(|(lsn, _)| *lsn)
    }
}

/// Decides entry by entry; they come sorted.
#[derive(Debug)]
pub(super) struct Sieve {
    roots: Roots,
    sweep: RangeSweep,
    cell: Option<CellIndex>,
    /// For each block of the cell, the LSN of the version that came last.
    newer: [Option<Lsn>; CELL_BLOCKS],
}

impl Sieve {
    pub(super) fn new(roots: Roots, ranges: &[RangeEntry]) -> Self {
        Self {
            roots,
            sweep: RangeSweep::new(ranges),
            cell: None,
            newer: [None; CELL_BLOCKS],
        }
    }

    /// Says whether an entry is needed.
    #[cfg(test)]
    pub(super) fn keeps(&mut self, entry: &Entry) -> bool {
        self.life_of(entry).is_some()
    }

    /// How long an entry lives; `None` when it is not needed.
    pub(super) fn life_of(&mut self, entry: &Entry) -> Option<Life> {
        if self.cell != Some(entry.cell) {
            self.cell = Some(entry.cell);
            self.newer = [None; CELL_BLOCKS];
            self.sweep.move_to(entry.cell);
        }
        let over = self.sweep.next(entry.lsn);
        let mut is_needed = false;
        let mut is_current = false;
        let mut last = entry.lsn;
        for (within, newer) in (0u8..).zip(&mut self.newer) {
            if entry.block_in_slot(within).is_none() {
                continue;
            }
            let died = match (*newer, over) {
                (Some(entry), Some(range)) => Some(entry.min(range)),
                (one, other) => one.or(other),
            };
            is_needed |= self.roots.need(entry.lsn, died);
            is_current |= died.is_none();
            last = last.max(died.unwrap_or_default());
            *newer = Some(entry.lsn);
        }
        is_needed.then_some(Life {
            born: entry.lsn,
            died: (!is_current).then_some(last),
        })
    }
}

/// From when to when blocks of an entry are what is shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Life {
    pub(super) born: Lsn,
    /// When the last of them was written over; `None` while one is current.
    pub(super) died: Option<Lsn>,
}

/// The ranges that are needed, by LSN.
pub(super) fn keep_ranges(mut ranges: Vec<RangeEntry>, roots: &Roots) -> Vec<RangeEntry> {
    ranges.sort_unstable_by_key(|range| (range.lsn, range.first));
    ranges.dedup();
    if ranges.len() > COMPARED_MAX {
        return ranges;
    }
    let end = |range: &RangeEntry| range.first.0.saturating_add(range.count);
    let is_needed = |place: usize| {
        let range = &ranges[place];
        let covers = |later: &&RangeEntry| {
            later.lsn > range.lsn && later.first <= range.first && end(later) >= end(range)
        };
        let died = ranges[place + 1..].iter().find(covers).map(|r| r.lsn);
        roots.need(range.lsn, died)
    };
    let kept = (0..ranges.len()).filter(|place| is_needed(*place));
    kept.map(|place| ranges[place]).collect()
}

#[cfg(test)]
mod tests;
