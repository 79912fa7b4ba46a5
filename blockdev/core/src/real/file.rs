//! System calls on open files that the standard library does not offer.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::buffer::BUFFER_ALIGNMENT;
use crate::convert::to_offset;

/// `BLKSSZGET`: the logical block size of a block device.
const BLKSSZGET: libc::Ioctl = 0x1268;
/// `BLKROGET`: says whether a block device is read-only.
const BLKROGET: libc::Ioctl = 0x125e;

fn check(answer: libc::c_int) -> io::Result<libc::c_int> {
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(answer)
    }
}

/// Opens `name` below the directory `at`. `O_CLOEXEC` is added.
#[allow(unsafe_code)]
pub(super) fn open_at(at: RawFd, name: &str, flags: libc::c_int) -> io::Result<OwnedFd> {
    let name = CString::new(name)?;
    let mode: libc::c_uint = 0o600;
    loop {
        // SAFETY: the name is a C string that outlives the call.
        let fd = unsafe { libc::openat(at, name.as_ptr(), flags | libc::O_CLOEXEC, mode) };
        match check(fd) {
            // SAFETY: the kernel just gave this descriptor to us.
            Ok(fd) => return Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Makes a directory; one that exists is as good.
#[allow(unsafe_code)]
pub(super) fn make_directory_at(at: RawFd, name: &str) -> io::Result<()> {
    let name = CString::new(name)?;
    // SAFETY: the name is a C string that outlives the call.
    match check(unsafe { libc::mkdirat(at, name.as_ptr(), 0o700) }) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Renames within one directory.
#[allow(unsafe_code)]
pub(super) fn rename_at(at: RawFd, from: &str, to: &str) -> io::Result<()> {
    let from = CString::new(from)?;
    let to = CString::new(to)?;
    // SAFETY: both names are C strings that outlive the call.
    check(unsafe { libc::renameat(at, from.as_ptr(), at, to.as_ptr()) }).map(drop)
}

/// Removes a name that is not a directory.
#[allow(unsafe_code)]
pub(super) fn remove_at(at: RawFd, name: &str) -> io::Result<()> {
    let name = CString::new(name)?;
    // SAFETY: the name is a C string that outlives the call.
    check(unsafe { libc::unlinkat(at, name.as_ptr(), 0) }).map(drop)
}

/// Total and available bytes of the file system.
#[allow(unsafe_code)]
pub(super) fn capacity(at: RawFd) -> io::Result<(u64, u64)> {
    let mut stat = MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: the pointer is to memory of the right type.
    check(unsafe { libc::fstatvfs(at, stat.as_mut_ptr()) })?;
    // SAFETY: the kernel filled it, and zero bytes are a value too.
    let stat = unsafe { stat.assume_init() };
    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    Ok((bytes(stat.f_blocks), bytes(stat.f_bavail)))
}

/// Takes the exclusive lock of a file; false when another holds it.
#[allow(unsafe_code)]
pub(super) fn try_lock(file: &File) -> io::Result<bool> {
    // SAFETY: the descriptor is open.
    match check(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

/// Performs `fallocate`.
#[allow(unsafe_code)]
pub(super) fn allocate(file: &File, mode: libc::c_int, offset: u64, length: u64) -> io::Result<()> {
    let (offset, length) = (to_offset(offset)?, to_offset(length)?);
    loop {
        // SAFETY: the descriptor is open.
        match check(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, length) }) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Finds the next data (`SEEK_DATA`) or hole (`SEEK_HOLE`); `None` when there is none.
#[allow(unsafe_code)]
pub(super) fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    // SAFETY: the descriptor is open.
    let found = unsafe { libc::lseek(file.as_raw_fd(), to_offset(offset)?, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

#[allow(unsafe_code)]
fn ask_block_device(file: &File, question: libc::Ioctl) -> io::Result<libc::c_int> {
    let mut answer: libc::c_int = 0;
    // SAFETY: both questions write one C integer to the address.
    check(unsafe { libc::ioctl(file.as_raw_fd(), question, &raw mut answer) })?;
    Ok(answer)
}

/// The logical block size of a block device.
pub(super) fn block_device_unit(file: &File) -> io::Result<u32> {
    u32::try_from(ask_block_device(file, BLKSSZGET)?).map_err(io::Error::other)
}

/// Says whether a block device refuses writes.
pub(super) fn is_block_device_read_only(file: &File) -> io::Result<bool> {
    Ok(ask_block_device(file, BLKROGET)? != 0)
}

/// Decides how a file that was opened with `O_DIRECT` is used: returns the unit of direct I/O in
/// bytes, 512 to 4096, or 1 after turning it over to the page cache, where no such unit will do.
pub(super) fn settle_direct(file: &File) -> io::Result<u32> {
    let unit = direct_unit(file)?;
    if unit != 1 {
        return Ok(unit);
    }
    leave_direct(file)?;
    Ok(1)
}

#[allow(unsafe_code)]
fn direct_unit(file: &File) -> io::Result<u32> {
    const LARGEST: u32 = 4096;
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: an empty name, and memory of the right type.
    check(unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            stat.as_mut_ptr(),
        )
    })?;
    // SAFETY: the kernel filled it, and zero bytes are a value too.
    let stat = unsafe { stat.assume_init() };
    if stat.stx_mask & libc::STATX_DIOALIGN == 0 {
        // A kernel or file system that does not say: the largest unit in use is always right.
        return Ok(LARGEST);
    }
    let unit = stat.stx_dio_offset_align;
    let is_usable = (1..=LARGEST).contains(&unit)
        && unit.is_power_of_two()
        && stat.stx_dio_mem_align as usize <= BUFFER_ALIGNMENT;
    Ok(if is_usable { unit.max(512) } else { 1 })
}

#[allow(unsafe_code)]
fn leave_direct(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open; the two commands take and give flags only.
    unsafe {
        let flags = check(libc::fcntl(file.as_raw_fd(), libc::F_GETFL))?;
        check(libc::fcntl(
            file.as_raw_fd(),
            libc::F_SETFL,
            flags & !libc::O_DIRECT,
        ))?;
    }
    Ok(())
}
