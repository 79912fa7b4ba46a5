//! What a store must show: the records and bulk blocks of every history, and the image of any disk
//! at any LSN worked out from them one by one.
//!
//! A block's content is a stamp; 0 stands for zeroes.

use std::collections::BTreeMap;

use afterimage_blockdev::{BLOCK_BYTES, DiskId, HistoryId, Lsn};

/// Makes the content of a block: the first half repeats, so that it compresses; the rest does not.
pub fn fill(stamp: u64, block: &mut [u8]) {
    if stamp == 0 {
        block.fill(0);
        return;
    }
    let mut word = stamp;
    let half = BLOCK_BYTES / 2;
    for (place, part) in block.chunks_exact_mut(8).enumerate() {
        if place * 8 >= half && stamp.is_multiple_of(4) {
            word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17) | 1;
        }
        part.copy_from_slice(&word.to_le_bytes());
    }
}

/// The content of a run of blocks.
#[must_use]
pub fn content(stamps: &[u64]) -> Vec<u8> {
    let mut bytes = vec![0; stamps.len() * BLOCK_BYTES];
    for (stamp, block) in stamps.iter().zip(bytes.chunks_exact_mut(BLOCK_BYTES)) {
        fill(*stamp, block);
    }
    bytes
}

/// What one record did.
#[derive(Clone, Debug)]
pub enum Change {
    /// Wrote blocks.
    Write {
        /// The disk.
        disk: DiskId,
        /// First block.
        first: usize,
        /// What they hold.
        stamps: Vec<u64>,
    },
    /// Made blocks zero.
    Clear {
        /// The disk.
        disk: DiskId,
        /// First block.
        first: usize,
        /// Number of blocks.
        count: usize,
    },
    /// Enlarged a disk.
    Grow {
        /// The disk.
        disk: DiskId,
        /// Its size in blocks.
        blocks: usize,
    },
    /// Began a batch.
    Begin {
        /// Its number.
        batch: u32,
        /// A first copy.
        is_initial: bool,
        /// The disks covered.
        disks: Vec<DiskId>,
    },
    /// Ended a batch.
    End {
        /// Its number.
        batch: u32,
    },
    /// Changed no content.
    Other,
}

/// A record.
#[derive(Clone, Debug)]
pub struct Record {
    /// Its LSN.
    pub lsn: Lsn,
    /// What it did.
    pub change: Change,
}

/// A bulk frame.
#[derive(Clone, Debug)]
pub struct Bulk {
    /// Number within the stream.
    pub number: u64,
    /// Its blocks rank below any write after this.
    pub lsn: Lsn,
    /// The disk.
    pub disk: DiskId,
    /// First block.
    pub first: usize,
    /// What they hold.
    pub stamps: Vec<u64>,
    /// The store said that it is durable.
    pub is_acknowledged: bool,
}

/// One history.
#[derive(Clone, Debug)]
pub struct History {
    /// Where it forked off.
    pub parent: Option<(HistoryId, Lsn)>,
    /// Forked by the store.
    pub is_branch: bool,
    /// In order of LSN.
    pub records: Vec<Record>,
    /// The last LSN of each frame: what can be cut off comes off in whole frames.
    pub frames: Vec<Lsn>,
    /// In order of arrival.
    pub bulk: Vec<Bulk>,
    /// The store said that everything up to here is durable.
    pub acknowledged: Lsn,
    /// LSN to which the store is known to have come.
    pub durable: Lsn,
    /// A drop was asked for.
    pub is_dropping: bool,
}

/// A batch of one disk, as its records tell it.
#[derive(Clone, Copy, Debug)]
struct Batch {
    number: u32,
    is_initial: bool,
    begin: Lsn,
    end: Option<Lsn>,
}

/// A point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Point {
    /// The history.
    pub history: HistoryId,
    /// The cut.
    pub lsn: Lsn,
    /// The store said that it exists.
    pub is_acknowledged: bool,
    /// Its deletion was asked for.
    pub is_dropping: bool,
}

/// Everything.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// Histories.
    pub histories: BTreeMap<HistoryId, History>,
    /// Sizes of disks in blocks when they were declared.
    pub sizes: BTreeMap<DiskId, usize>,
}

impl History {
    /// A history without records.
    #[must_use]
    pub fn new(parent: Option<(HistoryId, Lsn)>, is_branch: bool) -> Self {
        let fork = parent.map_or(Lsn::ZERO, |(_, fork)| fork);
        Self {
            parent,
            is_branch,
            records: Vec::new(),
            frames: Vec::new(),
            bulk: Vec::new(),
            acknowledged: fork,
            durable: fork,
            is_dropping: false,
        }
    }

    /// Forgets what came after an LSN.
    pub fn truncate(&mut self, last: Lsn) {
        self.records.retain(|record| record.lsn <= last);
        self.frames.retain(|frame| *frame <= last);
        self.durable = last;
        self.acknowledged = last;
    }

