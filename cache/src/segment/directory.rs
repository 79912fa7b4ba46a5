//! The end of a sealed segment: where each slot lies, and the footer that says so.

use afterimage_blockdev::{HistoryId, IoBuffer, SegmentId, StoreId};

use super::{SECTOR, SalvagedRecord, SegmentIdentity, SegmentScan, is_sequence};
use crate::bytes::{array, get_u16, get_u32, get_u64, index, is_zero, narrow, put, wide};
use crate::error::Damage;
use crate::frame::FrameView;
use crate::record::{RECORD_HEADER_BYTES, RecordView};
use crate::slot::{SLOT_HEADER_BYTES, TAG_BYTES};

/// Bytes of the footer; it is the last sector of the file.
pub const FOOTER_BYTES: usize = SECTOR;

/// Fewest bytes that a slot takes: a header and one tag.
const SLOT_BYTES_MIN: usize = SLOT_HEADER_BYTES + TAG_BYTES;
const FOOTER_MAGIC: &[u8; 8] = b"AILOGEND";
const VERSION: u16 = 1;
const HASH_AT: usize = 128;

const _: () = assert!(HASH_AT + 40 <= FOOTER_BYTES);
const NAME: &str = "log segment footer";

/// Byte offset of each slot of a segment, in units of 8 bytes. 0 stands for a lost slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    /// By slot index.
    pub offsets: Vec<u32>,
}

impl Directory {
    /// Sets the byte offset of a slot, leaving a gap of lost slots if need be.
    ///
    /// # Panics
    /// When the offset is not a multiple of 8 or beyond 32 GiB.
    pub fn set(&mut self, slot: u32, offset: u64) {
        assert!(offset.is_multiple_of(8), "slots are 8-byte aligned");
        let place = index(slot);
        if self.offsets.len() <= place {
            self.offsets.resize(place + 1, 0);
        }
        self.offsets[place] = u32::try_from(offset / 8).expect("segments are below 32 GiB");
    }

    /// As [`Directory::note_frame`], for the records that were salvaged of a frame.
    pub(crate) fn note_records(
        &mut self,
        offset: u64,
        frame: &[u8],
        records: &[SalvagedRecord],
        history: HistoryId,
    ) {
        for found in records {
            let Some(bytes) = frame.get(found.range.clone()) else {
                continue;
            };
            let Ok((record, _)) = RecordView::parse(bytes) else {
                continue;
            };
            let body = offset + wide(found.range.start + RECORD_HEADER_BYTES);
            let slots = record.slots(history).map_while(Result::ok);
            for (slot, (at, _, _)) in (found.first_slot..).zip(slots) {
                self.set(slot, body + wide(at));
            }
        }
    }

    /// Sets the byte offsets of a frame's slots, the first of which is `first_slot`; the frame lies
    /// at `offset` of the segment.
    pub fn note_frame(&mut self, first_slot: u32, offset: u64, frame: &FrameView<'_>) {
        for (slot, at) in (first_slot..).zip(frame.slot_offsets()) {
            let place = offset + wide(at);
            // Every slot takes its bytes, so a number beyond that is not one of ours.
            let is_possible = u64::from(slot) * wide(SLOT_BYTES_MIN) <= place;
            if at != 0 && is_possible {
                self.set(slot, place);
            }
        }
    }

    /// Byte offset of a slot; `None` when it is lost or does not exist.
    #[must_use]
    pub fn get(&self, slot: u32) -> Option<u64> {
        let offset = *self.offsets.get(index(slot))?;
        (offset != 0).then_some(u64::from(offset) * 8)
    }

    /// Bytes that directory and footer take for so many slots.
    #[must_use]
    pub fn sealed_bytes(slots: u32) -> u64 {
        wide((index(slots) * 4).next_multiple_of(SECTOR) + FOOTER_BYTES)
    }

    /// Lays out directory and footer, to be written at `at`.
    #[must_use]
    pub fn encode(&self, mut footer: Footer, at: u64) -> IoBuffer {
        let mut bytes = IoBuffer::with_capacity(self.offsets.len() * 4 + 2 * SECTOR);
        for offset in &self.offsets {
            bytes.extend_from_slice(&offset.to_le_bytes());
        }
        footer.directory_offset = at;
        footer.slot_count = narrow(self.offsets.len());
        footer.directory_hash = *blake3::hash(&bytes).as_bytes();
        bytes.pad_to(SECTOR);
        bytes.extend_from_slice(&footer.encode());
        bytes
    }

    /// Reads a directory and checks it against its footer.
    ///
    /// # Errors
    /// [`Damage`].
    pub fn decode(bytes: &[u8], footer: &Footer) -> Result<Self, Damage> {
        let structure = "log segment directory";
        let bytes = bytes
            .get(..footer.directory_len())
            .ok_or(Damage::Short { structure })?;
        if *blake3::hash(bytes).as_bytes() != footer.directory_hash {
            return Err(Damage::Hash { structure });
        }
        let (words, _) = bytes.as_chunks::<4>();
        Ok(Self {
            offsets: words.iter().map(|word| u32::from_le_bytes(*word)).collect(),
        })
    }
}

