//! The chain of an archive: a header, one commit for each segment, and an end.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::secret::{Keys, Protection, Secret};
use super::segment::{Named, SEGMENT_BYTES_MAX};
use super::{chain_path, damaged, get, get_u16, get_u32, get_u64, put};
use crate::error::BulkError;
use crate::raw::is_zero;

const MAGIC: [u8; 8] = *b"AFTCHAIN";
const COMMIT_MAGIC: [u8; 4] = *b"AFTC";
const VERSION: u16 = 1;
pub(super) const HEADER_BYTES: usize = 512;
pub(super) const COMMIT_BYTES: usize = 128;
/// Longest text that says which state of which disk an archive holds.
pub(super) const IDENTITY_BYTES_MAX: usize = 366;
const IDENTITY_AT: usize = 82;
const MAC_AT: usize = 448;
const HASH_AT: usize = 480;
const COMMIT_HASH_AT: usize = 96;
const SEGMENT: u8 = 1;
const END: u8 = 2;
/// Longest chain that is read.
const CHAIN_BYTES_MAX: u64 = 4 << 30;

const _: () = assert!(IDENTITY_AT + IDENTITY_BYTES_MAX == MAC_AT);
const _: () = assert!(MAC_AT + 32 == HASH_AT && HASH_AT + 32 == HEADER_BYTES);
const _: () = assert!(COMMIT_HASH_AT + 32 == COMMIT_BYTES);

/// What the header says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Header {
    pub(super) id: [u8; 16],
    pub(super) salt: [u8; 32],
    pub(super) protection: Protection,
    pub(super) size_bytes: u64,
    pub(super) identity: String,
}

impl Header {
    pub(super) fn encode(&self, keys: &Keys) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let (code, rounds) = self.protection.fields();
        put(&mut bytes, 0, &MAGIC);
        put(&mut bytes, 8, &VERSION.to_le_bytes());
        put(&mut bytes, 10, &code.to_le_bytes());
        put(&mut bytes, 12, &rounds.to_le_bytes());
        put(&mut bytes, 16, &self.id);
        put(&mut bytes, 32, &self.salt);
        put(&mut bytes, 64, &self.size_bytes.to_le_bytes());
        let identity = self.identity.as_bytes();
        let identity = identity.get(..IDENTITY_BYTES_MAX).unwrap_or(identity);
        let length = u16::try_from(identity.len()).unwrap_or(0);
        put(&mut bytes, 80, &length.to_le_bytes());
        put(&mut bytes, IDENTITY_AT, identity);
        let mac = keys.hash(&[&bytes[..MAC_AT]]);
        put(&mut bytes, MAC_AT, &mac);
        let hash = *blake3::hash(&bytes[..HASH_AT]).as_bytes();
        put(&mut bytes, HASH_AT, &hash);
        bytes
    }

    /// Reads a header without a secret; what it says is not authenticated yet.
    pub(super) fn decode(path: &Path, bytes: &[u8; HEADER_BYTES]) -> Result<Self, BulkError> {
        let wrong = |at, what| damaged(path, at, what);
        if get(bytes, 0) != Some(MAGIC) {
            return Err(wrong(0, "the magic of the header"));
        }
        let hash = *blake3::hash(&bytes[..HASH_AT]).as_bytes();
        if get(bytes, HASH_AT) != Some(hash) {
            return Err(wrong(0, "the header"));
        }
        let version = get_u16(bytes, 8).unwrap_or(0);
        if version != VERSION {
            return Err(BulkError::Version {
                path: path.to_owned(),
                found: version,
            });
        }
        let code = get_u16(bytes, 10).unwrap_or(u16::MAX);
        let rounds = get_u32(bytes, 12).unwrap_or(u32::MAX);
        let protection = Protection::from_fields(code, rounds);
        let length = usize::from(get_u16(bytes, 80).unwrap_or(u16::MAX));
        let identity = bytes.get(IDENTITY_AT..IDENTITY_AT.saturating_add(length));
        let identity = identity.filter(|_| length <= IDENTITY_BYTES_MAX);
        let is_reserved_zero = is_zero(&bytes[72..80]);
        match (
            protection,
            identity,
            get(bytes, 16),
            get(bytes, 32),
            get_u64(bytes, 64),
        ) {
            (Some(protection), Some(identity), Some(id), Some(salt), Some(size_bytes))
                if is_reserved_zero =>
            {
                Ok(Self {
                    id,
                    salt,
                    protection,
                    size_bytes,
                    identity: String::from_utf8_lossy(identity).into_owned(),
                })
            }
            _ => Err(wrong(0, "a field of the header")),
        }
    }

    /// The keys, if the secret is the right one.
    pub(super) fn unlock(
        &self,
        path: &Path,
        bytes: &[u8; HEADER_BYTES],
        secret: Option<&Secret>,
    ) -> Result<Keys, BulkError> {
        let path = || path.to_owned();
        let is_encrypted = self.protection != Protection::Plain;
        if is_encrypted != secret.is_some() {
            return Err(BulkError::KeyMismatch {
                path: path(),
                is_encrypted,
            });
        }
        let wrong = || BulkError::WrongKey { path: path() };
        let keys = Keys::new(secret, self.protection, &self.id, &self.salt).ok_or_else(wrong)?;
        if get(bytes, MAC_AT) == Some(keys.hash(&[&bytes[..MAC_AT]])) {
            Ok(keys)
        } else {
            Err(wrong())
        }
    }
}

