//! Hostile bytes for every parser of what a disk, a peer or a person gives.
//!
//! One seed is one input: an encoding that the product's own code made, changed in a few ways, and
//! mostly *mended* afterwards, so that its hashes fit again and the parser goes on to believe it.
//!
//! What must hold for every input:
//! * the parser neither panics nor overflows, and comes to an end;
//! * it claims no more memory than its target allows for so many bytes;
//! * what it accepts, it writes again as it was read (each target says how far);
//! * an input that was not changed is accepted.
//!
//! A target of which no changed input was accepted, or none refused, proves nothing, and fails.

// Menders share one signature; some of them need no more than the bytes that are there.
#![expect(clippy::ptr_arg)]

mod agent;
mod cache;
mod files;
mod log;
mod medium;
mod messages;
mod mutate;
mod nbd;
mod seed;
mod store;
mod streams;
#[cfg(test)]
mod tests;
mod text;
mod vhost;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use afterimage_blockdev::{Random, allocation};

/// So many seeds share their originals, which are dear to make.
const GROUP: u64 = 256;
/// Originals of a group.
const ORIGINALS: usize = 8;

/// What a parser said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It made sense of the bytes, to the last layer.
    Accepted,
    /// It gave an error.
    Refused,
}

impl Verdict {
    fn of(is_accepted: bool) -> Self {
        if is_accepted {
            Self::Accepted
        } else {
            Self::Refused
        }
    }
}

/// Most memory for an input of `n` bytes: `bytes + times * n`.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// For any input.
    pub bytes: usize,
    /// For each of its bytes.
    pub times: usize,
}

/// A parser and what it needs to be fed.
pub struct Target {
    /// Its name on the command line.
    pub name: &'static str,
    /// Inputs of one run of `tools/check`.
    pub round: u64,
    /// What it may claim.
    pub memory: Memory,
    /// Words that mean something to it; mutations put them in.
    pub words: &'static [&'static str],
    /// Makes a legal encoding.
    pub make: fn(&mut Random) -> Vec<u8>,
    /// Makes the hashes of a changed encoding fit again, as far as its structure can be followed.
    pub mend: fn(&mut Vec<u8>, &mut Random),
    /// Parses; panics when a property does not hold.
    pub run: fn(&[u8]) -> Verdict,
}

impl Target {
    fn new(
        round: u64,
        name: &'static str,
        make: fn(&mut Random) -> Vec<u8>,
        run: fn(&[u8]) -> Verdict,
    ) -> Self {
        Self {
            name,
            round,
            memory: Memory {
                bytes: 1 << 20,
                times: 64,
            },
            words: &[],
            make,
            mend: |_, _| {},
            run,
        }
    }

    fn mended_by(self, mend: fn(&mut Vec<u8>, &mut Random)) -> Self {
        Self { mend, ..self }
    }

    fn with_words(self, words: &'static [&'static str]) -> Self {
        Self { words, ..self }
    }

    fn with_memory(self, bytes: usize, times: usize) -> Self {
        let memory = Memory { bytes, times };
        Self { memory, ..self }
    }
}

/// All targets.
#[must_use]
pub fn targets() -> Vec<Target> {
    let rooms = [
        cache::targets(),
        log::targets(),
        seed::targets(),
        files::targets(),
        store::targets(),
        messages::targets(),
        streams::targets(),
        text::targets(),
        medium::targets(),
        agent::targets(),
        nbd::targets(),
        vhost::targets(),
    ];
    rooms.into_iter().flatten().collect()
}

/// What came of a range of seeds.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Inputs in all.
    pub executions: u64,
    /// Changed ones that were accepted.
    pub accepted: u64,
    /// Changed ones that were refused.
    pub refused: u64,
    /// Most bytes that one input claimed; 0 where the program does not count.
    pub peak_bytes: usize,
}

impl Outcome {
    /// What never happened, if anything.
    #[must_use]
    pub fn missing(&self) -> Option<&'static str> {
        if self.accepted == 0 {
            Some("never happened: a changed input that is accepted")
        } else if self.refused == 0 {
            Some("never happened: a changed input that is refused")
        } else {
            None
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unchanged = self.executions - self.accepted - self.refused;
        writeln!(f, "{:>12} changed inputs accepted", self.accepted)?;
        writeln!(f, "{:>12} changed inputs refused", self.refused)?;
        writeln!(f, "{unchanged:>12} unchanged inputs accepted")?;
        write!(f, "{:>12} bytes claimed at most", self.peak_bytes)
    }
}

