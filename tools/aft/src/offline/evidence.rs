//! What segments say by themselves, without a manifest.

use std::collections::{BTreeMap, BTreeSet};

use afterimage_blockdev::{
    BatchId, DiskId, HistoryId, Lsn, MachineId, SegmentId, StoreId, Timestamp,
};
use afterimage_cache::record::RecordKind;
use afterimage_cache::segment::{SegmentScan, segment_file};
use afterimage_cache::{FrameView, MarkKind};
use afterimage_seed::run::{self, RunFooter, RunId, parse_run_file, run_file};
use afterimage_seed::segment::{
    FOOTERS_BYTES, SeedFooter, check_header, parse_seed_file, seed_file,
};

use super::check::log_segments;
use super::state::NamedSegment;
use super::{Finding, Store};
use crate::error::AftError;

/// A mark of the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Mark {
    pub(super) machine: MachineId,
    pub(super) history: HistoryId,
    pub(super) lsn: Lsn,
    pub(super) time: Timestamp,
    pub(super) kind: MarkKind,
    pub(super) name: Vec<u8>,
}

/// A batch of the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Batch {
    pub(super) history: HistoryId,
    pub(super) batch: BatchId,
    pub(super) begin: Lsn,
    /// Zero while it is open.
    pub(super) end: Lsn,
    pub(super) disks: BTreeSet<DiskId>,
}

/// A file of a seed segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct SeedFile {
    pub(super) named: NamedSegment,
    /// Number of the notes that tell what was left out of it; 0 for none.
    pub(super) needs_notes: u32,
}

/// What segments say by themselves.
#[derive(Clone, Default, Debug)]
pub(super) struct Evidence {
    /// Sequences of the first and last commit of each segment of the log.
    ranges: Vec<(u64, u64)>,
    /// Commits that are missing between two others: the last one, and what is to be said.
    pub(super) gaps: Vec<(u64, Finding)>,
    /// Sequence of its last commit.
    pub(super) last_sequence: Option<u64>,
    /// Each history that wrote, its machine, and its highest LSN in the log.
    pub(super) histories: BTreeMap<HistoryId, (MachineId, Lsn)>,
    /// Of each segment of the log the first LSN of each history, and its commit.
    firsts: Vec<(u64, HistoryId, Lsn)>,
    /// The highest LSN of each history in runs.
    pub(super) in_runs: BTreeMap<HistoryId, Lsn>,
    /// Each disk that was written, and a history that did so.
    pub(super) disks: BTreeMap<DiskId, HistoryId>,
    pub(super) marks: Vec<Mark>,
    pub(super) batches: Vec<Batch>,
    /// Seed segments of which the directory can be read, in all generations that are there.
    pub(super) seeds: BTreeMap<SegmentId, Vec<SeedFile>>,
    /// What is damaged of seed segments, by number and generation.
    pub(super) of_seeds: Vec<(SegmentId, u32, Finding)>,
    pub(super) findings: Vec<Finding>,
}

/// Something of a commit that counts only as long as the commit does.
enum Note {
    Mark(Mark),
    Begin(Batch),
    End(HistoryId, BatchId, Lsn),
}

impl Evidence {
    /// Reads all segments; of the seed segments only those in `named`, when it is given: what a
    /// whole manifest does not name is left of work that was cut off. `batches` are known.
    pub(super) fn gather(
        store: &Store,
        id: StoreId,
        named: Option<&BTreeMap<SegmentId, NamedSegment>>,
        batches: Vec<Batch>,
    ) -> Result<Self, AftError> {
        let mut evidence = Self {
            batches,
            ..Self::default()
        };
        let mut notes: Vec<(u64, Note)> = Vec::new();
        let mut last = None;
        for segment in log_segments(store)? {
            let name = segment_file("log", segment).to_string();
            let bytes = store.read(&name)?.unwrap_or_default();
            evidence.read_log((id, segment), &name, &bytes, &mut notes, &mut last);
        }
        evidence.last_sequence = last;
        for (_, note) in notes {
            evidence.take(note);
        }
        let mut files = store.parsed("segments", parse_seed_file)?;
        files.sort_unstable();
        let is_named = |segment: SegmentId, generation: u32| {
            named.is_none_or(|named| {
                let found = named.get(&segment);
                found.is_some_and(|found| found.generation == generation)
            })
        };
        files.retain(|(segment, generation)| is_named(*segment, *generation));
        for (segment, generation) in files {
            let name = seed_file(segment, generation).to_string();
            let bytes = store.read(&name)?.unwrap_or_default();
            evidence.read_seed((id, segment, generation), &name, &bytes);
        }
        for run in store.parsed("runs", parse_run_file)? {
            let bytes = store.read(&run_file(run).to_string())?.unwrap_or_default();
            evidence.read_run((id, run), &bytes);
        }
        Ok(evidence)
    }

