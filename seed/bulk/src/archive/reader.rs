//! Reads an archive as a disk.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::chain::{COMMIT_BYTES, Chain, HEADER_BYTES};
use super::secret::Secret;
use super::segment::Segment;
use super::{chain_path, damaged};
use crate::error::BulkError;
use crate::progress::Progress;
use crate::source::BlockSource;

/// Segments whose directories are kept in memory.
const OPEN_MAX: usize = 4;

/// What a check of a whole archive found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Verified {
    /// Segments.
    pub segments: u64,
    /// Slots, all of whose hashes are right.
    pub slots: u64,
    /// Bytes of slots.
    pub bytes: u64,
}

/// A finished archive. Every byte that it gives was verified.
pub struct ArchiveReader {
    directory: PathBuf,
    chain: Chain,
    open: Mutex<VecDeque<(u64, Arc<Segment>)>>,
}

impl ArchiveReader {
    /// Opens an archive and verifies its chain.
    ///
    /// # Errors
    /// `WrongKey` and `KeyMismatch`, `Damaged`, `Unfinished`, `Version`, `Io`.
    pub fn open(directory: &Path, secret: Option<&Secret>) -> Result<Self, BulkError> {
        let path = chain_path(directory);
        let Some(chain) = Chain::load(directory, secret)? else {
            std::fs::metadata(&path).map_err(BulkError::io("open", &path))?;
            return Err(BulkError::Unfinished { path, at: 0 });
        };
        if let Some(at) = chain.broken_at
            && (!chain.is_torn || chain.is_finished || is_whole_commit(&path, at)?)
        {
            return Err(damaged(&path, at, "a commit of the chain"));
        }
        if !chain.is_finished {
            return Err(BulkError::Unfinished {
                path: directory.to_owned(),
                at: chain.position(),
            });
        }
        Ok(Self {
            directory: directory.to_owned(),
            chain,
            open: Mutex::default(),
        })
    }

    /// Which state of which disk it holds.
    #[must_use]
    pub fn identity(&self) -> &str {
        &self.chain.header.identity
    }

    /// Says whether a secret was needed.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.chain.keys.is_encrypted()
    }

    /// Verifies every segment and every slot.
    ///
    /// # Errors
    /// `Damaged` at the first thing that is wrong, `Interrupted`, `Io`.
    pub fn verify(&self, progress: &Progress) -> Result<Verified, BulkError> {
        progress.begin(self.size_bytes(), 0);
        let mut found = Verified::default();
        for named in &self.chain.segments {
            if progress.is_stopping() {
                return Err(BulkError::Interrupted);
            }
            let header = &self.chain.header;
            let segment = Segment::open(&self.directory, &self.chain.keys, &header.id, named)?;
            let bytes = segment.verify(&self.chain.keys)?;
            found.segments += 1;
            found.slots += segment.entries().len() as u64;
            found.bytes += bytes;
            progress.moved(bytes);
            progress.reached(named.to);
        }
        progress.reached(self.size_bytes());
        Ok(found)
    }

    fn segment(&self, number: usize) -> Result<Arc<Segment>, BulkError> {
        let named = self.chain.segments.get(number).ok_or_else(|| {
            let at = (HEADER_BYTES + number * COMMIT_BYTES) as u64;
            damaged(&self.chain.path, at, "the number of commits")
        })?;
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let known = open.iter().find(|(known, _)| *known == named.number);
        if let Some((_, segment)) = known {
            return Ok(Arc::clone(segment));
        }
        let id = &self.chain.header.id;
        let segment = Segment::open(&self.directory, &self.chain.keys, id, named)?;
        let segment = Arc::new(segment);
        if open.len() >= OPEN_MAX {
            open.pop_front();
        }
        open.push_back((named.number, Arc::clone(&segment)));
        Ok(segment)
    }

    /// The segments that hold something of a range.
    fn around(&self, range: &Range<u64>) -> Range<usize> {
        let segments = &self.chain.segments;
        let first = segments.partition_point(|named| named.to <= range.start);
        let end = segments.partition_point(|named| named.from < range.end);
        first..end.max(first)
    }
}

/// A torn commit is shorter than a whole one.
fn is_whole_commit(path: &Path, at: u64) -> Result<bool, BulkError> {
    let metadata = std::fs::metadata(path).map_err(BulkError::io("look at", path))?;
    Ok(metadata.len() >= at + COMMIT_BYTES as u64)
}

impl BlockSource for ArchiveReader {
    fn path(&self) -> &Path {
        &self.directory
    }

    fn size_bytes(&self) -> u64 {
        self.chain.header.size_bytes
    }

    fn data(&self, range: Range<u64>) -> Result<Vec<Range<u64>>, BulkError> {
        let mut data: Vec<Range<u64>> = Vec::new();
        for number in self.around(&range) {
            let segment = self.segment(number)?;
            let entries = segment.entries();
            let first = entries.partition_point(|entry| entry.end() <= range.start);
            for entry in entries.iter().skip(first) {
                if entry.offset >= range.end {
                    break;
                }
                let part = entry.offset.max(range.start)..entry.end().min(range.end);
                match data.last_mut() {
                    Some(last) if last.end == part.start => last.end = part.end,
                    _ => data.push(part),
                }
            }
        }
        Ok(data)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BulkError> {
        buffer.fill(0);
        let range = offset..offset + buffer.len() as u64;
        for number in self.around(&range) {
            let segment = self.segment(number)?;
            let entries = segment.entries();
            let first = entries.partition_point(|entry| entry.end() <= range.start);
            for entry in entries.iter().skip(first) {
                if entry.offset >= range.end {
                    break;
                }
                let plain = segment.plain(&self.chain.keys, entry)?;
                copy_overlap(entry.offset, &plain, offset, buffer);
            }
        }
        Ok(())
    }
}

/// Copies what bytes at `from` have in common with a buffer at `to`.
fn copy_overlap(from: u64, bytes: &[u8], to: u64, buffer: &mut [u8]) {
    let skip = |ahead: u64| usize::try_from(ahead).unwrap_or(usize::MAX);
    let source = bytes.iter().skip(skip(to.saturating_sub(from)));
    let target = buffer.iter_mut().skip(skip(from.saturating_sub(to)));
    for (target, source) in target.zip(source) {
        *target = *source;
    }
}