/// The seed that is being tried, for the message when it fails.
static SEED: AtomicU64 = AtomicU64::new(0);
/// Rises with every input, so that one that does not end can be told from the next.
static TRIED: AtomicU64 = AtomicU64::new(0);

/// The seed that is being tried, and how many were before.
#[must_use]
pub fn in_hand() -> (u64, u64) {
    (SEED.load(Ordering::Relaxed), TRIED.load(Ordering::Relaxed))
}

/// Feeds a target.
pub struct Campaign<'a> {
    target: &'a Target,
    group: Option<u64>,
    originals: Vec<Vec<u8>>,
    outcome: Outcome,
}

/// The numbers of a seed of a target; other targets get others.
fn numbers(target: &Target, seed: u64) -> Random {
    let hash = blake3::hash(target.name.as_bytes());
    let name = afterimage_cache::bytes::get_u64(hash.as_bytes(), 0).unwrap_or_default();
    Random::new(name ^ seed)
}

impl<'a> Campaign<'a> {
    /// Makes the campaign of a target.
    #[must_use]
    pub fn new(target: &'a Target) -> Self {
        Self {
            target,
            group: None,
            originals: Vec::new(),
            outcome: Outcome::default(),
        }
    }

    /// The input of a seed, and whether it is other than its original.
    pub fn input(&mut self, seed: u64) -> (Vec<u8>, bool) {
        let group = seed / GROUP;
        if self.group != Some(group) {
            self.group = Some(group);
            let mut random = numbers(self.target, !group);
            self.originals = (0..ORIGINALS)
                .map(|_| (self.target.make)(&mut random))
                .collect();
        }
        let mut random = numbers(self.target, seed);
        let original = &self.originals[random.index(ORIGINALS)];
        let mut bytes = original.clone();
        if random.below(64) == 0 {
            return (bytes, false);
        }
        let other = &self.originals[random.index(ORIGINALS)];
        mutate::mutate(&mut bytes, other, self.target.words, &mut random);
        if random.below(8) > 0 {
            (self.target.mend)(&mut bytes, &mut random);
        }
        let is_changed = bytes != *original;
        (bytes, is_changed)
    }

    /// Tries one seed.
    ///
    /// # Panics
    /// When a property does not hold.
    pub fn try_seed(&mut self, seed: u64) {
        SEED.store(seed, Ordering::Relaxed);
        TRIED.fetch_add(1, Ordering::Relaxed);
        let name = self.target.name;
        let (bytes, is_changed) = self.input(seed);
        let (verdict, peak_bytes) = allocation::measure(|| (self.target.run)(&bytes));
        let Memory { bytes: any, times } = self.target.memory;
        let most = any + times * bytes.len();
        assert!(
            peak_bytes <= most,
            "{name}: seed {seed}: {} bytes claim {peak_bytes} of memory, {most} are allowed",
            bytes.len()
        );
        self.outcome.executions += 1;
        self.outcome.peak_bytes = self.outcome.peak_bytes.max(peak_bytes);
        match (is_changed, verdict) {
            (true, Verdict::Accepted) => self.outcome.accepted += 1,
            (true, Verdict::Refused) => self.outcome.refused += 1,
            (false, Verdict::Accepted) => {}
            (false, Verdict::Refused) => panic!("{name}: seed {seed}: a legal input is refused"),
        }
    }

    /// What came of it so far.
    #[must_use]
    pub fn outcome(&self) -> &Outcome {
        &self.outcome
    }
}

/// Tries `count` seeds of a target, from `seed` on.
///
/// # Panics
/// When a property does not hold.
#[must_use]
pub fn fuzz(target: &Target, seed: u64, count: u64) -> Outcome {
    let mut campaign = Campaign::new(target);
    for seed in seed..seed.saturating_add(count) {
        campaign.try_seed(seed);
    }
    campaign.outcome
}
