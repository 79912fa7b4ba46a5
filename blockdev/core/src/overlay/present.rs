//! Which blocks of a device are in the overlay: a bitmap whose pages exist when a bit is set.

use core::ops::Range;

use parking_lot::RwLock;

const WORD_BITS: u64 = 64;
const LEAF_WORDS: usize = 512;
const LEAF_BITS: u64 = LEAF_WORDS as u64 * WORD_BITS;

struct Bits {
    leaves: Vec<Option<Box<[u64; LEAF_WORDS]>>>,
    count: u64,
}

/// The bitmap: 4 KiB of memory for each 128 MiB of disk that were written to.
pub(super) struct Present {
    bits: RwLock<Bits>,
}

/// Leaf, word and bit of a block.
fn place(block: u64) -> (usize, usize, u64) {
    let within = block % LEAF_BITS;
    let index = |value: u64| usize::try_from(value).expect("index within the address space");
    (
        index(block / LEAF_BITS),
        index(within / WORD_BITS),
        1 << (within % WORD_BITS),
    )
}

impl Bits {
    fn is_set(&self, block: u64) -> bool {
        let (leaf, word, bit) = place(block);
        self.leaves[leaf]
            .as_ref()
            .is_some_and(|leaf| leaf[word] & bit != 0)
    }

    /// End of the run of equal bits that begins at a block, as far as `end`.
    fn run_end(&self, block: u64, end: u64) -> u64 {
        let is_set = self.is_set(block);
        let mut at = block + 1;
        while at < end {
            let (leaf, word, _) = place(at);
            let step = match &self.leaves[leaf] {
                None if is_set => return at,
                None => LEAF_BITS - at % LEAF_BITS,
                Some(leaf) => {
                    let other = if is_set { !leaf[word] } else { leaf[word] };
                    let ahead = other >> (at % WORD_BITS);
                    if ahead != 0 {
                        return (at + u64::from(ahead.trailing_zeros())).min(end);
                    }
                    WORD_BITS - at % WORD_BITS
                }
            };
            at += step;
        }
        at.min(end)
    }
}

impl Present {
    pub(super) fn new(blocks: u64) -> Self {
        let leaves = place(blocks + LEAF_BITS - 1).0;
        let bits = Bits {
            leaves: (0..leaves).map(|_| None).collect(),
            count: 0,
        };
        Self {
            bits: RwLock::new(bits),
        }
    }

    pub(super) fn is_present(&self, block: u64) -> bool {
        self.bits.read().is_set(block)
    }

    /// Number of blocks present.
    pub(super) fn count(&self) -> u64 {
        self.bits.read().count
    }

    pub(super) fn mark(&self, blocks: Range<u64>) {
        let mut bits = self.bits.write();
        let mut at = blocks.start;
        while at < blocks.end {
            let (leaf, word, first) = place(at);
            let end = ((at / WORD_BITS + 1) * WORD_BITS).min(blocks.end);
            // From the first bit up, as many as there are blocks in this word.
            let mask = (u64::MAX >> (WORD_BITS - (end - at))) * first;
            let leaf = bits.leaves[leaf].get_or_insert_with(|| Box::new([0; LEAF_WORDS]));
            let added = (mask & !leaf[word]).count_ones();
            leaf[word] |= mask;
            bits.count += u64::from(added);
            at = end;
        }
    }

    /// Divides blocks into runs: present or not, and which.
    pub(super) fn runs(&self, blocks: Range<u64>) -> Vec<(bool, Range<u64>)> {
        let bits = self.bits.read();
        let mut runs = Vec::new();
        let mut at = blocks.start;
        while at < blocks.end {
            let end = bits.run_end(at, blocks.end);
            runs.push((bits.is_set(at), at..end));
            at = end;
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_what_was_asked_in_order() {
        let present = Present::new(3 * LEAF_BITS + 1);
        assert_eq!(
            present.runs(0..3 * LEAF_BITS + 1),
            [(false, 0..3 * LEAF_BITS + 1)]
        );
        present.mark(5..7);
        present.mark(LEAF_BITS * 2 - 1..LEAF_BITS * 2 + 1);
        present.mark(5..7);
        assert_eq!(present.count(), 4);
        assert_eq!(
            present.runs(4..3 * LEAF_BITS),
            [
                (false, 4..5),
                (true, 5..7),
                (false, 7..LEAF_BITS * 2 - 1),
                (true, LEAF_BITS * 2 - 1..LEAF_BITS * 2 + 1),
                (false, LEAF_BITS * 2 + 1..3 * LEAF_BITS),
            ]
        );
        assert!(present.runs(9..9).is_empty());
    }

    #[test]
    fn marks_and_runs_are_those_of_single_bits() {
        const BLOCKS: u64 = LEAF_BITS + 300;
        let mut random = crate::random::Random::new(5);
        for _ in 0..50 {
            let present = Present::new(BLOCKS);
            let mut model = vec![false; usize::try_from(BLOCKS).unwrap()];
            for _ in 0..random.below(20) {
                let start = LEAF_BITS - 200 + random.below(400);
                let end = (start + random.below(200)).min(BLOCKS);
                present.mark(start..end);
                for block in start..end {
                    model[usize::try_from(block).unwrap()] = true;
                }
            }
            let mut at = 0;
            let mut last = None;
            for (is_present, run) in present.runs(0..BLOCKS) {
                assert!(run.start == at && run.end > at && last != Some(is_present));
                for block in run.clone() {
                    assert_eq!(model[usize::try_from(block).unwrap()], is_present);
                }
                (at, last) = (run.end, Some(is_present));
            }
            assert_eq!(at, BLOCKS);
            assert_eq!(
                present.count(),
                model.iter().filter(|bit| **bit).count() as u64
            );
        }
    }
}
