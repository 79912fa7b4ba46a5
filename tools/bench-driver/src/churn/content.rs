//! What a version of a block holds, so that it can be had again without keeping it.

use afterimage_blockdev::Random;

use crate::fill::half_compressible;

/// Keeps the contents of this apart from those of other parts of the benchmark.
const SEED: u64 = 0xc0ff_ee00_5eed_0001;

/// A version of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Version {
    /// What `fill` wrote to a block.
    Filled(u64),
    /// What the record of a log with this number wrote.
    Written(u64),
}

impl Version {
    /// No two versions hold the same.
    pub(super) fn write_to(self, block: &mut [u8]) {
        let number = match self {
            Self::Filled(block) => block << 1,
            Self::Written(record) => (record << 1) | 1,
        };
        let mut random = Random::new(SEED ^ number);
        half_compressible(&mut random, block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_repeats_and_differs_from_all_others() {
        let content = |version: Version| {
            let mut block = vec![0; 4096];
            version.write_to(&mut block);
            block
        };
        assert_eq!(content(Version::Filled(7)), content(Version::Filled(7)));
        assert_ne!(content(Version::Filled(7)), content(Version::Written(7)));
        assert_ne!(content(Version::Written(7)), content(Version::Written(8)));
    }
}
