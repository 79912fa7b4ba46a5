//! Whole conversations: length prefixes, messages, and the state machines of both sides.

use afterimage_blockdev::{Epoch, Lsn, Random, Timestamp};
use afterimage_protocol::message::StreamId;
use afterimage_protocol::receiver::{Action, Limits, Receiver};
use afterimage_protocol::sender::{
    Outgoing, Question, RecordSource, Sender, SourceBulk, SourceFrame, StreamIdentity,
};
use afterimage_protocol::wire::{self, PREFIX_BYTES};
use afterimage_protocol::{FromReceiver, FromSender};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::messages::{
    AGENT, DISK, HISTORY, MACHINE, STREAM, answer, blob, description, hello, open, report,
};
use super::{Target, Verdict};

const LIMITS: Limits = Limits {
    streams_max: 3,
    disks_max: 2,
};
/// What the receiver grants to a stream.
const CREDIT_BYTES: u64 = 20_000;

pub(super) fn targets() -> Vec<Target> {
    vec![
        Target::new(200_000, "receiver", make_receiver, run_receiver)
            .mended_by(mend)
            .with_memory(3 << 20, 64),
        Target::new(150_000, "sender", make_sender, run_sender)
            .mended_by(mend)
            .with_memory(3 << 20, 64),
    ]
}

fn push<M: Serialize>(bytes: &mut Vec<u8>, message: &M) {
    bytes.extend(wire::encode(message).expect("short"));
}

/// Makes the length before the last message fit.
fn mend(bytes: &mut Vec<u8>, _: &mut Random) {
    let mut at = 0;
    while let Some(prefix) = afterimage_cache::bytes::get_u32(bytes, at) {
        let next = at + PREFIX_BYTES + afterimage_cache::bytes::index(prefix);
        if next > bytes.len() {
            let len = u32::try_from(bytes.len() - at - PREFIX_BYTES).unwrap_or(0);
            bytes[at..at + PREFIX_BYTES].copy_from_slice(&len.to_le_bytes());
            return;
        }
        at = next;
    }
    bytes.truncate(at);
}

/// Takes messages off the front, as both ends of a connection do.
struct Framing<'a>(&'a [u8]);

impl Framing<'_> {
    /// The next message; `None` at the end, an error when there is none where one should be.
    fn next<M: DeserializeOwned>(&mut self) -> Option<Result<M, ()>> {
        let (prefix, rest) = self.0.split_first_chunk::<PREFIX_BYTES>()?;
        let Ok(len) = wire::decode_prefix(*prefix) else {
            return Some(Err(()));
        };
        let Some((body, rest)) = rest.split_at_checked(len) else {
            return Some(Err(()));
        };
        self.0 = rest;
        Some(wire::decode(body).map_err(drop))
    }
}

// --- The appliance's side ------------------------------------------------------------------

fn make_receiver(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    push(&mut bytes, &hello());
    push(&mut bytes, &open(random));
    let stream = STREAM;
    push(
        &mut bytes,
        &FromSender::Declare {
            stream,
            description: description(),
        },
    );
    // All of it together is within the credit.
    let blob = |random: &mut Random| {
        let mut bytes = blob(random);
        bytes.truncate(2000);
        bytes
    };
    let mut last = 0;
    for number in 1..=random.below(8) {
        let message = match random.below(5) {
            0 => FromSender::Bulk {
                stream,
                number,
                bytes: blob(random),
            },
            1 => FromSender::Compare {
                stream,
                number,
                disk: DISK,
                first_block: random.below(1000),
                tags: vec![[5; 16]; 1 + random.index(9)],
            },
            2 => FromSender::Report {
                stream,
                report: report(random),
            },
            _ => {
                let first = Lsn(last + 1);
                last += 1 + random.below(5);
                FromSender::Frame {
                    stream,
                    first,
                    last: Lsn(last),
                    bytes: blob(random),
                }
            }
        };
        push(&mut bytes, &message);
    }
    if random.chance(0.5) {
        push(&mut bytes, &FromSender::Close { stream });
    }
    bytes
}

/// What the shell around a receiver knows.
struct Shell {
    receiver: Receiver,
    /// Bytes of frames that were taken, less those that were freed.
    outstanding_bytes: u64,
    largest_bytes: u64,
    is_good: bool,
}

