//! Frames: records of one machine and history, sealed together. The same bytes travel on the
//! wire, lie in the spool and in the log, and are relayed.
//!
//! Invariants
//! * LSNs of non-bulk records in a frame are consecutive, from `first` to `last`; a frame that
//!   holds an epoch start may begin above a gap. A bulk frame holds only bulk records and its
//!   LSNs never fall.
//! * The frame's hash covers its header, all record headers, all notes and all slot hashes, and
//!   each slot hash covers the slot: so it vouches for every byte but the padding, which is zero.

mod builder;
mod check;
#[cfg(test)]
mod tests;

pub use builder::FrameBuilder;
pub use check::DamagedSlot;

use core::ops::Range;

use afterimage_blockdev::{AgentId, Epoch, HistoryId, Lsn, MachineId};

use crate::bytes::{array, get_u16, get_u32, get_u64, index, put};
use crate::error::Damage;
use crate::record::{LSN_MAX, RECORD_HEADER_BYTES, RecordView};

/// Bytes of a frame's header.
pub const FRAME_HEADER_BYTES: usize = 160;
/// Longest frame, header included.
pub const FRAME_BYTES_MAX: usize = 16 << 20;
/// Version that this program writes.
pub const FRAME_VERSION: u16 = 1;

const NAME: &str = "frame";
const MAGIC: &[u8; 8] = b"AIFRAME\0";
const FLAG_BULK: u16 = 1;
const HASH_AT: usize = 128;
/// Where the hash stands in the header.
pub(crate) const FRAME_HASH_AT: usize = HASH_AT;

const _: () = assert!(HASH_AT + 32 == FRAME_HEADER_BYTES && FRAME_HEADER_BYTES.is_multiple_of(8));

/// Whose records a frame holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct FrameIdentity {
    /// The machine.
    pub machine: MachineId,
    /// The history.
    pub history: HistoryId,
    /// Who made the records. Who carries the frame is the protocol's matter.
    pub origin: AgentId,
    /// The epoch of the writer.
    pub epoch: Epoch,
}

/// The fixed part of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameHeader {
    /// Whose records.
    pub identity: FrameIdentity,
    /// LSN of the first record.
    pub first: Lsn,
    /// LSN of the last record.
    pub last: Lsn,
    /// Holds bulk records only.
    pub is_bulk: bool,
    /// Number of records.
    pub record_count: u32,
    /// Number of slots of all records.
    pub slot_count: u32,
    /// Bytes after the header; a multiple of 8.
    pub body_len: u32,
    /// Vouches for the whole frame.
    pub hash: [u8; 32],
}

impl FrameHeader {
    /// Bytes of the whole frame.
    #[must_use]
    pub fn frame_len(&self) -> usize {
        FRAME_HEADER_BYTES + index(self.body_len)
    }

    /// Says whether damaged bytes were a header, by most of its magic.
    pub(crate) fn is_likely(bytes: &[u8]) -> bool {
        MAGIC.iter().zip(bytes).filter(|(a, b)| a == b).count() > MAGIC.len() / 2
    }

    /// The identity that a header says, whatever else is wrong with it.
    pub(crate) fn identity_at(bytes: &[u8]) -> Option<FrameIdentity> {
        Some(FrameIdentity {
            machine: MachineId(array(bytes, 16)?),
            history: HistoryId(array(bytes, 32)?),
            origin: AgentId(array(bytes, 48)?),
            epoch: Epoch(get_u64(bytes, 64)?),
        })
    }

