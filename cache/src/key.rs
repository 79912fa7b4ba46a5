//! Keys of disks and tenants.

use core::fmt;

use afterimage_blockdev::{DiskId, Entropy, KeyId};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

/// Encrypts the slots of one disk. Shown as `***` wherever it is printed.
#[derive(Clone, PartialEq, Eq)]
pub struct DiskKey {
    /// Generation of the key, scoped to the disk; not 0.
    pub id: KeyId,
    /// The secret.
    pub secret: [u8; 32],
}

impl fmt::Debug for DiskKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DiskKey({}, ***)", self.id)
    }
}

/// Keys the content tags of one tenant (or of one machine, when its keys are end-to-end).
#[derive(Clone, PartialEq, Eq)]
pub struct TagKey(pub [u8; 32]);

impl fmt::Debug for TagKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TagKey(***)")
    }
}

/// Finds the secret of a disk's key.
pub trait KeySource: Send + Sync {
    /// The key, or `None` when this side does not hold it.
    fn disk_key(&self, disk: DiskId, key: KeyId) -> Option<DiskKey>;
}

/// Bytes of a wrapped secret: nonce, secret, authentication tag.
pub const WRAPPED_BYTES: usize = 12 + 32 + 16;

fn wrapping_key(store_key: &[u8; 32]) -> LessSafeKey {
    let secret = blake3::derive_key("afterimage 2026-11 store key wraps disk key v1", store_key);
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &secret).expect("AES-256 takes 32 bytes"))
}

fn wrapping_context(disk: DiskId, id: KeyId) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[..16].copy_from_slice(&disk.0);
    bytes[16..].copy_from_slice(&id.0.to_le_bytes());
    bytes
}

/// Wraps a disk's key with the key of the store, under a random nonce.
///
/// # Panics
/// Never: the length is fixed and far below the cipher's limit.
#[must_use]
pub fn wrap(
    store_key: &[u8; 32],
    disk: DiskId,
    key: &DiskKey,
    entropy: &dyn Entropy,
) -> [u8; WRAPPED_BYTES] {
    let mut wrapped = [0; WRAPPED_BYTES];
    let mut nonce = [0; 12];
    entropy.fill(&mut nonce);
    wrapped[..12].copy_from_slice(&nonce);
    wrapped[12..44].copy_from_slice(&key.secret);
    let aad = Aad::from(wrapping_context(disk, key.id));
    let tag = wrapping_key(store_key)
        .seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            aad,
            &mut wrapped[12..44],
        )
        .expect("32 bytes are below the cipher's limit");
    wrapped[44..].copy_from_slice(tag.as_ref());
    wrapped
}

/// Unwraps a disk's key; `None` when the store's key is another one or the bytes were changed.
#[must_use]
pub fn unwrap(
    store_key: &[u8; 32],
    disk: DiskId,
    id: KeyId,
    wrapped: &[u8; WRAPPED_BYTES],
) -> Option<DiskKey> {
    let mut sealed = [0; 48];
    sealed.copy_from_slice(&wrapped[12..]);
    let nonce = Nonce::try_assume_unique_for_key(&wrapped[..12]).ok()?;
    let aad = Aad::from(wrapping_context(disk, id));
    let plain = wrapping_key(store_key)
        .open_in_place(nonce, aad, &mut sealed)
        .ok()?;
    Some(DiskKey {
        id,
        secret: plain.try_into().ok()?,
    })
}
