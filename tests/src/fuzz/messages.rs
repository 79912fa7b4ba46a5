//! Messages of the data port, one by one.

use afterimage_blockdev::{
    AgentId, DiskId, Epoch, ErrorClass, HistoryId, Lsn, MachineId, Random, Timestamp,
};
use afterimage_protocol::head::{FrameHead, HEAD_BYTES_MAX};
use afterimage_protocol::message::{
    DiskDescription, DiskPhase, DiskReport, ForkPoint, MarkRequestKind, PROTOCOL_VERSION,
    SourceReport, StreamId,
};
use afterimage_protocol::wire::{self, PREFIX_BYTES};
use afterimage_protocol::{FromReceiver, FromSender, Refusal, RefusalCode};

use super::{Target, Verdict};

pub(super) const MACHINE: MachineId = MachineId([7; 16]);
pub(super) const HISTORY: HistoryId = HistoryId([8; 16]);
pub(super) const AGENT: AgentId = AgentId([9; 16]);
pub(super) const DISK: DiskId = DiskId([6; 16]);
pub(super) const STREAM: StreamId = StreamId(1);

pub(super) fn targets() -> Vec<Target> {
    vec![
        Target::new(200_000, "from-sender", make_from_sender, run_from_sender)
            .with_memory(3 << 20, 64),
        Target::new(
            200_000,
            "from-receiver",
            make_from_receiver,
            run_from_receiver,
        )
        .with_memory(3 << 20, 64),
    ]
}

fn text(random: &mut Random) -> String {
    let len = random.index(30);
    let letter = |random: &mut Random| ['a', 'Z', '-', 'é', '漢'][random.index(5)];
    (0..len).map(|_| letter(random)).collect()
}

pub(super) fn blob(random: &mut Random) -> Vec<u8> {
    let len = [0, 1, 40, 63, 64, 65, 300, 9000][random.index(8)];
    let mut bytes = vec![0; len];
    random.fill(&mut bytes);
    bytes
}

pub(super) fn description() -> DiskDescription {
    DiskDescription {
        disk: DISK,
        name: "vm".to_owned(),
        size_bytes: 1 << 30,
        logical_block_bytes: 512,
    }
}

pub(super) fn hello() -> FromSender {
    FromSender::Hello {
        version: PROTOCOL_VERSION,
        program: "fuzz".to_owned(),
    }
}

pub(super) fn open(random: &mut Random) -> FromSender {
    let parent = ForkPoint {
        history: HistoryId([3; 16]),
        lsn: Lsn(random.below(1000)),
    };
    FromSender::Open {
        stream: STREAM,
        machine: MACHINE,
        name: "web1".to_owned(),
        history: HISTORY,
        parent: random.chance(0.5).then_some(parent),
        origin: AGENT,
        epoch: Epoch(1 + random.below(9)),
    }
}

pub(super) fn report(random: &mut Random) -> SourceReport {
    let disk = |random: &mut Random| DiskReport {
        disk: DISK,
        phase: [DiskPhase::Initial, DiskPhase::Protected][random.index(2)],
        reason: text(random),
        done_bytes: random.next_u64(),
        total_bytes: random.next_u64(),
    };
    SourceReport {
        captured: Lsn(random.next_u64()),
        time: Timestamp(random.next_u64()),
        oldest_unacknowledged: random.chance(0.5).then(|| Timestamp(random.next_u64())),
        buffered_bytes: random.next_u64(),
        spooled_bytes: random.below(1000),
        disks: (0..random.below(3)).map(|_| disk(random)).collect(),
    }
}

fn make_from_sender(random: &mut Random) -> Vec<u8> {
    let stream = StreamId(u32::try_from(random.next_u64() >> 32).expect("32 bits"));
    let message = match random.below(8) {
        0 => hello(),
        1 => open(random),
        2 => FromSender::Declare {
            stream,
            description: description(),
        },
        3 => FromSender::Frame {
            stream,
            first: Lsn(random.below(1 << 20)),
            last: Lsn(random.next_u64()),
            bytes: blob(random),
        },
        4 => FromSender::Bulk {
            stream,
            number: random.next_u64(),
            bytes: blob(random),
        },
        5 => FromSender::Compare {
            stream,
            number: random.below(99),
            disk: DISK,
            first_block: random.next_u64(),
            tags: (0..random.below(20))
                .map(|tag| [tag.to_le_bytes()[0]; 16])
                .collect(),
        },
        6 => FromSender::Report {
            stream,
            report: report(random),
        },
        _ => FromSender::Close { stream },
    };
    wire::encode(&message).expect("short")[PREFIX_BYTES..].to_vec()
}

