//! Bulk blocks go straight into seed segments. One segment fills while others are sealed; an
//! acknowledgement follows the manifest commit that names the segment.

use std::collections::BTreeMap;

use afterimage_blockdev::{
    FileId, IoBuffer, Monotonic, SegmentId, StorageError, StorageErrorKind, StorageOp,
    StorageOutcome,
};
use afterimage_cache::{Frame, SlotContext};

use super::start::bulk_entry;
use super::state::SeedSegment;
use super::{AfterCommit, Engine, Event, Output, Owner, StreamEnd, StreamNumber};
use crate::manifest::Edit;
use crate::reader::SEED_BIT;
use crate::segment::{SeedSegmentBuilder, seed_file};

/// A bulk frame that waits for its segment.
#[derive(Debug)]
struct Waiting {
    stream: StreamNumber,
    number: u64,
    bytes: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Create,
    Write,
    Sync,
    SyncDirectory,
    Close,
    Commit,
    /// The medium was full: all of it is written again after a while.
    Retry(Monotonic),
}

#[derive(Debug)]
struct BulkSegment {
    /// `None` once it is finished.
    builder: Option<SeedSegmentBuilder>,
    file: Option<FileId>,
    step: Step,
    born: Monotonic,
    writes: Vec<(u64, IoBuffer)>,
    in_flight: usize,
    waiting: Vec<Waiting>,
    slots: Vec<SlotContext>,
    /// Kept until it is durable, so that a full medium costs nothing but time.
    frames: Vec<Frame>,
    root: [u8; 32],
    /// Of the frames.
    bytes: u64,
    /// Of the finished file.
    file_bytes: u64,
    is_sealing: bool,
}

/// The segments that are being filled or sealed.
#[derive(Debug, Default)]
pub(super) struct BulkSegments {
    open: Option<SegmentId>,
    all: BTreeMap<SegmentId, BulkSegment>,
    /// The medium was full, and streams were told.
    has_paused: bool,
}

impl BulkSegments {
    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Says whether a segment waits for room on the medium.
    pub(super) fn waits_for_room(&self) -> bool {
        self.has_paused
            && self
                .all
                .values()
                .any(|segment| matches!(segment.step, Step::Retry(_)))
    }

    /// The first segment that does not count yet.
    pub(super) fn first(&self) -> Option<SegmentId> {
        self.all.keys().next().copied()
    }

    /// Bytes on their way to the medium.
    pub(super) fn bytes(&self) -> u64 {
        self.all.values().map(|segment| segment.bytes).sum()
    }
}

impl Engine {
    /// Takes a bulk frame whose hashes were verified.
    pub(super) fn bulk_frame(
        &mut self,
        stream: StreamNumber,
        number: u64,
        frame: &Frame,
        out: &mut Vec<Output>,
    ) {
        let Some(open) = self.streams.get(&stream) else {
            out.push(Output::Event(Event::Over {
                stream,
                end: StreamEnd::Fenced,
            }));
            return;
        };
        let identity = frame.header.identity;
        let is_of_stream = frame.header.is_bulk
            && identity.machine == open.machine
            && identity.history == open.history
            && identity.epoch == open.epoch;
        if !is_of_stream {
            return self.end_stream(stream, StreamEnd::Damaged, out);
        }
        let (machine, history) = (open.machine, open.history);
        if let Some(why) = self.refusal_of(machine, history, frame) {
            tracing::error!(%history, %why, "a frame is refused");
            return self.end_stream(stream, StreamEnd::Damaged, out);
        }
        let bytes = frame.bytes.len() as u64;
        if let Some(open) = self.streams.get_mut(&stream) {
            open.queued_bytes += bytes;
        }
        let now = self.now;
        let id = match self.bulk.open {
            Some(id) => id,
            None => self.begin_bulk_segment(now, out),
        };
        let Some(segment) = self.bulk.all.get_mut(&id) else {
            return;
        };
        add_frame(segment, frame);
        segment.waiting.push(Waiting {
            stream,
            number,
            bytes,
        });
        segment.bytes += bytes;
        segment.frames.push(frame.clone());
        let last = frame.header.last;
        if let Some(entry) = self.histories.get_mut(&history) {
            entry.highest_bulk = entry.highest_bulk.max(last);
        }
        let is_full = segment.bytes >= self.options.bulk_segment_bytes;
        self.write_bulk(id, out);
        if is_full {
            self.seal_bulk(id, out);
        }
    }

    fn begin_bulk_segment(&mut self, now: Monotonic, out: &mut Vec<Output>) -> SegmentId {
        let id = SegmentId(self.next_segment | SEED_BIT);
        self.next_segment += 1;
        self.bulk.open = Some(id);
        let segment = BulkSegment {
            builder: Some(SeedSegmentBuilder::new(self.store, id)),
            file: None,
            step: Step::Create,
            born: now,
            writes: Vec::new(),
            in_flight: 0,
            waiting: Vec::new(),
            slots: Vec::new(),
            frames: Vec::new(),
            root: [0; 32],
            bytes: 0,
            file_bytes: 0,
            is_sealing: false,
        };
        self.bulk.all.insert(id, segment);
        self.submit(
            Owner::Bulk(id),
            StorageOp::Create {
                name: seed_file(id, 0),
            },
            out,
        );
        id
    }

