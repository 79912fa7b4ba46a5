use super::*;
use crate::message::DiskReport;

const LIMITS: Limits = Limits {
    streams_max: 3,
    disks_max: 2,
};
const NOW: Timestamp = Timestamp(5);
const CREDIT: u64 = 1000;

fn id(byte: u8) -> [u8; 16] {
    [byte; 16]
}

fn hello() -> FromSender {
    FromSender::Hello {
        version: PROTOCOL_VERSION,
        program: "test".to_owned(),
    }
}

fn open(stream: u32) -> FromSender {
    FromSender::Open {
        stream: StreamId(stream),
        machine: MachineId(id(1)),
        name: "web".to_owned(),
        history: HistoryId(id(2)),
        parent: None,
        origin: AgentId(id(3)),
        epoch: Epoch(1),
    }
}

fn declare(stream: u32, disk: u8) -> FromSender {
    let description = DiskDescription {
        disk: DiskId(id(disk)),
        name: "sda".to_owned(),
        size_bytes: 1 << 20,
        logical_block_bytes: 512,
    };
    FromSender::Declare {
        stream: StreamId(stream),
        description,
    }
}

fn frame(stream: u32, first: u64, last: u64, len: usize) -> FromSender {
    let (first, last) = (Lsn(first), Lsn(last));
    FromSender::Frame {
        stream: StreamId(stream),
        first,
        last,
        bytes: vec![0; len],
    }
}

fn bulk(stream: u32, number: u64, len: usize) -> FromSender {
    FromSender::Bulk {
        stream: StreamId(stream),
        number,
        bytes: vec![0; len],
    }
}

fn compare(number: u64, disk: u8, blocks: usize) -> FromSender {
    FromSender::Compare {
        stream: StreamId(1),
        number,
        disk: DiskId(id(disk)),
        first_block: 0,
        tags: vec![[0; 16]; blocks],
    }
}

fn feed(receiver: &mut Receiver, message: FromSender) -> Action {
    receiver.message(message, NOW, "afterimaged")
}

fn ready() -> Receiver {
    let mut receiver = Receiver::new(LIMITS);
    assert!(matches!(
        feed(&mut receiver, hello()),
        Action::Send(FromReceiver::Welcome { .. })
    ));
    receiver
}

fn with_stream(durable: u64) -> Receiver {
    let mut receiver = ready();
    assert!(matches!(feed(&mut receiver, open(1)), Action::Open(_)));
    let opened = receiver.opened(StreamId(1), Lsn(durable), Lsn(durable), CREDIT, [0; 32]);
    assert!(matches!(
        opened,
        Some(FromReceiver::Opened {
            credit_bytes: CREDIT,
            ..
        })
    ));
    receiver
}

fn refusal_of(action: &Action) -> Option<(bool, RefusalCode)> {
    match action {
        Action::HangUp(FromReceiver::Refused {
            stream: None,
            refusal,
        }) => Some((true, refusal.code)),
        Action::RefuseStream {
            message: FromReceiver::Refused { refusal, .. },
            ..
        } => Some((false, refusal.code)),
        _ => None,
    }
}

#[test]
fn hello_comes_first_once_and_in_the_same_version() {
    let mut receiver = Receiver::new(LIMITS);
    let action = feed(&mut receiver, open(1));
    assert_eq!(refusal_of(&action), Some((true, RefusalCode::Damaged)));
    assert!(receiver.is_over());
    assert_eq!(feed(&mut receiver, hello()), Action::None);

    let action = feed(&mut ready(), hello());
    assert_eq!(refusal_of(&action), Some((true, RefusalCode::Damaged)));

    let other = FromSender::Hello {
        version: PROTOCOL_VERSION + 1,
        program: String::new(),
    };
    let action = feed(&mut Receiver::new(LIMITS), other);
    assert_eq!(refusal_of(&action), Some((true, RefusalCode::Version)));
}

