//! The receiving side of a connection, without sockets. The shell feeds it what the peer says and
//! what the engine tells, and does what it answers.
//!
//! Invariants
//! * Nothing is acted on before a `Hello` of the same version, and no stream before its `Open` was
//!   granted; a message for a refused stream is dropped, since the peer may not know yet.
//! * Within a stream LSNs of frames, numbers of bulk frames and numbers of questions only rise.
//! * `outstanding_bytes` is the sum over the frames that were taken and not yet acknowledged *to
//!   the peer*. It never exceeds the largest credit that the peer was told, but for one frame when
//!   nothing else is outstanding.
//! * No message of the peer makes it panic, and it holds at most `streams_max` streams.
//!
//! Whether a frame follows without a gap is the engine's to judge: only a frame that begins an
//! epoch may leave one, and frames are opaque here.

mod stream;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use afterimage_blockdev::{
    AgentId, DiskId, Epoch, ErrorClass, HistoryId, Lsn, MachineId, Timestamp,
};

use crate::message::{
    COMPARE_BLOCKS_MAX, DiskDescription, ForkPoint, FromReceiver, FromSender, MarkRequestKind,
    NAME_BYTES_MAX, PROTOCOL_VERSION, Refusal, RefusalCode, SourceReport, StreamId,
};
pub use stream::StreamIdentity;
use stream::{Phase, Stream};

/// What a receiver is allowed to take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Most streams of one connection, refused ones included.
    pub streams_max: usize,
    /// Most disks that a stream may declare.
    pub disks_max: usize,
}

/// An `Open` as the peer asks for it. Whether the carrier may is for the shell to check.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OpenWanted {
    /// The stream's name.
    pub stream: StreamId,
    /// The machine's name.
    pub name: String,
    /// Where the history forked off.
    pub parent: Option<ForkPoint>,
    /// Whose records.
    pub identity: StreamIdentity,
}

/// What the shell does next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Nothing.
    None,
    /// Tells the peer.
    Send(FromReceiver),
    /// Asks for a stream; answered with [`Receiver::opened`] or [`Receiver::refuse`].
    Open(OpenWanted),
    /// Declares a disk; the answer is a `Disk` message or [`Receiver::refuse`].
    Declare {
        /// The stream.
        stream: StreamId,
        /// The disk.
        description: DiskDescription,
    },
    /// Checks a frame against the identity, and appends it.
    Append {
        /// The stream.
        stream: StreamId,
        /// Whose records it must hold.
        identity: StreamIdentity,
        /// LSN that its first record must have.
        first: Lsn,
        /// LSN that its last record must have.
        last: Lsn,
        /// The frame.
        bytes: Vec<u8>,
    },
    /// Checks a bulk frame against the identity, and stores it.
    Bulk {
        /// The stream.
        stream: StreamId,
        /// Whose records it must hold.
        identity: StreamIdentity,
        /// The frame's number.
        number: u64,
        /// The frame.
        bytes: Vec<u8>,
    },
    /// Compares tags; the answer is a `Differences` message.
    Compare {
        /// The stream.
        stream: StreamId,
        /// The question's number.
        number: u64,
        /// The disk.
        disk: DiskId,
        /// First block.
        first_block: u64,
        /// Tags of the source.
        tags: Vec<[u8; 16]>,
    },
    /// Keeps a report.
    Report {
        /// The stream.
        stream: StreamId,
        /// The report.
        report: SourceReport,
    },
    /// Ends a stream.
    Close {
        /// The stream.
        stream: StreamId,
    },
    /// Tells the peer, and ends the stream.
    RefuseStream {
        /// The stream.
        stream: StreamId,
        /// What the peer is told.
        message: FromReceiver,
    },
    /// Tells the peer, and ends the connection with all its streams.
    HangUp(FromReceiver),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    WaitsForHello,
    Ready,
    Over,
}

/// The state of one connection.
#[derive(Debug)]
pub struct Receiver {
    limits: Limits,
    state: State,
    streams: BTreeMap<StreamId, Stream>,
    freed_bytes: u64,
}

