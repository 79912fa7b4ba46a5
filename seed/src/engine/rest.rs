//! What of the map no slot tells of: zeroes, discards, and the times of LSNs. Gathered in a pass
//! over all runs, and laid out as a run for the notes.
//!
//! Invariants
//! * It is gathered whole or not at all: what is too much is dropped, and said so.

use afterimage_blockdev::{DiskId, HistoryId, IoBuffer, Lsn, StoreId};

use crate::entry::{Entry, RangeEntry};
use crate::run::{RunId, SectionContent, SectionName, TimeSample, encode_run};

/// Entries, ranges and samples that are held at most: about 100 MB.
const HELD_MAX: usize = 4 << 20;

/// What was gathered.
#[derive(Debug, Default)]
pub(super) struct Rest {
    /// Commit of the log up to which it holds all.
    pub(super) through: u64,
    sections: Vec<SectionContent>,
    held: usize,
}

impl Rest {
    pub(super) fn new(through: u64) -> Self {
        Self {
            through,
            ..Self::default()
        }
    }

    /// Goes on to a disk of a history.
    pub(super) fn begin(&mut self, name: SectionName, ranges: &[RangeEntry]) {
        self.add(name, ranges.to_vec(), Vec::new());
    }

    /// Adds an entry of the disk in hand. They come sorted.
    pub(super) fn push(&mut self, entry: Entry) {
        self.held += 1;
        if self.held > HELD_MAX {
            self.sections = Vec::new();
        } else if let Some(section) = self.sections.last_mut() {
            section.entries.push(entry);
        }
    }

    /// Adds the times of a history.
    pub(super) fn times(&mut self, history: HistoryId, samples: &[TimeSample]) {
        let disk = DiskId::NIL;
        let is_base_part = false;
        let name = SectionName {
            history,
            disk,
            is_base_part,
        };
        self.add(name, Vec::new(), samples.to_vec());
    }

    fn add(&mut self, name: SectionName, ranges: Vec<RangeEntry>, timeline: Vec<TimeSample>) {
        self.held += ranges.len() + timeline.len();
        self.sections.push(SectionContent {
            name,
            entries: Vec::new(),
            ranges,
            timeline,
            low: Lsn::ZERO,
            high: Lsn::ZERO,
        });
        if self.held > HELD_MAX {
            self.sections = Vec::new();
        }
    }

    /// Lays it out as a run; `None` when it was too much to be held.
    pub(super) fn encode(mut self, store: StoreId, run: RunId) -> Option<IoBuffer> {
        if self.held > HELD_MAX {
            return None;
        }
        for section in &mut self.sections {
            let entries = section.entries.iter().map(|entry| entry.lsn);
            let ranges = section.ranges.iter().map(|range| range.lsn);
            let samples = section.timeline.iter().map(|sample| sample.lsn);
            let lsns = || entries.clone().chain(ranges.clone()).chain(samples.clone());
            let low = lsns().min().unwrap_or_default();
            let high = lsns().max().unwrap_or_default();
            (section.low, section.high) = (low, high);
        }
        Some(encode_run(store, run, &self.sections).0)
    }
}
