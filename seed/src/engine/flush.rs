//! Writing what is open in the map as one run file, and moving the checkpoint of the log.

use std::sync::Arc;

use afterimage_blockdev::{
    DiskId, FileId, HistoryId, IoBuffer, Lsn, SegmentId, StorageError, StorageErrorKind, StorageOp,
    StorageOutcome,
};

use super::{AfterCommit, Engine, Output, Owner, Phase};
use crate::entry::Entry;
use crate::manifest::{Edit, HistoryState};
use crate::run::{
    RunId, SectionContent, SectionName, SectionTable, TimeSample, encode_run, run_file,
};
use crate::section::Section;

/// Bytes of one write.
const PIECE_BYTES: usize = 4 << 20;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Create,
    Write,
    Sync,
    SyncDirectory,
    Close,
    Commit,
}

/// Which sections in memory a run replaces.
#[derive(Debug)]
struct Replaced {
    history: HistoryId,
    disk: DiskId,
    sections: usize,
    base_parts: usize,
}

/// A run on its way.
#[derive(Debug)]
pub(super) struct Flush {
    run: RunId,
    step: Step,
    file: Option<FileId>,
    bytes: IoBuffer,
    tables: Vec<SectionTable>,
    written: usize,
    replaced: Vec<Replaced>,
    timelines: Vec<(HistoryId, Vec<TimeSample>)>,
    /// Histories whose state is among the edits.
    dirty: Vec<HistoryId>,
    edits: Vec<Edit>,
    entries: usize,
}

impl Engine {
    pub(super) fn flush_when_due(&mut self, at_once: bool, out: &mut Vec<Output>) {
        let is_due = self.open_entries >= self.options.flush_entries;
        if self.flush.is_some() || !(is_due || at_once) {
            return;
        }
        if let Some(at) = self.flush_retry_at.filter(|at| *at > self.now) {
            out.push(Output::WakeAt(at));
            return;
        }
        self.flush_retry_at = None;
        self.begin_flush(out);
    }

    fn begin_flush(&mut self, out: &mut Vec<Output>) {
        let run = RunId(self.next_run);
        self.next_run += 1;
        let mut sections = Vec::new();
        let mut replaced = Vec::new();
        let mut timelines = Vec::new();
        let mut dirty = Vec::new();
        let dropped = self
            .dropped_runs
            .iter()
            .map(|run| Edit::RunDropped { run: *run });
        let mut edits: Vec<Edit> = dropped.collect();
        edits.push(Edit::Checkpoint {
            log_sequence: self.applied_sequence,
        });
        for (history, entry) in &mut self.histories {
            for (disk, map) in &mut entry.disks {
                map.freeze();
                let taken = |parts: &[Arc<Section>]| {
                    parts
                        .iter()
                        .filter(|part| matches!(***part, Section::Memory { .. }))
                        .count()
                };
                let (data, base) = (taken(&map.sections), taken(&map.base_parts));
                if data > 0 {
                    let name = SectionName {
                        history: *history,
                        disk: *disk,
                        is_base_part: false,
                    };
                    sections.push(join(name, &map.sections));
                }
                if base > 0 {
                    let name = SectionName {
                        history: *history,
                        disk: *disk,
                        is_base_part: true,
                    };
                    sections.push(join(name, &map.base_parts));
                }
                if data + base > 0 {
                    let (history, disk) = (*history, *disk);
                    replaced.push(Replaced {
                        history,
                        disk,
                        sections: data,
                        base_parts: base,
                    });
                }
            }
            let samples = core::mem::take(&mut entry.open_timeline);
            if !samples.is_empty() {
                sections.push(timeline(*history, &samples));
                entry.timeline.extend_from_slice(&samples);
                timelines.push((*history, samples));
            }
            if core::mem::take(&mut entry.is_dirty) {
                dirty.push(*history);
                edits.push(Edit::HistoryState(HistoryState {
                    history: *history,
                    // What a writer only announced is not durable before its first frame.
                    epoch: entry.durable_epoch,
                    origin: entry.durable_origin,
                    last: entry.durable,
                    highest_bulk: entry.highest_bulk,
                    time: entry.durable_time,
                }));
                edits.extend(entry.batches.iter().cloned().map(Edit::Batch));
                for (disk, first, last) in &entry.lost {
                    let (disk, first, last) = (*disk, *first, *last);
                    edits.push(Edit::Lost {
                        disk,
                        history: *history,
                        first,
                        last,
                    });
                }
                for hole in &entry.holes {
                    for disk in &hole.undecided {
                        let (first, last) = (hole.first, hole.last);
                        edits.push(Edit::Lost {
                            disk: *disk,
                            history: *history,
                            first,
                            last,
                        });
                    }
                }
            }
        }
        for (disk, state) in &self.disks {
            edits.extend(
                state
                    .sizes
                    .iter()
                    .map(|(history, lsn, size_bytes)| Edit::Size {
                        disk: *disk,
                        history: *history,
                        lsn: *lsn,
                        size_bytes: *size_bytes,
                    }),
            );
        }
        edits.push(Edit::BaseThrough {
            segment: self.bulk_through(),
        });
        let (bytes, tables) = encode_run(self.store, run, &sections);
        edits.push(Edit::Run {
            run,
            bytes: bytes.len() as u64,
        });
        let entries = core::mem::take(&mut self.open_entries);
        self.flush = Some(Flush {
            run,
            step: Step::Create,
            file: None,
            bytes,
            tables,
            written: 0,
            replaced,
            timelines,
            dirty,
            edits,
            entries,
        });
        self.submit(
            Owner::Flush,
            StorageOp::Create {
                name: run_file(run),
            },
            out,
        );
    }

