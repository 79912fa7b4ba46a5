//! Takes what is still good out of damaged commits that are proven to have been durable.
//!
//! Invariants
//! * A frame counts as whole only when its hash fits: its header is then either as it was written
//!   or worked out anew and proven by that hash. Its bad slots are named.
//! * Of a frame that cannot be proven, only records whose own check fits are kept, under the
//!   identity of its header, or one in whose history their slots verify.
//! * Nothing here looks beyond the range that it was given, and all work is bounded by its length.

mod frame;
mod slots;

use core::ops::Range;
use std::collections::HashSet;

use afterimage_blockdev::Lsn;

use super::{COMMIT_HEADER_BYTES, CommitHeader, HASH_AT, SECTOR, SegmentIdentity};
use crate::bytes::{array, is_zero, wide};
use crate::error::Damage;
use crate::frame::{DamagedSlot, FRAME_HEADER_BYTES, Frame, FrameHeader, FrameIdentity, FrameView};
use frame::record_at;

/// So many equal bytes of a 32-byte hash prove that the rest of the hash is what is damaged.
const QUORUM: usize = 16;
/// How far back the mark of a lost commit header is guessed.
const MARK_GUESSES: u64 = 256;

/// A record that is whole, in a frame that is not.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SalvagedRecord {
    /// Where it lies within the frame's bytes.
    pub range: Range<usize>,
    /// Index of its first slot in the segment.
    pub first_slot: u32,
}

/// What became of one frame.
#[derive(Clone, Debug)]
pub enum Piece {
    /// The frame is proven by its hash.
    Whole {
        /// Byte offset in the segment.
        offset: u64,
        /// Index of its first slot in the segment.
        first_slot: u32,
        /// The frame.
        frame: Frame,
        /// Slots whose bytes on the medium are bad.
        damaged: Vec<DamagedSlot>,
    },
    /// Some records are whole.
    Part {
        /// Byte offset in the segment.
        offset: u64,
        /// Index of its first slot in the segment.
        first_slot: u32,
        /// Whose records.
        identity: FrameIdentity,
        /// The frame's bytes.
        bytes: Vec<u8>,
        /// The whole records.
        intact: Vec<SalvagedRecord>,
        /// LSNs of those that are not.
        lost: Vec<Lsn>,
        /// Bad slots of whole records; numbered within the frame.
        damaged: Vec<DamagedSlot>,
    },
}

/// A range between whole commits, all of which is proven to have been durable.
#[derive(Debug)]
pub(crate) struct Region<'a> {
    /// The bytes of the segment.
    pub(crate) bytes: &'a [u8],
    /// Where the range begins.
    pub(crate) from: usize,
    /// Where it ends.
    pub(crate) to: usize,
    pub(crate) identity: SegmentIdentity,
    pub(crate) segment_first: u64,
    /// First and last sequence that are missing.
    pub(crate) first_sequence: u64,
    pub(crate) last_sequence: u64,
    /// Index of the first slot; `None` when not even that is known.
    pub(crate) first_slot: Option<u32>,
    /// Index of the first slot behind the range, when a whole commit follows.
    pub(crate) next_slot: Option<u32>,
    /// Identities seen in whole frames.
    pub(crate) identities: &'a HashSet<FrameIdentity>,
}

/// One commit of a region.
#[derive(Debug)]
pub(crate) struct SalvagedCommit {
    pub(crate) sequence: u64,
    pub(crate) offset: u64,
    pub(crate) end: u64,
    /// Index of the first slot behind it.
    pub(crate) next_slot: Option<u32>,
    pub(crate) pieces: Vec<Piece>,
    /// Nothing is missing but what the pieces name.
    pub(crate) is_complete: bool,
}

/// Salvages a region: commits in order. Sequences that do not occur are lost.
pub(crate) fn salvage(region: &Region<'_>) -> Vec<SalvagedCommit> {
    let mut commits = Vec::new();
    let mut at = region.from;
    let mut sequence = region.first_sequence;
    let mut slot = region.first_slot;
    while at < region.to && sequence <= region.last_sequence {
        let header = region.header_at(at, sequence);
        let mut commit = region.commit(at, sequence, slot, None);
        if let Some(header) = header.filter(|_| !commit.is_complete) {
            // Behind lost commits only the header knows where it stands.
            let is_next = slot.is_some();
            let of = if is_next { sequence } else { header.sequence };
            let from = slot.or(Some(header.first_slot));
            let other = region.commit(at, of, from, Some(&header));
            if other.is_complete || other.pieces.len() > commit.pieces.len() {
                commit = other;
            }
        }
        sequence = commit.sequence;
        at = usize::try_from(commit.end).map_or(region.to, |end| end.max(at + SECTOR));
        if commit.is_complete || !commit.pieces.is_empty() {
            sequence += 1;
            slot = commit.next_slot;
            commits.push(commit);
        } else {
            slot = None;
        }
    }
    commits
}

