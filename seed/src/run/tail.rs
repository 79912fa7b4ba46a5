//! The end of a run file: what its sections are, and where their pages.

use afterimage_blockdev::{DiskId, HistoryId, IoBuffer, Lsn, StoreId, Timestamp};
use afterimage_cache::Damage;
use afterimage_cache::bytes::{
    array, get_u16, get_u32, get_u64, index, is_zero, narrow, put, wide,
};

use super::{PAGE_BYTES, RUN_VERSION, RunId, SectionName, SectionTable, TimeSample};
use crate::entry::{RANGE_BYTES, RangeEntry};

const FOOTER_MAGIC: &[u8; 8] = b"AIRUNEND";
const SECTION_BYTES: usize = 96;
const SAMPLE_BYTES: usize = 16;
/// Bytes of both footers, at the end of the file.
pub const FOOTERS_BYTES: usize = 2 * PAGE_BYTES;
const NAME: &str = "run file";
/// No run file is longer.
const FILE_BYTES_MAX: u64 = 1 << 48;

/// Lays out both tails and both footers, to be written at `tail_at`.
pub(super) fn encode_end(
    (store, run): (StoreId, RunId),
    sections: &[SectionTable],
    page_count: u32,
    tail_at: u64,
) -> IoBuffer {
    let (mut tail, mut fences, mut ranges, mut samples) = (vec![], vec![], vec![], vec![]);
    for section in sections {
        tail.extend_from_slice(&encode_section(section));
        for fence in &section.fences {
            fences.extend_from_slice(&fence.to_le_bytes());
        }
        for range in &section.ranges {
            ranges.extend_from_slice(&range.encode());
        }
        for sample in &section.timeline {
            samples.extend_from_slice(&sample.time.0.to_le_bytes());
            samples.extend_from_slice(&sample.lsn.0.to_le_bytes());
        }
    }
    for part in [fences, ranges, samples] {
        tail.extend_from_slice(&part);
    }
    let mut footer = [0; PAGE_BYTES];
    put(&mut footer, 0, FOOTER_MAGIC);
    put(&mut footer, 8, &RUN_VERSION.to_le_bytes());
    put(&mut footer, 12, &narrow(sections.len()).to_le_bytes());
    put(&mut footer, 16, &store.0);
    put(&mut footer, 32, &run.0.to_le_bytes());
    put(&mut footer, 36, &page_count.to_le_bytes());
    put(&mut footer, 40, &tail_at.to_le_bytes());
    put(&mut footer, 48, &wide(tail.len()).to_le_bytes());
    put(&mut footer, 56, blake3::hash(&tail).as_bytes());
    let hash = blake3::hash(&footer[..96]);
    put(&mut footer, 96, hash.as_bytes());
    let mut out = IoBuffer::with_capacity(2 * (tail.len() + 2 * PAGE_BYTES));
    for _ in 0..2 {
        out.extend_from_slice(&tail);
        out.pad_to(PAGE_BYTES);
    }
    for _ in 0..2 {
        out.extend_from_slice(&footer);
    }
    out
}

fn encode_section(section: &SectionTable) -> [u8; SECTION_BYTES] {
    let mut row = [0; SECTION_BYTES];
    put(&mut row, 0, &section.name.history.0);
    put(&mut row, 16, &section.name.disk.0);
    put(&mut row, 32, &section.entry_count.to_le_bytes());
    put(&mut row, 40, &section.low.0.to_le_bytes());
    put(&mut row, 48, &section.high.0.to_le_bytes());
    put(&mut row, 56, &section.first_page.to_le_bytes());
    put(&mut row, 60, &narrow(section.fences.len()).to_le_bytes());
    put(&mut row, 64, &narrow(section.ranges.len()).to_le_bytes());
    put(&mut row, 68, &narrow(section.timeline.len()).to_le_bytes());
    row[72] = u8::from(section.name.is_base_part);
    row
}