    /// Hands whole pieces to the storage.
    fn write_bulk(&mut self, id: SegmentId, out: &mut Vec<Output>) {
        let Some(segment) = self.bulk.all.get_mut(&id) else {
            return;
        };
        if let Some(ready) = segment
            .builder
            .as_mut()
            .and_then(SeedSegmentBuilder::take_ready)
        {
            segment.writes.push(ready);
        }
        let Some(file) = segment.file.filter(|_| segment.step == Step::Write) else {
            return;
        };
        let writes = core::mem::take(&mut segment.writes);
        segment.in_flight += writes.len();
        for (offset, buffer) in writes {
            self.submit(
                Owner::Bulk(id),
                StorageOp::Write {
                    file,
                    offset,
                    buffer,
                },
                out,
            );
        }
    }

    pub(super) fn seal_bulk_when_due(&mut self, at_once: bool, out: &mut Vec<Output>) {
        self.retry_bulk(out);
        let Some(id) = self.bulk.open else { return };
        let Some(segment) = self.bulk.all.get(&id) else {
            return;
        };
        let due = segment.born.after(self.options.bulk_age);
        let is_alone = self.bulk.all.len() == 1;
        if at_once || (self.now >= due && is_alone) {
            self.seal_bulk(id, out);
        } else if is_alone {
            out.push(Output::WakeAt(due));
        }
    }

    fn seal_bulk(&mut self, id: SegmentId, out: &mut Vec<Output>) {
        if self.bulk.open == Some(id) {
            self.bulk.open = None;
        }
        let Some(segment) = self.bulk.all.get_mut(&id) else {
            return;
        };
        if let Some(builder) = segment.builder.take() {
            let (offset, buffer, root) = builder.finish();
            segment.root = root;
            segment.file_bytes = offset + buffer.len() as u64;
            segment.writes.push((offset, buffer));
            segment.is_sealing = true;
        }
        self.write_bulk(id, out);
    }

    fn retry_bulk(&mut self, out: &mut Vec<Output>) {
        let now = self.now;
        let later = self
            .bulk
            .all
            .values()
            .filter_map(|segment| match segment.step {
                Step::Retry(at) if at > now => Some(at),
                _ => None,
            });
        out.extend(later.min().map(Output::WakeAt));
        let waits = |segment: &BulkSegment| matches!(segment.step, Step::Retry(at) if at <= now);
        let due: Vec<_> = self
            .bulk
            .all
            .iter()
            .filter(|(_, s)| waits(s))
            .map(|(id, _)| *id)
            .collect();
        for old in due {
            let Some(mut segment) = self.bulk.all.remove(&old) else {
                continue;
            };
            let id = SegmentId(self.next_segment | SEED_BIT);
            self.next_segment += 1;
            if self.bulk.open == Some(old) {
                self.bulk.open = None;
            }
            let frames = core::mem::take(&mut segment.frames);
            segment.builder = Some(SeedSegmentBuilder::new(self.store, id));
            segment.file = None;
            segment.step = Step::Create;
            segment.writes.clear();
            segment.slots.clear();
            // What is still under way names the old segment, and is not heard any more.
            segment.in_flight = 0;
            segment.is_sealing = false;
            for frame in &frames {
                add_frame(&mut segment, frame);
            }
            segment.frames = frames;
            self.bulk.all.insert(id, segment);
            self.submit(
                Owner::Bulk(id),
                StorageOp::Create {
                    name: seed_file(id, 0),
                },
                out,
            );
            self.seal_bulk(id, out);
        }
    }

