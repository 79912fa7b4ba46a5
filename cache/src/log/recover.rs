//! Start: lists the segments, walks those that are wanted, tells a torn tail from corruption, and
//! gives the frames back.
//!
//! Nothing is written here; but what an unsealed segment still holds is synced before it counts as
//! durable, for it may have been on its way when the program ended. What lies beyond the cut is void from the moment the next segment's
//! header says so, which is durable before any new commit is acknowledged.
//!
//! The walk reads one segment at a time and gives frames back as it goes, as long as no sequence
//! is missing. When one is missing it goes on only to learn whether a later commit proves that the
//! missing ones were durable. If so they are `Lost`, and the rest is read again and given back;
//! if not, the missing one is where the log ends.

use std::collections::VecDeque;

use afterimage_blockdev::{FileId, IoBuffer, SegmentId, StorageOp, StorageOutcome, StoreId};

use super::commit::{Sealing, note_slots};
use super::{FrameLocation, Log, LogOutput, OldSegment, Pending, Phase, StorageResult, opened};
use crate::bytes::index;
use crate::error::Damage;
use crate::frame::{Frame, FrameView};
use crate::segment::{
    Directory, FOOTER_BYTES, Footer, SECTOR, SegmentHeader, SegmentIdentity, SegmentScan,
    parse_segment_file,
};

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Step {
    #[default]
    List,
    Open,
    Header,
    Footer,
    Content,
    Sync,
    Close,
}

