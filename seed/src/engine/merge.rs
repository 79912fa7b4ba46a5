//! Merging runs: several become one, and what nobody needs is left out. Over all runs it is also
//! the sweep that finds which slots are needed.
//!
//! Invariants
//! * The runs that go in stay until the manifest names the one that came out, in the same commit
//!   that drops them; and their files stay while a snapshot reads them.
//! * A merge holds a few pages of each run, whatever their size.
//! * A merge that meets damage that no copy mends, or a full medium, is given up; nothing changes.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Weak};

use afterimage_blockdev::{
    DiskId, FileId, HistoryId, IoBuffer, Lsn, StorageError, StorageErrorKind, StorageOp,
    StorageOutcome,
};

use super::join::{Sieve, keep_ranges};
use super::live::LiveMap;
use super::roots::Roots;
use super::{AfterCommit, Engine, Event, Output, Owner, Phase};
use crate::entry::{Entry, RangeEntry};
use crate::manifest::Edit;
use crate::run::{
    PAGE_BYTES, RunId, RunWriter, SectionName, SectionTable, TimeSample, decode_page, place_of,
    run_file,
};
use crate::section::Section;

/// Pages of one read.
const READ_PAGES: u32 = 32;
/// Writes in flight.
const WRITES_MAX: usize = 4;
/// Entries that one step handles at most.
const STEP_ENTRIES: usize = 20_000;
/// Runs of one size that are merged into one of the next.
const FAN_IN: usize = 8;
/// Runs that one merge takes at most, but for a sweep.
const INPUTS_MAX: usize = 16;
/// Bytes of the smallest size.
const SMALLEST_BYTES: u64 = 256 << 10;
/// Distance of time samples that are older than the window, in nanoseconds.
const OLD_GRAIN: u64 = 60_000_000_000;

/// What a storage operation of a merge is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum MergeOp {
    Input(usize),
    Read(usize),
    Write,
    Step,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Open,
    Create,
    Join,
    Write,
    Sync,
    SyncDirectory,
    Close,
    Commit,
}

/// One section as it is read.
#[derive(Debug)]
struct Cursor {
    table: usize,
    file: FileId,
    run: RunId,
    reads: VecDeque<(u32, u32)>,
    /// First page and count of the read in flight, and whether the copies are read.
    reading: Option<(u32, u32, bool)>,
    entries: VecDeque<Entry>,
    is_asked: bool,
}

/// The sections of one disk of one history, on their way into one.
#[derive(Debug)]
struct Joining {
    sections: Vec<Arc<Section>>,
    cursors: Vec<Cursor>,
    sieve: Sieve,
    ranges: Vec<RangeEntry>,
}

type Group = ((HistoryId, DiskId), Vec<Arc<Section>>);

/// A merge on its way.
#[derive(Debug)]
pub(super) struct Merge {
    run: RunId,
    step: Step,
    inputs: Vec<(RunId, Option<FileId>)>,
    groups: VecDeque<Group>,
    timelines: VecDeque<(HistoryId, Vec<TimeSample>)>,
    joining: Option<Joining>,
    roots: BTreeMap<HistoryId, Roots>,
    live: Option<LiveMap>,
    /// Otherwise it only looks.
    writes: bool,
    writer: RunWriter,
    file: Option<FileId>,
    in_flight: usize,
    tables: Vec<SectionTable>,
    bytes: u64,
    is_committing: bool,
    /// Why it is given up.
    failure: Option<String>,
    dropped: u64,
    /// Entries that the present step joined.
    joined: usize,
}

/// Runs that the manifest no longer names, and the sections by which snapshots may read them.
#[derive(Debug)]
pub(super) struct RetiredRun {
    run: RunId,
    sections: Vec<Weak<Section>>,
}

/// The size class of a run.
fn class(bytes: u64) -> u32 {
    (bytes / SMALLEST_BYTES)
        .checked_ilog(FAN_IN as u64)
        .map_or(0, |class| class + 1)
}

