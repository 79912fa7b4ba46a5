//! Moving the slots of a segment that somebody needs into a new file of the same segment, so that
//! no map changes. A log segment becomes a seed segment by it.
//!
//! Invariants
//! * The new file is whole and synced, with its name, before the manifest names it; the old one
//!   goes after that commit.
//! * Slots keep their bytes, numbers and hashes; nothing is decrypted.
//! * What cannot be read as it should be is not left behind: the segment stays as it is.
//! * Before anything is left out there are notes that tell of it, and the new file names them.

use afterimage_blockdev::{
    FileId, FileName, HistoryId, IoBuffer, Lsn, SegmentId, StorageError, StorageErrorKind,
    StorageOp, StorageOutcome,
};
use afterimage_cache::SlotView;
use afterimage_cache::segment::{SegmentScan, segment_file};

use super::live::LiveSlots;
use super::state::SeedSegment;
use super::sweep::Judged;
use super::{AfterCommit, Engine, Output, Owner, Phase};
use crate::manifest::{Edit, Noted};
use crate::segment::{FOOTERS_BYTES, SECTOR, SeedFooter, SeedSegmentBuilder, seed_file};

/// Where a segment lies before.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    Log { last_sequence: u64, bytes: u64 },
    Seed(SeedSegment),
}

impl Source {
    /// The last commit of a log segment; 0 for any other.
    fn last_sequence(self) -> u64 {
        match self {
            Self::Log { last_sequence, .. } => last_sequence,
            Self::Seed(_) => 0,
        }
    }
}

