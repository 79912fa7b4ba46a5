//! The server's side of the handshake, as a machine without a socket.
//!
//! Invariants
//! * At most one option is worked on at a time; while it is the owner's turn nothing is read.
//! * STARTTLS forgets style and contexts, and refuses bytes that came behind it in the clear.
//! * Without TLS, where it is required, no option reaches the owner but STARTTLS.
//! * A context belongs to the export that it was selected for; another export has none.

use crate::export::ListedExport;
use crate::number::{
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, INIT_MAGIC, OPTION_MAGIC, flag, option, option_reply,
};
use crate::option::{
    ClientOption, ContextQuery, ExportFacts, OPTION_BYTES_DRAINED, OPTION_BYTES_MAX,
    OPTION_HEAD_BYTES, OptionError, OptionHead, put_reply,
};
use crate::reply::ReplyStyle;
use crate::request::CONTEXTS_MAX;
use crate::wire::{Cursor, Put, length_u32};

/// Whether a session may, must or cannot go over to TLS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TlsPolicy {
    /// There is none.
    Absent,
    /// Nothing is told without it.
    Required,
}

/// Why a session is over before transmission.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CloseReason {
    /// The client said so.
    #[error("the client ended the handshake")]
    Aborted,
    /// It breaks the rules of the handshake.
    #[error("the handshake is broken: {0}")]
    Broken(String),
    /// EXPORT_NAME has no other way to say no.
    #[error("the export was refused: {0}")]
    Refused(String),
}

/// What the owner of the machine is asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Question {
    /// Which exports there are; answer with [`Negotiation::listed`].
    List,
    /// Describe an export, and open it; answer with [`Negotiation::opened`].
    Open(String),
    /// Which contexts match; answer with [`Negotiation::contexts`].
    Contexts {
        /// Which.
        query: ContextQuery,
        /// They are selected, so each must be exact.
        is_set: bool,
    },
    /// Send what is there, go over to TLS, then call [`Negotiation::tls_started`].
    StartTls,
}

/// What comes next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// More bytes of the client.
    NeedInput,
    /// An answer of the owner.
    Ask(Question),
    /// Transmission, once the output was sent.
    Transmission(Session),
    /// The end, once the output was sent.
    Close(CloseReason),
}

/// What was agreed on.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Session {
    /// Headers of requests and replies.
    pub style: ReplyStyle,
    /// Names of the selected contexts; the number of one is its place, counted from 1.
    pub contexts: Vec<String>,
    /// Bytes that the client sent already.
    pub rest: Vec<u8>,
}

#[derive(PartialEq, Eq, Debug)]
enum Phase {
    ClientFlags,
    Options,
    Drain { number: u32, left: u64 },
    Asked(ClientOption),
    Over(Step),
}

/// The handshake of one connection.
#[derive(Debug)]
pub struct Negotiation {
    tls: TlsPolicy,
    is_secure: bool,
    phase: Phase,
    input: Vec<u8>,
    output: Vec<u8>,
    no_zeroes: bool,
    style: ReplyStyle,
    contexts: Option<(String, Vec<String>)>,
}

