use super::*;

const MIB: u64 = 1 << 20;

#[test]
fn chunks_begin_at_multiples() {
    assert_eq!(
        chunks(&(MIB / 2..3 * MIB), MIB),
        [MIB / 2..MIB, MIB..2 * MIB, 2 * MIB..3 * MIB]
    );
    assert_eq!(chunks(&(0..0), MIB), []);
}

#[test]
fn runs_of_differences_are_joined() {
    let differs = [true, true, false, true, false];
    assert_eq!(runs(&differs, 8192), [8192..16384, 20480..24576]);
    assert_eq!(runs(&[false; 5], 0), []);
}

#[test]
fn zero_cells_are_left_out() {
    let mut bytes = vec![0; 5 * CELL_BYTES];
    bytes[CELL_BYTES + 5] = 1;
    bytes[2 * CELL_BYTES] = 1;
    bytes[5 * CELL_BYTES - 1] = 1;
    let parts = without_zero_cells(&bytes, 10 * CELL);
    assert_eq!(parts, [11 * CELL..13 * CELL, 14 * CELL..15 * CELL]);
    // A range that begins within a cell.
    let parts = without_zero_cells(&bytes[BLOCK_BYTES..], 10 * CELL + BLOCK);
    assert_eq!(parts[0].start % CELL, 0);
    assert_eq!(without_zero_cells(&[0; BLOCK_BYTES], 0), []);
}