impl Engine {
    /// Begins a merge when many runs of one size are there.
    pub(super) fn merge_when_due(&mut self, out: &mut Vec<Output>) {
        let is_early = self.merge_retry_at.is_some_and(|at| at > self.now);
        if !self.has_new_runs || self.merge.is_some() || is_early {
            return;
        }
        self.has_new_runs = false;
        self.merge_retry_at = None;
        let mut classes: BTreeMap<u32, Vec<RunId>> = BTreeMap::new();
        for (run, bytes) in &self.runs {
            if self.unread.has_run(*run) {
                continue;
            }
            classes.entry(class(*bytes)).or_default().push(*run);
        }
        let due = classes.into_values().find(|runs| runs.len() >= FAN_IN);
        if let Some(mut runs) = due {
            runs.truncate(INPUTS_MAX);
            self.begin_merge(runs, None, true, out);
        }
    }

    pub(super) fn begin_merge(
        &mut self,
        runs: Vec<RunId>,
        live: Option<LiveMap>,
        writes: bool,
        out: &mut Vec<Output>,
    ) {
        let run = RunId(self.next_run);
        self.next_run += 1;
        let roots = self.roots();
        let mut groups: Vec<Group> = Vec::new();
        let mut timelines = Vec::new();
        for (history, entry) in &self.histories {
            for (disk, map) in &entry.disks {
                let all = map.sections.iter().chain(&map.base_parts);
                let chosen: Vec<_> = all.filter(|part| is_of(part, &runs)).cloned().collect();
                if !chosen.is_empty() {
                    groups.push(((*history, *disk), chosen));
                }
            }
            let window = roots.get(history).map_or(Lsn::ZERO, Roots::window);
            let samples = self.samples_of(*history, &runs, window);
            if !samples.is_empty() {
                timelines.push((*history, samples));
            }
        }
        self.merge = Some(Merge {
            run,
            step: Step::Open,
            inputs: runs.iter().map(|run| (*run, None)).collect(),
            groups: groups.into(),
            timelines: timelines.into(),
            joining: None,
            roots,
            live,
            writes,
            writer: RunWriter::new(self.store, run),
            file: None,
            in_flight: 0,
            tables: Vec::new(),
            bytes: 0,
            is_committing: false,
            failure: None,
            dropped: 0,
            joined: 0,
        });
        for (place, run) in runs.iter().enumerate() {
            let name = run_file(*run);
            self.merge_ask(MergeOp::Input(place), StorageOp::Open { name }, out);
        }
        self.merge_on(out);
    }

    /// The time samples that runs hold of a history; those before the window get fewer.
    fn samples_of(&self, history: HistoryId, runs: &[RunId], window: Lsn) -> Vec<TimeSample> {
        let of_runs = runs.iter().filter_map(|run| self.run_times.get(run));
        let intervals: Vec<_> = of_runs
            .flatten()
            .filter(|(of, _, _)| *of == history)
            .collect();
        let is_within = |sample: &&TimeSample| {
            let lsn = sample.lsn;
            intervals
                .iter()
                .any(|(_, low, high)| *low <= lsn && lsn <= *high)
        };
        let samples = self.histories.get(&history).map(|entry| &entry.timeline);
        let samples = samples.into_iter().flatten().filter(is_within).copied();
        thin_out(samples.collect(), window)
    }

    fn merge_ask(&mut self, op: MergeOp, operation: StorageOp, out: &mut Vec<Output>) {
        if let Some(merge) = &mut self.merge {
            merge.in_flight += 1;
        }
        self.submit(Owner::Merge(op), operation, out);
    }

    pub(super) fn merge_done(
        &mut self,
        op: MergeOp,
        result: Result<StorageOutcome, StorageError>,
        out: &mut Vec<Output>,
    ) {
        let Some(merge) = &mut self.merge else { return };
        merge.in_flight -= 1;
        match (op, result) {
            (MergeOp::Input(place), Ok(StorageOutcome::Opened { file, .. })) => {
                merge.inputs[place].1 = Some(file);
            }
            (MergeOp::Read(cursor), Ok(StorageOutcome::Read(bytes))) => {
                merge.page_read(cursor, &bytes);
            }
            (MergeOp::Step, Ok(StorageOutcome::Opened { file, .. })) => merge.file = Some(file),
            (_, Ok(_)) => {}
            (MergeOp::Read(cursor), Err(error)) => merge.read_failed(cursor, &error.to_string()),
            // Left over from a start that was cut before the manifest named it.
            (MergeOp::Step, Err(error)) if matches!(error.kind, StorageErrorKind::Exists) => {
                merge.failure = Some(error.to_string());
            }
            (MergeOp::Step | MergeOp::Write, Err(error)) if !error.is_no_space() => {
                return self.fail(error.into(), out);
            }
            (_, Err(error)) => merge.failure = Some(error.to_string()),
        }
        self.merge_on(out);
    }

