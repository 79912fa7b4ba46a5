//! Change records: one write, write-zeroes, discard, grow or mark.

#[cfg(test)]
mod tests;

use afterimage_blockdev::{
    BLOCK_BYTES, BatchId, BlockIndex, CELL_BLOCKS, CellIndex, DiskId, HistoryId, Lsn, Timestamp,
};

use crate::bytes::{array, get_u8, get_u16, get_u32, get_u64, index, put, wide};
use crate::error::Damage;
use crate::slot::{SlotContext, SlotView};

/// Bytes of a record's header.
pub const RECORD_HEADER_BYTES: usize = 80;
/// Longest write, in bytes; longer ones are split before they get an LSN.
pub const WRITE_BYTES_MAX: u64 = 4 << 20;
/// Longest body of a record without slots, in bytes.
pub const NOTE_BYTES_MAX: usize = 64 << 10;

/// No disk is longer, in bytes: a map entry has 6 bytes for the number of a cell.
pub const DISK_BYTES_MAX: u64 = 1 << 62;
/// No history comes to this LSN: below it there is room to count on.
pub const LSN_MAX: Lsn = Lsn(1 << 62);

const NAME: &str = "record";
const CHECK_AT: usize = 76;

const _: () = assert!(CHECK_AT + 4 == RECORD_HEADER_BYTES && RECORD_HEADER_BYTES.is_multiple_of(8));

fn header_check(header: &[u8], note: &[u8]) -> [u8; 4] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&header[..CHECK_AT]);
    hasher.update(note);
    array(hasher.finalize().as_bytes(), 0).unwrap_or_default()
}

/// What a record does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum RecordKind {
    /// Writes the blocks of its slots.
    Write,
    /// Makes a range zero.
    WriteZeroes,
    /// Gives a range up; it reads as zero.
    Discard,
    /// Enlarges the disk to `length` bytes.
    Grow,
    /// Names the cut before it; carries no data.
    Mark(MarkKind),
    /// Begins a batch that is a state only when whole.
    BatchBegin(BatchKind),
    /// Ends a batch.
    BatchEnd,
    /// First record of an epoch; LSNs before it, down to `argument` + 1, were never used.
    EpochStart,
    /// A block of a batch, read from the source: ranks below any write after its LSN.
    Bulk,
    /// A range whose content at the source could not be read back.
    Unknown,
}

/// Why a cut was named.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum MarkKind {
    /// By the timer; what a crash at this instant would leave.
    Crash,
    /// Applications were quiesced.
    Application,
    /// One cut over several machines.
    Group,
    /// By a person.
    Bookmark,
    /// Nothing was written; the state is as new as this mark.
    Heartbeat,
}

/// Why a batch is sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum BatchKind {
    /// The first copy of a disk.
    Initial,
    /// Differences found by comparing.
    Resync,
    /// A cycle of change tracking.
    Cycle,
}

impl RecordKind {
    fn code(self) -> u8 {
        match self {
            Self::Write => 1,
            Self::WriteZeroes => 2,
            Self::Discard => 3,
            Self::Grow => 4,
            Self::BatchEnd => 5,
            Self::EpochStart => 6,
            Self::Bulk => 7,
            Self::Unknown => 8,
            Self::Mark(MarkKind::Crash) => 16,
            Self::Mark(MarkKind::Application) => 17,
            Self::Mark(MarkKind::Group) => 18,
            Self::Mark(MarkKind::Bookmark) => 19,
            Self::Mark(MarkKind::Heartbeat) => 20,
            Self::BatchBegin(BatchKind::Initial) => 32,
            Self::BatchBegin(BatchKind::Resync) => 33,
            Self::BatchBegin(BatchKind::Cycle) => 34,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::Write,
            2 => Self::WriteZeroes,
            3 => Self::Discard,
            4 => Self::Grow,
            5 => Self::BatchEnd,
            6 => Self::EpochStart,
            7 => Self::Bulk,
            8 => Self::Unknown,
            16 => Self::Mark(MarkKind::Crash),
            17 => Self::Mark(MarkKind::Application),
            18 => Self::Mark(MarkKind::Group),
            19 => Self::Mark(MarkKind::Bookmark),
            20 => Self::Mark(MarkKind::Heartbeat),
            32 => Self::BatchBegin(BatchKind::Initial),
            33 => Self::BatchBegin(BatchKind::Resync),
            34 => Self::BatchBegin(BatchKind::Cycle),
            _ => return None,
        })
    }

    /// Says whether slots follow the header.
    #[must_use]
    pub fn has_slots(self) -> bool {
        matches!(self, Self::Write | Self::Bulk)
    }

    /// Says whether the record changes the content of its disk.
    #[must_use]
    pub fn changes_content(self) -> bool {
        matches!(
            self,
            Self::Write | Self::WriteZeroes | Self::Discard | Self::Bulk | Self::Unknown
        )
    }

    /// Says whether the record is about one disk, and so links to its previous record.
    #[must_use]
    pub fn is_of_disk(self) -> bool {
        self.changes_content() || self == Self::Grow
    }
}

