//! Run files: sorted, immutable map entries of an interval of the log, a section for each disk of
//! each history. Base parts, which name bulk blocks, have the same format.
//!
//! ```text
//! | header 4096 | entry pages of section 0 | ... | the same pages again | tail | footer 4096 |
//! page   = | hash 8 | count 2 | zero 2 | page number 4 | 170 entries of 24 bytes |
//! tail   = | section table | fences | ranges | timelines |, one hash over all of it
//! ```
//!
//! Invariants
//! * Entries of a section are sorted by cell, then newest first.
//! * A fence is the first cell of its page; entries of one cell may span pages.
//! * Every page is there twice, far from its copy: without it nobody knows where a region's blocks
//!   are before the map is made anew. When the tail or the footer is damaged, it is.
//! * The file is whole and synced before the manifest names it, and never changes.

use afterimage_blockdev::{
    CellIndex, DiskId, FileName, HistoryId, IoBuffer, Lsn, StoreId, Timestamp,
};
use afterimage_cache::Damage;
use afterimage_cache::bytes::{
    array, get_u16, get_u32, get_u64, index, is_zero, narrow, put, wide,
};

use crate::entry::{ENTRY_BYTES, Entry, RANGE_BYTES, RangeEntry};

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// Bytes of a page before its entries.
pub const PAGE_HEADER_BYTES: usize = 16;
/// Entries of a full page.
pub const PAGE_ENTRIES: usize = (PAGE_BYTES - PAGE_HEADER_BYTES) / ENTRY_BYTES;
/// Version that this program writes.
pub const RUN_VERSION: u16 = 1;

const _: () = assert!(PAGE_ENTRIES * ENTRY_BYTES + PAGE_HEADER_BYTES == PAGE_BYTES);

const HEADER_MAGIC: &[u8; 8] = b"AIRUNFIL";
const FOOTER_MAGIC: &[u8; 8] = b"AIRUNEND";
const SECTION_BYTES: usize = 96;
const SAMPLE_BYTES: usize = 16;
const NAME: &str = "run file";

/// Names a run file within a store.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RunId(pub u32);

/// Name of a run's file.
#[must_use]
pub fn run_file(run: RunId) -> FileName {
    FileName::new(format!("runs/{:010}.run", run.0))
}

/// The run that a file name means, if any.
#[must_use]
pub fn parse_run_file(name: &FileName) -> Option<RunId> {
    name.base().strip_suffix(".run")?.parse().ok().map(RunId)
}

/// What a section covers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct SectionName {
    /// The history.
    pub history: HistoryId,
    /// The disk; nil for a timeline.
    pub disk: DiskId,
    /// Names bulk blocks only.
    pub is_base_part: bool,
}

/// The instant of an LSN.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TimeSample {
    /// When the record completed.
    pub time: Timestamp,
    /// Its LSN.
    pub lsn: Lsn,
}

/// A section before it is written.
#[derive(Clone, Debug)]
pub struct SectionContent {
    /// What it covers.
    pub name: SectionName,
    /// Sorted entries.
    pub entries: Vec<Entry>,
    /// Ranges, by LSN.
    pub ranges: Vec<RangeEntry>,
    /// Time samples, by LSN.
    pub timeline: Vec<TimeSample>,
    /// Lowest LSN that the interval covers.
    pub low: Lsn,
    /// Highest LSN that the interval covers.
    pub high: Lsn,
}

/// A section of a file that was read.
#[derive(Clone, Debug)]
pub struct SectionTable {
    /// What it covers.
    pub name: SectionName,
    /// Number of the first page; page 0 follows the file's header.
    pub first_page: u32,
    /// Number of all pages of the file; so far behind each page lies its copy.
    pub copy_distance: u32,
    /// Number of entries.
    pub entry_count: u64,
    /// First cell of each page.
    pub fences: Vec<u64>,
    /// Ranges, by LSN.
    pub ranges: Vec<RangeEntry>,
    /// Time samples, by LSN.
    pub timeline: Vec<TimeSample>,
    /// Lowest LSN.
    pub low: Lsn,
    /// Highest LSN.
    pub high: Lsn,
}

