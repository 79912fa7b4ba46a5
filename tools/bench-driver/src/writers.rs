//! A few threads that write random blocks to one device, so that many writes are in flight.
//!
//! Invariants
//! * When [`Writers::write`] returns, the device has completed every write of it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use afterimage_blockdev::{BLOCK_BYTES, IoBuffer, Random};

use crate::error::BenchError;
use crate::fill::half_compressible;

type Done = Result<(), BenchError>;

/// Opens a device past the page cache.
pub(crate) fn open_direct(path: &Path) -> Result<File, BenchError> {
    OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .map_err(BenchError::io(format!("open {}", path.display())))
}

/// See the module's text. Dropping it ends the threads.
pub(crate) struct Writers {
    orders: Vec<Sender<u64>>,
    done: Receiver<Done>,
}

impl Writers {
    /// Starts `count` threads that write to the first `size_bytes` of a device.
    pub(crate) fn start(
        device: &Path,
        size_bytes: u64,
        count: usize,
        seed: u64,
    ) -> Result<Self, BenchError> {
        let device = Arc::new(open_direct(device)?);
        let mut random = Random::new(seed);
        let (ended, done) = channel();
        let mut orders = Vec::new();
        for _ in 0..count.max(1) {
            let (order, orders_of_one) = channel();
            let (device, ended) = (Arc::clone(&device), ended.clone());
            let random = random.fork();
            std::thread::spawn(move || serve(&device, size_bytes, random, &orders_of_one, &ended));
            orders.push(order);
        }
        Ok(Self { orders, done })
    }

    /// Writes so many random blocks, shared out evenly.
    pub(crate) fn write(&self, count: u64) -> Done {
        let threads = u64::try_from(self.orders.len()).unwrap_or(1);
        for (number, order) in (0..).zip(&self.orders) {
            let share = count / threads + u64::from(number < count % threads);
            order.send(share).map_err(|_| gone())?;
        }
        for _ in &self.orders {
            self.done.recv().map_err(|_| gone())??;
        }
        Ok(())
    }
}

fn gone() -> BenchError {
    BenchError::usage("a writer ended before its time")
}

fn serve(
    device: &File,
    size_bytes: u64,
    mut random: Random,
    orders: &Receiver<u64>,
    ended: &Sender<Done>,
) {
    let mut block = IoBuffer::zeroed(BLOCK_BYTES);
    while let Ok(count) = orders.recv() {
        let result = (0..count).try_for_each(|_| one(device, size_bytes, &mut random, &mut block));
        if ended.send(result).is_err() {
            return;
        }
    }
}

fn one(device: &File, size_bytes: u64, random: &mut Random, block: &mut IoBuffer) -> Done {
    let block_bytes = u64::try_from(BLOCK_BYTES).unwrap_or(u64::MAX);
    let offset = random.below(size_bytes / block_bytes) * block_bytes;
    half_compressible(random, block);
    device
        .write_all_at(block, offset)
        .map_err(BenchError::io(format!("write at {offset}")))
}
