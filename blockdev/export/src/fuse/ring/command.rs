//! The two commands of a ring entry (`enum fuse_uring_cmd` of `linux/fuse.h`).

use io_uring::squeue::Entry128;
use io_uring::{opcode, types};

/// `FUSE_IO_URING_CMD_REGISTER`.
const REGISTER: u32 = 1;
/// `FUSE_IO_URING_CMD_COMMIT_AND_FETCH`.
const COMMIT_AND_FETCH: u32 = 2;
/// The header and the payload.
const PLACES: u32 = 2;
/// Where the length stands in a submission entry.
const SQE_LENGTH_AT: usize = 24;

const _: () = assert!(size_of::<Entry128>() == 128);

/// Bytes of `fuse_uring_cmd_req`, at the start of the command's area.
fn area(commit_id: u64, queue: u16) -> [u8; 80] {
    let mut area = [0; 80];
    area[8..16].copy_from_slice(&commit_id.to_le_bytes());
    area[16..18].copy_from_slice(&queue.to_le_bytes());
    area
}

/// Hands an entry to the kernel for the first time. The two places are read while the command is
/// being submitted.
pub(super) fn register(file: types::Fixed, queue: u16, places: &[libc::iovec; 2]) -> Entry128 {
    let entry = opcode::UringCmd80::new(file, REGISTER)
        .cmd(area(0, queue))
        .addr(Some(places.as_ptr() as u64))
        .build();
    with_length(entry, PLACES)
}

/// Answers an entry's request, and hands the entry to the kernel for the next.
pub(super) fn commit_and_fetch(file: types::Fixed, queue: u16, commit_id: u64) -> Entry128 {
    opcode::UringCmd80::new(file, COMMIT_AND_FETCH)
        .cmd(area(commit_id, queue))
        .build()
}

/// Sets the length of a submission entry, for which the crate has no setter.
#[allow(unsafe_code)]
fn with_length(mut entry: Entry128, length: u32) -> Entry128 {
    // SAFETY: an entry is 128 bytes of plain numbers in the kernel's layout, with the length as
    // 4 aligned bytes at this place; all values of it are valid.
    unsafe {
        std::ptr::from_mut(&mut entry)
            .cast::<u8>()
            .add(SQE_LENGTH_AT)
            .cast::<u32>()
            .write(length);
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registration_carries_its_places() {
        let places = [libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 1,
        }; 2];
        let entry = register(types::Fixed(0), 7, &places);
        // SAFETY: the entry is plain bytes.
        #[allow(unsafe_code)]
        let bytes: [u8; 128] = unsafe { std::mem::transmute_copy(&entry) };
        assert_eq!(bytes[24..28], 2_u32.to_le_bytes());
        assert_eq!(bytes[16..24], (places.as_ptr() as u64).to_le_bytes());
        assert_eq!(bytes[8..12], REGISTER.to_le_bytes());
        assert_eq!(bytes[48 + 16..48 + 18], 7_u16.to_le_bytes());
    }
}
