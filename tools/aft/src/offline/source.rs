//! What a rebuild begins with: the manifest, notes, or what of both belongs together.
//!
//! Invariants
//! * Of a manifest that is not whole, what is newer than the notes is laid over them; what is older
//!   they know better.

use std::fs;
use std::path::Path;

use super::chain::Chain;
use super::check::newest_manifest;
use super::notes::{Notes, newest_rest};
use super::{Store, file_error, refused};
use crate::error::AftError;

/// What a rebuild begins with.
pub(super) struct Source {
    /// The edits.
    pub(super) chain: Chain,
    /// It is the store's own manifest, and all of it is there.
    pub(super) is_whole: bool,
    /// The newest notes.
    pub(super) notes: Option<Notes>,
    /// The manifest behind the rebuilt one goes on with this commit.
    pub(super) next_sequence: u64,
}

impl Source {
    /// Finds what is there. `given` is a copy of a manifest file that takes the place of what is
    /// left of the store's own.
    pub(super) fn choose(store: &Store, given: Option<&Path>) -> Result<Self, AftError> {
        let found = match given {
            Some(path) => {
                let bytes = fs::read(path).map_err(|error| file_error(path, &error))?;
                Some(Chain::read(path.display().to_string(), &bytes))
            }
            None => newest_manifest(store, &mut Vec::new())?,
        };
        let found = found.filter(|chain| chain.all_edits().next().is_some());
        let is_whole = given.is_none() && found.as_ref().is_some_and(Chain::is_whole);
        let notes = Notes::newest(store, &mut Vec::new())?;
        let ends = found.iter().flat_map(|chain| &chain.commits);
        let last = ends.map(|placed| placed.commit.sequence).max();
        let noted = notes.as_ref().map(|notes| notes.sequence);
        let next_sequence = last.max(noted).unwrap_or(0).saturating_add(1);
        let chain = match (found, &notes) {
            (Some(chain), Some(notes)) if is_whole || begins_behind(&chain, notes) => chain,
            (found, Some(notes)) => laid_over(notes, found),
            (Some(chain), None) => chain,
            (None, None) => {
                return Err(refused(
                    "there is no manifest to begin with, and no whole notes in segments/: the \
                     keys of the disks are nowhere else",
                    "name a copy of a manifest file of this store with --manifest, however old",
                ));
            }
        };
        Ok(Self {
            chain,
            is_whole,
            notes,
            next_sequence,
        })
    }

    /// The rest of the map that belongs to it: a whole manifest is newer than any.
    pub(super) fn rest(
        &self,
        store: &Store,
    ) -> Result<Option<(afterimage_seed::run::RunId, u64)>, AftError> {
        if self.is_whole {
            return newest_rest(store);
        }
        Ok(self.notes.as_ref().and_then(|notes| notes.rest))
    }
}

/// Says whether a manifest file begins with a state that is newer than notes.
fn begins_behind(chain: &Chain, notes: &Notes) -> bool {
    let first = chain.commits.first().map(|placed| placed.commit.sequence);
    chain.has_snapshot && first.is_some_and(|first| first >= notes.sequence)
}

/// What of a manifest is newer than notes, behind them.
fn laid_over(notes: &Notes, found: Option<Chain>) -> Chain {
    let mut chain = notes.chain.clone();
    let newer = found.map(|found| found.commits.into_iter().chain(found.beyond));
    let newer = newer.into_iter().flatten();
    let newer = newer.filter(|placed| placed.commit.sequence >= notes.sequence);
    chain.beyond.extend(newer);
    chain
}
