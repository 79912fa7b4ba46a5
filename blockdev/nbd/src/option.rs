//! Options of the handshake and the replies to them, for both sides.

use crate::number::{OPTION_MAGIC, OPTION_REPLY_MAGIC, info, option, option_reply};
use crate::wire::{Cursor, Put, length_u32};

/// Longest data of an option that is looked at.
pub const OPTION_BYTES_MAX: usize = 64 << 10;
/// Longest data of an option that is read and thrown away; a longer one ends the session.
pub const OPTION_BYTES_DRAINED: usize = 16 << 20;
/// Longest name or query, in bytes.
pub const NAME_BYTES_MAX: usize = 4096;
/// Queries of one option.
pub const QUERIES_MAX: usize = 64;
/// Bytes before an option's data.
pub const OPTION_HEAD_BYTES: usize = 16;
/// Bytes before the data of a reply.
pub const REPLY_HEAD_BYTES: usize = 20;

/// Why an option is answered with an error.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message}")]
pub struct OptionError {
    /// A number of [`option_reply`].
    pub code: u32,
    /// For people.
    pub message: String,
}

impl OptionError {
    /// Makes one.
    #[must_use]
    pub fn new(code: u32, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { code, message }
    }

    fn invalid(message: &str) -> Self {
        Self::new(option_reply::ERR_INVALID, message)
    }
}

/// Names contexts of an export.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ContextQuery {
    /// The export.
    pub export: String,
    /// Contexts, or what they begin with.
    pub queries: Vec<String>,
}

/// What a client asks for in the handshake.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ClientOption {
    /// Transmission, without any further answer.
    ExportName(String),
    /// The end.
    Abort,
    /// All exports.
    List,
    /// TLS.
    StartTls,
    /// Details of an export, and transmission if `is_go`.
    Info {
        /// The export.
        name: String,
        /// Details asked for, numbers of [`info`].
        wanted: Vec<u16>,
        /// Begins transmission.
        is_go: bool,
    },
    /// Structured replies.
    StructuredReply,
    /// Extended headers, and structured replies.
    ExtendedHeaders,
    /// Contexts; selects them if `is_set`.
    MetaContext {
        /// Which.
        query: ContextQuery,
        /// Selects them.
        is_set: bool,
    },
}

fn text(bytes: &[u8]) -> Result<String, OptionError> {
    if bytes.len() > NAME_BYTES_MAX {
        return Err(OptionError::new(
            option_reply::ERR_TOO_BIG,
            format!("a name has at most {NAME_BYTES_MAX} bytes"),
        ));
    }
    match core::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
        _ => Err(OptionError::invalid("a name is UTF-8 without NUL")),
    }
}

