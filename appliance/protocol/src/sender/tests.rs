//! The sender against the receiver, over a connection that loses what is under way at any time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;

use super::*;
use crate::receiver::{Action, Limits, Receiver};
use crate::wire::{self, PREFIX_BYTES};

const CREDIT: u64 = 1000;

#[derive(Default)]
struct Kept {
    frames: BTreeMap<Lsn, SourceFrame<Vec<u8>>>,
    bulk: BTreeMap<u64, SourceBulk<Vec<u8>>>,
    questions: BTreeMap<u64, Question>,
}

impl RecordSource for Kept {
    type Bytes = Vec<u8>;

    fn next_frame(&mut self, after: Lsn) -> Option<SourceFrame<Vec<u8>>> {
        self.frames
            .range(after.next()..)
            .next()
            .map(|(_, frame)| frame.clone())
    }

    fn next_bulk(&mut self, number: u64) -> Option<SourceBulk<Vec<u8>>> {
        self.bulk
            .range(number + 1..)
            .next()
            .map(|(_, bulk)| bulk.clone())
    }

    fn next_question(&mut self, number: u64) -> Option<Question> {
        self.questions
            .range(number + 1..)
            .next()
            .map(|(_, question)| question.clone())
    }
}

fn disk() -> DiskDescription {
    DiskDescription {
        disk: DiskId([5; 16]),
        name: "data".to_owned(),
        size_bytes: 1 << 20,
        logical_block_bytes: 512,
    }
}

fn sender() -> Sender {
    let identity = StreamIdentity {
        program: "test".to_owned(),
        machine: MachineId([1; 16]),
        name: "machine".to_owned(),
        history: HistoryId([2; 16]),
        parent: None,
        origin: AgentId([3; 16]),
        epoch: Epoch(1),
    };
    Sender::new(identity, vec![disk()])
}

/// What outlives connections at the receiving end.
#[derive(Default)]
struct Engine {
    /// Last LSN that was taken, durable or not.
    taken: Lsn,
    durable: Lsn,
    bulk: BTreeSet<u64>,
    bulk_waiting: Vec<u64>,
    begun: Lsn,
    answered: BTreeSet<u64>,
}

struct World {
    kept: Kept,
    engine: Engine,
    sender: Sender,
    receiver: Receiver,
    there: VecDeque<Vec<u8>>,
    back: VecDeque<FromReceiver>,
    next_lsn: u64,
    next_number: u64,
    in_flight: u64,
}

impl World {
    fn new() -> Self {
        Self {
            kept: Kept::default(),
            engine: Engine::default(),
            sender: sender(),
            receiver: Receiver::new(Limits {
                streams_max: 4,
                disks_max: 4,
            }),
            there: VecDeque::new(),
            back: VecDeque::new(),
            next_lsn: 1,
            next_number: 1,
            in_flight: 0,
        }
    }

    fn produce(&mut self, records: u64, bytes: usize) {
        let (first, last) = (Lsn(self.next_lsn), Lsn(self.next_lsn + records - 1));
        self.next_lsn += records;
        self.kept.frames.insert(
            last,
            SourceFrame {
                first,
                last,
                bytes: vec![1; bytes],
            },
        );
    }

    fn produce_bulk(&mut self, bytes: usize) {
        let number = self.next_number;
        self.next_number += 1;
        // The batch began with the newest record.
        let after = Lsn(self.next_lsn - 1);
        self.kept.bulk.insert(
            number,
            SourceBulk {
                number,
                after,
                bytes: vec![2; bytes],
            },
        );
    }

    fn ask(&mut self) {
        let number = self.next_number;
        self.next_number += 1;
        let question = Question {
            number,
            disk: disk().disk,
            first_block: 0,
            tags: vec![[0; 16]],
        };
        self.kept.questions.insert(number, question);
    }

    fn send(&mut self) {
        let Some(outgoing) = self.sender.next(&mut self.kept) else {
            return;
        };
        let mut bytes = outgoing.head().unwrap();
        bytes.extend_from_slice(outgoing.body());
        self.there.push_back(bytes);
    }

