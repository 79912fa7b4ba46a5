//! The manifest log: which files count, and what the store knows of machines, histories and
//! points. One chain of commits, each naming the hash of the one before.
//!
//! ```text
//! file   = | commit | the same commit | next commit | the same | ... |
//! commit = | header 128 | edits | zeroes to 4096 |
//! ```
//!
//! Invariants
//! * Every commit is there twice, in one write. One good copy suffices, so a damaged byte costs
//!   nothing, and the other copy is mended at the next start.
//! * One commit is written at a time, and is synced before the next begins; so only the last one
//!   can be torn. A commit bad in both copies with a whole one behind it is corruption, and the
//!   store says so.
//! * A file begins with a snapshot: commits that make up the whole state, the last of them marked.
//!   A file without that mark does not count; the one before it does, and is removed only after the
//!   new file and its name are durable.
//! * The chain goes on from file to file.
//! * An idle commit follows the last real one within a second, so that damage of the real one is
//!   not taken for a torn end.
//! * No commit is written that a reader would refuse; what is longer is cut into parts.

mod edit;
mod field;
mod found;
mod log;
mod noted;
mod snapshot;
mod space;

pub use edit::{BatchRecord, Edit, HistoryState, PointKind, PointRecord};
pub(crate) use found::{Found, Walked};
pub use log::{Manifest, ManifestOutput};
pub use noted::Noted;
pub use snapshot::encode_state;
pub use space::QuotaOf;

use afterimage_blockdev::{FileName, IoBuffer};
use afterimage_cache::Damage;
use afterimage_cache::bytes::{
    array, get_u16, get_u32, get_u64, index, is_zero, narrow, put, wide,
};

/// Alignment of commits.
pub const SECTOR: usize = 4096;
/// Version that this program writes.
pub const MANIFEST_VERSION: u16 = 1;

const MAGIC: &[u8; 8] = b"AIMANIFE";
const HEADER_BYTES: usize = 128;
const HASH_AT: usize = 96;
const FLAG_SNAPSHOT: u16 = 1;
const FLAG_SNAPSHOT_END: u16 = 2;
const NAME: &str = "manifest commit";
/// Longest commit, in bytes of its edits.
const COMMIT_BYTES_MAX: usize = 64 << 20;
/// Longest file; one that is longer is neither written nor read.
pub(crate) const FILE_BYTES_MAX: u64 = 4 << 30;

/// Name of a manifest file.
#[must_use]
pub fn manifest_file(number: u32) -> FileName {
    FileName::new(format!("manifest/{number:010}.manifest"))
}

fn parse_manifest_file(name: &FileName) -> Option<u32> {
    let number = name.base().strip_suffix(".manifest")?.parse().ok()?;
    // Two names never mean one file.
    (manifest_file(number).base() == name.base()).then_some(number)
}

/// A commit of the manifest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ManifestCommit {
    /// Place in the chain; rises by one.
    pub sequence: u64,
    /// Hash of the commit before.
    pub previous: [u8; 32],
    /// Part of a snapshot.
    pub is_snapshot: bool,
    /// Last part of a snapshot.
    pub ends_snapshot: bool,
    /// The edits.
    pub edits: Vec<Edit>,
}

