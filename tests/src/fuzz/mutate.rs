//! Ways to change bytes.

use afterimage_blockdev::Random;

/// Numbers at which lengths, counts and places go wrong.
const EXTREMES: [u64; 26] = [
    0,
    1,
    2,
    7,
    8,
    9,
    127,
    128,
    255,
    256,
    0x7fff,
    0xffff,
    4095,
    4096,
    4097,
    16 << 20,
    64 << 20,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 2,
    (1 << 32) - 1,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    u64::MAX - 1,
    u64::MAX,
];
/// Lengths of the structures that are known here.
const BLOCKS: [usize; 10] = [1, 4, 8, 16, 24, 32, 80, 128, 160, 4096];
const SECTOR: usize = 4096;

/// Changes `bytes` in one to four ways; they at most double, and get 8 KiB more. `other` is another
/// legal encoding, to splice with.
pub(super) fn mutate(bytes: &mut Vec<u8>, other: &[u8], words: &[&str], random: &mut Random) {
    let most = 2 * bytes.len() + 2 * SECTOR;
    for _ in 0..[1, 1, 1, 2, 2, 3, 4][random.index(7)] {
        change(bytes, other, words, random);
    }
    bytes.truncate(most);
}

fn change(bytes: &mut Vec<u8>, other: &[u8], words: &[&str], random: &mut Random) {
    if bytes.is_empty() {
        return extend(bytes, other, random);
    }
    if !words.is_empty() && random.chance(0.3) {
        return put_word(bytes, words[random.index(words.len())], random);
    }
    match random.below(16) {
        0 | 1 => {
            let at = place(bytes, 1, random);
            bytes[at] ^= 1 << random.below(8);
        }
        2 => {
            let at = place(bytes, 1, random);
            random.fill(&mut bytes[at..=at]);
        }
        3 | 4 => nudge(bytes, random),
        5..=8 => put_number(bytes, random),
        9 => splice(bytes, other, random),
        10 => bytes.truncate(random.index(bytes.len())),
        11 => extend(bytes, other, random),
        12 => repeat(bytes, random),
        13 => copy_over(bytes, random),
        14 => {
            let (at, len) = range(bytes, random);
            bytes[at..at + len].fill([0, 0, 0xff][random.index(3)]);
        }
        _ => {
            let (at, len) = range(bytes, random);
            bytes.drain(at..at + len);
        }
    }
}

/// A place where a change is likely to matter: not amid padding, and rather in the first bytes of
/// a sector, where the fixed fields are, than in the content.
fn place(bytes: &[u8], alignment: usize, random: &mut Random) -> usize {
    let anywhere = |random: &mut Random| {
        let at = if bytes.len() > SECTOR && random.chance(0.6) {
            let sector = random.index(bytes.len().div_ceil(SECTOR)) * SECTOR;
            (sector + random.index(192)).min(bytes.len() - 1)
        } else {
            random.index(bytes.len())
        };
        at - at % alignment
    };
    let mut at = anywhere(random);
    for _ in 0..6 {
        let end = (at + alignment).min(bytes.len());
        if bytes[at..end].iter().any(|byte| *byte != 0) {
            break;
        }
        at = anywhere(random);
    }
    at
}

fn range(bytes: &[u8], random: &mut Random) -> (usize, usize) {
    let len = BLOCKS[random.index(BLOCKS.len())].min(bytes.len());
    let at = place(bytes, len.min(8), random);
    (at, len.min(bytes.len() - at))
}

fn nudge(bytes: &mut [u8], random: &mut Random) {
    let at = place(bytes, 1, random);
    let by = [1, 1, 8, 16, 64][random.index(5)];
    bytes[at] = if random.chance(0.5) {
        bytes[at].wrapping_add(by)
    } else {
        bytes[at].wrapping_sub(by)
    };
}

/// Writes an extreme number where one may stand: of 1, 2, 4 or 8 bytes.
fn put_number(bytes: &mut [u8], random: &mut Random) {
    let width = [1, 2, 4, 4, 8, 8][random.index(6)];
    let at = place(bytes, width, random);
    let value = match random.below(4) {
        0 => (bytes.len() as u64)
            .wrapping_add(random.below(17))
            .wrapping_sub(8),
        _ => EXTREMES[random.index(EXTREMES.len())],
    };
    let end = (at + width).min(bytes.len());
    bytes[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
}

/// Goes on as another encoding does.
fn splice(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let at = place(bytes, 8, random);
    let from = if random.chance(0.5) {
        at.min(other.len())
    } else {
        random.index(other.len() + 1)
    };
    bytes.truncate(at);
    bytes.extend_from_slice(&other[from..]);
}

fn extend(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let len = BLOCKS[random.index(BLOCKS.len())];
    match random.below(3) {
        0 => bytes.resize(bytes.len() + len, 0),
        1 => {
            let end = bytes.len();
            bytes.resize(end + len, 0);
            random.fill(&mut bytes[end..]);
        }
        _ => bytes.extend_from_slice(&other[..other.len().min(64 << 10)]),
    }
}

/// The same structure a second time.
fn repeat(bytes: &mut Vec<u8>, random: &mut Random) {
    let (at, len) = range(bytes, random);
    let again = bytes[at..at + len].to_vec();
    bytes.splice(at..at, again);
}

/// One structure in the place of another.
fn copy_over(bytes: &mut [u8], random: &mut Random) {
    let (from, len) = range(bytes, random);
    let to = place(bytes, len.min(8), random);
    let len = len.min(bytes.len() - to);
    bytes.copy_within(from..from + len, to);
}

fn put_word(bytes: &mut Vec<u8>, word: &str, random: &mut Random) {
    let at = random.index(bytes.len() + 1);
    let end = if random.chance(0.5) {
        at
    } else {
        (at + word.len()).min(bytes.len())
    };
    bytes.splice(at..end, word.bytes());
}
