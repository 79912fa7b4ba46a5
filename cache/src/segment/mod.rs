//! Log segments: files of commits, written once, in order.
//!
//! ```text
//! | header 4096 | commit | commit | ... | directory | footer 4096 |
//! commit = | commit header 128 | frame | frame | ... | zeroes to 4096 |
//! ```
//!
//! Invariants
//! * Every commit names its store, segment, generation and sequence, so that a stale commit of a
//!   recycled file never passes for a live one, and repeats where its segment began, so that the
//!   segment's header is not needed to read it, nor to tell which earlier commits are void.
//! * A commit says up to which sequence its predecessors were durable when it was built. Damage at
//!   or below the highest such mark is corruption; beyond it, it is the tail of a crash.
//! * Slot numbers are given by the commit header, so a lost commit does not renumber later ones.

mod directory;
mod salvage;
mod scan;
#[cfg(test)]
mod tests;

pub use directory::{Directory, FOOTER_BYTES, Footer, rebuild_directory};
pub use salvage::{Piece, SalvagedRecord};
pub(crate) use salvage::{Region, damage_of_commit, salvage};
pub use scan::{FoundCommit, ScanEnd, SegmentScan};

use afterimage_blockdev::{FileName, IoBuffer, SegmentId, StoreId, Timestamp};

use crate::bytes::{array, get_u16, get_u32, get_u64, is_zero, put};
use crate::error::Damage;
use crate::frame::{DamagedSlot, Frame, FrameView};

/// Alignment of every commit, and bytes of the segment's header.
pub const SECTOR: usize = 4096;
/// Bytes of a commit's header.
pub const COMMIT_HEADER_BYTES: usize = 128;
/// Version that this program writes.
pub const SEGMENT_VERSION: u16 = 1;

const SEGMENT_MAGIC: &[u8; 8] = b"AILOGSEG";
const COMMIT_MAGIC: &[u8; 8] = b"AICOMMIT";
const HASH_AT: usize = 96;

const _: () = assert!(HASH_AT + 32 == COMMIT_HEADER_BYTES && COMMIT_HEADER_BYTES.is_multiple_of(8));
const _: () = assert!(SECTOR.is_multiple_of(4096) && SECTOR > COMMIT_HEADER_BYTES);

/// Sequences begin with 1, and no log comes to this one: below it there is room to count on.
const SEQUENCE_MAX: u64 = 1 << 62;

/// Says whether a commit can have this sequence.
fn is_sequence(sequence: u64) -> bool {
    (1..SEQUENCE_MAX).contains(&sequence)
}

/// Which file a commit belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentIdentity {
    /// The store or spool.
    pub store: StoreId,
    /// The segment.
    pub segment: SegmentId,
    /// Rises each time the file is used again.
    pub generation: u64,
}

/// First bytes of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentHeader {
    /// Which file.
    pub identity: SegmentIdentity,
    /// Sequence of its first commit. Commits of earlier segments at or above it are void.
    pub first_sequence: u64,
    /// When it was begun.
    pub time: Timestamp,
}

impl SegmentHeader {
    /// Writes the header as one sector.
    #[must_use]
    pub fn encode(&self) -> IoBuffer {
        let mut bytes = IoBuffer::zeroed(SECTOR);
        put(&mut bytes, 0, SEGMENT_MAGIC);
        put(&mut bytes, 8, &SEGMENT_VERSION.to_le_bytes());
        put(&mut bytes, 16, &self.identity.store.0);
        put(&mut bytes, 32, &self.identity.segment.0.to_le_bytes());
        put(&mut bytes, 40, &self.identity.generation.to_le_bytes());
        put(&mut bytes, 48, &self.first_sequence.to_le_bytes());
        put(&mut bytes, 56, &self.time.0.to_le_bytes());
        let hash = blake3::hash(&bytes[..HASH_AT]);
        put(&mut bytes, HASH_AT, hash.as_bytes());
        bytes
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`Damage`].
    pub fn decode(bytes: &[u8]) -> Result<Self, Damage> {
        const NAME: &str = "log segment header";
        let short = || Damage::Short { structure: NAME };
        let bytes = bytes.get(..SECTOR).ok_or_else(short)?;
        if bytes[..8] != SEGMENT_MAGIC[..] {
            return Err(Damage::Magic { structure: NAME });
        }
        // The hash comes first: a damaged version is damage, not a newer program's work.
        let hash: [u8; 32] = array(bytes, HASH_AT).ok_or_else(short)?;
        if *blake3::hash(&bytes[..HASH_AT]).as_bytes() != hash {
            return Err(Damage::Hash { structure: NAME });
        }
        let version = get_u16(bytes, 8).ok_or_else(short)?;
        if version > SEGMENT_VERSION {
            let supported = SEGMENT_VERSION;
            return Err(Damage::Version {
                structure: NAME,
                found: version,
                supported,
            });
        }
        if !is_zero(bytes, HASH_AT + 32, SECTOR) {
            return Err(Damage::Field {
                structure: NAME,
                field: "reserved bytes",
            });
        }
        let first_sequence = get_u64(bytes, 48).ok_or_else(short)?;
        if !is_sequence(first_sequence) {
            return Err(Damage::Field {
                structure: NAME,
                field: "first sequence",
            });
        }
        Ok(Self {
            identity: SegmentIdentity {
                store: StoreId(array(bytes, 16).ok_or_else(short)?),
                segment: SegmentId(get_u32(bytes, 32).ok_or_else(short)?),
                generation: get_u64(bytes, 40).ok_or_else(short)?,
            },
            first_sequence,
            time: Timestamp(get_u64(bytes, 56).ok_or_else(short)?),
        })
    }
}

