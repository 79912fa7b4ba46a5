//! What taps and store tell the machine, from threads that must not wait.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use afterimage_blockdev::DiskId;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::activity::worker::Bell;
use crate::order::Order;
use crate::pipeline::StoreEvents;
use crate::tap::CaptureEvents;

#[derive(Default)]
struct State {
    overflow: String,
    lost: Option<String>,
    unrecorded_bytes: HashMap<DiskId, u64>,
    reasons: HashMap<DiskId, String>,
}

/// See the module's text.
pub(super) struct Bridge {
    wake: Arc<Notify>,
    keeper: Arc<Bell>,
    order: OnceLock<Arc<Order>>,
    state: Mutex<State>,
}

impl Bridge {
    pub(super) fn new(wake: Arc<Notify>, keeper: Arc<Bell>) -> Arc<Self> {
        Arc::new(Self {
            wake,
            keeper,
            order: OnceLock::new(),
            state: Mutex::default(),
        })
    }

    /// Tells it whose flow it may stop.
    pub(super) fn set_order(&self, order: Arc<Order>) {
        let _already_set = self.order.set(order);
    }

    /// Why frames were lost, once.
    pub(super) fn take_lost(&self) -> Option<String> {
        self.state.lock().lost.take()
    }

    /// Why nothing flows, and the bytes of a disk that were not recorded since; empty when all is
    /// well.
    pub(super) fn reason_of(&self, disk: DiskId, is_flowing: bool) -> String {
        let state = self.state.lock();
        let mut reason = state.reasons.get(&disk).cloned().unwrap_or_default();
        if !is_flowing {
            let bytes = state.unrecorded_bytes.get(&disk).copied().unwrap_or(0);
            let overflow = match state.overflow.as_str() {
                "" => "no record can be made",
                overflow => overflow,
            };
            reason = format!("{overflow}; about {bytes} bytes wait for a resync");
        }
        reason
    }

    /// A resync of the disk has ended.
    pub(super) fn clear(&self, disk: DiskId) {
        let mut state = self.state.lock();
        state.reasons.remove(&disk);
        state.unrecorded_bytes.remove(&disk);
    }

    /// Records flow again.
    pub(super) fn flows(&self) {
        self.state.lock().overflow.clear();
    }

    /// Stops the flow, with a reason for people.
    pub(super) fn stop_flow(&self, reason: &str) {
        let Some(order) = self.order.get() else {
            return;
        };
        if order.stop_flow() {
            tracing::error!(
                reason,
                "writes are no longer recorded, only marked for a resync"
            );
            reason.clone_into(&mut self.state.lock().overflow);
        }
        self.keeper.ring();
    }
}

impl StoreEvents for Bridge {
    fn available(&self) {
        self.wake.notify_one();
    }

    fn full(&self, reason: &str) {
        self.stop_flow(reason);
    }

    fn failed(&self, reason: &str, is_lost: bool) {
        tracing::error!(reason, is_lost, "the spool has failed; memory has to do");
        if is_lost {
            self.state.lock().lost = Some(format!("the spool has failed: {reason}"));
            self.stop_flow("the spool has failed");
        }
        self.keeper.ring();
    }
}

impl CaptureEvents for Bridge {
    fn resync_needed(&self, disk: DiskId, reason: &str) {
        tracing::error!(%disk, reason, "a resync is needed");
        self.state.lock().reasons.insert(disk, reason.to_owned());
        self.keeper.ring();
    }

    fn not_recorded(&self, disk: DiskId, bytes: u64) {
        let mut state = self.state.lock();
        let sum = state.unrecorded_bytes.entry(disk).or_default();
        *sum = sum.saturating_add(bytes);
    }
}
