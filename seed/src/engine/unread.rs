//! Files that the manifest names and that the start could not read. Nobody knows which blocks they
//! held, so nothing that may be theirs is shown; that is known in memory only, so that a file that
//! is put back heals what it hurt.

use std::collections::BTreeSet;

use afterimage_blockdev::{HistoryId, Lsn, SegmentId};

use super::{Engine, Output};
use crate::error::SeedError;
use crate::run::RunId;

/// What could not be read.
#[derive(Debug, Default)]
pub(super) struct Unread {
    /// Segments of bulk blocks that are in no run.
    segments: BTreeSet<SegmentId>,
    /// Runs that cannot be made anew, because the log has given their commits away.
    runs: BTreeSet<RunId>,
    /// Histories that were there then.
    histories: BTreeSet<HistoryId>,
}

impl Unread {
    /// The range of LSNs of a history of which nobody knows what is missing.
    pub(super) fn lost_of(&self, history: HistoryId) -> Option<(Lsn, Lsn)> {
        let is_hurt = self.histories.contains(&history);
        is_hurt.then_some((Lsn(1), Lsn(u64::MAX)))
    }

    /// Says whether a run is merged with no other, since it would go with what it holds.
    pub(super) fn has_run(&self, run: RunId) -> bool {
        self.runs.contains(&run)
    }

    /// The map lacks runs: what it does not name may be needed.
    pub(super) fn lacks_runs(&self) -> bool {
        !self.runs.is_empty()
    }

    /// The first segment whose blocks are not in the map.
    pub(super) fn first_segment(&self) -> Option<SegmentId> {
        self.segments.first().copied()
    }
}

impl Engine {
    pub(super) fn segment_unread(&mut self, segment: SegmentId) {
        self.unread.segments.insert(segment);
        self.unread.histories = self.histories.keys().copied().collect();
    }

    pub(super) fn run_unread(&mut self, run: RunId) {
        self.unread.runs.insert(run);
        self.unread.histories = self.histories.keys().copied().collect();
    }

    /// Refuses collections while the map lacks runs; says whether it does.
    pub(super) fn refuses_to_collect(&mut self, out: &mut Vec<Output>) -> bool {
        if !self.unread.lacks_runs() {
            return false;
        }
        for id in self.sweep.take_requests() {
            let message = "nothing is collected while a run cannot be read";
            let hint = "put the file back that `aft status` names, and start again";
            out.push(Output::Reply(id, Err(SeedError::refused(message, hint))));
        }
        true
    }
}
