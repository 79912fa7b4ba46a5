//! Which slots of which segments are needed.

use std::collections::BTreeMap;

use afterimage_blockdev::SegmentId;

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
}

impl LiveMap {
    pub(super) fn new(segments: impl IntoIterator<Item = SegmentId>) -> Self {
        let empty = |segment| (segment, LiveSlots::default());
        Self {
            segments: segments.into_iter().map(empty).collect(),
        }
    }

    pub(super) fn mark(&mut self, segment: SegmentId, slot: u32) {
        if let Some(slots) = self.segments.get_mut(&segment) {
            slots.mark(slot);
        }
    }

    pub(super) fn into_segments(self) -> BTreeMap<SegmentId, LiveSlots> {
        self.segments
    }
}
