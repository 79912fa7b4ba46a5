//! What the engine knows of machines, disks, histories and streams.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use afterimage_blockdev::{
    AgentId, BatchId, DiskId, Epoch, HistoryId, KeyId, Lsn, MachineId, PointId, Timestamp,
};
use afterimage_cache::key::WRAPPED_BYTES;
use afterimage_cache::{FrameIdentity, RecordHeader};

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
    /// Those that are durable.
    pub(super) points: BTreeMap<PointId, PointRecord>,
    /// On their way to the manifest.
    pub(super) pending: BTreeMap<PointId, PointRecord>,
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
    pub(super) id: HistoryId,
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
    /// Epoch of the frame that ends there.
    pub(super) durable_epoch: Epoch,
    /// Its writer.
    pub(super) durable_origin: AgentId,
    pub(super) durable_time: Timestamp,
    pub(super) highest_bulk: Lsn,
    pub(super) disks: BTreeMap<DiskId, DiskMap>,
    /// Not in a run yet.
    pub(super) open_timeline: Vec<TimeSample>,
    pub(super) timeline: Vec<TimeSample>,
    pub(super) batches: Vec<BatchRecord>,
    pub(super) holes: Vec<Hole>,
    /// Ranges of LSNs that were found lost at start.
    pub(super) gaps: Vec<(Lsn, Lsn)>,
    /// Known losses: disk (nil for all), first, last.
    pub(super) lost: Vec<(DiskId, Lsn, Lsn)>,
    /// What the log lost may be the newest records of this history.
    pub(super) has_lost_tail: bool,
    pub(super) stream: Option<StreamNumber>,
    /// The state changed since the last checkpoint.
    pub(super) is_dirty: bool,
    /// Durable: what lies below is addressable only where a point or a fork names it.
    pub(super) floor: Lsn,
}

use super::StreamNumber;

/// The map of one disk in one history.
#[derive(Debug, Default)]
pub(super) struct DiskMap {
    pub(super) entries: Vec<Entry>,
    pub(super) ranges: Vec<RangeEntry>,
    pub(super) low: Lsn,
    pub(super) high: Lsn,
    /// Sealed: those in files first, then those in memory.
    pub(super) sections: Vec<Arc<Section>>,
    pub(super) bulk_entries: Vec<Entry>,
    /// Of bulk blocks: those in files first, then those in memory.
    pub(super) base_parts: Vec<Arc<Section>>,
    /// Blocks that are durable as bulk of an open first copy: first block and end of each range.
    pub(super) bulk_blocks: BTreeMap<u64, u64>,
}

