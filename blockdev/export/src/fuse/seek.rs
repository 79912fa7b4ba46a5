//! `SEEK_DATA` and `SEEK_HOLE`, answered from the device's extents a window at a time.

use std::sync::Arc;

use afterimage_blockdev::{BlockError, BlockErrorKind, BlockOp, BlockOutcome, ExtentKind};
use fuser::Errno;

use super::chain::{Job, Outcome};
use super::file::OpenFile;
use super::reply::Reply;
use super::request::failed;

/// Bytes that are asked for at once; bounds the answer to 65,536 extents of a block each.
const WINDOW_BYTES: u64 = 256 << 20;

/// Looks for the next byte of a kind.
pub(super) struct Seek {
    file: Arc<OpenFile>,
    wanted: ExtentKind,
    /// Nothing of the kind lies in front of this, from where the search began.
    position: u64,
    size_bytes: u64,
    reply: Option<Reply>,
}

impl Seek {
    /// From `position`, which lies within the device.
    pub(super) fn new(
        file: Arc<OpenFile>,
        wanted: ExtentKind,
        position: u64,
        reply: Reply,
    ) -> Self {
        let size_bytes = file.size_now();
        Self {
            file,
            wanted,
            position,
            size_bytes,
            reply: Some(reply),
        }
    }

    fn window(&self) -> (u64, u64) {
        let start = self.file.align_down(self.position);
        (start, self.size_bytes.min(start + WINDOW_BYTES))
    }

    /// Takes one answer: the position found, or none within its window.
    fn search(&mut self, outcome: Outcome) -> Result<Option<u64>, BlockError> {
        let extents = match outcome {
            Ok(BlockOutcome::Extents(extents)) => extents,
            // A device that does not know holds data everywhere.
            Ok(_)
            | Err(BlockError {
                kind: BlockErrorKind::NotSupported,
                ..
            }) => {
                let is_data = self.wanted == ExtentKind::Data;
                return Ok(Some(if is_data {
                    self.position
                } else {
                    self.size_bytes
                }));
            }
            Err(error) => return Err(error),
        };
        let found = extents.iter().find(|extent| {
            extent.kind == self.wanted
                && extent.length > 0
                && extent.offset.saturating_add(extent.length) > self.position
        });
        if let Some(extent) = found {
            return Ok(Some(extent.offset.max(self.position)));
        }
        self.position = self.window().1;
        Ok(None)
    }

    fn answer(&mut self, result: Result<u64, Errno>) {
        let Some(reply) = self.reply.take() else {
            return;
        };
        match result {
            Ok(position) if i64::try_from(position).is_ok() => reply.offset(position),
            Ok(_) => reply.error(Errno::EOVERFLOW),
            Err(errno) => reply.error(errno),
        }
    }
}

impl Job for Seek {
    fn step(&mut self, last: Option<Outcome>) -> Option<BlockOp> {
        match last.map(|outcome| self.search(outcome)) {
            Some(Ok(Some(position))) => {
                self.answer(Ok(position));
                return None;
            }
            Some(Err(error)) => {
                self.answer(Err(failed(&error)));
                return None;
            }
            None | Some(Ok(None)) => {}
        }
        if self.position >= self.size_bytes {
            // Every file ends in a hole.
            let is_hole = self.wanted == ExtentKind::Zero;
            self.answer(if is_hole {
                Ok(self.size_bytes)
            } else {
                Err(Errno::ENXIO)
            });
            return None;
        }
        let (offset, end) = self.window();
        Some(BlockOp::Extents {
            offset,
            length: end - offset,
        })
    }
}
