//! What the tree asks of the engine. All of it waits for the answer.

use afterimage_blockdev::{DiskId, Epoch, ErrorClass, HistoryId, Lsn, MachineId, PointId};
use afterimage_export::TreeError;
use afterimage_protocol::rest::ApiError;
use afterimage_protocol::rest::server::Point;

use crate::engine::{Command, EngineGone, EngineHandle, PointsWanted, ViewOpened, ViewRequest};

/// Kind of a point inside an unfinished copy.
pub(crate) const INCOMPLETE: &str = "resync-incomplete";

/// A point, and what of a disk is there.
pub(super) struct PointHere {
    pub(super) point: Point,
    /// Epoch of the newest writer of its history.
    pub(super) epoch: Epoch,
    pub(super) size_bytes: u64,
}

pub(super) struct Views {
    engine: EngineHandle,
}

impl Views {
    pub(super) fn new(engine: EngineHandle) -> Self {
        Self { engine }
    }

    pub(super) fn view(
        &self,
        machine: MachineId,
        disk: DiskId,
        at: &str,
    ) -> Result<ViewOpened, TreeError> {
        let reference = format!("{machine}/{disk}@{at}");
        let request = ViewRequest {
            reference,
            allow_incomplete: false,
        };
        let opened = self
            .engine
            .ask_blocking(|reply| Command::OpenView(request, reply));
        opened.map_err(gone)?.map_err(|error| refused(&error))
    }

    pub(super) fn view_at(
        &self,
        machine: MachineId,
        disk: DiskId,
        history: HistoryId,
        lsn: Lsn,
    ) -> Result<ViewOpened, TreeError> {
        self.view(machine, disk, &format!("{history}:lsn:{lsn}"))
    }

    /// Points after one, and the last one that was looked at; none at the end.
    pub(super) fn points(
        &self,
        machine: MachineId,
        disk: DiskId,
        after: PointId,
        limit: usize,
    ) -> Result<(Vec<PointHere>, Option<PointId>), TreeError> {
        self.listing(machine, disk, PointsWanted::After(after, limit))
    }

    fn listing(
        &self,
        machine: MachineId,
        disk: DiskId,
        wanted: PointsWanted,
    ) -> Result<(Vec<PointHere>, Option<PointId>), TreeError> {
        let listing = self
            .engine
            .ask_blocking(|reply| Command::PointStates {
                machine,
                disk,
                wanted,
                reply,
            })
            .map_err(gone)?
            .map_err(|error| refused(&error))?;
        let here = |(point, epoch, size_bytes)| PointHere {
            point,
            epoch,
            size_bytes,
        };
        let points = listing.points.into_iter().map(here);
        let shown = points.filter(|here| is_shown(&here.point)).collect();
        Ok((shown, listing.last))
    }

    pub(super) fn point(
        &self,
        machine: MachineId,
        disk: DiskId,
        id: PointId,
    ) -> Result<PointHere, TreeError> {
        let after = PointId(id.0.saturating_sub(1));
        let (found, _) = self.points(machine, disk, after, 1)?;
        let found = found.into_iter().find(|here| here.point.id == id);
        found.ok_or(TreeError::NotFound)
    }

    pub(super) fn point_named(
        &self,
        machine: MachineId,
        disk: DiskId,
        name: &str,
    ) -> Result<PointHere, TreeError> {
        let wanted = PointsWanted::Named(name.to_owned());
        let (found, _) = self.listing(machine, disk, wanted)?;
        found.into_iter().next().ok_or(TreeError::NotFound)
    }
}

/// A point that is no state of the source is opened only by explicit order, never from here.
fn is_shown(point: &Point) -> bool {
    point.kind != INCOMPLETE && !point.name.contains('/') && !point.name.is_empty()
}

pub(super) fn gone(error: EngineGone) -> TreeError {
    TreeError::Failed {
        errno: libc::EIO,
        message: error.to_string(),
    }
}

pub(super) fn refused(error: &ApiError) -> TreeError {
    match error.class {
        ErrorClass::Refused => TreeError::NotFound,
        ErrorClass::Retry => TreeError::Failed {
            errno: libc::EAGAIN,
            message: error.to_string(),
        },
        _ => TreeError::Failed {
            errno: libc::EIO,
            message: error.to_string(),
        },
    }
}