/// First bytes of a commit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CommitHeader {
    /// Which file.
    pub identity: SegmentIdentity,
    /// Place in the log; rises by one.
    pub sequence: u64,
    /// Byte offset in the segment, so that a misdirected write is seen.
    pub offset: u64,
    /// Bytes, header and padding included; a multiple of 4096.
    pub length: u64,
    /// Every commit up to this sequence was durable when this one was built.
    pub durable_through: u64,
    /// Number of frames; 0 for an idle commit.
    pub frame_count: u32,
    /// Index of the first slot.
    pub first_slot: u32,
    /// Number of slots.
    pub slot_count: u32,
    /// Sequence of the segment's first commit, as in [`SegmentHeader::first_sequence`].
    pub segment_first: u64,
}

impl CommitHeader {
    fn encode_without_hash(&self) -> [u8; HASH_AT] {
        let mut bytes = [0; HASH_AT];
        put(&mut bytes, 0, COMMIT_MAGIC);
        put(&mut bytes, 8, &self.identity.store.0);
        put(&mut bytes, 24, &self.identity.segment.0.to_le_bytes());
        put(&mut bytes, 28, &self.frame_count.to_le_bytes());
        put(&mut bytes, 32, &self.identity.generation.to_le_bytes());
        put(&mut bytes, 40, &self.sequence.to_le_bytes());
        put(&mut bytes, 48, &self.offset.to_le_bytes());
        put(&mut bytes, 56, &self.length.to_le_bytes());
        put(&mut bytes, 64, &self.durable_through.to_le_bytes());
        put(&mut bytes, 72, &self.first_slot.to_le_bytes());
        put(&mut bytes, 76, &self.slot_count.to_le_bytes());
        put(&mut bytes, 80, &self.segment_first.to_le_bytes());
        put(&mut bytes, 88, &SEGMENT_VERSION.to_le_bytes());
        bytes
    }

    /// The hash of a commit with these fields and the hashes of its frames.
    fn compute_hash<'a>(&self, frames: impl Iterator<Item = &'a [u8; 32]>) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.encode_without_hash());
        for hash in frames {
            hasher.update(hash);
        }
        *hasher.finalize().as_bytes()
    }

    fn decode(bytes: &[u8]) -> Result<(Self, [u8; 32]), Damage> {
        const NAME: &str = "commit";
        let short = || Damage::Short { structure: NAME };
        let bytes = bytes.get(..COMMIT_HEADER_BYTES).ok_or_else(short)?;
        if bytes[..8] != COMMIT_MAGIC[..] {
            return Err(Damage::Magic { structure: NAME });
        }
        let u64_at = |at| get_u64(bytes, at).ok_or_else(short);
        let u32_at = |at| get_u32(bytes, at).ok_or_else(short);
        let header = Self {
            identity: SegmentIdentity {
                store: StoreId(array(bytes, 8).ok_or_else(short)?),
                segment: SegmentId(u32_at(24)?),
                generation: u64_at(32)?,
            },
            frame_count: u32_at(28)?,
            sequence: u64_at(40)?,
            offset: u64_at(48)?,
            length: u64_at(56)?,
            durable_through: u64_at(64)?,
            first_slot: u32_at(72)?,
            slot_count: u32_at(76)?,
            segment_first: u64_at(80)?,
        };
        let is_legal = header.length >= SECTOR as u64
            && header.length.is_multiple_of(SECTOR as u64)
            && header.durable_through < header.sequence
            && header.segment_first <= header.sequence
            && is_sequence(header.segment_first)
            && is_sequence(header.sequence)
            // A reader counts slots from the first one on, and one further.
            && header
                .first_slot
                .checked_add(header.slot_count)
                .is_some_and(|end| end < u32::MAX)
            && get_u16(bytes, 88) == Some(SEGMENT_VERSION)
            && is_zero(bytes, 90, HASH_AT);
        if !is_legal {
            return Err(Damage::Field {
                structure: NAME,
                field: "length, sequence or slot",
            });
        }
        Ok((header, array(bytes, HASH_AT).ok_or_else(short)?))
    }
}

