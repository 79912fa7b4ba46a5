//! What is on a device, told from its first and last bytes. Nothing is written, and no byte of
//! the device is trusted: every offset and count is checked against what was read.

mod filesystem;
mod medium;
mod table;
#[cfg(test)]
mod tests;

use core::fmt;

use afterimage_blockdev::BlockDevice;

pub use self::medium::{DeviceMedium, FileMedium, Medium, Slice};
pub use self::table::Partition;
use crate::error::ExportError;

/// What a device holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum FsKind {
    /// ext2: no journal.
    Ext2,
    /// ext3: a journal, no extents.
    Ext3,
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
    /// btrfs.
    Btrfs,
    /// FAT12, FAT16 or FAT32.
    Vfat,
    /// Swap space.
    Swap,
    /// A physical volume of LVM2.
    Lvm2Member,
    /// A member of a Linux software RAID.
    MdMember,
    /// An encrypted container.
    Luks,
    /// A GUID partition table.
    Gpt,
    /// A DOS partition table.
    Mbr,
    /// Nothing that is known here.
    Unknown,
}

impl FsKind {
    /// Says whether [`mount_filesystem`](crate::mount_filesystem) can mount it.
    #[must_use]
    pub fn is_filesystem(self) -> bool {
        matches!(
            self,
            Self::Ext2 | Self::Ext3 | Self::Ext4 | Self::Xfs | Self::Btrfs | Self::Vfat
        )
    }

    /// Says whether it holds partitions.
    #[must_use]
    pub fn is_partition_table(self) -> bool {
        matches!(self, Self::Gpt | Self::Mbr)
    }

    /// What to do with it when it cannot be mounted.
    #[must_use]
    pub fn advice(self) -> &'static str {
        match self {
            Self::Swap => "swap space holds no files",
            Self::Lvm2Member => {
                "attach it with --device, then use `vgimportclone` under a new name, never \
                 `vgchange` beside the original"
            }
            Self::MdMember => {
                "attach it with --device, then assemble it read-only with \
                 `mdadm --assemble --readonly` under a new name"
            }
            Self::Luks => "attach it with --device, then open it with `cryptsetup open`",
            Self::Gpt | Self::Mbr => "name one of its partitions with --partition",
            Self::Unknown => "attach it with --device and look at it",
            _ => "",
        }
    }
}

impl fmt::Display for FsKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ext2 => "ext2",
            Self::Ext3 => "ext3",
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Vfat => "vfat",
            Self::Swap => "swap",
            Self::Lvm2Member => "an LVM2 physical volume",
            Self::MdMember => "an md RAID member",
            Self::Luks => "a LUKS container",
            Self::Gpt => "a GPT partition table",
            Self::Mbr => "an MBR partition table",
            Self::Unknown => "nothing known",
        })
    }
}

/// What was found on a device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    /// What it is.
    pub kind: FsKind,
    /// The file system's UUID.
    pub uuid: Option<[u8; 16]>,
    /// The file system's label; empty when it has none.
    pub label: String,
    /// The partitions of a table, by number.
    pub partitions: Vec<Partition>,
}

impl Found {
    fn plain(kind: FsKind) -> Self {
        Self {
            kind,
            uuid: None,
            label: String::new(),
            partitions: Vec::new(),
        }
    }
}

/// Looks at a medium.
///
/// A container (LUKS, LVM, md) is told before a file system, since the file system inside a
/// mirrored member begins where the member does; a GPT before a file system, and a file system
/// before an MBR, since making the one leaves traces of the other.
///
/// # Errors
/// What reading says, and `BadPartitionTable` for a GPT of which no copy is whole.
pub fn identify(medium: &mut dyn Medium) -> Result<Found, ExportError> {
    let head_bytes = medium.size_bytes().min(filesystem::HEAD_BYTES);
    let head = medium.read(0, head_bytes)?;
    if let Some(kind) = filesystem::container(&head) {
        return Ok(Found::plain(kind));
    }
    if filesystem::is_md_at_end(medium)? {
        return Ok(Found::plain(FsKind::MdMember));
    }
    if let Some(partitions) = table::gpt(medium)? {
        return Ok(Found {
            partitions,
            ..Found::plain(FsKind::Gpt)
        });
    }
    if let Some(found) = filesystem::filesystem(&head) {
        return Ok(found);
    }
    if let Some(partitions) = table::mbr(medium)? {
        return Ok(Found {
            partitions,
            ..Found::plain(FsKind::Mbr)
        });
    }
    Ok(Found::plain(FsKind::Unknown))
}

/// Looks at a device; waits for its answers, so not for threads that carry data.
///
/// # Errors
/// As for [`identify`].
pub fn device(device: &dyn BlockDevice) -> Result<Found, ExportError> {
    identify(&mut DeviceMedium::new(device))
}

/// Looks at one partition of a device.
///
/// # Errors
/// As for [`identify`].
pub fn partition(device: &dyn BlockDevice, partition: &Partition) -> Result<Found, ExportError> {
    let mut whole = DeviceMedium::new(device);
    identify(&mut Slice::new(
        &mut whole,
        partition.start_bytes,
        partition.size_bytes,
    ))
}
