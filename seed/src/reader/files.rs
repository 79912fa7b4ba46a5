//! Files kept open for reading.

use std::sync::Arc;

use afterimage_blockdev::{
    FileId, FileName, SegmentId, Storage, StorageCompleter, StorageCompletion, StorageOp,
    StorageOutcome, Token,
};

use super::Reader;
use crate::error::SeedError;
use crate::run::{RunId, run_file};
use crate::segment::seed_file;

/// Seed segments have this bit in their number; log segments do not.
pub(crate) const SEED_BIT: u32 = 1 << 31;

/// A segment's file: each time the segment is rewritten there is a new one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct SegmentFile {
    pub(crate) segment: SegmentId,
    /// 0 for the first one.
    pub(crate) generation: u32,
}

impl SegmentFile {
    pub(crate) fn is_seed(self) -> bool {
        self.segment.0 & SEED_BIT != 0 || self.generation > 0
    }
}

/// Which file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum FileKey {
    /// A log or seed segment.
    Segment(SegmentFile),
    /// A run.
    Run(RunId),
}

impl FileKey {
    pub(crate) fn name(self) -> FileName {
        match self {
            Self::Segment(file) if file.is_seed() => seed_file(file.segment, file.generation),
            Self::Segment(file) => afterimage_cache::segment::segment_file("log", file.segment),
            Self::Run(run) => run_file(run),
        }
    }
}

/// An open file; closed when nobody reads it any more.
pub(crate) struct OpenFile {
    pub(crate) id: FileId,
    pub(crate) length: u64,
    storage: Arc<dyn Storage>,
}

struct Ignore;

impl StorageCompleter for Ignore {
    fn complete(&self, _: StorageCompletion) {}
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        self.storage.submit(
            Token(0),
            StorageOp::Close { file: self.id },
            Arc::new(Ignore),
        );
    }
}

impl Reader {
    /// The file that a segment lies in now.
    pub(crate) fn file_of(&self, segment: SegmentId) -> SegmentFile {
        let generation = self.generations.read().get(&segment).copied();
        SegmentFile {
            segment,
            generation: generation.unwrap_or(0),
        }
    }

    pub(crate) fn file(
        self: &Arc<Self>,
        key: FileKey,
        done: impl FnOnce(Result<Arc<OpenFile>, SeedError>) + Send + 'static,
    ) {
        if let Some(file) = self.files.get(&key, |_| 1) {
            done(Ok(file));
            return;
        }
        let reader = Arc::clone(self);
        let op = StorageOp::Open { name: key.name() };
        self.submit(
            op,
            Box::new(move |result| match result {
                Ok(StorageOutcome::Opened { file, length }) => {
                    let storage = Arc::clone(&reader.storage);
                    let open = Arc::new(OpenFile {
                        id: file,
                        length,
                        storage,
                    });
                    // The active log segment still changes its length when it is sealed.
                    reader.files.insert(key, Arc::clone(&open), 1);
                    done(Ok(open));
                }
                Ok(_) => done(Err(SeedError::refused("the storage opened nothing", ""))),
                Err(error) => done(Err(error.into())),
            }),
        );
    }
}