/// Lays a commit out in `buffer`, which is cleared first. Returns the byte offset of each frame
/// within the commit.
pub fn build_commit<'a>(
    header: &mut CommitHeader,
    frames: impl Iterator<Item = &'a Frame>,
    buffer: &mut IoBuffer,
) -> Vec<u64> {
    buffer.set_len(0);
    buffer.extend_from_slice(&[0; COMMIT_HEADER_BYTES]);
    let mut hashes = Vec::new();
    let mut offsets = Vec::new();
    header.frame_count = 0;
    header.slot_count = 0;
    for frame in frames {
        offsets.push(buffer.len() as u64);
        buffer.extend_from_slice(&frame.bytes);
        hashes.push(frame.header.hash);
        header.frame_count += 1;
        header.slot_count += frame.header.slot_count;
    }
    buffer.pad_to(SECTOR);
    header.length = buffer.len() as u64;
    put(buffer, 0, &header.encode_without_hash());
    put(buffer, HASH_AT, &header.compute_hash(hashes.iter()));
    offsets
}

/// A commit in somebody's buffer: headers, notes and order are whole; slots may not be.
#[derive(Clone, Debug)]
pub struct CommitView<'a> {
    /// The header.
    pub header: CommitHeader,
    /// The frames and the offset of each within the commit.
    pub frames: Vec<(u64, FrameView<'a>)>,
    /// Slots whose content is bad: the place of the frame, and the slot.
    pub damaged: Vec<(usize, DamagedSlot)>,
}

impl<'a> CommitView<'a> {
    /// Takes the commit that `bytes` begin with: `bytes` are those of the segment from `offset` on.
    ///
    /// # Errors
    /// [`Damage`] when anything of it is not as it was written.
    pub fn accept(bytes: &'a [u8], offset: u64) -> Result<Self, Damage> {
        let commit = Self::accept_skeleton(bytes, offset)?;
        match commit.damaged.into_iter().next() {
            Some((_, slot)) => Err(slot.damage),
            None => Ok(Self {
                damaged: Vec::new(),
                ..commit
            }),
        }
    }

    /// As [`CommitView::accept`], but slots may be damaged.
    ///
    /// # Errors
    /// [`Damage`] when anything but a slot's content is not as it was written.
    pub fn accept_skeleton(bytes: &'a [u8], offset: u64) -> Result<Self, Damage> {
        const NAME: &str = "commit";
        let (header, hash) = CommitHeader::decode(bytes)?;
        let wrong = |field| Damage::Field {
            structure: NAME,
            field,
        };
        if header.offset != offset {
            return Err(wrong("offset"));
        }
        let length = usize::try_from(header.length).map_err(|_| wrong("length"))?;
        let bytes = bytes
            .get(..length)
            .ok_or(Damage::Short { structure: NAME })?;
        let mut at = COMMIT_HEADER_BYTES;
        let mut frames = Vec::new();
        let mut slots = 0u32;
        for _ in 0..header.frame_count {
            let frame = FrameView::parse(bytes.get(at..).unwrap_or(&[]))?;
            slots = slots
                .checked_add(frame.header.slot_count)
                .ok_or(wrong("slot count"))?;
            frames.push((at as u64, frame));
            at += frame.bytes.len();
        }
        let hashes = frames.iter().map(|(_, frame)| &frame.header.hash);
        if header.compute_hash(hashes) != hash {
            return Err(Damage::Hash { structure: NAME });
        }
        if slots != header.slot_count {
            return Err(wrong("slot count"));
        }
        if !is_zero(bytes, at, length) {
            return Err(wrong("padding"));
        }
        let mut damaged = Vec::new();
        for (place, (_, frame)) in frames.iter().enumerate() {
            let slots = frame.verify_skeleton()?;
            damaged.extend(slots.into_iter().map(|slot| (place, slot)));
        }
        Ok(Self {
            header,
            frames,
            damaged,
        })
    }
}

/// Name of a segment's file below `directory`.
#[must_use]
pub fn segment_file(directory: &str, segment: SegmentId) -> FileName {
    FileName::new(format!("{directory}/{:010}.log", segment.0))
}

/// The segment that a file name means, if any.
#[must_use]
pub fn parse_segment_file(name: &FileName) -> Option<SegmentId> {
    let digits = name.base().strip_suffix(".log")?;
    (digits.len() == 10).then(|| digits.parse().ok().map(SegmentId))?
}
