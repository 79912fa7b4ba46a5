//! Replies of the transmission phase.

use afterimage_blockdev::{BlockError, BlockErrorKind};

use crate::number::{
    EXTENDED_REPLY_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk, error,
};
use crate::wire::{Cursor, Head, Put, length_u32};

/// Longest message of an error, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 1024;

/// Which replies were negotiated. Extended ones come with extended requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord, Default)]
pub enum ReplyStyle {
    /// One error number, and bytes.
    #[default]
    Simple,
    /// Chunks.
    Structured,
    /// Chunks with lengths of 64 bits.
    Extended,
}

/// Why a request failed, as the client is told.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message} (error {code})")]
pub struct Failure {
    /// A number of [`error`].
    pub code: u32,
    /// For people.
    pub message: String,
}

impl Failure {
    /// Makes one.
    #[must_use]
    pub fn new(code: u32, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { code, message }
    }
}

impl From<&BlockError> for Failure {
    fn from(failed: &BlockError) -> Self {
        let code = match &failed.kind {
            BlockErrorKind::Range => error::EINVAL,
            BlockErrorKind::ReadOnly => error::EPERM,
            BlockErrorKind::NotSupported => error::ENOTSUP,
            BlockErrorKind::NoSpace => error::ENOSPC,
            BlockErrorKind::Closed => error::ESHUTDOWN,
            BlockErrorKind::Io { errno, .. } if *errno == libc::ENOMEM => error::ENOMEM,
            _ => error::EIO,
        };
        Self::new(code, failed.to_string())
    }
}

/// The whole reply of a request that needs no payload.
#[must_use]
pub fn done(style: ReplyStyle, cookie: u64, offset: u64) -> Head {
    if style == ReplyStyle::Extended {
        return chunk_head(style, (chunk::DONE, chunk::NONE), (cookie, offset), 0);
    }
    simple(cookie, 0)
}

/// The head of a simple reply.
#[must_use]
pub fn simple(cookie: u64, code: u32) -> Head {
    let mut head = Head::new();
    head.put_u32(SIMPLE_REPLY_MAGIC);
    head.put_u32(code);
    head.put_u64(cookie);
    head
}

fn chunk_head(
    style: ReplyStyle,
    (flags, kind): (u16, u16),
    (cookie, offset): (u64, u64),
    length: usize,
) -> Head {
    let is_extended = style == ReplyStyle::Extended;
    let mut head = Head::new();
    head.put_u32(if is_extended {
        EXTENDED_REPLY_MAGIC
    } else {
        STRUCTURED_REPLY_MAGIC
    });
    head.put_u16(flags);
    head.put_u16(kind);
    head.put_u64(cookie);
    if is_extended {
        head.put_u64(offset);
        head.put_u64(u64::from(length_u32(length)));
    } else {
        head.put_u32(length_u32(length));
    }
    head
}

fn done_flag(is_last: bool) -> u16 {
    if is_last { chunk::DONE } else { 0 }
}

/// Before `length` bytes of data.
#[must_use]
pub fn data(
    style: ReplyStyle,
    is_last: bool,
    (cookie, asked): (u64, u64),
    offset: u64,
    length: usize,
) -> Head {
    if style == ReplyStyle::Simple {
        return simple(cookie, 0);
    }
    let flags = (done_flag(is_last), chunk::OFFSET_DATA);
    let mut head = chunk_head(style, flags, (cookie, asked), length + 8);
    head.put_u64(offset);
    head
}

/// A range that reads as zero; only for chunked replies.
#[must_use]
pub fn hole(
    style: ReplyStyle,
    is_last: bool,
    (cookie, asked): (u64, u64),
    offset: u64,
    length: usize,
) -> Head {
    let flags = (done_flag(is_last), chunk::OFFSET_HOLE);
    let mut head = chunk_head(style, flags, (cookie, asked), 12);
    head.put_u64(offset);
    head.put_u32(length_u32(length));
    head
}

/// An error, with its message where there is a place for one. It ends the reply.
#[must_use]
pub fn failure(style: ReplyStyle, cookie: u64, asked: u64, failed: &Failure) -> (Head, Vec<u8>) {
    if style == ReplyStyle::Simple {
        return (simple(cookie, failed.code), Vec::new());
    }
    let mut end = failed.message.len().min(MESSAGE_BYTES_MAX);
    while !failed.message.is_char_boundary(end) {
        end -= 1;
    }
    let message = failed.message.as_bytes().get(..end).unwrap_or_default();
    let flags = (chunk::DONE, chunk::ERROR);
    let mut head = chunk_head(style, flags, (cookie, asked), message.len() + 6);
    head.put_u32(failed.code);
    head.put_u16(u16::try_from(message.len()).unwrap_or(0));
    (head, message.to_vec())
}

/// Extents of one context: lengths and flags.
#[must_use]
pub fn block_status(
    style: ReplyStyle,
    is_last: bool,
    (cookie, asked): (u64, u64),
    context: u32,
    extents: &[(u64, u32)],
) -> (Head, Vec<u8>) {
    let mut body = Vec::with_capacity(8 + extents.len() * 16);
    body.put_u32(context);
    let kind = if style == ReplyStyle::Extended {
        body.put_u32(length_u32(extents.len()));
        for (length, flags) in extents {
            body.put_u64(*length);
            body.put_u64(u64::from(*flags));
        }
        chunk::BLOCK_STATUS_EXT
    } else {
        for (length, flags) in extents {
            body.put_u32(u32::try_from(*length).unwrap_or(u32::MAX));
            body.put_u32(*flags);
        }
        chunk::BLOCK_STATUS
    };
    let flags = (done_flag(is_last), kind);
    let head = chunk_head(style, flags, (cookie, asked), body.len());
    (head, body)
}

