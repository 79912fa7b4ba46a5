//! A disk in memory, sparse by 4 KiB pages.

use std::sync::Arc;

use parking_lot::RwLock;

use crate::convert::to_usize;
use crate::device::{
    BlockCompleter, BlockCompletion, BlockDevice, BlockError, BlockOp, BlockOutcome, Extent,
    ExtentKind, Geometry,
};
use crate::id::Token;
use crate::pages::{PAGE_BYTES, Pages};

/// A [`BlockDevice`] in memory.
pub struct MemoryDevice {
    state: RwLock<State>,
}

struct State {
    geometry: Geometry,
    pages: Pages,
}

impl MemoryDevice {
    /// Makes a blank disk.
    ///
    /// # Panics
    /// When the logical block is neither 512 nor 4096, or the size not a multiple of it.
    #[must_use]
    pub fn new(size_bytes: u64, logical_block_bytes: u32) -> Arc<Self> {
        assert!(
            matches!(logical_block_bytes, 512 | 4096),
            "logical block is 512 or 4096"
        );
        assert!(
            size_bytes.is_multiple_of(u64::from(logical_block_bytes)),
            "size is whole blocks"
        );
        let geometry = Geometry {
            size_bytes,
            logical_block_bytes,
            is_read_only: false,
        };
        Arc::new(Self {
            state: RwLock::new(State {
                geometry,
                pages: Pages::default(),
            }),
        })
    }

    /// Allows or refuses writes from now on.
    pub fn set_read_only(&self, is_read_only: bool) {
        self.state.write().geometry.is_read_only = is_read_only;
    }

    /// Copies the bytes of a range.
    ///
    /// # Panics
    /// When the range is not within the device.
    #[must_use]
    pub fn copy(&self, offset: u64, length: usize) -> Vec<u8> {
        let state = self.state.read();
        let end = offset.checked_add(length as u64);
        assert!(
            end.is_some_and(|end| end <= state.geometry.size_bytes),
            "range is outside"
        );
        let mut bytes = vec![0; length];
        state.pages.read(offset, &mut bytes);
        bytes
    }

    fn perform(&self, op: BlockOp) -> Result<BlockOutcome, BlockError> {
        if let BlockOp::Read { .. } | BlockOp::Extents { .. } | BlockOp::Flush = op {
            let state = self.state.read();
            op.validate(&state.geometry)?;
            return Ok(state.answer(op));
        }
        let mut state = self.state.write();
        op.validate(&state.geometry)?;
        match op {
            BlockOp::Write { offset, buffer, .. } => state.pages.write(offset, &buffer),
            BlockOp::Discard { offset, length } | BlockOp::WriteZeroes { offset, length, .. } => {
                state.pages.zero(offset, length);
            }
            BlockOp::Grow { size_bytes } => state.geometry.size_bytes = size_bytes,
            BlockOp::Read { .. } | BlockOp::Extents { .. } | BlockOp::Flush => {}
        }
        Ok(BlockOutcome::Done)
    }
}

impl State {
    fn answer(&self, op: BlockOp) -> BlockOutcome {
        match op {
            BlockOp::Read { offset, mut buffer } => {
                self.pages.read(offset, &mut buffer);
                BlockOutcome::Data(buffer)
            }
            BlockOp::Extents { offset, length } => {
                BlockOutcome::Extents(self.extents(offset, offset + length))
            }
            _ => BlockOutcome::Done,
        }
    }

    fn extents(&self, start: u64, end: u64) -> Vec<Extent> {
        let mut extents: Vec<Extent> = Vec::new();
        let mut offset = start;
        while offset < end {
            let index = offset / PAGE_BYTES;
            let length = ((index + 1) * PAGE_BYTES).min(end) - offset;
            let kind = match self.pages.page(index) {
                Some(_) => ExtentKind::Data,
                None => ExtentKind::Zero,
            };
            match extents.last_mut() {
                Some(last) if last.kind == kind => last.length += length,
                _ => extents.push(Extent {
                    offset,
                    length,
                    kind,
                }),
            }
            offset += length;
        }
        extents
    }
}

impl BlockDevice for MemoryDevice {
    fn geometry(&self) -> Geometry {
        self.state.read().geometry
    }

    fn submit(&self, token: Token, op: BlockOp, to: Arc<dyn BlockCompleter>) {
        let result = self.perform(op);
        to.complete(BlockCompletion { token, result });
    }
}

impl MemoryDevice {
    /// Copies the whole disk.
    #[must_use]
    pub fn image(&self) -> Vec<u8> {
        self.copy(0, to_usize(self.geometry().size_bytes))
    }
}
