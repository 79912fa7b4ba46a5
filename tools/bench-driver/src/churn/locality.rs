//! Where an ordinary server writes.
//!
//! Of all blocks written
//! * 38 % go to a ring of an eighth of the filled part, one after the other, 1 to 16 at once:
//!   journals and write-ahead logs;
//! * 50 % are files, written whole or appended to, 16 to 64 blocks at once, at any place;
//! * 8 % go to hot places: 4 % of the 64 KiB clusters, scattered over the filled part, 1 to 4
//!   blocks at once, the lowest of them the most often (the cube of a uniform number);
//! * 4 % go to warm places: any block of 30 % of the clusters, 1 to 4 at once.
//!
//! The shares were chosen beside recorded traces of a database and of a package upgrade
//! (`tools/bench space.locality`), which wrote 64 and 67 clusters in each 1,000 blocks. This is
//! more scattered and rewrites more, so it flatters nothing.
//!
//! `uniform` is one block at any place.

use afterimage_blockdev::Random;

/// A cluster, in blocks: 64 KiB.
const CLUSTER_BLOCKS: u64 = 16;
/// The ring is one of so many parts.
const RING_PART: u64 = 8;
/// A number without a factor in common with powers of two: it scatters clusters.
const SCATTER: u64 = 0x9e37_79b1;

/// Where the writes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Pattern {
    /// As the module's text says.
    Ordinary,
    /// Anywhere.
    Uniform,
}

/// Blocks that are written at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Run {
    pub(super) first: u64,
    pub(super) count: u64,
}

/// See the module's text.
pub(super) struct Locality {
    pattern: Pattern,
    blocks: u64,
    ring_at: u64,
    random: Random,
}

impl Locality {
    /// For so many blocks, when so many were written before.
    pub(super) fn new(pattern: Pattern, blocks: u64, written: u64) -> Self {
        Self {
            pattern,
            blocks: blocks.max(1),
            ring_at: written / 100 * 38,
            random: Random::new(written.wrapping_add(1)),
        }
    }

    pub(super) fn next(&mut self) -> Run {
        let run = match self.pattern {
            Pattern::Uniform => self.single(self.blocks),
            Pattern::Ordinary => self.ordinary(),
        };
        let first = run.first.min(self.blocks - 1);
        Run {
            first,
            count: run.count.min(self.blocks - first),
        }
    }

    /// Shares are of blocks; long runs come the more rarely. Blocks of a run on average: 8.5 in the
    /// ring, 2.5 in hot and warm places, 40 in files.
    fn ordinary(&mut self) -> Run {
        let clusters = (self.blocks / CLUSTER_BLOCKS).max(1);
        match self.random.below(1052) {
            0..447 => self.ring(),
            447..767 => {
                let hot = (clusters / 25).max(1);
                let place = self.random.below(1 << 20);
                let cubed = (u128::from(place).pow(3) * u128::from(hot)) >> 60;
                self.in_cluster(u64::try_from(cubed).unwrap_or(0), clusters)
            }
            767..927 => {
                let warm = self.random.below((clusters * 3 / 10).max(1));
                self.in_cluster(warm, clusters)
            }
            _ => Run {
                first: self.random.below(self.blocks),
                count: 16 + self.random.below(49),
            },
        }
    }

    fn ring(&mut self) -> Run {
        let ring = (self.blocks / RING_PART).max(1);
        let first = self.ring_at % ring;
        let count = (1 + self.random.below(16)).min(ring - first);
        self.ring_at += count;
        Run { first, count }
    }

    fn in_cluster(&mut self, number: u64, clusters: u64) -> Run {
        let cluster = number.wrapping_add(1).wrapping_mul(SCATTER) % clusters;
        let within = self.random.below(CLUSTER_BLOCKS);
        let count = 1 + self.random.below(4);
        Run {
            first: cluster * CLUSTER_BLOCKS + within,
            count: count.min(CLUSTER_BLOCKS - within),
        }
    }

    fn single(&mut self, blocks: u64) -> Run {
        Run {
            first: self.random.below(blocks),
            count: 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(pattern: Pattern, blocks: u64, count: usize) -> Vec<u64> {
        let mut locality = Locality::new(pattern, blocks, 0);
        let mut written = Vec::new();
        while written.len() < count {
            let Run { first, count } = locality.next();
            assert!(count > 0 && first + count <= blocks);
            written.extend(first..first + count);
        }
        written
    }

    #[test]
    fn shares_are_what_the_text_says() {
        let blocks = 1 << 18;
        let all = written(Pattern::Ordinary, blocks, 400_000);
        // An eighth of all the rest lies in the ring's part as well.
        let in_ring = all.iter().filter(|block| **block < blocks / RING_PART);
        let in_ring = in_ring.count();
        assert!((170_000..196_000).contains(&in_ring), "{in_ring}");
        let clusters = |part: &[u64]| {
            let clusters = part.iter().map(|block| block / CLUSTER_BLOCKS);
            clusters.collect::<std::collections::BTreeSet<_>>().len()
        };
        let of_each: Vec<usize> = all.chunks(1000).map(clusters).collect();
        let mean = of_each.iter().sum::<usize>() / of_each.len();
        assert!((90..140).contains(&mean), "{mean}");
        let uniform = written(Pattern::Uniform, blocks, 400_000);
        let distinct: std::collections::BTreeSet<_> = uniform.iter().collect();
        assert!(distinct.len() > 200_000, "{}", distinct.len());
    }

    #[test]
    fn small_disks_do_not_overflow() {
        for blocks in [1, 2, 17, 255] {
            written(Pattern::Ordinary, blocks, 1000);
        }
    }
}
