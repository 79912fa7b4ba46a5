//! Frames: records of one machine and history, sealed together. The same bytes travel on the
//! wire, lie in the spool and in the log, and are relayed.
//!
//! Invariants
//! * LSNs of non-bulk records in a frame are consecutive, from `first` to `last`; a frame that
//!   holds an epoch start may begin above a gap. A bulk frame holds only bulk records and its
//!   LSNs never fall.
//! * The frame's hash covers its header, all record headers, all notes and all slot hashes, and
//!   each slot hash covers the slot: so it vouches for every byte but the padding, which is zero.

use core::ops::Range;

use afterimage_blockdev::{AgentId, Epoch, HistoryId, Lsn, MachineId};

use crate::bytes::{array, get_u16, get_u32, get_u64, index, narrow, put, wide};
use crate::error::Damage;
use crate::record::{
    NOTE_BYTES_MAX, RECORD_HEADER_BYTES, RecordBody, RecordHeader, RecordKind, RecordView,
};
use crate::seal::Sealer;
use crate::slot::SlotContext;

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
            identity: FrameIdentity {
                machine: MachineId(array(bytes, 16).ok_or_else(short)?),
                history: HistoryId(array(bytes, 32).ok_or_else(short)?),
                origin: AgentId(array(bytes, 48).ok_or_else(short)?),
                epoch: Epoch(get_u64(bytes, 64).ok_or_else(short)?),
            },
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
        if header.record_count == 0 || header.first > header.last {
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

    /// Byte offset within the frame of each slot, in order. Ends early where the structure is
    /// damaged.
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
            })
    }

    /// Checks everything: record order and counts, every slot's hash, the frame's hash.
    ///
    /// # Errors
    /// [`Damage`].
    pub fn verify(&self) -> Result<(), Damage> {
        let field = |field| Damage::Field {
            structure: NAME,
            field,
        };
        let history = self.header.identity.history;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.header.encode_without_hash());
        let mut order = OrderCheck::new(&self.header);
        for item in self.records() {
            let (_, record) = item?;
            order.next(&record.header)?;
            hasher.update(record.header_bytes);
            if let RecordBody::Note(note) = record.body {
                hasher.update(note);
            }
            for slot in record.slots(history) {
                let (_, context, slot) = slot?;
                slot.verify(&context)?;
                hasher.update(&slot.header.hash);
                order.slots += 1;
            }
        }
        order.finish()?;
        if *hasher.finalize().as_bytes() != self.header.hash {
            return Err(Damage::Hash { structure: NAME });
        }
        if self.header.record_count != order.records {
            return Err(field("record count"));
        }
        Ok(())
    }
}

/// Checks that the records of a frame are in order.
struct OrderCheck {
    header: FrameHeader,
    last: Option<Lsn>,
    records: u32,
    slots: u32,
}

impl OrderCheck {
    fn new(header: &FrameHeader) -> Self {
        Self {
            header: *header,
            last: None,
            records: 0,
            slots: 0,
        }
    }

    fn next(&mut self, record: &RecordHeader) -> Result<(), Damage> {
        let wrong = Damage::Field {
            structure: NAME,
            field: "record order",
        };
        self.records += 1;
        if self.header.is_bulk != (record.kind == RecordKind::Bulk) {
            return Err(wrong);
        }
        let follows = match self.last {
            None => record.lsn == self.header.first,
            Some(last) if self.header.is_bulk => record.lsn >= last,
            Some(last) => record.lsn.0.checked_sub(1) == Some(last.0),
        };
        // An epoch starts a frame, so that the gap before it lies between frames.
        let is_late_start = record.kind == RecordKind::EpochStart && self.last.is_some();
        if !follows || is_late_start {
            return Err(wrong);
        }
        self.last = Some(record.lsn);
        Ok(())
    }

    fn finish(&self) -> Result<(), Damage> {
        let field = |field| Damage::Field {
            structure: NAME,
            field,
        };
        if self.last != Some(self.header.last) {
            return Err(field("last LSN"));
        }
        if self.slots != self.header.slot_count {
            return Err(field("slot count"));
        }
        Ok(())
    }
}

/// Builds a frame record by record.
#[derive(Debug)]
pub struct FrameBuilder {
    identity: FrameIdentity,
    is_bulk: bool,
    bytes: Vec<u8>,
    hasher: blake3::Hasher,
    first: Option<Lsn>,
    last: Lsn,
    record_count: u32,
    slot_count: u32,
    slot_hashes: Vec<[u8; 32]>,
    parts: Vec<(Range<usize>, Range<usize>, Range<usize>)>,
}

