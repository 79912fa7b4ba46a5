//! Requests of the transmission phase, and what is legal in one.

use crate::number::{EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC, command, command_flag as flag, error};
use crate::reply::{Failure, ReplyStyle};
use crate::wire::{Cursor, Head, Put};

/// Most bytes of a payload, in both directions.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Contexts that one session may have.
pub const CONTEXTS_MAX: usize = 16;

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// Bytes.
    Read,
    /// Keeps bytes.
    Write,
    /// Ends the session.
    Disconnect,
    /// Makes durable what was answered.
    Flush,
    /// Gives a range up.
    Trim,
    /// Says that a range will be read.
    Cache,
    /// Makes a range zero.
    WriteZeroes,
    /// Asks for extents.
    BlockStatus,
    /// Something else.
    Unknown(u16),
}

impl Command {
    fn from_number(number: u16) -> Self {
        match number {
            command::READ => Self::Read,
            command::WRITE => Self::Write,
            command::DISCONNECT => Self::Disconnect,
            command::FLUSH => Self::Flush,
            command::TRIM => Self::Trim,
            command::CACHE => Self::Cache,
            command::WRITE_ZEROES => Self::WriteZeroes,
            command::BLOCK_STATUS => Self::BlockStatus,
            other => Self::Unknown(other),
        }
    }

    fn number(self) -> u16 {
        match self {
            Self::Read => command::READ,
            Self::Write => command::WRITE,
            Self::Disconnect => command::DISCONNECT,
            Self::Flush => command::FLUSH,
            Self::Trim => command::TRIM,
            Self::Cache => command::CACHE,
            Self::WriteZeroes => command::WRITE_ZEROES,
            Self::BlockStatus => command::BLOCK_STATUS,
            Self::Unknown(number) => number,
        }
    }

    fn writes(self) -> bool {
        matches!(self, Self::Write | Self::Trim | Self::WriteZeroes)
    }
}

/// One request, without its payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// `command_flag` bits.
    pub flags: u16,
    /// What is asked for.
    pub command: Command,
    /// Names the request; the client's choice.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Number of bytes, of the range or of the payload.
    pub length: u64,
}

/// The peer does not speak the protocol, or lost its place: nothing after this can be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a request begins with {found:#010x}: the peer does not speak what was negotiated")]
pub struct BadMagic {
    /// What came instead.
    pub found: u32,
}

impl Request {
    /// Bytes of a header.
    #[must_use]
    pub const fn header_bytes(style: ReplyStyle) -> usize {
        match style {
            ReplyStyle::Extended => 32,
            ReplyStyle::Simple | ReplyStyle::Structured => 28,
        }
    }

    /// Reads a header; `None` while bytes are missing.
    ///
    /// # Errors
    /// [`BadMagic`].
    pub fn decode(style: ReplyStyle, bytes: &[u8]) -> Result<Option<Self>, BadMagic> {
        let is_extended = style == ReplyStyle::Extended;
        let magic = if is_extended {
            EXTENDED_REQUEST_MAGIC
        } else {
            REQUEST_MAGIC
        };
        let mut cursor = Cursor(bytes);
        let mut read = || {
            let found = cursor.u32()?;
            if found != magic {
                return Some(Err(BadMagic { found }));
            }
            Some(Ok(Self {
                flags: cursor.u16()?,
                command: Command::from_number(cursor.u16()?),
                cookie: cursor.u64()?,
                offset: cursor.u64()?,
                length: if is_extended {
                    cursor.u64()?
                } else {
                    u64::from(cursor.u32()?)
                },
            }))
        };
        read().transpose()
    }

    /// Writes a header. A compact one holds the low 32 bits of the length.
    #[must_use]
    pub fn encode(&self, style: ReplyStyle) -> Head {
        let is_extended = style == ReplyStyle::Extended;
        let mut head = Head::new();
        head.put_u32(if is_extended {
            EXTENDED_REQUEST_MAGIC
        } else {
            REQUEST_MAGIC
        });
        head.put_u16(self.flags);
        head.put_u16(self.command.number());
        head.put_u64(self.cookie);
        head.put_u64(self.offset);
        if is_extended {
            head.put_u64(self.length);
        } else {
            head.put_u32(u32::try_from(self.length & u64::from(u32::MAX)).unwrap_or(0));
        }
        head
    }

    /// Says whether a flag is set.
    #[must_use]
    pub fn has(&self, bit: u16) -> bool {
        self.flags & bit != 0
    }

    /// Bytes that follow the header.
    #[must_use]
    pub fn payload_bytes(&self, style: ReplyStyle) -> u64 {
        let has_payload = style == ReplyStyle::Extended && self.has(flag::PAYLOAD_LEN);
        if self.command == Command::Write || has_payload {
            self.length
        } else {
            0
        }
    }
}