impl ClientOption {
    /// Reads an option.
    ///
    /// # Errors
    /// [`OptionError`], which is the reply; with EXPORT_NAME there is no reply but the end.
    pub fn decode(number: u32, data: &[u8]) -> Result<Self, OptionError> {
        let bare = |parsed: Self| {
            if data.is_empty() {
                Ok(parsed)
            } else {
                Err(OptionError::invalid("this option has no data"))
            }
        };
        match number {
            option::EXPORT_NAME => text(data).map(Self::ExportName),
            // Data that does not belong there is no reason to stay.
            option::ABORT => Ok(Self::Abort),
            option::LIST => bare(Self::List),
            option::STARTTLS => bare(Self::StartTls),
            option::STRUCTURED_REPLY => bare(Self::StructuredReply),
            option::EXTENDED_HEADERS => bare(Self::ExtendedHeaders),
            option::INFO | option::GO => decode_info(number == option::GO, data),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                let query = decode_query(data)?;
                let is_set = number == option::SET_META_CONTEXT;
                Ok(Self::MetaContext { query, is_set })
            }
            _ => Err(OptionError::new(
                option_reply::ERR_UNSUP,
                format!("option {number} is not known"),
            )),
        }
    }

    /// The option's number.
    #[must_use]
    pub fn number(&self) -> u32 {
        match self {
            Self::ExportName(_) => option::EXPORT_NAME,
            Self::Abort => option::ABORT,
            Self::List => option::LIST,
            Self::StartTls => option::STARTTLS,
            Self::Info { is_go: false, .. } => option::INFO,
            Self::Info { is_go: true, .. } => option::GO,
            Self::StructuredReply => option::STRUCTURED_REPLY,
            Self::ExtendedHeaders => option::EXTENDED_HEADERS,
            Self::MetaContext { is_set: false, .. } => option::LIST_META_CONTEXT,
            Self::MetaContext { is_set: true, .. } => option::SET_META_CONTEXT,
        }
    }

    /// Writes the option with its head.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut data = Vec::new();
        match self {
            Self::ExportName(name) => data.put(name.as_bytes()),
            Self::Info { name, wanted, .. } => {
                data.put_u32(length_u32(name.len()));
                data.put(name.as_bytes());
                data.put_u16(u16::try_from(wanted.len()).unwrap_or(u16::MAX));
                for kind in wanted {
                    data.put_u16(*kind);
                }
            }
            Self::MetaContext { query, .. } => {
                data.put_u32(length_u32(query.export.len()));
                data.put(query.export.as_bytes());
                data.put_u32(length_u32(query.queries.len()));
                for one in &query.queries {
                    data.put_u32(length_u32(one.len()));
                    data.put(one.as_bytes());
                }
            }
            _ => {}
        }
        let mut bytes = Vec::with_capacity(OPTION_HEAD_BYTES + data.len());
        bytes.put_u64(OPTION_MAGIC);
        bytes.put_u32(self.number());
        bytes.put_u32(length_u32(data.len()));
        bytes.put(&data);
        bytes
    }
}

fn decode_info(is_go: bool, data: &[u8]) -> Result<ClientOption, OptionError> {
    let short = || OptionError::invalid("the option is cut off or too long");
    let mut cursor = Cursor(data);
    let name = text(cursor.prefixed().ok_or_else(short)?)?;
    let count = cursor.u16().ok_or_else(short)?;
    let mut wanted = Vec::new();
    for _ in 0..count {
        wanted.push(cursor.u16().ok_or_else(short)?);
    }
    if !cursor.is_empty() {
        return Err(short());
    }
    Ok(ClientOption::Info {
        name,
        wanted,
        is_go,
    })
}

fn decode_query(data: &[u8]) -> Result<ContextQuery, OptionError> {
    let short = || OptionError::invalid("the option is cut off or too long");
    let mut cursor = Cursor(data);
    let export = text(cursor.prefixed().ok_or_else(short)?)?;
    let count = cursor.u32().ok_or_else(short)?;
    if count > length_u32(QUERIES_MAX) {
        return Err(OptionError::new(
            option_reply::ERR_TOO_BIG,
            format!("at most {QUERIES_MAX} queries at once"),
        ));
    }
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(text(cursor.prefixed().ok_or_else(short)?)?);
    }
    if !cursor.is_empty() {
        return Err(short());
    }
    Ok(ContextQuery { export, queries })
}

/// The head of an option as it came: number and length of the data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OptionHead {
    /// The option.
    pub number: u32,
    /// Bytes of its data.
    pub length: u32,
}

impl OptionHead {
    /// Reads a head; `None` while bytes are missing.
    ///
    /// # Errors
    /// When the magic is another: nothing after it can be read.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, OptionError> {
        let mut cursor = Cursor(bytes);
        match cursor.u64() {
            None => Ok(None),
            Some(OPTION_MAGIC) => {
                let mut read = || {
                    let number = cursor.u32()?;
                    let length = cursor.u32()?;
                    Some(Self { number, length })
                };
                Ok(read())
            }
            Some(_) => Err(OptionError::invalid("an option begins with another magic")),
        }
    }
}

/// Appends a reply to an option.
pub(crate) fn put_reply(out: &mut Vec<u8>, number: u32, kind: u32, data: &[u8]) {
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(number);
    out.put_u32(kind);
    out.put_u32(length_u32(data.len()));
    out.put(data);
}

/// What is told of an export before transmission.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ExportFacts {
    /// Size in bytes.
    pub size_bytes: u64,
    /// Numbers of [`crate::number::flag`].
    pub flags: u16,
    /// Smallest, best and largest request in bytes.
    pub block_bytes: (u32, u32, u32),
    /// The export's own name.
    pub name: String,
    /// A text for people; may be empty.
    pub description: String,
}