#[test]
fn frames_rise_and_the_first_may_overlap_what_is_durable() {
    let mut receiver = with_stream(10);
    assert!(matches!(
        feed(&mut receiver, frame(1, 8, 12, 10)),
        Action::Append { .. }
    ));
    assert!(matches!(
        feed(&mut receiver, frame(1, 13, 13, 10)),
        Action::Append { .. }
    ));
    // A gap is the engine's to judge.
    assert!(matches!(
        feed(&mut receiver, frame(1, 20, 21, 10)),
        Action::Append { .. }
    ));
    for (first, last) in [(20, 22), (21, 21), (0, 30), (30, 29)] {
        let mut receiver = with_stream(10);
        assert!(matches!(
            feed(&mut receiver, frame(1, 11, 21, 10)),
            Action::Append { .. }
        ));
        let action = feed(&mut receiver, frame(1, first, last, 10));
        assert_eq!(
            refusal_of(&action),
            Some((false, RefusalCode::Damaged)),
            "{first} {last}"
        );
        assert_eq!(receiver.outstanding_bytes(), 0);
        assert_eq!(receiver.take_freed_bytes(), 10);
    }
    let mut receiver = with_stream(10);
    let action = feed(&mut receiver, frame(1, 9, 10, 10));
    assert_eq!(refusal_of(&action), Some((false, RefusalCode::Damaged)));
}

#[test]
fn credit_is_charged_and_given_back() {
    let mut receiver = with_stream(0);
    assert!(matches!(
        feed(&mut receiver, frame(1, 1, 1, 600)),
        Action::Append { .. }
    ));
    assert!(matches!(
        feed(&mut receiver, bulk(1, 7, 400)),
        Action::Bulk { .. }
    ));
    assert_eq!(receiver.outstanding_bytes(), CREDIT);
    let told = receiver.durable(StreamId(1), Lsn(1), CREDIT);
    assert!(matches!(
        told,
        Some(FromReceiver::Acknowledged {
            durable: Lsn(1),
            ..
        })
    ));
    assert_eq!(receiver.take_freed_bytes(), 600);
    assert!(matches!(
        feed(&mut receiver, frame(1, 2, 2, 600)),
        Action::Append { .. }
    ));
    let told = receiver.bulk_durable(StreamId(1), vec![7, 99]);
    assert!(matches!(told, Some(FromReceiver::BulkAcknowledged { .. })));
    assert_eq!(receiver.take_freed_bytes(), 400);
    // Nobody acknowledged this one, so that the next byte is one too many.
    assert!(matches!(
        feed(&mut receiver, frame(1, 3, 3, 400)),
        Action::Append { .. }
    ));
    let action = feed(&mut receiver, frame(1, 4, 4, 1));
    assert_eq!(refusal_of(&action), Some((false, RefusalCode::Limit)));
    assert_eq!(feed(&mut receiver, frame(1, 5, 5, 1)), Action::None);
    assert_eq!(receiver.take_freed_bytes(), 1000);
}

#[test]
fn a_frame_above_the_credit_passes_alone_and_acknowledged_never_falls() {
    let mut receiver = with_stream(0);
    assert!(matches!(
        feed(&mut receiver, frame(1, 1, 9, 5000)),
        Action::Append { .. }
    ));
    let told = receiver.durable(StreamId(1), Lsn(9), CREDIT);
    assert!(matches!(
        told,
        Some(FromReceiver::Acknowledged {
            durable: Lsn(9),
            ..
        })
    ));
    let told = receiver.durable(StreamId(1), Lsn(4), CREDIT);
    assert!(matches!(
        told,
        Some(FromReceiver::Acknowledged {
            durable: Lsn(9),
            ..
        })
    ));
}

