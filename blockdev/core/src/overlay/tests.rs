use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use parking_lot::Mutex;

use super::*;
use crate::device::{Extent, ExtentKind};
use crate::memory::MemoryDevice;
use crate::random::Random;
use crate::wait;

type Waiting = (Token, BlockOp, Arc<dyn BlockCompleter>);

/// A device that performs its requests when told to, in random order, or fails them.
struct Slow {
    inner: Arc<MemoryDevice>,
    waiting: Mutex<Vec<Waiting>>,
    fails: AtomicBool,
}

impl Slow {
    fn new(inner: Arc<MemoryDevice>) -> Arc<Self> {
        Arc::new(Self {
            inner,
            waiting: Mutex::default(),
            fails: AtomicBool::new(false),
        })
    }

    fn run_one(&self, random: &mut Random) -> bool {
        let (token, op, to) = {
            let mut waiting = self.waiting.lock();
            if waiting.is_empty() {
                return false;
            }
            let index = random.index(waiting.len());
            waiting.swap_remove(index)
        };
        if self.fails.load(Ordering::Relaxed) {
            // What a failed write leaves is undefined, so it leaves rubbish.
            if let BlockOp::Write {
                offset,
                mut buffer,
                fua,
            } = op
            {
                buffer.fill(0xee);
                let rubbish = BlockOp::Write {
                    offset,
                    buffer,
                    fua,
                };
                let error = rubbish.error(BlockErrorKind::NoSpace);
                wait::device(&*self.inner, rubbish).unwrap();
                to.complete(BlockCompletion {
                    token,
                    result: Err(error),
                });
            } else {
                let error = op.error(BlockErrorKind::NoSpace);
                to.complete(BlockCompletion {
                    token,
                    result: Err(error),
                });
            }
        } else {
            self.inner.submit(token, op, to);
        }
        true
    }
}

impl BlockDevice for Slow {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn submit(&self, token: Token, op: BlockOp, to: Arc<dyn BlockCompleter>) {
        self.waiting.lock().push((token, op, to));
    }
}

fn base_of(size: u64, unit: u32, random: &mut Random) -> (Arc<MemoryDevice>, Vec<u8>) {
    let base = MemoryDevice::new(size, unit);
    let mut bytes = vec![0; to_usize(size)];
    for part in bytes.chunks_mut(4096) {
        if random.chance(0.7) {
            random.fill(part);
        }
    }
    let buffer = IoBuffer::copy_of(&bytes);
    wait::device(
        &*base,
        BlockOp::Write {
            offset: 0,
            buffer,
            fua: false,
        },
    )
    .unwrap();
    base.set_read_only(true);
    (base, bytes)
}

#[derive(Default)]
struct Record(Mutex<Vec<BlockCompletion>>);

impl BlockCompleter for Record {
    fn complete(&self, completion: BlockCompletion) {
        self.0.lock().push(completion);
    }
}

/// What a read in flight must find: bytes that no write in flight touches.
struct Expected {
    start: usize,
    bytes: Vec<Option<u8>>,
}

