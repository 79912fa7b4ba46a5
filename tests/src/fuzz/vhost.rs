//! Virtual machines: descriptors, rings and requests in a guest's memory.

use afterimage_blockdev::{MemoryDevice, Random};
use afterimage_vhost::{Outcome, run_ring};

use super::{Target, Verdict};

const QUEUE_SIZE: u16 = 16;
const AVAILABLE: usize = 256;
const USED: usize = 296;
const HEADERS: usize = 448;
const STATUS: usize = 520;
const DATA: usize = 1024;
const MEMORY_BYTES: usize = 2048;
const DISK_BYTES: u64 = 1 << 20;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

pub(super) fn targets() -> Vec<Target> {
    // A request may be as long as it was offered, within memory that exists.
    vec![Target::new(200_000, "vhost-ring", make, run).with_memory(8 << 20, 64)]
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

fn describe(image: &mut [u8], index: u16, address: usize, length: u32, flags: u16) {
    let at = usize::from(index) * 16;
    put(image, at, &(address as u64).to_le_bytes());
    put(image, at + 8, &length.to_le_bytes());
    put(image, at + 12, &flags.to_le_bytes());
    put(image, at + 14, &(index + 1).to_le_bytes());
}

/// A guest's memory with a few requests of each kind in its ring.
fn make(random: &mut Random) -> Vec<u8> {
    let mut image = vec![0; MEMORY_BYTES];
    let sector = random.below(DISK_BYTES / 512);
    put(&mut image, DATA, &sector.to_le_bytes());
    put(&mut image, DATA + 8, &1_u32.to_le_bytes());
    let count = 1 + u16::try_from(random.below(4)).expect("a small number");
    for request in 0..count {
        let kinds = [0_u32, 1, 4, 8, 11, 13];
        let kind = kinds[random.index(kinds.len())];
        let (bytes, flags) = match kind {
            0 => (512, NEXT | WRITE),
            1 => (512, NEXT),
            8 => (20, NEXT | WRITE),
            11 | 13 => (16, NEXT),
            _ => (0, NEXT),
        };
        let header = HEADERS + usize::from(request) * 16;
        put(&mut image, header, &kind.to_le_bytes());
        let sector = random.below(DISK_BYTES / 512);
        put(&mut image, header + 8, &sector.to_le_bytes());
        let first = request * 3;
        describe(&mut image, first, header, 16, NEXT);
        // What one request reads must not lie where another one's range is.
        let data = if flags & WRITE != 0 { DATA + 512 } else { DATA };
        describe(&mut image, first + 1, data, bytes, flags);
        let status = STATUS + usize::from(request);
        describe(&mut image, first + 2, status, 1, WRITE);
        let entry = AVAILABLE + 4 + usize::from(request) * 2;
        put(&mut image, entry, &first.to_le_bytes());
    }
    put(&mut image, AVAILABLE + 2, &count.to_le_bytes());
    image
}

fn run(bytes: &[u8]) -> Verdict {
    let device = MemoryDevice::new(DISK_BYTES, 512);
    let addresses = [0, AVAILABLE as u64, USED as u64];
    match run_ring(bytes, addresses, QUEUE_SIZE, device) {
        Outcome::Served(after) => {
            assert_eq!(after.len(), bytes.len());
            Verdict::Accepted
        }
        Outcome::Ended(_) => Verdict::Refused,
    }
}
