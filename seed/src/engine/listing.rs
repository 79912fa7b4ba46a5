//! Points as a directory of one disk shows them: with the size that the disk had there.

use std::ops::Bound;

use afterimage_blockdev::{DiskId, HistoryId, Lsn, MachineId, PointId};

use super::{Engine, PointState, Response};
use crate::error::SeedError;
use crate::manifest::PointRecord;

/// Points that are looked at for one answer, at most.
const SCAN_MAX: usize = 4096;

impl Engine {
    /// The LSN that is shown for one that was asked for: the begin of a batch that is open there.
    /// None where no whole copy of the disk is.
    pub(super) fn whole_at(&self, disk: DiskId, history: HistoryId, asked: Lsn) -> Option<Lsn> {
        let mut lsn = asked;
        // A batch is a state only when whole: before its end, its begin is shown.
        while let Some(begin) = self.open_batch(disk, history, lsn) {
            lsn = Lsn(begin.0.saturating_sub(1));
        }
        self.copied_in_lineage(disk, history, lsn).then_some(lsn)
    }

    fn point_state(&self, disk: DiskId, point: &PointRecord) -> Option<PointState> {
        let lsn = self.whole_at(disk, point.history, point.lsn)?;
        let entry = self.histories.get(&point.history)?;
        Some(PointState {
            point: point.clone(),
            epoch: entry.epoch,
            size_bytes: self.size_at(disk, point.history, lsn),
        })
    }

    /// Points after one, at which a disk has a state; up to `limit` of them.
    pub(super) fn point_states(
        &self,
        machine: MachineId,
        disk: DiskId,
        after: PointId,
        limit: usize,
    ) -> Result<Response, SeedError> {
        let state = self.machine_with(machine, disk)?;
        let mut found = Vec::new();
        let mut last = None;
        let from = (Bound::Excluded(after), Bound::Unbounded);
        for (id, point) in state.points.range(from).take(SCAN_MAX) {
            last = Some(*id);
            found.extend(self.point_state(disk, point));
            if found.len() >= limit.max(1) {
                break;
            }
        }
        Ok(Response::PointStates(found, last))
    }

    /// The point of a name, if the disk has a state there.
    pub(super) fn find_point(
        &self,
        machine: MachineId,
        disk: DiskId,
        name: &str,
    ) -> Result<Response, SeedError> {
        let state = self.machine_with(machine, disk)?;
        let point = state.names.get(name).and_then(|id| state.points.get(id));
        let found = point.and_then(|point| self.point_state(disk, point));
        let last = found.as_ref().map(|found| found.point.id);
        Ok(Response::PointStates(found.into_iter().collect(), last))
    }

    fn machine_with(
        &self,
        machine: MachineId,
        disk: DiskId,
    ) -> Result<&super::state::MachineState, SeedError> {
        let state = self.machines.get(&machine);
        state
            .filter(|state| state.disks.contains(&disk))
            .ok_or_else(|| SeedError::refused(format!("machine {machine} has no disk {disk}"), ""))
    }
}
