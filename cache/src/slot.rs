//! Slots: units of at most 16 KiB that are compressed, encrypted and hashed once, by whoever
//! sealed them, and then moved as they are.
//!
//! Invariants
//! * A slot never crosses a 16 KiB cell.
//! * The hash covers the context (disk, history, cell, mask, LSN of each block), the header before
//!   the hash, the tags and the stored bytes: a slot at a wrong place never verifies.
//! * `stored` is 0 bytes for codec zero, and at most the plain bytes plus the cipher's tag.

use afterimage_blockdev::{BLOCK_BYTES, CELL_BLOCKS, CellIndex, DiskId, HistoryId, KeyId, Lsn};

use crate::bytes::{array, get_u8, get_u32, get_u64, index, is_zero, narrow, put};
use crate::error::Damage;

/// Bytes of the header before the tags.
pub const SLOT_HEADER_BYTES: usize = 72;
/// Bytes of a content tag.
pub const TAG_BYTES: usize = 16;
/// Bytes that the cipher adds.
pub const CIPHER_TAG_BYTES: usize = 16;
/// Most bytes that a whole slot takes, padding included.
pub const SLOT_BYTES_MAX: usize =
    SLOT_HEADER_BYTES + CELL_BLOCKS * TAG_BYTES + CELL_BLOCKS * BLOCK_BYTES + CIPHER_TAG_BYTES;

const NAME: &str = "slot";
/// Where the hash stands in the header; the cipher authenticates all before it.
pub(crate) const HASH_AT: usize = 40;
/// Bytes of an encoded [`SlotContext`].
pub(crate) const CONTEXT_BYTES: usize = 80;
/// Bytes that are hashed before the stored ones, at most.
const HASHED_HEAD_BYTES_MAX: usize = CONTEXT_BYTES + HASH_AT + CELL_BLOCKS * TAG_BYTES;

const _: () = assert!(HASH_AT + 32 == SLOT_HEADER_BYTES);
const _: () = assert!(SLOT_HEADER_BYTES.is_multiple_of(8) && TAG_BYTES.is_multiple_of(8));
const _: () = assert!(CONTEXT_BYTES == 48 + CELL_BLOCKS * 8);
const _: () = assert!(SLOT_BYTES_MAX.is_multiple_of(8));

/// Keyed BLAKE3 of a block's plain bytes, cut to 16 bytes.
pub type ContentTag = [u8; TAG_BYTES];

/// How the stored bytes become plain bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Codec {
    /// Stored as they are.
    Raw,
    /// One zstd frame.
    Zstd,
    /// All zero; nothing is stored.
    Zero,
}

impl Codec {
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Zstd => 1,
            Self::Zero => 2,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Raw),
            1 => Some(Self::Zstd),
            2 => Some(Self::Zero),
            _ => None,
        }
    }
}

/// Where a slot's blocks belong: it is not stored with the slot, but hashed and authenticated
/// with it, so that a slot cannot pass for another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotContext {
    /// The disk.
    pub disk: DiskId,
    /// The history whose LSNs these are.
    pub history: HistoryId,
    /// The cell.
    pub cell: CellIndex,
    /// Which blocks of the cell the slot holds, lowest bit first.
    pub mask: u8,
    /// The LSN of each block held, in order; unused places are zero.
    pub lsns: [Lsn; CELL_BLOCKS],
}

impl SlotContext {
    /// Makes the context of a slot whose blocks were all written at one LSN.
    #[must_use]
    pub fn uniform(disk: DiskId, history: HistoryId, cell: CellIndex, mask: u8, lsn: Lsn) -> Self {
        let mut lsns = [Lsn::ZERO; CELL_BLOCKS];
        for place in lsns.iter_mut().take(index(mask.count_ones())) {
            *place = lsn;
        }
        Self {
            disk,
            history,
            cell,
            mask,
            lsns,
        }
    }

