//! The activity log's file.
//!
//! ```text
//! block 0           header
//! block 1 + 2i      bitmap block i, copy A
//! block 2 + 2i      bitmap block i, copy B
//! ```
//!
//! All blocks are 4096 bytes, all integers little-endian, unused bytes zero.
//!
//! | header at | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `AIACTIVE` |
//! | 8 | 2 | version, 1 |
//! | 10 | 6 | zero |
//! | 16 | 16 | disk |
//! | 32 | 8 | bytes of a region |
//! | 40 | 4 | bitmap blocks |
//! | 44 | 20 | zero |
//! | 64 | 32 | BLAKE3 of bytes 0 to 63 |
//!
//! | bitmap at | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `AIACTMAP` |
//! | 8 | 8 | generation; the copy with the higher one counts |
//! | 16 | 16 | disk |
//! | 32 | 4 | index of the bitmap block |
//! | 36 | 28 | zero |
//! | 64 | 4000 | one bit for each of 32,000 regions, lowest bit first; 1 is marked |
//! | 4064 | 32 | BLAKE3 of bytes 0 to 4063 |
//!
//! Invariants
//! * A bitmap block is written over the older of its two copies, so a torn write leaves the newer
//!   one. It lacks only marks whose writes were not yet given to the source.
//! * Where neither copy is whole, every region of the block counts as marked.
//! * The file is written in full when it is made, so that no later write needs room.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use afterimage_blockdev::DiskId;
use afterimage_cache::bytes::{array, get_u16, get_u32, get_u64, put};

const BLOCK: usize = 4096;
const HEADER_MAGIC: &[u8; 8] = b"AIACTIVE";
const MAP_MAGIC: &[u8; 8] = b"AIACTMAP";
const VERSION: u16 = 1;
const BITS_AT: usize = 64;
const BITS_BYTES: usize = 4000;
const MAP_HASH_AT: usize = BITS_AT + BITS_BYTES;
const HEADER_HASH_AT: usize = 64;
/// No agent ever writes a block so often; below it there is room to count on.
const GENERATION_MAX: u64 = 1 << 62;
/// Regions in one bitmap block.
pub(super) const BLOCK_REGIONS: usize = BITS_BYTES * 8;

const _: () = assert!(MAP_HASH_AT + 32 == BLOCK);

/// Why a file is not the disk's activity log.
#[derive(Debug)]
pub(super) enum Unusable {
    /// The medium failed.
    Io(io::Error),
    /// It holds something else, or something newer.
    Content(String),
}

impl From<io::Error> for Unusable {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// An open activity log file.
#[derive(Debug)]
pub(super) struct ActivityFile {
    file: File,
    disk: DiskId,
    region_bytes: u64,
    /// Of each bitmap block, the generation that counts and whether it is copy B.
    newest: Vec<(u64, bool)>,
}

/// What a file said when it was opened.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The marks, one bit for each region.
    pub bits: Vec<u8>,
    /// Bitmap blocks of which no copy was whole.
    pub damaged_blocks: usize,
}

impl ActivityFile {
    /// Makes a file with no region marked, or with those of `bits`.
    ///
    /// # Errors
    /// When it cannot be written.
    ///
    /// # Durability
    /// The file and its name are durable when this returns.
    pub(super) fn create(
        path: &Path,
        disk: DiskId,
        region_bytes: u64,
        regions: usize,
        bits: &[u8],
    ) -> io::Result<Self> {
        let blocks = regions.div_ceil(BLOCK_REGIONS).max(1);
        let temporary = path.with_extension("new");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        let mut this = Self {
            file,
            disk,
            region_bytes,
            newest: vec![(0, true); blocks],
        };
        this.file.write_all_at(&this.header(), 0)?;
        for block in 0..blocks {
            this.write_block(block, bits)?;
            this.write_block(block, bits)?;
        }
        this.file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        if let Some(directory) = path.parent() {
            File::open(directory)?.sync_all()?;
        }
        Ok(this)
    }

