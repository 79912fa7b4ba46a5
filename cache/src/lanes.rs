//! BLAKE3 of many messages side by side.
//!
//! One message of a few KiB keeps a quarter of a vector unit busy at best, and a message in two
//! parts less; sixteen messages in step keep all of it busy. What comes out is plain BLAKE3, bit
//! for bit; a test compares every length with the library's own.
//!
//! The library offers its vector code (`platform`) without documentation and without a promise:
//! its version is fixed by the lock file, and a change there fails the build or the test.

use blake3::hazmat::HasherExt;
use blake3::platform::Platform;
use blake3::{BLOCK_LEN, CHUNK_LEN, IncrementCounter, OUT_LEN};

/// Messages in step.
pub(crate) const LANES: usize = 16;

type Words = [u32; 8];
type Chained = [u8; OUT_LEN];

/// The initial value of BLAKE3, which is that of SHA-256.
const IV: Words = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 1 << 1;
const PARENT: u8 = 1 << 2;
const ROOT: u8 = 1 << 3;
const KEYED_HASH: u8 = 1 << 4;

/// A message in two parts; the first is shorter than a chunk.
#[derive(Clone, Copy)]
pub(crate) struct Message<'a> {
    /// What it begins with.
    pub(crate) head: &'a [u8],
    /// What follows.
    pub(crate) rest: &'a [u8],
}

impl<'a> Message<'a> {
    fn len(&self) -> usize {
        self.head.len() + self.rest.len()
    }

    /// The whole chunk of this number, above the first.
    fn chunk(&self, number: usize) -> Option<&'a [u8; CHUNK_LEN]> {
        let start = (number * CHUNK_LEN).checked_sub(self.head.len())?;
        self.rest.get(start..)?.first_chunk()
    }

    /// What is left behind the last whole chunk.
    fn tail(&self) -> &'a [u8] {
        let start = self.len() / CHUNK_LEN * CHUNK_LEN;
        self.rest.get(start - self.head.len()..).unwrap_or(&[])
    }
}

/// Hashes messages in step. Keeps its buffers for the next ones.
pub(crate) struct Lanes {
    platform: Platform,
    hasher: blake3::Hasher,
    key: Words,
    flags: u8,
    /// The first chunk of each message, as one piece.
    firsts: Vec<[u8; CHUNK_LEN]>,
    /// Chaining values of each message on their way up its tree.
    trees: [Vec<Chained>; LANES],
}

impl core::fmt::Debug for Lanes {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Lanes")
    }
}

impl Lanes {
    /// Without a key.
    pub(crate) fn new() -> Self {
        Self::with(blake3::Hasher::new(), IV, 0)
    }