fn page_hash(bytes: &[u8], run: RunId) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&run.0.to_le_bytes());
    hasher.update(&bytes[8..PAGE_BYTES]);
    array(hasher.finalize().as_bytes(), 0).unwrap_or_default()
}

/// Reads a page's entries.
///
/// # Errors
/// [`Damage`].
pub fn decode_page(bytes: &[u8], run: RunId, page: u32) -> Result<Vec<Entry>, Damage> {
    const PAGE: &str = "map page";
    let short = || Damage::Short { structure: PAGE };
    let bytes = bytes.get(..PAGE_BYTES).ok_or_else(short)?;
    let hash: [u8; 8] = array(bytes, 0).ok_or_else(short)?;
    if hash != page_hash(bytes, run) {
        return Err(Damage::Hash { structure: PAGE });
    }
    let count = usize::from(get_u16(bytes, 8).ok_or_else(short)?);
    if count > PAGE_ENTRIES || get_u32(bytes, 12) != Some(page) {
        return Err(Damage::Field {
            structure: PAGE,
            field: "count or number",
        });
    }
    bytes[PAGE_HEADER_BYTES..]
        .chunks_exact(ENTRY_BYTES)
        .take(count)
        .map(|entry| {
            Entry::decode(entry).ok_or(Damage::Field {
                structure: PAGE,
                field: "entry",
            })
        })
        .collect()
}

fn header(store: StoreId, run: RunId) -> [u8; PAGE_BYTES] {
    let mut header = [0; PAGE_BYTES];
    put(&mut header, 0, HEADER_MAGIC);
    put(&mut header, 8, &RUN_VERSION.to_le_bytes());
    put(&mut header, 16, &store.0);
    put(&mut header, 32, &run.0.to_le_bytes());
    header
}

/// Checks the first sector of a run file.
///
/// # Errors
/// [`Damage`].
pub fn check_header(bytes: &[u8], store: StoreId, run: RunId) -> Result<(), Damage> {
    if bytes.get(..PAGE_BYTES) == Some(&header(store, run)) {
        Ok(())
    } else {
        Err(Damage::Field {
            structure: NAME,
            field: "header",
        })
    }
}

