//! Reading: from a snapshot and a range to verified, plain bytes, without ever waiting.
//!
//! A read goes through three stages, each of which may find what it needs in memory or ask the
//! storage and go on from the completion: map pages (which slot holds which block), directories
//! (where the slot lies), slots (the bytes). What is read is verified in the context where it
//! should be, every time; what does not verify is an error that names it.

mod cache;
mod directory;
mod files;
mod map_page;
mod own;
mod slots;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use afterimage_blockdev::{
    IoBuffer, SegmentId, Storage, StorageCompleter, StorageCompletion, StorageError, StorageOp,
    StorageOutcome, StoreId, Token,
};
use afterimage_cache::segment::Directory;
use afterimage_cache::{KeySource, Opener, TagKey};
use parking_lot::{Mutex, RwLock};

use crate::error::SeedError;
use cache::Cache;
pub(crate) use files::SEED_BIT;
use files::{FileKey, OpenFile, SegmentFile};
use map_page::PageKey;

pub(crate) use map_page::{MapPage, REGION_BLOCKS, Resolved};
pub use slots::{ReadDone, ReadFailure, Sink};

/// Bounds of a reader.
#[derive(Clone, Copy, Debug)]
pub struct ReaderOptions {
    /// Bytes of map pages kept.
    pub map_bytes_max: usize,
    /// Bytes of directories kept.
    pub directory_bytes_max: usize,
    /// Files kept open.
    pub files_max: usize,
}

impl Default for ReaderOptions {
    fn default() -> Self {
        Self {
            map_bytes_max: 96 << 20,
            directory_bytes_max: 64 << 20,
            files_max: 512,
        }
    }
}

/// Reads slots through maps. Shared by all views and branches of a store.
pub struct Reader {
    storage: Arc<dyn Storage>,
    store: StoreId,
    keys: Arc<dyn KeySource>,
    openers: Mutex<Vec<Opener>>,
    files: Cache<FileKey, OpenFile>,
    directories: Cache<SegmentFile, Directory>,
    /// Directories of log segments that were begun since the start and are not sealed yet; they
    /// grow as commits become durable.
    live: RwLock<HashMap<SegmentId, Arc<RwLock<Directory>>>>,
    /// Segments that were rewritten or destaged, and how often.
    generations: RwLock<HashMap<SegmentId, u32>>,
    /// Counts such moves.
    moves: AtomicU64,
    pages: Cache<PageKey, MapPage>,
    /// Who waits for a directory that is being read.
    loading: Mutex<HashMap<SegmentFile, Vec<SlotsDone>>>,
}

/// Takes a directory.
type SlotsDone = Box<dyn FnOnce(Result<directory::Slots, SeedError>) + Send>;

impl core::fmt::Debug for Reader {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Reader({})", self.store)
    }
}

type StorageDone = Box<dyn FnOnce(Result<StorageOutcome, StorageError>) + Send>;

/// Calls a closure with the one completion.
struct Once(Mutex<Option<StorageDone>>);

impl StorageCompleter for Once {
    fn complete(&self, completion: StorageCompletion) {
        let done = self.0.lock().take();
        if let Some(done) = done {
            done(completion.result);
        }
    }
}

impl Reader {
    /// Makes a reader over a store's files.
    #[must_use]
    pub fn new(
        storage: Arc<dyn Storage>,
        store: StoreId,
        keys: Arc<dyn KeySource>,
        options: ReaderOptions,
    ) -> Arc<Self> {
        Arc::new(Self {
            storage,
            store,
            keys,
            openers: Mutex::new(Vec::new()),
            files: Cache::new(options.files_max, 1),
            directories: Cache::new(options.directory_bytes_max, 1),
            live: RwLock::new(HashMap::new()),
            generations: RwLock::new(HashMap::new()),
            moves: AtomicU64::new(0),
            pages: Cache::new(options.map_bytes_max, 8),
            loading: Mutex::new(HashMap::new()),
        })
    }

    /// The directory of an unsealed log segment, to be filled as commits become durable.
    #[must_use]
    pub fn live_directory(&self, segment: SegmentId) -> Arc<RwLock<Directory>> {
        Arc::clone(self.live.write().entry(segment).or_default())
    }

    /// A log segment has its directory on disk now.
    pub fn sealed(&self, segment: SegmentId) {
        // Readers may still look; the file's directory says the same as the live one, and more
        // than a walk over a damaged file.
        self.live.write().remove(&segment);
        let generation = 0;
        let name = SegmentFile {
            segment,
            generation,
        };
        // It was shortened, so an open file's length is wrong now.
        self.forget(name);
    }

    /// A segment lies in another file now, under the same numbers.
    pub fn moved(&self, segment: SegmentId, generation: u32) {
        self.removed(segment);
        self.generations.write().insert(segment, generation);
        self.moves.fetch_add(1, Ordering::AcqRel);
    }

    /// How many segments were moved so far. A read that fails while this changes is tried again:
    /// its file may be gone.
    pub(crate) fn moves(&self) -> u64 {
        self.moves.load(Ordering::Acquire)
    }

    /// A run is gone.
    pub fn run_removed(&self, run: crate::run::RunId) {
        self.files.forget(&FileKey::Run(run));
    }

    /// A segment's file is gone.
    pub fn removed(&self, segment: SegmentId) {
        self.live.write().remove(&segment);
        self.forget(self.file_of(segment));
    }

    fn forget(&self, name: SegmentFile) {
        self.directories.forget(&name);
        self.files.forget(&FileKey::Segment(name));
    }

    pub(crate) fn submit(&self, op: StorageOp, done: StorageDone) {
        self.storage
            .submit(Token(0), op, Arc::new(Once(Mutex::new(Some(done)))));
    }

    pub(crate) fn read_file(
        &self,
        file: Arc<OpenFile>,
        offset: u64,
        len: usize,
        done: impl FnOnce(Result<IoBuffer, StorageError>) + Send + 'static,
    ) {
        let op = StorageOp::Read {
            file: file.id,
            offset,
            buffer: IoBuffer::zeroed(len),
        };
        self.submit(
            op,
            Box::new(move |result| {
                // The file stays open until its last read is over.
                let _open = file;
                done(result.map(|outcome| match outcome {
                    StorageOutcome::Read(buffer) => buffer,
                    _ => IoBuffer::with_capacity(0),
                }));
            }),
        );
    }

    fn opener(&self) -> Opener {
        self.openers
            .lock()
            .pop()
            .unwrap_or_else(|| Opener::new(Arc::clone(&self.keys)))
    }

    fn give_back(&self, opener: Opener) {
        let mut openers = self.openers.lock();
        if openers.len() < 8 {
            openers.push(opener);
        }
    }

    /// The tag of a block of zeroes.
    #[must_use]
    pub fn zero_tag(key: &TagKey) -> [u8; 16] {
        afterimage_cache::seal::content_tag(key, &[0; afterimage_blockdev::BLOCK_BYTES])
    }
}