impl FrameBuilder {
    /// Begins a frame.
    #[must_use]
    pub fn new(identity: FrameIdentity, is_bulk: bool) -> Self {
        Self {
            identity,
            is_bulk,
            bytes: vec![0; FRAME_HEADER_BYTES],
            hasher: blake3::Hasher::new(),
            first: None,
            last: Lsn::ZERO,
            record_count: 0,
            slot_count: 0,
            slot_hashes: Vec::new(),
            parts: Vec::new(),
        }
    }

    /// Bytes so far, header included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Says whether no record was added yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.record_count == 0
    }

    /// Says whether a record with `plain_len` bytes of data surely fits.
    #[must_use]
    pub fn fits(&self, plain_len: usize) -> bool {
        // A slot adds at most 152 bytes to its plain bytes, per block.
        let worst = plain_len + (plain_len / afterimage_blockdev::BLOCK_BYTES + 2) * 160;
        self.len() + RECORD_HEADER_BYTES + worst + NOTE_BYTES_MAX <= FRAME_BYTES_MAX
    }

    /// Adds a record with data: `plain` holds `record.length` bytes, which `sealer` seals cell by
    /// cell.
    ///
    /// # Panics
    /// When the record's kind has no slots, or the lengths differ.
    pub fn push_data(&mut self, record: &RecordHeader, plain: &[u8], sealer: &mut Sealer) {
        assert!(record.kind.has_slots() && wide(plain.len()) == record.length);
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; RECORD_HEADER_BYTES]);
        let hashes_from = self.slot_hashes.len();
        let mut rest = plain;
        for (cell, mask) in crate::record::cells(record.offset, record.length) {
            let len = mask.count_ones() as usize * afterimage_blockdev::BLOCK_BYTES;
            let (now, later) = rest.split_at(len);
            rest = later;
            let context =
                SlotContext::uniform(record.disk, self.identity.history, cell, mask, record.lsn);
            let slot_at = self.bytes.len();
            sealer.seal(&context, now, &mut self.bytes);
            let hash = array(&self.bytes, slot_at + 40).expect("a slot has a hash");
            self.slot_hashes.push(hash);
        }
        self.finish_record(record, start, hashes_from);
    }

    /// Adds a record without data; `note` is the name of a mark or the disks of a batch.
    ///
    /// # Panics
    /// When the record's kind has slots or the note is too long.
    pub fn push_note(&mut self, record: &RecordHeader, note: &[u8]) {
        assert!(!record.kind.has_slots() && note.len() <= NOTE_BYTES_MAX);
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; RECORD_HEADER_BYTES]);
        self.bytes.extend_from_slice(note);
        let hashes_from = self.slot_hashes.len();
        self.finish_record(record, start, hashes_from);
    }

    fn finish_record(&mut self, record: &RecordHeader, start: usize, hashes_from: usize) {
        let slots = self.slot_hashes.len() - hashes_from;
        let slot_count = u16::try_from(slots).expect("a write has at most 257 slots");
        let body_len = narrow(self.bytes.len() - start - RECORD_HEADER_BYTES);
        let body = start + RECORD_HEADER_BYTES..self.bytes.len();
        let note = if record.kind.has_slots() {
            &[]
        } else {
            &self.bytes[body.clone()]
        };
        let header = record.encode(slot_count, body_len, note);
        put(&mut self.bytes, start, &header);
        self.parts
            .push((start..body.start, body, hashes_from..self.slot_hashes.len()));
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        self.first.get_or_insert(record.lsn);
        self.last = record.lsn;
        self.record_count += 1;
        self.slot_count += u32::from(slot_count);
    }

    /// Seals the frame.
    ///
    /// # Panics
    /// When no record was added.
    #[must_use]
    pub fn finish(mut self) -> Frame {
        let first = self.first.expect("a frame has at least one record");
        let mut header = FrameHeader {
            identity: self.identity,
            first,
            last: self.last,
            is_bulk: self.is_bulk,
            record_count: self.record_count,
            slot_count: self.slot_count,
            body_len: narrow(self.bytes.len() - FRAME_HEADER_BYTES),
            hash: [0; 32],
        };
        let encoded = header.encode_without_hash();
        self.hasher.update(&encoded);
        for (head, body, hashes) in &self.parts {
            self.hasher.update(&self.bytes[head.clone()]);
            if hashes.is_empty() {
                self.hasher.update(&self.bytes[body.clone()]);
            } else {
                self.hasher
                    .update(self.slot_hashes[hashes.clone()].as_flattened());
            }
        }
        header.hash = *self.hasher.finalize().as_bytes();
        put(&mut self.bytes, 0, &encoded);
        put(&mut self.bytes, HASH_AT, &header.hash);
        Frame {
            header,
            bytes: self.bytes,
        }
    }
}