/// Lays out a whole run file. Sections without entries, ranges and samples are left out.
#[must_use]
pub fn encode_run(store: StoreId, run: RunId, sections: &[SectionContent]) -> IoBuffer {
    let entries: usize = sections.iter().map(|section| section.entries.len()).sum();
    let mut out =
        IoBuffer::with_capacity((2 * (entries / PAGE_ENTRIES + sections.len()) + 8) * PAGE_BYTES);
    out.extend_from_slice(&header(store, run));
    let (mut table, mut fences, mut ranges, mut samples) = (vec![], vec![], vec![], vec![]);
    let mut page_number = 0u32;
    for section in sections {
        let first_page = page_number;
        for chunk in section.entries.chunks(PAGE_ENTRIES) {
            let mut page = [0; PAGE_BYTES];
            put(&mut page, 8, &narrow(chunk.len()).to_le_bytes()[..2]);
            put(&mut page, 12, &page_number.to_le_bytes());
            for (place, entry) in chunk.iter().enumerate() {
                put(
                    &mut page,
                    PAGE_HEADER_BYTES + place * ENTRY_BYTES,
                    &entry.encode(),
                );
            }
            let hash = page_hash(&page, run);
            put(&mut page, 0, &hash);
            out.extend_from_slice(&page);
            fences.extend_from_slice(&chunk[0].cell.0.to_le_bytes());
            page_number += 1;
        }
        let mut row = [0; SECTION_BYTES];
        put(&mut row, 0, &section.name.history.0);
        put(&mut row, 16, &section.name.disk.0);
        put(&mut row, 32, &wide(section.entries.len()).to_le_bytes());
        put(&mut row, 40, &section.low.0.to_le_bytes());
        put(&mut row, 48, &section.high.0.to_le_bytes());
        put(&mut row, 56, &first_page.to_le_bytes());
        put(&mut row, 60, &(page_number - first_page).to_le_bytes());
        put(&mut row, 64, &narrow(section.ranges.len()).to_le_bytes());
        put(&mut row, 68, &narrow(section.timeline.len()).to_le_bytes());
        row[72] = u8::from(section.name.is_base_part);
        table.extend_from_slice(&row);
        for range in &section.ranges {
            ranges.extend_from_slice(&range.encode());
        }
        for sample in &section.timeline {
            samples.extend_from_slice(&sample.time.0.to_le_bytes());
            samples.extend_from_slice(&sample.lsn.0.to_le_bytes());
        }
    }
    let again = IoBuffer::copy_of(&out[PAGE_BYTES..]);
    out.extend_from_slice(&again);
    let tail_at = out.len();
    for part in [&table, &fences, &ranges, &samples] {
        out.extend_from_slice(part);
    }
    let tail_hash = blake3::hash(&out[tail_at..]);
    let tail_len = out.len() - tail_at;
    out.pad_to(PAGE_BYTES);
    let mut footer = [0; PAGE_BYTES];
    put(&mut footer, 0, FOOTER_MAGIC);
    put(&mut footer, 8, &RUN_VERSION.to_le_bytes());
    put(&mut footer, 12, &narrow(sections.len()).to_le_bytes());
    put(&mut footer, 16, &store.0);
    put(&mut footer, 32, &run.0.to_le_bytes());
    put(&mut footer, 36, &page_number.to_le_bytes());
    put(&mut footer, 40, &wide(tail_at).to_le_bytes());
    put(&mut footer, 48, &wide(tail_len).to_le_bytes());
    put(&mut footer, 56, tail_hash.as_bytes());
    let hash = blake3::hash(&footer[..96]);
    put(&mut footer, 96, hash.as_bytes());
    out.extend_from_slice(&footer);
    out
}

/// Last sector of a run file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RunFooter {
    section_count: u32,
    /// Number of pages, copies not counted.
    pub page_count: u32,
    /// Where the tail begins.
    pub tail_offset: u64,
    /// Bytes of the tail.
    pub tail_len: u64,
    tail_hash: [u8; 32],
}

impl RunFooter {
    /// Reads the footer of a store's run file.
    ///
    /// # Errors
    /// [`Damage`].
    pub fn decode(bytes: &[u8], store: StoreId, run: RunId) -> Result<Self, Damage> {
        let short = || Damage::Short { structure: NAME };
        let bytes = bytes.get(..PAGE_BYTES).ok_or_else(short)?;
        if bytes[..8] != FOOTER_MAGIC[..] {
            return Err(Damage::Magic { structure: NAME });
        }
        let version = get_u16(bytes, 8).ok_or_else(short)?;
        if version > RUN_VERSION {
            let supported = RUN_VERSION;
            return Err(Damage::Version {
                structure: NAME,
                found: version,
                supported,
            });
        }
        let hash: [u8; 32] = array(bytes, 96).ok_or_else(short)?;
        if *blake3::hash(&bytes[..96]).as_bytes() != hash || !is_zero(bytes, 128, PAGE_BYTES) {
            return Err(Damage::Hash { structure: NAME });
        }
        if array(bytes, 16) != Some(store.0) || get_u32(bytes, 32) != Some(run.0) {
            return Err(Damage::Field {
                structure: NAME,
                field: "identity",
            });
        }
        Ok(Self {
            section_count: get_u32(bytes, 12).ok_or_else(short)?,
            page_count: get_u32(bytes, 36).ok_or_else(short)?,
            tail_offset: get_u64(bytes, 40).ok_or_else(short)?,
            tail_len: get_u64(bytes, 48).ok_or_else(short)?,
            tail_hash: array(bytes, 56).ok_or_else(short)?,
        })
    }

