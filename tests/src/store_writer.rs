//! A machine that writes: makes frames of random records, keeps those that are not acknowledged,
//! and notes everything in the model.

use std::collections::VecDeque;

use afterimage_blockdev::simulated::SeededEntropy;
use afterimage_blockdev::{
    AgentId, BLOCK_BYTES, BatchId, DiskId, Epoch, HistoryId, Lsn, MachineId, Random, Timestamp,
};
use afterimage_cache::seal::Effort;
use afterimage_cache::{
    BatchKind, DiskKey, Frame, FrameBuilder, FrameIdentity, MarkKind, RecordHeader, RecordKind,
    Sealer, TagKey,
};
use afterimage_seed::engine::StreamNumber;

use crate::store_model::{Bulk, Change, History, Model, Record, content};

const BLOCK: u64 = BLOCK_BYTES as u64;
/// Bytes at which a frame is long enough; a segment of a small log must have room for it.
const FRAME_BYTES: usize = 64 << 10;

/// A disk of a writer.
pub struct WriterDisk {
    /// Identity.
    pub id: DiskId,
    /// Name.
    pub name: String,
    /// Size in blocks.
    pub blocks: usize,
    /// LSN of its newest record.
    previous: Lsn,
    sealer: Option<Sealer>,
}

/// A frame that is not acknowledged, and what it holds.
pub struct Kept {
    /// The frame.
    pub frame: Frame,
    /// Its records.
    pub records: Vec<Record>,
    /// It was handed to the open stream.
    pub is_sent: bool,
}

/// A batch that was begun.
struct OpenBatch {
    number: u32,
    disks: Vec<usize>,
    /// The first LSN that its bulk may name.
    begin: Lsn,
}

/// See the module's text.
pub struct Writer {
    /// The machine.
    pub machine: MachineId,
    /// Its name.
    pub name: String,
    /// The history that it writes.
    pub history: HistoryId,
    /// Where that forked off.
    pub parent: Option<(HistoryId, Lsn)>,
    /// Who writes.
    pub origin: AgentId,
    /// The epoch of new frames.
    pub epoch: Epoch,
    /// The open stream.
    pub stream: Option<StreamNumber>,
    /// The disks.
    pub disks: Vec<WriterDisk>,
    /// Highest LSN given out.
    pub last: Lsn,
    /// Frames that are not acknowledged.
    pub kept: VecDeque<Kept>,
    /// Number of the next bulk frame.
    pub next_bulk: u64,
    random: Random,
    time: u64,
    next_stamp: u64,
    next_batch: u32,
    batch: Option<OpenBatch>,
    needs_epoch_start: Option<u64>,
}

fn identity(random: &mut Random) -> [u8; 16] {
    let mut bytes = [0; 16];
    random.fill(&mut bytes);
    bytes
}

impl Writer {
    /// Makes a machine with disks of a few blocks.
    #[must_use]
    pub fn new(seed: u64, number: usize, disks: usize, blocks_max: usize) -> Self {
        let mut random = Random::new(seed);
        let machine = MachineId(identity(&mut random));
        let disks = (0..disks)
            .map(|disk| WriterDisk {
                id: DiskId(identity(&mut random)),
                name: format!("disk-{disk}"),
                blocks: blocks_max / 2 + random.index(blocks_max / 2),
                previous: Lsn::ZERO,
                sealer: None,
            })
            .collect();
        Self {
            machine,
            name: format!("machine-{number}"),
            history: HistoryId(identity(&mut random)),
            parent: None,
            origin: AgentId(identity(&mut random)),
            epoch: Epoch(1),
            stream: None,
            disks,
            last: Lsn::ZERO,
            kept: VecDeque::new(),
            next_bulk: 1,
            time: 1_800_000_000_000_000_000 + random.below(1 << 30),
            next_stamp: u64::try_from(number + 1).unwrap_or(1) << 40,
            next_batch: 1,
            batch: None,
            needs_epoch_start: None,
            random,
        }
    }

    /// Sets the time of the next record, when that is not before the last one's.
    pub fn set_time(&mut self, time: Timestamp) {
        self.time = self.time.max(time.0);
    }

