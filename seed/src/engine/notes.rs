//! Writing notes: what a rebuild from segments alone needs. `FORMAT.md` says what is in them.
//!
//! Invariants
//! * Before a segment is rewritten, destaged or dropped, there are notes that were begun after it
//!   was judged; without room for them it names notes that are still to come.
//! * Older notes go only after the newer ones and their name are durable.
//! * They are begun between steps, when all that the manifest made durable is applied.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use afterimage_blockdev::{
    FileId, FileName, IoBuffer, Monotonic, StorageError, StorageErrorKind, StorageOp,
    StorageOutcome,
};

use super::rest::Rest;
use super::rewrite::moving;
use super::{Engine, Output, Owner, Phase, StoreFile};
use crate::manifest::{Edit, Noted, encode_state};
use crate::notes::NotesFile;
use crate::run::RunId;

/// No number is higher: a name that has such a one is none of ours.
const NUMBER_MAX: u32 = 1 << 31;
/// Bytes of one write.
const PIECE_BYTES: usize = 4 << 20;
/// How long a change waits for others.
const GATHER_FOR: Duration = Duration::from_secs(1);
/// Bytes a second that notes take of the medium on average, but for those of a collection.
const BYTES_PER_SECOND: u64 = 64 << 10;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Create,
    Write,
    Sync,
    Close,
    Rename,
    SyncDirectory,
}

/// Notes on their way.
#[derive(Debug)]
struct Writing {
    files: VecDeque<(NotesFile, IoBuffer)>,
    step: Step,
    file: Option<FileId>,
    written: usize,
    number: u32,
    rest: Option<(RunId, u64)>,
    bytes: u64,
    /// They were begun after the collection under way has judged.
    is_fresh: bool,
}

/// What the engine knows of notes.
#[derive(Debug, Default)]
pub(super) struct Notes {
    /// Number of the newest state; 0 for none.
    number: u32,
    /// The highest number that was given out.
    last_number: u32,
    /// The highest number of a run that notes had at start.
    last_run: u32,
    rest: Option<(RunId, u64)>,
    bytes: u64,
    /// Files that do not count any more once new ones are there.
    old: Vec<FileName>,
    gathered: Option<Rest>,
    is_fresh: bool,
    /// There was no room, or too much to hold.
    is_given_up: bool,
    is_wanted: bool,
    wants_rest: bool,
    changed_at: Option<Monotonic>,
    next_at: Monotonic,
    /// Commits on their way that change what notes say.
    commits: BTreeSet<u64>,
    writing: Option<Writing>,
}

impl Notes {
    /// Takes a name over that was found at start; false when it means no notes. No rest can hold
    /// more of the log than the map did.
    pub(super) fn found(&mut self, name: &FileName, checkpoint: u64) -> bool {
        match NotesFile::parse(name) {
            Some(NotesFile::State(number)) if number < NUMBER_MAX => {
                self.last_number = self.last_number.max(number);
                self.old.push(name.clone());
            }
            Some(NotesFile::Rest(run, through)) if run.0 < NUMBER_MAX => {
                self.last_run = self.last_run.max(run.0);
                let is_newest = through <= checkpoint && self.rest < Some((run, through));
                let found = Some((run, through));
                let outdone = if is_newest {
                    core::mem::replace(&mut self.rest, found)
                } else {
                    found
                };
                let outdone = outdone.map(|(run, through)| NotesFile::Rest(run, through).name());
                self.old.extend(outdone);
            }
            _ => return false,
        }
        true
    }

    /// The lowest number of a run that no notes have.
    pub(super) fn next_run(&self) -> u32 {
        self.last_run.saturating_add(1)
    }

    /// Something that notes say has changed, and is durable.
    pub(super) fn changed(&mut self, now: Monotonic) {
        self.changed_at.get_or_insert(now);
    }

    /// A commit is on its way.
    pub(super) fn committing(&mut self, number: u64, edits: &[Edit]) {
        if edits.iter().any(is_worth_noting) {
            self.commits.insert(number);
        }
    }

    /// It is durable.
    pub(super) fn committed(&mut self, number: u64, now: Monotonic) {
        if self.commits.remove(&number) {
            self.changed(now);
        }
    }

    /// A collection has judged; this is what its pass has gathered. What is missing of commits that
    /// the log has released is made up for.
    pub(super) fn judged(&mut self, rest: Rest, log_released: u64) {
        self.gathered = Some(rest);
        let lacks_rest = self.rest.map_or(0, |(_, through)| through) < log_released;
        (self.is_wanted, self.wants_rest) = (lacks_rest, lacks_rest);
        self.is_fresh = false;
        self.is_given_up = false;
        if let Some(writing) = &mut self.writing {
            writing.is_fresh = false;
        }
    }