/// Random requests at a depth, against an array of bytes to which the changes are applied in the
/// order of submission: that is the order that overlapping changes keep.
struct Run {
    random: Random,
    overlay: Arc<Overlay>,
    sides: [Arc<Slow>; 2],
    unit: usize,
    model: Vec<u8>,
    record: Arc<Record>,
    next: u64,
    reads: HashMap<u64, Expected>,
    changes: HashMap<u64, core::ops::Range<usize>>,
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let unit = if random.chance(0.7) { 512 } else { 4096 };
        let over_unit = if random.chance(0.7) { 512 } else { 4096 };
        let size = u64::from(unit) * (64 + random.below(64));
        let (base, model) = base_of(size, unit, &mut random);
        let over_size = size.next_multiple_of(u64::from(over_unit));
        let over = MemoryDevice::new(over_size, over_unit);
        let sides = [Slow::new(base), Slow::new(over)];
        let overlay = Overlay::new(sides[0].clone(), sides[1].clone()).unwrap();
        Self {
            random,
            overlay,
            sides,
            unit: unit as usize,
            model,
            record: Arc::default(),
            next: 0,
            reads: HashMap::new(),
            changes: HashMap::new(),
        }
    }

    fn in_flight(&self) -> usize {
        self.reads.len() + self.changes.len()
    }

    fn submit(&mut self) {
        let blocks = self.model.len() / self.unit;
        let first = self.random.index(blocks);
        let count = self.random.index((blocks - first).min(40)) + 1;
        let range = first * self.unit..(first + count) * self.unit;
        let (offset, length) = (range.start as u64, (range.end - range.start) as u64);
        self.next += 1;
        let token = Token(self.next);
        let mut buffer = IoBuffer::zeroed(range.len());
        let op = match self.random.below(10) {
            0..4 => {
                let bytes = self.model[range.clone()]
                    .iter()
                    .copied()
                    .map(Some)
                    .collect();
                let mut expected = Expected {
                    start: range.start,
                    bytes,
                };
                self.changes
                    .values()
                    .for_each(|change| expected.forget(change));
                self.reads.insert(token.0, expected);
                self.overlay
                    .submit(token, BlockOp::Read { offset, buffer }, self.record.clone());
                return;
            }
            4..8 => {
                self.random.fill(&mut buffer);
                self.model[range.clone()].copy_from_slice(&buffer);
                BlockOp::Write {
                    offset,
                    buffer,
                    fua: self.random.chance(0.1),
                }
            }
            kind => {
                self.model[range.clone()].fill(0);
                match kind {
                    8 => BlockOp::Discard { offset, length },
                    _ => BlockOp::WriteZeroes {
                        offset,
                        length,
                        may_unmap: false,
                    },
                }
            }
        };
        self.reads.values_mut().for_each(|read| read.forget(&range));
        self.changes.insert(token.0, range);
        self.overlay.submit(token, op, self.record.clone());
    }

    /// Lets one side perform one request, and checks what completed.
    fn step(&mut self) {
        let side = self.random.index(2);
        if !self.sides[side].run_one(&mut self.random) {
            self.sides[1 - side].run_one(&mut self.random);
        }
        for BlockCompletion { token, result } in self.record.0.lock().drain(..) {
            match (self.reads.remove(&token.0), result.unwrap()) {
                (Some(expected), BlockOutcome::Data(buffer)) => expected.check(&buffer),
                (None, BlockOutcome::Done) => assert!(self.changes.remove(&token.0).is_some()),
                (_, other) => panic!("{token} gave {other:?}"),
            }
        }
    }

    fn finish(&mut self) {
        while self.in_flight() > 0 {
            self.step();
        }
    }
}

impl Expected {
    fn forget(&mut self, range: &core::ops::Range<usize>) {
        let end = self.start + self.bytes.len();
        for at in range.start.max(self.start)..range.end.min(end) {
            self.bytes[at - self.start] = None;
        }
    }

    fn check(&self, got: &[u8]) {
        assert_eq!(got.len(), self.bytes.len());
        for (index, (got, expected)) in got.iter().zip(&self.bytes).enumerate() {
            assert!(
                expected.is_none_or(|byte| byte == *got),
                "byte {}",
                self.start + index
            );
        }
    }
}

#[test]
fn an_overlay_is_an_array_of_bytes_at_any_depth() {
    for seed in 0..300 {
        println!("seed {seed}");
        let mut run = Run::new(seed);
        let base_before = run.sides[0].inner.image();
        let depth = [1, 4, 16, 64][to_usize(seed % 4)];
        for _ in 0..150 {
            while run.in_flight() < depth {
                run.submit();
            }
            run.step();
        }
        run.finish();
        assert_eq!(run.overlay.shared.locks.depth(), (0, 0));
        let whole = BlockOp::Read {
            offset: 0,
            buffer: IoBuffer::zeroed(run.model.len()),
        };
        run.reads.insert(
            0,
            Expected {
                start: 0,
                bytes: run.model.iter().copied().map(Some).collect(),
            },
        );
        run.overlay.submit(Token(0), whole, run.record.clone());
        run.finish();
        check_extents(&mut run);
        assert_eq!(
            run.sides[0].inner.image(),
            base_before,
            "the base is never written"
        );
    }
}

