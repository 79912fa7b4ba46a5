//! A page-aligned buffer that belongs to whoever performs the I/O, never to a future.

use core::fmt;
use core::ops::{Deref, DerefMut};
use std::alloc::{Layout, alloc, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// Alignment of every buffer, in bytes; enough for direct I/O on any device.
pub const BUFFER_ALIGNMENT: usize = 4096;

/// Owned bytes at an address that direct I/O accepts. `len` may be below the capacity, after a
/// short read for instance.
pub struct IoBuffer {
    address: NonNull<u8>,
    capacity: usize,
    len: usize,
}

// SAFETY: the buffer owns its allocation exclusively, like `Vec<u8>`.
#[allow(unsafe_code)]
unsafe impl Send for IoBuffer {}
// SAFETY: shared access only reads, like `Vec<u8>`.
#[allow(unsafe_code)]
unsafe impl Sync for IoBuffer {}

#[allow(unsafe_code)]
impl IoBuffer {
    fn layout(capacity: usize) -> Layout {
        Layout::from_size_align(capacity, BUFFER_ALIGNMENT).expect("buffer within address space")
    }

    fn capacity_for(len: usize) -> usize {
        len.next_multiple_of(BUFFER_ALIGNMENT).max(BUFFER_ALIGNMENT)
    }

    /// Makes a buffer of `len` zero bytes; the capacity is `len` rounded up to 4096 (at least
    /// 4096).
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let capacity = Self::capacity_for(len);
        let layout = Self::layout(capacity);
        // SAFETY: the layout's size is not zero.
        let raw = unsafe { alloc_zeroed(layout) };
        let Some(address) = NonNull::new(raw) else {
            handle_alloc_error(layout)
        };
        Self {
            address,
            capacity,
            len,
        }
    }

    /// Makes a buffer that holds a copy of `bytes`.
    #[must_use]
    pub fn copy_of(bytes: &[u8]) -> Self {
        let len = bytes.len();
        let capacity = Self::capacity_for(len);
        let layout = Self::layout(capacity);
        // SAFETY: the layout's size is not zero.
        let raw = unsafe { alloc(layout) };
        let Some(address) = NonNull::new(raw) else {
            handle_alloc_error(layout)
        };
        // SAFETY: `capacity` bytes were just allocated, `len` of them are copied from elsewhere,
        // and the rest is set to zero; so all are initialised.
        unsafe {
            raw.copy_from_nonoverlapping(bytes.as_ptr(), len);
            raw.add(len).write_bytes(0, capacity - len);
        }
        Self {
            address,
            capacity,
            len,
        }
    }

    /// Makes an empty buffer that can grow to `capacity` without moving.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        let mut buffer = Self::zeroed(capacity);
        buffer.len = 0;
        buffer
    }

    /// Bytes that fit without moving.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Address of the first byte, for the kernel.
    #[must_use]
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// Sets the length. All bytes below the capacity are always initialised.
    ///
    /// # Panics
    /// When `len` is above the capacity.
    pub fn set_len(&mut self, len: usize) {
        assert!(
            len <= self.capacity,
            "buffer length {len} above capacity {}",
            self.capacity
        );
        self.len = len;
    }

    /// Appends `bytes`, moving to a larger allocation when they do not fit.
    pub fn extend_from_slice(&mut self, bytes: &[u8]) {
        let len = self.len + bytes.len();
        if len > self.capacity {
            let mut larger = Self::zeroed(len.max(self.capacity * 2));
            larger[..self.len].copy_from_slice(self);
            larger.len = self.len;
            *self = larger;
        }
        let start = self.len;
        self.len = len;
        self[start..].copy_from_slice(bytes);
    }

    /// Appends zero bytes until the length is a multiple of `alignment`.
    pub fn pad_to(&mut self, alignment: usize) {
        let target = self.len.next_multiple_of(alignment);
        while self.len < target {
            let step = (target - self.len).min(BUFFER_ALIGNMENT);
            self.extend_from_slice(&[0; BUFFER_ALIGNMENT][..step]);
        }
    }
}

impl Drop for IoBuffer {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: allocated with this very layout and not yet freed.
        unsafe { dealloc(self.address.as_ptr(), Self::layout(self.capacity)) }
    }
}

impl Deref for IoBuffer {
    type Target = [u8];
    #[allow(unsafe_code)]
    fn deref(&self) -> &[u8] {
        // SAFETY: the first `capacity` bytes are initialised and owned; `len` is within.
        unsafe { core::slice::from_raw_parts(self.address.as_ptr(), self.len) }
    }
}

impl DerefMut for IoBuffer {
    #[allow(unsafe_code)]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and the borrow is exclusive.
        unsafe { core::slice::from_raw_parts_mut(self.address.as_ptr(), self.len) }
    }
}

impl Clone for IoBuffer {
    fn clone(&self) -> Self {
        Self::copy_of(self)
    }
}

impl fmt::Debug for IoBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoBuffer({} of {} bytes)", self.len, self.capacity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_whole_and_zero_behind_its_end() {
        for len in [0_usize, 1, 4095, 4096, 4097, 3 * 4096 + 512] {
            let bytes: Vec<u8> = (0..len).map(|at| (at % 255).to_le_bytes()[0] + 1).collect();
            let mut copy = IoBuffer::copy_of(&bytes);
            assert_eq!(&copy[..], &bytes[..]);
            let capacity = copy.capacity();
            assert!(capacity >= len.max(1) && capacity.is_multiple_of(BUFFER_ALIGNMENT));
            copy.set_len(capacity);
            assert!(copy[len..].iter().all(|byte| *byte == 0));
        }
    }
}