#[derive(Debug)]
struct Found {
    id: SegmentId,
    length: u64,
    header: Option<SegmentHeader>,
    footer: Option<Footer>,
    last_sequence: u64,
    generation: u64,
    /// Of a segment without a footer: what its directory will be.
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
    at: usize,
    file: Option<FileId>,
    /// Next sequence to be given back.
    expected: u64,
    /// Highest sequence that is known to have been durable.
    proven: u64,
    /// First missing sequence of the present pass.
    gap: Option<u64>,
    last_break: Option<(SegmentId, u64, Damage)>,
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
            Err(error) => {
                self.fail(error.into(), out);
                return;
            }
        };
        match (self.recovery.step, outcome) {
            (Step::List, StorageOutcome::Listed(names)) => {
                let mut ids: Vec<_> = names.iter().filter_map(parse_segment_file).collect();
                ids.sort_unstable();
                self.next_segment = ids.last().map_or(1, |id| id.0 + 1);
                self.recovery.names = ids.into();
                self.survey_next(out);
            }
            (Step::Open, outcome) => self.recover_opened(opened(outcome), out),
            (Step::Header, StorageOutcome::Read(bytes)) => {
                let header = SegmentHeader::decode(&bytes).ok();
                let wanted = self.options.store;
                let Some(found) = self.recovery.found.last_mut() else {
                    return;
                };
                found.header = header.filter(|header| {
                    header.identity.store == wanted && header.identity.segment == found.id
                });
                let offset = found.length.saturating_sub(FOOTER_BYTES as u64);
                self.recover_read(Step::Footer, offset, FOOTER_BYTES, out);
            }
            (Step::Footer, StorageOutcome::Read(bytes)) => {
                let footer = Footer::decode(&bytes).ok();
                let wanted = self.options.store;
                let Some(found) = self.recovery.found.last_mut() else {
                    return;
                };
                found.footer = footer.filter(|footer| {
                    footer.identity.store == wanted && footer.identity.segment == found.id
                });
                self.recover_close(out);
            }
            (Step::Content, StorageOutcome::Read(bytes)) => {
                self.walk(&bytes, out);
                let is_sealed = self.recovery.found[self.recovery.at - 1].footer.is_some();
                match self.recovery.file {
                    Some(file) if !is_sealed => {
                        self.recovery.step = Step::Sync;
                        self.submit(Pending::Recover, StorageOp::Sync { file }, out);
                    }
                    _ => self.recover_close(out),
                }
            }
            (Step::Sync, _) => self.recover_close(out),
            (Step::Close, _) => match self.recovery.pass {
                Pass::Survey => self.survey_next(out),
                Pass::Walk | Pass::Again => self.walk_next(out),
            },
            _ => {}
        }
    }

    fn survey_next(&mut self, out: &mut Vec<LogOutput>) {
        if let Some(id) = self.recovery.names.pop_front() {
            self.recovery.step = Step::Open;
            let name = self.file_name(id);
            self.recovery.found.push(Found {
                id,
                length: 0,
                header: None,
                footer: None,
                last_sequence: 0,
                generation: 1,
                directory: Directory::default(),
                root: blake3::Hasher::new(),
                end: SECTOR as u64,
            });
            self.submit(Pending::Recover, StorageOp::Open { name }, out);
            return;
        }
        self.surveyed();
        self.begin_pass(Pass::Walk);
        self.walk_next(out);
    }

    /// What headers and footers prove: all before a segment's first commit was durable.
    fn surveyed(&mut self) {
        for found in &self.recovery.found {
            let begun = found
                .header
                .map_or(0, |header| header.first_sequence.saturating_sub(1));
            let sealed = found.footer.map_or(0, |footer| footer.last_sequence);
            self.recovery.proven = self.recovery.proven.max(begun).max(sealed);
        }
        // A spool gives old segments away: what is wanted begins with the first one left.
        let first = self.recovery.found.first().and_then(|found| found.header);
        let begin = first.map_or(0, |header| header.first_sequence);
        self.recovery.expected = self.recovery.expected.max(begin);
    }

    fn begin_pass(&mut self, pass: Pass) {
        self.recovery.pass = pass;
        // Begin with the last segment that starts at or below what is wanted.
        let expected = self.recovery.expected;
        let starts_low = |found: &Found| {
            found
                .header
                .is_none_or(|header| header.first_sequence <= expected)
        };
        let found = &self.recovery.found;
        self.recovery.at = found.iter().rposition(starts_low).unwrap_or(0);
        // A segment with a damaged header may begin anywhere: go back to one that is sure.
        while self.recovery.at > 0 && found[self.recovery.at].header.is_none() {
            self.recovery.at -= 1;
        }
    }

    fn walk_next(&mut self, out: &mut Vec<LogOutput>) {
        if let Some(found) = self.recovery.found.get(self.recovery.at) {
            let name = self.file_name(found.id);
            self.recovery.step = Step::Open;
            self.submit(Pending::Recover, StorageOp::Open { name }, out);
            return;
        }
        if self.recovery.pass == Pass::Walk {
            if let Some(gap) = self.recovery.gap.take() {
                if gap <= self.recovery.proven {
                    self.recovery.expected = gap;
                    self.begin_pass(Pass::Again);
                    self.walk_next(out);
                    return;
                }
            }
        }
        self.recovered(out);
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
            let found = &self.recovery.found[self.recovery.at];
            let end = found
                .footer
                .map_or(length, |footer| footer.directory_offset.min(length));
            let len = usize::try_from(end).unwrap_or(0).next_multiple_of(SECTOR);
            self.recover_read(Step::Content, 0, len, out);
        }
    }

    fn recover_read(&mut self, step: Step, offset: u64, len: usize, out: &mut Vec<LogOutput>) {
        let Some(file) = self.recovery.file else {
            return;
        };
        self.recovery.step = step;
        let buffer = IoBuffer::zeroed(len);
        self.submit(
            Pending::Recover,
            StorageOp::Read {
                file,
                offset,
                buffer,
            },
            out,
        );
    }

    fn recover_close(&mut self, out: &mut Vec<LogOutput>) {
        self.recovery.step = Step::Close;
        if let Some(file) = self.recovery.file.take() {
            self.submit(Pending::Recover, StorageOp::Close { file }, out);
        }
    }

    /// Walks the bytes of the present segment.
    fn walk(&mut self, bytes: &[u8], out: &mut Vec<LogOutput>) {
        let place = self.recovery.at;
        self.recovery.at += 1;
        let id = self.recovery.found[place].id;
        // Commits at or above the next segment's first are void: a cut was made before them.
        let void_from = self.recovery.found[place + 1..]
            .iter()
            .find_map(|later| later.header.map(|header| header.first_sequence))
            .unwrap_or(u64::MAX);
        let mut scan = SegmentScan::new(bytes, self.options.store, id);
        while let Some(item) = scan.step() {
            match item {
                Err(end) => self.recovery.last_break = Some((id, end.offset, end.damage)),
                Ok(commit) if commit.header.sequence >= void_from => break,
                Ok(commit) => {
                    let header = commit.header;
                    let found = &mut self.recovery.found[place];
                    found.generation = header.identity.generation;
                    self.recovery.proven = self.recovery.proven.max(header.durable_through);
                    self.meet(id, place, header.sequence, out);
                    let is_given = self.recovery.gap.is_none()
                        && header.sequence >= self.recovery.from_sequence
                        && header.sequence == self.recovery.expected;
                    if is_given {
                        self.recovery.found[place].last_sequence = header.sequence;
                        self.recovery.expected += 1;
                        give_back(&scan, &mut self.recovery.found[place], &commit, out);
                    }
                }
            }
        }
    }

    /// Notices when a sequence is missing before this one.
    fn meet(&mut self, id: SegmentId, place: usize, sequence: u64, out: &mut Vec<LogOutput>) {
        if sequence <= self.recovery.expected || self.recovery.gap.is_some() {
            return;
        }
        let fallback = || {
            (
                id,
                SECTOR as u64,
                Damage::Short {
                    structure: "commit",
                },
            )
        };
        let (segment, offset, damage) = self.recovery.last_break.clone().unwrap_or_else(fallback);
        let first_sequence = self.recovery.expected;
        if self.recovery.pass == Pass::Walk {
            self.recovery.gap = Some(first_sequence);
        } else if sequence - 1 <= self.recovery.proven {
            self.recovery.expected = sequence;
            self.recovery.found[place].last_sequence = sequence;
            let last_sequence = sequence - 1;
            out.push(LogOutput::Lost {
                segment,
                offset,
                first_sequence,
                last_sequence,
                damage,
            });
        } else {
            // Some of the missing ones were durable, this one was not: the log ends before it.
            let last_sequence = self.recovery.proven;
            if last_sequence >= first_sequence {
                self.recovery.expected = last_sequence + 1;
                out.push(LogOutput::Lost {
                    segment,
                    offset,
                    first_sequence,
                    last_sequence,
                    damage,
                });
            }
            self.recovery.gap = Some(first_sequence);
        }
    }

    fn recovered(&mut self, out: &mut Vec<LogOutput>) {
        // Durable commits at the very end may be missing with nothing whole behind them.
        let (expected, proven) = (self.recovery.expected, self.recovery.proven);
        if self.recovery.gap.is_none() && expected <= proven {
            if let Some((segment, offset, damage)) = self.recovery.last_break.clone() {
                let (first_sequence, last_sequence) = (expected, proven);
                out.push(LogOutput::Lost {
                    segment,
                    offset,
                    first_sequence,
                    last_sequence,
                    damage,
                });
            }
            self.recovery.expected = proven + 1;
        }
        let last_sequence = self.recovery.expected - 1;
        let mut segments = Vec::new();
        for found in core::mem::take(&mut self.recovery.found) {
            segments.push(found.id);
            if found.footer.is_none() && found.end > SECTOR as u64 && self.options.seals {
                self.unsealed.push(found.seal(self.options.store));
            }
            let sealed = found.footer.map_or(0, |footer| footer.last_sequence);
            self.old.push_back(OldSegment {
                id: found.id,
                generation: found
                    .header
                    .map_or(found.generation, |h| h.identity.generation),
                last_sequence: found.last_sequence.max(sealed).min(last_sequence),
                bytes: found.length,
            });
        }
        self.next_sequence = last_sequence + 1;
        self.durable_through = last_sequence;
        self.marked_through = last_sequence;
        self.last_data_sequence = 0;
        self.phase = Phase::Running;
        self.recovery = Recovery::default();
        out.push(LogOutput::Ready {
            last_sequence,
            segments,
        });
    }
}

