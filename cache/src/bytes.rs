//! Little-endian fields at fixed places. Reading never panics: what a peer or a disk says is
//! checked for length first.

/// Reads `N` bytes at `at`; `None` beyond the end.
#[must_use]
pub fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// Reads a byte.
#[must_use]
pub fn get_u8(bytes: &[u8], at: usize) -> Option<u8> {
    bytes.get(at).copied()
}

/// Reads a 16-bit integer.
#[must_use]
pub fn get_u16(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_le_bytes)
}

/// Reads a 32-bit integer.
#[must_use]
pub fn get_u32(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

/// Reads a 64-bit integer.
#[must_use]
pub fn get_u64(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}

/// Writes `value` at `at`.
///
/// # Panics
/// When it does not fit: the writer knows its own layout.
pub fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Says whether all of a range is zero; false when it does not exist.
#[must_use]
pub fn is_zero(bytes: &[u8], from: usize, to: usize) -> bool {
    bytes.get(from..to).is_some_and(is_all_zero)
}

/// Says whether all bytes are zero.
#[must_use]
pub fn is_all_zero(bytes: &[u8]) -> bool {
    let (head, middle) = bytes.as_chunks::<16>();
    middle.iter().all(|b| *b == 0) && head.iter().all(|chunk| u128::from_le_bytes(*chunk) == 0)
}

/// A `usize` as a 64-bit integer, which every machine that we support can hold.
#[must_use]
pub fn wide(value: usize) -> u64 {
    value as u64
}

/// A 32-bit integer as an index; every machine that we support has 64-bit addresses.
#[must_use]
pub fn index(value: u32) -> usize {
    value as usize
}

/// A length that the caller has bounded below 4 GiB.
///
/// # Panics
/// When it is not: a broken invariant of ours.
#[must_use]
pub fn narrow(value: usize) -> u32 {
    u32::try_from(value).expect("length bounded below 4 GiB")
}
