//! Segments of an archive: slots, the directory that finds them, and a trailer whose hash covers
//! all but the slots, which have hashes of their own in the directory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use aws_lc_rs::aead::LessSafeKey;

use super::secret::Keys;
use super::slot::{ENTRY_BYTES, Entry, SLOT_BYTES, Sealed, open, verify};
use super::{damaged, get, get_u16, get_u32, get_u64, put, segment_path};
use crate::buffer::Buffer;
use crate::error::BulkError;
use crate::raw::is_zero;

const MAGIC: [u8; 8] = *b"AFTSEEDS";
pub(super) const HEADER_BYTES: usize = 64;
pub(super) const TRAILER_BYTES: usize = 64;
const VERSION: u16 = 1;
/// Longest segment that is believed.
pub(super) const SEGMENT_BYTES_MAX: u64 = 256 << 20;

/// A segment that fills.
pub(super) struct Builder {
    number: u64,
    header: [u8; HEADER_BYTES],
    stored: Vec<u8>,
    entries: Vec<Entry>,
}

/// A segment's bytes, ready to be written.
pub(super) struct Finished {
    pub(super) number: u64,
    pub(super) buffer: Buffer,
    pub(super) slot_count: u32,
    pub(super) hash: [u8; 32],
}

impl Builder {
    pub(super) fn new(id: &[u8; 16], number: u64, session: &[u8; 16]) -> Self {
        let mut header = [0; HEADER_BYTES];
        put(&mut header, 0, &MAGIC);
        put(&mut header, 8, &VERSION.to_le_bytes());
        put(&mut header, 16, id);
        put(&mut header, 32, &number.to_le_bytes());
        put(&mut header, 40, session);
        Self {
            number,
            header,
            stored: Vec::new(),
            entries: Vec::new(),
        }
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(super) fn stored_bytes(&self) -> usize {
        self.stored.len()
    }

    pub(super) fn push(&mut self, sealed: Sealed) {
        let position = (HEADER_BYTES + self.stored.len()) as u64;
        self.entries.push(Entry {
            position,
            ..sealed.entry
        });
        self.stored.extend_from_slice(&sealed.stored);
    }

    pub(super) fn finish(self, keys: &Keys) -> Finished {
        let directory: Vec<u8> = self.entries.iter().flat_map(Entry::encode).collect();
        let at = HEADER_BYTES + self.stored.len();
        let mut trailer = [0; TRAILER_BYTES];
        let slot_count = u32::try_from(self.entries.len()).unwrap_or(u32::MAX);
        put(&mut trailer, 0, &(at as u64).to_le_bytes());
        put(&mut trailer, 8, &slot_count.to_le_bytes());
        let hash = keys.hash(&[&self.header, &directory, &trailer[..32]]);
        put(&mut trailer, 32, &hash);
        let mut buffer = Buffer::zeroed(at + directory.len() + TRAILER_BYTES);
        let bytes = buffer.bytes_mut();
        put(bytes, 0, &self.header);
        put(bytes, HEADER_BYTES, &self.stored);
        put(bytes, at, &directory);
        put(bytes, at + directory.len(), &trailer);
        Finished {
            number: self.number,
            buffer,
            slot_count,
            hash,
        }
    }
}

/// What a commit of the chain says of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Named {
    pub(super) number: u64,
    pub(super) bytes: u64,
    pub(super) slot_count: u32,
    /// The slots lie from here,
    pub(super) from: u64,
    /// to here.
    pub(super) to: u64,
    pub(super) hash: [u8; 32],
}

/// A segment whose directory was verified.
pub(super) struct Segment {
    path: PathBuf,
    file: File,
    entries: Vec<Entry>,
    cipher: Option<LessSafeKey>,
    id: [u8; 16],
}

