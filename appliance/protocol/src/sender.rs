//! The sending side of a stream, without sockets: messages in, messages and events out. One
//! [`Sender`] serves one connection; what must outlive it lies in the [`RecordSource`].
//!
//! Invariants
//! * Nothing goes out before the answer that it depends on: `Open` after `Welcome`, disks after
//!   `Opened`, records after every disk was answered.
//! * Ordered frames leave in LSN order, each once per connection, beginning after the receiver's
//!   durable LSN. So the receiver sees no gap, and a frame twice at most after a reconnect.
//! * A bulk frame leaves only after the record that begins its batch.
//! * Bytes on their way never exceed the credit, but for a single frame that is larger than it.

mod source;

use std::collections::{BTreeMap, VecDeque};

use afterimage_blockdev::{
    AgentId, DiskId, Epoch, ErrorClass, HistoryId, Lsn, MachineId, Timestamp,
};

use crate::message::{
    DiskDescription, ForkPoint, FromReceiver, FromSender, MarkRequestKind, PROTOCOL_VERSION,
    Refusal, RefusalCode, SourceReport, StreamId,
};
pub use source::{Outgoing, Question, RecordSource, SourceBulk, SourceFrame};

/// Of so many bytes of frames and bulk together, bulk gets one part when both are waiting.
const BULK_SHARE: u64 = 4;

/// Who opens the stream, for what.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StreamIdentity {
    /// The program and its version, for people.
    pub program: String,
    /// The machine.
    pub machine: MachineId,
    /// The machine's name.
    pub name: String,
    /// The history.
    pub history: HistoryId,
    /// Where it forked off.
    pub parent: Option<ForkPoint>,
    /// Who makes the records.
    pub origin: AgentId,
    /// The writer's epoch.
    pub epoch: Epoch,
}

/// What the receiver told about a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskAnswer {
    /// The disk.
    pub disk: DiskId,
    /// Generation of its key.
    pub key: u32,
    /// Its key.
    pub secret: [u8; 32],
    /// A whole copy is there.
    pub has_copy: bool,
    /// A batch was begun and not ended.
    pub is_in_batch: bool,
    /// Durable bulk of that batch: (first block, blocks).
    pub bulk_done: Vec<(u64, u64)>,
}

/// What came of a message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SenderEvent {
    /// The receiver's wall clock, at the instant of its answer.
    Welcome {
        /// Its time.
        time: Timestamp,
    },
    /// The stream is open; records after `durable` are wanted.
    Opened {
        /// Highest durable LSN.
        durable: Lsn,
        /// Highest LSN ever seen.
        highest: Lsn,
        /// Keys the content tags.
        tag_key: [u8; 32],
    },
    /// A disk was answered.
    Disk(DiskAnswer),
    /// Every disk was answered; records flow.
    Streaming,
    /// Everything up to here is durable.
    Acknowledged {
        /// Highest durable LSN.
        durable: Lsn,
    },
    /// These bulk frames are durable.
    BulkAcknowledged {
        /// Their numbers.
        numbers: Vec<u64>,
    },
    /// Answers a question.
    Differences {
        /// The question's number.
        number: u64,
        /// For each block asked about, whether it differs.
        differs: Vec<bool>,
    },
    /// A mark is wanted at the present cut.
    MarkWanted {
        /// Comes back as the mark's argument.
        request: u64,
        /// Its kind.
        kind: MarkRequestKind,
        /// Name of the point.
        name: String,
    },
    /// The receiver takes nothing for now.
    Paused(Refusal),
    /// The stream is over.
    Refused(Refusal),
}

/// Why the connection must be ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SenderError {
    /// The receiver speaks another version.
    #[error("the appliance speaks protocol version {found}, this agent {supported}")]
    Version {
        /// Its version.
        found: u16,
        /// Ours.
        supported: u16,
    },
    /// A message that does not belong here.
    #[error("the appliance sent {message} when it must not")]
    Unexpected {
        /// Which.
        message: &'static str,
    },
    /// An acknowledgement of what was never sent.
    #[error("the appliance acknowledged LSN {durable}, the highest sent is {sent}")]
    AcknowledgedUnsent {
        /// What it said.
        durable: Lsn,
        /// What was sent.
        sent: Lsn,
    },
}

