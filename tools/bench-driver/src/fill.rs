//! The data that every write of the benchmark carries.

use afterimage_blockdev::Random;

/// As in fio: each unit is random in its first half and zero in the second, which is what
/// `buffer_compress_percentage=50` means there.
const UNIT_BYTES: usize = 512;

/// Fills whole units with half-compressible data that was never written before.
pub(crate) fn half_compressible(random: &mut Random, bytes: &mut [u8]) {
    for unit in bytes.chunks_mut(UNIT_BYTES) {
        let (noise, rest) = unit.split_at_mut(unit.len() / 2);
        random.fill(noise);
        rest.fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_each_unit_is_zero_and_no_two_blocks_are_equal() {
        let mut random = Random::new(1);
        let (mut one, mut two) = (vec![1; 4096], vec![1; 4096]);
        half_compressible(&mut random, &mut one);
        half_compressible(&mut random, &mut two);
        assert_ne!(one, two);
        for unit in one.chunks(UNIT_BYTES) {
            assert!(unit[UNIT_BYTES / 2..].iter().all(|byte| *byte == 0));
            assert!(unit[..UNIT_BYTES / 2].iter().any(|byte| *byte != 0));
        }
    }
}