impl Segment {
    /// Opens a segment and verifies all but its slots.
    pub(super) fn open(
        directory: &Path,
        keys: &Keys,
        id: &[u8; 16],
        named: &Named,
    ) -> Result<Self, BulkError> {
        let path = segment_path(directory, named.number);
        let file = File::open(&path).map_err(BulkError::io("open", &path))?;
        let length = file
            .metadata()
            .map_err(BulkError::io("look at", &path))?
            .len();
        let least = (HEADER_BYTES + TRAILER_BYTES) as u64;
        if length != named.bytes || !(least..=SEGMENT_BYTES_MAX).contains(&length) {
            return Err(damaged(&path, length.min(named.bytes), "the length"));
        }
        let read = |at: u64, bytes: &mut [u8]| {
            file.read_exact_at(bytes, at)
                .map_err(BulkError::io("read", &path))
        };
        let (mut header, mut trailer) = ([0; HEADER_BYTES], [0; TRAILER_BYTES]);
        read(0, &mut header)?;
        let trailer_at = length - TRAILER_BYTES as u64;
        read(trailer_at, &mut trailer)?;
        let wrong_header = || damaged(&path, 0, "the header");
        let wrong_trailer = || damaged(&path, trailer_at, "the trailer");
        let directory_at = get_u64(&trailer, 0).ok_or_else(wrong_trailer)?;
        let count = get_u32(&trailer, 8).ok_or_else(wrong_trailer)?;
        let directory_bytes = u64::from(count) * ENTRY_BYTES as u64;
        if count != named.slot_count
            || directory_at < HEADER_BYTES as u64
            || directory_at.checked_add(directory_bytes) != Some(trailer_at)
            || get(&trailer, 32) != Some(named.hash)
        {
            return Err(wrong_trailer());
        }
        let mut table = vec![0; usize::try_from(directory_bytes).map_err(|_| wrong_trailer())?];
        read(directory_at, &mut table)?;
        if keys.hash(&[&header, &table, &trailer[..32]]) != named.hash {
            return Err(damaged(&path, directory_at, "the header or directory"));
        }
        if get_u16(&header, 8) != Some(VERSION)
            || get(&header, 0) != Some(MAGIC)
            || get(&header, 16) != Some(*id)
            || get_u64(&header, 32) != Some(named.number)
            || !is_zero(&header[10..16])
        {
            return Err(wrong_header());
        }
        let session: [u8; 16] = get(&header, 40).ok_or_else(wrong_header)?;
        let entries = decode_all(&path, &table, directory_at, named)?;
        Ok(Self {
            cipher: keys.session(&session),
            path,
            file,
            entries,
            id: *id,
        })
    }

    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    fn stored(&self, entry: &Entry) -> Result<Vec<u8>, BulkError> {
        let mut stored = vec![0; entry.stored_len as usize];
        self.file
            .read_exact_at(&mut stored, entry.position)
            .map_err(BulkError::io("read", &self.path))?;
        Ok(stored)
    }

    /// Reads and verifies the plain bytes of a slot.
    pub(super) fn plain(&self, keys: &Keys, entry: &Entry) -> Result<Vec<u8>, BulkError> {
        let stored = self.stored(entry)?;
        open(keys, self.cipher.as_ref(), &self.id, entry, stored)
            .map_err(|damage| damaged(&self.path, entry.position, damage.0))
    }

    /// Verifies every slot; gives the bytes that were read.
    pub(super) fn verify(&self, keys: &Keys) -> Result<u64, BulkError> {
        let mut bytes = 0;
        for entry in &self.entries {
            let stored = self.stored(entry)?;
            verify(keys, &self.id, entry, &stored)
                .map_err(|damage| damaged(&self.path, entry.position, damage.0))?;
            bytes += stored.len() as u64;
        }
        Ok(bytes)
    }
}

/// Reads the directory. Slots follow each other, in the segment and on the disk.
fn decode_all(
    path: &Path,
    table: &[u8],
    directory_at: u64,
    named: &Named,
) -> Result<Vec<Entry>, BulkError> {
    let mut entries = Vec::with_capacity(table.len() / ENTRY_BYTES);
    let mut position = HEADER_BYTES as u64;
    let mut offset = named.from;
    for (number, bytes) in table.chunks_exact(ENTRY_BYTES).enumerate() {
        let at = directory_at + (number * ENTRY_BYTES) as u64;
        let entry = Entry::decode(bytes).filter(|entry| {
            entry.position == position && entry.offset >= offset && entry.end() <= named.to
        });
        let entry = entry.ok_or_else(|| damaged(path, at, "an entry of the directory"))?;
        position += u64::from(entry.stored_len);
        offset = entry.offset + SLOT_BYTES as u64;
        entries.push(entry);
    }
    if position == directory_at {
        Ok(entries)
    } else {
        Err(damaged(path, position, "bytes that no slot has"))
    }
}
