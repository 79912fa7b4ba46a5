//! From a passphrase or a key file to the keys of one archive.

use std::fmt;
use std::num::NonZeroU32;

use aws_lc_rs::aead::{AES_256_GCM, LessSafeKey, UnboundKey};
use aws_lc_rs::pbkdf2;

use crate::error::BulkError;

/// Rounds of PBKDF2 for a new archive with a passphrase.
const ROUNDS: u32 = 600_000;
/// Most rounds that are believed of an archive.
pub(super) const ROUNDS_MAX: u32 = 10_000_000;
const PASSPHRASE_BYTES_MIN: usize = 8;
const KEY_BYTES_MIN: usize = 16;

const CHAIN_CONTEXT: &str = "afterimage 2026-11 seed archive chain key v1";
const SLOT_CONTEXT: &str = "afterimage 2026-11 seed archive slot key v1";
const KEY_CONTEXT: &str = "afterimage 2026-11 seed archive key file v1";

/// What an archive is encrypted with. Shown as `***` wherever it is printed.
#[derive(Clone, PartialEq, Eq)]
pub enum Secret {
    /// Something that a person remembers; stretched.
    Passphrase(Vec<u8>),
    /// Bytes that nobody can guess.
    Key(Vec<u8>),
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(***)")
    }
}

/// How the chain's header says what the keys come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Protection {
    Plain,
    Key,
    Passphrase { rounds: u32 },
}

impl Protection {
    pub(super) fn of(secret: Option<&Secret>) -> Self {
        match secret {
            None => Self::Plain,
            Some(Secret::Key(_)) => Self::Key,
            Some(Secret::Passphrase(_)) => Self::Passphrase { rounds: ROUNDS },
        }
    }

    pub(super) fn fields(self) -> (u16, u32) {
        match self {
            Self::Plain => (0, 0),
            Self::Key => (1, 0),
            Self::Passphrase { rounds } => (2, rounds),
        }
    }

    pub(super) fn from_fields(code: u16, rounds: u32) -> Option<Self> {
        match (code, rounds) {
            (0, 0) => Some(Self::Plain),
            (1, 0) => Some(Self::Key),
            (2, 1..=ROUNDS_MAX) => Some(Self::Passphrase { rounds }),
            _ => None,
        }
    }
}

/// The keys of one archive.
#[derive(Clone)]
pub(super) struct Keys {
    /// Keys the hashes.
    pub(super) chain: [u8; 32],
    /// From which the keys of slots are derived; `None` when nothing is encrypted.
    root: Option<[u8; 32]>,
    id: [u8; 16],
}

impl Secret {
    /// Refuses what anybody could guess.
    ///
    /// # Errors
    /// `WeakSecret`.
    pub fn check(&self) -> Result<(), BulkError> {
        let (bytes, needed_bytes) = match self {
            Self::Passphrase(bytes) => (bytes, PASSPHRASE_BYTES_MIN),
            Self::Key(bytes) => (bytes, KEY_BYTES_MIN),
        };
        if bytes.len() < needed_bytes {
            return Err(BulkError::WeakSecret {
                found_bytes: bytes.len(),
                needed_bytes,
            });
        }
        Ok(())
    }

    fn stretch(&self, protection: Protection, id: &[u8; 16], salt: &[u8; 32]) -> Option<[u8; 32]> {
        match (self, protection) {
            (Self::Key(bytes), Protection::Key) => {
                let material = [id.as_slice(), salt, bytes].concat();
                Some(blake3::derive_key(KEY_CONTEXT, &material))
            }
            (Self::Passphrase(bytes), Protection::Passphrase { rounds }) => {
                let mut root = [0; 32];
                let rounds = NonZeroU32::new(rounds)?;
                let salt = [id.as_slice(), salt].concat();
                pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, rounds, &salt, bytes, &mut root);
                Some(root)
            }
            _ => None,
        }
    }
}

impl Keys {
    /// `None` when the secret is of another kind than the archive's.
    pub(super) fn new(
        secret: Option<&Secret>,
        protection: Protection,
        id: &[u8; 16],
        salt: &[u8; 32],
    ) -> Option<Self> {
        let root = match (secret, protection) {
            (None, Protection::Plain) => None,
            (Some(secret), _) => Some(secret.stretch(protection, id, salt)?),
            (None, _) => return None,
        };
        // Without a secret the hashes find damage, not malice.
        let material = [id.as_slice(), root.as_ref().map_or(&[], |root| &root[..])].concat();
        Some(Self {
            chain: blake3::derive_key(CHAIN_CONTEXT, &material),
            root,
            id: *id,
        })
    }

    /// The cipher of one writer session, whose salt never came before.
    pub(super) fn session(&self, salt: &[u8; 16]) -> Option<LessSafeKey> {
        let root = self.root.as_ref()?;
        let material = [self.id.as_slice(), salt, root].concat();
        let key = blake3::derive_key(SLOT_CONTEXT, &material);
        // AES-256 takes 32 bytes, so this does not fail.
        UnboundKey::new(&AES_256_GCM, &key)
            .ok()
            .map(LessSafeKey::new)
    }

    pub(super) fn is_encrypted(&self) -> bool {
        self.root.is_some()
    }

    /// The hash of some parts, keyed.
    pub(super) fn hash(&self, parts: &[&[u8]]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(&self.chain);
        for part in parts {
            hasher.update(part);
        }
        *hasher.finalize().as_bytes()
    }
}
