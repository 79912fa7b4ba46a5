//! Seed segments: slots of bulk blocks and of destaged log segments, written once, sealed whole.
//!
//! ```text
//! | header 4096 | slot | slot | ... | directory | directory | footer 4096 | footer 4096 |
//! directory = | offsets 4 x n | contexts 32 x m | entries 80 x k | zeroes to 4096 |
//! ```
//!
//! Invariants
//! * The bytes of a slot are those that arrived; moving never decrypts.
//! * A slot keeps its segment and number when the segment is rewritten, so that no map changes. The
//!   offset of a slot that was left out is 0, and it has no entry.
//! * An entry of the directory holds all that a slot's context is, and the slot's hash: maps and
//!   scrub need nothing else.
//! * Directory and footer are there twice: without them nobody knows what the slots are.
//! * The file is whole and synced before the manifest names it, and never changes.

use std::collections::HashMap;

use afterimage_blockdev::{
    CELL_BLOCKS, CellIndex, DiskId, FileName, HistoryId, IoBuffer, Lsn, SegmentId, StoreId,
};
use afterimage_cache::bytes::{
    array, get_u16, get_u32, get_u64, index, is_zero, narrow, put, wide,
};
use afterimage_cache::segment::Directory;
use afterimage_cache::{Damage, SlotContext};

use crate::entry::CELLS_MAX;

/// Bytes of header and footer.
pub const SECTOR: usize = 4096;
/// Version that this program writes.
pub const SEED_SEGMENT_VERSION: u16 = 1;

const HEADER_MAGIC: &[u8; 8] = b"AISEEDSG";
const FOOTER_MAGIC: &[u8; 8] = b"AISEEDND";
/// Copies of directory and footer.
const COPIES: usize = 2;
/// Bytes of all footers, at the end of the file.
pub const FOOTERS_BYTES: usize = COPIES * SECTOR;
const CONTEXT_BYTES: usize = 32;
const ENTRY_BYTES: usize = 80;
const NAME: &str = "seed segment";

/// Name of a seed segment's file. Each time the segment is rewritten its generation rises.
#[must_use]
pub fn seed_file(segment: SegmentId, generation: u32) -> FileName {
    FileName::new(format!("segments/{:010}-{generation}.seed", segment.0))
}

/// The segment and generation that a file name means, if any.
#[must_use]
pub fn parse_seed_file(name: &FileName) -> Option<(SegmentId, u32)> {
    let (segment, generation) = name.base().strip_suffix(".seed")?.split_once('-')?;
    let (segment, generation) = (SegmentId(segment.parse().ok()?), generation.parse().ok()?);
    // Two names never mean one file.
    let is_its_name = seed_file(segment, generation).base() == name.base();
    is_its_name.then_some((segment, generation))
}

/// What the directory says of a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotEntry {
    /// Its number in the segment.
    pub slot: u32,
    /// Where its blocks belong.
    pub context: SlotContext,
    /// The slot's hash.
    pub hash: [u8; 32],
}

/// A seed segment that is being filled.
#[derive(Debug)]
pub struct SeedSegmentBuilder {
    store: StoreId,
    segment: SegmentId,
    contexts: Vec<(DiskId, HistoryId)>,
    /// The place of each of them.
    places: HashMap<(DiskId, HistoryId), usize>,
    offsets: Directory,
    entries: Vec<u8>,
    root: blake3::Hasher,
    /// Bytes that are not handed out for writing yet.
    pending: IoBuffer,
    pending_at: u64,
    /// The next slot's number.
    slots: u32,
    /// Slots that it holds.
    held: u32,
    needs_notes: u32,
}

