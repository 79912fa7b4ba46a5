//! Start: lists the segments, walks those that are wanted, tells a torn tail from corruption, and
//! gives the frames back.
//!
//! Invariants
//! * Nothing is written here but what is there already: commits that nothing proves durable are
//!   written once more at their place, with the same bytes, and synced before they count. The
//!   program may have ended before their sync, or after one that failed and left them in memory
//!   only.
//! * What lies beyond the cut is void from the moment the next segment's header says so, which is
//!   durable before any new commit is acknowledged. Every commit repeats that header's word.
//! * Only what is proven durable is salvaged; a torn tail is cut whole.
//!
//! The walk reads one segment at a time and gives frames back as it goes, as long as no sequence
//! is missing. When one is missing whose durability is not proven yet, it goes on only to learn
//! whether a later commit proves it. If so the segment is read again and salvaged; if not, the
//! missing one is where the log ends.

mod survey;
mod walk;

use std::collections::{HashSet, VecDeque};

use afterimage_blockdev::{FileId, IoBuffer, SegmentId, StorageOp, StorageOutcome, StoreId};

use super::commit::Sealing;
use super::{Log, LogOutput, OldSegment, Pending, Phase, StorageResult, opened};
use crate::error::Damage;
use crate::frame::FrameIdentity;
use crate::segment::{Directory, Footer, SECTOR, SegmentIdentity, parse_segment_file};

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Step {
    #[default]
    List,
    Open,
    Header,
    Footer,
    /// All of a file whose header says nothing.
    Probe,
    Content,
    Rewrite,
    Sync,
    Close,
}

/// A segment that was found.
#[derive(Debug)]
struct Found {
    id: SegmentId,
    length: u64,
    /// Sequence of its first commit; `None` when nothing in it says so.
    first: Option<u64>,
    generation: u64,
    footer: Option<Footer>,
    /// The header, or the directory, is damaged.
    damage: Option<(u64, Damage)>,
    is_blank: bool,
    /// The header is that of the segment whose file this was before.
    is_stale: bool,
    /// The file belongs to another store, and is left alone.
    is_foreign: bool,
    /// Gets a new directory.
    is_unsealed: bool,
    /// Something of it is lost at its end, so that its directory would overwrite remains.
    has_lost_end: bool,
    last_sequence: u64,
    /// Index of the first slot behind the last commit that was noted.
    next_slot: Option<u32>,
    directory: Directory,
    root: blake3::Hasher,
    end: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Pass {
    /// Headers and footers of all segments.
    #[default]
    Survey,
    /// Contents; frames are given back until a sequence is missing.
    Walk,
    /// Contents once more, because missing commits were durable.
    Again,
}

#[derive(Debug, Default)]
pub(super) struct Recovery {
    step: Step,
    pass: Pass,
    from_sequence: u64,
    found: Vec<Found>,
    names: VecDeque<SegmentId>,
    /// Places in `found` that are still to be walked.
    walks: VecDeque<usize>,
    at: usize,
    file: Option<FileId>,
    /// Next sequence to be given back.
    expected: u64,
    /// Highest sequence that is known to have been durable.
    proven: u64,
    /// First missing sequence of the present pass.
    gap: Option<u64>,
    identities: HashSet<FrameIdentity>,
    /// Bytes to be written again, and where.
    rewrite: Option<(u64, IoBuffer)>,
}

impl Recovery {
    pub(super) fn abandon(&mut self) -> Option<FileId> {
        self.file.take()
    }
}

impl Log {
    pub(super) fn start(&mut self, from_sequence: u64, out: &mut Vec<LogOutput>) {
        assert!(self.phase == Phase::New, "a log starts once");
        self.phase = Phase::Recovering;
        self.recovery.from_sequence = from_sequence.max(1);
        self.recovery.expected = from_sequence.max(1);
        let directory = self.options.directory.clone();
        self.submit(Pending::Recover, StorageOp::List { directory }, out);
    }