    pub(super) fn sweep_ends(&mut self) {
        self.is_wanted = self.wants_rest;
        self.gathered.take_if(|_| !self.wants_rest);
    }

    /// Says whether notes tell of what was judged, and of the log up to a commit; otherwise they
    /// will be written.
    pub(super) fn tell_of(&mut self, last_sequence: u64) -> bool {
        let has_rest = self.rest.map_or(0, |(_, through)| through) >= last_sequence;
        if self.is_given_up || (self.is_fresh && has_rest) {
            return true;
        }
        self.is_wanted = true;
        self.wants_rest |= !has_rest;
        false
    }

    /// The number of the notes that a segment needs which is written now.
    pub(super) fn needed(&self) -> u32 {
        if self.is_fresh {
            self.number
        } else {
            self.last_number.saturating_add(1)
        }
    }

    /// Bytes of the files that count.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.bytes
    }

    /// The files that count.
    pub(super) fn files(&self) -> impl Iterator<Item = StoreFile> {
        let state = (self.number > 0).then_some(NotesFile::State(self.number));
        let rest = self.rest.filter(|_| self.number > 0);
        let rest = rest.map(|(run, through)| NotesFile::Rest(run, through));
        state.into_iter().chain(rest).map(StoreFile::Notes)
    }
}

impl Engine {
    /// Writes notes when a collection waits for them, or something has changed a while ago.
    pub(super) fn notes_when_due(&mut self, out: &mut Vec<Output>) {
        if self.notes.writing.is_some() {
            return;
        }
        if self.notes.is_wanted {
            return self.begin_notes(out);
        }
        let Some(changed_at) = self.notes.changed_at else {
            return;
        };
        let due = changed_at.after(GATHER_FOR).max(self.notes.next_at);
        if self.now < due {
            out.push(Output::WakeAt(due));
        } else {
            self.begin_notes(out);
        }
    }

    /// Writes what has changed before the store is closed; says whether that is done.
    pub(super) fn notes_at_stop(&mut self, out: &mut Vec<Output>) -> bool {
        if self.notes.writing.is_none() && self.notes.changed_at.is_some() {
            self.begin_notes(out);
        }
        self.notes.writing.is_none()
    }

    fn begin_notes(&mut self, out: &mut Vec<Output>) {
        let number = self.notes.last_number.saturating_add(1);
        let mut files = VecDeque::new();
        let mut rest = self.notes.rest;
        let gathered = self.notes.gathered.take_if(|_| self.notes.wants_rest);
        self.notes.is_given_up |= self.notes.wants_rest && gathered.is_none();
        if let Some(gathered) = gathered {
            let (run, through) = (RunId(self.next_run), gathered.through);
            if let Some(bytes) = gathered.encode(self.store, run) {
                self.next_run += 1;
                rest = Some((run, through));
                files.push_back((NotesFile::Rest(run, through), bytes));
            } else {
                tracing::error!("there are too many zeroes and discards for notes of them");
                self.notes.is_given_up = true;
            }
        }
        let state = match encode_state(&self.noted_state(number, rest), 1) {
            Ok(bytes) => bytes,
            Err(damage) => {
                tracing::error!(%damage, "the state of the store cannot be noted");
                return self.notes_given_up(out);
            }
        };
        files.push_back((NotesFile::State(number), state));
        let notes = &mut self.notes;
        notes.last_number = number;
        notes.changed_at = None;
        (notes.is_wanted, notes.wants_rest) = (false, false);
        notes.writing = Some(Writing {
            bytes: files.iter().map(|(_, bytes)| bytes.len() as u64).sum(),
            files,
            step: Step::Create,
            file: None,
            written: 0,
            number,
            rest,
            is_fresh: true,
        });
        self.notes_next(out);
    }

    /// The state as edits, and what only notes say.
    fn noted_state(&self, number: u32, rest: Option<(RunId, u64)>) -> Vec<Edit> {
        let mut edits = self.whole_state();
        let (rest, rest_through) = rest.unwrap_or((RunId(0), 0));
        let sequence = self.manifest.next_sequence();
        let notes = Noted::Notes {
            number,
            sequence,
            rest,
            rest_through,
        };
        edits.insert(1, Edit::Noted(notes));
        // More than was acknowledged, never less.
        let pending = self.machines.values().flat_map(|m| m.pending.values());
        edits.extend(pending.cloned().map(Edit::Point));
        let known = self.histories.iter().map(|(history, entry)| Noted::Known {
            history: *history,
            lsn: entry.durable,
        });
        edits.extend(known.map(Edit::Noted));
        edits.extend(self.rewrite.iter().map(super::rewrite::Rewrite::moving));
        let judged = self.sweep.logs.iter().chain(&self.sweep.seeds);
        edits.extend(judged.map(|judged| moving(judged.segment, judged.source, &judged.live)));
        edits
    }

