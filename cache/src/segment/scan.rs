//! Walks a segment that may be damaged, and tells what is whole.

use afterimage_blockdev::{SegmentId, StoreId};

use super::salvage::frames_end;
use super::{COMMIT_HEADER_BYTES, CommitHeader, CommitView, SECTOR, SegmentHeader};
use crate::error::Damage;
use crate::frame::{DamagedSlot, FrameView};

/// A commit whose headers, notes and order are whole.
#[derive(Clone, Debug)]
pub struct FoundCommit {
    /// Its header.
    pub header: CommitHeader,
    /// Byte offset of each frame within the segment.
    pub frames: Vec<u64>,
    /// Slots whose content is bad: the place of the frame in `frames`, and the slot.
    pub damaged: Vec<(usize, DamagedSlot)>,
}

/// What lies between or behind whole commits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScanEnd {
    /// Byte offset where the walk broke off.
    pub offset: u64,
    /// Why.
    pub damage: Damage,
    /// Byte offset of the next whole commit; `None` at the end.
    pub resumed: Option<u64>,
}

/// A walk over the bytes of a segment.
#[derive(Debug)]
pub struct SegmentScan<'a> {
    bytes: &'a [u8],
    store: StoreId,
    segment: SegmentId,
    generation: Option<u64>,
    /// The segment's header, unless it is damaged.
    pub header: Result<SegmentHeader, Damage>,
    at: usize,
    last_sequence: u64,
}

impl<'a> SegmentScan<'a> {
    /// Begins a walk. The name of the file says which segment it should be.
    #[must_use]
    pub fn new(bytes: &'a [u8], store: StoreId, segment: SegmentId) -> Self {
        let header = SegmentHeader::decode(bytes).and_then(|header| {
            let is_ours = header.identity.store == store && header.identity.segment == segment;
            let structure = "log segment header";
            if is_ours {
                Ok(header)
            } else {
                Err(Damage::Field {
                    structure,
                    field: "identity",
                })
            }
        });
        let generation = header
            .as_ref()
            .ok()
            .map(|header| header.identity.generation);
        Self {
            bytes,
            store,
            segment,
            generation,
            header,
            at: SECTOR,
            last_sequence: 0,
        }
    }

    fn is_ours(&self, header: &CommitHeader) -> bool {
        let identity = header.identity;
        identity.store == self.store
            && identity.segment == self.segment
            && self
                .generation
                .is_none_or(|generation| generation == identity.generation)
            && header.sequence > self.last_sequence
    }

    fn accept(&self, at: usize) -> Result<CommitView<'a>, Damage> {
        let structure = "commit";
        let rest = self.bytes.get(at..).ok_or(Damage::Short { structure })?;
        let commit = CommitView::accept_skeleton(rest, at as u64)?;
        if self.is_ours(&commit.header) {
            Ok(commit)
        } else {
            Err(Damage::Field {
                structure,
                field: "identity",
            })
        }
    }

    /// The next commit, or where the walk broke off and goes on. `None` at the end.
    pub fn step(&mut self) -> Option<Result<FoundCommit, ScanEnd>> {
        if self.at >= self.bytes.len() {
            return None;
        }
        match self.accept(self.at) {
            Ok(commit) => {
                let start = self.at as u64;
                let header = commit.header;
                self.generation = Some(header.identity.generation);
                self.last_sequence = header.sequence;
                // `accept` has found the whole length in the buffer.
                self.at += usize::try_from(header.length).unwrap_or(self.bytes.len());
                Some(Ok(FoundCommit {
                    header,
                    frames: commit.frames.iter().map(|(at, _)| start + at).collect(),
                    damaged: commit.damaged,
                }))
            }
            Err(damage) => {
                let offset = self.at as u64;
                self.at = self.resume(self.at);
                let resumed = (self.at < self.bytes.len()).then_some(self.at as u64);
                Some(Err(ScanEnd {
                    offset,
                    damage,
                    resumed,
                }))
            }
        }
    }

    /// Where the next whole commit begins after a bad one. What a slot holds is chosen by its
    /// writer and could look like a commit: so whatever can be told of the bad one's length is
    /// jumped over.
    fn resume(&self, at: usize) -> usize {
        let end = self.bytes.len();
        let header = CommitHeader::decode(&self.bytes[at..])
            .ok()
            .map(|(header, _)| header)
            .filter(|header| header.offset == at as u64 && self.is_ours(header));
        let by_header = header
            .and_then(|header| usize::try_from(header.length).ok())
            .and_then(|length| at.checked_add(length));
        if let Some(next) = by_header.filter(|next| *next < end && self.accept(*next).is_ok()) {
            return next;
        }
        let by_frames = frames_end(self.bytes, at + COMMIT_HEADER_BYTES, end);
        let mut next = by_frames.next_multiple_of(SECTOR).max(at + SECTOR);
        while next < end && self.accept(next).is_err() {
            next += SECTOR;
        }
        next.min(end)
    }

    /// The frame at a byte offset that [`FoundCommit`] named.
    #[must_use]
    pub fn frame(&self, offset: u64) -> Option<FrameView<'a>> {
        let at = usize::try_from(offset).ok()?;
        FrameView::parse(self.bytes.get(at..)?).ok()
    }
}
