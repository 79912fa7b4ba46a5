//! Where a branch has data: what the store says, with what is only in memory laid over it.

use core::ops::Range;
use std::sync::Arc;

use afterimage_blockdev::{BlockCompleter, BlockCompletion, BlockOutcome, Extent, ExtentKind};

/// Byte ranges, sorted and disjoint, that are of one kind whatever lies below.
pub(super) struct Layer {
    pub(super) kind: ExtentKind,
    pub(super) ranges: Vec<Range<u64>>,
}

impl Layer {
    /// Of ranges in any order, cut to `within`.
    pub(super) fn new(
        kind: ExtentKind,
        ranges: impl Iterator<Item = Range<u64>>,
        within: &Range<u64>,
    ) -> Self {
        let cut = |range: Range<u64>| range.start.max(within.start)..range.end.min(within.end);
        let mut sorted: Vec<Range<u64>> = ranges
            .map(cut)
            .filter(|range| range.start < range.end)
            .collect();
        sorted.sort_unstable_by_key(|range| range.start);
        let mut joined: Vec<Range<u64>> = Vec::new();
        for range in sorted {
            match joined.last_mut() {
                Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
                _ => joined.push(range),
            }
        }
        Self {
            kind,
            ranges: joined,
        }
    }

    fn over(&self, below: &[Extent]) -> Vec<Extent> {
        let mut extents = Vec::with_capacity(below.len() + 2 * self.ranges.len());
        let mut mine = self.ranges.iter().peekable();
        for extent in below {
            let (mut at, end) = (extent.offset, extent.offset + extent.length);
            while at < end {
                while mine.next_if(|range| range.end <= at).is_some() {}
                let (to, kind) = match mine.peek() {
                    Some(range) if range.start <= at => (range.end.min(end), self.kind),
                    Some(range) => (range.start.min(end), extent.kind),
                    None => (end, extent.kind),
                };
                push(&mut extents, at..to, kind);
                at = to;
            }
        }
        extents
    }
}

fn push(extents: &mut Vec<Extent>, range: Range<u64>, kind: ExtentKind) {
    let length = range.end - range.start;
    match extents.last_mut() {
        Some(last) if last.kind == kind && last.offset + last.length == range.start => {
            last.length += length;
        }
        _ => extents.push(Extent {
            offset: range.start,
            length,
            kind,
        }),
    }
}

/// Lays what was in memory over the store's answer, the last layer on top.
pub(super) struct LaidOver {
    pub(super) layers: Vec<Layer>,
    pub(super) to: Arc<dyn BlockCompleter>,
}

impl BlockCompleter for LaidOver {
    fn complete(&self, completion: BlockCompletion) {
        let BlockCompletion { token, result } = completion;
        let result = result.map(|outcome| match outcome {
            BlockOutcome::Extents(below) => {
                let laid = self
                    .layers
                    .iter()
                    .fold(below, |below, layer| layer.over(&below));
                BlockOutcome::Extents(laid)
            }
            other => other,
        });
        self.to.complete(BlockCompletion { token, result });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(extents: &[Extent]) -> Vec<(u64, u64, bool)> {
        let shown = extents
            .iter()
            .map(|e| (e.offset, e.length, e.kind == ExtentKind::Data));
        shown.collect()
    }

    #[test]
    fn the_upper_layer_wins_and_neighbours_are_joined() {
        let below = [
            Extent {
                offset: 0,
                length: 100,
                kind: ExtentKind::Data,
            },
            Extent {
                offset: 100,
                length: 100,
                kind: ExtentKind::Zero,
            },
        ];
        let within = 0..200;
        let holes = Layer::new(ExtentKind::Zero, [50..120, 10..20].into_iter(), &within);
        let laid = holes.over(&below);
        assert_eq!(
            kinds(&laid),
            [
                (0, 10, true),
                (10, 10, false),
                (20, 30, true),
                (50, 150, false)
            ]
        );
        let data = Layer::new(ExtentKind::Data, [190..400, 60..70].into_iter(), &within);
        assert_eq!(
            kinds(&data.over(&laid)),
            [
                (0, 10, true),
                (10, 10, false),
                (20, 30, true),
                (50, 10, false),
                (60, 10, true),
                (70, 120, false),
                (190, 10, true)
            ]
        );
    }
}