    /// Runs only tell how far the log went; one that is damaged tells nothing.
    fn read_run(&mut self, (store, number): (StoreId, RunId), bytes: &[u8]) {
        let ends = bytes.len().saturating_sub(run::FOOTERS_BYTES);
        let found = RunFooter::find(bytes.get(ends..).unwrap_or(&[]), store, number);
        let sections = found.and_then(|footer| {
            let at = usize::try_from(footer.tail_offset).unwrap_or(usize::MAX);
            footer.find_tail(bytes.get(at..).unwrap_or(&[]))
        });
        for section in sections.into_iter().flatten() {
            let high = self.in_runs.entry(section.name.history).or_default();
            *high = section.high.max(*high);
        }
    }

    fn read_log(
        &mut self,
        (store, segment): (StoreId, SegmentId),
        name: &str,
        bytes: &[u8],
        notes: &mut Vec<(u64, Note)>,
        last: &mut Option<u64>,
    ) {
        let mut scan = SegmentScan::new(bytes, store, segment);
        let mut is_first = true;
        let (mut begun, mut range) = (BTreeSet::new(), None);
        while let Some(item) = scan.step() {
            let Ok(commit) = item else { continue };
            let header = commit.header;
            if is_first {
                is_first = false;
                // Commits of earlier segments from here on are void.
                notes.retain(|(sequence, _)| *sequence < header.segment_first);
                let before = header.segment_first.saturating_sub(1);
                *last = last.map(|last| last.min(before));
            }
            range.get_or_insert((header.sequence, 0)).1 = header.sequence;
            if let Some(last) = last.filter(|last| header.sequence > last.saturating_add(1)) {
                let (from, to) = (last + 1, header.sequence - 1);
                let what = format!("commits {from} to {to} before it are missing");
                let found = Finding::new(name, header.offset, what);
                self.gaps.push((to, found));
            }
            *last = Some(header.sequence);
            for at in commit.frames {
                if let Some(frame) = scan.frame(at) {
                    let history = frame.header.identity.history;
                    if begun.insert(history) {
                        let first = (header.sequence, history, frame.header.first);
                        self.firsts.push(first);
                    }
                    self.read_frame(header.sequence, &frame, notes);
                }
            }
        }
        self.ranges.extend(range);
    }

    fn read_frame(&mut self, sequence: u64, frame: &FrameView<'_>, notes: &mut Vec<(u64, Note)>) {
        let identity = frame.header.identity;
        let wrote = self.histories.entry(identity.history);
        let wrote = wrote.or_insert((identity.machine, Lsn::ZERO));
        wrote.1 = wrote.1.max(frame.header.last);
        let history = identity.history;
        for (_, record) in frame.records().map_while(Result::ok) {
            let header = record.header;
            if header.kind.is_of_disk() {
                self.disks.insert(header.disk, history);
            }
            let note = match header.kind {
                RecordKind::Mark(kind) => Note::Mark(Mark {
                    machine: identity.machine,
                    history,
                    lsn: header.lsn,
                    time: header.time,
                    kind,
                    name: record.note().to_vec(),
                }),
                RecordKind::BatchBegin(_) => {
                    let ids = record.note().as_chunks::<16>().0;
                    Note::Begin(Batch {
                        history,
                        batch: header.batch,
                        begin: header.lsn,
                        end: Lsn::ZERO,
                        disks: ids.iter().map(|id| DiskId(*id)).collect(),
                    })
                }
                RecordKind::BatchEnd => Note::End(history, header.batch, header.lsn),
                _ => continue,
            };
            notes.push((sequence, note));
        }
    }

