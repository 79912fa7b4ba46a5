//! A private, writable copy of a device that is not touched: copy-on-write by 4 KiB blocks.
//!
//! Always true:
//! * The base is never written.
//! * A block is marked present only after all its bytes are in `over`, and never unmarked; until
//!   then reads take it from the base. So a read needs no lock, and a failed write shows the
//!   block's old content or, where it was present, an undefined mixture of old and new.
//! * Whatever changes a block holds that block's range lock until it has completed, so no merge
//!   of a part of a block loses another part's write.
//!
//! What a flush makes durable is `over`, for as long as this overlay lives: which blocks it holds
//! is known only here, in memory. After a restart the copy is gone.

mod extents;
mod join;
mod present;

use std::sync::Arc;

use self::join::{Continuation, Gather, Join};
use self::present::Present;
use crate::buffer::IoBuffer;
use crate::convert::to_usize;
use crate::device::{
    BlockCompleter, BlockCompletion, BlockDevice, BlockError, BlockErrorKind, BlockOp,
    BlockOutcome, Geometry,
};
use crate::id::Token;
use crate::range_lock::RangeLock;
use crate::size::BLOCK_BYTES;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// A copy-on-write device over two others.
pub struct Overlay {
    shared: Arc<Shared>,
}

struct Shared {
    base: Arc<dyn BlockDevice>,
    over: Arc<dyn BlockDevice>,
    geometry: Geometry,
    over_size: u64,
    /// Smallest unit of a request to `over`.
    over_unit: u64,
    present: Present,
    locks: RangeLock,
}

/// Who asked, and for what.
struct Caller {
    token: Token,
    to: Arc<dyn BlockCompleter>,
    asked: (&'static str, u64, u64),
}

impl Caller {
    fn reply(self, result: Result<BlockOutcome, BlockErrorKind>) {
        let (operation, offset, length) = self.asked;
        let result = result.map_err(|kind| BlockError {
            operation,
            offset,
            length,
            kind,
        });
        self.to.complete(BlockCompletion {
            token: self.token,
            result,
        });
    }
}

impl Overlay {
    /// Lays a blank writable device over a base that does not change. The size is the base's.
    ///
    /// # Errors
    /// `ReadOnly` or `Range` when `over` cannot be written or does not hold every block of the
    /// base.
    pub fn new(
        base: Arc<dyn BlockDevice>,
        over: Arc<dyn BlockDevice>,
    ) -> Result<Arc<Self>, BlockError> {
        let geometry = Geometry {
            is_read_only: false,
            ..base.geometry()
        };
        let over_geometry = over.geometry();
        let over_unit = u64::from(over_geometry.logical_block_bytes);
        let length = geometry.size_bytes;
        let error = |kind| BlockError {
            operation: "overlay",
            offset: 0,
            length,
            kind,
        };
        if over_geometry.is_read_only {
            return Err(error(BlockErrorKind::ReadOnly));
        }
        let is_legal_unit = over_unit > 0 && BLOCK.is_multiple_of(over_unit);
        if !is_legal_unit || over_geometry.size_bytes < length.next_multiple_of(over_unit) {
            return Err(error(BlockErrorKind::Range));
        }
        let shared = Shared {
            base,
            over,
            geometry,
            over_size: over_geometry.size_bytes,
            over_unit,
            present: Present::new(length.div_ceil(BLOCK)),
            locks: RangeLock::new(),
        };
        Ok(Arc::new(Self {
            shared: Arc::new(shared),
        }))
    }

    /// Number of bytes that were written over, in whole blocks.
    #[must_use]
    pub fn present_bytes(&self) -> u64 {
        self.shared.present.count() * BLOCK
    }
}

impl BlockDevice for Overlay {
    fn geometry(&self) -> Geometry {
        self.shared.geometry
    }