    /// Reads the tail.
    ///
    /// # Errors
    /// [`Damage`].
    pub fn decode_tail(&self, bytes: &[u8]) -> Result<Vec<SectionTable>, Damage> {
        let short = || Damage::Short { structure: NAME };
        let len = usize::try_from(self.tail_len).map_err(|_| short())?;
        let bytes = bytes.get(..len).ok_or_else(short)?;
        if *blake3::hash(bytes).as_bytes() != self.tail_hash {
            return Err(Damage::Hash { structure: NAME });
        }
        let mut fences_at = index(self.section_count) * SECTION_BYTES;
        let mut ranges_at = fences_at + index(self.page_count) * 8;
        let counts = |row: usize, at: usize| get_u32(bytes, row * SECTION_BYTES + at).map(index);
        let all_ranges: Option<usize> = (0..index(self.section_count))
            .map(|row| counts(row, 64))
            .sum();
        let mut samples_at = ranges_at + all_ranges.ok_or_else(short)? * RANGE_BYTES;
        let mut sections = Vec::new();
        for row in 0..index(self.section_count) {
            let mut section = decode_section(
                bytes,
                row * SECTION_BYTES,
                [&mut fences_at, &mut ranges_at, &mut samples_at],
            )
            .ok_or_else(short)?;
            section.copy_distance = self.page_count;
            sections.push(section);
        }
        Ok(sections)
    }
}

fn decode_section(bytes: &[u8], row: usize, parts: [&mut usize; 3]) -> Option<SectionTable> {
    let [fences_at, ranges_at, samples_at] = parts;
    let page_count = index(get_u32(bytes, row + 60)?);
    let range_count = index(get_u32(bytes, row + 64)?);
    let sample_count = index(get_u32(bytes, row + 68)?);
    let take = |at: &mut usize, size: usize, count: usize| {
        let part = bytes.get(*at..at.checked_add(count.checked_mul(size)?)?)?;
        *at += count * size;
        Some(part)
    };
    let fences = take(fences_at, 8, page_count)?;
    let ranges = take(ranges_at, RANGE_BYTES, range_count)?;
    let samples = take(samples_at, SAMPLE_BYTES, sample_count)?;
    Some(SectionTable {
        name: SectionName {
            history: HistoryId(array(bytes, row)?),
            disk: DiskId(array(bytes, row + 16)?),
            is_base_part: *bytes.get(row + 72)? == 1,
        },
        first_page: get_u32(bytes, row + 56)?,
        copy_distance: 0,
        entry_count: get_u64(bytes, row + 32)?,
        fences: fences
            .as_chunks::<8>()
            .0
            .iter()
            .map(|b| u64::from_le_bytes(*b))
            .collect(),
        ranges: ranges
            .chunks_exact(RANGE_BYTES)
            .map(RangeEntry::decode)
            .collect::<Option<_>>()?,
        timeline: samples
            .chunks_exact(SAMPLE_BYTES)
            .map(|b| {
                Some(TimeSample {
                    time: Timestamp(get_u64(b, 0)?),
                    lsn: Lsn(get_u64(b, 8)?),
                })
            })
            .collect::<Option<_>>()?,
        low: Lsn(get_u64(bytes, row + 40)?),
        high: Lsn(get_u64(bytes, row + 48)?),
    })
}

/// The pages of a section that may hold cells `first..end`, as indexes into its fences.
#[must_use]
pub fn pages_for(fences: &[u64], first: CellIndex, end: CellIndex) -> core::ops::Range<usize> {
    // The page before the first fence at or above `first` may hold it as well.
    let from = fences
        .partition_point(|fence| *fence < first.0)
        .saturating_sub(1);
    let to = fences.partition_point(|fence| *fence < end.0);
    from.min(to)..to
}