    pub(super) fn recover_step(&mut self, result: StorageResult, out: &mut Vec<LogOutput>) {
        let outcome = match result {
            Ok(outcome) => outcome,
            // Writing again what is there needs no room, but on media that copy on write: there
            // the sync alone must do.
            Err(error) if self.recovery.step == Step::Rewrite && error.is_no_space() => {
                StorageOutcome::Done
            }
            Err(error) => {
                self.fail(error.into(), out);
                return;
            }
        };
        match (self.recovery.step, outcome) {
            (Step::List, StorageOutcome::Listed(names)) => {
                let mut ids: Vec<_> = names.iter().filter_map(parse_segment_file).collect();
                ids.sort_unstable();
                self.next_segment = ids.last().map_or(1, |id| id.0.saturating_add(1));
                self.recovery.names = ids.into();
                self.survey_next(out);
            }
            (Step::Open, outcome) => self.recover_opened(opened(outcome), out),
            (Step::Header, StorageOutcome::Read(bytes)) => self.header_read(&bytes, out),
            (Step::Footer, StorageOutcome::Read(bytes)) => self.footer_read(&bytes, out),
            (Step::Probe, StorageOutcome::Read(bytes)) => {
                self.probe(&bytes);
                self.recover_close(out);
            }
            (Step::Content, StorageOutcome::Read(bytes)) => {
                self.walk(&bytes, out);
                self.rewrite_tail(out);
            }
            (Step::Rewrite, _) => self.recover_sync(out),
            (Step::Sync, _) => self.recover_close(out),
            (Step::Close, _) => match self.recovery.pass {
                Pass::Survey => self.survey_next(out),
                Pass::Walk | Pass::Again => self.walk_next(out),
            },
            _ => {}
        }
    }

    fn recover_opened(&mut self, file: Option<(FileId, u64)>, out: &mut Vec<LogOutput>) {
        let Some((file, length)) = file else { return };
        self.recovery.file = Some(file);
        if self.recovery.pass == Pass::Survey {
            if let Some(found) = self.recovery.found.last_mut() {
                found.length = length;
            }
            self.recover_read(Step::Header, 0, SECTOR, out);
        } else {
            self.recover_read_all(Step::Content, length, out);
        }
    }

    fn recover_read_all(&mut self, step: Step, length: u64, out: &mut Vec<LogOutput>) {
        // A file is never longer than its segment was to be.
        let length = length.min(self.options.segment_bytes.max(1 << 30));
        let len = usize::try_from(length).unwrap_or(0);
        self.recover_read(step, 0, len.next_multiple_of(SECTOR).max(SECTOR), out);
    }

    fn recover_read(&mut self, step: Step, offset: u64, len: usize, out: &mut Vec<LogOutput>) {
        let Some(file) = self.recovery.file else {
            return;
        };
        self.recovery.step = step;
        let buffer = IoBuffer::zeroed(len);
        let op = StorageOp::Read {
            file,
            offset,
            buffer,
        };
        self.submit(Pending::Recover, op, out);
    }

    /// Writes again what may be in memory only.
    fn rewrite_tail(&mut self, out: &mut Vec<LogOutput>) {
        let Some(file) = self.recovery.file else {
            return;
        };
        if self.recovery.found[self.recovery.at].footer.is_some() {
            self.recover_close(out);
            return;
        }
        let Some((offset, buffer)) = self.recovery.rewrite.take() else {
            self.recover_sync(out);
            return;
        };
        self.recovery.step = Step::Rewrite;
        let op = StorageOp::Write {
            file,
            offset,
            buffer,
        };
        self.submit(Pending::Recover, op, out);
    }

    fn recover_sync(&mut self, out: &mut Vec<LogOutput>) {
        let Some(file) = self.recovery.file else {
            return;
        };
        self.recovery.step = Step::Sync;
        self.submit(Pending::Recover, StorageOp::Sync { file }, out);
    }

    fn recover_close(&mut self, out: &mut Vec<LogOutput>) {
        self.recovery.step = Step::Close;
        if let Some(file) = self.recovery.file.take() {
            self.submit(Pending::Recover, StorageOp::Close { file }, out);
        }
    }

