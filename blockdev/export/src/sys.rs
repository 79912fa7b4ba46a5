//! System calls that the standard library lacks.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// `PR_SET_IO_FLUSHER` of `linux/prctl.h`.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Makes a path fit for a system call.
pub(crate) fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|error| io::Error::other(error.to_string()))
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Tells the kernel that this process is part of the way to a disk, so that its allocations never
/// wait for writes to that disk. Call it before any thread starts: threads inherit it.
///
/// # Errors
/// `PermissionDenied` without `CAP_SYS_RESOURCE`, `InvalidInput` before Linux 5.6. The product
/// works without, but can deadlock under memory pressure: log the error.
pub fn set_io_flusher() -> io::Result<()> {
    let (on, unused): (libc::c_ulong, libc::c_ulong) = (1, 0);
    // SAFETY: this prctl takes plain numbers and touches no memory of ours.
    #[allow(unsafe_code)]
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, on, unused, unused, unused) };
    check(result).map(|_| ())
}

/// Makes later reads of a range of a file come from its medium, as far as the kernel can.
///
/// # Errors
/// What the system says.
pub fn forget_cached(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let too_large = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let offset = libc::off_t::try_from(offset).map_err(too_large)?;
    let length = libc::off_t::try_from(length).map_err(too_large)?;
    // SAFETY: this call takes plain numbers and touches no memory of ours.
    #[allow(unsafe_code)]
    let result =
        unsafe { libc::posix_fadvise(file.as_raw_fd(), offset, length, libc::POSIX_FADV_DONTNEED) };
    match result {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Says whether the process runs as root.
pub(crate) fn is_root() -> bool {
    // SAFETY: geteuid has no arguments and cannot fail.
    #[allow(unsafe_code)]
    let user = unsafe { libc::geteuid() };
    user == 0
}

/// mount(2).
pub(crate) fn mount(
    source: &CStr,
    target: &CStr,
    kind: &CStr,
    flags: libc::c_ulong,
    data: &CStr,
) -> io::Result<()> {
    // SAFETY: all four are NUL-terminated strings that outlive the call.
    #[allow(unsafe_code)]
    let result = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            flags,
            data.as_ptr().cast(),
        )
    };
    check(result).map(|_| ())
}

/// umount2(2).
pub(crate) fn umount(target: &CStr, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: the path is a NUL-terminated string that outlives the call.
    #[allow(unsafe_code)]
    let result = unsafe { libc::umount2(target.as_ptr(), flags) };
    check(result).map(|_| ())
}

/// Makes a block device node, for machines whose `/dev` the kernel does not fill.
pub(crate) fn make_block_node(path: &Path, major: u32, minor: u32) -> io::Result<()> {
    let path = c_path(path)?;
    let device = libc::makedev(major, minor);
    // SAFETY: the path is a NUL-terminated string that outlives the call.
    #[allow(unsafe_code)]
    let result = unsafe { libc::mknod(path.as_ptr(), libc::S_IFBLK | 0o660, device) };
    match check(result) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map(|_| ()),
    }
}

/// Says whether a path is on a mount that nobody serves any more. Asks for the file system, not
/// for the file: the kernel may remember the file's attributes.
pub(crate) fn is_dead_mount(path: &Path) -> bool {
    let Ok(path) = c_path(path) else { return false };
    let mut answer = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the path is a NUL-terminated string, and the answer has room for what is written.
    #[allow(unsafe_code)]
    let result = unsafe { libc::statfs(path.as_ptr(), answer.as_mut_ptr()) };
    matches!(check(result), Err(error) if error.raw_os_error() == Some(libc::ENOTCONN))
}

/// Makes an object that threads wake each other by (eventfd).
pub(crate) fn event() -> io::Result<File> {
    // SAFETY: the call takes plain numbers.
    #[allow(unsafe_code)]
    let descriptor = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
    // SAFETY: the descriptor is new and belongs to nobody else.
    #[allow(unsafe_code)]
    Ok(unsafe { File::from_raw_fd(descriptor) })
}

/// The number that mount options name a file by.
pub(crate) fn descriptor(file: &File) -> RawFd {
    file.as_raw_fd()
}