    /// Opens a file and reads the marks.
    ///
    /// # Errors
    /// [`Unusable`].
    pub(super) fn open(path: &Path, disk: DiskId) -> Result<(Self, Found), Unusable> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let mut header = [0; BLOCK];
        file.read_exact_at(&mut header, 0)?;
        let wrong = |what: &str| Unusable::Content(what.to_owned());
        if header[..8] != HEADER_MAGIC[..] {
            return Err(wrong("it does not begin with its magic"));
        }
        if hash(&header[..HEADER_HASH_AT]) != header[HEADER_HASH_AT..HEADER_HASH_AT + 32] {
            return Err(wrong("its header does not match its hash"));
        }
        match get_u16(&header, 8) {
            Some(VERSION) => {}
            version => {
                let version = version.unwrap_or_default();
                return Err(wrong(&format!("version {version} is not known here")));
            }
        }
        if array(&header, 16).map(DiskId) != Some(disk) {
            return Err(wrong("it belongs to another disk"));
        }
        let region_bytes = get_u64(&header, 32).unwrap_or_default();
        let blocks = get_u32(&header, 40).unwrap_or_default() as usize;
        if !region_bytes.is_power_of_two() || !(1..=1024).contains(&blocks) {
            return Err(wrong("its header makes no sense"));
        }
        let mut this = Self {
            file,
            disk,
            region_bytes,
            newest: vec![(0, true); blocks],
        };
        let mut found = Found::default();
        for block in 0..blocks {
            this.read_block(block, &mut found)?;
        }
        Ok((this, found))
    }

    /// Bytes of a region.
    #[must_use]
    pub(super) fn region_bytes(&self) -> u64 {
        self.region_bytes
    }

    /// Regions that there is room for.
    #[must_use]
    pub(super) fn regions_max(&self) -> usize {
        self.newest.len() * BLOCK_REGIONS
    }

    fn header(&self) -> [u8; BLOCK] {
        let mut bytes = [0; BLOCK];
        put(&mut bytes, 0, HEADER_MAGIC);
        put(&mut bytes, 8, &VERSION.to_le_bytes());
        put(&mut bytes, 16, &self.disk.0);
        put(&mut bytes, 32, &self.region_bytes.to_le_bytes());
        let blocks = u32::try_from(self.newest.len()).unwrap_or(u32::MAX);
        put(&mut bytes, 40, &blocks.to_le_bytes());
        let hash = hash(&bytes[..HEADER_HASH_AT]);
        put(&mut bytes, HEADER_HASH_AT, &hash);
        bytes
    }

    fn place(block: usize, is_b: bool) -> u64 {
        ((1 + 2 * block + usize::from(is_b)) * BLOCK) as u64
    }

    fn read_block(&mut self, block: usize, found: &mut Found) -> io::Result<()> {
        let mut best: Option<(u64, bool, Vec<u8>)> = None;
        for is_b in [false, true] {
            let mut bytes = vec![0; BLOCK];
            match self
                .file
                .read_exact_at(&mut bytes, Self::place(block, is_b))
            {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => continue,
                Err(error) => return Err(error),
            }
            let is_whole = bytes[..8] == MAP_MAGIC[..]
                && array(&bytes, 16).map(DiskId) == Some(self.disk)
                && get_u32(&bytes, 32).map(|index| index as usize) == Some(block)
                && hash(&bytes[..MAP_HASH_AT]) == bytes[MAP_HASH_AT..];
            let generation = get_u64(&bytes, 8).unwrap_or(u64::MAX);
            let is_whole = is_whole && generation < GENERATION_MAX;
            if is_whole && best.as_ref().is_none_or(|(best, ..)| generation > *best) {
                best = Some((generation, is_b, bytes));
            }
        }
        match best {
            Some((generation, is_b, bytes)) => {
                self.newest[block] = (generation, is_b);
                found.bits.extend_from_slice(&bytes[BITS_AT..MAP_HASH_AT]);
            }
            None => {
                found.damaged_blocks += 1;
                found.bits.extend_from_slice(&[0xff; BITS_BYTES]);
            }
        }
        Ok(())
    }

    /// Writes one bitmap block over its older copy. `bits` are those of all regions.
    ///
    /// # Errors
    /// When it cannot be written; the newer copy still counts.
    ///
    /// # Durability
    /// Durable after [`ActivityFile::sync`].
    pub(super) fn write_block(&mut self, block: usize, bits: &[u8]) -> io::Result<()> {
        let (generation, is_b) = self.newest[block];
        let mut bytes = [0; BLOCK];
        put(&mut bytes, 0, MAP_MAGIC);
        put(&mut bytes, 8, &(generation + 1).to_le_bytes());
        put(&mut bytes, 16, &self.disk.0);
        let index = u32::try_from(block).unwrap_or(u32::MAX);
        put(&mut bytes, 32, &index.to_le_bytes());
        let from = (block * BITS_BYTES).min(bits.len());
        let to = (from + BITS_BYTES).min(bits.len());
        put(&mut bytes, BITS_AT, &bits[from..to]);
        let hash = hash(&bytes[..MAP_HASH_AT]);
        put(&mut bytes, MAP_HASH_AT, &hash);
        self.file.write_all_at(&bytes, Self::place(block, !is_b))?;
        self.newest[block] = (generation + 1, !is_b);
        Ok(())
    }

    /// Makes the blocks written so far durable.
    ///
    /// # Errors
    /// When that failed; the file must be made anew then.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

#[cfg(test)]
impl ActivityFile {
    /// The same file, which can no longer be written.
    pub(super) fn read_only(mut self, path: &Path) -> Self {
        self.file = File::open(path).unwrap();
        self
    }
}

fn hash(bytes: &[u8]) -> [u8; 32] {
    *blake3::hash(bytes).as_bytes()
}
