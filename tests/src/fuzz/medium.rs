//! What lies at the beginning and end of a disk: partition tables, superblocks, members of
//! containers.

use afterimage_blockdev::Random;
use afterimage_cache::bytes::{get_u32, get_u64, put};
use afterimage_export::error::ExportError;
use afterimage_export::probe::{FsKind, Medium, Slice, identify};

use super::{Target, Verdict};

const BLOCK: usize = 512;
const MD_MAGIC: u32 = 0xA92B_4EFC;
/// Where the size of a logical block stands: behind the medium.
const TRAILER_BYTES: usize = 1;

pub(super) fn targets() -> Vec<Target> {
    vec![
        Target::new(30_000, "probe", make, run)
            .mended_by(mend)
            .with_memory(4 << 20, 64),
    ]
}

struct Bytes<'a> {
    bytes: &'a [u8],
    block: u64,
}

impl Medium for Bytes<'_> {
    fn size_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn logical_block_bytes(&self) -> u64 {
        self.block
    }

    fn read(&mut self, offset: u64, length: u64) -> Result<Vec<u8>, ExportError> {
        let from = usize::try_from(offset).expect("within the medium");
        let len = usize::try_from(length).expect("within the medium");
        assert!(len <= 1 << 20, "a probe reads at most a mebibyte at once");
        let range = self.bytes.get(from..from.saturating_add(len));
        Ok(range.expect("a probe reads within the medium").to_vec())
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            (sum >> 1) ^ if sum & 1 == 1 { 0xEDB8_8320 } else { 0 }
        })
    }) ^ u32::MAX
}

fn put_entry(bytes: &mut [u8], at: usize, kind: u8, start: u32, sectors: u32) {
    bytes[at + 4] = kind;
    put(bytes, at + 8, &start.to_le_bytes());
    put(bytes, at + 12, &sectors.to_le_bytes());
}

fn put_boot_record(bytes: &mut [u8], sector: usize, entries: &[(u8, u32, u32)]) {
    let at = sector * BLOCK;
    for (place, (kind, start, sectors)) in entries.iter().enumerate() {
        put_entry(bytes, at + 446 + 16 * place, *kind, *start, *sectors);
    }
    put(bytes, at + 510, &[0x55, 0xAA]);
}

fn put_gpt(bytes: &mut [u8], at: u64, entries_at: u64) {
    let header = usize::try_from(at).expect("small") * BLOCK;
    let entries = usize::try_from(entries_at).expect("small") * BLOCK;
    bytes[entries..entries + 16].fill(7);
    put(bytes, entries + 32, &8u64.to_le_bytes());
    put(bytes, entries + 40, &15u64.to_le_bytes());
    put(bytes, entries + 56, b"d\0b\0");
    put(bytes, header, b"EFI PART");
    put(bytes, header + 12, &92u32.to_le_bytes());
    put(bytes, header + 24, &at.to_le_bytes());
    put(bytes, header + 72, &entries_at.to_le_bytes());
    put(bytes, header + 80, &4u32.to_le_bytes());
    put(bytes, header + 84, &128u32.to_le_bytes());
    mend_gpt(bytes, header);
}

/// Makes both sums of a header fit.
fn mend_gpt(bytes: &mut [u8], at: usize) -> Option<()> {
    let start = usize::try_from(get_u64(bytes, at + 72)?)
        .ok()?
        .checked_mul(BLOCK)?;
    let count = usize::try_from(get_u32(bytes, at + 80)?).ok()?;
    let len = count.checked_mul(usize::try_from(get_u32(bytes, at + 84)?).ok()?)?;
    if let Some(entries) = bytes.get(start..start.checked_add(len)?) {
        let sum = crc32(&entries[..entries.len().min(1 << 20)]);
        put(bytes, at + 88, &sum.to_le_bytes());
    }
    let len = usize::try_from(get_u32(bytes, at + 12)?).ok()?;
    put(bytes, at + 16, &[0; 4]);
    let sum = crc32(bytes.get(at..at.checked_add(len)?)?);
    put(bytes, at + 16, &sum.to_le_bytes());
    Some(())
}

