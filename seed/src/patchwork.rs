//! Reads of which parts fail: what can be read of a range is, and the rest is named.
//!
//! Structures that are there twice are mostly read in one go. When that read fails, one bad sector
//! must not hide the copy beside it: so the range is read again in halves, down to sectors.

use afterimage_blockdev::IoBuffer;

/// Smallest piece.
const SECTOR: usize = 4096;
/// Reads that may fail before all of it is given up.
const FAILURES_MAX: usize = 512;

/// A range that is read in pieces.
#[derive(Debug)]
pub(crate) struct Patchwork {
    offset: u64,
    bytes: IoBuffer,
    /// Pieces that are still to be read, the next one last: place and length.
    pieces: Vec<(usize, usize)>,
    unreadable: Vec<u64>,
    failures: usize,
}

impl Patchwork {
    /// Begins with a range whose read failed.
    pub(crate) fn new(offset: u64, len: usize) -> Self {
        let len = len.next_multiple_of(SECTOR);
        let mut all = Self {
            offset,
            bytes: IoBuffer::zeroed(len),
            pieces: Vec::new(),
            unreadable: Vec::new(),
            failures: 0,
        };
        all.split(0, len);
        all
    }

    fn split(&mut self, at: usize, len: usize) {
        if len <= SECTOR {
            self.unreadable.push(self.offset + at as u64);
            return;
        }
        let half = (len / 2).next_multiple_of(SECTOR);
        self.pieces.push((at + half, len - half));
        self.pieces.push((at, half));
    }

    /// What is to be read next: byte offset and length; `None` at the end.
    pub(crate) fn wanted(&self) -> Option<(u64, usize)> {
        let (at, len) = *self.pieces.last()?;
        Some((self.offset + at as u64, len))
    }

    /// Takes what was read of the piece that was wanted; `None` when its read failed. False when
    /// too much fails to go on.
    pub(crate) fn take(&mut self, read: Option<&[u8]>) -> bool {
        let Some((at, len)) = self.pieces.pop() else {
            return true;
        };
        match read {
            Some(read) => {
                let len = len.min(read.len());
                self.bytes[at..at + len].copy_from_slice(&read[..len]);
                true
            }
            None => {
                self.failures += 1;
                self.split(at, len);
                self.failures < FAILURES_MAX
            }
        }
    }

    /// The bytes, zeroes in place of what cannot be read, and the offsets of those sectors.
    pub(crate) fn finish(self) -> (IoBuffer, Vec<u64>) {
        (self.bytes, self.unreadable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_sector_hides_no_other() {
        let medium: Vec<u8> = (0..37 * SECTOR)
            .map(|at| u8::try_from(at / SECTOR).unwrap_or(0) + 1)
            .collect();
        for bad in 0..37 {
            let mut patchwork = Patchwork::new(8192, medium.len());
            let mut reads = 0;
            while let Some((offset, len)) = patchwork.wanted() {
                let at = usize::try_from(offset).unwrap() - 8192;
                let is_bad = (at..at + len).contains(&(bad * SECTOR));
                assert!(patchwork.take((!is_bad).then(|| &medium[at..at + len])));
                reads += 1;
            }
            let (bytes, unreadable) = patchwork.finish();
            assert_eq!(unreadable, [8192 + (bad * SECTOR) as u64]);
            let mut expected = medium.clone();
            expected[bad * SECTOR..(bad + 1) * SECTOR].fill(0);
            assert!(bytes[..] == expected[..]);
            assert!(reads < 20, "{reads} reads");
        }
    }

    #[test]
    fn a_medium_that_fails_is_given_up() {
        let mut patchwork = Patchwork::new(0, 64 << 20);
        let mut reads = 0;
        while patchwork.take(None) {
            reads += 1;
        }
        assert!(reads < FAILURES_MAX);
    }
}