#[test]
fn a_refused_stream_is_silent_until_it_is_opened_again() {
    let mut receiver = with_stream(0);
    let refusal = damaged("test");
    assert!(receiver.refuse(StreamId(1), refusal.clone()).is_some());
    assert!(receiver.refuse(StreamId(1), refusal).is_none());
    assert_eq!(feed(&mut receiver, frame(1, 1, 1, 1)), Action::None);
    assert!(receiver.durable(StreamId(1), Lsn(1), CREDIT).is_none());
    assert!(matches!(feed(&mut receiver, open(1)), Action::Open(_)));
    assert!(!receiver.is_open(StreamId(1)));
    assert!(
        receiver
            .opened(StreamId(1), Lsn(0), Lsn(0), CREDIT, [0; 32])
            .is_some()
    );
    assert!(matches!(
        feed(&mut receiver, frame(1, 1, 1, 1)),
        Action::Append { .. }
    ));
    assert!(matches!(
        feed(
            &mut receiver,
            FromSender::Close {
                stream: StreamId(1)
            }
        ),
        Action::Close { .. }
    ));
    assert_eq!(receiver.outstanding_bytes(), 0);
}

#[test]
fn streams_and_disks_are_bounded_and_known() {
    let mut receiver = ready();
    for stream in 1..=3 {
        assert!(matches!(feed(&mut receiver, open(stream)), Action::Open(_)));
    }
    let action = feed(&mut receiver, open(4));
    assert_eq!(refusal_of(&action), Some((true, RefusalCode::Limit)));

    let action = feed(&mut with_stream(0), frame(9, 1, 1, 1));
    assert_eq!(refusal_of(&action), Some((true, RefusalCode::Damaged)));

    let mut receiver = with_stream(0);
    assert!(matches!(
        feed(&mut receiver, declare(1, 5)),
        Action::Declare { .. }
    ));
    assert!(matches!(
        feed(&mut receiver, declare(1, 5)),
        Action::Declare { .. }
    ));
    assert!(matches!(
        feed(&mut receiver, declare(1, 6)),
        Action::Declare { .. }
    ));
    let action = feed(&mut receiver, declare(1, 7));
    assert_eq!(refusal_of(&action), Some((false, RefusalCode::Limit)));
}

#[test]
fn names_are_checked_and_a_bad_one_costs_only_its_stream() {
    for name in [
        "",
        ".",
        "..",
        "a/b",
        "a@b",
        "a\nb",
        &"a".repeat(NAME_BYTES_MAX + 1),
    ] {
        let mut receiver = ready();
        let FromSender::Open {
            stream,
            machine,
            history,
            origin,
            epoch,
            ..
        } = open(1)
        else {
            unreachable!()
        };
        let name = name.to_owned();
        let parent = None;
        let message = FromSender::Open {
            stream,
            machine,
            name,
            history,
            parent,
            origin,
            epoch,
        };
        let action = feed(&mut receiver, message);
        assert_eq!(refusal_of(&action), Some((false, RefusalCode::Name)));
        assert!(matches!(feed(&mut receiver, open(2)), Action::Open(_)));
    }
}

#[test]
fn questions_are_bounded_and_rise() {
    let mut receiver = with_stream(0);
    assert!(matches!(
        feed(&mut receiver, declare(1, 5)),
        Action::Declare { .. }
    ));
    assert!(matches!(
        feed(&mut receiver, compare(1, 5, 10)),
        Action::Compare { .. }
    ));
    let wrong = [
        (1, 5, 10),
        (2, 6, 10),
        (2, 5, 0),
        (2, 5, COMPARE_BLOCKS_MAX + 1),
    ];
    for (number, disk, blocks) in wrong {
        let mut receiver = with_stream(0);
        feed(&mut receiver, declare(1, 5));
        feed(&mut receiver, compare(1, 5, 10));
        let action = feed(&mut receiver, compare(number, disk, blocks));
        assert_eq!(refusal_of(&action), Some((false, RefusalCode::Damaged)));
    }
}

mod hostile {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Input {
        Peer(FromSender),
        Opened(u32, u64, u64),
        Durable(u32, u64, u64),
        BulkDurable(u32, Vec<u64>),
        Mark(u32),
        Refuse(u32),
    }

    fn number() -> impl Strategy<Value = u64> {
        prop_oneof![0..20u64, Just(u64::MAX), Just(u64::MAX - 1)]
    }

