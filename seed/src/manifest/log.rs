//! The manifest as a state machine: recovery, commits one at a time, a new file when one is full.
//!
//! A new file is not a copy step of its own: the first commit that finds the file full asks the
//! engine for the whole state, which goes into the next file together with what waits.

use std::collections::VecDeque;

use afterimage_blockdev::{
    FileId, IoBuffer, StorageError, StorageErrorKind, StorageOp, StorageOutcome,
};
use afterimage_cache::Damage;

use super::found::{Found, Walked};
use super::snapshot::{COMMIT_BYTES, bytes_of, encode_snapshot};
use super::{
    COMMIT_BYTES_MAX, Edit, FILE_BYTES_MAX, ManifestCommit, SECTOR, manifest_file,
    parse_manifest_file,
};
use crate::error::SeedError;
use crate::patchwork::Patchwork;

type StorageResult = Result<StorageOutcome, StorageError>;

/// A file is replaced when it is so many times as long as the snapshot that it began with.
const SNAPSHOT_LENGTHS: u64 = 4;

/// What the manifest wants or tells.
#[derive(Debug)]
pub enum ManifestOutput {
    /// Perform this; exactly one is outstanding at a time.
    Storage(StorageOp),
    /// Edits of the newest whole state, in order.
    Recovered(Vec<Edit>),
    /// One of the two copies of a commit was damaged, and is whole again.
    Mended {
        /// Name of the file.
        file: String,
        /// Byte offset.
        offset: u64,
    },
    /// Recovery is done; `is_new` when there was no whole manifest at all.
    Ready {
        /// The store has no manifest yet.
        is_new: bool,
    },
    /// The commits with these numbers are durable.
    Durable(Vec<u64>),
    /// The file is full: give the whole state through [`Manifest::rotate`].
    WantsSnapshot,
    /// There is no room; the commit is tried again on the next [`Manifest::retry`].
    NoSpace,
    /// The manifest cannot go on.
    Failed(SeedError),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Idle,
    List,
    Open,
    Read,
    CloseFound,
    Rewrite,
    SyncFound,
    SyncFoundName,
    Write,
    Sync,
    Create,
    WriteNext,
    SyncNext,
    SyncName,
    CloseOld,
    Sweep,
    CloseNext,
    RemoveNext,
}

/// What becomes true when the commit under way is durable.
#[derive(Clone, Copy, Debug, Default)]
struct Pending {
    length: u64,
    sequence: u64,
    hash: [u8; 32],
}

/// The manifest log.
#[derive(Debug)]
pub struct Manifest {
    bytes_max: u64,
    step: Step,
    /// Found and not looked at, oldest first.
    unread: Vec<u32>,
    /// Files that do not count.
    others: Vec<u32>,
    number: u32,
    file: Option<FileId>,
    /// Length of the file that is looked at.
    found_bytes: usize,
    next_number: u32,
    next_file: Option<FileId>,
    /// Bytes at which the present file is full.
    full_at: u64,
    write_at: u64,
    sequence: u64,
    previous: [u8; 32],
    /// Waiting: the caller's number and the edits.
    queue: VecDeque<(u64, Vec<Edit>)>,
    /// On their way: the callers' numbers and the edits.
    writing: Vec<(u64, Vec<Edit>)>,
    /// The commit under way is an idle one.
    is_proving: bool,
    /// The last commit is an idle one: damage of those before it cannot look torn.
    is_proven: bool,
    /// The read of the file that is looked at, in pieces.
    patchwork: Option<Patchwork>,
    pending: Pending,
    has_no_space: bool,
    wants_snapshot: bool,
    /// The whole state, for the next file, with all that was queued before it.
    snapshot: Option<Vec<Edit>>,
    found: Option<Found>,
    is_ready: bool,
}

impl Manifest {
    /// A manifest that has not looked at its storage yet. A file gets at least so many bytes before
    /// it is replaced.
    #[must_use]
    pub fn new(bytes_max: u64) -> Self {
        Self {
            bytes_max,
            step: Step::Idle,
            unread: Vec::new(),
            others: Vec::new(),
            number: 0,
            file: None,
            found_bytes: 0,
            next_number: 1,
            next_file: None,
            full_at: bytes_max,
            write_at: 0,
            sequence: 1,
            previous: [0; 32],
            queue: VecDeque::new(),
            writing: Vec::new(),
            is_proving: false,
            is_proven: true,
            patchwork: None,
            pending: Pending::default(),
            has_no_space: false,
            wants_snapshot: false,
            snapshot: None,
            found: None,
            is_ready: false,
        }
    }

