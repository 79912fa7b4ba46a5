//! Requests on open files. Each owns its reply, and answers from whichever thread completes it.
//!
//! Invariant: an [`IoDone`] serves one operation at a time, and answers it once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use afterimage_blockdev::{
    BlockCompleter, BlockCompletion, BlockError, BlockOp, BlockOutcome, IoBuffer, Token,
};
use fuser::Errno;
use parking_lot::Mutex;

use super::chain;
use super::file::OpenFile;
use super::patch::{Patch, Zero};
use super::reply::Reply;

/// Makes an error number that the kernel takes as the answer to one request only. `ENOSYS` would
/// switch the operation off for good, with success for every later fsync; numbers from 512 on
/// are the kernel's own, and it would drop the answer.
pub(super) fn errno(number: i32) -> Errno {
    match number {
        libc::ENOSYS => Errno::EIO,
        1..512 => Errno::from_i32(number),
        _ => Errno::EIO,
    }
}

/// Logs a failed request, and gives the number to answer.
pub(super) fn failed(error: &BlockError) -> Errno {
    tracing::debug!(%error, "request on an exported file failed");
    errno(error.errno())
}

/// Counts the reads and writes that are under way in a mount.
#[derive(Clone, Default)]
pub(super) struct UnderWay(Arc<AtomicUsize>);

impl UnderWay {
    /// Counts one in; says whether it is alone.
    pub(super) fn enter(&self) -> (Entered, bool) {
        let is_alone = self.0.fetch_add(1, Ordering::AcqRel) == 0;
        (Entered(self.clone()), is_alone)
    }
}

/// Counts one out when it is dropped.
pub(super) struct Entered(UnderWay);

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What a request gets when its operation is done.
#[derive(Clone, Copy)]
enum Answer {
    /// Data; `skip` bytes of the widened read lie before it.
    Data { skip: usize, take: usize },
    /// The number of bytes.
    Written { length: u32 },
    /// Nothing but success.
    Nothing,
}

/// An operation under way.
struct Done {
    answer: Answer,
    /// The file whose gate it passed.
    gated: Option<Arc<OpenFile>>,
    entered: Option<Entered>,
}

impl Done {
    /// Leaves what was entered and passed.
    fn leave(self) -> Answer {
        drop(self.entered);
        if let Some(file) = self.gated {
            file.gate.leave_shared();
        }
        self.answer
    }
}

/// Takes the completion of one operation, and answers the request that it is for.
#[derive(Default)]
pub(super) struct IoDone(Mutex<Option<(Reply, Done)>>);

impl IoDone {
    /// Gets ready for the operation of `reply`, which owns this.
    fn begin(reply: Reply, done: Done) -> Arc<Self> {
        let own = reply.completer();
        let before = own.0.lock().replace((reply, done));
        assert!(before.is_none(), "an operation began before the last ended");
        own
    }
}

impl BlockCompleter for IoDone {
    fn complete(&self, completion: BlockCompletion) {
        let Some((reply, done)) = self.0.lock().take() else {
            return;
        };
        // What was entered or passed is left before the answer, so that who waits for the answer
        // finds nothing under way.
        match (done.leave(), completion.result) {
            (Answer::Data { skip, take }, Ok(BlockOutcome::Data(buffer))) => {
                reply.data_of(buffer, skip, take);
            }
            (Answer::Data { .. }, Ok(_)) => reply.error(Errno::EIO),
            (Answer::Written { length }, Ok(outcome)) => {
                if let BlockOutcome::Written(buffer) = outcome {
                    reply.give_back(buffer);
                }
                reply.written(length);
            }
            (Answer::Nothing, Ok(_)) => reply.ok(),
            (_, Err(error)) => reply.error(failed(&error)),
        }
    }
}

/// Reads any range; what lies beyond the end is cut off.
pub(super) fn read(
    file: &OpenFile,
    token: Token,
    offset: u64,
    length: u32,
    entered: Entered,
    reply: Reply,
) {
    let wanted_end = offset.saturating_add(u64::from(length));
    let end = wanted_end.min(file.size_reaching(wanted_end));
    if offset >= end {
        return reply.data(&[]);
    }
    let start = file.align_down(offset);
    // The widened read is at most the request and two blocks, so that both fit.
    let (Ok(bytes), Ok(skip), Ok(take)) = (
        usize::try_from(file.align_up(end) - start),
        usize::try_from(offset - start),
        usize::try_from(end - offset),
    ) else {
        return reply.error(Errno::EINVAL);
    };
    let op = BlockOp::Read {
        offset: start,
        buffer: reply.buffer(bytes),
    };
    let done = Done {
        answer: Answer::Data { skip, take },
        gated: None,
        entered: Some(entered),
    };
    file.device.submit(token, op, IoDone::begin(reply, done));
}