impl ManifestCommit {
    /// Lays the commit out; gives back its bytes and its hash.
    ///
    /// # Errors
    /// [`Damage`] when no reader would take it: a commit that is written is one that can be read.
    pub fn encode(&self) -> Result<(IoBuffer, [u8; 32]), Damage> {
        let mut content = Vec::new();
        for edit in &self.edits {
            edit.encode_into(&mut content);
        }
        if content.len() > COMMIT_BYTES_MAX {
            return Err(Damage::Field {
                structure: NAME,
                field: "length",
            });
        }
        let flags = if self.is_snapshot { FLAG_SNAPSHOT } else { 0 }
            | if self.ends_snapshot {
                FLAG_SNAPSHOT_END
            } else {
                0
            };
        let mut header = [0; HEADER_BYTES];
        put(&mut header, 0, MAGIC);
        put(&mut header, 8, &MANIFEST_VERSION.to_le_bytes());
        put(&mut header, 10, &flags.to_le_bytes());
        put(&mut header, 12, &narrow(content.len()).to_le_bytes());
        put(&mut header, 16, &self.sequence.to_le_bytes());
        put(&mut header, 24, &wide(self.edits.len()).to_le_bytes());
        put(&mut header, 32, &self.previous);
        let mut hasher = blake3::Hasher::new();
        hasher.update(&header[..HASH_AT]);
        hasher.update(&content);
        let hash = *hasher.finalize().as_bytes();
        put(&mut header, HASH_AT, &hash);
        let mut bytes = IoBuffer::with_capacity(HEADER_BYTES + content.len() + SECTOR);
        bytes.extend_from_slice(&header);
        bytes.extend_from_slice(&content);
        bytes.pad_to(SECTOR);
        Ok((bytes, hash))
    }

    /// Lays the commit out twice, one copy behind the other; gives back both and its hash.
    ///
    /// # Errors
    /// As [`ManifestCommit::encode`].
    pub fn encode_twice(&self) -> Result<(IoBuffer, [u8; 32]), Damage> {
        let (mut bytes, hash) = self.encode()?;
        let again = IoBuffer::copy_of(&bytes);
        bytes.extend_from_slice(&again);
        Ok((bytes, hash))
    }

    /// Says whether a manifest file can begin with the commit.
    fn begins_file(&self) -> bool {
        self.is_snapshot
            && matches!(self.edits.first(), Some(Edit::Store { .. }))
            && (self.sequence == 1) == (self.previous == [0; 32])
    }

    /// Reads the commit that `bytes` begin with; gives back its hash and its whole length.
    ///
    /// # Errors
    /// [`Damage`].
    pub fn decode(bytes: &[u8]) -> Result<(Self, [u8; 32], usize), Damage> {
        let short = || Damage::Short { structure: NAME };
        let field = |field| Damage::Field {
            structure: NAME,
            field,
        };
        let header = bytes.get(..HEADER_BYTES).ok_or_else(short)?;
        if header[..8] != MAGIC[..] {
            return Err(Damage::Magic { structure: NAME });
        }
        let version = get_u16(header, 8).ok_or_else(short)?;
        if version > MANIFEST_VERSION {
            let supported = MANIFEST_VERSION;
            return Err(Damage::Version {
                structure: NAME,
                found: version,
                supported,
            });
        }
        let flags = get_u16(header, 10).ok_or_else(short)?;
        let len = index(get_u32(header, 12).ok_or_else(short)?);
        if len > COMMIT_BYTES_MAX || flags > 3 {
            return Err(field("length"));
        }
        let whole = (HEADER_BYTES + len).next_multiple_of(SECTOR);
        let content = bytes
            .get(HEADER_BYTES..HEADER_BYTES + len)
            .ok_or_else(short)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&header[..HASH_AT]);
        hasher.update(content);
        let hash: [u8; 32] = array(header, HASH_AT).ok_or_else(short)?;
        if *hasher.finalize().as_bytes() != hash
            || !is_zero(bytes, HEADER_BYTES + len, whole)
            || !is_zero(header, 64, HASH_AT)
        {
            return Err(Damage::Hash { structure: NAME });
        }
        let mut rest = content;
        let mut edits = Vec::new();
        while !rest.is_empty() {
            let (edit, later) = Edit::decode(rest)?;
            edits.push(edit);
            rest = later;
        }
        if get_u64(header, 24) != Some(wide(edits.len())) {
            return Err(field("edit count"));
        }
        let commit = Self {
            sequence: get_u64(header, 16).ok_or_else(short)?,
            previous: array(header, 32).ok_or_else(short)?,
            is_snapshot: flags & FLAG_SNAPSHOT != 0,
            ends_snapshot: flags & FLAG_SNAPSHOT_END != 0,
            edits,
        };
        Ok((commit, hash, whole))
    }
}
