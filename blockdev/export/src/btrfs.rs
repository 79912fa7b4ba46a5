//! Another identity for a copy of a btrfs file system, so that it can be mounted beside the
//! original on kernels that give no temporary one.
//!
//! Only the superblocks change (`btrfs_tree.h`, `struct btrfs_super_block`): the file system
//! identity becomes a new one, and the one that all blocks of the tree carry is noted as the
//! metadata identity. That is what `btrfstune -m` does.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::ExportError;

const SUPER_BYTES: usize = 4096;
/// Where the copies of the superblock lie.
const PLACES: [u64; 3] = [64 << 10, 64 << 20, 256 << 30];
const MAGIC: &[u8] = b"_BHRfS_M";
const FSID: usize = 0x20;
const OWN_PLACE: usize = 0x30;
const MAGIC_AT: usize = 0x40;
const DEVICES: usize = 0x88;
const INCOMPATIBLE: usize = 0xBC;
const CHECKSUM_KIND: usize = 0xC4;
const METADATA_UUID: usize = 0x23B;
/// `BTRFS_FEATURE_INCOMPAT_METADATA_UUID`, known since Linux 5.0.
const HAS_METADATA_UUID: u64 = 1 << 10;

type Super = [u8; SUPER_BYTES];

/// CRC-32C, as btrfs has it by default.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            (sum >> 1) ^ if sum & 1 == 1 { 0x82F6_3B78 } else { 0 }
        })
    }) ^ u32::MAX
}

fn u64_at(block: &Super, at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&block[at..at + 8]);
    u64::from_le_bytes(bytes)
}

fn is_whole(block: &Super, place: u64) -> bool {
    block[MAGIC_AT..].starts_with(MAGIC)
        && u64_at(block, OWN_PLACE) == place
        && block[CHECKSUM_KIND..CHECKSUM_KIND + 2] == [0, 0]
        && block[..4] == crc32c(&block[FSID..]).to_le_bytes()
}

/// Gives the file system on a device a new identity. The device must be a private copy or a branch,
/// and not be mounted.
///
/// # Errors
/// `SameFilesystemMounted` when its superblock allows no such change: several devices, or another
/// checksum than CRC-32C.
pub fn renew_identity(device: &Path) -> Result<(), ExportError> {
    let system = |source| ExportError::system("change the identity", device, source);
    let refused = || ExportError::SameFilesystemMounted {
        device: device.to_owned(),
    };
    let mut options = OpenOptions::new();
    let mut file = options
        .read(true)
        .write(true)
        .open(device)
        .map_err(system)?;
    let size_bytes = file.seek(SeekFrom::End(0)).map_err(system)?;
    let mut fresh = [0; 16];
    let mut random = File::open("/dev/urandom").map_err(system)?;
    random.read_exact(&mut fresh).map_err(system)?;
    // A random UUID says so in its version and variant.
    fresh[6] = fresh[6] & 0x0F | 0x40;
    fresh[8] = fresh[8] & 0x3F | 0x80;
    let mut changed = Vec::new();
    for place in PLACES {
        if place + SUPER_BYTES as u64 > size_bytes {
            break;
        }
        let mut block = [0; SUPER_BYTES];
        file.read_exact_at(&mut block, place).map_err(system)?;
        if is_whole(&block, place) {
            if u64_at(&block, DEVICES) != 1 {
                return Err(refused());
            }
            renew(&mut block, fresh);
            changed.push((place, block));
        }
    }
    // Without the first one nothing mounts; the last to be written decides.
    if changed.first().is_none_or(|(place, _)| *place != PLACES[0]) {
        return Err(refused());
    }
    let written = || -> io::Result<()> {
        for (place, block) in changed.iter().rev() {
            file.write_all_at(block, *place)?;
        }
        file.sync_all()
    };
    written().map_err(system)
}

fn renew(block: &mut Super, fresh: [u8; 16]) {
    let features = u64_at(block, INCOMPATIBLE);
    if features & HAS_METADATA_UUID == 0 {
        block.copy_within(FSID..FSID + 16, METADATA_UUID);
        let features = (features | HAS_METADATA_UUID).to_le_bytes();
        block[INCOMPATIBLE..INCOMPATIBLE + 8].copy_from_slice(&features);
    }
    block[FSID..FSID + 16].copy_from_slice(&fresh);
    let sum = crc32c(&block[FSID..]).to_le_bytes();
    block[..4].copy_from_slice(&sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_one_of_the_standard() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn a_changed_superblock_is_whole_and_keeps_the_identity_of_its_blocks() {
        let mut block = [0; SUPER_BYTES];
        block[MAGIC_AT..MAGIC_AT + 8].copy_from_slice(MAGIC);
        block[FSID..FSID + 16].fill(7);
        block[OWN_PLACE..OWN_PLACE + 8].copy_from_slice(&PLACES[0].to_le_bytes());
        let sum = crc32c(&block[FSID..]).to_le_bytes();
        block[..4].copy_from_slice(&sum);
        assert!(is_whole(&block, PLACES[0]) && !is_whole(&block, PLACES[1]));
        renew(&mut block, [9; 16]);
        assert!(is_whole(&block, PLACES[0]));
        assert_eq!(block[FSID..FSID + 16], [9; 16]);
        assert_eq!(block[METADATA_UUID..METADATA_UUID + 16], [7; 16]);
        renew(&mut block, [8; 16]);
        assert_eq!(block[METADATA_UUID..METADATA_UUID + 16], [7; 16]);
        assert_eq!(u64_at(&block, INCOMPATIBLE), HAS_METADATA_UUID);
    }
}
