//! The replica: plain bytes, and what was checked on the way.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use afterimage_blockdev::{BLOCK_BYTES, DiskId, HistoryId, KeyId, Lsn};
use afterimage_cache::seal::content_tag;
use afterimage_cache::{
    DiskKey, Frame, KeySource, MarkKind, Opener, RecordBody, RecordKind, RecordView, TagKey,
};
use parking_lot::Mutex;

pub const TAG_KEY: [u8; 32] = [77; 32];

struct OneKey;

pub fn disk_secret(disk: DiskId) -> [u8; 32] {
    *blake3::hash(&disk.0).as_bytes()
}

impl KeySource for OneKey {
    fn disk_key(&self, disk: DiskId, key: KeyId) -> Option<DiskKey> {
        (key == KeyId(1)).then(|| DiskKey {
            id: key,
            secret: disk_secret(disk),
        })
    }
}

#[derive(Default)]
pub struct ReplicaDisk {
    pub bytes: Vec<u8>,
    lsns: Vec<u64>,
    pub has_copy: bool,
    pub batch: Option<u32>,
    pub bulk_done: Vec<(u64, u64)>,
    pub last: Lsn,
}

/// One line of the story, for tests that look at the order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Told {
    pub lsn: Lsn,
    pub kind: RecordKind,
    pub argument: u64,
    pub note: Vec<u8>,
}

pub struct Replica {
    pub history: Option<HistoryId>,
    pub epoch: u64,
    pub durable: Lsn,
    pub highest: Lsn,
    pub last_time: u64,
    pub disks: HashMap<DiskId, ReplicaDisk>,
    pub story: Vec<Told>,
    pub bulk_bytes: u64,
    pub bulk_frames: u64,
    pub questions: u64,
    pub blocks_asked: u64,
    pub open_batches: HashSet<u32>,
    opener: Opener,
}

pub type Shared = Arc<Mutex<Replica>>;

impl Replica {
    pub fn new() -> Shared {
        Arc::new(Mutex::new(Self {
            history: None,
            epoch: 0,
            durable: Lsn::ZERO,
            highest: Lsn::ZERO,
            last_time: 0,
            disks: HashMap::new(),
            story: Vec::new(),
            bulk_bytes: 0,
            bulk_frames: 0,
            questions: 0,
            blocks_asked: 0,
            open_batches: HashSet::new(),
            opener: Opener::new(Arc::new(OneKey)),
        }))
    }

    pub fn declare(&mut self, disk: DiskId, size_bytes: u64) {
        let disk = self.disks.entry(disk).or_default();
        disk.resize(size_bytes);
    }

    pub fn apply(&mut self, frame: &Frame) {
        assert_eq!(
            frame.header.identity.epoch.0, self.epoch,
            "a frame is of its stream's epoch"
        );
        let records: Vec<RecordView<'_>> = frame
            .view()
            .records()
            .map(|record| record.unwrap().1)
            .collect();
        for record in records {
            if record.header.lsn <= self.durable {
                continue;
            }
            let starts = record.header.kind == RecordKind::EpochStart;
            assert!(
                starts || record.header.lsn == self.durable.next(),
                "LSN {} after {}",
                record.header.lsn,
                self.durable
            );
            assert!(record.header.time.0 >= self.last_time, "times never fall");
            self.last_time = record.header.time.0;
            self.durable = record.header.lsn;
            self.highest = self.highest.max(self.durable);
            self.apply_record(&record);
        }
    }

    fn apply_record(&mut self, record: &RecordView<'_>) {
        let header = record.header;
        let note = match record.body {
            RecordBody::Note(note) => note.to_vec(),
            RecordBody::Slots(_) => Vec::new(),
        };
        match header.kind {
            RecordKind::Write => self.write(record, header.lsn),
            RecordKind::WriteZeroes | RecordKind::Discard => {
                let disk = self.disks.get_mut(&header.disk).unwrap();
                disk.link(header.previous, header.lsn);
                let (start, end) = (
                    header.offset as usize,
                    (header.offset + header.length) as usize,
                );
                disk.bytes[start..end].fill(0);
                disk.stamp(start, end, header.lsn);
            }
            RecordKind::Grow => self
                .disks
                .get_mut(&header.disk)
                .unwrap()
                .resize(header.length),
            RecordKind::BatchBegin(_) => {
                self.open_batches.insert(header.batch.0);
                for id in note.chunks_exact(16) {
                    let id = DiskId(id.try_into().unwrap());
                    self.disks.get_mut(&id).unwrap().batch = Some(header.batch.0);
                }
            }
            RecordKind::BatchEnd => {
                self.open_batches.remove(&header.batch.0);
                for disk in self.disks.values_mut() {
                    if disk.batch == Some(header.batch.0) {
                        disk.batch = None;
                        disk.has_copy = true;
                        disk.bulk_done.clear();
                    }
                }
            }
            _ => {}
        }
        if record.slot_count == 0 {
            let (lsn, kind, argument) = (header.lsn, header.kind, header.argument);
            self.story.push(Told {
                lsn,
                kind,
                argument,
                note,
            });
        }
    }