impl Receiver {
    /// Makes the state of a new connection.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            state: State::WaitsForHello,
            streams: BTreeMap::new(),
            freed_bytes: 0,
        }
    }

    /// Takes a message of the peer. `now` and `program` go into a `Welcome`.
    pub fn message(&mut self, message: FromSender, now: Timestamp, program: &str) -> Action {
        match self.take(message, now, program) {
            Ok(action) => action,
            Err(Fault::Stream(stream, refusal)) => match self.refuse(stream, refusal) {
                Some(message) => Action::RefuseStream { stream, message },
                None => Action::None,
            },
            Err(Fault::Connection(refusal)) => {
                self.state = State::Over;
                Action::HangUp(FromReceiver::Refused {
                    stream: None,
                    refusal,
                })
            }
        }
    }

    fn take(
        &mut self,
        message: FromSender,
        now: Timestamp,
        program: &str,
    ) -> Result<Action, Fault> {
        match (self.state, message) {
            (State::Over, _) => Ok(Action::None),
            (State::WaitsForHello, FromSender::Hello { version, .. }) => {
                self.hello(version, now, program)
            }
            (State::WaitsForHello, _) => Err(violation("the first message is not a hello")),
            (State::Ready, FromSender::Hello { .. }) => Err(violation("a second hello")),
            (
                State::Ready,
                FromSender::Open {
                    stream,
                    machine,
                    name,
                    history,
                    parent,
                    origin,
                    epoch,
                },
            ) => {
                let identity = StreamIdentity {
                    machine,
                    history,
                    origin,
                    epoch,
                };
                self.open(OpenWanted {
                    stream,
                    name,
                    parent,
                    identity,
                })
            }
            (State::Ready, message) => self.on_stream(message),
        }
    }

    fn hello(&mut self, version: u16, now: Timestamp, program: &str) -> Result<Action, Fault> {
        if version != PROTOCOL_VERSION {
            return Err(Fault::Connection(Refusal {
                code: RefusalCode::Version,
                class: ErrorClass::Operator,
                message: format!(
                    "protocol version {version} is not spoken here, only {PROTOCOL_VERSION}"
                ),
                hint: "bring agent and appliance to the same release".to_owned(),
            }));
        }
        self.state = State::Ready;
        Ok(Action::Send(FromReceiver::Welcome {
            version: PROTOCOL_VERSION,
            program: program.to_owned(),
            time: now,
        }))
    }

    fn open(&mut self, wanted: OpenWanted) -> Result<Action, Fault> {
        let stream = wanted.stream;
        match self.streams.get(&stream) {
            Some(known) if !known.is_refused() => {
                return Err(violation("a stream is opened twice"));
            }
            None if self.streams.len() >= self.limits.streams_max => {
                return Err(Fault::Connection(limit("streams", self.limits.streams_max)));
            }
            _ => {}
        }
        if let Err(refusal) = check_name(&wanted.name) {
            self.streams.insert(stream, Stream::new(wanted.identity));
            return Err(Fault::Stream(stream, refusal));
        }
        let identity = wanted.identity;
        if identity.machine.is_nil() || identity.history.is_nil() || identity.origin.is_nil() {
            return Err(violation("a stream without identity"));
        }
        self.streams.insert(stream, Stream::new(identity));
        Ok(Action::Open(wanted))
    }

    fn on_stream(&mut self, message: FromSender) -> Result<Action, Fault> {
        let id = match &message {
            FromSender::Declare { stream, .. }
            | FromSender::Frame { stream, .. }
            | FromSender::Bulk { stream, .. }
            | FromSender::Compare { stream, .. }
            | FromSender::Report { stream, .. }
            | FromSender::Close { stream } => *stream,
            FromSender::Hello { .. } | FromSender::Open { .. } => {
                return Err(violation("out of order"));
            }
        };
        let disks_max = self.limits.disks_max;
        let Some(stream) = self.streams.get_mut(&id) else {
            return Err(violation("a message for a stream that was never opened"));
        };
        match stream.phase {
            Phase::Refused => {
                if matches!(message, FromSender::Close { .. }) {
                    self.streams.remove(&id);
                }
                return Ok(Action::None);
            }
            Phase::Opening => return Err(violation("a message before the stream was opened")),
            Phase::Open => {}
        }
        let at = |refusal| Fault::Stream(id, refusal);
        match message {
            FromSender::Declare {
                stream: _,
                description,
            } => {
                stream.declare(&description, disks_max).map_err(at)?;
                Ok(Action::Declare {
                    stream: id,
                    description,
                })
            }
            FromSender::Frame {
                stream: _,
                first,
                last,
                bytes,
            } => {
                stream.take_frame(first, last, bytes.len()).map_err(at)?;
                Ok(Action::Append {
                    stream: id,
                    identity: stream.identity,
                    first,
                    last,
                    bytes,
                })
            }
            FromSender::Bulk {
                stream: _,
                number,
                bytes,
            } => {
                stream.take_bulk(number, bytes.len()).map_err(at)?;
                Ok(Action::Bulk {
                    stream: id,
                    identity: stream.identity,
                    number,
                    bytes,
                })
            }
            FromSender::Compare {
                stream: _,
                number,
                disk,
                first_block,
                tags,
            } => {
                stream
                    .take_question(number, disk, first_block, tags.len())
                    .map_err(at)?;
                Ok(Action::Compare {
                    stream: id,
                    number,
                    disk,
                    first_block,
                    tags,
                })
            }
            FromSender::Report { stream: _, report } => {
                stream.check_report(&report, disks_max).map_err(at)?;
                Ok(Action::Report { stream: id, report })
            }
            FromSender::Close { .. } => {
                self.freed_bytes += stream.refuse();
                self.streams.remove(&id);
                Ok(Action::Close { stream: id })
            }
            FromSender::Hello { .. } | FromSender::Open { .. } => Err(violation("out of order")),
        }
    }

    /// The engine has granted a stream. `None` when it is over by now.
    pub fn opened(
        &mut self,
        id: StreamId,
        durable: Lsn,
        highest: Lsn,
        credit_bytes: u64,
        tag_key: [u8; 32],
    ) -> Option<FromReceiver> {
        let stream = self.streams.get_mut(&id)?;
        if stream.phase != Phase::Opening {
            return None;
        }
        stream.open(durable, credit_bytes);
        Some(FromReceiver::Opened {
            stream: id,
            durable,
            highest,
            credit_bytes,
            tag_key,
        })
    }

    /// Refuses a stream, by the engine or the shell. `None` when the peer was told before.
    pub fn refuse(&mut self, id: StreamId, refusal: Refusal) -> Option<FromReceiver> {
        let stream = self.streams.get_mut(&id)?;
        if stream.is_refused() {
            return None;
        }
        self.freed_bytes += stream.refuse();
        Some(FromReceiver::Refused {
            stream: Some(id),
            refusal,
        })
    }

    /// Everything of a stream up to `durable` is durable. `None` when the stream is not open.
    pub fn durable(
        &mut self,
        id: StreamId,
        durable: Lsn,
        credit_bytes: u64,
    ) -> Option<FromReceiver> {
        let stream = self.streams.get_mut(&id)?;
        if stream.phase != Phase::Open {
            return None;
        }
        self.freed_bytes += stream.settle(durable, credit_bytes);
        let durable = stream.acknowledged;
        Some(FromReceiver::Acknowledged {
            stream: id,
            durable,
            credit_bytes,
        })
    }

    /// These bulk frames of a stream are durable. `None` when the stream is not open.
    pub fn bulk_durable(&mut self, id: StreamId, numbers: Vec<u64>) -> Option<FromReceiver> {
        let stream = self.streams.get_mut(&id)?;
        if stream.phase != Phase::Open || numbers.is_empty() {
            return None;
        }
        self.freed_bytes += stream.settle_bulk(&numbers);
        Some(FromReceiver::BulkAcknowledged {
            stream: id,
            numbers,
        })
    }

    /// A mark is wanted of a stream. `None` when it is not open.
    pub fn place_mark(
        &mut self,
        id: StreamId,
        request: u64,
        kind: MarkRequestKind,
        name: String,
    ) -> Option<FromReceiver> {
        self.is_open(id).then_some(FromReceiver::PlaceMark {
            stream: id,
            request,
            kind,
            name,
        })
    }

    /// Says whether a stream is open.
    #[must_use]
    pub fn is_open(&self, id: StreamId) -> bool {
        self.streams
            .get(&id)
            .is_some_and(|stream| stream.phase == Phase::Open)
    }

    /// LSN of the newest record that was taken of an open stream.
    #[must_use]
    pub fn taken(&self, id: StreamId) -> Option<Lsn> {
        let stream = self.streams.get(&id)?;
        (stream.phase == Phase::Open).then_some(stream.last)
    }

    /// Says whether the connection has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// Bytes of frames that were taken and not yet acknowledged, in all streams.
    #[must_use]
    pub fn outstanding_bytes(&self) -> u64 {
        self.streams
            .values()
            .map(|stream| stream.outstanding_bytes)
            .sum()
    }

    /// Bytes of frames that are no longer outstanding since this was last asked.
    pub fn take_freed_bytes(&mut self) -> u64 {
        core::mem::take(&mut self.freed_bytes)
    }
}

