//! What copies ask of the machine.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use afterimage_blockdev::Lsn;
use afterimage_cache::TagKey;

use super::{Disk, Machine};
use crate::order::Draft;
use crate::pipeline::sealer::Sealers;
use crate::replicate::Begun;
use crate::tap::Capture;

impl Machine {
    /// Sealers for a copying thread.
    pub(crate) fn sealers(&self) -> Sealers {
        Sealers::new(Arc::clone(&self.keys), Arc::clone(&self.entropy))
    }

    /// The key of the content tags.
    pub(crate) fn tag_key(&self) -> Option<TagKey> {
        self.keys.tag()
    }

    /// Says whether the appliance has answered for every protected disk.
    pub(crate) fn has_answers(&self) -> bool {
        self.disks()
            .iter()
            .all(|disk| !disk.saved.lock().is_protected || disk.state.lock().answer.is_some())
    }

    /// The appliance knows best whether it holds a copy.
    pub(crate) fn believe_answers(&self) {
        for disk in self.disks() {
            let state = disk.state.lock();
            let mut saved = disk.saved.lock();
            let Some(answer) = state.answer.as_ref().filter(|_| saved.is_protected) else {
                continue;
            };
            if saved.is_copied && !answer.has_copy {
                tracing::warn!(
                    disk = saved.name,
                    "the appliance holds no copy; one is made"
                );
            }
            saved.is_copied = answer.has_copy;
        }
    }

    /// The batch that was begun with the epoch, once.
    pub(crate) fn take_begun(&self) -> Option<Begun> {
        self.begun.lock().take()
    }

    /// Protected disks that begin to capture with the next batch.
    pub(crate) fn take_waiting_captures(&self) -> Vec<(Arc<Disk>, Arc<Capture>)> {
        core::mem::take(&mut self.waiting_captures.lock())
    }

    /// Disks of a batch that the appliance waits to see ended.
    pub(crate) fn disks_in_open_batch(&self) -> Vec<Arc<Disk>> {
        let mut disks = self.disks();
        disks.retain(|disk| {
            let is_captured = disk
                .tap
                .as_ref()
                .is_some_and(|tap| tap.captured_by().is_some());
            let state = disk.state.lock();
            is_captured
                && state
                    .answer
                    .as_ref()
                    .is_some_and(|answer| answer.is_in_batch)
        });
        disks
    }

    /// Says whether so little is held that records may flow again.
    pub(crate) fn can_flow(&self) -> bool {
        self.store.is_drained() && self.is_streaming() && self.order.has_lsns()
    }

    /// Lets records flow, beginning with this one; returns its LSN.
    pub(crate) fn flow_again(&self, draft: Option<Draft>) -> Option<Lsn> {
        if !self.order.is_flowing() {
            tracing::info!("writes are recorded again");
        }
        let lsn = self.order.begin_flow(draft);
        self.bridge.flows();
        lsn
    }

    /// Tells the appliance the state of the source at once.
    pub(crate) fn report_now(&self) {
        self.is_report_due.store(true, Ordering::Release);
        self.wake.notify_one();
    }

    /// The copy of a disk is whole and acknowledged.
    pub(crate) fn note_copied(&self, disk: &Disk) {
        disk.saved.lock().is_copied = true;
        let mut state = disk.state.lock();
        if let Some(answer) = &mut state.answer {
            answer.has_copy = true;
            answer.is_in_batch = false;
            answer.bulk_done.clear();
        }
        drop(state);
        self.bridge.clear(disk.id);
        self.keeper_bell.ring();
    }

    /// Writes down which copies are whole.
    pub(crate) fn save_copied(&self) {
        if let Err(error) = self.save_disks() {
            tracing::error!(%error, "after a restart the copy may be made again");
        }
    }
}
