//! The oracle of design decision D8: LSN order is a linear extension of happens-before, and the
//! records applied in that order give the source, at any queue depth.
#![allow(clippy::single_range_in_vec_init)]

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use afterimage_blockdev::{
    AgentId, BLOCK_BYTES, BlockCompletion, BlockError, BlockOutcome, DiskId, Epoch, HistoryId,
    IoBuffer, Lsn, MachineId, MemoryDevice, SystemClock, Timestamp, wait,
};
use afterimage_cache::{FrameIdentity, RecordKind};
use parking_lot::Mutex;

use super::admission::Admission;
use super::ranges::RangeLock;
use super::*;
use crate::activity::Activity;
use crate::activity::worker::Worker;
use crate::clock::ApplianceClock;
use crate::config::ActivityConfig;
use crate::order::{Captured, Order, OrderStart, Payload, PortionOptions};
use crate::testing::{Replica, Scrambled};

#[derive(Default)]
struct Heard {
    resyncs: Mutex<Vec<String>>,
}

impl CaptureEvents for Heard {
    fn resync_needed(&self, _disk: DiskId, reason: &str) {
        self.resyncs.lock().push(reason.to_owned());
    }

    fn not_recorded(&self, _disk: DiskId, _bytes: u64) {}
}

struct Rig {
    tap: Arc<Tap>,
    order: Arc<Order>,
    activity: Arc<Activity>,
    heard: Arc<Heard>,
    worker: Worker,
    _directory: tempfile::TempDir,
}

impl Rig {
    fn new(source: Arc<dyn BlockDevice>, admitted_bytes: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let identity = FrameIdentity {
            machine: MachineId([1; 16]),
            history: HistoryId([2; 16]),
            origin: AgentId([3; 16]),
            epoch: Epoch(1),
        };
        let start = OrderStart {
            identity,
            next: Lsn(1),
            reserved: Lsn(1 << 40),
            time_floor: Timestamp(0),
        };
        let clock = Arc::new(ApplianceClock::new(Arc::new(SystemClock::default()), 0));
        let portions = PortionOptions {
            bytes: 1 << 20,
            gather: Duration::ZERO,
        };
        let order = Arc::new(Order::new(start, clock, portions, 0, Box::new(|| ())));
        order.begin_flow([]);
        let worker = Worker::start(ActivityConfig::default()).unwrap();
        let disk = DiskId([4; 16]);
        let size = source.geometry().size_bytes;
        let path = directory.path().join("activity");
        let acknowledged = Arc::new(AtomicU64::new(0));
        let (activity, _) =
            Activity::open(&path, disk, size, true, worker.bell(), acknowledged).unwrap();
        worker.add(Arc::clone(&activity), Arc::clone(&source));
        let heard: Arc<Heard> = Arc::default();
        let events: Arc<Heard> = Arc::clone(&heard);
        let capture = Arc::new(Capture {
            disk,
            place: order.add_disk(),
            source: Arc::clone(&source),
            order: Arc::clone(&order),
            admission: Arc::new(Admission::new(admitted_bytes)),
            activity: Arc::clone(&activity),
            ranges: RangeLock::default(),
            events,
        });
        let tap = Tap::new(source);
        tap.capture(capture, Box::new(|| ()));
        Self {
            tap,
            order,
            activity,
            heard,
            worker,
            _directory: directory,
        }
    }

    /// Takes records off in order, as a sealer does, until the order is closed.
    fn drain(&self) -> std::thread::JoinHandle<Vec<Captured>> {
        let (order, tap) = (Arc::clone(&self.order), Arc::clone(&self.tap));
        std::thread::spawn(move || {
            let mut records = Vec::new();
            while let Some(portion) = order.take() {
                records.extend(portion.records);
                tap.captured_by().unwrap().admission.leave(portion.cost);
            }
            records
        })
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<BlockOutcome, BlockError> {
        let buffer = IoBuffer::copy_of(bytes);
        wait::device(
            &*self.tap,
            BlockOp::Write {
                offset,
                buffer,
                fua: false,
            },
        )
    }

    fn all(&self, op: BlockOp) -> Vec<Captured> {
        let drained = self.drain();
        let _result = wait::device(&*self.tap, op);
        self.order.close();
        drained.join().unwrap()
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963);
        (self.0 >> 33) % limit
    }
}

fn check_chain(records: &[Captured]) {
    let mut previous = Lsn::ZERO;
    let mut time = Timestamp(0);
    for (record, lsn) in records.iter().zip(1..) {
        assert_eq!(record.header.lsn, Lsn(lsn), "no gap");
        assert_eq!(
            record.header.previous, previous,
            "each record names its disk's previous one"
        );
        assert!(record.header.time >= time, "times never fall");
        (previous, time) = (record.header.lsn, record.header.time);
    }
}

