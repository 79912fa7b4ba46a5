//! Sealing plain blocks into slots and opening slots into plain blocks.
//!
//! Invariants
//! * One [`Sealer`] is one writer session: its salt is random and its counter never repeats, so a
//!   nonce is never used twice under one session key, whatever image an agent is restored from.
//! * Opening checks, in this order: hash in context, cipher, decompressed size. The output bound is
//!   the slot's own plain length, never what a compressed frame claims.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;

use afterimage_blockdev::{BLOCK_BYTES, CELL_BLOCKS, CELL_BYTES, DiskId, Entropy, KeyId};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

use crate::bytes::{index, is_all_zero, narrow};
use crate::error::Damage;
use crate::key::{DiskKey, KeySource, TagKey};
use crate::lanes::{Lanes, Message};
use crate::slot::{
    CIPHER_TAG_BYTES, CONTEXT_BYTES, Codec, ContentTag, HASH_AT, SLOT_HEADER_BYTES, SlotContext,
    SlotHeader, SlotView, TAG_BYTES,
};

const SESSION_CONTEXT: &str = "afterimage 2026-11 slot session key v1";
const SESSIONS_MAX: usize = 256;

/// How hard to compress.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effort {
    /// Not at all.
    None,
    /// zstd at this level; negative levels are faster.
    Zstd(i32),
}

fn session_key(key: &DiskKey, salt: &[u8; 16]) -> LessSafeKey {
    let mut material = [0; 48];
    material[..32].copy_from_slice(&key.secret);
    material[32..].copy_from_slice(salt);
    let secret = blake3::derive_key(SESSION_CONTEXT, &material);
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &secret).expect("AES-256 takes 32 bytes"))
}

fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[..8].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

fn associated(context: &SlotContext, header: &SlotHeader) -> [u8; CONTEXT_BYTES + HASH_AT] {
    let mut bytes = [0; CONTEXT_BYTES + HASH_AT];
    bytes[..CONTEXT_BYTES].copy_from_slice(&context.encode());
    bytes[CONTEXT_BYTES..].copy_from_slice(&header.sealed_part());
    bytes
}

/// Computes the content tag of one block.
#[must_use]
pub fn content_tag(key: &TagKey, block: &[u8]) -> ContentTag {
    cut(blake3::keyed_hash(&key.0, block).as_bytes())
}

/// Computes content tags, many at once for less than one by one.
#[derive(Debug)]
pub struct Tagger {
    key: TagKey,
    lanes: Lanes,
}

impl Tagger {
    /// Makes a tagger.
    #[must_use]
    pub fn new(key: TagKey) -> Self {
        let lanes = Lanes::keyed(&key.0);
        Self { key, lanes }
    }

    /// The key.
    #[must_use]
    pub fn key(&self) -> &TagKey {
        &self.key
    }

    /// Appends the tag of each block of `plain`, a piece of whole blocks, to `tags`; and so for all
    /// pieces.
    pub fn tag<'a>(
        &mut self,
        plain: impl IntoIterator<Item = &'a [u8]>,
        tags: &mut Vec<ContentTag>,
    ) {
        let blocks = plain
            .into_iter()
            .flat_map(|piece| piece.chunks_exact(BLOCK_BYTES));
        let blocks: Vec<Message<'a>> = blocks
            .map(|block| Message {
                head: &[],
                rest: block,
            })
            .collect();
        if blocks.len() < TAGGED_ALONE_MAX {
            let alone = blocks
                .iter()
                .map(|block| content_tag(&self.key, block.rest));
            return tags.extend(alone);
        }
        tags.reserve(blocks.len());
        self.lanes.hash(&blocks, |_, hash| tags.push(cut(&hash)));
    }
}

/// Fewer blocks than this are tagged faster one by one.
const TAGGED_ALONE_MAX: usize = 5;

fn cut(hash: &[u8; 32]) -> ContentTag {
    let mut tag = [0; TAG_BYTES];
    tag.copy_from_slice(&hash[..TAG_BYTES]);
    tag
}

/// Seals blocks of one disk, as one writer session.
pub struct Sealer {
    tagger: Tagger,
    key: Option<(KeyId, LessSafeKey)>,
    salt: [u8; 16],
    counter: u64,
    compressor: Option<zstd::bulk::Compressor<'static>>,
    effort: Effort,
    scratch: Vec<u8>,
}

