//! Arithmetic on sorted, disjoint byte ranges.

use std::ops::Range;

/// Sorts and joins ranges.
#[must_use]
pub fn join(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// What of `from` is not in `taken`, which is sorted and disjoint.
#[must_use]
pub fn subtract(from: &Range<u64>, taken: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left = Vec::new();
    let mut at = from.start;
    for range in taken {
        if range.start >= from.end {
            break;
        }
        if range.start > at {
            left.push(at..range.start);
        }
        at = at.max(range.end);
    }
    if at < from.end {
        left.push(at..from.end);
    }
    left
}

/// Bytes in all.
#[must_use]
pub fn total(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::single_range_in_vec_init)]

    use super::*;

    #[test]
    fn joining_and_subtracting() {
        let joined = join(vec![8..12, 0..4, 4..6, 9..10, 20..20]);
        assert_eq!(joined, [0..6, 8..12]);
        assert_eq!(subtract(&(0..16), &joined), [6..8, 12..16]);
        assert_eq!(subtract(&(2..9), &joined), [6..8]);
        assert_eq!(subtract(&(0..6), &joined), []);
        assert_eq!(total(&joined), 10);
    }
}