/// Puts a file system, a container or nothing into a medium.
fn put_content(bytes: &mut [u8], random: &mut Random) {
    match random.below(8) {
        0 => put(bytes, 0, b"XFSB"),
        1 => put(bytes, 0x10040, b"_BHRfS_M"),
        2 => {
            put(bytes, 1080, &[0x53, 0xEF]);
            put(bytes, 1024 + 92, &[4]);
            put(bytes, 1024 + 96, &[0x40]);
            put(bytes, 1024 + 120, b"label");
        }
        3 => put(bytes, 4086, b"SWAPSPACE2"),
        4 => {
            put(bytes, 512, b"LABELONE");
            put(bytes, 536, b"LVM2 001");
        }
        5 => put(bytes, 0, b"LUKS\xba\xbe"),
        6 => {
            put(bytes, 4096, &MD_MAGIC.to_le_bytes());
            put(bytes, 4100, &[1]);
        }
        _ => {
            let at = (bytes.len() / 512 - 16) / 8 * 8 * 512;
            put(bytes, at, &MD_MAGIC.to_le_bytes());
            put(bytes, at + 4, &[1]);
        }
    }
}

fn make(random: &mut Random) -> Vec<u8> {
    let blocks = [64, 160, 160, 400][random.index(4)];
    let mut bytes = vec![0; blocks * BLOCK];
    match random.below(4) {
        0 => {
            let last = blocks as u64 - 1;
            put_boot_record(&mut bytes, 0, &[(0xEE, 1, 100)]);
            put_gpt(&mut bytes, 1, 2);
            put_gpt(&mut bytes, last, last - 1);
        }
        1 => {
            put_boot_record(&mut bytes, 0, &[(0x83, 1, 4), (0x05, 8, 50)]);
            put_boot_record(&mut bytes, 8, &[(0x83, 2, 3), (0x05, 10, 20)]);
            put_boot_record(&mut bytes, 18, &[(0x82, 2, 3), (0, 0, 0)]);
        }
        _ => {
            if blocks > 140 {
                put_content(&mut bytes, random);
            } else {
                put(&mut bytes, 0, b"XFSB");
            }
        }
    }
    bytes.push([1, 1, 8][random.index(3)]);
    // A table counts in blocks of its device; a legal one has something in it.
    if identify(&mut medium_of(&bytes)).is_err() {
        let end = bytes.len() - TRAILER_BYTES;
        bytes[end] = 1;
    }
    bytes
}

fn medium_of(bytes: &[u8]) -> Bytes<'_> {
    let (block, bytes) = bytes.split_last().unwrap_or((&1, &[]));
    let block = if block & 8 == 0 { 512 } else { 4096 };
    Bytes { bytes, block }
}

fn mend(bytes: &mut Vec<u8>, random: &mut Random) {
    for at in (0..bytes.len().saturating_sub(BLOCK)).step_by(BLOCK) {
        if bytes[at..].starts_with(b"EFI PART") {
            if random.chance(0.3) {
                put(bytes, at + 24, &((at / BLOCK) as u64).to_le_bytes());
            }
            mend_gpt(bytes, at);
        }
    }
}

fn run(bytes: &[u8]) -> Verdict {
    let mut medium = medium_of(bytes);
    let size_bytes = medium.size_bytes();
    let Ok(found) = identify(&mut medium) else {
        return Verdict::Refused;
    };
    assert!(
        found.partitions.len() <= 255,
        "more partitions than a kernel makes"
    );
    for partition in &found.partitions {
        let end = partition.start_bytes.checked_add(partition.size_bytes);
        assert!(partition.size_bytes > 0 && end.is_some_and(|end| end <= size_bytes));
        let (start, len) = (partition.start_bytes, partition.size_bytes);
        let _inside = identify(&mut Slice::new(&mut medium, start, len));
    }
    Verdict::of(found.kind != FsKind::Unknown)
}
