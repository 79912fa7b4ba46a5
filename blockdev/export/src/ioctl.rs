//! The kernel's control interface of loop devices and partitions (`linux/loop.h`,
//! `linux/blkpg.h`). All structs are plain numbers, laid out as the kernel has them.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const LOOP_CLR_FD: u64 = 0x4C01;
const LOOP_SET_CAPACITY: u64 = 0x4C07;
const LOOP_CONFIGURE: u64 = 0x4C0A;
const LOOP_CTL_GET_FREE: u64 = 0x4C82;
const BLKPG: u64 = 0x1269;
const BLKPG_ADD_PARTITION: i32 = 1;
const BLKPG_DEL_PARTITION: i32 = 2;

/// `LO_FLAGS_READ_ONLY`.
pub(crate) const LOOP_READ_ONLY: u32 = 1;
/// `LO_FLAGS_DIRECT_IO`.
pub(crate) const LOOP_DIRECT_IO: u32 = 16;
/// Bytes of a loop device's name, the closing zero included.
pub(crate) const LOOP_NAME_BYTES: usize = 64;

#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    real_device: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; LOOP_NAME_BYTES],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

#[repr(C)]
struct LoopConfig {
    file: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

#[repr(C)]
struct PartitionArgument {
    start: i64,
    length: i64,
    number: i32,
    device_name: [u8; 64],
    volume_name: [u8; 64],
}

#[repr(C)]
struct BlkpgArgument {
    operation: i32,
    flags: i32,
    data_bytes: i32,
    data: *mut PartitionArgument,
}

const _: () = assert!(size_of::<LoopInfo64>() == 232);
const _: () = assert!(size_of::<LoopConfig>() == 304);
const _: () = assert!(size_of::<PartitionArgument>() == 152);

fn check(result: libc::c_int) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Calls an ioctl whose argument is a plain number.
fn with_number(file: &File, request: u64, argument: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: the requests used here take no pointer, and the descriptor is open.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, argument) };
    check(result)
}

/// Finds, or makes, a loop device that nobody uses, and gives its number.
pub(crate) fn free_loop(control: &File) -> io::Result<u32> {
    let number = with_number(control, LOOP_CTL_GET_FREE, 0)?;
    u32::try_from(number).map_err(|error| io::Error::other(error.to_string()))
}

/// Binds a loop device to its backing file, in one step. `name` is cut to 63 bytes.
pub(crate) fn configure_loop(
    device: &File,
    backing: &File,
    block_bytes: u32,
    flags: u32,
    name: &[u8],
) -> io::Result<()> {
    let file = u32::try_from(backing.as_raw_fd()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut file_name = [0; LOOP_NAME_BYTES];
    let name = &name[..name.len().min(LOOP_NAME_BYTES - 1)];
    file_name[..name.len()].copy_from_slice(name);
    let info = LoopInfo64 {
        device: 0,
        inode: 0,
        real_device: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags,
        file_name,
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
    let config = LoopConfig {
        file,
        block_size: block_bytes,
        info,
        reserved: [0; 8],
    };
    // SAFETY: the argument is a `loop_config` of the kernel's size that outlives the call.
    #[allow(unsafe_code)]
    let result = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            LOOP_CONFIGURE,
            std::ptr::from_ref(&config),
        )
    };
    check(result).map(|_| ())
}

/// Unbinds a loop device; while others hold it open, the kernel waits for the last of them.
pub(crate) fn clear_loop(device: &File) -> io::Result<()> {
    with_number(device, LOOP_CLR_FD, 0).map(|_| ())
}

/// Makes a loop device take the present size of its backing file.
pub(crate) fn update_loop_capacity(device: &File) -> io::Result<()> {
    with_number(device, LOOP_SET_CAPACITY, 0).map(|_| ())
}

fn partition(device: &File, operation: i32, mut data: PartitionArgument) -> io::Result<()> {
    let mut argument = BlkpgArgument {
        operation,
        flags: 0,
        data_bytes: 152,
        data: std::ptr::from_mut(&mut data),
    };
    // SAFETY: argument and data have the kernel's layout and outlive the call.
    #[allow(unsafe_code)]
    let result =
        unsafe { libc::ioctl(device.as_raw_fd(), BLKPG, std::ptr::from_mut(&mut argument)) };
    check(result).map(|_| ())
}

/// Adds partition `number` (from 1) at a byte range of the device.
pub(crate) fn add_partition(device: &File, number: i32, start: i64, length: i64) -> io::Result<()> {
    let data = PartitionArgument {
        start,
        length,
        number,
        device_name: [0; 64],
        volume_name: [0; 64],
    };
    partition(device, BLKPG_ADD_PARTITION, data)
}

/// Removes partition `number` from the kernel's table; the device's bytes stay.
pub(crate) fn remove_partition(device: &File, number: i32) -> io::Result<()> {
    let data = PartitionArgument {
        start: 0,
        length: 0,
        number,
        device_name: [0; 64],
        volume_name: [0; 64],
    };
    partition(device, BLKPG_DEL_PARTITION, data)
}
