//! The client's side of the handshake, as a machine without a socket.

use super::ClientError;
use crate::number::{
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, INIT_MAGIC, OPTION_MAGIC, flag, info, option_reply,
};
use crate::option::{
    ClientOption, ContextQuery, ExportFacts, OptionError, OptionReply, REPLY_HEAD_BYTES,
};
use crate::reply::ReplyStyle;
use crate::request::CONTEXTS_MAX;
use crate::wire::{Cursor, Put};

const GREETING_BYTES: usize = 18;
/// Replies to one option that are taken in.
const REPLIES_MAX: usize = 256;

/// What a client asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wish {
    /// The export.
    pub export: String,
    /// Metadata contexts; those that the server lacks are not there afterwards.
    pub contexts: Vec<String>,
    /// Asks for extended headers.
    pub allow_extended: bool,
}

/// What was agreed on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Agreed {
    /// The export.
    pub facts: ExportFacts,
    /// Headers of requests and replies.
    pub style: ReplyStyle,
    /// Numbers and names of the contexts.
    pub contexts: Vec<(u32, String)>,
}

impl Agreed {
    /// Says whether the server knows a command or a promise.
    #[must_use]
    pub fn has(&self, bit: u16) -> bool {
        self.facts.flags & flag::HAS_FLAGS != 0 && self.facts.flags & bit != 0
    }
}

/// What comes next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ClientStep {
    /// At least so many more bytes of the server; no more are part of the handshake.
    Need(usize),
    /// Transmission.
    Agreed(Agreed),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Greeting,
    Extended,
    Structured,
    Contexts,
    Go,
    Done,
}

/// The handshake of one connection.
#[derive(Debug)]
pub struct ClientNegotiation {
    wish: Wish,
    phase: Phase,
    input: Vec<u8>,
    output: Vec<u8>,
    agreed: Agreed,
    has_export: bool,
    replies: usize,
}

impl ClientNegotiation {
    /// Begins a handshake.
    #[must_use]
    pub fn new(wish: Wish) -> Self {
        Self {
            wish,
            phase: Phase::Greeting,
            input: Vec::new(),
            output: Vec::new(),
            agreed: Agreed {
                facts: ExportFacts::default(),
                style: ReplyStyle::Simple,
                contexts: Vec::new(),
            },
            has_export: false,
            replies: 0,
        }
    }

    /// Takes bytes of the server.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// Takes what is to be sent.
    pub fn take_output(&mut self) -> Vec<u8> {
        core::mem::take(&mut self.output)
    }

    /// Goes on as far as it can.
    ///
    /// # Errors
    /// [`ClientError`]; there is no way on then.
    pub fn step(&mut self) -> Result<ClientStep, ClientError> {
        loop {
            match self.phase {
                Phase::Done => return Ok(ClientStep::Agreed(self.agreed.clone())),
                Phase::Greeting => {
                    let missing = GREETING_BYTES.saturating_sub(self.input.len());
                    if missing > 0 {
                        return Ok(ClientStep::Need(missing));
                    }
                    self.greeting()?;
                }
                _ => {
                    let decoded = OptionReply::decode(&self.input);
                    let decoded = decoded.map_err(|error| unusable(&error.message))?;
                    let Some((reply, length)) = decoded else {
                        return Ok(ClientStep::Need(self.missing()));
                    };
                    self.input.drain(..length);
                    self.reply(&reply)?;
                }
            }
        }
    }

    /// Bytes that the reply at hand still lacks, as far as is known.
    fn missing(&self) -> usize {
        let mut cursor = Cursor(&self.input);
        let _magic_option_kind = (cursor.u64(), cursor.u32(), cursor.u32());
        let data = cursor.u32().and_then(|length| usize::try_from(length).ok());
        let whole = data.map_or(REPLY_HEAD_BYTES, |data| REPLY_HEAD_BYTES + data);
        whole.saturating_sub(self.input.len()).max(1)
    }

    fn greeting(&mut self) -> Result<(), ClientError> {
        let mut cursor = Cursor(&self.input);
        let magics = (cursor.u64(), cursor.u64());
        let flags = cursor.u16().unwrap_or(0);
        if magics != (Some(INIT_MAGIC), Some(OPTION_MAGIC)) || flags & FLAG_FIXED_NEWSTYLE == 0 {
            return Err(unusable(
                "it does not greet as a fixed newstyle server does",
            ));
        }
        self.input.drain(..GREETING_BYTES);
        let known = flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        self.output.put_u32(u32::from(known));
        if self.wish.allow_extended {
            self.send(Phase::Extended, &ClientOption::ExtendedHeaders);
        } else {
            self.send(Phase::Structured, &ClientOption::StructuredReply);
        }
        Ok(())
    }

