//! Buffers that the kernel may own for a while: aligned for direct I/O, moved and never lent.

/// What direct I/O asks of addresses, offsets and lengths.
pub(crate) const ALIGNMENT: usize = 4096;

/// Bytes at an aligned address within a vector that never grows.
#[derive(Debug)]
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// Makes a buffer of zeroes.
    pub(crate) fn zeroed(len: usize) -> Self {
        let bytes = vec![0; len + ALIGNMENT];
        // A vector keeps its address when it is moved.
        let start = bytes.as_ptr().align_offset(ALIGNMENT);
        let start = if start < ALIGNMENT { start } else { 0 };
        Self { bytes, start, len }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }

    /// Gives the vector away, with the place of the bytes in it.
    pub(crate) fn into_parts(self) -> (Vec<u8>, usize, usize) {
        (self.bytes, self.start, self.len)
    }

    /// Takes the vector back.
    pub(crate) fn from_parts((bytes, start, len): (Vec<u8>, usize, usize)) -> Self {
        Self { bytes, start, len }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_stay_so() {
        for len in [1, 4096, 70_000] {
            let mut buffer = Buffer::zeroed(len);
            buffer.bytes_mut()[len - 1] = 7;
            let moved = Box::new(buffer);
            assert_eq!(moved.bytes().as_ptr().align_offset(ALIGNMENT), 0);
            let back = Buffer::from_parts((*moved).into_parts());
            assert_eq!((back.len(), back.bytes()[len - 1]), (len, 7));
        }
    }
}