/// The head of a reply as a client reads it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReplyHead {
    /// A simple reply; data follows a successful read.
    Simple {
        /// Names the request.
        cookie: u64,
        /// 0 for success.
        code: u32,
    },
    /// A chunk, whose payload follows.
    Chunk {
        /// Names the request.
        cookie: u64,
        /// The last one of the reply.
        is_last: bool,
        /// A number of [`chunk`].
        kind: u16,
        /// Bytes of the payload.
        length: u64,
    },
}

/// What a client cannot make sense of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the server's reply is malformed: {what}")]
pub struct BadReply {
    /// What is wrong.
    pub what: &'static str,
}

/// Longest head.
pub const REPLY_HEAD_BYTES_MAX: usize = 32;

/// Reads the head of a reply: the head and its length, or `None` while bytes are missing.
///
/// # Errors
/// [`BadReply`] when the magic belongs to no reply of this style.
pub fn decode_head(
    style: ReplyStyle,
    bytes: &[u8],
) -> Result<Option<(ReplyHead, usize)>, BadReply> {
    let mut cursor = Cursor(bytes);
    let Some(magic) = cursor.u32() else {
        return Ok(None);
    };
    let read = match (magic, style) {
        (SIMPLE_REPLY_MAGIC, ReplyStyle::Simple | ReplyStyle::Structured) => {
            let mut read = || {
                let code = cursor.u32()?;
                let cookie = cursor.u64()?;
                Some((ReplyHead::Simple { cookie, code }, 16))
            };
            read()
        }
        (STRUCTURED_REPLY_MAGIC, ReplyStyle::Structured)
        | (EXTENDED_REPLY_MAGIC, ReplyStyle::Extended) => read_chunk(style, &mut cursor),
        _ => {
            return Err(BadReply {
                what: "it begins with another magic number",
            });
        }
    };
    Ok(read)
}

fn read_chunk(style: ReplyStyle, cursor: &mut Cursor<'_>) -> Option<(ReplyHead, usize)> {
    let flags = cursor.u16()?;
    let kind = cursor.u16()?;
    let cookie = cursor.u64()?;
    let (length, bytes) = if style == ReplyStyle::Extended {
        let _offset = cursor.u64()?;
        (cursor.u64()?, 32)
    } else {
        (u64::from(cursor.u32()?), 20)
    };
    let is_last = flags & chunk::DONE != 0;
    let head = ReplyHead::Chunk {
        cookie,
        is_last,
        kind,
        length,
    };
    Some((head, bytes))
}

/// Reads the payload of an error chunk.
///
/// # Errors
/// [`BadReply`].
pub fn decode_failure(payload: &[u8]) -> Result<Failure, BadReply> {
    let mut cursor = Cursor(payload);
    let mut read = || {
        let code = cursor.u32()?;
        let length = usize::from(cursor.u16()?);
        let message = String::from_utf8_lossy(cursor.take(length)?).into_owned();
        Some(Failure { code, message })
    };
    match read() {
        Some(failed) if failed.code != 0 => Ok(failed),
        _ => Err(BadReply {
            what: "an error without a number or with too short a message",
        }),
    }
}

/// Reads the payload of a chunk of extents: the context, and lengths and flags.
///
/// # Errors
/// [`BadReply`].
pub fn decode_status(
    is_extended: bool,
    payload: &[u8],
) -> Result<(u32, Vec<(u64, u64)>), BadReply> {
    let mut cursor = Cursor(payload);
    let mut read = || {
        let context = cursor.u32()?;
        let count = is_extended
            .then(|| cursor.u32())
            .map_or(Some(None), |n| n.map(Some))?;
        let mut extents = Vec::with_capacity(cursor.0.len() / 8);
        while !cursor.is_empty() {
            extents.push(if is_extended {
                (cursor.u64()?, cursor.u64()?)
            } else {
                (u64::from(cursor.u32()?), u64::from(cursor.u32()?))
            });
        }
        let is_counted = count.is_none_or(|count| count == length_u32(extents.len()));
        let is_legal = is_counted && !extents.is_empty() && extents.iter().all(|e| e.0 > 0);
        is_legal.then_some((context, extents))
    };
    read().ok_or(BadReply {
        what: "a list of extents that is empty or cut off",
    })
}

/// Reads where a chunk of data or a hole lies: offset, and the length of a hole.
///
/// # Errors
/// [`BadReply`].
pub fn decode_place(kind: u16, payload: &[u8]) -> Result<(u64, u32), BadReply> {
    let mut cursor = Cursor(payload);
    let mut read = || {
        let offset = cursor.u64()?;
        let length = if kind == chunk::OFFSET_HOLE {
            cursor.u32()?
        } else {
            0
        };
        Some((offset, length))
    };
    read().ok_or(BadReply {
        what: "a chunk without its place",
    })
}
