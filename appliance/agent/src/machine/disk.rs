//! One attached disk.

use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use afterimage_blockdev::{BlockDevice, DiskId, Lsn};
use afterimage_export::LoopDevice;
use afterimage_protocol::message::{DiskDescription, DiskPhase, DiskReport};
use afterimage_protocol::rest::agent::TappedDisk;
use afterimage_protocol::sender::DiskAnswer;
use parking_lot::Mutex;

use crate::state::disks::SavedDisk;
use crate::tap::Tap;

/// Where a pass over a disk stands.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// A pass is going on.
    pub is_running: bool,
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
    /// When it began.
    pub since: Option<Instant>,
    /// Bytes read to compare, by the last pass after a restart.
    pub recheck_read_bytes: u64,
    /// Bytes that differed in it.
    pub recheck_sent_bytes: u64,
}

impl Progress {
    fn rate(&self) -> u64 {
        let Some(since) = self.since.filter(|_| self.is_running) else {
            return 0;
        };
        let ms = u64::try_from(since.elapsed().as_millis())
            .unwrap_or(u64::MAX)
            .max(1);
        self.done_bytes.saturating_mul(1000) / ms
    }
}

/// What is known of a disk beside its tap.
#[derive(Default)]
pub struct DiskState {
    /// What the appliance told on the present connection.
    pub answer: Option<DiskAnswer>,
    /// A protection that has not begun yet.
    pub wants_protection: bool,
    /// Where a pass stands.
    pub progress: Progress,
    /// What a person should know; empty when all is well.
    pub reason: String,
    /// The device in front of the source.
    pub device: Option<LoopDevice>,
    /// An old device of a dead agent that is still in use.
    pub stale_device: String,
    /// What is wrong with the source; empty when all is well.
    pub trouble: String,
    /// The size that the disk gets with the next batch, since the new space may hold data.
    pub wants_bytes: Option<u64>,
    /// A growth that was recorded and not yet saved.
    pub(super) grown: Option<Grown>,
}

/// A growth on its way to the appliance.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Grown {
    pub(super) size_bytes: u64,
    /// LSN of its record, in the epoch of this generation.
    pub(super) lsn: Lsn,
    pub(super) generation: u64,
}

impl DiskState {
    /// Everything that a person should know.
    fn reasons(&self) -> String {
        let grows = match self.wants_bytes {
            Some(bytes) => format!(
                "the source grew to {bytes} bytes; the disk follows as soon as the appliance is \
                 connected and no copy is under way"
            ),
            None => String::new(),
        };
        let mut reasons = vec![&self.trouble, &self.reason, &self.stale_device, &grows];
        reasons.retain(|reason| !reason.is_empty());
        let reasons: Vec<&str> = reasons.into_iter().map(String::as_str).collect();
        reasons.join("; ")
    }
}

/// An attached disk.
pub struct Disk {
    /// Identity.
    pub id: DiskId,
    /// What is saved of it.
    pub saved: Mutex<SavedDisk>,
    /// What is not.
    pub state: Mutex<DiskState>,
    /// The tap; none when the source could not be opened.
    pub tap: Option<Arc<Tap>>,
    /// The source itself, for its size; keeps other agents off an image file.
    pub(super) file: Option<File>,
}

impl Disk {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> String {
        self.saved.lock().name.clone()
    }

    /// The present size.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        match &self.tap {
            Some(tap) => tap.geometry().size_bytes,
            None => self.saved.lock().size_bytes,
        }
    }

    /// As the appliance is told.
    #[must_use]
    pub fn description(&self) -> DiskDescription {
        let saved = self.saved.lock().clone();
        DiskDescription {
            disk: self.id,
            name: saved.name,
            size_bytes: self.size_bytes(),
            logical_block_bytes: saved.logical_block_bytes,
        }
    }

    /// What is going on; `None` when it is not protected.
    #[must_use]
    pub fn phase(&self, is_flowing: bool) -> Option<DiskPhase> {
        let saved = self.saved.lock().clone();
        if !saved.is_protected {
            return None;
        }
        let (is_running, has_trouble) = {
            let state = self.state.lock();
            (state.progress.is_running, !state.trouble.is_empty())
        };
        if has_trouble || self.tap.is_none() {
            return Some(DiskPhase::SourceError);
        }
        let capture = self.tap.as_ref().and_then(|tap| tap.captured_by());
        let is_tainted = capture.is_some_and(|capture| capture.activity.is_tainted());
        Some(match (saved.is_copied, is_running) {
            (false, _) => DiskPhase::Initial,
            (true, true) => DiskPhase::Resync,
            _ if is_tainted || !is_flowing || capture.is_none() => DiskPhase::ResyncNeeded,
            _ => DiskPhase::Protected,
        })
    }

    /// As the appliance is told every second.
    #[must_use]
    pub fn report(&self, is_flowing: bool) -> Option<DiskReport> {
        let phase = self.phase(is_flowing)?;
        let state = self.state.lock();
        Some(DiskReport {
            disk: self.id,
            phase,
            reason: state.reasons(),
            done_bytes: state.progress.done_bytes,
            total_bytes: state.progress.total_bytes,
        })
    }

    /// As the control socket shows it.
    #[must_use]
    pub fn show(&self, link: String, is_flowing: bool) -> TappedDisk {
        let phase = self.phase(is_flowing);
        let saved = self.saved.lock().clone();
        let size_bytes = self.size_bytes();
        let state = self.state.lock();
        let device = state
            .device
            .as_ref()
            .map(|device| device.path().display().to_string());
        let progress = state.progress;
        TappedDisk {
            name: saved.name,
            disk: self.id,
            source: saved.source,
            device: device.unwrap_or_default(),
            link,
            size_bytes,
            is_protected: saved.is_protected,
            phase,
            reason: state.reasons(),
            done_bytes: progress.done_bytes,
            total_bytes: progress.total_bytes,
            rate_bytes: progress.rate(),
            recheck_read_bytes: progress.recheck_read_bytes,
            recheck_sent_bytes: progress.recheck_sent_bytes,
        }
    }
}
