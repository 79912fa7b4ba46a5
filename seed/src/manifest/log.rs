//! The manifest as a state machine: recovery, commits one at a time, a new file when one is full.
//!
//! A new file is not a copy step of its own: the first commit that finds the file full asks the
//! engine for a snapshot, which goes into the next file together with what waits.

use std::collections::VecDeque;

use afterimage_blockdev::{
    FileId, IoBuffer, StorageError, StorageErrorKind, StorageOp, StorageOutcome,
};
use afterimage_cache::Damage;

use super::{Edit, ManifestCommit, SECTOR, manifest_file, parse_manifest_file};
use crate::error::SeedError;

type StorageResult = Result<StorageOutcome, StorageError>;

/// Bytes after which the next commit goes into a new file.
const FILE_BYTES_MAX: u64 = 16 << 20;
/// Edits in one commit of a snapshot.
const SNAPSHOT_EDITS: usize = 4096;

/// What the manifest wants or tells.
#[derive(Debug)]
pub enum ManifestOutput {
    /// Perform this; exactly one is outstanding at a time.
    Storage(StorageOp),
    /// Edits of the newest whole state, in order.
    Recovered(Vec<Edit>),
    /// Recovery is done; `is_new` when there was no manifest at all.
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
    SyncFound,
    Close,
    Write,
    Sync,
    Create,
    SyncDirectory,
    CloseOld,
    RemoveOld,
}

/// The manifest log.
#[derive(Debug)]
pub struct Manifest {
    step: Step,
    numbers: Vec<u32>,
    number: u32,
    file: Option<FileId>,
    length: u64,
    write_at: u64,
    sequence: u64,
    previous: [u8; 32],
    /// Waiting: the caller's number and the edits.
    queue: VecDeque<(u64, Vec<Edit>)>,
    /// Being written: the callers' numbers, the bytes, and the hash that they end with.
    writing: Vec<u64>,
    writing_hash: [u8; 32],
    writing_sequence: u64,
    writing_edits: Vec<Vec<Edit>>,
    has_no_space: bool,
    wants_snapshot: bool,
    snapshot: Option<Vec<Edit>>,
    old_file: Option<(u32, FileId)>,
    recovered: Option<Vec<Edit>>,
    is_ready: bool,
}

impl Default for Manifest {
    fn default() -> Self {
        Self {
            step: Step::Idle,
            numbers: Vec::new(),
            number: 0,
            file: None,
            length: 0,
            write_at: 0,
            sequence: 1,
            previous: [0; 32],
            queue: VecDeque::new(),
            writing: Vec::new(),
            writing_hash: [0; 32],
            writing_sequence: 0,
            writing_edits: Vec::new(),
            has_no_space: false,
            wants_snapshot: false,
            snapshot: None,
            old_file: None,
            recovered: None,
            is_ready: false,
        }
    }
}

impl Manifest {
    /// Begins recovery.
    pub fn start(&mut self, out: &mut Vec<ManifestOutput>) {
        self.ask(Step::List, StorageOp::List { directory: "manifest".to_owned() }, out);
    }