    fn cut(&mut self) {
        self.there.clear();
        self.back.clear();
        self.sender = sender();
        self.receiver = Receiver::new(Limits {
            streams_max: 4,
            disks_max: 4,
        });
        // What was taken and not durable is lost with the receiver's process.
        self.engine.taken = self.engine.durable;
        self.engine.bulk_waiting.clear();
        self.in_flight = 0;
    }

    fn deliver_there(&mut self) {
        let Some(bytes) = self.there.pop_front() else {
            return;
        };
        let prefix = bytes[..PREFIX_BYTES].try_into().unwrap();
        assert_eq!(
            wire::decode_prefix(prefix).unwrap(),
            bytes.len() - PREFIX_BYTES
        );
        let message: FromSender = wire::decode(&bytes[PREFIX_BYTES..]).unwrap();
        match self.receiver.message(message, Timestamp(1), "test") {
            Action::Send(message) => self.back.push_back(message),
            Action::Open(wanted) => {
                let (durable, key) = (self.engine.durable, [9; 32]);
                let opened = self
                    .receiver
                    .opened(wanted.stream, durable, durable, CREDIT, key);
                self.back.extend(opened);
            }
            Action::Declare {
                stream,
                description,
            } => self.back.push_back(FromReceiver::Disk {
                stream,
                disk: description.disk,
                key: 1,
                secret: [0; 32],
                has_copy: false,
                is_in_batch: false,
                bulk_done: Vec::new(),
            }),
            Action::Append {
                first, last, bytes, ..
            } => self.append(first, last, &bytes),
            Action::Bulk { number, bytes, .. } => {
                let bulk = &self.kept.bulk[&number];
                assert!(
                    bulk.after <= self.engine.taken,
                    "bulk comes after its batch began"
                );
                self.engine.begun = self.engine.begun.max(bulk.after);
                self.in_flight += bytes.len() as u64;
                self.engine.bulk_waiting.push(number);
            }
            Action::Compare { stream, number, .. } => {
                self.engine.answered.insert(number);
                let differs = vec![true];
                self.back.push_back(FromReceiver::Differences {
                    stream,
                    number,
                    differs,
                });
            }
            Action::None | Action::Report { .. } | Action::Close { .. } => {}
            refused => panic!("refused: {refused:?}"),
        }
        let allowed = CREDIT.max(600);
        assert!(
            self.receiver.outstanding_bytes() <= allowed,
            "the credit is kept"
        );
    }

    fn append(&mut self, first: Lsn, last: Lsn, bytes: &[u8]) {
        assert!(
            last > self.engine.taken,
            "nothing twice within a connection"
        );
        assert!(first <= self.engine.taken.next(), "no gap");
        assert_eq!(self.kept.frames[&last].bytes, bytes);
        self.engine.taken = last;
    }

    fn commit(&mut self) {
        self.engine.durable = self.engine.taken;
        let durable = self
            .receiver
            .durable(StreamId(1), self.engine.durable, CREDIT);
        self.back.extend(durable);
        let numbers = core::mem::take(&mut self.engine.bulk_waiting);
        self.engine.bulk.extend(&numbers);
        let durable = self.receiver.bulk_durable(StreamId(1), numbers);
        self.back.extend(durable);
    }

    fn deliver_back(&mut self) {
        let Some(message) = self.back.pop_front() else {
            return;
        };
        for event in self.sender.receive(message).unwrap() {
            match event {
                SenderEvent::Acknowledged { durable } | SenderEvent::Opened { durable, .. } => {
                    self.kept.frames.retain(|last, _| *last > durable);
                }
                SenderEvent::BulkAcknowledged { numbers } => {
                    numbers
                        .iter()
                        .for_each(|number| drop(self.kept.bulk.remove(number)));
                }
                SenderEvent::Differences { number, .. } => {
                    self.kept.questions.remove(&number);
                }
                _ => {}
            }
        }
    }

