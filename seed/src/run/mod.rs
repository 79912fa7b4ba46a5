//! Run files: sorted, immutable map entries of an interval of the log, a section for each disk of
//! each history. Base parts, which name bulk blocks, have the same format.
//!
//! ```text
//! | header 4096 | stripe | stripe | ... | tail | tail | footer 4096 | footer 4096 |
//! stripe = | up to 256 entry pages | the same pages again |
//! page   = | hash 8 | count 2 | zero 2 | page number 4 | 170 entries of 24 bytes |
//! tail   = | section table | fences | ranges | timelines | zeroes to 4096 |, one hash over all
//! ```
//!
//! Invariants
//! * Entries of a section are sorted by cell, then newest first.
//! * A fence is the first cell of its page; entries of one cell may span pages.
//! * Pages, tail and footer are there twice: without them nobody knows where a region's blocks are.
//! * Pages of a section follow each other, from stripe to stripe.
//! * The file is whole and synced before the manifest names it, and never changes.

mod page;
mod tail;
mod writer;

use afterimage_blockdev::{CellIndex, DiskId, FileName, HistoryId, Lsn, StoreId, Timestamp};
use afterimage_cache::Damage;
use afterimage_cache::bytes::put;

use crate::entry::{ENTRY_BYTES, Entry, RangeEntry};

pub use page::{Place, decode_page, place_of};
pub use tail::{FOOTERS_BYTES, RunFooter};
pub use writer::{RunWriter, encode_run};

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// Bytes of a page before its entries.
pub const PAGE_HEADER_BYTES: usize = 16;
/// Entries of a full page.
pub const PAGE_ENTRIES: usize = (PAGE_BYTES - PAGE_HEADER_BYTES) / ENTRY_BYTES;
/// Version that this program writes.
pub const RUN_VERSION: u16 = 1;
/// Pages of a whole stripe, copies not counted.
pub const STRIPE_PAGES: u32 = 256;

const _: () = assert!(PAGE_ENTRIES * ENTRY_BYTES + PAGE_HEADER_BYTES == PAGE_BYTES);

const HEADER_MAGIC: &[u8; 8] = b"AIRUNFIL";
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
    let run = RunId(name.base().strip_suffix(".run")?.parse().ok()?);
    // Two names never mean one file.
    (run_file(run).base() == name.base()).then_some(run)
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
    /// Number of all pages of the file, copies not counted.
    pub file_pages: u32,
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

impl SectionTable {
    /// The pages that may hold cells `first..end`, as runs of adjoining ones: first page and count.
    #[must_use]
    pub fn reads(&self, first: CellIndex, end: CellIndex) -> Vec<(u32, u32)> {
        // The page before the first fence at or above `first` may hold it as well.
        let from = self.fences.partition_point(|fence| *fence < first.0);
        let to = self.fences.partition_point(|fence| *fence < end.0);
        let from = from.saturating_sub(1).min(to);
        self.adjoining(from, to)
    }

    /// Pages `from..to` of the section, as runs of adjoining ones.
    #[must_use]
    pub fn adjoining(&self, from: usize, to: usize) -> Vec<(u32, u32)> {
        let place = |place: usize| u32::try_from(place).unwrap_or(u32::MAX);
        let number = |page: usize| self.first_page.saturating_add(place(page));
        let (mut page, end) = (number(from), number(to));
        let mut reads = Vec::new();
        while page < end {
            let count = place_of(page, self.file_pages).adjoining.min(end - page);
            reads.push((page, count.max(1)));
            page += count.max(1);
        }
        reads
    }
}
