//! From durable records to map entries.

use afterimage_blockdev::{
    CELL_BLOCKS, CellIndex, DiskId, HistoryId, Lsn, SegmentId, SlotIndex, Token,
};
use afterimage_cache::log::{FrameLocation, SalvagedRecord};
use afterimage_cache::record::{RecordBody, cells};
use afterimage_cache::{
    BatchKind, Frame, FrameHeader, FrameIdentity, FrameView, MarkKind, RecordHeader, RecordKind,
    RecordView,
};

use super::records::{batch_disks, mark_name};
use super::state::{DiskMap, Hole};
use super::{Engine, Event, Output};
use crate::entry::{Entry, EntryKind, RangeEntry};
use crate::manifest::BatchRecord;
use crate::retention::Stored;

/// A mark that became durable.
pub(super) struct FoundMark {
    pub(super) history: HistoryId,
    pub(super) kind: MarkKind,
    pub(super) lsn: Lsn,
    pub(super) time: afterimage_blockdev::Timestamp,
    pub(super) request: u64,
    pub(super) name: String,
}

/// Where the records of a frame lie, and whose they are.
struct Source<'a> {
    location: &'a FrameLocation,
    identity: FrameIdentity,
    /// Highest LSN of the frame.
    last: Lsn,
    /// The segment was begun since the start, so its directory is kept in memory.
    is_live: bool,
}

/// A record of a frame: where it begins, and the number of its first slot.
type Placed<'a> = (usize, u32, RecordView<'a>);

/// The records of a frame that is whole.
fn placed<'a>(first_slot: u32, view: &FrameView<'a>) -> impl Iterator<Item = Placed<'a>> + use<'a> {
    let mut slot = first_slot;
    // The frame was verified when it was accepted or recovered.
    view.records()
        .map_while(Result::ok)
        .map(move |(range, record)| {
            let first = slot;
            slot += u32::from(record.slot_count);
            (range.start, first, record)
        })
}

impl Engine {
    /// A frame found in the log at start.
    pub(super) fn recovered_frame(&mut self, location: &FrameLocation, frame: &Frame) {
        let FrameHeader {
            identity,
            first,
            last,
            ..
        } = frame.header;
        let starts_epoch = super::ingest::starts_epoch(frame);
        if !self.follows(identity, first, last, starts_epoch) {
            return;
        }
        let source = Source {
            location,
            identity,
            last,
            is_live: false,
        };
        let _marks = self.apply(&source, placed(location.first_slot, &frame.view()));
    }

    /// A frame found in the log at start, of which only some records are whole.
    pub(super) fn salvaged_frame(
        &mut self,
        location: &FrameLocation,
        identity: FrameIdentity,
        bytes: &[u8],
        intact: &[SalvagedRecord],
        lost: &[Lsn],
    ) {
        let parse = |found: &SalvagedRecord| {
            let (record, _) = RecordView::parse(bytes.get(found.range.clone())?).ok()?;
            Some((found.range.start, found.first_slot, record))
        };
        let records: Vec<Placed<'_>> = intact.iter().filter_map(parse).collect();
        let lsns = || {
            records
                .iter()
                .map(|(_, _, record)| record.header.lsn)
                .chain(lost.iter().copied())
        };
        let (Some(first), Some(last)) = (lsns().min(), lsns().max()) else {
            return;
        };
        let starts_epoch = records
            .first()
            .is_some_and(|(_, _, record)| record.header.kind == RecordKind::EpochStart);
        self.note_damage(format!(
            "log segment {} at {}: records {} of history {} are damaged",
            location.segment,
            location.offset,
            lost.iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(", "),
            identity.history
        ));
        if !self.follows(identity, first, last, starts_epoch) {
            return;
        }
        for lsn in lost {
            self.note_hole(identity.history, *lsn, *lsn);
        }
        let source = Source {
            location,
            identity,
            last,
            is_live: false,
        };
        let _marks = self.apply(&source, records.into_iter());
    }

    /// Says whether a frame found at start is new, and notes what is missing before it.
    fn follows(
        &mut self,
        identity: FrameIdentity,
        first: Lsn,
        last: Lsn,
        starts_epoch: bool,
    ) -> bool {
        // Otherwise its history was dropped.
        let Some(entry) = self.histories.get_mut(&identity.history) else {
            return false;
        };
        if last <= entry.received && entry.received_epoch.0 != 0 {
            return false;
        }
        let expected = entry.received.next();
        entry.received = last;
        entry.received_epoch = identity.epoch;
        if first > expected && !starts_epoch {
            self.note_hole(identity.history, expected, Lsn(first.0 - 1));
        }
        true
    }

    /// Commits of the log are lost. A history in which something follows shows by its LSNs what it
    /// lost; of the others nobody knows.
    pub(super) fn commits_lost(&mut self) {
        for entry in self.histories.values_mut() {
            entry.has_lost_tail = true;
        }
    }

    /// A slot is damaged on the medium. Reading it says so; nothing else is hurt.
    pub(super) fn slot_damaged(&mut self, location: &FrameLocation, disk: DiskId, lsn: Lsn) {
        let segment = location.segment;
        self.note_damage(format!(
            "log segment {segment} at {}: a block of disk {disk}, written at LSN {lsn}, is damaged",
            location.offset
        ));
    }

    fn note_hole(&mut self, history: HistoryId, first: Lsn, last: Lsn) {
        let Some(entry) = self.histories.get_mut(&history) else {
            return;
        };
        let of_machine = self.machines.get(&entry.machine).map(|state| &state.disks);
        let known = of_machine.into_iter().flatten().chain(entry.disks.keys());
        let undecided = known.copied().collect();
        entry.holes.push(Hole {
            first,
            last,
            undecided,
        });
        entry.gaps.push((first, last));
    }