impl SenderError {
    /// How to go on.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Version { .. } => ErrorClass::Operator,
            Self::Unexpected { .. } | Self::AcknowledgedUnsent { .. } => ErrorClass::Retry,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Greeting,
    Opening,
    Declaring,
    Streaming,
    Over,
}

/// The sending side of one connection.
#[derive(Debug)]
pub struct Sender {
    identity: StreamIdentity,
    stream: StreamId,
    phase: Phase,
    control: VecDeque<FromSender>,
    report: Option<SourceReport>,
    disks: Vec<DiskDescription>,
    unanswered: Vec<DiskId>,
    sent: Lsn,
    acknowledged: Lsn,
    /// Frames on their way: last LSN and bytes.
    frames: VecDeque<(Lsn, u64)>,
    frame_bytes: u64,
    bulk: BTreeMap<u64, u64>,
    bulk_bytes: u64,
    bulk_sent: u64,
    asked: u64,
    credit_bytes: u64,
    is_paused: bool,
    bytes_since_bulk: u64,
}

impl Sender {
    /// Begins a connection: the first message out is `Hello`.
    #[must_use]
    pub fn new(identity: StreamIdentity, disks: Vec<DiskDescription>) -> Self {
        let hello = FromSender::Hello {
            version: PROTOCOL_VERSION,
            program: identity.program.clone(),
        };
        Self {
            identity,
            stream: StreamId(1),
            phase: Phase::Greeting,
            control: VecDeque::from([hello]),
            report: None,
            disks,
            unanswered: Vec::new(),
            sent: Lsn::ZERO,
            acknowledged: Lsn::ZERO,
            frames: VecDeque::new(),
            frame_bytes: 0,
            bulk: BTreeMap::new(),
            bulk_bytes: 0,
            bulk_sent: 0,
            asked: 0,
            credit_bytes: 0,
            is_paused: false,
            bytes_since_bulk: 0,
        }
    }

    /// Says whether records flow.
    #[must_use]
    pub fn is_streaming(&self) -> bool {
        self.phase == Phase::Streaming
    }