#[derive(Clone, Copy)]
struct Event {
    id: u64,
    submitted: u64,
    completed: u64,
}

/// 64 writers, each of which waits for its write before the next one; ranges overlap a lot.
#[test]
fn lsn_order_extends_happens_before_at_depth_64() {
    const BLOCKS: u64 = 48;
    let memory = MemoryDevice::new(BLOCKS * BLOCK_BYTES as u64, 4096);
    let rig = Rig::new(Scrambled::new(Arc::clone(&memory), 7), 1 << 20);
    let drained = rig.drain();
    let ticks = AtomicU64::new(1);
    let events = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for writer in 0..64 {
            let (rig, ticks, events) = (&rig, &ticks, &events);
            scope.spawn(move || {
                let mut random = Random(writer + 1);
                for number in 0..40 {
                    let id = writer * 1000 + number + 1;
                    let first = random.below(BLOCKS - 4);
                    let blocks = 1 + random.below(4);
                    let mut bytes = vec![0; usize::try_from(blocks).unwrap() * BLOCK_BYTES];
                    for block in bytes.chunks_exact_mut(BLOCK_BYTES) {
                        block[..8].copy_from_slice(&id.to_le_bytes());
                    }
                    let submitted = ticks.fetch_add(1, Ordering::SeqCst);
                    rig.write(first * BLOCK_BYTES as u64, &bytes).unwrap();
                    let completed = ticks.fetch_add(1, Ordering::SeqCst);
                    events.lock().push(Event {
                        id,
                        submitted,
                        completed,
                    });
                }
            });
        }
    });
    rig.order.close();
    let records = drained.join().unwrap();
    check_chain(&records);
    let mut lsns = HashMap::new();
    let mut replica = Replica::new(memory.geometry().size_bytes);
    for record in &records {
        let Payload::Data(bytes) = &record.payload else {
            panic!("only writes were made")
        };
        let id = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        lsns.insert(id, record.header.lsn);
        replica.apply(record);
    }
    let events = events.into_inner();
    assert_eq!(lsns.len(), events.len());
    for a in &events {
        for b in &events {
            if a.completed < b.submitted {
                assert!(
                    lsns[&a.id] < lsns[&b.id],
                    "a write that came after has a higher LSN"
                );
            }
        }
    }
    assert!(
        replica.bytes == memory.image(),
        "the records in order give the source"
    );
}

/// Any mixture of operations of 512-byte blocks on a disk of an odd size.
#[test]
fn records_give_the_source_with_512_byte_blocks() {
    const SECTORS: u64 = 8 * 40 + 5;
    let memory = MemoryDevice::new(SECTORS * 512, 512);
    let rig = Rig::new(Scrambled::new(Arc::clone(&memory), 3), 256 << 10);
    let drained = rig.drain();
    std::thread::scope(|scope| {
        for writer in 0..64 {
            let rig = &rig;
            scope.spawn(move || {
                let mut random = Random(writer * 31 + 5);
                for _ in 0..40 {
                    let first = random.below(SECTORS - 1);
                    let count = 1 + random.below(20.min(SECTORS - first));
                    let (offset, length) = (first * 512, count * 512);
                    let op = match random.below(6) {
                        0 => BlockOp::Discard { offset, length },
                        1 => BlockOp::WriteZeroes {
                            offset,
                            length,
                            may_unmap: true,
                        },
                        kind => {
                            let fill = u8::try_from(1 + random.below(255)).unwrap();
                            let mut buffer = IoBuffer::zeroed(usize::try_from(length).unwrap());
                            buffer.fill(fill);
                            BlockOp::Write {
                                offset,
                                buffer,
                                fua: kind == 2,
                            }
                        }
                    };
                    wait::device(&*rig.tap, op).unwrap();
                }
            });
        }
    });
    rig.order.close();
    let records = drained.join().unwrap();
    check_chain(&records);
    let mut replica = Replica::new(memory.geometry().size_bytes);
    records.iter().for_each(|record| replica.apply(record));
    let mut image = memory.image();
    image.resize(replica.bytes.len(), 0);
    assert!(
        replica.bytes == image,
        "what lies beyond the end of the disk is zero"
    );
}

#[test]
fn a_failed_write_gets_what_the_source_holds() {
    let memory = MemoryDevice::new(1 << 20, 4096);
    wait::device(
        &*memory,
        BlockOp::Write {
            offset: 8192,
            buffer: IoBuffer::copy_of(&[9; 4096]),
            fua: false,
        },
    )
    .unwrap();
    let source = Scrambled::new(Arc::clone(&memory), 1);
    source.fail(|name, _| name == "write");
    let rig = Rig::new(source, 1 << 20);
    let drained = rig.drain();
    rig.write(8192, &[1; 4096]).unwrap_err();
    rig.order.close();
    let records = drained.join().unwrap();
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].header.kind, RecordKind::Write);
    let Payload::Data(bytes) = &records[0].payload else {
        panic!("a write has data")
    };
    assert!(bytes[..] == [9; 4096], "the log has what the source has");
    assert!(rig.heard.resyncs.lock().is_empty());
}