    /// A frame that the log made durable.
    pub(super) fn durable_frame(
        &mut self,
        token: Token,
        location: &FrameLocation,
        frame: &Frame,
        out: &mut Vec<Output>,
    ) {
        let FrameHeader { identity, last, .. } = frame.header;
        let source = Source {
            location,
            identity,
            last,
            is_live: true,
        };
        let end = location.offset + frame.bytes.len() as u64;
        self.space.log_written(location.segment, end);
        let marks = self.apply(&source, placed(location.first_slot, &frame.view()));
        if let Some((from, bytes)) = self.appended.remove(&token) {
            if let Some(open) = self.streams.get_mut(&from) {
                open.queued_bytes = open.queued_bytes.saturating_sub(bytes);
            }
        }
        // The stream that sent it may be over, and another one be open in its place.
        let entry = self.histories.get(&identity.history);
        if let Some(stream) = entry.and_then(|entry| entry.stream) {
            let queued_bytes = self
                .streams
                .get(&stream)
                .map_or(0, |open| open.queued_bytes);
            out.push(Output::Event(Event::Durable {
                stream,
                durable: last,
                queued_bytes,
            }));
        }
        for mark in marks {
            self.mark_is_durable(mark, out);
        }
    }

    fn apply<'a>(
        &mut self,
        source: &Source<'_>,
        records: impl Iterator<Item = Placed<'a>>,
    ) -> Vec<FoundMark> {
        let Source {
            location, identity, ..
        } = source;
        let history = identity.history;
        let grain = afterimage_blockdev::clock::nanoseconds(self.options.time_grain);
        let reader = self.reader.as_ref().filter(|_| source.is_live);
        let live = reader.map(|reader| reader.live_directory(location.segment));
        let mut live = live.as_ref().map(|live| live.write());
        self.applied_sequence = self.applied_sequence.max(location.sequence);
        let Some(entry) = self.histories.get_mut(&history) else {
            return Vec::new();
        };
        let before = entry.durable;
        entry.durable_to(*identity, source.last);
        let mut marks = Vec::new();
        let mut grown = Vec::new();
        let mut added = 0;
        for (start, slot, record) in records {
            let header = record.header;
            entry.sample(header.time, header.lsn, grain);
            match header.kind {
                RecordKind::Mark(kind) => marks.push(mark(history, kind, &record)),
                RecordKind::BatchBegin(kind) => {
                    let mut batch = begin(history, kind, &record);
                    batch.disks.retain(|disk| self.disks.contains_key(disk));
                    if !batch.disks.is_empty() {
                        entry.batch_begins(batch);
                    }
                }
                RecordKind::BatchEnd => {
                    entry.batch_ends(header.batch, header.lsn);
                    self.notes.changed(self.now);
                }
                RecordKind::EpochStart => entry.epoch_starts(before, header.lsn),
                RecordKind::Grow => {
                    entry.note_link(&header);
                    grown.push((header.disk, header.lsn, header.length));
                }
                RecordKind::Bulk => {}
                RecordKind::Write => {
                    entry.note_link(&header);
                    let body = start + afterimage_cache::record::RECORD_HEADER_BYTES;
                    if let Some(live) = live.as_deref_mut() {
                        let slots = record.slots(history).map_while(Result::ok);
                        for (number, (at, _, _)) in (slot..).zip(slots) {
                            live.set(number, location.offset + (body + at) as u64);
                        }
                    }
                    let map = entry.disks.entry(header.disk).or_default();
                    map.note(header.lsn);
                    added += write(map, &header, location.segment, slot);
                    if source.is_live {
                        let cells = cells(header.offset, header.length).map(|(cell, _)| cell.0);
                        let stored = stored(&record);
                        self.space.written(self.now, header.disk, stored, cells);
                    }
                }
                RecordKind::WriteZeroes | RecordKind::Discard | RecordKind::Unknown => {
                    entry.note_link(&header);
                    let map = entry.disks.entry(header.disk).or_default();
                    map.note(header.lsn);
                    added += clear(map, &header);
                }
            }
        }
        entry.has_lost_tail = false;
        self.open_entries += added;
        self.grow(history, grown);
        marks
    }
}

/// What a record that carries slots takes.
fn stored(record: &RecordView<'_>) -> Stored {
    let body = if let RecordBody::Slots(bytes) = record.body {
        bytes.len()
    } else {
        0
    };
    let bytes = (afterimage_cache::record::RECORD_HEADER_BYTES + body) as u64;
    let blocks = record.header.length / afterimage_blockdev::BLOCK_BYTES as u64;
    Stored { bytes, blocks }
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
    map.ranges.push(RangeEntry {
        first: CellIndex(first_whole),
        count,
        lsn: header.lsn,
        kind,
    });
    map.entries.len() - before + 1
}

fn mark(history: HistoryId, kind: MarkKind, record: &RecordView<'_>) -> FoundMark {
    let note = if let RecordBody::Note(note) = record.body {
        note
    } else {
        &[]
    };
    FoundMark {
        history,
        kind,
        lsn: record.header.lsn,
        time: record.header.time,
        request: record.header.argument,
        name: mark_name(note),
    }
}

fn begin(history: HistoryId, kind: BatchKind, record: &RecordView<'_>) -> BatchRecord {
    let note = if let RecordBody::Note(note) = record.body {
        note
    } else {
        &[]
    };
    BatchRecord {
        history,
        batch: record.header.batch,
        is_initial: kind == BatchKind::Initial,
        begin: record.header.lsn,
        end: Lsn::ZERO,
        disks: batch_disks(note),
    }
}