impl Region<'_> {
    /// A commit header that reads well and may be what it says.
    fn header_at(&self, at: usize, sequence: u64) -> Option<CommitHeader> {
        let (header, _) = CommitHeader::decode(&self.bytes[at..]).ok()?;
        let end = header.offset.checked_add(header.length)?;
        let is_likely = header.identity == self.identity
            && header.offset == wide(at)
            && end <= wide(self.to)
            && (sequence..=self.last_sequence).contains(&header.sequence)
            && header.segment_first == self.segment_first;
        is_likely.then_some(header)
    }

    fn commit(
        &self,
        at: usize,
        sequence: u64,
        first_slot: Option<u32>,
        header: Option<&CommitHeader>,
    ) -> SalvagedCommit {
        let limit = header
            .and_then(|header| usize::try_from(header.offset + header.length).ok())
            .unwrap_or(self.to);
        let spans = spans(self.bytes, at + COMMIT_HEADER_BYTES, limit);
        let frames_end = spans.last().map_or(at + SECTOR, |span| span.end);
        let end = match header {
            Some(_) => limit,
            None => frames_end.next_multiple_of(SECTOR).min(self.to),
        };
        let is_last = sequence == self.last_sequence && end == self.to;
        let said = header.and_then(|header| header.first_slot.checked_add(header.slot_count));
        let end_slot = self.next_slot.filter(|_| is_last).or(said);
        let mut pieces = Vec::new();
        let mut slot = first_slot;
        let mut is_complete = true;
        for (place, span) in spans.iter().enumerate() {
            let first = slot.or_else(|| slot_before(self.bytes, &spans[place..], end_slot?));
            let piece = first.and_then(|first| {
                frame::salvage_frame(self.bytes, span.clone(), first, self.identities)
            });
            let Some((piece, slots)) = piece else {
                // The rest may be padding that is not zero any more.
                let is_last = place + 1 == spans.len();
                if is_last && self.is_proven(at, end, sequence, first_slot, header, &pieces) {
                    break;
                }
                // Frames behind it can only be numbered from the end.
                is_complete = false;
                slot = None;
                continue;
            };
            slot = first.and_then(|first| first.checked_add(slots?));
            pieces.push(piece);
        }
        let is_only = self.first_sequence == self.last_sequence && is_last;
        let fits_next = is_only && slot.is_some() && slot == self.next_slot;
        is_complete &= fits_next || self.is_proven(at, end, sequence, first_slot, header, &pieces);
        SalvagedCommit {
            sequence,
            offset: wide(at),
            end: wide(end),
            next_slot: slot,
            pieces,
            is_complete,
        }
    }

    /// Says whether the commit's hash fits its frames, with the header as it is read or as it
    /// must have been.
    fn is_proven(
        &self,
        at: usize,
        end: usize,
        sequence: u64,
        first_slot: Option<u32>,
        header: Option<&CommitHeader>,
        pieces: &[Piece],
    ) -> bool {
        let hashes: Option<Vec<[u8; 32]>> = pieces.iter().map(Piece::frame_hash).collect();
        let (Some(hashes), Some(stored)) = (hashes, array::<32>(self.bytes, at + HASH_AT)) else {
            return false;
        };
        let proves = |header: &CommitHeader| agrees(&header.compute_hash(hashes.iter()), &stored);
        if header.is_some_and(proves) {
            return true;
        }
        let slots: u32 = pieces.iter().map(Piece::slot_count).sum();
        let (Some(first_slot), Ok(frame_count)) = (first_slot, u32::try_from(pieces.len())) else {
            return false;
        };
        let below = (sequence.saturating_sub(MARK_GUESSES)..sequence).rev();
        let read = crate::bytes::get_u64(self.bytes, at + 64);
        below.chain(read).any(|durable_through| {
            proves(&CommitHeader {
                identity: self.identity,
                sequence,
                offset: wide(at),
                length: wide(end - at),
                durable_through,
                frame_count,
                first_slot,
                slot_count: slots,
                segment_first: self.segment_first,
            })
        })
    }
}

impl Piece {
    /// The hash that the commit's hash covers; unknown when it may itself be damaged.
    fn frame_hash(&self) -> Option<[u8; 32]> {
        match self {
            Self::Whole { frame, .. } => Some(frame.header.hash),
            Self::Part { bytes, .. } => FrameHeader::decode(bytes).ok().map(|header| header.hash),
        }
    }

    fn slot_count(&self) -> u32 {
        match self {
            Self::Whole { frame, .. } => frame.header.slot_count,
            Self::Part { bytes, .. } => {
                FrameHeader::decode(bytes).map_or(0, |header| header.slot_count)
            }
        }
    }
}

