//! Seed archives: a directory of segments and a chain that names them. See `FORMAT.md`.
//!
//! Invariants
//! * A segment is synced, with its name, before a commit of the chain names it.
//! * Every commit's hash covers the commit before it and the segment that it adds; the last one
//!   says that the disk is whole. Without it the archive is unfinished, and not imported.
//! * Every byte of every file lies under one hash; hashes are keyed by the secret, if there is one.
//! * No length is believed before it was compared with the file it speaks of.

mod chain;
mod reader;
mod secret;
mod segment;
mod slot;
#[cfg(test)]
mod tests;
mod writer;

pub use reader::{ArchiveReader, Verified};
pub use secret::Secret;
pub use writer::{ArchiveState, ArchiveTarget, archive_state, export_archive, is_archive};

use std::path::{Path, PathBuf};

use crate::error::BulkError;

/// Name of the chain.
const CHAIN: &str = "chain.aft";

fn chain_path(directory: &Path) -> PathBuf {
    directory.join(CHAIN)
}

fn segment_path(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("{number:08}.seg"))
}

/// The number that a name of a segment holds.
fn segment_number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".seg")?;
    let is_plain = digits.len() >= 8 && digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|_| is_plain)
}

fn damaged(path: &Path, at: u64, what: &'static str) -> BulkError {
    BulkError::Damaged {
        path: path.to_owned(),
        at,
        what,
    }
}

fn get<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn get_u16(bytes: &[u8], at: usize) -> Option<u16> {
    get(bytes, at).map(u16::from_le_bytes)
}

fn get_u32(bytes: &[u8], at: usize) -> Option<u32> {
    get(bytes, at).map(u32::from_le_bytes)
}

fn get_u64(bytes: &[u8], at: usize) -> Option<u64> {
    get(bytes, at).map(u64::from_le_bytes)
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}