fn check_extents(run: &mut Run) {
    let unit = run.unit as u64;
    let blocks = run.model.len() as u64 / unit;
    let first = run.random.below(blocks);
    let count = run.random.below(blocks - first) + 1;
    let (offset, length) = (first * unit, count * unit);
    run.overlay.submit(
        Token(0),
        BlockOp::Extents { offset, length },
        run.record.clone(),
    );
    while run.sides.iter().any(|side| side.run_one(&mut run.random)) {}
    let BlockOutcome::Extents(extents) = run.record.0.lock().pop().unwrap().result.unwrap() else {
        panic!("extents gave something else")
    };
    let mut at = offset;
    for Extent {
        offset,
        length,
        kind,
    } in extents
    {
        assert!(offset == at && length > 0);
        at += length;
        if kind == ExtentKind::Zero {
            let bytes = &run.model[to_usize(offset)..to_usize(at)];
            assert!(
                bytes.iter().all(|byte| *byte == 0),
                "data called a hole at {offset}"
            );
        }
    }
    assert_eq!(at, offset + length);
}

#[test]
fn a_failed_write_leaves_the_old_block_and_the_lock_free() {
    let mut random = Random::new(1);
    let (base, bytes) = base_of(65536, 512, &mut random);
    let over = Slow::new(MemoryDevice::new(65536, 512));
    let overlay = Overlay::new(base, over.clone()).unwrap();
    let record: Arc<Record> = Arc::default();
    over.fails.store(true, Ordering::Relaxed);
    for (offset, length) in [(0, 4096), (4608, 512), (8192, 1024)] {
        let buffer = IoBuffer::copy_of(&vec![7; length]);
        overlay.submit(
            Token(1),
            BlockOp::Write {
                offset,
                buffer,
                fua: false,
            },
            record.clone(),
        );
    }
    overlay.submit(
        Token(2),
        BlockOp::Discard {
            offset: 512,
            length: 8704,
        },
        record.clone(),
    );
    while over.run_one(&mut random) {}
    let failures = core::mem::take(&mut *record.0.lock());
    assert_eq!(failures.len(), 4);
    for failure in &failures {
        let error = failure.result.as_ref().unwrap_err();
        assert!(matches!(error.kind, BlockErrorKind::NoSpace), "{error}");
    }
    assert_eq!(overlay.present_bytes(), 0);
    over.fails.store(false, Ordering::Relaxed);
    let read = |record: &Arc<Record>| {
        let op = BlockOp::Read {
            offset: 0,
            buffer: IoBuffer::zeroed(16384),
        };
        overlay.submit(Token(3), op, record.clone());
    };
    read(&record);
    match record.0.lock().pop().unwrap().result.unwrap() {
        BlockOutcome::Data(buffer) => assert_eq!(buffer[..], bytes[..16384]),
        other => panic!("read gave {other:?}"),
    }
    // A discard over the rubbish that failed writes left must read as zero.
    overlay.submit(
        Token(4),
        BlockOp::Discard {
            offset: 0,
            length: 16384,
        },
        record.clone(),
    );
    while over.run_one(&mut random) {}
    read(&record);
    while over.run_one(&mut random) {}
    match record.0.lock().pop().unwrap().result.unwrap() {
        BlockOutcome::Data(buffer) => assert!(buffer.iter().all(|byte| *byte == 0)),
        other => panic!("read gave {other:?}"),
    }
}