    fn submit(&self, token: Token, op: BlockOp, to: Arc<dyn BlockCompleter>) {
        let shared = &self.shared;
        if let Err(error) = op.validate(&shared.geometry) {
            return to.complete(BlockCompletion {
                token,
                result: Err(error),
            });
        }
        let asked = op.describe();
        let caller = Caller { token, to, asked };
        match op {
            BlockOp::Flush => shared.over.submit(token, op, caller.to),
            BlockOp::Grow { .. } => caller.reply(Err(BlockErrorKind::NotSupported)),
            BlockOp::Read { buffer, .. } if buffer.is_empty() => {
                caller.reply(Ok(BlockOutcome::Data(buffer)));
            }
            BlockOp::Read { offset, buffer } => shared.read(offset, buffer, caller),
            BlockOp::Extents { offset, length } => shared.extents(offset, length, caller),
            _ if asked.2 == 0 => caller.reply(Ok(BlockOutcome::Done)),
            BlockOp::Write {
                offset,
                buffer,
                fua,
            } => {
                shared.change(caller, move |shared, then| {
                    shared.write(offset, buffer, fua, then)
                });
            }
            BlockOp::Discard { offset, length } | BlockOp::WriteZeroes { offset, length, .. } => {
                shared.change(caller, move |shared, then| {
                    shared.zero(offset, length, then)
                });
            }
        }
    }
}

impl Shared {
    /// The blocks that a byte range touches.
    fn blocks(offset: u64, end: u64) -> core::ops::Range<u64> {
        offset / BLOCK..end.div_ceil(BLOCK)
    }

    /// Says whether a range that ends here leaves a rest of its last block to others.
    fn cuts_block(&self, end: u64) -> bool {
        !end.is_multiple_of(BLOCK) && end != self.geometry.size_bytes
    }

    fn fits_over(&self, offset: u64, end: u64) -> bool {
        offset.is_multiple_of(self.over_unit) && end.is_multiple_of(self.over_unit)
    }

    /// Performs a change under the lock of its blocks, and replies when it is complete.
    fn change(
        self: &Arc<Self>,
        caller: Caller,
        perform: impl FnOnce(&Arc<Self>, Continuation<()>) + Send + 'static,
    ) {
        let (_, offset, length) = caller.asked;
        let blocks = Self::blocks(offset, offset + length);
        let shared = Arc::clone(self);
        let waiter = Box::new(move |guard| {
            perform(
                &shared,
                Box::new(move |result| {
                    caller.reply(result.map(|()| BlockOutcome::Done));
                    drop(guard);
                }),
            );
        });
        self.locks.lock(blocks, waiter);
    }

    fn read(self: &Arc<Self>, offset: u64, buffer: IoBuffer, caller: Caller) {
        let end = offset + buffer.len() as u64;
        let runs = self.present.runs(Self::blocks(offset, end));
        if let [(is_present, _)] = runs[..]
            && (!is_present || self.fits_over(offset, end))
        {
            let side = if is_present { &self.over } else { &self.base };
            return side.submit(caller.token, BlockOp::Read { offset, buffer }, caller.to);
        }
        let parts = runs
            .into_iter()
            .map(|(is_present, blocks)| {
                let part = (blocks.start * BLOCK).max(offset)..(blocks.end * BLOCK).min(end);
                (is_present, part)
            })
            .collect();
        let then = Box::new(|result: Result<_, _>| caller.reply(result.map(BlockOutcome::Data)));
        self.gather(offset, buffer, parts, then);
    }

    /// Reads byte ranges, each from one side, into a buffer that stands for `offset` and on.
    fn gather(
        &self,
        offset: u64,
        buffer: IoBuffer,
        parts: Vec<(bool, core::ops::Range<u64>)>,
        then: Continuation<IoBuffer>,
    ) {
        let gather = Gather::new(buffer, parts.len(), then);
        for (is_present, part) in parts {
            // `over` may take only larger units; its rest is cut off again.
            let unit = if is_present { self.over_unit } else { 1 };
            let from = part.start - part.start % unit;
            let length = to_usize(part.end.next_multiple_of(unit) - from);
            let at = to_usize(part.start - offset);
            let take = to_usize(part.end - part.start);
            let to = gather.part(at, to_usize(part.start - from), take);
            let op = BlockOp::Read {
                offset: from,
                buffer: IoBuffer::zeroed(length),
            };
            let side = if is_present { &self.over } else { &self.base };
            side.submit(Token(0), op, to);
        }
        gather.end();
    }