    /// Begins recovery.
    pub fn start(&mut self, out: &mut Vec<ManifestOutput>) {
        self.ask(
            Step::List,
            StorageOp::List {
                directory: "manifest".to_owned(),
            },
            out,
        );
    }

    /// Number of the present file.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Bytes of the present file.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.write_at
    }

    /// All commits below this one are durable, and none from it on was reported so.
    #[must_use]
    pub fn next_sequence(&self) -> u64 {
        self.sequence
    }

    /// Says whether commits wait or are on their way.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.step != Step::Idle || !self.queue.is_empty() || !self.writing.is_empty()
    }

    /// Says whether commits wait for room on the medium.
    #[must_use]
    pub fn has_no_space(&self) -> bool {
        self.has_no_space
    }

    /// Queues a commit; comes back as `Durable` with `number`. One without edits is durable with
    /// those before it.
    pub fn commit(&mut self, number: u64, edits: Vec<Edit>, out: &mut Vec<ManifestOutput>) {
        if edits.is_empty() && self.is_ready && !self.is_busy() {
            out.push(ManifestOutput::Durable(vec![number]));
            return;
        }
        self.queue.push_back((number, edits));
        self.advance(out);
    }

    /// Says whether a commit has none behind it that proves that it was durable.
    #[must_use]
    pub fn is_unproven(&self) -> bool {
        !self.is_proven && self.is_ready && !self.has_no_space
    }

    /// Writes an idle commit behind the last real one, when nothing else is to be written.
    pub fn prove(&mut self, out: &mut Vec<ManifestOutput>) {
        // Also into a full file: what waits for the next commit would else wait for proof as well.
        if let Some(file) = self.file.filter(|_| self.is_unproven()) {
            if !self.is_busy() {
                self.is_proving = true;
                self.write_queue(file, out);
            }
        }
    }

    /// Begins a new file with the whole state. What waits is written behind it, so the state need
    /// not contain that, but may.
    pub fn rotate(&mut self, state: Vec<Edit>, out: &mut Vec<ManifestOutput>) {
        self.snapshot = Some(state);
        self.wants_snapshot = false;
        self.advance(out);
    }

    /// Tries again after the medium was full.
    pub fn retry(&mut self, out: &mut Vec<ManifestOutput>) {
        if core::mem::take(&mut self.has_no_space) {
            self.rewrite(out);
            self.advance(out);
        }
    }

    fn ask(&mut self, step: Step, op: StorageOp, out: &mut Vec<ManifestOutput>) {
        self.step = step;
        out.push(ManifestOutput::Storage(op));
    }

    fn advance(&mut self, out: &mut Vec<ManifestOutput>) {
        if self.step != Step::Idle || !self.is_ready || self.has_no_space {
            return;
        }
        if self.snapshot.is_some() {
            self.create_next(out);
            return;
        }
        if self.queue.is_empty() && self.writing.is_empty() {
            return;
        }
        let is_long = self.writing.is_empty() && self.queue.front().is_some_and(is_long);
        let is_full = is_long || self.write_at >= self.full_at;
        let Some(file) = self.file.filter(|_| !is_full) else {
            if !self.wants_snapshot {
                self.wants_snapshot = true;
                out.push(ManifestOutput::WantsSnapshot);
            }
            return;
        };
        self.write_queue(file, out);
    }

    /// Writes what waits as one commit, as long as it is not too long.
    fn write_queue(&mut self, file: FileId, out: &mut Vec<ManifestOutput>) {
        if self.writing.is_empty() && !self.is_proving {
            let mut bytes = 0;
            while let Some((_, edits)) = self.queue.front() {
                bytes += bytes_of(edits);
                if bytes > COMMIT_BYTES && !self.writing.is_empty() {
                    break;
                }
                self.writing.extend(self.queue.pop_front());
            }
        }
        let commit = ManifestCommit {
            sequence: self.sequence,
            previous: self.previous,
            is_snapshot: false,
            ends_snapshot: false,
            edits: self
                .writing
                .iter()
                .flat_map(|(_, edits)| edits.iter().cloned())
                .collect(),
        };
        let (buffer, hash) = match commit.encode_twice() {
            Ok(encoded) => encoded,
            Err(damage) => return self.refuse(damage, out),
        };
        let offset = self.write_at;
        let length = offset + buffer.len() as u64;
        self.pending = Pending {
            length,
            sequence: self.sequence.saturating_add(1),
            hash,
        };
        self.ask(
            Step::Write,
            StorageOp::Write {
                file,
                offset,
                buffer,
            },
            out,
        );
    }

    fn create_next(&mut self, out: &mut Vec<ManifestOutput>) {
        let name = manifest_file(self.next_number);
        self.next_number = self.next_number.saturating_add(1);
        self.ask(Step::Create, StorageOp::Create { name }, out);
    }

    fn write_snapshot(&mut self, file: FileId, out: &mut Vec<ManifestOutput>) {
        self.next_file = Some(file);
        let mut state = self.snapshot.take().unwrap_or_default();
        // The state may be older than what was queued, which is not lost by being said twice.
        self.writing.extend(self.queue.drain(..));
        for (_, edits) in &mut self.writing {
            state.append(edits);
        }
        let (bytes, sequence, previous) =
            match encode_snapshot(&state, self.sequence, self.previous) {
                Ok(encoded) => encoded,
                Err(damage) => return self.refuse(damage, out),
            };
        if bytes.len() as u64 > FILE_BYTES_MAX / 2 {
            let structure = "manifest file";
            let field = "length";
            return self.refuse(Damage::Field { structure, field }, out);
        }
        self.snapshot = Some(state);
        self.pending = Pending {
            length: bytes.len() as u64,
            sequence,
            hash: previous,
        };
        self.ask(
            Step::WriteNext,
            StorageOp::Write {
                file,
                offset: 0,
                buffer: bytes,
            },
            out,
        );
    }

    /// What no reader would take is not written: the store stops with the manifest that it has.
    fn refuse(&mut self, damage: Damage, out: &mut Vec<ManifestOutput>) {
        let file = manifest_file(self.number).to_string();
        let error = damaged(file, self.write_at, damage);
        out.push(ManifestOutput::Failed(error));
    }

    /// Takes the completion of the one outstanding operation.
    pub fn completed(&mut self, result: StorageResult, out: &mut Vec<ManifestOutput>) {
        let step = core::mem::replace(&mut self.step, Step::Idle);
        match result {
            Ok(outcome) => self.succeeded(step, outcome, out),
            Err(error) => self.failed(step, error, out),
        }
    }

    fn failed(&mut self, step: Step, error: StorageError, out: &mut Vec<ManifestOutput>) {
        match step {
            Step::Read => self.read_on(Err(error), out),
            // The name may be left from a change of files that was cut.
            Step::Create if matches!(error.kind, StorageErrorKind::Exists) => {
                self.create_next(out);
            }
            // Proof is not worth waiting for; what comes next takes its place.
            Step::Write if self.is_proving && error.is_no_space() => {
                self.is_proving = false;
                self.is_proven = true;
                self.advance(out);
            }
            Step::Create | Step::Write | Step::Rewrite if error.is_no_space() => {
                self.wait_for_room(out);
            }
            Step::WriteNext if error.is_no_space() => {
                // The new file does not count; the present one goes on to.
                if let Some(file) = self.next_file.take() {
                    self.ask(Step::CloseNext, StorageOp::Close { file }, out);
                }
            }
            // What cannot be closed or removed now is swept at the next start.
            Step::CloseOld | Step::Sweep => self.sweep(out),
            Step::CloseNext | Step::RemoveNext => self.wait_for_room(out),
            _ => out.push(ManifestOutput::Failed(error.into())),
        }
    }

    fn wait_for_room(&mut self, out: &mut Vec<ManifestOutput>) {
        self.has_no_space = true;
        out.push(ManifestOutput::NoSpace);
    }

    fn succeeded(&mut self, step: Step, outcome: StorageOutcome, out: &mut Vec<ManifestOutput>) {
        let sync_name = || StorageOp::SyncDirectory {
            directory: "manifest".to_owned(),
        };
        match (step, outcome) {
            (Step::List, StorageOutcome::Listed(names)) => {
                self.unread = names.iter().filter_map(parse_manifest_file).collect();
                self.unread.sort_unstable();
                self.others.clone_from(&self.unread);
                self.next_number = self.unread.last().map_or(1, |last| last.saturating_add(1));
                self.open_next(out);
            }
            (Step::Open, StorageOutcome::Opened { file, length }) => {
                self.file = Some(file);
                self.found_bytes = usize::try_from(length).unwrap_or(usize::MAX);
                if length > FILE_BYTES_MAX {
                    let file = manifest_file(self.number).to_string();
                    let (structure, field) = ("manifest file", "length");
                    let error = damaged(file, FILE_BYTES_MAX, Damage::Field { structure, field });
                    out.push(ManifestOutput::Failed(error));
                    return;
                }
                let len = self.found_bytes.next_multiple_of(SECTOR).max(SECTOR);
                self.ask_read(file, 0, len, out);
            }
            (Step::Read, StorageOutcome::Read(bytes)) => self.read_on(Ok(&bytes), out),
            (Step::CloseFound, _) => self.open_next(out),
            (Step::Rewrite, _) => self.with_file(Step::SyncFound, out),
            // What is found counts from now on, so it and its name must be durable.
            (Step::SyncFound, _) => self.ask(Step::SyncFoundName, sync_name(), out),
            (Step::SyncFoundName | Step::CloseOld | Step::Sweep, _) => self.sweep(out),
            (Step::Write, _) => self.with_file(Step::Sync, out),
            (Step::Sync, _) => self.finish_commit(out),
            (Step::Create, StorageOutcome::Opened { file, .. }) => self.write_snapshot(file, out),
            (Step::WriteNext, _) => {
                if let Some(file) = self.next_file {
                    self.ask(Step::SyncNext, StorageOp::Sync { file }, out);
                }
            }
            (Step::SyncNext, _) => self.ask(Step::SyncName, sync_name(), out),
            (Step::SyncName, _) => self.change_files(out),
            (Step::CloseNext, _) => {
                let name = manifest_file(self.next_number - 1);
                self.ask(Step::RemoveNext, StorageOp::Remove { name }, out);
            }
            (Step::RemoveNext, _) => self.wait_for_room(out),
            _ => {}
        }
    }

    /// Syncs the present file.
    fn with_file(&mut self, step: Step, out: &mut Vec<ManifestOutput>) {
        if let Some(file) = self.file {
            self.ask(step, StorageOp::Sync { file }, out);
        }
    }

    /// The next file is whole and durable: it counts, and the others do not.
    fn change_files(&mut self, out: &mut Vec<ManifestOutput>) {
        self.snapshot = None;
        self.full_at = self.full_at(self.pending.length);
        if self.number > 0 {
            self.others.push(self.number);
        }
        self.number = self.next_number - 1;
        let old = core::mem::replace(&mut self.file, self.next_file.take());
        match old {
            Some(file) => self.ask(Step::CloseOld, StorageOp::Close { file }, out),
            None => self.sweep(out),
        }
    }

    /// Bytes at which a file with such a snapshot is full; a longest commit still fits behind.
    fn full_at(&self, snapshot_bytes: u64) -> u64 {
        let most = FILE_BYTES_MAX - 4 * COMMIT_BYTES_MAX as u64;
        let many = snapshot_bytes.saturating_mul(SNAPSHOT_LENGTHS);
        self.bytes_max.max(many).min(most)
    }

    /// Removes the files that do not count, then goes on.
    fn sweep(&mut self, out: &mut Vec<ManifestOutput>) {
        if let Some(number) = self.others.pop() {
            let name = manifest_file(number);
            self.ask(Step::Sweep, StorageOp::Remove { name }, out);
        } else if let Some(found) = self.found.take() {
            self.recovered(found, out);
        } else {
            self.finish_commit(out);
        }
    }

    fn finish_commit(&mut self, out: &mut Vec<ManifestOutput>) {
        self.write_at = self.pending.length;
        self.sequence = self.pending.sequence;
        self.previous = self.pending.hash;
        self.is_proven = core::mem::take(&mut self.is_proving);
        let numbers: Vec<u64> = self.writing.drain(..).map(|(number, _)| number).collect();
        if !numbers.is_empty() {
            out.push(ManifestOutput::Durable(numbers));
        }
        self.advance(out);
    }

    fn ask_read(&mut self, file: FileId, offset: u64, len: usize, out: &mut Vec<ManifestOutput>) {
        let buffer = IoBuffer::zeroed(len);
        let op = StorageOp::Read {
            file,
            offset,
            buffer,
        };
        self.ask(Step::Read, op, out);
    }

    /// Takes what was read of a file. One bad sector hides no copy that is elsewhere.
    fn read_on(&mut self, result: Result<&IoBuffer, StorageError>, out: &mut Vec<ManifestOutput>) {
        let Some(file) = self.file else { return };
        match (&mut self.patchwork, result) {
            (None, Ok(bytes)) => return self.read(bytes, &[], out),
            (None, Err(error)) => {
                tracing::error!(%error, "the manifest is read in pieces");
                let len = self.found_bytes.max(SECTOR);
                self.patchwork = Some(Patchwork::new(0, len));
            }
            (Some(patchwork), result) => {
                if !patchwork.take(result.as_ref().ok().map(|bytes| &bytes[..])) {
                    if let Err(error) = result {
                        out.push(ManifestOutput::Failed(error.into()));
                    }
                    return;
                }
            }
        }
        let wanted = self.patchwork.as_ref().and_then(Patchwork::wanted);
        match wanted {
            Some((offset, len)) => self.ask_read(file, offset, len, out),
            None => {
                let patchwork = self.patchwork.take().map(Patchwork::finish);
                let (bytes, unreadable) = patchwork.unwrap_or((IoBuffer::zeroed(0), Vec::new()));
                self.read(&bytes, &unreadable, out);
            }
        }
    }

    /// Opens the newest file that was not looked at.
    fn open_next(&mut self, out: &mut Vec<ManifestOutput>) {
        if let Some(number) = self.unread.pop() {
            self.number = number;
            self.ask(
                Step::Open,
                StorageOp::Open {
                    name: manifest_file(number),
                },
                out,
            );
        } else {
            self.number = 0;
            self.is_ready = true;
            out.push(ManifestOutput::Ready { is_new: true });
        }
    }

    fn read(&mut self, bytes: &[u8], unreadable: &[u64], out: &mut Vec<ManifestOutput>) {
        let Some(file) = self.file else { return };
        let name = || manifest_file(self.number).to_string();
        match Found::walk(bytes, unreadable) {
            Walked::Whole(found) => {
                self.others.retain(|other| *other != self.number);
                for offset in &found.damaged {
                    out.push(ManifestOutput::Mended {
                        file: name(),
                        offset: *offset,
                    });
                }
                self.found = Some(*found);
                self.rewrite(out);
            }
            // Its snapshot was not durable: the file before it counts.
            Walked::NotWhole => {
                self.file = None;
                self.ask(Step::CloseFound, StorageOp::Close { file }, out);
            }
            Walked::Newer { found, supported } => {
                out.push(ManifestOutput::Failed(SeedError::NewerFormat {
                    found,
                    supported,
                }));
            }
            Walked::Damaged(offset, damage) => {
                out.push(ManifestOutput::Failed(damaged(name(), offset, damage)));
            }
        }
    }

    /// An earlier sync of what was found may have failed, so it is written once more.
    fn rewrite(&mut self, out: &mut Vec<ManifestOutput>) {
        if let (Some(found), Some(file)) = (&self.found, self.file) {
            let (offset, buffer) = (found.rewrite_at, IoBuffer::copy_of(found.rewrite()));
            self.ask(
                Step::Rewrite,
                StorageOp::Write {
                    file,
                    offset,
                    buffer,
                },
                out,
            );
        }
    }

    fn recovered(&mut self, found: Found, out: &mut Vec<ManifestOutput>) {
        self.write_at = found.bytes.len() as u64;
        self.full_at = self.full_at(found.snapshot_bytes);
        self.is_proven = found.is_proven;
        self.sequence = found.sequence;
        self.previous = found.hash;
        self.is_ready = true;
        out.push(ManifestOutput::Recovered(found.edits));
        out.push(ManifestOutput::Ready { is_new: false });
        self.advance(out);
    }
}

/// Says whether a commit would be so long that a snapshot must take it, in parts.
fn is_long((_, edits): &(u64, Vec<Edit>)) -> bool {
    bytes_of(edits) > COMMIT_BYTES_MAX / 2
}

fn damaged(file: String, offset: u64, damage: Damage) -> SeedError {
    SeedError::Damaged {
        file,
        offset,
        damage,
    }
}
