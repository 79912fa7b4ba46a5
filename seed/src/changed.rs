//! What differs between two cuts of one disk, told from the map alone: no data is read.
//!
//! Invariants
//! * A block that differs is never called unchanged. One that was written with the bytes that it
//!   had counts as changed; so does whatever of either cut is not known for certain.
//! * A block is unchanged if both cuts resolve it to one version (one slot of one history, since
//!   one LSN), or if both read it as zeroes without any slot.

use std::sync::Arc;

use afterimage_blockdev::{BLOCK_BYTES, BlockError, BlockErrorKind, BlockIndex};

use crate::entry::EntryKind;
use crate::error::SeedError;
use crate::reader::{MapPage, REGION_BLOCKS, Reader, Resolved};
use crate::section::Snapshot;
use crate::view::{ViewDevice, device_error_kind};

/// A range that changed as a whole, or not at all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChangedRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
    /// Says whether it may differ.
    pub is_changed: bool,
}

/// Takes adjoining ranges that cover what was asked, in order.
pub type ChangesDone = Box<dyn FnOnce(Result<Vec<ChangedRange>, BlockError>) + Send>;

/// The differences of a disk between two cuts. Holds both cuts readable.
#[derive(Debug)]
pub struct Changes {
    reader: Arc<Reader>,
    since: Arc<Snapshot>,
    until: Arc<Snapshot>,
}

impl Changes {
    /// Compares a view with an earlier one; any two cuts will do, also of two histories.
    ///
    /// # Errors
    /// When they are of different disks.
    pub fn between(since: &ViewDevice, until: &ViewDevice) -> Result<Self, SeedError> {
        let (before, after) = (since.snapshot(), until.snapshot());
        if before.disk != after.disk {
            return Err(SeedError::refused(
                format!("{} and {} are different disks", before.disk, after.disk),
                "compare two states of one disk",
            ));
        }
        Ok(Self {
            reader: Arc::clone(until.reader()),
            since: Arc::clone(before),
            until: Arc::clone(after),
        })
    }

    /// Tells of a range of the later cut what may differ from the earlier one.
    pub fn ranges(&self, offset: u64, length: u64, done: ChangesDone) {
        let end = offset.checked_add(length);
        let Some(end) = end.filter(|end| *end <= self.until.size_bytes) else {
            return done(Err(BlockError {
                operation: "changes",
                offset,
                length,
                kind: BlockErrorKind::Range,
            }));
        };
        let walk = Walk {
            reader: Arc::clone(&self.reader),
            since: Arc::clone(&self.since),
            until: Arc::clone(&self.until),
            at: offset,
            end,
            asked: (offset, length),
            ranges: Vec::new(),
        };
        walk.go(done);
    }
}

/// Walks regions one after the other.
struct Walk {
    reader: Arc<Reader>,
    since: Arc<Snapshot>,
    until: Arc<Snapshot>,
    at: u64,
    end: u64,
    asked: (u64, u64),
    ranges: Vec<ChangedRange>,
}

impl Walk {
    fn go(mut self, done: ChangesDone) {
        if self.since.is_hurt() || self.until.is_hurt() {
            let end = self.end;
            self.add(end, true);
        }
        while self.at < self.end {
            let region = BlockIndex::containing(self.at).0 / REGION_BLOCKS;
            let before = self.reader.page_in_memory(&self.since, region);
            let after = self.reader.page_in_memory(&self.until, region);
            let (Some(before), Some(after)) = (before, after) else {
                return self.load(region, done);
            };
            self.region(&before, &after);
        }
        done(Ok(self.ranges));
    }

    /// Goes on when both pages are there.
    fn load(self, region: u64, done: ChangesDone) {
        let (reader, since) = (Arc::clone(&self.reader), Arc::clone(&self.since));
        reader.map_page(&since, region, move |before| match before {
            Err(error) => done(Err(self.error(&error))),
            Ok(before) => {
                let (reader, until) = (Arc::clone(&self.reader), Arc::clone(&self.until));
                let mut walk = self;
                reader.map_page(&until, region, move |after| match after {
                    Err(error) => done(Err(walk.error(&error))),
                    Ok(after) => {
                        walk.region(&before, &after);
                        walk.go(done);
                    }
                });
            }
        });
    }

    fn error(&self, error: &SeedError) -> BlockError {
        let (offset, length) = self.asked;
        BlockError {
            operation: "changes",
            offset,
            length,
            kind: device_error_kind(error),
        }
    }

    fn region(&mut self, before: &MapPage, after: &MapPage) {
        let blocks = before.blocks.iter().zip(&after.blocks);
        let first = BlockIndex::containing(self.at).0 % REGION_BLOCKS;
        for (old, new) in blocks.skip(usize::try_from(first).unwrap_or(0)) {
            if self.at >= self.end {
                return;
            }
            let block = BlockIndex::containing(self.at);
            let next = block.offset() + BLOCK_BYTES as u64;
            // A block that the earlier disk did not have as a whole is new.
            let is_new = self.since.size_bytes < next.min(self.until.size_bytes);
            let is_changed = is_new || !self.is_same(old, new);
            self.add(next.min(self.end), is_changed);
        }
    }

    fn is_same(&self, old: &Resolved, new: &Resolved) -> bool {
        if reads_zero(old) && reads_zero(new) {
            return true;
        }
        let version = |one: &Resolved| (one.lsn, one.kind, one.segment, one.slot, one.block);
        one_history((&self.since, old), (&self.until, new))
            && old.kind != EntryKind::Unknown
            && version(old) == version(new)
    }

    fn add(&mut self, next: u64, is_changed: bool) {
        let length = next - self.at;
        match self.ranges.last_mut() {
            Some(last) if last.is_changed == is_changed => last.length += length,
            _ if length > 0 => self.ranges.push(ChangedRange {
                offset: self.at,
                length,
                is_changed,
            }),
            _ => {}
        }
        self.at = next;
    }
}

/// Says whether a block has no slot, and is known to be zeroes.
fn reads_zero(block: &Resolved) -> bool {
    block.layer == 0 || matches!(block.kind, EntryKind::Zero | EntryKind::Discard)
}

fn one_history(old: (&Snapshot, &Resolved), new: (&Snapshot, &Resolved)) -> bool {
    let history = |(snapshot, block): (&Snapshot, &Resolved)| {
        let place = usize::from(block.layer).checked_sub(1)?;
        Some(snapshot.layers.get(place)?.history)
    };
    let found = history(old);
    found.is_some() && found == history(new)
}
