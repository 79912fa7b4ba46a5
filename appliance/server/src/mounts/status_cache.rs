//! What the engine knows of machines and disks, asked at most a few times a second however many
//! names the kernel looks up.

use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::{Clock, DiskId, MachineId, Monotonic};
use parking_lot::Mutex;

use crate::engine::{Command, DiskSummary, EngineGone, EngineHandle, EngineStatus, MachineSummary};

const FRESH: Duration = Duration::from_millis(500);

pub(super) struct StatusCache {
    engine: EngineHandle,
    clock: Arc<dyn Clock>,
    last: Mutex<Option<(Monotonic, Arc<EngineStatus>)>>,
}

impl StatusCache {
    pub(super) fn new(engine: EngineHandle, clock: Arc<dyn Clock>) -> Self {
        Self {
            engine,
            clock,
            last: Mutex::new(None),
        }
    }

    /// The status, not older than half a second. Waits for the engine.
    pub(super) fn get(&self) -> Result<Arc<EngineStatus>, EngineGone> {
        // Held over the question, so that many who ask at once ask once.
        let mut last = self.last.lock();
        let now = self.clock.monotonic();
        if let Some((time, status)) = &*last
            && now.since(*time) < FRESH
        {
            return Ok(Arc::clone(status));
        }
        let status = Arc::new(self.engine.ask_blocking(Command::Status)?);
        *last = Some((now, Arc::clone(&status)));
        Ok(status)
    }
}

pub(super) fn machine(status: &EngineStatus, machine: MachineId) -> Option<&MachineSummary> {
    status
        .machines
        .iter()
        .find(|found| found.machine == machine)
}

pub(super) fn disk(
    status: &EngineStatus,
    machine: MachineId,
    disk: DiskId,
) -> Option<(&MachineSummary, &DiskSummary)> {
    let machine = self::machine(status, machine)?;
    Some((
        machine,
        machine.disks.iter().find(|found| found.disk == disk)?,
    ))
}
