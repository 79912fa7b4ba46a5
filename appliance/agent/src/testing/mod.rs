//! What tests of this crate share: a source that completes out of order, and a replica.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;

use afterimage_blockdev::{
    BLOCK_BYTES, BlockCompleter, BlockCompletion, BlockDevice, BlockErrorKind, BlockOp, Geometry,
    MemoryDevice, Token,
};
use afterimage_cache::RecordKind;
use parking_lot::{Condvar, Mutex};

use crate::order::{Captured, Payload};

type Job = (Token, BlockOp, Arc<dyn BlockCompleter>);

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    seed: u64,
    is_closed: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    filled: Condvar,
}

/// Says what fails: given the operation's name and offset.
type Fails = Box<dyn Fn(&'static str, u64) -> bool + Send + Sync>;

/// A disk in memory whose requests complete on other threads, in a random order.
pub(crate) struct Scrambled {
    pub(crate) memory: Arc<MemoryDevice>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    fails: Arc<Mutex<Option<Fails>>>,
}

fn next_random(seed: &mut u64) -> u64 {
    *seed = seed
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    *seed >> 33
}

impl Scrambled {
    pub(crate) fn new(memory: Arc<MemoryDevice>, seed: u64) -> Arc<Self> {
        let shared: Arc<Shared> = Arc::default();
        shared.queue.lock().seed = seed;
        let fails: Arc<Mutex<Option<Fails>>> = Arc::default();
        let threads = (0..3).map(|_| {
            let (shared, memory, fails) =
                (Arc::clone(&shared), Arc::clone(&memory), Arc::clone(&fails));
            std::thread::spawn(move || serve(&shared, &memory, &fails))
        });
        let threads = threads.collect();
        Arc::new(Self {
            memory,
            shared,
            threads,
            fails,
        })
    }

    pub(crate) fn fail(&self, fails: impl Fn(&'static str, u64) -> bool + Send + Sync + 'static) {
        *self.fails.lock() = Some(Box::new(fails));
    }
}

fn serve(shared: &Shared, memory: &MemoryDevice, fails: &Mutex<Option<Fails>>) {
    loop {
        let (token, op, to) = {
            let mut queue = shared.queue.lock();
            while queue.jobs.is_empty() {
                if queue.is_closed {
                    return;
                }
                shared.filled.wait(&mut queue);
            }
            let mut seed = queue.seed;
            let place = usize::try_from(next_random(&mut seed)).unwrap() % queue.jobs.len();
            queue.seed = seed;
            queue.jobs.swap_remove_back(place).unwrap()
        };
        let (name, offset, _) = op.describe();
        if fails
            .lock()
            .as_ref()
            .is_some_and(|fails| fails(name, offset))
        {
            let error = op.error(BlockErrorKind::Io {
                errno: libc::EIO,
                message: "made up".to_owned(),
            });
            to.complete(BlockCompletion {
                token,
                result: Err(error),
            });
        } else {
            memory.submit(token, op, to);
        }
    }
}

impl Drop for Scrambled {
    fn drop(&mut self) {
        self.shared.queue.lock().is_closed = true;
        self.shared.filled.notify_all();
        for thread in self.threads.drain(..) {
            let _panicked = thread.join();
        }
    }
}

impl BlockDevice for Scrambled {
    fn geometry(&self) -> Geometry {
        self.memory.geometry()
    }

    fn submit(&self, token: Token, op: BlockOp, to: Arc<dyn BlockCompleter>) {
        self.shared.queue.lock().jobs.push_back((token, op, to));
        self.shared.filled.notify_one();
    }
}

/// Whole blocks, written by records.
pub(crate) struct Replica {
    pub(crate) bytes: Vec<u8>,
}

impl Replica {
    pub(crate) fn new(size_bytes: u64) -> Self {
        let size = usize::try_from(size_bytes)
            .unwrap()
            .next_multiple_of(BLOCK_BYTES);
        Self {
            bytes: vec![0; size],
        }
    }

    pub(crate) fn apply(&mut self, record: &Captured) {
        let start = usize::try_from(record.header.offset).unwrap();
        let end = start + usize::try_from(record.header.length).unwrap();
        match (record.header.kind, &record.payload) {
            (RecordKind::Write, Payload::Data(bytes)) => {
                self.bytes[start..end].copy_from_slice(bytes);
            }
            (RecordKind::Discard | RecordKind::WriteZeroes, _) => self.bytes[start..end].fill(0),
            (RecordKind::Grow, _) => {
                let size = usize::try_from(record.header.length).unwrap();
                self.bytes.resize(size.next_multiple_of(BLOCK_BYTES), 0);
            }
            _ => {}
        }
    }
}