/// Encodes the commit that adds a segment; the hash is the next one's `before`.
pub(super) fn segment_commit(keys: &Keys, before: &[u8; 32], named: &Named) -> [u8; COMMIT_BYTES] {
    let mut bytes = [0; COMMIT_BYTES];
    put(&mut bytes, 0, &COMMIT_MAGIC);
    bytes[4] = SEGMENT;
    put(&mut bytes, 8, &named.number.to_le_bytes());
    put(&mut bytes, 16, &named.bytes.to_le_bytes());
    put(&mut bytes, 24, &named.slot_count.to_le_bytes());
    put(&mut bytes, 32, &named.from.to_le_bytes());
    put(&mut bytes, 40, &named.to.to_le_bytes());
    put(&mut bytes, 64, &named.hash);
    seal(keys, before, bytes)
}

/// Encodes the commit that says that the disk is whole.
pub(super) fn end_commit(
    keys: &Keys,
    before: &[u8; 32],
    segments: u64,
    size_bytes: u64,
) -> [u8; COMMIT_BYTES] {
    let mut bytes = [0; COMMIT_BYTES];
    put(&mut bytes, 0, &COMMIT_MAGIC);
    bytes[4] = END;
    put(&mut bytes, 8, &segments.to_le_bytes());
    put(&mut bytes, 40, &size_bytes.to_le_bytes());
    seal(keys, before, bytes)
}

fn seal(keys: &Keys, before: &[u8; 32], mut bytes: [u8; COMMIT_BYTES]) -> [u8; COMMIT_BYTES] {
    let hash = keys.hash(&[before, &bytes[..COMMIT_HASH_AT]]);
    put(&mut bytes, COMMIT_HASH_AT, &hash);
    bytes
}

/// The hash that a commit ends with.
pub(super) fn hash_of(commit: &[u8; COMMIT_BYTES]) -> [u8; 32] {
    get(commit, COMMIT_HASH_AT).unwrap_or_default()
}

/// Says whether a commit claims to be the end.
pub(super) fn is_end(commit: &[u8; COMMIT_BYTES]) -> bool {
    get(commit, 0) == Some(COMMIT_MAGIC) && commit[4] == END
}

/// What is left of a chain.
pub(super) struct Chain {
    pub(super) path: PathBuf,
    pub(super) header: Header,
    pub(super) keys: Keys,
    pub(super) segments: Vec<Named>,
    /// What the first commit's hash covers in place of one before it.
    pub(super) origin: [u8; 32],
    /// The hash of each commit of a segment.
    pub(super) hashes: Vec<[u8; 32]>,
    /// The end is there.
    pub(super) is_finished: bool,
    /// Where something stands that is no commit of this chain.
    pub(super) broken_at: Option<u64>,
    /// What is broken is no more than the last commit, which may not have been written whole.
    pub(super) is_torn: bool,
}

