//! A view: a read-only disk at one (history, LSN).

use std::sync::Arc;

use afterimage_blockdev::{
    BLOCK_BYTES, BlockCompleter, BlockCompletion, BlockDevice, BlockError, BlockErrorKind,
    BlockIndex, BlockOp, BlockOutcome, Extent, ExtentKind, Geometry, IoBuffer, Token,
};

use crate::entry::EntryKind;
use crate::error::SeedError;
use crate::reader::{REGION_BLOCKS, ReadFailure, Reader, Resolved, Sink};
use crate::section::Snapshot;

/// A disk as it was. Cheap to make, readable from any thread, unchanging.
#[derive(Debug)]
pub struct ViewDevice {
    reader: Arc<Reader>,
    snapshot: Arc<Snapshot>,
}

impl ViewDevice {
    /// Makes a device of a snapshot.
    #[must_use]
    pub fn new(reader: Arc<Reader>, snapshot: Arc<Snapshot>) -> Self {
        Self { reader, snapshot }
    }

    /// The snapshot shown.
    #[must_use]
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    pub(crate) fn reader(&self) -> &Arc<Reader> {
        &self.reader
    }
}

impl BlockDevice for ViewDevice {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.snapshot.size_bytes,
            logical_block_bytes: self.snapshot.logical_block_bytes,
            is_read_only: true,
        }
    }

    fn submit(&self, token: Token, op: BlockOp, to: Arc<dyn BlockCompleter>) {
        if let Err(error) = op.validate(&self.geometry()) {
            return to.complete(BlockCompletion {
                token,
                result: Err(error),
            });
        }
        match op {
            BlockOp::Read { offset, buffer } => read(self, token, offset, buffer, to),
            BlockOp::Extents { offset, length } => {
                let walk = ExtentWalk {
                    reader: Arc::clone(&self.reader),
                    snapshot: Arc::clone(&self.snapshot),
                    at: offset,
                    end: offset + length,
                    asked: (offset, length),
                    extents: Vec::new(),
                };
                walk.go(token, to);
            }
            BlockOp::Flush => {
                to.complete(BlockCompletion {
                    token,
                    result: Ok(BlockOutcome::Done),
                });
            }
            other => {
                let error = other.error(BlockErrorKind::ReadOnly);
                to.complete(BlockCompletion {
                    token,
                    result: Err(error),
                });
            }
        }
    }
}

/// What a client of a device is told of an error of the store.
pub(crate) fn device_error_kind(error: &SeedError) -> BlockErrorKind {
    match error {
        SeedError::Storage(error) => BlockErrorKind::Io {
            errno: 0,
            message: error.to_string(),
        },
        other => BlockErrorKind::Corrupt(other.to_string()),
    }
}

fn read(
    view: &ViewDevice,
    token: Token,
    offset: u64,
    buffer: IoBuffer,
    to: Arc<dyn BlockCompleter>,
) {
    let length = buffer.len();
    let first = BlockIndex::containing(offset);
    let end = (offset + length as u64).next_multiple_of(BLOCK_BYTES as u64);
    let count = usize::try_from(end / BLOCK_BYTES as u64 - first.0).unwrap_or(0);
    let is_whole = offset == first.offset() && count * BLOCK_BYTES == length;
    // Requests of less than whole blocks go through a buffer of whole ones.
    let (target, outer) = if is_whole {
        (buffer, None)
    } else {
        (IoBuffer::zeroed(count * BLOCK_BYTES), Some(buffer))
    };
    let done = move |result: Result<Sink, ReadFailure>| {
        let result = match (result, outer) {
            (Ok(Sink::Plain(inner)), None) => Ok(BlockOutcome::Data(inner)),
            (Ok(Sink::Plain(inner)), Some(mut outer)) => {
                let at = usize::try_from(offset - first.offset()).unwrap_or(0);
                outer.copy_from_slice(&inner[at..at + length]);
                Ok(BlockOutcome::Data(outer))
            }
            (Ok(Sink::Tags { .. }), _) => return,
            (Err(failure), _) => {
                let error = &failure.error;
                tracing::error!(block = failure.block.0, %error, "view read failed");
                Err(BlockError {
                    operation: "read",
                    offset,
                    length: length as u64,
                    kind: device_error_kind(&failure.error),
                })
            }
        };
        to.complete(BlockCompletion { token, result });
    };
    view.reader.read(
        &view.snapshot,
        first,
        count,
        Sink::Plain(target),
        Box::new(done),
    );
}

/// Walks regions one after the other; never deeper than one region on the stack.
struct ExtentWalk {
    reader: Arc<Reader>,
    snapshot: Arc<Snapshot>,
    at: u64,
    end: u64,
    asked: (u64, u64),
    extents: Vec<Extent>,
}

impl ExtentWalk {
    fn go(mut self, token: Token, to: Arc<dyn BlockCompleter>) {
        while self.at < self.end {
            let region = BlockIndex::containing(self.at).0 / REGION_BLOCKS;
            let Some(page) = self.reader.page_in_memory(&self.snapshot, region) else {
                let reader = Arc::clone(&self.reader);
                let snapshot = Arc::clone(&self.snapshot);
                reader.map_page(&snapshot, region, move |page| match page {
                    Ok(page) => {
                        self.region(&page.blocks);
                        self.go(token, to);
                    }
                    Err(error) => {
                        let (offset, length) = self.asked;
                        let kind = device_error_kind(&error);
                        let error = BlockError {
                            operation: "extents",
                            offset,
                            length,
                            kind,
                        };
                        to.complete(BlockCompletion {
                            token,
                            result: Err(error),
                        });
                    }
                });
                return;
            };
            self.region(&page.blocks);
        }
        let result = Ok(BlockOutcome::Extents(self.extents));
        to.complete(BlockCompletion { token, result });
    }

    fn region(&mut self, blocks: &[Resolved]) {
        while self.at < self.end {
            let block = BlockIndex::containing(self.at);
            let within = usize::try_from(block.0 % REGION_BLOCKS).unwrap_or(0);
            let resolved = blocks[within];
            // What may not be shown as good must not pass for a hole: a reader skips those.
            let is_known = !self.snapshot.is_hurt() && resolved.kind != EntryKind::Unknown;
            let is_data = (resolved.layer > 0 && resolved.kind.has_slot()) || !is_known;
            let kind = if is_data {
                ExtentKind::Data
            } else {
                ExtentKind::Zero
            };
            let next = (block.offset() + BLOCK_BYTES as u64).min(self.end);
            let length = next - self.at;
            match self.extents.last_mut() {
                Some(last) if last.kind == kind => last.length += length,
                _ => self.extents.push(Extent {
                    offset: self.at,
                    length,
                    kind,
                }),
            }
            self.at = next;
            if within == blocks.len() - 1 {
                break;
            }
        }
    }
}