impl Found {
    fn seal(&self, store: StoreId) -> Sealing {
        Sealing {
            identity: SegmentIdentity {
                store,
                segment: self.id,
                generation: self.generation,
            },
            file: None,
            first_sequence: self.header.map_or(1, |header| header.first_sequence),
            last_sequence: self.last_sequence,
            end: self.end,
            sealed_end: 0,
            directory: self.directory.clone(),
            root: *self.root.finalize().as_bytes(),
            is_begun: false,
        }
    }
}

fn give_back(
    scan: &SegmentScan<'_>,
    found: &mut Found,
    commit: &crate::segment::FoundCommit,
    out: &mut Vec<LogOutput>,
) {
    let segment = found.id;
    found.end = commit.header.offset + commit.header.length;
    let mut first_slot = commit.header.first_slot;
    for offset in &commit.frames {
        let Some(FrameView { header, bytes }) = scan.frame(*offset) else {
            continue;
        };
        let sequence = commit.header.sequence;
        let location = FrameLocation {
            segment,
            offset: *offset,
            first_slot,
            sequence,
        };
        first_slot += header.slot_count;
        found.root.update(&header.hash);
        if found.footer.is_none() {
            note_slots(
                &mut found.directory,
                &location,
                &FrameView { header, bytes },
            );
        }
        assert!(
            index(header.body_len) < bytes.len(),
            "a frame that was verified has its length"
        );
        out.push(LogOutput::Recovered {
            location,
            frame: Frame {
                header,
                bytes: bytes.to_vec(),
            },
        });
    }
}