impl Negotiation {
    /// Begins a handshake; the greeting is in the output.
    #[must_use]
    pub fn new(tls: TlsPolicy) -> Self {
        let mut output = Vec::new();
        output.put_u64(INIT_MAGIC);
        output.put_u64(OPTION_MAGIC);
        output.put_u16(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        Self {
            tls,
            is_secure: false,
            phase: Phase::ClientFlags,
            input: Vec::new(),
            output,
            no_zeroes: false,
            style: ReplyStyle::Simple,
            contexts: None,
        }
    }

    /// Takes bytes of the client.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// Takes what is to be sent.
    pub fn take_output(&mut self) -> Vec<u8> {
        core::mem::take(&mut self.output)
    }

    /// Goes on as far as it can.
    pub fn step(&mut self) -> Step {
        loop {
            match &mut self.phase {
                Phase::Over(step) => return step.clone(),
                Phase::Asked(option) => return Step::Ask(question(option)),
                Phase::ClientFlags => {
                    let Some(flags) = Cursor(&self.input).u32() else {
                        return Step::NeedInput;
                    };
                    self.input.drain(..4);
                    self.client_flags(flags);
                }
                Phase::Drain { number, left } => {
                    let here = usize::try_from(*left).unwrap_or(usize::MAX);
                    let here = here.min(self.input.len());
                    self.input.drain(..here);
                    *left -= u64::try_from(here).unwrap_or(0);
                    if *left > 0 {
                        return Step::NeedInput;
                    }
                    let number = *number;
                    self.phase = Phase::Options;
                    let text = format!("an option has at most {OPTION_BYTES_MAX} bytes");
                    self.refuse(number, &OptionError::new(option_reply::ERR_TOO_BIG, text));
                }
                Phase::Options => match OptionHead::decode(&self.input) {
                    Err(error) => self.close(CloseReason::Broken(error.to_string())),
                    Ok(None) => return Step::NeedInput,
                    Ok(Some(head)) => {
                        if !self.option(head) {
                            return Step::NeedInput;
                        }
                    }
                },
            }
        }
    }

    fn client_flags(&mut self, flags: u32) {
        let known = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        if flags & !known != 0 {
            let text = format!("client flags {:#x} are not known", flags & !known);
            return self.close(CloseReason::Broken(text));
        }
        self.no_zeroes = flags & u32::from(FLAG_NO_ZEROES) != 0;
        self.phase = Phase::Options;
    }

    /// Works on one option; says whether it was there as a whole.
    fn option(&mut self, head: OptionHead) -> bool {
        let length = usize::try_from(head.length).unwrap_or(usize::MAX);
        if length > OPTION_BYTES_MAX {
            if length > OPTION_BYTES_DRAINED || head.number == option::EXPORT_NAME {
                let text = format!("an option of {length} bytes");
                self.close(CloseReason::Broken(text));
                return true;
            }
            self.input.drain(..OPTION_HEAD_BYTES);
            self.phase = Phase::Drain {
                number: head.number,
                left: u64::from(head.length),
            };
            return true;
        }
        let end = OPTION_HEAD_BYTES + length;
        let Some(data) = self.input.get(OPTION_HEAD_BYTES..end) else {
            return false;
        };
        let parsed = ClientOption::decode(head.number, data);
        self.input.drain(..end);
        self.parsed(head.number, parsed);
        true
    }

    fn parsed(&mut self, number: u32, parsed: Result<ClientOption, OptionError>) {
        let is_open = self.is_secure || self.tls != TlsPolicy::Required;
        let may_pass = matches!(number, option::STARTTLS | option::ABORT);
        if !is_open && !may_pass {
            let text = "this server tells nothing without TLS";
            let error = OptionError::new(option_reply::ERR_TLS_REQD, text);
            return self.refuse(number, &error);
        }
        match parsed {
            Err(error) => self.refuse(number, &error),
            Ok(ClientOption::Abort) => {
                self.reply(option::ABORT, option_reply::ACK, &[]);
                self.close(CloseReason::Aborted);
            }
            Ok(ClientOption::StartTls) => self.start_tls(),
            Ok(ClientOption::StructuredReply) => self.raise_style(number, ReplyStyle::Structured),
            Ok(ClientOption::ExtendedHeaders) => self.raise_style(number, ReplyStyle::Extended),
            Ok(ClientOption::MetaContext { .. }) if self.style == ReplyStyle::Simple => {
                let text = "structured replies come first";
                self.refuse(number, &OptionError::new(option_reply::ERR_INVALID, text));
            }
            Ok(option) => self.phase = Phase::Asked(option),
        }
    }

    fn start_tls(&mut self) {
        let number = option::STARTTLS;
        if self.is_secure {
            let text = "TLS is on already";
            return self.refuse(number, &OptionError::new(option_reply::ERR_INVALID, text));
        }
        if self.tls == TlsPolicy::Absent {
            let text = "there is no TLS on this socket";
            return self.refuse(number, &OptionError::new(option_reply::ERR_POLICY, text));
        }
        if !self.input.is_empty() {
            // Somebody on the way may have added it, to be taken for what TLS protects.
            let text = "something was sent in the clear behind STARTTLS";
            return self.close(CloseReason::Broken(text.to_owned()));
        }
        self.reply(number, option_reply::ACK, &[]);
        self.phase = Phase::Asked(ClientOption::StartTls);
    }

    /// TLS is on; what was negotiated before it counts no more.
    pub fn tls_started(&mut self) {
        self.is_secure = true;
        self.style = ReplyStyle::Simple;
        self.contexts = None;
        self.input.clear();
        self.phase = Phase::Options;
    }

    fn raise_style(&mut self, number: u32, style: ReplyStyle) {
        if self.style >= style {
            let text = "that is agreed on already";
            let code = if self.style > style {
                option_reply::ERR_INVALID
            } else {
                option_reply::ACK
            };
            if code != option_reply::ACK {
                return self.refuse(number, &OptionError::new(code, text));
            }
        }
        self.style = style;
        self.reply(number, option_reply::ACK, &[]);
    }

    /// Answers [`Question::List`].
    pub fn listed(&mut self, listed: Result<Vec<ListedExport>, OptionError>) {
        let number = option::LIST;
        match listed {
            Err(error) => self.refuse(number, &error),
            Ok(exports) => {
                for export in exports {
                    let mut data = Vec::new();
                    data.put_u32(length_u32(export.name.len()));
                    data.put(export.name.as_bytes());
                    data.put(export.description.as_bytes());
                    self.reply(number, option_reply::SERVER, &data);
                }
                self.reply(number, option_reply::ACK, &[]);
            }
        }
        self.phase = Phase::Options;
    }

    /// Answers [`Question::Open`]. The flags get what belongs to the style.
    pub fn opened(&mut self, opened: Result<ExportFacts, OptionError>) {
        let before = core::mem::replace(&mut self.phase, Phase::Options);
        let Phase::Asked(asked) = before else {
            self.phase = before;
            return;
        };
        let number = asked.number();
        match (opened, asked) {
            (Err(error), ClientOption::ExportName(_)) => {
                self.close(CloseReason::Refused(error.message));
            }
            (Err(error), _) => self.refuse(number, &error),
            (Ok(mut facts), ClientOption::ExportName(name)) => {
                facts.flags |= self.style_flags();
                self.output.put_u64(facts.size_bytes);
                self.output.put_u16(facts.flags);
                if !self.no_zeroes {
                    self.output.put(&[0; 124]);
                }
                self.begin(&name);
            }
            (
                Ok(mut facts),
                ClientOption::Info {
                    name,
                    wanted,
                    is_go,
                },
            ) => {
                facts.flags |= self.style_flags();
                for data in facts.infos(&wanted) {
                    self.reply(number, option_reply::INFO, &data);
                }
                self.reply(number, option_reply::ACK, &[]);
                if is_go {
                    self.begin(&name);
                }
            }
            (Ok(_), other) => self.phase = Phase::Asked(other),
        }
    }

    fn style_flags(&self) -> u16 {
        match self.style {
            ReplyStyle::Simple => 0,
            ReplyStyle::Structured => flag::SEND_DF,
            ReplyStyle::Extended => flag::SEND_DF | flag::BLOCK_STATUS_PAYLOAD,
        }
    }

    fn begin(&mut self, name: &str) {
        let contexts = match self.contexts.take() {
            Some((export, contexts)) if export == name => contexts,
            _ => Vec::new(),
        };
        self.phase = Phase::Over(Step::Transmission(Session {
            style: self.style,
            contexts,
            rest: core::mem::take(&mut self.input),
        }));
    }

    /// Answers [`Question::Contexts`]: names that exist and match.
    pub fn contexts(&mut self, found: Result<Vec<String>, OptionError>) {
        let before = core::mem::replace(&mut self.phase, Phase::Options);
        let Phase::Asked(ClientOption::MetaContext { query, is_set }) = before else {
            self.phase = before;
            return;
        };
        let number = ClientOption::MetaContext {
            query: query.clone(),
            is_set,
        }
        .number();
        if is_set {
            self.contexts = None;
        }
        match found {
            Err(error) => self.refuse(number, &error),
            Ok(mut names) => {
                if is_set {
                    names.truncate(CONTEXTS_MAX);
                }
                for (id, name) in (1u32..).zip(&names) {
                    let mut data = Vec::new();
                    data.put_u32(if is_set { id } else { 0 });
                    data.put(name.as_bytes());
                    self.reply(number, option_reply::META_CONTEXT, &data);
                }
                self.reply(number, option_reply::ACK, &[]);
                if is_set {
                    self.contexts = Some((query.export, names));
                }
            }
        }
    }

    fn reply(&mut self, number: u32, kind: u32, data: &[u8]) {
        put_reply(&mut self.output, number, kind, data);
    }

    fn refuse(&mut self, number: u32, error: &OptionError) {
        if number == option::EXPORT_NAME {
            return self.close(CloseReason::Refused(error.message.clone()));
        }
        self.reply(number, error.code, error.message.as_bytes());
    }

    fn close(&mut self, reason: CloseReason) {
        self.input.clear();
        self.phase = Phase::Over(Step::Close(reason));
    }
}

fn question(option: &ClientOption) -> Question {
    match option {
        ClientOption::ExportName(name) | ClientOption::Info { name, .. } => {
            Question::Open(name.clone())
        }
        ClientOption::MetaContext { query, is_set } => Question::Contexts {
            query: query.clone(),
            is_set: *is_set,
        },
        ClientOption::StartTls => Question::StartTls,
        _ => Question::List,
    }
}

#[cfg(test)]
mod tests;