impl core::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Sealer({:?}, {} sealed)", self.effort, self.counter)
    }
}

impl Sealer {
    /// Begins a writer session. Without a key the slots are not encrypted, which only tests do.
    #[must_use]
    pub fn new(key: Option<&DiskKey>, tag_key: TagKey, entropy: &dyn Entropy) -> Self {
        let mut salt = [0; 16];
        entropy.fill(&mut salt);
        let key = key.map(|key| (key.id, session_key(key, &salt)));
        let scratch = vec![0; CELL_BYTES];
        let mut sealer = Self {
            tagger: Tagger::new(tag_key),
            key,
            salt,
            counter: 0,
            compressor: None,
            effort: Effort::None,
            scratch,
        };
        sealer.set_effort(Effort::Zstd(1));
        sealer
    }

    /// Sets how hard to compress from now on.
    pub fn set_effort(&mut self, effort: Effort) {
        if effort == self.effort {
            return;
        }
        self.effort = effort;
        self.compressor = match effort {
            Effort::None => None,
            Effort::Zstd(level) => zstd::bulk::Compressor::new(level).ok(),
        };
    }

    /// Compresses into the scratch; `None` when it does not pay.
    fn compress(&mut self, plain: &[u8]) -> Option<usize> {
        let limit = plain.len() / 10 * 9;
        let compressor = self.compressor.as_mut()?;
        let scratch = &mut self.scratch[..limit];
        compressor.compress_to_buffer(plain, scratch).ok()
    }

    /// Seals the blocks that `context.mask` names; `plain` holds them in order. Appends the whole
    /// slot, padded, to `out`.
    ///
    /// # Panics
    /// When `plain` is not as long as the mask says.
    pub fn seal(&mut self, context: &SlotContext, plain: &[u8], out: &mut Vec<u8>) {
        let tags = self.tags(plain);
        let start = out.len();
        let header = self.seal_unhashed(context, plain, &tags, out);
        let stored_at = start + header.header_len();
        let stored_end = stored_at + index(header.stored_len);
        let hash = header.compute_hash(context, &out[stored_at..stored_end]);
        out[start + HASH_AT..start + SLOT_HEADER_BYTES].copy_from_slice(&hash);
    }

    /// The content tag of each block of `plain`.
    pub(crate) fn tags(&mut self, plain: &[u8]) -> Vec<ContentTag> {
        let mut tags = Vec::new();
        self.tagger.tag([plain], &mut tags);
        tags
    }

    /// Does all of [`Sealer::seal`] but the hash, whose place stays zero.
    pub(crate) fn seal_unhashed(
        &mut self,
        context: &SlotContext,
        plain: &[u8],
        block_tags: &[ContentTag],
        out: &mut Vec<u8>,
    ) -> SlotHeader {
        let blocks = context.mask.count_ones() as usize;
        assert!(
            blocks > 0 && plain.len() == blocks * BLOCK_BYTES && block_tags.len() == blocks,
            "plain length and tags fit the mask"
        );
        let mut tags = [[0; TAG_BYTES]; CELL_BLOCKS];
        tags[..blocks].copy_from_slice(block_tags);
        let (codec, stored_plain_len) = if is_all_zero(plain) {
            (Codec::Zero, 0)
        } else if let Some(len) = self.compress(plain) {
            (Codec::Zstd, len)
        } else {
            (Codec::Raw, plain.len())
        };
        let key_id = match (&self.key, codec) {
            (_, Codec::Zero) | (None, _) => KeyId(0),
            (Some((id, _)), _) => *id,
        };
        let cipher = if key_id.0 == 0 { 0 } else { CIPHER_TAG_BYTES };
        let header = SlotHeader {
            codec,
            blocks: blocks.to_le_bytes()[0],
            mask: context.mask,
            stored_len: narrow(stored_plain_len + cipher),
            key: key_id,
            salt: self.salt,
            counter: self.counter,
            hash: [0; 32],
            tags,
        };
        self.counter += 1;
        let start = out.len();
        header.encode_into(out);
        let stored_at = out.len();
        match codec {
            Codec::Zero => {}
            Codec::Zstd => out.extend_from_slice(&self.scratch[..stored_plain_len]),
            Codec::Raw => out.extend_from_slice(plain),
        }
        if cipher > 0 {
            let (_, key) = self.key.as_ref().expect("key id was taken from it");
            let aad = Aad::from(associated(context, &header));
            let tag = key
                .seal_in_place_separate_tag(nonce(header.counter), aad, &mut out[stored_at..])
                .expect("a slot is far below the cipher's limit");
            out.extend_from_slice(tag.as_ref());
        }
        out.resize(start + header.slot_len(), 0);
        header
    }
}

