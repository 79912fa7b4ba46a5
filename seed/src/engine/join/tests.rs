//! What is left after joining shows the same at every root, and nothing is left that no root needs.

use afterimage_blockdev::{CELL_BLOCKS, CellIndex, Lsn, SegmentId, SlotIndex};
use proptest::collection::vec;
use proptest::prelude::*;

use super::{Sieve, keep_ranges};
use crate::engine::roots::Roots;
use crate::entry::{Entry, EntryKind, RangeEntry};

const CELLS: u64 = 6;

fn entry() -> impl Strategy<Value = Entry> {
    let kinds = prop_oneof![
        4 => Just(EntryKind::Data),
        2 => Just(EntryKind::Bulk),
        1 => Just(EntryKind::Zero),
        1 => Just(EntryKind::Discard),
    ];
    (0..CELLS, 1..60u64, 1..16u8, kinds).prop_map(|(cell, lsn, mask, kind)| Entry {
        cell: CellIndex(cell),
        lsn: Lsn(lsn),
        mask,
        first: 0,
        kind,
        segment: SegmentId(0),
        slot: SlotIndex(0),
    })
}

fn range() -> impl Strategy<Value = RangeEntry> {
    (0..CELLS, 1..CELLS, 1..60u64).prop_map(|(first, count, lsn)| RangeEntry {
        first: CellIndex(first),
        count,
        lsn: Lsn(lsn),
        kind: EntryKind::Zero,
    })
}

/// What each block shows at an LSN: the LSN and kind of its version, and the slot.
fn shown(entries: &[Entry], ranges: &[RangeEntry], at: Lsn) -> Vec<(Lsn, EntryKind, u32)> {
    let mut blocks = Vec::new();
    for cell in 0..CELLS {
        for within in 0..CELL_BLOCKS {
            let bit = 1 << within;
            let of_entries = entries
                .iter()
                .filter(|e| e.cell.0 == cell && e.mask & bit != 0 && e.lsn <= at)
                .map(|e| (e.lsn, e.kind, e.slot.0));
            let of_ranges = ranges
                .iter()
                .filter(|r| r.first.0 <= cell && cell < r.first.0 + r.count && r.lsn <= at)
                .map(|r| (r.lsn, r.kind, u32::MAX));
            let newest = of_entries.chain(of_ranges).max();
            blocks.push(newest.unwrap_or((Lsn::ZERO, EntryKind::Zero, 0)));
        }
    }
    blocks
}

/// One record is about a block at most once: of a cell and LSN the first entry stays.
fn distinct(entries: Vec<Entry>, ranges: &[RangeEntry]) -> Vec<Entry> {
    let mut kept: Vec<Entry> = Vec::new();
    for entry in entries {
        let is_known = kept
            .iter()
            .any(|known| known.cell == entry.cell && known.lsn == entry.lsn);
        let is_of_range = ranges.iter().any(|range| range.lsn == entry.lsn);
        if !is_known && !is_of_range {
            let slot = SlotIndex(u32::try_from(kept.len()).unwrap());
            kept.push(Entry { slot, ..entry });
        }
    }
    kept.sort_by_key(Entry::key);
    kept
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn every_root_shows_the_same_and_nothing_else_stays(
        entries in vec(entry(), 0..60),
        ranges in vec(range(), 0..6),
        mut at in vec((1..60u64).prop_map(Lsn), 0..5),
        window in 1..70u64,
    ) {
        let mut ranges = ranges;
        ranges.sort_by_key(|range| range.lsn);
        ranges.dedup_by_key(|range| range.lsn);
        let entries = distinct(entries, &ranges);
        at.retain(|root| root.0 < window);
        at.sort();
        let roots = Roots::new(at.clone(), Lsn(window));
        let mut sieve = Sieve::new(roots.clone(), &ranges);
        let kept: Vec<Entry> = entries.iter().copied().filter(|e| sieve.keeps(e)).collect();
        let kept_ranges = keep_ranges(ranges.clone(), &roots);
        let windowed = (window..75).map(Lsn);
        let all_roots: Vec<Lsn> = at.into_iter().chain(windowed).collect();
        for root in &all_roots {
            let before = shown(&entries, &ranges, *root);
            prop_assert_eq!(before, shown(&kept, &kept_ranges, *root), "at {}", root);
        }
        for entry in &kept {
            let is_shown = all_roots.iter().any(|root| {
                let blocks = shown(&entries, &ranges, *root);
                blocks.iter().any(|(_, _, slot)| *slot == entry.slot.0)
            });
            prop_assert!(is_shown, "{:?} is shown nowhere", entry);
        }
    }
}