impl Source {
    /// Bytes of the file.
    pub(super) fn bytes(self) -> u64 {
        match self {
            Self::Log { bytes, .. } => bytes,
            Self::Seed(state) => state.bytes,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Step {
    Open,
    Read,
    CloseSource,
    /// What is left out is told of first.
    Notes,
    Create,
    Write,
    Sync,
    SyncDirectory,
    Close,
    Commit,
}

/// A segment on its way.
#[derive(Debug)]
pub(super) struct Rewrite {
    segment: SegmentId,
    source: Source,
    live: LiveSlots,
    step: Step,
    file: Option<FileId>,
    /// The needed slots, when there are any.
    builder: Option<Box<SeedSegmentBuilder>>,
    /// Pieces to be written, last one first.
    pieces: Vec<(u64, IoBuffer)>,
    /// What the manifest is told of the new file; `None` when nothing is needed.
    moved: Option<SeedSegment>,
    is_in_flight: bool,
    failure: Option<String>,
}

/// What became of a log segment's bytes.
enum Sorted {
    /// It must stay in the log.
    Stays,
    /// Its needed slots.
    Moves(Box<SeedSegmentBuilder>),
    /// Something in it cannot be read.
    Damaged(String),
}

impl Engine {
    pub(super) fn begin_rewrite(&mut self, judged: Judged, out: &mut Vec<Output>) {
        let Judged {
            segment,
            source,
            live,
        } = judged;
        let is_dead_seed = live.count() == 0 && matches!(source, Source::Seed(_));
        self.rewrite = Some(Rewrite {
            segment,
            source,
            live,
            step: if is_dead_seed {
                Step::CloseSource
            } else {
                Step::Open
            },
            file: None,
            builder: None,
            pieces: Vec::new(),
            moved: None,
            is_in_flight: false,
            failure: None,
        });
        if is_dead_seed {
            return self.rewrite_on(out);
        }
        let name = source_name(segment, source);
        self.rewrite_ask(StorageOp::Open { name }, out);
    }

    fn rewrite_ask(&mut self, op: StorageOp, out: &mut Vec<Output>) {
        if let Some(rewrite) = &mut self.rewrite {
            rewrite.is_in_flight = true;
        }
        self.submit(Owner::Rewrite, op, out);
    }

    pub(super) fn rewrite_done(
        &mut self,
        result: Result<StorageOutcome, StorageError>,
        out: &mut Vec<Output>,
    ) {
        let Some(rewrite) = &mut self.rewrite else {
            return;
        };
        rewrite.is_in_flight = false;
        if self.phase == Phase::Stopping {
            rewrite.failure = Some("the store is being closed".to_owned());
        }
        match result {
            Ok(StorageOutcome::Opened { file, length }) => {
                rewrite.file = Some(file);
                if rewrite.failure.is_none() && rewrite.step == Step::Open {
                    rewrite.step = Step::Read;
                    let len = usize::try_from(length).unwrap_or(0);
                    let buffer = IoBuffer::zeroed(len.next_multiple_of(SECTOR));
                    let offset = 0;
                    let op = StorageOp::Read {
                        file,
                        offset,
                        buffer,
                    };
                    return self.rewrite_ask(op, out);
                }
            }
            Ok(StorageOutcome::Read(bytes)) if rewrite.failure.is_none() => {
                return self.source_read(&bytes, out);
            }
            Ok(_) => {}
            Err(error) => {
                let is_new = rewrite.step >= Step::Create;
                let is_mild = error.is_no_space() || matches!(error.kind, StorageErrorKind::Exists);
                if is_new && !is_mild {
                    return self.fail(error.into(), out);
                }
                rewrite.failure = Some(error.to_string());
            }
        }
        self.rewrite_on(out);
    }

    fn source_read(&mut self, bytes: &[u8], out: &mut Vec<Output>) {
        let Some(rewrite) = &self.rewrite else { return };
        let must_go = self.log.stored_bytes() > self.options.cache_bytes;
        let floor = |history: HistoryId| self.histories.get(&history).map(|entry| entry.floor);
        let builder = SeedSegmentBuilder::new(self.store, rewrite.segment);
        let sorted = match rewrite.source {
            Source::Log { .. } => {
                let scan = SegmentScan::new(bytes, self.store, rewrite.segment);
                sort_log(scan, &rewrite.live, builder, must_go, floor)
            }
            Source::Seed(_) => sort_seed(bytes, self.store, rewrite, builder),
        };
        let Some(rewrite) = &mut self.rewrite else {
            return;
        };
        match sorted {
            Sorted::Stays => {
                rewrite.failure = Some(String::new());
            }
            Sorted::Damaged(why) => {
                rewrite.failure = Some(why.clone());
                let name = source_name(rewrite.segment, rewrite.source);
                self.note_damage(format!("{name} stays as it is: {why}"));
            }
            Sorted::Moves(builder) if builder.slot_count() == 0 => {}
            Sorted::Moves(builder) => rewrite.builder = Some(builder),
        }
        self.rewrite_on(out);
    }

    /// Notes were written, or could not be.
    pub(super) fn rewrite_has_notes(&mut self, out: &mut Vec<Output>) {
        let waits = |rewrite: &Rewrite| rewrite.step == Step::Notes;
        if self.rewrite.as_ref().is_some_and(waits) {
            self.rewrite_on(out);
        }
    }

    fn rewrite_on(&mut self, out: &mut Vec<Output>) {
        let notes = &mut self.notes;
        let Some(rewrite) = &mut self.rewrite else {
            return;
        };
        if rewrite.failure.is_some() {
            if !rewrite.is_in_flight {
                self.give_rewrite_up(out);
            }
            return;
        }
        let op = match (rewrite.step, rewrite.file) {
            (Step::Open | Step::Read, Some(file)) => {
                rewrite.step = Step::CloseSource;
                rewrite.file = None;
                StorageOp::Close { file }
            }
            (Step::CloseSource | Step::Notes, _) => {
                rewrite.step = Step::Notes;
                if !notes.tell_of(rewrite.source.last_sequence()) {
                    return;
                }
                match rewrite.lay_out(notes.needed()) {
                    None => return self.commit_rewrite(out),
                    Some(name) => {
                        rewrite.step = Step::Create;
                        StorageOp::Create { name }
                    }
                }
            }
            (Step::Create | Step::Write, Some(file)) => {
                rewrite.step = Step::Write;
                match rewrite.pieces.pop() {
                    Some((offset, buffer)) => StorageOp::Write {
                        file,
                        offset,
                        buffer,
                    },
                    None => {
                        rewrite.step = Step::Sync;
                        StorageOp::Sync { file }
                    }
                }
            }
            (Step::Sync, _) => {
                rewrite.step = Step::SyncDirectory;
                let directory = "segments".to_owned();
                StorageOp::SyncDirectory { directory }
            }
            (Step::SyncDirectory, Some(file)) => {
                rewrite.step = Step::Close;
                rewrite.file = None;
                StorageOp::Close { file }
            }
            (Step::Close, _) => return self.commit_rewrite(out),
            _ => return,
        };
        self.rewrite_ask(op, out);
    }

    fn commit_rewrite(&mut self, out: &mut Vec<Output>) {
        let Some(rewrite) = &mut self.rewrite else {
            return;
        };
        rewrite.step = Step::Commit;
        let segment = rewrite.segment;
        let mut edits = Vec::new();
        if let Some(moved) = rewrite.moved {
            edits.push(Edit::Segment {
                segment,
                generation: moved.generation,
                slot_count: moved.slot_count,
                bytes: moved.bytes,
                root: moved.root,
            });
        } else if matches!(rewrite.source, Source::Seed(_)) {
            edits.push(Edit::SegmentDropped { segment });
        }
        if let Source::Log { last_sequence, .. } = rewrite.source {
            let log_sequence = last_sequence;
            edits.push(Edit::LogReleased { log_sequence });
        }
        self.commit(edits, AfterCommit::Rewrite, out);
    }

    pub(super) fn rewrite_committed(&mut self, out: &mut Vec<Output>) {
        let Some(rewrite) = self.rewrite.take() else {
            return;
        };
        let segment = rewrite.segment;
        let written = rewrite.moved.map_or(0, |moved| moved.bytes);
        match rewrite.moved {
            Some(moved) => {
                self.seed_segments.insert(segment, moved);
            }
            None => {
                self.seed_segments.remove(&segment);
            }
        }
        if let Some(reader) = &self.reader {
            match rewrite.moved {
                Some(moved) => reader.moved(segment, moved.generation),
                None => reader.removed(segment),
            }
        }
        let done = &mut self.sweep.done;
        let before = rewrite.source.bytes();
        done.freed_bytes += i64::try_from(before).unwrap_or(i64::MAX);
        done.freed_bytes -= i64::try_from(written).unwrap_or(i64::MAX);
        done.written_bytes += written;
        match (rewrite.source, rewrite.moved) {
            (_, None) => done.dropped += 1,
            (Source::Log { .. }, _) => done.destaged += 1,
            (Source::Seed(_), _) => done.rewritten += 1,
        }
        match rewrite.source {
            Source::Log { last_sequence, .. } => {
                self.log_released = self.log_released.max(last_sequence);
            }
            Source::Seed(_) => self.removals.push(source_name(segment, rewrite.source)),
        }
        self.remove_retired(out);
        self.sweep_when_due(out);
    }

    fn give_rewrite_up(&mut self, out: &mut Vec<Output>) {
        let Some(rewrite) = self.rewrite.take() else {
            return;
        };
        let why = rewrite.failure.unwrap_or_default();
        if !why.is_empty() {
            tracing::warn!(%why, segment = %rewrite.segment, "a segment is not rewritten");
        }
        if matches!(rewrite.source, Source::Log { .. }) {
            self.stop_destaging();
        }
        if let Some(file) = rewrite.file {
            self.submit(Owner::Nobody, StorageOp::Close { file }, out);
        }
        if let Some(moved) = rewrite.moved.filter(|_| rewrite.step >= Step::Create) {
            let name = seed_file(rewrite.segment, moved.generation);
            self.submit(Owner::Nobody, StorageOp::Remove { name }, out);
        }
        if self.phase == Phase::Running {
            self.sweep_when_due(out);
        }
    }

    pub(super) fn give_rewrite_up_when_stopping(&mut self, out: &mut Vec<Output>) {
        let Some(rewrite) = &mut self.rewrite else {
            return;
        };
        if rewrite.step != Step::Commit && !rewrite.is_in_flight {
            rewrite.failure = Some("the store is being closed".to_owned());
            self.give_rewrite_up(out);
        }
    }
}

impl Rewrite {
    /// Lays the new file out, if there is anything to keep; gives back its name.
    fn lay_out(&mut self, notes: u32) -> Option<FileName> {
        let mut builder = self.builder.take()?;
        builder.need_notes(notes);
        let slot_count = builder.slot_count();
        let generation = match self.source {
            Source::Log { .. } => 1,
            Source::Seed(state) => state.generation + 1,
        };
        let (offset, end, root) = builder.finish();
        self.moved = Some(SeedSegment {
            generation,
            slot_count,
            bytes: offset + end.len() as u64,
            root,
        });
        self.pieces.push((offset, end));
        Some(seed_file(self.segment, generation))
    }

    /// What is about to become of it.
    pub(super) fn moving(&self) -> Edit {
        moving(self.segment, self.source, &self.live)
    }
}

/// What is about to become of a segment.
pub(super) fn moving(segment: SegmentId, source: Source, live: &LiveSlots) -> Edit {
    Edit::Noted(Noted::Moving {
        segment,
        last_sequence: source.last_sequence(),
        needed: live.count(),
    })
}

fn source_name(segment: SegmentId, source: Source) -> FileName {
    match source {
        Source::Log { .. } => segment_file("log", segment),
        Source::Seed(state) => seed_file(segment, state.generation),
    }
}

/// Takes the needed slots out of a log segment, once it has left every window.
fn sort_log(
    mut scan: SegmentScan<'_>,
    live: &LiveSlots,
    mut builder: SeedSegmentBuilder,
    must_go: bool,
    floor: impl Fn(HistoryId) -> Option<Lsn>,
) -> Sorted {
    while let Some(item) = scan.step() {
        let commit = match item {
            Ok(commit) => commit,
            // Behind the last commit lie the directory, or zeroes.
            Err(end) if end.resumed.is_none() => break,
            Err(end) => return Sorted::Damaged(end.damage.to_string()),
        };
        let mut slot = commit.header.first_slot;
        for at in &commit.frames {
            let Some(frame) = scan.frame(*at) else {
                return Sorted::Damaged("a frame cannot be read".to_owned());
            };
            let history = frame.header.identity.history;
            let is_behind = floor(history).is_none_or(|floor| frame.header.last < floor);
            if !is_behind && !must_go {
                return Sorted::Stays;
            }
            for record in frame.records() {
                let Ok((_, record)) = record else {
                    return Sorted::Damaged("a record cannot be read".to_owned());
                };
                let mut found = 0;
                for item in record.slots(history) {
                    let Ok((_, context, view)) = item else {
                        return Sorted::Damaged("a slot cannot be read".to_owned());
                    };
                    if live.has(slot + found) {
                        builder.push_at(slot + found, &context, &view.header.hash, view.bytes);
                    }
                    found += 1;
                }
                if found != u32::from(record.slot_count) {
                    return Sorted::Damaged("a record lacks slots".to_owned());
                }
                slot += found;
            }
        }
    }
    if builder.slot_count() == live.count() {
        Sorted::Moves(Box::new(builder))
    } else {
        Sorted::Damaged("slots that are needed were not found".to_owned())
    }
}

fn sort_seed(
    bytes: &[u8],
    store: afterimage_blockdev::StoreId,
    rewrite: &Rewrite,
    mut builder: SeedSegmentBuilder,
) -> Sorted {
    let tail = bytes.len().saturating_sub(FOOTERS_BYTES);
    let found = SeedFooter::find(bytes.get(tail..).unwrap_or(&[]), store, rewrite.segment)
        .and_then(|footer| {
            let at = usize::try_from(footer.directory_offset).unwrap_or(usize::MAX);
            footer.find_directory(bytes.get(at..).unwrap_or(&[]))
        });
    let (offsets, entries) = match found {
        Ok(found) => found,
        Err(damage) => return Sorted::Damaged(damage.to_string()),
    };
    for entry in entries.iter().filter(|entry| rewrite.live.has(entry.slot)) {
        let at = offsets.get(entry.slot).unwrap_or(u64::MAX);
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        match SlotView::parse(bytes.get(at..).unwrap_or(&[])) {
            Ok(view) => builder.push_at(entry.slot, &entry.context, &entry.hash, view.bytes),
            Err(damage) => return Sorted::Damaged(damage.to_string()),
        }
    }
    if builder.slot_count() == rewrite.live.count() {
        Sorted::Moves(Box::new(builder))
    } else {
        Sorted::Damaged("slots that are needed were not found".to_owned())
    }
}