impl Shell {
    fn take(&mut self, bytes: u64) {
        self.outstanding_bytes += bytes;
        self.largest_bytes = self.largest_bytes.max(bytes);
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Open(wanted) => {
                let (durable, highest) = (Lsn(0), Lsn(9));
                let stream = wanted.stream;
                let receiver = &mut self.receiver;
                let opened = receiver.opened(stream, durable, highest, CREDIT_BYTES, [1; 32]);
                assert!(opened.is_some(), "a stream that is asked for can be opened");
            }
            Action::Append {
                stream,
                first,
                last,
                bytes,
                ..
            } => {
                self.take(bytes.len() as u64);
                assert!(first <= last && self.receiver.taken(stream) == Some(last));
                // Every other frame is durable at once.
                if last.0 % 2 == 0 {
                    let _told = self.receiver.durable(stream, last, CREDIT_BYTES);
                }
            }
            Action::Bulk {
                stream,
                number,
                bytes,
                ..
            } => {
                self.take(bytes.len() as u64);
                if number % 2 == 0 {
                    let _told = self.receiver.bulk_durable(stream, vec![number, number]);
                }
            }
            Action::Compare { tags, .. } => assert!(!tags.is_empty()),
            Action::HangUp(_) | Action::RefuseStream { .. } => self.is_good = false,
            _ => {}
        }
        self.outstanding_bytes -= self.receiver.take_freed_bytes();
        let outstanding = self.receiver.outstanding_bytes();
        assert_eq!(
            outstanding, self.outstanding_bytes,
            "every byte is freed once"
        );
        // Each stream holds its credit at most, or one frame.
        let most = LIMITS.streams_max as u64 * CREDIT_BYTES.max(self.largest_bytes);
        assert!(outstanding <= most, "more is taken than was granted");
    }
}

fn run_receiver(bytes: &[u8]) -> Verdict {
    let mut shell = Shell {
        receiver: Receiver::new(LIMITS),
        outstanding_bytes: 0,
        largest_bytes: 0,
        is_good: true,
    };
    let mut framing = Framing(bytes);
    while let Some(message) = framing.next::<FromSender>() {
        let Ok(message) = message else {
            return Verdict::Refused;
        };
        let action = shell.receiver.message(message, Timestamp(1), "fuzz");
        shell.act(action);
        if shell.receiver.is_over() {
            return Verdict::Refused;
        }
    }
    let is_open = shell.receiver.is_open(STREAM);
    assert!(is_open || shell.receiver.taken(STREAM).is_none());
    Verdict::of(shell.is_good && framing.0.is_empty())
}

// --- The agent's side ----------------------------------------------------------------------

/// Frames of ten LSNs each, and a few bulk frames and questions.
struct Source;

impl RecordSource for Source {
    type Bytes = Vec<u8>;

    fn next_frame(&mut self, after: Lsn) -> Option<SourceFrame<Vec<u8>>> {
        let first = after.0 / 10 * 10;
        (first < 60).then(|| SourceFrame {
            first: Lsn(first + 1),
            last: Lsn(first + 10),
            bytes: vec![1; 700],
        })
    }

    fn next_bulk(&mut self, number: u64) -> Option<SourceBulk<Vec<u8>>> {
        (number < 4).then(|| SourceBulk {
            number: number + 1,
            after: Lsn(20),
            bytes: vec![2; 400],
        })
    }

    fn next_question(&mut self, number: u64) -> Option<Question> {
        (number < 2).then(|| Question {
            number: number + 1,
            disk: DISK,
            first_block: 0,
            tags: vec![[0; 16]; 3],
        })
    }
}

fn make_sender(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    for which in 0..3 {
        push(&mut bytes, &answer(which, random));
    }
    // Nothing is acknowledged beyond what the opening told.
    for _ in 0..random.below(6) {
        let which = 4 + random.below(4);
        push(&mut bytes, &answer(which, random));
    }
    if random.chance(0.2) {
        push(&mut bytes, &answer(8, random));
    }
    bytes
}

fn run_sender(bytes: &[u8]) -> Verdict {
    let identity = StreamIdentity {
        program: "fuzz".to_owned(),
        machine: MACHINE,
        name: "web1".to_owned(),
        history: HISTORY,
        parent: None,
        origin: AGENT,
        epoch: Epoch(1),
    };
    let mut sender = Sender::new(identity, vec![description()]);
    let mut framing = Framing(bytes);
    let mut last = Lsn::ZERO;
    loop {
        // No more leaves than there is: frames, bulk, questions, and a few messages.
        for _ in 0..40 {
            let Some(outgoing) = sender.next(&mut Source) else {
                break;
            };
            assert!(outgoing.head().is_ok(), "what it sends can be encoded");
            if let Outgoing::Frame {
                stream, last: to, ..
            } = outgoing
            {
                assert!(to > last && stream == StreamId(1), "frames leave in order");
                last = to;
            }
        }
        assert!(sender.next(&mut Source).is_none(), "it never stops sending");
        match framing.next::<FromReceiver>() {
            None => return Verdict::of(framing.0.is_empty()),
            Some(Ok(message)) => {
                let Ok(_events) = sender.receive(message) else {
                    return Verdict::Refused;
                };
            }
            Some(Err(())) => return Verdict::Refused,
        }
    }
}
