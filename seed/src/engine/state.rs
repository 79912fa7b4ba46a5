//! What the engine knows of machines, disks, histories and streams.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use afterimage_blockdev::{
    AgentId, BatchId, DiskId, Epoch, HistoryId, KeyId, Lsn, MachineId, PointId, Timestamp,
};
use afterimage_cache::key::WRAPPED_BYTES;

use crate::entry::{Entry, RangeEntry};
use crate::manifest::{BatchRecord, PointRecord};
use crate::run::TimeSample;
use crate::section::Section;

/// A machine.
#[derive(Debug)]
pub(super) struct MachineState {
    pub(super) name: String,
    pub(super) tag_key: [u8; 32],
    /// The agent that may write; nil for any with a grant.
    pub(super) holder: AgentId,
    pub(super) disks: Vec<DiskId>,
    /// The history that agents write.
    pub(super) trunk: HistoryId,
    pub(super) points: BTreeMap<PointId, PointRecord>,
    pub(super) names: BTreeMap<String, PointId>,
}

/// A disk.
#[derive(Debug)]
pub(super) struct DiskState {
    pub(super) machine: MachineId,
    pub(super) name: String,
    pub(super) declared_bytes: u64,
    pub(super) logical_block_bytes: u32,
    pub(super) key: KeyId,
    pub(super) wrapped: [u8; WRAPPED_BYTES],
    /// From an LSN of a history on, the disk has a size.
    pub(super) sizes: Vec<(HistoryId, Lsn, u64)>,
}

/// A range of LSNs that was lost, and the disks for which it is not known whether they lost any.
#[derive(Debug)]
pub(super) struct Hole {
    pub(super) first: Lsn,
    pub(super) last: Lsn,
    pub(super) undecided: BTreeSet<DiskId>,
}

/// A history.
#[derive(Debug)]
pub(super) struct HistoryEntry {
    pub(super) machine: MachineId,
    pub(super) parent: Option<(HistoryId, Lsn)>,
    pub(super) is_branch: bool,
    pub(super) epoch: Epoch,
    pub(super) origin: AgentId,
    /// Highest LSN that was handed to the log.
    pub(super) received: Lsn,
    /// Epoch of that frame.
    pub(super) received_epoch: Epoch,
    pub(super) durable: Lsn,
    pub(super) durable_time: Timestamp,
    pub(super) highest_bulk: Lsn,
    pub(super) disks: BTreeMap<DiskId, DiskMap>,
    /// Not in a run yet.
    pub(super) open_timeline: Vec<TimeSample>,
    pub(super) timeline: Vec<TimeSample>,
    pub(super) batches: Vec<BatchRecord>,
    pub(super) holes: Vec<Hole>,
    /// Known losses: disk (nil for all), first, last.
    pub(super) lost: Vec<(DiskId, Lsn, Lsn)>,
    pub(super) stream: Option<StreamNumber>,
    /// The state changed since the last checkpoint.
    pub(super) is_dirty: bool,
}

use super::StreamNumber;

/// The map of one disk in one history.
#[derive(Debug, Default)]
pub(super) struct DiskMap {
    /// LSN of its newest record; `None` when the next link cannot be checked.
    pub(super) last: Option<Lsn>,
    pub(super) entries: Vec<Entry>,
    pub(super) ranges: Vec<RangeEntry>,
    pub(super) low: Lsn,
    pub(super) high: Lsn,
    /// Sealed: those in files first, then those in memory.
    pub(super) sections: Vec<Arc<Section>>,
    pub(super) bulk_entries: Vec<Entry>,
    /// Of bulk blocks: those in files first, then those in memory.
    pub(super) base_parts: Vec<Arc<Section>>,
    /// Cells that are durable as bulk of the open batch.
    pub(super) bulk_cells: BTreeMap<u64, u64>,
}

impl DiskMap {
    /// Seals what is open, so that a snapshot can have it.
    pub(super) fn freeze(&mut self) {
        if !self.entries.is_empty() || !self.ranges.is_empty() {
            let mut entries = core::mem::take(&mut self.entries);
            entries.sort_unstable_by_key(Entry::key);
            let ranges = core::mem::take(&mut self.ranges);
            let section = Section::Memory { entries, ranges, low: self.low, high: self.high };
            self.sections.push(Arc::new(section));
        }
        if !self.bulk_entries.is_empty() {
            let mut entries = core::mem::take(&mut self.bulk_entries);
            entries.sort_unstable_by_key(Entry::key);
            let low = entries.iter().map(|entry| entry.lsn).min().unwrap_or_default();
            let high = entries.iter().map(|entry| entry.lsn).max().unwrap_or_default();
            let section = Section::Memory { entries, ranges: Vec::new(), low, high };
            self.base_parts.push(Arc::new(section));
        }
    }

    /// Widens the interval that is open.
    pub(super) fn note(&mut self, lsn: Lsn) {
        if self.entries.is_empty() && self.ranges.is_empty() {
            self.low = lsn;
        }
        self.high = lsn;
    }