    /// Writes under the lock of the blocks.
    fn write(self: &Arc<Self>, offset: u64, buffer: IoBuffer, fua: bool, then: Continuation<()>) {
        let end = offset + buffer.len() as u64;
        let blocks = Self::blocks(offset, end);
        let mut partial = Vec::new();
        if !offset.is_multiple_of(BLOCK) {
            partial.push(blocks.start);
        }
        if self.cuts_block(end) && partial.last() != Some(&(blocks.end - 1)) {
            partial.push(blocks.end - 1);
        }
        let is_direct = self.fits_over(offset, end)
            && partial.iter().all(|block| self.present.is_present(*block));
        if is_direct {
            return self.write_over(offset, buffer, fua, then);
        }
        let start = blocks.start * BLOCK;
        let wide_end = (blocks.end * BLOCK).min(self.over_size);
        let wide = IoBuffer::zeroed(to_usize(wide_end - start));
        let parts = partial
            .into_iter()
            .map(|block| {
                let part = block * BLOCK..((block + 1) * BLOCK).min(self.geometry.size_bytes);
                (self.present.is_present(block), part)
            })
            .collect();
        let shared = Arc::clone(self);
        let merge = Box::new(move |wide: Result<IoBuffer, BlockErrorKind>| match wide {
            Ok(mut wide) => {
                let at = to_usize(offset - start);
                wide[at..at + buffer.len()].copy_from_slice(&buffer);
                shared.write_over(start, wide, fua, then);
            }
            Err(kind) => then(Err(kind)),
        });
        self.gather(start, wide, parts, merge);
    }

    /// Writes to `over` what fills all blocks that are not yet present.
    fn write_over(
        self: &Arc<Self>,
        offset: u64,
        buffer: IoBuffer,
        fua: bool,
        then: Continuation<()>,
    ) {
        let blocks = Self::blocks(offset, offset + buffer.len() as u64);
        let op = BlockOp::Write {
            offset,
            buffer,
            fua,
        };
        self.over.submit(Token(0), op, self.marking(blocks, then));
    }

    /// Completes one request to `over` by marking the blocks that it filled.
    fn marking(
        self: &Arc<Self>,
        blocks: core::ops::Range<u64>,
        then: Continuation<()>,
    ) -> Arc<dyn BlockCompleter> {
        let shared = Arc::clone(self);
        let then = Box::new(move |result: Result<(), BlockErrorKind>| {
            if result.is_ok() {
                shared.present.mark(blocks);
            }
            then(result);
        });
        Join::new(1, then)
    }

    /// Makes bytes zero under the lock of the blocks. `over` gives the room up in any case.
    fn zero(self: &Arc<Self>, offset: u64, length: u64, then: Continuation<()>) {
        let end = offset + length;
        let blocks = Self::blocks(offset, end);
        let inner_start = if offset.is_multiple_of(BLOCK) {
            blocks.start
        } else {
            blocks.start + 1
        };
        let inner_end = if self.cuts_block(end) {
            blocks.end - 1
        } else {
            blocks.end
        };
        let has_inner = inner_start < inner_end;
        // Parts of blocks are merged like any write; both lie in one block when nothing is inner.
        let edges = if has_inner {
            [
                offset..inner_start * BLOCK,
                (inner_end * BLOCK).min(end)..end,
            ]
        } else {
            [
                offset..end.min(inner_start * BLOCK),
                end.min(inner_start * BLOCK)..end,
            ]
        };
        let edges = edges
            .into_iter()
            .filter(|edge| edge.start < edge.end)
            .collect::<Vec<_>>();
        let join = Join::new(edges.len() + usize::from(has_inner), then);
        for edge in edges {
            let zeroes = IoBuffer::zeroed(to_usize(edge.end - edge.start));
            let join = Arc::clone(&join);
            self.write(
                edge.start,
                zeroes,
                false,
                Box::new(move |result| join.finish(result)),
            );
        }
        if has_inner {
            let offset = inner_start * BLOCK;
            let length = (inner_end * BLOCK).min(self.over_size) - offset;
            let op = BlockOp::WriteZeroes {
                offset,
                length,
                may_unmap: true,
            };
            let then = Box::new(move |result| join.finish(result));
            self.over
                .submit(Token(0), op, self.marking(inner_start..inner_end, then));
        }
    }
}

#[cfg(test)]
mod tests;
