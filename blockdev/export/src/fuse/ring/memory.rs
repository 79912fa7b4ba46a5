//! The memory that the kernel and this process share: for each entry a header, and a payload of
//! the longest request.
//!
//! Invariants:
//! * an entry's memory has one owner at a time: the kernel from the submission of its command to
//!   the completion, and whoever holds the [`Entry`](super::Entry) from there to its answer;
//! * it stays mapped as long as anybody holds an entry of it;
//! * no reference into it ever exists: bytes are copied in and out.

use std::io;
use std::ptr::NonNull;

use crate::fuse::wire::OUT_HEADER_BYTES;

/// Bytes of `fuse_uring_req_header`.
pub(super) const HEADER_BYTES: usize = 288;
/// Where the first argument of a request stands in it.
pub(super) const FIXED_AT: usize = 128;
/// Where the number to commit stands.
pub(super) const COMMIT_AT: usize = 264;
/// Where the length of the payload stands.
pub(super) const LENGTH_AT: usize = 272;
/// Bytes from one header to the next.
const HEADER_STRIDE: usize = 512;
const PAGE_BYTES: usize = 4096;

/// The memory of a number of entries.
pub(super) struct Memory {
    start: NonNull<u8>,
    mapped_bytes: usize,
    payloads_at: usize,
    payload_bytes: usize,
    count: usize,
}

// SAFETY: this is plain memory, not bound to a thread; who may touch which part is the callers'
// contract, see the invariants.
#[allow(unsafe_code)]
unsafe impl Send for Memory {}
// SAFETY: as above: shared access goes through the two unsafe copies below only.
#[allow(unsafe_code)]
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps memory for `count` entries. What is never used takes address space only.
    pub(super) fn map(count: usize, payload_bytes: usize) -> io::Result<Self> {
        let too_large = || io::Error::from(io::ErrorKind::InvalidInput);
        let payload_bytes = payload_bytes.next_multiple_of(PAGE_BYTES);
        let headers = count.checked_mul(HEADER_STRIDE).ok_or_else(too_large)?;
        let payloads_at = headers.next_multiple_of(PAGE_BYTES);
        let payloads = count.checked_mul(payload_bytes).ok_or_else(too_large)?;
        let mapped_bytes = payloads_at.checked_add(payloads).ok_or_else(too_large)?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing.
        #[allow(unsafe_code)]
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(address.cast()).ok_or_else(too_large)?;
        Ok(Self {
            start,
            mapped_bytes,
            payloads_at,
            payload_bytes,
            count,
        })
    }

    /// Bytes of one payload.
    pub(super) fn payload_bytes(&self) -> usize {
        self.payload_bytes
    }

    fn at(&self, offset: usize, length: usize) -> *mut u8 {
        assert!(
            offset
                .checked_add(length)
                .is_some_and(|end| end <= self.mapped_bytes),
            "bytes outside of the shared memory"
        );
        self.start.as_ptr().wrapping_add(offset)
    }

    /// The two places of an entry, as the kernel takes them when it is registered.
    pub(super) fn places(&self, index: u16) -> [libc::iovec; 2] {
        let index = usize::from(index);
        assert!(index < self.count, "no such entry");
        let place = |offset: usize, length: usize| libc::iovec {
            iov_base: self.at(offset, length).cast(),
            iov_len: length,
        };
        let payload = self.payloads_at + index * self.payload_bytes;
        [
            place(index * HEADER_STRIDE, HEADER_BYTES),
            place(payload, self.payload_bytes),
        ]
    }

    /// Copies an entry's header.
    ///
    /// # Safety
    /// The caller owns the entry.
    #[allow(unsafe_code)]
    pub(super) unsafe fn read_header(&self, index: u16, header: &mut [u8; HEADER_BYTES]) {
        let [place, _] = self.places(index);
        // SAFETY: the place is mapped and as long as the header, and nobody else writes to it.
        unsafe {
            header
                .as_mut_ptr()
                .copy_from_nonoverlapping(place.iov_base.cast(), HEADER_BYTES);
        }
    }

    /// Copies the first bytes of an entry's payload.
    ///
    /// # Safety
    /// The caller owns the entry.
    #[allow(unsafe_code)]
    pub(super) unsafe fn read_payload(&self, index: u16, bytes: &mut [u8]) {
        let [_, place] = self.places(index);
        assert!(bytes.len() <= place.iov_len, "more than a payload holds");
        // SAFETY: the place is mapped and long enough, and nobody else writes to it.
        unsafe {
            bytes
                .as_mut_ptr()
                .copy_from_nonoverlapping(place.iov_base.cast(), bytes.len());
        }
    }

    /// Writes an answer into an entry. The body fits into a payload.
    ///
    /// # Safety
    /// The caller owns the entry.
    #[allow(unsafe_code)]
    pub(super) unsafe fn write_answer(
        &self,
        index: u16,
        header: &[u8; OUT_HEADER_BYTES],
        length: u32,
        body: &[u8],
    ) {
        let [head, payload] = self.places(index);
        assert!(body.len() <= payload.iov_len, "more than a payload holds");
        let head = head.iov_base.cast::<u8>();
        // SAFETY: both places are mapped and long enough (the length stands within the header),
        // and nobody else touches them.
        unsafe {
            head.copy_from_nonoverlapping(header.as_ptr(), OUT_HEADER_BYTES);
            head.add(LENGTH_AT)
                .copy_from_nonoverlapping(length.to_le_bytes().as_ptr(), size_of::<u32>());
            payload
                .iov_base
                .cast::<u8>()
                .copy_from_nonoverlapping(body.as_ptr(), body.len());
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this struct's own, and by the invariants nobody uses it any more.
        #[allow(unsafe_code)]
        let result = unsafe { libc::munmap(self.start.as_ptr().cast(), self.mapped_bytes) };
        assert!(result == 0, "the shared memory was not mapped");
    }
}