    /// Tells the model of this machine.
    pub fn declare(&self, model: &mut Model) {
        model
            .histories
            .insert(self.history, History::new(self.parent, false));
        for disk in &self.disks {
            model.sizes.insert(disk.id, disk.blocks);
        }
    }

    /// Takes a disk's keys.
    pub fn set_keys(&mut self, disk: usize, key: &DiskKey, tag_key: [u8; 32]) {
        let entropy = SeededEntropy::new(self.random.next_u64());
        let mut sealer = Sealer::new(Some(key), TagKey(tag_key), &entropy);
        let effort = if self.random.chance(0.5) {
            Effort::None
        } else {
            Effort::Zstd(-5)
        };
        sealer.set_effort(effort);
        self.disks[disk].sealer = Some(sealer);
    }

    fn stamps(&mut self, count: usize) -> Vec<u64> {
        (0..count)
            .map(|_| {
                self.next_stamp += 1;
                if self.random.chance(0.1) {
                    0
                } else {
                    self.next_stamp
                }
            })
            .collect()
    }

    fn range(&mut self, disk: usize, longest: usize) -> (usize, usize) {
        let blocks = self.disks[disk].blocks;
        let count = (1 + self.random.index(longest)).min(blocks);
        // Half of all writes go to a few places, so that blocks are written again and again.
        let end = if self.random.chance(0.5) {
            (blocks - count).min(12)
        } else {
            blocks - count
        };
        (self.random.index(end + 1), count)
    }

    fn header(&mut self, kind: RecordKind) -> RecordHeader {
        self.last = self.last.next();
        self.time += self.random.below(300_000_000);
        RecordHeader {
            kind,
            lsn: self.last,
            previous: Lsn::ZERO,
            time: Timestamp(self.time),
            disk: DiskId::NIL,
            offset: 0,
            length: 0,
            batch: BatchId(0),
            argument: 0,
        }
    }

    fn of_disk(
        &mut self,
        kind: RecordKind,
        disk: usize,
        first: usize,
        count: usize,
    ) -> RecordHeader {
        let mut header = self.header(kind);
        let state = &mut self.disks[disk];
        header.disk = state.id;
        header.previous = state.previous;
        header.offset = first as u64 * BLOCK;
        header.length = count as u64 * BLOCK;
        state.previous = header.lsn;
        header
    }

    fn identity(&self) -> FrameIdentity {
        FrameIdentity {
            machine: self.machine,
            history: self.history,
            origin: self.origin,
            epoch: self.epoch,
        }
    }

    /// Begins a new epoch, some LSNs above all that were given out; what was not acknowledged is
    /// forgotten.
    pub fn restart(&mut self, highest: Lsn, last_kept: Lsn) {
        self.kept.clear();
        self.epoch = Epoch(self.epoch.0 + 1);
        self.last = Lsn(self.last.max(highest).0 + self.random.below(20));
        self.needs_epoch_start = Some(last_kept.0);
        self.batch = None;
        for disk in &mut self.disks {
            disk.previous = Lsn::ZERO;
        }
    }

    /// Goes on in a history of its own.
    pub fn rescue(&mut self, parent: HistoryId, fork: Lsn, model: &mut Model) {
        self.kept.clear();
        self.stream = None;
        self.history = HistoryId(identity(&mut self.random));
        self.parent = Some((parent, fork));
        self.last = fork;
        self.epoch = Epoch(self.epoch.0 + 1);
        self.batch = None;
        self.needs_epoch_start = None;
        for disk in &mut self.disks {
            disk.previous = Lsn::ZERO;
        }
        model
            .histories
            .insert(self.history, History::new(self.parent, false));
    }

    /// Makes the next frame of at most so many records.
    pub fn write(&mut self, records_max: u64) {
        let mut builder = FrameBuilder::new(self.identity(), false);
        let mut made = Vec::new();
        if let Some(before) = self.needs_epoch_start.take() {
            let mut header = self.header(RecordKind::EpochStart);
            header.argument = before;
            builder.push_note(&header, &[]);
            made.push(Record {
                lsn: header.lsn,
                change: Change::Other,
            });
        }
        let count = 1 + self.random.below(records_max);
        for _ in 0..count {
            if builder.len() > FRAME_BYTES {
                break;
            }
            let record = self.next_record(&mut builder);
            made.push(record);
        }
        self.finish(builder, made);
    }

