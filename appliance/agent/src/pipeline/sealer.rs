//! The threads that seal: compress, tag, encrypt and hash records into frames.

use std::collections::HashMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use afterimage_blockdev::{BLOCK_BYTES, DiskId, Entropy, KeyId};
use afterimage_cache::{ContentTag, Effort, Frame, FrameBuilder, FrameIdentity, Sealer, Tagger};

pub use super::effort::{effort_for, level_for_cores};

use super::effort::Governor;
use super::keys::Keys;
use super::store::FrameStore;
use crate::order::{Order, Payload, Portion};
use crate::tap::admission::Admission;

/// The sealers of one thread, one for each disk: each is a writer session of its own.
pub struct Sealers {
    keys: Arc<Keys>,
    entropy: Arc<dyn Entropy>,
    effort: Effort,
    tagger: Option<Tagger>,
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
            tagger: None,
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
        let tags = self.tags(portion);
        let mut tags = tags.as_slice();
        let mut builder = FrameBuilder::new(portion.identity, false);
        builder.reserve(portion.cost);
        for record in &portion.records {
            match &record.payload {
                Payload::Data(bytes) => {
                    let (now, later) = tags.split_at(bytes.len() / BLOCK_BYTES);
                    tags = later;
                    let sealer = self.of(record.header.disk);
                    builder.push_tagged(&record.header, bytes, now, sealer);
                }
                Payload::Note(note) => builder.push_note(&record.header, note),
            }
        }
        builder.finish()
    }

    /// The content tags of all blocks, in order.
    fn tags(&mut self, portion: &Portion) -> Vec<ContentTag> {
        let mut tags = Vec::new();
        let blocks = portion
            .records
            .iter()
            .filter_map(|record| match &record.payload {
                Payload::Data(bytes) => Some(&bytes[..]),
                Payload::Note(_) => None,
            });
        let key = self.keys.tag();
        if self.tagger.as_ref().map(Tagger::key) != key.as_ref() {
            self.tagger = key.map(Tagger::new);
        }
        match &mut self.tagger {
            Some(tagger) => tagger.tag(blocks, &mut tags),
            None => assert_eq!(blocks.count(), 0, "a captured disk has a tag key"),
        }
        tags
    }
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
        let mut governor = Governor::new(self.waiting_max, self.level_max);
        while let Some(portion) = self.order.take() {
            let effort = governor.effort(portion.waiting);
            sealers.set_effort(effort);
            let began = Instant::now();
            let frame = sealers.seal(&portion);
            governor.sealed(effort, portion.cost, frame.bytes.len(), began.elapsed());
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