    /// Lets everything arrive.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            self.send();
            self.deliver_there();
            self.commit();
            self.deliver_back();
            self.deliver_back();
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Produce(u64, usize),
    Bulk(usize),
    Ask,
    Send,
    There,
    Commit,
    Back,
    Cut,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1..5u64, 1..600usize).prop_map(|(records, bytes)| Step::Produce(records, bytes)),
        2 => (1..600usize).prop_map(Step::Bulk),
        1 => Just(Step::Ask),
        8 => Just(Step::Send),
        8 => Just(Step::There),
        4 => Just(Step::Commit),
        8 => Just(Step::Back),
        1 => Just(Step::Cut),
    ];
    prop::collection::vec(step, 0..300)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn every_frame_arrives_in_order_whatever_is_lost(steps in steps()) {
        let mut world = World::new();
        for step in steps {
            match step {
                Step::Produce(records, bytes) => world.produce(records, bytes),
                Step::Bulk(bytes) => world.produce_bulk(bytes),
                Step::Ask => world.ask(),
                Step::Send => world.send(),
                Step::There => world.deliver_there(),
                Step::Commit => world.commit(),
                Step::Back => world.deliver_back(),
                Step::Cut => world.cut(),
            }
        }
        world.settle();
        prop_assert_eq!(world.engine.durable, Lsn(world.next_lsn - 1));
        prop_assert!(world.kept.frames.is_empty() && world.kept.bulk.is_empty());
        prop_assert!(world.kept.questions.is_empty());
    }
}

#[test]
fn bulk_gets_its_share_while_writes_go_on() {
    let mut world = World::new();
    for _ in 0..20 {
        world.send();
        world.deliver_there();
        world.deliver_back();
        world.deliver_back();
    }
    assert!(world.sender.is_streaming());
    world.produce_bulk(100);
    for _ in 0..200 {
        world.produce(1, 100);
        world.send();
        world.deliver_there();
        world.commit();
        world.deliver_back();
        world.deliver_back();
    }
    assert_eq!(world.engine.bulk.len(), 1);
}

#[test]
fn wrong_answers_end_the_connection() {
    let welcome = |version| FromReceiver::Welcome {
        version,
        program: String::new(),
        time: Timestamp(0),
    };
    let mut sender = sender();
    assert!(matches!(
        sender.receive(welcome(99)),
        Err(SenderError::Version { found: 99, .. })
    ));
    let mut sender = self::sender();
    let early = FromReceiver::BulkAcknowledged {
        stream: StreamId(1),
        numbers: vec![1],
    };
    assert!(matches!(
        sender.receive(early),
        Err(SenderError::Unexpected { .. })
    ));
    let mut world = World::new();
    world.settle();
    let unsent = FromReceiver::Acknowledged {
        stream: StreamId(1),
        durable: Lsn(5),
        credit_bytes: CREDIT,
    };
    let error = world.sender.receive(unsent).unwrap_err();
    assert!(matches!(
        error,
        SenderError::AcknowledgedUnsent {
            durable: Lsn(5),
            ..
        }
    ));
}

#[test]
fn a_pause_holds_data_back_until_the_next_acknowledgement() {
    let mut world = World::new();
    world.settle();
    let refusal = Refusal {
        code: RefusalCode::NoSpace,
        class: ErrorClass::Retry,
        message: "full".to_owned(),
        hint: "make room".to_owned(),
    };
    world
        .sender
        .receive(FromReceiver::Paused { refusal })
        .unwrap();
    world.produce(1, 10);
    assert!(world.sender.next(&mut world.kept).is_none());
    world.sender.report(SourceReport::default());
    let report = world.sender.next(&mut world.kept);
    assert!(matches!(
        report,
        Some(Outgoing::Message(FromSender::Report { .. }))
    ));
    let goes_on = FromReceiver::Acknowledged {
        stream: StreamId(1),
        durable: Lsn::ZERO,
        credit_bytes: CREDIT,
    };
    world.sender.receive(goes_on).unwrap();
    assert!(matches!(
        world.sender.next(&mut world.kept),
        Some(Outgoing::Frame { .. })
    ));
}
