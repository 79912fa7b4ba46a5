//! The threads that seal: compress, tag, encrypt and hash records into frames.

use std::collections::HashMap;
use std::sync::Arc;
use std::thread::JoinHandle;

use afterimage_blockdev::{DiskId, Entropy, KeyId};
use afterimage_cache::{Effort, Frame, FrameBuilder, FrameIdentity, Sealer};

use super::keys::Keys;
use super::store::FrameStore;
use crate::order::{Order, Payload, Portion};
use crate::tap::admission::Admission;

/// The sealers of one thread, one for each disk: each is a writer session of its own.
pub struct Sealers {
    keys: Arc<Keys>,
    entropy: Arc<dyn Entropy>,
    effort: Effort,
    disks: HashMap<DiskId, (KeyId, Sealer)>,
}

impl Sealers {
    /// Makes a thread's sealers.
    #[must_use]
    pub fn new(keys: Arc<Keys>, entropy: Arc<dyn Entropy>) -> Self {
        Self {
            keys,
            entropy,
            effort: Effort::Zstd(1),
            disks: HashMap::new(),
        }
    }

    /// Sets how hard to compress from now on.
    pub fn set_effort(&mut self, effort: Effort) {
        self.effort = effort;
    }

    /// The sealer of a disk.
    ///
    /// # Panics
    /// When the disk's keys are not known: nothing is captured before they are.
    pub fn of(&mut self, disk: DiskId) -> &mut Sealer {
        let key = self.keys.disk(disk).expect("a captured disk has a key");
        let is_current = self.disks.get(&disk).is_some_and(|(id, _)| *id == key.id);
        if !is_current {
            let tag = self.keys.tag().expect("a captured disk has a tag key");
            let sealer = Sealer::new(Some(&key), tag, self.entropy.as_ref());
            self.disks.insert(disk, (key.id, sealer));
        }
        let (_, sealer) = self.disks.get_mut(&disk).expect("it was just made");
        sealer.set_effort(self.effort);
        sealer
    }

    fn seal(&mut self, portion: &Portion) -> Frame {
        let mut builder = FrameBuilder::new(portion.identity, false);
        for record in &portion.records {
            match &record.payload {
                Payload::Data(bytes) => {
                    builder.push_data(&record.header, bytes, self.of(record.header.disk));
                }
                Payload::Note(note) => builder.push_note(&record.header, note),
            }
        }
        builder.finish()
    }
}

/// How hard to compress with so many bytes waiting: less, the more there are.
#[must_use]
pub fn effort_for(waiting: usize, waiting_max: usize, level_max: i32) -> Effort {
    match waiting_max / waiting.max(1) {
        0..4 => Effort::None,
        4..16 => Effort::Zstd(-5),
        16..64 => Effort::Zstd(-1),
        64..256 => Effort::Zstd(1.min(level_max)),
        _ => Effort::Zstd(level_max),
    }
}

/// The highest zstd level that this machine can spare the time for.
#[must_use]
pub fn level_for_cores(level_max: i32) -> i32 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let level = match cores {
        0..4 => 1,
        4..8 => 2,
        _ => 3,
    };
    level.min(level_max)
}

/// What the threads share.
pub struct SealJob {
    /// Where records come from.
    pub order: Arc<Order>,
    /// What their bytes leave when sealed.
    pub admission: Arc<Admission>,
    /// Where frames go.
    pub store: Arc<FrameStore>,
    /// The keys.
    pub keys: Arc<Keys>,
    /// For the writer sessions.
    pub entropy: Arc<dyn Entropy>,
    /// Bytes that may wait.
    pub waiting_max: usize,
    /// Most effort.
    pub level_max: i32,
}

impl SealJob {
    fn run(&self) {
        let mut sealers = Sealers::new(Arc::clone(&self.keys), Arc::clone(&self.entropy));
        while let Some(portion) = self.order.take() {
            sealers.set_effort(effort_for(
                portion.waiting,
                self.waiting_max,
                self.level_max,
            ));
            let frame = sealers.seal(&portion);
            let (ticket, cost) = (portion.ticket, portion.cost);
            drop(portion);
            self.store.put(ticket, frame);
            self.admission.leave(cost);
        }
    }
}

/// The sealing threads; they end when the order is closed and empty.
pub struct SealPool {
    threads: Vec<JoinHandle<()>>,
}

impl SealPool {
    /// Starts them.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(job: SealJob, threads: usize) -> std::io::Result<Self> {
        let job = Arc::new(job);
        let start = |number: usize| {
            let job = Arc::clone(&job);
            let name = format!("seal-{number}");
            std::thread::Builder::new()
                .name(name)
                .spawn(move || job.run())
        };
        Ok(Self {
            threads: (0..threads).map(start).collect::<Result<_, _>>()?,
        })
    }

    /// Waits for the threads to end.
    pub fn join(self) {
        for thread in self.threads {
            let _panicked = thread.join();
        }
    }
}

/// Seals one frame of bulk records. Each is (header, plain bytes).
#[must_use]
pub fn seal_bulk<'a>(
    sealers: &mut Sealers,
    identity: FrameIdentity,
    records: impl IntoIterator<Item = (afterimage_cache::RecordHeader, &'a [u8])>,
) -> Frame {
    let mut builder = FrameBuilder::new(identity, true);
    for (header, bytes) in records {
        builder.push_data(&header, bytes, sealers.of(header.disk));
    }
    builder.finish()
}
