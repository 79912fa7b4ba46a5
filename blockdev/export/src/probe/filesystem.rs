//! Superblocks of file systems and of what file systems are put into.
//!
//! Offsets are those of the formats' own headers: `ext4_fs.h`, `xfs_format.h`, `btrfs_tree.h`,
//! `swap.h`, `md_p.h`, LVM2 `label.h` and the LUKS on-disk formats 1 and 2.

use super::{Found, FsKind, Medium};
use crate::error::ExportError;

/// Bytes at the start of a device that hold all superblocks known here.
pub(super) const HEAD_BYTES: u64 = 128 << 10;

const EXT_SUPERBLOCK: usize = 1024;
const EXT_MAGIC: u16 = 0xEF53;
const EXT_HAS_JOURNAL: u32 = 0x4;
const EXT_JOURNAL_DEVICE: u32 = 0x8;
/// Incompatible features of ext3: file types in directories, recovery needed, meta block groups.
const EXT3_INCOMPATIBLE: u32 = 0x2 | 0x4 | 0x10;
/// Read-only compatible features of ext3: sparse superblocks, large files, and an unused one.
const EXT3_READ_ONLY: u32 = 0x1 | 0x2 | 0x4;
const BTRFS_SUPERBLOCK: usize = 64 << 10;
const MD_MAGIC: u32 = 0xA92B_4EFC;
/// Where the kernels of different machines end their first swap page.
const SWAP_PAGES: [usize; 4] = [4 << 10, 8 << 10, 16 << 10, 64 << 10];

fn starts_with(bytes: &[u8], offset: usize, magic: &[u8]) -> bool {
    bytes
        .get(offset..)
        .is_some_and(|rest| rest.starts_with(magic))
}

fn array<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    array(bytes, offset).map(u16::from_le_bytes)
}

pub(super) fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    array(bytes, offset).map(u32::from_le_bytes)
}

pub(super) fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    array(bytes, offset).map(u64::from_le_bytes)
}

/// The text before the first zero byte.
fn label_at(bytes: &[u8], offset: usize, length: usize) -> String {
    let field = bytes.get(offset..offset + length).unwrap_or_default();
    let text = field.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).trim_end().to_owned()
}

/// What a file system may be inside of, from the first bytes of a device.
pub(super) fn container(head: &[u8]) -> Option<FsKind> {
    if starts_with(head, 0, b"LUKS\xba\xbe") {
        return Some(FsKind::Luks);
    }
    let is_lvm = (0..4).any(|sector| {
        starts_with(head, sector * 512, b"LABELONE")
            && starts_with(head, sector * 512 + 24, b"LVM2 001")
    });
    if is_lvm {
        return Some(FsKind::Lvm2Member);
    }
    // Version 1.1 at the start, version 1.2 behind the first 4 KiB.
    [0, 4096].into_iter().find_map(|offset| {
        let is_md = u32_at(head, offset) == Some(MD_MAGIC) && u32_at(head, offset + 4) == Some(1);
        is_md.then_some(FsKind::MdMember)
    })
}

/// Looks for the md superblocks that lie at the end: version 0.90 and version 1.0.
pub(super) fn is_md_at_end(medium: &mut dyn Medium) -> Result<bool, ExportError> {
    let size_bytes = medium.size_bytes();
    let old = (size_bytes & !0xFFFF).checked_sub(64 << 10);
    let new = (size_bytes / 512)
        .checked_sub(16)
        .map(|sector| (sector & !7) * 512);
    for (offset, version) in [(old, 0), (new, 1)] {
        let Some(offset) = offset.filter(|offset| size_bytes - offset >= 512) else {
            continue;
        };
        let block = medium.read(offset, 512)?;
        // Version 0.90 was written in the byte order of its machine.
        let is_magic = match (array(&block, 0).map(u32::from_le_bytes), version) {
            (Some(magic), 0) => magic == MD_MAGIC || magic == MD_MAGIC.swap_bytes(),
            (magic, _) => magic == Some(MD_MAGIC),
        };
        let version_found = u32_at(&block, 4).map(|found| found.min(found.swap_bytes()));
        if is_magic && version_found == Some(version) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The file system, or swap space, that begins where the device does.
pub(super) fn filesystem(head: &[u8]) -> Option<Found> {
    if starts_with(head, 0, b"XFSB") {
        return Some(found(head, FsKind::Xfs, 32, 108, 12));
    }
    if starts_with(head, BTRFS_SUPERBLOCK + 0x40, b"_BHRfS_M") {
        let (uuid, label) = (BTRFS_SUPERBLOCK + 0x20, BTRFS_SUPERBLOCK + 0x12B);
        return Some(found(head, FsKind::Btrfs, uuid, label, 256));
    }
    if let Some(kind) = ext(head) {
        let (uuid, label) = (EXT_SUPERBLOCK + 104, EXT_SUPERBLOCK + 120);
        return Some(found(head, kind, uuid, label, 16));
    }
    if let Some(label) = fat(head) {
        return Some(Found {
            label: label_at(head, label, 11),
            ..Found::plain(FsKind::Vfat)
        });
    }
    let is_swap = SWAP_PAGES.iter().any(|end| {
        starts_with(head, end - 10, b"SWAPSPACE2") || starts_with(head, end - 10, b"SWAP-SPACE")
    });
    is_swap.then(|| found(head, FsKind::Swap, 1036, 1052, 16))
}

fn found(head: &[u8], kind: FsKind, uuid: usize, label: usize, label_bytes: usize) -> Found {
    let uuid = array(head, uuid).filter(|uuid| *uuid != [0; 16]);
    Found {
        uuid,
        label: label_at(head, label, label_bytes),
        ..Found::plain(kind)
    }
}

/// Where the label of a FAT lies. The word at its side is no proof, so that the boot sector must
/// make sense as well: a boot sector of a partitioned disk may hold that word in its program.
fn fat(head: &[u8]) -> Option<usize> {
    let label = if starts_with(head, 82, b"FAT32   ") {
        71
    } else if starts_with(head, 54, b"FAT12   ") || starts_with(head, 54, b"FAT16   ") {
        43
    } else {
        return None;
    };
    let sector_bytes = u16_at(head, 11)?;
    let (cluster_sectors, reserved) = (*head.get(13)?, u16_at(head, 14)?);
    let (tables, medium) = (*head.get(16)?, *head.get(21)?);
    let is_sound = head.get(510..512)? == [0x55, 0xAA]
        && matches!(head.first(), Some(0xEB | 0xE9))
        && matches!(sector_bytes, 512 | 1024 | 2048 | 4096)
        && cluster_sectors.is_power_of_two()
        && reserved > 0
        && matches!(tables, 1 | 2)
        && medium >= 0xF0;
    is_sound.then_some(label)
}

fn ext(head: &[u8]) -> Option<FsKind> {
    if u16_at(head, EXT_SUPERBLOCK + 56)? != EXT_MAGIC {
        return None;
    }
    let compatible = u32_at(head, EXT_SUPERBLOCK + 92)?;
    let incompatible = u32_at(head, EXT_SUPERBLOCK + 96)?;
    let read_only = u32_at(head, EXT_SUPERBLOCK + 100)?;
    if incompatible & EXT_JOURNAL_DEVICE != 0 {
        return None;
    }
    if incompatible & !EXT3_INCOMPATIBLE != 0 || read_only & !EXT3_READ_ONLY != 0 {
        return Some(FsKind::Ext4);
    }
    let has_journal = compatible & EXT_HAS_JOURNAL != 0;
    Some(if has_journal {
        FsKind::Ext3
    } else {
        FsKind::Ext2
    })
}
