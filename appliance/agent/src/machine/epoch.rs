//! Epochs: how one begins, and how one is given up.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use afterimage_blockdev::{BatchId, Epoch, Lsn};
use afterimage_cache::{BatchKind, FrameIdentity, RecordKind};
use parking_lot::MutexGuard;

use super::{Disk, Machine};
use crate::error::AgentError;
use crate::order::Draft;
use crate::replicate::Begun;
use crate::state::counters::Counters;

/// Disks that one batch can name: its note holds 16 bytes each.
const BATCH_DISKS_MAX: usize = 4096;

impl Machine {
    /// Changes the counters, durably.
    pub(super) fn change_counters<T>(
        &self,
        change: impl FnOnce(&mut Counters) -> T,
    ) -> Result<T, AgentError> {
        let mut guard = self.counters.lock();
        let (file, counters) = &mut *guard;
        let mut changed = *counters;
        let result = change(&mut changed);
        file.save(&changed)?;
        *counters = changed;
        Ok(result)
    }

    /// Names a batch that never was.
    pub(crate) fn next_batch(&self) -> Result<BatchId, AgentError> {
        self.change_counters(|counters| {
            counters.batch = BatchId(counters.batch.0.wrapping_add(1).max(1));
            counters.batch
        })
    }

    /// Protected disks whose replica is not known to be equal.
    pub(crate) fn disks_in_need(&self) -> Vec<Arc<Disk>> {
        let mut disks = self.disks();
        disks.retain(|disk| {
            let capture = disk.tap.as_ref().and_then(|tap| tap.captured_by());
            capture.is_some_and(|capture| {
                capture.activity.is_tainted() || !disk.saved.lock().is_copied
            })
        });
        disks.truncate(BATCH_DISKS_MAX);
        disks
    }

    /// The record that begins a batch of these disks.
    pub(crate) fn batch_begin(&self, batch: BatchId, disks: &[Arc<Disk>]) -> Draft {
        let is_initial = disks.iter().any(|disk| !disk.saved.lock().is_copied);
        let kind = if is_initial {
            BatchKind::Initial
        } else {
            BatchKind::Resync
        };
        let note = disks.iter().flat_map(|disk| disk.id.0).collect();
        Draft::note(RecordKind::BatchBegin(kind), batch, 0, note)
    }

    /// Keeps the present epoch from being given up while the guard lives; says its generation.
    pub(crate) fn hold_epoch(&self) -> (MutexGuard<'_, ()>, u64) {
        let guard = self.restarting.lock();
        (guard, self.generation())
    }

    /// Lets the present epoch begin: its first record, and a batch of the disks in need.
    pub(super) fn begin_epoch(&self) -> Result<(), AgentError> {
        let first = self.order.next();
        self.epoch_first.store(first.0, Ordering::Release);
        let mut drafts = vec![Draft::note(
            RecordKind::EpochStart,
            BatchId(0),
            0,
            Vec::new(),
        )];
        let disks = self.disks_in_need();
        let batch = if disks.is_empty() {
            None
        } else {
            Some(self.next_batch()?)
        };
        drafts.extend(batch.map(|batch| self.batch_begin(batch, &disks)));
        let last = self.order.begin_flow(drafts);
        self.bridge.flows();
        let ids = disks.iter().map(|disk| disk.id).collect();
        *self.begun.lock() = batch.zip(last).map(|(batch, lsn)| Begun {
            generation: self.generation(),
            batch,
            lsn,
            disks: ids,
        });
        self.outbox.nudge();
        Ok(())
    }

    /// Gives the present epoch up and begins the next one, above `above`. What was not acknowledged
    /// is dropped; it lies within marked regions, and all of those are compared.
    pub(super) fn restart_epoch(&self, reason: &str, above: Lsn) -> Result<(), AgentError> {
        tracing::error!(
            reason,
            "a new epoch begins, and marked regions are compared"
        );
        let _restarting = self.restarting.lock();
        self.order.stop_flow();
        let reserve = self.config.state.reserve_lsns;
        let next = self.order.next().max(above.next());
        let (epoch, reserved) = self.change_counters(|counters| {
            counters.epoch = Epoch(counters.epoch.0 + 1);
            counters.reserved = Lsn(counters.reserved.0.max(next.0 + reserve));
            (counters.epoch, counters.reserved)
        })?;
        let identity = FrameIdentity {
            epoch,
            ..self.order.identity()
        };
        self.generation.fetch_add(1, Ordering::AcqRel);
        let dropped_bytes = self.order.restart(identity, next);
        self.order.reserve(reserved);
        self.store.restart(epoch, self.acknowledged());
        self.admission.leave(dropped_bytes);
        self.outbox.clear(self.generation());
        for disk in self.disks() {
            if let Some(capture) = disk.tap.as_ref().and_then(|tap| tap.captured_by()) {
                capture.activity.taint_marked();
            }
        }
        {
            let mut link = self.link.lock();
            link.is_outdated = true;
            link.is_streaming = false;
            link.has_sent = false;
        }
        self.begin_epoch()?;
        self.record_growth();
        self.wake.notify_one();
        Ok(())
    }
}
