//! Immutable parts of the map, and the snapshot that a view reads.
//!
//! Invariants
//! * A section never changes; a snapshot holds what it names until it is dropped.
//! * Layers of a snapshot are ordered from the view's own history up to its oldest ancestor; within
//!   a layer the highest LSN at or below the layer's cap wins, and a nearer layer wins over a
//!   farther one.

use std::sync::Arc;

use afterimage_blockdev::{CellIndex, DiskId, HistoryId, Lsn};

use crate::entry::{Entry, RangeEntry};
use crate::run::{RunId, SectionTable};

/// One immutable part of the map of one disk.
#[derive(Debug)]
pub enum Section {
    /// In memory, waiting for the next run file.
    Memory {
        /// Sorted entries.
        entries: Vec<Entry>,
        /// Ranges, by LSN.
        ranges: Vec<RangeEntry>,
        /// Lowest LSN.
        low: Lsn,
        /// Highest LSN.
        high: Lsn,
    },
    /// In a run file.
    File {
        /// The file.
        run: RunId,
        /// Where in it.
        table: SectionTable,
    },
}

impl Section {
    /// Lowest and highest LSN.
    #[must_use]
    pub fn lsns(&self) -> (Lsn, Lsn) {
        match self {
            Self::Memory { low, high, .. } => (*low, *high),
            Self::File { table, .. } => (table.low, table.high),
        }
    }

    /// The ranges.
    #[must_use]
    pub fn ranges(&self) -> &[RangeEntry] {
        match self {
            Self::Memory { ranges, .. } => ranges,
            Self::File { table, .. } => &table.ranges,
        }
    }

    /// Entries of cells `first..end`, when they are in memory.
    #[must_use]
    pub fn entries_in_memory(&self, first: CellIndex, end: CellIndex) -> &[Entry] {
        match self {
            Self::Memory { entries, .. } => {
                let from = entries.partition_point(|entry| entry.cell < first);
                let to = entries.partition_point(|entry| entry.cell < end);
                &entries[from..to]
            }
            Self::File { .. } => &[],
        }
    }
}

/// The sections of one history that a view sees.
#[derive(Clone, Debug)]
pub struct Layer {
    /// The history.
    pub history: HistoryId,
    /// Entries above this LSN are not seen.
    pub cap: Lsn,
    /// Its sections.
    pub sections: Vec<Arc<Section>>,
}

impl Snapshot {
    /// Says whether records that the view should show may be lost.
    #[must_use]
    pub fn is_hurt(&self) -> bool {
        !self.lost.is_empty()
    }
}

/// What a disk was at one (history, LSN).
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Names the snapshot in caches; never given out twice by one engine.
    pub serial: u64,
    /// The disk.
    pub disk: DiskId,
    /// The history asked for.
    pub history: HistoryId,
    /// The LSN.
    pub lsn: Lsn,
    /// Size of the disk then, in bytes.
    pub size_bytes: u64,
    /// Smallest unit of a request, in bytes.
    pub logical_block_bytes: u32,
    /// Nearest history first.
    pub layers: Vec<Layer>,
    /// Ranges of LSNs of this disk that were lost: (history, first, last). What was written there
    /// is not known, so no view above them may be shown as good.
    pub lost: Vec<(HistoryId, Lsn, Lsn)>,
}