impl DiskMap {
    /// Seals what is open, so that a snapshot can have it.
    pub(super) fn freeze(&mut self) {
        if !self.entries.is_empty() || !self.ranges.is_empty() {
            let mut entries = core::mem::take(&mut self.entries);
            entries.sort_unstable_by_key(Entry::key);
            let ranges = core::mem::take(&mut self.ranges);
            let section = Section::Memory {
                entries,
                ranges,
                low: self.low,
                high: self.high,
            };
            self.sections.push(Arc::new(section));
        }
        if !self.bulk_entries.is_empty() {
            let mut entries = core::mem::take(&mut self.bulk_entries);
            entries.sort_unstable_by_key(Entry::key);
            let low = entries
                .iter()
                .map(|entry| entry.lsn)
                .min()
                .unwrap_or_default();
            let high = entries
                .iter()
                .map(|entry| entry.lsn)
                .max()
                .unwrap_or_default();
            let section = Section::Memory {
                entries,
                ranges: Vec::new(),
                low,
                high,
            };
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

    /// Notes the blocks of a bulk entry as durable.
    pub(super) fn bulk_done(&mut self, entry: &Entry) {
        for within in 0..4u8 {
            if entry.block_in_slot(within).is_some() {
                self.bulk_block(entry.cell.first_block().0 + u64::from(within));
            }
        }
    }

    /// Notes a block, joined with its neighbours.
    fn bulk_block(&mut self, block: u64) {
        let mut start = block;
        let mut end = block + 1;
        if let Some((first, last)) = self.bulk_blocks.range(..=block).next_back() {
            if *last > block {
                return;
            }
            if *last == block {
                start = *first;
            }
        }
        if let Some(last) = self.bulk_blocks.remove(&end) {
            end = last;
        }
        self.bulk_blocks.insert(start, end);
    }
}

impl HistoryEntry {
    pub(super) fn new(
        id: HistoryId,
        machine: MachineId,
        parent: Option<(HistoryId, Lsn)>,
        is_branch: bool,
    ) -> Self {
        let fork = parent.map_or(Lsn::ZERO, |(_, fork)| fork);
        Self {
            id,
            machine,
            parent,
            is_branch,
            epoch: Epoch(0),
            origin: AgentId::NIL,
            received: fork,
            received_epoch: Epoch(0),
            durable: fork,
            durable_epoch: Epoch(0),
            durable_origin: AgentId::NIL,
            durable_time: Timestamp(0),
            highest_bulk: Lsn::ZERO,
            disks: BTreeMap::new(),
            open_timeline: Vec::new(),
            timeline: Vec::new(),
            batches: Vec::new(),
            holes: Vec::new(),
            gaps: Vec::new(),
            lost: Vec::new(),
            has_lost_tail: false,
            stream: None,
            is_dirty: false,
            floor: Lsn::ZERO,
        }
    }

    /// Everything up to the end of a frame is durable.
    pub(super) fn durable_to(&mut self, identity: FrameIdentity, last: Lsn) {
        if identity.epoch >= self.epoch {
            self.epoch = identity.epoch;
            self.origin = identity.origin;
        }
        self.durable = last;
        self.durable_epoch = identity.epoch;
        self.durable_origin = identity.origin;
        self.is_dirty = true;
    }

    /// Notes the instant of a record, when the last one noted is long ago.
    pub(super) fn sample(&mut self, time: Timestamp, lsn: Lsn, grain: u64) {
        let last = self.open_timeline.last().or(self.timeline.last());
        if last.is_none_or(|last| time.0 >= last.time.0.saturating_add(grain)) {
            self.open_timeline.push(TimeSample { time, lsn });
        }
        self.durable_time = self.durable_time.max(time);
    }

    /// Decides by the link of a record which holes before it hurt its disk.
    pub(super) fn note_link(&mut self, header: &RecordHeader) {
        let Self { holes, lost, .. } = self;
        if holes.is_empty() {
            return;
        }
        for hole in holes.iter_mut().filter(|hole| hole.first < header.lsn) {
            let was_undecided = hole.undecided.remove(&header.disk);
            // A link to a record behind the hole says nothing of the hole: what did is missing.
            let is_hurt =
                header.previous >= hole.first && (was_undecided || header.previous <= hole.last);
            if is_hurt {
                note_loss(lost, (header.disk, hole.first, hole.last));
            }
        }
        holes.retain(|hole| !hole.undecided.is_empty());
    }

    /// Links do not reach over the start of an epoch: what is undecided then stays in doubt.
    pub(super) fn epoch_starts(&mut self, before: Lsn, lsn: Lsn) {
        for hole in core::mem::take(&mut self.holes) {
            for disk in hole.undecided {
                note_loss(&mut self.lost, (disk, hole.first, hole.last));
            }
        }
        if self.has_lost_tail && before.next() < lsn {
            note_loss(&mut self.lost, (DiskId::NIL, before.next(), Lsn(lsn.0 - 1)));
        }
    }

    /// Begins a batch. An open first copy of the same disk goes on in it.
    pub(super) fn batch_begins(&mut self, batch: BatchRecord) {
        for disk in &batch.disks {
            if batch.is_initial && self.copying_since(*disk).is_none() {
                self.disks.entry(*disk).or_default().bulk_blocks.clear();
            }
        }
        self.put_batch(batch);
    }

    /// Takes a batch over. What it says of a disk holds in place of what was known.
    pub(super) fn put_batch(&mut self, batch: BatchRecord) {
        for known in self
            .batches
            .iter_mut()
            .filter(|known| known.begin == batch.begin)
        {
            known.disks.retain(|disk| !batch.disks.contains(disk));
        }
        self.batches.retain(|known| !known.disks.is_empty());
        self.batches.push(batch);
    }

    /// Ends a batch, and with it earlier ones of the same disks whose end never came.
    pub(super) fn batch_ends(&mut self, batch: BatchId, end: Lsn) {
        let disks: BTreeSet<DiskId> = self
            .batches
            .iter()
            .filter(|known| known.batch == batch && known.end == Lsn::ZERO)
            .flat_map(|known| known.disks.iter().copied())
            .collect();
        if disks.is_empty() {
            self.unknown_batch_ends(batch, end);
        }
        let mut ended = Vec::new();
        for known in &self.batches {
            let covered = known
                .disks
                .iter()
                .filter(|disk| disks.contains(*disk))
                .copied();
            let disks: Vec<DiskId> = covered.collect();
            if known.end == Lsn::ZERO && known.begin < end && !disks.is_empty() {
                ended.push(BatchRecord {
                    end,
                    disks,
                    ..known.clone()
                });
            }
        }
        for batch in ended {
            self.put_batch(batch);
        }
        for disk in disks {
            if self.copying_since(disk).is_none() {
                if let Some(map) = self.disks.get_mut(&disk) {
                    map.bulk_blocks.clear();
                }
            }
        }
    }

    /// The begin of the batch that ends was lost: nothing from there on is a state.
    fn unknown_batch_ends(&mut self, batch: BatchId, end: Lsn) {
        if let Some((begin, _)) = self.gaps.last().copied() {
            let disks = self.disks.keys().copied().collect();
            let history = self.id;
            let is_initial = false;
            self.put_batch(BatchRecord {
                history,
                batch,
                is_initial,
                begin,
                end,
                disks,
            });
        }
    }

    /// Where the open first copy of a disk began.
    pub(super) fn copying_since(&self, disk: DiskId) -> Option<Lsn> {
        self.batches
            .iter()
            .filter(|batch| batch.is_initial && batch.end == Lsn::ZERO)
            .filter(|batch| batch.disks.contains(&disk))
            .map(|batch| batch.begin)
            .min()
    }

    /// Works out what is done of open first copies, from the entries that were read at start.
    pub(super) fn find_bulk_done(&mut self) {
        let copying: Vec<(DiskId, Lsn)> = self
            .disks
            .keys()
            .filter_map(|disk| Some((*disk, self.copying_since(*disk)?)))
            .collect();
        for (disk, since) in copying {
            let Some(map) = self.disks.get_mut(&disk) else {
                continue;
            };
            map.bulk_blocks.clear();
            let entries = core::mem::take(&mut map.bulk_entries);
            for entry in entries.iter().filter(|entry| entry.lsn >= since) {
                map.bulk_done(entry);
            }
            map.bulk_entries = entries;
        }
    }

    /// The batch of a disk that is open at an LSN.
    pub(super) fn batch_at(&self, disk: DiskId, lsn: Lsn) -> Option<&BatchRecord> {
        self.batches
            .iter()
            .filter(|batch| batch.disks.contains(&disk))
            .filter(|batch| batch.begin > Lsn::ZERO && batch.begin <= lsn)
            .filter(|batch| batch.end == Lsn::ZERO || lsn < batch.end)
            .min_by_key(|batch| batch.begin)
    }

    /// Says whether a batch of a disk had ended at an LSN.
    pub(super) fn ended_by(&self, disk: DiskId, lsn: Lsn) -> bool {
        let is_ended = |batch: &BatchRecord| batch.end != Lsn::ZERO && batch.end <= lsn;
        self.batches
            .iter()
            .any(|batch| is_ended(batch) && batch.disks.contains(&disk))
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

    /// The time of an LSN, to the grain of the timeline; `None` before its first record.
    pub(super) fn time_of(&self, lsn: Lsn) -> Option<Timestamp> {
        let find = |samples: &[TimeSample]| {
            let end = samples.partition_point(|sample| sample.lsn <= lsn);
            samples[..end].last().map(|sample| sample.time)
        };
        find(&self.open_timeline).or_else(|| find(&self.timeline))
    }
}

fn note_loss(lost: &mut Vec<(DiskId, Lsn, Lsn)>, loss: (DiskId, Lsn, Lsn)) {
    if !lost.contains(&loss) {
        lost.push(loss);
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
    pub(super) generation: u32,
    pub(super) slot_count: u32,
    pub(super) bytes: u64,
    pub(super) root: [u8; 32],
}