    /// The hash of a frame with this header, given what [`FrameView::hashed_records`] gives.
    pub(crate) fn hash_with(&self, records: &[u8]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.encode_without_hash());
        hasher.update(records);
        *hasher.finalize().as_bytes()
    }

    /// Writes the header.
    #[must_use]
    pub(crate) fn encode(&self) -> [u8; FRAME_HEADER_BYTES] {
        let mut bytes = [0; FRAME_HEADER_BYTES];
        put(&mut bytes, 0, &self.encode_without_hash());
        put(&mut bytes, HASH_AT, &self.hash);
        bytes
    }

    fn encode_without_hash(&self) -> [u8; HASH_AT] {
        let mut bytes = [0; HASH_AT];
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, 8, &FRAME_VERSION.to_le_bytes());
        let flags = if self.is_bulk { FLAG_BULK } else { 0 };
        put(&mut bytes, 10, &flags.to_le_bytes());
        put(&mut bytes, 12, &self.body_len.to_le_bytes());
        put(&mut bytes, 16, &self.identity.machine.0);
        put(&mut bytes, 32, &self.identity.history.0);
        put(&mut bytes, 48, &self.identity.origin.0);
        put(&mut bytes, 64, &self.identity.epoch.0.to_le_bytes());
        put(&mut bytes, 72, &self.first.0.to_le_bytes());
        put(&mut bytes, 80, &self.last.0.to_le_bytes());
        put(&mut bytes, 88, &self.record_count.to_le_bytes());
        put(&mut bytes, 92, &self.slot_count.to_le_bytes());
        bytes
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`Damage`], naming the field.
    pub fn decode(bytes: &[u8]) -> Result<Self, Damage> {
        let short = || Damage::Short { structure: NAME };
        let field = |field| Damage::Field {
            structure: NAME,
            field,
        };
        let bytes = bytes.get(..FRAME_HEADER_BYTES).ok_or_else(short)?;
        if bytes[..8] != MAGIC[..] {
            return Err(Damage::Magic { structure: NAME });
        }
        let version = get_u16(bytes, 8).ok_or_else(short)?;
        if version != FRAME_VERSION {
            return Err(Damage::Version {
                structure: NAME,
                found: version,
                supported: FRAME_VERSION,
            });
        }
        let flags = get_u16(bytes, 10).ok_or_else(short)?;
        if flags & !FLAG_BULK != 0 || !crate::bytes::is_zero(bytes, 96, HASH_AT) {
            return Err(field("reserved bytes"));
        }
        let header = Self {
            identity: Self::identity_at(bytes).ok_or_else(short)?,
            first: Lsn(get_u64(bytes, 72).ok_or_else(short)?),
            last: Lsn(get_u64(bytes, 80).ok_or_else(short)?),
            is_bulk: flags & FLAG_BULK != 0,
            record_count: get_u32(bytes, 88).ok_or_else(short)?,
            slot_count: get_u32(bytes, 92).ok_or_else(short)?,
            body_len: get_u32(bytes, 12).ok_or_else(short)?,
            hash: array(bytes, HASH_AT).ok_or_else(short)?,
        };
        if header.frame_len() > FRAME_BYTES_MAX || !header.body_len.is_multiple_of(8) {
            return Err(field("length"));
        }
        let is_legal = header.first <= header.last && header.last < LSN_MAX;
        if header.record_count == 0 || !is_legal {
            return Err(field("LSN range"));
        }
        Ok(header)
    }
}

/// A sealed frame that somebody owns.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Its header, already read.
    pub header: FrameHeader,
    /// All its bytes.
    pub bytes: Vec<u8>,
}

impl Frame {
    /// Takes bytes from a peer or a disk: checks structure and every hash.
    ///
    /// # Errors
    /// [`Damage`].
    pub fn accept(bytes: Vec<u8>) -> Result<Self, Damage> {
        let header = {
            let view = FrameView::parse(&bytes)?;
            view.verify()?;
            if view.bytes.len() != bytes.len() {
                return Err(Damage::Field {
                    structure: NAME,
                    field: "length",
                });
            }
            view.header
        };
        Ok(Self { header, bytes })
    }

    /// Looks into the frame.
    ///
    /// # Panics
    /// Never: the structure was checked when the frame was made.
    #[must_use]
    pub fn view(&self) -> FrameView<'_> {
        FrameView {
            header: self.header,
            bytes: &self.bytes,
        }
    }
}

/// A frame in somebody's buffer.
#[derive(Clone, Copy, Debug)]
pub struct FrameView<'a> {
    /// The header.
    pub header: FrameHeader,
    /// All bytes of the frame.
    pub bytes: &'a [u8],
}

impl<'a> FrameView<'a> {
    /// Finds the frame that `bytes` begin with and checks the structure of all records and slots:
    /// lengths, order, counts. Contents are checked by [`FrameView::verify`].
    ///
    /// # Errors
    /// [`Damage`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Damage> {
        let header = FrameHeader::decode(bytes)?;
        let bytes = bytes
            .get(..header.frame_len())
            .ok_or(Damage::Short { structure: NAME })?;
        Ok(Self { header, bytes })
    }

    /// Walks the records: the byte range of each within the frame, and itself.
    ///
    /// # Errors
    /// Each item can be [`Damage`]; the walk ends there.
    pub fn records(
        &self,
    ) -> impl Iterator<Item = Result<(Range<usize>, RecordView<'a>), Damage>> + use<'a> {
        let bytes = self.bytes;
        let mut at = FRAME_HEADER_BYTES;
        core::iter::from_fn(move || {
            if at >= bytes.len() {
                return None;
            }
            match RecordView::parse(&bytes[at..]) {
                Ok((record, len)) if at + len <= bytes.len() => {
                    let range = at..at + len;
                    at += len;
                    Some(Ok((range, record)))
                }
                Ok(_) => {
                    at = bytes.len();
                    Some(Err(Damage::Short { structure: NAME }))
                }
                Err(damage) => {
                    at = bytes.len();
                    Some(Err(damage))
                }
            }
        })
    }

    /// Byte offset within the frame of each slot, in order. In a frame with damaged slots, 0 stands
    /// for one that cannot be found, so that the others keep their numbers.
    pub fn slot_offsets(&self) -> impl Iterator<Item = usize> + use<'a> {
        let history = self.header.identity.history;
        self.records()
            .map_while(Result::ok)
            .flat_map(move |(range, record)| {
                let body = range.start + RECORD_HEADER_BYTES;
                record
                    .slots(history)
                    .map_while(Result::ok)
                    .map(move |(at, _, _)| body + at)
                    .chain(core::iter::repeat(0))
                    .take(usize::from(record.slot_count))
            })
    }
}
