//! The grain of the map (4 KiB blocks) and of compression (16 KiB cells).

use core::fmt;

use serde::{Deserialize, Serialize};

/// Bytes of a block, the grain of the map and of content tags.
pub const BLOCK_BYTES: usize = 4096;
/// Blocks of a cell. A slot never crosses a cell, so a lookup by cell sees every slot of a block.
pub const CELL_BLOCKS: usize = 4;
/// Bytes of a cell, the largest unit of compression.
pub const CELL_BYTES: usize = BLOCK_BYTES * CELL_BLOCKS;

/// Position of a 4 KiB block on a disk, counted in blocks from its start.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize,
)]
pub struct BlockIndex(pub u64);

/// Position of a 16 KiB cell on a disk, counted in cells from its start.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize,
)]
pub struct CellIndex(pub u64);

impl BlockIndex {
    /// The block that holds byte `offset`.
    pub fn containing(offset: u64) -> Self {
        Self(offset / BLOCK_BYTES as u64)
    }

    /// Offset of the block's first byte.
    pub fn offset(self) -> u64 {
        self.0 * BLOCK_BYTES as u64
    }

    /// The cell that holds this block.
    pub fn cell(self) -> CellIndex {
        CellIndex(self.0 / CELL_BLOCKS as u64)
    }

    /// Position of the block within its cell, 0 to 3.
    pub fn within_cell(self) -> u8 {
        u8::try_from(self.0 % CELL_BLOCKS as u64).expect("below the blocks of a cell")
    }
}

impl CellIndex {
    /// The cell's first block.
    pub fn first_block(self) -> BlockIndex {
        BlockIndex(self.0 * CELL_BLOCKS as u64)
    }

    /// Offset of the cell's first byte.
    pub fn offset(self) -> u64 {
        self.0 * CELL_BYTES as u64
    }
}

impl fmt::Display for BlockIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for CellIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
