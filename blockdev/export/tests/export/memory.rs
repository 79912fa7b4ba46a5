//! A disk in memory for these tests. It can complete late and in another order, on threads of
//! its own, and it can fail to flush.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, RwLock};
use std::thread::JoinHandle;

use afterimage_blockdev::{
    BlockCompleter, BlockCompletion, BlockDevice, BlockError, BlockErrorKind, BlockOp,
    BlockOutcome, Extent, ExtentKind, Geometry, Token,
};

const CHUNK: usize = 64 << 10;

type Chunk = RwLock<Option<Box<[u8]>>>;

/// The bytes, and what is known about what was asked of them.
pub(crate) struct Disk {
    chunks: Vec<Chunk>,
    block: u32,
    is_read_only: bool,
    size: AtomicU64,
    pub(crate) flushes: AtomicU64,
    pub(crate) fua_writes: AtomicU64,
    pub(crate) discards: AtomicU64,
    pub(crate) zeroes: AtomicU64,
    /// What a flush fails with; 0 when it succeeds.
    pub(crate) flush_errno: AtomicI32,
}

impl Disk {
    fn perform(&self, op: BlockOp) -> Result<BlockOutcome, BlockError> {
        op.validate(&self.geometry())?;
        match op {
            BlockOp::Read { offset, mut buffer } => {
                self.parts(offset, buffer.len(), |chunk, at, range| {
                    match chunk.read().unwrap().as_deref() {
                        Some(bytes) => {
                            let length = range.len();
                            buffer[range].copy_from_slice(&bytes[at..at + length]);
                        }
                        None => buffer[range].fill(0),
                    }
                });
                return Ok(BlockOutcome::Data(buffer));
            }
            BlockOp::Write {
                offset,
                buffer,
                fua,
            } => {
                self.fua_writes.fetch_add(u64::from(fua), Ordering::SeqCst);
                self.parts(offset, buffer.len(), |chunk, at, range| {
                    let mut chunk = chunk.write().unwrap();
                    let bytes = chunk.get_or_insert_with(|| vec![0; CHUNK].into_boxed_slice());
                    bytes[at..at + range.len()].copy_from_slice(&buffer[range]);
                });
            }
            BlockOp::Flush => {
                self.flushes.fetch_add(1, Ordering::SeqCst);
                let errno = self.flush_errno.load(Ordering::SeqCst);
                if errno != 0 {
                    let message = "the test's disk does not flush".to_owned();
                    return Err(BlockOp::Flush.error(BlockErrorKind::Io { errno, message }));
                }
            }
            BlockOp::Discard { offset, length } => {
                self.discards.fetch_add(1, Ordering::SeqCst);
                self.zero(offset, length);
            }
            BlockOp::WriteZeroes { offset, length, .. } => {
                self.zeroes.fetch_add(1, Ordering::SeqCst);
                self.zero(offset, length);
            }
            BlockOp::Grow { size_bytes } => {
                if size_bytes > (self.chunks.len() * CHUNK) as u64 {
                    return Err(BlockOp::Grow { size_bytes }.error(BlockErrorKind::NoSpace));
                }
                self.size.store(size_bytes, Ordering::SeqCst);
            }
            BlockOp::Extents { offset, length } => {
                let mut extents = Vec::new();
                let length = usize::try_from(length).unwrap();
                self.parts(offset, length, |chunk, _, range| {
                    let is_data = chunk.read().unwrap().is_some();
                    extents.push(Extent {
                        offset: offset + range.start as u64,
                        length: range.len() as u64,
                        kind: if is_data {
                            ExtentKind::Data
                        } else {
                            ExtentKind::Zero
                        },
                    });
                });
                return Ok(BlockOutcome::Extents(extents));
            }
        }
        Ok(BlockOutcome::Done)
    }

    fn zero(&self, offset: u64, length: u64) {
        self.parts(
            offset,
            usize::try_from(length).unwrap(),
            |chunk, at, range| {
                let mut chunk = chunk.write().unwrap();
                if range.len() == CHUNK {
                    *chunk = None;
                } else if let Some(bytes) = chunk.as_deref_mut() {
                    bytes[at..at + range.len()].fill(0);
                }
            },
        );
    }