/// Last sector of a run file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RunFooter {
    section_count: u32,
    /// Number of pages, copies not counted.
    pub page_count: u32,
    /// Where the first tail begins.
    pub tail_offset: u64,
    /// Bytes of a tail, without padding.
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
        // The hash comes first: a damaged version is damage, not a newer program's work.
        let hash: [u8; 32] = array(bytes, 96).ok_or_else(short)?;
        if *blake3::hash(&bytes[..96]).as_bytes() != hash {
            return Err(Damage::Hash { structure: NAME });
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
        if !is_zero(bytes, 128, PAGE_BYTES) {
            return Err(Damage::Hash { structure: NAME });
        }
        if array(bytes, 16) != Some(store.0) || get_u32(bytes, 32) != Some(run.0) {
            return Err(Damage::Field {
                structure: NAME,
                field: "identity",
            });
        }
        let footer = Self {
            section_count: get_u32(bytes, 12).ok_or_else(short)?,
            page_count: get_u32(bytes, 36).ok_or_else(short)?,
            tail_offset: get_u64(bytes, 40).ok_or_else(short)?,
            tail_len: get_u64(bytes, 48).ok_or_else(short)?,
            tail_hash: array(bytes, 56).ok_or_else(short)?,
        };
        // The tail follows the pages and their copies, and no file is so long that adding to its
        // length overflows.
        let pages = 1 + 2 * u64::from(footer.page_count);
        if footer.tail_offset != pages * PAGE_BYTES as u64 || footer.tail_len > FILE_BYTES_MAX {
            return Err(Damage::Field {
                structure: NAME,
                field: "tail",
            });
        }
        Ok(footer)
    }

    /// Bytes of both tails, with padding.
    #[must_use]
    pub fn tails_len(&self) -> u64 {
        self.tail_len
            .checked_next_multiple_of(PAGE_BYTES as u64)
            .unwrap_or(u64::MAX)
            .saturating_mul(2)
    }

    /// Zeroes behind a tail.
    #[must_use]
    pub fn padding_len(&self) -> usize {
        let padding = self.tails_len() / 2 - self.tail_len.min(self.tails_len() / 2);
        usize::try_from(padding).unwrap_or(0)
    }

    /// Reads the better one of the footers in the last [`FOOTERS_BYTES`] of a file.
    ///
    /// # Errors
    /// [`Damage`] when none is good.
    pub fn find(bytes: &[u8], store: StoreId, run: RunId) -> Result<Self, Damage> {
        let last = bytes.len().saturating_sub(PAGE_BYTES);
        Self::decode(bytes.get(last..).unwrap_or(&[]), store, run)
            .or_else(|damage| Self::decode(bytes, store, run).map_err(|_| damage))
    }

    /// Reads the better one of the tails, which `bytes` begin with.
    ///
    /// # Errors
    /// [`Damage`] when none is good.
    pub fn find_tail(&self, bytes: &[u8]) -> Result<Vec<SectionTable>, Damage> {
        let second = usize::try_from(self.tails_len() / 2).unwrap_or(usize::MAX);
        self.decode_tail(bytes).or_else(|damage| {
            self.decode_tail(bytes.get(second..).unwrap_or(&[]))
                .map_err(|_| damage)
        })
    }

    /// Reads a tail.
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
        self.decode_sections(bytes).ok_or_else(short)
    }

    fn decode_sections(&self, bytes: &[u8]) -> Option<Vec<SectionTable>> {
        // Each number has 32 bits, and as many rows are summed as there are bytes for: 64 bits do.
        let mut fences_at = index(self.section_count).checked_mul(SECTION_BYTES)?;
        if fences_at > bytes.len() {
            return None;
        }
        let mut ranges_at = fences_at.checked_add(index(self.page_count).checked_mul(8)?)?;
        let counts = |row: usize, at: usize| get_u32(bytes, row * SECTION_BYTES + at).map(index);
        let all_ranges: Option<usize> = (0..index(self.section_count))
            .map(|row| counts(row, 64))
            .sum();
        let mut samples_at = ranges_at.checked_add(all_ranges?.checked_mul(RANGE_BYTES)?)?;
        let mut sections = Vec::new();
        for row in 0..index(self.section_count) {
            let mut section = decode_section(
                bytes,
                row * SECTION_BYTES,
                [&mut fences_at, &mut ranges_at, &mut samples_at],
            )?;
            let pages = u32::try_from(section.fences.len()).ok()?;
            let end = section.first_page.checked_add(pages)?;
            if end > self.page_count {
                return None;
            }
            section.file_pages = self.page_count;
            sections.push(section);
        }
        Some(sections)
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
    let first_page = get_u32(bytes, row + 56)?;
    first_page.checked_add(narrow(page_count))?;
    let fences = take(fences_at, 8, page_count)?;
    let ranges = take(ranges_at, RANGE_BYTES, range_count)?;
    let samples = take(samples_at, SAMPLE_BYTES, sample_count)?;
    Some(SectionTable {
        name: SectionName {
            history: HistoryId(array(bytes, row)?),
            disk: DiskId(array(bytes, row + 16)?),
            is_base_part: *bytes.get(row + 72)? == 1,
        },
        first_page,
        file_pages: 0,
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