    /// Does what can be done now.
    pub(super) fn merge_on(&mut self, out: &mut Vec<Output>) {
        if self.phase == Phase::Stopping {
            if let Some(merge) = &mut self.merge {
                // What it would give can be had again.
                let is_late = matches!(merge.step, Step::Commit);
                if !is_late && merge.failure.is_none() {
                    merge.failure = Some("the store is being closed".to_owned());
                }
            }
        }
        loop {
            let Some(merge) = &mut self.merge else { return };
            if merge.failure.is_some() {
                if merge.in_flight == 0 {
                    self.give_merge_up(out);
                }
                return;
            }
            let is_waiting = merge.in_flight > 0;
            match merge.step {
                Step::Open if is_waiting => return,
                Step::Open if !merge.writes => merge.step = Step::Join,
                Step::Open => {
                    merge.step = Step::Create;
                    let name = run_file(merge.run);
                    self.merge_ask(MergeOp::Step, StorageOp::Create { name }, out);
                }
                Step::Create if is_waiting => return,
                Step::Create => merge.step = Step::Join,
                Step::Join => {
                    if !self.join_on(out) {
                        return;
                    }
                    if self.merge.as_ref().is_some_and(|merge| !merge.writes) {
                        return self.looked(out);
                    }
                }
                _ if is_waiting => return,
                _ => {
                    if !self.merge_finish(out) {
                        return;
                    }
                }
            }
        }
    }

    /// Joins as far as what is read goes; says whether to go on at once.
    fn join_on(&mut self, out: &mut Vec<Output>) -> bool {
        if !self.has_turn(out) {
            return false;
        }
        let Some(merge) = &mut self.merge else {
            return false;
        };
        let mut asks = Vec::new();
        let is_done = merge.join(&mut asks);
        let joined = merge.joined;
        let mut writes = Vec::new();
        while let Some((offset, buffer)) = merge.writer.take_ready() {
            let Some(file) = merge.file else { continue };
            writes.push(StorageOp::Write {
                file,
                offset,
                buffer,
            });
        }
        if is_done {
            merge.step = Step::Write;
        }
        let is_quiet = asks.is_empty() && writes.is_empty();
        self.spent_on_entries(joined);
        for (cursor, op) in asks {
            self.merge_ask(MergeOp::Read(cursor), op, out);
        }
        for op in writes {
            self.merge_ask(MergeOp::Write, op, out);
        }
        let in_flight = self.merge.as_ref().map_or(0, |merge| merge.in_flight);
        if !is_done && in_flight == 0 && is_quiet {
            // A step has its end; the rest comes with the next one.
            out.push(Output::WakeAt(self.now));
        }
        is_done
    }

    /// All was looked at, and nothing written.
    fn looked(&mut self, out: &mut Vec<Output>) {
        let Some(merge) = self.merge.take() else {
            return;
        };
        for (_, file) in merge.inputs {
            if let Some(file) = file {
                self.submit(Owner::Nobody, StorageOp::Close { file }, out);
            }
        }
        if let Some(live) = merge.live {
            self.swept(live, out);
        }
    }

    /// The steps behind the last entry; says whether to go on at once.
    fn merge_finish(&mut self, out: &mut Vec<Output>) -> bool {
        let Some(merge) = &mut self.merge else {
            return false;
        };
        let Some(file) = merge.file else { return false };
        let op = match merge.step {
            Step::Write => {
                merge.step = Step::Sync;
                let mut writes = Vec::new();
                (merge.tables, merge.bytes) = merge.writer.finish();
                while let Some((offset, buffer)) = merge.writer.take_ready() {
                    writes.push(StorageOp::Write {
                        file,
                        offset,
                        buffer,
                    });
                }
                for op in writes {
                    self.merge_ask(MergeOp::Write, op, out);
                }
                return false;
            }
            Step::Sync => {
                merge.step = Step::SyncDirectory;
                StorageOp::Sync { file }
            }
            Step::SyncDirectory => {
                merge.step = Step::Close;
                StorageOp::SyncDirectory {
                    directory: "runs".to_owned(),
                }
            }
            Step::Close => {
                merge.step = Step::Commit;
                merge.file = None;
                StorageOp::Close { file }
            }
            _ => return false,
        };
        self.merge_ask(MergeOp::Step, op, out);
        false
    }