    /// Says whether a commit is in the log.
    pub(super) fn has_commit(&self, sequence: u64) -> bool {
        let mut ranges = self.ranges.iter();
        ranges.any(|(first, last)| (*first..=*last).contains(&sequence))
    }

    /// The first commit of the segments of the log that hold any behind a sequence.
    pub(super) fn begins_behind(&self, sequence: u64) -> Option<u64> {
        let behind = self.ranges.iter().filter(|(_, last)| *last > sequence);
        behind.map(|(first, _)| *first).min()
    }

    /// The first LSN of a history behind a commit of the log.
    pub(super) fn first_behind(&self, history: HistoryId, sequence: u64) -> Option<Lsn> {
        let found = self.firsts.iter();
        let behind = found.filter(|(at, of, _)| *of == history && *at > sequence);
        behind.min().map(|(_, _, lsn)| *lsn)
    }

    /// Says whether a history wrote in a commit of the log up to this one.
    pub(super) fn wrote_by(&self, history: HistoryId, sequence: u64) -> bool {
        let mut found = self.firsts.iter();
        found.any(|(at, of, _)| *of == history && *at <= sequence)
    }

    /// A file of a seed segment, by its generation.
    pub(super) fn seed(&self, segment: SegmentId, generation: u32) -> Option<SeedFile> {
        let files = self.seeds.get(&segment)?;
        let is_it = |file: &&SeedFile| file.named.generation == generation;
        files.iter().find(is_it).copied()
    }

    fn take(&mut self, note: Note) {
        match note {
            Note::Mark(mark) => self.marks.push(mark),
            Note::Begin(batch) => {
                let is_same =
                    |known: &Batch| known.history == batch.history && known.begin == batch.begin;
                self.batches.retain(|known| !is_same(known));
                self.batches.push(batch);
            }
            Note::End(history, number, lsn) => {
                let mut open: Vec<_> = self
                    .batches
                    .iter_mut()
                    .filter(|batch| batch.history == history && batch.end == Lsn::ZERO)
                    .collect();
                let ended = open.iter().rev().find(|batch| batch.batch == number);
                let Some(disks) = ended.map(|batch| batch.disks.clone()) else {
                    return;
                };
                // It also ends those before it that were cut off and are covered by it.
                for batch in &mut open {
                    if batch.disks.is_subset(&disks) {
                        batch.end = lsn;
                    }
                }
            }
        }
    }

    fn read_seed(
        &mut self,
        (store, segment, generation): (StoreId, SegmentId, u32),
        name: &str,
        bytes: &[u8],
    ) {
        let ends = bytes.len().saturating_sub(FOOTERS_BYTES);
        let tail = bytes.get(ends..).unwrap_or(&[]);
        let found = SeedFooter::find(tail, store, segment).and_then(|footer| {
            let at = usize::try_from(footer.directory_offset).unwrap_or(usize::MAX);
            let (_, entries) = footer.find_directory(bytes.get(at..).unwrap_or(&[]))?;
            Ok((footer, entries))
        });
        if let Err(damage) = check_header(bytes, store, segment) {
            let found = Finding::new(name, 0, damage);
            self.of_seeds.push((segment, generation, found));
        }
        match found {
            Ok((footer, entries)) => {
                for entry in entries {
                    let (disk, history) = (entry.context.disk, entry.context.history);
                    self.disks.entry(disk).or_insert(history);
                }
                let named = NamedSegment {
                    generation,
                    slot_count: footer.entry_count,
                    bytes: bytes.len() as u64,
                    root: footer.root,
                };
                let needs_notes = footer.needs_notes;
                self.seeds
                    .entry(segment)
                    .or_default()
                    .push(SeedFile { named, needs_notes });
            }
            Err(damage) => {
                let found = Finding::new(name, ends as u64, damage);
                self.of_seeds.push((segment, generation, found));
            }
        }
    }
}
