//! From durable records to map entries.

use afterimage_blockdev::{
    CELL_BLOCKS, CellIndex, DiskId, HistoryId, Lsn, SegmentId, SlotIndex, Token,
};
use afterimage_cache::log::FrameLocation;
use afterimage_cache::record::{RecordBody, cells};
use afterimage_cache::{BatchKind, Frame, MarkKind, RecordHeader, RecordKind, RecordView};

use super::state::{DiskMap, Hole};
use super::{Engine, Event, Output};
use crate::entry::{Entry, EntryKind, RangeEntry};
use crate::manifest::BatchRecord;
use crate::run::TimeSample;

/// A mark that became durable.
pub(super) struct FoundMark {
    pub(super) history: HistoryId,
    pub(super) kind: MarkKind,
    pub(super) lsn: Lsn,
    pub(super) time: afterimage_blockdev::Timestamp,
    pub(super) request: u64,
    pub(super) name: String,
}

impl Engine {
    /// A frame found in the log at start.
    pub(super) fn recovered_frame(&mut self, location: &FrameLocation, frame: &Frame) {
        let header = frame.header;
        let Some(entry) = self.histories.get_mut(&header.identity.history) else {
            // Its history was dropped.
            return;
        };
        let expected = entry.received.next();
        if header.last <= entry.received && entry.received_epoch.0 != 0 {
            return;
        }
        if header.first > expected && !super::ingest::starts_epoch(frame) {
            let undecided = entry.disks.keys().copied().collect();
            let last = Lsn(header.first.0 - 1);
            entry.holes.push(Hole { first: expected, last, undecided });
        }
        entry.received = header.last;
        entry.received_epoch = header.identity.epoch;
        let _marks = self.apply(location, frame);
    }

    /// A frame that the log made durable.
    pub(super) fn durable_frame(
        &mut self,
        token: Token,
        location: &FrameLocation,
        frame: &Frame,
        out: &mut Vec<Output>,
    ) {
        let marks = self.apply(location, frame);
        if let Some((Some(stream), bytes)) = self.appended.remove(&token) {
            if let Some(open) = self.streams.get_mut(&stream) {
                open.queued_bytes = open.queued_bytes.saturating_sub(bytes);
                let queued_bytes = open.queued_bytes;
                let durable = frame.header.last;
                out.push(Output::Event(Event::Durable { stream, durable, queued_bytes }));
            }
        }
        for mark in marks {
            self.mark_is_durable(mark, out);
        }
    }

    fn apply(&mut self, location: &FrameLocation, frame: &Frame) -> Vec<FoundMark> {
        let view = frame.view();
        let history = view.header.identity.history;
        let grain = afterimage_blockdev::clock::nanoseconds(self.options.time_grain);
        let live = self.reader.as_ref().map(|reader| reader.live_directory(location.segment));
        let mut live = live.as_ref().map(|live| live.write());
        let Some(entry) = self.histories.get_mut(&history) else { return Vec::new() };
        entry.epoch = entry.epoch.max(view.header.identity.epoch);
        entry.origin = view.header.identity.origin;
        entry.durable = view.header.last;
        entry.is_dirty = true;
        self.applied_sequence = self.applied_sequence.max(location.sequence);
        let mut slot = location.first_slot;
        let mut marks = Vec::new();
        let mut added = 0;
        for item in view.records() {
            // The frame was verified when it was accepted or recovered.
            let Ok((range, record)) = item else { break };
            let header = record.header;
            let is_sampled = entry
                .open_timeline
                .last()
                .or(entry.timeline.last())
                .is_none_or(|last| header.time.0 >= last.time.0.saturating_add(grain));
            if is_sampled {
                entry.open_timeline.push(TimeSample { time: header.time, lsn: header.lsn });
            }
            entry.durable_time = entry.durable_time.max(header.time);
            match header.kind {
                RecordKind::Mark(kind) => marks.push(mark(history, kind, &record)),
                RecordKind::BatchBegin(kind) => {
                    entry.batch_begins(begin(history, kind, &record));
                }
                RecordKind::BatchEnd => {
                    entry.batch_ends(header.batch, header.lsn);
                }
                RecordKind::EpochStart => {
                    // What was not sent of the old epoch is covered by a batch of the new one.
                    for map in entry.disks.values_mut() {
                        map.last = None;
                    }
                }
                RecordKind::Grow => {
                    if let Some(disk) = self.disks.get_mut(&header.disk) {
                        disk.sizes.retain(|known| (known.0, known.1) != (history, header.lsn));
                        disk.sizes.push((history, header.lsn, header.length));
                    }
                    entry.disks.entry(header.disk).or_default().last = Some(header.lsn);
                }
                RecordKind::Bulk => {}
                RecordKind::Write
                | RecordKind::WriteZeroes
                | RecordKind::Discard
                | RecordKind::Unknown => {
                    let map = entry.disks.entry(header.disk).or_default();
                    note_link(map, &header, &mut entry.holes, &mut entry.lost);
                    map.note(header.lsn);
                    added += if header.kind == RecordKind::Write {
                        let body = range.start + afterimage_cache::record::RECORD_HEADER_BYTES;
                        for (place, item) in record.slots(history).enumerate() {
                            let Ok((at, _, _)) = item else { break };
                            let number = slot + u32::try_from(place).unwrap_or(0);
                            if let Some(live) = live.as_deref_mut() {
                                live.set(number, location.offset + (body + at) as u64);
                            }
                        }
                        write(map, &header, location.segment, slot)
                    } else {
                        clear(map, &header)
                    };
                }
            }
            slot += u32::from(record.slot_count);
        }
        self.open_entries += added;
        marks
    }
}

