//! Recovery: the manifest says which files count; runs and seed segments give the map up to the
//! checkpoint; the log gives the rest.
//!
//! A run that is damaged costs nothing but time: all runs are derived from the log, so the map is
//! then made anew from the log's beginning.

use std::collections::VecDeque;

use afterimage_blockdev::{
    DiskId, FileId, FileName, HistoryId, IoBuffer, Lsn, SegmentId, StorageError, StorageErrorKind,
    StorageOp, StorageOutcome, StoreId,
};
use afterimage_cache::log::{Log, LogInput, LogOptions};
use std::sync::Arc;

use super::state::{DiskState, HistoryEntry, MachineState, SeedSegment};
use super::{AfterCommit, Engine, Output, Owner, Phase};
use crate::entry::{Entry, EntryKind};
use crate::error::SeedError;
use crate::manifest::Edit;
use crate::reader::Reader;
use crate::run::{PAGE_BYTES, RunFooter, RunId, parse_run_file, run_file};
use crate::section::Section;
use crate::segment::{FOOTERS_BYTES, SeedFooter, SlotEntry, parse_seed_file, seed_file};

type StorageResult = Result<StorageOutcome, StorageError>;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wanted {
    Run(RunId),
    Seed(SegmentId),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Step {
    #[default]
    NewLog,
    NewSegments,
    NewRuns,
    ListRuns,
    ListSegments,
    Sweep,
    Open,
    Footer,
    Directory,
    Close,
    Capacity,
}

/// Where recovery stands.
#[derive(Debug, Default)]
pub(super) struct Start {
    step: Step,
    sweep: VecDeque<FileName>,
    wanted: VecDeque<Wanted>,
    file: Option<FileId>,
    length: u64,
    run_footer: Option<RunFooter>,
    seed_footer: Option<SeedFooter>,
}

impl Engine {
    pub(super) fn begin(&mut self, out: &mut Vec<Output>) {
        self.phase = Phase::Manifest;
        let mut wants = Vec::new();
        self.manifest.start(&mut wants);
        self.manifest_outputs(wants, out);
    }

    pub(super) fn manifest_ready(&mut self, is_new: bool, out: &mut Vec<Output>) {
        if is_new {
            // Files without a manifest are a store that lost it, and nothing to begin upon.
            self.start_ask(
                Step::NewLog,
                StorageOp::List {
                    directory: "log".to_owned(),
                },
                out,
            );
        } else {
            self.read_runs(out);
        }
    }

    fn must_be_new(
        &mut self,
        names: &[FileName],
        next: Option<(Step, &str)>,
        out: &mut Vec<Output>,
    ) {
        if let Some(name) = names.first() {
            let error = SeedError::Damaged {
                file: "manifest".to_owned(),
                offset: 0,
                damage: afterimage_cache::Damage::Short {
                    structure: "manifest",
                },
            };
            tracing::error!(file = %name, "there is no whole manifest for what is here");
            self.fail(error, out);
        } else if let Some((step, directory)) = next {
            let directory = directory.to_owned();
            self.start_ask(step, StorageOp::List { directory }, out);
        } else {
            self.store = StoreId(self.entropy.identity());
            self.created = self.clock.wall();
            let edits = self.whole_state();
            self.commit(edits, AfterCommit::Created, out);
        }
    }

    pub(super) fn read_runs(&mut self, out: &mut Vec<Output>) {
        self.phase = Phase::Runs;
        let mut options = LogOptions::new("log", self.store);
        options.segment_bytes = self.options.segment_bytes;
        options.budget_bytes = self.options.budget_bytes;
        options.reserve_bytes = self.options.reserve_bytes;
        options.idle_commit = self.options.idle_commit;
        options.retry = self.options.retry;
        self.log = Log::new(options);
        self.reader = Some(Reader::new(
            Arc::clone(&self.storage),
            self.store,
            Arc::clone(&self.keys) as Arc<dyn afterimage_cache::KeySource>,
            self.options.reader,
        ));
        self.start.wanted = self.runs.keys().copied().map(Wanted::Run).collect();
        self.want_seeds();
        self.start_ask(
            Step::ListRuns,
            StorageOp::List {
                directory: "runs".to_owned(),
            },
            out,
        );
    }

    fn want_seeds(&mut self) {
        let newer = self.seed_segments.keys().copied();
        let base_through = self.base_through;
        let newer = newer
            .filter(|segment| *segment > base_through)
            .map(Wanted::Seed);
        self.start.wanted.extend(newer);
    }

    fn start_ask(&mut self, step: Step, op: StorageOp, out: &mut Vec<Output>) {
        self.start.step = step;
        self.submit(Owner::Start, op, out);
    }

    pub(super) fn start_done(&mut self, result: StorageResult, out: &mut Vec<Output>) {
        let step = self.start.step;
        let outcome = match result {
            Ok(outcome) => outcome,
            Err(error) if step == Step::Sweep => {
                // What cannot be removed now is swept at the next start.
                tracing::warn!(%error, "an unnamed file stays");
                StorageOutcome::Done
            }
            Err(error) if matches!(error.kind, StorageErrorKind::NotFound) => {
                self.file_damaged(&error.to_string(), out);
                return;
            }
            Err(error) => {
                self.fail(error.into(), out);
                return;
            }
        };
        match (step, outcome) {
            (Step::NewLog, StorageOutcome::Listed(names)) => {
                self.must_be_new(&names, Some((Step::NewSegments, "segments")), out);
            }
            (Step::NewSegments, StorageOutcome::Listed(names)) => {
                self.must_be_new(&names, Some((Step::NewRuns, "runs")), out);
            }
            (Step::NewRuns, StorageOutcome::Listed(names)) => self.must_be_new(&names, None, out),
            (Step::ListRuns, StorageOutcome::Listed(names)) => {
                let is_named = |name: &FileName| {
                    parse_run_file(name).is_some_and(|run| self.runs.contains_key(&run))
                };
                let unnamed: Vec<_> = names.into_iter().filter(|name| !is_named(name)).collect();
                self.start.sweep.extend(unnamed);
                let directory = "segments".to_owned();
                self.start_ask(Step::ListSegments, StorageOp::List { directory }, out);
            }
            (Step::ListSegments, StorageOutcome::Listed(names)) => {
                let is_named = |name: &FileName| {
                    parse_seed_file(name).is_some_and(|id| self.seed_segments.contains_key(&id))
                };
                let unnamed: Vec<_> = names.into_iter().filter(|name| !is_named(name)).collect();
                self.start.sweep.extend(unnamed);
                self.sweep_next(out);
            }
            (Step::Sweep, _) => self.sweep_next(out),
            (Step::Open, StorageOutcome::Opened { file, length }) => {
                self.start.file = Some(file);
                self.start.length = length;
                let is_run = matches!(self.start.wanted.front(), Some(Wanted::Run(_)));
                let len = if is_run { PAGE_BYTES } else { FOOTERS_BYTES };
                let offset = length.saturating_sub(len as u64) / PAGE_BYTES as u64;
                let offset = offset * PAGE_BYTES as u64;
                let buffer = IoBuffer::zeroed(len);
                self.start_ask(
                    Step::Footer,
                    StorageOp::Read {
                        file,
                        offset,
                        buffer,
                    },
                    out,
                );
            }
            (Step::Footer, StorageOutcome::Read(bytes)) => self.start_footer(&bytes, out),
            (Step::Directory, StorageOutcome::Read(bytes)) => self.start_directory(&bytes, out),
            (Step::Close, _) => self.open_wanted(out),
            (Step::Capacity, StorageOutcome::Capacity(capacity)) => {
                self.free_bytes = capacity.free_bytes;
                self.phase = Phase::Log;
                let from_sequence = self.checkpoint + 1;
                self.log_step(LogInput::Start { from_sequence }, out);
            }
            _ => {}
        }
    }

    fn sweep_next(&mut self, out: &mut Vec<Output>) {
        match self.start.sweep.pop_front() {
            Some(name) => self.start_ask(Step::Sweep, StorageOp::Remove { name }, out),
            None => self.open_wanted(out),
        }
    }

    fn open_wanted(&mut self, out: &mut Vec<Output>) {
        let name = match self.start.wanted.front() {
            Some(Wanted::Run(run)) => run_file(*run),
            Some(Wanted::Seed(segment)) => seed_file(*segment),
            None => {
                self.start_ask(Step::Capacity, StorageOp::Capacity, out);
                return;
            }
        };
        self.start_ask(Step::Open, StorageOp::Open { name }, out);
    }

    fn start_footer(&mut self, bytes: &[u8], out: &mut Vec<Output>) {
        let (Some(wanted), Some(file)) = (self.start.wanted.front().copied(), self.start.file)
        else {
            return;
        };
        let place = match wanted {
            Wanted::Run(run) => RunFooter::decode(bytes, self.store, run).map(|footer| {
                self.start.run_footer = Some(footer);
                (
                    footer.tail_offset,
                    usize::try_from(footer.tail_len).unwrap_or(0),
                )
            }),
            Wanted::Seed(segment) => SeedFooter::find(bytes, self.store, segment).map(|footer| {
                self.start.seed_footer = Some(footer);
                (footer.directory_offset, footer.directories_len())
            }),
        };
        match place {
            Ok((offset, len)) if len as u64 <= self.start.length => {
                let buffer = IoBuffer::zeroed(len.next_multiple_of(PAGE_BYTES).max(PAGE_BYTES));
                self.start_ask(
                    Step::Directory,
                    StorageOp::Read {
                        file,
                        offset,
                        buffer,
                    },
                    out,
                );
            }
            Ok(_) => self.file_damaged("its length is impossible", out),
            Err(damage) => self.file_damaged(&damage.to_string(), out),
        }
    }

    fn start_directory(&mut self, bytes: &[u8], out: &mut Vec<Output>) {
        let Some(wanted) = self.start.wanted.front().copied() else {
            return;
        };
        match wanted {
            Wanted::Run(run) => {
                let Some(footer) = self.start.run_footer.take() else {
                    return;
                };
                match footer.decode_tail(bytes) {
                    Ok(sections) => self.adopt_sections(run, sections),
                    Err(damage) => return self.file_damaged(&damage.to_string(), out),
                }
            }
            Wanted::Seed(segment) => {
                let Some(footer) = self.start.seed_footer.take() else {
                    return;
                };
                match footer.find_directory(bytes) {
                    Ok((_, entries)) => self.adopt_slots(segment, &entries),
                    Err(damage) => return self.file_damaged(&damage.to_string(), out),
                }
            }
        }
        self.start.wanted.pop_front();
        if let Some(file) = self.start.file.take() {
            self.start_ask(Step::Close, StorageOp::Close { file }, out);
        }
    }

    /// A derived file is unusable. Runs are made anew from the log; a seed segment is named.
    fn file_damaged(&mut self, why: &str, out: &mut Vec<Output>) {
        let Some(wanted) = self.start.wanted.pop_front() else {
            let error = SeedError::refused(format!("recovery failed: {why}"), "");
            return self.fail(error, out);
        };
        match wanted {
            Wanted::Seed(segment) => {
                self.note_damage(format!("{}: {why}", seed_file(segment)));
                // Nobody knows which blocks it held: no disk may be shown as good above its LSNs.
                for entry in self.histories.values_mut() {
                    let lost = (DiskId::NIL, Lsn(1), Lsn(u64::MAX));
                    if !entry.lost.contains(&lost) {
                        entry.lost.push(lost);
                        entry.is_dirty = true;
                    }
                }
            }
            Wanted::Run(run) => {
                tracing::warn!(%why, run = run.0, "a run is damaged; the map is made anew");
                self.note_damage(format!("{}: {why}; made anew from the log", run_file(run)));
                self.forget_runs();
            }
        }
        match self.start.file.take() {
            Some(file) => self.start_ask(Step::Close, StorageOp::Close { file }, out),
            None => self.open_wanted(out),
        }
    }

    fn forget_runs(&mut self) {
        self.checkpoint = 0;
        self.covered.clear();
        self.base_through = SegmentId(0);
        self.dropped_runs
            .extend(core::mem::take(&mut self.runs).into_keys());
        for entry in self.histories.values_mut() {
            let fork = entry.parent.map_or(Lsn::ZERO, |(_, fork)| fork);
            entry.received = fork;
            entry.durable = fork;
            entry.received_epoch = afterimage_blockdev::Epoch(0);
            entry.timeline.clear();
            entry.batches.clear();
            entry.lost.clear();
            entry.disks.clear();
        }
        self.start.wanted.clear();
        self.want_seeds();
    }

    fn adopt_sections(&mut self, run: RunId, sections: Vec<crate::run::SectionTable>) {
        for table in sections {
            let Some(entry) = self.histories.get_mut(&table.name.history) else {
                continue;
            };
            if table.name.disk.is_nil() {
                entry.timeline.extend_from_slice(&table.timeline);
                continue;
            }
            let map = entry.disks.entry(table.name.disk).or_default();
            let is_base_part = table.name.is_base_part;
            let section = Arc::new(Section::File { run, table });
            if is_base_part {
                map.base_parts.push(section)
            } else {
                map.sections.push(section)
            }
        }
    }

    fn adopt_slots(&mut self, segment: SegmentId, entries: &[SlotEntry]) {
        for (slot, found) in (0u32..).zip(entries) {
            let context = &found.context;
            let Some(history) = self.histories.get_mut(&context.history) else {
                continue;
            };
            let found = bulk_entry(context, segment, slot);
            history.highest_bulk = history.highest_bulk.max(found.lsn);
            history.is_dirty = true;
            let map = history.disks.entry(context.disk).or_default();
            map.bulk_entries.push(found);
            self.open_entries += 1;
        }
    }

    pub(super) fn log_ready(&mut self, last_sequence: u64, out: &mut Vec<Output>) {
        self.applied_sequence = self.applied_sequence.max(last_sequence);
        for entry in self.histories.values_mut() {
            entry.find_bulk_done();
        }
        self.phase = Phase::Running;
        out.push(Output::Ready);
    }

    /// Builds the state that the manifest describes.
    pub(super) fn replay(&mut self, edits: Vec<Edit>) -> Result<(), SeedError> {
        self.note_covered(&edits);
        for edit in edits {
            self.replay_edit(edit)?;
        }
        for (machine, state) in &mut self.machines {
            state.disks = self
                .disks
                .iter()
                .filter(|(_, disk)| disk.machine == *machine)
                .map(|(id, _)| *id)
                .collect();
        }
        Ok(())
    }

    fn replay_edit(&mut self, edit: Edit) -> Result<(), SeedError> {
        match edit {
            Edit::Store {
                store,
                created,
                next_segment,
                next_run,
                next_point,
            } => {
                self.store = store;
                self.created = created;
                self.next_segment = self.next_segment.max(next_segment.0);
                self.next_run = self.next_run.max(next_run.0);
                self.next_point = self.next_point.max(next_point.0);
            }
            Edit::Machine {
                machine,
                tag_key,
                holder,
                name,
            } => {
                self.put_machine(machine, tag_key, holder, name);
            }
            Edit::Disk {
                disk,
                machine,
                size_bytes,
                logical_block_bytes,
                key,
                wrapped,
                name,
            } => {
                let unwrapped =
                    afterimage_cache::key::unwrap(&self.options.store_key, disk, key, &wrapped)
                        .ok_or(SeedError::WrongStoreKey {
                            disk: disk.to_string(),
                        })?;
                self.keys.keys.write().insert((disk, key), unwrapped);
                let sizes = self
                    .disks
                    .remove(&disk)
                    .map_or(Vec::new(), |known| known.sizes);
                let state = DiskState {
                    machine,
                    name,
                    declared_bytes: size_bytes,
                    logical_block_bytes,
                    key,
                    wrapped,
                    sizes,
                };
                self.disks.insert(disk, state);
            }
            Edit::History {
                history,
                machine,
                parent,
                fork,
                is_branch,
            } => {
                let parent = (!parent.is_nil()).then_some((parent, fork));
                self.put_history(history, machine, parent, is_branch);
            }
            Edit::HistoryDropped { history } => {
                self.histories.remove(&history);
            }
            Edit::Size {
                disk,
                history,
                lsn,
                size_bytes,
            } => {
                if let Some(disk) = self.disks.get_mut(&disk) {
                    disk.sizes
                        .retain(|known| (known.0, known.1) != (history, lsn));
                    disk.sizes.push((history, lsn, size_bytes));
                }
            }
            Edit::Segment {
                segment,
                slot_count,
                bytes,
                root,
            } => {
                self.next_segment = self
                    .next_segment
                    .max((segment.0 & !crate::reader::SEED_BIT) + 1);
                self.seed_segments.insert(
                    segment,
                    SeedSegment {
                        slot_count,
                        bytes,
                        root,
                    },
                );
            }
            Edit::SegmentDropped { segment } => {
                self.seed_segments.remove(&segment);
            }
            Edit::Run { run, bytes } => {
                self.next_run = self.next_run.max(run.0 + 1);
                self.runs.insert(run, bytes);
            }
            Edit::RunDropped { run } => {
                self.runs.remove(&run);
            }
            Edit::Checkpoint { log_sequence } => {
                self.checkpoint = log_sequence;
                self.applied_sequence = log_sequence;
            }
            Edit::HistoryState(state) => {
                if let Some(entry) = self.histories.get_mut(&state.history) {
                    entry.epoch = entry.epoch.max(state.epoch);
                    entry.origin = state.origin;
                    entry.received = state.last;
                    entry.durable = state.last;
                    entry.highest_bulk = state.highest_bulk;
                    entry.durable_time = state.time;
                    entry.received_epoch = state.epoch;
                    entry.durable_epoch = state.epoch;
                    entry.durable_origin = state.origin;
                }
            }
            Edit::Batch(batch) => {
                if let Some(entry) = self.histories.get_mut(&batch.history) {
                    entry.put_batch(batch);
                }
            }
            Edit::Point(point) => {
                self.next_point = self.next_point.max(point.id.0 + 1);
                self.put_point(point);
            }
            Edit::PointDropped { point } => {
                for machine in self.machines.values_mut() {
                    if let Some(point) = machine.points.remove(&point) {
                        machine.names.remove(&point.name);
                    }
                }
            }
            Edit::Lost {
                disk,
                history,
                first,
                last,
            } => {
                if let Some(entry) = self.histories.get_mut(&history) {
                    if !entry.lost.contains(&(disk, first, last)) {
                        entry.lost.push((disk, first, last));
                    }
                }
            }
            Edit::BaseThrough { segment } => self.base_through = segment,
        }
        Ok(())
    }

    pub(super) fn put_machine(
        &mut self,
        machine: afterimage_blockdev::MachineId,
        tag_key: [u8; 32],
        holder: afterimage_blockdev::AgentId,
        name: String,
    ) {
        let state = self
            .machines
            .entry(machine)
            .or_insert_with(|| MachineState {
                name: String::new(),
                tag_key,
                holder,
                disks: Vec::new(),
                trunk: HistoryId::NIL,
                points: std::collections::BTreeMap::new(),
                pending: std::collections::BTreeMap::new(),
                names: std::collections::BTreeMap::new(),
            });
        state.name = name;
        state.holder = holder;
    }

    pub(super) fn put_history(
        &mut self,
        history: HistoryId,
        machine: afterimage_blockdev::MachineId,
        parent: Option<(HistoryId, Lsn)>,
        is_branch: bool,
    ) {
        self.histories
            .entry(history)
            .or_insert_with(|| HistoryEntry::new(history, machine, parent, is_branch));
        if let Some(state) = self.machines.get_mut(&machine).filter(|_| !is_branch) {
            state.trunk = history;
        }
    }
}

/// The map entry of a bulk slot.
pub(super) fn bulk_entry(
    context: &afterimage_cache::SlotContext,
    segment: SegmentId,
    slot: u32,
) -> Entry {
    Entry {
        cell: context.cell,
        lsn: context.lsns.iter().copied().max().unwrap_or_default(),
        mask: context.mask,
        first: 0,
        kind: EntryKind::Bulk,
        segment,
        slot: afterimage_blockdev::SlotIndex(slot),
    }
}
