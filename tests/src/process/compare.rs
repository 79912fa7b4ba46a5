//! Whole devices, byte by byte, past the page cache.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

const CHUNK: usize = 1 << 20;
const ALIGN: usize = 4096;

/// Reads a device directly.
struct Direct {
    file: File,
    buffer: Vec<u8>,
    start: usize,
}

impl Direct {
    fn open(path: &Path) -> Self {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let buffer = vec![0; CHUNK + ALIGN];
        let start = buffer.as_ptr().align_offset(ALIGN);
        Self {
            file,
            buffer,
            start,
        }
    }

    /// Reads from an offset to the end of its chunk, or of the device.
    fn read(&mut self, offset: u64) -> std::io::Result<&[u8]> {
        let place = &mut self.buffer[self.start..self.start + CHUNK];
        let mut done = 0;
        while done < CHUNK {
            let at = offset + u64::try_from(done).expect("a chunk fits");
            match self.file.read_at(&mut place[done..], at)? {
                0 => break,
                count => done += count,
            }
            // The rest of a last, odd block cannot be asked for directly, and is not there.
            if done % 512 != 0 {
                break;
            }
        }
        Ok(&self.buffer[self.start..self.start + done])
    }
}

/// The first byte at which two devices or files differ; a missing end counts as one.
///
/// # Panics
/// When one cannot be read.
#[must_use]
pub fn first_difference(one: &Path, other: &Path) -> Option<u64> {
    let (mut left, mut right) = (Direct::open(one), Direct::open(other));
    let mut offset = 0;
    loop {
        let fault = |error| panic!("at {offset}: {error}");
        let (a, b) = (
            left.read(offset).unwrap_or_else(fault),
            right.read(offset).unwrap_or_else(fault),
        );
        let at = |index: usize| offset + u64::try_from(index).expect("an index fits");
        if a != b {
            let shared = a.len().min(b.len());
            let index = (0..shared).find(|index| a[*index] != b[*index]);
            return Some(at(index.unwrap_or(shared)));
        }
        if a.len() < CHUNK {
            return None;
        }
        offset = at(CHUNK);
    }
}

/// Asserts that two devices hold the same bytes.
///
/// # Panics
/// When they do not.
pub fn assert_equal_devices(one: &Path, other: &Path) {
    if let Some(at) = first_difference(one, other) {
        panic!(
            "{} and {} differ at byte {at} (block {}): {}, {}",
            one.display(),
            other.display(),
            at / 4096,
            show(one, at),
            show(other, at)
        );
    }
}

/// Some bytes around a difference, for people.
fn show(path: &Path, at: u64) -> String {
    let mut bytes = [0; 16];
    let start = at & !15;
    let count = File::open(path).and_then(|file| file.read_at(&mut bytes, start));
    format!("{:02x?}", &bytes[..count.unwrap_or(0)])
}

/// How a device reads against the truth, chunk by chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Reading {
    /// Blocks that are equal.
    pub equal: u64,
    /// Blocks that give an error.
    pub errors: u64,
    /// Blocks that are served with other content: never allowed.
    pub wrong: u64,
}

/// Reads a device in blocks of 4 KiB against what it must hold.
///
/// # Panics
/// When the truth cannot be read.
#[must_use]
pub fn read_against(device: &Path, truth: &Path) -> Reading {
    let (mut device, mut truth) = (Direct::open(device), Direct::open(truth));
    let mut reading = Reading::default();
    let mut offset = 0;
    loop {
        let expected = truth.read(offset).expect("the truth").to_vec();
        if expected.is_empty() {
            return reading;
        }
        match device.read(offset) {
            Ok(found) if found == expected => {
                reading.equal += u64::try_from(expected.len().div_ceil(ALIGN)).expect("fits");
            }
            _ => device.block_by_block(offset, &expected, &mut reading),
        }
        offset += u64::try_from(expected.len()).expect("a chunk fits");
    }
}

impl Direct {
    fn block_by_block(&mut self, offset: u64, expected: &[u8], reading: &mut Reading) {
        let mut at = offset;
        for block in expected.chunks(ALIGN) {
            let place = &mut self.buffer[self.start..self.start + block.len()];
            match self.file.read_exact_at(place, at) {
                Err(_) => reading.errors += 1,
                Ok(()) if place == block => reading.equal += 1,
                Ok(()) => reading.wrong += 1,
            }
            at += u64::try_from(block.len()).expect("a block fits");
        }
    }
}
