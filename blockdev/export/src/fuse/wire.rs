//! The kernel's messages (`linux/fuse.h`), as far as this server speaks them: numbers of fixed
//! width one after the other, in the byte order of the machine.
//!
//! Invariant: nothing here trusts a length; what is too short is no field.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType};

// The kernel speaks the machine's byte order, and this file the little one.
const _: () = assert!(cfg!(target_endian = "little"));

/// Bytes of `fuse_in_header`.
pub(super) const IN_HEADER_BYTES: usize = 40;
/// Bytes of `fuse_out_header`.
pub(super) const OUT_HEADER_BYTES: usize = 16;
/// Bytes of the longest answer that is not data: `fuse_entry_out`.
const FIELDS_BYTES_MAX: usize = 128;
/// Bytes of `fuse_dirent` before the name.
const DIRENT_BYTES: usize = 24;

/// Numbers of the kernel's requests.
pub(super) mod opcode {
    pub(in super::super) const LOOKUP: u32 = 1;
    pub(in super::super) const FORGET: u32 = 2;
    pub(in super::super) const GETATTR: u32 = 3;
    pub(in super::super) const SETATTR: u32 = 4;
    pub(in super::super) const SYMLINK: u32 = 6;
    pub(in super::super) const MKNOD: u32 = 8;
    pub(in super::super) const MKDIR: u32 = 9;
    pub(in super::super) const UNLINK: u32 = 10;
    pub(in super::super) const RMDIR: u32 = 11;
    pub(in super::super) const RENAME: u32 = 12;
    pub(in super::super) const LINK: u32 = 13;
    pub(in super::super) const OPEN: u32 = 14;
    pub(in super::super) const READ: u32 = 15;
    pub(in super::super) const WRITE: u32 = 16;
    pub(in super::super) const STATFS: u32 = 17;
    pub(in super::super) const RELEASE: u32 = 18;
    pub(in super::super) const FSYNC: u32 = 20;
    pub(in super::super) const SETXATTR: u32 = 21;
    pub(in super::super) const GETXATTR: u32 = 22;
    pub(in super::super) const LISTXATTR: u32 = 23;
    pub(in super::super) const REMOVEXATTR: u32 = 24;
    pub(in super::super) const FLUSH: u32 = 25;
    pub(in super::super) const OPENDIR: u32 = 27;
    pub(in super::super) const READDIR: u32 = 28;
    pub(in super::super) const RELEASEDIR: u32 = 29;
    pub(in super::super) const FSYNCDIR: u32 = 30;
    pub(in super::super) const CREATE: u32 = 35;
    pub(in super::super) const DESTROY: u32 = 38;
    pub(in super::super) const IOCTL: u32 = 39;
    pub(in super::super) const BATCH_FORGET: u32 = 42;
    pub(in super::super) const FALLOCATE: u32 = 43;
    pub(in super::super) const READDIRPLUS: u32 = 44;
    pub(in super::super) const RENAME2: u32 = 45;
    pub(in super::super) const LSEEK: u32 = 46;
    pub(in super::super) const COPY_FILE_RANGE: u32 = 47;
}

/// Reads a field of 4 bytes.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(field.try_into().ok()?))
}

/// Reads a field of 8 bytes.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(field.try_into().ok()?))
}

/// Reads a field of 4 bytes that has a sign.
pub(super) fn i32_at(bytes: &[u8], at: usize) -> Option<i32> {
    u32_at(bytes, at).map(u32::cast_signed)
}

/// The fields of a short answer, without memory of their own.
pub(super) struct Fields {
    bytes: [u8; FIELDS_BYTES_MAX],
    len: usize,
}

impl Fields {
    /// None yet.
    pub(super) fn new() -> Self {
        Self {
            bytes: [0; FIELDS_BYTES_MAX],
            len: 0,
        }
    }

    fn put(mut self, field: &[u8]) -> Self {
        let end = self.len + field.len();
        self.bytes[self.len..end].copy_from_slice(field);
        self.len = end;
        self
    }

    /// Adds 4 bytes.
    pub(super) fn u32(self, value: u32) -> Self {
        self.put(&value.to_le_bytes())
    }

    /// Adds 4 bytes with a sign.
    pub(super) fn i32(self, value: i32) -> Self {
        self.put(&value.to_le_bytes())
    }

    /// Adds 8 bytes.
    pub(super) fn u64(self, value: u64) -> Self {
        self.put(&value.to_le_bytes())
    }