    /// With a key.
    pub(crate) fn keyed(key: &[u8; 32]) -> Self {
        let mut words = [0; 8];
        for (word, bytes) in words.iter_mut().zip(key.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        Self::with(blake3::Hasher::new_keyed(key), words, KEYED_HASH)
    }

    fn with(hasher: blake3::Hasher, key: Words, flags: u8) -> Self {
        Self {
            platform: Platform::detect(),
            hasher,
            key,
            flags,
            firsts: vec![[0; CHUNK_LEN]; LANES],
            trees: [const { Vec::new() }; LANES],
        }
    }

    /// Hashes any number of messages; `each` is told the place and hash of every one, in order.
    pub(crate) fn hash(&mut self, messages: &[Message<'_>], mut each: impl FnMut(usize, Chained)) {
        for (group, messages) in messages.chunks(LANES).enumerate() {
            self.chunks(messages);
            self.tails(messages);
            self.climb();
            for (place, message) in messages.iter().enumerate() {
                let value = self.trees[place].pop();
                let value = value.unwrap_or_else(|| self.small(message));
                each(group * LANES + place, value);
            }
        }
    }

    /// A message that is no longer than a chunk has no tree.
    fn small(&self, message: &Message<'_>) -> Chained {
        let mut hasher = self.hasher.clone();
        hasher.update(message.head).update(message.rest);
        *hasher.finalize().as_bytes()
    }

    /// Whole chunks, each number of all messages together.
    fn chunks(&mut self, messages: &[Message<'_>]) {
        let mut whole_max = 0;
        for (message, first) in messages.iter().zip(&mut self.firsts) {
            if message.len() <= CHUNK_LEN {
                continue;
            }
            whole_max = whole_max.max(message.len() / CHUNK_LEN);
            let (head, rest) = first.split_at_mut(message.head.len());
            head.copy_from_slice(message.head);
            rest.copy_from_slice(&message.rest[..rest.len()]);
        }
        for number in 0..whole_max {
            let mut inputs = Vec::with_capacity(LANES);
            let mut places = Vec::with_capacity(LANES);
            for (place, message) in messages.iter().enumerate() {
                if message.len() <= CHUNK_LEN || message.len() / CHUNK_LEN <= number {
                    continue;
                }
                let chunk = match number {
                    0 => Some(&self.firsts[place]),
                    _ => message.chunk(number),
                };
                inputs.extend(chunk);
                places.push(place);
            }
            let mut values = [0; LANES * OUT_LEN];
            self.platform.hash_many(
                &inputs,
                &self.key,
                number as u64,
                IncrementCounter::No,
                self.flags,
                CHUNK_START,
                CHUNK_END,
                &mut values,
            );
            for (place, value) in places.iter().zip(values.as_chunks().0) {
                self.trees[*place].push(*value);
            }
        }
    }

    /// Last chunks, which are rarely whole.
    fn tails(&mut self, messages: &[Message<'_>]) {
        for (message, values) in messages.iter().zip(&mut self.trees) {
            if values.is_empty() || message.len().is_multiple_of(CHUNK_LEN) {
                continue;
            }
            let mut hasher = self.hasher.clone();
            hasher.set_input_offset((values.len() * CHUNK_LEN) as u64);
            hasher.update(message.tail());
            values.push(hasher.finalize_non_root());
        }
    }

    /// Joins neighbours level by level, all trees together; an odd one goes up as it is.
    fn climb(&mut self) {
        while self.trees.iter().any(|values| values.len() > 1) {
            self.join(self.flags | PARENT, |count| count > 2);
            self.join(self.flags | PARENT | ROOT, |count| count == 2);
        }
    }

    fn join(&mut self, flags: u8, is_due: impl Fn(usize) -> bool) {
        let due = self.trees.iter().filter(|values| is_due(values.len()));
        let pairs: Vec<&[u8; BLOCK_LEN]> = due
            .flat_map(|values| values.as_flattened().as_chunks().0)
            .collect();
        if pairs.is_empty() {
            return;
        }
        let mut joined = vec![0; pairs.len() * OUT_LEN];
        let no = IncrementCounter::No;
        self.platform
            .hash_many(&pairs, &self.key, 0, no, flags, 0, 0, &mut joined);
        let mut joined = joined.as_chunks().0.iter().copied();
        for values in &mut self.trees {
            if !is_due(values.len()) {
                continue;
            }
            let odd = (values.len() % 2 == 1).then(|| values.pop()).flatten();
            let pairs = values.len() / 2;
            values.clear();
            values.extend(joined.by_ref().take(pairs).chain(odd));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(len: usize, salt: usize) -> Vec<u8> {
        let byte = |at: usize| ((at * 31 + salt * 7) % 251).to_le_bytes()[0];
        (0..len).map(byte).collect()
    }

    /// Every number of chunks that a slot can have, and every kind of last chunk.
    fn lengths() -> Vec<usize> {
        let around = |chunks: usize| {
            [
                chunks * CHUNK_LEN,
                chunks * CHUNK_LEN + 1,
                chunks * 1024 + 700,
            ]
        };
        let mut lengths: Vec<usize> = (0..18).flat_map(around).collect();
        lengths.extend([1, 63, 64, 65, 1023, 4096 - 136, 16 * 1024 + 16]);
        lengths
    }

    #[test]
    fn every_length_hashes_as_the_library_hashes_it() {
        let owned: Vec<(Vec<u8>, Vec<u8>)> = lengths()
            .into_iter()
            .enumerate()
            .map(|(salt, len)| (bytes(salt % 3 * 68, salt), bytes(len, salt + 1)))
            .collect();
        let messages: Vec<Message<'_>> = owned
            .iter()
            .map(|(head, rest)| Message { head, rest })
            .collect();
        let key = [9; 32];
        for (mut lanes, plain) in [
            (Lanes::new(), blake3::Hasher::new()),
            (Lanes::keyed(&key), blake3::Hasher::new_keyed(&key)),
        ] {
            for from in [0, 1, messages.len() - 1] {
                let mut count = 0;
                lanes.hash(&messages[from..], |place, value| {
                    let (head, rest) = &owned[from + place];
                    let whole = plain.clone().update(head).update(rest).finalize();
                    assert_eq!(&value, whole.as_bytes(), "message {place} from {from}");
                    assert_eq!(place, count);
                    count += 1;
                });
                assert_eq!(count, messages.len() - from);
            }
        }
    }
}