    fn write(&mut self, record: &RecordView<'_>, lsn: Lsn) {
        let history = self.history.unwrap();
        let disk = self.disks.get_mut(&record.header.disk).unwrap();
        disk.link(record.header.previous, lsn);
        let mut at = record.header.offset as usize;
        for slot in record.slots(history) {
            let (_, context, slot) = slot.unwrap();
            let mut plain = vec![0; slot.header.plain_len()];
            self.opener.open(&context, &slot, &mut plain).unwrap();
            disk.bytes[at..at + plain.len()].copy_from_slice(&plain);
            disk.stamp(at, at + plain.len(), lsn);
            at += plain.len();
        }
    }

    pub fn bulk(&mut self, frame: &Frame) {
        let history = self.history.unwrap();
        self.bulk_frames += 1;
        self.bulk_bytes += frame.bytes.len() as u64;
        for record in frame.view().records() {
            let (_, record) = record.unwrap();
            let header = record.header;
            assert_eq!(header.kind, RecordKind::Bulk);
            assert!(
                self.open_batches.contains(&header.batch.0),
                "bulk comes within its batch"
            );
            self.highest = self.highest.max(header.lsn);
            let disk = self.disks.get_mut(&header.disk).unwrap();
            let mut at = header.offset as usize;
            for slot in record.slots(history) {
                let (_, context, slot) = slot.unwrap();
                let mut plain = vec![0; slot.header.plain_len()];
                self.opener.open(&context, &slot, &mut plain).unwrap();
                for block in plain.chunks_exact(BLOCK_BYTES) {
                    if disk.lsns[at / BLOCK_BYTES] <= header.lsn.0 {
                        disk.bytes[at..at + BLOCK_BYTES].copy_from_slice(block);
                        disk.lsns[at / BLOCK_BYTES] = header.lsn.0;
                    }
                    at += BLOCK_BYTES;
                }
            }
            let block = BLOCK_BYTES as u64;
            disk.bulk_done
                .push((header.offset / block, header.length / block));
        }
    }

    pub fn compare(&mut self, disk: DiskId, first_block: u64, tags: &[[u8; 16]]) -> Vec<bool> {
        self.questions += 1;
        self.blocks_asked += tags.len() as u64;
        let key = TagKey(TAG_KEY);
        let bytes = &self.disks[&disk].bytes;
        let differs = |(block, tag): (usize, &[u8; 16])| {
            let at = block * BLOCK_BYTES;
            content_tag(&key, &bytes[at..at + BLOCK_BYTES]) != *tag
        };
        (first_block as usize..).zip(tags).map(differs).collect()
    }

    pub fn marks(&self) -> Vec<Told> {
        let is_mark = |told: &&Told| {
            matches!(
                told.kind,
                RecordKind::Mark(MarkKind::Crash | MarkKind::Bookmark)
            )
        };
        self.story.iter().filter(is_mark).cloned().collect()
    }
}

impl ReplicaDisk {
    fn resize(&mut self, size_bytes: u64) {
        let size = (size_bytes as usize).next_multiple_of(BLOCK_BYTES);
        self.bytes.resize(size, 0);
        self.lsns.resize(size / BLOCK_BYTES, 0);
    }

    /// Each record names its disk's previous one; an epoch begins anew.
    fn link(&mut self, previous: Lsn, lsn: Lsn) {
        assert!(
            previous == Lsn::ZERO || previous == self.last,
            "no hole within the disk"
        );
        self.last = lsn;
    }

    fn stamp(&mut self, start: usize, end: usize, lsn: Lsn) {
        self.lsns[start / BLOCK_BYTES..end / BLOCK_BYTES].fill(lsn.0);
    }
}