    /// The 80 bytes that are hashed and authenticated.
    #[must_use]
    pub fn encode(&self) -> [u8; CONTEXT_BYTES] {
        let mut bytes = [0; CONTEXT_BYTES];
        put(&mut bytes, 0, &self.disk.0);
        put(&mut bytes, 16, &self.history.0);
        put(&mut bytes, 32, &self.cell.0.to_le_bytes());
        bytes[40] = self.mask;
        for (place, lsn) in self.lsns.iter().enumerate() {
            put(&mut bytes, 48 + place * 8, &lsn.0.to_le_bytes());
        }
        bytes
    }
}

/// The fixed part of a slot and its tags.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlotHeader {
    /// How the stored bytes become plain bytes.
    pub codec: Codec,
    /// Blocks held, 1 to 4.
    pub blocks: u8,
    /// Which blocks of the cell, lowest bit first; `blocks` of them.
    pub mask: u8,
    /// Bytes stored, without padding.
    pub stored_len: u32,
    /// Key generation of the disk; 0 when not encrypted.
    pub key: KeyId,
    /// Random salt of the writer session, from which the session key is derived.
    pub salt: [u8; 16],
    /// Nonce within the writer session; never used twice with one salt.
    pub counter: u64,
    /// BLAKE3 over context, header, tags and stored bytes.
    pub hash: [u8; 32],
    /// One content tag for each block held.
    pub tags: [ContentTag; CELL_BLOCKS],
}

impl SlotHeader {
    /// Plain bytes.
    #[must_use]
    pub fn plain_len(&self) -> usize {
        usize::from(self.blocks) * BLOCK_BYTES
    }

    /// Bytes of header and tags.
    #[must_use]
    pub fn header_len(&self) -> usize {
        SLOT_HEADER_BYTES + usize::from(self.blocks) * TAG_BYTES
    }

    /// Bytes of the whole slot, padded to a multiple of 8.
    #[must_use]
    pub fn slot_len(&self) -> usize {
        (self.header_len() + index(self.stored_len)).next_multiple_of(8)
    }

    /// The header bytes that the cipher authenticates and the hash begins with.
    #[must_use]
    pub fn sealed_part(&self) -> [u8; HASH_AT] {
        let mut bytes = [0; HASH_AT];
        bytes[0] = self.codec.code();
        bytes[1] = self.blocks;
        bytes[2] = self.mask;
        put(&mut bytes, 4, &self.stored_len.to_le_bytes());
        put(&mut bytes, 8, &self.key.0.to_le_bytes());
        put(&mut bytes, 12, &narrow(self.plain_len()).to_le_bytes());
        put(&mut bytes, 16, &self.salt);
        put(&mut bytes, 32, &self.counter.to_le_bytes());
        bytes
    }

