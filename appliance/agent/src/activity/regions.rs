//! The state of the regions in memory.

use std::ops::Range;
use std::sync::Arc;

use afterimage_blockdev::Lsn;

use super::file::BLOCK_REGIONS;
use crate::tap::ranges::Resume;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mark {
    /// Not marked, or being unmarked.
    Clean,
    /// A write waits for the mark.
    Wanted,
    /// The mark is being made durable.
    Committing,
    /// Marked durably.
    Durable,
}

#[derive(Clone, Copy, Debug)]
struct Region {
    mark: Mark,
    /// When it was tainted, as the table counts; 0 when it is not.
    tainted: u64,
    /// Writes in flight, or waiting for the mark.
    writers: u32,
    last_lsn: Lsn,
    /// Tick of the last write's end.
    touched: u64,
}

/// What one commit makes durable.
pub(super) struct Commit {
    /// Bitmap blocks that changed.
    pub(super) blocks: Vec<usize>,
    /// The bits of all regions.
    pub(super) bits: Vec<u8>,
    /// Who may go afterwards.
    pub(super) waiting: Vec<Arc<dyn Resume>>,
}

/// Regions that may be unmarked after a flush, each with its last LSN when that was planned.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct UnmarkPlan {
    regions: Vec<(usize, Lsn)>,
}

impl UnmarkPlan {
    /// Says whether a flush would be of no use.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }
}

/// All regions of a disk. What lies beyond the last one, after the disk has grown, belongs to it.
pub(super) struct Regions {
    region_bytes: u64,
    regions: Vec<Region>,
    changed_blocks: Vec<bool>,
    waiting: Vec<Arc<dyn Resume>>,
    marked: u64,
    taints: u64,
    /// Rounds of the worker.
    tick: u64,
    /// Regions wanted anew one after the other, and where the last of them ended.
    run: usize,
    run_end: usize,
}

/// Regions that are marked ahead of a sequential writer.
const AHEAD: usize = 16;
/// Regions, one after the other, that tell that a writer is sequential.
const RUN: usize = 3;

impl Regions {
    pub(super) fn new(region_bytes: u64, marks: &[bool]) -> Self {
        let region = |is_marked: &bool| Region {
            mark: if *is_marked {
                Mark::Durable
            } else {
                Mark::Clean
            },
            tainted: u64::from(*is_marked),
            writers: 0,
            last_lsn: Lsn::ZERO,
            touched: 0,
        };
        let blocks = marks.len().div_ceil(BLOCK_REGIONS).max(1);
        Self {
            region_bytes,
            regions: marks.iter().map(region).collect(),
            changed_blocks: vec![false; blocks],
            waiting: Vec::new(),
            marked: marks.iter().filter(|is_marked| **is_marked).count() as u64,
            taints: 1,
            tick: 0,
            run: 0,
            run_end: 0,
        }
    }

    /// Adds regions up to a disk's new end; says whether there are more now.
    pub(super) fn grow(&mut self, disk_bytes: u64) -> bool {
        let count = disk_bytes.div_ceil(self.region_bytes);
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        if count <= self.regions.len() {
            return false;
        }
        let region = Region {
            mark: Mark::Clean,
            tainted: 0,
            writers: 0,
            last_lsn: Lsn::ZERO,
            touched: 0,
        };
        self.regions.resize(count, region);
        let blocks = count.div_ceil(BLOCK_REGIONS);
        self.changed_blocks.resize(blocks, false);
        true
    }

    pub(super) fn region_bytes(&self) -> u64 {
        self.region_bytes
    }

    fn places(&self, range: &Range<u64>) -> Range<usize> {
        let last = self.regions.len() - 1;
        let place = |offset: u64| {
            usize::try_from(offset / self.region_bytes).map_or(last, |place| place.min(last))
        };
        place(range.start)..place(range.end.max(range.start + 1) - 1) + 1
    }

    pub(super) fn begin(
        &mut self,
        range: &Range<u64>,
        waiter: impl FnOnce() -> Arc<dyn Resume>,
    ) -> bool {
        let mut may_go = true;
        let mut is_new = false;
        let places = self.places(range);
        for place in places.clone() {
            is_new |= self.want(place);
            let region = &mut self.regions[place];
            region.writers += 1;
            may_go &= region.mark == Mark::Durable;
        }
        if is_new && self.is_sequential(&places) {
            let ahead = places.end..(places.end + AHEAD).min(self.regions.len());
            self.run_end = ahead.end;
            for place in ahead {
                self.want(place);
            }
        }
        if !may_go {
            self.waiting.push(waiter());
        }
        may_go
    }

    /// Wants a mark; says whether it was not wanted before.
    fn want(&mut self, place: usize) -> bool {
        let region = &mut self.regions[place];
        if region.mark != Mark::Clean {
            return false;
        }
        region.mark = Mark::Wanted;
        region.touched = self.tick;
        self.marked += 1;
        self.changed_blocks[place / BLOCK_REGIONS] = true;
        true
    }

    /// Notes that regions were wanted anew; says whether a sequential writer did that, whose next
    /// regions are better marked at once than one by one.
    fn is_sequential(&mut self, places: &Range<usize>) -> bool {
        let follows = (self.run_end..=self.run_end + 1).contains(&places.start);
        self.run = if follows { self.run + 1 } else { 1 };
        self.run_end = places.end;
        self.run >= RUN
    }

    pub(super) fn advance(&mut self) {
        self.tick += 1;
    }