    /// Up to which seed segment all is in base parts once the map is in runs: a segment that is
    /// still on its way may be named later than one behind it. While a first copy goes on, the
    /// directories must be read at start, because they tell what is done of it.
    fn bulk_through(&self) -> SegmentId {
        let is_copying = |entry: &super::state::HistoryEntry| {
            entry
                .batches
                .iter()
                .any(|b| b.is_initial && b.end == Lsn::ZERO)
        };
        if self.histories.values().any(is_copying) || self.unread.first_segment().is_some() {
            return self.base_through;
        }
        let last = self
            .seed_segments
            .keys()
            .next_back()
            .copied()
            .unwrap_or_default();
        self.bulk
            .first()
            .map_or(last, |first| last.min(SegmentId(first.0 - 1)))
    }

    pub(super) fn flush_done(
        &mut self,
        result: Result<StorageOutcome, StorageError>,
        out: &mut Vec<Output>,
    ) {
        let Some(flush) = &mut self.flush else { return };
        let outcome = match result {
            Ok(outcome) => outcome,
            Err(error) if error.is_no_space() => return self.give_flush_up(out),
            Err(error) if matches!(error.kind, StorageErrorKind::Exists) => {
                // Left over from a start that was cut before the manifest named it.
                self.give_flush_up(out);
                self.flush_retry_at = None;
                return;
            }
            Err(error) => return self.fail(error.into(), out),
        };
        if let StorageOutcome::Opened { file, .. } = outcome {
            flush.file = Some(file);
            flush.step = Step::Write;
        }
        let Some(file) = flush.file else { return };
        let op = match flush.step {
            Step::Create => return,
            Step::Write if flush.written < flush.bytes.len() => {
                let end = (flush.written + PIECE_BYTES).min(flush.bytes.len());
                let buffer = IoBuffer::copy_of(&flush.bytes[flush.written..end]);
                let offset = flush.written as u64;
                flush.written = end;
                StorageOp::Write {
                    file,
                    offset,
                    buffer,
                }
            }
            Step::Write => {
                flush.step = Step::Sync;
                StorageOp::Sync { file }
            }
            Step::Sync => {
                flush.step = Step::SyncDirectory;
                StorageOp::SyncDirectory {
                    directory: "runs".to_owned(),
                }
            }
            Step::SyncDirectory => {
                flush.step = Step::Close;
                StorageOp::Close { file }
            }
            Step::Close => {
                flush.step = Step::Commit;
                let edits = flush.edits.clone();
                return self.commit(edits, AfterCommit::Flush, out);
            }
            Step::Commit => return,
        };
        self.submit(Owner::Flush, op, out);
    }