    /// Bytes of the present file.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.write_at
    }

    /// Says whether commits wait or are on their way.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.step != Step::Idle || !self.queue.is_empty()
    }

    /// Queues a commit; comes back as `Durable` with `number`.
    pub fn commit(&mut self, number: u64, edits: Vec<Edit>, out: &mut Vec<ManifestOutput>) {
        self.queue.push_back((number, edits));
        self.advance(out);
    }

    /// Begins a new file with the whole state, which includes everything that was committed or is
    /// queued.
    pub fn rotate(&mut self, state: Vec<Edit>, out: &mut Vec<ManifestOutput>) {
        self.snapshot = Some(state);
        self.wants_snapshot = false;
        self.advance(out);
    }

    /// Tries again after the medium was full.
    pub fn retry(&mut self, out: &mut Vec<ManifestOutput>) {
        if self.has_no_space {
            self.has_no_space = false;
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
        if self.queue.is_empty() && self.writing_edits.is_empty() {
            return;
        }
        if self.file.is_none() || self.write_at >= FILE_BYTES_MAX {
            if !self.wants_snapshot {
                self.wants_snapshot = true;
                out.push(ManifestOutput::WantsSnapshot);
            }
            return;
        }
        self.write_queue(out);
    }

    /// Writes all that waits as one commit.
    fn write_queue(&mut self, out: &mut Vec<ManifestOutput>) {
        let Some(file) = self.file else { return };
        for (number, edits) in self.queue.drain(..) {
            self.writing.push(number);
            self.writing_edits.push(edits);
        }
        let commit = ManifestCommit {
            sequence: self.sequence,
            previous: self.previous,
            is_snapshot: false,
            ends_snapshot: false,
            edits: self.writing_edits.concat(),
        };
        let (buffer, hash) = commit.encode();
        self.writing_hash = hash;
        self.writing_sequence = self.sequence + 1;
        self.length = self.write_at + buffer.len() as u64;
        let offset = self.write_at;
        self.ask(Step::Write, StorageOp::Write { file, offset, buffer }, out);
    }

    fn create_next(&mut self, out: &mut Vec<ManifestOutput>) {
        // A file of this number may be left from a rotation that was cut; its state is not whole.
        self.number += 1;
        self.ask(Step::Create, StorageOp::Create { name: manifest_file(self.number) }, out);
    }

    fn write_snapshot(&mut self, file: FileId, out: &mut Vec<ManifestOutput>) {
        let state = self.snapshot.take().unwrap_or_default();
        // What waits is part of the state already.
        for (number, _) in self.queue.drain(..) {
            self.writing.push(number);
        }
        self.writing_edits.clear();
        let mut bytes = IoBuffer::with_capacity(SECTOR);
        let (mut sequence, mut previous) = (self.sequence, self.previous);
        let pieces = state.len().div_ceil(SNAPSHOT_EDITS).max(1);
        for piece in 0..pieces {
            let edits = state.iter().skip(piece * SNAPSHOT_EDITS).take(SNAPSHOT_EDITS).cloned();
            let commit = ManifestCommit {
                sequence,
                previous,
                is_snapshot: true,
                ends_snapshot: piece + 1 == pieces,
                edits: edits.collect(),
            };
            let (encoded, hash) = commit.encode();
            bytes.extend_from_slice(&encoded);
            sequence += 1;
            previous = hash;
        }
        self.writing_hash = previous;
        self.writing_sequence = sequence;
        self.length = bytes.len() as u64;
        if let Some(old) = self.file.replace(file) {
            self.old_file = Some((self.number - 1, old));
        }
        self.snapshot = Some(state);
        self.ask(Step::Write, StorageOp::Write { file, offset: 0, buffer: bytes }, out);
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
        if step == Step::Create && matches!(error.kind, StorageErrorKind::Exists) {
            self.create_next(out);
        } else if error.is_no_space() && matches!(step, Step::Write | Step::Create) {
            if step == Step::Create || self.snapshot.is_some() {
                // The new file does not count; go back to the old one and try again later.
                self.has_no_space = true;
                if let Some((_, old)) = self.old_file.take() {
                    self.file = Some(old);
                }
            } else {
                self.has_no_space = true;
            }
            out.push(ManifestOutput::NoSpace);
        } else if matches!(step, Step::RemoveOld | Step::CloseOld) {
            self.finish_commit(out);
        } else {
            out.push(ManifestOutput::Failed(error.into()));
        }
    }

    fn succeeded(&mut self, step: Step, outcome: StorageOutcome, out: &mut Vec<ManifestOutput>) {
        match (step, outcome) {
            (Step::List, StorageOutcome::Listed(names)) => {
                self.numbers = names.iter().filter_map(parse_manifest_file).collect();
                self.numbers.sort_unstable();
                self.number = self.numbers.last().copied().unwrap_or(0);
                self.open_next(out);
            }
            (Step::Open, StorageOutcome::Opened { file, length }) => {
                self.file = Some(file);
                let len = usize::try_from(length).unwrap_or(0).next_multiple_of(SECTOR);
                let buffer = IoBuffer::zeroed(len.max(SECTOR));
                self.ask(Step::Read, StorageOp::Read { file, offset: 0, buffer }, out);
            }
            (Step::Read, StorageOutcome::Read(bytes)) => self.read(&bytes, out),
            (Step::SyncFound, _) => {
                // What is found counts from now on, so it must be durable from now on.
                if let Some(edits) = self.recovered.take() {
                    self.is_ready = true;
                    out.push(ManifestOutput::Recovered(edits));
                    out.push(ManifestOutput::Ready { is_new: false });
                    self.advance(out);
                }
            }
            (Step::Close, _) => self.open_next(out),
            (Step::Create, StorageOutcome::Opened { file, .. }) => self.write_snapshot(file, out),
            (Step::Write, _) => {
                if let Some(file) = self.file {
                    self.ask(Step::Sync, StorageOp::Sync { file }, out);
                }
            }
            (Step::Sync, _) => {
                if self.snapshot.take().is_some() {
                    let directory = "manifest".to_owned();
                    self.ask(Step::SyncDirectory, StorageOp::SyncDirectory { directory }, out);
                } else {
                    self.finish_commit(out);
                }
            }
            (Step::SyncDirectory, _) => match self.old_file {
                Some((_, file)) => self.ask(Step::CloseOld, StorageOp::Close { file }, out),
                None => self.finish_commit(out),
            },
            (Step::CloseOld, _) => {
                let number = self.old_file.take().map_or(0, |(number, _)| number);
                let name = manifest_file(number);
                self.ask(Step::RemoveOld, StorageOp::Remove { name }, out);
            }
            (Step::RemoveOld, _) => self.finish_commit(out),
            _ => {}
        }
    }

    fn finish_commit(&mut self, out: &mut Vec<ManifestOutput>) {
        self.write_at = self.length;
        self.sequence = self.writing_sequence;
        self.previous = self.writing_hash;
        self.writing_edits.clear();
        let numbers = core::mem::take(&mut self.writing);
        if !numbers.is_empty() {
            out.push(ManifestOutput::Durable(numbers));
        }
        self.advance(out);
    }

    /// Opens the newest file that was not looked at.
    fn open_next(&mut self, out: &mut Vec<ManifestOutput>) {
        if let Some(number) = self.numbers.pop() {
            self.ask(Step::Open, StorageOp::Open { name: manifest_file(number) }, out);
            self.wants_snapshot = false;
        } else {
            self.is_ready = true;
            out.push(ManifestOutput::Ready { is_new: true });
        }
    }

    fn read(&mut self, bytes: &[u8], out: &mut Vec<ManifestOutput>) {
        let Some(file) = self.file else { return };
        match Found::walk(bytes) {
            Ok(Some(found)) => {
                self.write_at = found.end;
                self.length = found.end;
                self.sequence = found.sequence;
                self.previous = found.hash;
                self.recovered = Some(found.edits);
                self.ask(Step::SyncFound, StorageOp::Sync { file }, out);
            }
            // Its snapshot is not whole: the file before it counts.
            Ok(None) => {
                self.file = None;
                self.ask(Step::Close, StorageOp::Close { file }, out);
            }
            Err((offset, Damage::Version { found, supported, .. })) => {
                let _ = offset;
                out.push(ManifestOutput::Failed(SeedError::NewerFormat { found, supported }));
            }
            Err((offset, damage)) => {
                let file = "manifest".to_owned();
                out.push(ManifestOutput::Failed(SeedError::Damaged { file, offset, damage }));
            }
        }
    }
}

