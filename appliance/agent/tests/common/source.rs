//! Image files, and writers to devices.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const O_DIRECT: i32 = 0o40000;

pub fn image(root: &Path, name: &str, size_bytes: u64) -> PathBuf {
    let path = root.join(name);
    File::create(&path).unwrap().set_len(size_bytes).unwrap();
    path
}

/// Deterministic bytes that do not compress to nothing.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

#[repr(align(4096))]
struct Aligned([u8; 1 << 20]);

/// Writes through the device without the page cache.
pub struct Direct {
    file: File,
    buffer: Box<Aligned>,
}

impl Direct {
    pub fn open(path: &Path) -> Self {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(O_DIRECT)
            .open(path)
            .unwrap();
        Self {
            file,
            buffer: Box::new(Aligned([0; 1 << 20])),
        }
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.buffer.0[..bytes.len()].copy_from_slice(bytes);
        self.file
            .write_all_at(&self.buffer.0[..bytes.len()], offset)
    }

    pub fn sync(&self) -> std::io::Result<()> {
        self.file.sync_data()
    }
}
