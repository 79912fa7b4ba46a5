//! The journal window: from which LSN on every one is addressable.
//!
//! Invariants
//! * A floor is durable before anything below it may go, and never falls.
//! * No floor lies above the newest whole state of a disk, nor above what the first LSN of a window
//!   shows, in whichever history that is.
//! * Below a floor exactly the cuts of points and forks are addressable.

use std::time::Duration;

use afterimage_blockdev::{HistoryId, Lsn, MachineId, Timestamp};

use super::Engine;
use super::state::HistoryEntry;
use crate::error::SeedError;
use crate::manifest::PointRecord;
use crate::reference::format_time;

/// A floor is raised once a window moved by its such part.
const STEPS_PER_WINDOW: u32 = 32;

fn fork_of(entry: &HistoryEntry) -> Lsn {
    entry.parent.map_or(Lsn::ZERO, |(_, fork)| fork)
}

impl Engine {
    /// The history whose own records end at an LSN of a lineage.
    pub(super) fn owner(&self, history: HistoryId, lsn: Lsn) -> (HistoryId, Lsn) {
        let mut lineage = self.lineage(history, lsn);
        let own = lineage.find(|(_, entry, cap)| {
            let parent = entry
                .parent
                .filter(|(id, _)| self.histories.contains_key(id));
            parent.is_none_or(|(_, fork)| *cap > fork)
        });
        own.map_or((history, lsn), |(history, _, cap)| (history, cap))
    }

    /// The LSN of a history at which its journal window begins now; the durable floor while the
    /// time is not trusted.
    pub(super) fn window_floor(&self, history: HistoryId) -> Lsn {
        let Some(entry) = self.histories.get(&history) else {
            return Lsn::ZERO;
        };
        let Some(begin) = self.window_begin(entry.machine) else {
            return entry.floor;
        };
        let mut floor = self.begin_of_window(entry, begin);
        let related = self
            .histories
            .values()
            .filter(|other| other.machine == entry.machine);
        for other in related {
            for lsn in [other.durable, self.begin_of_window(other, begin)] {
                for (owner, shown) in self.whole_states(other, lsn) {
                    if owner == history {
                        floor = floor.min(shown);
                    }
                }
            }
        }
        floor.max(entry.floor)
    }

    fn window_begin(&self, machine: MachineId) -> Option<Timestamp> {
        let window = self.journal_window(machine);
        let window = afterimage_blockdev::clock::nanoseconds(window);
        let now = self.trusted_time()?;
        Some(Timestamp(now.0.saturating_sub(window)))
    }

    /// The last LSN of a history at or before a time; its fork when it is younger.
    fn begin_of_window(&self, entry: &HistoryEntry, begin: Timestamp) -> Lsn {
        let grain = afterimage_blockdev::clock::nanoseconds(self.options.time_grain);
        let found = entry.lsn_at_or_before(begin, grain);
        found.map_or(fork_of(entry), |lsn| lsn.min(entry.durable))
    }

    /// What is shown of each disk at an LSN of a history, and whose it is.
    fn whole_states(&self, entry: &HistoryEntry, lsn: Lsn) -> Vec<(HistoryId, Lsn)> {
        let disks = self.machines.get(&entry.machine);
        let disks = disks.into_iter().flat_map(|state| &state.disks);
        let shown = disks.filter_map(|disk| {
            let mut lsn = lsn;
            while let Some(begin) = self.open_batch(*disk, entry.id, lsn) {
                lsn = Lsn(begin.0.saturating_sub(1));
            }
            // Of a disk without a whole copy nothing is shown.
            self.copied_in_lineage(*disk, entry.id, lsn)
                .then(|| self.owner(entry.id, lsn))
        });
        shown.collect()
    }

    /// The floors that have moved far enough to be recorded.
    pub(super) fn floors_to_raise(&self) -> Vec<(HistoryId, Lsn)> {
        let moved = self.histories.iter().filter_map(|(history, entry)| {
            let floor = self.window_floor(*history);
            let window = self.journal_window(entry.machine);
            let step = window / STEPS_PER_WINDOW;
            let time = |lsn| entry.time_of(lsn).unwrap_or_default().0;
            let by = Duration::from_nanos(time(floor).saturating_sub(time(entry.floor)));
            (floor > entry.floor && by >= step).then_some((*history, floor))
        });
        moved.collect()
    }

    /// Says whether an LSN can be shown.
    pub(super) fn is_addressable(&self, machine: MachineId, history: HistoryId, lsn: Lsn) -> bool {
        let cut = self.owner(history, lsn);
        let floor = self.histories.get(&cut.0).map_or(Lsn::ZERO, |e| e.floor);
        cut.1 >= floor
            || self
                .points_of(machine)
                .any(|point| self.owner(point.history, point.lsn) == cut)
            || self
                .histories
                .values()
                .filter_map(|entry| entry.parent)
                .any(|(parent, fork)| self.owner(parent, fork) == cut)
    }

    fn points_of(&self, machine: MachineId) -> impl Iterator<Item = &PointRecord> {
        let state = self.machines.get(&machine);
        state.into_iter().flat_map(|state| {
            let kept = |point: &&PointRecord| !self.retention.dropping.contains(&point.id);
            state.points.values().filter(kept)
        })
    }

    /// Refuses what is shown in place of a cut inside a batch, when nothing keeps it: of a window
    /// and of a point it is kept, but not of a fork.
    pub(super) fn must_be_kept(
        &self,
        machine: MachineId,
        history: HistoryId,
        (asked, shown): (Lsn, Lsn),
    ) -> Result<(), SeedError> {
        let cut = self.owner(history, asked);
        let floor = self.histories.get(&cut.0).map_or(Lsn::ZERO, |e| e.floor);
        let is_kept = shown == asked
            || cut.1 >= floor
            || self
                .points_of(machine)
                .any(|point| self.owner(point.history, point.lsn) == cut);
        if is_kept {
            return Ok(());
        }
        self.must_be_addressable(machine, (history, shown))
            .map(drop)
    }

    /// Refuses what is below the window and named by nothing.
    pub(super) fn must_be_addressable(
        &self,
        machine: MachineId,
        (history, lsn): (HistoryId, Lsn),
    ) -> Result<(HistoryId, Lsn), SeedError> {
        if self.is_addressable(machine, history, lsn) {
            return Ok((history, lsn));
        }
        let cut = self.owner(history, lsn);
        let entry = self.histories.get(&cut.0);
        let floor = entry.map_or(Lsn::ZERO, |entry| entry.floor);
        let since = entry.and_then(|entry| entry.time_of(floor));
        let since = since.map_or(String::new(), |time| format!(" ({})", format_time(time)));
        let points = self.points_of(machine).filter_map(|point| {
            let (owner, at) = self.owner(point.history, point.lsn);
            (owner == cut.0).then_some((at.0.abs_diff(cut.1.0), &point.name))
        });
        let hint = match points.min() {
            Some((distance, name)) if distance < floor.0 - cut.1.0 => {
                format!("the nearest point is {name:?}; see `aft point list`")
            }
            _ => format!("the nearest one is {}:lsn:{floor}", cut.0),
        };
        Err(SeedError::refused(
            format!("LSN {lsn} lies before the journal window, which begins at {floor}{since}"),
            hint,
        ))
    }
}