    /// Says whether the receiver owes an answer. What it has paused it does not owe.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        let is_owed = matches!(
            self.phase,
            Phase::Greeting | Phase::Opening | Phase::Declaring
        ) || !self.unanswered.is_empty()
            || !self.frames.is_empty()
            || !self.bulk.is_empty();
        is_owed && !self.is_paused
    }

    /// Highest LSN given to the connection.
    #[must_use]
    pub fn sent(&self) -> Lsn {
        self.sent
    }

    /// Declares one more disk, or a known one whose size changed.
    pub fn declare(&mut self, description: DiskDescription) {
        self.disks.retain(|known| known.disk != description.disk);
        self.disks.push(description.clone());
        if matches!(self.phase, Phase::Declaring | Phase::Streaming) {
            self.push_declare(description);
        }
    }

    fn push_declare(&mut self, description: DiskDescription) {
        self.unanswered.push(description.disk);
        self.control.push_back(FromSender::Declare {
            stream: self.stream,
            description,
        });
    }

    /// Sets the report that goes out next. An unsent older one is replaced.
    pub fn report(&mut self, report: SourceReport) {
        self.report = Some(report);
    }

    /// Ends the stream in order, after what was given out so far.
    pub fn close(&mut self) {
        if self.phase == Phase::Streaming {
            self.control.push_back(FromSender::Close {
                stream: self.stream,
            });
        }
        self.phase = Phase::Over;
    }

    /// Takes a message.
    ///
    /// # Errors
    /// [`SenderError`]: the connection must be ended.
    pub fn receive(&mut self, message: FromReceiver) -> Result<Vec<SenderEvent>, SenderError> {
        match (self.phase, message) {
            (Phase::Greeting, FromReceiver::Welcome { version, time, .. }) => {
                self.welcome(version, time)
            }
            (
                Phase::Opening,
                FromReceiver::Opened {
                    durable,
                    highest,
                    credit_bytes,
                    tag_key,
                    ..
                },
            ) => Ok(self.opened(durable, highest, credit_bytes, tag_key)),
            (
                Phase::Declaring | Phase::Streaming,
                FromReceiver::Disk {
                    disk,
                    key,
                    secret,
                    has_copy,
                    is_in_batch,
                    bulk_done,
                    ..
                },
            ) => {
                let answer = DiskAnswer {
                    disk,
                    key,
                    secret,
                    has_copy,
                    is_in_batch,
                    bulk_done,
                };
                Ok(self.disk(answer))
            }
            (
                Phase::Declaring | Phase::Streaming | Phase::Over,
                FromReceiver::Acknowledged {
                    durable,
                    credit_bytes,
                    ..
                },
            ) => self.acknowledge(durable, credit_bytes),
            (Phase::Streaming | Phase::Over, FromReceiver::BulkAcknowledged { numbers, .. }) => {
                self.acknowledge_bulk(&numbers);
                Ok(vec![SenderEvent::BulkAcknowledged { numbers }])
            }
            (
                Phase::Streaming | Phase::Over,
                FromReceiver::Differences {
                    number, differs, ..
                },
            ) => Ok(vec![SenderEvent::Differences { number, differs }]),
            (
                Phase::Declaring | Phase::Streaming,
                FromReceiver::PlaceMark {
                    request,
                    kind,
                    name,
                    ..
                },
            ) => Ok(vec![SenderEvent::MarkWanted {
                request,
                kind,
                name,
            }]),
            (_, FromReceiver::Paused { refusal }) => {
                self.is_paused = true;
                Ok(vec![SenderEvent::Paused(refusal)])
            }
            (_, FromReceiver::Refused { refusal, .. }) => {
                self.phase = Phase::Over;
                self.control.clear();
                Ok(vec![SenderEvent::Refused(refusal)])
            }
            (_, message) => Err(SenderError::Unexpected {
                message: name(&message),
            }),
        }
    }

    fn welcome(&mut self, version: u16, time: Timestamp) -> Result<Vec<SenderEvent>, SenderError> {
        if version != PROTOCOL_VERSION {
            self.phase = Phase::Over;
            return Err(SenderError::Version {
                found: version,
                supported: PROTOCOL_VERSION,
            });
        }
        self.phase = Phase::Opening;
        self.control.push_back(FromSender::Open {
            stream: self.stream,
            machine: self.identity.machine,
            name: self.identity.name.clone(),
            history: self.identity.history,
            parent: self.identity.parent,
            origin: self.identity.origin,
            epoch: self.identity.epoch,
        });
        Ok(vec![SenderEvent::Welcome { time }])
    }

    fn opened(
        &mut self,
        durable: Lsn,
        highest: Lsn,
        credit_bytes: u64,
        tag_key: [u8; 32],
    ) -> Vec<SenderEvent> {
        self.phase = Phase::Declaring;
        self.sent = durable;
        self.acknowledged = durable;
        self.credit_bytes = credit_bytes;
        for description in self.disks.clone() {
            self.push_declare(description);
        }
        let mut events = vec![SenderEvent::Opened {
            durable,
            highest,
            tag_key,
        }];
        events.extend(self.begin_streaming());
        events
    }

    fn begin_streaming(&mut self) -> Option<SenderEvent> {
        if self.phase == Phase::Declaring && self.unanswered.is_empty() {
            self.phase = Phase::Streaming;
            return Some(SenderEvent::Streaming);
        }
        None
    }

    fn disk(&mut self, answer: DiskAnswer) -> Vec<SenderEvent> {
        if let Some(at) = self.unanswered.iter().position(|disk| *disk == answer.disk) {
            self.unanswered.swap_remove(at);
        }
        let mut events = vec![SenderEvent::Disk(answer)];
        events.extend(self.begin_streaming());
        events
    }

    fn acknowledge(
        &mut self,
        durable: Lsn,
        credit_bytes: u64,
    ) -> Result<Vec<SenderEvent>, SenderError> {
        if durable > self.sent {
            return Err(SenderError::AcknowledgedUnsent {
                durable,
                sent: self.sent,
            });
        }
        self.credit_bytes = credit_bytes;
        self.is_paused = false;
        while let Some((last, bytes)) = self.frames.front().copied() {
            if last > durable {
                break;
            }
            self.frames.pop_front();
            self.frame_bytes -= bytes;
        }
        self.acknowledged = self.acknowledged.max(durable);
        Ok(vec![SenderEvent::Acknowledged {
            durable: self.acknowledged,
        }])
    }

    fn acknowledge_bulk(&mut self, numbers: &[u64]) {
        for number in numbers {
            self.bulk_bytes -= self.bulk.remove(number).unwrap_or(0);
        }
    }

    /// The next message to put on the connection; `None` when nothing may be sent now.
    pub fn next<S: RecordSource>(&mut self, source: &mut S) -> Option<Outgoing<S::Bytes>> {
        if let Some(message) = self.control.pop_front() {
            return Some(Outgoing::Message(message));
        }
        if self.phase != Phase::Streaming {
            return None;
        }
        if let Some(report) = self.report.take() {
            return Some(Outgoing::Message(FromSender::Report {
                stream: self.stream,
                report,
            }));
        }
        if let Some(question) = source.next_question(self.asked) {
            self.asked = question.number;
            return Some(Outgoing::Message(FromSender::Compare {
                stream: self.stream,
                number: question.number,
                disk: question.disk,
                first_block: question.first_block,
                tags: question.tags,
            }));
        }
        if self.is_paused {
            return None;
        }
        self.next_data(source)
    }

    fn next_data<S: RecordSource>(&mut self, source: &mut S) -> Option<Outgoing<S::Bytes>> {
        let bulk = source
            .next_bulk(self.bulk_sent)
            .filter(|bulk| bulk.after <= self.sent);
        let frame = source.next_frame(self.sent);
        let is_turn_of_bulk = match (&bulk, &frame) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(bulk), Some(_)) => {
                self.bytes_since_bulk >= length(bulk.bytes.as_ref()) * (BULK_SHARE - 1)
            }
        };
        if is_turn_of_bulk {
            let bulk = bulk?;
            let bytes = self.take_credit(bulk.bytes.as_ref())?;
            self.bulk_sent = bulk.number;
            self.bulk.insert(bulk.number, bytes);
            self.bulk_bytes += bytes;
            self.bytes_since_bulk = 0;
            return Some(Outgoing::Bulk {
                stream: self.stream,
                number: bulk.number,
                bytes: bulk.bytes,
            });
        }
        let frame = frame?;
        let bytes = self.take_credit(frame.bytes.as_ref())?;
        self.sent = frame.last;
        self.frames.push_back((frame.last, bytes));
        self.frame_bytes += bytes;
        self.bytes_since_bulk = self.bytes_since_bulk.saturating_add(bytes);
        Some(Outgoing::Frame {
            stream: self.stream,
            first: frame.first,
            last: frame.last,
            bytes: frame.bytes,
        })
    }

    /// Bytes of a frame when it may leave now.
    fn take_credit(&self, frame: &[u8]) -> Option<u64> {
        let bytes = length(frame);
        let on_the_way = self.frame_bytes + self.bulk_bytes;
        let is_allowed =
            self.credit_bytes > 0 && (on_the_way == 0 || on_the_way + bytes <= self.credit_bytes);
        is_allowed.then_some(bytes)
    }
}

fn length(bytes: &[u8]) -> u64 {
    bytes.len() as u64
}

fn name(message: &FromReceiver) -> &'static str {
    match message {
        FromReceiver::Welcome { .. } => "Welcome",
        FromReceiver::Opened { .. } => "Opened",
        FromReceiver::Disk { .. } => "Disk",
        FromReceiver::Acknowledged { .. } => "Acknowledged",
        FromReceiver::BulkAcknowledged { .. } => "BulkAcknowledged",
        FromReceiver::Differences { .. } => "Differences",
        FromReceiver::PlaceMark { .. } => "PlaceMark",
        FromReceiver::Paused { .. } => "Paused",
        FromReceiver::Refused { .. } => "Refused",
    }
}

/// The refusal that stands for a version mismatch, for whoever shows it.
#[must_use]
pub fn version_refusal(error: &SenderError) -> Refusal {
    Refusal {
        code: RefusalCode::Version,
        class: error.class(),
        message: error.to_string(),
        hint: "update the older of the two".to_owned(),
    }
}

#[cfg(test)]
mod tests;