    /// Makes a frame that is one mark; gives back its LSN.
    pub fn mark(&mut self, request: u64, name: &str) -> Lsn {
        let mut builder = FrameBuilder::new(self.identity(), false);
        let mut made = Vec::new();
        if let Some(before) = self.needs_epoch_start.take() {
            let mut header = self.header(RecordKind::EpochStart);
            header.argument = before;
            builder.push_note(&header, &[]);
            made.push(Record {
                lsn: header.lsn,
                change: Change::Other,
            });
        }
        let mut header = self.header(RecordKind::Mark(MarkKind::Bookmark));
        header.argument = request;
        builder.push_note(&header, name.as_bytes());
        made.push(Record {
            lsn: header.lsn,
            change: Change::Other,
        });
        self.finish(builder, made);
        header.lsn
    }

    fn finish(&mut self, builder: FrameBuilder, records: Vec<Record>) {
        let frame = builder.finish();
        self.kept.push_back(Kept {
            frame,
            records,
            is_sent: false,
        });
    }

    /// The next frame to hand to the stream; its records are noted.
    pub fn next_to_send(&mut self, model: &mut Model) -> Option<Frame> {
        let kept = self.kept.iter_mut().find(|kept| !kept.is_sent)?;
        kept.is_sent = true;
        let history = model.histories.get_mut(&self.history)?;
        if history
            .frames
            .last()
            .is_none_or(|last| *last < kept.frame.header.last)
        {
            history.records.extend(kept.records.iter().cloned());
            history.frames.push(kept.frame.header.last);
        }
        Some(kept.frame.clone())
    }

    /// A stream was opened anew: everything above what is durable goes into it again.
    pub fn reopened(&mut self, durable: Lsn) {
        self.acknowledged(durable);
        for kept in &mut self.kept {
            kept.is_sent = false;
        }
    }

    fn next_record(&mut self, builder: &mut FrameBuilder) -> Record {
        let disk = self.random.index(self.disks.len());
        let id = self.disks[disk].id;
        match self.random.below(16) {
            0 => self.clear(builder, RecordKind::Discard, disk),
            1 => self.clear(builder, RecordKind::WriteZeroes, disk),
            2 => {
                let header = self.header(RecordKind::Mark(MarkKind::Heartbeat));
                builder.push_note(&header, &[]);
                Record {
                    lsn: header.lsn,
                    change: Change::Other,
                }
            }
            3 if self.random.chance(0.2) => {
                let blocks = self.disks[disk].blocks + 1 + self.random.index(8);
                self.disks[disk].blocks = blocks;
                let mut header = self.of_disk(RecordKind::Grow, disk, 0, blocks);
                header.offset = 0;
                builder.push_note(&header, &[]);
                Record {
                    lsn: header.lsn,
                    change: Change::Grow { disk: id, blocks },
                }
            }
            _ => {
                let longest = if self.random.chance(0.1) { 20 } else { 3 };
                let (first, count) = self.range(disk, longest);
                let stamps = self.stamps(count);
                let header = self.of_disk(RecordKind::Write, disk, first, count);
                let sealer = self.disks[disk].sealer.as_mut().expect("a declared disk");
                builder.push_data(&header, &content(&stamps), sealer);
                Record {
                    lsn: header.lsn,
                    change: Change::Write {
                        disk: id,
                        first,
                        stamps,
                    },
                }
            }
        }
    }

    fn clear(&mut self, builder: &mut FrameBuilder, kind: RecordKind, disk: usize) -> Record {
        let longest = self.disks[disk].blocks;
        let (first, count) = self.range(disk, longest);
        let header = self.of_disk(kind, disk, first, count);
        builder.push_note(&header, &[]);
        let disk = self.disks[disk].id;
        Record {
            lsn: header.lsn,
            change: Change::Clear { disk, first, count },
        }
    }

