//! One request of a client, from submission to completion. Long ones go piece by piece.

use std::sync::Arc;

use afterimage_blockdev::{
    BlockCompleter, BlockCompletion, BlockError, BlockErrorKind, BlockOp, BlockOutcome, Extent,
    ExtentKind, IoBuffer, Token,
};

use super::negotiation::Agreed;
use crate::number::{command_flag, error, flag, state};
use crate::reply::{BadReply, Failure, ReplyStyle};
use crate::request::{Command, PAYLOAD_BYTES_MAX, Request};

/// Bytes of one command without a payload.
const RANGE_BYTES_MAX: u64 = 1 << 30;
/// Chunks of one reply.
const CHUNKS_MAX: usize = 64 * 1024;

/// Takes extents of a context: lengths and flags.
pub(super) type StatusDone = Box<dyn FnOnce(Result<Vec<(u64, u64)>, BlockError>) + Send>;

/// The buffer of a write, and how much of it earlier pieces have sent.
pub(super) type Payload = (Arc<IoBuffer>, u64);

/// What is done.
pub(super) enum Work {
    Read(IoBuffer),
    Write {
        buffer: Arc<IoBuffer>,
        fua: bool,
    },
    Flush,
    Trim,
    Zeroes {
        may_unmap: bool,
    },
    Status {
        context: u32,
        found: Vec<(u64, u64)>,
    },
}

/// Who is told.
pub(super) enum Told {
    Device(Token, Arc<dyn BlockCompleter>),
    Status(StatusDone),
}

/// A request that is not completed.
pub(super) struct Active {
    pub(super) work: Work,
    pub(super) told: Told,
    pub(super) operation: &'static str,
    pub(super) offset: u64,
    pub(super) length: u64,
    /// Bytes that earlier pieces have done.
    pub(super) done: u64,
    /// Bytes of the piece on its way.
    pub(super) piece: u64,
    /// Parts of the piece that came, in order of their place.
    pub(super) parts: Vec<(u64, u64)>,
    pub(super) failure: Option<Failure>,
    pub(super) is_sent: bool,
}

impl Active {
    pub(super) fn of_op(token: Token, op: BlockOp, to: Arc<dyn BlockCompleter>) -> Self {
        let (operation, offset, length) = op.describe();
        let work = match op {
            BlockOp::Read { buffer, .. } => Work::Read(buffer),
            BlockOp::Write { buffer, fua, .. } => Work::Write {
                buffer: Arc::new(buffer),
                fua,
            },
            BlockOp::Discard { .. } => Work::Trim,
            BlockOp::WriteZeroes { may_unmap, .. } => Work::Zeroes { may_unmap },
            BlockOp::Extents { .. } => Work::Status {
                context: 0,
                found: Vec::new(),
            },
            _ => Work::Flush,
        };
        Self::new(work, Told::Device(token, to), (operation, offset, length))
    }