    /// Everything is durable: the manifest is told. Called when a step ends.
    pub(super) fn commit_merge(&mut self, out: &mut Vec<Output>) {
        let Some(merge) = &self.merge else { return };
        let is_ready = merge.step == Step::Commit && merge.in_flight == 0 && !merge.is_committing;
        if !is_ready {
            return;
        }
        let mut edits = vec![Edit::Run {
            run: merge.run,
            bytes: merge.bytes,
        }];
        let dropped = merge.inputs.iter();
        edits.extend(dropped.map(|(run, _)| Edit::RunDropped { run: *run }));
        let files: Vec<_> = merge.inputs.iter().filter_map(|(_, file)| *file).collect();
        if let Some(merge) = &mut self.merge {
            merge.is_committing = true;
        }
        for file in files {
            self.submit(Owner::Nobody, StorageOp::Close { file }, out);
        }
        self.commit(edits, AfterCommit::Merge, out);
    }

    pub(super) fn merge_committed(&mut self, out: &mut Vec<Output>) {
        let Some(merge) = self.merge.take() else {
            return;
        };
        let inputs: Vec<RunId> = merge.inputs.iter().map(|(run, _)| *run).collect();
        self.runs.insert(merge.run, merge.bytes);
        self.has_new_runs = true;
        self.note_times(merge.run, &merge.tables);
        let mut retired: BTreeMap<RunId, Vec<Weak<Section>>> = BTreeMap::new();
        for run in &inputs {
            self.runs.remove(run);
            self.run_times.remove(run);
            retired.insert(*run, Vec::new());
        }
        for map in self
            .histories
            .values_mut()
            .flat_map(|e| e.disks.values_mut())
        {
            for parts in [&mut map.sections, &mut map.base_parts] {
                parts.retain(|part| {
                    let is_gone = is_of(part, &inputs);
                    if let (true, Section::File { run, .. }) = (is_gone, &**part) {
                        retired.entry(*run).or_default().push(Arc::downgrade(part));
                    }
                    !is_gone
                });
            }
        }
        for table in merge.tables {
            let entry = self.histories.get_mut(&table.name.history);
            let map = entry.and_then(|entry| entry.disks.get_mut(&table.name.disk));
            if let Some(map) = map {
                let run = merge.run;
                map.sections
                    .insert(0, Arc::new(Section::File { run, table }));
            }
        }
        let retired = retired.into_iter();
        self.retired
            .extend(retired.map(|(run, sections)| RetiredRun { run, sections }));
        out.push(Output::Event(Event::Merged {
            runs: inputs.len(),
            left_out: merge.dropped,
        }));
        if let Some(live) = merge.live {
            self.swept(live, out);
        }
        self.remove_retired(out);
    }

    pub(super) fn note_times(&mut self, run: RunId, tables: &[SectionTable]) {
        let times = tables.iter().filter(|table| table.name.disk.is_nil());
        let times = times.map(|table| (table.name.history, table.low, table.high));
        self.run_times.insert(run, times.collect());
    }

    /// Removes files that nobody reads any more.
    pub(super) fn remove_retired(&mut self, out: &mut Vec<Output>) {
        if self.are_files_pinned() {
            return;
        }
        self.release_log(out);
        for name in core::mem::take(&mut self.removals) {
            // What cannot be removed now is swept at the next start.
            self.submit(Owner::Nobody, StorageOp::Remove { name }, out);
        }
        let mut kept = Vec::new();
        for mut retired in core::mem::take(&mut self.retired) {
            retired.sections.retain(|part| part.strong_count() > 0);
            if !retired.sections.is_empty() {
                kept.push(retired);
                continue;
            }
            if let Some(reader) = &self.reader {
                reader.run_removed(retired.run);
            }
            let name = run_file(retired.run);
            self.submit(Owner::Nobody, StorageOp::Remove { name }, out);
        }
        self.retired = kept;
    }