    /// The medium is full: what is open stays open, and counts again.
    fn give_flush_up(&mut self, out: &mut Vec<Output>) {
        let Some(flush) = self.flush.take() else {
            return;
        };
        self.open_entries += flush.entries;
        for (history, samples) in flush.timelines {
            if let Some(entry) = self.histories.get_mut(&history) {
                let kept = entry.timeline.len().saturating_sub(samples.len());
                entry.timeline.truncate(kept);
                entry.open_timeline.splice(0..0, samples);
            }
        }
        for history in flush.dirty {
            if let Some(entry) = self.histories.get_mut(&history) {
                entry.is_dirty = true;
            }
        }
        if let Some(file) = flush.file {
            self.submit(Owner::Nobody, StorageOp::Close { file }, out);
        }
        let name = run_file(flush.run);
        self.submit(Owner::Nobody, StorageOp::Remove { name }, out);
        let retry_at = self.now.after(self.options.retry);
        self.flush_retry_at = Some(retry_at);
        out.push(Output::WakeAt(retry_at));
        if self.phase == Phase::Stopping {
            // The log has it all; the next start makes the map from there.
            self.open_entries = 0;
        }
    }

    /// The manifest names the run: it takes the place of what was in memory.
    pub(super) fn flush_committed(&mut self, _out: &mut Vec<Output>) {
        let Some(mut flush) = self.flush.take() else {
            return;
        };
        self.runs.insert(flush.run, flush.bytes.len() as u64);
        self.has_new_runs = true;
        self.note_times(flush.run, &flush.tables);
        // Their files are swept at the next start.
        self.dropped_runs.clear();
        self.note_covered(&flush.edits);
        for table in core::mem::take(&mut flush.tables) {
            let name = table.name;
            let Some(entry) = self.histories.get_mut(&name.history) else {
                continue;
            };
            let Some(map) = entry.disks.get_mut(&name.disk) else {
                continue;
            };
            let replaced = flush
                .replaced
                .iter()
                .find(|known| known.history == name.history && known.disk == name.disk);
            let Some(replaced) = replaced else { continue };
            let (parts, count) = if name.is_base_part {
                (&mut map.base_parts, replaced.base_parts)
            } else {
                (&mut map.sections, replaced.sections)
            };
            let first = parts
                .iter()
                .position(|part| matches!(**part, Section::Memory { .. }))
                .unwrap_or(parts.len());
            let section = Arc::new(Section::File {
                run: flush.run,
                table,
            });
            parts.splice(first..first + count, [section]);
        }
    }
}

/// Joins the sections in memory into one.
fn join(name: SectionName, parts: &[Arc<Section>]) -> SectionContent {
    let mut content = SectionContent {
        name,
        entries: Vec::new(),
        ranges: Vec::new(),
        timeline: Vec::new(),
        low: Lsn(u64::MAX),
        high: Lsn::ZERO,
    };
    for part in parts {
        if let Section::Memory {
            entries,
            ranges,
            low,
            high,
        } = &**part
        {
            content.entries.extend_from_slice(entries);
            content.ranges.extend_from_slice(ranges);
            content.low = content.low.min(*low);
            content.high = content.high.max(*high);
        }
    }
    content.entries.sort_unstable_by_key(Entry::key);
    content
}

fn timeline(history: HistoryId, samples: &[TimeSample]) -> SectionContent {
    SectionContent {
        name: SectionName {
            history,
            disk: DiskId::NIL,
            is_base_part: false,
        },
        entries: Vec::new(),
        ranges: Vec::new(),
        timeline: samples.to_vec(),
        low: samples.first().map_or(Lsn::ZERO, |sample| sample.lsn),
        high: samples.last().map_or(Lsn::ZERO, |sample| sample.lsn),
    }
}
