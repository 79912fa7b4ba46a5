//! Entries of the layered map: which slot holds which blocks of a cell since which LSN.

use afterimage_blockdev::{CellIndex, Lsn, SegmentId, SlotIndex};
use afterimage_cache::bytes::{array, get_u32, get_u64};

/// Bytes of an entry on disk.
pub const ENTRY_BYTES: usize = 24;
/// Cells of a disk: an entry has 6 bytes for the number of one.
pub const CELLS_MAX: u64 = 1 << 48;
/// Bytes of a range entry on disk.
pub const RANGE_BYTES: usize = 32;

/// What an entry says of its blocks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum EntryKind {
    /// A block copied in a batch: ranks below any write after its LSN.
    Bulk,
    /// A write.
    Data,
    /// Made zero.
    Zero,
    /// Given up; reads as zero.
    Discard,
    /// Unknown at the source; must not be shown as good.
    Unknown,
}

impl EntryKind {
    fn code(self) -> u8 {
        match self {
            Self::Bulk => 1,
            Self::Data => 2,
            Self::Zero => 3,
            Self::Discard => 4,
            Self::Unknown => 5,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::Bulk,
            2 => Self::Data,
            3 => Self::Zero,
            4 => Self::Discard,
            5 => Self::Unknown,
            _ => return None,
        })
    }

    /// Says whether a slot belongs to the entry.
    #[must_use]
    pub fn has_slot(self) -> bool {
        matches!(self, Self::Bulk | Self::Data)
    }
}

/// Blocks of one cell, from one LSN on. Names a slot, never a place in a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The cell.
    pub cell: CellIndex,
    /// Since when.
    pub lsn: Lsn,
    /// Which blocks of the cell, lowest bit first.
    pub mask: u8,
    /// Index within the slot of the first of these blocks; the others follow.
    pub first: u8,
    /// What it says.
    pub kind: EntryKind,
    /// The segment of the slot.
    pub segment: SegmentId,
    /// The slot.
    pub slot: SlotIndex,
}

impl Entry {
    /// Order in a section: by cell, then newest first; a bulk block after a write of its LSN.
    #[must_use]
    pub fn key(&self) -> (CellIndex, core::cmp::Reverse<(Lsn, EntryKind)>) {
        (self.cell, core::cmp::Reverse((self.lsn, self.kind)))
    }

    /// Index within the slot of block `within` of the cell; `None` when the entry does not hold it.
    #[must_use]
    pub fn block_in_slot(&self, within: u8) -> Option<u8> {
        let bit = 1u8 << within;
        if self.mask & bit == 0 {
            return None;
        }
        let before = (self.mask & (bit - 1)).count_ones().to_le_bytes()[0];
        Some(self.first + before)
    }

    /// Writes the entry: cell (6 bytes), mask and first (4 bits each), kind, LSN, segment, slot.
    /// No cell is taken that 6 bytes do not hold.
    #[must_use]
    pub fn encode(&self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[..6].copy_from_slice(&self.cell.0.to_le_bytes()[..6]);
        bytes[6] = self.mask | self.first << 4;
        bytes[7] = self.kind.code();
        bytes[8..16].copy_from_slice(&self.lsn.0.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.segment.0.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.slot.0.to_le_bytes());
        bytes
    }

    /// Reads an entry; `None` when a field is impossible.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut cell = [0; 8];
        cell[..6].copy_from_slice(bytes.get(..6)?);
        let packed = *bytes.get(6)?;
        let entry = Self {
            cell: CellIndex(u64::from_le_bytes(cell)),
            mask: packed & 15,
            first: packed >> 4,
            kind: EntryKind::from_code(*bytes.get(7)?)?,
            lsn: Lsn(get_u64(bytes, 8)?),
            segment: SegmentId(get_u32(bytes, 16)?),
            slot: SlotIndex(get_u32(bytes, 20)?),
        };
        (entry.mask != 0 && entry.first < 4).then_some(entry)
    }
}

/// Many whole cells, from one LSN on; never with slots.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RangeEntry {
    /// First cell.
    pub first: CellIndex,
    /// Number of cells.
    pub count: u64,
    /// Since when.
    pub lsn: Lsn,
    /// What it says.
    pub kind: EntryKind,
}

impl RangeEntry {
    /// Says whether the range holds a cell.
    #[must_use]
    pub fn holds(&self, cell: CellIndex) -> bool {
        cell.0 >= self.first.0 && cell.0 - self.first.0 < self.count
    }

    /// Writes the entry.
    #[must_use]
    pub fn encode(&self) -> [u8; RANGE_BYTES] {
        let mut bytes = [0; RANGE_BYTES];
        bytes[..8].copy_from_slice(&self.first.0.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.count.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.lsn.0.to_le_bytes());
        bytes[24] = self.kind.code();
        bytes
    }

    /// Reads an entry; `None` when a field is impossible.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let reserved: [u8; 7] = array(bytes, 25)?;
        let entry = Self {
            first: CellIndex(get_u64(bytes, 0)?),
            count: get_u64(bytes, 8)?,
            lsn: Lsn(get_u64(bytes, 16)?),
            kind: EntryKind::from_code(*bytes.get(24)?)?,
        };
        let is_legal = entry.count > 0
            && entry
                .first
                .0
                .checked_add(entry.count)
                .is_some_and(|end| end <= CELLS_MAX)
            && !entry.kind.has_slot()
            && reserved == [0; 7];
        is_legal.then_some(entry)
    }
}