    fn send(&mut self, phase: Phase, option: &ClientOption) {
        self.phase = phase;
        self.replies = 0;
        self.output.put(&option.encode());
    }

    fn go(&mut self) {
        let option = ClientOption::Info {
            name: self.wish.export.clone(),
            wanted: vec![info::BLOCK_SIZE],
            is_go: true,
        };
        self.send(Phase::Go, &option);
    }

    fn ask_contexts(&mut self) {
        if self.wish.contexts.is_empty() {
            return self.go();
        }
        let query = ContextQuery {
            export: self.wish.export.clone(),
            queries: self.wish.contexts.clone(),
        };
        let is_set = true;
        self.send(
            Phase::Contexts,
            &ClientOption::MetaContext { query, is_set },
        );
    }

    fn reply(&mut self, reply: &OptionReply) -> Result<(), ClientError> {
        self.replies += 1;
        if self.replies > REPLIES_MAX {
            return Err(unusable("it answers an option without an end"));
        }
        let expected = match self.phase {
            Phase::Extended => ClientOption::ExtendedHeaders.number(),
            Phase::Structured => ClientOption::StructuredReply.number(),
            Phase::Contexts => crate::number::option::SET_META_CONTEXT,
            _ => crate::number::option::GO,
        };
        if reply.number != expected {
            return Err(unusable("it answers another option than it was asked"));
        }
        let error = reply.error();
        let is_ack = reply.kind == option_reply::ACK;
        match (self.phase, error) {
            (Phase::Extended, Some(_)) => {
                self.send(Phase::Structured, &ClientOption::StructuredReply);
            }
            (Phase::Extended, None) if is_ack => {
                self.agreed.style = ReplyStyle::Extended;
                self.ask_contexts();
            }
            // Without structured replies there are no contexts.
            (Phase::Structured, Some(_)) => self.go(),
            (Phase::Structured, None) if is_ack => {
                self.agreed.style = ReplyStyle::Structured;
                self.ask_contexts();
            }
            (Phase::Contexts, Some(_)) => self.go(),
            (Phase::Contexts, None) if is_ack => self.go(),
            (Phase::Contexts, None) => self.context(reply)?,
            (Phase::Go, Some(why)) => {
                let what = format!("export {:?}", self.wish.export);
                return Err(ClientError::Refused { what, why });
            }
            (Phase::Go, None) if is_ack => self.agree()?,
            (Phase::Go, None) if reply.kind == option_reply::INFO => {
                let kind = Cursor(&reply.data).u16();
                self.has_export |= kind == Some(info::EXPORT);
                let learned = self.agreed.facts.learn(&reply.data);
                learned.map_err(|error| unusable(&error.message))?;
            }
            _ => {
                return Err(unusable(
                    "it answers with something else than was asked for",
                ));
            }
        }
        Ok(())
    }

    fn context(&mut self, reply: &OptionReply) -> Result<(), ClientError> {
        let found = reply
            .context()
            .filter(|_| reply.kind == option_reply::META_CONTEXT);
        let (id, name) = found.ok_or_else(|| unusable("a metadata context is malformed"))?;
        let is_known = self.agreed.contexts.iter().any(|known| known.0 == id);
        if is_known || self.agreed.contexts.len() == CONTEXTS_MAX {
            return Err(unusable("it gives metadata contexts one number"));
        }
        self.agreed.contexts.push((id, name));
        Ok(())
    }

    fn agree(&mut self) -> Result<(), ClientError> {
        if !self.has_export {
            return Err(unusable("it does not tell the size of the export"));
        }
        let (smallest, _, largest) = &mut self.agreed.facts.block_bytes;
        if *smallest == 0 && *largest == 0 {
            // It did not say: any size is good, up to the usual longest.
            (*smallest, *largest) = (1, crate::request::PAYLOAD_BYTES_MAX);
        }
        if !smallest.is_power_of_two() || *smallest > 1 << 16 || *largest < *smallest {
            return Err(unusable("its block sizes are impossible"));
        }
        self.phase = Phase::Done;
        Ok(())
    }
}

fn unusable(why: &str) -> ClientError {
    ClientError::Unusable(why.to_owned())
}

impl From<OptionError> for ClientError {
    fn from(error: OptionError) -> Self {
        Self::Unusable(error.message)
    }
}