/// The fixed part of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RecordHeader {
    /// What it does.
    pub kind: RecordKind,
    /// Its place in the history. A bulk record repeats the highest LSN given out before its read.
    pub lsn: Lsn,
    /// LSN of the previous record of the same disk; zero when there is none. A hole shows here.
    pub previous: Lsn,
    /// When it completed at the source, on the appliance's clock; never falls within a history.
    pub time: Timestamp,
    /// The disk; nil for marks and batch records.
    pub disk: DiskId,
    /// First byte; a multiple of 4096.
    pub offset: u64,
    /// Bytes; a multiple of 4096. The new size for a grow.
    pub length: u64,
    /// The batch that it belongs to; zero when ordered.
    pub batch: BatchId,
    /// By kind: for [`RecordKind::EpochStart`] the last LSN before the gap.
    pub argument: u64,
}

/// What follows a record's header.
#[derive(Clone, Copy, Debug)]
pub enum RecordBody<'a> {
    /// Slots, one after the other.
    Slots(&'a [u8]),
    /// A note: the name of a mark, or the disks of a batch (16 bytes each).
    Note(&'a [u8]),
}

impl RecordHeader {
    /// Blocks that the record covers.
    #[must_use]
    pub fn block_count(&self) -> u64 {
        self.length / wide(BLOCK_BYTES)
    }

    /// Writes the header; `slot_count` and `body_len` describe what follows. The header carries a
    /// check of its own, over itself and the note, so that in a damaged frame each record can
    /// still be told good or bad.
    #[must_use]
    pub fn encode(&self, slot_count: u16, body_len: u32, note: &[u8]) -> [u8; RECORD_HEADER_BYTES] {
        let mut bytes = [0; RECORD_HEADER_BYTES];
        put(&mut bytes, 0, &self.lsn.0.to_le_bytes());
        put(&mut bytes, 8, &self.previous.0.to_le_bytes());
        put(&mut bytes, 16, &self.time.0.to_le_bytes());
        put(&mut bytes, 24, &self.offset.to_le_bytes());
        put(&mut bytes, 32, &self.length.to_le_bytes());
        put(&mut bytes, 40, &self.disk.0);
        bytes[56] = self.kind.code();
        put(&mut bytes, 58, &slot_count.to_le_bytes());
        put(&mut bytes, 60, &self.batch.0.to_le_bytes());
        put(&mut bytes, 64, &self.argument.to_le_bytes());
        put(&mut bytes, 72, &body_len.to_le_bytes());
        let check = header_check(&bytes, note);
        put(&mut bytes, CHECK_AT, &check);
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<(Self, u16, usize), Damage> {
        let short = Damage::Short { structure: NAME };
        let field = |field| Damage::Field {
            structure: NAME,
            field,
        };
        let bytes = bytes.get(..RECORD_HEADER_BYTES).ok_or(short.clone())?;
        let u64_at = |at| get_u64(bytes, at).ok_or(Damage::Short { structure: NAME });
        let kind = get_u8(bytes, 56)
            .and_then(RecordKind::from_code)
            .ok_or(field("kind"))?;
        if get_u8(bytes, 57) != Some(0) {
            return Err(field("reserved bytes"));
        }
        let header = Self {
            kind,
            lsn: Lsn(u64_at(0)?),
            previous: Lsn(u64_at(8)?),
            time: Timestamp(u64_at(16)?),
            offset: u64_at(24)?,
            length: u64_at(32)?,
            disk: DiskId(array(bytes, 40).ok_or(short.clone())?),
            batch: BatchId(get_u32(bytes, 60).ok_or(short.clone())?),
            argument: u64_at(64)?,
        };
        let slot_count = get_u16(bytes, 58).ok_or(short.clone())?;
        let body_len = index(get_u32(bytes, 72).ok_or(short)?);
        header.check(slot_count, body_len)?;
        Ok((header, slot_count, body_len))
    }

    fn check(&self, slot_count: u16, body_len: usize) -> Result<(), Damage> {
        let field = |field| Damage::Field {
            structure: NAME,
            field,
        };
        let block = wide(BLOCK_BYTES);
        if self.kind.changes_content() {
            let is_legal = self.offset.is_multiple_of(block)
                && self.length.is_multiple_of(block)
                && self.length > 0
                && self
                    .offset
                    .checked_add(self.length)
                    .is_some_and(|end| end <= DISK_BYTES_MAX);
            if !is_legal {
                return Err(field("range"));
            }
            if self.disk.is_nil() {
                return Err(field("disk"));
            }
        }
        if self.kind.has_slots() {
            if self.length > WRITE_BYTES_MAX {
                return Err(field("length"));
            }
            if u64::from(slot_count) != cell_count(self.offset, self.length) {
                return Err(field("slot count"));
            }
        } else if slot_count != 0 || body_len > NOTE_BYTES_MAX {
            return Err(field("body"));
        }
        if self.lsn >= LSN_MAX {
            return Err(field("LSN"));
        }
        // A bulk record repeats an LSN, which is its own disk's previous one at most.
        let is_ordered =
            self.previous < self.lsn || self.kind == RecordKind::Bulk || !self.kind.is_of_disk();
        if is_ordered {
            Ok(())
        } else {
            Err(field("previous LSN"))
        }
    }
}

/// Number of cells that a range touches, and so of slots that a write of it has.
#[must_use]
pub fn cell_count(offset: u64, length: u64) -> u64 {
    let cell = wide(CELL_BLOCKS * BLOCK_BYTES);
    (offset + length).div_ceil(cell) - offset / cell
}

/// The cells that a range of whole blocks touches, each with the mask of its blocks.
pub fn cells(offset: u64, length: u64) -> impl Iterator<Item = (CellIndex, u8)> + Clone {
    let first = BlockIndex::containing(offset).0;
    let end = first + length / wide(BLOCK_BYTES);
    let per_cell = wide(CELL_BLOCKS);
    (first / per_cell..end.div_ceil(per_cell)).map(move |cell| {
        let from = first.max(cell * per_cell) - cell * per_cell;
        let to = end.min((cell + 1) * per_cell) - cell * per_cell;
        (CellIndex(cell), ((1u8 << to) - 1) & !((1u8 << from) - 1))
    })
}

/// A record in somebody's buffer: structure checked, content not yet.
#[derive(Clone, Copy, Debug)]
pub struct RecordView<'a> {
    /// The header.
    pub header: RecordHeader,
    /// What follows it.
    pub body: RecordBody<'a>,
    /// The header's bytes, for the frame's hash.
    pub header_bytes: &'a [u8],
    /// Number of slots.
    pub slot_count: u16,
    padding: &'a [u8],
}

impl<'a> RecordView<'a> {
    /// Finds the record that `bytes` begin with. Returns it and its whole length.
    ///
    /// # Errors
    /// [`Damage`] when the structure is wrong or cut short.
    pub fn parse(bytes: &'a [u8]) -> Result<(Self, usize), Damage> {
        let (header, slot_count, body_len) = RecordHeader::decode(bytes)?;
        let short = Damage::Short { structure: NAME };
        let end = RECORD_HEADER_BYTES + body_len;
        let body = bytes.get(RECORD_HEADER_BYTES..end).ok_or(short.clone())?;
        let padding = bytes.get(end..end.next_multiple_of(8)).ok_or(short)?;
        let body = if header.kind.has_slots() {
            RecordBody::Slots(body)
        } else {
            RecordBody::Note(body)
        };
        let header_bytes = &bytes[..RECORD_HEADER_BYTES];
        Ok((
            Self {
                header,
                body,
                header_bytes,
                slot_count,
                padding,
            },
            end.next_multiple_of(8),
        ))
    }

    /// The note; empty for a record with slots.
    #[must_use]
    pub fn note(&self) -> &'a [u8] {
        match self.body {
            RecordBody::Note(note) => note,
            RecordBody::Slots(_) => &[],
        }
    }

    /// Checks header and note against the header's own check.
    ///
    /// # Errors
    /// [`Damage::Hash`].
    pub fn verify_header(&self) -> Result<(), Damage> {
        if self.header_bytes[CHECK_AT..] == header_check(self.header_bytes, self.note()) {
            Ok(())
        } else {
            Err(Damage::Hash { structure: NAME })
        }
    }

    /// Checks that the padding is zero.
    ///
    /// # Errors
    /// [`Damage::Field`].
    pub fn verify_padding(&self) -> Result<(), Damage> {
        if self.padding.iter().all(|byte| *byte == 0) {
            Ok(())
        } else {
            Err(Damage::Field {
                structure: NAME,
                field: "padding",
            })
        }
    }

    /// Walks the slots: offset of each within the body, its context, and itself.
    ///
    /// # Errors
    /// Each item can be [`Damage`]; the walk ends there.
    pub fn slots(
        &self,
        history: HistoryId,
    ) -> impl Iterator<Item = Result<(usize, SlotContext, SlotView<'a>), Damage>> + use<'a> {
        let bytes = match self.body {
            RecordBody::Slots(bytes) => bytes,
            RecordBody::Note(_) => &[],
        };
        let header = self.header;
        let expected = self.slot_count;
        let mut cells = cells(header.offset, header.length).take(usize::from(expected));
        let mut at = 0;
        core::iter::from_fn(move || {
            if expected == 0 {
                return None;
            }
            let Some((cell, mask)) = cells.next() else {
                let is_whole = at >= bytes.len();
                at = bytes.len();
                return (!is_whole).then_some(Err(Damage::Field {
                    structure: NAME,
                    field: "body length",
                }));
            };
            let slot = bytes.get(at..).ok_or(Damage::Short { structure: NAME });
            let item = slot.and_then(SlotView::parse).and_then(|slot| {
                if slot.header.mask != mask {
                    return Err(Damage::Field {
                        structure: "slot",
                        field: "block mask",
                    });
                }
                let context = SlotContext::uniform(header.disk, history, cell, mask, header.lsn);
                let found = (at, context, slot);
                at += found.2.bytes.len();
                Ok(found)
            });
            if item.is_err() {
                cells = self::cells(0, 0).take(0);
                at = bytes.len();
            }
            Some(item)
        })
    }
}