    /// Takes over what was found and lets appends begin.
    fn recovered(&mut self, out: &mut Vec<LogOutput>) {
        let mut recovery = core::mem::take(&mut self.recovery);
        let last_sequence = recovery.expected - 1;
        let through = recovery.found.iter().map(Found::through).max();
        self.found_through = through.unwrap_or(0);
        let mut segments = Vec::new();
        let mut before = 0;
        let nexts = recovery.nexts();
        let known = recovery
            .found
            .iter()
            .rposition(|found| found.first.is_some());
        // Without any other, the only file is kept for whoever can read it.
        let last_known = known.unwrap_or(usize::MAX);
        for (place, (found, next)) in recovery.found.drain(..).zip(nexts).enumerate() {
            // Nothing that can be read, behind all that can: torn before anything was durable.
            let is_torn = found.first.is_none() && !found.is_foreign && place > last_known;
            let is_void = found.first.is_some_and(|first| first > last_sequence) || is_torn;
            if found.is_blank || is_void {
                // A blank file protects nothing; a void one has a header that keeps a tail void.
                if found.is_blank {
                    let name = self.file_name(found.id);
                    self.submit(Pending::Release, StorageOp::Remove { name }, out);
                } else {
                    self.leftovers.push(found.id);
                }
                continue;
            }
            segments.push(found.id);
            // A header beyond what is proven, or of nothing at all, was torn by the crash, which is
            // no damage.
            if let Some((offset, damage)) = &found.damage
                && found.first.is_some_and(|first| first <= recovery.proven)
            {
                out.push(LogOutput::Mended {
                    segment: found.id,
                    offset: *offset,
                    damage: damage.clone(),
                });
            }
            let holds_commits = found.end > SECTOR as u64;
            if found.is_unsealed && holds_commits && !found.has_lost_end && self.options.seals {
                self.unsealed.push(found.seal(self.options.store));
            }
            // Without a commit walked, all before the next segment may be in it.
            let sealed = found.footer.map_or(0, |footer| footer.last_sequence);
            let until = next.map_or(last_sequence, |next| next - 1).max(before);
            let last = match found.first {
                Some(_) => until,
                None => found.last_sequence.max(sealed).max(before),
            };
            before = last.min(last_sequence);
            self.old.push_back(OldSegment {
                id: found.id,
                generation: found.generation,
                last_sequence: before,
                bytes: found.length,
            });
        }
        self.next_sequence = last_sequence + 1;
        self.durable_through = last_sequence;
        self.marked_through = recovery.proven.min(last_sequence);
        // An idle commit proves the rest, seals what is unsealed and voids what was cut.
        self.last_data_sequence = last_sequence;
        self.last_data_at = self.now;
        if !self.unsealed.is_empty() || !self.leftovers.is_empty() {
            self.marked_through = self.marked_through.min(last_sequence.saturating_sub(1));
        }
        self.phase = if self.closes_when_ready {
            Phase::Closing
        } else {
            Phase::Running
        };
        out.push(LogOutput::Ready {
            last_sequence,
            segments,
        });
    }
}

impl Recovery {
    /// For each segment, where the one behind it begins.
    fn nexts(&self) -> Vec<Option<u64>> {
        let mut nexts = vec![None; self.found.len()];
        let mut next: Option<u64> = None;
        for (place, found) in self.found.iter().enumerate().rev() {
            nexts[place] = next;
            next = match (found.first, next) {
                (Some(first), Some(later)) => Some(later.min(first)),
                (first, later) => first.or(later),
            };
        }
        nexts
    }
}

impl Found {
    fn new(id: SegmentId) -> Self {
        Self {
            id,
            length: 0,
            first: None,
            generation: 1,
            footer: None,
            damage: None,
            is_blank: false,
            is_stale: false,
            is_foreign: false,
            is_unsealed: true,
            has_lost_end: false,
            last_sequence: 0,
            next_slot: Some(0),
            directory: Directory::default(),
            root: blake3::Hasher::new(),
            end: SECTOR as u64,
        }
    }

    /// Highest sequence that the file shows to have been there.
    fn through(&self) -> u64 {
        let sealed = self.footer.map_or(0, |footer| footer.last_sequence);
        let before = self.first.map_or(0, |first| first.saturating_sub(1));
        self.last_sequence.max(sealed).max(before)
    }

    fn seal(&self, store: StoreId) -> Sealing {
        Sealing {
            identity: self.identity(store),
            file: None,
            first_sequence: self.first.unwrap_or(1),
            last_sequence: self.last_sequence,
            end: self.end,
            sealed_end: 0,
            directory: self.directory.clone(),
            root: *self.root.finalize().as_bytes(),
            is_begun: false,
            is_sealed: false,
        }
    }

    fn identity(&self, store: StoreId) -> SegmentIdentity {
        SegmentIdentity {
            store,
            segment: self.id,
            generation: self.generation,
        }
    }
}
