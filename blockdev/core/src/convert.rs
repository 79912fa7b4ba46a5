//! Conversions between the integers of a disk and those of memory.

use std::io;

use crate::device::BlockErrorKind;
use crate::storage::StorageErrorKind;

/// A byte count or index as memory counts.
///
/// # Panics
/// When it does not fit the address space: whoever made it had it in memory.
pub(crate) fn to_usize(value: u64) -> usize {
    usize::try_from(value).expect("count within the address space")
}

/// A file offset as the kernel counts.
pub(crate) fn to_offset(value: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

/// What an error of the operating system means to a storage.
pub(crate) fn storage_kind(error: io::Error) -> StorageErrorKind {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => StorageErrorKind::NoSpace,
        Some(libc::ENOENT) => StorageErrorKind::NotFound,
        Some(libc::EEXIST) => StorageErrorKind::Exists,
        _ => StorageErrorKind::Io(error),
    }
}

/// What an error of the operating system means to a device.
pub(crate) fn block_kind(error: &io::Error) -> BlockErrorKind {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => BlockErrorKind::NoSpace,
        Some(libc::EROFS | libc::EPERM) => BlockErrorKind::ReadOnly,
        Some(libc::EOPNOTSUPP) => BlockErrorKind::NotSupported,
        errno => BlockErrorKind::Io {
            errno: errno.unwrap_or(0),
            message: error.to_string(),
        },
    }
}
