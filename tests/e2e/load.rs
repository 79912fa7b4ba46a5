//! A writer that knows what every block of a device may hold.
//!
//! Invariants
//! * Each block is written by one thread only, one write at a time, so its writes have an order.
//! * A write that was answered is what the block holds; one that failed or had no answer yet is a
//!   possibility beside what was there before.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use afterimage_blockdev::IoBuffer;

pub(crate) const BLOCK: usize = 4096;
/// Writes between two flushes of a thread.
const FLUSH_EVERY: u64 = 32;

/// What blocks may hold: the number of the write; 0 is what was there before all of them.
#[derive(Clone, Default, Debug)]
pub(crate) struct Model {
    blocks: BTreeMap<u64, Vec<u64>>,
    /// Number of the last write.
    last: u64,
}

/// Writers that run until they are stopped or fail.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    threads: Vec<JoinHandle<(Model, Option<std::io::Error>)>>,
}

/// Random numbers that can be had again.
#[derive(Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// The bytes of a block: its number, the write's number, and half of it random.
fn stamp(block: u64, write: u64, out: &mut [u8]) {
    out.fill(0);
    out[..8].copy_from_slice(&block.to_le_bytes());
    out[8..16].copy_from_slice(&write.to_le_bytes());
    let mut random = Random::new(block ^ write.rotate_left(32));
    for piece in out[16..BLOCK / 2].chunks_exact_mut(8) {
        piece.copy_from_slice(&random.next().to_le_bytes());
    }
}

fn open_direct(device: &Path, is_writing: bool) -> File {
    OpenOptions::new()
        .read(true)
        .write(is_writing)
        .custom_flags(libc::O_DIRECT)
        .open(device)
        .unwrap_or_else(|error| panic!("{} opens: {error}", device.display()))
}

impl Load {
    /// Begins to write to `count` blocks from `first`, with `threads` writers; goes on from what
    /// the model knows.
    pub(crate) fn start(
        device: &Path,
        model: &Model,
        first: u64,
        count: u64,
        threads: u64,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let written = Arc::new(AtomicU64::new(0));
        let each = count / threads;
        let threads = (0..threads)
            .map(|number| {
                let file = open_direct(device, true);
                let (stop, written) = (Arc::clone(&stop), Arc::clone(&written));
                let range = first + number * each..first + (number + 1) * each;
                let mut own = Model {
                    blocks: BTreeMap::new(),
                    last: model.last,
                };
                own.blocks.extend(
                    model
                        .blocks
                        .range(range.clone())
                        .map(|(b, w)| (*b, w.clone())),
                );
                let random = Random::new(model.last ^ number << 48);
                std::thread::spawn(move || write(&file, range, own, random, &stop, &written))
            })
            .collect();
        Self {
            stop,
            written,
            threads,
        }
    }

    /// Writes that were answered so far.
    pub(crate) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Says whether all writers have failed.
    pub(crate) fn has_ended(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// Stops and gives what blocks may hold now, and the errors that writers were given.
    pub(crate) fn end(self, mut model: Model) -> (Model, Vec<std::io::Error>) {
        self.stop.store(true, Ordering::Relaxed);
        let mut errors = Vec::new();
        for thread in self.threads {
            let (own, error) = thread.join().expect("a writer does not panic");
            model.last = model.last.max(own.last);
            model.blocks.extend(own.blocks);
            errors.extend(error);
        }
        (model, errors)
    }
}

fn write(
    file: &File,
    range: std::ops::Range<u64>,
    mut model: Model,
    mut random: Random,
    stop: &AtomicBool,
    written: &AtomicU64,
) -> (Model, Option<std::io::Error>) {
    let mut buffer = IoBuffer::zeroed(BLOCK);
    while !stop.load(Ordering::Relaxed) {
        let block = range.start + random.below(range.end - range.start);
        model.last += 1;
        stamp(block, model.last, &mut buffer);
        let result = file.write_all_at(&buffer, block * BLOCK as u64);
        let possible = model.blocks.entry(block).or_insert_with(|| vec![0]);
        if let Err(error) = result {
            possible.push(model.last);
            return (model, Some(error));
        }
        *possible = vec![model.last];
        written.fetch_add(1, Ordering::Relaxed);
        if model.last.is_multiple_of(FLUSH_EVERY)
            && let Err(error) = file.sync_data()
        {
            return (model, Some(error));
        }
    }
    (model, None)
}

impl Model {
    /// Checks that a device holds what it may hold, and learns which possibility came true.
    pub(crate) fn check(&mut self, device: &Path) {
        let file = open_direct(device, false);
        let mut buffer = IoBuffer::zeroed(BLOCK);
        let mut expected = vec![0; BLOCK];
        for (block, possible) in &mut self.blocks {
            let place = block * BLOCK as u64;
            file.read_exact_at(&mut buffer, place)
                .unwrap_or_else(|error| panic!("block {block} of {}: {error}", device.display()));
            let mut word = [0; 8];
            word.copy_from_slice(&buffer[8..16]);
            let found = u64::from_le_bytes(word);
            if possible.contains(&found) && found != 0 {
                stamp(*block, found, &mut expected);
                assert!(
                    buffer[..] == expected[..],
                    "block {block} is torn at write {found}"
                );
            } else {
                // What was there before all writes was never stamped with this block's number.
                word.copy_from_slice(&buffer[..8]);
                let is_stamped = u64::from_le_bytes(word) == *block && found > 0;
                assert!(
                    possible.contains(&0) && !is_stamped,
                    "block {block} of {} holds write {found}, not one of {possible:?}",
                    device.display()
                );
            }
            *possible = vec![if possible.contains(&found) { found } else { 0 }];
        }
    }

    /// Number of the last write.
    pub(crate) fn last(&self) -> u64 {
        self.last
    }
}