#[test]
fn a_range_that_cannot_be_read_back_is_unknown() {
    let source = Scrambled::new(MemoryDevice::new(8 << 20, 4096), 1);
    source.fail(|name, _| name != "flush");
    let rig = Rig::new(source, 1 << 20);
    let drained = rig.drain();
    rig.write(2 << 20, &[1; 8192]).unwrap_err();
    rig.order.close();
    let records = drained.join().unwrap();
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].header.kind, RecordKind::Unknown);
    assert_eq!(
        (records[0].header.offset, records[0].header.length),
        (2 << 20, 8192)
    );
    assert_eq!(rig.heard.resyncs.lock().len(), 1);
    assert_eq!(rig.activity.tainted(8 << 20), [2 << 20..3 << 20]);
}

#[test]
fn long_writes_are_split() {
    let memory = MemoryDevice::new(16 << 20, 4096);
    let rig = Rig::new(memory, 64 << 20);
    let mut buffer = IoBuffer::zeroed(9 << 20);
    buffer.fill(5);
    let records = rig.all(BlockOp::Write {
        offset: 1 << 20,
        buffer,
        fua: false,
    });
    let parts: Vec<_> = records
        .iter()
        .map(|record| (record.header.offset, record.header.length))
        .collect();
    assert_eq!(
        parts,
        [(1 << 20, 4 << 20), (5 << 20, 4 << 20), (9 << 20, 1 << 20)]
    );
}

#[test]
fn a_refused_request_leaves_no_record() {
    let memory = MemoryDevice::new(1 << 20, 4096);
    let rig = Rig::new(memory, 1 << 20);
    let records = rig.all(BlockOp::Discard {
        offset: 1 << 20,
        length: 4096,
    });
    assert!(records.is_empty());
}

#[test]
fn without_a_flow_writes_pass_and_taint() {
    let memory = MemoryDevice::new(4 << 20, 4096);
    let rig = Rig::new(Arc::<MemoryDevice>::clone(&memory), 1 << 20);
    rig.order.stop_flow();
    rig.write(1 << 20, &[7; 4096]).unwrap();
    assert_eq!(rig.activity.tainted(4 << 20), [1 << 20..2 << 20]);
    assert_eq!(memory.copy(1 << 20, 1), [7]);
    assert_eq!(rig.order.captured().0, Lsn::ZERO, "no LSN was given out");
    let taints = rig.activity.taints();
    rig.activity.clear(&[0..4 << 20], taints - 1);
    assert!(
        rig.activity.is_tainted(),
        "an older resync does not clear a newer taint"
    );
    rig.activity.clear(&[0..4 << 20], taints);
    assert!(!rig.activity.is_tainted());
}

#[test]
fn capture_begins_behind_the_last_write_that_passed() {
    let memory = MemoryDevice::new(1 << 20, 4096);
    let held = Arc::new(Held::default());
    let tap = Tap::new(Arc::<Held>::clone(&held));
    let write = || BlockOp::Write {
        offset: 0,
        buffer: IoBuffer::zeroed(4096),
        fua: false,
    };
    struct Ignore;
    impl BlockCompleter for Ignore {
        fn complete(&self, _completion: BlockCompletion) {}
    }
    tap.submit(Token(1), write(), Arc::new(Ignore));
    let rig = Rig::new(memory, 1 << 20);
    let capture = Arc::clone(rig.tap.captured_by().unwrap());
    let settled = Arc::new(AtomicU64::new(0));
    let told = Arc::clone(&settled);
    tap.capture(capture, Box::new(move || told.store(1, Ordering::SeqCst)));
    assert_eq!(
        settled.load(Ordering::SeqCst),
        0,
        "one write is still under way"
    );
    held.release();
    assert_eq!(settled.load(Ordering::SeqCst), 1);
    drop(rig.worker);
}

type Waiting = (Token, Arc<dyn BlockCompleter>);

#[derive(Default)]
struct Held {
    waiting: Mutex<Vec<Waiting>>,
}

impl Held {
    fn release(&self) {
        for (token, to) in self.waiting.lock().drain(..) {
            to.complete(BlockCompletion {
                token,
                result: Ok(BlockOutcome::Done),
            });
        }
    }
}

impl BlockDevice for Held {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: 1 << 20,
            logical_block_bytes: 4096,
            is_read_only: false,
        }
    }

    fn submit(&self, token: Token, _op: BlockOp, to: Arc<dyn BlockCompleter>) {
        self.waiting.lock().push((token, to));
    }
}