    /// The batches of each disk, as far as they are durable.
    fn batches(&self, disk: DiskId) -> Vec<Batch> {
        let mut batches: Vec<Batch> = Vec::new();
        for record in self
            .records
            .iter()
            .filter(|record| record.lsn <= self.durable)
        {
            match &record.change {
                Change::Begin {
                    batch,
                    is_initial,
                    disks,
                } if disks.contains(&disk) => {
                    batches.push(Batch {
                        number: *batch,
                        is_initial: *is_initial,
                        begin: record.lsn,
                        end: None,
                    });
                }
                Change::End { batch } => {
                    // The end of a batch of this disk ends all that were begun before.
                    let is_of_disk = |b: &Batch| b.number == *batch && b.end.is_none();
                    if batches.iter().any(is_of_disk) {
                        for known in batches.iter_mut().filter(|known| known.end.is_none()) {
                            known.end = Some(record.lsn);
                        }
                    }
                }
                _ => {}
            }
        }
        batches
    }
}

impl Model {
    /// Histories from one up to its oldest ancestor, each with the last LSN that is seen.
    fn lineage(&self, history: HistoryId, lsn: Lsn) -> Vec<(HistoryId, Lsn)> {
        let mut found = vec![(history, lsn)];
        let mut at = history;
        let mut cap = lsn;
        while let Some((parent, fork)) = self.histories[&at].parent {
            cap = cap.min(fork);
            found.push((parent, cap));
            at = parent;
        }
        found
    }

    /// What a disk holds at an LSN of a history, as it is.
    #[must_use]
    pub fn image(&self, history: HistoryId, disk: DiskId, lsn: Lsn) -> Vec<u64> {
        let mut image = vec![0; self.sizes[&disk]];
        for (history, cap) in self.lineage(history, lsn).into_iter().rev() {
            let history = &self.histories[&history];
            let mut bulk: Vec<&Bulk> = history
                .bulk
                .iter()
                .filter(|b| b.is_acknowledged && b.disk == disk && b.lsn <= cap)
                .collect();
            bulk.sort_by_key(|bulk| bulk.lsn);
            let mut bulk = bulk.into_iter().peekable();
            for record in history.records.iter().filter(|record| record.lsn <= cap) {
                // A bulk block ranks below the write of its own LSN, and above all before.
                while let Some(before) = bulk.next_if(|bulk| bulk.lsn <= record.lsn) {
                    put(&mut image, before.first, &before.stamps);
                }
                apply(&mut image, disk, &record.change);
            }
            for rest in bulk {
                put(&mut image, rest.first, &rest.stamps);
            }
        }
        image
    }

    /// The LSN that is shown when this one is asked for: before the batch that it lies in.
    #[must_use]
    pub fn shown(&self, history: HistoryId, disk: DiskId, asked: Lsn) -> Lsn {
        let mut lsn = asked;
        loop {
            let mut lineage = self.lineage(history, lsn).into_iter();
            let mut is_closed = false;
            let open = lineage.find_map(|(history, cap)| {
                let batches = self.histories[&history].batches(disk);
                let is_open =
                    |b: &&Batch| b.begin <= cap && b.end.is_none_or(|end| cap < end) && !is_closed;
                let open = batches.iter().filter(is_open).map(|b| b.begin).min();
                // A whole batch also brings what an unfinished one before it lacks.
                is_closed |= batches.iter().any(|b| b.end.is_some_and(|end| end <= cap));
                open
            });
            match open {
                Some(begin) => lsn = Lsn(begin.0 - 1),
                None => return lsn,
            }
        }
    }

    /// Says whether a first copy of a disk was whole at an LSN.
    #[must_use]
    pub fn is_copied(&self, history: HistoryId, disk: DiskId, lsn: Lsn) -> bool {
        self.lineage(history, lsn)
            .into_iter()
            .any(|(history, cap)| {
                let batches = self.histories[&history].batches(disk);
                batches
                    .iter()
                    .any(|b| b.is_initial && b.end.is_some_and(|end| end <= cap))
            })
    }
}

fn put(image: &mut Vec<u64>, first: usize, stamps: &[u64]) {
    if image.len() < first + stamps.len() {
        image.resize(first + stamps.len(), 0);
    }
    image[first..first + stamps.len()].copy_from_slice(stamps);
}

fn apply(image: &mut Vec<u64>, of: DiskId, change: &Change) {
    match change {
        Change::Write {
            disk,
            first,
            stamps,
        } if *disk == of => put(image, *first, stamps),
        Change::Clear { disk, first, count } if *disk == of => {
            put(image, *first, &vec![0; *count]);
        }
        Change::Grow { disk, blocks } if *disk == of && image.len() < *blocks => {
            image.resize(*blocks, 0);
        }
        _ => {}
    }
}