enum Fault {
    Stream(StreamId, Refusal),
    Connection(Refusal),
}

fn damaged(message: impl Into<String>) -> Refusal {
    Refusal {
        code: RefusalCode::Damaged,
        class: ErrorClass::Corrupt,
        message: message.into(),
        hint: "this is an error of the sending program: report it".to_owned(),
    }
}

fn violation(what: &str) -> Fault {
    Fault::Connection(damaged(format!("protocol violated: {what}")))
}

fn limit(what: &str, max: usize) -> Refusal {
    Refusal {
        code: RefusalCode::Limit,
        class: ErrorClass::Refused,
        message: format!("more than {max} {what}"),
        hint: "raise the limit in the appliance's configuration".to_owned(),
    }
}

fn check_name(name: &str) -> Result<(), Refusal> {
    let is_legal = !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && !name.starts_with('.')
        && !name.contains(|c: char| c.is_control() || "/@".contains(c));
    if is_legal {
        return Ok(());
    }
    Err(Refusal {
        code: RefusalCode::Name,
        class: ErrorClass::Refused,
        message: format!(
            "the name {:?} is not acceptable",
            name.chars().take(64).collect::<String>()
        ),
        hint: format!(
            "use 1 to {NAME_BYTES_MAX} bytes without slash, @ and control characters, and no dot \
             in front"
        ),
    })
}