/// Writes any range within the device. With `fua` it is durable when answered.
pub(super) fn write(
    file: Arc<OpenFile>,
    token: Token,
    offset: u64,
    buffer: IoBuffer,
    fua: bool,
    entered: Entered,
    reply: Reply,
) {
    let Ok(length) = u32::try_from(buffer.len()) else {
        return reply.error(Errno::EINVAL);
    };
    let Some(end) = offset.checked_add(u64::from(length)) else {
        return reply.error(Errno::EFBIG);
    };
    if !file.is_writable {
        return reply.error(Errno::EBADF);
    }
    if end > file.size_reaching(end) {
        return reply.error(Errno::EFBIG);
    }
    if length == 0 {
        return reply.written(0);
    }
    let gate = Arc::clone(&file.gate);
    if file.is_aligned(offset, u64::from(length)) {
        gate.enter_shared(move || {
            let device = Arc::clone(&file.device);
            let done = Done {
                answer: Answer::Written { length },
                gated: Some(file),
                entered: Some(entered),
            };
            let op = BlockOp::Write {
                offset,
                buffer,
                fua,
            };
            device.submit(token, op, IoDone::begin(reply, done));
        });
    } else {
        gate.enter_alone(move || {
            let device = Arc::clone(&file.device);
            let job = Patch::new(file, offset, buffer, fua, move |result| {
                drop(entered);
                match result {
                    Ok(()) => reply.written(length),
                    Err(error) => reply.error(failed(&error)),
                }
            });
            chain::run(device, token, Box::new(job));
        });
    }
}

/// Makes what was written durable.
pub(super) fn flush(file: &OpenFile, token: Token, reply: Reply) {
    let done = Done {
        answer: Answer::Nothing,
        gated: None,
        entered: None,
    };
    file.device
        .submit(token, BlockOp::Flush, IoDone::begin(reply, done));
}

/// The two ways in which `fallocate` makes zeroes of a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ZeroKind {
    /// The room is given up.
    Discard,
    /// The room is kept.
    WriteZeroes,
}

impl ZeroKind {
    /// Understands the mode of `fallocate`.
    pub(super) fn from_mode(mode: i32) -> Option<Self> {
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        match mode & !libc::FALLOC_FL_KEEP_SIZE {
            libc::FALLOC_FL_PUNCH_HOLE if mode == punch => Some(Self::Discard),
            libc::FALLOC_FL_ZERO_RANGE => Some(Self::WriteZeroes),
            _ => None,
        }
    }

    /// Makes the request for a range of whole blocks.
    pub(super) fn op(self, offset: u64, length: u64) -> BlockOp {
        match self {
            Self::Discard => BlockOp::Discard { offset, length },
            Self::WriteZeroes => BlockOp::WriteZeroes {
                offset,
                length,
                may_unmap: false,
            },
        }
    }
}

/// Makes a range read as zero; what lies beyond the end is cut off.
pub(super) fn zero(
    file: Arc<OpenFile>,
    token: Token,
    kind: ZeroKind,
    offset: u64,
    length: u64,
    reply: Reply,
) {
    let wanted_end = offset.saturating_add(length);
    let end = wanted_end.min(file.size_reaching(wanted_end));
    if !file.is_writable {
        return reply.error(Errno::EBADF);
    }
    if offset >= end {
        return reply.ok();
    }
    let gate = Arc::clone(&file.gate);
    if file.is_aligned(offset, end - offset) {
        gate.enter_shared(move || {
            let device = Arc::clone(&file.device);
            let done = Done {
                answer: Answer::Nothing,
                gated: Some(file),
                entered: None,
            };
            let op = kind.op(offset, end - offset);
            device.submit(token, op, IoDone::begin(reply, done));
        });
    } else {
        gate.enter_alone(move || {
            let device = Arc::clone(&file.device);
            let job = Zero::new(file, kind, offset, end, move |result| match result {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(failed(&error)),
            });
            chain::run(device, token, Box::new(job));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_error_number_switches_an_operation_off_or_gets_lost() {
        assert_eq!(errno(libc::ENOSYS), Errno::EIO);
        assert_eq!(errno(libc::ENOSPC), Errno::ENOSPC);
        for number in [0, -5, 512, i32::MAX, i32::MIN] {
            assert_eq!(errno(number), Errno::EIO);
        }
    }

    #[test]
    fn modes_of_fallocate() {
        let keep = libc::FALLOC_FL_KEEP_SIZE;
        let (punch, zero) = (libc::FALLOC_FL_PUNCH_HOLE, libc::FALLOC_FL_ZERO_RANGE);
        assert_eq!(ZeroKind::from_mode(punch | keep), Some(ZeroKind::Discard));
        assert_eq!(
            ZeroKind::from_mode(zero | keep),
            Some(ZeroKind::WriteZeroes)
        );
        assert_eq!(ZeroKind::from_mode(zero), Some(ZeroKind::WriteZeroes));
        for mode in [
            0,
            keep,
            punch,
            libc::FALLOC_FL_COLLAPSE_RANGE,
            punch | zero | keep,
        ] {
            assert_eq!(ZeroKind::from_mode(mode), None);
        }
    }
}