/// Checks that a record follows its disk's previous one; decides holes for its disk.
fn note_link(
    map: &mut DiskMap,
    header: &RecordHeader,
    holes: &mut Vec<Hole>,
    lost: &mut Vec<(DiskId, Lsn, Lsn)>,
) {
    let follows = map.last.is_none_or(|last| last == header.previous || header.previous < last);
    map.last = Some(header.lsn);
    if holes.is_empty() && follows {
        return;
    }
    for hole in holes.iter_mut() {
        let was_undecided = hole.undecided.remove(&header.disk);
        let is_hurt = header.previous >= hole.first && header.previous <= hole.last;
        if is_hurt && (was_undecided || !follows) {
            let loss = (header.disk, hole.first, hole.last);
            if !lost.contains(&loss) {
                lost.push(loss);
            }
        }
    }
    holes.retain(|hole| !hole.undecided.is_empty());
}

/// Adds the entries of a write; gives back how many.
fn write(map: &mut DiskMap, header: &RecordHeader, segment: SegmentId, first_slot: u32) -> usize {
    let before = map.entries.len();
    let slots = (first_slot..).map(SlotIndex);
    for ((cell, mask), slot) in cells(header.offset, header.length).zip(slots) {
        map.entries.push(Entry {
            cell,
            lsn: header.lsn,
            mask,
            first: 0,
            kind: EntryKind::Data,
            segment,
            slot,
        });
    }
    map.entries.len() - before
}

/// Adds the entries of a range without data; gives back how many.
fn clear(map: &mut DiskMap, header: &RecordHeader) -> usize {
    let kind = match header.kind {
        RecordKind::Discard => EntryKind::Discard,
        RecordKind::Unknown => EntryKind::Unknown,
        _ => EntryKind::Zero,
    };
    let before = map.entries.len();
    let per_cell = (CELL_BLOCKS * afterimage_blockdev::BLOCK_BYTES) as u64;
    let first_whole = header.offset.div_ceil(per_cell);
    let end_whole = (header.offset + header.length) / per_cell;
    let piece = |map: &mut DiskMap, offset: u64, length: u64| {
        for (cell, mask) in cells(offset, length) {
            map.entries.push(Entry {
                cell,
                lsn: header.lsn,
                mask,
                first: 0,
                kind,
                segment: SegmentId(0),
                slot: SlotIndex(0),
            });
        }
    };
    if first_whole >= end_whole {
        piece(map, header.offset, header.length);
        return map.entries.len() - before;
    }
    let head = first_whole * per_cell - header.offset;
    if head > 0 {
        piece(map, header.offset, head);
    }
    let tail = header.offset + header.length - end_whole * per_cell;
    if tail > 0 {
        piece(map, end_whole * per_cell, tail);
    }
    let count = end_whole - first_whole;
    map.ranges.push(RangeEntry { first: CellIndex(first_whole), count, lsn: header.lsn, kind });
    map.entries.len() - before + 1
}

fn mark(history: HistoryId, kind: MarkKind, record: &RecordView<'_>) -> FoundMark {
    let note = if let RecordBody::Note(note) = record.body { note } else { &[] };
    FoundMark {
        history,
        kind,
        lsn: record.header.lsn,
        time: record.header.time,
        request: record.header.argument,
        name: String::from_utf8_lossy(note).into_owned(),
    }
}

fn begin(history: HistoryId, kind: BatchKind, record: &RecordView<'_>) -> BatchRecord {
    let note = if let RecordBody::Note(note) = record.body { note } else { &[] };
    let disks = note.as_chunks::<16>().0.iter().map(|id| DiskId(*id)).collect();
    BatchRecord {
        history,
        batch: record.header.batch,
        is_initial: kind == BatchKind::Initial,
        begin: record.header.lsn,
        end: Lsn::ZERO,
        disks,
    }
}