/// Opens slots. Keeps the derived session keys of recent writers.
pub struct Opener {
    keys: Arc<dyn KeySource>,
    sessions: HashMap<(DiskId, KeyId, [u8; 16]), LessSafeKey>,
    decompressor: zstd::bulk::Decompressor<'static>,
    scratch: Vec<u8>,
}

impl core::fmt::Debug for Opener {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Opener({} sessions)", self.sessions.len())
    }
}

impl Opener {
    /// Makes an opener over the keys that this side holds.
    ///
    /// # Panics
    /// When zstd cannot allocate its context.
    #[must_use]
    pub fn new(keys: Arc<dyn KeySource>) -> Self {
        let decompressor = zstd::bulk::Decompressor::new().expect("zstd context allocates");
        Self {
            keys,
            sessions: HashMap::new(),
            decompressor,
            scratch: Vec::new(),
        }
    }

    /// Verifies, decrypts and decompresses a slot into `plain`, which is as long as the slot's
    /// plain bytes.
    ///
    /// # Errors
    /// [`Damage`]; `plain` then holds nothing meaningful.
    pub fn open(
        &mut self,
        context: &SlotContext,
        slot: &SlotView<'_>,
        plain: &mut [u8],
    ) -> Result<(), Damage> {
        let header = &slot.header;
        let mut scratch = core::mem::take(&mut self.scratch);
        scratch.clear();
        let head = header.hashed_head(context);
        scratch.extend_from_slice(&head);
        scratch.extend_from_slice(slot.stored);
        let result = self.open_copied(context, slot, &mut scratch, head.len(), plain);
        self.scratch = scratch;
        result
    }

    /// `copy` is what the hash covers; the stored bytes begin at `stored_at` of it.
    fn open_copied(
        &mut self,
        context: &SlotContext,
        slot: &SlotView<'_>,
        copy: &mut [u8],
        stored_at: usize,
        plain: &mut [u8],
    ) -> Result<(), Damage> {
        let header = &slot.header;
        if context.mask != header.mask || *blake3::hash(copy).as_bytes() != header.hash {
            return Err(Damage::Hash { structure: "slot" });
        }
        if plain.len() != header.plain_len() {
            return Err(Damage::Field {
                structure: "slot",
                field: "plain length",
            });
        }
        if header.codec == Codec::Zero {
            plain.fill(0);
            return Ok(());
        }
        let stored: &[u8] = if header.key.0 == 0 {
            slot.stored
        } else {
            let key = self.session(context.disk, header.key, &header.salt)?;
            let aad = Aad::from(associated(context, header));
            key.open_in_place(nonce(header.counter), aad, &mut copy[stored_at..])
                .map_err(|_| Damage::Cipher)?
        };
        match header.codec {
            Codec::Raw => {
                plain.copy_from_slice(stored);
                Ok(())
            }
            Codec::Zstd => match self.decompressor.decompress_to_buffer(stored, plain) {
                Ok(len) if len == plain.len() => Ok(()),
                _ => Err(Damage::Decompress {
                    expected: plain.len(),
                }),
            },
            Codec::Zero => Ok(()),
        }
    }

    fn session(
        &mut self,
        disk: DiskId,
        id: KeyId,
        salt: &[u8; 16],
    ) -> Result<&LessSafeKey, Damage> {
        let name = (disk, id, *salt);
        if !self.sessions.contains_key(&name) {
            let missing = Damage::KeyMissing { disk, key: id.0 };
            let key = self.keys.disk_key(disk, id).ok_or(missing)?;
            if self.sessions.len() >= SESSIONS_MAX {
                self.sessions.clear();
            }
            self.sessions.insert(name, session_key(&key, salt));
        }
        self.sessions.get(&name).ok_or(Damage::Cipher)
    }
}
