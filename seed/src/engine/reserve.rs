//! A file that only takes room, so that there is some when the medium is full: it goes when the
//! manifest has no room, which deletes of points need to give more.
//!
//! Invariants
//! * No other file needs it, and the manifest does not name it; so a start sweeps it, and it is
//!   made again.
//! * It is made only while nobody waits for room.

use afterimage_blockdev::{FileId, FileName, IoBuffer, StorageError, StorageOp, StorageOutcome};

use super::{Engine, Output, Owner};

/// Bytes of one write.
const PIECE_BYTES: u64 = 1 << 20;

/// How far the file is.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) enum Reserve {
    #[default]
    Absent,
    /// Its file, and the bytes that were written.
    Growing(Option<FileId>, u64),
    There,
    Leaving,
}

fn reserve_file() -> FileName {
    FileName::new("segments/reserve")
}

impl Engine {
    pub(super) fn make_reserve(&mut self, out: &mut Vec<Output>) {
        let lacks_room = self.is_paused.is_some() || self.manifest_retry_at.is_some();
        let is_early = self.reserve_retry_at.is_some_and(|at| at > self.now);
        let has_none = self.reserve == Reserve::Absent;
        if self.options.reserve_file_bytes == 0 || lacks_room || is_early || !has_none {
            return;
        }
        self.reserve = Reserve::Growing(None, 0);
        let name = reserve_file();
        self.submit(Owner::Reserve, StorageOp::Create { name }, out);
    }

    /// Bytes that the file takes.
    pub(super) fn reserve_bytes(&self) -> u64 {
        match self.reserve {
            Reserve::There => self.options.reserve_file_bytes,
            Reserve::Growing(_, written) => written,
            Reserve::Absent | Reserve::Leaving => 0,
        }
    }

    /// Gives the room up.
    pub(super) fn spend_reserve(&mut self, out: &mut Vec<Output>) {
        if self.reserve == Reserve::There {
            tracing::warn!("the medium is full: the store's reserve is given up for its manifest");
            self.leave_reserve(out);
        }
    }

    fn leave_reserve(&mut self, out: &mut Vec<Output>) {
        self.reserve = Reserve::Leaving;
        let name = reserve_file();
        self.submit(Owner::Reserve, StorageOp::Remove { name }, out);
    }

    pub(super) fn reserve_done(
        &mut self,
        result: Result<StorageOutcome, StorageError>,
        out: &mut Vec<Output>,
    ) {
        match (self.reserve, result) {
            (Reserve::Growing(_, _), Ok(StorageOutcome::Opened { file, .. })) => {
                self.grow_reserve(file, 0, out);
            }
            (Reserve::Growing(Some(file), written), Ok(_)) => {
                self.grow_reserve(file, written + PIECE_BYTES, out);
            }
            (Reserve::Growing(file, _), Err(_)) => {
                if let Some(file) = file {
                    self.submit(Owner::Nobody, StorageOp::Close { file }, out);
                }
                self.leave_reserve(out);
            }
            (Reserve::Leaving, _) => {
                self.reserve = Reserve::Absent;
                self.reserve_retry_at = Some(self.now.after(self.options.retry));
                self.manifest_retry_at = self.manifest_retry_at.map(|_| self.now);
                out.push(Output::WakeAt(self.now));
            }
            _ => {}
        }
    }

    fn grow_reserve(&mut self, file: FileId, written: u64, out: &mut Vec<Output>) {
        let left = self.options.reserve_file_bytes.saturating_sub(written);
        if left == 0 {
            self.reserve = Reserve::There;
            return self.submit(Owner::Nobody, StorageOp::Close { file }, out);
        }
        self.reserve = Reserve::Growing(Some(file), written);
        let len = usize::try_from(left.min(PIECE_BYTES)).unwrap_or(0);
        let buffer = IoBuffer::zeroed(len);
        let op = StorageOp::Write {
            file,
            offset: written,
            buffer,
        };
        self.submit(Owner::Reserve, op, out);
    }
}