    fn from_peer() -> impl Strategy<Value = FromSender> {
        let report = SourceReport {
            disks: vec![
                DiskReport {
                    disk: DiskId(id(5)),
                    phase: crate::message::DiskPhase::Initial,
                    reason: String::new(),
                    done_bytes: 0,
                    total_bytes: 0,
                };
                3
            ],
            ..SourceReport::default()
        };
        prop_oneof![
            1 => Just(hello()),
            4 => (0..5u32).prop_map(open),
            4 => (0..5u32, 4..9u8).prop_map(|(stream, disk)| declare(stream, disk)),
            8 => (0..5u32, number(), number(), 0..1500usize)
                .prop_map(|(stream, first, last, len)| frame(stream, first, last, len)),
            8 => (0..5u32, number(), 0..1500usize)
                .prop_map(|(stream, number, len)| bulk(stream, number, len)),
            4 => (number(), 4..7u8, 0..3usize, number()).prop_map(|(n, disk, blocks, first)| {
                FromSender::Compare {
                    stream: StreamId(1),
                    number: n,
                    disk: DiskId(id(disk)),
                    first_block: first,
                    tags: vec![[0; 16]; blocks],
                }
            }),
            1 => (0..5u32).prop_map(move |stream| FromSender::Report {
                stream: StreamId(stream),
                report: report.clone(),
            }),
            2 => (0..5u32).prop_map(|stream| FromSender::Close { stream: StreamId(stream) }),
        ]
    }

    fn input() -> impl Strategy<Value = Input> {
        prop_oneof![
            8 => from_peer().prop_map(Input::Peer),
            4 => (0..5u32, number(), 0..2000u64).prop_map(|(s, l, c)| Input::Opened(s, l, c)),
            2 => (0..5u32, number(), 0..2000u64).prop_map(|(s, l, c)| Input::Durable(s, l, c)),
            2 => (0..5u32, prop::collection::vec(number(), 0..4))
                .prop_map(|(s, numbers)| Input::BulkDurable(s, numbers)),
            1 => (0..5u32).prop_map(Input::Mark),
            1 => (0..5u32).prop_map(Input::Refuse),
        ]
    }

    proptest! {
        /// Whatever comes in whatever order: no panic, bytes taken = bytes freed + outstanding,
        /// and nothing for a stream that is not open reaches the engine.
        #[test]
        fn nothing_breaks_it(inputs in prop::collection::vec(input(), 0..120)) {
            let mut receiver = ready();
            let (mut taken, mut freed) = (0u64, 0u64);
            for input in inputs {
                let may_act: Vec<bool> =
                    (0..5).map(|stream| receiver.is_open(StreamId(stream))).collect();
                match input {
                    Input::Peer(message) => match feed(&mut receiver, message) {
                        Action::Append { stream, bytes, .. }
                        | Action::Bulk { stream, bytes, .. } => {
                            taken += bytes.len() as u64;
                            prop_assert!(may_act[stream.0 as usize]);
                        }
                        Action::Declare { stream, .. }
                        | Action::Compare { stream, .. }
                        | Action::Report { stream, .. }
                        | Action::Close { stream } => {
                            prop_assert!(may_act[stream.0 as usize]);
                        }
                        _ => {}
                    },
                    Input::Opened(stream, durable, credit) => {
                        let durable = Lsn(durable);
                        receiver.opened(StreamId(stream), durable, durable, credit, [0; 32]);
                    }
                    Input::Durable(stream, lsn, credit) => {
                        receiver.durable(StreamId(stream), Lsn(lsn), credit);
                    }
                    Input::BulkDurable(stream, numbers) => {
                        receiver.bulk_durable(StreamId(stream), numbers);
                    }
                    Input::Mark(stream) => {
                        let kind = MarkRequestKind::Crash;
                        receiver.place_mark(StreamId(stream), 1, kind, String::new());
                    }
                    Input::Refuse(stream) => {
                        receiver.refuse(StreamId(stream), damaged("test"));
                    }
                }
                freed += receiver.take_freed_bytes();
                prop_assert_eq!(taken, freed + receiver.outstanding_bytes());
            }
        }
    }
}
