//! What the tree asks of the engine. All of it waits for the answer.

use afterimage_blockdev::{DiskId, ErrorClass, HistoryId, Lsn, MachineId, PointId};
use afterimage_export::TreeError;
use afterimage_protocol::rest::ApiError;
use afterimage_protocol::rest::server::Point;

use crate::engine::{Command, EngineGone, EngineHandle, ViewOpened, ViewRequest};

/// Points asked of the engine at once when one is looked for by name.
const SEARCH_PAGE: usize = 1000;
const INCOMPLETE: &str = "resync-incomplete";

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

    pub(super) fn points(
        &self,
        machine: MachineId,
        after: PointId,
        limit: usize,
    ) -> Result<Vec<Point>, TreeError> {
        let machine = machine.to_string();
        let page = self
            .engine
            .ask_blocking(|reply| Command::ListPoints {
                machine,
                after,
                limit,
                reply,
            })
            .map_err(gone)?
            .map_err(|error| refused(&error))?;
        Ok(page.points)
    }

    pub(super) fn point(&self, machine: MachineId, id: PointId) -> Result<Point, TreeError> {
        let after = PointId(id.0.saturating_sub(1));
        let found = self.points(machine, after, 1)?.into_iter().next();
        found
            .filter(|point| point.id == id)
            .ok_or(TreeError::NotFound)
    }

    pub(super) fn point_named(&self, machine: MachineId, name: &str) -> Result<Point, TreeError> {
        let mut after = PointId(0);
        loop {
            let page = self.points(machine, after, SEARCH_PAGE)?;
            let Some(last) = page.last() else {
                return Err(TreeError::NotFound);
            };
            if last.id <= after {
                return Err(TreeError::NotFound);
            }
            after = last.id;
            if let Some(point) = page.into_iter().find(|point| point.name == name) {
                return if is_shown(&point) {
                    Ok(point)
                } else {
                    Err(TreeError::NotFound)
                };
            }
        }
    }
}

/// A point that is no state of the source is opened only by explicit order, never from here.
pub(super) fn is_shown(point: &Point) -> bool {
    point.kind != INCOMPLETE && !point.name.contains('/') && !point.name.is_empty()
}

pub(super) fn gone(error: EngineGone) -> TreeError {
    TreeError::Failed {
        errno: libc::EIO,
        message: error.to_string(),
    }
}

fn refused(error: &ApiError) -> TreeError {
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