impl ExportFacts {
    /// The data of INFO replies, those that every client gets and those that are wanted.
    pub(crate) fn infos(&self, wanted: &[u16]) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        let mut with = |kind: u16, fill: &dyn Fn(&mut Vec<u8>)| {
            let mut data = Vec::new();
            data.put_u16(kind);
            fill(&mut data);
            all.push(data);
        };
        if wanted.contains(&info::NAME) {
            with(info::NAME, &|data| data.put(self.name.as_bytes()));
        }
        if wanted.contains(&info::DESCRIPTION) && !self.description.is_empty() {
            with(info::DESCRIPTION, &|data| {
                data.put(self.description.as_bytes());
            });
        }
        with(info::BLOCK_SIZE, &|data| {
            let (smallest, best, largest) = self.block_bytes;
            data.put_u32(smallest);
            data.put_u32(best);
            data.put_u32(largest);
        });
        with(info::EXPORT, &|data| {
            data.put_u64(self.size_bytes);
            data.put_u16(self.flags);
        });
        all
    }

    /// Takes one INFO reply in. What is not known is passed over.
    ///
    /// # Errors
    /// When a known one is malformed.
    pub fn learn(&mut self, data: &[u8]) -> Result<(), OptionError> {
        let malformed = || OptionError::invalid("a detail of the export is malformed");
        let mut cursor = Cursor(data);
        let kind = cursor.u16().ok_or_else(malformed)?;
        let mut read = || {
            match kind {
                info::EXPORT => {
                    self.size_bytes = cursor.u64()?;
                    self.flags = cursor.u16()?;
                }
                info::BLOCK_SIZE => {
                    self.block_bytes = (cursor.u32()?, cursor.u32()?, cursor.u32()?);
                }
                _ => return Some(()),
            }
            cursor.is_empty().then_some(())
        };
        read().ok_or_else(malformed)
    }
}

/// One reply to an option as a client reads it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OptionReply {
    /// The option that it answers.
    pub number: u32,
    /// A number of [`option_reply`].
    pub kind: u32,
    /// Its data.
    pub data: Vec<u8>,
}

impl OptionReply {
    /// Reads a reply: it and its length, or `None` while bytes are missing.
    ///
    /// # Errors
    /// When the magic is another, or the data longer than any reply of use.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, OptionError> {
        let mut cursor = Cursor(bytes);
        match cursor.u64() {
            None => return Ok(None),
            Some(OPTION_REPLY_MAGIC) => {}
            Some(_) => return Err(OptionError::invalid("a reply begins with another magic")),
        }
        let mut head = || Some((cursor.u32()?, cursor.u32()?, cursor.u32()?));
        let Some((number, kind, length)) = head() else {
            return Ok(None);
        };
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length > OPTION_BYTES_MAX {
            return Err(OptionError::invalid("a reply is longer than any of use"));
        }
        let Some(data) = cursor.take(length) else {
            return Ok(None);
        };
        let data = data.to_vec();
        let read = REPLY_HEAD_BYTES + length;
        Ok(Some((Self { number, kind, data }, read)))
    }

    /// The error that the reply is, if it is one.
    #[must_use]
    pub fn error(&self) -> Option<OptionError> {
        if self.kind & option_reply::ERROR == 0 {
            return None;
        }
        let message = String::from_utf8_lossy(&self.data);
        let message = if message.is_empty() {
            format!("the server refuses option {}", self.number)
        } else {
            message.into_owned()
        };
        Some(OptionError::new(self.kind, message))
    }

    /// Number and name of a context.
    #[must_use]
    pub fn context(&self) -> Option<(u32, String)> {
        let mut cursor = Cursor(&self.data);
        let id = cursor.u32()?;
        let name = core::str::from_utf8(cursor.0).ok()?;
        Some((id, name.to_owned()))
    }

    /// The name of a listed export.
    #[must_use]
    pub fn server(&self) -> Option<String> {
        let name = Cursor(&self.data).prefixed()?;
        Some(core::str::from_utf8(name).ok()?.to_owned())
    }
}