impl SeedSegmentBuilder {
    /// Begins a segment.
    #[must_use]
    pub fn new(store: StoreId, segment: SegmentId) -> Self {
        let mut pending = IoBuffer::with_capacity(1 << 20);
        let mut header = [0; SECTOR];
        put(&mut header, 0, HEADER_MAGIC);
        put(&mut header, 8, &SEED_SEGMENT_VERSION.to_le_bytes());
        put(&mut header, 16, &store.0);
        put(&mut header, 32, &segment.0.to_le_bytes());
        let hash = blake3::hash(&header[..64]);
        put(&mut header, 64, hash.as_bytes());
        pending.extend_from_slice(&header);
        Self {
            store,
            segment,
            contexts: Vec::new(),
            places: HashMap::new(),
            offsets: Directory::default(),
            entries: Vec::new(),
            root: blake3::Hasher::new(),
            pending,
            pending_at: 0,
            slots: 0,
            held: 0,
            needs_notes: 0,
        }
    }

    /// Says which notes tell what was left out of it: those of this number, or later ones.
    pub fn need_notes(&mut self, number: u32) {
        self.needs_notes = number;
    }

    /// The segment.
    #[must_use]
    pub fn segment(&self) -> SegmentId {
        self.segment
    }

    /// Number of slots held so far.
    #[must_use]
    pub fn slot_count(&self) -> u32 {
        self.held
    }

    /// Bytes so far, directory not counted.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pending_at + wide(self.pending.len())
    }

    /// Adds a slot's bytes; gives back its index.
    pub fn push(&mut self, context: &SlotContext, hash: &[u8; 32], bytes: &[u8]) -> u32 {
        let slot = self.slots;
        self.push_at(slot, context, hash, bytes);
        slot
    }

    /// Adds a slot under a number above all before it.
    pub fn push_at(&mut self, slot: u32, context: &SlotContext, hash: &[u8; 32], bytes: &[u8]) {
        self.slots = slot + 1;
        self.held += 1;
        self.offsets.set(slot, self.bytes());
        self.pending.extend_from_slice(bytes);
        self.root.update(hash);
        let pair = (context.disk, context.history);
        let contexts = &mut self.contexts;
        let place = *self.places.entry(pair).or_insert_with(|| {
            contexts.push(pair);
            contexts.len() - 1
        });
        let mut entry = [0; ENTRY_BYTES];
        put(&mut entry, 0, &context.cell.0.to_le_bytes());
        for (block, lsn) in context.lsns.iter().enumerate() {
            put(&mut entry, 8 + block * 8, &lsn.0.to_le_bytes());
        }
        put(&mut entry, 40, &narrow(place).to_le_bytes());
        entry[44] = context.mask;
        put(&mut entry, 48, hash);
        self.entries.extend_from_slice(&entry);
    }

    /// Takes whole sectors for writing, at the offset given, when there are many.
    pub fn take_ready(&mut self) -> Option<(u64, IoBuffer)> {
        let len = self.pending.len() / SECTOR * SECTOR;
        if len < (1 << 20) {
            return None;
        }
        let mut rest = IoBuffer::with_capacity(1 << 20);
        rest.extend_from_slice(&self.pending[len..]);
        let mut ready = core::mem::replace(&mut self.pending, rest);
        ready.set_len(len);
        let at = self.pending_at;
        self.pending_at += wide(len);
        Some((at, ready))
    }

    /// Finishes: the last bytes to write with their offset, and the segment's root hash.
    #[must_use]
    pub fn finish(mut self) -> (u64, IoBuffer, [u8; 32]) {
        self.pending.pad_to(SECTOR);
        let directory_at = self.bytes();
        let mut directory = Vec::new();
        for offset in &self.offsets.offsets {
            directory.extend_from_slice(&offset.to_le_bytes());
        }
        for (disk, history) in &self.contexts {
            directory.extend_from_slice(&disk.0);
            directory.extend_from_slice(&history.0);
        }
        directory.extend_from_slice(&self.entries);
        let root = *self.root.finalize().as_bytes();
        let mut footer = [0; SECTOR];
        put(&mut footer, 0, FOOTER_MAGIC);
        put(&mut footer, 8, &SEED_SEGMENT_VERSION.to_le_bytes());
        put(&mut footer, 12, &self.needs_notes.to_le_bytes());
        put(&mut footer, 16, &self.store.0);
        put(&mut footer, 32, &self.segment.0.to_le_bytes());
        put(&mut footer, 36, &self.slots.to_le_bytes());
        put(&mut footer, 40, &narrow(self.contexts.len()).to_le_bytes());
        put(&mut footer, 44, &self.held.to_le_bytes());
        put(&mut footer, 48, &directory_at.to_le_bytes());
        put(&mut footer, 56, &root);
        put(&mut footer, 88, blake3::hash(&directory).as_bytes());
        let hash = blake3::hash(&footer[..120]);
        put(&mut footer, 120, hash.as_bytes());
        for _ in 0..COPIES {
            self.pending.extend_from_slice(&directory);
            self.pending.pad_to(SECTOR);
        }
        for _ in 0..COPIES {
            self.pending.extend_from_slice(&footer);
        }
        (self.pending_at, self.pending, root)
    }
}