    pub(super) fn new(
        work: Work,
        told: Told,
        (operation, offset, length): (&'static str, u64, u64),
    ) -> Self {
        Self {
            work,
            told,
            operation,
            offset,
            length,
            done: 0,
            piece: 0,
            parts: Vec::new(),
            failure: None,
            is_sent: false,
        }
    }

    /// The command for the next piece, and its payload.
    pub(super) fn next(&mut self, cookie: u64, agreed: &Agreed) -> (Request, Option<Payload>) {
        let (_, _, largest) = agreed.facts.block_bytes;
        let payload_max = u64::from(largest.min(PAYLOAD_BYTES_MAX));
        let left = self.length - self.done;
        let (command, most, mut flags) = match &self.work {
            Work::Read(_) => (Command::Read, payload_max, 0),
            Work::Write { fua, .. } => {
                let fua = if *fua { command_flag::FUA } else { 0 };
                (Command::Write, payload_max, fua)
            }
            Work::Flush => (Command::Flush, u64::MAX, 0),
            Work::Trim => (Command::Trim, RANGE_BYTES_MAX, 0),
            Work::Zeroes { may_unmap: true } => (Command::WriteZeroes, RANGE_BYTES_MAX, 0),
            Work::Zeroes { may_unmap: false } => {
                (Command::WriteZeroes, RANGE_BYTES_MAX, command_flag::NO_HOLE)
            }
            Work::Status { .. } => (Command::BlockStatus, RANGE_BYTES_MAX, 0),
        };
        if command == Command::Write && agreed.style == ReplyStyle::Extended {
            flags |= command_flag::PAYLOAD_LEN;
        }
        self.piece = left.min(most);
        self.parts.clear();
        self.is_sent = true;
        let offset = if command == Command::Flush {
            0
        } else {
            self.offset + self.done
        };
        let request = Request {
            flags,
            command,
            cookie,
            offset,
            length: self.piece,
        };
        let payload = match &self.work {
            Work::Write { buffer, .. } => Some((Arc::clone(buffer), self.done)),
            _ => None,
        };
        (request, payload)
    }

    /// Where a part of the present piece goes.
    pub(super) fn place(&mut self, offset: u64, length: u64) -> Result<&mut [u8], BadReply> {
        let bad = |what| BadReply { what };
        let start = self.offset + self.done;
        let end = start + self.piece;
        let until = offset.checked_add(length);
        if length == 0 || offset < start || until.is_none_or(|until| until > end) {
            return Err(bad("a part of a read that was not asked for"));
        }
        if self.parts.len() >= CHUNKS_MAX {
            return Err(bad("a read in too many parts"));
        }
        let at = self.parts.partition_point(|part| part.0 < offset);
        let follows = at.checked_sub(1).and_then(|before| self.parts.get(before));
        let overlaps = follows.is_some_and(|part| part.0 + part.1 > offset)
            || self
                .parts
                .get(at)
                .is_some_and(|part| part.0 < offset + length);
        if overlaps {
            return Err(bad("parts of a read that overlap"));
        }
        self.parts.insert(at, (offset, length));
        let from = usize::try_from(offset - self.offset).unwrap_or(usize::MAX);
        let to = usize::try_from(offset + length - self.offset).unwrap_or(usize::MAX);
        match &mut self.work {
            Work::Read(buffer) => buffer.get_mut(from..to),
            _ => None,
        }
        .ok_or(bad("data that was not asked for"))
    }

    /// Takes extents in.
    pub(super) fn extents(&mut self, id: u32, new: &[(u64, u64)]) -> Result<(), BadReply> {
        let bad = |what| BadReply { what };
        let Work::Status { context, found } = &mut self.work else {
            return Err(bad("extents that were not asked for"));
        };
        if id != *context {
            return Ok(());
        }
        if !self.parts.is_empty() {
            return Err(bad("extents of one context twice"));
        }
        let mut left = self.length - self.done;
        for (length, flags) in new {
            let length = (*length).min(left);
            left -= length;
            match found.last_mut() {
                Some(last) if last.1 == *flags => last.0 += length,
                _ if length > 0 => found.push((length, *flags)),
                _ => {}
            }
        }
        let taken = self.length - self.done - left;
        self.parts.push((self.offset + self.done, taken));
        Ok(())
    }

    /// The reply to a piece is over. Says whether the request is.
    pub(super) fn end_piece(&mut self) -> Result<bool, BadReply> {
        self.is_sent = false;
        if self.failure.is_some() {
            return Ok(true);
        }
        let came: u64 = self.parts.iter().map(|part| part.1).sum();
        match self.work {
            Work::Read(_) if came != self.piece => Err(BadReply {
                what: "a read that is not whole",
            }),
            Work::Status { .. } if came == 0 => Err(BadReply {
                what: "no extents of a context that was selected",
            }),
            Work::Status { .. } => {
                self.done += came;
                Ok(self.done >= self.length)
            }
            _ => {
                self.done += self.piece;
                Ok(self.done >= self.length)
            }
        }
    }

    fn error(&self, kind: BlockErrorKind) -> BlockError {
        BlockError {
            operation: self.operation,
            offset: self.offset,
            length: self.length,
            kind,
        }
    }

    /// Tells that the connection is lost.
    pub(super) fn lose(self, why: &str) {
        let kind = BlockErrorKind::Io {
            errno: libc::ENOTCONN,
            message: why.to_owned(),
        };
        let error = self.error(kind);
        self.tell(Err(error));
    }

    /// Tells what came of it.
    pub(super) fn complete(mut self) {
        let result = match self.failure.take() {
            Some(failed) => Err(self.error(kind_of(failed))),
            None => Ok(()),
        };
        self.tell(result);
    }

    fn tell(self, result: Result<(), BlockError>) {
        let offset = self.offset;
        match (self.told, self.work) {
            (Told::Status(done), Work::Status { found, .. }) => done(result.map(|()| found)),
            (Told::Status(done), _) => done(result.map(|()| Vec::new())),
            (Told::Device(token, to), work) => {
                let result = result.map(|()| match work {
                    Work::Read(buffer) => BlockOutcome::Data(buffer),
                    Work::Status { found, .. } => BlockOutcome::Extents(allocation(offset, &found)),
                    _ => BlockOutcome::Done,
                });
                to.complete(BlockCompletion { token, result });
            }
        }
    }
}

fn kind_of(failed: Failure) -> BlockErrorKind {
    match failed.code {
        error::EPERM => BlockErrorKind::ReadOnly,
        error::ENOTSUP => BlockErrorKind::NotSupported,
        error::ENOSPC => BlockErrorKind::NoSpace,
        error::ESHUTDOWN => BlockErrorKind::Closed,
        code => BlockErrorKind::Io {
            errno: i32::try_from(code).unwrap_or(libc::EIO),
            message: failed.message,
        },
    }
}

fn allocation(mut offset: u64, found: &[(u64, u64)]) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for (length, flags) in found {
        let kind = if flags & u64::from(state::ZERO) != 0 {
            ExtentKind::Zero
        } else {
            ExtentKind::Data
        };
        match extents.last_mut() {
            Some(last) if last.kind == kind => last.length += length,
            _ => extents.push(Extent {
                offset,
                length: *length,
                kind,
            }),
        }
        offset += length;
    }
    extents
}

/// Says whether the server can do it; what it cannot is refused here.
pub(super) fn is_known(work: &Work, agreed: &Agreed) -> bool {
    match work {
        Work::Read(_) | Work::Write { .. } | Work::Status { .. } | Work::Flush => true,
        Work::Trim => agreed.has(flag::SEND_TRIM),
        Work::Zeroes { .. } => agreed.has(flag::SEND_WRITE_ZEROES),
    }
}

impl Active {
    /// The command of the present piece.
    pub(super) fn command(&self) -> Command {
        match self.work {
            Work::Read(_) => Command::Read,
            Work::Write { .. } => Command::Write,
            Work::Flush => Command::Flush,
            Work::Trim => Command::Trim,
            Work::Zeroes { .. } => Command::WriteZeroes,
            Work::Status { .. } => Command::BlockStatus,
        }
    }
}