fn run_from_sender(bytes: &[u8]) -> Verdict {
    let start = &bytes[..bytes.len().min(HEAD_BYTES_MAX)];
    let head = FrameHead::parse(start, bytes.len());
    let Ok(message) = wire::decode::<FromSender>(bytes) else {
        assert!(head.is_none(), "the head of what is no message");
        return Verdict::Refused;
    };
    // The short way to a frame and the long one agree.
    let is_frame = matches!(message, FromSender::Frame { .. } | FromSender::Bulk { .. });
    assert_eq!(head.is_some(), is_frame, "a head for each frame");
    if let Some(head) = head {
        assert_eq!(head.head_len + head.frame_len, bytes.len());
        let frame = bytes[head.head_len..].to_vec();
        assert_eq!(
            head.into_message(frame),
            message,
            "the head says what the message does"
        );
    }
    let again = wire::encode(&message).expect("it came in a message");
    assert_eq!(wire::decode(&again[PREFIX_BYTES..]).as_ref(), Ok(&message));
    Verdict::Accepted
}

pub(super) fn refusal(random: &mut Random) -> Refusal {
    Refusal {
        code: [RefusalCode::Gap, RefusalCode::NoSpace, RefusalCode::Limit][random.index(3)],
        class: ErrorClass::Refused,
        message: text(random),
        hint: text(random),
    }
}

/// The answers that an appliance gives, by their number.
pub(super) fn answer(which: u64, random: &mut Random) -> FromReceiver {
    let stream = STREAM;
    match which {
        0 => FromReceiver::Welcome {
            version: PROTOCOL_VERSION,
            program: text(random),
            time: Timestamp(random.next_u64()),
        },
        1 => FromReceiver::Opened {
            stream,
            durable: Lsn(random.below(8) * 10),
            highest: Lsn(random.below(1000)),
            credit_bytes: random.below(2000),
            tag_key: [1; 32],
        },
        2 => FromReceiver::Disk {
            stream,
            disk: DISK,
            key: 1,
            secret: [2; 32],
            has_copy: random.chance(0.5),
            is_in_batch: random.chance(0.5),
            bulk_done: (0..random.below(9)).map(|n| (n * 100, 1 + n)).collect(),
        },
        3 => FromReceiver::Acknowledged {
            stream,
            durable: Lsn(random.below(8) * 10),
            credit_bytes: random.below(2000),
        },
        4 => FromReceiver::BulkAcknowledged {
            stream,
            numbers: (0..random.below(4)).collect(),
        },
        5 => FromReceiver::Differences {
            stream,
            number: random.below(9),
            differs: (0..random.below(50)).map(|n| n % 3 == 0).collect(),
        },
        6 => FromReceiver::PlaceMark {
            stream,
            request: random.next_u64(),
            kind: [MarkRequestKind::Crash, MarkRequestKind::Bookmark][random.index(2)],
            name: text(random),
        },
        7 => FromReceiver::Paused {
            refusal: refusal(random),
        },
        _ => FromReceiver::Refused {
            stream: random.chance(0.5).then_some(stream),
            refusal: refusal(random),
        },
    }
}

fn make_from_receiver(random: &mut Random) -> Vec<u8> {
    let which = random.below(9);
    let message = answer(which, random);
    wire::encode(&message).expect("short")[PREFIX_BYTES..].to_vec()
}

fn run_from_receiver(bytes: &[u8]) -> Verdict {
    let Ok(message) = wire::decode::<FromReceiver>(bytes) else {
        return Verdict::Refused;
    };
    let again = wire::encode(&message).expect("it came in a message");
    assert_eq!(wire::decode(&again[PREFIX_BYTES..]).as_ref(), Ok(&message));
    Verdict::Accepted
}
