//! What a pass over all runs finds: which slots of which segments are needed, and what of the map
//! has no slot.

use std::collections::BTreeMap;

use afterimage_blockdev::{HistoryId, SegmentId};

use super::account::Draft;
use super::join::Life;
use super::rest::Rest;
use crate::entry::{Entry, RangeEntry};
use crate::run::{SectionName, TimeSample};

/// A bit for each slot of a segment.
#[derive(Clone, Debug, Default)]
pub(super) struct LiveSlots {
    bits: Vec<u64>,
    count: u32,
}

impl LiveSlots {
    fn mark(&mut self, slot: u32) {
        let place = usize::try_from(slot / 64).unwrap_or(usize::MAX);
        if self.bits.len() <= place {
            self.bits.resize(place + 1, 0);
        }
        let bit = 1 << (slot % 64);
        self.count += u32::from(self.bits[place] & bit == 0);
        self.bits[place] |= bit;
    }

    /// Says whether a slot is needed.
    pub(super) fn has(&self, slot: u32) -> bool {
        let word = usize::try_from(slot / 64).ok();
        let word = word.and_then(|place| self.bits.get(place));
        word.is_some_and(|word| word & (1 << (slot % 64)) != 0)
    }

    /// Number of slots that are needed.
    pub(super) fn count(&self) -> u32 {
        self.count
    }
}

/// The needed slots of the segments that a sweep was asked about; of others nothing is noted.
#[derive(Debug, Default)]
pub(super) struct LiveMap {
    segments: BTreeMap<SegmentId, LiveSlots>,
    rest: Rest,
    account: Draft,
    /// What the entries in hand are of.
    of: Option<SectionName>,
}

impl LiveMap {
    /// The runs hold all commits of the log up to `through`.
    pub(super) fn new(
        through: u64,
        segments: impl IntoIterator<Item = SegmentId>,
        account: Draft,
    ) -> Self {
        let empty = |segment| (segment, LiveSlots::default());
        Self {
            segments: segments.into_iter().map(empty).collect(),
            rest: Rest::new(through),
            account,
            of: None,
        }
    }

    /// Goes on to the entries of a disk, with its ranges that are needed.
    pub(super) fn begin(&mut self, name: SectionName, ranges: &[RangeEntry]) {
        self.of = Some(name);
        self.rest.begin(name, ranges);
    }

    /// Notes an entry that is needed.
    pub(super) fn note(&mut self, entry: &Entry, life: Life) {
        if let Some(of) = self.of {
            self.account.add(of.history, of.disk, entry, life);
        }
        if !entry.kind.has_slot() {
            self.rest.push(*entry);
        } else if let Some(slots) = self.segments.get_mut(&entry.segment) {
            slots.mark(entry.slot.0);
        }
    }

    /// Notes the times of a history.
    pub(super) fn times(&mut self, history: HistoryId, samples: &[TimeSample]) {
        self.rest.times(history, samples);
    }

    pub(super) fn take_rest(&mut self) -> Rest {
        core::mem::take(&mut self.rest)
    }

    pub(super) fn take_account(&mut self) -> Draft {
        core::mem::take(&mut self.account)
    }

    /// The number of needed slots of a segment; `None` when the sweep was not asked about it.
    pub(super) fn count_of(&self, segment: SegmentId) -> Option<u32> {
        self.segments.get(&segment).map(LiveSlots::count)
    }

    pub(super) fn into_segments(self) -> BTreeMap<SegmentId, LiveSlots> {
        self.segments
    }
}