    pub(super) fn bulk_done(
        &mut self,
        id: SegmentId,
        result: Result<StorageOutcome, StorageError>,
        out: &mut Vec<Output>,
    ) {
        let retry_at = self.now.after(self.options.retry);
        let Some(segment) = self.bulk.all.get_mut(&id) else {
            return;
        };
        let outcome = match result {
            Ok(outcome) => outcome,
            Err(error) if error.is_no_space() => {
                segment.in_flight = segment.in_flight.saturating_sub(1);
                self.bulk_no_space(id, retry_at, out);
                return;
            }
            Err(error) if matches!(error.kind, StorageErrorKind::Exists) => {
                // Left over from a start that was cut before the manifest named it.
                segment.step = Step::Retry(self.now);
                return;
            }
            Err(error) => return self.fail(error.into(), out),
        };
        if matches!(segment.step, Step::Retry(_)) {
            segment.in_flight = segment.in_flight.saturating_sub(1);
            return;
        }
        let Some(file) = segment.file.or(match &outcome {
            StorageOutcome::Opened { file, .. } => Some(*file),
            _ => None,
        }) else {
            return;
        };
        match segment.step {
            Step::Create => {
                segment.file = Some(file);
                segment.step = Step::Write;
                self.write_bulk(id, out);
            }
            Step::Write => {
                segment.in_flight -= 1;
                if segment.is_sealing && segment.in_flight == 0 && segment.writes.is_empty() {
                    segment.step = Step::Sync;
                    self.submit(Owner::Bulk(id), StorageOp::Sync { file }, out);
                }
            }
            Step::Sync => {
                segment.step = Step::SyncDirectory;
                let directory = "segments".to_owned();
                self.submit(Owner::Bulk(id), StorageOp::SyncDirectory { directory }, out);
            }
            Step::SyncDirectory => {
                segment.step = Step::Close;
                self.submit(Owner::Bulk(id), StorageOp::Close { file }, out);
            }
            Step::Close => {
                segment.step = Step::Commit;
                let slot_count = afterimage_cache::bytes::narrow(segment.slots.len());
                let (bytes, root) = (segment.file_bytes, segment.root);
                let edit = Edit::Segment {
                    segment: id,
                    generation: 0,
                    slot_count,
                    bytes,
                    root,
                };
                self.commit(vec![edit], AfterCommit::Bulk(id), out);
            }
            Step::Commit | Step::Retry(_) => {}
        }
    }

    /// Gives the file up; the frames are kept and written again later.
    fn bulk_no_space(&mut self, id: SegmentId, retry_at: Monotonic, out: &mut Vec<Output>) {
        let Some(segment) = self.bulk.all.get_mut(&id) else {
            return;
        };
        let is_first = !matches!(segment.step, Step::Retry(_));
        segment.step = Step::Retry(retry_at);
        segment.writes.clear();
        segment.builder = None;
        let file = segment.file.take();
        if self.bulk.open == Some(id) {
            self.bulk.open = None;
        }
        if is_first {
            // Nobody waits for these two; an unnamed file is swept at the next start anyway.
            if let Some(file) = file {
                self.submit(Owner::Nobody, StorageOp::Close { file }, out);
            }
            let name = seed_file(id, 0);
            self.submit(Owner::Nobody, StorageOp::Remove { name }, out);
            if !core::mem::replace(&mut self.bulk.has_paused, true) {
                out.push(Output::Event(Event::Paused { is_budget: false }));
            }
        }
        out.push(Output::WakeAt(retry_at));
    }

    /// The manifest names the segment: its blocks count, and are acknowledged.
    pub(super) fn bulk_committed(&mut self, id: SegmentId, out: &mut Vec<Output>) {
        let Some(segment) = self.bulk.all.remove(&id) else {
            return;
        };
        let slot_count = afterimage_cache::bytes::narrow(segment.slots.len());
        let counted = SeedSegment {
            generation: 0,
            slot_count,
            bytes: segment.file_bytes,
            root: segment.root,
        };
        self.seed_segments.insert(id, counted);
        let slots = segment.slots.iter();
        let slots = slots.map(|context| (context.disk, context.mask));
        self.space.copied(segment.file_bytes, slots);
        for (slot, context) in (0u32..).zip(&segment.slots) {
            let Some(entry) = self.histories.get_mut(&context.history) else {
                continue;
            };
            entry.is_dirty = true;
            let found = bulk_entry(context, id, slot);
            let is_copying = entry
                .copying_since(context.disk)
                .is_some_and(|lsn| found.lsn >= lsn);
            let map = entry.disks.entry(context.disk).or_default();
            if is_copying {
                map.bulk_done(&found);
            }
            map.bulk_entries.push(found);
            self.open_entries += 1;
        }
        if core::mem::take(&mut self.bulk.has_paused) && self.is_paused.is_none() {
            out.push(Output::Event(Event::Resumed));
        }
        for waiting in segment.waiting {
            let Some(open) = self.streams.get_mut(&waiting.stream) else {
                continue;
            };
            open.queued_bytes = open.queued_bytes.saturating_sub(waiting.bytes);
            out.push(Output::Event(Event::BulkDurable {
                stream: waiting.stream,
                number: waiting.number,
                queued_bytes: open.queued_bytes,
            }));
        }
    }
}

/// Adds the slots of a frame to a segment.
fn add_frame(segment: &mut BulkSegment, frame: &Frame) {
    let Some(builder) = segment.builder.as_mut() else {
        return;
    };
    let view = frame.view();
    let history = view.header.identity.history;
    for (_, record) in view.records().map_while(Result::ok) {
        for (_, context, slot) in record.slots(history).map_while(Result::ok) {
            builder.push(&context, &slot.header.hash, slot.bytes);
            segment.slots.push(context);
        }
    }
}