/// What a walk over a manifest file finds.
struct Found {
    edits: Vec<Edit>,
    end: u64,
    sequence: u64,
    hash: [u8; 32],
}

impl Found {
    /// Walks a file. `None` when its snapshot is not whole.
    fn walk(bytes: &[u8]) -> Result<Option<Self>, (u64, Damage)> {
        let mut edits = Vec::new();
        let mut at = 0;
        let mut last: Option<(u64, [u8; 32])> = None;
        let mut is_whole = false;
        let damage = loop {
            let rest = bytes.get(at..).unwrap_or(&[]);
            match ManifestCommit::decode(rest) {
                Ok((commit, hash, len)) => {
                    let follows = last.is_none_or(|(sequence, previous)| {
                        commit.sequence == sequence + 1 && commit.previous == previous
                    });
                    if !follows || (commit.is_snapshot && is_whole) {
                        let field = "place in the chain";
                        break Damage::Field { structure: super::NAME, field };
                    }
                    is_whole |= commit.ends_snapshot;
                    last = Some((commit.sequence, hash));
                    edits.extend(commit.edits);
                    at += len;
                }
                Err(damage @ Damage::Version { .. }) => return Err((at as u64, damage)),
                Err(damage) => break damage,
            }
        };
        let Some((sequence, hash)) = last.filter(|_| is_whole) else {
            return if is_first_damaged(bytes) { Err((at as u64, damage)) } else { Ok(None) };
        };
        // Only the last commit can be torn: a whole one behind the damage follows from durability.
        let mut later = at + SECTOR;
        while later < bytes.len() {
            let is_commit = ManifestCommit::decode(&bytes[later..])
                .is_ok_and(|(commit, _, _)| commit.sequence > sequence);
            if is_commit {
                return Err((at as u64, damage));
            }
            later += SECTOR;
        }
        Ok(Some(Self { edits, end: at as u64, sequence: sequence + 1, hash }))
    }
}

/// Says whether a snapshot was whole once: a commit that is not part of it follows somewhere.
fn is_first_damaged(bytes: &[u8]) -> bool {
    (0..bytes.len()).step_by(SECTOR).any(|at| {
        ManifestCommit::decode(&bytes[at..])
            .is_ok_and(|(commit, _, _)| !commit.is_snapshot || commit.ends_snapshot)
    })
}