/// Says whether a stored hash is the right one, but for bytes that were damaged in it.
fn agrees(right: &[u8; 32], stored: &[u8; 32]) -> bool {
    right.iter().zip(stored).filter(|(a, b)| a == b).count() >= QUORUM
}

/// Says whether a frame can end at `at`: another follows, or padding up to the sector.
fn lands(bytes: &[u8], at: usize, limit: usize) -> bool {
    if at == limit {
        return true;
    }
    if at > limit {
        return false;
    }
    let sector = at.next_multiple_of(SECTOR).min(limit);
    let is_padding = sector > at && is_zero(bytes, at, sector);
    let is_commit = at.is_multiple_of(SECTOR) && CommitHeader::decode(&bytes[at..]).is_ok();
    is_padding || is_commit || begins_frame(bytes, at, limit)
}

fn begins_frame(bytes: &[u8], at: usize, limit: usize) -> bool {
    let Some(rest) = bytes.get(at..limit) else {
        return false;
    };
    FrameHeader::decode(rest).is_ok()
        || (FrameHeader::is_likely(rest) && record_at(rest, FRAME_HEADER_BYTES).is_some())
}

/// The number of the first slot of the first of some frames, when all their headers are whole and
/// the last is followed by slot `end`.
fn slot_before(bytes: &[u8], spans: &[Range<usize>], end: u32) -> Option<u32> {
    spans.iter().try_fold(end, |slot, span| {
        let header = FrameHeader::decode(&bytes[span.clone()]).ok()?;
        slot.checked_sub(header.slot_count)
    })
}

/// Where the frame at `at` ends, as far as its own bytes tell.
fn frame_end(bytes: &[u8], at: usize, limit: usize) -> Option<usize> {
    let rest = bytes.get(at..limit)?;
    let header = FrameHeader::decode(rest).ok();
    if let Ok(view) = FrameView::parse(rest)
        && view.verify_skeleton().is_ok()
    {
        return Some(at + view.bytes.len());
    }
    let said = header.and_then(|header| at.checked_add(header.frame_len()));
    if let Some(said) = said.filter(|said| lands(bytes, *said, limit)) {
        return Some(said);
    }
    let mut walked = FRAME_HEADER_BYTES;
    while let Some(record) = record_at(rest, walked) {
        walked = record.range.end;
    }
    let is_end = walked > FRAME_HEADER_BYTES && lands(bytes, at + walked, limit);
    is_end.then_some(at + walked)
}

/// Where the frames that begin at `at` end, as far as they can be followed.
pub(super) fn frames_end(bytes: &[u8], mut at: usize, limit: usize) -> usize {
    while at < limit && begins_frame(bytes, at, limit) {
        let Some(end) = frame_end(bytes, at, limit) else {
            break;
        };
        at = end;
    }
    at.min(limit)
}

/// The frames between `at` and `limit`, damaged ones too.
fn spans(bytes: &[u8], mut at: usize, limit: usize) -> Vec<Range<usize>> {
    let mut spans = Vec::new();
    let is_end = |at: usize| {
        let sector = at.next_multiple_of(SECTOR).min(limit);
        // What is not padding up to the sector may be a frame that begins right on it.
        is_zero(bytes, at, sector) && !begins_frame(bytes, at, limit)
    };
    while at < limit && !is_end(at) {
        let end = frame_end(bytes, at, limit).unwrap_or_else(|| search_end(bytes, at, limit));
        spans.push(at..end);
        at = end;
    }
    spans
}

/// Looks for what can follow the damaged frame at `at`.
fn search_end(bytes: &[u8], at: usize, limit: usize) -> usize {
    let follows = |place: usize| {
        let rest = &bytes[place..limit];
        FrameHeader::decode(rest).is_ok()
            || (place.is_multiple_of(SECTOR) && CommitHeader::decode(rest).is_ok())
    };
    let from = (at + FRAME_HEADER_BYTES).min(limit);
    if let Some(found) = (from..limit).step_by(8).find(|place| follows(*place)) {
        let zeroes = bytes[from..found]
            .iter()
            .rev()
            .take_while(|byte| **byte == 0);
        let is_commit =
            found.is_multiple_of(SECTOR) && FrameHeader::decode(&bytes[found..]).is_err();
        let back = if is_commit { zeroes.count() / 8 * 8 } else { 0 };
        return (found - back).max(from);
    }
    let zeroes = bytes[from..limit]
        .iter()
        .rev()
        .take_while(|byte| **byte == 0);
    (limit - zeroes.count() / 8 * 8).max(from)
}

/// What a region's damage is called when nothing better is known.
pub(crate) fn damage_of_commit() -> Damage {
    Damage::Short {
        structure: "commit",
    }
}
