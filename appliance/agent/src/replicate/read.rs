//! Reads a range of a source under its range lock.

use std::ops::Range;
use std::sync::Arc;

use afterimage_blockdev::{BLOCK_BYTES, BlockError, BlockOp, BlockOutcome, IoBuffer, Lsn, wait};
use crossbeam::channel::{Sender, bounded};

use crate::tap::Capture;
use crate::tap::ranges::Resume;

struct Signal(Sender<()>);

impl Resume for Signal {
    fn resume(self: Arc<Self>) {
        let _gone = self.0.send(());
    }
}

/// Bytes of a source at a point of its order.
pub(super) struct Read {
    /// Whole blocks; what lies beyond the end of the disk is zero.
    pub(super) bytes: Vec<u8>,
    /// Highest LSN given out before the read.
    pub(super) lsn: Lsn,
    /// The disk's own last LSN then.
    pub(super) previous: Lsn,
}

/// Reads whole blocks while no write to them is under way.
pub(super) fn read_locked(capture: &Capture, range: &Range<u64>) -> Result<Read, BlockError> {
    let (sender, held) = bounded(1);
    if !capture
        .ranges
        .lock(range.clone(), &Arc::new(Signal(sender)))
    {
        // Whoever holds it gives it back when its write ends.
        let _disconnected = held.recv();
    }
    let (lsn, previous) = capture.order.highest(capture.place);
    let result = read_plain(capture, range);
    for next in capture.ranges.unlock(range) {
        next.resume();
    }
    result.map(|bytes| Read {
        bytes,
        lsn,
        previous,
    })
}

/// Reads whole blocks, whoever writes them.
pub(super) fn read_plain(capture: &Capture, range: &Range<u64>) -> Result<Vec<u8>, BlockError> {
    let size = capture.source.geometry().size_bytes;
    let whole = usize::try_from(range.end - range.start).expect("a chunk fits in memory");
    let wanted = usize::try_from(range.end.min(size) - range.start).expect("a chunk fits");
    let op = BlockOp::Read {
        offset: range.start,
        buffer: IoBuffer::zeroed(wanted),
    };
    let mut bytes = match wait::device(capture.source.as_ref(), op)? {
        BlockOutcome::Data(buffer) => buffer.to_vec(),
        _ => Vec::new(),
    };
    bytes.resize(whole.next_multiple_of(BLOCK_BYTES), 0);
    Ok(bytes)
}