    /// Says whether a batch is open.
    #[must_use]
    pub fn is_in_batch(&self) -> bool {
        self.batch.is_some()
    }

    /// Makes the frame that begins a batch of some disks.
    pub fn begin_batch(&mut self, is_initial: bool) {
        let mut disks: Vec<usize> = (0..self.disks.len()).collect();
        if !is_initial && self.random.chance(0.5) {
            self.random.shuffle(&mut disks);
            disks.truncate(1);
        }
        let number = self.next_batch;
        self.next_batch += 1;
        let kind = if is_initial {
            BatchKind::Initial
        } else {
            BatchKind::Resync
        };
        let mut builder = FrameBuilder::new(self.identity(), false);
        let mut made = Vec::new();
        if let Some(before) = self.needs_epoch_start.take() {
            let mut header = self.header(RecordKind::EpochStart);
            header.argument = before;
            builder.push_note(&header, &[]);
            made.push(Record {
                lsn: header.lsn,
                change: Change::Other,
            });
        }
        let mut header = self.header(RecordKind::BatchBegin(kind));
        header.batch = BatchId(number);
        let ids: Vec<DiskId> = disks.iter().map(|disk| self.disks[*disk].id).collect();
        let note: Vec<u8> = ids.iter().flat_map(|id| id.0).collect();
        builder.push_note(&header, &note);
        self.batch = Some(OpenBatch {
            number,
            disks,
            begin: header.lsn,
        });
        let change = Change::Begin {
            batch: number,
            is_initial,
            disks: ids,
        };
        made.push(Record {
            lsn: header.lsn,
            change,
        });
        self.finish(builder, made);
    }

    /// Makes the frame that ends the batch.
    pub fn end_batch(&mut self) {
        let Some(batch) = self.batch.take() else {
            return;
        };
        let mut builder = FrameBuilder::new(self.identity(), false);
        let mut header = self.header(RecordKind::BatchEnd);
        header.batch = BatchId(batch.number);
        builder.push_note(&header, &[]);
        let made = vec![Record {
            lsn: header.lsn,
            change: Change::End {
                batch: batch.number,
            },
        }];
        self.finish(builder, made);
    }

    /// Makes a bulk frame of the open batch. No block is sent twice at one LSN.
    pub fn bulk_frame(&mut self, model: &mut Model) -> Option<(u64, Frame)> {
        let batch = self.batch.as_ref()?;
        let (number, begin) = (batch.number, batch.begin);
        let disk = batch.disks[self.random.index(batch.disks.len())];
        let (first, count) = self.range(disk, 24);
        let id = self.disks[disk].id;
        let lsn = self.last.max(begin);
        let history = model.histories.get_mut(&self.history)?;
        let is_twice = history.bulk.iter().any(|known| {
            known.lsn == lsn
                && known.disk == id
                && known.first < first + count
                && first < known.first + known.stamps.len()
        });
        if is_twice {
            return None;
        }
        let stamps = self.stamps(count);
        let header = RecordHeader {
            kind: RecordKind::Bulk,
            lsn,
            previous: self.disks[disk].previous,
            time: Timestamp(self.time),
            disk: id,
            offset: first as u64 * BLOCK,
            length: count as u64 * BLOCK,
            batch: BatchId(number),
            argument: 0,
        };
        let mut builder = FrameBuilder::new(self.identity(), true);
        let sealer = self.disks[disk].sealer.as_mut()?;
        builder.push_data(&header, &content(&stamps), sealer);
        let bulk_number = self.next_bulk;
        self.next_bulk += 1;
        history.bulk.push(Bulk {
            number: bulk_number,
            lsn,
            disk: id,
            first,
            stamps,
            is_acknowledged: false,
        });
        Some((bulk_number, builder.finish()))
    }

    /// Drops what is acknowledged.
    pub fn acknowledged(&mut self, durable: Lsn) {
        while self
            .kept
            .front()
            .is_some_and(|kept| kept.frame.header.last <= durable)
        {
            self.kept.pop_front();
        }
    }
}
