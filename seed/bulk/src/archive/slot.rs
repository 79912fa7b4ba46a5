//! Slots of an archive: compressed, encrypted and hashed units of the disk.

use aws_lc_rs::aead::{Aad, LessSafeKey, NONCE_LEN, Nonce};

use super::secret::Keys;
use super::{get, get_u32, get_u64, put};
use crate::raw::is_zero;

/// Plain bytes of a slot, but for the last one of a disk. Slots begin at its multiples.
pub(super) const SLOT_BYTES: usize = 64 << 10;
/// Bytes that the cipher adds.
const CIPHER_TAG_BYTES: usize = 16;
/// Bytes of an entry in a segment's directory.
pub(super) const ENTRY_BYTES: usize = 64;

const RAW: u8 = 0;
const ZSTD: u8 = 1;

/// Where a slot's bytes are, and what they are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    /// First byte of the disk.
    pub(super) offset: u64,
    pub(super) plain_len: u32,
    pub(super) stored_len: u32,
    /// First byte in the segment.
    pub(super) position: u64,
    pub(super) codec: u8,
    pub(super) hash: [u8; 32],
}

/// A slot that has no place in a segment yet.
pub(super) struct Sealed {
    pub(super) entry: Entry,
    pub(super) stored: Vec<u8>,
}

/// What is wrong with a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct SlotDamage(pub(super) &'static str);

impl Entry {
    pub(super) fn end(&self) -> u64 {
        self.offset + u64::from(self.plain_len)
    }

    pub(super) fn encode(&self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        put(&mut bytes, 0, &self.offset.to_le_bytes());
        put(&mut bytes, 8, &self.plain_len.to_le_bytes());
        put(&mut bytes, 12, &self.stored_len.to_le_bytes());
        put(&mut bytes, 16, &self.position.to_le_bytes());
        bytes[24] = self.codec;
        put(&mut bytes, 32, &self.hash);
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let entry = Self {
            offset: get_u64(bytes, 0)?,
            plain_len: get_u32(bytes, 8)?,
            stored_len: get_u32(bytes, 12)?,
            position: get_u64(bytes, 16)?,
            codec: *bytes.get(24)?,
            hash: get(bytes, 32)?,
        };
        let most = SLOT_BYTES as u64;
        let is_legal = (1..=most).contains(&u64::from(entry.plain_len))
            && entry.offset.is_multiple_of(most)
            && entry.offset.checked_add(most).is_some()
            && entry.stored_len as usize <= SLOT_BYTES + CIPHER_TAG_BYTES
            && entry.codec <= ZSTD
            && bytes.get(25..32).is_some_and(is_zero);
        is_legal.then_some(entry)
    }

    /// What the hash and the cipher bind the stored bytes to.
    fn context(&self, id: &[u8; 16]) -> [u8; 40] {
        let mut bytes = [0; 40];
        put(&mut bytes, 0, id);
        put(&mut bytes, 16, &self.offset.to_le_bytes());
        put(&mut bytes, 24, &self.plain_len.to_le_bytes());
        bytes[28] = self.codec;
        bytes
    }
}

/// A nonce: a writer session seals every place of the disk at most once.
fn nonce(offset: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[..8].copy_from_slice(&offset.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// Seals the bytes at an offset; `None` when they are all zero.
pub(super) fn seal(
    keys: &Keys,
    cipher: Option<&LessSafeKey>,
    id: &[u8; 16],
    offset: u64,
    plain: &[u8],
    level: i32,
) -> Option<Sealed> {
    if plain.is_empty() || is_zero(plain) {
        return None;
    }
    let plain_len = u32::try_from(plain.len()).ok()?;
    let smaller = zstd::bulk::compress(plain, level)
        .ok()
        .filter(|packed| packed.len() < plain.len() / 10 * 9);
    let (codec, mut stored) = match smaller {
        Some(packed) => (ZSTD, packed),
        None => (RAW, plain.to_vec()),
    };
    let mut entry = Entry {
        offset,
        plain_len,
        stored_len: 0,
        position: 0,
        codec,
        hash: [0; 32],
    };
    if let Some(cipher) = cipher {
        let aad = Aad::from(entry.context(id));
        let sealed = cipher.seal_in_place_append_tag(nonce(offset), aad, &mut stored);
        // A slot is far below the cipher's limit.
        sealed.ok()?;
    }
    entry.stored_len = u32::try_from(stored.len()).ok()?;
    entry.hash = keys.hash(&[&entry.context(id), &stored]);
    Some(Sealed { entry, stored })
}

/// Verifies and opens a slot.
pub(super) fn open(
    keys: &Keys,
    cipher: Option<&LessSafeKey>,
    id: &[u8; 16],
    entry: &Entry,
    mut stored: Vec<u8>,
) -> Result<Vec<u8>, SlotDamage> {
    verify(keys, id, entry, &stored)?;
    let plain_len = entry.plain_len as usize;
    if let Some(cipher) = cipher {
        let aad = Aad::from(entry.context(id));
        let opened = cipher.open_in_place(nonce(entry.offset), aad, &mut stored);
        let len = opened.map_err(|_| SlotDamage("a slot's cipher"))?.len();
        stored.truncate(len);
    }
    let plain = match entry.codec {
        ZSTD => zstd::bulk::decompress(&stored, plain_len)
            .map_err(|_| SlotDamage("a slot's compressed bytes"))?,
        _ => stored,
    };
    if plain.len() == plain_len {
        Ok(plain)
    } else {
        Err(SlotDamage("a slot's length"))
    }
}

/// Checks the hash of a slot alone.
pub(super) fn verify(
    keys: &Keys,
    id: &[u8; 16],
    entry: &Entry,
    stored: &[u8],
) -> Result<(), SlotDamage> {
    if keys.hash(&[&entry.context(id), stored]) == entry.hash {
        Ok(())
    } else {
        Err(SlotDamage("a slot's hash"))
    }
}