    /// Adds `fuse_attr`.
    fn attributes(self, attributes: &FileAttr) -> Self {
        let times = [attributes.atime, attributes.mtime, attributes.ctime].map(since_epoch);
        let mut fields = self
            .u64(attributes.ino.0)
            .u64(attributes.size)
            .u64(attributes.blocks);
        for time in times {
            fields = fields.u64(time.as_secs());
        }
        for time in times {
            fields = fields.u32(time.subsec_nanos());
        }
        fields
            .u32(mode_of(attributes.kind) | u32::from(attributes.perm))
            .u32(attributes.nlink)
            .u32(attributes.uid)
            .u32(attributes.gid)
            .u32(attributes.rdev)
            .u32(attributes.blksize)
            .u32(attributes.flags)
    }

    /// Makes `fuse_attr_out`.
    pub(super) fn attr(lifetime: Duration, attributes: &FileAttr) -> Self {
        Self::new()
            .u64(lifetime.as_secs())
            .u32(lifetime.subsec_nanos())
            .u32(0)
            .attributes(attributes)
    }

    /// Makes `fuse_entry_out`. Its generation is always 0: the kernel asks again for what it has
    /// dropped.
    pub(super) fn entry(lifetime: Duration, attributes: &FileAttr) -> Self {
        Self::new()
            .u64(attributes.ino.0)
            .u64(0)
            .u64(lifetime.as_secs())
            .u64(lifetime.as_secs())
            .u32(lifetime.subsec_nanos())
            .u32(lifetime.subsec_nanos())
            .attributes(attributes)
    }

    /// The bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

fn since_epoch(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn mode_of(kind: FileType) -> u32 {
    match kind {
        FileType::Directory => libc::S_IFDIR,
        _ => libc::S_IFREG,
    }
}

/// The entries of a directory, as many as the kernel has room for.
pub(super) struct Listing {
    bytes: Vec<u8>,
    room: usize,
}

impl Listing {
    /// With room for `room` bytes, of which as many are taken as are needed.
    pub(super) fn new(room: usize) -> Self {
        Self {
            bytes: Vec::new(),
            room,
        }
    }

    /// Adds an entry, with what is known of its node where the kernel asked for that; says
    /// whether there was no room for it.
    pub(super) fn add(
        &mut self,
        node: Option<&Fields>,
        inode: u64,
        cursor: u64,
        kind: FileType,
        name: &[u8],
    ) -> bool {
        let before = node.map_or(0, |node| node.bytes().len());
        let length = (DIRENT_BYTES + name.len()).next_multiple_of(8) + before;
        let end = self.bytes.len() + length;
        let Ok(name_bytes) = u32::try_from(name.len()) else {
            return true;
        };
        if end > self.room {
            return true;
        }
        if let Some(node) = node {
            self.bytes.extend_from_slice(node.bytes());
        }
        let entry = Fields::new()
            .u64(inode)
            .u64(cursor)
            .u32(name_bytes)
            .u32(mode_of(kind) >> 12);
        self.bytes.extend_from_slice(entry.bytes());
        self.bytes.extend_from_slice(name);
        self.bytes.resize(end, 0);
        false
    }

    /// The bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use fuser::INodeNo;

    use super::*;

    fn file(size: u64) -> FileAttr {
        let time = UNIX_EPOCH + Duration::new(7, 9);
        FileAttr {
            ino: INodeNo(11),
            size,
            blocks: 1,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: FileType::RegularFile,
            perm: 0o600,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    #[test]
    fn answers_have_the_kernels_sizes() {
        let lifetime = Duration::new(1, 2);
        let attr = Fields::attr(lifetime, &file(5));
        assert_eq!(attr.bytes().len(), 104);
        assert_eq!(u64_at(attr.bytes(), 16 + 8), Some(5));
        assert_eq!(u32_at(attr.bytes(), 16 + 60), Some(0o100_600));
        let entry = Fields::entry(lifetime, &file(5));
        assert_eq!(entry.bytes().len(), 128);
        assert_eq!(u64_at(entry.bytes(), 40 + 8), Some(5));
    }

    #[test]
    fn a_listing_ends_where_its_room_does() {
        let mut listing = Listing::new(100);
        let add = |listing: &mut Listing| listing.add(None, 7, 1, FileType::Directory, b"four");
        assert!(!add(&mut listing));
        assert!(!add(&mut listing));
        assert!(!add(&mut listing));
        assert!(add(&mut listing));
        assert_eq!(listing.bytes().len(), 96);
        assert_eq!(u32_at(listing.bytes(), 20), Some(4));
        assert_eq!(&listing.bytes()[24..32], b"four\0\0\0\0");
    }
}