/// Last sector of a sealed segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Footer {
    /// Which file.
    pub identity: SegmentIdentity,
    /// Sequence of the first commit.
    pub first_sequence: u64,
    /// Sequence of the last commit; below the first when there is none.
    pub last_sequence: u64,
    /// Where the directory begins.
    pub directory_offset: u64,
    /// Number of slots.
    pub slot_count: u32,
    /// Hash over the hashes of all frames, in order.
    pub root: [u8; 32],
    /// Hash of the directory.
    pub directory_hash: [u8; 32],
}

impl Footer {
    /// Bytes of the directory, without padding.
    #[must_use]
    pub fn directory_len(&self) -> usize {
        index(self.slot_count) * 4
    }

    fn encode(&self) -> [u8; FOOTER_BYTES] {
        let mut bytes = [0; FOOTER_BYTES];
        put(&mut bytes, 0, FOOTER_MAGIC);
        put(&mut bytes, 8, &VERSION.to_le_bytes());
        put(&mut bytes, 12, &self.slot_count.to_le_bytes());
        put(&mut bytes, 16, &self.identity.store.0);
        put(&mut bytes, 32, &self.identity.segment.0.to_le_bytes());
        put(&mut bytes, 40, &self.identity.generation.to_le_bytes());
        put(&mut bytes, 48, &self.first_sequence.to_le_bytes());
        put(&mut bytes, 56, &self.last_sequence.to_le_bytes());
        put(&mut bytes, 64, &self.root);
        put(&mut bytes, 96, &self.directory_hash);
        let mut hasher = blake3::Hasher::new();
        hasher.update(&bytes[..HASH_AT]);
        hasher.update(&self.directory_offset.to_le_bytes());
        put(&mut bytes, HASH_AT, hasher.finalize().as_bytes());
        put(
            &mut bytes,
            HASH_AT + 32,
            &self.directory_offset.to_le_bytes(),
        );
        bytes
    }

    /// Says whether damaged bytes were a footer, by most of its magic.
    pub(crate) fn is_likely(bytes: &[u8]) -> bool {
        let equal = FOOTER_MAGIC.iter().zip(bytes).filter(|(a, b)| a == b);
        equal.count() > FOOTER_MAGIC.len() / 2
    }

    /// Reads a footer.
    ///
    /// # Errors
    /// [`Damage`].
    pub fn decode(bytes: &[u8]) -> Result<Self, Damage> {
        let short = || Damage::Short { structure: NAME };
        let bytes = bytes.get(..FOOTER_BYTES).ok_or_else(short)?;
        if bytes[..8] != FOOTER_MAGIC[..] {
            return Err(Damage::Magic { structure: NAME });
        }
        let directory_offset = get_u64(bytes, HASH_AT + 32).ok_or_else(short)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&bytes[..HASH_AT]);
        hasher.update(&directory_offset.to_le_bytes());
        let hash: [u8; 32] = array(bytes, HASH_AT).ok_or_else(short)?;
        if *hasher.finalize().as_bytes() != hash || !is_zero(bytes, HASH_AT + 40, FOOTER_BYTES) {
            return Err(Damage::Hash { structure: NAME });
        }
        let version = get_u16(bytes, 8).ok_or_else(short)?;
        if version > VERSION {
            return Err(Damage::Version {
                structure: NAME,
                found: version,
                supported: VERSION,
            });
        }
        let (first_sequence, last_sequence) = (
            get_u64(bytes, 48).ok_or_else(short)?,
            get_u64(bytes, 56).ok_or_else(short)?,
        );
        // Without a commit the last one is that before the first.
        if !is_sequence(first_sequence) || !is_sequence(last_sequence.saturating_add(1)) {
            return Err(Damage::Field {
                structure: NAME,
                field: "sequence",
            });
        }
        Ok(Self {
            identity: SegmentIdentity {
                store: StoreId(array(bytes, 16).ok_or_else(short)?),
                segment: SegmentId(get_u32(bytes, 32).ok_or_else(short)?),
                generation: get_u64(bytes, 40).ok_or_else(short)?,
            },
            first_sequence,
            last_sequence,
            directory_offset,
            slot_count: get_u32(bytes, 12).ok_or_else(short)?,
            root: array(bytes, 64).ok_or_else(short)?,
            directory_hash: array(bytes, 96).ok_or_else(short)?,
        })
    }
}

/// Finds again where the slots of a segment lie, when its directory is damaged: `bytes` are those
/// of the whole file. Slots of damaged commits are missing from it.
#[must_use]
pub fn rebuild_directory(bytes: &[u8], store: StoreId, segment: SegmentId) -> Directory {
    let mut directory = Directory::default();
    let mut scan = SegmentScan::new(bytes, store, segment);
    while let Some(item) = scan.step() {
        let Ok(commit) = item else { continue };
        let mut slot = commit.header.first_slot;
        for at in commit.frames {
            let Some(frame) = scan.frame(at) else {
                continue;
            };
            directory.note_frame(slot, at, &frame);
            slot = slot.saturating_add(frame.header.slot_count);
        }
    }
    directory
}
