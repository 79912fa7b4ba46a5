//! What the edits of a manifest come to.

use std::collections::BTreeMap;

use afterimage_blockdev::{HistoryId, Lsn, PointId, SegmentId, StoreId};
use afterimage_seed::manifest::{Edit, PointRecord};
use afterimage_seed::run::RunId;

/// A seed segment that is named.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct NamedSegment {
    pub(super) generation: u32,
    pub(super) slot_count: u32,
    pub(super) bytes: u64,
    pub(super) root: [u8; 32],
}

/// What the edits of a manifest come to, as far as files and points go.
#[derive(Clone, Default, Debug)]
pub(super) struct State {
    pub(super) store: StoreId,
    pub(super) segments: BTreeMap<SegmentId, NamedSegment>,
    pub(super) runs: BTreeMap<RunId, u64>,
    pub(super) points: BTreeMap<PointId, PointRecord>,
    pub(super) log_released: u64,
    /// All commits of the log up to here were applied once.
    pub(super) checkpoint: u64,
    pub(super) parents: BTreeMap<HistoryId, (HistoryId, Lsn)>,
    /// How far runs hold each history.
    pub(super) covered: BTreeMap<HistoryId, Lsn>,
    /// Numbers of segments below this one were given out.
    pub(super) next_segment: u32,
}

impl State {
    pub(super) fn of<'a>(edits: impl Iterator<Item = &'a Edit>) -> Self {
        let mut state = Self::default();
        for edit in edits {
            state.apply(edit);
        }
        state
    }

    fn apply(&mut self, edit: &Edit) {
        match edit {
            Edit::Store {
                store,
                next_segment,
                ..
            } => {
                self.store = *store;
                self.next_segment = self.next_segment.max(next_segment.0);
            }
            Edit::Segment {
                segment,
                generation,
                slot_count,
                bytes,
                root,
            } => {
                let named = NamedSegment {
                    generation: *generation,
                    slot_count: *slot_count,
                    bytes: *bytes,
                    root: *root,
                };
                self.segments.insert(*segment, named);
            }
            Edit::SegmentDropped { segment } => {
                self.segments.remove(segment);
            }
            Edit::Run { run, bytes } => {
                self.runs.insert(*run, *bytes);
            }
            Edit::RunDropped { run } => {
                self.runs.remove(run);
            }
            Edit::Point(point) => {
                self.points.insert(point.id, point.clone());
            }
            Edit::PointDropped { point } => {
                self.points.remove(point);
            }
            Edit::Checkpoint { log_sequence } => {
                self.checkpoint = self.checkpoint.max(*log_sequence);
            }
            Edit::HistoryDropped { history } => {
                self.parents.remove(history);
                self.covered.remove(history);
            }
            Edit::HistoryState(state) => {
                self.covered.insert(state.history, state.last);
            }
            Edit::LogReleased { log_sequence } => self.log_released = *log_sequence,
            Edit::History {
                history,
                parent,
                fork,
                ..
            } => {
                self.parents.entry(*history).or_insert((*parent, *fork));
            }
            _ => {}
        }
    }

    /// Points that show a history at an LSN or above, also through forks.
    pub(super) fn points_from(&self, history: HistoryId, lsn: Lsn) -> Vec<String> {
        let sees = |point: &&PointRecord| {
            let (mut at, mut high) = (point.history, point.lsn);
            // Histories of a damaged manifest could name each other.
            for _ in 0..200 {
                if at == history {
                    return high >= lsn;
                }
                match self.parents.get(&at) {
                    Some((parent, fork)) if !parent.is_nil() => {
                        high = high.min(*fork);
                        at = *parent;
                    }
                    _ => return false,
                }
            }
            false
        };
        let hurt = self.points.values().filter(sees);
        hurt.map(|point| point.name.clone()).collect()
    }
}