    fn give_merge_up(&mut self, out: &mut Vec<Output>) {
        let Some(merge) = self.merge.take() else {
            return;
        };
        let why = merge.failure.unwrap_or_default();
        tracing::warn!(%why, "a merge of runs is given up");
        let files = merge.inputs.iter().filter_map(|(_, file)| *file);
        for file in files.chain(merge.file) {
            self.submit(Owner::Nobody, StorageOp::Close { file }, out);
        }
        if merge.writes {
            let name = run_file(merge.run);
            self.submit(Owner::Nobody, StorageOp::Remove { name }, out);
        }
        let retry_at = self.now.after(self.options.retry);
        self.merge_retry_at = Some(retry_at);
        self.has_new_runs = true;
        out.push(Output::WakeAt(retry_at));
        out.push(Output::Event(Event::MergeGivenUp { why }));
        if merge.live.is_some() {
            self.sweep_given_up(out);
        }
    }
}

impl Merge {
    /// Joins until something must be read; adds what. Says whether all is joined.
    fn join(&mut self, asks: &mut Vec<(usize, StorageOp)>) -> bool {
        self.joined = 0;
        loop {
            if self.in_flight >= WRITES_MAX + self.reads_in_flight() {
                return false;
            }
            if self.joining.is_none() {
                match self.groups.pop_front() {
                    Some(group) => self.begin_group(group),
                    None => return self.write_timelines(),
                }
            }
            let Some(joining) = &mut self.joining else {
                continue;
            };
            for (place, cursor) in joining.cursors.iter_mut().enumerate() {
                cursor.ask(place, &joining.sections, asks);
            }
            let is_waiting = joining.cursors.iter().any(Cursor::is_waiting);
            if is_waiting || self.joined >= STEP_ENTRIES {
                return false;
            }
            match joining.next() {
                Some(entry) => {
                    self.joined += 1;
                    if let Some(life) = joining.sieve.life_of(&entry) {
                        if let Some(live) = &mut self.live {
                            live.note(&entry, life);
                        }
                        self.writer.push(entry);
                    } else {
                        self.dropped += 1;
                    }
                }
                None => {
                    if let Some(joining) = self.joining.take() {
                        self.writer.end(joining.ranges, Vec::new());
                    }
                }
            }
        }
    }

    fn reads_in_flight(&self) -> usize {
        let cursors = self.joining.iter().flat_map(|joining| &joining.cursors);
        cursors.filter(|cursor| cursor.is_asked).count()
    }

    fn begin_group(&mut self, ((history, disk), sections): Group) {
        let Some(roots) = self.roots.get(&history) else {
            return;
        };
        let lsns = || sections.iter().map(|section| section.lsns());
        let low = lsns().map(|lsns| lsns.0).min().unwrap_or_default();
        let high = lsns().map(|lsns| lsns.1).max().unwrap_or_default();
        let name = SectionName {
            history,
            disk,
            is_base_part: false,
        };
        self.writer.begin(name, low, high);
        let ranges = sections.iter().flat_map(|section| section.ranges());
        let ranges: Vec<_> = ranges.copied().collect();
        let cursors = sections.iter().enumerate();
        let cursors = cursors.filter_map(|(place, part)| Cursor::new(place, part, &self.inputs));
        let sieve = Sieve::new(roots.clone(), &ranges);
        let ranges = keep_ranges(ranges, roots);
        if let Some(live) = &mut self.live {
            live.begin(name, &ranges);
        }
        self.joining = Some(Joining {
            cursors: cursors.collect(),
            sieve,
            ranges,
            sections,
        });
    }

    fn write_timelines(&mut self) -> bool {
        for (history, samples) in core::mem::take(&mut self.timelines) {
            let name = SectionName {
                history,
                disk: DiskId::NIL,
                is_base_part: false,
            };
            let low = samples.first().map_or(Lsn::ZERO, |sample| sample.lsn);
            let high = samples.last().map_or(Lsn::ZERO, |sample| sample.lsn);
            if let Some(live) = &mut self.live {
                live.times(history, &samples);
            }
            self.writer.begin(name, low, high);
            self.writer.end(Vec::new(), samples);
        }
        true
    }

