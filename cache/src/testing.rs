//! What the tests of this crate share.

use std::sync::Arc;

use afterimage_blockdev::simulated::SeededEntropy;
use afterimage_blockdev::{
    AgentId, BatchId, CellIndex, DiskId, Epoch, HistoryId, KeyId, Lsn, MachineId, Timestamp,
};

use crate::key::{DiskKey, KeySource, TagKey};
use crate::record::{MarkKind, RecordHeader, RecordKind};
use crate::seal::{Opener, Sealer};
use crate::slot::SlotContext;
use crate::{Frame, FrameBuilder, FrameIdentity};

pub(crate) const DISK: DiskId = DiskId([0xd1; 16]);
pub(crate) const HISTORY: HistoryId = HistoryId([0x41; 16]);
pub(crate) const TAG: TagKey = TagKey([9; 32]);

pub(crate) fn key() -> DiskKey {
    DiskKey {
        id: KeyId(1),
        secret: [5; 32],
    }
}

/// Holds the key above.
pub(crate) struct OneKey;

impl KeySource for OneKey {
    fn disk_key(&self, disk: DiskId, id: KeyId) -> Option<DiskKey> {
        (disk == DISK && id == KeyId(1)).then(key)
    }
}

pub(crate) fn sealer(seed: u64) -> Sealer {
    Sealer::new(Some(&key()), TAG, &SeededEntropy::new(seed))
}

pub(crate) fn opener() -> Opener {
    Opener::new(Arc::new(OneKey))
}

pub(crate) fn context(mask: u8) -> SlotContext {
    SlotContext::uniform(DISK, HISTORY, CellIndex(77), mask, Lsn(1234))
}

pub(crate) fn identity(which: u8) -> FrameIdentity {
    FrameIdentity {
        machine: MachineId([which; 16]),
        history: HISTORY,
        origin: AgentId([0xa9; 16]),
        epoch: Epoch(3),
    }
}

pub(crate) fn write(lsn: u64, offset: u64, length: usize) -> RecordHeader {
    RecordHeader {
        kind: RecordKind::Write,
        lsn: Lsn(lsn),
        previous: Lsn(lsn - 1),
        time: Timestamp(1_700_000_000_000_000_000 + lsn),
        disk: DISK,
        offset,
        length: length as u64,
        batch: BatchId(0),
        argument: 0,
    }
}

pub(crate) fn mark(lsn: u64) -> RecordHeader {
    RecordHeader {
        kind: RecordKind::Mark(MarkKind::Bookmark),
        disk: DiskId::NIL,
        ..write(lsn, 0, 0)
    }
}

/// Bytes that compress to about half, unlike those of another seed.
pub(crate) fn plain(seed: u64, len: usize) -> Vec<u8> {
    let mut random = afterimage_blockdev::Random::new(seed);
    let mut bytes = vec![0; len];
    for block in bytes.chunks_mut(128) {
        random.fill(&mut block[..64]);
    }
    bytes
}

/// Two writes and a mark, from LSN `first` on.
pub(crate) fn frame(seed: u64, first: u64) -> Frame {
    let mut sealer = sealer(seed);
    let mut builder = FrameBuilder::new(identity(1), false);
    let offset = seed % 5 * 4096;
    builder.push_data(&write(first, offset, 8192), &plain(seed, 8192), &mut sealer);
    builder.push_note(&mark(first + 1), b"before the upgrade");
    let second = plain(seed + 1, 5 * 4096);
    builder.push_data(&write(first + 2, 12288, second.len()), &second, &mut sealer);
    builder.finish()
}
