//! What a manifest file holds.

use afterimage_cache::Damage;

use super::{Edit, ManifestCommit, NAME, SECTOR};

/// A file whose snapshot is whole.
#[derive(Debug)]
pub(crate) struct Found {
    /// All edits, in order.
    pub(crate) edits: Vec<Edit>,
    /// The file as it should be, up to the end of the last commit.
    pub(super) bytes: Vec<u8>,
    /// Bytes of the snapshot.
    pub(super) snapshot_bytes: u64,
    /// Where the part begins that must be written again.
    pub(super) rewrite_at: u64,
    /// Sequence of the next commit.
    pub(super) sequence: u64,
    /// Hash of the last commit.
    pub(super) hash: [u8; 32],
    /// Where a copy is bad of which the other is good.
    pub(crate) damaged: Vec<u64>,
    /// The last commit is an idle one.
    pub(super) is_proven: bool,
}

/// What came of a walk.
pub(crate) enum Walked {
    /// The file counts.
    Whole(Box<Found>),
    /// The file was never durable as a whole.
    NotWhole,
    /// Written by a newer program.
    Newer { found: u16, supported: u16 },
    /// Something durable is damaged in both copies.
    Damaged(u64, Damage),
}

/// A commit of which at least one copy is good.
struct Pair<'a> {
    commit: ManifestCommit,
    hash: [u8; 32],
    good: &'a [u8],
    bad: Option<u64>,
}

type Place = Option<(u64, [u8; 32])>;

fn follows(commit: &ManifestCommit, last: Place) -> bool {
    // What went before a file's first commit is in no file any more: but it begins the snapshot.
    last.map_or_else(
        || commit.begins_file(),
        |(sequence, hash)| {
            commit.previous == hash && commit.sequence.checked_sub(1) == Some(sequence)
        },
    )
}

/// The commit at a place, from its first copy or else from its second.
fn pair_at(bytes: &[u8], at: usize, last: Place) -> Result<Pair<'_>, Damage> {
    let first = ManifestCommit::decode(bytes.get(at..).unwrap_or(&[]));
    let damage = match first {
        Ok((commit, hash, len)) if follows(&commit, last) => {
            let good = &bytes[at..at + len];
            let is_twice = bytes.get(at + len..at + 2 * len) == Some(good);
            let bad = (!is_twice).then_some((at + len) as u64);
            return Ok(Pair {
                commit,
                hash,
                good,
                bad,
            });
        }
        Ok(_) => Damage::Field {
            structure: NAME,
            field: "place in the chain",
        },
        Err(damage) => damage,
    };
    for second in (at + SECTOR..bytes.len()).step_by(SECTOR) {
        let Ok((commit, hash, len)) = ManifestCommit::decode(&bytes[second..]) else {
            continue;
        };
        if len == second - at && follows(&commit, last) {
            let good = &bytes[second..second + len];
            return Ok(Pair {
                commit,
                hash,
                good,
                bad: Some(at as u64),
            });
        }
    }
    Err(damage)
}

impl Found {
    /// Walks the bytes of a file, with zeroes in place of the sectors that cannot be read.
    pub(crate) fn walk(bytes: &[u8], unreadable: &[u64]) -> Walked {
        let mut found = Self {
            edits: Vec::new(),
            bytes: Vec::new(),
            snapshot_bytes: 0,
            rewrite_at: 0,
            sequence: 1,
            hash: [0; 32],
            damaged: Vec::new(),
            is_proven: false,
        };
        let mut last: Place = None;
        let damage = loop {
            let at = found.bytes.len();
            let pair = match pair_at(bytes, at, last) {
                Ok(pair) => pair,
                Err(damage) => break damage,
            };
            let is_whole = found.snapshot_bytes > 0;
            if pair.commit.is_snapshot == is_whole {
                break Damage::Field {
                    structure: NAME,
                    field: "place in the chain",
                };
            }
            found.damaged.extend(pair.bad);
            found.bytes.extend_from_slice(pair.good);
            found.bytes.extend_from_slice(pair.good);
            // Before a commit is written all before it is durable; a snapshot is written as one.
            found.rewrite_at = if is_whole { at as u64 } else { 0 };
            if pair.commit.ends_snapshot {
                found.snapshot_bytes = found.bytes.len() as u64;
            }
            found.is_proven = is_whole && pair.commit.edits.is_empty();
            last = Some((pair.commit.sequence, pair.hash));
            found.edits.extend(pair.commit.edits);
        };
        found.end(bytes, unreadable, last, damage)
    }

    /// Decides whether what follows the last good commit was ever durable.
    fn end(mut self, bytes: &[u8], unreadable: &[u64], last: Place, damage: Damage) -> Walked {
        let at = self.bytes.len();
        let is_whole = self.snapshot_bytes > 0;
        // A torn write can be read.
        if unreadable.iter().any(|offset| *offset >= at as u64) {
            return Walked::Damaged(at as u64, damage);
        }
        let mut newer = 0;
        for place in (at..bytes.len()).step_by(SECTOR) {
            match ManifestCommit::decode(&bytes[place..]) {
                // Only the last commit can be torn: a whole one behind it follows from durability.
                // Of a snapshot, any part may be missing.
                Ok((commit, _, _)) if is_whole || !commit.is_snapshot => {
                    let is_later = last.is_none_or(|(sequence, _)| commit.sequence > sequence);
                    if is_later {
                        return Walked::Damaged(at as u64, damage);
                    }
                }
                // One copy alone may be damaged.
                Err(Damage::Version {
                    found, supported, ..
                }) => {
                    newer += 1;
                    if newer > 1 {
                        return Walked::Newer { found, supported };
                    }
                }
                _ => {}
            }
        }
        let Some((sequence, hash)) = last.filter(|_| is_whole) else {
            return Walked::NotWhole;
        };
        self.sequence = sequence.saturating_add(1);
        self.hash = hash;
        // In the last write a bad copy may be torn, which is no damage.
        let proven = self.rewrite_at;
        self.damaged.retain(|offset| *offset < proven);
        if !self.damaged.is_empty() {
            self.rewrite_at = 0;
        }
        Walked::Whole(Box::new(self))
    }

    /// What must be written again.
    pub(super) fn rewrite(&self) -> &[u8] {
        &self.bytes[usize::try_from(self.rewrite_at).unwrap_or(0)..]
    }
}
