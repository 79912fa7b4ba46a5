//! Builds frames.

use core::ops::Range;

use afterimage_blockdev::Lsn;

use super::{FRAME_BYTES_MAX, FRAME_HEADER_BYTES, Frame, FrameHeader, FrameIdentity, HASH_AT};
use crate::bytes::{narrow, put, wide};
use crate::lanes::{Lanes, Message};
use crate::record::{NOTE_BYTES_MAX, RECORD_HEADER_BYTES, RecordHeader};
use crate::seal::Sealer;
use crate::slot::{ContentTag, HASH_AT as SLOT_HASH_AT, HashedHead, SlotContext, SlotView};

/// Builds a frame record by record.
#[derive(Debug)]
pub struct FrameBuilder {
    identity: FrameIdentity,
    is_bulk: bool,
    bytes: Vec<u8>,
    hasher: blake3::Hasher,
    first: Option<Lsn>,
    last: Lsn,
    record_count: u32,
    slot_count: u32,
    /// Slots, whose hashes are made together in the end: where each begins, and what else its
    /// hash covers.
    slots: Vec<(usize, HashedHead)>,
    parts: Vec<(Range<usize>, Range<usize>, Range<usize>)>,
}

impl FrameBuilder {
    /// Begins a frame.
    #[must_use]
    pub fn new(identity: FrameIdentity, is_bulk: bool) -> Self {
        Self {
            identity,
            is_bulk,
            bytes: vec![0; FRAME_HEADER_BYTES],
            hasher: blake3::Hasher::new(),
            first: None,
            last: Lsn::ZERO,
            record_count: 0,
            slot_count: 0,
            slots: Vec::new(),
            parts: Vec::new(),
        }
    }

    /// Makes room for so many bytes at once.
    pub fn reserve(&mut self, bytes: usize) {
        self.bytes.reserve(bytes.min(FRAME_BYTES_MAX));
    }

    /// Bytes so far, header included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Says whether no record was added yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.record_count == 0
    }

    /// Says whether a record with `plain_len` bytes of data surely fits.
    #[must_use]
    pub fn fits(&self, plain_len: usize) -> bool {
        // A slot adds at most 152 bytes to its plain bytes, per block.
        let worst = plain_len + (plain_len / afterimage_blockdev::BLOCK_BYTES + 2) * 160;
        self.len() + RECORD_HEADER_BYTES + worst + NOTE_BYTES_MAX <= FRAME_BYTES_MAX
    }

    /// Adds a record with data: `plain` holds `record.length` bytes, which `sealer` seals cell by
    /// cell.
    ///
    /// # Panics
    /// When the record's kind has no slots, or the lengths differ.
    pub fn push_data(&mut self, record: &RecordHeader, plain: &[u8], sealer: &mut Sealer) {
        let tags = sealer.tags(plain);
        self.push_tagged(record, plain, &tags, sealer);
    }

    /// Adds a record with data whose content tags are known: one for each block.
    ///
    /// # Panics
    /// When the record's kind has no slots, or the lengths differ.
    pub fn push_tagged(
        &mut self,
        record: &RecordHeader,
        plain: &[u8],
        tags: &[ContentTag],
        sealer: &mut Sealer,
    ) {
        assert!(record.kind.has_slots() && wide(plain.len()) == record.length);
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; RECORD_HEADER_BYTES]);
        let slots_from = self.slots.len();
        let (mut rest, mut tags_rest) = (plain, tags);
        for (cell, mask) in crate::record::cells(record.offset, record.length) {
            let blocks = mask.count_ones() as usize;
            let (now, later) = rest.split_at(blocks * afterimage_blockdev::BLOCK_BYTES);
            let (tags, tags_later) = tags_rest.split_at(blocks);
            (rest, tags_rest) = (later, tags_later);
            let context =
                SlotContext::uniform(record.disk, self.identity.history, cell, mask, record.lsn);
            let slot_at = self.bytes.len();
            let header = sealer.seal_unhashed(&context, now, tags, &mut self.bytes);
            self.slots.push((slot_at, header.hashed_head(&context)));
        }
        self.finish_record(record, start, slots_from);
    }

    /// Adds a record without data; `note` is the name of a mark or the disks of a batch.
    ///
    /// # Panics
    /// When the record's kind has slots or the note is too long.
    pub fn push_note(&mut self, record: &RecordHeader, note: &[u8]) {
        assert!(!record.kind.has_slots() && note.len() <= NOTE_BYTES_MAX);
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; RECORD_HEADER_BYTES]);
        self.bytes.extend_from_slice(note);
        let slots_from = self.slots.len();
        self.finish_record(record, start, slots_from);
    }

    fn finish_record(&mut self, record: &RecordHeader, start: usize, slots_from: usize) {
        let slots = self.slots.len() - slots_from;
        let slot_count = u16::try_from(slots).expect("a write has at most 257 slots");
        let body_len = narrow(self.bytes.len() - start - RECORD_HEADER_BYTES);
        let body = start + RECORD_HEADER_BYTES..self.bytes.len();
        let note = if record.kind.has_slots() {
            &[]
        } else {
            &self.bytes[body.clone()]
        };
        let header = record.encode(slot_count, body_len, note);
        put(&mut self.bytes, start, &header);
        self.parts
            .push((start..body.start, body, slots_from..self.slots.len()));
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        self.first.get_or_insert(record.lsn);
        self.last = record.lsn;
        self.record_count += 1;
        self.slot_count += u32::from(slot_count);
    }

    /// Seals the frame.
    ///
    /// # Panics
    /// When no record was added.
    #[must_use]
    pub fn finish(mut self) -> Frame {
        let first = self.first.expect("a frame has at least one record");
        let mut header = FrameHeader {
            identity: self.identity,
            first,
            last: self.last,
            is_bulk: self.is_bulk,
            record_count: self.record_count,
            slot_count: self.slot_count,
            body_len: narrow(self.bytes.len() - FRAME_HEADER_BYTES),
            hash: [0; 32],
        };
        let slot_hashes = self.hash_slots();
        let encoded = header.encode_without_hash();
        self.hasher.update(&encoded);
        for (head, body, hashes) in &self.parts {
            self.hasher.update(&self.bytes[head.clone()]);
            if hashes.is_empty() {
                self.hasher.update(&self.bytes[body.clone()]);
            } else {
                self.hasher
                    .update(slot_hashes[hashes.clone()].as_flattened());
            }
        }
        header.hash = *self.hasher.finalize().as_bytes();
        put(&mut self.bytes, 0, &encoded);
        put(&mut self.bytes, HASH_AT, &header.hash);
        Frame {
            header,
            bytes: self.bytes,
        }
    }

    /// Makes the slots' hashes and writes them into the slots.
    fn hash_slots(&mut self) -> Vec<[u8; 32]> {
        let mut hashes = Vec::with_capacity(self.slots.len());
        let messages: Vec<Message<'_>> = self
            .slots
            .iter()
            .map(|(at, head)| Message {
                head,
                rest: stored_of(&self.bytes, *at),
            })
            .collect();
        Lanes::new().hash(&messages, |_, hash| hashes.push(hash));
        for ((at, _), hash) in self.slots.iter().zip(&hashes) {
            put(&mut self.bytes, at + SLOT_HASH_AT, hash);
        }
        hashes
    }
}

/// The stored bytes of the slot that begins there.
fn stored_of(bytes: &[u8], at: usize) -> &[u8] {
    SlotView::parse(&bytes[at..])
        .expect("a slot that was just sealed")
        .stored
}