/// Each thread owns every fourth sector, so that all share all blocks.
#[test]
fn threads_that_share_blocks_lose_nothing() {
    const SECTORS: u64 = 256;
    let mut random = Random::new(3);
    let (base, _) = base_of(SECTORS * 512, 512, &mut random);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("over");
    std::fs::File::create(&path)
        .unwrap()
        .set_len(SECTORS * 512)
        .unwrap();
    let over = crate::real::RealDevice::open(&path, crate::real::DeviceOptions::default()).unwrap();
    let overlay = Overlay::new(base, over).unwrap();
    let threads: Vec<_> = (0..4_u64)
        .map(|lane| {
            let overlay = Arc::clone(&overlay);
            thread::spawn(move || {
                let mut random = Random::new(lane);
                for sector in (0..SECTORS / 4).map(|row| row * 4 + lane) {
                    for round in 0..3 {
                        let mut buffer = IoBuffer::zeroed(512);
                        random.fill(&mut buffer);
                        let written = buffer.clone();
                        let (offset, fua) = (sector * 512, round == 2);
                        let op = BlockOp::Write {
                            offset,
                            buffer,
                            fua,
                        };
                        wait::device(&*overlay, op).unwrap();
                        let op = BlockOp::Read {
                            offset,
                            buffer: IoBuffer::zeroed(512),
                        };
                        let BlockOutcome::Data(back) = wait::device(&*overlay, op).unwrap() else {
                            panic!("read gave something else")
                        };
                        assert_eq!(back[..], written[..]);
                    }
                }
            })
        })
        .collect();
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
    wait::device(&*overlay, BlockOp::Flush).unwrap();
    for lane in 0..4 {
        let mut random = Random::new(lane);
        for sector in (0..SECTORS / 4).map(|row| row * 4 + lane) {
            let mut expected = [0; 512];
            (0..3).for_each(|_| random.fill(&mut expected));
            let op = BlockOp::Read {
                offset: sector * 512,
                buffer: IoBuffer::zeroed(512),
            };
            let BlockOutcome::Data(back) = wait::device(&*overlay, op).unwrap() else {
                panic!("read gave something else")
            };
            assert_eq!(back[..], expected);
        }
    }
}

#[test]
fn unfit_devices_and_requests_are_refused() {
    let base = || MemoryDevice::new(8192 + 512, 512);
    assert!(Overlay::new(base(), MemoryDevice::new(8192, 512)).is_err());
    assert!(Overlay::new(base(), MemoryDevice::new(8192, 4096)).is_err());
    let read_only = MemoryDevice::new(16384, 512);
    read_only.set_read_only(true);
    assert!(Overlay::new(base(), read_only).is_err());
    let overlay = Overlay::new(base(), MemoryDevice::new(12288, 4096)).unwrap();
    let grow = BlockOp::Grow { size_bytes: 16384 };
    let error = wait::device(&*overlay, grow).unwrap_err();
    assert!(matches!(error.kind, BlockErrorKind::NotSupported));
    let read = BlockOp::Read {
        offset: 8192,
        buffer: IoBuffer::zeroed(1024),
    };
    assert!(matches!(
        wait::device(&*overlay, read).unwrap_err().kind,
        BlockErrorKind::Range
    ));
    // The last block is whole with 512 bytes, and wider on the other side.
    let write = BlockOp::Write {
        offset: 8192,
        buffer: IoBuffer::copy_of(&[5; 512]),
        fua: false,
    };
    wait::device(&*overlay, write).unwrap();
    let read = BlockOp::Read {
        offset: 0,
        buffer: IoBuffer::zeroed(8704),
    };
    match wait::device(&*overlay, read).unwrap() {
        BlockOutcome::Data(buffer) => {
            assert!(buffer[..8192].iter().all(|byte| *byte == 0));
            assert_eq!(buffer[8192..], [5; 512]);
        }
        other => panic!("read gave {other:?}"),
    }
}
