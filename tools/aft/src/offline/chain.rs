//! The commits of a manifest file, as far as they can be read.

use afterimage_cache::Damage;
use afterimage_seed::manifest::{Edit, ManifestCommit, SECTOR};

use super::Finding;

/// A commit and where it was found.
#[derive(Clone, Debug)]
pub(super) struct Placed {
    pub(super) offset: u64,
    pub(super) commit: ManifestCommit,
}

/// What a manifest file holds.
#[derive(Clone, Debug)]
pub(super) struct Chain {
    /// Its name, or path.
    pub(super) file: String,
    /// Commits from the beginning on, each behind its predecessor.
    pub(super) commits: Vec<Placed>,
    /// Whole commits behind a place that is damaged.
    pub(super) beyond: Vec<Placed>,
    /// What is damaged.
    pub(super) findings: Vec<Finding>,
    /// The snapshot at the beginning is whole.
    pub(super) has_snapshot: bool,
}

impl Chain {
    /// Says whether all that was ever durable is there.
    pub(super) fn is_whole(&self) -> bool {
        self.has_snapshot && self.beyond.is_empty()
    }

    /// Edits of the beginning, in order.
    pub(super) fn edits(&self) -> impl Iterator<Item = &Edit> {
        self.commits.iter().flat_map(|placed| &placed.commit.edits)
    }

    /// All edits that can be read, in order.
    pub(super) fn all_edits(&self) -> impl Iterator<Item = &Edit> {
        let all = self.commits.iter().chain(&self.beyond);
        all.flat_map(|placed| &placed.commit.edits)
    }

    /// Reads a file.
    pub(super) fn read(file: impl Into<String>, bytes: &[u8]) -> Self {
        let mut chain = Self {
            file: file.into(),
            commits: Vec::new(),
            beyond: Vec::new(),
            findings: Vec::new(),
            has_snapshot: false,
        };
        let (mut at, mut last) = (0, None);
        let damage = loop {
            match pair_at(bytes, at, last) {
                Ok((commit, hash, len, bad)) => {
                    // A copy that is bad in the last write may be torn, which is no damage.
                    let behind = at + 2 * len;
                    let is_last = bytes.get(behind..).is_none_or(|rest| !begins_commit(rest));
                    if let Some(offset) = bad.filter(|_| !is_last) {
                        let what = "one of the two copies of a commit is damaged";
                        let found = Finding::new(chain.file.clone(), offset, what);
                        chain.findings.push(found);
                    }
                    last = Some((commit.sequence, hash));
                    chain.has_snapshot |= commit.ends_snapshot;
                    let offset = at as u64;
                    chain.commits.push(Placed { offset, commit });
                    at = behind;
                }
                Err(damage) => break damage,
            }
        };
        chain.look_beyond(bytes, at, last.map_or(0, |(sequence, _)| sequence));
        if !chain.is_whole() {
            let found = Finding::new(chain.file.clone(), at as u64, &damage);
            chain.findings.push(found);
        }
        chain
    }

    /// Finds what stands behind the last commit that follows its predecessor.
    fn look_beyond(&mut self, bytes: &[u8], from: usize, mut sequence: u64) {
        for at in (from..bytes.len()).step_by(SECTOR) {
            let found = bytes.get(at..).map(ManifestCommit::decode);
            if let Some(Ok((commit, _, _))) = found {
                if commit.sequence > sequence {
                    sequence = commit.sequence;
                    let offset = at as u64;
                    self.beyond.push(Placed { offset, commit });
                }
            }
        }
    }
}

type Pair = (ManifestCommit, [u8; 32], usize, Option<u64>);

/// The commit at a place, from its first copy or else from its second.
fn pair_at(bytes: &[u8], at: usize, last: Option<(u64, [u8; 32])>) -> Result<Pair, Damage> {
    let follows = |commit: &ManifestCommit| match last {
        None => commit.is_snapshot && matches!(commit.edits.first(), Some(Edit::Store { .. })),
        Some((sequence, hash)) => {
            commit.previous == hash && commit.sequence.checked_sub(1) == Some(sequence)
        }
    };
    let rest = bytes.get(at..).unwrap_or(&[]);
    let damage = match ManifestCommit::decode(rest) {
        Ok((commit, hash, len)) if follows(&commit) => {
            let is_twice = rest.get(len..2 * len) == rest.get(..len);
            let bad = (!is_twice).then_some((at + len) as u64);
            return Ok((commit, hash, len, bad));
        }
        Ok(_) => Damage::Field {
            structure: "manifest commit",
            field: "place in the chain",
        },
        Err(damage) => damage,
    };
    for ahead in (SECTOR..rest.len()).step_by(SECTOR) {
        let second = rest.get(ahead..).map(ManifestCommit::decode);
        if let Some(Ok((commit, hash, len))) = second {
            if len == ahead && follows(&commit) {
                return Ok((commit, hash, len, Some(at as u64)));
            }
        }
    }
    Err(damage)
}

fn begins_commit(bytes: &[u8]) -> bool {
    ManifestCommit::decode(bytes).is_ok()
        || bytes
            .get(SECTOR..)
            .is_some_and(|rest| ManifestCommit::decode(rest).is_ok())
}