    /// Calls with each chunk of a range: the place in the chunk, and the part of the range.
    fn parts(
        &self,
        offset: u64,
        length: usize,
        mut each: impl FnMut(&Chunk, usize, std::ops::Range<usize>),
    ) {
        let start = usize::try_from(offset).unwrap();
        let mut done = 0;
        while done < length {
            let (chunk, at) = ((start + done) / CHUNK, (start + done) % CHUNK);
            let step = (CHUNK - at).min(length - done);
            each(&self.chunks[chunk], at, done..done + step);
            done += step;
        }
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.size.load(Ordering::SeqCst),
            logical_block_bytes: self.block,
            is_read_only: self.is_read_only,
        }
    }
}

type Pending = (Token, BlockOp, Arc<dyn BlockCompleter>);

#[derive(Default)]
struct Late {
    waiting: Mutex<(Vec<Pending>, bool)>,
    changed: Condvar,
}

/// The device over a [`Disk`].
pub(crate) struct Memory {
    pub(crate) disk: Arc<Disk>,
    late: Arc<Late>,
    threads: Vec<JoinHandle<()>>,
}

impl Memory {
    /// Completes within `submit`.
    pub(crate) fn new(size: u64, block: u32) -> Arc<Self> {
        Self::with_threads(size, size, block, 0, false)
    }

    /// Completes on two threads, the youngest request first.
    pub(crate) fn late(size: u64, block: u32) -> Arc<Self> {
        Self::with_threads(size, size, block, 2, false)
    }

    pub(crate) fn read_only(size: u64) -> Arc<Self> {
        Self::with_threads(size, size, 512, 0, true)
    }

    pub(crate) fn growing(size: u64, largest: u64) -> Arc<Self> {
        Self::with_threads(size, largest, 512, 2, false)
    }

    fn with_threads(
        size: u64,
        largest: u64,
        block: u32,
        threads: usize,
        is_read_only: bool,
    ) -> Arc<Self> {
        let chunks = usize::try_from(largest).unwrap().div_ceil(CHUNK);
        let disk = Arc::new(Disk {
            chunks: (0..chunks).map(|_| RwLock::new(None)).collect(),
            block,
            is_read_only,
            size: AtomicU64::new(size),
            flushes: AtomicU64::new(0),
            fua_writes: AtomicU64::new(0),
            discards: AtomicU64::new(0),
            zeroes: AtomicU64::new(0),
            flush_errno: AtomicI32::new(0),
        });
        let late = Arc::new(Late::default());
        let threads = (0..threads)
            .map(|_| {
                let (disk, late) = (Arc::clone(&disk), Arc::clone(&late));
                std::thread::spawn(move || work(&disk, &late))
            })
            .collect();
        Arc::new(Self {
            disk,
            late,
            threads,
        })
    }

    /// The bytes of any range.
    pub(crate) fn bytes(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.disk.parts(offset, length, |chunk, at, range| {
            if let Some(chunk) = chunk.read().unwrap().as_deref() {
                let length = range.len();
                bytes[range].copy_from_slice(&chunk[at..at + length]);
            }
        });
        bytes
    }
}

fn work(disk: &Disk, late: &Late) {
    loop {
        let (token, op, to) = {
            let mut waiting = late.waiting.lock().unwrap();
            loop {
                if let Some(pending) = waiting.0.pop() {
                    break pending;
                }
                if waiting.1 {
                    return;
                }
                waiting = late.changed.wait(waiting).unwrap();
            }
        };
        to.complete(BlockCompletion {
            token,
            result: disk.perform(op),
        });
    }
}

impl BlockDevice for Memory {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn submit(&self, token: Token, op: BlockOp, to: Arc<dyn BlockCompleter>) {
        if self.threads.is_empty() {
            to.complete(BlockCompletion {
                token,
                result: self.disk.perform(op),
            });
        } else {
            self.late.waiting.lock().unwrap().0.push((token, op, to));
            self.late.changed.notify_one();
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.late.waiting.lock().unwrap().1 = true;
        self.late.changed.notify_all();
        let own = std::thread::current().id();
        for thread in self.threads.drain(..) {
            // The last completion may be what drops the device.
            if thread.thread().id() != own {
                thread.join().unwrap();
            }
        }
    }
}