/// What requests of a session are measured by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bounds {
    /// Size of the export in bytes.
    pub size_bytes: u64,
    /// Smallest unit in bytes.
    pub block_bytes: u32,
    /// Says whether writes are refused.
    pub is_read_only: bool,
    /// What was negotiated.
    pub style: ReplyStyle,
    /// Selected contexts.
    pub context_count: usize,
}

/// Checks everything about a request that its header tells.
///
/// # Errors
/// The error that the client is told; a payload is still to be read and thrown away.
pub fn check(request: &Request, bounds: &Bounds) -> Result<(), Failure> {
    check_flags(request, bounds)?;
    if request.command.writes() && bounds.is_read_only {
        return Err(Failure::new(error::EPERM, "the export is read-only"));
    }
    match request.command {
        Command::Unknown(number) => Err(Failure::new(
            error::EINVAL,
            format!("command {number} is not known"),
        )),
        Command::Disconnect => Ok(()),
        Command::Flush if request.offset != 0 || request.length != 0 => Err(Failure::new(
            error::EINVAL,
            "a flush has neither offset nor length",
        )),
        Command::Flush => Ok(()),
        Command::BlockStatus if request.has(flag::PAYLOAD_LEN) => check_filter(request, bounds),
        Command::BlockStatus if bounds.context_count == 0 => Err(Failure::new(
            error::EINVAL,
            "no metadata context was selected",
        )),
        _ => check_range(request, request.length, bounds),
    }
}

fn check_flags(request: &Request, bounds: &Bounds) -> Result<(), Failure> {
    let is_structured = bounds.style != ReplyStyle::Simple;
    let payload = if bounds.style == ReplyStyle::Extended {
        flag::PAYLOAD_LEN
    } else {
        0
    };
    let legal = match request.command {
        Command::Read if is_structured => flag::FUA | flag::DF,
        Command::Write => flag::FUA | payload,
        Command::WriteZeroes => flag::FUA | flag::NO_HOLE | flag::FAST_ZERO,
        Command::BlockStatus => flag::FUA | flag::REQ_ONE | payload,
        _ => flag::FUA,
    };
    if request.flags & !legal == 0 {
        return Ok(());
    }
    let text = format!("flags {:#x} are not legal here", request.flags & !legal);
    Err(Failure::new(error::EINVAL, text))
}

fn check_filter(request: &Request, bounds: &Bounds) -> Result<(), Failure> {
    let longest = 8 + 4 * u64::try_from(CONTEXTS_MAX).unwrap_or(0);
    let is_legal = (8..=longest).contains(&request.length) && request.length.is_multiple_of(4);
    if is_legal && bounds.context_count > 0 {
        return Ok(());
    }
    Err(Failure::new(
        error::EINVAL,
        "the list of contexts is malformed",
    ))
}

/// Checks a range against the export.
///
/// # Errors
/// As [`check`].
pub fn check_range(request: &Request, length: u64, bounds: &Bounds) -> Result<(), Failure> {
    let block = u64::from(bounds.block_bytes);
    let has_payload = matches!(request.command, Command::Read | Command::Write);
    if has_payload && length > u64::from(PAYLOAD_BYTES_MAX) {
        let text = format!("{length} bytes at once, at most {PAYLOAD_BYTES_MAX}");
        return Err(Failure::new(error::EINVAL, text));
    }
    if length == 0 {
        return Err(Failure::new(error::EINVAL, "the range is empty"));
    }
    let end = request.offset.checked_add(length);
    if end.is_none_or(|end| end > bounds.size_bytes) {
        let code = match request.command {
            Command::Write | Command::WriteZeroes => error::ENOSPC,
            _ => error::EINVAL,
        };
        let size = bounds.size_bytes;
        return Err(Failure::new(
            code,
            format!("the range ends beyond the export of {size} bytes"),
        ));
    }
    if !request.offset.is_multiple_of(block) || !length.is_multiple_of(block) {
        let text = format!("the range is not aligned to {block} bytes");
        return Err(Failure::new(error::EINVAL, text));
    }
    Ok(())
}

/// Reads the payload of a BLOCK_STATUS with a list of contexts: length of the range, and their
/// numbers. `None` when it is malformed or names one twice.
#[must_use]
pub fn decode_filter(payload: &[u8]) -> Option<(u64, Vec<u32>)> {
    let mut cursor = Cursor(payload);
    let length = cursor.u64()?;
    let mut contexts = Vec::new();
    while !cursor.is_empty() {
        let id = cursor.u32()?;
        if contexts.contains(&id) || contexts.len() == CONTEXTS_MAX {
            return None;
        }
        contexts.push(id);
    }
    Some((length, contexts))
}
