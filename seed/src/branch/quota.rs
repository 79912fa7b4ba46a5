//! How much of a branch is its own, and how much of it may be.
//!
//! Invariants
//! * A block is a branch's own while the newest thing that the branch says of it is data; blocks
//!   that it made zero or gave up are not.
//! * `used` is the number of own blocks in bytes. A write that would bring it above the limit
//!   changes nothing.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use afterimage_blockdev::BLOCK_BYTES;

/// Blocks of a word, and words of a region of 2 MiB.
const WORD_BLOCKS: u64 = 64;
const REGION_WORDS: usize = 8;
const REGION_BLOCKS: u64 = WORD_BLOCKS * REGION_WORDS as u64;

/// What a branch uses and may use. Shared with whoever shows or sets it.
#[derive(Debug)]
pub struct Usage {
    limit_bytes: AtomicU64,
    used_bytes: AtomicU64,
}

impl Usage {
    /// Nothing is used; without a limit as much may be as the disk is large.
    #[must_use]
    pub fn new(limit_bytes: Option<u64>) -> Self {
        Self {
            limit_bytes: AtomicU64::new(limit_bytes.unwrap_or(u64::MAX)),
            used_bytes: AtomicU64::new(0),
        }
    }

    /// Bytes of the branch's own blocks.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// The most that it may have, if there is a limit.
    #[must_use]
    pub fn limit_bytes(&self) -> Option<u64> {
        Some(self.limit_bytes.load(Ordering::Relaxed)).filter(|limit| *limit != u64::MAX)
    }

    /// Sets the limit. One below what is used keeps every block that is there.
    pub fn set_limit(&self, limit_bytes: Option<u64>) {
        self.limit_bytes
            .store(limit_bytes.unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

/// Which blocks are a branch's own. One word of memory for 256 KiB, of regions that it wrote to.
#[derive(Debug, Default)]
pub(crate) struct OwnBlocks {
    regions: BTreeMap<u64, [u64; REGION_WORDS]>,
    count: u64,
}

/// The bits of a range of blocks, word by word: region, word, mask.
fn masks(first: u64, count: u64) -> impl Iterator<Item = (u64, usize, u64)> {
    let end = first + count;
    let mut at = first;
    core::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let within = at % WORD_BLOCKS;
        let length = (WORD_BLOCKS - within).min(end - at);
        let mask = (u64::MAX >> (WORD_BLOCKS - length)) << within;
        let word = usize::try_from(at % REGION_BLOCKS / WORD_BLOCKS).unwrap_or(0);
        let region = at / REGION_BLOCKS;
        at += length;
        Some((region, word, mask))
    })
}

impl OwnBlocks {
    /// Own blocks in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.count * BLOCK_BYTES as u64
    }

    fn missing(&self, first: u64, count: u64) -> u64 {
        let missing = masks(first, count).map(|(region, word, mask)| {
            let known = self.regions.get(&region).map_or(0, |words| words[word]);
            u64::from((mask & !known).count_ones())
        });
        missing.sum()
    }

    /// Adds blocks.
    pub(crate) fn add(&mut self, first: u64, count: u64) {
        for (region, word, mask) in masks(first, count) {
            let words = self.regions.entry(region).or_default();
            self.count += u64::from((mask & !words[word]).count_ones());
            words[word] |= mask;
        }
    }

    /// Removes blocks. Costs as much as there are own regions among them.
    pub(crate) fn remove(&mut self, first: u64, count: u64) {
        let end = first.saturating_add(count);
        let last = end.div_ceil(REGION_BLOCKS);
        let regions = self.regions.range_mut(first / REGION_BLOCKS..last);
        let mut gone = 0;
        for (region, words) in regions {
            let from = first.max(region * REGION_BLOCKS);
            let to = end.min((region + 1) * REGION_BLOCKS);
            for (_, word, mask) in masks(from, to.saturating_sub(from)) {
                gone += u64::from((mask & words[word]).count_ones());
                words[word] &= !mask;
            }
        }
        self.count -= gone;
    }
}

/// The books of one open branch.
#[derive(Debug)]
pub(super) struct Account {
    usage: std::sync::Arc<Usage>,
    own: OwnBlocks,
}

impl Account {
    pub(super) fn new(usage: std::sync::Arc<Usage>, own: OwnBlocks) -> Self {
        usage.used_bytes.store(own.bytes(), Ordering::Relaxed);
        Self { usage, own }
    }

    /// Takes blocks; says whether the limit allows it.
    pub(super) fn take(&mut self, first: u64, count: u64) -> bool {
        let limit = self.usage.limit_bytes.load(Ordering::Relaxed);
        let more = self.own.missing(first, count) * BLOCK_BYTES as u64;
        if more > 0 && self.own.bytes().saturating_add(more) > limit {
            return false;
        }
        self.own.add(first, count);
        self.note();
        true
    }

    /// Gives blocks back.
    pub(super) fn give(&mut self, first: u64, count: u64) {
        self.own.remove(first, count);
        self.note();
    }

    fn note(&self) {
        self.usage
            .used_bytes
            .store(self.own.bytes(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_write_above_the_limit_changes_nothing_and_a_rewrite_costs_nothing() {
        let usage = Arc::new(Usage::new(Some(3 * BLOCK_BYTES as u64)));
        let mut account = Account::new(Arc::clone(&usage), OwnBlocks::default());
        assert!(account.take(10, 2));
        assert!(!account.take(11, 3), "two more are one too many");
        assert_eq!(usage.used_bytes(), 2 * BLOCK_BYTES as u64);
        assert!(account.take(11, 2) && account.take(10, 3));
        account.give(0, u64::MAX);
        assert_eq!(usage.used_bytes(), 0);
        usage.set_limit(Some(0));
        assert!(!account.take(0, 1));
        usage.set_limit(None);
        assert!(account.take(0, 100_000));
    }

    proptest! {
        #[test]
        fn counts_as_a_set_does(steps in prop::collection::vec(
            (any::<bool>(), 0u64..3000, 0u64..1500), 1..40)
        ) {
            let (mut own, mut model) = (OwnBlocks::default(), BTreeSet::new());
            for (adds, first, count) in steps {
                let missing = (first..first + count).filter(|block| !model.contains(block));
                prop_assert_eq!(own.missing(first, count), missing.count() as u64);
                if adds {
                    own.add(first, count);
                    model.extend(first..first + count);
                } else {
                    own.remove(first, count);
                    model.retain(|block| !(first..first + count).contains(block));
                }
                prop_assert_eq!(own.bytes(), (model.len() * BLOCK_BYTES) as u64);
            }
        }
    }
}
