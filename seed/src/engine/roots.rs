//! What must stay readable, and what a version is needed for.
//!
//! A version lives on [birth, death): from its LSN to that of the next version of the same block.
//! It is needed if and only if a root lies there.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use afterimage_blockdev::{HistoryId, Lsn};

use super::Engine;
use crate::manifest::PointKind;
use crate::section::Snapshot;

/// The LSNs of one history at which something can be shown.
#[derive(Clone, Debug)]
pub(super) struct Roots {
    /// Sorted.
    at: Vec<Lsn>,
    /// Every LSN from here on can be shown.
    window: Lsn,
}

impl Roots {
    /// From the single LSNs, sorted, and the begin of the window.
    #[cfg(test)]
    pub(super) fn new(at: Vec<Lsn>, window: Lsn) -> Self {
        Self { at, window }
    }

    /// Says whether a version that lives on [born, died) is needed; `None` for one that still
    /// lives.
    pub(super) fn need(&self, born: Lsn, died: Option<Lsn>) -> bool {
        let Some(died) = died else { return true };
        // Two entries of one LSN tell different blocks apart, and neither ends the other.
        if died > self.window || died == born {
            return true;
        }
        let next = self.at.partition_point(|root| *root < born);
        self.at.get(next).is_some_and(|root| *root < died)
    }

    /// The first LSN from which on every one can be shown.
    pub(super) fn window(&self) -> Lsn {
        self.window
    }
}

impl Engine {
    /// All roots of all histories: windows, heads, retained points, forks, open views.
    pub(super) fn roots(&mut self) -> BTreeMap<HistoryId, Roots> {
        self.snapshots.retain(|known| known.strong_count() > 0);
        let mut all: BTreeMap<HistoryId, Roots> = self
            .histories
            .iter()
            .map(|(history, entry)| {
                let roots = Roots {
                    at: Vec::new(),
                    window: entry.floor,
                };
                (*history, roots)
            })
            .collect();
        let mut cuts = self.cuts_to_keep();
        for (history, entry) in &self.histories {
            cuts.push((*history, entry.durable));
            cuts.extend(entry.parent);
            // A cut inside a batch shows what was before it.
            cuts.extend(self.before_batch(*history, entry.floor));
        }
        for (history, lsn) in cuts {
            for (history, _, cap) in self.lineage(history, lsn) {
                if let Some(roots) = all.get_mut(&history) {
                    if roots.at.last() != Some(&cap) && cap < roots.window {
                        roots.at.push(cap);
                    }
                }
            }
        }
        for roots in all.values_mut() {
            roots.at.sort_unstable();
            roots.at.dedup();
        }
        all
    }

    /// The cuts of points and of views that are open.
    fn cuts_to_keep(&self) -> Vec<(HistoryId, Lsn)> {
        let mut cuts = Vec::new();
        for machine in self.machines.values() {
            for point in machine.points.values().chain(machine.pending.values()) {
                cuts.push((point.history, point.lsn));
                if point.kind == PointKind::ResyncIncomplete {
                    cuts.extend(self.before_batch(point.history, point.lsn));
                }
            }
        }
        let views = self.snapshots.iter().filter_map(Weak::upgrade);
        cuts.extend(views.map(|view| (view.history, view.lsn)));
        cuts
    }

    /// What is shown instead of a cut inside a batch, for any disk of the history's machine.
    fn before_batch(&self, history: HistoryId, lsn: Lsn) -> Vec<(HistoryId, Lsn)> {
        let machine = self.histories.get(&history).map(|entry| entry.machine);
        let disks = machine.and_then(|machine| self.machines.get(&machine));
        let mut shown = Vec::new();
        for disk in disks.into_iter().flat_map(|state| &state.disks) {
            let mut lsn = lsn;
            while let Some(begin) = self.open_batch(*disk, history, lsn) {
                lsn = Lsn(begin.0.saturating_sub(1));
                shown.push((history, lsn));
            }
        }
        shown
    }

    /// Remembers a snapshot as a root while somebody has it.
    pub(super) fn keep_snapshot(&mut self, snapshot: &Arc<Snapshot>) {
        if self.snapshots.len() >= 64 && self.snapshots.len().is_power_of_two() {
            self.snapshots.retain(|known| known.strong_count() > 0);
        }
        self.snapshots.push(Arc::downgrade(snapshot));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_needed_while_a_root_sees_it() {
        let roots = Roots {
            at: vec![Lsn(10), Lsn(20)],
            window: Lsn(100),
        };
        for (born, died, is_needed) in [
            (1, Some(10), false),
            (1, Some(11), true),
            (10, Some(11), true),
            (11, Some(20), false),
            (11, Some(21), true),
            (21, Some(100), false),
            (21, Some(101), true),
            (100, Some(101), true),
            (1, None, true),
        ] {
            let died_at = died.map(Lsn);
            assert_eq!(roots.need(Lsn(born), died_at), is_needed, "{born} {died:?}");
        }
    }
}