/// Checks the first sector of a segment.
///
/// # Errors
/// [`Damage`].
pub fn check_header(bytes: &[u8], store: StoreId, segment: SegmentId) -> Result<(), Damage> {
    let bytes = bytes
        .get(..SECTOR)
        .ok_or(Damage::Short { structure: NAME })?;
    if bytes[..8] != HEADER_MAGIC[..] {
        return Err(Damage::Magic { structure: NAME });
    }
    let is_whole = array(bytes, 64) == Some(*blake3::hash(&bytes[..64]).as_bytes())
        && is_zero(bytes, 96, SECTOR);
    if !is_whole {
        return Err(Damage::Hash { structure: NAME });
    }
    if array(bytes, 16) != Some(store.0) || get_u32(bytes, 32) != Some(segment.0) {
        return Err(Damage::Field {
            structure: NAME,
            field: "identity",
        });
    }
    Ok(())
}

/// Last sector of a seed segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SeedFooter {
    /// Highest number of a slot, and one.
    pub slot_count: u32,
    context_count: u32,
    /// Slots that it holds.
    pub entry_count: u32,
    /// Where the directory begins.
    pub directory_offset: u64,
    /// Hash over the hashes of all slots.
    pub root: [u8; 32],
    /// Number of the notes that tell what was left out; 0 when nothing was, or nothing tells.
    pub needs_notes: u32,
    directory_hash: [u8; 32],
}

impl SeedFooter {
    /// Bytes of the directory, without padding.
    #[must_use]
    pub fn directory_len(&self) -> usize {
        index(self.slot_count) * 4
            + index(self.context_count) * CONTEXT_BYTES
            + index(self.entry_count) * ENTRY_BYTES
    }

    /// Bytes of both directories, with padding.
    #[must_use]
    pub fn directories_len(&self) -> usize {
        COPIES * self.directory_len().next_multiple_of(SECTOR)
    }

    /// Reads the better one of the footers in the last [`FOOTERS_BYTES`] of a file.
    ///
    /// # Errors
    /// [`Damage`] when none is good.
    pub fn find(bytes: &[u8], store: StoreId, segment: SegmentId) -> Result<Self, Damage> {
        let last = bytes
            .get(bytes.len().saturating_sub(SECTOR)..)
            .unwrap_or(&[]);
        Self::decode(last, store, segment)
            .or_else(|damage| Self::decode(bytes, store, segment).map_err(|_| damage))
    }

    /// Reads the better one of the directories.
    ///
    /// # Errors
    /// [`Damage`] when none is good.
    pub fn find_directory(&self, bytes: &[u8]) -> Result<(Directory, Vec<SlotEntry>), Damage> {
        let second = bytes
            .get(self.directory_len().next_multiple_of(SECTOR)..)
            .unwrap_or(&[]);
        self.decode_directory(bytes)
            .or_else(|damage| self.decode_directory(second).map_err(|_| damage))
    }