    pub(super) fn end(&mut self, range: &Range<u64>, lsn: Option<Lsn>) {
        let tick = self.tick;
        for place in self.places(range) {
            let region = &mut self.regions[place];
            assert!(region.writers > 0, "a write that ends was begun");
            region.writers -= 1;
            region.touched = tick;
            region.last_lsn = region.last_lsn.max(lsn.unwrap_or(Lsn::ZERO));
        }
    }

    pub(super) fn taint(&mut self, range: &Range<u64>) {
        self.taints += 1;
        for place in self.places(range) {
            self.regions[place].tainted = self.taints;
        }
    }

    pub(super) fn taint_marked(&mut self) {
        self.taints += 1;
        for region in &mut self.regions {
            if region.mark != Mark::Clean {
                region.tainted = self.taints;
            }
        }
    }

    pub(super) fn taint_new(&mut self, range: &Range<u64>) {
        self.taints += 1;
        for place in self.places(range) {
            self.regions[place].tainted = self.taints;
            self.want(place);
        }
    }

    pub(super) fn taint_all(&mut self) {
        self.taint_new(&(0..u64::MAX));
    }

    pub(super) fn taints(&self) -> u64 {
        self.taints
    }

    pub(super) fn tainted(&self, disk_bytes: u64) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let last = self.regions.len() - 1;
        for (place, region) in self.regions.iter().enumerate() {
            let start = place as u64 * self.region_bytes;
            if region.tainted == 0 || start >= disk_bytes {
                continue;
            }
            let end = if place == last {
                disk_bytes
            } else {
                start + self.region_bytes
            };
            match ranges.last_mut() {
                Some(range) if range.end == start => range.end = end.min(disk_bytes),
                _ => ranges.push(start..end.min(disk_bytes)),
            }
        }
        ranges
    }

    pub(super) fn is_tainted(&self) -> bool {
        self.regions.iter().any(|region| region.tainted > 0)
    }

    /// Clears what was tainted when `taints` was read, and not since.
    pub(super) fn clear(&mut self, range: &Range<u64>, taints: u64) {
        for place in self.places(range) {
            let region = &mut self.regions[place];
            if region.tainted <= taints {
                region.tainted = 0;
            }
        }
    }

    pub(super) fn marked_bytes(&self) -> u64 {
        self.marked * self.region_bytes
    }

    pub(super) fn bits(&self) -> Vec<u8> {
        let mut bits = vec![0; self.regions.len().div_ceil(8)];
        for (place, region) in self.regions.iter().enumerate() {
            if region.mark != Mark::Clean {
                bits[place / 8] |= 1 << (place % 8);
            }
        }
        bits
    }

    /// What there is to make durable; `None` when there is nothing, unless `is_forced`.
    pub(super) fn take_commit(&mut self, is_forced: bool) -> Option<Commit> {
        let changed = self.changed_blocks.iter_mut().enumerate();
        let blocks: Vec<usize> = changed
            .filter_map(|(block, is)| core::mem::take(is).then_some(block))
            .collect();
        if blocks.is_empty() && self.waiting.is_empty() && !is_forced {
            return None;
        }
        let is_needed = is_forced || !blocks.is_empty();
        let bits = if is_needed { self.bits() } else { Vec::new() };
        // Whoever comes from now on waits for the next commit, which may have nothing to write.
        for region in &mut self.regions {
            if region.mark == Mark::Wanted {
                region.mark = Mark::Committing;
            }
        }
        Some(Commit {
            blocks,
            bits,
            waiting: core::mem::take(&mut self.waiting),
        })
    }

    /// The marks of a commit are durable.
    pub(super) fn committed(&mut self) {
        for region in &mut self.regions {
            if region.mark == Mark::Committing {
                region.mark = Mark::Durable;
            }
        }
    }

    pub(super) fn plan_unmark(
        &self,
        acknowledged: Lsn,
        idle_ticks: u64,
        marked_bytes_max: u64,
    ) -> UnmarkPlan {
        let can_go = |region: &Region| {
            region.mark == Mark::Durable
                && region.tainted == 0
                && region.writers == 0
                && region.last_lsn <= acknowledged
        };
        let mut candidates: Vec<(u64, usize, Lsn)> = (self.regions.iter().enumerate())
            .filter(|(_, region)| can_go(region))
            .map(|(place, region)| (region.touched, place, region.last_lsn))
            .collect();
        candidates.sort_unstable();
        let over = self.marked_bytes().saturating_sub(marked_bytes_max);
        let evict = over.div_ceil(self.region_bytes);
        let is_due = |(count, (touched, ..)): &(u64, &(u64, usize, Lsn))| {
            *count < evict || touched + idle_ticks <= self.tick
        };
        let due = (0..).zip(candidates.iter()).filter(is_due);
        UnmarkPlan {
            regions: due.map(|(_, (_, place, lsn))| (*place, *lsn)).collect(),
        }
    }

    pub(super) fn unmark(&mut self, plan: &UnmarkPlan) {
        for (place, lsn) in &plan.regions {
            let region = &mut self.regions[*place];
            let is_untouched = region.mark == Mark::Durable
                && region.writers == 0
                && region.tainted == 0
                && region.last_lsn == *lsn;
            if is_untouched {
                region.mark = Mark::Clean;
                self.marked -= 1;
                self.changed_blocks[place / BLOCK_REGIONS] = true;
            }
        }
    }
}