    /// Appends header and tags.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.sealed_part());
        out.extend_from_slice(&self.hash);
        for tag in self.tags.iter().take(usize::from(self.blocks)) {
            out.extend_from_slice(tag);
        }
    }

    /// Reads a header and checks every field against the others.
    ///
    /// # Errors
    /// [`Damage`], naming the field.
    pub fn decode(bytes: &[u8]) -> Result<Self, Damage> {
        let short = Damage::Short { structure: NAME };
        let field = |field| Damage::Field {
            structure: NAME,
            field,
        };
        if bytes.len() < SLOT_HEADER_BYTES {
            return Err(short);
        }
        let codec = get_u8(bytes, 0)
            .and_then(Codec::from_code)
            .ok_or(field("codec"))?;
        let blocks = get_u8(bytes, 1).ok_or(short.clone())?;
        let mask = get_u8(bytes, 2).ok_or(short.clone())?;
        let stored_len = get_u32(bytes, 4).ok_or(short.clone())?;
        let key = KeyId(get_u32(bytes, 8).ok_or(short.clone())?);
        let plain_len = get_u32(bytes, 12).ok_or(short.clone())?;
        if !(1..=4).contains(&blocks) || mask.count_ones() != u32::from(blocks) || mask >= 16 {
            return Err(field("block mask"));
        }
        if index(plain_len) != usize::from(blocks) * BLOCK_BYTES {
            return Err(field("plain length"));
        }
        if get_u8(bytes, 3) != Some(0) {
            return Err(field("reserved byte"));
        }
        let cipher = if key.0 == 0 { 0 } else { CIPHER_TAG_BYTES };
        let stored = index(stored_len);
        let is_legal_length = match codec {
            Codec::Zero => stored == 0,
            Codec::Raw => stored == index(plain_len) + cipher,
            Codec::Zstd => stored > cipher && stored < index(plain_len) + cipher,
        };
        if !is_legal_length {
            return Err(field("stored length"));
        }
        let mut tags = [[0; TAG_BYTES]; CELL_BLOCKS];
        for (place, tag) in tags.iter_mut().enumerate().take(usize::from(blocks)) {
            *tag = array(bytes, SLOT_HEADER_BYTES + place * TAG_BYTES).ok_or(short.clone())?;
        }
        Ok(Self {
            codec,
            blocks,
            mask,
            stored_len,
            key,
            salt: array(bytes, 16).ok_or(short.clone())?,
            counter: get_u64(bytes, 32).ok_or(short.clone())?,
            hash: array(bytes, HASH_AT).ok_or(short)?,
            tags,
        })
    }

    /// Computes the hash of this slot in its context.
    #[must_use]
    pub fn compute_hash(&self, context: &SlotContext, stored: &[u8]) -> [u8; 32] {
        let head = self.hashed_head(context);
        let mut whole = Vec::with_capacity(head.len() + stored.len());
        whole.extend_from_slice(&head);
        whole.extend_from_slice(stored);
        // In one piece it keeps the whole vector unit busy, which in two it does not.
        *blake3::hash(&whole).as_bytes()
    }

    /// What the hash covers before the stored bytes: context, header and tags.
    #[must_use]
    pub(crate) fn hashed_head(&self, context: &SlotContext) -> HashedHead {
        let mut bytes = [0; HASHED_HEAD_BYTES_MAX];
        put(&mut bytes, 0, &context.encode());
        put(&mut bytes, CONTEXT_BYTES, &self.sealed_part());
        let tags = usize::from(self.blocks) * TAG_BYTES;
        let end = CONTEXT_BYTES + HASH_AT + tags;
        put(
            &mut bytes,
            CONTEXT_BYTES + HASH_AT,
            &self.tags.as_flattened()[..tags],
        );
        HashedHead { bytes, end }
    }
}

/// See [`SlotHeader::hashed_head`].
#[derive(Clone, Debug)]
pub(crate) struct HashedHead {
    bytes: [u8; HASHED_HEAD_BYTES_MAX],
    end: usize,
}

impl core::ops::Deref for HashedHead {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.end]
    }
}

/// A slot in somebody's buffer: structure checked, content not yet.
#[derive(Clone, Debug)]
pub struct SlotView<'a> {
    /// The header.
    pub header: SlotHeader,
    /// The stored bytes.
    pub stored: &'a [u8],
    /// All bytes of the slot, header and padding included.
    pub bytes: &'a [u8],
}

impl<'a> SlotView<'a> {
    /// Finds the slot that `bytes` begin with.
    ///
    /// # Errors
    /// [`Damage`] when the structure is wrong or cut short.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Damage> {
        let header = SlotHeader::decode(bytes)?;
        let short = Damage::Short { structure: NAME };
        let whole = bytes.get(..header.slot_len()).ok_or(short.clone())?;
        let end = header.header_len() + index(header.stored_len);
        let stored = whole.get(header.header_len()..end).ok_or(short)?;
        Ok(Self {
            header,
            stored,
            bytes: whole,
        })
    }

    /// Checks that the padding is zero. A reader of the content need not care.
    ///
    /// # Errors
    /// [`Damage::Field`].
    pub fn verify_padding(&self) -> Result<(), Damage> {
        let end = self.header.header_len() + self.stored.len();
        if is_zero(self.bytes, end, self.bytes.len()) {
            Ok(())
        } else {
            Err(Damage::Field {
                structure: NAME,
                field: "padding",
            })
        }
    }

    /// Checks the content against the hash, in the context where the slot should be.
    ///
    /// # Errors
    /// [`Damage::Hash`].
    pub fn verify(&self, context: &SlotContext) -> Result<(), Damage> {
        let is_right = context.mask == self.header.mask
            && self.header.compute_hash(context, self.stored) == self.header.hash;
        if is_right {
            Ok(())
        } else {
            Err(Damage::Hash { structure: NAME })
        }
    }
}