impl Chain {
    /// Everything up to here is in segments.
    pub(super) fn position(&self) -> u64 {
        self.segments.last().map_or(0, |last| last.to)
    }

    /// The hash of the last commit.
    pub(super) fn last_hash(&self) -> [u8; 32] {
        self.hashes.last().copied().unwrap_or(self.origin)
    }

    /// Reads a chain as far as it verifies. `None` when there is not even a whole header.
    pub(super) fn load(
        directory: &Path,
        secret: Option<&Secret>,
    ) -> Result<Option<Self>, BulkError> {
        let path = chain_path(directory);
        let mut file = match File::open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(BulkError::io("open", &path))?,
        };
        let length = file
            .metadata()
            .map_err(BulkError::io("look at", &path))?
            .len();
        if length < HEADER_BYTES as u64 {
            return Ok(None);
        }
        if length > CHAIN_BYTES_MAX {
            return Err(damaged(&path, CHAIN_BYTES_MAX, "the length"));
        }
        let mut bytes = [0; HEADER_BYTES];
        file.read_exact(&mut bytes)
            .map_err(BulkError::io("read", &path))?;
        let header = Header::decode(&path, &bytes)?;
        let keys = header.unlock(&path, &bytes, secret)?;
        let mut chain = Self {
            origin: get(&bytes, MAC_AT).unwrap_or_default(),
            path,
            header,
            keys,
            segments: Vec::new(),
            hashes: Vec::new(),
            is_finished: false,
            broken_at: None,
            is_torn: false,
        };
        chain.load_commits(file, length)?;
        Ok(Some(chain))
    }

    fn load_commits(&mut self, file: File, length: u64) -> Result<(), BulkError> {
        let mut reader = std::io::BufReader::new(file);
        let mut at = HEADER_BYTES as u64;
        while at < length {
            let left = length - at;
            let mut bytes = [0; COMMIT_BYTES];
            if left < COMMIT_BYTES as u64 {
                (self.broken_at, self.is_torn) = (Some(at), true);
                return Ok(());
            }
            reader
                .read_exact(&mut bytes)
                .map_err(BulkError::io("read", &self.path))?;
            if self.is_finished || !self.take(&bytes) {
                self.broken_at = Some(at);
                self.is_torn = left == COMMIT_BYTES as u64 && !self.is_finished;
                return Ok(());
            }
            at += COMMIT_BYTES as u64;
        }
        Ok(())
    }

    fn take(&mut self, bytes: &[u8; COMMIT_BYTES]) -> bool {
        self.parse(bytes).is_some()
    }

    fn parse(&mut self, bytes: &[u8; COMMIT_BYTES]) -> Option<()> {
        let hash = self
            .keys
            .hash(&[&self.last_hash(), &bytes[..COMMIT_HASH_AT]]);
        if get(bytes, COMMIT_HASH_AT) != Some(hash) || get(bytes, 0) != Some(COMMIT_MAGIC) {
            return None;
        }
        let kind = *bytes.get(4)?;
        let count = self.segments.len() as u64;
        let (number, to) = (get_u64(bytes, 8)?, get_u64(bytes, 40)?);
        if kind == END {
            let is_whole = number == count && to == self.header.size_bytes;
            self.is_finished = is_whole;
            return is_whole.then_some(());
        }
        let named = Named {
            number,
            bytes: get_u64(bytes, 16)?,
            slot_count: get_u32(bytes, 24)?,
            from: get_u64(bytes, 32)?,
            to,
            hash: get(bytes, 64)?,
        };
        let is_legal = kind == SEGMENT
            && named.number == count + 1
            && named.from == self.position()
            && named.to > named.from
            && named.to <= self.header.size_bytes
            && named.bytes <= SEGMENT_BYTES_MAX;
        if !is_legal {
            return None;
        }
        self.segments.push(named);
        self.hashes.push(hash);
        Some(())
    }
}