    /// Begins the next file; when there is none, the notes are written.
    fn notes_next(&mut self, out: &mut Vec<Output>) {
        let Some(writing) = &mut self.notes.writing else {
            return;
        };
        if let Some((name, _)) = writing.files.front() {
            let name = name.name_before();
            (writing.step, writing.written) = (Step::Create, 0);
            return self.submit(Owner::Notes, StorageOp::Create { name }, out);
        }
        let Some(writing) = self.notes.writing.take() else {
            return;
        };
        let notes = &mut self.notes;
        let mut old = core::mem::take(&mut notes.old);
        if notes.number > 0 {
            old.push(NotesFile::State(notes.number).name());
        }
        let outdone = notes.rest.filter(|_| notes.rest != writing.rest);
        old.extend(outdone.map(|(run, through)| NotesFile::Rest(run, through).name()));
        notes.number = writing.number;
        notes.rest = writing.rest;
        notes.bytes = writing.bytes;
        notes.is_fresh = writing.is_fresh;
        let wait = Duration::from_millis(writing.bytes * 1000 / BYTES_PER_SECOND);
        notes.next_at = self.now.after(wait.max(self.options.notes_interval));
        self.removals.extend(old);
        self.remove_retired(out);
        self.rewrite_has_notes(out);
    }

    pub(super) fn notes_done(
        &mut self,
        result: Result<StorageOutcome, StorageError>,
        out: &mut Vec<Output>,
    ) {
        let Some(writing) = &mut self.notes.writing else {
            return;
        };
        let is_mild = |error: &StorageError| {
            error.is_no_space() || matches!(error.kind, StorageErrorKind::Exists)
        };
        match result {
            Ok(StorageOutcome::Opened { file, .. }) => {
                writing.file = Some(file);
                writing.step = Step::Write;
            }
            Ok(_) => {}
            Err(error) if is_mild(&error) => {
                tracing::warn!(%error, "notes are not written");
                return self.notes_given_up(out);
            }
            Err(error) => return self.fail(error.into(), out),
        }
        let Some((name, bytes)) = writing.files.front() else {
            return;
        };
        let name = *name;
        let op = match (writing.step, writing.file) {
            (Step::Write, Some(file)) if writing.written < bytes.len() => {
                let end = (writing.written + PIECE_BYTES).min(bytes.len());
                let buffer = IoBuffer::copy_of(&bytes[writing.written..end]);
                let offset = writing.written as u64;
                writing.written = end;
                StorageOp::Write {
                    file,
                    offset,
                    buffer,
                }
            }
            (Step::Write, Some(file)) => {
                writing.step = Step::Sync;
                StorageOp::Sync { file }
            }
            (Step::Sync, Some(file)) => {
                writing.step = Step::Close;
                writing.file = None;
                StorageOp::Close { file }
            }
            (Step::Close, _) => {
                writing.step = Step::Rename;
                let (from, to) = (name.name_before(), name.name());
                StorageOp::Rename { from, to }
            }
            (Step::Rename, _) => {
                writing.step = Step::SyncDirectory;
                let directory = "segments".to_owned();
                StorageOp::SyncDirectory { directory }
            }
            _ => {
                writing.files.pop_front();
                return self.notes_next(out);
            }
        };
        self.submit(Owner::Notes, op, out);
    }

    /// They are written later; a collection goes on without.
    fn notes_given_up(&mut self, out: &mut Vec<Output>) {
        let notes = &mut self.notes;
        notes.is_given_up = true;
        notes.gathered = None;
        (notes.is_wanted, notes.wants_rest) = (false, false);
        notes.next_at = self.now.after(self.options.notes_interval);
        if self.phase == Phase::Stopping {
            notes.changed_at = None;
        } else {
            notes.changed(self.now);
        }
        if let Some(writing) = notes.writing.take() {
            if let Some(file) = writing.file {
                self.submit(Owner::Nobody, StorageOp::Close { file }, out);
            }
            if let Some((name, _)) = writing.files.front() {
                let name = name.name_before();
                self.submit(Owner::Nobody, StorageOp::Remove { name }, out);
            }
        }
        self.rewrite_has_notes(out);
    }
}

/// Says whether an edit changes what notes say in a way that a rebuild would miss: not what the log
/// and the segments tell as well.
fn is_worth_noting(edit: &Edit) -> bool {
    !matches!(
        edit,
        Edit::Clock(_)
            | Edit::Churn { .. }
            | Edit::Checkpoint { .. }
            | Edit::Run { .. }
            | Edit::RunDropped { .. }
            | Edit::HistoryState(_)
            | Edit::Floor { .. }
            | Edit::LogReleased { .. }
            | Edit::BaseThrough { .. }
    )
}