    /// Notes a cell as durable bulk, joined with its neighbours.
    pub(super) fn bulk_cell(&mut self, cell: u64) {
        let mut start = cell;
        let mut end = cell + 1;
        if let Some((first, last)) = self.bulk_cells.range(..=cell).next_back() {
            if *last > cell {
                return;
            }
            if *last == cell {
                start = *first;
            }
        }
        if let Some(last) = self.bulk_cells.remove(&end) {
            end = last;
        }
        self.bulk_cells.insert(start, end);
    }
}

impl HistoryEntry {
    pub(super) fn new(machine: MachineId, parent: Option<(HistoryId, Lsn)>, is_branch: bool) -> Self {
        let fork = parent.map_or(Lsn::ZERO, |(_, fork)| fork);
        Self {
            machine,
            parent,
            is_branch,
            epoch: Epoch(0),
            origin: AgentId::NIL,
            received: fork,
            received_epoch: Epoch(0),
            durable: fork,
            durable_time: Timestamp(0),
            highest_bulk: Lsn::ZERO,
            disks: BTreeMap::new(),
            open_timeline: Vec::new(),
            timeline: Vec::new(),
            batches: Vec::new(),
            holes: Vec::new(),
            lost: Vec::new(),
            stream: None,
            is_dirty: false,
        }
    }

    /// Begins a batch.
    pub(super) fn batch_begins(&mut self, batch: BatchRecord) {
        for disk in &batch.disks {
            if batch.is_initial {
                self.disks.entry(*disk).or_default().bulk_cells.clear();
            }
        }
        self.batches.retain(|known| known.begin != batch.begin);
        self.batches.push(batch);
    }

    /// Ends a batch, and with it earlier ones of the same disks whose end never came.
    pub(super) fn batch_ends(&mut self, batch: BatchId, end: Lsn) -> Vec<BatchRecord> {
        let disks: BTreeSet<DiskId> = self
            .batches
            .iter()
            .filter(|known| known.batch == batch && known.end == Lsn::ZERO)
            .flat_map(|known| known.disks.iter().copied())
            .collect();
        let mut ended = Vec::new();
        for known in &mut self.batches {
            let is_covered = known.disks.iter().all(|disk| disks.contains(disk));
            if known.end == Lsn::ZERO && known.begin < end && is_covered {
                known.end = end;
                ended.push(known.clone());
            }
        }
        ended
    }

    /// The batch of a disk (or of any disk) that is open at an LSN.
    pub(super) fn batch_at(&self, disk: Option<DiskId>, lsn: Lsn) -> Option<&BatchRecord> {
        self.batches
            .iter()
            .filter(|batch| disk.is_none_or(|disk| batch.disks.contains(&disk)))
            .filter(|batch| batch.begin <= lsn && (batch.end == Lsn::ZERO || lsn < batch.end))
            .min_by_key(|batch| batch.begin)
    }

    /// The LSN at which a first copy of a disk was whole.
    pub(super) fn copied_at(&self, disk: DiskId) -> Option<Lsn> {
        self.batches
            .iter()
            .filter(|batch| batch.is_initial && batch.end != Lsn::ZERO)
            .filter(|batch| batch.disks.contains(&disk))
            .map(|batch| batch.end)
            .min()
    }

    /// The last LSN at or before a time. A sample stands for the records of one grain; the
    /// state shown is never newer than the time asked for, and at most one grain older.
    pub(super) fn lsn_at_or_before(&self, time: Timestamp, grain: u64) -> Option<Lsn> {
        let samples = || self.timeline.iter().chain(&self.open_timeline);
        let find = |samples: &[TimeSample]| samples.partition_point(|sample| sample.time <= time);
        let place = find(&self.timeline) + find(&self.open_timeline);
        let found = samples().nth(place.checked_sub(1)?)?;
        if time.0 < found.time.0.saturating_add(grain) {
            return Some(found.lsn);
        }
        let before_next = samples().nth(place).map(|next| Lsn(next.lsn.0 - 1));
        Some(before_next.unwrap_or(self.durable).max(found.lsn))
    }

    /// The time of an LSN, to the grain of the timeline.
    pub(super) fn time_of(&self, lsn: Lsn) -> Timestamp {
        let find = |samples: &[TimeSample]| {
            let end = samples.partition_point(|sample| sample.lsn <= lsn);
            samples[..end].last().map(|sample| sample.time)
        };
        find(&self.open_timeline).or_else(|| find(&self.timeline)).unwrap_or(self.durable_time)
    }
}

/// An open stream.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) machine: MachineId,
    pub(super) history: HistoryId,
    pub(super) epoch: Epoch,
    pub(super) queued_bytes: u64,
}

/// A seed segment that counts.
#[derive(Clone, Copy, Debug)]
pub(super) struct SeedSegment {
    pub(super) slot_count: u32,
    pub(super) bytes: u64,
    pub(super) root: [u8; 32],
}
