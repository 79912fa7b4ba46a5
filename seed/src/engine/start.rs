//! Recovery: the manifest says which files count; runs and seed segments give the map up to the
//! checkpoint; the log gives the rest.
//!
//! A run that is damaged costs nothing but time: all runs are derived from the log, so the map is
//! then made anew from the log's beginning. Once commits of the log were given away that cannot be
//! done: then nobody knows what the run held, and nothing that may be in it is shown.
//!
//! A file that cannot be read is named and missed in memory only: put back, it counts again.

use std::collections::VecDeque;

use afterimage_blockdev::{
    FileId, FileName, HistoryId, IoBuffer, Lsn, SegmentId, StorageError, StorageErrorKind,
    StorageOp, StorageOutcome, StoreId,
};
use afterimage_cache::Damage;
use afterimage_cache::log::{Log, LogInput, LogOptions};
use std::sync::Arc;

use super::state::{DiskState, HistoryEntry, MachineState, SeedSegment};
use super::{AfterCommit, Engine, Output, Owner, Phase};
use crate::entry::{Entry, EntryKind};
use crate::error::SeedError;
use crate::manifest::Edit;
use crate::patchwork::Patchwork;
use crate::reader::Reader;
use crate::run::{
    FOOTERS_BYTES as RUN_FOOTERS_BYTES, PAGE_BYTES, RunFooter, RunId, parse_run_file, run_file,
};
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
    /// Where the read under way begins, and its length.
    reading: (u64, usize),
    /// That read in pieces, once it has failed as a whole.
    patchwork: Option<Patchwork>,
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
                damage: Damage::Short {
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
        self.name_moved();
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

    /// Tells the reader which segments were rewritten or destaged.
    fn name_moved(&self) {
        let Some(reader) = &self.reader else { return };
        let moved = self.seed_segments.iter();
        for (segment, state) in moved.filter(|(_, state)| state.generation > 0) {
            reader.moved(*segment, state.generation);
        }
    }

    fn want_seeds(&mut self) {
        let newer = self.seed_segments.keys().copied();
        let base_through = self.base_through;
        // Destaged ones came from the log, and are in runs.
        let newer = newer
            .filter(|segment| segment.0 & crate::reader::SEED_BIT != 0)
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
            Err(error) if matches!(step, Step::Footer | Step::Directory) => {
                tracing::error!(%error, "copies are read on their own");
                return self.read_apart(None, out);
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
                    parse_seed_file(name).is_some_and(|(id, generation)| {
                        let known = self.seed_segments.get(&id);
                        known.is_some_and(|known| known.generation == generation)
                    })
                };
                let notes = &mut self.notes;
                let is_left =
                    |name: &FileName| !is_named(name) && !notes.found(name, self.checkpoint);
                let unnamed: Vec<_> = names.into_iter().filter(is_left).collect();
                self.next_run = self.next_run.max(self.notes.next_run());
                self.start.sweep.extend(unnamed);
                self.sweep_next(out);
            }
            (Step::Sweep, _) => self.sweep_next(out),
            (Step::Open, StorageOutcome::Opened { file, length }) => {
                self.start.file = Some(file);
                self.start.length = length;
                let is_run = matches!(self.start.wanted.front(), Some(Wanted::Run(_)));
                let len = if is_run {
                    RUN_FOOTERS_BYTES
                } else {
                    FOOTERS_BYTES
                };
                let offset = length.saturating_sub(len as u64) / PAGE_BYTES as u64;
                let offset = offset * PAGE_BYTES as u64;
                self.start.reading = (offset, len);
                self.start_read(Step::Footer, file, (offset, len), out);
            }
            (Step::Footer | Step::Directory, StorageOutcome::Read(bytes)) => {
                if self.start.patchwork.is_some() {
                    self.read_apart(Some(&bytes), out);
                } else {
                    self.was_read(&bytes, out);
                }
            }
            (Step::Close, _) => self.open_wanted(out),
            (Step::Capacity, StorageOutcome::Capacity(capacity)) => {
                self.free_bytes = capacity.free_bytes;
                self.phase = Phase::Log;
                let from_sequence = self.checkpoint.saturating_add(1);
                self.log_step(LogInput::Start { from_sequence }, out);
            }
            _ => {}
        }
    }

    fn start_read(
        &mut self,
        step: Step,
        file: FileId,
        (offset, len): (u64, usize),
        out: &mut Vec<Output>,
    ) {
        let buffer = IoBuffer::zeroed(len);
        let op = StorageOp::Read {
            file,
            offset,
            buffer,
        };
        self.start_ask(step, op, out);
    }

    fn was_read(&mut self, bytes: &[u8], out: &mut Vec<Output>) {
        if self.start.step == Step::Footer {
            self.start_footer(bytes, out);
        } else {
            self.start_directory(bytes, out);
        }
    }

    /// Goes on with a read that failed as a whole: a copy that cannot be read is a damaged one.
    fn read_apart(&mut self, read: Option<&[u8]>, out: &mut Vec<Output>) {
        let (offset, len) = self.start.reading;
        match &mut self.start.patchwork {
            None => self.start.patchwork = Some(Patchwork::new(offset, len)),
            Some(patchwork) => {
                if !patchwork.take(read) {
                    self.start.patchwork = None;
                    return self.file_damaged("it cannot be read", out);
                }
            }
        }
        let wanted = self.start.patchwork.as_ref().and_then(Patchwork::wanted);
        match (wanted, self.start.file) {
            (Some(place), Some(file)) => self.start_read(self.start.step, file, place, out),
            _ => {
                let patchwork = self.start.patchwork.take().map(Patchwork::finish);
                let (bytes, _) = patchwork.unwrap_or((IoBuffer::zeroed(0), Vec::new()));
                self.was_read(&bytes, out);
            }
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
            Some(Wanted::Seed(segment)) => self.seed_name(*segment),
            None => {
                self.order_timelines();
                let directory = "segments".to_owned();
                self.start_ask(Step::Capacity, StorageOp::Capacity { directory }, out);
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
            Wanted::Run(run) => RunFooter::find(bytes, self.store, run).map(|footer| {
                self.start.run_footer = Some(footer);
                let len = usize::try_from(footer.tails_len()).unwrap_or(usize::MAX);
                (footer.tail_offset, len)
            }),
            Wanted::Seed(segment) => SeedFooter::find(bytes, self.store, segment).map(|footer| {
                self.start.seed_footer = Some(footer);
                (footer.directory_offset, footer.directories_len())
            }),
        };
        match place {
            Ok((offset, len)) if len as u64 <= self.start.length => {
                let len = len.next_multiple_of(PAGE_BYTES).max(PAGE_BYTES);
                self.start.reading = (offset, len);
                self.start_read(Step::Directory, file, (offset, len), out);
            }
            Err(Damage::Version {
                found, supported, ..
            }) => self.fail(SeedError::NewerFormat { found, supported }, out),
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
                match footer.find_tail(bytes) {
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
                // Nobody knows which blocks it held: no disk may be shown as good.
                self.note_damage(format!("{}: {why}", self.seed_name(segment)));
                self.segment_unread(segment);
            }
            Wanted::Run(run) if self.log_released > 0 => {
                let name = run_file(run);
                self.note_damage(format!("{name}: {why}; what it held is not known any more"));
                self.run_unread(run);
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
        self.run_times.clear();
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
        self.note_times(run, &sections);
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

    /// Merged runs hold old samples under new numbers, and some twice.
    fn order_timelines(&mut self) {
        for entry in self.histories.values_mut() {
            entry.timeline.sort_unstable_by_key(|sample| sample.lsn);
            entry.timeline.dedup_by_key(|sample| sample.lsn);
        }
    }

    fn seed_name(&self, segment: SegmentId) -> FileName {
        let known = self.seed_segments.get(&segment);
        seed_file(segment, known.map_or(0, |known| known.generation))
    }

    fn adopt_slots(&mut self, segment: SegmentId, entries: &[SlotEntry]) {
        for found in entries {
            let context = &found.context;
            let Some(history) = self.histories.get_mut(&context.history) else {
                continue;
            };
            let found = bulk_entry(context, segment, found.slot);
            history.highest_bulk = history.highest_bulk.max(found.lsn);
            history.is_dirty = true;
            let map = history.disks.entry(context.disk).or_default();
            map.bulk_entries.push(found);
            self.open_entries += 1;
        }
    }

    pub(super) fn log_ready(&mut self, last_sequence: u64, out: &mut Vec<Output>) {
        self.applied_sequence = self.applied_sequence.max(last_sequence);
        let found = self.log.found_through();
        if found < self.checkpoint {
            self.log_is_short(found);
        }
        for entry in self.histories.values_mut() {
            entry.find_bulk_done();
        }
        self.phase = Phase::Running;
        self.notes.changed(self.now);
        self.limit_budget();
        self.ask_room(out);
        self.release_log(out);
        out.push(Output::Ready);
    }

    /// The log ends before what the map holds: nobody knows what followed. Its commits and LSNs
    /// go on behind the checkpoint, and an epoch that begins behind a gap shows what was lost.
    fn log_is_short(&mut self, found: u64) {
        let checkpoint = self.checkpoint;
        self.note_damage(format!(
            "the log ends at commit {found}, and was applied up to {checkpoint}: what followed is \
             lost, and what only it held cannot be read"
        ));
        self.commits_lost();
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
                generation,
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
                        generation,
                        slot_count,
                        bytes,
                        root,
                    },
                );
            }
            Edit::SegmentDropped { segment } => {
                self.seed_segments.remove(&segment);
            }
            Edit::LogReleased { log_sequence } => self.log_released = log_sequence,
            Edit::Run { run, bytes } => {
                self.next_run = self.next_run.max(run.0.saturating_add(1));
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
                // Before the first LSN nothing can begin.
                let entry = self.histories.get_mut(&batch.history);
                if let Some(entry) = entry.filter(|_| batch.begin > Lsn::ZERO) {
                    entry.put_batch(batch);
                }
            }
            Edit::Point(point) => {
                self.next_point = self.next_point.max(point.id.0.saturating_add(1));
                self.put_point(point);
            }
            Edit::PointDropped { point } => {
                for machine in self.machines.values_mut() {
                    if let Some(point) = machine.points.remove(&point) {
                        machine.names.remove(&point.name);
                    }
                }
                self.retention.locks.remove(&point);
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
            // Only notes have them.
            Edit::Noted(_) => {}
            edit @ (Edit::Policy { .. }
            | Edit::PointLocked { .. }
            | Edit::Clock(_)
            | Edit::Floor { .. }) => self.replay_retention(edit),
            edit @ (Edit::Quota { .. } | Edit::Churn { .. }) => self.replay_space(&edit),
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