    /// Reads a footer.
    ///
    /// # Errors
    /// [`Damage`].
    pub fn decode(bytes: &[u8], store: StoreId, segment: SegmentId) -> Result<Self, Damage> {
        let short = || Damage::Short { structure: NAME };
        let bytes = bytes.get(..SECTOR).ok_or_else(short)?;
        if bytes[..8] != FOOTER_MAGIC[..] {
            return Err(Damage::Magic { structure: NAME });
        }
        // The hash comes first: a damaged version is damage, not a newer program's work.
        let hash: [u8; 32] = array(bytes, 120).ok_or_else(short)?;
        if *blake3::hash(&bytes[..120]).as_bytes() != hash {
            return Err(Damage::Hash { structure: NAME });
        }
        let version = get_u16(bytes, 8).ok_or_else(short)?;
        if version > SEED_SEGMENT_VERSION {
            let supported = SEED_SEGMENT_VERSION;
            return Err(Damage::Version {
                structure: NAME,
                found: version,
                supported,
            });
        }
        if !is_zero(bytes, 152, SECTOR) {
            return Err(Damage::Hash { structure: NAME });
        }
        if array(bytes, 16) != Some(store.0) || get_u32(bytes, 32) != Some(segment.0) {
            return Err(Damage::Field {
                structure: NAME,
                field: "identity",
            });
        }
        Ok(Self {
            slot_count: get_u32(bytes, 36).ok_or_else(short)?,
            context_count: get_u32(bytes, 40).ok_or_else(short)?,
            entry_count: get_u32(bytes, 44).ok_or_else(short)?,
            directory_offset: get_u64(bytes, 48).ok_or_else(short)?,
            root: array(bytes, 56).ok_or_else(short)?,
            needs_notes: get_u32(bytes, 12).ok_or_else(short)?,
            directory_hash: array(bytes, 88).ok_or_else(short)?,
        })
    }

    /// Reads the directory: where the slots lie, and what they are.
    ///
    /// # Errors
    /// [`Damage`].
    pub fn decode_directory(&self, bytes: &[u8]) -> Result<(Directory, Vec<SlotEntry>), Damage> {
        let structure = "seed segment directory";
        let bytes = bytes
            .get(..self.directory_len())
            .ok_or(Damage::Short { structure })?;
        if *blake3::hash(bytes).as_bytes() != self.directory_hash {
            return Err(Damage::Hash { structure });
        }
        let slots = index(self.slot_count);
        let offsets: Vec<u32> = bytes[..slots * 4]
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| u32::from_le_bytes(*b))
            .collect();
        let held = (0u32..).zip(&offsets).filter(|(_, offset)| **offset != 0);
        if held.clone().count() != index(self.entry_count) {
            return Err(Damage::Field {
                structure,
                field: "entry count",
            });
        }
        let contexts_at = slots * 4;
        let entries_at = contexts_at + index(self.context_count) * CONTEXT_BYTES;
        let entries = held
            .enumerate()
            .map(|(place, (slot, _))| {
                let at = entries_at + place * ENTRY_BYTES;
                decode_entry(bytes, slot, contexts_at, at, entries_at)
            })
            .collect::<Option<_>>()
            .ok_or(Damage::Field {
                structure,
                field: "entry",
            })?;
        Ok((Directory { offsets }, entries))
    }
}

fn decode_entry(
    bytes: &[u8],
    slot: u32,
    contexts_at: usize,
    at: usize,
    entries_at: usize,
) -> Option<SlotEntry> {
    let context_at = contexts_at + index(get_u32(bytes, at + 40)?) * CONTEXT_BYTES;
    if context_at + CONTEXT_BYTES > entries_at || !is_zero(bytes, at + 45, at + 48) {
        return None;
    }
    let mut lsns = [Lsn::ZERO; CELL_BLOCKS];
    for (block, lsn) in lsns.iter_mut().enumerate() {
        *lsn = Lsn(get_u64(bytes, at + 8 + block * 8)?);
    }
    Some(SlotEntry {
        slot,
        context: SlotContext {
            disk: DiskId(array(bytes, context_at)?),
            history: HistoryId(array(bytes, context_at + 16)?),
            cell: CellIndex(get_u64(bytes, at).filter(|cell| *cell < CELLS_MAX)?),
            mask: *bytes.get(at + 44)?,
            lsns,
        },
        hash: array(bytes, at + 48)?,
    })
}