    /// A page that cannot be read is as good as a damaged one.
    fn read_failed(&mut self, place: usize, why: &str) {
        let joining = self.joining.as_mut();
        let Some(cursor) = joining.and_then(|joining| joining.cursors.get_mut(place)) else {
            return;
        };
        cursor.is_asked = false;
        match cursor.reading {
            Some((first, count, false)) => cursor.reading = Some((first, count, true)),
            _ => self.failure = Some(format!("{}: {why}", run_file(cursor.run))),
        }
    }

    fn page_read(&mut self, place: usize, bytes: &[u8]) {
        let Some(joining) = &mut self.joining else {
            return;
        };
        let Some(cursor) = joining.cursors.get_mut(place) else {
            return;
        };
        cursor.is_asked = false;
        let Some((first, count, is_copy)) = cursor.reading.take() else {
            return;
        };
        let mut entries = VecDeque::new();
        for (page, bytes) in (first..first + count).zip(bytes.chunks(PAGE_BYTES)) {
            match decode_page(bytes, cursor.run, page) {
                Ok(found) => entries.extend(found),
                Err(_) if !is_copy => {
                    cursor.reading = Some((first, count, true));
                    return;
                }
                Err(damage) => {
                    let name = run_file(cursor.run);
                    self.failure = Some(format!("{name}, page {page}: {damage}"));
                    return;
                }
            }
        }
        cursor.entries = entries;
    }
}

impl Joining {
    /// The next entry in order.
    fn next(&mut self) -> Option<Entry> {
        let heads = self.cursors.iter().enumerate();
        let heads = heads.filter_map(|(place, cursor)| Some((cursor.entries.front()?, place)));
        let (_, place) = heads.min_by_key(|(entry, _)| entry.key())?;
        self.cursors[place].entries.pop_front()
    }
}

impl Cursor {
    fn new(
        place: usize,
        section: &Arc<Section>,
        inputs: &[(RunId, Option<FileId>)],
    ) -> Option<Self> {
        let Section::File { run, table } = &**section else {
            return None;
        };
        let (_, file) = inputs.iter().find(|(input, _)| input == run)?;
        let mut reads = VecDeque::new();
        for (first, count) in table.adjoining(0, table.fences.len()) {
            let mut at = first;
            while at < first + count {
                let some = READ_PAGES.min(first + count - at);
                reads.push_back((at, some));
                at += some;
            }
        }
        Some(Self {
            table: place,
            file: (*file)?,
            run: *run,
            reads,
            reading: None,
            entries: VecDeque::new(),
            is_asked: false,
        })
    }

    fn is_waiting(&self) -> bool {
        self.entries.is_empty() && (self.reading.is_some() || !self.reads.is_empty())
    }

    /// Asks for the next pages when none are left.
    fn ask(&mut self, place: usize, sections: &[Arc<Section>], asks: &mut Vec<(usize, StorageOp)>) {
        if !self.entries.is_empty() || self.is_asked {
            return;
        }
        if self.reading.is_none() {
            self.reading = self.reads.pop_front().map(|(at, count)| (at, count, false));
        }
        let Some((first, count, is_copy)) = self.reading else {
            return;
        };
        let Some(Section::File { table, .. }) = sections.get(self.table).map(|part| &**part) else {
            return;
        };
        let found = place_of(first, table.file_pages);
        let offset = if is_copy { found.copy } else { found.offset };
        let buffer = IoBuffer::zeroed(usize::try_from(count).unwrap_or(0) * PAGE_BYTES);
        self.is_asked = true;
        let file = self.file;
        asks.push((
            place,
            StorageOp::Read {
                file,
                offset,
                buffer,
            },
        ));
    }
}

fn is_of(section: &Section, runs: &[RunId]) -> bool {
    matches!(section, Section::File { run, .. } if runs.contains(run))
}

/// Leaves out samples before the window that are close to each other.
pub(super) fn thin_out(samples: Vec<TimeSample>, window: Lsn) -> Vec<TimeSample> {
    let mut kept: Vec<TimeSample> = Vec::with_capacity(samples.len());
    for sample in samples {
        let is_near = kept
            .last()
            .is_some_and(|last| sample.time.0 < last.time.0.saturating_add(OLD_GRAIN));
        if sample.lsn >= window || !is_near {
            kept.push(sample);
        }
    }
    kept
}
